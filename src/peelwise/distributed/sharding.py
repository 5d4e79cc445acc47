"""Models that several processes train: whole in each of them (DDP), or spread over them (``fully_shard``, FSDP2)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peelwise.errors import UnsupportedModelError


def unwrap_ddp(model: nn.Module) -> nn.Module:
    """Return the model without the wrapper that keeps replicas in step (DDP, DeepSpeed's engine).

    Raises:
        UnsupportedModelError: If its parameters are spread over processes in another way than by ``fully_shard``.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine":
        model = model.get_submodule("module")
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise UnsupportedModelError("Not yet: models in FullyShardedDataParallel (FSDP1). Use fully_shard (FSDP2).")
    if any(hasattr(p, "ds_id") and p.numel() == 0 for p in model.parameters()):
        raise UnsupportedModelError(
            "Not yet: parameters that DeepSpeed spreads over processes (ZeRO-3). Stages 1 and 2 leave them whole."
        )
    gathered = {id(p) for module in model.modules() if gathers(module) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if not is_sharded(parameter):
            continue
        placements = [placement for placement in _placements(parameter) if placement.is_shard()]
        if id(parameter) not in gathered or len(placements) > 1:
            raise UnsupportedModelError(f"Not yet: {name} is spread over processes by something else than fully_shard.")
    return model


def check_blocks(blocks: Mapping[str, nn.Module]) -> None:
    """Check that every block gathers its own parameters when it is called by itself.

    Args:
        blocks: the blocks' modules by name.

    Raises:
        UnsupportedModelError: If one does not.
    """
    for name, module in blocks.items():
        gathered = {id(p) for inner in module.modules() if gathers(inner) for p in inner.parameters()}
        if any(is_sharded(p) and id(p) not in gathered for p in module.parameters()):
            raise UnsupportedModelError(
                f"{name} is sharded only together with others, and cannot be run by itself. "
                "Call fully_shard on every block, then on the model."
            )


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of a tensor (a DTensor)."""
    return hasattr(tensor, "placements")


def local_shard(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds: all of it, unless it is spread."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; of one that is spread gathered, for which all processes call this in the same order."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Let the parameters of a module be whole inside, such as they are while it runs; all processes enter together.

    Nothing happens to a module that is not spread. Leaving needs nobody else. What is written into the parameters
    inside is forgotten.
    """
    shards: list[Any] = gathering(module)
    try:
        for each in shards:
            each.unshard()
        yield
    finally:
        for each in shards:
            each.reshard()


def shard_(model: nn.Module, blocks: Sequence[nn.Module], dtype: torch.dtype, device: torch.device) -> None:
    """Spread a model over all processes, in place: every block is gathered when it runs, the rest when the model does.

    One block after the other is brought to dtype and device and cut, so that of parameters that are mapped from files
    there is no more than one block in memory besides the parts.

    Args:
        model: with the same parameters in all processes.
        blocks: its blocks.
        dtype: of its floating-point parameters afterwards.
        device: where its parts lie afterwards; of every process its own.
    """
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for module in (*blocks, model):
        for parameter in module.parameters():
            if not is_sharded(parameter):
                parameter.data = parameter.data.to(device, dtype if parameter.is_floating_point() else None)
        fully_shard(module, mesh=mesh)


def empty_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model that is spread over processes which is whole: on the CPU, without values."""
    shards: list[Any] = gathering(model)
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(
            torch.empty(parameter.shape, dtype=parameter.dtype),
            requires_grad=parameter.requires_grad,
        )
        for parameter in model.parameters()
    }
    classes = [(module, type(module)) for module in shards]
    for module in shards:
        memo |= {id(value): type(value)() for name, value in vars(module).items() if _of_sharding(name)}
    try:
        for module in shards:  # theirs refuses to be copied
            module.__class__ = original_class(module)
        return copy.deepcopy(model, memo)
    finally:
        for module, own in classes:
            module.__class__ = own


def _of_sharding(name: str) -> bool:
    """Whether an attribute of a module is what ``fully_shard`` keeps there: hooks, and state of torch's contract."""
    return name.endswith("_hooks") or name.startswith("__composable_api")


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, without what ``fully_shard`` has put over it."""
    return type(module).__mro__[2] if gathers(module) else type(module)


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Let gradients that are on their way to other processes wait, and give gathered parameters back at both ends.

    Parameters that stay gathered after a forward pass would be those of the next one too, whatever the optimiser
    has done meanwhile; and a backward pass in the middle of an accumulation would send what is not complete.
    """
    shards: list[Any] = gathering(model)
    groups = [group for module in shards for group in _groups(module)]
    syncs = [(group, group.reduce_grads, group.all_reduce_grads) for group in groups]
    for module in shards:
        module.reshard()
        module.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    except BaseException:
        for module in shards:
            if module._get_fsdp_state()._is_root:
                module.reset_iter_state()  # a pass may have ended in the middle
        raise
    finally:
        for module in shards:
            module.reshard()
        for group, reduce, all_reduce in syncs:
            group.reduce_grads, group.all_reduce_grads = reduce, all_reduce


def gathering(module: nn.Module) -> list[nn.Module]:
    """Return the modules inside of one, and itself, whose parameters are gathered whenever they run."""
    return [each for each in module.modules() if gathers(each)]


def gathers(module: nn.Module) -> bool:
    """Whether a module gathers its parameters when it is called."""
    # By name of a method that FSDP2 adds, so that torch.distributed need not be there.
    return hasattr(module, "set_requires_gradient_sync")


def _groups(module: Any) -> list[Any]:
    """Return what FSDP2 gathers together; it tells its present settings nowhere else."""
    state = module._get_fsdp_state()
    one = getattr(state, "_fsdp_param_group", None)
    return list(getattr(state, "_fsdp_param_groups", [one] if one is not None else []))


def _placements(parameter: Any) -> list[Any]:
    return list(parameter.placements)
