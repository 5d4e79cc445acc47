"""One backward sweep over the blocks: from gradients at the top to proposals for every linear map.

Only one block's sums and one micro-batch of its activations are alive at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from peelwise.errors import IllConditionedWarning, ModelError, UnsupportedModelError
from peelwise.model.layers import Block, LinearMap
from peelwise.model.runner import Batch, Runner, Trace
from peelwise.references.whitened import InputWhitened, Proposal, two_sided
from peelwise.stats.gram import CrossSum, GramSum, Moments, widened, with_ones
from peelwise.stats.linalg import Spectrum

Direction = Literal["input-whitened", "two-sided"]
DIRECTIONS: tuple[Direction, ...] = ("input-whitened", "two-sided")
Targets = Callable[[Batch, int], Tensor]


@dataclass(frozen=True)
class BlockProposals:
    """What one sweep proposes for one block, and the free statistics that rank it.

    Attributes:
        changes: per direction and map, the calibrated proposal.
        energy: gradient energy explained by the inputs in sample, summed over maps.
        held_out_energy: what of the input-whitened proposal holds on select, summed over maps.
        gradient_norm: Frobenius norm of the mean gradient of all maps.
    """

    index: int
    changes: dict[Direction, dict[LinearMap, Proposal]]
    energy: float
    held_out_energy: float
    gradient_norm: float


def sweep(
    runner: Runner,
    fit: Trace,
    select: Trace,
    *,
    directions: Sequence[Direction] = DIRECTIONS,
    only: Collection[int] | None = None,
    targets: Targets | None = None,
    after_block: Callable[[int], None] = lambda done: None,
) -> dict[int, BlockProposals]:
    """Differentiate the loss down to the lowest block asked for, and make its proposals on the way.

    Args:
        runner: the model; what is spliced into it is where the loss is linearised.
        fit: tokens that make the directions, with stations of the same (spliced) model.
        select: tokens that calibrate them, likewise.
        directions: which of the two directions to make.
        only: indices of the blocks wanted; ``None`` for all.
        targets: other targets for the fit tokens (null control).
        after_block: called with the number of blocks done.
    """
    wanted = set(range(len(runner.blocks))) if only is None else set(only)
    with_F = "two-sided" in directions
    above = runner.tail_gradients(fit, targets), runner.tail_gradients(select)
    found = {}
    for done, block in enumerate(reversed(runner.blocks), start=1):
        if block.index < min(wanted):
            break
        keep = block.index in wanted
        fit_moments, down = block_moments(runner, block, fit, above[0], keep=keep, with_F=with_F)
        select_moments, down_select = block_moments(runner, block, select, above[1], keep=keep, with_F=with_F)
        above = down, down_select
        if keep:
            found[block.index] = _proposals(block, fit_moments, select_moments, directions)
        after_block(done)
    return found


def block_moments(
    runner: Runner, block: Block, trace: Trace, above: list[Tensor], *, keep: bool, with_F: bool
) -> tuple[dict[LinearMap, Moments], list[Tensor]]:
    """Pass gradients through one block, adding up the moments of its maps over all micro-batches."""
    S: dict[LinearMap, GramSum] = {}
    C: dict[LinearMap, CrossSum] = {}
    F: dict[LinearMap, GramSum] = {}
    groups: dict[LinearMap, LinearMap] = {}
    below = []
    for batch, gradient in zip(trace.batches, above, strict=True):
        down, capture, grads = runner.block_gradients(block, batch, gradient)
        below.append(down)
        if not keep:
            continue
        groups.update({linear: capture.groups[linear] for linear in grads})
        rows = {first: _rows(capture.inputs[first], batch, first) for first in set(groups.values())}
        for first, x in rows.items():
            S.setdefault(first, GramSum()).update(x)
        for linear, g in grads.items():
            g = _rows(g, batch, linear, ones=False)
            C.setdefault(linear, CrossSum()).update(g, rows[groups[linear]])
            if with_F:
                F.setdefault(linear, GramSum()).update(g)
    for linear, total in C.items():
        if not bool(total.mean().isfinite().all()):
            dtype = str(linear.weight().dtype).removeprefix("torch.")
            raise ModelError(f"The gradients of {linear.name} overflow in {dtype}. Try --dtype float32.")
    means = {first: total.mean() for first, total in S.items()}
    moments = {
        linear: Moments(C[linear].n, means[groups[linear]], C[linear].mean(), F[linear].mean() if with_F else None)
        for linear in C
    }
    return moments, below


def _rows(x: Tensor, batch: Batch, linear: LinearMap, *, ones: bool = True) -> Tensor:
    """Return the rows of predicted tokens ``[n, d]``, with a column of ones if the map has a bias."""
    if x.shape[:-1] != batch.weights.shape:
        x_rows = x.reshape(-1, x.shape[-1])
        if x_rows.shape[0] != batch.weights.numel():
            raise UnsupportedModelError(
                f"Not yet: {linear.name} sees {tuple(x.shape)} instead of one row per token (mixture of experts?)."
            )
        x = x_rows.view(*batch.weights.shape, x.shape[-1])
    rows = widened(x.detach()[batch.weights])
    return with_ones(rows) if ones and linear.has_bias else rows


def _proposals(
    block: Block,
    fit: dict[LinearMap, Moments],
    select: dict[LinearMap, Moments],
    directions: Sequence[Direction],
) -> BlockProposals:
    energy, whitened, spectra = 0.0, {}, {}
    for linear, moments in fit.items():
        # Maps that share an input share the very tensor S, hence its decomposition.
        if id(moments.S) not in spectra:
            spectra[id(moments.S)] = InputWhitened(moments.S, select[linear].S)
            _warn_of_rank(linear, moments, spectra[id(moments.S)].spectrum)
        reference = spectra[id(moments.S)]
        energy += reference.energy(moments.C)
        whitened[linear] = reference.propose(moments.C, select[linear].C)
    changes: dict[Direction, dict[LinearMap, Proposal]] = {"input-whitened": whitened}
    if "two-sided" in directions:
        changes["two-sided"] = {m: two_sided(fit[m], select[m], whitened[m], name=m.name) for m in fit}
    return BlockProposals(
        block.index,
        changes,
        energy=energy,
        held_out_energy=sum(p.energy for p in whitened.values()),
        gradient_norm=sum(float(m.C.square().sum()) for m in fit.values()) ** 0.5,
    )


def _warn_of_rank(linear: LinearMap, moments: Moments, spectrum: Spectrum) -> None:
    """Warn where tokens are too few; inputs that lack directions by nature (behind a norm) are no reason to."""
    d = moments.S.shape[0]
    if moments.n < d:
        warnings.warn(
            f"{linear.name}: {moments.n} fit tokens for {d} inputs make its [{d}, {d}] sum rank deficient (rank "
            f"{spectrum.rank()}). Damping keeps the result valid; more fit tokens would sharpen it.",
            IllConditionedWarning,
            stacklevel=2,
        )
