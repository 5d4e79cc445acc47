"""The published YES algorithm, executed exactly: every map on the same samples, prefixes solved once."""

from __future__ import annotations

import torch
from torch import Tensor

from peelwise.references.maps import MapPlan, StationMap
from peelwise.stats.projection import Projector
from peelwise.tasks.yes.chain import Chain


class PublishedStacks:
    """Losses of all stacks of ``plan`` on the samples that they are fitted to (arXiv:2410.10984).

    ``A_0 = X``; ``A_l`` is the ReLU of the fit of ``[A_{l-1}, 1]`` to ``H_sigma(l)``, the last without. A
    design is factorised once for all targets that may follow it, and stacks with a common prefix share it.
    Memory is ``O(L^2)`` times one ``[n, d]`` matrix.

    Args:
        chain: the network; hidden widths equal the output width.
        x: inputs ``[n, d_0]``, float64.
        y: targets ``[n, d]``, float64.
    """

    def __init__(self, chain: Chain, x: Tensor, y: Tensor) -> None:
        self._chain, self._x, self._y = chain, x, y
        self._root: Projector | None = None
        self._yes_0: float | None = None

    def losses(self, plan: MapPlan) -> dict[StationMap, float]:
        """Return map -> mean over samples of the squared error summed over outputs, at this moment.

        What does not depend on the weights (the inputs' factor and YES-0) is kept for the next moment.
        """
        hidden = [after for _, after in self._chain.stations(self._x)[:-1]]
        joined = torch.cat([*hidden, self._y], dim=1)  # [n, L d]: one product serves all targets of a design
        found: dict[StationMap, float] = {}
        self._visit((), self._x, joined, plan, found)
        return found

    def _visit(
        self, prefix: StationMap, a: Tensor, joined: Tensor, plan: MapPlan, found: dict[StationMap, float]
    ) -> None:
        last, width = len(self._chain), self._y.shape[1]
        layer = len(prefix) + 1
        targets = plan.targets(prefix)
        if prefix and set(prefix) == {last} and self._yes_0 is not None:
            found[(last,) * last] = self._yes_0
            return
        columns = [joined[:, (t - 1) * width : t * width] for t in targets]
        consecutive = targets == tuple(range(targets[0], targets[-1] + 1))
        wanted = joined[:, (targets[0] - 1) * width : targets[-1] * width] if consecutive else torch.cat(columns, 1)
        fitted = self._projector(prefix, a, layer).fit(wanted)  # [n, len(targets) * d]
        for target, z in zip(targets, torch.split(fitted, width, dim=1), strict=True):
            path = (*prefix, target)
            # With nothing to clip, later layers with this target have what they want already: depth is idle.
            while len(path) < last and plan.targets(path) == (target,) and self._is_idle(len(path), z):
                path = (*path, target)
            if len(path) == last:
                found[path] = float((z - self._y).square().sum(dim=1).mean())
                if set(path) == {last}:
                    self._yes_0 = found[path]
            else:
                self._visit(path, z.clamp(min=0), joined, plan, found)

    def _is_idle(self, layer: int, z: Tensor) -> bool:
        """Whether layer ``layer + 1`` maps ``relu(z)`` to ``z`` itself, ``z`` being a fit to its target."""
        here, after = self._chain.layers[layer - 1], self._chain.layers[layer]
        return (here.has_bias or not after.has_bias) and bool(z.min() >= 0)

    def _projector(self, prefix: StationMap, a: Tensor, layer: int) -> Projector:
        if not prefix and self._root is not None:
            return self._root
        if self._chain.layers[layer - 1].has_bias:
            a = torch.cat([a, a.new_ones(a.shape[0], 1)], dim=1)
        projector = Projector(a)
        if not prefix:
            self._root = projector
        return projector
