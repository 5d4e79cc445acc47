"""A block is damaged by noise; one closed-form round of it alone takes back a share of what that costs."""

from __future__ import annotations

from peelwise.engine.refine import Refined
from peelwise.engine.rounds import next_round
from peelwise.engine.session import Session
from peelwise.model.parts import Parts
from peelwise.records.anatomy import Recovery
from peelwise.tasks.anatomy.bend import changer

NOISE = 0.5  # standard deviations of each matrix (arXiv:2603.19348)


def recovery(session: Session, parts: Parts, margin: float, seed: int) -> Recovery:
    """Return what the damage costs, and what of it is left after one round of the block alone.

    The round is that of an audit's solo gain: directions from fit, step on select, both costs on report.
    """
    index, clean = parts.block.index, session.report.losses
    damage = {m: d for m, d in changer("noise", parts, seed)(NOISE).items() if m in set(parts.block.linears)}
    spoilt = session.losses(session.report, damage, index)
    select_loss = session.select.mean_of(session.losses(session.select, damage, index))
    begun = Refined(damage, (), select_loss, spoilt, index)
    better = next_round(session, begun, None, "dense", output_changes={}, block=index)
    mended = spoilt if better is None or better.report_losses is None else better.report_losses
    cost, left = session.gain(spoilt, clean), session.gain(mended, clean)
    share = 1 - left.mean / cost.mean if cost.mean > margin else None
    return Recovery(damage=cost.interval(), left=left.interval(), share=share)
