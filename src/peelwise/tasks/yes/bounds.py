"""YES bounds of feed-forward networks (arXiv:2410.10984): what layer-wise least squares reaches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.special import stdtrit
from torch import Tensor, nn

from peelwise.errors import OptionError, TooFewSamplesError, UnsupportedModelError
from peelwise.model.layers import check_device, device_of
from peelwise.records.base import Interval
from peelwise.records.yes import Mode, YesControls, YesPart, YesRecord, YesRow, cloud_of
from peelwise.references.least_squares import DAMPINGS
from peelwise.references.maps import MapPlan, StationMap, best_by_size
from peelwise.stats.projection import Projector
from peelwise.tasks.yes.chain import Chain, read_chain
from peelwise.tasks.yes.published import PublishedStacks
from peelwise.tasks.yes.samples import Samples, checked_samples
from peelwise.tasks.yes.streamed import PairedMeans, StreamedStacks, StreamOptions, head_control, paired_means

EXHAUSTIVE_MAPS = 2**10
_PUBLISHED_LAYERS = 16

Maps = Literal["auto"] | Sequence[Sequence[int]]


def yes_bounds(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: Literal["squared", "cross_entropy"] = "squared",
    mode: Mode = "default",
    maps: Maps = "auto",
    damping: float | Sequence[float] | None = None,
    split: tuple[float, float, float] = (0.6, 0.2, 0.2),
    seed: int = 0,
    batch_size: int = 4096,
    beam_width: int = 64,
    regress_to: Literal["preactivation", "activation"] = "preactivation",
    controls: bool = True,
    untrained: nn.Module | None = None,
) -> YesRecord:
    """Return YES-0 and YES-k, ``k = 1..L-1``, of a chain of affine maps and activations at this moment.

    Each map sigma of `peelwise.references.maps` gives a stack of reference layers, fitted one after another:

        A_0 = X,    W_l = argmin |H_sigma(l) - W_l [A_{l-1}, 1]|,    A_l = phi(W_l [A_{l-1}, 1]),    H_L = Y

    YES-k is the smallest loss of stacks with at most ``k`` hidden stations. Nothing of ``net`` is changed.

    Args:
        net: ``nn.Sequential`` or any module whose forward is such a chain.
        x: inputs ``[n, d_0]``, samples as rows.
        y: targets ``[n, m]``, or class labels ``[n]`` (int64) for cross-entropy.
        loss: ``squared`` (summed over outputs, mean over samples) or ``cross_entropy`` (nats per sample).
        mode: ``published``: the paper's algorithm to the digit, in-sample. ``default``: streamed, held out.
        maps: ``auto``: all, or a beam beyond 2^10; or a list such as ``[[3, 3, 3, 4]]`` (YES-0 is added).
        damping: default mode: candidates relative to the mean variance of a feature, chosen on select.
        split: default mode: shares of fit, select and report.
        seed: of the split and the controls.
        batch_size: default mode: samples held at a time.
        beam_width: default mode: prefixes kept per level beyond 2^10 maps.
        regress_to: default mode: a station's values before its activation, or behind it as published.
        controls: whether to run the null controls (about three times the cost).
        untrained: the network at initialisation; without it, a copy with its layers' parameters reset.

    Raises:
        UnsupportedModelError: If ``net`` is no such chain, or not of the published kind in published mode.
        ProbeError: If ``x`` or ``y`` has a wrong shape or type or holds NaN.
        MapError: If a map decreases, points backwards or has the wrong length.
        OptionError: If an option has a value that is not allowed.
        TooFewSamplesError: If ``damping`` is zero and there are fewer fit samples than features.
    """
    if mode not in ("default", "published"):
        raise OptionError(f'mode: expected "default" or "published", got {mode!r}.')
    if regress_to not in ("preactivation", "activation"):
        raise OptionError(f'regress_to: expected "preactivation" or "activation", got {regress_to!r}.')
    check_device(net)
    chain = read_chain(net)
    plan = _plan(chain, maps)
    published = mode == "published"
    samples = checked_samples(
        chain, x, y, loss=loss, split=None if published else split, seed=seed, batch_size=batch_size
    )
    start = (lambda: read_chain(untrained or _at_initialisation(net, seed))) if controls else None
    if published:
        _check_published(chain, samples, damping)
        return _published(chain, samples, plan, start() if start else None)
    options = StreamOptions(
        dampings=_dampings(damping),
        beam_width=_beam(plan, beam_width),
        preactivation=regress_to == "preactivation",
    )
    _check_samples_suffice(chain, samples, options)
    return _default(chain, samples, plan, options, start() if start else None)


class YesMonitor:
    """YES bounds during training: call `step` when a row is wanted; the network is only read.

    The running minimum mixes checkpoints, so it stands beside the present bound and not in its place. The
    cloud follows the running minimum in published mode and the present bounds in default mode. The untrained
    control is taken once, when the monitor is made, so make it before training starts.

    Args:
        net: the network in training.
        x: inputs ``[n, d_0]``.
        y: targets.
        options: of `yes_bounds`.

    Attributes:
        rows: one `YesRow` per call of `step`.
        untrained: YES-0..YES-(L-1) of the network as it was when the monitor was made, or ``None``.
    """

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor, *, controls: bool = True, **options: object) -> None:
        self._net, self._x, self._y, self._options = net, x, y, options
        self.rows: list[YesRow] = []
        self.untrained: tuple[float, ...] | None = self._bounds().bounds if controls else None

    def step(self, step: int) -> YesRow:
        """Return and keep the row of this moment."""
        found = self._bounds()
        present = dict(enumerate(found.bounds))
        before = {0: self.rows[-1].yes_0, **self.rows[-1].running} if self.rows else present
        running = {k: min(v, before[k]) for k, v in present.items()}
        cloud = cloud_of(found.loss, running[0], running[max(running)]) if found.mode == "published" else found.cloud
        floor = min(self.untrained) if self.untrained else None
        row = YesRow(
            step=step,
            loss=found.loss,
            yes_0=found.yes_0,
            present=found.yes_k,
            running={k: v for k, v in running.items() if k > 0},
            cloud=cloud,
            best_map=found.best_map,
            informative={} if floor is None else {k: v < floor for k, v in present.items()},
        )
        self.rows.append(row)
        return row

    def _bounds(self) -> YesRecord:
        return yes_bounds(self._net, self._x, self._y, controls=False, **self._options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Run:
    """One construction in default mode: bounds by ``k`` on fit and report."""

    best: list[tuple[float, StationMap]]
    fit: PairedMeans
    report: PairedMeans
    visited: int
    head: tuple[float, ...] = ()


def _default(chain: Chain, samples: Samples, plan: MapPlan, options: StreamOptions, start: Chain | None) -> YesRecord:
    run = _run(chain, samples, plan, options, with_head=start is not None)
    found = None
    if start is not None:
        untrained = _run(start, samples, plan, options)
        shuffled = _run(chain, samples.with_permuted_targets(), plan, options)
        found = YesControls(untrained.report.bounds, shuffled.report.bounds, run.head[0])
    bounds = run.report.bounds
    gaps = zip(run.report.gap_mean, run.report.gap_deviation, strict=True)
    return YesRecord(
        mode="default",
        objective=samples.loss,
        loss=run.report.loss,
        yes_0=bounds[0],
        yes_k=dict(enumerate(bounds[1:], start=1)),
        cloud=cloud_of(run.report.loss, bounds[0], bounds[-1]),
        best_map={k: m for k, (_, m) in enumerate(run.best)},
        maps_visited=run.visited,
        maps_total=plan.total,
        beam_width=options.beam_width,
        fit=YesPart(run.fit.n, run.fit.loss, run.fit.bounds),
        report=YesPart(run.report.n, run.report.loss, bounds),
        gap={k: _student(mean, deviation, run.report.n) for k, (mean, deviation) in enumerate(gaps)},
        controls=found,
        informative=dict(enumerate(found.informative(bounds))) if found else {},
    )


def _run(chain: Chain, samples: Samples, plan: MapPlan, options: StreamOptions, *, with_head: bool = False) -> _Run:
    stacks = StreamedStacks(chain, samples, plan, options)
    best = stacks.fit()
    candidates = [stacks.output(m) for _, m in best]
    if with_head:
        candidates.append(head_control(chain, samples, options.dampings))
    fit, report = paired_means(chain, samples, candidates)
    size = len(best)
    return _Run(best, fit.first(size), report.first(size), stacks.maps_visited, report.bounds[size:])


def _published(chain: Chain, samples: Samples, plan: MapPlan, start: Chain | None) -> YesRecord:
    x = samples.x.to(samples.device).double().flatten(1)
    y = samples.y.to(samples.device).double()
    with torch.no_grad():
        losses = PublishedStacks(chain, x, y).losses(plan)
        stations = chain.stations(x)
        loss = float((stations[-1][1] - y).square().sum(dim=1).mean())
        best = best_by_size(losses, len(chain))
        bounds = tuple(value for value, _ in best)
        found = None
        if start is not None:
            other = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(samples.seed)).to(y.device)]
            found = YesControls(
                _published_values(start, x, y, plan),
                _published_values(chain, x, other, plan),
                _head_in_sample(chain, stations[-2][1], y),
            )
    return YesRecord(
        mode="published",
        objective="squared",
        loss=loss,
        yes_0=bounds[0],
        yes_k=dict(enumerate(bounds[1:], start=1)),
        cloud=cloud_of(loss, bounds[0], bounds[-1]),
        best_map={k: m for k, (_, m) in enumerate(best)},
        maps_visited=len(losses),
        maps_total=plan.total,
        beam_width=None,
        fit=YesPart(len(y), loss, bounds),
        report=None,
        gap={},
        controls=found,
        informative=dict(enumerate(found.informative(bounds))) if found else {},
    )


def _published_values(chain: Chain, x: Tensor, y: Tensor, plan: MapPlan) -> tuple[float, ...]:
    return tuple(v for v, _ in best_by_size(PublishedStacks(chain, x, y).losses(plan), len(chain)))


def _head_in_sample(chain: Chain, a: Tensor, y: Tensor) -> float:
    if chain.layers[-1].has_bias:
        a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)
    return float((Projector(a).fit(y) - y).square().sum(dim=1).mean())


def _plan(chain: Chain, maps: Maps) -> MapPlan:
    if isinstance(maps, str):
        if maps != "auto":
            raise OptionError(f'maps: expected "auto" or a list of maps, got {maps!r}.')
        return MapPlan(len(chain))
    return MapPlan(len(chain), maps)


def _dampings(damping: float | Sequence[float] | None) -> tuple[float, ...]:
    values = DAMPINGS if damping is None else (damping,) if isinstance(damping, (int, float)) else tuple(damping)
    if not values or not all(0 <= v < float("inf") for v in values):
        raise OptionError(f"damping: expected one or more finite values >= 0, got {damping!r}.")
    return tuple(float(v) for v in values)


def _beam(plan: MapPlan, width: int) -> int | None:
    if width < 1:
        raise OptionError(f"beam_width: expected at least 1, got {width}.")
    return width if plan.total > EXHAUSTIVE_MAPS else None


def _check_published(chain: Chain, samples: Samples, damping: object) -> None:
    remedy = 'Use mode="default" for it.'
    if samples.loss != "squared" or damping is not None:
        raise OptionError(f"mode: the published form has squared error and no damping only. {remedy}")
    *hidden, last = chain.layers
    if len({*chain.widths}) != 1:
        raise UnsupportedModelError(
            f"net: the published form needs hidden widths equal to the output, got {list(chain.widths)}: "
            f"a layer cannot regress to a station of another width. {remedy}"
        )
    probe = torch.linspace(-2, 2, 9, dtype=torch.float64, device=samples.device)
    with torch.no_grad():
        is_relu = all(torch.equal(layer.activated(probe.clone()), probe.clamp(min=0)) for layer in hidden)
    if not is_relu or last.activation is not None:
        names = [layer.activation_name for layer in chain.layers]
        raise UnsupportedModelError(
            f"net: the published form needs ReLU behind every layer but the last, got {names}. {remedy}"
        )
    if len(chain) > _PUBLISHED_LAYERS:
        raise UnsupportedModelError(f"net: {len(chain)} layers have 2^{len(chain) - 1} maps. {remedy}")


def _check_samples_suffice(chain: Chain, samples: Samples, options: StreamOptions) -> None:
    widest = max(chain.width_in, *chain.widths[:-1]) + 1
    n = samples.counts()[0]
    if 0 in options.dampings and n < widest:
        raise TooFewSamplesError(
            f"damping: undamped least squares needs n >= {widest} fit samples (widest layer and bias), "
            f"got n = {n}. Give more samples or use damping > 0."
        )


def _at_initialisation(net: nn.Module, seed: int) -> nn.Module:
    """Return a copy whose layers are initialised anew; neither ``net`` nor the generators are touched.

    It is drawn on the CPU, so that bounds of the same seed are the same on every device.
    """
    fresh = copy.deepcopy(net).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for module in fresh.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    return fresh.to(device_of(net))


def _student(mean: float, deviation: float, n: int) -> Interval:
    """Return the 95 % Student interval of a mean of ``n`` paired differences."""
    error = deviation / n**0.5
    reach = float(stdtrit(n - 1, 0.975)) * error
    return Interval(
        mean=mean, low=mean - reach, high=mean + reach, standard_error=error, sequences=n, method="student-t"
    )
