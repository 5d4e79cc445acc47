"""`check`: which blocks of a model are unlike their neighbours, as people use it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peelwise.api.inputs import Target, open_both, open_target
from peelwise.api.report import Certified, check_out, frame
from peelwise.certificate.check import factor_tensors
from peelwise.distributed.processes import together
from peelwise.distributed.sharding import unwrap_ddp
from peelwise.engine.clock import Watcher
from peelwise.errors import OptionError
from peelwise.model.offloaded import measures_offloaded
from peelwise.model.options import OpenOptions
from peelwise.probe.options import ProbeOptions
from peelwise.probe.probe import Probe
from peelwise.records.check import BlockCheck, CheckRecord, MatrixCheck
from peelwise.tasks.check.run import run_check
from peelwise.tasks.check.settings import CHECK_LENGTH, CHECK_TOKENS, CheckSettings

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class CheckReport(Certified):
    """What a check found.

    Attributes:
        record: every number, as in ``certificate.json``.
        probe: the token sequences that were used; ``None`` without text.
    """

    record: CheckRecord
    probe: Probe | None = field(default=None, repr=False)

    def to_frame(self, rows: Literal["blocks", "matrices"] = "blocks") -> pd.DataFrame:
        """Return the signals as a data frame.

        Args:
            rows: ``"blocks"``: one row per block, a column ``signal.part`` (``signal`` where it is of the whole block)
                beside score and ablation. ``"matrices"``: one row per linear layer, a column per signal.

        Raises:
            OptionError: If ``rows`` is neither.
            MissingExtraError: Without pandas.
        """
        if rows == "blocks":
            return frame([_block_row(block) for block in self.record.blocks], "index")
        if rows == "matrices":
            return frame([_matrix_row(matrix) for matrix in self.record.matrices], "name")
        raise OptionError(f'rows: expected "blocks" or "matrices", got {rows!r}.')

    def _proof(self) -> tuple[dict[str, Tensor], Probe | None]:
        return factor_tensors(self.record), self.probe


@measures_offloaded
def check(
    model: nn.Module | str | Path,
    probe: Probe | ProbeOptions | None = None,
    settings: CheckSettings | None = None,
    *,
    text: bool = True,
    opening: OpenOptions | None = None,
    out: str | Path | None = None,
    force: bool = False,
    progress: Watcher | None = None,
) -> CheckReport:
    """Tell which blocks are unlike their neighbours, by which signals, and what one factor on a part of them gains.

    Where ``torch.distributed`` has several processes, call it in all of them, as `peelwise.audit`.

    Args:
        model: a module (left exactly as it was), or what ``peelwise check`` takes: a folder, a GGUF file.
        probe: the probe (of text or of batches), or the text to draw it from with the model's tokenizer; default:
            2,048 tokens of the reference prose. A module without a tokenizer and a probe is checked by its weights
            alone.
        settings: signals and limits.
        text: false for the signals of weights alone, without any text.
        opening: how a folder or file is opened; `ShardedOptions` spread it over the processes.
        out: folder to save the report in; refused before the work if it is taken.
        force: replace an earlier check there.
        progress: called with a `Progress` at every step.

    Returns:
        The report; print it, show it in a notebook, or ``save`` it as a certificate with its page.

    Raises:
        PeelwiseError: With one or two lines on what is wrong and what to do.

    Example:
        >>> report = peelwise.check("path/to/model")
        >>> [each.block for each in report.record.unlike]
        [15]
    """
    if probe is not None and not text:
        raise OptionError("A probe and text=False exclude each other. Leave one of them out.")
    with together() as processes:
        with processes.agreeing():
            if out is not None and processes.is_main:
                check_out(out, force=force)
            target, drawn = _opened(model, probe, opening or OpenOptions(), text=text)
            module = target.model if processes.count == 1 else unwrap_ddp(target.model)
        record = run_check(
            module,
            drawn,
            settings or CheckSettings(),
            name=target.name,
            source=target.source,
            watcher=progress if processes.is_main else None,
            processes=processes,
        )
        report = CheckReport(record, drawn)
        with processes.agreeing():
            if out is not None and processes.is_main:
                report.save(out, force=force)
    return report


def _opened(
    model: nn.Module | str | Path, probe: Probe | ProbeOptions | None, opening: OpenOptions, *, text: bool
) -> tuple[Target, Probe | None]:
    """Return the module to measure and the probe, ``None`` where weights are all there is to look at."""
    given_as_module = not isinstance(model, str | Path)
    if not text or (given_as_module and probe is None and opening.tokenizer is None):
        return open_target(model, opening), None
    return open_both(model, probe or ProbeOptions(tokens=CHECK_TOKENS, sequence_length=CHECK_LENGTH), opening)


def _block_row(block: BlockCheck) -> dict[str, Any]:
    ablation = block.ablation.model_dump() if block.ablation is not None else {}
    intervals = {f"ablation_{end}": ablation.get(end) for end in ("mean", "low", "high")}
    return {"index": block.index, "name": block.name, "score": block.score} | intervals | block.signals


def _matrix_row(matrix: MatrixCheck) -> dict[str, Any]:
    return {"name": matrix.name, "block": matrix.block, "part": matrix.part} | matrix.signals
