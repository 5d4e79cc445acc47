"""Follow the codes of a model's low-bit layers over a training run."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from peelwise.formats.base import Encoded
from peelwise.formats.signals import LowBitSignals, measure
from peelwise.model.layers import plain_name, unwrapped
from peelwise.model.weights.table import held


class CodeWatch:
    """Measures every low-bit layer that trains a latent weight, and remembers its codes until the next measurement.

    It keeps a byte per weight in main memory, and reads the model without changing anything.

    Args:
        model: any module; layers are found at every measurement.

    Example:
        >>> watch = CodeWatch(model)
        >>> watch.measure()["model.layers.0.mlp.down_proj"].near_threshold
        0.06
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrapped(model)
        self._before: dict[str, Encoded] = {}

    @torch.no_grad()
    def measure(self) -> dict[str, LowBitSignals]:
        """Return the signals of every layer by its name, against the measurement before."""
        found: dict[str, LowBitSignals] = {}
        codes: dict[str, Encoded] = {}
        for name, module in self._model.named_modules():
            now = held(module)
            if now is None or now.latent is None:
                continue
            name = plain_name(name)
            encoded = _in_memory(now.encoded)
            found[name] = measure(now.format, now.latent.cpu(), encoded, self._before.get(name))
            codes[name] = encoded
        self._before = codes
        return found


def _in_memory(encoded: Encoded) -> Encoded:
    """Return a copy in main memory, which later steps of training do not change."""

    def kept(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.detach().cpu().clone()

    return replace(
        encoded,
        codes=encoded.codes.detach().cpu().clone(),
        scales=kept(encoded.scales),
        zeros=kept(encoded.zeros),
        support=kept(encoded.support),
    )
