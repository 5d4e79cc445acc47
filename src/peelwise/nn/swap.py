"""Put layers that train inside a format into a model, take them out again, and give them one scale for all."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from peelwise.errors import FormatError
from peelwise.formats.base import Format
from peelwise.formats.masked import Masked
from peelwise.formats.membership import scaled_part
from peelwise.formats.scaled import Scaled
from peelwise.formats.table import parse_format
from peelwise.nn.files import note_formats
from peelwise.nn.linear import LAYER_OF, QuantizedLinear

Choice = Callable[[str, nn.Linear], bool]


def quantize_(
    model: nn.Module, form: Format | str, *, skip: Collection[str] = (), choose: Choice | None = None
) -> list[str]:
    """Swap the linear layers of ``model`` for ones that train inside a format; in place.

    The output head stays as it is: it is where low bits hurt most, and its weights are often those of the embedding.
    Parameters stay the same objects under the same names, so optimizers and checkpoints keep working.

    Args:
        model: any module.
        form: the format or its name; see `parse_format`.
        skip: layers to leave alone, by name or by the last part of it, such as ``"down_proj"``.
        choose: told name and layer, says whether to swap it; asked instead of sparing the head.

    Returns:
        The names of the layers swapped.

    Raises:
        FormatError: If no layer is left to swap, or the format does not go with one of them; then none is swapped.

    Example:
        >>> quantize_(model, "ternary")
        ['model.layers.0.self_attn.q_proj', ...]
    """
    form = parse_format(form) if isinstance(form, str) else form
    family = type(form.inner if isinstance(form, Masked) else form)
    if family not in LAYER_OF:
        raise FormatError(f"{form.name} needs no special layer. Expected one of codes and scales, such as int4.")
    heads = _heads(model)
    swapped: dict[str, QuantizedLinear] = {}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or name in skip or name.rpartition(".")[2] in skip:
            continue
        if choose(name, module) if choose is not None else module not in heads:
            try:
                swapped[name] = LAYER_OF[family].from_linear(module, form)
            except FormatError as error:
                raise FormatError(f"{name}: {error} Or leave the layer out with skip=[{name!r}].") from error
    if not swapped:
        raise FormatError(
            f"{type(model).__name__} has no nn.Linear to quantise besides its head and what was skipped. "
            "Choose layers with choose=..., or give another model."
        )
    for name, layer in swapped.items():
        _put(model, name, layer)
    share_scale_(model)
    note_formats(model)
    return list(swapped)


def quantize_like_(model: nn.Module, pattern: nn.Module) -> None:
    """Give ``model`` low-bit layers where ``pattern``, a model of the same layout, has them; in place."""
    for name, layer in pattern.named_modules():
        if isinstance(layer, QuantizedLinear):
            linear = model.get_submodule(name)
            if type(linear) is nn.Linear:
                _put(model, name, type(layer).from_linear(linear, layer.format))
    note_formats(model)


@torch.no_grad()
def share_scale_(model: nn.Module) -> list[str]:
    """Give all layers with one scale for the whole model the scale that the rule makes of all their weights; in place.

        s = mean |W|   over the latent weights on the supports of all layers      (binary and ternary)

    `quantize_` does so once. The scale then stays while codes flip; call this after each step of the optimiser to let
    it follow the latent weights, or never, to train with a scale fixed beforehand. Layers of another inner format
    have a scale of their own. Source: arXiv:2502.01908.

    Returns:
        The names of the layers.

    Example:
        >>> quantize_(net, "binary:model,blocks=4")
        >>> optimizer.step()
        >>> share_scale_(net)
    """
    groups: dict[Scaled, list[tuple[str, QuantizedLinear]]] = {}
    for name, module in model.named_modules():
        inner = scaled_part(module.format) if isinstance(module, QuantizedLinear) else None
        if inner is not None and inner.layout.per == "model":
            groups.setdefault(inner, []).append((name, module))
    for inner, group in groups.items():
        device = group[0][1].weight.device
        weights = torch.cat([_on_support(layer).to(device) for _, layer in group])
        scales, zeros = inner.rule(weights[None, None])  # [1, 1, n]
        for _, layer in group:  # tensors of their own: files refuse those that share memory
            layer.scales = inner.stored(scales).to(layer.weight.device, copy=True)
            stored = inner.stored_zeros(zeros)
            layer.zeros = None if stored is None else stored.to(layer.weight.device, copy=True)
    return [name for group in groups.values() for name, _ in group]


def _on_support(layer: QuantizedLinear) -> Tensor:
    """Return the latent weights of a layer as ``[n]``, float32."""
    weight = layer.latent.detach().float()
    return (weight if layer.support is None else weight[layer.support]).flatten()


@torch.no_grad()
def dense_(model: nn.Module) -> list[str]:
    """Swap the layers back for plain ones that hold the effective weights; in place. Latent weights are lost.

    Returns:
        The names of the layers swapped.
    """
    swapped = []
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            _put(model, name, module.plain())
            swapped.append(name)
    note_formats(model)
    return swapped


def _heads(model: nn.Module) -> list[nn.Module]:
    """Return the output head: what transformers calls it, or the last linear layer outside the lists of blocks."""
    getter = getattr(model, "get_output_embeddings", None)
    if callable(getter):
        head = getter()
        return [head] if isinstance(head, nn.Module) else []
    inside = {id(m) for part in model.modules() if isinstance(part, nn.ModuleList) for m in part.modules()}
    outside: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in inside]
    return outside[-1:] if inside else []


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    if not name:
        raise FormatError("The model is itself the layer to swap. Put it into a module, such as nn.Sequential.")
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, module)
