"""Blocks dropped and scaled, in memory and in a folder that transformers opens."""

import pytest
import torch
import transformers

from peelwise.act import block_modules, drop_blocks, scale_blocks
from peelwise.errors import ModelError, OptionError, OutputError, UnsupportedModelError
from plain_gpt import PlainGPT

IDS = torch.arange(12)[None] % 90


def llama(blocks=4, **more):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=blocks,
                                      num_attention_heads=2, initializer_range=0.2, **more)  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model):
    out = model(IDS)
    return getattr(out, "logits", out)


@torch.no_grad()
def skipping(model, blocks):
    """Return logits with the blocks' input passed on as their output, by hooks."""
    handles = [
        block_modules(model)[index].register_forward_hook(lambda module, args, kwargs, out: args[0], with_kwargs=True)
        for index in blocks
    ]
    found = logits(model)
    for handle in handles:
        handle.remove()
    return found


def test_a_dropped_block_is_a_skipped_one_in_memory_and_on_disk(tmp_path):
    model = llama()
    whole, expected = logits(model), skipping(model, [1, 2])
    dropped = drop_blocks(model, [2, 1], tmp_path / "out")
    assert torch.allclose(logits(dropped), expected, atol=1e-5)
    assert not torch.allclose(whole, expected, atol=1e-2)  # the control: they did something
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(logits(opened), expected, atol=1e-5)
    assert opened.config.num_hidden_layers == 2
    assert torch.equal(logits(model), whole)  # the model given is as it was
    cached = opened.generate(IDS, max_new_tokens=4, do_sample=False)  # finds its cache by the new numbers
    plain = opened.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


def test_lists_of_the_configuration_follow(tmp_path):
    torch.manual_seed(0)
    config = transformers.Qwen2Config(vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
                                      num_attention_heads=2, num_key_value_heads=1, use_sliding_window=True,
                                      sliding_window=4, max_window_layers=2, initializer_range=0.2)  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    kinds = list(model.config.layer_types)
    expected = skipping(model, [0])
    drop_blocks(model, [0], tmp_path / "out")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert list(opened.config.layer_types) == kinds[1:]
    assert torch.allclose(logits(opened), expected, atol=1e-5)


def test_a_folder_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    def forgetful(self, folder, **options):
        with torch.no_grad():
            spoilt = llama(3)
        transformers.PreTrainedModel.save_pretrained(spoilt, folder, **options)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", forgetful)
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    with pytest.raises(ModelError, match="computes something else"):
        drop_blocks(model, [0], tmp_path / "out")


def test_what_attention_and_mlp_write_is_scaled_exactly(tmp_path):
    model = llama()
    block = model.model.layers[2]
    writes = [block.self_attn, block.mlp]

    def scaled(module, args, out):
        return (0.5 * out[0], *out[1:]) if isinstance(out, tuple) else 0.5 * out

    handles = [module.register_forward_hook(scaled) for module in writes]
    expected = logits(model)
    for handle in handles:
        handle.remove()
    scale_blocks(model, {2: 0.5}, tmp_path / "out", of=("o_proj", "down_proj"))
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(logits(opened), expected, atol=1e-5)
    assert not torch.allclose(logits(model), expected, atol=1e-3)


def test_every_matrix_of_a_block_is_scaled_and_no_gain():
    model = PlainGPT()
    changed = scale_blocks(model, {1: 0.9})
    for (name, before), after in zip(model.named_parameters(), changed.parameters(), strict=True):
        factor = 0.9 if name.startswith("blocks.1.") and before.dim() > 1 else 1.0
        assert torch.equal(after, before * factor), name


@pytest.mark.parametrize("blocks", [[], [0, 1, 2, 3], [4], [-1]])
def test_blocks_that_cannot_be_dropped(blocks):
    with pytest.raises(OptionError):
        drop_blocks(llama(), blocks)


def test_what_else_is_refused(tmp_path):
    with pytest.raises(OptionError, match="expected a finite number"):
        scale_blocks(llama(), {0: float("inf")})
    with pytest.raises(OptionError, match="no module of the block has a name among"):
        scale_blocks(llama(), {0: 0.5}, of=("c_proj",))
    with pytest.raises(OptionError, match="at least one block"):
        scale_blocks(llama(), {})
    with pytest.raises(UnsupportedModelError, match="has no save_pretrained"):
        drop_blocks(PlainGPT(), [0], tmp_path / "plain")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(OutputError, match="exists and is not empty"):
        drop_blocks(llama(), [0], tmp_path / "taken")
    with pytest.raises(UnsupportedModelError, match="No blocks found"):
        block_modules(torch.nn.Linear(2, 2))
