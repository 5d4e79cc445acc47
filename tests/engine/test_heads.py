"""The reference without blocks: what it can know, what it cannot, and what it hangs on."""

import pytest
import torch
from torch import nn

from audits import session_of
from peelwise.engine.heads import head_rows, light_head, own_head_losses, without_blocks
from peelwise.engine.permute import shuffled_targets
from peelwise.model.guard import untouched
from peelwise.probe.probe import Probe
from zoo import VOCABULARY, ZOO


def chain(length=3000, followers=2):
    """Return tokens each of which is followed by one of so many, evenly: ``log(followers)`` nats per token."""
    generator = torch.Generator().manual_seed(0)
    successors = torch.stack([torch.randperm(VOCABULARY, generator=generator) for _ in range(followers)], dim=1)
    choices = torch.randint(followers, (length,), generator=generator)
    ids = [0]
    for choice in choices.tolist():
        ids.append(int(successors[ids[-1], choice]))
    return torch.tensor(ids)


def bound(model, ids):
    probe = Probe.from_tokens(ids, tokens=len(ids), sequence_length=32, in_distribution=True)
    with untouched(model):
        return without_blocks(session_of(model, probe), seconds=60.0)


def test_it_knows_the_last_token_and_nothing_else():
    model, ids = ZOO["plain"](), chain()
    entropy = torch.tensor(2.0).log().item()
    assert entropy < bound(model, ids) < 0.6 * torch.tensor(VOCABULARY).log().item()
    shuffled = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))]  # the control
    assert bound(model, shuffled) > 0.9 * torch.tensor(VOCABULARY).log().item()


@pytest.mark.parametrize("name", ["plain", "llama"])
def test_it_does_not_hang_on_the_blocks_or_the_head(name):
    model, ids = ZOO[name](), chain(1200)
    before = bound(model, ids)
    tied = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    with torch.no_grad():
        for block_or_head in (m for m in model.modules() if isinstance(m, nn.Linear)):
            if id(block_or_head.weight) not in tied:
                block_or_head.weight.mul_(1.5)
    assert bound(model, ids) == before


def test_none_where_the_logits_are_changed_behind_the_head():
    assert bound(ZOO["gemma2"](), chain(1200)) is None


def test_no_time_is_a_looser_bound():
    model = ZOO["plain"]()
    probe = Probe.from_tokens(chain(1200), tokens=1200, sequence_length=32, in_distribution=True)
    with untouched(model):
        cut = without_blocks(session_of(model, probe), seconds=0.0)
    assert cut == pytest.approx(torch.tensor(VOCABULARY).log().item())


# -- the fit itself ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnable():
    """A session of an untrained model on text whose next token hangs on the last one: its head has much to learn."""
    return session_of(ZOO["plain"](), Probe.from_tokens(chain(), tokens=3000, sequence_length=32))


def test_no_step_leaves_the_models_own_losses(learnable):
    head, own = light_head(learnable, max_steps=0), own_head_losses(learnable)
    assert head.steps == 0
    assert not head.change.any()
    for part in ("fit", "select", "report"):
        assert getattr(head.losses, part) == pytest.approx(getattr(own, part), rel=1e-5)
    torch.testing.assert_close(head.losses.report_sequences, own.report_sequences, rtol=1e-4, atol=1e-3)


def test_a_fitted_head_wins_on_report_and_one_with_shuffled_labels_wins_less(learnable):
    own, head = own_head_losses(learnable), light_head(learnable)
    shuffled = light_head(learnable, targets=shuffled_targets(learnable.fit, 0))
    assert head.losses.report < own.report - 0.5
    assert shuffled.losses.report > head.losses.report + 0.5  # the control


def test_losses_are_those_of_the_change_as_it_is_stored(learnable):
    head = light_head(learnable)
    rows = head_rows(learnable.runner, learnable.report)
    assert head.change.dtype == torch.bfloat16
    tokens = rows.token_losses(head.change.float())
    assert torch.equal(rows.per_sequence(tokens), head.losses.report_sequences)
    assert float(tokens.mean()) == head.losses.report
