"""The sums of a sweep against slow float64 ones, and what is made of them."""

import pytest
import torch

from audits import (
    assert_same_moments,
    ragged_rows,
    runner_of,
    slow_moments,
    split_of,
    swept_moments,
    tiny_probe,
)
from peelwise.engine.sweep import sweep
from peelwise.errors import IllConditionedWarning, UnsupportedModelError
from peelwise.model.experts import experts_called
from peelwise.model.splice import spliced
from plain_gpt import Block
from zoo import BLOCKS, ZOO


@pytest.mark.parametrize("name", ZOO)
def test_float64_sums_equal_slow_ones(name):
    """C is checked against autograd's own gradient of the mean loss with respect to weights and biases."""
    # Gemma 2 gives NaN in float64 to padding that lies further off than its window.
    rows = [row for row in ragged_rows() if name != "gemma2" or len(row) > 9]
    model = ZOO[name]().double()
    runner = runner_of(model, micro_batch_tokens=40)
    with experts_called(model):
        found = swept_moments(runner, runner.trace(split_of(rows)))
    # Losses are taken in float32 whatever the model's format, which is what the tolerance is for.
    assert_same_moments(found, slow_moments(model, rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2-tied"])
def test_float32_sums_equal_slow_ones(name):
    runner = runner_of(ZOO[name]())
    found = swept_moments(runner, runner.trace(split_of(ragged_rows())))
    assert_same_moments(found, slow_moments(ZOO[name](), ragged_rows()), rtol=1e-3, atol=1e-4)


def test_the_comparison_would_notice_one_sequence_too_many():
    runner = runner_of(ZOO["llama"]())
    found = swept_moments(runner, runner.trace(split_of([*ragged_rows(), [1, 2]])))
    with pytest.raises(AssertionError):
        assert_same_moments(found, slow_moments(ZOO["llama"](), ragged_rows()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "plain"])
def test_streamed_equals_whole(name):
    def moments(micro_batch_tokens):
        runner = runner_of(ZOO[name](), micro_batch_tokens=micro_batch_tokens)
        return swept_moments(runner, runner.trace(split_of(ragged_rows())))

    assert_same_moments(moments(1), moments(10_000), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def swept():
    runner, probe = runner_of(ZOO["llama"]()), tiny_probe()
    fit, select = runner.trace(probe.fit), runner.trace(probe.select)
    return runner, fit, select, sweep(runner, fit, select)[0]


def test_every_map_gets_both_directions(swept):
    runner, _, _, found = swept
    assert sorted(found) == list(range(BLOCKS))
    for block in runner.blocks:
        proposals = found[block.index]
        assert set(proposals.changes) == {"input-whitened", "two-sided"}
        for changes in proposals.changes.values():
            assert set(changes) == set(block.linears)
            assert all(m.weight().shape == p.change.shape and p.change.isfinite().all() for m, p in changes.items())


def test_free_statistics_are_those_of_their_definition(swept):
    runner, fit, _, found = swept
    moments = swept_moments(runner, fit)
    for block in runner.blocks:
        energy = norm = 0.0
        for linear in block.linears:
            m = moments[linear.name]
            damped = m.S + 0.1 * m.S.trace() / len(m.S) * torch.eye(len(m.S), dtype=m.S.dtype)
            energy += float((m.C @ torch.linalg.inv(damped) @ m.C.T).trace())
            norm += float(m.C.square().sum())
        assert found[block.index].signals["energy"] == pytest.approx(energy, rel=1e-6)
        assert found[block.index].signals["gradient_norm"] == pytest.approx(norm**0.5, rel=1e-6)


def test_only_some_blocks(swept):
    runner, fit, select, whole = swept
    seen: list[int] = []
    (found,) = sweep(runner, fit, select, only=[1], directions=["input-whitened"], after_block=seen.append)
    assert list(found) == [1]
    assert seen == [1, 2]  # the lowest block is not reached
    assert found[1].signals["energy"] == whole[1].signals["energy"]
    assert set(found[1].changes) == {"input-whitened"}


def test_a_small_step_along_the_proposal_lowers_the_fit_loss_by_its_slope(swept):
    runner, fit, _, found = swept
    moments = swept_moments(runner, fit)
    changes = {m: p.change for b in found.values() for m, p in b.changes["input-whitened"].items()}
    slope = sum(float((moments[m.name].C * change).sum()) for m, change in changes.items())
    step = 0.01 / abs(slope)
    with spliced(changes, step):
        lower = runner.trace(tiny_probe().fit).mean
    assert slope < 0
    assert (lower - fit.mean) / step == pytest.approx(slope, rel=0.1)


def test_other_targets_give_other_directions(swept):
    runner, fit, select, whole = swept
    same, other = sweep(runner, fit, select, targets=[None, lambda batch, position: batch.targets.flip(0)])
    assert other[0].signals["energy"] != pytest.approx(whole[0].signals["energy"], rel=1e-3)
    assert same[0].signals["energy"] == whole[0].signals["energy"]
    (alone,) = sweep(runner, fit, select, targets=[lambda batch, position: batch.targets.flip(0)])
    assert alone[0].signals["energy"] == other[0].signals["energy"]


def test_too_few_tokens_are_named_and_give_finite_proposals():
    runner = runner_of(ZOO["llama"]())
    trace = runner.trace(split_of(ragged_rows()[:2]))  # 21 tokens for 48 and 80 inputs
    with pytest.warns(IllConditionedWarning, match=r"layers\.\d\.\S+: 21 fit tokens for (48|80) inputs") as caught:
        (found,) = sweep(runner, trace, trace)
    assert len(caught) == 4 * len(runner.blocks)  # once for each input that maps share
    for block in found.values():
        assert all(p.change.isfinite().all() for changes in block.changes.values() for p in changes.values())


def test_inputs_that_lack_a_direction_by_nature_are_no_reason_to_warn():
    """A norm at initialisation makes inputs that add up to nothing, whatever the text; warnings are errors here."""
    runner = runner_of(ZOO["plain"]())
    trace = runner.trace(tiny_probe().fit)
    values = torch.linalg.eigvalsh(swept_moments(runner, trace)["blocks.2.attention.qkv"].S)
    assert values[0] < 1e-6 * values[-1]
    sweep(runner, trace, trace)


class Pooled(Block):
    """Gives its feed-forward part one row for two tokens."""

    def forward(self, x):
        return x + self.attention(self.norm_1(x)) + self.feed_forward(x[:, :1])


def pooled():
    model = ZOO["plain"]()
    for block in model.blocks:
        block.__class__ = Pooled
    return model


def test_rows_that_are_not_tokens_count_by_the_tokens():
    rows = [row[:9] for row in ragged_rows() if len(row) >= 9]
    runner = runner_of(pooled())
    found = swept_moments(runner, runner.trace(split_of(rows)))
    assert_same_moments(found, slow_moments(pooled(), rows), rtol=1e-3, atol=1e-4)


def test_rows_that_are_not_tokens_are_refused_beside_padding():
    runner = runner_of(pooled())
    trace = runner.trace(split_of(ragged_rows()))
    said = r"blocks\.2\.feed_forward\.\d sees .* instead of one row per token, and some tokens are padding"
    with pytest.raises(UnsupportedModelError, match=said):
        sweep(runner, trace, trace)
