"""Checks of a training run that need no probe: is every parameter reached, stepped and finite?

They read flags, the optimiser's groups and counts, version counters and gradients; nothing is run or written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from peelwise.distributed.processes import ONE_PROCESS, Processes
from peelwise.distributed.sharding import is_sharded, local_shard
from peelwise.evidence.events import DEAD_CHECKS, Complaint, Finding
from peelwise.model.layers import Block, plain_name
from peelwise.model.refined import adapter_parameters
from peelwise.tasks.monitor.writes import Writes, writes

_DEAD_SHARE = 0.1  # of a map's outputs; a few dead units are nothing unusual
_NUMBER = re.compile(r"\d+")  # a block's place in a name
_LOOKED_AT = 16  # numbers of an output's gradient, before all of it
_SAME_NORMS, _SAME = 4, 1e-3  # so many norms in a row that differ by less than a thousandth are no chance


class Vitals:
    """Looks at parameters, gradients and optimiser at every `check`, and remembers what it saw before.

    Args:
        model: the module in training.
        blocks: its blocks.
        optimizer: whatever steps it, or ``None`` if that is not known.
        processes: the processes that train it, each of which looks at its own part of a gradient; all check at once.

    Attributes:
        blocks: as they are at present.
        saw_gradients: whether any check found gradients; if never, it is called after they are cleared.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        optimizer: torch.optim.Optimizer | None = None,
        processes: Processes = ONE_PROCESS,
    ) -> None:
        self._processes = processes
        self._model = model
        self._parameters: dict[str, nn.Parameter] = {}
        self.blocks = blocks
        self._optimizer = optimizer
        self._writes: dict[str, Writes] = {}
        self._still: dict[str, int] = {}
        self._zero_rate_before: set[str] = set()
        self._silent: dict[str, Tensor] = {}  # per layer [d_out]: checks in a row without a gradient
        self._seen_writes: dict[str, Writes] = {}
        self._zeros: dict[str, int] = {}  # of adapters: checks in a row at zero while others moved; -1: it is not
        self._norms: list[float] = []  # of all gradients together, at the latest checks
        self.saw_gradients = False

    @property
    def clipped_to(self) -> float | None:
        """The norm that all gradients together had at each of the latest checks, or ``None`` if it varied."""
        norms = self._norms
        same = len(norms) == _SAME_NORMS and 0 < max(norms) < min(norms) * (1 + _SAME)
        return norms[-1] if same else None

    def check(self) -> list[Finding]:
        """Return what is wrong now."""
        # Asked for anew each time: parameters may be replaced while training goes on.
        self._parameters = {plain_name(name): p for name, p in self._model.named_parameters()}
        trained = {name: p for name, p in self._parameters.items() if p.requires_grad}
        added = {plain_name(name) for name in adapter_parameters(self._model)}
        found = [self._finding("frozen", self._frozen(trained, added))]
        groups = self._groups()
        if groups is not None:
            missing = [name for name, p in trained.items() if id(p) not in groups]
            found.append(self._finding("not-optimised", missing))
            found.append(self._finding("zero-rate", self._zero_rates(trained, groups)))
            trained = {name: p for name, p in trained.items() if name not in missing}
        with_gradient = {name: p for name, p in trained.items() if p.grad is not None}
        if with_gradient:
            self.saw_gradients = True
            found.append(self._finding("no-gradient", (n for n in trained if n not in with_gradient)))
            found.append(self._finding("non-finite", self._non_finite(with_gradient)))
            found.extend(self._dead())
            self._norms = [*self._norms, _norm(with_gradient)][-_SAME_NORMS:]
        # Where gradients tell why, a parameter that stands still needs no second mention.
        named = {name for finding in found if finding for name in finding.names}
        found.append(self._finding("not-updated", (n for n in self._standing(trained) if n not in named)))
        zero = self._at_zero({name: p for name, p in trained.items() if name in added})
        found.append(self._finding("still-zero", (n for n in zero if n not in named)))
        return [finding for finding in found if finding is not None]

    def _frozen(self, trained: Collection[str], added: Collection[str]) -> list[str]:
        """Return parameters that do not train although they seem meant to.

        The base of adapters is frozen on purpose, and so is what is frozen of the adapters of all blocks.
        """
        frozen = [name for name in self._parameters if name not in trained]
        if not added:
            return frozen
        kinds = {_NUMBER.sub("", name) for name in trained}
        return [name for name in frozen if name in added and _NUMBER.sub("", name) in kinds]

    def _at_zero(self, adapters: dict[str, nn.Parameter]) -> list[str]:
        """Return matrices of adapters that were all zero at this and the checks before, while others were written.

        One of an adapter's two matrices begins at zero. Where both do, neither ever gets a gradient.
        """
        now = dict(zip(adapters, writes(list(adapters.values()), self._optimizer), strict=True))
        moved = any(mark != self._seen_writes.get(name, mark) for name, mark in now.items())
        self._seen_writes = now
        for name, p in adapters.items():
            before = self._zeros.get(name, 0)
            if before < 0 or p.dim() < 2 or is_sharded(p):
                continue  # it was seen to be something else, and need not be looked at again
            self._zeros[name] = before + moved if not bool(p.detach().any()) else -1
        return [name for name, times in self._zeros.items() if times >= DEAD_CHECKS and name in adapters]

    def rates(self) -> list[float | None]:
        """Return the learning rate of every block (the mean over its maps), ``None`` where it is not known."""
        groups = self._groups()
        if groups is None:
            return [None] * len(self.blocks)
        rates = []
        for block in self.blocks:
            found = [groups[id(p)] for p in block.module.parameters() if id(p) in groups and p.dim() > 1]
            rates.append(sum(found) / len(found) if found else None)
        return rates

    def _groups(self) -> dict[int, float] | None:
        """Return id of a parameter -> its learning rate."""
        if self._optimizer is None:
            return None
        return {id(p): float(group["lr"]) for group in self._optimizer.param_groups for p in group["params"]}

    def _zero_rates(self, trained: dict[str, nn.Parameter], groups: dict[int, float]) -> list[str]:
        """Return parameters whose rate is zero while others' is not, or that had none at the last check either."""
        zero = {name for name, p in trained.items() if groups.get(id(p)) == 0.0}
        others_move = any(rate != 0.0 for rate in groups.values())
        found = [n for n in trained if n in zero and (others_move or n in self._zero_rate_before)]
        self._zero_rate_before = zero
        return found

    def _standing(self, trained: dict[str, nn.Parameter]) -> list[str]:
        """Return parameters that were not written at the last two checks while others were."""
        now = dict(zip(trained, writes(list(trained.values()), self._optimizer), strict=True))
        moved = {name for name, mark in now.items() if mark != self._writes.get(name, mark)}
        if moved:
            for name in now:
                still = name in self._writes and name not in moved
                self._still[name] = self._still.get(name, 0) + 1 if still else 0
        self._writes = now
        return [name for name in trained if self._still.get(name, 0) >= 2]

    def _dead(self) -> Iterator[Finding]:
        maps, counts = [], []
        for block in self.blocks:
            for linear in block.linears:
                gradient = getattr(linear.module.weight, "grad", None)
                if not isinstance(gradient, Tensor) or gradient.is_sparse or gradient.dim() != 2:
                    continue
                spread = is_sharded(gradient)
                if spread and linear.transposed:
                    continue  # its outputs lie in every process's part
                silent = _all_zero(local_shard(gradient), 0 if linear.transposed else 1)  # [d_out, or a part of it]
                before = self._silent.get(linear.name)
                if before is not None and before.shape != silent.shape:
                    before = None  # another layer has taken its place
                rows = silent.int() if before is None else (before + 1) * silent
                self._silent[linear.name] = rows
                maps.append((block, linear))
                # What is whole in every process is counted by the first.
                own = spread or self._processes.is_main
                counts += [int((rows >= DEAD_CHECKS).sum()) * own, len(rows) * own]
        counts = self._processes.all_sum(counts)
        for (block, linear), dead, outputs in zip(maps, counts[::2], counts[1::2], strict=True):
            if dead >= _DEAD_SHARE * outputs and dead:
                yield Finding("dead-units", (linear.name,), (block.index,), outputs, dead)

    def _non_finite(self, parameters: dict[str, nn.Parameter]) -> list[str]:
        parts = {
            name: local_shard(p.grad) for name, p in parameters.items() if p.grad is not None and not p.grad.is_sparse
        }
        held = [part for part in parts.values() if part.numel()]
        norms = iter(torch._foreach_norm(held) if held else [])
        # A sum of squares may overflow where no number does, so it only acquits.
        bad = self._processes.all_sum(
            [
                int(part.numel() > 0 and not bool(next(norms).isfinite()) and not bool(part.isfinite().all()))
                for part in parts.values()
            ]
        )
        return [name for name, count in zip(parts, bad, strict=True) if count]

    def _finding(self, kind: Complaint, names: Iterable[str]) -> Finding | None:
        found = tuple(names)
        if not found:
            return None
        blocks = tuple(b.index for b in self.blocks if any(name.startswith(f"{b.name}.") for name in found))
        return Finding(kind, found, blocks, len(self._parameters))


def _norm(parameters: dict[str, nn.Parameter]) -> float:
    """Return the Euclidean norm of all gradients together; no number where a process holds only its part of them."""
    gradients = [p.grad for p in parameters.values() if p.grad is not None and not p.grad.is_sparse]
    if any(is_sharded(gradient) for gradient in gradients):
        return math.nan
    return float(sum(norm.double().square() for norm in torch._foreach_norm(gradients))) ** 0.5 if gradients else 0.0


def _all_zero(gradient: Tensor, dim: int) -> Tensor:
    """Return which rows (``dim=1``) or columns (``dim=0``) of a matrix hold nothing but zeros.

    A few numbers of each acquit nearly all of them.
    """
    rows = gradient if dim == 1 else gradient.T
    silent = (rows[:, :: max(1, rows.shape[1] // _LOOKED_AT)] == 0).all(dim=1)
    left = silent.nonzero()[:, 0]
    if len(left):
        silent[left] = (rows[left] == 0).all(dim=1)
    return silent
