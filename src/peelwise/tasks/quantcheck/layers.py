"""The layers of a quantised model beside their parent's: what they hold, their inputs, and better codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peelwise.engine.sweep import token_rows
from peelwise.errors import FormatError, ModelError
from peelwise.formats.base import Encoded, Format
from peelwise.formats.dense import Stored
from peelwise.formats.membership import scaled_part
from peelwise.formats.recover import recover
from peelwise.model.capture import captured
from peelwise.model.checkpoints import gguf_file
from peelwise.model.layers import Block, LinearLayer, vocabulary_size
from peelwise.model.runner import Runner
from peelwise.model.trace import Trace
from peelwise.model.weights.gguf import stored_layers
from peelwise.model.weights.held import Held
from peelwise.model.weights.reading import reading_of
from peelwise.records.base import SplitRecord
from peelwise.records.quantcheck import LayerCheck
from peelwise.references.allocation import predicted_damage
from peelwise.references.asymmetric import InputSums
from peelwise.references.coded import damped
from peelwise.references.quantized import lowest_on_support, quadratic, solve
from peelwise.stats.gram import GramSum
from peelwise.tasks.quantcheck.settings import QuantcheckSettings


@dataclass(frozen=True)
class Candidate:
    """A model with what the record says about it."""

    model: nn.Module
    name: str
    source: str | None = None


def matched(
    quantised: Candidate, parent: Candidate, blocks: tuple[Block, ...], above: tuple[Block, ...]
) -> dict[LinearLayer, LinearLayer]:
    """Return the parent's map of every map of the quantised model.

    Raises:
        ModelError: If there is none, of this shape; or if the vocabularies differ.
    """
    sizes = vocabulary_size(quantised.model), vocabulary_size(parent.model)
    if None not in sizes and sizes[0] != sizes[1]:
        raise ModelError(
            f"{parent.name} knows {sizes[1]} tokens, {quantised.name} {sizes[0]}: it is not its parent. Give the model "
            "that was quantised."
        )
    if len(blocks) != len(above):
        raise ModelError(
            f"{parent.name} has {len(above)} blocks, {quantised.name} {len(blocks)}: it is not its parent. Give the "
            "model that was quantised."
        )
    by_name = {linear.name: linear for block in above for linear in block.linears}
    pairs = {}
    for linear in (linear for block in blocks for linear in block.linears):
        twin = by_name.get(linear.name)
        if twin is None:
            raise ModelError(f"{parent.name} has no layer {linear.name}, so it is not the parent of {quantised.name}.")
        shapes = tuple(twin.weight().shape), tuple(linear.weight().shape)
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"{linear.name} is {shapes[0]} in {parent.name} and {shapes[1]} in {quantised.name}: it is not its "
                "parent. Give the model that was quantised."
            )
        pairs[linear] = twin
    return pairs


def held_of(quantised: Candidate, blocks: tuple[Block, ...], form: Format | None) -> dict[LinearLayer, Held]:
    """Return what the quantised model's maps hold: by their modules, in their GGUF file, or read from plain weights.

    Raises:
        FormatError: If none is quantised, or the plain weights do not obey ``form``.
    """
    linears = [linear for block in blocks for linear in block.linears]
    found = {m: h for m in linears if m.low_bit and (h := m.held()) is not None}
    reading = reading_of(quantised.model)
    if reading is not None:
        for linear in (m for m in linears if m.name in reading.numbers):
            stored = Stored(layout=f"{reading.method}, numbers", each=reading.numbers[linear.name])
            found[linear] = Held(stored, Encoded(linear.weight().float()))
    file = gguf_file(quantised.source)
    if not found and file is not None:
        found = stored_layers(file, blocks, numbers=True)
    if form is not None:  # all layers, or the experts beside layers that say what they hold themselves
        unsaid = [linear for linear in linears if linear not in found and (linear.is_expert or not found)]
        found |= {linear: _read(linear, form) for linear in unsaid}
    if not found:
        raise FormatError(
            f"{quantised.name} says of no layer which format it holds. If its plain weights were quantised and saved, "
            "name the format, such as --format int3:group=32."
        )
    return found


def _read(linear: LinearLayer, form: Format) -> Held:
    try:
        return Held(form, recover(linear.weight(), form))
    except FormatError as error:
        raise FormatError(f"{linear.name}: {error}") from error


@torch.no_grad()
def input_sums(runner: Runner, block: Block, trace: Trace) -> dict[LinearLayer, InputSums]:
    """Return ``S = E[x x^T] [d_in, d_in]`` of every map of a block over the tokens that it is given, float32.

    Maps that share an input share the tensor. A bias is the same in both models, so no column of ones is added. Experts
    that no token is routed to have sums of zero.
    """
    totals: dict[LinearLayer, GramSum] = {}
    first_of: dict[LinearLayer, LinearLayer] = {}
    for batch in trace.batches:
        with captured(block.linears) as capture:
            runner.run_block(block, batch.stations[block.index], batch)
        first_of.update(capture.groups)
        for first in set(capture.groups.values()):
            for call in capture.calls[first]:
                rows = token_rows(call.x, call, batch, first, ones=False)
                totals.setdefault(first, GramSum()).update(rows)
    runner.work.add(runner.shares[block.index], trace.predicted)
    means = {first: InputSums(total.mean().float(), tokens=total.n) for first, total in totals.items() if total.n}
    found = {linear: means[first] for linear, first in first_of.items() if first in means}
    for linear in (m for m in block.linears if m.is_expert and m not in found):
        d_in = linear.weight().shape[1]
        found[linear] = InputSums(linear.weight().new_zeros((d_in, d_in), dtype=torch.float32), tokens=0)
    return found


@dataclass(frozen=True, eq=False)
class Layer:
    """One map: the parent's weights ``T``, what the quantised model holds, and the sums of the parent's inputs."""

    name: str
    block: int
    T: Tensor  # [d_out, d_in]
    own: Held
    fit: Tensor  # [d_in, d_in]
    select: Tensor
    report: Tensor
    F: Tensor | None = None  # [d_out, d_out] of the loss's gradients at its outputs
    part: float = 1.0  # of all tokens of report that it is given
    base: Tensor | None = None  # [d_out, d_in], before a fine-tune
    input_error: float | None = None  # mean squared change of its output when its inputs are rounded

    def error(self, S: Tensor, encoded: Encoded) -> float:
        """Return ``tr((W - T) S (W - T)^T)`` of what codes stand for."""
        return float(quadratic(S, self._change(encoded)).sum())

    def _change(self, encoded: Encoded) -> Tensor:
        return self.own.format.decode(encoded).to(self.T) - self.T

    @property
    def has_codes(self) -> bool:
        """Whether codes can be looked for in its format."""
        return scaled_part(self.own.format) is not None

    def best(self, settings: QuantcheckSettings) -> tuple[Encoded, float]:
        """Return the codes found and the damping of the sums they were found in; those in use if no others do better.

        Every damping of the settings gets rounding with error feedback; the one that does best on select is solved.
        """
        form, starts = self.own.format, [self.own.encoded]
        rough = {
            d: self.error(self.select, solve(damped(self.fit, d), self.T, form, starts=starts, max_sweeps=0).encoded)
            for d in settings.dampings
        }
        damping = min(rough, key=lambda d: rough[d])
        found = solve(
            damped(self.fit, damping),
            self.T,
            form,
            starts=starts,
            max_sweeps=settings.max_sweeps,
            tolerance=settings.tolerance,
        ).encoded
        better = self.error(self.select, found) < self.error(self.select, self.own.encoded)
        return (found if better else self.own.encoded), damping

    def checked(self, encoded: Encoded | None, damping: float | None) -> LayerCheck:
        """Return the layer's line; with its parts if codes were looked for."""
        T, own, S = self.T, self.own, self.report
        energy = float(quadratic(S, T).sum()) or 1.0
        current = self.error(S, own.encoded)
        d_out, d_in = T.shape
        plain = LayerCheck(
            name=self.name,
            block=self.block,
            format=own.format.name,
            bits_per_weight=own.format.bits(d_out, d_in, own.encoded.support) / T.numel(),
            error=current / energy,
            predicted=None if self.F is None else self.part * predicted_damage(self._change(own.encoded), S, self.F),
            codes=self.has_codes,
            inputs=None if self.input_error is None else self.input_error / energy,
            fine_tune=None if self.base is None else float(quadratic(S, T - self.base.to(T)).sum()) / energy,
        )
        if encoded is None:
            return plain
        achieved, relaxed = self.error(S, encoded), 0.0
        if own.encoded.support is not None:
            relaxed = float(quadratic(S, lowest_on_support(S, T, own.encoded.support).to(T) - T).sum())
        return plain.model_copy(
            update={
                "rounded": self.error(S, own.format.encode(T, own.encoded.support)) / energy,
                "flipped": float((encoded.codes != own.encoded.codes).sum()) / T.numel(),
                "damping": damping,
                "split": SplitRecord(
                    irreducible=relaxed / energy,
                    price_of_precision=(achieved - relaxed) / energy,
                    left_on_the_table=(current - achieved) / energy,
                ),
            }
        )
