"""Blocks left out, or their weights scaled, in a copy of a model that transformers opens as any other."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peelwise.act.blocks import block_modules, checked_index
from peelwise.errors import ModelError, OptionError, OutputError, UnsupportedModelError


def drop_blocks(model: nn.Module, blocks: Collection[int], out: str | Path | None = None) -> nn.Module:
    """Return a copy of the model without some blocks: the input of each is passed on as its output.

    The configuration says the new depth; its lists of one entry per block, and the numbers by which attention finds its
    cache, follow.

    Args:
        model: of transformers, if it is to be saved; otherwise any with a list of blocks.
        blocks: indices of those that go.
        out: folder to save it in; must not exist or be empty. It is opened again there, and must give the same logits.

    Raises:
        OptionError: If there is no such block, or none would be left.
        OutputError: If the folder is taken.
        ModelError: If the saved model does not compute what the one in memory does.
    """
    count = len(block_modules(model))
    gone = {checked_index(index, count, "blocks") for index in blocks}
    if not gone or len(gone) == count:
        raise OptionError(f"blocks: expected one to {count - 1} of {count} blocks, got {len(gone)}.")
    changed = copy.deepcopy(model)
    kept = [block for index, block in enumerate(block_modules(changed)) if index not in gone]
    _replace_list(changed, kept)
    config = getattr(changed, "config", None)
    if config is not None:
        _shorten(config, gone, count)
    for index, block in enumerate(kept):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # type: ignore[assignment]
    return _saved(changed, out)


def scale_blocks(
    model: nn.Module, factors: Mapping[int, float], out: str | Path | None = None, *, of: Collection[str] | None = None
) -> nn.Module:
    """Return a copy of the model in which weight matrices of some blocks are multiplied by a factor each.

    Args:
        model: of transformers, if it is to be saved; otherwise any with a list of blocks.
        factors: per block, finite; arXiv:2603.19348 scales all matrices of a block.
        out: folder to save it in, as in `drop_blocks`.
        of: last part of the names of the modules that are scaled, such as ``("o_proj", "down_proj")``, their biases
            with them: then what attention and MLP write is scaled exactly. Default: every matrix, no bias or gain.

    Raises:
        OptionError: If there is no such block, a factor is not finite, or no module has such a name.
        OutputError: If the folder is taken.
        ModelError: If the saved model does not compute what the one in memory does.
    """
    changed = copy.deepcopy(model)
    blocks = block_modules(changed)
    if not factors:
        raise OptionError("factors: expected at least one block.")
    for index, factor in factors.items():
        checked_index(index, len(blocks), "factors")
        if not math.isfinite(factor):
            raise OptionError(f"factors: expected a finite number, got {factor} for block {index}.")
        _scale_(blocks[index], factor, of)
    return _saved(changed, out)


@torch.no_grad()
def _scale_(block: nn.Module, factor: float, of: Collection[str] | None) -> None:
    chosen = [
        p
        for name, p in block.named_parameters()
        if (p.dim() > 1 if of is None else name.split(".")[-2:-1] != [] and name.split(".")[-2] in of)
    ]
    if not chosen:
        raise OptionError(f"of: no module of the block has a name among {sorted(of or ())}.")
    for p in chosen:
        p.mul_(factor)


def _replace_list(model: nn.Module, kept: list[nn.Module]) -> None:
    members = set(block_modules(model))
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and set(child) == members:
                setattr(module, name, nn.ModuleList(kept))
                return
    raise UnsupportedModelError("The blocks are in no nn.ModuleList that could be shortened.")


def _shorten(config: Any, gone: set[int], count: int) -> None:
    names = [n for n in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if getattr(config, n, None) == count]
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == count and "layer" in name:
            setattr(config, name, [each for index, each in enumerate(value) if index not in gone])
    for name in names:
        setattr(config, name, count - len(gone))


def _saved(model: nn.Module, out: str | Path | None) -> nn.Module:
    if out is None:
        return model
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists and is not empty. Choose another folder.")
    save = getattr(model, "save_pretrained", None)
    if not callable(save):
        raise UnsupportedModelError(f"{type(model).__name__} is no model of transformers: it has no save_pretrained.")
    save(folder)
    _check_same(model, folder)
    return model


@torch.no_grad()
def _check_same(model: nn.Module, folder: Path) -> None:
    """Open the folder again and compare logits of a few tokens: a configuration may say more than the weights."""
    opened = type(model).from_pretrained(folder, dtype=next(model.parameters()).dtype)  # type: ignore[attr-defined]
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device)[None]
    ours, theirs = (_logits(each, ids) for each in (model, opened.to(device)))
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
        raise ModelError(
            f"{folder} opens, but computes something else (logits differ by {float((ours - theirs).abs().max()):.2g}): "
            "its configuration describes the blocks in a way that this function does not know."
        )


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    training = model.training
    model.eval()
    logits: Tensor = model(ids).logits.float()
    model.train(training)
    return logits
