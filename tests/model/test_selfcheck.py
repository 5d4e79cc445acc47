"""Self-checks of the model: what would be wrong without a word is an error that names the layer, before any number."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import peelwise
from odd_models import REFUSED, RIGHT, Attention, Lm, Mixed, Mlp, NeverCalls, encoder, tied
from peelwise.engine.opening import checked_blocks, open_session
from peelwise.errors import UnsupportedModelError
from peelwise.model.architectures import find_blocks, refuse_text
from peelwise.model.guard import untouched
from peelwise.model.layers import Block
from peelwise.model.runner import Runner
from peelwise.model.selfcheck import self_check
from peelwise.probe.probe import Probe
from peelwise.probe.rows import Split
from peelwise.records.base import Note
from zoo import LEFT_OUT, LORA, UNSUPPORTED, ZOO, sample_ids

pytestmark = pytest.mark.slow

LENGTH = 24


def probe() -> Probe:
    ids = sample_ids(60, LENGTH, seed=3).flatten()
    return Probe.from_tokens(ids, sequence_length=LENGTH, tokens=1200, in_distribution=True)


def opened(model: nn.Module) -> tuple[Note, ...]:
    """Open a model as every task does, and return what the self-checks have to say."""
    text = probe()
    blocks = checked_blocks(model, text, shared=True)
    with untouched(model):
        session = open_session(model, blocks, text, name="m", budget_seconds=60, micro_batch_tokens=1024, watcher=None)
    return session.notes


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


PAGE = Path(__file__).parents[2] / "docs" / "self-checks.md"
# Words of a refusal -> the check that refuses, as the page calls it.
CHECKS = {
    "is not causal": "causality",
    "share one weight": "shared weights",
    "hooked into": "changes",
    "joined by more than the hidden state": "gradients",
    "gradient at": "gradients",
    "keeps its weights packed": "weights to compute with",
}


def rows_of_the_page() -> dict[str, str]:
    """Return member -> outcome from the page's table of every member."""
    table = PAGE.read_text(encoding="utf-8").partition("| member | self-checks |")[2]
    return dict(re.findall(r"^\| ([^|]+?) \| (passes[a-z; ]*?|refused: [a-z ]+?) \|", table, flags=re.MULTILINE))


def outcome(notes: tuple[Note, ...]) -> str:
    return "; ".join(["passes", *sorted({note.code.replace("-", " ") for note in notes})])


def test_the_page_has_every_member() -> None:
    zoo = ["plain GPT" if name == "plain" else name for name in ZOO]
    expected = [*zoo, *RIGHT, "llama with LoRA in two blocks of three", *REFUSED, *UNSUPPORTED]
    assert list(rows_of_the_page()) == expected


@pytest.mark.parametrize("name", RIGHT)
def test_right_models_are_opened(name: str) -> None:
    assert outcome(opened(RIGHT[name]().eval())) == rows_of_the_page()[name]


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_models_are_refused_by_name(name: str) -> None:
    build, said = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        opened(build().eval())
    check = next((check for words, check in CHECKS.items() if words in str(caught.value)), "forward")
    assert rows_of_the_page()[name] == f"refused: {check}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ZOO)
def test_no_false_alarm_and_nothing_left_out_in_silence_in_the_zoo(name: str, dtype: torch.dtype) -> None:
    model = ZOO[name]().to(dtype)
    ids = sample_ids(2, LENGTH)
    with untouched(model):
        runner = Runner(model, find_blocks(model))
        said = self_check(runner, Split(ids, torch.ones_like(ids, dtype=torch.bool)))
    assert [note.values["count"] for note in said if note.code == "left-out"] == list(
        filter(None, [LEFT_OUT.get(name)])
    )
    assert outcome(tuple(said)) == rows_of_the_page()["plain GPT" if name == "plain" else name]


def test_adapters_pass_and_the_rest_is_said_to_be_frozen() -> None:
    assert outcome(opened(LORA().eval())) == rows_of_the_page()["llama with LoRA in two blocks of three"]


def blocks_for_text(model: nn.Module) -> tuple[Block, ...]:
    refuse_text(model)
    return find_blocks(model)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_has_no_blocks_that_text_runs_is_refused(name: str) -> None:
    model = UNSUPPORTED[name]()
    with pytest.raises(UnsupportedModelError):
        blocks_for_text(model)
    assert rows_of_the_page()[name] == "refused: no blocks"


def test_an_autocast_of_the_models_own_is_told_and_kept() -> None:
    model = Mixed(Mlp(), Mlp()).eval()
    (said,) = opened(model)
    assert (said.code, said.values) == ("autocast", {"dtype": "bfloat16"})
    assert opened(Lm(Mlp(), Mlp()).eval()) == ()  # the control
    with untouched(model):
        runner = Runner(model, find_blocks(model))
        trace = runner.trace(probe().report)
        assert torch.equal(runner.losses_from(trace, 0), trace.losses)  # block by block, in the same precision
        runner.autocast = None
        assert not torch.equal(runner.losses_from(trace, 0), trace.losses)


def test_left_out_parameters_are_counted_with_their_share() -> None:
    model = Lm(Attention(), Attention()).eval()
    (said,) = opened(model)
    block = model.h[0]
    left = block.mha.in_proj_weight.numel() + block.mha.out_proj.weight.numel()
    assert said.code == "left-out"
    assert said.values["count"] == 4
    assert said.values["share"] == pytest.approx(left / sum(p.numel() for p in block.parameters()))
    assert said.values["names"] == "mha.in_proj_weight (blocks 0-1), mha.out_proj.weight (blocks 0-1)"


def test_layers_that_share_a_weight_are_left_out_unless_nothing_else_is_there() -> None:
    (said,) = opened(tied().eval())
    assert (said.code, said.values["names"], said.values["count"]) == ("left-out", "up.weight (block 0)", 1)
    model = tied().eval()
    names = {linear.name for block in checked_blocks(model, probe(), shared=True) for linear in block.linears}
    assert names == {"h.0.down", "h.1.up", "h.1.down", "h.2.down"}
    with pytest.raises(UnsupportedModelError, match=r"h\.0\.up and h\.2\.up share one weight"):
        checked_blocks(model, probe())  # as all tasks but audit, check and monitor do
    all_of_it = Lm(Mlp(), Mlp()).eval()
    for name in ("up", "down"):
        getattr(all_of_it.h[1], name).weight = getattr(all_of_it.h[0], name).weight
    with pytest.raises(UnsupportedModelError, match="share one weight"):
        checked_blocks(all_of_it, probe(), shared=True)


def test_a_layer_that_is_never_called_is_left_out() -> None:
    (said,) = opened(Lm(NeverCalls(), NeverCalls()).eval())
    assert said.values["names"] == "up.weight (blocks 0-1)"


def test_the_fast_path_is_off_while_measuring_and_on_again() -> None:
    model = encoder().eval()
    report = peelwise.audit(model, probe(), budget="30s")
    assert torch.backends.mha.get_fastpath_enabled()
    # Random tokens: their frequencies are all there is to win, and only a witness that has an effect wins them.
    assert report.record.loss.composed is not None
    assert report.record.loss.composed < report.record.loss.current
    assert [note.code for note in report.record.notes if isinstance(note, Note)].count("left-out") == 1


def test_blocks_of_other_widths_are_audited_without_being_taken_out() -> None:
    record = peelwise.audit(RIGHT["widths"]().eval(), probe(), budget="30s").record
    assert all(block.removal_nats is None for block in record.blocks)
    assert all(block.recoverable_nats is not None for block in record.blocks)
