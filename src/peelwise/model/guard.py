"""A context in which a user's model can be measured and after which nothing of it has changed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from peelwise.distributed.sharding import at_rest
from peelwise.model.experts import experts_called
from peelwise.model.replaced import CALL
from peelwise.model.weights.bitsandbytes import packing_paused
from peelwise.model.weights.fakes import observers_paused


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode without parameter gradients; restore everything on the way out.

    Restored, also after an exception or Ctrl-C: each module's training flag and forward, each parameter's
    ``requires_grad``, the random states of Python, NumPy and PyTorch, and PyTorch's flags; our hooks are gone.
    Compiled code is run eagerly inside, because hooks added after compilation would be ignored, and autocast is off,
    also where accelerate has put it inside of the model's ``forward`` (a Trainer with ``bf16=True``).
    Experts are run one by one (`peelwise.model.experts`); observers of fake quantisers keep their scales, and
    layers of bitsandbytes their codes. Of a model that is spread over processes all of them enter together.
    """
    with at_rest(model), _restored(model), experts_called(model), observers_paused(model), packing_paused(model):
        yield


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    before = _Before(model)
    try:
        model.eval()
        for module, _ in before.wrapped:
            module.__dict__["forward"] = module.__dict__["_original_forward"]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        _set_backend_flags(_exact(before.flags))
        # The fast path of nn.TransformerEncoderLayer reads weights itself, past every hook.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.compiler.set_stance("force_eager"), torch.autocast(before.device, enabled=False):
            yield
    finally:
        try:
            before.put_back()
        except BaseException:  # Ctrl-C in the middle of it: once more, from the beginning
            before.put_back()
            raise


class _Before:
    """What is to be put back, as it was when this was made."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [(module, module.training, module.__dict__.get("forward")) for module in model.modules()]
        # Accelerate keeps a module's forward beside the one in autocast that it made of it.
        self.wrapped = [(m, f) for m, _, f in self.modules if f is not None and "_original_forward" in m.__dict__]
        self.hooks = [(hooks, frozenset(hooks)) for module, _, _ in self.modules for hooks in _hooks_of(module)]
        self.gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.states, self.flags = _random_states(), _backend_flags()
        self.fast, self.threads = torch.backends.mha.get_fastpath_enabled(), torch.get_num_threads()
        device = next((parameter.device.type for parameter, _ in self.gradients), "cpu")
        # Not for parameters that were moved away ("meta").
        self.device = device if torch.amp.is_autocast_available(device) else "cpu"
        self.autocast, self.grad = torch.is_autocast_enabled(self.device), torch.is_grad_enabled()

    def put_back(self) -> None:
        """Put everything back; doing so again changes nothing.

        What peelwise hangs into a model takes itself out. An interrupt between two of its instructions can leave
        something behind: that is taken out here, and nothing of anybody else's.
        """
        for module, training, forward in self.modules:
            module.training = training
            present = module.__dict__.get("forward")
            if _ours(module.__dict__.get(CALL)):
                module.__dict__.pop(CALL)
            if present is not forward and _ours(present):
                module.__dict__.pop("forward")
                module.__dict__.update({} if forward is None else {"forward": forward})
        for module, forward in self.wrapped:
            module.__dict__["forward"] = forward
        for hooks, known in self.hooks:
            for key in [key for key, hook in hooks.items() if key not in known and _ours(hook)]:
                del hooks[key]
        for parameter, flag in self.gradients:
            parameter.requires_grad_(flag)
        _set_backend_flags(self.flags)
        torch.backends.mha.set_fastpath_enabled(self.fast)
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        torch.set_autocast_enabled(self.device, self.autocast)
        torch.set_grad_enabled(self.grad)
        _restore_random_states(self.states)


def _hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def _ours(added: object) -> bool:
    return str(getattr(added, "__module__", "")).partition(".")[0] == __name__.partition(".")[0]


@dataclass(frozen=True)
class _Flags:
    """How exact PyTorch's products are; the first two are ``None`` where PyTorch refuses to say.

    It has an older and a newer way of asking for TF32 and raises when the older is read after the newer was
    used, so both are kept: ``precisions`` is the newer, one value per backend and kind of operation.
    """

    matmul: str | None
    cudnn_tf32: bool | None
    cudnn_benchmark: bool
    cudnn_deterministic: bool
    precisions: tuple[str, ...]


def _backend_flags() -> _Flags:
    cudnn = torch.backends.cudnn
    precisions = tuple(owner.fp32_precision for owner in _precision_owners())
    matmul, cudnn_tf32 = None, None
    with suppress(RuntimeError):
        matmul = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        cudnn_tf32 = cudnn.allow_tf32
    return _Flags(matmul, cudnn_tf32, cudnn.benchmark, cudnn.deterministic, precisions)


def _exact(flags: _Flags) -> _Flags:
    """Return flags without TF32, spoken in the same way as ``flags``."""
    return _Flags(
        None if flags.matmul is None else "highest",
        None if flags.cudnn_tf32 is None else False,
        False,
        True,
        ("ieee",) * len(flags.precisions),
    )


def _set_backend_flags(flags: _Flags) -> None:
    cudnn = torch.backends.cudnn
    if flags.matmul is not None:
        torch.set_float32_matmul_precision(flags.matmul)
    if flags.cudnn_tf32 is not None:
        cudnn.allow_tf32 = flags.cudnn_tf32
    cudnn.benchmark = flags.cudnn_benchmark
    cudnn.deterministic = flags.cudnn_deterministic
    # Last, because the older way sets these too, and not always to what they were.
    for owner, precision in zip(_precision_owners(), flags.precisions, strict=True):
        owner.fp32_precision = precision


def _precision_owners() -> list[Any]:
    """Return PyTorch's places of the newer setting; none before it existed (2.9)."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    names = ((cuda, "matmul"), (cudnn, "conv"), (cudnn, "rnn"), (mkldnn, "matmul"), (mkldnn, "conv"), (mkldnn, "rnn"))
    found = [getattr(backend, name, None) for backend, name in names]
    return [owner for owner in found if hasattr(owner, "fp32_precision")]


_States = tuple[Any, Any, torch.Tensor, list[torch.Tensor]]


def _random_states() -> _States:
    # NumPy's global generator belongs to the user's data loading, so it is saved, never used.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), cuda  # noqa: NPY002


def _restore_random_states(states: _States) -> None:
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
