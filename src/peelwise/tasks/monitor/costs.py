"""What each kind of measurement takes: passes over the probe, and solves whose number does not depend on its size.

Until one was made, seconds follow from those of a pass forward: solves are products of matrices too. In a wide model
and on few tokens they are most of a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence

from peelwise.engine.proposals import operations
from peelwise.model.layers import Block
from peelwise.probe.probe import Probe
from peelwise.records.run import MeasurementKind
from peelwise.tasks.monitor.sizes import PASSES, SOLVES, tokens_of

# Passes forward over the probe; of slopes over its report part alone.
_PASSES: dict[MeasurementKind, float] = {"slopes": 3.5, "ranking": 5.0, "alone": PASSES, "joint": 12.0}
# Times that all layers are solved for, or as long as that takes.
_SOLVES: dict[MeasurementKind, float] = {"slopes": 0.0, "ranking": 1.0, "alone": SOLVES, "joint": 1.0}


def solve_tokens(blocks: Sequence[Block], parameters: int) -> float:
    """Return over how many tokens a pass forward takes as long as the solves of all layers.

    ``sum over layers operations / (2 parameters)``: as if no two layers shared their input, at most a tenth too many.

    Args:
        blocks: the blocks.
        parameters: of the whole model, each of which a token is multiplied by once.
    """
    shapes = [linear.weight().shape for block in blocks for linear in block.linears]
    return sum(operations(int(d_in), [int(d_out)]) for d_out, d_in in shapes) / (2 * max(parameters, 1))


class Costs:
    """Seconds of measurements of one run, as expected and then as they were.

    Args:
        per_token: seconds of a pass forward.
        solves: `solve_tokens` of the model.

    Attributes:
        per_token: the same, by the measurements made since.
    """

    def __init__(self, per_token: float, solves: float) -> None:
        self.per_token, self.solves = per_token, solves
        self._took: dict[MeasurementKind, tuple[float, int]] = {}  # seconds, and tokens that went forward

    def of(self, kind: MeasurementKind, probe: Probe) -> float:
        """Return what a measurement is expected to take: as the last of its kind did, and more for more tokens."""
        if kind not in self._took:
            return self.expected(kind, _tokens(kind, probe))
        seconds, tokens = self._took[kind]
        return max(seconds + self.per_token * _PASSES[kind] * (_tokens(kind, probe) - tokens), 0.0)

    def expected(self, kind: MeasurementKind, tokens: int) -> float:
        """Return what a measurement takes that sends so many tokens forward."""
        return self.per_token * (_PASSES[kind] * tokens + _SOLVES[kind] * self.solves)

    def took(self, kind: MeasurementKind, probe: Probe, seconds: float, *, failed: bool = False) -> None:
        """Note what a measurement took."""
        tokens = _tokens(kind, probe)
        self._took[kind] = seconds, tokens
        expected = self.expected(kind, tokens)
        if kind != "slopes" and not failed and expected > 0:
            self.per_token *= seconds / expected


def _tokens(kind: MeasurementKind, probe: Probe) -> int:
    return probe.report.tokens if kind == "slopes" else tokens_of(probe)
