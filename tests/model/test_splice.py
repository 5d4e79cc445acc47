"""A splice must equal weights that were really written, and write none."""

import pytest
import torch
from torch import nn

from audits import Snapshot, random_changes, written
from peelwise.model import splice
from peelwise.model.experts import experts_called
from peelwise.model.layers import LinearLayer
from peelwise.model.splice import spliced
from zoo import ZOO, sample_ids

HALF = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


def logits_of(model, ids=None):
    with torch.no_grad():
        output = model(sample_ids() if ids is None else ids)
    return getattr(output, "logits", output)


def only_hooks(monkeypatch):
    monkeypatch.setattr(splice, "_plain", lambda linear: False)


@pytest.mark.parametrize("path", ["merged", "hooked"])
@pytest.mark.parametrize("name", ZOO)
def test_equals_written_weights(name, path, monkeypatch):
    if path == "hooked":
        only_hooks(monkeypatch)
    model = ZOO[name]()
    _, changes = random_changes(model)
    before, own = Snapshot.of(model), logits_of(model)
    expected = logits_of(written(model, changes, 0.5))
    with experts_called(model), spliced(changes, 0.5):
        found = logits_of(model)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - own).abs().max() > 0.05  # the control: the changes matter
    before.assert_unchanged(model)
    torch.testing.assert_close(logits_of(model), own, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_half_precision_adds_in_float32_and_keeps_the_dtype(name, dtype):
    model = ZOO[name]().to(dtype)
    _, changes = random_changes(model)
    exact = logits_of(written(ZOO[name]().to(dtype).float(), changes))
    before, own = Snapshot.of(model), logits_of(model)
    with spliced(changes):
        found = logits_of(model)
    assert found.dtype == dtype
    spread = float(exact.std())
    assert (found.float() - exact).abs().mean() < 2 * HALF[dtype] * spread
    assert (own.float() - exact).abs().mean() > 5 * (found.float() - exact).abs().mean()
    before.assert_unchanged(model)


@torch.no_grad()
def test_a_change_too_small_for_bf16_weights_still_acts():
    linear = nn.Linear(64, 1, bias=False).bfloat16()
    linear.weight.copy_(torch.tensor([1.0, -1.0]).repeat(32))
    x, step = torch.ones(1, 64).bfloat16(), 2.0**-9  # 1 + 2^-9 is 1 in bf16
    assert float(nn.functional.linear(x, linear.weight + step)) == 0.0
    with spliced({LinearLayer("map", linear, False): torch.full((1, 64), step)}):
        assert float(linear(x)) == 64 * step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nested_splices_add_up(dtype):
    linear, x = nn.Linear(5, 3).to(dtype), torch.ones(2, 5, dtype=dtype)
    change, own = torch.full((3, 6), 0.5), linear(x)
    m = LinearLayer("map", linear, False)
    with spliced({m: change}):
        with spliced({m: change}, 2.0):
            torch.testing.assert_close(linear(x), own + 9.0, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(linear(x), own + 3.0, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(linear(x), own, rtol=0, atol=0)


@pytest.mark.parametrize("path", ["merged", "hooked"])
def test_keyword_input(path, monkeypatch):
    if path == "hooked":
        only_hooks(monkeypatch)
    linear, x = nn.Linear(5, 3), torch.ones(2, 5)
    with spliced({LinearLayer("map", linear, False): torch.ones(3, 6)}):
        torch.testing.assert_close(linear(input=x), linear(x), rtol=0, atol=0)


def test_somebody_elses_forward_and_hooks_are_kept():
    linear, x = nn.Linear(5, 3), torch.ones(2, 5)
    own = linear(x)
    linear.forward = lambda x: 10 * nn.functional.linear(x, linear.weight, linear.bias)
    seen = []
    linear.register_forward_hook(lambda module, args, y: seen.append(y))
    before = Snapshot.of(linear)
    with spliced({LinearLayer("map", linear, False): torch.ones(3, 6)}):
        torch.testing.assert_close(linear(x), 10 * own + 6)
    before.assert_unchanged(linear)
    torch.testing.assert_close(linear(x), 10 * own)
    assert len(seen) == 2


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_stays_behind_an_exception(error, dtype):
    model = ZOO["gpt2"]().to(dtype)
    _, changes = random_changes(model)
    before = Snapshot.of(model)

    def fail():
        with spliced(changes):
            assert Snapshot.of(model).attachments != before.attachments
            raise error

    with pytest.raises(error):
        fail()
    before.assert_unchanged(model)


def test_a_splice_that_fails_halfway_takes_back_what_it_did():
    model = ZOO["llama"]()
    _, changes = random_changes(model)
    last = list(changes)[-1]
    before = Snapshot.of(model)
    with pytest.raises(RuntimeError), spliced(changes | {last: torch.ones(1, 2, 3)}):
        pass
    before.assert_unchanged(model)
