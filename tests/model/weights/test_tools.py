"""What is read without the tools that wrote it, beside these tools themselves, where they are installed.

None of them is a dependency. `pip install bitsandbytes compressed-tensors auto-round` beside torch 2.13 runs all.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peelwise
from audits import tiny_probe
from gguf_files import llama_of_whole_blocks
from packed_files import CASES, write_packed
from peelwise.errors import UnsupportedModelError
from peelwise.formats.membership import check_member
from peelwise.model.adapters import merged_and_bare
from peelwise.model.architectures import find_blocks
from peelwise.model.checkpoints import open_model
from peelwise.model.guard import untouched
from peelwise.model.weights.bitsandbytes import read_bitsandbytes
from peelwise.model.weights.gptq import read_auto_round, read_awq
from peelwise.model.weights.reading import reading_of
from peelwise.model.weights.table import held, unread
from peelwise.nn import quantize_
from peelwise.probe.probe import Probe
from peelwise.tasks.quantcheck.settings import QuantcheckSettings

QUICK = QuantcheckSettings(budget=1e-6)


def _four_bits(W: Tensor, **options: Any) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(W.shape[1], W.shape[0], bias=False, compute_dtype=torch.float32, **options)
    layer.weight = bnb.nn.Params4bit(W.clone(), requires_grad=False, **options)
    return layer.to("cpu")


@pytest.mark.parametrize("table", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_of_bitsandbytes(table: str, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    W = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    layer = _four_bits(W, quant_type=table, compress_statistics=nested)
    expected = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    state = layer.state_dict()
    stored = read_bitsandbytes(state, {})
    found = held(layer)
    assert found.format.name == f"{table}:group=64,scale=float32"
    check_member(found.encoded, found.format, (48, 128))
    torch.testing.assert_close(found.weight, expected, rtol=2e-7, atol=0)
    assert torch.equal(stored.weight, found.weight)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    with untouched(layer):
        torch.testing.assert_close(layer(x), x @ found.weight.T, rtol=1e-4, atol=1e-4)
    assert torch.equal(held(layer).weight, found.weight)


@pytest.mark.parametrize("measured", [True, False])
def test_four_bits_are_not_packed_anew_while_they_are_measured(measured: bool) -> None:
    W = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    layer = _four_bits(W, quant_type="nf4")
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes packs codes anew on CPUs with AVX-512 for bfloat16")
    before = layer.weight.data.clone()
    with untouched(layer) if measured else nullcontext():
        layer.eval()(torch.randn(5, 128))
    assert layer.support_avx512bf16_for_cpu
    assert torch.equal(layer.weight.data.flatten(), before.flatten()) == measured
    if not measured:
        with pytest.raises(UnsupportedModelError, match="packs the codes anew and rounds their scales"):
            held(layer)


def test_adapters_beside_four_bits_are_measured_as_they_were_trained() -> None:
    """A fine-tune by QLoRA in memory, quantised to int4, and beside the model in full precision."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=97, max_position_embeddings=64, **sizes)).eval()
    base = copy.deepcopy(plain)
    for name in (linear.name for block in find_blocks(plain) for linear in block.linears):
        owner, _, last = name.rpartition(".")
        weight = plain.get_submodule(name).weight.detach()
        setattr(base.get_submodule(owner), last, _four_bits(weight, quant_type="nf4", compress_statistics=True))
    base.is_loaded_in_4bit = True
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(base, settings).eval()
    layer = tuned.base_model.model.model.layers[0].mlp.down_proj
    assert type(layer).__name__ == "Linear4bit"
    codes, ids = layer.base_layer.weight.data.clone(), torch.arange(40)[None]
    made = merged_and_bare(tuned)
    with torch.no_grad(), untouched(tuned):
        expected = tuned(ids).logits
        with tuned.disable_adapter():
            torch.testing.assert_close(made.bare(ids).logits, tuned(ids).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(made.merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
        again = copy.deepcopy(tuned).merge_and_unload()  # the control: PEFT rounds both to codes again
        assert float((again(ids).logits - expected).abs().max()) > 1e-3
    quantised = copy.deepcopy(made.merged)
    quantize_(quantised, "int4:group=32")
    probe = tiny_probe(in_distribution=True)
    record = peelwise.quantcheck(quantised, tuned, probe, QUICK).record
    assert record.fine_tune.gained.mean != 0
    assert [note.values["layers"] for note in record.notes if note.code == "adapters-on-codes"] == [14]
    deployed = peelwise.quantcheck(tuned, plain, probe, QUICK).record
    assert deployed.loss.quantised == pytest.approx(record.loss.parent, abs=1e-5)
    assert torch.equal(layer.base_layer.weight.data, codes)


def test_eight_bits_of_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    W = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    layer = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(W.clone(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    found = held(layer)
    assert found.format.name == "int8:channel,symmetric,scale=float32"
    expected = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    torch.testing.assert_close(found.weight, expected, rtol=1e-6, atol=0)
    state = layer.state_dict()
    assert torch.equal(read_bitsandbytes(state, {}).weight, found.weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_folder_that_transformers_wrote_with_bitsandbytes(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=97, max_position_embeddings=64, **sizes)).save_pretrained(
        tmp_path / "plain"
    )
    said = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        if bits == 4
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=said, device_map="cpu", dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "packed")
    ours = open_model(tmp_path / "packed", device="cpu", with_tokenizer=False).model
    assert reading_of(ours).codes == 14
    for linear in (linear for block in find_blocks(ours) for linear in block.linears):
        module = theirs.get_submodule(linear.name)
        assert torch.equal(linear.weight(), held(module).weight)
    ids = torch.arange(40)[None]
    with torch.no_grad(), untouched(theirs):
        a, b = ours(ids).logits, theirs(ids).logits
    # Eight bits round the inputs too, four bits do not.
    torch.testing.assert_close(a, b, rtol=0, atol=(1e-4 if bits == 4 else 0.1) * float(b.std()))


@pytest.mark.parametrize("case", ["pack-quantized", "pack-quantized-3-bits", "int-quantized", "float-quantized"])
def test_files_of_this_suite_are_what_compressed_tensors_reads(tmp_path: Path, case: str) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    make, said = CASES[case]
    W = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    tensors, expected = make(W)
    weights = {
        "pack-quantized": {"num_bits": 4, "strategy": "group", "group_size": 32},
        "pack-quantized-3-bits": {"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": False},
        "int-quantized": {"num_bits": 8, "strategy": "channel"},
        "float-quantized": {"num_bits": 8, "strategy": "channel", "type": "float"},
    }[case]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    compressor = compressors.BaseCompressor.get_value_from_registry(said["format"])
    found = compressor.decompress(tensors, scheme)["weight"]
    assert torch.equal(found, expected.to(found.dtype))
    folder = tmp_path / "packed"
    ours = write_packed(llama_of_whole_blocks(), folder, make, said)
    opened = open_model(folder, device="cpu", with_tokenizer=False).model
    assert all(torch.equal(m.weight(), ours[f"{m.name}.weight"]) for b in find_blocks(opened) for m in b.linears)


def _grid(W: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Scales in half precision and zero points ``[d_out, groups]``, none of them 0, which one layout cannot store."""
    pooled = W.reshape(len(W), -1, group)
    high, low = pooled.amax(-1).clamp_min(0), pooled.amin(-1).clamp_max(0)
    scales = ((high - low) / (2**bits - 1)).half().float()
    return scales, (-low / scales).round().clamp(1, 2**bits - 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("packing", ["auto_round", "auto_round:auto_gptq"])
def test_layers_that_auto_round_packs(bits: int, packing: str) -> None:
    name = "qlinear_torch_zp" if "gptq" in packing else "qlinear_torch"
    theirs = pytest.importorskip(f"auto_round_extension.torch.{name}")
    linear = nn.Linear(96, 64, bias=False)
    scales, zeros = _grid(linear.weight.detach(), bits, 32)
    layer = theirs.QuantLinear(bits, 32, 96, 64, bias=False)
    layer.device = "cpu"
    layer.pack(linear, scales, zeros, None, device="cpu")
    layer.post_init()
    said = {"bits": bits, "packing_format": packing}
    found = read_auto_round(dict(layer.named_buffers()), said)
    assert found.format.name.startswith(f"int{bits}:group=32,affine")
    assert (found.weight - linear.weight).abs().max() <= scales.max()
    computed = layer(torch.eye(96)).T  # in half precision inside
    torch.testing.assert_close(computed.float(), found.weight, rtol=2e-3, atol=1e-5)


def test_layers_that_auto_round_packs_as_awq() -> None:
    awq = pytest.importorskip("auto_round.export.export_to_awq.utils")
    linear = nn.Linear(96, 64, bias=False)
    scales, zeros = _grid(linear.weight.detach(), 4, 32)
    layer = awq.WQLinear_GEMM.from_linear(linear, 4, 32, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
    expected = awq.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, 32).T
    found = read_awq(dict(layer.named_buffers()), {"version": "gemm"})
    assert torch.equal(found.weight, expected)
    assert (found.weight - linear.weight).abs().max() <= scales.max()


def test_layers_that_compressed_tensors_rounds_as_they_run_are_refused() -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    model = nn.Sequential(nn.Linear(64, 32))
    assert unread(model[0]) is None
    weights = quantization.QuantizationArgs(num_bits=4, strategy="group", group_size=32)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    quantization.apply_quantization_config(model, quantization.QuantizationConfig(config_groups={"all": scheme}))
    assert "(compressed-tensors) rounds its weights as it runs" in unread(model[0])


def test_eight_bits_of_bitsandbytes_round_their_inputs_in_memory_and_from_a_folder_alike(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    parent = llama_of_whole_blocks()
    parent.save_pretrained(tmp_path / "plain")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain",
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        device_map="cpu",
        dtype=torch.float32,
    )
    theirs.save_pretrained(tmp_path / "packed")
    ids = torch.randint(0, 97, (24, 33), generator=torch.Generator().manual_seed(0))
    probe, settings = Probe.from_tokens(ids, in_distribution=True), QuantcheckSettings(budget=1e-6)
    here = peelwise.quantcheck(theirs, parent, probe, settings).record
    there = peelwise.quantcheck(tmp_path / "packed", parent, probe, settings).record
    assert here.loss.quantised == pytest.approx(there.loss.quantised, abs=1e-4)
    assert here.loss.activations.mean == pytest.approx(there.loss.activations.mean, abs=3e-3)
    for a, b in zip(here.layers, there.layers, strict=True):
        assert a.inputs == pytest.approx(b.inputs, rel=0.2)
