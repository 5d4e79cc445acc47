"""One backward sweep over the blocks: from gradients at the top to proposals for every linear map.

Only one block's sums and one micro-batch of its activations are alive at a time; of a model whose weights stay in files
those of some of its layers, for which the block is run several times.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from peelwise.engine.fading import FadingSums
from peelwise.engine.proposals import DIRECTIONS, BlockProposals, Direction, Solves
from peelwise.errors import ModelError, UnsupportedModelError
from peelwise.model.capture import Call
from peelwise.model.handed import Gradient
from peelwise.model.layers import Block, LinearLayer
from peelwise.model.runner import Runner
from peelwise.model.trace import Batch, Trace, batch_first
from peelwise.records.options import MOST_SUMS
from peelwise.stats.gram import CrossSum, GramSum, Moments, all_reduce, widened, with_ones

Targets = Callable[[Batch, int], Tensor]
_FLOAT64 = 8
_Total = TypeVar("_Total", GramSum, CrossSum)


def sweep(
    runner: Runner,
    fit: Trace,
    select: Trace,
    *,
    directions: Sequence[Direction] = DIRECTIONS,
    only: Collection[int] | None = None,
    targets: Sequence[Targets | None] = (None,),
    after_block: Callable[[int], None] = lambda done: None,
    keep_going: Callable[[], bool] = lambda: True,
    kept: FadingSums | None = None,
) -> list[dict[int, BlockProposals]]:
    """Differentiate the loss down to the lowest block asked for, and make its proposals on the way.

    Args:
        runner: the model; what is spliced into it is where the loss is linearised.
        fit: tokens that make the directions, with stations of the same (spliced) model.
        select: tokens that calibrate them, likewise.
        directions: which of the two directions to make.
        only: indices of the blocks wanted; ``None`` for all that have layers to ask about.
        targets: what the fit tokens are to predict, one set of proposals for each: ``None`` for the next token,
            or other targets for a null control. All of them share the inputs' sums and decompositions.
        after_block: called with the number of blocks done.
        keep_going: asked before each block; the blocks below the one where it says no get no proposals.
        kept: sums of earlier measurements, which those of the fit tokens are added to.

    Returns:
        For each of ``targets``, block index -> proposals.
    """
    wanted = {block.index for block in runner.blocks if block.linears} if only is None else set(only)
    with_F = "two-sided" in directions
    above = [runner.tail_gradients(fit, each) for each in targets]
    above_select = [runner.tail_gradients(select)]
    found: list[dict[int, BlockProposals]] = [{} for _ in targets]
    solves = Solves(runner.processes, directions, runner.spill)
    for done, block in enumerate(reversed(runner.blocks), start=1):
        if block.index < min(wanted) or not keep_going():
            break
        keep = block.index in wanted
        parts = sums_in_parts(runner, block, len(targets), with_F) if keep else [block.linears]
        above_fit, above_own = above, above_select
        for place, linears in enumerate(parts, start=1):
            moments_of = partial(block_moments, runner, block, keep=keep, with_F=with_F, linears=linears)
            moments, above = moments_of(fit, above_fit)
            # Solves take as much memory again.
            moments = _on_disk(runner, moments) if len(parts) > 1 else moments
            select_moments, above_select = moments_of(select, above_own)
            select_moments = _on_disk(runner, select_moments) if len(parts) > 1 else select_moments
            if keep:
                moments = moments if kept is None else [kept.joined(each) for each in moments]
                with runner.whole(block):
                    solves.ask(block, moments, select_moments[0], more=place < len(parts))
            del moments, select_moments  # before the next ones are added up
        if solves.enough:
            _keep(solves.made(), found)
        after_block(done)
    _keep(solves.made(), found)
    return found


def gradient_norms(runner: Runner, trace: Trace) -> dict[int, float]:
    """Return per block the Frobenius norm of the mean gradient of its linear layers, and nothing else of a sweep.

    Args:
        runner: the model.
        trace: tokens, with its stations.
    """
    above = [runner.tail_gradients(trace)]
    found = {}
    for block in reversed(runner.blocks):
        (moments,), above = block_moments(runner, block, trace, above, keep=True, with_F=False)
        if moments:
            found[block.index] = sum(float(each.C.square().sum()) for each in moments.values()) ** 0.5
    return found


def _keep(made: Sequence[Sequence[BlockProposals]], found: Sequence[dict[int, BlockProposals]]) -> None:
    """Enter what was made for blocks, one for each set of targets."""
    for of_targets in made:
        for proposals, into in zip(of_targets, found, strict=True):
            if proposals.signals:  # else none of its layers has a gradient
                into[proposals.index] = proposals


def sums_in_parts(runner: Runner, block: Block, targets: int, with_F: bool) -> list[Sequence[LinearLayer]]:
    """Return the layers of a block whose sums are there together: all, or where memory is short as many as fit.

    Experts stay together: what each is given is told beside the others.
    """
    if runner.spill is None or runner.processes.count > 1:
        return [block.linears]
    parts: list[list[LinearLayer]] = [[]]
    held = 0
    for linear in block.linears:
        d_out, d_in = linear.shape
        size = _FLOAT64 * (2 * d_in**2 + (targets + 1) * (d_out * d_in + with_F * d_out**2))
        if parts[-1] and held + size > MOST_SUMS and not (linear.is_expert and parts[-1][-1].is_expert):
            parts.append([])
            held = 0
        parts[-1].append(linear)
        held += size
    return list(parts)


def _on_disk(runner: Runner, moments: Sequence[dict[LinearLayer, Moments]]) -> list[dict[LinearLayer, Moments]]:
    """Return moments that are kept where the model's weights are; those that shared a tensor share it there too."""
    there: dict[int, Tensor] = {}

    def kept(tensor: Tensor) -> Tensor:
        if id(tensor) not in there:
            there[id(tensor)] = runner.kept(tensor)
        return there[id(tensor)]

    return [
        {
            m: Moments(each.n, kept(each.S), kept(each.C), None if each.F is None else kept(each.F))
            for m, each in of.items()
        }
        for of in moments
    ]


def block_moments(
    runner: Runner,
    block: Block,
    trace: Trace,
    above: Sequence[list[Gradient]],
    *,
    keep: bool,
    with_F: bool,
    linears: Sequence[LinearLayer] | None = None,
) -> tuple[list[dict[LinearLayer, Moments]], list[list[Gradient]]]:
    """Pass gradients through one block, adding up the moments of its linear layers over all micro-batches.

    Args:
        runner: the model.
        block: the block.
        trace: tokens and stations.
        above: for each set of targets, the gradients behind the block, per micro-batch.
        keep: whether the moments are wanted, or only the gradients below.
        with_F: whether to add up ``F``.
        linears: whose moments; ``None`` for all layers of the block.

    Returns:
        For each set of targets the moments of every layer, which share ``S``, and the gradients before the block.
    """
    S: dict[LinearLayer, GramSum] = {}
    C: list[dict[LinearLayer, CrossSum]] = [{} for _ in above]
    F: list[dict[LinearLayer, GramSum]] = [{} for _ in above]
    groups: dict[LinearLayer, LinearLayer] = {}
    asked = set(block.linears if linears is None else linears)
    if keep and runner.processes.count > 1:
        _expect_experts(block, S, C, F if with_F else ())
    below: list[list[Gradient]] = [[] for _ in above]
    for batch, *gradients in zip(trace.batches, *above, strict=True):
        capture, results = runner.block_gradients(block, batch, gradients)
        for (down, _), into in zip(results, below, strict=True):
            into.append(down)
        if not keep:
            continue
        here = {linear: capture.groups[linear] for linear in results[0][1] if linear in asked}
        for linear, first in here.items():
            if groups.setdefault(linear, first) is not first:
                raise UnsupportedModelError(f"Not yet: {linear.name} shares its input with other layers now and then.")
        rows = {
            first: [token_rows(call.x, call, batch, first) for call in capture.calls[first]]
            for first in dict.fromkeys(here.values())
        }
        for first, inputs in rows.items():
            for x in inputs:
                S.setdefault(first, GramSum()).update(x)
        for (_, grads), C_sums, F_sums in zip(results, C, F, strict=True):
            for linear, first in here.items():
                for call, g, x in zip(capture.calls[linear], grads[linear], rows[first], strict=True):
                    g = token_rows(g, call, batch, linear, ones=False)
                    C_sums.setdefault(linear, CrossSum()).update(g, x)
                    if with_F:
                        F_sums.setdefault(linear, GramSum()).update(g)
    if keep and runner.processes.count > 1 and any(linear.is_expert for linear in block.linears):
        groups = _groups_of_all(runner, block, groups)
    runner.work.add(runner.shares[block.index], trace.predicted, 1 + 2 * len(above))
    cross = (total for sums in C for total in sums.values())
    all_reduce([*S.values(), *cross, *(total for sums in F for total in sums.values())], runner.processes)
    tokens = trace.predicted
    means = {first: total.mean(tokens) for first, total in _emptied(S) if total.n}
    moments = [
        {
            linear: Moments(
                total.n,
                means[groups[linear]],
                _finite_mean(total, linear, tokens),
                F_sums.pop(linear).mean() if with_F else None,
            )
            for linear, total in _emptied(C_sums)
            if total.n
        }
        for C_sums, F_sums in zip(C, F, strict=True)
    ]
    return moments, below


def _emptied(sums: dict[LinearLayer, _Total]) -> Iterator[tuple[LinearLayer, _Total]]:
    """Yield sums and forget each once its mean was made, so that both are there of one layer at a time."""
    for linear in list(sums):
        yield linear, sums.pop(linear)


def _expect_experts(
    block: Block,
    S: dict[LinearLayer, GramSum],
    C: Sequence[dict[LinearLayer, CrossSum]],
    F: Sequence[dict[LinearLayer, GramSum]],
) -> None:
    """Begin the sums of all experts, in the same order in every process: an expert is given tokens in some only."""
    for linear in block.linears:
        if not linear.is_expert:
            continue
        d_out, d_in = linear.shape
        parameter = linear.parameter
        assert isinstance(parameter, Tensor)
        none = torch.empty(0, d_in, dtype=parameter.dtype, device=parameter.device)
        x, g = widened(none), widened(none.new_empty(0, d_out))
        x = with_ones(x) if linear.has_bias else x
        S.setdefault(linear, GramSum()).update(x)
        for C_sums in C:
            C_sums.setdefault(linear, CrossSum()).update(g, x)
        for F_sums in F:
            F_sums.setdefault(linear, GramSum()).update(g)


def _groups_of_all(
    runner: Runner, block: Block, groups: dict[LinearLayer, LinearLayer]
) -> dict[LinearLayer, LinearLayer]:
    """Return which layer's input every layer shares, also of experts that were given tokens in other processes only."""
    places = {linear: place for place, linear in enumerate(block.linears)}
    own = {places[linear]: places[first] for linear, first in groups.items()}
    of_all = {place: first for each in runner.processes.exchange(own) for place, first in each.items()}
    return {block.linears[place]: block.linears[first] for place, first in sorted(of_all.items())}


def _finite_mean(total: CrossSum, linear: LinearLayer, tokens: float) -> Tensor:
    mean = total.mean(tokens)
    if not bool(mean.isfinite().all()):
        holder = linear.parameter if isinstance(linear.parameter, Tensor) else linear.weight()
        dtype = str(holder.dtype).removeprefix("torch.")
        raise ModelError(f"The gradients of {linear.name} overflow in {dtype}. Try --dtype float32.")
    return mean


def token_rows(x: Tensor, call: Call, batch: Batch, linear: LinearLayer, *, ones: bool = True) -> Tensor:
    """Return the rows of tokens that were read ``[n, d]``, with a column of ones if the map has a bias.

    Args:
        x: input or output of the layer, or a gradient there, ``[..., d]``.
        call: the run that it belongs to.
        batch: the micro-batch.
        linear: the layer.
        ones: whether a column of ones is wanted.

    Raises:
        UnsupportedModelError: If some tokens are padding and it cannot be told which rows are theirs.
    """
    rows = widened(_predicted(x.detach(), call.rows, batch.read, linear))
    return with_ones(rows) if ones and linear.has_bias else rows


def _predicted(x: Tensor, rows: Tensor | None, weights: Tensor, linear: LinearLayer) -> Tensor:
    x = x if rows is not None else batch_first(x, weights)
    flat = x.reshape(-1, x.shape[-1])
    if rows is not None:
        return flat[weights.flatten()[rows]]
    if x.dim() > 2 and x.shape[:2] == weights.shape:
        return x[weights].reshape(-1, x.shape[-1])  # also several rows per token, such as one for each head
    if len(flat) == weights.numel():
        return flat[weights.flatten()]
    if not bool(weights.all()):
        raise UnsupportedModelError(
            f"Not yet: {linear.name} sees {tuple(x.shape)} instead of one row per token, and some tokens are padding "
            "that cannot be told from the others. Use a probe whose sequences are all full."
        )
    return flat
