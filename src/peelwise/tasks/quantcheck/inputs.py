"""What quantised inputs cost beside quantised weights: in the outputs of each layer, and in the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peelwise.engine.sweep import token_rows
from peelwise.errors import OptionError
from peelwise.model.capture import captured
from peelwise.model.layers import Block, LinearLayer
from peelwise.model.runner import Runner
from peelwise.model.trace import Trace
from peelwise.model.weights.activations import InputRounding, rounds_inputs, said_of_folder, with_rounded_inputs
from peelwise.model.weights.held import Held
from peelwise.model.weights.reading import reading_of
from peelwise.tasks.quantcheck.settings import QuantcheckSettings


@dataclass(frozen=True)
class QuantisedInputs:
    """The layers of a quantised model whose inputs are rounded when it runs.

    Attributes:
        before: those in front of which the rounding has to be put.
        themselves: those in memory that do it, with how in words.
    """

    before: Mapping[LinearLayer, InputRounding] = field(default_factory=dict)
    themselves: Mapping[LinearLayer, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.before or self.themselves)

    @property
    def names(self) -> str | None:
        """The formats, each once; ``None`` if there are none."""
        found = {each.format.name for each in self.before.values()} | set(self.themselves.values())
        return ", ".join(sorted(found)) or None

    def get(self, linear: LinearLayer) -> InputRounding | None:
        """Return the rounding to put in front of a layer."""
        return self.before.get(linear)


def quantised_inputs(
    model: nn.Module, held: Mapping[LinearLayer, Held], settings: QuantcheckSettings
) -> QuantisedInputs:
    """Return which of the quantised layers get rounded inputs, as asked for or as folder and layers say.

    Raises:
        OptionError: If inputs are to be rounded in another way than layers in memory do themselves.
    """
    themselves = {linear: how for linear in held if (how := rounds_inputs(linear.module)) is not None}
    form = settings.parsed_activations()
    if form is not None and themselves:
        raise OptionError(
            f"activations: layers round their inputs themselves ({next(iter(themselves.values()))}). Leave it out."
        )
    if form is not None:
        return QuantisedInputs({linear: InputRounding(form) for linear in held})
    if settings.activations == "none":
        return QuantisedInputs()
    return QuantisedInputs(said_of_folder(reading_of(model), held), themselves)


@torch.no_grad()
def input_errors(
    runner: Runner, block: Block, trace: Trace, layers: Mapping[LinearLayer, LinearLayer], inputs: QuantisedInputs
) -> dict[LinearLayer, float]:
    """Return ``E|f(x rounded) - f(x)|^2`` of each layer at the parent's inputs, over the predicted tokens.

    Args:
        runner: of the parent.
        block: one of its blocks.
        trace: of a part of the probe.
        layers: the quantised layer under each of the parent's.
        inputs: how inputs are rounded.
    """
    wanted = [
        m for m in block.linears if m in layers and (layers[m] in inputs.before or layers[m] in inputs.themselves)
    ]
    total, tokens = dict.fromkeys(wanted, 0.0), dict.fromkeys(wanted, 0)
    for batch in trace.batches if wanted else ():
        with captured(wanted) as capture:
            runner.run_block(block, batch.stations[block.index], batch)
        for twin, calls in capture.calls.items():
            linear = layers[twin]
            run = with_rounded_inputs(linear, inputs.get(linear))
            weight, bias = linear.weight().float(), linear.bias()
            for call in calls:
                x = token_rows(call.x, call, batch, twin, ones=False).float()
                plain = torch.nn.functional.linear(x, weight, None if bias is None else bias.float())
                total[twin] += float((run(x.to(_dtype(linear))).float() - plain).square().sum())
                tokens[twin] += len(x)
    return {twin: total[twin] / max(tokens[twin], 1) for twin in wanted}


def _dtype(linear: LinearLayer) -> torch.dtype:
    weight = linear.module.weight
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else torch.float32
