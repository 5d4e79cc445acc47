"""What the loads of a mixture's experts say: a router that has collapsed, experts that are dead. No torch.

A router that gives every token to ``k`` of ``E`` experts can spread them evenly over all, entropy ``log E`` of the
experts' shares, or give the same ``k`` to every token, ``log k``. What is left of the even spread is

    (H - log k) / (log E - log k)        1: even; 0: collapsed

An expert without a token is dead on this text only if an even load would have given it many.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from peelwise.records.run import Event

COLLAPSED = 0.3  # of the even spread: of 8 experts, 2 for each token, three take all
ENOUGH = 30.0  # tokens that an expert gets of an even load
_SIGHTINGS = 3  # measurements in a row


def spread(tokens: Sequence[int], per_token: float) -> float | None:
    """Return what is left of an even spread, 0..1; ``None`` where every expert is given every token, or none is any.

    Args:
        tokens: that each expert was given.
        per_token: experts that each token is routed to.
    """
    total, experts = sum(tokens), len(tokens)
    if not total or not 0 < per_token < experts:
        return None
    entropy = -sum(n / total * math.log(n / total) for n in tokens if n)
    least = math.log(max(per_token, 1.0))
    return max(0.0, (entropy - least) / (math.log(experts) - least))


def has_collapsed(left: float | None) -> bool:
    """Return whether hardly anything is left of an even spread."""
    return left is not None and left < COLLAPSED


def dead(tokens: Sequence[int]) -> list[int]:
    """Return the experts that no token was routed to, where an even load would have given each enough."""
    if sum(tokens) < ENOUGH * len(tokens):
        return []
    return [expert for expert, n in enumerate(tokens) if not n]


@dataclass
class MixtureWatch:
    """Remembers what measurements of a run have shown of its mixtures; `add` returns what is to be said now."""

    _seen: Counter[tuple[str, int]] = field(default_factory=Counter)

    def add(self, step: int, signals: Mapping[str, Sequence[float | None]]) -> list[Event]:
        """Return the events of mixtures that show a fault at the third measurement in a row, each once while it lasts.

        Args:
            step: of the training.
            signals: ``expert_spread``, ``experts_used`` and ``expert_tokens``, one value per block.
        """
        events = []
        columns = (signals.get(name, ()) for name in ("expert_spread", "experts_used", "expert_tokens"))
        for block, (left, used, even) in enumerate(zip(*columns, strict=False)):
            collapsed = has_collapsed(left)
            missing = used is not None and used < 1 and even is not None and even >= ENOUGH and not collapsed
            if self._told_now("router-collapsed", block, seen=collapsed):
                events.append(_collapsed(step, block, left or 0.0))
            if self._told_now("dead-experts", block, seen=missing):
                events.append(_dead(step, block, 1 - (used or 0.0), even or 0.0))
        return events

    def _told_now(self, kind: str, block: int, *, seen: bool) -> bool:
        self._seen[kind, block] = self._seen[kind, block] + 1 if seen else 0
        return self._seen[kind, block] == _SIGHTINGS


def _collapsed(step: int, block: int, left: float) -> Event:
    text = (
        f"block {block}: its router has collapsed: of an even spread over the experts {left:.0%} is left, at three "
        "measurements in a row."
    )
    advice = "Usual causes: no or too little load balancing (auxiliary loss, bias), a router rate that is too large."
    return Event(step, "alert", "router-collapsed", text, block, suggestion=advice)


def _dead(step: int, block: int, share: float, even: float) -> Event:
    text = (
        f"block {block}: {share:.0%} of its experts were given no token of the probe, at three measurements in a row; "
        f"an even load would be {even:.0f} each."
    )
    advice = "Text of another kind may use them; if none does, they are parameters that train no more."
    return Event(step, "warning", "dead-experts", text, block, suggestion=advice)
