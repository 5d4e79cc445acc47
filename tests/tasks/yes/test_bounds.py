from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from peelwise.errors import MapError, OptionError, PeelwiseError, ProbeError, TooFewSamplesError, UnsupportedModelError
from peelwise.records.yes import cloud_of
from peelwise.show.yes import text
from peelwise.tasks.yes.bounds import YesMonitor, yes_bounds
from peelwise.tasks.yes.chain import read_chain
from peelwise.tasks.yes.samples import checked_samples
from yes_reference import yes_reference


def _net(widths: list[int], activation: Callable[[], nn.Module] = nn.ReLU, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), activation()]
    return nn.Sequential(*layers[:-1])


def _phase(n: int = 20, m: int = 100, samples: int = 800) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, n)
    return x, (x @ torch.randn(m, n).T).abs()


def _denoise() -> tuple[Tensor, Tensor]:
    basis, code = torch.randn(5, 24), torch.randn(400, 5)
    clean = torch.tanh(code @ basis)
    return clean + 0.3 * torch.randn(400, 24), clean


def _digits() -> tuple[Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    x = torch.tensor(images) / 16
    return x, nn.functional.one_hot(torch.tensor(labels), 10).to(x.dtype)


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("task", "layers", "bias"),
    [
        (_phase, 5, True),
        (_denoise, 4, False),
        (_digits, 4, True),
        pytest.param(_phase, 5, False, marks=pytest.mark.nightly),
        pytest.param(_denoise, 4, True, marks=pytest.mark.nightly),
    ],
)
def test_published_mode_is_the_plain_algorithm_to_the_digit(task, layers: int, bias: bool) -> None:
    x, y = task()
    net = _net([x.shape[1], *[y.shape[1]] * layers], bias=bias)
    monitor = YesMonitor(net, x, y, mode="published", controls=False)
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    smallest: list[float] | None = None
    for step in range(201):
        if step in (0, 20, 200):
            yes_0, yes_k, loss = yes_reference(net, x, y)
            smallest = yes_k if smallest is None else [min(a, b) for a, b in zip(smallest, yes_k, strict=True)]
            row = monitor.step(step)
            found = [row.yes_0, *row.present.values(), *row.running.values(), row.loss]
            assert found == pytest.approx([yes_0, *yes_k, *smallest, loss], rel=1e-8, abs=0)
            assert row.cloud == cloud_of(loss, yes_0, smallest[-1])
        optimiser.zero_grad()
        (net(x) - y).square().sum(1).mean().backward()
        optimiser.step()


def test_published_mode_with_constant_columns_and_dead_units() -> None:
    x, y = _phase(6, 10, 200)
    x[:, 0], x[:, 1] = 1.0, 0.0
    net = _net([6, 10, 10, 10])
    with torch.no_grad():
        net[0].bias[:5] = -100.0
    yes_0, yes_k, _ = yes_reference(net, x, y)
    found = yes_bounds(net, x, y, mode="published", controls=False)
    assert list(found.bounds) == pytest.approx([yes_0, *yes_k], rel=1e-8)


def _undamped(x: Tensor, y: Tensor, net: nn.Module, **options: object):
    return yes_bounds(net, x, y, damping=0.0, regress_to="activation", controls=False, **options)


def test_default_mode_without_its_amendments_is_the_published_one() -> None:
    x, y = _phase(8, 12, 600)
    net = _net([8, 12, 12, 12])
    found = _undamped(x, y, net, split=(0.98, 0.01, 0.01))
    samples = checked_samples(read_chain(net), x, y, loss="squared", split=(0.98, 0.01, 0.01), seed=0, batch_size=1000)
    _, _, part = next(iter(samples.batches()))
    expected = yes_bounds(net, x[part == 0], y[part == 0], mode="published", controls=False)
    assert found.fit.bounds[0] == pytest.approx(expected.yes_0, rel=1e-7)
    direct = [[1, 2, 3]]
    found = _undamped(x, y, net, split=(0.98, 0.01, 0.01), maps=direct)
    expected = yes_bounds(net, x[part == 0], y[part == 0], mode="published", controls=False, maps=direct)
    assert min(found.fit.bounds) == pytest.approx(expected.yes_k[2], rel=1e-7)


def test_batches_and_beam_do_not_change_what_they_need_not() -> None:
    x, y = _phase(6, 9, 500)
    net = _net([6, 9, 9, 9, 9])
    whole = yes_bounds(net, x, y, controls=False)
    pieces = yes_bounds(net, x, y, controls=False, batch_size=37)
    assert whole.bounds == pytest.approx(pieces.bounds, rel=1e-9)
    assert whole.maps_visited == whole.maps_total == 8
    assert whole.beam_width is None


def test_beam_beyond_1024_maps_is_on_the_record() -> None:
    x, y = _phase(4, 5, 300)
    found = yes_bounds(_net([4, *[5] * 12]), x, y, controls=False, beam_width=4)
    assert found.beam_width == 4
    assert found.maps_total == 2**11
    assert 12 <= found.maps_visited < 200
    assert len(found.yes_k) == 11


def test_split_is_disjoint_repeatable_and_close_to_its_shares() -> None:
    net, x, y = _net([3, 4, 2]), torch.randn(10_000, 3), torch.randn(10_000, 2)
    options = {"loss": "squared", "split": (0.6, 0.2, 0.2), "batch_size": 999}
    one, two = (checked_samples(read_chain(net), x, y, seed=s, **options) for s in (0, 1))
    assert one.counts() != two.counts()
    assert [c / 10_000 for c in one.counts()] == pytest.approx([0.6, 0.2, 0.2], abs=0.02)
    first, other = (torch.cat([p for _, _, p in s.batches()]) for s in (one, two))
    assert torch.bincount(first).tolist() == list(one.counts())
    assert 0.3 < float((first == other).double().mean()) < 0.6  # 0.44 if independent
    permuted = torch.cat([b for _, b, _ in one.with_permuted_targets().batches()])
    assert torch.equal(permuted[first == 2], y[first == 2])
    assert not torch.isclose(permuted[first != 2], y[first != 2]).any()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU, nn.PReLU])
def test_any_widths_and_activations_beat_the_mean_and_their_controls_say_so(activation) -> None:
    x, y = _phase(6, 8, 1500)
    net = _net([6, 24, 5, 12, 8], activation)
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(300):
        optimiser.zero_grad()
        (net(x) - y).square().sum(1).mean().backward()
        optimiser.step()
    found = yes_bounds(net, x, y)
    assert found.controls is not None
    assert min(found.bounds) < float((y - y.mean(0)).square().sum(1).mean())
    assert min(found.controls.shuffled) > min(found.bounds)
    assert found.informative[3]  # trained features beat untrained ones
    assert found.controls.head_control < found.loss * 1.05
    assert found.gap[3].mean == pytest.approx(found.yes_k[3] - found.loss, rel=1e-6)
    assert "YES-3" in text(found)
    assert "untrained" in text(found)


def test_control_untrained_networks_bounds_are_not_informative() -> None:
    x, y = _phase(6, 8, 600)
    net = _net([6, 8, 8, 8])
    found = yes_bounds(net, x, y, untrained=copy.deepcopy(net))
    assert not any(found.informative.values())
    assert "uninformative" in text(found)


@pytest.mark.parametrize("layers", [1, 2])
def test_softmax_head_finds_the_convex_optimum(layers: int) -> None:
    x = torch.randn(900, 4)
    y = (x @ torch.randn(4, 3) + torch.randn(900, 3)).argmax(1)
    net = _net([4, *[6] * layers, 3])
    found = yes_bounds(net, x, y, loss="cross_entropy", split=(0.5, 0.25, 0.25))
    assert found.controls is not None
    assert found.loss > min(found.bounds)
    assert min(found.bounds) < 0.9 * torch.log(torch.tensor(3.0))
    assert min(found.controls.shuffled) > min(found.bounds) + 0.3
    # The head control of a frozen chain is logistic regression: compare with plain gradient descent.
    chain = read_chain(net)
    samples = checked_samples(chain, x, y, loss="cross_entropy", split=(0.5, 0.25, 0.25), seed=0, batch_size=900)
    _, _, part = next(iter(samples.batches()))
    a = chain.stations(x)[-2][1].detach()
    head = nn.Linear(6, 3)
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(head(a[part == 0]), y[part == 0])
        loss.backward()
        return loss

    optimiser.step(closure)
    plain = nn.functional.cross_entropy(head(a[part == 2]), y[part == 2]).item()
    assert found.controls.head_control == pytest.approx(plain, rel=0.05)


def test_the_monitor_changes_nothing_and_keeps_the_minimum_apart() -> None:
    x, y = _phase(5, 6, 300)
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    net.float().train()
    seen: list[int] = []
    net[1].register_forward_hook(lambda *_: seen.append(1))
    net(x.float()).sum().backward()
    seen.clear()
    before = copy.deepcopy(net.state_dict())
    gradients = [p.grad.clone() for p in net.parameters()]
    random = torch.get_rng_state()
    monitor = YesMonitor(net, x, y)
    rows = [monitor.step(0)]
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, net.parameters(), strict=True))
    assert net.training
    assert all(m.training for m in net)
    assert not seen
    assert rows[0].informative == dict.fromkeys(range(3), False)  # the network is its own control
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    rows.append(monitor.step(1))
    assert rows[1].present[2] > rows[1].running[2] == rows[0].running[2]
    assert monitor.rows == rows


def test_single_precision_networks_are_bounded_in_double() -> None:
    x, y = _phase(5, 6, 300)
    for activation in (nn.PReLU, nn.SiLU):
        net = _net([5, 7, 6], activation)
        single = copy.deepcopy(net).float()
        ours = yes_bounds(single, x.float(), y.float(), controls=False)
        assert ours.bounds == pytest.approx(yes_bounds(net, x, y, controls=False).bounds, rel=1e-5)


class _Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))


def test_a_forward_with_functions_is_read_like_a_sequential() -> None:
    x, y = _phase(5, 6, 300)
    net = _Functional()
    chained = nn.Sequential(nn.Sequential(net.one, nn.ReLU()), nn.Identity(), net.two)
    ours, theirs = (yes_bounds(n, x, y, mode="published", controls=False) for n in (net, chained))
    assert ours == theirs


class _Branching(_Functional):
    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        return self.two(h * torch.sigmoid(h))


_X, _Y = torch.randn(60, 5, dtype=torch.float64), torch.rand(60, 6, dtype=torch.float64)
_NAN = torch.where(torch.arange(60)[:, None] == 7, torch.nan, _Y)
_LABELS = torch.arange(60) % 6


@pytest.mark.parametrize(
    ("net", "x", "y", "options", "error", "words"),
    [
        (
            [5, 7, 6],
            _X,
            _Y,
            {"mode": "published"},
            UnsupportedModelError,
            r"net: .*\[7, 6\].*mode=\"default\"",
        ),
        ([5, 6, 6], _X, _Y, {"maps": [[2, 1]]}, MapError, "maps: .*direct map"),
        ([5, 6, 6, 6], _X, _Y, {"maps": [[1, 1, 3]]}, MapError, "maps: .*backwards"),
        ([5, 6, 6], _X, _Y, {"maps": "all"}, OptionError, "maps: "),
        ([5, 90, 6], _X, _Y, {"damping": 0.0}, TooFewSamplesError, r"damping: .*n >= 91 .*damping > 0"),
        ([5, 6, 6], _X, _Y, {"damping": -1.0}, OptionError, "damping: "),
        ([5, 6, 6], _X, _NAN, {}, ProbeError, "y: NaN or Inf, first in row 7"),
        ([5, 6, 6], _X, _Y[:, :3], {}, ProbeError, r"y: expected \[60, 6\].*\[60, 3\]"),
        ([5, 6, 6], _X, _LABELS, {}, ProbeError, r"y: .*float.*got int64 \[60\].*cross_entropy"),
        ([5, 6, 6], _X, _Y, {"loss": "cross_entropy"}, ProbeError, r"y: .*int64 .*y\.long\(\)"),
        ([5, 6, 6], _X, _LABELS + 1, {"loss": "cross_entropy"}, ProbeError, r"y: labels must be 0\.\.5"),
        ([5, 6, 6], _X, _LABELS, {"loss": "cross_entropy", "mode": "published"}, OptionError, "mode: "),
        ([5, 6, 6], _X[:, :4], _Y, {}, ProbeError, r"x: expected \[n, 5\]"),
        ([5, 6, 6], _LABELS, _Y, {}, ProbeError, "x: expected a float tensor"),
        ([5, 6, 6], _X[:3], _Y[:3], {}, TooFewSamplesError, "x: the .* part"),
        ([5, 6, 6], _X, _Y, {"split": (0.5, 0.4)}, OptionError, "split: "),
        ([5, 6, 6], _X, _Y, {"loss": "hinge"}, OptionError, "loss: "),
        ([5, 6, 6], _X, _Y, {"mode": "paper"}, OptionError, "mode: "),
        ([5, 6, 6], _X, _Y, {"beam_width": 0}, OptionError, "beam_width: "),
        ([5, 6, 6], _X, _Y, {"batch_size": 0}, OptionError, "batch_size: "),
        ([5, 6], _X, _Y, {}, UnsupportedModelError, "net: .*at least 2"),
    ],
)
def test_bad_input_gets_one_error_that_names_argument_and_remedy(net, x, y, options, error, words) -> None:
    with pytest.raises(error, match=words) as caught:
        yes_bounds(_net(net), x, y, **options)
    assert isinstance(caught.value, PeelwiseError)


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (nn.Sequential(nn.Linear(5, 6), nn.Softmax(dim=1), nn.Linear(6, 6)), "activation.*cannot be found"),
        (nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 6)), "activation.*cannot be found"),
        (nn.Sequential(nn.Linear(5, 6), nn.RReLU(), nn.Linear(6, 6)), "deterministic"),
        (nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Tanh(), nn.Linear(6, 6)), "one activation"),
        (nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(6, 6)), "gives 7 features"),
        (_Branching(), "output of the step before"),
        (nn.LSTM(5, 6), "net: "),
    ],
)
def test_a_network_that_is_no_chain_is_named(net: nn.Module, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        yes_bounds(net.double(), _X, _Y)


def test_published_mode_needs_relu() -> None:
    with pytest.raises(UnsupportedModelError, match=r'needs ReLU.*mode="default"'):
        yes_bounds(_net([5, 6, 6], nn.Tanh), _X, _Y, mode="published")
