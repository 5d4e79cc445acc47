"""Save a model whose layers train inside a format, and put these layers back when it is opened.

Weights are saved as they are trained; ``config.json`` says under ``peelwise_formats`` which layer has which format.
Supports, and scales that a layer keeps, are tensors beside its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peelwise.errors import FormatError, OutputError
from peelwise.formats.base import Encoded, Format
from peelwise.formats.masked import Given, Masked
from peelwise.formats.membership import check_member
from peelwise.formats.table import parse_format
from peelwise.nn.linear import LAYER_OF, QuantizedLinear

FORMATS_KEY = "peelwise_formats"
_GIVEN = "support=given"
TENSORS = ("support", "scales", "zeros")


def save_pretrained(model: nn.Module, folder: str | Path, tokenizer: Any | None = None) -> None:
    """Write a Hugging Face folder that ``peelwise audit`` opens with its low-bit layers.

    Args:
        model: a transformers model, after `quantize_`.
        folder: created if need be.
        tokenizer: written too unless ``None``.

    Raises:
        OutputError: If the model is none of transformers, or has no low-bit layer.

    Example:
        >>> quantize_(model, "ternary")
        >>> save_pretrained(model, "out/ternary", tokenizer)
    """
    save = getattr(model, "save_pretrained", None)
    if save is None:
        raise OutputError(f"{type(model).__name__} has no save_pretrained: expected a transformers model.")
    if not note_formats(model):
        raise OutputError("The model has no low-bit layers of peelwise.nn. Use quantize_ first, or its own saving.")
    save(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def note_formats(model: nn.Module) -> dict[str, str]:
    """Write into the model's config, where it has one, which of its layers have which format; and return it."""
    names = {name: m.format.name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    config = getattr(model, "config", None)
    if names and config is not None:
        setattr(config, FORMATS_KEY, names)
    elif hasattr(config, FORMATS_KEY):
        delattr(config, FORMATS_KEY)
    return names


def restore_(model: nn.Module, formats: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Put low-bit layers back into a model that was opened with plain ones; in place.

    Args:
        model: with the latent weights loaded.
        formats: layer -> name of its format.
        tensors: supports, and scales that layers keep, by name as saved.

    Raises:
        FormatError: If a format does not go with its layer, or what is saved is not of it.
    """
    layers = {name: _restored(model, name, form, tensors.get) for name, form in formats.items()}
    for name, layer in layers.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, layer)
    note_formats(model)


def hold_in(model: nn.Module, name: str, form: Format, encoded: Encoded) -> None:
    """Swap one plain layer of ``model`` for one that holds the codes given; in place.

    Raises:
        FormatError: If the codes are none of the format.
    """
    linear = model.get_submodule(name)
    inner = form.inner if isinstance(form, Masked) else form
    layer = LAYER_OF[type(inner)].from_linear(linear, form)
    layer.support = encoded.support
    layer.hold_(encoded)
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, layer)


def _restored(model: nn.Module, name: str, form_name: str, saved: Callable[[str], Tensor | None]) -> QuantizedLinear:
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        raise FormatError(f"{FORMATS_KEY} names {name}, which the model does not have.") from None
    if type(linear) is not nn.Linear and type(linear).__name__ != "Conv1D":
        raise FormatError(f"{FORMATS_KEY} names {name}: expected an nn.Linear or Conv1D, got {type(linear).__name__}.")
    support, scales, zeros = (saved(f"{name}.{part}") for part in TENSORS)
    given = _GIVEN in form_name
    form = parse_format(form_name.replace(f",{_GIVEN}", "").replace(f":{_GIVEN}", ""))
    if (given or isinstance(form, Masked)) and support is None:
        raise FormatError(f"{name}: its support is missing from the saved tensors. Save the model again.")
    if given and support is not None:
        form = Masked(form, Given(support))
    inner = form.inner if isinstance(form, Masked) else form
    if type(inner) not in LAYER_OF:
        raise FormatError(
            f"{name}: {form.name} is no format to train in. Expected one of codes and scales, such as int4."
        )
    try:
        layer = LAYER_OF[type(inner)].from_linear(linear, form)
        layer.support = support
        layer.scales, layer.zeros = scales, zeros
        if scales is not None:
            check_member(layer.encoded(), form, (layer.out_features, layer.in_features))
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from error
    return layer
