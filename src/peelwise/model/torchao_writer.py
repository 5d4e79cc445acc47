"""A quantised model as a folder with torchao's weights, which transformers opens where torchao is installed."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peelwise.errors import FormatError, MissingExtraError, ModelError, OutputError
from peelwise.formats.base import Encoded, Format
from peelwise.formats.integer import Integer
from peelwise.model.checkpoint_files import brief
from peelwise.model.checkpoints import open_model, save_model
from peelwise.model.loading import quiet, require_transformers
from peelwise.model.weights.table import hold_

Codes = Mapping[str, tuple[Format, Encoded]]


def check_torchao(form: Format) -> None:
    """Refuse a format that torchao's integer weights cannot hold.

    Raises:
        FormatError: If they cannot.
        MissingExtraError: Without torchao.
    """
    if find_spec("torchao") is None:
        raise MissingExtraError("Writing torchao weights", "quant")
    if not isinstance(form, Integer) or form.kind == "minimum" or form.layout.per not in ("channel", "group"):
        raise FormatError(
            f"torchao has no weights for {form.name}. Expected int2 to int8, symmetric or affine, with a scale per "
            "channel or group."
        )


@torch.no_grad()
def write_torchao(model: nn.Module, tokenizer: Any | None, codes: Codes, folder: Path) -> None:
    """Write a folder in which the layers given hold torchao's integer weights, and read it back.

    Args:
        model: the parent, a causal language model of transformers; left as it is.
        tokenizer: written too unless ``None``.
        codes: format and codes per layer, by its name.
        folder: created if need be.

    Raises:
        FormatError: If a format is none of torchao's.
        OutputError: If the model cannot be written.
        ModelError: If what was written does not read back as the same weights to the bit.
        MissingExtraError: Without torchao.
    """
    for name, (form, _) in codes.items():
        check_torchao(form)
        if type(model.get_submodule(name)) is not nn.Linear:
            raise FormatError(f"{name}: torchao's weights are those of nn.Linear. Leave it out with --skip {name}.")
    with tempfile.TemporaryDirectory() as plain:
        made = copy.deepcopy(model)
        for name, (form, encoded) in codes.items():
            weight: Any = made.get_submodule(name).weight
            weight.copy_(form.decode(encoded))
        save_model(made, None, plain)
        del made
        try:
            with quiet():
                theirs = _opened(plain, codes)
                for name, (_, encoded) in codes.items():
                    hold_(theirs.get_submodule(name), _in_float32(encoded))
                theirs.save_pretrained(folder)
                if tokenizer is not None:
                    tokenizer.save_pretrained(folder)
        except Exception as error:  # full disk, or whatever an architecture does with its own weights
            raise OutputError(f"The model could not be written with torchao's weights: {brief(error)}.") from error
    _check_same(folder, codes)


def _opened(folder: str, codes: Codes) -> Any:
    from torchao.quantization import FqnToConfig

    package = require_transformers()
    configs = {name: _config(form) for name, (form, _) in codes.items()}
    said = package.TorchAoConfig(FqnToConfig(configs))
    return package.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=said, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )


def _config(form: Format) -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup
    from torchao.quantization.quant_primitives import MappingType

    assert isinstance(form, Integer)
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{form.width}"),
        granularity=PerGroup(form.layout.size) if form.layout.size else PerAxis(0),
        mapping_type=MappingType.ASYMMETRIC if form.kind == "affine" else MappingType.SYMMETRIC,
    )


def _in_float32(encoded: Encoded) -> Encoded:
    """Return the same codes with scales in the dtype of the weights, which torchao computes in."""
    assert encoded.scales is not None
    return replace(encoded, scales=encoded.scales.float())


def _check_same(folder: Path, codes: Codes) -> None:
    again = open_model(folder, device="cpu", with_tokenizer=False).model
    for name, (form, encoded) in codes.items():
        found: Any = again.get_submodule(name).weight
        if not torch.equal(found.dequantize().float(), form.decode(encoded).cpu()):
            raise ModelError(f"{folder}: {name} does not read back as it was written. Nothing was kept.")
