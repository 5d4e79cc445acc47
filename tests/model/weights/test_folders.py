"""Folders of other quantisation tools: opened without these tools, with exactly the weights that they store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gguf_files import llama_of_whole_blocks
from packed_files import CASES, int_quantized, words_along, write_packed
from peelwise.errors import ModelError, UnsupportedModelError
from peelwise.formats.membership import check_member
from peelwise.formats.uneven import table_of
from peelwise.model.architectures import find_blocks
from peelwise.model.checkpoints import open_model, save_model
from peelwise.model.weights.bitsandbytes import read_bitsandbytes
from peelwise.model.weights.float8 import read_float8
from peelwise.model.weights.packing import packed_bits, unpacked_bits
from peelwise.model.weights.reading import reading_of
from peelwise.model.weights.table import held
from zoo import ZOO

FORMATS = {
    "gptq": "int4:group=32,symmetric",
    "gptq-3-bits": "int3:group=32,affine",
    "gptq-v2": "int8:group=32,affine",
    "auto-round": "int4:group=32,affine",
    "auto-round-as-gptq": "int2:group=32,affine",
    "auto-round-as-awq": "int4:group=32,affine",
    "awq": "int4:group=32,affine",
    "pack-quantized": "int4:group=32,symmetric,scale=bfloat16",
    "pack-quantized-3-bits": "int3:group=32,affine,scale=bfloat16",
    "int-quantized": "int8:channel,symmetric,scale=float32",
    "float-quantized": "float8_e4m3:channel,scale=float32",
    "bitsandbytes-nf4": "nf4:group=32,scale=float32",
    "bitsandbytes-int8": "int8:channel,symmetric,scale=float32",
    "fp8-blocks": "float8_e4m3:block=32,scale=float32",
    "fp8-tensor": "float8_e4m3:tensor,scale=float32",
}


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_go_on_from_one_word_to_the_next(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 41), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    words = words_along(codes, bits)
    assert torch.equal(packed_bits(codes, bits), words)
    assert torch.equal(unpacked_bits(words, bits, 41), codes)
    with pytest.raises(ModelError, match="expected 200 codes"):
        unpacked_bits(words, bits, 200)


@pytest.mark.parametrize("case", CASES)
def test_a_folder_is_opened_with_exactly_the_weights_that_it_stores(tmp_path: Path, case: str) -> None:
    model = llama_of_whole_blocks()
    expected = write_packed(model, tmp_path, *CASES[case])
    opened = open_model(tmp_path, device="cpu", with_tokenizer=False).model
    linears = [linear for block in find_blocks(opened) for linear in block.linears]
    assert len(linears) == 14
    for linear in linears:
        held = linear.held()
        assert torch.equal(linear.weight(), expected[f"{linear.name}.weight"]), linear.name
        assert not torch.equal(linear.weight(), model.get_submodule(linear.name).weight)
        if case == "gptq-act-order":
            assert held is None
        else:
            assert held is not None
            assert held.format.name == FORMATS[case]
            check_member(held.encoded, held.format, tuple(linear.weight().shape))
    reading = reading_of(opened)
    assert reading is not None
    assert (reading.codes, len(reading.numbers)) == ((0, 14) if case == "gptq-act-order" else (14, 0))
    if reading.numbers:  # 4 bits, a scale and a zero point per 32 weights, and the groups of 64 or 96 inputs
        assert reading.numbers["model.layers.0.mlp.up_proj"] == pytest.approx(4 + 20 / 32 + 32 / 96)
    plain = llama_of_whole_blocks()
    plain.load_state_dict(expected)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("shape", [(96, 64), (70, 64), (64, 48), (40, 40), (48, 32), (32, 32)])
def test_blocks_that_are_cut_off_at_the_edge_are_those_of_the_configuration(shape: tuple[int, int]) -> None:
    """One block after the other: 70 outputs in blocks of 32 are 32, 32 and 6, not three of the same size."""
    d_out, d_in = shape
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scales = torch.rand(-(-d_out // 32), -(-d_in // 32), generator=torch.Generator().manual_seed(1)) + 0.5
    weight, expected = W.to(torch.float8_e4m3fn), torch.empty(shape)
    for i in range(d_out):
        for j in range(d_in):
            expected[i, j] = float(weight[i, j].float()) * scales[i // 32, j // 32]
    read = read_float8({"weight": weight, "weight_scale_inv": scales}, {"weight_block_size": [32, 32]})
    assert isinstance(read, torch.Tensor) == bool(d_out % 32 or d_in % 32)
    torch.testing.assert_close(read if isinstance(read, torch.Tensor) else read.weight, expected, rtol=0, atol=0)
    if scales.numel() > 1:
        with pytest.raises(ModelError, match="are not those of blocks"):
            read_float8({"weight": weight, "weight_scale_inv": scales.repeat(2, 2)}, {"weight_block_size": [32, 32]})


def test_what_was_opened_is_saved_with_its_codes(tmp_path: Path) -> None:
    expected = write_packed(llama_of_whole_blocks(), tmp_path / "in", *CASES["awq"])
    opened = open_model(tmp_path / "in", device="cpu", with_tokenizer=False)
    save_model(opened.model, None, tmp_path / "out")
    again = open_model(tmp_path / "out", device="cpu", with_tokenizer=False).model
    for linear in (linear for block in find_blocks(again) for linear in block.linears):
        assert linear.held().format.name == FORMATS["awq"]
        assert torch.equal(linear.weight(), expected[f"{linear.name}.weight"])


def test_layers_in_full_precision_stay_so(tmp_path: Path) -> None:
    model = llama_of_whole_blocks()
    write_packed(model, tmp_path, *CASES["gptq"])
    stored = load_file(tmp_path / "model.safetensors")
    layer = "model.layers.1.mlp.down_proj"
    left = {name: tensor for name, tensor in stored.items() if not name.startswith(layer)}
    save_file(left | {f"{layer}.weight": model.get_submodule(layer).weight}, tmp_path / "model.safetensors")
    opened = open_model(tmp_path, device="cpu", with_tokenizer=False).model
    by_name = {linear.name: linear for block in find_blocks(opened) for linear in block.linears}
    assert by_name[layer].held() is None
    assert torch.equal(by_name[layer].weight(), model.get_submodule(layer).weight)
    assert sum(linear.low_bit for linear in by_name.values()) == 13


def _spoilt(folder: Path, case: str, spoil) -> None:
    write_packed(llama_of_whole_blocks(), folder, *CASES[case])
    stored = load_file(folder / "model.safetensors")
    spoil(stored, "model.layers.1.mlp.up_proj")
    save_file(stored, folder / "model.safetensors")


def _edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("case", "spoil", "said"),
    [
        ("gptq", lambda t, n: t.pop(f"{n}.scales"), r"up_proj do not go together .*'scales'.* gptq"),
        ("gptq", lambda t, n: t.update({f"{n}.qweight": t[f"{n}.qweight"][:3]}), "up_proj"),
        ("gptq", lambda t, n: t[f"{n}.scales"].fill_(float("nan")), "up_proj.*NaN or Inf"),
        ("awq", lambda t, n: t.update({f"{n}.qzeros": t[f"{n}.qzeros"][:1]}), "up_proj"),
        ("gptq-act-order", lambda t, n: t[f"{n}.g_idx"].add_(1), "up_proj: g_idx should name one of 2 groups"),
        ("int-quantized", lambda t, n: t.update({f"{n}.weight_scale": torch.ones(5, 1)}), "do not divide a matrix"),
        ("fp8-blocks", lambda t, n: t.pop(f"{n}.weight_scale_inv"), r"up_proj.weight is packed as float8.* no scale"),
        ("fp8-tensor", lambda t, n: t[f"{n}.weight"].view(torch.uint8).fill_(0x7F), "up_proj.*NaN or Inf"),
        ("pack-quantized", lambda t, n: t.update({f"{n}.weight_shape": torch.tensor([96, 640])}), "up_proj"),
    ],
)
def test_damaged_layers_are_named(tmp_path: Path, case: str, spoil, said: str) -> None:
    _spoilt(tmp_path, case, spoil)
    with pytest.raises((ModelError, UnsupportedModelError), match=said) as raised:
        open_model(tmp_path, device="cpu", with_tokenizer=False)
    assert "Traceback" not in str(raised.value)


@pytest.mark.parametrize(
    ("case", "changes", "said"),
    [
        ("awq", {"version": "gemv"}, "packed for 'gemv'"),
        ("gptq", {"checkpoint_format": "marlin"}, "packed for 'marlin'"),
        ("pack-quantized", {"format": "marlin-24"}, "format 'marlin-24'"),
        ("auto-round", {"packing_format": "auto_round:fp8_static"}, "packed for 'auto_round:fp8_static'"),
        ("auto-round", {"act_bits": 8}, "with quantised inputs"),
        ("gptq", {"quant_method": "mxfp4"}, "quantised by 'mxfp4'"),
    ],
)
def test_other_layouts_are_refused_by_name(tmp_path: Path, case: str, changes: dict[str, str], said: str) -> None:
    write_packed(llama_of_whole_blocks(), tmp_path, *CASES[case])
    _edit(tmp_path, **changes)
    with pytest.raises(UnsupportedModelError, match=said):
        open_model(tmp_path, device="cpu", with_tokenizer=False)


def test_in_another_dtype_the_numbers_stay_and_no_codes_are_claimed(tmp_path: Path) -> None:
    expected = write_packed(llama_of_whole_blocks(), tmp_path, *CASES["gptq"])
    opened = open_model(tmp_path, device="cpu", dtype="bfloat16", with_tokenizer=False).model
    reading = reading_of(opened)
    assert (reading.codes, len(reading.numbers)) == (0, 14)
    for linear in (linear for block in find_blocks(opened) for linear in block.linears):
        assert torch.equal(linear.weight(), expected[f"{linear.name}.weight"].bfloat16())


def test_experts_that_the_loader_merges_keep_the_stored_numbers(tmp_path: Path) -> None:
    """Files have a matrix per expert, the model one parameter of all: codes cannot stay, the weights must."""
    model = ZOO["mixtral"]()
    model.save_pretrained(tmp_path)
    stored, packed, expected = load_file(tmp_path / "model.safetensors"), {}, {}
    for name, tensor in stored.items():
        if tensor.dim() == 2 and ("experts" in name or "_proj" in name):
            made, expected[name] = int_quantized(tensor)
            packed |= {f"{name.removesuffix('.weight')}.{part}": t.contiguous() for part, t in made.items()}
        else:
            packed[name] = expected[name] = tensor
    save_file(packed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": CASES["int-quantized"][1]}))
    opened = open_model(tmp_path, device="cpu", with_tokenizer=False).model
    plain_folder = tmp_path / "plain"
    model.save_pretrained(plain_folder)
    save_file(expected, plain_folder / "model.safetensors", metadata={"format": "pt"})
    plain = open_model(plain_folder, device="cpu", with_tokenizer=False).model
    reading = reading_of(opened)
    assert reading.codes > 0
    assert any("expert" in name for name in reading.numbers)
    theirs = {linear.name: linear for block in find_blocks(plain) for linear in block.linears}
    for linear in (linear for block in find_blocks(opened) for linear in block.linears):
        assert torch.equal(linear.weight(), theirs[linear.name].weight()), linear.name
        assert not (linear.is_expert and linear.low_bit)


def _four_bits(**said: object) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors of bitsandbytes' nf4, written one byte after the other, and the weight that they stand for."""
    W = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    table = torch.tensor(table_of("nf4").values)
    absmax = W.reshape(-1, 64).abs().amax(1)
    codes = (W.reshape(-1, 64) / absmax[:, None])[..., None].sub(table).abs().argmin(-1).flatten().tolist()
    packed = [16 * codes[i] + codes[i + 1] for i in range(0, len(codes), 2)]  # the first in the high half
    state = json.dumps({"shape": [16, 64], "blocksize": 64, "dtype": "float32", "quant_type": "nf4"} | said).encode()
    return {
        "weight": torch.tensor(packed, dtype=torch.uint8)[:, None],
        "weight.absmax": absmax,
        "weight.quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state), dtype=torch.uint8),
    }, (table[torch.tensor(codes)].reshape(-1, 64) * absmax[:, None]).reshape(16, 64)


def test_four_bits_are_read_from_their_bytes() -> None:
    tensors, expected = _four_bits()
    found = read_bitsandbytes(tensors, {})
    assert found.format.name == "nf4:group=64,scale=float32"
    assert torch.equal(found.weight, expected)
    across = read_bitsandbytes(_four_bits(shape=[32, 32])[0], {})  # blocks of 64 go on from one output to the next
    assert torch.equal(across, expected.reshape(32, 32))
    for said in ({"shape": [16, 65]}, {"blocksize": 10**12}, {"blocksize": 32}, {"blocksize": 0}):
        with pytest.raises(ModelError, match="are not those of a matrix"):
            read_bitsandbytes(_four_bits(**said)[0], {})


@pytest.mark.parametrize("block", [None, (32, 32)])
def test_fp8_layers_in_memory_are_read_as_transformers_dequantises_them(block: tuple[int, int] | None) -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    layer = fp8.FP8Linear(64, 96, block_size=block)
    W = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    layer.weight.data = W.to(torch.float8_e4m3fn)
    scales = torch.rand_like(layer.weight_scale_inv) + 0.5
    layer.weight_scale_inv.data = scales
    found = held(layer)
    assert found.format.name.startswith("float8_e4m3:tensor" if block is None else "float8_e4m3:block=32")
    wide = scales if block is None else scales.repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert torch.equal(found.weight, layer.weight.float() * wide)
