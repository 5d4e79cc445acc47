"""One backward sweep over the blocks: from gradients at the top to proposals for every linear map.

Only one block's sums and one micro-batch of its activations are alive at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from peelwise.engine.fading import FadingSums
from peelwise.engine.signals import LayerSums, of_block, of_layer, routed
from peelwise.errors import IllConditionedWarning, ModelError, UnsupportedModelError
from peelwise.model.capture import Call
from peelwise.model.layers import Block, LinearLayer
from peelwise.model.runner import Batch, Runner, Trace
from peelwise.records.signals import RANKED_BY, SWEPT
from peelwise.references.coded import LocalProblem
from peelwise.references.whitened import InputWhitened, Proposal, two_sided
from peelwise.stats.gram import CrossSum, GramSum, Moments, all_reduce, widened, with_ones
from peelwise.stats.linalg import Spectrum

PROPOSAL_DTYPE = torch.bfloat16

Direction = Literal["input-whitened", "two-sided"]
DIRECTIONS: tuple[Direction, ...] = ("input-whitened", "two-sided")
Targets = Callable[[Batch, int], Tensor]


@dataclass(frozen=True)
class BlockProposals:
    """What one sweep proposes for one block, and the signals that rank it.

    Attributes:
        changes: per direction and map, the calibrated proposal.
        signals: by name, the signals of the block that a sweep gives (`records.signals.SWEPT`).
        local: per low-bit map, the sums that better codes are found from; as large as the maps themselves.
    """

    index: int
    changes: dict[Direction, dict[LinearLayer, Proposal]]
    signals: dict[str, float]
    local: dict[LinearLayer, LocalProblem] = field(default_factory=dict)

    @property
    def ranking(self) -> float:
        """What ranks blocks before anything is evaluated; where the two-sided direction was not made, the other's."""
        return self.signals.get(RANKED_BY, self.signals["held_out_energy"])


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
    for done, block in enumerate(reversed(runner.blocks), start=1):
        if block.index < min(wanted) or not keep_going():
            break
        keep = block.index in wanted
        moments, above = block_moments(runner, block, fit, above, keep=keep, with_F=with_F)
        select_moments, above_select = block_moments(runner, block, select, above_select, keep=keep, with_F=with_F)
        if keep:
            moments = moments if kept is None else [kept.joined(each) for each in moments]
            made = _agreed(runner, proposals_of(block, moments, select_moments[0], directions))
            for proposals, into in zip(made, found, strict=True):
                if proposals.signals:  # else none of its layers has a gradient
                    into[block.index] = proposals
        after_block(done)
    return found


def block_moments(
    runner: Runner, block: Block, trace: Trace, above: Sequence[list[Tensor]], *, keep: bool, with_F: bool
) -> tuple[list[dict[LinearLayer, Moments]], list[list[Tensor]]]:
    """Pass gradients through one block, adding up the moments of its linear layers over all micro-batches.

    Args:
        runner: the model.
        block: the block.
        trace: tokens and stations.
        above: for each set of targets, the gradients at the block's output, per micro-batch.
        keep: whether the moments are wanted, or only the gradients below.
        with_F: whether to add up ``F``.

    Returns:
        For each set of targets the moments of every layer, which share ``S``, and the gradients at the block's input.
    """
    S: dict[LinearLayer, GramSum] = {}
    C: list[dict[LinearLayer, CrossSum]] = [{} for _ in above]
    F: list[dict[LinearLayer, GramSum]] = [{} for _ in above]
    groups: dict[LinearLayer, LinearLayer] = {}
    if keep and runner.processes.count > 1:
        _expect_experts(block, S, C, F if with_F else ())
    below: list[list[Tensor]] = [[] for _ in above]
    for batch, *gradients in zip(trace.batches, *above, strict=True):
        capture, results = runner.block_gradients(block, batch, gradients)
        for (down, _), into in zip(results, below, strict=True):
            into.append(down)
        if not keep:
            continue
        here = {linear: capture.groups[linear] for linear in results[0][1]}
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
            for linear, of_runs in grads.items():
                for call, g, x in zip(capture.calls[linear], of_runs, rows[here[linear]], strict=True):
                    g = token_rows(g, call, batch, linear, ones=False)
                    C_sums.setdefault(linear, CrossSum()).update(g, x)
                    if with_F:
                        F_sums.setdefault(linear, GramSum()).update(g)
    of_gradients = [total for sums in C for total in sums.values()]
    all_reduce([*S.values(), *of_gradients, *(total for sums in F for total in sums.values())], runner.processes)
    tokens = trace.predicted
    means = {first: total.mean(tokens) for first, total in S.items() if total.n}
    moments = [
        {
            linear: Moments(
                total.n,
                means[groups[linear]],
                _finite_mean(total, linear, tokens),
                F_sums[linear].mean() if with_F else None,
            )
            for linear, total in C_sums.items()
            if total.n
        }
        for C_sums, F_sums in zip(C, F, strict=True)
    ]
    return moments, below


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
        none = linear.weight()[:0]  # [0, d_in]
        x, g = widened(none), widened(none.new_empty(0, linear.weight().shape[0]))
        x = with_ones(x) if linear.has_bias else x
        S.setdefault(linear, GramSum()).update(x)
        for C_sums in C:
            C_sums.setdefault(linear, CrossSum()).update(g, x)
        for F_sums in F:
            F_sums.setdefault(linear, GramSum()).update(g)


def _finite_mean(total: CrossSum, linear: LinearLayer, tokens: float) -> Tensor:
    mean = total.mean(tokens)
    if not bool(mean.isfinite().all()):
        dtype = str(linear.weight().dtype).removeprefix("torch.")
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


def proposals_of(
    block: Block,
    fits: Sequence[dict[LinearLayer, Moments]],
    select: dict[LinearLayer, Moments],
    directions: Sequence[Direction],
) -> list[BlockProposals]:
    """Return for each set of targets what the moments of one block's layers propose.

    Args:
        block: the block.
        fits: per set of targets, the moments of the fit tokens, which share ``S``.
        select: moments of the select tokens.
        directions: which directions to make.
    """
    # Maps that share an input share the very tensor S, hence its decomposition.
    references: dict[int, InputWhitened] = {}
    # An expert that select gives no token cannot be calibrated; it stays as it is.
    fits = [{linear: moments for linear, moments in fit.items() if linear in select} for fit in fits]
    for linear, moments in fits[0].items():
        if id(moments.S) not in references:
            references[id(moments.S)] = InputWhitened(moments.S, select[linear].S, name=linear.name)
            if not linear.is_expert:
                _warn_of_rank(linear, moments, references[id(moments.S)].spectrum)
    _warn_of_experts(block, fits[0])
    rotated_select = {m: references[id(moments.S)].rotate(select[m].C) for m, moments in fits[0].items()}
    made = []
    tokens_of = routed(block, fits[0])
    shared: dict[int, Tensor] = {}
    for fit in fits:
        whitened: dict[LinearLayer, Proposal] = {}
        natural: dict[LinearLayer, Proposal] = {}
        signals = []
        for linear, moments in fit.items():
            reference = references[id(moments.S)]
            rotated = reference.rotate(moments.C)
            whitened[linear] = reference.propose(
                moments.C, select[linear].C, rotated=rotated, rotated_select=rotated_select[linear]
            )
            if "two-sided" in directions:
                natural[linear] = two_sided(moments, select[linear], whitened[linear], name=linear.name)
            sums = LayerSums(
                linear,
                moments,
                select[linear],
                reference,
                rotated,
                rotated_select[linear],
                whitened[linear],
                natural.get(linear),
                tokens_of.get(linear),
            )
            signals.append(of_layer(SWEPT, sums))
        changes: dict[Direction, dict[LinearLayer, Proposal]] = {}
        # The one that is better as a rule comes first: a search of the other is cut short when it cannot win.
        if "two-sided" in directions:
            changes["two-sided"] = natural
        if "input-whitened" in directions:
            changes["input-whitened"] = whitened
        made.append(
            BlockProposals(
                block.index,
                {direction: _compact(proposals) for direction, proposals in changes.items()},
                of_block(SWEPT, signals),
                local={m: _local(m, moments, changes, shared) for m, moments in fit.items() if m.low_bit},
            )
        )
    return made


def _local(
    linear: LinearLayer,
    moments: Moments,
    changes: dict[Direction, dict[LinearLayer, Proposal]],
    shared: dict[int, Tensor],
) -> LocalProblem:
    """Return the sums of one low-bit map without the column of its bias; maps that share an input share ``S``."""
    S = shared.setdefault(id(moments.S), moments.S.float())
    inputs, outputs = (changes[d][linear].damping if d in changes else 0.0 for d in DIRECTIONS)
    F = None if moments.F is None else moments.F.float()
    if linear.has_bias:
        return LocalProblem(S[:-1, :-1], F, inputs, outputs, S[:-1, -1])
    return LocalProblem(S, F, inputs, outputs)


def _agreed(runner: Runner, made: list[BlockProposals]) -> list[BlockProposals]:
    """Return the proposals with the first process's numbers: what is tried next hangs on them to the last bit."""
    if runner.processes.count == 1:
        return made
    numbers = runner.processes.broadcast([_numbers(each) for each in made])
    agreed = []
    for each, (own, of_maps) in zip(made, numbers, strict=True):
        changes = {
            direction: {m: replace(p, **found) for (m, p), found in zip(maps.items(), of_maps[direction], strict=True)}
            for direction, maps in each.changes.items()
        }
        agreed.append(replace(each, changes=changes, **own))
    return agreed


def _numbers(made: BlockProposals) -> tuple[dict[str, Any], dict[Direction, list[dict[str, Any]]]]:
    own = {f.name: getattr(made, f.name) for f in fields(made) if f.name not in ("changes", "local")}
    of_maps = {
        direction: [{f.name: getattr(p, f.name) for f in fields(p) if f.name != "change"} for p in maps.values()]
        for direction, maps in made.changes.items()
    }
    return own, of_maps


def _compact(proposals: dict[LinearLayer, Proposal]) -> dict[LinearLayer, Proposal]:
    """Return the proposals in half precision: those of all blocks are alive together."""
    return {linear: replace(p, change=p.change.to(PROPOSAL_DTYPE)) for linear, p in proposals.items()}


def _warn_of_experts(block: Block, fit: dict[LinearLayer, Moments]) -> None:
    """Warn once for all experts of a block that few tokens were routed to, or none."""
    experts = [linear for linear in block.linears if linear.is_expert]
    rows = {linear: fit[linear].n if linear in fit else 0 for linear in experts}
    few = {linear: n for linear, n in rows.items() if n < linear.weight().shape[1]}
    if not few:
        return
    none = sum(n == 0 for n in few.values())
    text = (
        f"{block.name}: {len(few)} of {len(experts)} matrices of experts saw fewer fit tokens than they have inputs, "
        f"{none} of them none on fit or select. Damping keeps the result valid; more fit tokens would sharpen it."
    )
    warnings.warn(
        IllConditionedWarning(
            text, "few-expert-tokens", block=block.name, matrices=len(few), of=len(experts), without=none
        ),
        stacklevel=2,
    )


def _warn_of_rank(linear: LinearLayer, moments: Moments, spectrum: Spectrum) -> None:
    """Warn where tokens are too few; inputs that lack directions by nature (behind a norm) are no reason to."""
    d = moments.S.shape[0]
    if moments.n < d:
        rank = spectrum.rank()
        text = (
            f"{linear.name}: {moments.n} fit tokens for {d} inputs make its [{d}, {d}] sum rank deficient (rank "
            f"{rank}). Damping keeps the result valid; more fit tokens would sharpen it."
        )
        values: dict[str, int | float | str] = {
            "layer": linear.name,
            "tokens": int(moments.n),
            "inputs": d,
            "rank": int(rank),
        }
        warnings.warn(IllConditionedWarning(text, "few-fit-tokens", **values), stacklevel=2)
