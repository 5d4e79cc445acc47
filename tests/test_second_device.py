"""The second device that tests play: it takes what a GPU takes, refuses what a GPU refuses, and computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from second_device import is_on_it, second_device
from zoo import ZOO, sample_ids

HERE, ROWS = torch.arange(3.0), torch.tensor([0, 1])


@pytest.fixture
def there():
    """Three numbers on the device."""
    with second_device() as device:
        yield HERE.to(device)


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda x: x + HERE,
    "sum the other way round": lambda x: HERE + x,
    "a single number of it with several here": lambda x: HERE + x[0],
    "in place into a number here": lambda x: torch.zeros(()).add_(x[0]),
    "product": lambda x: x[None] @ HERE[:, None],
    "product with a single number": lambda x: torch.dot(x[:1], HERE[:1]),
    "put together": lambda x: torch.cat([x, HERE]),
    "stack of single numbers": lambda x: torch.stack([x[0], HERE[0]]),
    "condition": lambda x: torch.where(HERE > 0, x, x),
    "mask": lambda x: x.masked_fill(HERE > 0, 0.0),
    "rows by number": lambda x: x.index_select(0, ROWS),
    "sums by number": lambda x: x.index_add(0, ROWS, x[:2]),
    "picked here by numbers of it": lambda x: HERE[x.long()],
    "several numbers written": lambda x: x.__setitem__(ROWS, torch.ones(2)),
    "comparison": lambda x: torch.equal(x, HERE),
    "result elsewhere": lambda x: torch.add(x, 1, out=torch.zeros(3)),
    "embedding": lambda x: nn.functional.embedding(ROWS, x[:, None]),
    "layer": lambda x: nn.Linear(3, 3)(x),
    "quantile": lambda x: x.quantile(torch.tensor([0.5])),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_tensor_left_behind_is_refused(there: Tensor, kind: str) -> None:
    with pytest.raises(RuntimeError, match=r"Expected all tensors to be on the same device.* cpu and cuda:0|q tensor"):
        REFUSED[kind](there)


def test_numpy_and_generators_of_the_cpu_are_refused(there: Tensor) -> None:
    for asked in (there.numpy, lambda: np.asarray(there)):
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            asked()
    generator = torch.Generator().manual_seed(0)
    for drawn in (
        lambda: torch.randn(3, generator=generator, device=there.device),
        lambda: torch.randperm(3, generator=generator, device=there.device),
        lambda: there.normal_(generator=generator),
        lambda: torch.multinomial(there, 1, generator=generator),
    ):
        with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
            drawn()


TAKEN: dict[str, tuple[Callable[[Tensor], Any], list[float]]] = {
    "a number times all": (lambda x: x * torch.tensor(2.0), [0.0, 2.0, 4.0]),
    "a number in a condition": (lambda x: torch.where(x > 0, x, torch.tensor(7.0)), [7.0, 1.0, 2.0]),
    "a number into all": (lambda x: x.add_(torch.tensor(1.0)), [1.0, 2.0, 3.0]),
    "indices": (lambda x: x[ROWS], [0.0, 1.0]),
    "a mask as index": (lambda x: x[HERE > 0], [1.0, 2.0]),
    "copy from here": (lambda x: x.copy_(HERE + 1), [1.0, 2.0, 3.0]),
    "made as it": (lambda x: torch.ones_like(x) + x.new_zeros(3) + x.new_tensor([1, 2, 3]), [2.0, 3.0, 4.0]),
    "made on it": (lambda x: x + torch.tensor([1.0, 2.0, 3.0], device="cuda"), [1.0, 3.0, 5.0]),
    "made on it without numbers": (lambda x: x + torch.arange(3, device=x.device), [0.0, 2.0, 4.0]),
    "another shape in place": (lambda x: x.resize_(2), [0.0, 1.0]),
    "in place into a view": (lambda x: x[1:].mul_(3), [3.0, 6.0]),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_what_a_gpu_takes_is_taken(there: Tensor, kind: str) -> None:
    found = TAKEN[kind][0](there)
    assert (found.device, found.cpu().device) == (torch.device("cuda:0"), torch.device("cpu"))
    assert found.tolist() == TAKEN[kind][1]
    assert found.to("cuda") is found


def test_numbers_written_through_a_view_are_in_the_whole(there: Tensor) -> None:
    there[1:].mul_(3)
    there[ROWS] = 5.0
    assert there.tolist() == [5.0, 5.0, 6.0]
    assert f"{there[0]:.1f} {float(there.sum())} {int(there[0])}" == "5.0 16.0 5"


@pytest.mark.parametrize("name", ["llama-tied", "plain", "mixtral", "gpt2"])
def test_models_give_the_same_logits_gradients_and_steps(name: str) -> None:
    def trained(model: nn.Module, ids: Tensor) -> list[Tensor]:
        out = model(ids)
        logits = getattr(out, "logits", out)
        cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        torch.optim.AdamW(model.parameters()).step()
        return [logits, *(p.grad for p in model.parameters() if p.grad is not None), *model.parameters()]

    expected = trained(ZOO[name](), sample_ids())
    with second_device() as device:
        model = ZOO[name]().to(device)
        assert all(type(p) is nn.Parameter and is_on_it(p) for p in model.parameters())
        assert all(map(is_on_it, model.buffers()))
        twin = copy.deepcopy(model)
        found = trained(model, sample_ids().to(device))
        assert not any(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
        assert not any(map(is_on_it, model.cpu().parameters()))


def test_it_draws_from_a_generator_of_its_own_and_is_gone_afterwards() -> None:
    with second_device() as device:
        before = torch.get_rng_state()
        torch.manual_seed(3)
        first, state = torch.randn(4, device=device).tolist(), torch.get_rng_state()
        torch.manual_seed(3)
        assert torch.randn(4, device=device).tolist() == first
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.randn(4).tolist() != first
        assert torch.cuda.is_available()
        torch.set_rng_state(before)
    assert not torch.cuda.is_available()
    with pytest.raises((AssertionError, RuntimeError)):
        HERE.to(device)
    assert HERE.device.type == "cpu"
    assert "device" not in vars(Tensor)
