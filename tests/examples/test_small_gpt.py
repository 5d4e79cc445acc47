"""The small trained GPT, the zoo and the damages: are they what the other tests take them for?"""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from torch.nn.functional import cross_entropy

import damage
from small_gpt.evaluate import mean_loss, token_losses, windows
from small_gpt.text import held_out_documents, training_documents
from stages import CHECKPOINTS, STAGES, stage_folder
from zoo import UNSUPPORTED, VOCABULARY, ZOO, sample_ids

DAMAGED_BLOCK = 3


@pytest.fixture(scope="module")
def few_windows(held_out_windows):
    """Every sixteenth window: enough for differences of a few hundredths of a nat."""
    return held_out_windows[::16]


@pytest.fixture(scope="module")
def healthy_loss(stored_stage, few_windows):
    return mean_loss(stored_stage("final")[0], few_windows)


def test_text_has_a_fixed_split_without_shared_paragraphs():
    training, held_out = training_documents(), held_out_documents()
    assert training == training_documents()
    assert sum(map(len, training)) > 1_000_000
    assert sum(map(len, held_out)) > 50_000
    known = {paragraph for document in training for paragraph in document.split("\n\n")}
    shared = [p for d in held_out for p in d.split("\n\n") if p in known and len(" ".join(p.split())) >= 60]
    assert not shared


@pytest.mark.parametrize("stage", STAGES)
def test_stage_opens_in_float32_and_eval_mode(small_gpt, stage):
    model, tokenizer = small_gpt(stage)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    assert model.config.num_hidden_layers == 6
    assert len(tokenizer) == model.config.vocab_size == 512


def test_small_gpt_hands_out_copies(small_gpt):
    first, _ = small_gpt("early")
    with torch.no_grad():
        first.model.norm.weight.zero_()
    assert small_gpt("early")[0].model.norm.weight.abs().min() > 0


def test_stages_share_one_tokenizer():
    expected = (CHECKPOINTS / "tokenizer" / "tokenizer.json").read_bytes()
    assert all((stage_folder(stage) / "tokenizer.json").read_bytes() == expected for stage in STAGES)


@pytest.mark.parametrize(
    "text", ["Return a new list.\n\n    >>> f(x)\n    [1, 2]\n", "Größe, 大きさ, \t🙂  two spaces"]
)
def test_tokenizer_gives_any_text_back(small_gpt, text):
    _, tokenizer = small_gpt("final")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_loss_falls_from_stage_to_stage(small_gpt, few_windows):
    early, middle, final = (mean_loss(small_gpt(stage)[0], few_windows) for stage in STAGES)
    assert early < math.log(512) - 1.0
    assert middle < early - 0.8
    assert final < middle - 0.1


def test_final_loss_is_far_below_what_frequencies_alone_give(healthy_loss, few_windows):
    counts = Counter(few_windows[:, 1:].flatten().tolist())
    total = counts.total()
    unigram_entropy = -sum(c / total * math.log(c / total) for c in counts.values())
    assert healthy_loss < unigram_entropy - 2.0


@pytest.mark.parametrize("stage", STAGES)
def test_stored_weights_have_the_recorded_loss(small_gpt, held_out_windows, stage):
    training = json.loads((CHECKPOINTS / "training.json").read_text())
    record = training["stages"][STAGES.index(stage)]
    assert record["folder"] == stage_folder(stage).name
    assert abs(record["float16_rounding_nats"]) < 1e-3
    # A quarter of the text, for time; and another release of Python brings slightly other text.
    assert mean_loss(small_gpt(stage)[0], held_out_windows[::4]) == pytest.approx(
        record["held_out_nats_per_token"], abs=0.1
    )


def test_checkpoints_stay_small():
    assert sum(file.stat().st_size for file in CHECKPOINTS.rglob("*") if file.is_file()) < 5_000_000


def test_windows_predict_every_token_once():
    assert windows(torch.arange(9), context=4).tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]


def test_token_losses_agree_with_transformers(small_gpt, few_windows):
    model, _ = small_gpt("early")
    batch = few_windows[:2]
    theirs = model(batch[:, :-1], labels=batch[:, :-1], shift_labels=batch[:, 1:].contiguous()).loss
    assert token_losses(model, batch).mean().item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_zoo_member_runs_forward_and_backward(zoo, name):
    model, twin, ids = zoo[name](), zoo[name](), sample_ids()
    assert not any(module.training for module in model.modules())
    loss = token_losses(model, ids).mean()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in model.parameters())
    torch.testing.assert_close(token_losses(twin, ids).mean(), loss, rtol=0, atol=0)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_member_runs_forward_and_backward(name):
    model, ids = UNSUPPORTED[name](), sample_ids()
    output = model(ids, labels=ids) if name == "t5" else model(ids)
    loss = cross_entropy(getattr(output, "logits", output).view(-1, VOCABULARY), ids.flatten())
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_factories_leave_the_random_numbers_alone():
    before = torch.get_rng_state()
    ZOO["plain"](), ZOO["llama"]()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", damage.STANDARD)
def test_damage_costs_and_stays_in_its_block(small_gpt, few_windows, healthy_loss, name):
    healthy, _ = small_gpt("final")
    untouched = {key: value.clone() for key, value in healthy.state_dict().items()}
    damaged = damage.STANDARD[name](healthy, DAMAGED_BLOCK, small_gpt("early")[0])
    changed = {key for key, value in damaged.state_dict().items() if not torch.equal(value, untouched[key])}
    assert changed
    assert all(key.startswith(f"model.layers.{DAMAGED_BLOCK}.") for key in changed)
    assert all(torch.equal(value, untouched[key]) for key, value in healthy.state_dict().items())
    assert mean_loss(damaged, few_windows) > healthy_loss + 0.005
