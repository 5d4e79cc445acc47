"""Run a model from any block on, and block by block backwards, with cached stations.

The model's own code embeds tokens, builds masks and computes logits, or whatever the loss is made of; only its blocks
are called one by one, with the arguments they were seen to get. Stations are ``H_0`` (input of the first block) to
``H_L``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peelwise.distributed.processes import ONE_PROCESS, Processes
from peelwise.distributed.sharding import gathered, gathering, is_sharded
from peelwise.errors import UnsupportedModelError
from peelwise.model.architectures import find_head, in_decoder, inner_lists, other_stacks
from peelwise.model.calls import hidden_of, skipping, uncached, without_hidden
from peelwise.model.capture import Capture, captured
from peelwise.model.gradients import differentiable, gradients_by_layer
from peelwise.model.handed import Gradient, Handed, Passed, Watch, Ways
from peelwise.model.layers import Block, LinearLayer, check_device, unwrapped
from peelwise.model.losses import losses_of, sequence_losses, token_losses
from peelwise.model.refusals import no_gradient, not_once, other_shapes, too_few_logits
from peelwise.model.spill import spill_of
from peelwise.model.trace import Batch, Trace
from peelwise.probe.examples import Examples
from peelwise.probe.rows import Split
from peelwise.records.options import MICRO_BATCH_TOKENS as MICRO_BATCH_TOKENS


class Work:
    """Counts token passes in units of one forward pass of the whole model over one token."""

    def __init__(self) -> None:
        self.token_forwards = 0.0

    def add(self, share: float, tokens: float, times: float = 1.0) -> None:
        """Add ``times`` passes of ``share`` (0..1) of the model over ``tokens``."""
        self.token_forwards += share * tokens * times


class Runner:
    """The moving parts of a model, and the ways of running them that an audit needs.

    Args:
        model: any model whose blocks feed each other.
        blocks: its blocks, from `find_blocks`.
        micro_batch_tokens: tokens that go through the model at a time; results do not depend on it.
        processes: the processes that share the work; all of them call the same methods in the same order.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        *,
        micro_batch_tokens: int = MICRO_BATCH_TOKENS,
        processes: Processes = ONE_PROCESS,
    ) -> None:
        check_device(model)
        self.model, self.processes = unwrapped(model), processes
        self.spill = spill_of(self.model)  # where stations and changes go to; of a model in memory nowhere
        self.sharded = any(is_sharded(p) for p in model.parameters())
        self._accepted = _accepted(self.model)
        self._with_targets = False  # for models that return the last position's logits unless they get targets
        self.blocks = tuple(blocks)
        self.head = find_head(self.model, self.blocks)
        self.micro_batch_tokens = micro_batch_tokens
        self.autocast: torch.dtype | None = None  # what the model's own forward computes its blocks in, if it says so
        self.work = Work()
        sizes = [sum(p.numel() for p in b.module.parameters()) for b in self.blocks]
        head = sum(p.numel() for p in self.head.parameters()) if self.head is not None else 0
        # An encoder, or other stages, run with the model's ends.
        beside = other_stacks(self.model, self.blocks).values()
        head += sum(p.numel() for stack in beside for p in stack.parameters())
        total = max(sum(sizes) + head, 1)
        self.shares = [size / total for size in sizes]
        self.head_share = head / total

    def kept(self, tensor: Tensor) -> Tensor:
        """Return what there is one of for every block, or many: on disk where the weights are, else as it is."""
        return tensor if self.spill is None else self.spill.kept(tensor)

    # -- forward ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def trace(self, split: Split) -> Trace:
        """Run the whole model over a split, keeping the stations and the arguments of every block."""
        batches = list(self._batches(split))
        losses = [self._traced(batch) for batch in batches]
        self.work.add(1.0, split.tokens)
        tokens = split.weights.sum(dim=1).double().to(batches[0].inputs.device)
        return Trace(batches, self._of_all(losses, split.sequences), tokens)

    @torch.no_grad()
    def own_losses(self, split: Split) -> Tensor:
        """Run the whole model over a split and return the losses ``[sequences]`` alone; nothing is kept."""
        losses = [sequence_losses(self._call(batch), batch) for batch in self._batches(split)]
        self.work.add(1.0, split.tokens)
        return self._of_all(losses, split.sequences)

    @torch.no_grad()
    def losses_ahead(self, split: Split) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the whole model over a split and return what its logits cost, and keep nothing.

        Returns:
            Per sequence ``[sequences]``: loss and number of the next tokens; loss of those that have one behind them,
            and loss of that one under the same logits. A model whose labels were shifted twice predicts the latter.
        """
        columns: list[list[Tensor]] = [[], [], [], []]
        for batch in self._batches(split):
            logits = self._call(batch)
            own = token_losses(logits, batch.targets).double() * batch.weights  # [b, t]
            both = batch.weights[:, :-1] & batch.weights[:, 1:]
            after = token_losses(logits[:, :-1], batch.targets[:, 1:]).double() * both
            rows = own.sum(1), batch.weights.sum(1).double(), (own[:, :-1] * both).sum(1), after.sum(1)
            for column, row in zip(columns, rows, strict=True):
                column.append(row)
        self.work.add(1.0, split.tokens)
        first, second, third, fourth = (self._of_all(column, split.sequences) for column in columns)
        return first, second, third, fourth

    @torch.no_grad()
    def losses_from(self, trace: Trace, start: int) -> Tensor:
        """Return the losses ``[sequences]`` of running blocks ``start..`` on the cached station before them."""
        losses = []
        for batch in trace.batches:
            hidden, handed = batch.stations[start], Handed()
            for block in self.blocks[start:]:
                hidden = self.run_block(block, hidden, batch, handed)
            losses.append(self.end_losses(batch, hidden))
        self.work.add(sum(self.shares[start:]) + self.head_share, trace.predicted)
        return self._of_all(losses, len(trace.tokens))

    def losses_without(self, trace: Trace, index: int) -> Tensor:
        """Return the losses ``[sequences]`` of the model without one block, whose input is passed on as its output.

        What it hands on beside the hidden state, such as keys and values for later blocks, stays.
        """
        passed = [replace(b, stations=[*b.stations[: index + 1], b.stations[index]]) for b in trace.batches]
        return self.losses_from(replace(trace, batches=passed), index + 1)

    @torch.no_grad()
    def refreshed(self, trace: Trace, start: int = 0) -> Trace:
        """Return the trace with stations behind block ``start`` and losses computed again."""
        batches, losses = [], []
        for old in trace.batches:
            batch = replace(old, stations=list(old.stations[: start + 1]), calls=list(old.calls))
            for block in self.blocks[start:]:
                self.advance(block, batch)
            losses.append(self.end_losses(batch, batch.stations[-1]))
            batches.append(batch)
        self.work.add(sum(self.shares[start:]) + self.head_share, trace.predicted)
        return Trace(batches, self._of_all(losses, len(trace.tokens)), trace.tokens)

    def _of_all(self, losses: list[Tensor], sequences: int) -> Tensor:
        """Return the losses of all processes' sequences, in their order, without those that only fill up."""
        return self.processes.all_gather(torch.cat(losses))[:sequences]

    @torch.no_grad()
    def end_losses(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Return the losses ``[b]`` of one micro-batch, in nats, that the model's end makes of a last station."""
        return sequence_losses(self.logits(batch, hidden), batch)

    def run_block(self, block: Block, hidden: Tensor, batch: Batch, handed: Handed | None = None) -> Tensor:
        """Call one block as the model called it, and return its hidden state ``[b, t, d]``.

        Args:
            block: the block.
            hidden: what it is given, ``[b, t, d]``.
            batch: the micro-batch, with the arguments it was seen to get.
            handed: what blocks that ran just before have handed on beside the hidden state; what this one does is
                added. By default what the model itself handed on.
        """
        call = batch.calls[block.index]
        if call is None:
            return hidden
        args, kwargs = call = batch.ways.with_handed(call, handed or {})
        given = batch.ways.given(call)
        with self.as_called(hidden), self._in_step(block.module):
            out = block.module(hidden, *args, **kwargs)
        if handed is not None:
            handed |= batch.ways.written(call, given, out)
        return hidden_of(out)

    def advance(self, block: Block, batch: Batch) -> None:
        """Run one block on its station, and add the station behind it; blocks behind get what it hands on besides."""
        handed = Handed()
        batch.stations.append(self.kept(self.run_block(block, batch.stations[block.index], batch, handed)))
        batch.hand_on(block.index, handed)

    @contextmanager
    def whole(self, block: Block) -> Iterator[None]:
        """Let the weights of a block be whole inside; of a sharded model all processes enter together."""
        with ExitStack() as stack:
            with self.gathering():
                stack.enter_context(gathered(block.module))
            yield

    @contextmanager
    def as_called(self, hidden: Tensor) -> Iterator[None]:
        """Compute in the precision that the model's own forward calls its blocks in."""
        if self.autocast is None:
            yield
        else:
            with torch.autocast(hidden.device.type, self.autocast):
                yield

    # -- backward --------------------------------------------------------------------------------------

    def tail_gradients(self, trace: Trace, targets: Callable[[Batch, int], Tensor] | None = None) -> list[Gradient]:
        """Return per batch the gradient of the summed loss at the last station.

        Args:
            trace: the split to differentiate.
            targets: optional other targets, as a function of (batch, position of the batch).
        """
        gradients = []
        for position, batch in enumerate(trace.batches):
            hidden = batch.stations[-1].detach().requires_grad_(True)
            with torch.enable_grad():
                logits = self.logits(batch, hidden)
                wanted = batch.targets if targets is None else targets(batch, position)
                loss = (losses_of(logits, wanted, batch) * batch.weights).sum()
            if not loss.requires_grad:
                raise no_gradient(self.model, batch)
            with self.gathering():
                gradients.append(Gradient(torch.autograd.grad(loss, hidden)[0]))
        self.work.add(self.head_share, trace.predicted, 3)
        return gradients

    def block_gradients(
        self, block: Block, batch: Batch, gradients: Sequence[Gradient]
    ) -> tuple[Capture, list[tuple[Gradient, dict[LinearLayer, list[Tensor]]]]]:
        """Pass gradients back through one block; several share its forward pass. The caller counts the work.

        Args:
            block: the block.
            batch: the micro-batch, with its stations.
            gradients: gradients behind the block.

        Returns:
            What its linear layers saw, and for each gradient the one before it and those at each layer's output, one
            per run. A layer whose output has no gradient, as one that only chooses which tokens are looked at, or that
            the block's output does not depend on, is left out.

        Raises:
            NotDifferentiableError: If the block hides its inner results from gradients.
        """
        with torch.enable_grad():
            with captured(block.linears) as capture:
                passed = self.in_graph(block, batch)
            used = differentiable(capture, passed.out, block.name)
            outputs = [y for ys in used.values() for y in ys]
            results = []
            for left, gradient in zip(range(len(gradients), 0, -1), gradients, strict=True):
                below, found = passed.back(gradient, outputs, again=left > 1)
                results.append((below, gradients_by_layer(used, found)))
        return capture, results

    def in_graph(self, block: Block, batch: Batch) -> Passed:
        """Run one block on its station, as leaves of a graph where gradients are on."""
        wanted = torch.is_grad_enabled()
        hidden = batch.stations[block.index].detach().requires_grad_(wanted)
        given = batch.handed_to(block.index)
        leaves = {key: each.detach().requires_grad_(wanted) for key, each in given.items() if each.is_floating_point()}
        handed = dict(leaves)
        out = self.run_block(block, hidden, batch, handed)
        written = {key: each for key, each in handed.items() if leaves.get(key) is not each}
        return Passed(hidden, leaves, out, written, self.gathering)

    # -- the model's own ends --------------------------------------------------------------------------

    def head_inputs(self, trace: Trace, station: int = -1) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(x [n, d], y [n], logits_agree)``: inputs of the output head at the predicted tokens.

        The third is a bool tensor: whether the head's output is the model's logits as they are (no
        soft-capping or scaling behind it).

        Args:
            trace: the tokens.
            station: which station the model's end is given; the last one, or 0 for a model without its blocks.
        """
        assert self.head is not None
        seen: list[Tensor] = []
        handle = self.head.register_forward_hook(lambda _m, args, y: seen.append(args[0]) or seen.append(y))  # type: ignore[func-returns-value]
        inputs, targets, agree = [], [], True
        try:
            for batch in trace.batches:
                seen.clear()
                with torch.no_grad():
                    logits = self.logits(batch, batch.stations[station])
                agree = agree and len(seen) == 2 and seen[1].shape == logits.shape
                agree = agree and torch.allclose(seen[1].float(), logits.float(), atol=1e-5)
                if agree:
                    inputs.append(seen[0][batch.weights])
                    targets.append(batch.targets[batch.weights])
        finally:
            handle.remove()
        self.work.add(self.head_share, trace.predicted)
        if not self.processes.all_true(agree):
            return torch.empty(0), torch.empty(0), torch.tensor(False)
        return (
            self.processes.all_gather(torch.cat(inputs)),
            self.processes.all_gather(torch.cat(targets)),
            torch.tensor(True),
        )

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Wait inside for parts of a sharded model from all processes, once none of them has failed."""
        if not self.sharded:
            yield
            return
        with self.processes.gathering():
            yield

    @contextmanager
    def _in_step(self, module: nn.Module) -> Iterator[None]:
        """Let all processes meet before any part of a module is gathered: one may have failed in the part before."""
        begin, end = self.processes.begin_gathering, self.processes.end_gathering
        with ExitStack() as stack:
            for each in gathering(module) if self.sharded else ():
                # One before the hook that gathers it, which came first, and one behind.
                stack.callback(each.register_forward_pre_hook(lambda *_: begin(), prepend=True).remove)
                stack.callback(each.register_forward_pre_hook(lambda *_: end()).remove)
            yield

    def _call(self, batch: Batch, inputs: Tensor | None = None) -> Any:
        """Run the model's own forward and return its logits ``[b, t, vocabulary]``; of examples whatever it returns.

        Args:
            batch: what it is called with.
            inputs: other token ids instead of those of the batch.
        """
        with self._in_step(self.model):
            return self._called(batch, inputs)

    def _called(self, batch: Batch, inputs: Tensor | None) -> Any:
        if batch.examples is not None:
            return self._call_by_name(batch.columns)
        kwargs: dict[str, Any] = {}
        if hasattr(self.model, "config") and hasattr(self.model.config, "model_type"):
            if self._accepted("use_cache"):
                kwargs["use_cache"] = False
            if batch.padded:
                kwargs["attention_mask"] = batch.attended.long()
        if self._with_targets:
            kwargs["targets"] = batch.targets
        out = self.model(batch.inputs if inputs is None else inputs, **kwargs)
        logits = getattr(out, "logits", out)
        logits = logits[0] if isinstance(logits, (tuple, list)) else logits
        if not isinstance(logits, Tensor) or logits.dim() != 3:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} must return logits [batch, tokens, vocabulary]; got "
                f"{getattr(logits, 'shape', type(logits).__name__)}."
            )
        if logits.shape[1] != batch.inputs.shape[1] and not self._with_targets and self._accepted("targets"):
            self._with_targets = True  # nanoGPT
            batch.stations.clear()  # what the first try left
            batch.calls.clear()
            return self._called(batch, inputs)
        if logits.shape[1] != batch.inputs.shape[1]:
            raise too_few_logits(self.model, logits, batch)
        return logits

    def _call_by_name(self, columns: Mapping[str, Tensor]) -> Any:
        """Run the model's own forward on examples; what it does not take is for the loss alone."""
        kwargs: dict[str, Any] = {name: column for name, column in columns.items() if self._accepted(name)}
        if hasattr(getattr(self.model, "config", None), "model_type") and self._accepted("use_cache"):
            kwargs["use_cache"] = False
        return self.model(**kwargs)

    def running(self, batch: Batch) -> list[Block]:
        """Return the blocks that the model does not skip."""
        return [block for block, call in zip(self.blocks, batch.calls, strict=True) if call is not None]

    @torch.no_grad()
    def own_logits(self, batch: Batch, inputs: Tensor | None = None) -> Any:
        """Return the logits ``[b, t, vocabulary]`` of the model's own forward, optionally for other token ids.

        Of examples whatever it returns.
        """
        return self._call(batch, inputs)

    def own_loss(self, batch: Batch) -> Tensor:
        """Return the summed loss of the model's own forward, in the graph where gradients are on."""
        loss = (losses_of(self._call(batch), batch.targets, batch) * batch.weights).sum()
        if batch.examples is not None and torch.is_grad_enabled() and not loss.requires_grad:
            raise no_gradient(self.model, batch)
        return loss

    def _traced(self, batch: Batch) -> Tensor:
        """Run the model once, filling the batch's stations and calls; return its sequence losses."""
        batch.stations.clear()
        batch.calls.clear()

        runs: list[int] = []
        batch.ways = Ways()
        watch = Watch(batch.ways)

        def before(block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, args, kwargs = without_hidden(args, kwargs, block.module)
            if not batch.calls:
                runs.clear()  # the model is called once more, with targets
            runs.append(block.index)
            while len(batch.calls) < block.index:  # blocks that were skipped
                batch.stations.append(self.kept(hidden))
                batch.calls.append(None)
            batch.stations.append(self.kept(hidden))
            call = tuple(map(uncached, args)), {name: uncached(a) for name, a in kwargs.items()}
            batch.calls.append(watch.before(call))
            self.autocast = _autocast(hidden.device.type)

        def after(block: Block, out: Any) -> None:
            batch.rest = out[1:] if type(out) is list else tuple(out[1:]) if isinstance(out, tuple) else None
            watch.after(batch.rest or ())
            batch.stations[block.index + 1 :] = [self.kept(hidden_of(out))]

        with ExitStack() as stack:
            for block in self.blocks:
                stack.callback(
                    block.module.register_forward_pre_hook(
                        lambda _m, args, kwargs, block=block: before(block, args, kwargs), with_kwargs=True
                    ).remove
                )
                stack.callback(
                    block.module.register_forward_hook(lambda _m, _args, out, block=block: after(block, out)).remove
                )
            logits = self._call(batch)
        if not runs or runs != sorted(set(runs)):
            raise not_once(self.model, self.blocks, runs, batch)
        while len(batch.calls) < len(self.blocks):
            batch.stations.append(batch.stations[-1])
            batch.calls.append(None)
        if batch.examples is not None:
            self._find_positions(batch, batch.examples)
        return sequence_losses(logits, batch)

    def _find_positions(self, batch: Batch, examples: Examples) -> None:
        """Enter which positions count, now that the model has said how many it makes of an example."""
        shapes = {tuple(station.shape[:-1]) for station in batch.stations}
        if any(station.dim() != 3 for station in batch.stations) or len(shapes) > 1:
            raise other_shapes(self.model, shapes, inner_lists(self.blocks))
        decoder = in_decoder(self.model, self.blocks)
        batch.attended = examples.positions(batch.columns, batch.stations[0], decoder=decoder)
        batch.read = batch.attended & batch.weights

    def logits(self, batch: Batch, hidden: Tensor) -> Any:
        """Return the logits (of examples whatever it returns) that the model's own code makes of a last station."""
        with skipping(self.running(batch), hidden, batch.rest):
            return self._call(batch)

    def _batches(self, split: Split) -> Iterator[Batch]:
        device = next(self.model.parameters()).device
        per_batch = max(1, self.micro_batch_tokens // max(split.width, 1))
        part = self.processes.part(split.sequences)
        for start in range(0, len(part), per_batch):
            places = part[start : start + per_batch]
            rows = torch.tensor([0 if place is None else place for place in places])
            real = torch.tensor([place is not None for place in places])
            attended = split.read[rows]
            batch = Batch(
                split.inputs[rows].to(device),
                split.targets[rows].to(device),
                (split.weights[rows] & real[:, None]).to(device),
                padded=not bool(split.mask[rows].all()),
                attended=attended.to(device),
                read=(attended & real[:, None]).to(device),
            )
            if isinstance(split, Examples):
                batch.examples, batch.columns = split, self._as_called(split.taken(batch.inputs))
            yield batch

    def _as_called(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return columns where the model is, their floating-point numbers in its dtype if that is of half precision."""
        parameter = next(p for p in self.model.parameters() if p.is_floating_point())
        half = parameter.element_size() == 2
        return {
            name: column.to(parameter.device, parameter.dtype if half and column.is_floating_point() else column.dtype)
            for name, column in columns.items()
        }


def _autocast(device: str) -> torch.dtype | None:
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def check_replay(runner: Runner, trace: Trace) -> None:
    """Check that calling the blocks one by one gives the model's own loss, on a trace of few tokens.

    Raises:
        UnsupportedModelError: If it does not: something happens between the blocks.
    """
    again = runner.losses_from(trace, 0)
    if not torch.allclose(trace.losses, again, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise UnsupportedModelError(
            f"Calling the blocks of {type(runner.model).__name__} one after another gives loss "
            f"{float(again.sum()):.4f} instead of {float(trace.losses.sum()):.4f}: the model computes "
            "something between its blocks, which is not supported yet."
        )


def _accepted(model: nn.Module) -> Callable[[str], bool]:
    """Return whether the model's forward takes a keyword."""
    found = inspect.signature(model.forward).parameters
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found.values())
    return lambda name: anything or name in found
