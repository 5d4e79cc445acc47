"""Signals that a sweep gives for nothing more: small functions of what it knows of one linear layer.

A new one is a function here (or anywhere) and a row of `records.signals.SIGNALS` that names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from torch import Tensor

from peelwise.distributed.sharding import is_sharded
from peelwise.model.layers import Block, LinearLayer
from peelwise.records.signals import Kind, OverLayers, Signal, of_kinds
from peelwise.references.whitened import InputWhitened, Proposal
from peelwise.stats.gram import Moments

_OVER_LAYERS: dict[OverLayers, Callable[[Sequence[float]], float]] = {
    "sum": lambda values: float(sum(values)),
    "root of sum": lambda values: float(sum(values)) ** 0.5,
    "mean": lambda values: sum(values) / len(values),
    "largest": max,
}


@dataclass(frozen=True)
class Routed:
    """How many of the fit tokens that a mixture routes go to one expert.

    Attributes:
        share: of all that its parameter's experts were given, from 0 to 1.
        experts: how many share the parameter.
        parameters: how many such parameters the block has, over which a block's value is a mean.
        tokens: that all of its parameter's experts were given.
        per_token: experts that a token is given to; ``None`` where the block has no layer that sees every token.
    """

    share: float
    experts: int
    parameters: int
    tokens: int
    per_token: float | None = None


def routed(block: Block, fit: Mapping[LinearLayer, Moments]) -> dict[LinearLayer, Routed]:
    """Return how a block's tokens were routed, for every expert's matrix that saw any."""
    tokens: dict[int, dict[LinearLayer, int]] = {}
    for linear in block.linears:
        if linear.is_expert:
            tokens.setdefault(id(linear.parameter), {})[linear] = fit[linear].n if linear in fit else 0
    read = max((moments.n for linear, moments in fit.items() if not linear.is_expert), default=0)
    totals = {key: sum(found.values()) for key, found in tokens.items()}
    return {
        linear: Routed(n / totals[key], len(found), len(tokens), totals[key], totals[key] / read if read else None)
        for key, found in tokens.items()
        for linear, n in found.items()
        if n
    }


@dataclass(frozen=True)
class OfWeight:
    """What takes a layer's weight, ``None`` where that is elsewhere: ``|<C, W>|`` and ``|W|_F^2``."""

    slope: float | None = None
    norm: float | None = None


def of_weight(linear: LinearLayer, fit: Moments) -> OfWeight:
    """Return what a layer's weight says together with its sums, while the weight is whole."""
    W = linear.weight()
    if is_sharded(W) or W.is_meta:
        return OfWeight()
    W = W.double()
    slope = abs(float((fit.C[:, : W.shape[1]].double() * W).sum()))
    return OfWeight(slope, float(W.square().sum()))


@dataclass(frozen=True)
class LayerSums:
    """What a sweep knows of one linear layer, alive only until the next one's turn.

    Attributes:
        linear: the layer.
        fit, select: means over tokens: ``C [d_out, d_in]`` of its gradient, ``S [d_in, d_in]`` of its inputs, and
            ``F [d_out, d_out]`` of its outputs' gradients where the two-sided direction is made.
        reference: the decomposition of ``S``.
        rotated, rotated_select: both ``C`` in the eigenbasis of ``S``.
        whitened, two_sided: the calibrated proposals.
        routed: of one expert's matrix, how many tokens it was given.
        of_weight: what takes the weight.
    """

    linear: LinearLayer
    fit: Moments
    select: Moments
    reference: InputWhitened
    rotated: Tensor
    rotated_select: Tensor
    whitened: Proposal
    two_sided: Proposal | None
    routed: Routed | None = None
    of_weight: OfWeight = OfWeight()


def natural_energy(of: LayerSums) -> float | None:
    """Return what of the two-sided proposal holds on select; none where it was not made."""
    return None if of.two_sided is None else of.two_sided.energy


def energy(of: LayerSums) -> float:
    """Return the gradient energy that the inputs explain, in sample."""
    return of.reference.energy(of.rotated)


def held_out_energy(of: LayerSums) -> float:
    """Return what of the input-whitened proposal holds on select."""
    return of.whitened.energy


def cross_energy(of: LayerSums) -> float:
    """Return the energy that fit and select tokens agree on."""
    return of.reference.cross_energy(of.rotated, of.rotated_select)


def gradient_norm(of: LayerSums) -> float:
    """Return the squared Frobenius norm of the mean gradient; a block's norm is the root of the sum."""
    return float(of.fit.C.square().sum())


def layer_slope(of: LayerSums) -> float | None:
    """Return ``|E <g, W x>| = |<C, W>|``: how the loss answers to a scale on the layer's weight (its gain slope).

    Exact, from sums that the sweep has: nats per unit of log scale. At an optimum it vanishes.
    """
    return of.of_weight.slope


def gradient_agreement(of: LayerSums) -> float | None:
    """Return ``<C, C_s> / (|C| |C_s|)`` of the mean gradients on fit and on select, from -1 to 1.

    Near 1 the gradient is signal, near 0 what is left of it is noise of the tokens.
    """
    size = float(of.fit.C.norm() * of.select.C.norm())
    return float((of.fit.C * of.select.C).sum()) / size if size > 0 else None


def input_rank(of: LayerSums) -> float | None:
    """Return ``tr(S)^2 / |S|_F^2``: the number of directions that a layer's inputs fill, from 1 to ``d_in``."""
    size = float(of.fit.S.double().square().sum())
    return float(of.fit.S.diagonal().double().sum()) ** 2 / size if size > 0 else None


def weight_norm(of: LayerSums) -> float | None:
    """Return the squared Frobenius norm of the weight; a block's norm is the root of the sum."""
    return of.of_weight.norm


def expert_load(of: LayerSums) -> float | None:
    """Return an expert's tokens over those of an even load; a block's value is that of its busiest expert."""
    return None if of.routed is None else of.routed.share * of.routed.experts


def expert_entropy(of: LayerSums) -> float | None:
    """Return ``-p log p / log E`` of an expert's share ``p``; the sum over ``E`` experts is 1 where all are even."""
    if of.routed is None or of.routed.experts < 2:
        return None
    return -of.routed.share * math.log(of.routed.share) / math.log(of.routed.experts) / of.routed.parameters


def experts_used(of: LayerSums) -> float | None:
    """Return ``1 / E`` for an expert that was given a token; the sum is the share of experts that are not dead."""
    return None if of.routed is None else 1 / of.routed.experts / of.routed.parameters


def expert_spread(of: LayerSums) -> float | None:
    """Return an expert's part ``-p log(p k) / log(E / k)`` of what is left of an even spread; the sum is 1 where even.

    ``p`` is its share of the tokens and ``k`` the number of experts that a token is given to (`evidence.mixtures`).
    """
    routed = of.routed
    if routed is None or routed.per_token is None or not 1 <= routed.per_token < routed.experts:
        return None
    part = -routed.share * math.log(routed.share * routed.per_token)
    return part / math.log(routed.experts / routed.per_token) / routed.parameters


def expert_tokens(of: LayerSums) -> float | None:
    """Return the tokens that an expert would have been given of an even load."""
    return None if of.routed is None else of.routed.tokens / of.routed.experts


def of_layer(kinds: Collection[Kind], layer: Any) -> dict[str, float | None]:
    """Return the signals of some kinds for one linear layer.

    Args:
        kinds: those whose functions take such a ``layer``.
        layer: a `LayerSums`, or what the functions of these kinds are given.
    """
    return {signal.name: _function(signal)(layer) for signal in of_kinds(kinds) if signal.function}


def of_block(kinds: Collection[Kind], layers: Sequence[dict[str, float | None]]) -> dict[str, float]:
    """Return a block's signals from those of its linear layers, `of_layer` each; without those that no layer has."""
    found = {}
    for signal in of_kinds(kinds):
        values = [value for layer in layers if (value := layer.get(signal.name)) is not None]
        if values:
            found[signal.name] = _OVER_LAYERS[signal.over_layers](values)
    return found


def _function(signal: Signal) -> Callable[[Any], float | None]:
    function: Callable[[Any], float | None] = resolve_name(signal.function)
    return function
