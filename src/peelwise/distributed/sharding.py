"""Models that several processes train: whole in each of them (DDP), or spread over them (``fully_shard``, FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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
    gathered = {id(p) for module in model.modules() if _gathers(module) for p in module.parameters()}
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
        gathered = {id(p) for inner in module.modules() if _gathers(inner) for p in inner.parameters()}
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


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Let gradients that are on their way to other processes wait, and give gathered parameters back at both ends.

    Parameters that stay gathered after a forward pass would be those of the next one too, whatever the optimiser
    has done meanwhile; and a backward pass in the middle of an accumulation would send what is not complete.
    """
    shards: list[Any] = [module for module in model.modules() if _gathers(module)]
    groups = [group for module in shards for group in _groups(module)]
    syncs = [(group, group.reduce_grads, group.all_reduce_grads) for group in groups]
    for module in shards:
        module.reshard()
        module.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
        for group, reduce, all_reduce in syncs:
            group.reduce_grads, group.all_reduce_grads = reduce, all_reduce


def _gathers(module: nn.Module) -> bool:
    # By name of a method that FSDP2 adds, so that torch.distributed need not be there.
    return hasattr(module, "set_requires_gradient_sync")


def _groups(module: Any) -> list[Any]:
    """Return what FSDP2 gathers together; it tells its present settings nowhere else."""
    state = module._get_fsdp_state()
    one = getattr(state, "_fsdp_param_group", None)
    return list(getattr(state, "_fsdp_param_groups", [one] if one is not None else []))


def _placements(parameter: Any) -> list[Any]:
    return list(parameter.placements)
