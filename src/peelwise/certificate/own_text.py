"""The witness of a certificate on text that whoever made it did not choose: the check that needs no trust."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peelwise.certificate.base import OwnBlock, OwnText, tolerance_of
from peelwise.certificate.recheck import check_finite
from peelwise.engine.opening import open_report
from peelwise.engine.session import ReportSession
from peelwise.engine.witness import changes_of
from peelwise.errors import CertificateError, ProbeError
from peelwise.evidence.intervals import Paired
from peelwise.evidence.verdict import Evidence, default_margin, judge
from peelwise.model.architectures import find_blocks
from peelwise.model.layers import context_length, vocabulary_size
from peelwise.probe.probe import Probe
from peelwise.probe.split import PARTS
from peelwise.probe.unseen import Unseen, unseen
from peelwise.records.audit import AuditRecord
from peelwise.records.base import Interval, SealedRecord


@dataclass(frozen=True)
class Text:
    """Text to check a certificate on.

    Attributes:
        documents: the text.
        tokenizer: that of the model.
        tokens: upper limit of predicted tokens.
        source: what it is called.
        in_distribution: whether the model was trained on text of this kind, in the words of whoever gives it.
        seed: draws the sequences.
    """

    documents: Sequence[str]
    tokenizer: Any
    tokens: int | None
    source: str
    in_distribution: bool = False
    seed: int = 0


def cut_like(text: Text, probe: Probe, model: nn.Module) -> Unseen:
    """Return the sequences of a text, as long as those of a certificate's probe and none of them in it.

    Raises:
        ProbeError: If too few are left, or they do not fit the model.
    """
    known = [row for part in PARTS for row in getattr(probe, part).rows()]
    length = probe.report.ids.shape[1] - 1
    found = unseen(text.documents, text.tokenizer, known, tokens=text.tokens, sequence_length=length, seed=text.seed)
    size, limit = vocabulary_size(model), context_length(model)
    if size is not None and int(found.split.ids.max()) >= size:
        raise ProbeError(
            f"The tokenizer gives id {int(found.split.ids.max())}, the model knows {size}. Use the model's tokenizer."
        )
    if limit is not None and length > limit:
        raise ProbeError(f"The certificate's sequences have {length} tokens, the model's context is {limit}.")
    return found


def own_margin(record: SealedRecord, loss: float, tolerance: float) -> float:
    """Return the smallest gain that counts on another text: what was asked for or the default, above the tolerance."""
    asked = record.settings.get("margin_nats")
    return max(default_margin(loss) if asked is None else record.margin_nats, tolerance)


def audit_on(record: AuditRecord, witness: dict[str, Tensor], probe: Probe, model: nn.Module, text: Text) -> OwnText:
    """Return what the witness of an audit is worth on a text; the model is in the state of `untouched`.

    Raises:
        ProbeError: If the text leaves too few sequences, or does not fit the model.
        CertificateError: If the witness does not fit the model.
        FormatError: If it leaves the format of a low-bit layer.
    """
    found = cut_like(text, probe, model)
    session = open_report(model, find_blocks(model), found.split)
    tolerance, loss = tolerance_of(model), session.report.mean
    margin = own_margin(record, loss, tolerance)
    composed = None
    if record.loss.composed_gain is not None:
        composed = _gain(session, witness, "composed", None)
    evidence = [
        Evidence(frozen=block.frozen)
        if block.recoverable_nats is None
        else Evidence(_gain(session, witness, "alone", block.index))
        for block in record.blocks
    ]
    verdicts = judge(evidence, margin, in_distribution=text.in_distribution)
    blocks = tuple(
        OwnBlock(b.name, b.verdict, v.colour, (b.recoverable_nats, None if e.alone is None else e.alone.interval()))
        for b, v, e in zip(record.blocks, verdicts, evidence, strict=True)
    )
    interval = None if composed is None else composed.interval()
    least = max(record.margin_nats, tolerance), margin
    wrong = not_confirmed(record.loss.composed_gain, interval, blocks, least)
    return OwnText(
        source=text.source,
        sequences=found.split.sequences,
        tokens=found.split.tokens,
        overlapping=found.overlapping,
        loss=loss,
        margin=margin,
        certified=record.loss.composed_gain,
        found=interval,
        blocks=blocks,
        holds=wrong is None,
        reason=wrong or "Nothing that was certified is refuted on text that the witness was not made on.",
    )


def _gain(session: ReportSession, witness: dict[str, Tensor], kind: str, block: int | None) -> Paired:
    blocks = session.runner.blocks if block is None else (session.runner.blocks[block],)
    changes = changes_of(witness, kind, blocks)
    losses = session.losses(session.report, changes, block or 0)
    check_finite(kind if block is None else blocks[0].name, session.report.losses, losses)
    return session.gain(session.report.losses, losses)


def gain_refused(
    what: str, certified: Interval | None, found: Interval | None, least: tuple[float, float]
) -> str | None:
    """Say that a gain which was certified is not found on another text, or ``None``.

    Args:
        what: gains.
        certified: on the author's text. Only what is above its least gain with the whole interval was claimed.
        found: on the other text.
        least: gain that counts on the author's text and on the other one, nats per token.
    """
    if certified is None or found is None or certified.low <= least[0] or found.low > least[1]:
        return None
    return (
        f"On your text the {what} {found.mean:.3f} ({found.low:.3f} to {found.high:.3f}): "
        f"not more than {least[1]:.4g}, which is the least that counts there."
    )


def not_confirmed(
    certified: Interval | None, found: Interval | None, blocks: Sequence[OwnBlock], least: tuple[float, float]
) -> str | None:
    """Say what of a certificate is not so on another text, or ``None``. What is merely undecided there is not said.

    A certificate that claims no gain holds where nothing gains: that is what it says.
    """
    wrong = gain_refused("witness gains", certified, found, least)
    if wrong:
        return wrong
    refuted = [block.name for block in blocks if block.certified == "red" and block.found == "green"]
    if refuted:
        return f"{', '.join(refuted)}: red was certified, green is found on your text."
    hidden = [block.name for block in blocks if _hidden(*block.gains, least)]
    if hidden:
        return (
            f"{', '.join(hidden)}: no gain above the margin was certified, and its own weights gain more on your text."
        )
    claimed = any(block.certified in ("red", "yellow") for block in blocks)
    by_blocks_alone = certified is None or found is None or certified.low <= least[0]
    if by_blocks_alone and claimed and not any(block.found in ("red", "yellow") for block in blocks):
        return (
            "The composed witness claims no gain above the margin, and no block's own weights are shown to gain that "
            "much on your text."
        )
    return None


def _hidden(certified: Interval | None, found: Interval | None, least: tuple[float, float]) -> bool:
    """Whether a block was certified to gain less than the margin, and gains more on another text."""
    return certified is not None and found is not None and certified.high < least[0] and found.low > least[1]


def require_witness(witness: dict[str, Tensor]) -> None:
    """Refuse a certificate without any replacement weights: there is nothing to try on a text.

    Raises:
        CertificateError: If it is one.
    """
    if not witness:
        raise CertificateError("The certificate holds no witness, so there is nothing to try on a text.")
