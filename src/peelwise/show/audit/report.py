"""One audit as one HTML file: no script, no network, legible on screen and paper, with or without colour."""

from __future__ import annotations

import math

from peelwise.records.audit import AuditRecord, BlockRecord
from peelwise.show.audit import sections
from peelwise.show.audit.low_bit import low_bit
from peelwise.show.audit.words import conclusion, reasons, two_gains
from peelwise.show.check import words as check_words
from peelwise.show.html.markup import chip, esc, paragraph
from peelwise.show.html.page import document, heading
from peelwise.show.words import (
    INTERACTION,
    NOT_IN_BUDGET,
    VERDICTS,
    behind,
    bracket,
    control_sentence,
    counts,
    gain_sentence,
    is_interaction,
    nats,
    solo_gain,
    with_ends,
)

MOST_IN_A_ROW = 32
UNLIKE = '<em class="unlike">▲</em>'
FLAG = '<em class="flag">✕</em>'


def render_html(record: AuditRecord) -> str:
    """Return the report of an audit as one self-contained HTML document.

    Args:
        record: What the audit found; parts that were not measured are named as such.

    Returns:
        The document, the same for the same record and the same version of matplotlib.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    body = "".join(
        (
            _header(record),
            "<main>",
            f'<div id="verdicts">{verdicts(record)}</div>',
            sections.recoverable(record),
            sections.losses(record),
            low_bit(record),
            sections.reading(record),
            sections.inside(record),
            sections.head_and_rounds(record),
            sections.blocks(record),
            sections.verifying(record),
            sections.cost(record),
            sections.origin(record),
            "</main>",
        )
    )
    return document(f"{record.model.name} – peelwise audit", body)


def _header(record: AuditRecord) -> str:
    return f'{heading("audit", record)}<p class="conclusion">{esc(conclusion(record))}</p>{_warnings(record)}</header>'


def _warnings(record: AuditRecord) -> str:
    lines = []
    if not record.complete:
        lines.append(f"Stopped early. What is missing below was {NOT_IN_BUDGET}.")
    controlled = record.loss.shuffled is not None or record.loss.untrained is not None
    if controlled and not record.informative:
        lines.append(control_sentence(record))
    return "".join(paragraph(line, "warning") for line in lines)


def verdicts(record: AuditRecord) -> str:
    """Return the verdict strip and the one number: what a reader in a hurry should see."""
    gain = record.loss.composed_gain
    if gain is None or record.loss.composed is None:
        number = f'<p class="number missing">{NOT_IN_BUDGET}</p><p class="what">the whole witness\'s gain</p>'
    else:
        number = (
            f'<p class="number">{nats(gain.mean, signed=True)} <small>{esc(behind(record))}</small></p>'
            f'<p class="range">95 % interval {bracket(gain)}</p>'
            f'<p class="what">{esc(gain_sentence(record))}</p>'
        )
    tally = "".join(f"<li><strong>{number}</strong>{chip(colour)}</li>" for colour, number in counts(record).items())
    odd = sum(is_interaction(block.unique_nats) for block in record.blocks)
    if odd:
        tally += f'<li><strong>{odd}</strong><span class="chip">{FLAG}<span>{INTERACTION}</span></span></li>'
    unlike = {each.block for each in record.check.unlike} if record.check is not None else set()
    cells = "".join(
        _cell(block, reason, block.index in unlike, behind(record))
        for block, reason in zip(record.blocks, reasons(record), strict=True)
    )
    # Rows of equal length, so that no last row of two blocks hangs below thirty.
    rows = max(1, math.ceil(len(record.blocks) / MOST_IN_A_ROW))
    columns = max(1, math.ceil(len(record.blocks) / rows))
    return (
        '<section class="card"><div class="hero">'
        f'<div>{number}</div><ul class="tally">{tally}</ul></div>'
        f'<ol class="strip" style="--columns:{columns}" aria-label="Verdict of each block, first to last">'
        f"{cells}</ol>{_two_gains(record)}{_check(record)}</section>"
    )


def _two_gains(record: AuditRecord) -> str:
    said = two_gains(record)
    return paragraph(f"The blocks {said}{f', in{behind(record)}' if behind(record) else ''}.", "small") if said else ""


def _check(record: AuditRecord) -> str:
    """What the check that an audit begins with says: a second row under the strip."""
    if record.check is None:
        return ""
    lines = "".join(f"<li>{esc(line)}</li>" for line in check_words.part_sentences(record.check))
    return f'<ul class="said" aria-label="Blocks unlike their neighbours">{lines}</ul>'


def _cell(block: BlockRecord, reason: str, unlike: bool, unit: str) -> str:
    words = VERDICTS[block.verdict]
    odd = is_interaction(block.unique_nats)
    label = (
        f"Block {block.index} ({block.name}): {words.words}. Solo gain {solo_gain(block)}, "
        f"marginal gain {with_ends(block.unique_nats)}{unit}. {reason}"
        f"{f'. {INTERACTION}' if odd else ''}{'. Unlike its neighbours' if unlike else ''}"
    )
    marks = (FLAG if odd else "") + (UNLIKE if unlike else "")
    return (
        f'<li title="{esc(label)}" aria-label="{esc(label)}" data-block="{block.index}">'
        f'<b class="tile {block.verdict}">{words.letter}</b><i>{block.index}</i>{marks}</li>'
    )
