"""The rule of unlikeness on numbers made up for it: what counts, what is discounted, what is said of healthy ones."""

from __future__ import annotations

import numpy as np
import pytest

from peelwise.evidence.unlike import THRESHOLD, named, to_screen, unlikeness, with_gains

BLOCKS = 24
GATES = [6] * BLOCKS


def healthy(seed: int = 0) -> dict[tuple[str, str], list[float | None]]:
    """Return signals that follow a trend over depth, with noise, and ends that are unlike the middle."""
    random = np.random.default_rng(seed)
    depth = np.arange(BLOCKS) / BLOCKS

    def row(start: float, trend: float, noise: float) -> list[float | None]:
        found = start * np.exp(trend * depth + noise * random.standard_normal(BLOCKS))
        found[[0, -1]] *= 2.0
        return [float(v) for v in found]

    own = [float(random.chisquare(6) / 6) for _ in range(BLOCKS)]
    return {
        **{("weight_rms", part): row(0.05, 0.5, 0.05) for part in ("q_proj", "up_proj", "down_proj")},
        **{("stable_rank", part): row(20, -0.3, 0.1) for part in ("q_proj", "up_proj", "down_proj")},
        ("block_influence", ""): row(0.2, -1.0, 0.2),
        ("trace_of_training", "up_proj"): row(3.0, 0.1, 0.05),
        ("neuron_mismatch", "up_proj"): [float(v) for v in random.uniform(0.05, 0.5, BLOCKS)],
        ("neuron_mismatch", "gate_proj"): [float(v) for v in random.uniform(0.9, 1.2, BLOCKS)],
        ("marginal_evidence", ""): own,
    }


def scores(values: dict[tuple[str, str], list[float | None]], off: float = 0.0) -> np.ndarray:
    found = unlikeness(values, BLOCKS, GATES, off)
    assert found is not None
    return found.scores


def test_of_healthy_blocks_less_than_one_in_a_hundred_is_named() -> None:
    assert sum(len(named(scores(healthy(seed)))) for seed in range(60)) <= 0.01 * 60 * BLOCKS


@pytest.mark.parametrize("block", [0, 1, 11, BLOCKS - 1])
def test_neurons_permuted_on_one_side_are_told_at_the_ends_too(block: int) -> None:
    values = healthy()
    values["neuron_mismatch", "up_proj"][block] = 1.01
    found = scores(values)
    assert int(found.argmax()) == block
    assert named(found)[0] == block


def test_where_no_block_pairs_its_neurons_it_says_nothing() -> None:
    """The gate of a gated layer, as in `healthy`: all of it lies where a permuted one would."""
    values = healthy()
    without = {key: row for key, row in values.items() if key != ("neuron_mismatch", "gate_proj")}
    assert scores(values) == pytest.approx(scores(without))


@pytest.mark.parametrize("block", [0, 11])
def test_a_matrix_that_was_never_trained_is_told(block: int) -> None:
    values = healthy()
    values["trace_of_training", "up_proj"][block] = 1.0
    assert named(scores(values))[0] == block


def test_both_ends_are_tried_however_far_another_block_stands_out() -> None:
    far = np.zeros(BLOCKS)
    far[12] = 20 * THRESHOLD
    assert {0, 12, BLOCKS - 1} <= set(to_screen(far))


def test_own_evidence_and_gains_count_less_in_a_model_that_is_off_its_distribution() -> None:
    values = healthy()
    values["marginal_evidence", ""][20] = 30.0
    sound, off = scores(values), scores(values, off=6.0)
    assert int(sound.argmax()) == 20
    assert off[20] < sound[20] / 1.5
    others = [b for b in range(BLOCKS) if b != 20]
    assert off[others] == pytest.approx(sound[others], abs=1.5)
    plain, broken = (unlikeness(healthy(), BLOCKS, GATES, nats) for nats in (0.0, 6.0))
    assert plain is not None
    assert broken is not None
    gain = {BLOCKS - 1: 0.3}
    assert with_gains(plain, gain, 0.015).gains[-1] == pytest.approx(2 * np.log2(1 + 0.3 / 0.015))
    assert with_gains(broken, gain, 0.015).gains[-1] == pytest.approx(2 * np.log2(1 + 0.3 / 0.615))


def test_fewer_than_five_blocks_have_no_depth() -> None:
    assert unlikeness({("weight_rms", "q"): [1.0, 1.0, 9.0, 1.0]}, 4) is None
