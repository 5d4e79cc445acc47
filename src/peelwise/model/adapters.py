"""Models with adapters of PEFT: the same with them merged into its weights, and without them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from torch import nn

from peelwise.errors import ModelError
from peelwise.model.layers import device_of

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapted(model: nn.Module) -> bool:
    """Whether it is a model of PEFT, whose layers are wrapped in adapters."""
    return hasattr(model, "peft_config") and hasattr(model, "merge_and_unload")


def merged_and_bare(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return two copies of a model of PEFT: with its adapters merged, and without them. It stays as it is.

    Raises:
        ModelError: If its adapters cannot be merged.
    """
    made = []
    for way in ("merge_and_unload", "unload"):
        try:
            made.append(getattr(copy.deepcopy(model), way)())
        except Exception as error:  # kinds of adapters that cannot be merged raise what they like
            raise ModelError(f"The adapters of {type(model).__name__} cannot be merged: {error}") from error
    return made[0].eval(), made[1].eval()


def adapter_base(folder: Path) -> str | None:
    """Return what model the adapter in a folder is for; ``None`` if the folder holds no adapter, or a whole model too.

    Raises:
        ModelError: If its configuration does not say.
    """
    if not (folder / _CONFIG).is_file() or (folder / "config.json").is_file():
        return None
    try:
        base = json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder / _CONFIG} cannot be read: {error}.") from error
    if not isinstance(base, str) or not base:
        raise ModelError(f"{folder / _CONFIG} names no base model. Merge the adapter into its model and give that.")
    return base


def with_adapter(base: nn.Module, folder: Path) -> nn.Module:
    """Return a model with the adapter of a folder put into it.

    Raises:
        ModelError: If PEFT or the adapter's safetensors are missing, or it does not go with the model.
    """
    if not (folder / _WEIGHTS).is_file():  # PEFT would ask the network for them, or read a pickle
        raise ModelError(f"{folder} holds no {_WEIGHTS}: expected the weights of the adapter beside {_CONFIG}.")
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError(f"{folder} holds an adapter, which PEFT reads: pip install peft.") from error
    device = device_of(base)
    try:
        # Adapters are drawn before they are read, on this device or on the CPU.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            made: nn.Module = PeftModel.from_pretrained(base, str(folder))
    except Exception as error:  # as many kinds of errors as of adapters
        raise ModelError(f"The adapter in {folder} does not go with its base model: {error}") from error
    return made
