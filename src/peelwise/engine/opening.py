"""How an audit and a peel begin: what must be true of model and probe, and the model's own losses."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

from torch import nn

from peelwise.distributed.processes import ONE_PROCESS, Processes
from peelwise.distributed.sharding import check_blocks, is_sharded, shard_
from peelwise.engine.clock import Clock, Watcher
from peelwise.engine.session import LOSSES, ReportSession, Session
from peelwise.errors import ModelError, ProbeError, UnsupportedModelError
from peelwise.model.architectures import find_blocks, in_decoder, other_stacks, refuse_text, stack_of
from peelwise.model.fingerprint import check_finite
from peelwise.model.fresh import fresh_copy
from peelwise.model.layers import Block, LinearLayer, context_length, unwrapped, vocabulary_size
from peelwise.model.refined import chosen, frozen_note, names_of, only
from peelwise.model.runner import MICRO_BATCH_TOKENS, Runner, check_replay
from peelwise.model.selfcheck import check_dtypes, self_check
from peelwise.model.shared_weights import check_shared, without_shared
from peelwise.model.weights.held import Held
from peelwise.model.whereabouts import check_in_memory, untied_note
from peelwise.probe.examples import Examples
from peelwise.probe.limits import check_context, check_vocabulary
from peelwise.probe.probe import Probe
from peelwise.probe.rows import Split
from peelwise.records.base import Note, note
from peelwise.records.codes import NoteCode
from peelwise.records.options import Refine


def checked_blocks(
    model: nn.Module,
    probe: Probe,
    refine: Refine = "all",
    stepped: Collection[int] | None = None,
    *,
    batches: bool = False,
    stack: str | None = None,
    shared: bool = False,
    spread: bool = False,
) -> tuple[Block, ...]:
    """Return the blocks of a model that can be measured on ``probe``.

    Args:
        model: as it stands, with its flags of training.
        probe: the text.
        refine: which of their linear layers are asked about; see `peelwise.model.refined.chosen`.
        stepped: parameters that the optimiser has, where there is one.
        batches: whether a probe of batches will do.
        stack: the name of the list of blocks; ``None`` for the one that the architecture says.
        shared: whether layers that share a weight may be left out.
        spread: whether weights may be spread over processes (``fully_shard``).

    Raises:
        OptionError: If there are no such layers.
        UnsupportedModelError: If the architecture cannot be measured, or weights are not in memory.
        ModelError: If the model holds NaN or Inf.
        ProbeError: If the probe's tokens do not fit the model's vocabulary, or its sequences the context; if it is of
            batches and tokens are needed.
    """
    if probe.examples is not None and not batches:
        raise ProbeError(
            "Not yet: this needs a probe of token sequences, and the probe is of batches (Probe.from_batches), which "
            "peelwise.check, audit, compare and Monitor take."
        )
    check_in_memory(model)
    if not spread:
        _check_whole(model)
    blocks = chosen(find_blocks(model, stack), refine, stepped)
    if shared:
        blocks = without_shared(blocks)
    else:
        check_shared(blocks)
    check_dtypes(blocks)
    if spread:
        check_spread(blocks)
    if probe.examples is None:
        refuse_text(model)
        size, limit = vocabulary_size(model), context_length(model)
        if size is not None:
            check_vocabulary(probe, size)
        if limit is not None:
            check_context(probe, limit)
    check_finite(model)
    return blocks


def _check_whole(model: nn.Module) -> None:
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise UnsupportedModelError(
            "Not yet: this of a model whose weights are spread over processes (fully_shard), which peelwise.audit, "
            "check and Monitor measure. Give it the whole model, in one process."
        )


def check_spread(blocks: tuple[Block, ...]) -> None:
    """Check that every block of a model that is spread over processes can be run by itself.

    Raises:
        UnsupportedModelError: If one is gathered only together with others.
    """
    check_blocks({block.name: unwrapped(block.module) for block in blocks})


def check_dense(blocks: tuple[Block, ...]) -> None:
    """Check that no process has a part only of what the codes of a low-bit layer are made from.

    Raises:
        UnsupportedModelError: If one has.
    """
    for linear in (linear for block in blocks for linear in block.linears):
        if linear.low_bit and any(is_sharded(parameter) for parameter in linear.module.parameters()):
            raise UnsupportedModelError(
                f"Not yet: {linear.name} computes with a low-bit format, and its weight is spread over processes "
                "(fully_shard). Give the whole model to each of them."
            )


def open_session(
    model: nn.Module,
    blocks: tuple[Block, ...],
    probe: Probe,
    *,
    name: str,
    budget_seconds: float,
    micro_batch_tokens: int,
    watcher: Watcher | None,
    processes: Processes = ONE_PROCESS,
    checked: bool = False,
    gradients: bool = True,
) -> Session:
    """Start the clock and measure the model as it stands on all parts of the probe.

    With several ``processes`` all of them do the same: sequences and solves are shared out.
    ``checked`` says that this model has passed its self-checks before: only the replay of its loss is checked again;
    ``gradients`` whether those of it will be needed, and are checked.

    Raises:
        UnsupportedModelError: If calling the blocks one by one is not what the model does.
        ModelError: If its loss is no finite number.
    """
    runner = Runner(model, blocks, micro_batch_tokens=micro_batch_tokens, processes=processes)
    clock = Clock(budget_seconds, runner.work, watcher, processes)
    with clock.stage("self-checks"):
        if checked:
            check_replay(runner, runner.trace(probe.fit.at(slice(1))))
        notes = () if checked else first_notes(runner, probe.fit, gradients=gradients)
    with clock.stage(LOSSES):
        fit, select, report = runner.trace(probe.fit), runner.trace(probe.select), runner.trace(probe.report)
    for trace in (fit, select, report):
        _check_loss(trace.mean, name, probe)
    return Session(runner, report, probe, fit, select, clock, probe.seed, low_bit_layers(blocks), notes)


def first_notes(runner: Runner, split: Split, *, gradients: bool = True, causal: bool = True) -> tuple[Note, ...]:
    """Make the self-checks of a model, and return what there is to say of it besides its numbers."""
    return (
        *self_check(runner, split, gradients=gradients, causal=causal),
        *frozen_note(runner.blocks),
        *untied_note(runner.model),
        *_notes_on_batches(runner, split),
    )


def open_report(
    model: nn.Module, blocks: tuple[Block, ...], report: Split, *, micro_batch_tokens: int = MICRO_BATCH_TOKENS
) -> ReportSession:
    """Measure the model as it stands on one part of a probe, to evaluate changes there that are already known."""
    runner = Runner(model, blocks, micro_batch_tokens=micro_batch_tokens)
    return ReportSession(runner, runner.trace(report))


def untrained_session(session: Session, probe: Probe) -> Session | None:
    """Return a session on the same architecture at initialisation, its work charged to the clock of ``session``.

    Args:
        session: on the model.
        probe: what the initialised model is measured on.

    Returns ``None`` where the model cannot be initialised again.
    """
    fresh = fresh_copy(session.runner.model, session.seed)
    if fresh is None:
        return None
    measured = session.runner.blocks
    found, asked = find_blocks(fresh, stack_of(measured)), names_of(measured)
    if not asked <= names_of(found):
        return None  # what was put into the model after it was made, such as adapters, is in no configuration
    blocks = only(found, asked)
    own = session.runner
    if own.sharded:
        parameter = next(own.model.parameters())
        shard_(fresh, [block.module for block in found], parameter.dtype, parameter.device)
    runner = Runner(fresh, blocks, micro_batch_tokens=own.micro_batch_tokens, processes=own.processes)
    runner.work = own.work
    fit, select, report = runner.trace(probe.fit), runner.trace(probe.select), runner.trace(probe.report)
    return Session(runner, report, probe, fit, select, session.clock, session.seed, low_bit_layers(blocks))


def low_bit_layers(blocks: tuple[Block, ...]) -> dict[LinearLayer, Held]:
    """Return what the low-bit maps of a model hold; a witness for them must be of the same formats.

    Raises:
        FormatError: If a map does not store what its format says.
        UnsupportedModelError: If its codes cannot be read.
    """
    found = {linear: linear.held() for block in blocks for linear in block.linears if linear.low_bit}
    return {linear: held for linear, held in found.items() if held is not None}


def format_names(held: Mapping[LinearLayer, Held]) -> str:
    """Return the formats that low-bit maps hold, each once; empty if there are none."""
    return ", ".join(sorted({each.format.name for each in held.values()}))


def _notes_on_batches(runner: Runner, split: Split) -> Iterator[Note]:
    """Yield what a reader of numbers on batches should know: what is missing of next tokens, and of an encoder."""
    if isinstance(split, Examples):
        yield note("own-loss")
        others = other_stacks(runner.model, runner.blocks)
        if others:
            code: NoteCode = "encoder-left-out" if in_decoder(runner.model, runner.blocks) else "stacks-left-out"
            values = {} if code == "encoder-left-out" else {"stack": stack_of(runner.blocks)}
            yield note(code, names=", ".join(others), **values)


def _check_loss(loss: float, name: str, probe: Probe) -> None:
    if not math.isfinite(loss) and probe.examples is not None:
        raise ModelError(f"The loss of {name} on the batches is {loss}: expected a finite number for each example.")
    if not math.isfinite(loss):
        raise ModelError(f"The loss of {name} on the probe is {loss}: its activations overflow. Try --dtype float32.")
    if loss < 0:  # of tokens it is not
        raise ModelError(
            f"The mean loss of {name} on the batches is {loss:.4g}: gains are judged by the size of the loss, so it "
            "must not be below 0. Add a constant to it."
        )
