"""Folders and files made to load something else, to hang, or to fill the memory: one line each, within seconds."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from peelwise.errors import ModelError, UnsupportedModelError
from peelwise.model.checkpoint_files import check_weights
from peelwise.model.checkpoints import open_model, save_model
from peelwise.model.fingerprint import fingerprint
from peelwise.model.loading import contained
from refusals import refused
from tiny_llama import cut, edit, tiny_llama

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_time", "no_kernels")]

HUGE = 10**9


# --- Names of things to load ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize(
    "value",
    ["anybody/kernel", "anybody/kernel@main:forward", "paged|anybody/kernel", {"": "anybody/kernel"}, {"x": 3}, 7],
)
def test_kernels_of_others_are_refused(folder, key, value):
    edit(folder / "config.json", **{key: value})
    refused(folder, "config.json", key, "kernels of others are never loaded")


def test_kernels_of_parts_and_of_experts_are_refused(folder):
    edit(folder / "config.json", text_config={"deeper": [{"attn_implementation": "anybody/kernel"}]})
    refused(folder, "kernels of others")
    edit(folder / "config.json", text_config=None, experts_implementation="sonicmoe")
    refused(folder, "experts_implementation is 'sonicmoe'")


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2", "flex_attention", {"": "eager"}])
def test_built_in_attention_is_set_by_us(folder, name):
    edit(folder / "config.json", _attn_implementation=name)
    model = open_model(folder, with_tokenizer=False).model
    expected = "eager" if name in ("eager", {"": "eager"}) else "sdpa"
    assert model.config._attn_implementation == expected
    assert fingerprint(model) == fingerprint(tiny_llama())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("configuration_files", ["config.4.0.0.json"]),
        ("transformers_weights", "other.safetensors"),
        ("fusion_config", {"patch_embeddings": True}),
        ("use_kernels", True),
        ("kernel_config", {"RMSNorm": "anybody/norm:Norm"}),
        ("use_pretrained_backbone", True),
    ],
)
def test_other_things_to_load_are_refused(folder, key, value):
    edit(folder / "config.json", **{key: value})
    refused(folder, "config.json", key, "never done")


@pytest.mark.parametrize("method", ["eetq", "mxfp4", "nvfp4", "anybody/quantiser"])
def test_quantisers_that_fetch_kernels_are_refused(folder, method):
    edit(folder / "config.json", quantization_config={"quant_method": method})
    with pytest.raises(UnsupportedModelError, match=f"quantised by '{method}', which is unknown or fetches kernels"):
        open_model(folder)


@pytest.mark.parametrize("value", [[], [1], "bitnet", 3, True, {}, {"quant_method": 3}, {"quant_method": ["bitnet"]}])
def test_wrong_types_of_quantisation(folder, value):
    edit(folder / "config.json", quantization_config=value)
    refused(folder, "config.json", "quantization_config should be an object")
    edit(folder / "config.json", quantization_config=None, text_config={"quantization_config": value})
    refused(folder, "quantization_config should be an object")


@pytest.mark.parametrize("value", [{"quant_type": 3}, {"quant_type": {"os": {"system": "x"}}}, {"bits": "x" * 10**5}])
def test_nonsense_of_a_known_quantiser_is_one_line(folder, value):
    pytest.importorskip("torchao")
    edit(folder / "config.json", quantization_config={"quant_method": "torchao", **value})
    refused(folder)


def test_an_adapter_beside_a_model_is_ambiguous(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    refused(folder, "adapter beside a whole model")


def test_parts_by_process_do_not_take_the_place_of_the_weights(folder):
    shutil.copy(folder / "model.safetensors", folder / "shard-00001-model-00001-of-00001.safetensors")
    refused(folder, "parts of a model by process")


def test_code_of_a_tokenizer_is_never_run(folder):
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.T", None]}, tokenizer_class="Mine")
    (folder / "mine.py").write_text("raise SystemExit('ran')")
    refused(folder, "tokenizer_config.json", "never run")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("init_inputs", ["/etc/passwd"]),
        ("fast_tokenizer_files", ["../tokenizer.4.0.0.json"]),
        ("fast_tokenizer_files", ["/tokenizer.4.0.0.json"]),
        ("fast_tokenizer_files", 7),
    ],
)
def test_files_of_a_tokenizer_lie_beside_it(folder, key, value):
    edit(folder / "tokenizer_config.json", **{key: value})
    refused(folder, "tokenizer_config.json", key)


def test_a_chat_template_is_never_rendered(folder):
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for i in range(10**12) %}x{% endfor %}"
    edit(folder / "tokenizer_config.json", chat_template=template)
    (folder / "chat_template.jinja").write_text(template)
    assert open_model(folder).tokenizer("while x")["input_ids"]


def test_an_architecture_fetches_no_kernel_by_itself(monkeypatch):
    import transformers.integrations.hub_kernels as hub
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "get_kernel_hub", lambda *_, **__: "loaded", raising=False)
    before = constants.HF_HUB_OFFLINE
    with contained():
        assert constants.HF_HUB_OFFLINE
        with pytest.raises(ModelError, match="kernel of others"):
            hub.get_kernel_hub("kernels-community/rwkv", version=1)
    assert hub.get_kernel_hub("x") == "loaded"
    assert before == constants.HF_HUB_OFFLINE


# --- Indexes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "sharded"
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    return folder


def point(folder, shard, name="model.safetensors.index.json"):
    """Let one tensor of an index lie in another file."""
    shard_of = json.loads((folder / name).read_text())["weight_map"]
    edit(folder / name, weight_map={**shard_of, "model.norm.weight": shard})


@pytest.mark.parametrize("kind", ["absolute", "parent", "hidden parent", "link", "folder link"])
def test_an_index_stays_in_its_folder(sharded, tmp_path, kind):
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(sorted(sharded.glob("*.safetensors"))[0], outside / "stolen.safetensors")
    (sharded / "inside").mkdir()
    (sharded / "linked.safetensors").symlink_to(outside / "stolen.safetensors")
    (sharded / "way").symlink_to(outside)
    shard = {
        "absolute": str(outside / "stolen.safetensors"),
        "parent": "../outside/stolen.safetensors",
        "hidden parent": "inside/../../outside/stolen.safetensors",
        "link": "linked.safetensors",
        "folder link": "way/stolen.safetensors",
    }[kind]
    point(sharded, shard)
    refused(sharded, "index.json", "outside of the folder")


def test_the_links_of_the_hubs_cache_are_inside(sharded, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert fingerprint(open_model(snapshot).model) == fingerprint(tiny_llama())


@pytest.mark.parametrize("shard", [None, 3, ["a"], {}, "", "a\0b", "a\nb", "x" * 5000, "nowhere.safetensors", "."])
def test_wrong_types_in_an_index(sharded, shard):
    point(sharded, shard)
    refused(sharded)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": "x"}', "[" * 10**5, "1" * 10**4])
def test_an_index_of_another_shape(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    refused(sharded, "index.json")


def test_an_index_of_pickles_stays_in_its_folder(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), tmp_path / "stolen.bin")
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"model.norm.weight": "../stolen.bin"}}')
    (folder / "other.bin").write_bytes(b"x")
    refused(folder, "outside of the folder", allow_pickle=True)


# --- Sizes ---------------------------------------------------------------------------------------------------------


def test_layers_that_the_config_leaves_out_are_told(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=6, **sizes))
    save_model(model, None, tmp_path)
    assert len(open_model(tmp_path).model.model.layers) == 6
    edit(tmp_path / "config.json", num_hidden_layers=5)
    refused(tmp_path, "model.layers.5.", "9 such in all", "another model would be measured")


def test_weights_that_the_file_lacks_are_told(folder):
    edit(folder / "config.json", attention_bias=True)
    refused(folder, "lacks model.layers.0.self_attn")


@pytest.mark.parametrize("layers", [10**5, HUGE, 10**30, 0, -1, True, "2", 2.0, [2], float("inf")])
def test_layers_that_cannot_be(folder, layers):
    edit(folder / "config.json", num_hidden_layers=layers)
    refused(folder, "config.json: num_hidden_layers")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", HUGE),
        ("hidden_size", 4096),
        ("hidden_size", 0),
        ("hidden_size", -16),
        ("hidden_size", "wide"),
        ("intermediate_size", 10**6),
        ("vocab_size", HUGE),
        ("vocab_size", 10**12),
        ("num_attention_heads", HUGE),
        ("num_attention_heads", 0),
        ("num_attention_heads", 10**4),
        ("num_key_value_heads", 0),
        ("head_dim", 10**6),
        ("head_dim", HUGE),
        ("num_labels", HUGE),
        ("rope_parameters", [1]),
        ("rope_parameters", {"rope_type": "unheard of"}),
        ("hidden_act", ["silu"]),
        ("layer_types", ["full_attention"] * 3),
        ("id2label", 3),
        ("model_type", ["llama"]),
        ("to_dict", 3),
        ("num_hidden_layers", None),  # left out: the default of 32
    ],
)
def test_sizes_that_the_files_do_not_hold(folder, key, value):
    edit(folder / "config.json", **{key: value})
    message = refused(folder)
    assert "tokenizer" not in message


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {"num_hidden_layers": HUGE}),
        ("gpt2", {"n_layer": HUGE}),
        ("gpt2", {"n_positions": 10**6}),
        ("gptj", {"n_positions": 10**6}),
        ("gpt_neo", {"attention_types": [[["global", "local"], HUGE]]}),
        ("mixtral", {"num_local_experts": HUGE}),
        ("mixtral", {"num_local_experts": 10**5}),
        ("jamba", {"num_experts": HUGE}),
        ("gemma3_text", {"num_hidden_layers": HUGE}),
        ("mamba", {"num_hidden_layers": 10**5}),
        ("bloom", {"n_layer": 10**5}),
    ],
)
def test_other_architectures_neither_hang_nor_fill_the_memory(folder, kind, changes):
    config = {"model_type": kind, "num_hidden_layers": 2, "hidden_size": 16, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    message = refused(folder)
    assert "tokenizer" not in message


def test_infinity_as_transformers_writes_it(folder):
    config = transformers.NemotronHConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=2, layers_block_type=["mamba", "attention"],
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, intermediate_size=32, mamba_num_heads=4,
        mamba_head_dim=8, n_groups=2, ssm_state_size=8,
    )  # fmt: skip
    assert config.time_step_limit[1] == float("inf")
    transformers.NemotronHForCausalLM(config).save_pretrained(folder)
    assert "__float__" in (folder / "config.json").read_text()
    assert open_model(folder).model.config.time_step_limit[1] == float("inf")


def test_a_config_nested_too_deeply(folder):
    (folder / "config.json").write_text('{"model_type": "llama", "a": ' + "[" * 10**5)
    refused(folder, "config.json", "nested too deeply")


def test_the_config_beside_another_tokenizer_is_checked_too(folder, saved, tmp_path):
    other = Path(shutil.copytree(saved, tmp_path / "other"))
    edit(other / "config.json", model_type="qwen2", num_hidden_layers=HUGE)
    refused(folder, "other/config.json: num_hidden_layers", tokenizer=other)


def test_what_a_folder_holds(folder):
    stored = check_weights(folder, allow_pickle=False)
    assert stored.safetensors
    assert stored.shapes["model.embed_tokens.weight"] == (300, 16)
    cut(folder / "model.safetensors", 200)
    with pytest.raises(ModelError, match="damaged"):
        check_weights(folder, allow_pickle=False)
