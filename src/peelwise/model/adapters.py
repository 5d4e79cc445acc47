"""Models with adapters of PEFT: the same with them merged into its weights, and without them.

Under an adapter may be codes of few bits (QLoRA). PEFT would round base and adapter together to such codes again, which
is neither what was trained nor what runs: the numbers that the codes stand for take their place first.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peelwise.errors import ModelError
from peelwise.model.layers import LinearLayer, device_of
from peelwise.model.weights.reading import Reading, note_reading, reading_of
from peelwise.model.weights.table import is_low_bit

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WRAPPED = "base_model.model."  # what PEFT puts in front of names
_BESIDE = "codes with adapters beside them"


def is_adapted(model: nn.Module) -> bool:
    """Whether it is a model of PEFT, whose layers are wrapped in adapters."""
    return hasattr(model, "peft_config") and hasattr(model, "merge_and_unload")


@dataclass(frozen=True, eq=False)
class FineTune:
    """Two copies of a model of PEFT, both with plain numbers in all layers.

    Attributes:
        merged: with its adapters.
        bare: without them.
        codes: layers of the base that hold codes of few bits, and in the copies the numbers that they stand for.
    """

    merged: nn.Module
    bare: nn.Module
    codes: int


def merged_and_bare(model: nn.Module) -> FineTune:
    """Return a model of PEFT with its adapters merged, and without them, in copies. It stays as it is.

    Raises:
        ModelError: If its adapters cannot be merged.
        FormatError: If a layer below them does not hold what its format says.
        UnsupportedModelError: If its codes cannot be read.
    """
    bare = _bare(model)
    codes = [name for name, module in bare.named_modules() if is_low_bit(module)]
    if not codes:
        return FineTune(_merged(copy.deepcopy(model)), bare.eval(), 0)
    in_numbers_(bare, codes)
    return FineTune(_merged(_adapted_again(model, copy.deepcopy(bare))), bare.eval(), len(codes))


def merged_beside_codes(model: nn.Module) -> nn.Module:
    """Return a copy of a quantised model of PEFT whose adapted layers hold what codes and adapters make together.

    Its other layers keep their codes; what is said of a folder that was read (`Reading`) counts the adapted ones among
    those that hold plain numbers.

    Raises:
        ModelError, FormatError, UnsupportedModelError: As `merged_and_bare`.
    """
    bare = _bare(model)
    said, bits = reading_of(bare), dict(_bits_of_adapted(model))
    made = _merged(_adapted_again(model, in_numbers_(bare, bits)))
    if bits:
        left = sum(is_low_bit(module) for module in made.modules())
        numbers = bits if said is None else {**said.numbers, **bits}
        scales = {} if said is None else said.scales
        note_reading(made, Reading({"quant_method": _BESIDE}, left, numbers, scales))
    return made


@torch.no_grad()
def in_numbers_(model: nn.Module, names: Collection[str]) -> nn.Module:
    """Put plain layers with the numbers that codes stand for in the place of the low-bit layers named; return it.

    They are in the dtype of the model's other weights.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dim() > 1), torch.float32)
    for name in names:
        linear = LinearLayer(name, model.get_submodule(name), transposed=False)
        weight, bias = linear.weight(), linear.bias()
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        plain.weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(bias.to(dtype, copy=True), requires_grad=False)
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, plain)
    for said in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # what PEFT asks for the kind of its layers
        if hasattr(model, said):
            setattr(model, said, False)
    return model


def _bare(model: nn.Module) -> nn.Module:
    """Return a copy without its adapters, and without what merging some of them changed."""
    made: Any = copy.deepcopy(model)
    merged = [name for name, module in made.named_modules() if getattr(module, "merged", False) is True]
    try:
        if any(is_low_bit(made.get_submodule(name).get_base_layer()) for name in merged):
            raise ModelError(
                f"{merged[0]}: its adapter was merged into codes of few bits, which rounded both again. Load base and "
                "adapter anew, and give them unmerged."
            )
        if merged:
            made.unmerge_adapter()
        found: nn.Module = made.unload()
    except ModelError:
        raise
    except Exception as error:  # kinds of adapters that cannot be merged raise what they like
        raise ModelError(f"The adapters of {type(model).__name__} cannot be merged: {error}") from error
    return found


def _merged(model: Any) -> nn.Module:
    try:
        found: nn.Module = model.merge_and_unload()
    except Exception as error:
        raise ModelError(f"The adapters of {type(model).__name__} cannot be merged: {error}") from error
    return found.eval()


def _adapted_again(model: Any, base: nn.Module) -> nn.Module:
    """Return another base with copies of the adapters that are active in a model."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    made: Any = None
    try:
        with _numbers_kept(model):  # adapters are drawn before they are copied
            for name in model.active_adapters:
                config = copy.deepcopy(model.peft_config[name])
                config.base_model_name_or_path = None
                if hasattr(config, "init_lora_weights"):
                    config.init_lora_weights = True  # others would change the base
                if made is None:
                    made = get_peft_model(base, config, adapter_name=name)
                else:
                    made.add_adapter(name, config)
                state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
                unknown = set_peft_model_state_dict(made, state, adapter_name=name).unexpected_keys
                if unknown:
                    raise ModelError(f"{unknown[0]} has no place in the model with plain weights")
        made.base_model.set_adapter(list(model.active_adapters))
    except Exception as error:  # as many kinds of errors as of adapters
        raise ModelError(f"The adapters of {type(model).__name__} cannot be put on plain weights: {error}") from error
    found: nn.Module = made
    return found


def _bits_of_adapted(model: nn.Module) -> Iterator[tuple[str, float]]:
    """Yield the layers of codes below adapters by their names without these, with the bits per weight of both."""
    for name, module in model.named_modules():
        below = module._modules.get("base_layer")
        if below is None or not is_low_bit(below):
            continue
        linear = LinearLayer(name.removeprefix(_WRAPPED), below, transposed=False)
        held = linear.held()
        assert held is not None
        d_out, d_in = held.encoded.codes.shape
        added = sum(_bits(p) for part, p in module.named_parameters() if not part.startswith("base_layer"))
        yield linear.name, (held.format.bits(d_out, d_in, held.encoded.support) + added) / (d_out * d_in)


def _bits(tensor: Tensor) -> int:
    return 8 * tensor.numel() * tensor.element_size()


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
    try:
        with _numbers_kept(base):  # adapters are drawn before they are read
            made: nn.Module = PeftModel.from_pretrained(base, str(folder))
    except Exception as error:  # as many kinds of errors as of adapters
        raise ModelError(f"The adapter in {folder} does not go with its base model: {error}") from error
    return made


def _numbers_kept(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context behind which random numbers go on as before it, those of the CPU and of the model's GPU."""
    device = device_of(model)
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
