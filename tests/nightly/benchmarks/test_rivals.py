"""The diagnostics that peelwise is compared with are what they say, and leave the model alone."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks" / "truth"))

import rivals
import spectra
from audits import Snapshot, part_of, slow_losses, tiny_probe
from damage import reset, sign_flip
from peelwise.model.architectures import find_blocks
from peelwise.probe.probe import Probe
from peelwise.probe.rows import Split
from rivals import Given
from zoo import ZOO

LLAMA = "llama"


@pytest.fixture(scope="module")
def given() -> Given:
    """A random Llama of three blocks and a few ragged sequences."""
    probe = tiny_probe()
    lengths = torch.arange(probe.fit.sequences) % 7 + 11
    mask = torch.arange(probe.fit.ids.shape[1]) < lengths[:, None]
    return Given(ZOO[LLAMA](), replace(probe, fit=Split(probe.fit.ids, mask)))


@pytest.fixture(scope="module")
def small(stored_stage: Callable[[str], tuple[Any, Any]], training_probe: Probe) -> Given:
    """The trained small GPT with block 3 sign-flipped; an earlier stage stands for its initialisation."""
    model = sign_flip(stored_stage("final")[0], 3)
    return Given(model, part_of(training_probe, fit=8, select=4), stored_stage("early")[0])


@pytest.fixture(scope="module")
def measured(small: Given) -> dict[str, Any]:
    """Every rival on the small GPT; nothing of the model may change on the way."""
    before = Snapshot.of(small.model)
    found = rivals.measure(small)
    before.assert_unchanged(small.model)
    return found


class Identity(nn.Module):
    """A block that does nothing, and returns what a block of transformers returns."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden


def rows_of(split: Split) -> list[list[int]]:
    return [ids[keep].tolist() for ids, keep in zip(split.ids, split.mask, strict=True)]


def mean_loss(model: nn.Module, split: Split) -> float:
    return float(slow_losses(model, rows_of(split)).sum() / split.tokens)


def test_every_rival_gives_one_finite_number_per_block(measured: dict[str, Any]) -> None:
    assert list(measured) == [rival.name for rival in rivals.RIVALS]
    spoken = {name: one["scores"] for name, one in measured.items() if one["scores"] is not None}
    missing = set() if spectra.installed() else {"weightwatcher", "weightwatcher warnings"}
    assert spoken.keys() == measured.keys() - missing
    assert all(len(scores) == 6 and all(map(math.isfinite, scores)) for scores in spoken.values())
    assert all(one["seconds"] > 0 for one in measured.values() if one["scores"] is not None)


def test_report_is_never_read(given: Given) -> None:
    """With ids that no embedding knows on report, any look at it fails."""
    report = Split(given.probe.report.ids + 10_000, given.probe.report.mask)
    found = rivals.measure(replace(given, probe=replace(given.probe, report=report)))
    assert found["peel maps"]["scores"] is not None


def test_gradient_norm_is_that_of_autograd_in_float64(given: Given) -> None:
    model = copy.deepcopy(given.model).double().requires_grad_(True)
    rows = rows_of(given.probe.fit)
    for row in rows:  # one sequence at a time, without padding
        logits = model(torch.tensor([row[:-1]]), use_cache=False).logits[0]
        picked = logits.log_softmax(-1)[torch.arange(len(row) - 1), torch.tensor(row[1:])]
        (-picked.sum() / given.probe.fit.tokens).backward()
    expected = [math.hypot(*(float(p.grad.norm()) for p in block.parameters())) for block in model.model.layers]
    assert rivals.gradient_norm(given) == pytest.approx(expected, rel=1e-4)
    weights = [math.hypot(*(float(p.detach().norm()) for p in block.parameters())) for block in model.model.layers]
    ratios = [g / w for g, w in zip(expected, weights, strict=True)]
    assert rivals.gradient_to_weight(given) == pytest.approx(ratios, rel=1e-4)


def test_removal_is_the_loss_of_a_model_whose_block_is_the_identity(given: Given) -> None:
    whole, expected = mean_loss(given.model, given.probe.select), []
    for index in range(len(given.model.model.layers)):
        without = copy.deepcopy(given.model)
        without.model.layers[index] = Identity()
        expected.append(whole - mean_loss(without, given.probe.select))
    assert rivals.removal(given) == pytest.approx(expected, abs=1e-5)
    assert max(map(abs, expected)) > 1e-3


def test_a_block_that_does_nothing_is_first_for_influence_cka_and_removal(given: Given) -> None:
    silent = copy.deepcopy(given.model)
    with torch.no_grad():
        silent.model.layers[1].self_attn.o_proj.weight.zero_()
        silent.model.layers[1].mlp.down_proj.weight.zero_()
    there = Given(silent, given.probe)
    for score, best in ((rivals.block_influence, 0.0), (rivals.cka, 1.0), (rivals.removal, 0.0)):
        assert score(there)[1] == pytest.approx(best, abs=1e-6)
    for score in (rivals.block_influence, rivals.cka):
        scores = score(there)
        assert scores[1] > max(scores[0], scores[2]) + 1e-3


def test_block_influence_is_one_minus_the_mean_cosine_of_the_models_own_hidden_states(given: Given) -> None:
    cosines: list[list[float]] = [[], [], []]
    last: list[Tensor] = []  # transformers normalises the last hidden state, so the block's own is taken
    handle = given.model.model.layers[-1].register_forward_hook(lambda _m, _x, y: last.append(y))
    with torch.no_grad():
        for row in rows_of(given.probe.fit):
            states = given.model(torch.tensor([row[:-1]]), use_cache=False, output_hidden_states=True).hidden_states
            states = [*(state[0] for state in states[:-1]), last.pop()[0]]
            for index, (x, y) in enumerate(pairwise(states)):
                cosines[index] += [float(a @ b / (a.norm() * b.norm())) for a, b in zip(x, y, strict=True)]
    handle.remove()
    expected = [sum(one) / len(one) - 1 for one in cosines]
    assert rivals.block_influence(given) == pytest.approx(expected, abs=1e-5)


def test_cka_knows_rotation_and_scale_as_equal_and_noise_as_different() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 8, generator=generator, dtype=torch.float64) * torch.arange(1.0, 9.0)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    assert rivals.linear_cka(x, x) == pytest.approx(1.0)
    assert rivals.linear_cka(x, 3.0 * x @ turn + 5.0) == pytest.approx(1.0)
    assert rivals.linear_cka(x, torch.randn(500, 8, generator=generator, dtype=torch.float64)) < 0.1
    # By kernels over tokens, as the paper writes it.
    y = x + 5 * torch.randn(500, 8, generator=generator, dtype=torch.float64)
    K, L = (m @ m.T for m in (x - x.mean(0), y - y.mean(0)))
    assert rivals.linear_cka(x, y) == pytest.approx(float((K * L).sum() / (K.norm() * L.norm())))


def test_a_block_that_has_not_moved_is_first_from_initialisation(given: Given) -> None:
    moved = reset(reset(given.model, 0), 2)
    there = Given(moved, given.probe, given.model)
    distances, turns = rivals.distance(there), rivals.rotation(there)
    assert distances is not None
    assert distances[1] == 0.0
    assert max(distances[0], distances[2]) < -1.0
    assert turns is not None
    assert turns[1] == pytest.approx(1.0)
    assert max(abs(turns[0]), abs(turns[2])) < 0.1
    assert rivals.distance(given) is rivals.rotation(given) is None  # no initial weights


def test_distance_sees_scale_and_rotation_does_not(given: Given) -> None:
    scaled = copy.deepcopy(given.model)
    with torch.no_grad():
        for linear in find_blocks(scaled)[1].linears:
            linear.module.weight.mul_(1.5)
    there = Given(scaled, given.probe, given.model)
    assert rivals.distance(there) == pytest.approx([0.0, -0.5, 0.0])
    assert rivals.rotation(there) == pytest.approx([1.0, 1.0, 1.0])


def test_peel_maps_find_the_sign_flipped_block_or_its_neighbour(measured: dict[str, Any]) -> None:
    scores = measured["peel maps"]["scores"]
    assert max(range(6), key=scores.__getitem__) in (2, 3)
    assert scores[-1] == min(scores)


def test_peel_maps_are_for_few_blocks(given: Given) -> None:
    config = copy.deepcopy(given.model.config)
    config.num_hidden_layers = rivals.MOST_BLOCKS_TO_PEEL + 1
    assert rivals.peel_maps(Given(type(given.model)(config).eval(), given.probe)) is None
    assert rivals.peel_maps(given) is not None


def test_weightwatcher_is_left_out_and_said_once_where_it_is_missing(
    given: Given, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "weightwatcher", None)
    spectra.installed.cache_clear()
    try:
        assert rivals.weightwatcher(replace(given)) is None
        assert rivals.weightwatcher_warnings(replace(given)) is None
        said = capsys.readouterr().err
    finally:
        spectra.installed.cache_clear()
    assert said.count(spectra.INSTALL) == 1


def test_weightwatcher_counts_every_matrix_of_every_block(small: Given, measured: dict[str, Any]) -> None:
    pytest.importorskip("weightwatcher")
    there = small.spectra
    assert there is not None
    assert [len(block) for block in there.alphas] == [7] * 6
    extra = measured["weightwatcher warnings"]["extra"]
    flat = [alpha for block in there.alphas for alpha in block]
    assert extra["warned"] == sum(alpha > 6 or alpha < 2 for alpha in flat) > 0
    assert (extra["matrices"], extra["failed"]) == (42, 0)
    # What spectra cannot see: no singular value of a sign-flipped matrix differs.
    healthy = spectra.spectra_of(sign_flip(small.model, 3))
    assert healthy is not None
    assert healthy.mean_alphas() == pytest.approx(measured["weightwatcher"]["scores"], rel=1e-3)
