"""Targets of layers that are quantised after others, against least squares over the tokens themselves."""

from __future__ import annotations

import pytest
import torch

from peelwise.formats.table import parse_format
from peelwise.references.asymmetric import InputSums, Target, coded, targets
from planted import normal

D_IN, D_OUT, N = 12, 8, 4_000


def drawn(n=N, *, noise=0.3, seed=0):
    """Inputs in the parent, inputs that came out smaller and noisy, and what the stream lacks."""
    x = normal(n, D_IN, seed=seed) @ normal(D_IN, D_IN, seed=9)
    z = 0.8 * x + noise * normal(n, D_IN, seed=seed + 1)
    gap = z @ normal(D_IN, D_OUT, seed=7) * 0.1 + normal(n, D_OUT, seed=seed + 2) * 0.1
    return x, z, gap


def sums_of(x, z, gap=None):
    n = len(z)
    return InputSums(z.T @ z / n, (x - z).T @ z / n, None if gap is None else gap.T @ z / n)


W = normal(D_OUT, D_IN, seed=5)


def test_the_target_is_least_squares_over_the_tokens():
    x, z, gap = drawn()
    (found,) = targets([W], sums_of(x, z, gap), sums_of(*drawn(seed=20)), dampings=(1e-9,))
    wanted = torch.linalg.lstsq(z, x @ W.T + gap).solution.T
    assert found.share == pytest.approx(1, abs=0.05)  # other tokens confirm it
    whole = W + (found.T - W) / found.share
    assert torch.allclose(whole, wanted, atol=1e-5)


def test_excess_is_what_the_tokens_say():
    x, z, gap = drawn()
    other = W + 0.1 * normal(D_OUT, D_IN, seed=3)
    M = torch.eye(D_OUT, dtype=torch.float64) + normal(D_OUT, 1, seed=4) @ normal(D_OUT, 1, seed=4).T

    def cost(weight, metric):
        e = x @ W.T + gap - z @ weight.T
        return float(((e @ metric) * e).sum() / len(z))

    for metric in (torch.eye(D_OUT, dtype=torch.float64), M):
        assert sums_of(x, z, gap).excess(W, other, metric) == pytest.approx(cost(other, metric) - cost(W, metric))
    assert sums_of(x, z, gap).excess(W, other) == pytest.approx(
        cost(other, M * 0 + torch.eye(D_OUT)) - cost(W, M * 0 + torch.eye(D_OUT))
    )


def test_nothing_is_made_up_for_where_nothing_is_lost_or_others_do_not_confirm_it():
    _x, z, _ = drawn()
    assert targets([W], InputSums(z.T @ z / N), InputSums(z.T @ z / N))[0].share == 0
    few = drawn(16, noise=3.0)
    learnt = targets([W], sums_of(*few[:2]), sums_of(z, z))[0]  # select says that nothing is missing
    assert torch.equal(learnt.T, W)
    assert learnt.share == 0


def test_codes_are_no_worse_on_select_than_rounding_or_any_start():
    form = parse_format("int3")
    weight = W.float()
    fit, select = (
        InputSums(*(t.float() for t in (s.zz, s.lost))) for s in (sums_of(*drawn()[:2]), sums_of(*drawn(seed=30)[:2]))
    )
    (aim,) = targets([weight], fit, select)
    start = form.encode(weight * 0.5)
    found = coded(weight, aim, fit, select, form, starts=[start])
    cost = select.excess(weight, form.decode(found.encoded))
    for other in (form.encode(weight), start, *found.steps.values()):
        assert cost <= select.excess(weight, form.decode(other)) + 1e-9
    plain = coded(weight, Target(weight), fit, select, form, starts=[start])
    assert cost < select.excess(weight, form.decode(plain.encoded))  # making up for what is lost pays here


def test_what_the_loss_minds_is_spared():
    """One direction of the output matters a thousand times as much as the others."""
    form = parse_format("int2")
    weight, (_x, z, _) = normal(32, D_IN, seed=5).float(), drawn()
    sums = InputSums((z.T @ z / N).float())
    direction = torch.nn.functional.normalize(normal(32, 1, seed=6).float(), dim=0)
    F = 1_000 * direction @ direction.T + torch.eye(32)
    weighed = coded(weight, Target(weight), sums, sums, form, curvature=F).encoded
    plain = coded(weight, Target(weight), sums, sums, form).encoded

    def along(encoded):
        e = direction.T @ (form.decode(encoded) - weight)
        return float((e @ sums.zz @ e.T).sum())

    assert along(weighed) < 0.5 * along(plain)
