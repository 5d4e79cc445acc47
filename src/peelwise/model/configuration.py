"""What a model computes with besides its saved tensors: its configuration, and its buffers that are not saved.

Genuine weights under another rotary base, epsilon or activation are another model. What is gathered here stands in the
record as plain values, so that a difference can be named, and the fingerprint is taken over it as well.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peelwise.model.layers import plain_name, unwrapped
from peelwise.records.options import Plain

# Entries of a configuration of transformers that change no logit of the model in eval mode, or that say how it was
# opened. Quantisation is in the tensors and in the formats of the record.
_NO_FUNCTION = {
    *(
        "name_or_path",
        "transformers_version",
        "architectures",
        "tokenizer_class",
        "auto_map",
        "finetuning_task",
        "prefix",
    ),
    *(
        "dtype",
        "torch_dtype",
        "attn_implementation",
        "quantization_config",
        "peelwise_formats",
        "torchscript",
        "pretraining_tp",
    ),
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward"),
    *("id2label", "label2id", "problem_type", "task_specific_params"),
    *("initializer_range", "initializer_factor", "gradient_checkpointing"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id"),
}
_NOT_IN_EVAL = re.compile(r"(dropout|pdrop|dropout_prob|dropout_rate|drop_rate|aux_loss_coef|jitter_noise)$")
_BUFFER = "buffer "
_SAME_BUFFER = 2e-3  # of rounded sums, whose last digits another machine may compute otherwise
_PIECE = 1 << 22
_LONGEST = 400  # characters of one value
_MISSING = object()


def configuration(model: nn.Module) -> Plain:
    """Return what a model computes with besides its saved tensors, by name.

    A configuration of transformers gives its entries, without those that change no logit in eval mode; other models
    give the numbers, names and functions that their modules hold as attributes. Buffers that are not saved (inverse
    frequencies, masks) give their shape, their mean size and where in them it lies, to four digits, since the same
    formula ends in other last digits on another machine. What is the same in every block stands once, with ``*`` for
    the index.
    """
    model = unwrapped(model)
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    entries = _entries(to_dict()) if callable(to_dict) else _attributes(model)
    return dict(sorted(_once(dict(entries)).items())) | dict(sorted(_once(dict(_buffers(model))).items()))


def other_configuration(certified: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """Return the first entry that two configurations have with different values, in words, or ``None``.

    What only one of them has is no difference: versions of transformers add entries and drop them.
    """
    # The configuration says it in its own words, so it comes before what follows from it.
    for name in sorted(certified.keys() | found.keys(), key=lambda name: (name.startswith(_BUFFER), name)):
        a, b = (each.get(name, each.get(_general(name), _MISSING)) for each in (certified, found))
        if _MISSING in (a, b) or a == b or (name.startswith(_BUFFER) and _near(a, b)):
            continue
        return f"{name[:80]} is {str(b)[:80]}, {str(a)[:80]} was certified"
    return None


def _near(a: Any, b: Any) -> bool:
    numbers = isinstance(a, int | float) and isinstance(b, int | float)
    return numbers and math.isclose(a, b, rel_tol=_SAME_BUFFER, abs_tol=_SAME_BUFFER)


def _entries(config: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        name = str(key)
        if name.startswith("_") or name in _NO_FUNCTION or _NOT_IN_EVAL.search(name):
            continue
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _plain(value)


def _attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the public scalars and functions that modules hold, and the classes of those without parameters."""
    for path, module in model.named_modules():
        if "Dropout" in type(module).__name__ or unwrapped(module) is not module:
            continue
        where = f"{plain_name(path)}." if path else ""
        if path and next(module.parameters(), None) is None:
            yield f"{where}class", type(module).__name__
        for name, value in vars(module).items():
            if name.startswith("_") or name in ("training", "forward"):  # what hooks of others replace
                continue
            if isinstance(value, bool | int | float | str):
                yield f"{where}{name}", _plain(value)
            elif inspect.isroutine(value):
                yield f"{where}{name}", str(getattr(value, "__name__", "function"))


def _buffers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is None or buffer.is_meta:
                continue
            where = f"{_BUFFER}{plain_name(path)}{'.' if path else ''}{name}"
            yield f"{where} shape", str(list(buffer.shape))
            size, middle, odd = _moments(buffer)
            yield f"{where} mean size", size
            yield f"{where} middle", middle
            if odd:
                yield f"{where} not finite", odd


@torch.no_grad()
def _moments(buffer: Tensor) -> tuple[float, float, int]:
    """Return mean |x|, the mean of ``x`` weighted from 0 (first) to 1 (last) as a share of it, and how many are odd."""
    values = (torch.view_as_real(buffer) if buffer.is_complex() else buffer).detach().contiguous().reshape(-1)
    size = middle = 0.0
    finite, n = 0, max(values.numel(), 1)
    for start in range(0, values.numel(), _PIECE):
        x = values[start : start + _PIECE].cpu().double()
        ramp = torch.arange(start, start + len(x), dtype=torch.float64) / n
        usable = x.isfinite()
        x = torch.where(usable, x, 0.0)
        size, middle, finite = size + float(x.abs().sum()), middle + float(x @ ramp), finite + int(usable.sum())
    share = middle / size if size else 0.0
    return float(f"{size / n:.4g}"), round(share, 3) + 0.0, values.numel() - finite  # + 0.0: no minus zero


def _plain(value: Any) -> bool | int | float | str | None:
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    text = json.dumps(value, default=str) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= _LONGEST else f"SHA-256 {hashlib.sha256(text.encode()).hexdigest()}"


def _once(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return entries with ``*`` for the indices of blocks where all of them have the same value."""
    alike: dict[str, list[str]] = {}
    for name in entries:
        alike.setdefault(_general(name), []).append(name)
    found: dict[str, Any] = {}
    for general, names in alike.items():
        values = [entries[name] for name in names]
        if all(value == values[0] and type(value) is type(values[0]) for value in values):
            found[general] = values[0]
        else:
            found |= {name: entries[name] for name in names}
    return found


def _general(name: str) -> str:
    """Return the name of an entry with ``*`` for every index."""
    return re.sub(r"(?<![^. ])\d+(?=\.)", "*", name)
