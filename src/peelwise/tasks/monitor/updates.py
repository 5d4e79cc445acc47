"""What one step of the optimiser does to the weights, seen on a sample of them before and after it.

How far each block moves, whether it is still the one of earlier checks, whether half-precision weights move at all,
what weight decay takes, and whether the gradient holds that of the step before. Nothing is run and nothing of the
training is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from peelwise.distributed.sharding import is_sharded
from peelwise.evidence.facts import UpdateFacts
from peelwise.model.layers import Block
from peelwise.tasks.monitor.uncopied import Uncopied
from peelwise.tasks.monitor.writes import Writes, writes

_SAMPLED = 1024  # numbers of each parameter
_BACK = 2  # checks that a block is compared with itself over
_FRESH, _LARGEST_FRESH = 4, 65_536  # parameters whose own gradient of a step is kept; numbers in each
_EXPLAINED, _OWN = 0.05, 0.2  # of the gradient's norm: what two gradients must leave over, and one alone
_DECOUPLED = ("AdamW", "Lion", "Muon", "Adafactor")
_ROUNDED_OTHERWISE = ("stochastic", "kahan", "master")  # parts of names of options and states of such optimisers


class UpdateWatch:
    """Looks at a step from both sides: `before` at the end of the step before, `after` at its own end.

    Args:
        model: in training.
        blocks: its blocks.
        optimizer: what steps it, or ``None`` if that is not known.
        alone: whether this process alone makes the gradient; else what is kept of it cannot be told.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[Block], optimizer: torch.optim.Optimizer | None, *, alone: bool = True
    ) -> None:
        self._model, self.blocks, self._optimizer, self._alone = model, blocks, optimizer, alone
        self._parameters: list[nn.Parameter] = []
        self._weights: Tensor | None = None  # [sampled], float32
        self._writes: list[Writes] = []
        self._fresh: dict[int, Tensor] = {}  # id of a parameter -> what this step's backward passes have added
        self._stale: dict[int, Tensor] = {}  # id of a parameter -> the gradient at the end of the step before
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._first: dict[str, float] = {}
        self._checked: list[_Checked] = []  # after the last checks, the oldest first

    def before(self) -> None:
        """Take a sample of the weights as they are before the next step."""
        self.drop()
        self._parameters = [
            p for p in self._model.parameters() if p.requires_grad and p.is_floating_point() and not is_sharded(p)
        ]
        if not self._parameters:
            return
        self._weights = _sample(self._parameters)
        self._writes = writes(self._parameters, self._optimizer)
        small = [p for p in self._parameters if 1 < p.numel() <= _LARGEST_FRESH] if self._alone else []
        for parameter in small[:: max(1, len(small) // _FRESH)][:_FRESH]:
            if parameter.grad is not None:  # else it was cleared, and nothing is left in it
                self._stale[id(parameter)] = parameter.grad.detach().clone()
                keep = _Keep(self._fresh, id(parameter))
                self._handles.append(parameter.register_hook(keep))  # type: ignore[no-untyped-call]

    def drop(self) -> None:
        """Let go of everything that waits for the end of a step."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._weights, self._parameters = [], None, []
        self._fresh.clear()
        self._stale.clear()

    @torch.no_grad()
    def after(self, step: int) -> UpdateFacts | None:
        """Return what the step did; ``None`` if it was not looked at from before, or parameters are other ones now.

        Args:
            step: its number.
        """
        weights, parameters = self._weights, self._parameters
        if weights is None:
            return None
        now = _sample(parameters)
        if writes(parameters, self._optimizer) == self._writes and torch.equal(now, weights):
            self.drop()  # not stepped: within an accumulation, or skipped by a scaler
            return None
        stale, gradients = self._staleness(), _sample([_gradient(p) for p in parameters])
        sums = _sums(parameters, weights, now, gradients)
        self.drop()
        facts = self._facts(parameters, sums, stale)
        checked = _Checked(step, parameters, now)
        if self._checked and not self._checked[-1].precedes(checked):
            self._checked.clear()
        earlier = self._checked[0] if len(self._checked) == _BACK else None
        self._checked = [*self._checked[1 - _BACK :], checked]
        if earlier is None:
            return facts
        return replace(facts, alike=_alike(self.blocks, earlier, checked), since=earlier.step)

    def _facts(
        self, parameters: Sequence[nn.Parameter], sums: Mapping[str, Sequence[float]], stale: float | None
    ) -> UpdateFacts:
        place = {id(p): i for i, p in enumerate(parameters)}
        groups = _groups(self._optimizer)

        def total(name: str, chosen: Sequence[Tensor], factor: Callable[[Tensor], float] = lambda p: 1.0) -> float:
            return sum(sums[name][place[id(p)]] * factor(p) for p in chosen)

        def of_block(block: Block) -> list[nn.Parameter]:
            return [p for p in block.module.parameters() if id(p) in place and p.dim() > 1]

        moved, relative, rates = [], [], []
        for block in self.blocks:
            own = of_block(block)
            size, numbers = total("weight", own), sum(p.numel() for p in own)
            moved.append((total("change", own) / numbers) ** 0.5 if own else None)
            relative.append((total("change", own) / size) ** 0.5 if size > 0 else None)
            found = [groups[id(p)][0] for p in own if id(p) in groups]
            rates.append(sum(found) / len(found) if found else None)
        half = [p for p in parameters if p.dtype in (torch.bfloat16, torch.float16)]
        reached = total("reached", half)
        matrices = [p for p in parameters if p.dim() > 1]
        decayed = [p for p in matrices if id(p) in groups and groups[id(p)][1] > 0]
        apart = [p for p in decayed if groups[id(p)][2]]
        joined = [p for p in decayed if not groups[id(p)][2]]
        gradient = total("gradient", joined)
        return UpdateFacts(
            tuple(moved),
            tuple(relative),
            tuple(rates),
            max((rate for rate, *_ in groups.values()), default=None),
            total("unmoved", half) / reached if reached > 0 and not _rounds_otherwise(self._optimizer) else None,
            str(half[0].dtype).removeprefix("torch.") if half else "",
            sum(p.numel() * groups[id(p)][0] * groups[id(p)][1] for p in apart)
            / max(sum(p.numel() for p in matrices), 1),
            self._kept("norm", total("weight", apart) ** 0.5),
            (total("weight", joined, lambda p: groups[id(p)][1] ** 2) / gradient) ** 0.5 if gradient > 0 else 0.0,
            stale,
        )

    def _kept(self, name: str, value: float) -> float:
        """Return a value over what it was at the first check."""
        first = self._first.setdefault(name, value)
        return value / first if first > 0 else 1.0

    def _staleness(self) -> float | None:
        """Return the part ``b`` of the last gradient ``h`` in this one: ``g = a f + b h``, ``f`` of this step alone.

        Zero where ``f`` explains ``g`` by itself; ``None`` where the two do not explain it, or there is no ``h``.
        """
        chosen = [p for p in self._parameters if id(p) in self._stale and id(p) in self._fresh and p.grad is not None]
        if not chosen:
            return None
        g, f, h = (
            torch.cat([t.detach().float().flatten() for t in each])
            for each in (
                [_gradient(p) for p in chosen],
                [self._fresh[id(p)] for p in chosen],
                [self._stale[id(p)] for p in chosen],
            )
        )
        size = float(g.norm())
        if not 0 < size < float("inf") or not bool(f.isfinite().all() & h.isfinite().all()):
            return None
        if float((g - f * (f @ g) / (f @ f).clamp_min(1e-30)).norm()) < _OWN * size:
            return 0.0
        basis = torch.stack([f, h], dim=1).double()  # [n, 2]
        try:
            factors = torch.linalg.lstsq(basis, g.double()[:, None]).solution[:, 0]
        except RuntimeError:  # the two are one direction
            return None
        left = float((g.double() - basis @ factors).norm())
        return float(factors[1]) if left < _EXPLAINED * size else None


@dataclass(frozen=True, eq=False)
class _Checked:
    """A sample of parameters ``[sampled]`` at the end of a step."""

    step: int
    parameters: Sequence[nn.Parameter]
    sample: Tensor

    def precedes(self, other: _Checked) -> bool:
        """Whether the other is of the same parameters and a later step."""
        ids, others = ([id(p) for p in each.parameters] for each in (self, other))
        return self.step < other.step and ids == others and self.sample.device == other.sample.device


def _alike(blocks: Sequence[Block], earlier: _Checked, now: _Checked) -> tuple[float | None, ...]:
    """Return per block the cosine of its matrices at two checks; ``None`` where it has none that is trained."""
    a, b = earlier.sample, now.sample
    names = ("both", "before", "now")
    sums = _totals(now.parameters, dict(zip(names, (a * b, a.square(), b.square()), strict=True)))
    place = {id(p): i for i, p in enumerate(now.parameters)}
    found: list[float | None] = []
    for block in blocks:
        own = [place[id(p)] for p in block.module.parameters() if p.dim() > 1 and id(p) in place]
        both, before, after = (sum(sums[name][i] for i in own) for name in names)
        size = (before * after) ** 0.5
        found.append(both / size if 0 < size < float("inf") else None)
    return tuple(found)


class _Keep(Uncopied):
    """Adds up the gradients that reach a parameter in one step; copies of the parameter do without it."""

    def __init__(self, kept: dict[int, Tensor], key: int) -> None:
        self._kept, self._key = kept, key

    def __call__(self, gradient: Tensor) -> None:
        before = self._kept.get(self._key)
        self._kept[self._key] = gradient.detach().clone() if before is None else before + gradient.detach()


def _gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    if gradient is None or gradient.is_sparse:
        return torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
    return gradient


def _stride(tensor: Tensor) -> int:
    return max(1, tensor.numel() // _SAMPLED)


def _sample(tensors: Sequence[Tensor]) -> Tensor:
    """Return about `_SAMPLED` numbers of each tensor, evenly spaced, behind each other: float32."""
    return torch.cat([t.detach().reshape(-1)[:: _stride(t)].float() for t in tensors])


def _sums(parameters: Sequence[Tensor], before: Tensor, now: Tensor, gradients: Tensor) -> dict[str, list[float]]:
    """Return sums over all numbers of each parameter, estimated from the sample."""
    change, reached = now - before, gradients != 0
    columns = {
        "change": change.square(),
        "weight": before.square(),
        "gradient": gradients.square(),
        "reached": reached.float(),
        "unmoved": (reached & (change == 0)).float(),
    }
    return _totals(parameters, columns)


def _totals(parameters: Sequence[Tensor], columns: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Return the sums of columns ``[sampled]`` over all numbers of each parameter."""
    rows = torch.stack(list(columns.values()))  # [columns, sampled]
    counts = [len(range(0, p.numel(), _stride(p))) for p in parameters]
    place = torch.repeat_interleave(torch.tensor(counts, device=rows.device))  # [sampled]
    factor = torch.tensor(
        [p.numel() / max(count, 1) for p, count in zip(parameters, counts, strict=True)], device=rows.device
    )
    sums = torch.zeros(len(columns), len(counts), device=rows.device).index_add_(1, place, rows) * factor
    return dict(zip(columns, sums.tolist(), strict=True))


def _groups(optimizer: torch.optim.Optimizer | None) -> dict[int, tuple[float, float, bool]]:
    """Return id of a parameter -> its learning rate, its weight decay, and whether that is beside the gradient."""
    if optimizer is None:
        return {}
    by_name = any(name in type(optimizer).__name__ for name in _DECOUPLED)
    return {
        id(p): (
            float(group.get("lr") or 0.0),
            float(group.get("weight_decay") or 0.0),
            bool(group.get("decoupled_weight_decay", False)) or by_name,
        )
        for group in optimizer.param_groups
        for p in group["params"]
    }


def _rounds_otherwise(optimizer: torch.optim.Optimizer | None) -> bool:
    """Whether an optimiser makes up for half precision: by random rounding, by remembering what was cut off."""
    if optimizer is None:
        return False
    options = {key: value for group in optimizer.param_groups for key, value in group.items() if key != "params"}
    own = {key: value for key, value in vars(optimizer).items() if isinstance(value, bool)}
    states = {str(key): True for state in optimizer.state.values() if isinstance(state, dict) for key in state}
    names = [str(key) for key, value in (options | own | states).items() if value]
    return any(part in name.lower() for name in names for part in _ROUNDED_OTHERWISE)
