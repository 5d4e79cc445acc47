"""A demonstration: a model as it is, and a copy of it with one damaged block, audited one after the other.

The damage turns the sign of what a block writes: no singular value and no norm of a weight changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from peelwise.api.audit import AuditReport, audit
from peelwise.api.inputs import open_both
from peelwise.errors import OptionError
from peelwise.model.architectures import find_blocks
from peelwise.model.parts import parts_of
from peelwise.probe.options import ProbeOptions
from peelwise.records.audit import AuditRecord
from peelwise.records.folder import check_free, write_text_file
from peelwise.show.audit.beside import Entry, render_html
from peelwise.show.audit.words import conclusion
from peelwise.show.words import VERDICTS

if TYPE_CHECKING:
    from peelwise.engine.clock import Watcher

    Working = Callable[[str], AbstractContextManager[Watcher | None]]

PAGE, HEALTHY, DAMAGED = "index.html", "as-it-is", "damaged"


@dataclass(frozen=True)
class Plan:
    """What is audited.

    Attributes:
        block: index of the block that is damaged in the copy.
        tokens: of the reference prose.
        budget: wall time of each of the two audits.
        model: folder, file or name.
    """

    block: int
    tokens: int
    budget: str
    model: str = "smollm2"


def damaged(model: nn.Module, block: int) -> nn.Module:
    """Return a copy of a model in which what one block adds to the stream has its sign turned.

    Raises:
        OptionError: If there is no such block, or nothing that writes to the stream was recognised in it.
    """
    twin = copy.deepcopy(model)
    blocks = find_blocks(twin)
    if not 0 <= block < len(blocks):
        raise OptionError(f"block: expected 0 to {len(blocks) - 1}, got {block}.")
    branches = parts_of(blocks[block]).branches
    if not branches:
        raise OptionError(f"{blocks[block].name}: no layer that writes to the residual stream was recognised.")
    with torch.no_grad():
        for branch in branches:
            for parameter in branch.writer.module.parameters():
                parameter.neg_()
    return twin


def demonstrate(
    out: Path, plan: Plan, *, force: bool, say: Callable[[str], None], working: Working | None = None
) -> Path:
    """Audit both, save both certificates and a page that shows them below each other; return the page's file.

    Args:
        out: folder of both certificates and the page.
        plan: what is audited.
        force: replace what an earlier demonstration left there.
        say: prints a line.
        working: yields a watcher of the progress of one step, given what is done in it.

    Raises:
        PeelwiseError: If the folder is taken, or the model cannot be opened or audited.
    """
    working = working or _unseen
    check_free(out, force=force, ours=PAGE)
    with working(f"Opening {plan.model} ..."):
        target, probe = open_both(plan.model, ProbeOptions(tokens=plan.tokens))
    twins = {HEALTHY: target.model, DAMAGED: damaged(target.model, plan.block)}
    about = {
        HEALTHY: ("As it is", "The model as it was opened."),
        DAMAGED: (
            f"Block {plan.block} damaged",
            f"A copy in which what block {plan.block} writes has its sign turned. No norm and no singular value "
            "of its weights changes.",
        ),
    }
    entries = []
    for folder, model in twins.items():
        title, what = about[folder]
        say(f"{title}:")
        name = target.name if folder == HEALTHY else f"{target.name}, block {plan.block} damaged"
        with working("Checking the model ...") as watcher:
            report = audit(model, probe, budget=plan.budget, name=name, out=out / folder, force=force, progress=watcher)
        say(_summary(report))
        entries.append(Entry(title, what, f"{folder}/report.html", report.record))
    title = f"{target.name}, as it is and with one block damaged"
    page = out / PAGE
    write_text_file(page, render_html(title, _in_short(entries[1].record, plan.block), entries))
    say(f"Both on one page: {page}")
    return page


def _unseen(_: str) -> AbstractContextManager[None]:
    return nullcontext()


def _summary(report: AuditReport) -> str:
    letters = "".join(VERDICTS[block.verdict].letter for block in report.record.blocks)
    return f"  {letters}\n  {conclusion(report.record)}"


def _in_short(record: AuditRecord, block: int) -> str:
    """Say whether the damaged block was found."""
    red = [each.index for each in record.blocks if each.verdict == "red"]
    unlike = [each.block for each in record.check.unlike] if record.check is not None else []
    found = [
        *(["certified under-optimised"] if block in red else []),
        *(["unlike its neighbours"] if block in unlike else []),
    ]
    others = len([index for index in red if index != block])
    beside = f"; {others} other {'block is' if others == 1 else 'blocks are'} red too" if others else ""
    if not found:
        return f"Block {block}, which was damaged in the copy, was not found within the budget{beside}."
    return f"Block {block}, which was damaged in the copy, was found: {' and '.join(found)}{beside}."
