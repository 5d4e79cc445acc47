"""How a mixture's router spreads the tokens of a text over its experts, and which experts are copies of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peelwise.evidence.mixtures import dead, has_collapsed, spread
from peelwise.model.capture import captured
from peelwise.model.layers import Block, LinearLayer
from peelwise.model.runner import Runner
from peelwise.model.trace import Trace
from peelwise.records.base import Note, note

_SAME = 0.999  # cosine of the weights of two experts
_SAMPLED = 65_536  # numbers of each expert's matrix
_LISTED = 8  # experts that a note names


@dataclass(frozen=True)
class Loads:
    """One mixture of a block.

    Attributes:
        tokens: that each expert was given, in their order.
        per_token: experts that each token was given to, on average.
        copies: pairs of experts whose weights are the same, but for a factor.
    """

    tokens: tuple[int, ...]
    per_token: float
    copies: tuple[tuple[int, int], ...]


def mixtures_of(block: Block) -> list[list[LinearLayer]]:
    """Return the experts of every mixture of a block, each by its first matrix."""
    found: dict[int, list[LinearLayer]] = {}
    owners: set[int] = set()
    for linear in (*block.linears, *block.frozen):
        if linear.is_expert:
            found.setdefault(id(linear.parameter), []).append(linear)
    first = []
    for experts in found.values():  # the first parameter of each module of experts: the others go with it
        owner = id(getattr(experts[0].module, "owner", experts[0].module))
        if owner not in owners:
            owners.add(owner)
            first.append(experts)
    return first


@torch.no_grad()
def loads_of(runner: Runner, block: Block, trace: Trace) -> list[Loads]:
    """Run a block once more on its cached input, and count the tokens that each expert is given."""
    mixtures = mixtures_of(block)
    counts = {linear: 0 for experts in mixtures for linear in experts}
    if not counts:
        return []
    for batch in trace.batches:
        with captured(list(counts)) as capture:
            runner.run_block(block, batch.stations[block.index], batch)
        for linear, calls in capture.calls.items():
            for call in calls:
                rows = call.rows
                counts[linear] += len(call.x) if rows is None else int(batch.read.flatten()[rows].sum())
    runner.work.add(runner.shares[block.index], trace.predicted)
    read, *totals = runner.processes.all_sum([sum(int(batch.read.sum()) for batch in trace.batches), *counts.values()])
    counts = dict(zip(counts, totals, strict=True))
    found = []
    with runner.whole(block):
        for experts in mixtures:
            tokens = tuple(counts[linear] for linear in experts)
            found.append(Loads(tokens, sum(tokens) / max(read, 1), tuple(copies(experts))))
    return found


def copies(experts: Sequence[LinearLayer]) -> list[tuple[int, int]]:
    """Return the pairs of experts with a cosine of their weights above 0.999, from a sample of each matrix."""
    rows = torch.stack([_sample(linear) for linear in experts])
    unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
    alike = torch.triu(unit @ unit.T, diagonal=1) > _SAME
    return [(int(a), int(b)) for a, b in alike.nonzero()]


def _sample(linear: LinearLayer) -> torch.Tensor:
    flat = linear.weight().detach().reshape(-1)
    return flat[:: -(-flat.numel() // _SAMPLED)].float()


def mixture_notes(runner: Runner, trace: Trace) -> list[Note]:
    """Return what is wrong with the mixtures of a model on a text, block by block."""
    found = []
    for block in runner.blocks:
        for loads in loads_of(runner, block, trace):
            experts, even = len(loads.tokens), sum(loads.tokens) / len(loads.tokens)
            left = spread(loads.tokens, loads.per_token)
            silent = dead(loads.tokens)
            if has_collapsed(left):
                busiest = sorted(range(experts), key=lambda e: -loads.tokens[e])[: max(1, round(loads.per_token))]
                share = sum(loads.tokens[e] for e in busiest) / sum(loads.tokens)
                found.append(
                    note("router-collapsed", block=block.index, experts=_listed(busiest), of=experts, share=share)
                )
            elif silent:
                found.append(
                    note(
                        "dead-experts",
                        block=block.index,
                        experts=_listed(silent),
                        count=len(silent),
                        of=experts,
                        even=even,
                    )
                )
            if loads.copies:
                pairs = ", ".join(f"{a} and {b}" for a, b in loads.copies[:_LISTED])
                more = ", .." if len(loads.copies) > _LISTED else ""
                found.append(note("copied-experts", block=block.index, pairs=f"{pairs}{more}"))
    return found


def _listed(experts: Sequence[int]) -> str:
    return ", ".join(map(str, experts[:_LISTED])) + (", .." if len(experts) > _LISTED else "")
