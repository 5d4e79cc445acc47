"""One pass over the blocks, from the top down: what each gave to the stream, and how the loss answers to its parts.

Only one block's activations are alive at a time; every signal of a kind is made from what one pass saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peelwise.engine.depth.backward import Backward, GradientSums
from peelwise.engine.depth.forward import Stream
from peelwise.model.handed import Gradient, Passed
from peelwise.model.parts import ATTENTION, Parts
from peelwise.model.runner import Runner
from peelwise.model.trace import Batch, Trace, batch_first, by_token

INNER = ".inner"  # behind a branch's name: the channels between its layers, heads or neurons


@dataclass
class Seen:
    """What one pass saw of one block."""

    stream: Stream
    backward: dict[str, Backward] = field(default_factory=dict)

    @classmethod
    def of_all(cls, parts: Sequence[Seen], order: Tensor) -> Seen:
        """Return what processes saw together, each of its own tokens.

        Args:
            parts: of each process.
            order: which rows of the stream, one process after another, come first, second, and so on in the text.
        """
        streams, backward = [part.stream for part in parts], dict[str, Backward]()
        for part in parts:
            for name, found in part.backward.items():
                if name in backward:
                    backward[name].merge(found)
                else:
                    backward[name] = found
        first = streams[0]
        earlier = [each.earlier for each in streams if each.earlier is not None]
        return cls(
            Stream(
                torch.cat([each.before for each in streams])[order],
                torch.cat([each.after for each in streams])[order],
                {name: torch.cat([each.updates[name] for each in streams])[order] for name in first.updates},
                torch.cat(earlier)[order] if earlier else None,
                first.attention,  # as one process alone, which looks at one sequence too
            ),
            backward,
        )


def observe(
    runner: Runner,
    all_parts: Sequence[Parts],
    trace: Trace,
    *,
    gradients: bool = True,
    of_weights: bool = True,
    after_block: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[Parts, Seen]]:
    """Yield every block, the last one first, with what a pass forward and (with ``gradients``) backward saw of it.

    Processes that share ``trace`` run their own tokens each, and all see all of them.

    Args:
        runner: the model.
        all_parts: the parts of its blocks, in order.
        trace: tokens, with stations.
        gradients: also differentiate the loss.
        of_weights: also add up the gradients of weights, which costs a third of the backward pass.
        after_block: called with the number of blocks done.
    """
    several = runner.processes.count > 1
    order = _order(runner, trace) if several else torch.empty(0)
    above = runner.tail_gradients(trace) if gradients else None
    for done, parts in enumerate(reversed(all_parts), start=1):
        seen, above = _observe_block(runner, parts, trace, above, of_weights)
        yield parts, Seen.of_all(runner.processes.exchange(seen), order) if several else seen
        after_block(done)


def _order(runner: Runner, trace: Trace) -> Tensor:
    """Return the order in the text of the rows that all processes see, one process after another.

    Of a trace of several parts each process has some of the first and then some of the second: what a signal says of
    the first half of the tokens is to be of the same ones as in one process alone.
    """
    batches = iter(trace.batches)
    own = [sum(int(next(batches).read.sum()) for _ in range(count)) for count in trace.parts or (len(trace.batches),)]
    places, start = dict[tuple[int, int], Tensor](), 0
    for process, rows in enumerate(runner.processes.exchange(own)):
        for part, n in enumerate(rows):
            places[part, process] = torch.arange(start, start + n)
            start += n
    return torch.cat([places[key] for key in sorted(places)])


def _observe_block(
    runner: Runner, parts: Parts, trace: Trace, above: list[Gradient] | None, of_weights: bool
) -> tuple[Seen, list[Gradient] | None]:
    index = parts.block.index
    backward: dict[str, Backward] = {}
    updates: dict[str, list[Tensor]] = {}
    attention = AttentionSums(causal=trace.batches[0].examples is None)
    below: list[Gradient] = []
    for place, batch in enumerate(trace.batches):
        with torch.set_grad_enabled(above is not None), outputs(parts, of_weights) as found, attention:
            passed = runner.in_graph(parts.block, batch)
        if not updates:
            attention.only_first()  # the first micro-batch says enough of what attention looks at
        for branch in parts.branches:
            y = found.tensors.get(branch.name)
            if y is not None and y.shape == passed.hidden.shape:
                updates.setdefault(branch.name, []).append(by_token(y.detach(), batch.read).flatten(1).float())
        if above is not None:
            below.append(_add_gradients(parts, batch, found, passed, above[place], backward))
    runner.work.add(runner.shares[index], trace.predicted, 1 if above is None else 3)
    before, after, earlier = (_rows(trace, index + away) for away in (0, 1, -1))
    stream = Stream(
        before,
        after,
        {name: torch.cat(rows) for name, rows in updates.items()},
        None if earlier is None else before - earlier,
        attention.found(),
    )
    return Seen(stream, backward), None if above is None else below


def _rows(trace: Trace, station: int) -> Any:
    if station < 0:
        return None
    return torch.cat([by_token(batch.stations[station], batch.read).flatten(1).float() for batch in trace.batches])


def _add_gradients(
    parts: Parts,
    batch: Batch,
    found: Outputs,
    passed: Passed,
    above: Gradient,
    into: dict[str, Backward],
) -> Gradient:
    """Add one micro-batch to what the backward pass found, and return the gradient before the block."""
    used = {name: y for name, y in found.tensors.items() if y.requires_grad}
    below, results = passed.back(above, list(used.values()))
    for (name, y), g in zip(used.items(), results, strict=True):
        rows, g_rows = token_channels(y.detach(), batch), None if g is None else token_channels(g, batch)
        if rows is None or g_rows is None:
            continue
        heads = parts.head_dim if name == ATTENTION + INNER else None
        part = into.setdefault(name, Backward(head_dim=heads))
        part.gate.update(rows, g_rows)
        x = found.inputs.get(name)
        x_rows = None if x is None else token_channels(x.detach(), batch)
        if x_rows is not None:
            part.gradient = part.gradient or GradientSums()
            part.gradient.update(x_rows, g_rows)
    return below


def token_channels(y: Tensor, batch: Batch) -> Tensor | None:
    """Return a tensor's rows of tokens that were read ``[n, d]``, float32; ``None`` where it has no row per token."""
    shape, y = batch.read.shape, batch_first(y, batch.read)
    if y.shape[:2] == shape:
        return y.flatten(2)[batch.read].float() if y.dim() > 2 else None
    if y.dim() == 2 and y.shape[0] == batch.read.numel():
        return y.view(*shape, -1)[batch.read].float()
    return None


@dataclass
class Outputs:
    """What the parts of a block gave, in the graph: by a part's name, and inputs of linear layers by theirs."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def outputs(parts: Parts, of_weights: bool) -> Iterator[Outputs]:
    """Record what linear layers, norms and branches of a block give while the context is open.

    Args:
        parts: of the block.
        of_weights: also what linear layers are given.
    """
    found = Outputs()
    handles = []
    inner = {id(branch.writer.module): branch.name + INNER for branch in parts.branches if len(branch.linears) > 1}

    def keep(name: str, *, linear: bool) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            y = y[0] if isinstance(y, (tuple, list)) else y
            if not isinstance(y, Tensor):
                return
            found.tensors[name] = y
            x = args[0] if args else next(iter(kwargs.values()), None)
            if linear and isinstance(x, Tensor):
                if of_weights:
                    found.inputs[name] = x
                if id(module) in inner:
                    found.tensors[inner[id(module)]] = x

        return after

    wanted: list[tuple[str, nn.Module, bool]] = [
        *((name, linear.module, True) for name, linear in parts.linears.items()),
        *((name, norm, False) for name, norm in parts.norms.items()),
        *((branch.name, branch.module, False) for branch in parts.branches),
    ]
    try:
        for name, module, linear in wanted:
            handles.append(module.register_forward_hook(keep(name, linear=linear), with_kwargs=True))
        yield found
    finally:
        for handle in handles:
            handle.remove()


class AttentionSums(TorchFunctionMode):
    """Sees the queries and keys of PyTorch's scaled dot-product attention, and adds up what it pays attention to.

    Where a model computes its attention by other means nothing is seen.

    Args:
        causal: whether no position sees a later one; else what each sees is what the function is told.
    """

    def __init__(self, *, causal: bool = True) -> None:
        super().__init__()
        self._causal = causal
        self._entropy = self._sink = 0.0
        self._count = 0
        self._closed = False

    def only_first(self) -> None:
        """Look at no further micro-batch."""
        self._closed = True

    def found(self) -> tuple[float, float] | None:
        """Return mean entropy (over the log of the keys seen) and mean attention to the first key."""
        return (self._entropy / self._count, self._sink / self._count) if self._count else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the arguments of attention, and call the function as it was called."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and not self._closed and len(args) >= 2:
            with torch.no_grad(), torch._C.DisableTorchFunction():
                q, k = args[0].detach(), args[1].detach()
                if self._causal or kwargs.get("is_causal"):
                    self._add(q, k, kwargs.get("scale"))
                else:
                    self._add_seen(q, k, kwargs.get("scale"), kwargs.get("attn_mask"))
        return func(*args, **kwargs)

    def _add(self, q: Tensor, k: Tensor, scale: float | None) -> None:
        """Add where no position sees a later one."""
        length, keys = q.shape[-2], k.shape[-2]
        future = torch.ones(length, keys, dtype=torch.bool, device=q.device).triu(1 + keys - length)
        p = _scores(q, k, scale).masked_fill(future, -torch.inf).softmax(-1)
        seen = torch.arange(2, length + 1, device=q.device).float()
        self._add_up(p[..., 1:, :], seen)  # the first token sees itself alone

    def _add_seen(self, q: Tensor, k: Tensor, scale: float | None, mask: Tensor | None) -> None:
        """Add where every position sees what ``mask`` allows, a bool or what is added to the scores."""
        scores = _scores(q, k, scale)
        if mask is not None:
            mask = mask[:1] if mask.dim() == scores.dim() else mask
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
        p = scores.softmax(-1)
        seen = (p > 0).sum(-1).clamp_min(2).float()
        self._add_up(p, seen)

    def _add_up(self, p: Tensor, seen: Tensor) -> None:
        """Add attention ``p [1, heads, t, keys]``, of which so many keys are ``seen``."""
        entropy = -(p * p.clamp_min(1e-30).log()).sum(-1) / seen.log()
        self._entropy += float(entropy.sum())
        self._sink += float(p[..., 0].sum())
        self._count += entropy.numel()


def _scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """Return the scores ``[1, heads, t, keys]`` of the first sequence."""
    q, k = q[:1].float(), k[:1].float()
    if q.shape[1] != k.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
