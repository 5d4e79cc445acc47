"""Tensors that are on one device by name and on another by their numbers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

from peelwise.model.carried import Carried

CPU = torch.device("cpu")


def test_it_computes_as_its_numbers_do_and_only_views_stay_carried() -> None:
    held, x = torch.randn(5, 4), torch.randn(3, 4, requires_grad=True)
    carried = nn.Parameter(Carried(held, CPU), requires_grad=False)
    assert isinstance(carried, nn.Parameter)
    for ours, theirs in ((F.linear(x, carried), F.linear(x, held)), (x @ carried.T, x @ held.T)):
        assert type(ours) is torch.Tensor
        assert torch.equal(ours, theirs)
        gradients = [torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (ours, theirs)]
        assert torch.equal(*gradients)
    for view in (carried.detach(), carried.T, carried[1:3], carried.view(4, 5), carried.float()):
        assert type(view) is Carried
        assert view.held.untyped_storage().data_ptr() == held.untyped_storage().data_ptr()  # no copy
    assert torch.equal(carried[1:3].T.double(), held[1:3].T.double())
    carried.requires_grad_(True)
    assert torch.equal(torch.autograd.grad(F.linear(x, carried).sum(), carried)[0], x.detach().sum(0).expand(5, 4))


def test_it_is_never_written() -> None:
    held = torch.randn(5, 4)
    before, carried, other = held.clone(), Carried(held, CPU), torch.zeros(5, 4)
    for write in (lambda: carried.mul_(2), lambda: carried[0].copy_(other[0]), lambda: torch.neg(other, out=carried)):
        with pytest.raises(RuntimeError):
            write()
    assert torch.equal(held, before)
    other.copy_(carried)  # it may be read
    assert torch.equal(other, held)
    twin = copy.deepcopy(nn.Parameter(carried))
    assert type(twin) is nn.Parameter
    assert twin.data_ptr() != held.data_ptr()
    assert torch.equal(twin, held)


def test_it_meets_only_what_is_on_its_device() -> None:
    """A device that is none: its tensors know where they are, and have no numbers."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    weight = Carried(torch.randn(5, 4), torch.device("cuda:0"))
    assert weight.device == torch.device("cuda:0")
    assert weight.cpu().device == CPU
    with mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.randn(3, 4, device="cuda")
        assert F.linear(x, weight).device == torch.device("cuda:0")
        with pytest.raises(RuntimeError, match="device"):
            F.linear(torch.randn(3, 4), weight)
