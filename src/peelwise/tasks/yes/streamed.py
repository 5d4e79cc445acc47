"""The default YES bounds: streamed sums, shared prefixes, a beam, and three disjoint parts of the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from peelwise.references.least_squares import Ridge, choose, shaped
from peelwise.references.maps import MapPlan, StationMap, beam, best_by_size, subset_of_map
from peelwise.stats.gram import RegressionSum, RegressionSums
from peelwise.tasks.yes.chain import Chain
from peelwise.tasks.yes.head import applied, fit_softmax_head
from peelwise.tasks.yes.samples import FIT, REPORT, SELECT, Samples

# Sums of the designs of one level may take this much; more designs are served in several passes.
_SUMS_BYTES = 512 * 2**20
_HEADS_PER_SIZE = 2

Losses = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class StreamOptions:
    """How the reference layers are fitted and which maps are followed."""

    dampings: tuple[float, ...]
    beam_width: int | None  # None: every map
    preactivation: bool = True


@dataclass
class Found:
    """What a streamed run found: per map the error on select, and the weights of every stack."""

    select: dict[StationMap, float] = field(default_factory=dict)
    weights: dict[StationMap, Tensor] = field(default_factory=dict)  # prefix -> its last layer
    visited: int = 0


@dataclass(frozen=True)
class PairedMeans:
    """Mean losses of the network and of each candidate, and the moments of their paired difference."""

    n: int
    loss: float
    bounds: tuple[float, ...]
    gap_mean: tuple[float, ...]  # candidate - network
    gap_deviation: tuple[float, ...]  # standard deviation of the same over samples

    def first(self, size: int) -> PairedMeans:
        """Return the means of the first ``size`` candidates only."""
        return replace(
            self,
            bounds=self.bounds[:size],
            gap_mean=self.gap_mean[:size],
            gap_deviation=self.gap_deviation[:size],
        )


class StreamedStacks:
    """Stacks of references for a chain, fitted level by level; each level is one pass over the samples.

    Level ``l`` holds one design per live prefix of length ``l - 1``. Its sums over the fit part give the next
    layer for every target that may follow, its sums over the select part choose the damping.

    Args:
        chain: the network, only read.
        samples: split samples.
        plan: which maps to follow.
        options: dampings, beam, targets.
    """

    def __init__(self, chain: Chain, samples: Samples, plan: MapPlan, options: StreamOptions) -> None:
        self._chain, self._samples, self._plan, self._options = chain, samples, plan, options
        self._found = Found()

    def fit(self) -> list[tuple[float, StationMap]]:
        """Fit all stacks; return per ``k`` the best ``(select value, map)`` of at most ``k`` stations."""
        live: list[StationMap] = [()]
        with torch.no_grad():
            for layer in range(1, len(self._chain) + 1):
                live = self._level(layer, live)
            if self._samples.loss == "cross_entropy":
                self._fit_heads()
        return best_by_size(self._found.select, len(self._chain))

    @property
    def maps_visited(self) -> int:
        """Number of complete maps that were fitted and compared on select."""
        return self._found.visited

    def output(self, stations: StationMap) -> Callable[[Tensor], Tensor]:
        """Return the function that the stack of a complete map computes, ``x [b, d_0] -> [b, m]``."""
        return lambda x: applied(self._found.weights[stations], self._from_inputs(stations[:-1], x))

    def _level(self, layer: int, live: Sequence[StationMap]) -> list[StationMap]:
        children: list[tuple[StationMap, StationMap]] = []
        scores: dict[StationMap, float] = {}
        for group in self._groups(live):
            for prefix, (fit, select, columns) in self._sums(group).items():
                scores[prefix] = self._extend(layer, prefix, fit, select, columns)
                children += [(prefix, (*prefix, t)) for t in self._plan.targets(prefix)]
        kept = set(live)
        width = self._options.beam_width
        if width is not None and len(live) > width:
            kept = set(beam(scores, width, len(self._chain)))
        if layer == len(self._chain):
            self._found.visited = len(children)
            return []
        for parent, child in children:
            if parent not in kept:
                del self._found.weights[child]
        return [child for parent, child in children if parent in kept]

    def _extend(
        self,
        layer: int,
        prefix: StationMap,
        fit: RegressionSums,
        select: RegressionSums,
        columns: dict[int, slice],
    ) -> float:
        """Fit every layer that may follow ``prefix``; return the select error of a readout to ``Y``."""
        here, last = self._chain.layers[layer - 1], len(self._chain)
        ridge = Ridge(fit, bias=here.has_bias)
        score = float("inf")
        for target, pick in columns.items():
            part = fit.columns(pick.start, pick.stop)
            error, weight, _ = choose(ridge, part, select.columns(pick.start, pick.stop), self._options.dampings)
            if target == last:
                score = error
            if layer < last and target in self._plan.targets(prefix):
                self._found.weights[(*prefix, target)] = shaped(weight, fit, here.module.out_features)
            elif layer == last:
                self._found.weights[(*prefix, target)] = weight
                self._found.select[(*prefix, target)] = error
        return score

    def _sums(
        self, designs: Sequence[StationMap]
    ) -> dict[StationMap, tuple[RegressionSums, RegressionSums, dict[int, slice]]]:
        """Pass over the samples once and return each design's fit sums, select sums and target columns."""
        plans = {p: self._columns(p) for p in designs}
        sums: dict[StationMap, tuple[RegressionSum, RegressionSum]] = {}
        for x, y, part in self._samples.batches():
            values = self._target_values(x, y)
            cache: dict[StationMap, Tensor] = {(): x}
            rows = {which: part == which for which in (FIT, SELECT)}
            for prefix, columns in plans.items():
                a = self._features(prefix, cache)
                joined = torch.cat([values[t - 1] for t in columns], dim=1)
                if prefix not in sums:
                    sums[prefix] = (RegressionSum(), RegressionSum())
                for which in (FIT, SELECT):
                    sums[prefix][which].update(a[rows[which]], joined[rows[which]])
        return {p: (sums[p][FIT].sums(), sums[p][SELECT].sums(), plans[p]) for p in designs}

    def _target_values(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Return the values to regress to at each station ``1..L``."""
        # The values before the activation are what an affine map should hit: the activation follows anyway.
        which = 0 if self._options.preactivation else 1
        hidden = [pair[which] for pair in self._chain.stations(x)[:-1]]
        return [*hidden, self._samples.regression_targets(y)]

    def _columns(self, prefix: StationMap) -> dict[int, slice]:
        """Return where each target of a design stands in its columns; ``Y`` is always there, for scores."""
        targets = sorted({*self._plan.targets(prefix), len(self._chain)})
        found, start = {}, 0
        for t in targets:
            width = self._chain.widths[t - 1]
            found[t] = slice(start, start + width)
            start += width
        return found

    def _features(self, prefix: StationMap, cache: dict[StationMap, Tensor]) -> Tensor:
        """Return what the stack of ``prefix`` computes; ``cache`` has the inputs at ``()``."""
        if prefix not in cache:
            before = self._features(prefix[:-1], cache)
            layer = self._chain.layers[len(prefix) - 1]
            cache[prefix] = layer.activated(applied(self._found.weights[prefix], before))
        return cache[prefix]

    def _groups(self, live: Sequence[StationMap]) -> Iterable[Sequence[StationMap]]:
        widths = (self._chain.width_in, *self._chain.widths)
        d, total = max(widths), sum(widths)
        size = max(1, _SUMS_BYTES // (2 * 8 * d * (d + total)))
        return (live[i : i + size] for i in range(0, len(live), size))

    def _fit_heads(self) -> None:
        """Replace the squared errors of the most promising leaves by the nats of a softmax head."""
        by_size: dict[int, list[StationMap]] = {}
        for stations in sorted(self._found.select, key=self._found.select.__getitem__):
            by_size.setdefault(len(subset_of_map(stations)), []).append(stations)
        chosen = [m for maps in by_size.values() for m in maps[:_HEADS_PER_SIZE]]
        # Summed again for these few: keeping the sums of every leaf would cost far more memory.
        sums = self._sums([stations[:-1] for stations in chosen])
        nats = {}
        for stations in chosen:
            nats[stations], self._found.weights[stations] = fit_softmax_head(
                self._samples,
                partial(self._from_inputs, stations[:-1]),
                sums[stations[:-1]][0],
                bias=self._chain.layers[-1].has_bias,
            )
        self._found.select = nats

    def _from_inputs(self, prefix: StationMap, x: Tensor) -> Tensor:
        return self._features(prefix, {(): x})


def head_control(chain: Chain, samples: Samples, dampings: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """Return the network with its last layer fitted anew, on fit, damping chosen on select."""

    def features(x: Tensor) -> Tensor:
        return chain.stations(x)[-2][1]

    bias = chain.layers[-1].has_bias
    with torch.no_grad():
        sums = {which: RegressionSum() for which in (FIT, SELECT)}
        for x, y, part in samples.batches():
            a, target = features(x), samples.regression_targets(y)
            for which, total in sums.items():
                total.update(a[part == which], target[part == which])
        fit, select = sums[FIT].sums(), sums[SELECT].sums()
        if samples.loss == "cross_entropy":
            weight = fit_softmax_head(samples, features, fit, bias=bias)[1]
        else:
            weight = choose(Ridge(fit, bias=bias), fit, select, dampings)[1]
    return lambda x: applied(weight, features(x))


def paired_means(
    chain: Chain, samples: Samples, candidates: Sequence[Callable[[Tensor], Tensor]]
) -> tuple[PairedMeans, PairedMeans]:
    """Return losses on fit and on report, in one pass: the network's, the candidates', the differences."""
    size = len(candidates)
    sums = torch.zeros(3, 1 + 3 * size, dtype=torch.float64)  # per part: loss, bounds, gaps, squared gaps
    counts = [0, 0, 0]
    with torch.no_grad():
        for x, y, part in samples.batches():
            own = samples.per_sample_loss(chain.stations(x)[-1][1], y)  # [b]
            bounds = torch.stack([samples.per_sample_loss(c(x), y) for c in candidates])  # [size, b]
            gaps = bounds - own
            terms = torch.cat([own[None], bounds, gaps, gaps.square()]).cpu()  # [1 + 3 size, b]
            for which in (FIT, REPORT):
                rows = (part == which).cpu()
                sums[which] += terms[:, rows].sum(1)
                counts[which] += int(rows.sum())
    fit, report = (_means(sums[w], counts[w], size) for w in (FIT, REPORT))
    return fit, report


def _means(sums: Tensor, n: int, size: int) -> PairedMeans:
    mean = sums / max(n, 1)
    gap, square = mean[1 + size : 1 + 2 * size], mean[1 + 2 * size :]
    deviation = ((square - gap.square()).clamp(min=0) * n / max(n - 1, 1)).sqrt()
    bounds = tuple(mean[1 : 1 + size].tolist())
    return PairedMeans(n, float(mean[0]), bounds, tuple(gap.tolist()), tuple(deviation.tolist()))
