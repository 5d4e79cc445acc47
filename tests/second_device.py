"""A second device where there is none: real numbers that say they are on a GPU, and refuse what a GPU refuses.

On a GPU the product falls over a tensor that was left behind on the CPU; on the CPU no test can see that. Within
``second_device()`` tensors and modules can be moved to ``cuda`` as if there were one: their numbers are in ordinary
memory and are computed with by the kernels of the CPU, so that results are those of the CPU. What PyTorch refuses on a
GPU is refused: an operation on tensors of two devices (a single number of the CPU will do in what is computed element
by element, and indices of the CPU may pick elements), a generator of another device, ``numpy()``. The device draws
random numbers from a generator of its own. `tests/test_second_device.py` holds each of these rules.

How: to C++ these tensors are on ``cpu:1``, which is not ``cpu`` and has the same kernels; Python is told ``cuda:0``.
They keep Python's own types, `Tensor` and `Parameter`, since what is done with a weight may depend on that; a mode,
under which every operation passes by, knows them by a dispatch key. Not played: other threads (backward passes run in
the caller's), autocast, streams, how much memory is used, kernels of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_WITHIN = torch.device("cpu", 1)  # what C++ is told
_NAMES = ("cuda", "mps")
PEAK = 123_456_789  # bytes that it says were used at most
_played = [_NAMES[0]]

# Operations that may read a tensor of another device whatever its size.
_COPIES = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class _Marked(Tensor):
    """What a tensor is while it is made, so that it gets the dispatch key."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("no tensor keeps this type")


def is_on_it(tensor: object) -> bool:
    """Say whether a tensor is on the second device."""
    return (
        isinstance(tensor, Tensor)
        and torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python)
        and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    )


def _moved(values: Tensor) -> Tensor:
    """Return a tensor on the second device that shares its memory with one of the CPU."""
    if _played[0] == "mps" and values.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
    made = Tensor._make_subclass(_Marked, values, False, dispatch_device=True, device_for_backend_keys=_WITHIN)
    made.__class__ = Tensor
    return made


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor of the CPU that shares its memory with one of the second device."""
    with torch._C._DisableTorchDispatch():
        storage, offset, shape, stride = (
            tensor.untyped_storage(),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
        )
    found: Tensor = torch.empty(0, dtype=tensor.dtype).set_(storage, offset, shape, stride)
    return found


class _Mode(TorchDispatchMode):
    """Under which every operation passes by."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return _WITHIN
        tensors, device = _tensors((*args, *kwargs.values())), kwargs.get("device")
        here = any(map(is_on_it, tensors))
        if not here and not _is_second(device):
            return func(*args, **kwargs)
        _check_generators(func, args, kwargs)
        if device is not None:
            kwargs = {**kwargs, "device": "cpu" if _is_second(device) else device}
        else:
            _check_devices(func, args, kwargs, tensors)
        return _computed(func, args, kwargs, device is None or _is_second(device))


def _computed(func: Any, args: Any, kwargs: dict[str, Any], stays: bool) -> Any:
    """Return what an operation gives on the CPU, on the second device if that is where it ``stays``."""
    twins: dict[int, tuple[Tensor, Tensor]] = {}

    def plain(tensor: Tensor) -> Tensor:
        if not is_on_it(tensor):
            return tensor
        found = _plain(tensor)
        twins[id(found)] = tensor, found
        return found

    def moved(tensor: Tensor) -> Tensor:
        return twins[id(tensor)][0] if id(tensor) in twins else _moved(tensor)  # in place: as itself

    args, kwargs = _mapped(plain, args), {key: _mapped(plain, value) for key, value in kwargs.items()}
    with _its_numbers(func):
        out = _KERNELS.get(func, func)(*args, **kwargs)
    for tensor, twin in twins.values():
        _follow(tensor, twin)
    return _mapped(moved, out) if stays else out


_random = torch.Generator()  # the device draws from a generator of its own


@contextmanager
def _its_numbers(func: Any) -> Iterator[None]:
    if torch.Tag.nondeterministic_seeded not in func.tags:
        yield
        return
    before = torch.get_rng_state()
    torch.set_rng_state(_random.get_state())
    try:
        yield
    finally:
        _random.set_state(torch.get_rng_state())
        torch.set_rng_state(before)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among some arguments, and in lists among them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif type(value) in (list, tuple):
            found += [each for each in value if isinstance(each, Tensor)]
    return found


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Change a tensor, or those of a list."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_mapped(change, each) for each in value) if type(value) in (list, tuple) else value


def _follow(tensor: Tensor, plain: Tensor) -> None:
    """Give a tensor the shape and the memory that an operation in place has given its twin."""
    with torch._C._DisableTorchDispatch():
        same = tensor.shape == plain.shape and tensor.stride() == plain.stride()
        same = same and tensor.storage_offset() == plain.storage_offset() and tensor.data_ptr() == plain.data_ptr()
    if not same:
        with _Mode():
            tensor.data = _moved(plain)


def _is_second(device: Any) -> bool:
    if not isinstance(device, str | torch.device):
        return False
    device = torch.device(device)
    return device == _WITHIN or device.type == _played[0]


@functools.cache
def _written(func: Any) -> tuple[frozenset[int], frozenset[str]]:
    """Return which arguments an operation writes to: places and names."""
    arguments = func._schema.arguments
    written = [i for i, each in enumerate(arguments) if each.alias_info is not None and each.alias_info.is_write]
    return frozenset(written), frozenset(arguments[i].name for i in written)


def _check_devices(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
    """Refuse tensors of two devices where the kernels of a GPU refuse them."""
    others = [tensor for tensor in tensors if not is_on_it(tensor)]
    if not others or func in _COPIES:
        return
    if func in _INDEXED and is_on_it(args[0]):
        value = args[2] if len(args) > 2 else None
        if value is None or is_on_it(value) or value.dim() == 0:
            return
    places, names = _written(func)
    targets = [args[i] for i in places if i < len(args)] + [kwargs[name] for name in names if name in kwargs]
    read_only = all(other is not target for other in others for target in _tensors(targets))
    if read_only and all(other.dim() == 0 for other in others) and _by_elements(func):
        return
    found = " and ".join(sorted({f"{_played[0]}:0" if is_on_it(each) else str(each.device) for each in tensors}))
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {found}! ({func})"
    )


def _by_elements(func: Any) -> bool:
    return torch.Tag.pointwise in func.tags or func.name().startswith("aten::_foreach_")


def _check_generators(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Generator):
            raise RuntimeError(
                f"Expected a '{_played[0]}' device type for generator but found '{value.device}' ({func})"
            )


def _histc(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return aten.histc.default(values.double(), *args, **kwargs).to(values.dtype)


# What a GPU can do and the CPU cannot.
_KERNELS: dict[Any, Callable[..., Any]] = {aten.histc.default: _histc}


# -- what Python asks a tensor -----------------------------------------------------------------------------------


def _methods() -> dict[str, Any]:
    """Return what `Tensor` answers while there is a second device."""
    base = torch._C.TensorBase
    own = {
        name: getattr(Tensor, name) for name in ("__array__", "__format__", "__deepcopy__", "__reduce_ex__", "__repr__")
    }

    def either(name: str, instead: Callable[..., Any]) -> Callable[..., Any]:
        usual = own.get(name) or getattr(base, name)

        @functools.wraps(usual)
        def asked(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (instead if is_on_it(self) else usual)(self, *args, **kwargs)

        return asked

    def said(name: str, value: Callable[[], Any]) -> property:
        usual = getattr(base, name)
        return property(lambda self: value() if is_on_it(self) else usual.__get__(self))

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Do what ``Tensor.to`` does, by the name that C++ knows: it would ask a driver which GPU ``cuda`` is."""
        if _is_second(kwargs.get("device")):
            kwargs["device"] = _WITHIN
        if args and _is_second(args[0]):
            args = (_WITHIN, *args[1:])
        return base.to(self, *args, **kwargs)

    def numpy(self: Tensor, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
            "memory first."
        )

    def new_tensor(
        self: Tensor, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
    ) -> Tensor:
        made = torch.tensor(data, dtype=dtype or self.dtype, device=self.device if device is None else device)
        return made.requires_grad_(requires_grad)

    return {
        "to": to,
        "device": said("device", lambda: torch.device(_played[0], 0)),
        "is_cpu": said("is_cpu", lambda: False),
        "is_cuda": said("is_cuda", lambda: _played[0] == "cuda"),
        "is_mps": said("is_mps", lambda: _played[0] == "mps"),
        "get_device": either("get_device", lambda self: 0),
        "tolist": either("tolist", lambda self: self.detach().cpu().tolist()),
        "numpy": either("numpy", numpy),
        "new_tensor": either("new_tensor", new_tensor),
        "__array__": either("__array__", lambda self, dtype=None: numpy(self)),
        "__format__": either("__format__", lambda self, form: format(self.detach().cpu(), form)),
        "__repr__": either("__repr__", lambda self, **_: f"{self.detach().cpu()!r} on {self.device}"),
        "__deepcopy__": either("__deepcopy__", _deep_copy),
        "__reduce_ex__": either(
            "__reduce_ex__", lambda self, protocol: (_back, (self.detach().cpu(), self.requires_grad))
        ),
    }


def _deep_copy(self: Tensor, memo: dict[int, Any]) -> Tensor:
    if id(self) not in memo:
        memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
        memo[id(self)].__dict__.update(self.__dict__)
    found: Tensor = memo[id(self)]
    return found


def _back(values: Tensor, requires_grad: bool) -> Tensor:
    return values.to(_played[0]).requires_grad_(requires_grad)


def _parameter(cls: type[nn.Parameter], data: Tensor | None = None, requires_grad: bool = True) -> Tensor:
    """Make a parameter, of the second device if its numbers are there."""
    if data is None or not is_on_it(data):
        return _new_parameter(cls, data, requires_grad)
    made = data.detach()
    made.__class__ = cls
    return made.requires_grad_(requires_grad)


_new_parameter = nn.Parameter.__new__


def _read(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return ``torch.tensor`` or the like, which reads numbers past every mode, so that it can make them here too."""

    @functools.wraps(make)
    def made(data: Any, *args: Any, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> Tensor:
        if not _is_second(device):
            found = make(data, *args, device=device, **kwargs)
        elif is_on_it(data):
            found = make(data, *args, **kwargs)
        else:
            found = make(data, *args, **kwargs).to(_WITHIN)
        return found.requires_grad_() if requires_grad else found

    return made


@contextmanager
def second_device(name: str = "cuda") -> Iterator[torch.device]:
    """Have a second device of this name: tensors and modules can be moved ``.to`` it, and made on it."""
    if name not in _NAMES:
        raise ValueError(f"expected one of {_NAMES}, got {name!r}")
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    before = _played[0]
    _device_constructors()  # remembered for good: not what stands in their place meanwhile
    with ExitStack() as stack:
        for owner, names in _replaced(name):
            for function, instead in names.items():
                stack.enter_context(mock.patch.object(owner, function, instead))
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        stack.callback(_played.__setitem__, 0, before)
        _played[0] = name
        # A module's parameters stay who they are when it is moved, so that tied ones stay tied.
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.enter_context(_Mode())
        yield torch.device(name, 0)


def _replaced(name: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield what is replaced in PyTorch meanwhile."""
    yield Tensor, _methods()
    yield nn.Parameter, {"__new__": _parameter}
    yield torch, {function: _read(getattr(torch, function)) for function in ("tensor", "as_tensor")}
    alone = {
        "get_rng_state": lambda device=0: _random.get_state(),
        "set_rng_state": lambda state, device=0: _random.set_state(state),
    }
    if name == "mps":
        yield torch.backends.mps, {"is_available": lambda: True}
        yield torch.mps, {**alone, "manual_seed": lambda seed: _seed(seed), "synchronize": lambda: None}
        return
    yield torch.cuda, {"is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0}
    yield (
        torch.cuda,
        {"set_device": lambda device: None, "empty_cache": lambda: None, "is_bf16_supported": lambda: True},
    )
    yield torch.cuda, {**alone, "get_rng_state_all": lambda: [_random.get_state()]}
    yield torch.cuda, {"set_rng_state_all": lambda states: _random.set_state(states[0]), "manual_seed_all": _seed}
    yield torch.cuda, {"_lazy_init": lambda: None, "synchronize": lambda device=None: None}
    yield (
        torch.cuda,
        {"max_memory_allocated": lambda device=None: PEAK, "get_device_capability": lambda device=None: (9, 0)},
    )


def _seed(seed: int) -> None:
    _random.manual_seed(seed + 1)  # the same seed gives other numbers there
