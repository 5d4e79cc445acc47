"""What maps and rules are fed with: one positive number per block, measured on training text alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from peelwise.engine.depth.weights import Matrix, hill_alpha
from peelwise.engine.opening import open_session
from peelwise.engine.refine import unrefined
from peelwise.engine.rounds import next_round
from peelwise.engine.session import Session
from peelwise.model.architectures import find_blocks
from peelwise.model.guard import untouched
from peelwise.probe.probe import Probe
from training import Loop, Size, texts

LEAST = 1e-4  # rates need positive numbers; an ablation may be below 0
SIGNAL_SHARES, WITNESS_SHARES = (0.5, 0.25, 0.25), (0.75, 0.2, 0.05)


@contextmanager
def session_at(
    model: nn.Module, size: Size, tokens: int, shares: tuple[float, float, float], draw: int
) -> Iterator[Session]:
    """Open the engine on a model in training, on sequences of training text drawn by number; leave it as it was."""
    stream, _ = texts(size.context)
    generator = torch.Generator().manual_seed(7_919 + draw)
    starts = torch.randint(len(stream) - size.context, (max(8, tokens // size.context), 1), generator=generator)
    rows = stream[starts + torch.arange(size.context + 1)]
    probe = Probe.from_tokens(rows, tokens=None, in_distribution=True, shares=shares)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    with untouched(model), torch.no_grad():
        yield open_session(model, find_blocks(model), probe, name="small", budget_seconds=float("inf"),
                           micro_batch_tokens=2_048, watcher=None, checked=True)  # fmt: skip
    for p, flag in flags:
        p.requires_grad_(flag)


def natural_gradient_score(loop: Loop) -> list[float]:
    """Return the part of each block's gradient energy that a two-sided step explains and that holds on other text."""
    with session_at(loop.model, loop.size, 2_048, SIGNAL_SHARES, loop.step) as session:
        proposals = session.swept({})[0]
        return [max(proposals[index].signals["natural_energy"], LEAST) for index in sorted(proposals)]


def ablation(loop: Loop) -> list[float]:
    """Return what skipping each block costs on 2,048 tokens of training text, nats per token."""
    return ablations(loop.model, loop.size, 8_192, loop.step)


def ablations(model: nn.Module, size: Size, tokens: int, draw: int) -> list[float]:
    """Return what skipping each block costs on a quarter of so many tokens."""
    with session_at(model, size, tokens, SIGNAL_SHARES, draw) as session:
        report = session.report
        without = [report.mean_of(session.losses_without(report, b.index)) for b in session.runner.blocks]
        return [max(each - report.mean, LEAST) for each in without]


def tail_index(loop: Loop) -> list[float]:
    """Return Hill's exponent of each block's matrices, the mean over them (arXiv:2605.22297 maps it onto rates)."""
    found = []
    for block in find_blocks(loop.model):
        values = [hill_alpha(Matrix(linear.weight())) for linear in block.linears]
        found.append(sum(v or 0.0 for v in values) / len(values))
    return found


def gradient_norms(model: nn.Module) -> list[float]:
    """Return the norm of each block's gradients as they are."""
    return [
        max(sum(float(p.grad.square().sum()) for p in b.module.parameters() if p.grad is not None) ** 0.5, LEAST)
        for b in find_blocks(model)
    ]


def joint_witness(model: nn.Module, size: Size, tokens: int, draw: int) -> dict[str, Tensor]:
    """Return the change of every linear layer that one joint round finds on training text; empty if none helps."""
    with session_at(model, size, tokens, WITNESS_SHARES, draw) as session:
        found = next_round(session, unrefined(session.select), None, output_changes={}, evaluations=8)
        return {} if found is None else {linear.name: change for linear, change in found.changes.items()}
