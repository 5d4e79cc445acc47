"""A plan in the syntax of other tools, read and carried out by these tools themselves where they are installed.

None of them is a dependency, and llm-compressor cannot be installed beside the transformers of the other tests. Each
test says what it needs; docs/quantise.md says which versions were tried.
"""

from __future__ import annotations

import copy
import ctypes
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

import peelwise
from audits import tiny_probe
from gguf_files import write_llama_gguf
from peelwise.records.allocation import AllocationRecord
from peelwise.show.allocate.exports import exports

FORMS = ("int4:group=32,symmetric", "int8:channel,symmetric", "int3:group=32,symmetric", "dense:float32")


# Widths are multiples of 256, which K-quants need.
SIZES = {
    "vocab_size": 97,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
}


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """Return a random Llama."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


@pytest.fixture(scope="module")
def mixtral() -> MixtralForCausalLM:
    """Return a random Mixtral of four experts a block."""
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)).eval()


@pytest.fixture(scope="module")
def record(llama: LlamaForCausalLM) -> AllocationRecord:
    """Return a plan in which layers that share their input have one format, and every format is used."""
    return plan_of(llama)


@pytest.fixture(scope="module")
def mixed(mixtral: MixtralForCausalLM) -> AllocationRecord:
    """Return such a plan of a mixture."""
    return plan_of(mixtral)


def plan_of(model: PreTrainedModel) -> AllocationRecord:
    settings = peelwise.AllocateSettings(5.0, ("int3:group=32", "int4:group=32"), points=0)
    found = peelwise.allocate(model, tiny_probe(), settings).record
    groups = sorted({layer.group for layer in found.layers})
    layers = [
        layer.model_copy(update={"format": FORMS[groups.index(layer.group) % len(FORMS)]}) for layer in found.layers
    ]
    assert {layer.format for layer in layers} == set(FORMS)
    return found.model_copy(update={"layers": tuple(layers), "formats": FORMS})


def llm_compressor_modifier(record: AllocationRecord, folder: Path) -> Any:
    """Return what llm-compressor reads of the recipe; skip where it is not installed."""
    recipes = pytest.importorskip("llmcompressor.recipe", reason="needs llmcompressor, in an environment of its own")
    file = folder / "llm-compressor.yaml"
    file.write_text(exports(record)[file.name])
    (modifier,) = recipes.Recipe.create_instance(str(file)).modifiers
    return modifier


def test_llm_compressor_carries_out_the_recipe(
    record: AllocationRecord, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    modifier = llm_compressor_modifier(record, tmp_path)
    from compressed_tensors.quantization import apply_quantization_config

    assert type(modifier).__name__ == "GPTQModifier"
    model = copy.deepcopy(llama)
    apply_quantization_config(model, modifier.resolve_quantization_config())
    for layer in record.layers:
        scheme = getattr(model.get_submodule(layer.name), "quantization_scheme", None)
        if layer.format.startswith("dense"):
            assert scheme is None
        else:
            own = scheme.weights
            group = 32 if "group" in layer.format else None
            assert (own.num_bits, own.group_size, own.symmetric) == (int(layer.format[3]), group, True)
    assert getattr(model.lm_head, "quantization_scheme", None) is None


def test_llm_compressor_finds_experts_once_it_has_made_modules_of_them(
    mixed: AllocationRecord, mixtral: MixtralForCausalLM, tmp_path: Path
) -> None:
    modifier = llm_compressor_modifier(mixed, tmp_path)
    from compressed_tensors.quantization import apply_quantization_config
    from llmcompressor.modeling.moe.linearize import linearize_moe

    model = copy.deepcopy(mixtral)
    linearize_moe(model)
    apply_quantization_config(model, modifier.resolve_quantization_config())
    for layer in mixed.stored:
        owner, _, last = layer.name.rpartition(".")
        parts = [last] if last != "gate_up_proj" else ["gate_proj", "up_proj"]
        names = [layer.name] if layer.parameter is None else [f"{owner}.{e}.{part}" for e in range(4) for part in parts]
        for name in names:
            scheme = getattr(model.get_submodule(name), "quantization_scheme", None)
            if layer.format.startswith("dense"):
                assert scheme is None, name
            else:
                assert (scheme.weights.num_bits, scheme.weights.symmetric) == (int(layer.format[3]), True), name


class _Override(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("type", ctypes.c_int))


class _Quantising(ctypes.Structure):
    """The arguments of ``llama_model_quantize``, as llama.cpp's header has them since April 2026."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("nthread", "ftype", "output_tensor_type", "token_embedding_type")),
        *(
            (name, ctypes.c_bool)
            for name in ("allow_requantize", "quantize_output_tensor", "only_copy", "pure", "keep_split", "dry_run")
        ),
        *((name, ctypes.c_void_p) for name in ("imatrix", "kv_overrides")),
        ("tt_overrides", ctypes.POINTER(_Override)),
        ("prune_layers", ctypes.c_void_p),
    )


def _libllama() -> Any:
    """Return llama.cpp's library from the folder that ``LLAMA_CPP_LIBRARIES`` names."""
    folder = os.environ.get("LLAMA_CPP_LIBRARIES")
    if not folder:
        pytest.skip("needs LLAMA_CPP_LIBRARIES, a folder with libllama.so and libggml*.so")
    found = None
    for pattern in ("libggml-base*.so", "libggml.so", "libggml.v*.so", "libllama.so", "libllama.v*.so"):
        for file in sorted(Path(folder).glob(pattern)):
            found = ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    assert found is not None, f"no libllama.so in {folder}"
    return found


WANTED = dict(zip(FORMS, ("Q4_K", "Q8_0", "Q3_K", "F16"), strict=True))


def test_llama_cpp_gives_every_layer_its_type(
    record: AllocationRecord, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    types, names = _quantised_by_llama_cpp(record, llama, tmp_path)
    for layer in record.layers:
        assert types[f"{names.get_name(layer.name)}.weight"] == WANTED[layer.format]


def test_llama_cpp_gives_experts_theirs_and_leaves_the_router_alone(
    mixed: AllocationRecord, mixtral: MixtralForCausalLM, tmp_path: Path
) -> None:
    types, names = _quantised_by_llama_cpp(mixed, mixtral, tmp_path)
    for layer in mixed.stored:
        block, last = f"blk.{layer.block}", layer.name.rpartition(".")[2]
        if layer.parameter is None:
            assert types[f"{names.get_name(layer.name)}.weight"] == WANTED[layer.format]
        elif last == "gate_up_proj":
            assert {types[f"{block}.ffn_{part}_exps.weight"] for part in ("gate", "up")} == {WANTED[layer.format]}
        else:
            assert types[f"{block}.ffn_down_exps.weight"] == WANTED[layer.format]
        assert types[f"{block}.ffn_gate_inp.weight"] == "F32"


def _quantised_by_llama_cpp(
    record: AllocationRecord, model: PreTrainedModel, folder: Path
) -> tuple[dict[str, str], Any]:
    """Return the type of every tensor as llama.cpp has quantised it, and the map of their names."""
    gguf, lib = pytest.importorskip("gguf"), _libllama()
    kinds = {kind.name.lower(): int(kind) for kind in gguf.GGMLQuantizationType}
    words = exports(record)["llama-cpp.txt"].replace("\\\n", "").split()
    assert set(words[::2]) == {"--tensor-type"}
    # What the command line of `llama-quantize` makes of each: a pattern in lower case, and a type by its name.
    said = [word.partition("=")[::2] for word in words[1::2]]
    overrides = [_Override(pattern.lower().encode(), kinds[kind.lower()]) for pattern, kind in said]
    vocabulary = [f"{chr(97 + i % 26)}{i}" for i in range(model.config.vocab_size)]
    write_llama_gguf(model, folder / "f32.gguf", "F32", vocabulary=vocabulary)
    lib.llama_model_quantize_default_params.restype = _Quantising
    options = lib.llama_model_quantize_default_params()
    options.tt_overrides = (_Override * (len(overrides) + 1))(*overrides, _Override(None, 0))
    options.ftype = 7  # Q8_0 for what no option names
    options.nthread = 1
    lib.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Quantising)]
    lib.llama_backend_init()
    files = [str(folder / name).encode() for name in ("f32.gguf", "mixed.gguf")]
    assert lib.llama_model_quantize(*files, ctypes.byref(options)) == 0
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / "mixed.gguf").tensors}
    return types, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)


def test_transformers_leaves_out_what_it_is_told(
    record: AllocationRecord, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao, which transformers calls here")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    llama.save_pretrained(tmp_path)
    config = TorchAoConfig(
        quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(32)),
        **json.loads(exports(record)["transformers.json"]),
    )
    made = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    for layer in record.layers:
        plain = type(made.get_submodule(layer.name).weight) is torch.nn.Parameter
        assert plain == layer.format.startswith("dense"), layer.name
    assert type(made.lm_head.weight) is torch.nn.Parameter


def test_onnx_runtime_leaves_out_the_nodes_that_are_found(record: AllocationRecord, llama: LlamaForCausalLM) -> None:
    pytest.importorskip("onnx", reason="needs onnx, onnxscript and onnxruntime")
    pytest.importorskip("onnxscript")
    quantiser = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    ids = torch.arange(16)[None]
    exported = torch.onnx.export(llama, (), kwargs={"input_ids": ids, "use_cache": False}, dynamo=True).model_proto
    space: dict[str, Any] = {}
    exec(exports(record)["onnx_nodes.py"], space)
    left = space["nodes_to_exclude"](exported)
    weights = {node.name for node in exported.graph.node if node.name.startswith("node_linear")}
    assert len(weights) == len(record.layers) + 1
    made = quantiser.MatMulNBitsQuantizer(exported, block_size=32, is_symmetric=True, nodes_to_exclude=left)
    made.process()
    kept = [n.name for n in made.model.model.graph.node if n.op_type == "MatMul" and n.name in weights]
    assert sorted(kept) == sorted(left)
    assert len(left) == 1 + sum(layer.format.startswith("dense") for layer in record.layers)
