"""Models whose weights accelerate moves away between calls: their own weights in place while they are measured.

Accelerate's hooks stand in a module's ``forward``: they bring its parameters before a call and leave empty ones (on the
``meta`` device) behind. What is measured reads weights, splices changes into them and asks for gradients between calls,
so hooks would have to run at every turn. Instead, inside of a context, each empty parameter gives its place to the
tensor that its hook would bring: the one in memory, or a view of its file, of which the system reads the pages that
are used and drops them where memory is short. The hooks, which then have nothing to do, stand aside. Where modules
compute on an accelerator, the tensor says that it is there, and is copied there by each operation that reads it
(`Carried`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from peelwise.errors import ModelError, UnsupportedModelError
from peelwise.model.carried import Carried
from peelwise.model.layers import plain_name, unwrapped
from peelwise.model.spill import kept_on_disk
from peelwise.model.weights_map import WeightsMap

P = ParamSpec("P")
R = TypeVar("R")

_HOOK, _OWN = "_hf_hook", "_old_forward"  # where accelerate keeps a module's hook, and its forward without it
_ALIGNS = "AlignDevicesHook"
# What accelerate's dispatch_model puts before a model's methods, with a warning.
_METHODS = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa")


def measures_offloaded(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function find the weights of the offloaded models among its arguments in their place."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with brought(*args, *kwargs.values()):
            return function(*args, **kwargs)

    return inside


@contextmanager
def brought(*models: object) -> Iterator[None]:
    """Have the weights of offloaded models in their place; afterwards everything of them is as it was.

    Also after an exception or Ctrl-C. What is no module, or a module that is not offloaded, is left alone. A copy that
    is made inside has no hooks and all weights in memory.

    Args:
        models: any of which some may be modules.

    Raises:
        UnsupportedModelError: If modules are computed on several devices, or have hooks of other kinds.
        ModelError: If a file with weights is missing, damaged or cut short.
        OutputError: If weights are to be converted, and the disk has no room.
    """
    with ExitStack() as stack:
        for model in models:
            if isinstance(model, nn.Module):
                stack.enter_context(_brought(unwrapped(model)))
        yield


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate moves the module's own weights away between calls."""
    return any(getattr(hook, "offload", False) for hook in _hooks(module))


@contextmanager
def _brought(model: nn.Module) -> Iterator[None]:
    hooked = {plain_name(name): module for name, module in model.named_modules() if _HOOK in vars(module)}
    if not any(map(is_offloaded, hooked.values())):
        yield
        return
    for name, module in hooked.items():
        _check_hooks(name or type(model).__name__, module)
    device, weights = _device(hooked), WeightsMap()
    swaps = _swaps(model, hooked, weights, device)
    _tie(model, swaps)
    before = [(vars(module), dict(vars(module))) for module in hooked.values()]
    try:
        for swap in swaps:
            swap.place[swap.name] = swap.tensor
        for module in hooked.values():
            _stand_aside(module)
        with kept_on_disk(model) if weights.on_disk else nullcontext():
            yield
    finally:
        try:
            _put_back(swaps, before)
        except BaseException:  # Ctrl-C in the middle of it: once more, from the beginning
            _put_back(swaps, before)
            raise


# -- hooks ---------------------------------------------------------------------------------------------------


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """Return the hooks of accelerate that a module has, in the order in which they run."""
    hook = getattr(module, _HOOK, None)
    return tuple(getattr(hook, "hooks", () if hook is None else (hook,)))


def _check_hooks(name: str, module: nn.Module) -> None:
    """Check that a module's hooks do nothing but bring weights and inputs."""
    for hook in _hooks(module):
        if type(hook).__name__ != _ALIGNS:
            raise UnsupportedModelError(
                f"Not yet: {name} has a hook of accelerate ({type(hook).__name__}) besides those that bring weights. "
                "Remove it, or load the whole model onto one device."
            )
    forward = vars(module).get("forward")
    if not isinstance(forward, functools.partial) or forward.func.__module__ != "accelerate.hooks":
        raise UnsupportedModelError(
            f"Not yet: the forward of {name} was replaced after accelerate offloaded it. Load the whole model onto one "
            "device."
        )


def _device(hooked: Mapping[str, nn.Module]) -> torch.device:
    """Return the device that all modules with hooks are computed on."""
    found: dict[torch.device, str] = {}
    for name, module in hooked.items():
        for hook in _hooks(module):
            if hook.execution_device is not None:
                device = torch.device(hook.execution_device)
                found.setdefault(device if device.type == "cpu" else torch.device(device.type, device.index or 0), name)
    if len(found) > 1:
        said = ", ".join(f"{name or 'a part'} on {device}" for device, name in found.items())
        raise UnsupportedModelError(
            f"Not yet: modules of one model are computed on several devices (accelerate): {said}. Offload all of "
            "them from one device."
        )
    return next(iter(found), torch.device("cpu"))


def _stand_aside(module: nn.Module) -> None:
    """Give a module the forward that it had before accelerate, and its class's methods."""
    own = vars(module)
    forward = own[_OWN]
    if getattr(forward, "__func__", None) is type(module).forward:
        own.pop("forward")
    else:
        own["forward"] = forward
    for name in (_HOOK, *_METHODS):
        own.pop(name, None)


def _put_back(swaps: list[_Swap], before: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Put everything back; doing so again changes nothing."""
    for swap in swaps:
        swap.place[swap.name] = swap.empty
    for own, known in before:
        for name in (_HOOK, "forward", *_METHODS):
            if name in known:
                own[name] = known[name]


# -- weights -------------------------------------------------------------------------------------------------


@dataclass
class _Swap:
    """One tensor of one module: where it stands, the empty one, and the one with values."""

    place: dict[str, Any]  # a module's parameters or buffers
    name: str
    empty: Tensor
    tensor: Tensor


def _swaps(model: nn.Module, hooked: Mapping[str, nn.Module], weights: WeightsMap, device: torch.device) -> list[_Swap]:
    """Return what is to be put where. Tensors that were one parameter, as those of tied layers, are one again."""
    swaps: list[_Swap] = []
    parameters = {_values_of(parameter): parameter for parameter in model.parameters() if not parameter.is_meta}
    for path, module in hooked.items():
        for hook in (hook for hook in _hooks(module) if hook.offload):
            # A hook of a whole block brings what is below it too.
            owners = module.named_modules() if hook.place_submodules else [("", module)]
            for below, owner in owners:
                for place in (owner._parameters, owner._buffers):
                    for name, empty in place.items():
                        if empty is None or not empty.is_meta or name in owner._non_persistent_buffers_set:
                            continue
                        full = ".".join(part for part in (path, below, name) if part)
                        value = weights.tensor(hook.weights_map, f"{below}.{name}" if below else name)
                        _check_like(full, empty, value)
                        value = _seen_on(device, value)
                        if isinstance(empty, nn.Parameter):
                            made = nn.Parameter(value, requires_grad=empty.requires_grad)
                            value = parameters.setdefault(_values_of(value), made)
                        swaps.append(_Swap(place, name, empty, value))
    return swaps


def _seen_on(device: torch.device, value: Tensor) -> Tensor:
    """Return a tensor as one on the device that its module is computed on."""
    return value if value.device == device else Carried(value, device)


def _check_like(name: str, empty: Tensor, value: Tensor) -> None:
    if type(empty) not in (nn.Parameter, Tensor):
        raise UnsupportedModelError(
            f"Not yet: {name} is offloaded (accelerate) and quantised ({type(empty).__name__}). Load the whole model "
            "onto one device."
        )
    if value.shape != empty.shape or value.dtype != empty.dtype:
        raise ModelError(
            f"{name} was offloaded as {value.dtype} {list(value.shape)}, and the model has {empty.dtype} "
            f"{list(empty.shape)} there. Load the model again."
        )


def _values_of(tensor: Tensor) -> tuple[object, ...]:
    """Return what two tensors have in common if they are views of the same numbers."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _tie(model: nn.Module, swaps: list[_Swap]) -> None:
    """Make tied parameters of a model of transformers one again where accelerate wrote their numbers twice."""
    found = {(id(swap.place), swap.name): swap for swap in swaps}
    for module in model.modules():
        for names in vars(module).get("all_tied_weights_keys", {}).items():
            places = [_place(module, name) for name in names]
            own = [found.get((id(place), name)) for place, name in places]
            tied, source = (s.tensor if s else place.get(name) for s, (place, name) in zip(own, places, strict=True))
            if tied is None or source is None or not torch.equal(tied, source):
                continue
            if own[0] is not None:
                own[0].tensor = source
            elif own[1] is not None:
                own[1].tensor = tied


def _place(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Return the parameters among which one of that name, seen from a module, stands, and its name there."""
    path, _, last = name.rpartition(".")
    try:
        return module.get_submodule(path)._parameters, last
    except AttributeError:
        return {}, last
