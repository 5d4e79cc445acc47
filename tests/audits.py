"""What tests of audits share: small probes, settings, snapshots, and slow obvious reference sums."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from peelwise.engine.clock import Clock
from peelwise.engine.session import Session
from peelwise.engine.sweep import block_moments
from peelwise.model.architectures import find_blocks
from peelwise.model.experts import experts_called
from peelwise.model.layers import Block, LinearLayer
from peelwise.model.runner import Runner
from peelwise.model.trace import Trace
from peelwise.probe.probe import Probe
from peelwise.probe.rows import Split
from peelwise.records.audit import AuditRecord
from peelwise.stats.gram import Moments
from peelwise.tasks.audit.settings import AuditSettings
from zoo import sample_ids

# Enough report sequences for an interval without a warning, and more fit tokens than any zoo map has inputs.
SEQUENCES, LENGTH = 28, 16
ONE_ROUND = AuditSettings(600.0, joint_rounds=1, solo_rounds=1)
RAGGED = (16, 5, 11, 2, 16, 9)


def tiny_probe(sequences: int = SEQUENCES, length: int = LENGTH, **options: Any) -> Probe:
    """Return a probe of random tokens that every zoo model accepts."""
    return Probe.from_tokens(sample_ids(sequences, length + 1), **options)


def part_of(probe: Probe, **counts: int) -> Probe:
    """Return a probe with only the first so many sequences of each part, such as ``fit=20``."""
    splits = {part: getattr(probe, part) for part in counts}
    fewer = {p: Split(s.ids[: counts[p]], s.mask[: counts[p]]) for p, s in splits.items()}
    return replace(probe, pool=None, documents=None, **fewer)


def split_of(rows: list[list[int]]) -> Split:
    """Return rows of any length as one split, padded on the right with an id that is not 0."""
    positions = max(map(len, rows))
    ids = torch.tensor([row + [5] * (positions - len(row)) for row in rows])
    return Split(ids, torch.arange(positions) < torch.tensor([[len(row)] for row in rows]))


def ragged_rows() -> list[list[int]]:
    """Return rows of random tokens of different lengths."""
    return [ids[: n + 1] for ids, n in zip(sample_ids(len(RAGGED), 17).tolist(), RAGGED, strict=True)]


def runner_of(model: nn.Module, **options: Any) -> Runner:
    """Return a runner with frozen parameters, as an audit uses it."""
    return Runner(model.requires_grad_(False), find_blocks(model), **options)


def session_of(model: nn.Module, probe: Probe | None = None, **options: Any) -> Session:
    """Return what the stages of an audit work on, with ten minutes on its clock."""
    probe = probe or tiny_probe()
    runner = runner_of(model, **options)
    fit, select, report = (runner.trace(split) for split in (probe.fit, probe.select, probe.report))
    return Session(runner, report, probe, fit, select, Clock(600.0, runner.work), probe.seed)


def slow_losses(model: nn.Module, rows: list[list[int]]) -> Tensor:
    """Return each row's summed cross-entropy, one row at a time, without padding and without a runner."""
    return torch.stack([_row_loss(model, row).detach() for row in rows]).double()


def _row_loss(model: nn.Module, row: list[int]) -> Tensor:
    output = model(torch.tensor([row[:-1]]))
    return cross_entropy(getattr(output, "logits", output)[0], torch.tensor(row[1:]), reduction="sum")


def slow_moments(model: nn.Module, rows: list[list[int]]) -> dict[str, Moments]:
    """Return S, C, F of every map in float64: S and F from what hooks see, C from the parameters' own ``.grad``."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    twin = copy.deepcopy(model)  # by its own code, whose experts are no layers
    if hasattr(twin, "set_experts_implementation"):
        twin.set_experts_implementation("eager")  # there is no grouped product of float64
    maps = [linear for block in find_blocks(model) for linear in block.linears]
    seen: dict[LinearLayer, list[tuple[Tensor, Tensor]]] = {linear: [] for linear in maps}

    def keep(linear: LinearLayer) -> Any:
        def after(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            y.retain_grad()
            seen[linear].append((args[0].detach(), y))

        return after

    for linear in maps:
        linear.module.register_forward_hook(keep(linear))
    tokens = sum(len(row) - 1 for row in rows)
    with experts_called(model):
        (sum(_row_loss(model, row) for row in rows) / tokens).backward()
    (sum(_row_loss(twin, row) for row in rows) / tokens).backward()
    found = {}
    own = [linear for block in find_blocks(twin) for linear in block.linears]
    for linear, theirs in zip(maps, own, strict=True):
        if not seen[linear]:
            continue  # an expert without tokens
        x = torch.cat([x.flatten(0, -2) for x, _ in seen[linear]])  # [n, d_in]
        g = tokens * torch.cat([y.grad.flatten(0, -2) for _, y in seen[linear]])  # [n, d_out]
        weight = theirs.module.weight.grad
        C = weight.T if linear.transposed else weight
        if linear.has_bias:
            x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
            C = torch.cat([C, theirs.module.bias.grad[:, None]], dim=1)
        found[linear.name] = Moments(len(x), x.T @ x / tokens, C, g.T @ g / len(g))
    return found


def swept_moments(runner: Runner, trace: Trace) -> dict[str, Moments]:
    """Return the sums of every map as the sweep adds them up, from the top block down."""
    above, found = [runner.tail_gradients(trace)], {}
    for block in reversed(runner.blocks):
        (moments,), above = block_moments(runner, block, trace, above, keep=True, with_F=True)
        found.update({linear.name: value for linear, value in moments.items()})
    return found


def assert_same_moments(found: dict[str, Moments], expected: dict[str, Moments], **tolerance: float) -> None:
    """Fail unless both hold the same sums of the same maps."""
    assert found.keys() == expected.keys()
    for name, moments in found.items():
        assert moments.n == expected[name].n
        for kind in ("S", "C", "F"):
            there = getattr(expected[name], kind)
            here = getattr(moments, kind).to(there.dtype)
            size = float(there.abs().max())
            torch.testing.assert_close(
                here / size, there / size, **tolerance, msg=lambda m, k=kind, n=name: f"{n} {k}: {m}"
            )


def random_changes(model: nn.Module, strength: float = 0.3, dtype: torch.dtype = torch.float32) -> Any:
    """Return the blocks of a model and a random change for each of their maps, biases included."""
    generator = torch.Generator().manual_seed(3)
    blocks = find_blocks(model)
    changes = {}
    for linear in (linear for block in blocks for linear in block.linears):
        d_out, d_in = linear.weight().shape
        change = torch.randn(d_out, d_in + linear.has_bias, generator=generator, dtype=dtype)
        changes[linear] = strength * linear.weight().float().std() * change
    return blocks, changes


@torch.no_grad()
def written(model: nn.Module, changes: dict[LinearLayer, Tensor], scale: float = 1.0) -> nn.Module:
    """Return a copy of a model with the changes written into its parameters: what a splice must equal."""
    out = copy.deepcopy(model)
    for block in find_blocks(out):
        for linear in block.linears:
            change = next((scale * c for m, c in changes.items() if m.name == linear.name), None)
            if change is None:
                continue
            weight = change[:, :-1] if linear.has_bias else change
            linear.module.weight.add_(weight.T if linear.transposed else weight)
            if linear.has_bias:
                linear.module.bias.add_(change[:, -1])
    return out


@dataclass
class Snapshot:
    """Everything of a model and of the process that an audit must leave as it was."""

    tensors: dict[str, Tensor]
    versions: dict[str, int]
    flags: dict[str, tuple[bool, bool]]
    gradients: dict[str, Tensor | None]
    attachments: list[str]
    states: tuple[Any, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """Look at a model now."""
        parameters = dict(model.named_parameters())
        everything = parameters | dict(model.named_buffers())
        return cls(
            {name: tensor.detach().clone() for name, tensor in everything.items()},
            {name: tensor._version for name, tensor in everything.items()},
            {name: (module.training, False) for name, module in model.named_modules()}
            | {f"parameter {name}": (False, p.requires_grad) for name, p in parameters.items()},
            {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()},
            list(_attachments(model)),
            (random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()),  # noqa: NPY002
        )

    def assert_unchanged(self, model: nn.Module) -> None:
        """Fail if anything differs; ``_version`` tells even a write of the same value."""
        now = Snapshot.of(model)
        assert now.versions == self.versions
        assert all(torch.equal(now.tensors[name], tensor) for name, tensor in self.tensors.items())
        assert now.flags == self.flags
        assert all(_same(now.gradients[name], gradient) for name, gradient in self.gradients.items())
        assert now.attachments == self.attachments
        assert now.states[0] == self.states[0]
        np.testing.assert_equal(now.states[1], self.states[1])
        assert torch.equal(now.states[2], self.states[2])


def _attachments(model: nn.Module) -> Iterator[str]:
    """Name every hook and every replaced ``forward`` in a model."""
    for name, module in model.named_modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            yield from (f"{name}{kind}" for _ in getattr(module, kind))
        if "forward" in module.__dict__:
            yield f"{name}.forward {id(module.__dict__['forward'])}"


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def numbers(record: AuditRecord) -> dict[str, Any]:
    """Return what a record says, without when it was made, how long it took and with which batches."""
    plain = record.model_dump(exclude={"created", "cost", "digest", "witness", "versions"})
    plain["settings"].pop("micro_batch_tokens")
    return plain


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of nested dicts and sequences with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from flat(item, f"{path}.{index}")
    else:
        yield path, value


def same_bits(a: Any, b: Any) -> bool:
    """Whether two nests of dicts, sequences and tensors hold the same to the bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return bool(a == b)


def block_of(blocks: tuple[Block, ...], name: str) -> LinearLayer:
    """Return the one map whose name ends in ``name`` in the first block."""
    (found,) = (linear for linear in blocks[0].linears if linear.name.endswith(name))
    return found


def trained_beside(model: nn.Module, monitor_of: Callable[[torch.optim.Optimizer], Any] | None) -> dict[str, Tensor]:
    """Train a tiny model for eight steps, beside a monitor if there is to be one, and return its weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = monitor_of(optimizer) if monitor_of is not None else None
    ids = sample_ids(4, 16)
    for step in range(1, 9):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            monitor.step(step, float(loss.detach()))
    if monitor is not None:
        monitor.close()
    return model.state_dict()
