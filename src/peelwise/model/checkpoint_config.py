"""What the config of a checkpoint may ask for: nothing that is loaded from elsewhere, no sizes that its files lack.

transformers reads from ``config.json`` which attention kernel to fetch, which other file is the config, which file
holds the weights, which quantiser to import. All of these are decided here instead, before anything is built.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peelwise.errors import MissingExtraError, ModelError, UnsupportedModelError
from peelwise.model.checkpoint_files import Stored, brief, read_json
from peelwise.model.weights.folders import PACKINGS
from peelwise.model.weights.gguf_header import GgufHeader

# Set by us: every implementation of attention computes the same. All other names are repositories of kernels.
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_EXPERTS_KEYS = ("experts_implementation", "_experts_implementation", "_experts_implementation_internal")
_BUILT_IN = {
    "attention": ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"),
    "experts": ("eager", "grouped_mm", "batched_mm"),
}
# Each names a file, a folder, a kernel or a patch that transformers would load or apply.
_LOADING_KEYS = (
    "configuration_files", "transformers_weights", "fusion_config", "distributed_config", "kernel_config",
    "use_kernels", "use_pretrained_backbone", "base_model_name_or_path",
)  # fmt: skip
# Code of the checkpoint is never run, so it need not be named.
_CODE_KEYS = ("auto_map", "custom_pipelines", "_auto_class")
# Quantisers from Python packages; the others (eetq, mxfp4, ..) fetch kernels from the hub.
_QUANTISERS = ("torchao", "bitnet", "aqlm", "quanto", "hqq", "vptq", "spqr", "quark", *PACKINGS)
_QUANTISATION_KEYS = ("quantization_config", "compression_config")
_SPECIAL_FLOATS = ("Infinity", "-Infinity", "NaN")
_LAYER_KEYS = re.compile(r"num_hidden_layers|n_layers?|num_layers|num_(de|en)coder_layers|(de|en)coder_layers")
_AT_LEAST_ONE = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_COUNT_KEYS = re.compile(
    r"(^|_)(layers?|blocks?|experts?|heads?|labels|codebooks|stages|depths?|groups|steps|types)(_|$)"
)
_UNBUILT_KEYS = re.compile(r"position|ctx|context|length|theta|token|base|seed|window|rope|vocab|parameter")
_MOST_COUNTED = 100_000  # of anything but layers: no model has as many experts, heads, labels
_LARGEST_NUMBER = 10**7  # of what a loop may run over
_MOST_PLAIN, _MOST_PACKED = 1, 16  # weights in a byte: two bytes each, half a bit each
_LARGEST_BUFFERS_BYTES = 2**30  # masks and tables that no file holds


def checked_config(folder: Path, config: dict[str, Any], stored: Stored | None = None) -> Any:
    """Return the transformers config of a folder, without what it must not decide.

    Args:
        folder: How errors name it.
        config: The content of ``config.json``.
        stored: What the weight files hold; ``None`` where no weights are to be loaded.

    Raises:
        ModelError: If it names things to load from elsewhere, or sizes that the files do not hold.
        UnsupportedModelError: If its architecture is no causal language model of transformers.
        MissingExtraError: If its weights need a package that is not installed.
    """
    file = folder / "config.json"
    kind = _architecture(folder, config)
    _check_quantisers(file, config)
    allowed, attention = _checked(file, config, kind, (len(stored.shapes) if stored else 0) or _MOST_COUNTED)
    from transformers import CONFIG_MAPPING

    try:
        built = CONFIG_MAPPING[kind].from_dict(allowed)
        if attention == "eager":
            built._attn_implementation = attention
    except Exception as error:  # every architecture has checks of its own
        raise ModelError(
            f"{file} cannot be used: {brief(error)}. Save the model again; a newer transformers may open it."
        ) from error
    if stored is not None:
        check_sizes(folder, built, stored.size, _MOST_PACKED if _quantisers(allowed) else _MOST_PLAIN)
    if packed_config(config) is not None:  # its layers are read without the tool that made them
        del built.quantization_config
    return built


def packed_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what ``config.json`` says of quantised weights, if `weights.folders` reads them; else ``None``."""
    found = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(found, dict):
        return None
    method = found.get("quant_method")
    if method is None and (found.get("load_in_4bit") is True or found.get("load_in_8bit") is True):
        method = "bitsandbytes"
    return found | {"quant_method": method} if method in PACKINGS else None


def check_config_beside(folder: Path) -> None:
    """Check the config, if there is one, of a folder from which only the tokenizer is wanted; its reader builds it too.

    Raises:
        ModelError: If it names things to load from elsewhere, or absurd sizes.
    """
    file = folder / "config.json"
    if file.exists():
        config = read_json(file)
        _checked(file, config, config.get("model_type"), _MOST_COUNTED)


def check_gguf_counts(file: Path, header: GgufHeader) -> None:
    """Check the sizes in the header of a GGUF file against its tensors.

    Raises:
        ModelError: If the file announces more than it holds, or holds blocks that it does not announce.
    """
    name = header.values.get("general.architecture")
    blocks = {int(found[1]) for tensor in header.tensors if (found := re.match(r"blk\.(\d{1,9})\.", tensor))}
    for key, value in header.values.items():
        if not key.startswith(f"{name}.") or isinstance(value, bool) or not isinstance(value, int):
            continue
        short = key.removeprefix(f"{name}.")
        if short == "block_count":
            if value < 1 or (blocks and value != max(blocks) + 1):
                raise ModelError(
                    f"{file} says it has {value} blocks, and its tensors are those of {len(blocks)}. "
                    "Convert the model again."
                )
        elif _COUNT_KEYS.search(short.replace(".", "_")) and abs(value) > _MOST_COUNTED:
            raise ModelError(f"{file}: {key} is {value}, expected at most {_MOST_COUNTED}. Convert the model again.")


def check_sizes(source: Path, config: Any, size: int, per_byte: int = _MOST_PACKED) -> None:
    """Check that a model of this config has about the size of what is stored; nothing is allocated for that.

    Args:
        source: How errors name it.
        config: A transformers config.
        size: Bytes of all weight files.
        per_byte: How many weights a byte may hold.

    Raises:
        ModelError: If it does not.
    """
    model = on_meta(source, config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    if weights > per_byte * size:
        raise ModelError(
            f"{source}: its config describes {weights} weights, and its files have {size} bytes. "
            "The weights belong to another configuration."
        )
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if buffers > _LARGEST_BUFFERS_BYTES + size:
        raise ModelError(
            f"{source}: its config asks for {buffers} bytes of masks and tables beside the weights, expected at most "
            f"{_LARGEST_BUFFERS_BYTES + size}. Correct the context length in config.json."
        )


def on_meta(source: Path, config: Any) -> nn.Module:
    """Return the model of a config without values: tensors have sizes, and take no memory.

    Args:
        source: How errors name it.
        config: A transformers config.

    Raises:
        ModelError: If its sizes do not go together.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # architectures refuse sizes with errors of any kind
        raise ModelError(
            f"{source} cannot be opened: {brief(error)}. The sizes in its config do not go together, or a newer "
            "transformers is needed."
        ) from error
    return model


def _checked(file: Path, config: dict[str, Any], kind: Any, tensors: int) -> tuple[dict[str, Any], str | None]:
    """Return the config without what it must not decide, and the attention it asks for; its numbers are checked."""
    from transformers import CONFIG_MAPPING

    allowed, attention = _without_loading(file, config)
    _check_counts(file, allowed, tensors)
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        _check_numbers(file, allowed, _fields(CONFIG_MAPPING[kind]))
    return allowed, attention


def _architecture(folder: Path, config: Mapping[str, Any]) -> str:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    kind: str = config["model_type"]
    if kind == "mistral" and "layer_types" in config:  # as transformers opens it
        kind = "ministral"
    if kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING:
        return kind
    if "auto_map" in config:
        raise ModelError(
            f"{folder}: model_type {kind!r} needs Python code that comes with the checkpoint, which is "
            "never run. Expected an architecture that transformers has itself."
        )
    raise UnsupportedModelError(
        f"{folder}: transformers has no causal language model for model_type {kind!r}. "
        "Expected one such as llama, qwen3 or gpt2; a newer transformers may have it."
    )


def _quantisers(config: Any) -> list[Any]:
    """Return every description of quantised weights, of parts of the model too."""
    return [value for key, value in _entries(config) if key in _QUANTISATION_KEYS and value is not None]


def _check_quantisers(file: Path, config: Mapping[str, Any]) -> None:
    for found in _quantisers(config):
        method = found.get("quant_method") if isinstance(found, dict) else None
        if isinstance(found, dict) and (found.get("load_in_4bit") is True or found.get("load_in_8bit") is True):
            method = "bitsandbytes"
        if not isinstance(method, str):
            got = f"quant_method {method!r}" if isinstance(found, dict) else type(found).__name__
            raise ModelError(
                f"{file}: quantization_config should be an object with the name of a quant_method, got {got[:80]}. "
                "Save the model again."
            )
        if method not in _QUANTISERS:
            raise UnsupportedModelError(
                f"Not yet: {file.parent} has weights quantised by {method[:80]!r}, which is unknown or fetches kernels "
                f"from the network. Expected one of {', '.join(_QUANTISERS)}."
            )
        if method == "torchao" and find_spec("torchao") is None:
            raise MissingExtraError("Opening a checkpoint with torchao weights", "quant")


def _without_loading(file: Path, config: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return the config without names of code and kernels, and the implementation of attention that it asks for."""
    asked: set[str] = set()

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(item) for item in value]
        if not isinstance(value, dict):
            return value
        if set(value) == {"__float__"} and value["__float__"] in _SPECIAL_FLOATS:
            return float(value["__float__"])  # how transformers writes what JSON has no number for
        kept = {}
        for key, item in value.items():
            if key in _ATTENTION_KEYS:
                asked.update(_built_in(file, key, item, "attention"))
            elif key in _EXPERTS_KEYS:
                _built_in(file, key, item, "experts")
            elif key in _LOADING_KEYS and item not in (None, False):
                raise ModelError(
                    f"{file}: {key} names something to load beside the weights, which is never done. Remove it, "
                    "and save the model again if it needs it."
                )
            elif key not in (*_CODE_KEYS, *_LOADING_KEYS) and not key.startswith("__"):
                kept[key] = clean(item)
        return kept

    allowed: dict[str, Any] = clean(config)
    return allowed, "eager" if asked == {"eager"} else None


def _built_in(file: Path, key: str, value: Any, what: str) -> list[str]:
    """Return the names of implementations that a config asks for, all of them built in."""
    found = list(value.values()) if isinstance(value, dict) else [value]
    names = [name for name in found if name is not None]
    for name in names:
        if not isinstance(name, str) or name.removeprefix("paged|") not in _BUILT_IN[what]:
            raise ModelError(
                f"{file}: {key} is {str(name)[:80]!r}: kernels of others are never loaded. Expected one of "
                f"{', '.join(_BUILT_IN[what])}, or nothing."
            )
    return names


def _check_counts(file: Path, config: Any, tensors: int) -> None:
    """Check everything that a model has several of, where lists and modules are made in a loop."""
    for key, value in _entries(config):
        if isinstance(value, list) and key != "num_hidden_layers":  # counts per stage
            counts = [item for item in value if isinstance(item, int) and not isinstance(item, bool)]
            if _COUNT_KEYS.search(key) and counts and max(counts) > _MOST_COUNTED:
                raise ModelError(f"{file}: {key} holds {max(counts)}, expected at most {_MOST_COUNTED}. Correct it.")
            continue
        if _LAYER_KEYS.fullmatch(key) and value is not None:
            if isinstance(value, bool) or not isinstance(value, int):
                raise ModelError(f"{file}: {key} should be a whole number, got {str(value)[:40]!r}. Correct it.")
            if value < (1 if key in _AT_LEAST_ONE else 0):
                raise ModelError(f"{file}: {key} is {value}: expected at least one layer. Correct it.")
            if value > tensors:
                raise ModelError(
                    f"{file}: {key} is {value}, and the weight files hold {tensors} tensors. "
                    "The weights belong to another configuration."
                )
        elif _COUNT_KEYS.search(key) and _is_above(value, _MOST_COUNTED):
            raise ModelError(f"{file}: {key} is {value}, expected at most {_MOST_COUNTED}. Correct it.")


def _check_numbers(file: Path, config: Any, known: frozenset[str]) -> None:
    """Check every number that the architecture knows and may loop over, inside lists too."""
    for key, value in _entries(config):
        if key not in known or _UNBUILT_KEYS.search(key):
            continue
        for number in _leaves(value):
            if _is_above(number, _LARGEST_NUMBER):
                raise ModelError(f"{file}: {key} is {number}, expected at most {_LARGEST_NUMBER}. Correct it.")


def _fields(known: Any) -> frozenset[str]:
    """Return the names that a config class and those of its parts know."""
    names = {field.name for field in dataclasses.fields(known)} if dataclasses.is_dataclass(known) else set()
    names |= set(getattr(known, "attribute_map", {})) | {"num_labels"}
    for part in (getattr(known, "sub_configs", None) or {}).values():
        if dataclasses.is_dataclass(part):
            names |= {field.name for field in dataclasses.fields(part)} | set(getattr(part, "attribute_map", {}))
    return frozenset(names)


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key with its value, of objects inside objects and lists too."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, item
            yield from _entries(item)
    elif isinstance(value, list):
        for item in value:
            yield from _entries(item)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif not isinstance(value, dict):
        yield value


def _is_above(value: Any, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) > limit  # no loop runs to 1e9
