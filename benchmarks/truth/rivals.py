"""Diagnostics that people use today, one number per block, to be compared with peelwise on the same cases.

Every score is turned so that LARGER means more suspicious; each function says which sign that is, and why. Nothing here
looks at the report part of a probe. weightwatcher has to be installed beside peelwise (see `spectra`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectra
from peelwise.model.architectures import find_blocks
from peelwise.model.guard import untouched
from peelwise.model.layers import Block
from peelwise.model.runner import Runner
from peelwise.model.trace import Trace
from peelwise.probe.probe import Probe
from peelwise.references.map_search import direct_map
from peelwise.references.maps import map_of_subset
from peelwise.tasks.peel.run import run_peel
from peelwise.tasks.peel.settings import PeelSettings

MOST_BLOCKS_TO_PEEL = 8
_ENDLESS = 3600.0  # seconds: a peel that the clock ended would depend on how busy the machine is


@dataclass(frozen=True)
class Given:
    """What a diagnostic may look at. Parts that several need are computed once.

    Args:
        model: with ``model.model.layers`` or any blocks that peelwise finds, float32, in eval mode.
        probe: fit and select may be used, report never.
        initial: the same architecture at its initialisation, where that is known.
    """

    model: nn.Module
    probe: Probe
    initial: nn.Module | None = None

    @cached_property
    def runner(self) -> Runner:
        """The model, to be run block by block."""
        return Runner(self.model, find_blocks(self.model))

    @cached_property
    def fit(self) -> Trace:
        """Stations of the fit tokens."""
        return self.runner.trace(self.probe.fit)

    @cached_property
    def select(self) -> Trace:
        """Stations and losses of the select tokens."""
        return self.runner.trace(self.probe.select)

    @cached_property
    def gradients(self) -> list[float]:
        """Norm of each block's mean gradient."""
        return gradient_norms(self)

    @cached_property
    def spectra(self) -> spectra.Spectra | None:
        """What weightwatcher found."""
        return spectra.spectra_of(self.model)


Score = Callable[[Given], list[float] | None]


@dataclass(frozen=True)
class Rival:
    """One diagnostic.

    Attributes:
        name: as it stands in tables.
        needs: what it has to be given.
        score: one number per block, larger = more suspicious; ``None`` where it does not apply.
        reads: the parts of `Given` that it uses; their time is counted as its own.
        extra: what is worth keeping beside the scores.
    """

    name: str
    needs: str
    score: Score
    reads: tuple[str, ...] = ()
    extra: Callable[[Given], dict[str, Any]] | None = None


def measure(given: Given, *, without: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Return ``{rival: {"scores": .., "seconds": .., "extra": ..}}``; ``scores`` is ``None`` where one does not apply.

    Seconds are those of a rival run by itself: a part that several share is computed once and counted for each.
    The model is left as it was. Rivals named in ``without`` are left out.
    """
    given = replace(given)  # what was cached may be of weights that have changed since
    paid: dict[str, float] = {}
    found: dict[str, dict[str, Any]] = {}
    with untouched(given.model):
        spectra.installed()  # its import is nobody's time, and draws random numbers
        for rival in (r for r in RIVALS if r.name not in without):
            for part in rival.reads:
                if part not in paid:
                    _, paid[part] = _timed(getattr, given, part)
            scores, own = _timed(rival.score, given)
            found[rival.name] = {"scores": scores, "seconds": own + sum(paid[part] for part in rival.reads)}
            if scores is not None and rival.extra is not None:
                found[rival.name]["extra"] = rival.extra(given)
    return found


def _timed(work: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(*args), time.perf_counter() - start


# -- gradients -----------------------------------------------------------------------------------------


def gradient_norms(given: Given) -> list[float]:
    """Return ``|mean gradient|`` of each block over all its parameters, on the fit tokens, by plain backward passes."""
    split, blocks = given.probe.fit, find_blocks(given.model)
    parameters = [list(block.module.parameters()) for block in blocks]
    every = [p for own in parameters for p in own]
    total = [torch.zeros_like(p) for p in every]
    rows_per_pass = max(1, given.runner.micro_batch_tokens // split.inputs.shape[1])
    with untouched(given.model):
        for parameter in every:
            parameter.requires_grad_(True)
        for rows in torch.split(torch.arange(split.sequences), rows_per_pass):
            # Padding is on the right, so no predicted token sees it.
            logits = given.model(split.inputs[rows], use_cache=False).logits
            losses = F.cross_entropy(logits.flatten(0, 1), split.targets[rows].flatten(), reduction="none")
            loss = (losses * split.weights[rows].flatten()).sum() / split.tokens
            for sum_, gradient in zip(total, torch.autograd.grad(loss, every), strict=True):
                sum_ += gradient
    sums = iter(total)
    return [_norm([next(sums) for _ in own]) for own in parameters]


def gradient_norm(given: Given) -> list[float]:
    """Norm of the mean gradient: LARGE is suspicious, since a block that has settled has none left."""
    return given.gradients


def gradient_to_weight(given: Given) -> list[float]:
    """Gradient norm over weight norm (the inverse of LARS's trust ratio, arXiv:1708.03888): LARGE is suspicious."""
    weights = [_norm(list(block.module.parameters())) for block in given.runner.blocks]
    return [g / max(w, _TINY) for g, w in zip(given.gradients, weights, strict=True)]


# -- spectra -------------------------------------------------------------------------------------------


def weightwatcher(given: Given) -> list[float] | None:
    """Mean power law exponent of a block's spectra (weightwatcher, arXiv:1901.08276): LARGE is called under-trained."""
    return given.spectra.mean_alphas() if given.spectra else None


def weightwatcher_warnings(given: Given) -> list[float] | None:
    """Matrices of a block that weightwatcher calls under- or over-trained: MANY are suspicious."""
    return given.spectra.warned() if given.spectra else None


def _warning_counts(given: Given) -> dict[str, Any]:
    return given.spectra.extra() if given.spectra else {}


# -- distance from initialisation ------------------------------------------------------------------------


def distance(given: Given) -> list[float] | None:
    """Mean over matrices of ``|W - W_0| / |W_0|``: SMALL is suspicious, since the block did not move."""
    return _from_start(given, lambda w, start: -_norm([w - start]) / max(_norm([start]), _TINY))


def rotation(given: Given) -> list[float] | None:
    """Mean over matrices of ``cos(W, W_0)``: LARGE is suspicious, since the block turned little, whatever its size."""
    return _from_start(given, lambda w, start: float((w * start).sum()) / max(_norm([w]) * _norm([start]), _TINY))


def _from_start(given: Given, compare: Callable[[Tensor, Tensor], float]) -> list[float] | None:
    if given.initial is None:
        return None
    pairs = zip(find_blocks(given.model), find_blocks(given.initial), strict=True)
    return [_mean([compare(w, start) for w, start in _matrices(*pair)]) for pair in pairs]


def _matrices(block: Block, start: Block) -> list[tuple[Tensor, Tensor]]:
    pairs = zip(block.linears, start.linears, strict=True)
    return [(one.weight().double(), other.weight().double()) for one, other in pairs]


# -- stations ------------------------------------------------------------------------------------------


@torch.no_grad()
def block_influence(given: Given) -> list[float]:
    """``1 - mean cos(input, output)`` over tokens (arXiv:2403.03853): SMALL is suspicious, the block does nothing.

    That is the one sign in use: a small value marks blocks to prune. A fault that makes a block do too much looks
    healthy to it.
    """
    scores = []
    for block in given.runner.blocks:
        cosines = [F.cosine_similarity(x, y, dim=-1) for x, y in _around(given.fit, block)]
        scores.append(-(1.0 - float(torch.cat(cosines).mean())))
    return scores


@torch.no_grad()
def cka(given: Given) -> list[float]:
    """Linear CKA of a block's input and output (arXiv:1905.00414): LARGE is suspicious, the block adds nothing new.

    The input of a block is the output of its neighbour, so this is the similarity of neighbours too.
    """
    scores = []
    for block in given.runner.blocks:
        x, y = zip(*_around(given.fit, block), strict=True)
        scores.append(linear_cka(torch.cat(x), torch.cat(y)))
    return scores


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Return ``|Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F)`` of centred features (arXiv:1905.00414).

    Args:
        x: ``[n, d]``.
        y: ``[n, e]``, the same tokens.
    """
    x, y = x - x.mean(0), y - y.mean(0)
    return float((y.T @ x).square().sum() / max(_norm([x.T @ x]) * _norm([y.T @ y]), _TINY))


@torch.no_grad()
def removal(given: Given) -> list[float]:
    """Loss increase on select without the block (arXiv:1605.06431): SMALL or negative is suspicious, it is no help."""
    trace, scores = given.select, []
    for block in given.runner.blocks:
        losses = given.runner.losses_without(trace, block.index)
        scores.append(trace.mean - float(losses.sum() / trace.tokens.sum()))
    return scores


def _around(trace: Trace, block: Block) -> list[tuple[Tensor, Tensor]]:
    """Return per batch the predicted tokens' states before and after a block, ``[n, d]`` each, float64."""
    i = block.index
    return [(b.stations[i][b.weights].double(), b.stations[i + 1][b.weights].double()) for b in trace.batches]


# -- peel maps -----------------------------------------------------------------------------------------


def peel_maps(given: Given) -> list[float] | None:
    """What passing a block's station by as a target wins (arXiv:2605.02853): LARGE is suspicious, the station misleads.

    One map passes by each block, one is direct; all get a fitted head. The score is the loss on select of the best map
    that has the station less that of the map that has not. No map passes the last station by, so the last block gets
    the lowest score: peel maps cannot blame it. References get one round of closed-form solves, to save half the time.
    """
    layers = len(given.runner.blocks)
    if not 3 <= layers <= MOST_BLOCKS_TO_PEEL:
        return None
    hidden = set(range(1, layers))
    maps = (direct_map(layers), *(map_of_subset(hidden - {station}, layers) for station in sorted(hidden)))
    settings = PeelSettings(_ENDLESS, maps, rounds=1, steps=False, controls=False)
    # A peel shows its numbers on report; here that is select once more.
    record = run_peel(given.model, replace(given.probe, report=given.probe.select), settings).record
    lost = {block.index: block.lost_nats for block in record.blocks}
    scores = [-interval.mean for _, interval in sorted(lost.items()) if interval is not None]
    return [*scores, min(scores)]


# -- small helpers -------------------------------------------------------------------------------------

_TINY = 1e-300


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


RIVALS: tuple[Rival, ...] = (
    Rival("gradient norm", "data", gradient_norm, ("gradients",)),
    Rival("gradient-to-weight ratio", "data", gradient_to_weight, ("gradients",)),
    Rival("weightwatcher", "weights", weightwatcher, ("spectra",)),
    Rival("weightwatcher warnings", "weights", weightwatcher_warnings, ("spectra",), _warning_counts),
    Rival("distance from initialisation", "weights, initial weights", distance),
    Rival("rotation from initialisation", "weights, initial weights", rotation),
    Rival("block influence", "data", block_influence, ("fit",)),
    Rival("removal", "data", removal, ("select",)),
    Rival("CKA", "data", cka, ("fit",)),
    Rival("peel maps", "data", peel_maps),
)
