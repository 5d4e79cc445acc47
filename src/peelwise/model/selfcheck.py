"""Checks of the model itself, on one sequence, before any number of it is shown.

What is measured rests on assumptions about a model's code that a model can break without a word: that a position reads
no later one (where the next token is predicted), that a change hooked into a linear layer does what the same change
written into its weight would do, that calling the blocks one by one gives loss and gradients of the whole, and that
what is refined is most of the blocks. Each is tested; what fails is an error that names the layer, and what is left out
is a note.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from peelwise.errors import NotCausalError, PeelwiseError, UnsupportedModelError
from peelwise.model.calls import replaced_hidden
from peelwise.model.capture import captured
from peelwise.model.carried import Carried
from peelwise.model.experts import ExpertLinear, experts_as_they_are
from peelwise.model.gradients import differentiable, gradients_by_layer, not_differentiable
from peelwise.model.layers import Block, LinearLayer, plain_name, unwrapped
from peelwise.model.parts import parts_of
from peelwise.model.refined import is_adapted
from peelwise.model.runner import Runner, check_replay
from peelwise.model.splice import spliced
from peelwise.model.trace import Batch, Trace
from peelwise.model.weights.reading import reading_notes
from peelwise.model.weights.table import unread
from peelwise.probe.examples import Examples
from peelwise.probe.rows import Split
from peelwise.records.base import Note, note
from peelwise.stats.linalg import solve_dtype

_CHANGE = 0.1  # of a weight's own root mean square: large enough to be seen in half precision
_NAMED = 8  # kinds of parameters that a note names


@dataclass(frozen=True)
class _Slack:
    """How far two ways of computing the same may be apart, relative to its size."""

    effect: float
    gradient: float
    loss: float


_EXACT, _HALF = _Slack(0.02, 0.01, 1e-4), _Slack(0.35, 0.25, 1e-2)


def self_check(runner: Runner, split: Split, *, gradients: bool = True, causal: bool = True) -> tuple[Note, ...]:
    """Check on the first sequence of a split that the model is one that can be measured as it is.

    Afterwards ``runner.blocks`` have the layers that run and have a gradient, and experts beside such a one.

    In order: its own forward returns logits of every position; no logit moves with a later token (of examples instead:
    labels cost what the model says that they cost); blocks called one by one give its loss, and its gradients at every
    linear layer's output; a random change of a block's layers has the same effect through hooks as in the weights.
    Takes about as long as five training steps on that one sequence.

    Args:
        runner: of the model, whose weights are not to change meanwhile.
        split: tokens; one sequence is used.
        gradients: also compare gradients; without, a model that cannot be differentiated passes too.
        causal: also check that no logit moves with a later token.

    Returns:
        What is left out of refinement, where that is more than norms and biases, and an autocast of the model's own.

    Raises:
        UnsupportedModelError: With the name of the layer or block where a check fails.
        NotDifferentiableError: Of these, if gradients cannot be had.
    """
    few = split.at(slice(1))
    trace = _first_trace(runner, few)
    if not math.isfinite(trace.mean):
        return ()  # whoever reads the loss says so
    _first_replay(runner, trace)
    if trace.batches[0].examples is not None:
        check_own_loss(runner, trace)
    elif causal:
        check_causal(runner, trace.batches[0])
    called = {block: _called(runner, block, trace.batches[0]) for block in runner.blocks}
    if not any(called.values()) and any(block.linears for block in runner.blocks):
        raise _never_called(runner.blocks)
    if gradients:
        called = {block: _with_gradient(runner, trace, block, linears) for block, linears in called.items()}
    if gradients:
        check_gradients(runner, trace, called)
    called = {block: check_splice(runner, block, linears, trace.batches[0]) for block, linears in called.items()}
    live = {block: _and_experts(block, linears) for block, linears in called.items()}
    runner.blocks = tuple(replace(block, linears=linears) for block, linears in live.items())
    return (*_left_out(live), *_in_autocast(runner), *reading_notes(runner.model))


def check_dtypes(blocks: Sequence[Block]) -> None:
    """Check that the weights that are to be refined are numbers that can be computed with.

    Raises:
        UnsupportedModelError: For packed bytes or float8 in a layer that no known low-bit format explains.
    """
    for block in blocks:
        for linear in block.linears:
            weight, why = getattr(linear.module, "weight", None), unread(linear.module)
            if why is not None:
                raise UnsupportedModelError(f"Not yet: {linear.name}: {why}")
            if not isinstance(weight, Tensor) or linear.low_bit:
                continue
            if not weight.is_floating_point() or weight.element_size() < 2:
                raise UnsupportedModelError(
                    f"Not yet: {linear.name} ({type(linear.module).__name__}) keeps its weight as "
                    f"{str(weight.dtype).removeprefix('torch.')}, which is none of the low-bit formats that peelwise "
                    "reads. Open the model in bfloat16 or float32 (dequantised) instead."
                )


def check_causal(runner: Runner, batch: Batch) -> None:
    """Check that changing all tokens from a position on leaves all logits before it as they are.

    Tried from the second token on, which shows whether the first tokens read each other (a prefix, a chunk), and from
    an odd position near the middle, where no chunk of even size ends.

    Raises:
        NotCausalError: If an earlier logit moves: the model may read what it is to predict.
    """
    length = int(batch.attended[0].sum())
    before = runner.own_logits(batch)
    for cut in dict.fromkeys((1, length // 2 | 1)):
        if cut < length:
            _check_causal_from(runner, batch, before, cut, length)


def _check_causal_from(runner: Runner, batch: Batch, before: Tensor, cut: int, length: int) -> None:
    # Tokens of the sequence itself in another order: all are in the vocabulary, and most positions change.
    other = batch.inputs.clone()
    other[:, cut:length] = batch.inputs[:, :length].roll(cut + 1, dims=1)[:, cut:length]
    if torch.equal(other, batch.inputs):
        other[:, cut:length] = 0 if bool((batch.inputs[:, cut:length] != 0).any()) else 1
    moved = (runner.own_logits(batch, other) - before).float().abs()[0].amax(dim=-1)  # [t]
    earlier, later = float(moved[:cut].max()), float(moved[cut:length].max())
    if earlier > 1e-2 * later and earlier > 1e-4 * float(before.float().abs().max()):
        position = int(moved[:cut].argmax())
        raise NotCausalError(
            f"{type(runner.model).__name__} is not causal: with other tokens from position {cut} on, its logits at "
            f"position {position} move by {earlier:.3g}. It reads the tokens that it is to predict (a masked, "
            "bidirectional, prefix or chunk-wise model, or a missing mask), so its loss on them says nothing. peelwise "
            "measures causal language models."
        )


def check_own_loss(runner: Runner, trace: Trace) -> None:
    """Check that labels of the first example cost what the model says that they cost, where it is asked and says so.

    Raises:
        UnsupportedModelError: If not: its labels are shifted, weighted or of another kind.
    """
    batch = trace.batches[0]
    if batch.examples is None or batch.examples.loss is not None:
        return  # a loss that was given is what is meant
    own = getattr(runner.own_logits(batch), "loss", None)
    if not isinstance(own, Tensor) or own.numel() != 1:
        return
    slack = _slack(runner).loss
    if not math.isclose(float(own), trace.mean, rel_tol=slack, abs_tol=slack):
        raise UnsupportedModelError(
            f"{type(runner.model).__name__} computes a loss of {float(own):.4f} for the labels of the first example, "
            f"and the cross-entropy of its logits and them is {trace.mean:.4f} (shifted labels, or weights?). Give "
            "Probe.from_batches the loss that is meant; next tokens have Probe.from_tokens."
        )


def check_gradients(runner: Runner, trace: Trace, called: dict[Block, tuple[LinearLayer, ...]]) -> None:
    """Check that gradients passed back block by block are those of the whole model, at every linear layer's output.

    Raises:
        UnsupportedModelError: With the name of the layer with the largest difference.
    """
    slack = _slack(runner)
    whole = _whole_gradients(runner, trace, called)
    if not all(bool(g.isfinite().all()) for g in whole.values()):
        return  # nothing to compare; the sweep names the layer that overflows
    batch, gradient = trace.batches[0], runner.tail_gradients(trace)[0]
    differences: list[tuple[float, LinearLayer]] = []
    largest = max((_norm(g) for g in whole.values()), default=0.0)
    for block in reversed(runner.blocks):
        _, ((gradient, found),) = runner.block_gradients(block, batch, [gradient])
        runner.work.add(runner.shares[block.index], trace.predicted, 3)
        for linear in called[block]:
            true = whole[linear]
            other = _joined(found[linear]) if linear in found else torch.zeros_like(true)
            size = _norm(true) + 1e-3 * largest
            differences.append((_norm(other - true) / size if size else 0.0, linear))
    worst, linear = max(differences, key=lambda pair: pair[0])
    if not worst <= slack.gradient:
        raise UnsupportedModelError(
            f"The gradient at {linear.name}, passed back block by block, differs by {100 * worst:.0f} % from that of "
            f"the whole {type(runner.model).__name__}: its blocks are joined by more than the hidden state (shared "
            "keys and values, skip connections), which is not supported yet."
        )


def check_splice(runner: Runner, block: Block, linears: Sequence[LinearLayer], batch: Batch) -> tuple[LinearLayer, ...]:
    """Check that a random change hooked into a block's layers does what it does when it is written into the weights.

    Returns the layers for which it does: all but those below an adapter that reads their weight itself, as DoRA does
    for its norm (arXiv:2402.09353). Such a base is left as it is.

    Raises:
        UnsupportedModelError: With the name of the worst other layer for which it does not.
    """
    module = unwrapped(block.module)
    with runner.whole(block):
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        changes = {linear: _random_change(linear) for linear in linears if _writable(linear, names)}
    if not changes:
        return tuple(linears)
    slack = _slack(runner)
    base = _block_output(runner, block, batch, {})

    def apart(some: Sequence[LinearLayer]) -> float:
        with spliced({linear: changes[linear] for linear in some}):
            hooked = _block_output(runner, block, batch, {})
        with experts_as_they_are(module):  # what the model's own code makes of the weights
            true = _block_output(runner, block, batch, {m: changes[m] for m in some})
        effect = max(_norm(true - base), _norm(hooked - base))
        away = _norm(hooked - true) / max(effect, 1e-4 * _norm(base), 1e-30)
        return float(runner.processes.broadcast(away)) if runner.sharded else away  # how many are tried hangs on it

    if apart(list(changes)) <= slack.effect:
        return tuple(linears)
    found = {linear: apart([linear]) for linear in changes}
    read = {linear for linear, away in found.items() if not away <= slack.effect and is_adapted(linear)}
    rest = [linear for linear in changes if linear not in read]
    if read and (not rest or apart(rest) <= slack.effect):
        return tuple(linear for linear in linears if linear not in read)
    linear = max(found, key=lambda each: found[each])
    raise UnsupportedModelError(
        f"A change hooked into {linear.name} does not do what the same change of its weight does (they are "
        f"{100 * found[linear]:.0f} % apart at the block's output): {type(block.module).__name__} reads the weight "
        "itself somewhere, so replacement weights cannot be evaluated. Call the layer instead of using its weight."
    )


def _first_trace(runner: Runner, few: Split) -> Trace:
    """Run the model for the first time; what it raises is about the way in which it wants to be called."""
    try:
        return runner.trace(few)
    except PeelwiseError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError) as error:
        said = str(error).strip().splitlines()[0][:200] if str(error).strip() else "no message"
        if isinstance(few, Examples):
            raise UnsupportedModelError(
                f"{type(runner.model).__name__} could not be called with {', '.join(few.columns)} as keyword arguments:"
                f" {type(error).__name__}: {said}"
            ) from error
        raise UnsupportedModelError(
            f"{type(runner.model).__name__} could not be run on token ids [batch, tokens] to logits [batch, tokens, "
            f"vocabulary]: {type(error).__name__}: {said} Wrap it in a module whose forward does that."
        ) from error


def _first_replay(runner: Runner, trace: Trace) -> None:
    """Call the blocks one by one for the first time; what they raise is about how they want to be called."""
    try:
        check_replay(runner, trace)
    except PeelwiseError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError, RuntimeError) as error:
        said = str(error).strip().splitlines()[0][:200] if str(error).strip() else "no message"
        raise UnsupportedModelError(
            f"Not yet: the blocks of {type(runner.model).__name__} cannot be called one by one with the hidden state "
            f"alone: {type(error).__name__}: {said}"
        ) from error


def _called(runner: Runner, block: Block, batch: Batch) -> tuple[LinearLayer, ...]:
    """Return the linear layers of a block that run; a hook on another has no effect."""
    with torch.no_grad(), captured(block.linears) as capture:
        runner.run_block(block, batch.stations[block.index], batch)
    return tuple(linear for linear in block.linears if linear in capture.calls)


def _never_called(blocks: Sequence[Block]) -> UnsupportedModelError:
    block = next(block for block in blocks if block.linears)
    return UnsupportedModelError(
        f"None of the linear layers of {block.name} ({type(block.module).__name__}) is called when it runs, such "
        f"as {block.linears[0].name}: it reads their weights itself, so nothing can be measured in it."
    )


def _with_gradient(
    runner: Runner, trace: Trace, block: Block, linears: tuple[LinearLayer, ...]
) -> tuple[LinearLayer, ...]:
    """Return the layers of a block whose outputs have a gradient; others only choose, as which tokens are looked at."""
    if not linears:
        return ()
    batch = trace.batches[0]
    hidden = batch.stations[block.index].detach().requires_grad_(True)
    with torch.enable_grad(), captured(linears) as capture:
        out = runner.run_block(block, hidden, batch)
    used = tuple(differentiable(capture, out, block.name))
    for branch in parts_of(block).branches:
        if branch.linears and all(linear in capture.calls and linear not in used for linear in branch.linears):
            raise not_differentiable(branch.linears[0].name)  # a whole path is hidden: kernels of packed weights
    return used


def _and_experts(block: Block, linears: Sequence[LinearLayer]) -> tuple[LinearLayer, ...]:
    """Return some layers of a block, and the experts beside those among them: one sequence does not reach all."""
    reached = {id(linear.parameter) for linear in linears if linear.is_expert}
    kept = set(linears)
    return tuple(
        linear for linear in block.linears if linear in kept or (linear.is_expert and id(linear.parameter) in reached)
    )


def _left_out(called: dict[Block, tuple[LinearLayer, ...]]) -> Iterator[Note]:
    """Yield a note on parameters of blocks that are neither in a layer that runs nor norms, biases and the like."""
    count, left, total, seen = 0, 0, 0, set()
    owners: dict[str, list[int]] = {}  # by a parameter's name within its block
    for block, linears in called.items():
        inside = {id(p) for linear in (*linears, *block.frozen) for p in linear.module.parameters()}
        for name, parameter in unwrapped(block.module).named_parameters():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += parameter.numel()
            # One number a channel (a norm's gain, a bias) is left alone by design, however it is laid out.
            if id(parameter) not in inside and sum(size > 1 for size in parameter.shape) > 1:
                owners.setdefault(plain_name(name), []).append(block.index)
                count += 1
                left += parameter.numel()
    if owners:
        names = [f"{name} (block{'s' * (len(of) > 1)} {_spans(of)})" for name, of in owners.items()]
        yield note("left-out", count=count, share=left / total, names=", ".join(names[:_NAMED]))


def _spans(numbers: Sequence[int]) -> str:
    """Return ascending numbers in words, neighbours together: ``0-3, 7``."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _in_autocast(runner: Runner) -> Iterator[Note]:
    if runner.autocast is not None:
        yield note("autocast", dtype=str(runner.autocast).removeprefix("torch."))


def _whole_gradients(
    runner: Runner, trace: Trace, called: dict[Block, tuple[LinearLayer, ...]]
) -> dict[LinearLayer, Tensor]:
    """Return the gradient of the model's own loss at the output of every layer, by one plain backward pass."""
    linears = [linear for each in called.values() for linear in each]

    def entry(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return replaced_hidden(args, kwargs, lambda hidden: hidden.detach().requires_grad_(True))

    with ExitStack() as stack, torch.enable_grad():
        batch = trace.batches[0]
        handle = runner.running(batch)[0].module.register_forward_pre_hook(entry, with_kwargs=True)
        stack.callback(handle.remove)
        capture = stack.enter_context(captured(linears))
        loss = runner.own_loss(batch)
        used = differentiable(capture, loss, type(runner.model).__name__)
    if len(used) < len(linears):
        raise not_differentiable(next(linear.name for linear in linears if linear not in used))
    with runner.gathering():
        found = torch.autograd.grad(loss, [y for ys in used.values() for y in ys], allow_unused=True)
    grads = gradients_by_layer(used, found)
    return {
        linear: _joined(grads[linear]) if linear in grads else _joined([torch.zeros_like(y) for y in outputs])
        for linear, outputs in used.items()
    }


def _joined(gradients: Sequence[Tensor]) -> Tensor:
    """Return the gradients at all runs of a layer as one vector, float32."""
    return torch.cat([g.float().flatten() for g in gradients])


def _random_change(linear: LinearLayer) -> Tensor:
    weight = linear.weight()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(weight.shape, generator=generator).to(weight.device)
    scale = _norm(weight) / weight.numel() ** 0.5 or 1.0 / weight.shape[1] ** 0.5
    change = (_CHANGE * scale * noise).to(weight.dtype).float()
    return torch.nn.functional.pad(change, (0, int(linear.has_bias)))  # no change of the bias


def _writable(linear: LinearLayer, names: Mapping[int, str]) -> bool:
    """Whether the weight is in a plain parameter, one of ``names``, that another can stand in for."""
    weight = linear.parameter
    if not isinstance(weight, nn.Parameter) or type(weight) not in (nn.Parameter, Carried):
        return False
    numbers = weight.is_floating_point() and not weight.is_meta
    return numbers and id(weight) in names and not linear.low_bit


def _written(changes: Mapping[LinearLayer, Tensor], names: Mapping[int, str]) -> dict[str, Tensor]:
    """Return by name the parameters that the changes of some layers, their biases left out, would be written into."""
    written: dict[str, Tensor] = {}
    for linear, change in changes.items():
        parameter, weight = linear.parameter, linear.weight()
        assert isinstance(parameter, nn.Parameter)
        name = names[id(parameter)]
        own = (weight.float() + change[:, : weight.shape[1]]).to(weight.dtype)
        if isinstance(linear.module, ExpertLinear):
            written.setdefault(name, parameter.detach().clone())
            linear.module.matrix(written[name]).copy_(own)
        else:
            written[name] = own.T if linear.transposed else own
    return written


@torch.no_grad()
def _block_output(runner: Runner, block: Block, batch: Batch, changes: Mapping[LinearLayer, Tensor]) -> Tensor:
    """Return what a block gives, with ``changes`` written into its weights."""
    hidden, module = batch.stations[block.index], unwrapped(block.module)
    if not changes:
        return runner.run_block(block, hidden, batch).float()
    with runner.whole(block):
        weights = _written(changes, {id(parameter): name for name, parameter in module.named_parameters()})
        if runner.sharded:
            # In the place of what was gathered, which is forgotten when the block has run.
            for name, weight in weights.items():
                path, _, leaf = name.rpartition(".")
                module.get_submodule(path).register_parameter(leaf, nn.Parameter(weight, requires_grad=False))
            return runner.run_block(block, hidden, batch).float()
    call = batch.calls[block.index]
    assert call is not None  # no layer of a block that is skipped is checked
    args, kwargs = batch.ways.with_handed(call, {})
    with runner.as_called(hidden):
        out = functional_call(module, weights, (hidden, *args), kwargs)
    return (out if isinstance(out, Tensor) else out[0]).float()


def _norm(x: Tensor) -> float:
    return float(x.to(solve_dtype(x.device)).norm())  # squares of large activations overflow in float32


def _slack(runner: Runner) -> _Slack:
    dtypes = {p.dtype for p in runner.model.parameters() if p.is_floating_point()}
    return _EXACT if dtypes <= {torch.float32, torch.float64} and runner.autocast is None else _HALF
