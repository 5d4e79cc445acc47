"""Probes that ask for some tokens only: labels of -100, conversations, and that every number is of the answers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import peelwise
from peelwise.engine.sweep import block_moments
from peelwise.errors import ProbeError
from peelwise.model.architectures import find_blocks
from peelwise.model.runner import Runner
from peelwise.probe import texts
from peelwise.probe.answers import conversation_rows
from peelwise.probe.options import ProbeOptions
from peelwise.probe.probe import Probe

WORDS = [f"w{i}" for i in range(60)]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<user>", "<assistant>", "<system>", "<end>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    made.chat_template = TEMPLATE
    return made


def conversations(count=24, turns=2, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def words(most):
        length = int(torch.randint(2, most, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=generator).tolist())

    return [
        [message for _ in range(turns) for message in (
            {"role": "user", "content": words(9)}, {"role": "assistant", "content": words(7)})]
        for _ in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=65, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def probe(tokenizer):
    return Probe.from_messages(conversations(), tokenizer)


def test_of_a_conversation_the_answers_are_asked_for_with_what_ends_them(tokenizer):
    messages = [
        {"role": "system", "content": "w0"},
        {"role": "user", "content": "w1 w2"},
        {"role": "assistant", "content": "w3 w4"},
        {"role": "user", "content": "w5"},
        {"role": "assistant", "content": "w6"},
    ]
    (row,) = conversation_rows([messages], tokenizer, 1024)
    written = tokenizer.convert_ids_to_tokens(row.ids)
    assert written == [
        "<system>",
        "w0",
        "<end>",
        "<user>",
        "w1",
        "w2",
        "<end>",
        "<assistant>",
        "w3",
        "w4",
        "<end>",
        "<user>",
        "w5",
        "<end>",
        "<assistant>",
        "w6",
        "<end>",
    ]
    asked = [word for word, counts in zip(written, row.asked, strict=True) if counts]
    assert asked == ["w3", "w4", "<end>", "w6", "<end>"]
    assert [row] == list(conversation_rows([{"messages": messages, "id": 7}], tokenizer, 1024))


def test_a_conversation_is_cut_and_left_out_where_no_answer_is_left(tokenizer):
    (messages,) = conversations(1, turns=1)
    (whole,) = conversation_rows([messages], tokenizer, 1024)
    begins = whole.asked.index(True)
    (short,) = conversation_rows([messages], tokenizer, begins)
    assert (len(short.ids), sum(short.asked)) == (begins + 1, 1)
    assert list(conversation_rows([messages], tokenizer, begins - 1)) == []
    assert list(conversation_rows([messages[:1]], tokenizer, 1024)) == []


def test_the_loss_is_that_of_transformers_with_labels_of_minus_100(model, probe):
    runner = Runner(model, find_blocks(model))
    trace = runner.trace(probe.report)
    split = probe.report
    for place in range(split.sequences):
        length = int(split.mask[place].sum())
        ids = split.ids[place : place + 1, :length]
        labels = torch.where(split.asked[place : place + 1, :length], ids, -100)
        with torch.no_grad():
            expected = model(ids, labels=labels).loss
        assert float(trace.losses[place] / trace.tokens[place]) == pytest.approx(float(expected), rel=1e-5)
    assert 0 < split.tokens < int(split.read.sum())


def test_sums_are_over_all_that_is_read_and_gradients_are_of_the_answers(model, probe):
    blocks = find_blocks(model)
    runner = Runner(model, blocks, micro_batch_tokens=64)
    trace = runner.trace(probe.fit)
    (found,), _ = block_moments(runner, blocks[2], trace, [runner.tail_gradients(trace)], keep=True, with_F=True)
    linear = next(each for each in blocks[2].linears if each.name.endswith("down_proj"))
    inputs, S, n = [], 0.0, 0
    handle = linear.module.register_forward_hook(lambda _m, args, _out: inputs.append(args[0].detach()[0]))
    model.zero_grad()
    for place in range(probe.fit.sequences):
        length = int(probe.fit.mask[place].sum())
        ids = probe.fit.ids[place : place + 1, :length]
        labels = torch.where(probe.fit.asked[place : place + 1, :length], ids, -100)
        cross = cross_entropy(model(ids).logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
        cross.backward()
        x = inputs.pop().double()[:-1]  # the last token has no next one
        S, n = S + x.T @ x, n + len(x)
    handle.remove()
    gradient = linear.module.weight.grad.double()
    model.zero_grad()
    assert found[linear].n == n > probe.fit.tokens
    assert torch.allclose(found[linear].S, S / probe.fit.tokens, rtol=1e-4, atol=1e-8)
    assert torch.allclose(found[linear].C.double().abs(), (gradient / probe.fit.tokens).abs(), rtol=1e-3, atol=1e-8)


def test_labels_ask_for_the_same_as_messages(tokenizer, probe):
    rows = list(conversation_rows(conversations(), tokenizer, 1024))
    made = Probe.from_tokens([row.ids for row in rows], labels=[row.labels for row in rows])
    assert made.fingerprint == probe.fingerprint
    assert made.fingerprint != Probe.from_tokens([row.ids for row in rows]).fingerprint


def test_a_stored_probe_is_the_same_one(probe):
    again = Probe.from_tensors(probe.to_tensors(), source=probe.source, pool=probe.pool)
    assert again.fingerprint == probe.fingerprint
    assert (again.report.tokens, again.report.asked.sum()) == (probe.report.tokens, probe.report.asked.sum())
    damaged = {name: t.clone() for name, t in probe.to_tensors().items()}
    damaged["report.asked"][0] = 0
    with pytest.raises(ProbeError, match="damaged"):
        Probe.from_tensors(damaged, source="x")


def test_a_certificate_on_answers_is_verified(model, probe, tmp_path):
    report = peelwise.audit(model, probe, budget=60, out=tmp_path / "audit", name="chat")
    assert report.record.probe.report_tokens == probe.report.tokens
    outcome = peelwise.verify(tmp_path / "audit", model)
    assert outcome.status in ("holds", "losses hold, verdicts not rechecked"), outcome.reason
    file = tmp_path / "audit" / "probe.safetensors"
    tensors = load_file(file)
    place = int(tensors["report.asked"][0].nonzero()[-1])
    tensors["report.asked"][0, place] = 0
    save_file(tensors, file)
    assert peelwise.verify(tmp_path / "audit", model).status == "not the same model or data"


def test_a_check_is_of_the_answers(model, probe):
    found = peelwise.check(model, probe)
    assert found.record.probe.report_tokens == probe.report.tokens


def test_a_tokenised_data_set_rolls_by_its_labels_or_masks(tokenizer):
    rows = list(conversation_rows(conversations(120), tokenizer, 1024))

    class Data:
        def __init__(self, key):
            self.key = key

        def __len__(self):
            return len(rows)

        def __getitem__(self, i):
            ids, asked = [*rows[i].ids, 0, 0], [*rows[i].asked, False, False]
            own = {
                "labels": [one if wanted else -100 for one, wanted in zip(ids, asked, strict=True)],
                "assistant_masks": [int(each) for each in asked],
                "completion_mask": torch.tensor(asked),
            }[self.key]
            return {"input_ids": ids, "attention_mask": [1] * len(rows[i].ids) + [0, 0], self.key: own}

    made = [Probe.rolling(Data(key), seed=3) for key in ("labels", "assistant_masks", "completion_mask")]
    assert len({each.fingerprint for each in made}) == 1
    assert 0 < made[0].report.tokens < int(made[0].report.read.sum())
    assert made[0].fixed.asked is not None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("hello", "expected a list of messages"),
        ([{"role": "user"}], "messages with 'role' and 'content'"),
        ({"text": "x"}, "expected a list of messages"),
        ([["user", "x"]], "messages with 'role' and 'content'"),
    ],
)
def test_what_is_no_conversation_is_refused(wrong, said, tokenizer):
    with pytest.raises(ProbeError, match=said):
        Probe.from_messages([wrong], tokenizer)


def test_a_template_that_rewrites_what_was_said_is_refused(tokenizer):
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>")
    with pytest.raises(ProbeError, match="no chat template"):
        Probe.from_messages(conversations(), other)
    other.chat_template = "<{{ messages | length }}> " + TEMPLATE
    counted = [[{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]]
    other.chat_template = "{% if messages | length > 1 %}w9 {% endif %}" + TEMPLATE
    with pytest.raises(ProbeError, match="writes its beginning otherwise"):
        Probe.from_messages(counted, other)
    other.chat_template = "{{ raise_exception('only three roles') }}"
    with pytest.raises(ProbeError, match="cannot write it: only three roles"):
        Probe.from_messages(counted, other)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([[1, 2, 3]], "one row of them for each"),
        ([[1, 2], [4, 5, 6]], "2 labels for 3 token ids"),
        ([[2, 3, -100], [4, 5, 6]], "labels are not shifted"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, said):
    with pytest.raises(ProbeError, match=said):
        Probe.from_tokens([[1, 2, 3], [4, 5, 6]], labels=labels)
    with pytest.raises(ProbeError, match="of which one is asked for"):
        Probe.from_tokens([[1, 2, 3]], labels=[[1, -100, -100]])


def test_a_file_of_conversations_is_read_by_the_field_that_holds_them(tokenizer, tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(json.dumps({"messages": each, "text": "w1 w2"}) for each in conversations()))
    made = Probe.from_options(ProbeOptions([file], "messages"), tokenizer)
    assert made.fingerprint == Probe.from_messages(conversations(), tokenizer).fingerprint
    with file.open("a") as more:
        more.write('\n{"messages": "w1 w2 w3"}')
    with pytest.raises(ProbeError, match="24 of 25 documents are conversations, the others text"):
        ProbeOptions([file], "messages").documents()


def test_a_large_file_of_conversations_is_sampled(tmp_path, monkeypatch):
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(json.dumps({"messages": each}) for each in conversations(400)))
    monkeypatch.setattr(texts, "WHOLE_BYTES", file.stat().st_size // 2)
    documents = ProbeOptions([file], "messages").documents()
    assert 5 < len(documents) <= 400
    assert all(document in conversations(400) for document in documents[:5])


def test_the_command_line_audits_a_chat_model_on_its_conversations(model, tokenizer, tmp_path, run):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": each}) for each in conversations()))
    out, text = tmp_path / "out", ("--text", tmp_path / "chat.jsonl", "--field", "messages")
    code, _, error = run("audit", tmp_path / "model", *text, "--budget", "30s", "--out", out)
    assert code == 0, error
    record = json.loads((out / "certificate.json").read_text())
    assert record["probe"]["report_tokens"] == Probe.from_messages(conversations(), tokenizer).report.tokens
    code, _, error = run("verify", out, *text)
    assert code == 2
    assert "not on conversations" in error


def test_conversations_roll_by_index_or_as_a_list(tokenizer):
    class Data:
        def __len__(self):
            return 120

        def __getitem__(self, i):
            return {"messages": conversations(120)[i]}

    made = Probe.rolling(Data(), tokenizer, field="messages", tokens=2_000)
    assert 0 < made.report.tokens < int(made.report.read.sum())
    listed = Probe.rolling(conversations(120), tokenizer, tokens=100_000)
    assert listed.fit.asked is not None
