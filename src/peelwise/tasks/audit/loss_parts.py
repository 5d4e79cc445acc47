"""What is said of matrices, and of low-bit ones beside it: the loss in three parts, and each map's own error."""

from __future__ import annotations

from peelwise.engine.proposals import BlockProposals
from peelwise.engine.refine import Refined
from peelwise.engine.session import Session
from peelwise.model.layers import Block, LinearLayer
from peelwise.records.audit import MatrixRecord
from peelwise.records.base import Interval, SplitRecord
from peelwise.references.coded import local_split
from peelwise.tasks.audit.findings import Findings


def split_of(session: Session, inside: Refined | None, dense: Refined | None) -> tuple[SplitRecord, Interval] | None:
    """Return the loss on report in three parts that add up to it, and the interval of the quantisation gap.

    A matrix of a format is a dense matrix too: where select likes the witness inside the formats better, it stands for
    both, and the price is 0. The choice is made on select, so on report a part may be a little below 0.

    Args:
        session: the model's own losses.
        inside: the witness inside the formats, evaluated on report.
        dense: the one without them.
    """
    if inside is None or dense is None or inside.report_losses is None or dense.report_losses is None:
        return None
    lowest = dense if dense.select_loss < inside.select_loss else inside
    assert lowest.report_losses is not None
    price = session.gain(inside.report_losses, lowest.report_losses).interval()
    irreducible, achieved = map(session.report.mean_of, (lowest.report_losses, inside.report_losses))
    parts = SplitRecord(
        irreducible=irreducible,
        price_of_precision=achieved - irreducible,
        left_on_the_table=session.report.mean - achieved,
    )
    return parts, price


def matrices_of(block: Block, proposals: BlockProposals | None) -> tuple[MatrixRecord, ...]:
    """Return how a block's explained gradient energy is shared among its matrices; nothing without proposals."""
    if proposals is None:
        return ()
    whitened = proposals.changes["input-whitened"]
    total = sum(p.energy for p in whitened.values())
    return tuple(
        MatrixRecord(
            name=linear.name.removeprefix(f"{block.name}."),
            share=whitened[linear].energy / total if total > 0 else 0.0,
            damping=whitened[linear].damping,
            step_weight=whitened[linear].weight,
        )
        for linear in block.linears
        if linear in whitened
    )


def coded_matrices(session: Session, findings: Findings, block: Block) -> tuple[MatrixRecord, ...]:
    """Return `matrices_of` with format, flipped codes and own error of every low-bit map."""
    proposals = findings.proposals.get(block.index)
    plain = matrices_of(block, proposals)
    linears = [m for m in block.linears if proposals is not None and m in proposals.changes["input-whitened"]]
    return tuple(_coded(session, findings, block, m, record) for m, record in zip(linears, plain, strict=True))


def _coded(
    session: Session, findings: Findings, block: Block, linear: LinearLayer, record: MatrixRecord
) -> MatrixRecord:
    held = session.held.get(linear)
    if held is None:
        return record
    form, codes = held.format, held.encoded.codes
    alone, dense = findings.alone.get(block.index), findings.dense_alone.get(block.index)
    flipped = split = None
    if alone is not None:
        new = alone.codes.get(linear, held.encoded).codes
        flipped = float((new != codes).sum()) / codes.numel()
    local = findings.proposals[block.index].local.get(linear)
    if dense is not None and linear in dense.changes and local is not None:
        change = dense.changes[linear]
        parts = local_split(local, change[:, :-1] if linear.has_bias else change, form, held.encoded)
        split = SplitRecord(**parts._asdict())
    bits = form.bits(codes.shape[0], codes.shape[1], held.encoded.support) / codes.numel()
    extra = {"format": form.name, "bits_per_weight": bits, "flipped": flipped, "split": split}
    return record.model_copy(update=extra)
