"""Shapes read from configs against models that are there: parameters, linear layers, who shares an input."""

import json
from collections import Counter

import pytest
import torch
from torch import nn

from audits import runner_of, tiny_probe
from gguf_files import write_llama_gguf
from peelwise.errors import ModelError, UnsupportedModelError
from peelwise.model import checkpoint_config
from peelwise.model.architectures import find_blocks
from peelwise.model.capture import captured
from peelwise.model.experts import experts_called
from peelwise.model.shape import read_shape, shape_of
from peelwise.tasks.plan.shapes import Decoder
from tiny_llama import edit, tiny_llama
from zoo import ZOO

MODELS = ("llama", "gpt2", "gpt2-untied", "neox-parallel", "gemma2", "qwen3", "opt", "mixtral", "gpt-oss", "lfm2")


@pytest.mark.parametrize("name", MODELS)
def test_a_shape_has_all_parameters_and_every_linear_layer_of_the_blocks(name):
    model = ZOO[name]()
    shape = shape_of(model, name, 4.0)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    linears = [linear for block in find_blocks(model) for linear in block.linears]
    assert shape.linear_weights == sum(linear.weight().numel() for linear in linears)
    assert sum(group.count * len(group.outputs) for group in shape.groups) == len(linears)
    assert shape.head_weights == model.get_output_embeddings().weight.numel()
    assert shape.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox-parallel", "gemma2", "qwen3", "opt"])
def test_layers_that_share_an_input_when_they_run_are_in_one_group(name):
    model = ZOO[name]()
    runner = runner_of(model)
    batch = runner.trace(tiny_probe().fit).batches[0]
    seen: Counter[tuple[int, tuple[int, ...]]] = Counter()
    for block in runner.blocks:
        with captured(block.linears) as capture:
            runner.run_block(block, batch.stations[block.index], batch)
        # Layers with the very same input, whatever the capture makes of their biases.
        groups: dict[int, list[torch.Tensor]] = {}
        for linear, (call,) in capture.calls.items():
            groups.setdefault(id(call.x), []).append(linear.weight())
        seen.update((W[0].shape[1], tuple(sorted((w.shape[0] for w in W), reverse=True))) for W in groups.values())
    expected: Counter[tuple[int, tuple[int, ...]]] = Counter()
    for group in shape_of(model, name, 4.0).groups:
        expected[group.inputs, group.outputs] += group.count
    assert seen == expected


def test_experts_are_given_the_tokens_that_a_router_sends_them():
    model = ZOO["mixtral"]()
    rows = 0
    runner = runner_of(model)
    with experts_called(model):
        batch = runner.trace(tiny_probe().fit).batches[0]
        linears = [linear for linear in runner.blocks[0].linears if linear.is_expert]
        with captured(linears) as capture:
            runner.run_block(runner.blocks[0], batch.stations[0], batch)
        rows = sum(len(call.x) for calls in capture.calls.values() for call in calls)
    experts = [group for group in shape_of(model, "mixtral", 4.0).groups if group.expert]
    per_block = sum(group.count * group.routed for group in experts) / len(runner.blocks)
    assert rows == per_block * batch.inputs.numel()
    assert {group.routed for group in experts} == {0.5}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Mixtral"])
def test_the_closed_form_is_the_model(kind, tied):
    import transformers

    sizes = {"vocab_size": 90, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    mixture = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "Mixtral" else {}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, f"{kind}Config")(**sizes, **heads, **mixture)
        )
    experts = {"experts": 4, "chosen": 2} if mixture else {}
    decoder = Decoder(24, 40, 3, 4, 2, 90, tied, bytes_per_weight=4.0, **experts)
    assert decoder.parameters == sum(p.numel() for p in model.parameters())
    routers = 3 * 4 * 24 if mixture and any(n.endswith("gate") for n, m in model.named_modules() if is_linear(m)) else 0
    found, expected = shape_of(model, "decoder", 4.0), decoder.shape()
    assert found.parameters == expected.parameters
    assert found.linear_weights == expected.linear_weights + routers
    assert found.active_weights == expected.active_weights + routers
    assert found.attention_width == expected.attention_width
    assert found.tied == tied
    assert {g for g in expected.groups if not g.expert} <= set(found.groups)


def is_linear(module):
    return isinstance(module, nn.Linear)


def test_a_folder_a_config_and_a_gguf_file_have_one_shape(tmp_path):
    folder = tmp_path / "tiny"
    model = tiny_llama()
    model.save_pretrained(folder)
    shape = read_shape(folder)
    assert shape.name == "tiny"
    assert shape.stored_bytes == pytest.approx((folder / "model.safetensors").stat().st_size)
    assert shape.streamable
    (folder / "model.safetensors").unlink()
    alone = read_shape(folder / "config.json")
    assert alone.stored_bytes_per_weight == 4.0  # float32, by config.json
    assert alone.groups == shape.groups
    file = tmp_path / "tiny.gguf"
    write_llama_gguf(model, file, "F16")
    stored = read_shape(file)
    assert stored.groups == shape.groups
    assert not stored.streamable
    assert stored.stored_bytes == file.stat().st_size


def test_no_weight_is_read_or_made(tmp_path, monkeypatch):
    """7 B parameters take no memory: on the meta device, and the folder has no weights."""
    import transformers

    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32_000}
    transformers.LlamaConfig(**sizes, num_attention_heads=32, dtype="bfloat16").save_pretrained(tmp_path)
    made, built = [], checkpoint_config.on_meta

    def on_meta(*args):
        made.append(built(*args))
        return made[-1]

    monkeypatch.setattr("peelwise.model.shape.on_meta", on_meta)
    shape = read_shape(tmp_path)
    assert all(p.is_meta for p in made[0].parameters())
    assert shape.parameters == 6_738_415_616  # Llama 2 of 7 B
    assert shape.stored_bytes_per_weight == 2.0


def test_bad_input_is_one_or_two_lines(tmp_path):
    with pytest.raises(ModelError, match="not found"):
        read_shape(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        read_shape(tmp_path)
    config = tmp_path / "config.json"
    config.write_text("{")
    with pytest.raises(ModelError, match="is not valid JSON"):
        read_shape(config)
    config.write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(UnsupportedModelError, match="no causal language model for model_type 'nonsense'"):
        read_shape(config)
    config.write_text(json.dumps({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}))
    with pytest.raises(ModelError, match=r"cannot be (opened|used)"):
        read_shape(config)
    tiny_llama().config.save_pretrained(tmp_path)
    edit(config, num_hidden_layers=-1)
    with pytest.raises(ModelError, match="expected at least one layer"):
        read_shape(config)
