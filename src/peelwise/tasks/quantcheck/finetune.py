"""How much of a fine-tune a quantised model keeps: the model before it, the fine-tuned one, and its quantised copy.

    gained    L(base) - L(fine-tuned)          kept    L(base) - L(quantised)          survives    kept / gained

on report, paired by sequence; the share has Fieller's interval. Then each block alone gets the quantised weights inside
the fine-tuned model, and what that costs says where the fine-tune is lost.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from peelwise.engine.clock import Clock
from peelwise.engine.session import ReportSession, change_to
from peelwise.evidence.intervals import ratio
from peelwise.model.layers import LinearLayer
from peelwise.records.base import ModelRecord
from peelwise.records.quantcheck import FineTunedBlock, FineTuneRecord, LayerCheck


def survival(
    fine_tuned: ReportSession,
    base_losses: Tensor,
    quantised_losses: Tensor,
    held: Mapping[LinearLayer, Tensor],
    layers: tuple[LayerCheck, ...],
    base: ModelRecord,
    clock: Clock,
) -> FineTuneRecord:
    """Return what survives, and what each block alone costs.

    Args:
        fine_tuned: the parent on report.
        base_losses: of the model before the fine-tune on report ``[sequences]``, nats.
        quantised_losses: likewise.
        held: the quantised weights of the parent's layers ``[d_out, d_in]``.
        layers: with the sizes of the fine-tune and of the error in each layer's outputs.
        base: for the record.
        clock: no block is begun after its budget.
    """
    report = fine_tuned.report
    gained = fine_tuned.gain(base_losses, report.losses)
    kept = fine_tuned.gain(base_losses, quantised_losses)
    share = None
    if gained.interval().low > 0:
        left, whole = ((base_losses - losses).cpu().numpy() for losses in (quantised_losses, report.losses))
        share = ratio(left, whole, report.tokens.cpu().numpy())
    blocks = []
    for block in fine_tuned.runner.blocks:
        changes = {m: change_to(m, held[m].to(m.weight().device)) for m in block.linears if m in held}
        if not changes or clock.elapsed > clock.budget:
            continue
        lost = fine_tuned.gain(fine_tuned.losses(report, changes, block.index), report.losses)
        own = [layer for layer in layers if layer.block == block.index and layer.fine_tune]
        noise = [layer.error / layer.fine_tune for layer in own if layer.fine_tune]
        blocks.append(
            FineTunedBlock(index=block.index, lost=lost.interval(), noise=sum(noise) / len(noise) if noise else None)
        )
    return FineTuneRecord(
        base=base,
        loss=report.mean_of(base_losses),
        gained=gained.interval(),
        kept=kept.interval(),
        survives=None if share is None else share.mean,
        low=None if share is None else share.low,
        high=None if share is None else share.high,
        blocks=tuple(blocks),
    )
