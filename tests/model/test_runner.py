"""Losses and stations of the runner against the model run plainly, one sequence at a time."""

import pytest
import torch
from torch import nn

from audits import ragged_rows, random_changes, runner_of, slow_losses, split_of, tiny_probe, written
from peelwise.errors import UnsupportedModelError
from peelwise.model.architectures import find_blocks
from peelwise.model.runner import Runner, check_replay
from peelwise.model.splice import spliced
from plain_gpt import PlainGPT
from zoo import BLOCKS, VOCABULARY, ZOO


@pytest.mark.parametrize("name", ZOO)
def test_padded_losses_are_those_of_each_sequence_alone(name):
    model, rows = ZOO[name](), ragged_rows()
    trace = runner_of(model).trace(split_of(rows))
    torch.testing.assert_close(trace.losses, slow_losses(model, rows), rtol=1e-4, atol=1e-4)
    assert trace.tokens.tolist() == [len(row) - 1 for row in rows]
    assert trace.mean == pytest.approx(float(slow_losses(model, rows).sum()) / sum(len(r) - 1 for r in rows), rel=1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_every_station_leads_to_the_same_losses(name):
    runner = runner_of(ZOO[name](), micro_batch_tokens=40)
    trace = runner.trace(split_of(ragged_rows()))
    for start in range(BLOCKS + 1):
        torch.testing.assert_close(runner.losses_from(trace, start), trace.losses, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "plain"])
def test_refreshed_equals_a_trace_of_written_weights(name):
    model = ZOO[name]()
    blocks, changes = random_changes(model)
    upper = {linear: changes[linear] for linear in (*blocks[1].linears, *blocks[2].linears)}
    split = split_of(ragged_rows())
    expected = runner_of(written(model, upper)).trace(split)
    runner = runner_of(model)
    trace = runner.trace(split)
    with spliced(upper):
        found, losses = runner.refreshed(trace, 1), runner.losses_from(trace, 1)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(losses, expected.losses, rtol=1e-4, atol=1e-3)
    weights = trace.batches[0].weights
    for station, other in zip(found.batches[0].stations, expected.batches[0].stations, strict=True):
        torch.testing.assert_close(station[weights], other[weights], rtol=1e-3, atol=1e-3)
    assert (trace.losses - expected.losses).abs().max() > 0.05  # the control: the changes matter


@pytest.mark.parametrize("micro_batch_tokens", [1, 17, 64, 10_000])
def test_losses_do_not_depend_on_the_micro_batch(micro_batch_tokens):
    runner = runner_of(ZOO["llama"](), micro_batch_tokens=micro_batch_tokens)
    trace = runner.trace(split_of(ragged_rows()))
    whole = runner_of(ZOO["llama"]()).trace(split_of(ragged_rows()))
    assert (len(trace.batches) == 1) == (micro_batch_tokens > 100)
    torch.testing.assert_close(trace.losses, whole.losses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "plain"])
def test_gradient_at_the_embedding_equals_autograd(name):
    model, split = ZOO[name](), split_of(ragged_rows())
    runner = runner_of(model, micro_batch_tokens=1)
    trace = runner.trace(split)
    above = runner.tail_gradients(trace)
    for block in reversed(runner.blocks):
        above = [
            runner.block_gradients(block, batch, [g])[1][0][0] for batch, g in zip(trace.batches, above, strict=True)
        ]
    embedding: list[torch.Tensor] = []

    def keep(module, args):
        embedding.append(args[0].requires_grad_(True))

    handle = runner.blocks[0].module.register_forward_pre_hook(keep)
    for position, row in enumerate(ragged_rows()):
        embedding.clear()
        output = model(torch.tensor([row[:-1]]))
        logits = getattr(output, "logits", output)[0]
        loss = nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum")
        (expected,) = torch.autograd.grad(loss, embedding)
        found = above[position].hidden[:, : len(row) - 1]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        assert not above[position].hidden[:, len(row) - 1 :].any()  # padding has no weight
    handle.remove()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "plain"])
def test_head_inputs_give_the_losses_of_the_model(name):
    runner = runner_of(ZOO[name]())
    trace = runner.trace(split_of(ragged_rows()))
    x, y, agree = runner.head_inputs(trace)
    assert bool(agree)
    loss = nn.functional.cross_entropy(runner.head(x), y, reduction="sum")
    assert float(loss) == pytest.approx(float(trace.losses.sum()), rel=1e-5)


def test_capped_logits_are_not_taken_for_the_heads():
    runner = runner_of(ZOO["gemma2"]())
    assert not bool(runner.head_inputs(runner.trace(split_of(ragged_rows())))[2])


def test_work_counts_passes_of_the_whole_model():
    runner, split = runner_of(ZOO["llama"]()), tiny_probe().fit
    trace = runner.trace(split)
    assert runner.work.token_forwards == split.tokens
    runner.losses_from(trace, 0)
    assert runner.work.token_forwards == pytest.approx(2 * split.tokens)
    runner.losses_from(trace, BLOCKS)
    assert runner.work.token_forwards == pytest.approx((2 + runner.head_share) * split.tokens)


class Between(PlainGPT):
    """Does something between its blocks that calling them one by one would miss."""

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = 2.0 * block(x)
        return self.head(self.norm(x))


class Again(PlainGPT):
    """Runs its blocks twice."""

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return self.head(self.norm(x))


class LastOnly(PlainGPT):
    """Gives the logits of the last token only."""

    def forward(self, ids):
        return super().forward(ids)[:, -1]


class NoTensor(PlainGPT):
    def forward(self, ids):
        return {"prediction": super().forward(ids)}


REFUSED = {
    Between: "something between its blocks",
    Again: r"runs its 3 blocks 6 times per forward pass; expected each of them at most once, in order",
    LastOnly: r"must return logits \[batch, tokens, vocabulary\]; got torch.Size\(\[.*97\]\)",
    NoTensor: "must return logits .* got dict",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_replayed_is_refused(kind):
    torch.manual_seed(0)
    runner = runner_of(kind())
    with pytest.raises(UnsupportedModelError, match=REFUSED[kind]):
        check_replay(runner, runner.trace(tiny_probe().fit.at(slice(1))))


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_can_be_replayed(name):
    runner = runner_of(ZOO[name]())
    check_replay(runner, runner.trace(split_of(ragged_rows()).at(slice(1))))


def test_model_without_a_head_still_runs():
    model = PlainGPT(width=VOCABULARY - 1)
    model.head = nn.ConstantPad1d((0, 1), 0.0)  # logits without a linear map
    runner = Runner(model, find_blocks(model))
    assert runner.head is None
    assert runner.trace(tiny_probe().fit).losses.isfinite().all()


class _Hidden(nn.Module):
    """Shows nobody the configuration, so nobody asks for a run without a cache of keys and values."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, ids):
        return self.inner(ids)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox-parallel", "gemma2"])
@torch.no_grad()
def test_blocks_called_again_see_no_keys_of_an_earlier_call(name):
    runner = runner_of(_Hidden(ZOO[name]()))
    trace = runner.trace(tiny_probe().report)
    for parameter in runner.blocks[0].module.parameters():
        parameter.mul_(1.5)
    again = runner.losses_from(trace, 0)
    torch.testing.assert_close(again, runner.trace(tiny_probe().report).losses, rtol=1e-6, atol=1e-5)
    assert not torch.allclose(again, trace.losses, rtol=1e-4)  # or a forgotten change would pass
