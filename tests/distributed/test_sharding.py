"""Which wrapped models are taken, by what they look like: the real ones need processes (`tests/nightly`)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peelwise
from audits import tiny_probe
from peelwise.distributed.sharding import unwrap_ddp
from peelwise.errors import UnsupportedModelError
from zoo import ZOO


class DeepSpeedEngine(nn.Module):
    """Called as DeepSpeed's, which holds the model in the same place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


def test_an_engine_is_unwrapped() -> None:
    model = ZOO["llama"]()
    assert unwrap_ddp(DeepSpeedEngine(model)) is model
    assert unwrap_ddp(model) is model


def test_parameters_that_are_elsewhere_are_refused() -> None:
    model = ZOO["llama"]()
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number  # type: ignore[attr-defined]
    unwrap_ddp(model)  # gathered at the moment
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    with pytest.raises(UnsupportedModelError, match=r"DeepSpeed spreads over processes \(ZeRO-3\)"):
        peelwise.Monitor(DeepSpeedEngine(model), tiny_probe(), store=None)
