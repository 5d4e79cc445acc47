"""A context in which a user's model can be measured and after which nothing of it has changed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode without parameter gradients; restore everything on the way out.

    Restored, also after an exception or Ctrl-C: each module's training flag, each parameter's
    ``requires_grad``, the random states of Python, NumPy and PyTorch, and PyTorch's precision flags.
    Compiled code is run eagerly inside, because hooks added after compilation would be ignored.
    """
    training = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    states = _random_states()
    flags = _backend_flags()
    try:
        model.eval()
        for parameter, _ in gradients:
            parameter.requires_grad_(False)
        _set_backend_flags((False, False, False, True, "highest"))
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in gradients:
            parameter.requires_grad_(flag)
        _set_backend_flags(flags)
        _restore_random_states(states)


_Flags = tuple[bool, bool, bool, bool, str]


def _backend_flags() -> _Flags:
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    # Reading the precision first: PyTorch mixes the two ways of asking for TF32.
    precision = torch.get_float32_matmul_precision()
    return cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, precision


def _set_backend_flags(flags: _Flags) -> None:
    cuda_tf32, cudnn_tf32, benchmark, deterministic, precision = flags
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.matmul.allow_tf32 = cuda_tf32
    torch.backends.cudnn.allow_tf32 = cudnn_tf32
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cudnn.deterministic = deterministic


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
