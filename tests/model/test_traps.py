"""Compiled models, activation checkpointing, half precision, padding and dropout: same sums, same losses."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from audits import (
    ONE_ROUND,
    Snapshot,
    assert_same_moments,
    numbers,
    ragged_rows,
    runner_of,
    slow_losses,
    slow_moments,
    split_of,
    swept_moments,
    tiny_probe,
)
from peelwise.errors import ModelError, UnsupportedModelError
from peelwise.model.fingerprint import fingerprint
from peelwise.model.guard import untouched
from peelwise.tasks.audit.run import run_audit
from plain_gpt import Block, PlainGPT
from zoo import ZOO, sample_ids

pytestmark = pytest.mark.slow


def moments_of(model):
    runner = runner_of(model)
    return swept_moments(runner, runner.trace(split_of(ragged_rows())))


# -- torch.compile -------------------------------------------------------------------------------------


def compiled_whole(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_blocks(model):
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(block, backend="eager")
    return model


@pytest.fixture(scope="module")
def eager_outcome():
    return run_audit(ZOO["llama"](), tiny_probe(), ONE_ROUND)


@pytest.mark.parametrize("compiled", [compiled_whole, compiled_in_place, compiled_blocks])
@pytest.mark.slow
def test_compiled_model_gives_the_audit_of_the_plain_one(compiled, eager_outcome):
    model = compiled(ZOO["llama"]())
    model(sample_ids())  # compiled before the first hook is there
    before = Snapshot.of(model)
    outcome = run_audit(model, tiny_probe(), ONE_ROUND)
    before.assert_unchanged(model)
    assert numbers(outcome.record) == numbers(eager_outcome.record)
    assert outcome.witness.keys() == eager_outcome.witness.keys()
    assert fingerprint(model) == eager_outcome.record.model.fingerprint


def test_hooks_on_a_compiled_model_are_silent_outside_the_guard():
    model = ZOO["llama"]()
    compiled, seen = compiled_whole(model), []
    compiled(sample_ids())
    # What makes hooks of a later day silent: compiled code does not look for them again.
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
        compiled(sample_ids())
        assert not seen
        with untouched(compiled):
            compiled(sample_ids())
        assert len(seen) == 1
        handle.remove()


# -- activation checkpointing --------------------------------------------------------------------------


class CheckpointedBlock(Block):
    """Checkpoints itself, whether training or not."""

    reentrant = False

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


class ReentrantBlock(CheckpointedBlock):
    reentrant = True


class CheckpointingGPT(PlainGPT):
    """Checkpoints every block from outside."""

    reentrant = False

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))


class ReentrantGPT(CheckpointingGPT):
    reentrant = True


def plain_as(kind):
    """Return the zoo's plain model, of another class: a block's or its own."""
    model = ZOO["plain"]()
    for module in [model] if issubclass(kind, PlainGPT) else model.blocks:
        module.__class__ = kind
    return model


@pytest.mark.parametrize("kind", [CheckpointedBlock, CheckpointingGPT])
def test_checkpointing_does_not_count_tokens_twice(kind):
    rows = ragged_rows()
    found = moments_of(plain_as(kind))
    assert {moments.n for moments in found.values()} == {sum(len(row) - 1 for row in rows)}
    assert_same_moments(found, slow_moments(ZOO["plain"](), rows), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointing_of_transformers_changes_nothing(eager_outcome):
    model = ZOO["llama"]().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    outcome = run_audit(model, tiny_probe(), ONE_ROUND)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    assert numbers(outcome.record) == numbers(eager_outcome.record)


@pytest.mark.parametrize("kind", [ReentrantBlock, ReentrantGPT])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused_with_the_remedy(kind):
    model = plain_as(kind)
    before = Snapshot.of(model)
    with pytest.raises(UnsupportedModelError, match=r"^blocks\.0\.attention\.qkv .*use_reentrant=False"):
        run_audit(model, tiny_probe(), ONE_ROUND)
    before.assert_unchanged(model)


# -- half precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_half_precision_sums_are_exact_sums_of_what_the_model_computes(name, dtype):
    found = moments_of(ZOO[name]().to(dtype))
    expected = slow_moments(ZOO[name]().to(dtype), ragged_rows())
    for key, moments in found.items():
        assert {moments.S.dtype, moments.C.dtype, moments.F.dtype} == {torch.float64}
        # A sum taken in bf16 is not positive semi-definite; one of bf16 rows is, to float32's rounding.
        lowest = torch.linalg.eigvalsh(moments.S)[0] / moments.S.diagonal().mean()
        assert lowest > -1e-5
        there = expected[key].S
        assert (moments.S - there).norm() < 0.05 * there.norm()


def test_a_bf16_product_is_not_positive_semi_definite():
    """The control of the test above: what would happen without widening."""
    x = torch.randn(40, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    rough = (x.T @ x).double()
    assert torch.linalg.eigvalsh(rough)[0] / rough.diagonal().mean() < -1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "plain"])
@pytest.mark.slow
def test_half_precision_models_are_audited_without_nan(name, dtype):
    model = ZOO[name]().to(dtype)
    before = Snapshot.of(model)
    outcome = run_audit(model, tiny_probe(), ONE_ROUND)
    before.assert_unchanged(model)
    exact = runner_of(ZOO[name]()).trace(tiny_probe().report).mean
    assert outcome.record.model.dtype == str(dtype).removeprefix("torch.")
    assert outcome.record.loss.current == pytest.approx(exact, abs=0.02)
    assert all(tensor.isfinite().all() for tensor in outcome.witness.values())


# -- padding, dropout, tied heads, bad values ------------------------------------------------------------


def test_unmasked_padding_would_change_the_sums():
    """The control of every padded comparison: the padding's tokens are not harmless."""
    rows = ragged_rows()
    padded = split_of(rows).ids.tolist()
    masked, unmasked = slow_moments(ZOO["llama"](), rows), slow_moments(ZOO["llama"](), padded)
    assert all((masked[n].S - unmasked[n].S).norm() > 0.05 * masked[n].S.norm() for n in masked)


def test_dropout_in_training_mode_does_not_reach_the_losses():
    model = ZOO["gpt2"]().train()
    probe = tiny_probe()
    outcome = run_audit(model, probe, ONE_ROUND)
    assert all(module.training for module in model.modules())
    rows = probe.report.ids.tolist()
    expected = slow_losses(ZOO["gpt2"](), rows)
    assert outcome.record.loss.current == pytest.approx(float(expected.sum()) / probe.report.tokens, abs=1e-5)
    assert (slow_losses(model, rows) - expected).abs().max() > 0.01  # the control: it does something


def test_under_no_grad_the_audit_is_the_same(eager_outcome):
    with torch.no_grad():
        inside = run_audit(ZOO["llama"](), tiny_probe(), ONE_ROUND)
        assert not torch.is_grad_enabled()
    assert numbers(inside.record) == numbers(eager_outcome.record)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_are_named(bad):
    model = ZOO["llama"]()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = bad
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 of"):
        run_audit(model, tiny_probe(), ONE_ROUND)


@pytest.mark.parametrize(
    ("gain", "words"),
    [(1e25, r"The loss of model on the probe is (nan|inf)"), (1.0, r"gradients of blocks\.2\.\S+ overflow in float32")],
)
def test_overflow_is_told_from_bad_weights(gain, words):
    model = ZOO["plain"]()
    with torch.no_grad():
        model.head.weight.mul_(1e38 if gain == 1.0 else gain)
        model.norm.weight.mul_(gain)
    before = Snapshot.of(model)
    with pytest.raises(ModelError, match=words + ".*--dtype float32"):
        run_audit(model, tiny_probe(), ONE_ROUND)
    before.assert_unchanged(model)


def test_a_tied_head_is_neither_doubled_nor_moved():
    model = ZOO["llama-tied"]()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    outcome = run_audit(model, tiny_probe(), ONE_ROUND)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(".layers." in name for name in outcome.witness)
    assert outcome.record.model.parameters == sum(p.numel() for p in nn.Module.parameters(model))
