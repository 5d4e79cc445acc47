"""Where a model's weights are, and whose: in memory or moved away, tied or not, as in a checkpoint or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from peelwise.distributed.sharding import is_sharded, local_shard, whole
from peelwise.errors import ModelError, UnsupportedModelError
from peelwise.model.checkpoint_files import check_folder, check_weights, each_tensor
from peelwise.model.layers import named_embedding, plain_name, unwrapped
from peelwise.model.offloaded import is_offloaded
from peelwise.records.base import Note, note

_NAMED = 3
# What wrappers put into names: PEFT around the model, and around each layer that has an adapter.
_WRAPPED = "base_model.model."
_INNER = ".base_layer."


def check_in_memory(model: nn.Module) -> None:
    """Check that every weight is where the model computes, on one device.

    Raises:
        UnsupportedModelError: With the first that was moved away (to the disk, or to another memory between calls), or
            lies elsewhere.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise UnsupportedModelError(
                f"Not yet: {plain_name(name)} has no values (meta device): it was offloaded, or never loaded. Load the "
                "whole model onto one device."
            )
    placed = {parameter.device: plain_name(name) for name, parameter in model.named_parameters()}
    if len(placed) > 1:
        said = ", ".join(f"{name} is on {device}" for device, name in placed.items())
        raise UnsupportedModelError(f"Not yet: {said}. Load the whole model onto one device.")
    for name, module in model.named_modules():
        if is_offloaded(module):
            raise UnsupportedModelError(
                f"Not yet: {plain_name(name) or type(module).__name__} is offloaded between calls (accelerate). Load "
                "the whole model onto one device."
            )


def untied_note(model: nn.Module) -> Iterator[Note]:
    """Yield a note where the configuration says that the embedding is the head's weight too, and it is another."""
    model = unwrapped(model)
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    ends = [named_embedding(model, "input"), named_embedding(model, "output")]
    weights = [getattr(end, "weight", None) for end in ends]
    if not all(isinstance(weight, Tensor) for weight in weights) or weights[0] is weights[1]:
        return
    embedding, head = (weight.detach() for weight in weights if isinstance(weight, Tensor))
    if not is_sharded(head) and local_shard(embedding).data_ptr() == head.data_ptr():
        return
    names = {id(module): plain_name(name) for name, module in model.named_modules()}
    same = embedding.shape == head.shape and torch.equal(whole(embedding).to(head.dtype), whole(head))
    yield note(
        "untied", embedding=names.get(id(ends[0]), "embedding"), head=names.get(id(ends[1]), "head"), same=int(same)
    )


def checkpoint_note(model: nn.Module, folder: str | Path) -> Note:
    """Compare the tensors of a checkpoint with the model in memory, in the model's own dtypes, and say what differs.

    Of a model that is spread over processes all of them compare at once.

    Args:
        model: in memory; names that PEFT or ``torch.compile`` put around others are seen through.
        folder: a Hugging Face folder with safetensors.

    Raises:
        ModelError: If the folder has none, or has not one tensor in common with the model.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ModelError(f"{folder} is no folder: expected a checkpoint with model.safetensors.")
    check_folder(path)
    stored = check_weights(path, allow_pickle=False)
    own = {_bare(name): tensor.detach() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    name_of = {name: _found_as(name, own, model) for name in stored.shapes}
    of_file = set(name_of.values())
    both = [name for name in own if name in of_file]
    if not both:
        raise ModelError(
            f"{folder} has no tensor of the model, such as {next(iter(own), 'none')}: expected a checkpoint of it."
        )
    held = {local_shard(own[name]).data_ptr() for name in both}
    shared = {name for name, mine in name_of.items() if mine in own}
    other = {name_of[name] for name, tensor in each_tensor(path, shared) if not _equal(own[name_of[name]], tensor)}
    differ = [name for name in both if name in other]
    # A tied weight is stored once.
    left = [name for name in own if name not in of_file and local_shard(own[name]).data_ptr() not in held]
    return note(
        "checkpoint",
        folder=path.name,
        compared=len(both),
        differ=len(differ),
        names=", ".join(differ[:_NAMED]) or "none",
        only_model=len(left),
        only_file=len(stored.shapes) - len(shared),
    )


def _bare(name: str) -> str:
    return plain_name(name).removeprefix(_WRAPPED).replace(_INNER, ".")


def _found_as(name: str, own: dict[str, Tensor], model: nn.Module) -> str:
    """Return what the model calls a tensor of a file; files of base models lack the prefix, or have one too many."""
    prefix = f"{getattr(unwrapped(model), 'base_model_prefix', '')}."
    tried = (_bare(name), f"{prefix}{name}", name.removeprefix(prefix))
    return next((each for each in tried if each in own), name)


def _equal(own: Tensor, stored: Tensor) -> bool:
    return own.shape == stored.shape and torch.equal(whole(own).cpu(), stored.to(own.dtype))
