from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from peelwise.errors import FormatError, ModelError, OutputError
from peelwise.formats.masked import Given, Masked
from peelwise.formats.table import parse_format
from peelwise.model.checkpoints import open_model, save_model
from peelwise.model.fingerprint import fingerprint
from peelwise.nn import IntLinear, QuantizedLinear, dense_, quantize_, save_pretrained
from peelwise.references.quantized import solve
from zoo import ZOO, sample_ids


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(sample_ids(2, 9)).logits


@pytest.mark.parametrize("form", ["ternary", "binary:channel", "int2:group=16,affine", "int4:keep=2:4"])
def test_a_quantised_model_is_opened_as_it_was_saved(tmp_path, form: str) -> None:
    model = ZOO["llama-tied"]()
    names = quantize_(model, form, skip=["down_proj"])
    with torch.no_grad():  # what keep=2:4 would choose now is not what it chose when the layers were made
        for name in names:
            model.get_submodule(name).weight.add_(torch.randn_like(model.get_submodule(name).weight) * 0.05)
    save_pretrained(model, tmp_path)
    opened = open_model(tmp_path, with_tokenizer=False).model
    assert [n for n, m in opened.named_modules() if isinstance(m, QuantizedLinear)] == names
    torch.testing.assert_close(_logits(opened), _logits(model), rtol=0, atol=0)
    assert fingerprint(opened) == fingerprint(model)


def test_scales_that_a_layer_keeps_and_a_given_support_are_saved(tmp_path) -> None:
    model = ZOO["llama"]()
    linear = model.model.layers[0].mlp.up_proj
    mask = torch.rand(linear.weight.shape) < 0.5
    mask[:, 0] = True
    quantize_(model, Masked(parse_format("int2:affine"), Given(mask)), choose=lambda name, m: m is linear)
    layer = model.model.layers[0].mlp.up_proj
    S = torch.randn(200, linear.in_features).T.cov() + torch.eye(linear.in_features)
    best = solve(S, layer.weight.detach(), layer.format, starts=[layer.encoded()]).encoded
    assert not torch.equal(best.scales, layer.encoded().scales)
    layer.hold_(best)
    torch.testing.assert_close(layer.effective_weight(), layer.format.decode(best), rtol=0, atol=0)
    save_model(model, None, tmp_path)
    opened = open_model(tmp_path, with_tokenizer=False).model
    again = opened.model.layers[0].mlp.up_proj
    assert torch.equal(again.encoded().codes * mask, best.codes * mask)
    torch.testing.assert_close(_logits(opened), _logits(model), rtol=0, atol=0)


def test_dense_layers_are_saved_as_plain_ones(tmp_path) -> None:
    model = ZOO["llama"]()
    quantize_(model, "ternary")
    dense_(model)
    with pytest.raises(OutputError, match="no low-bit layers"):
        save_pretrained(model, tmp_path)
    save_model(model, None, tmp_path)
    assert "peelwise_formats" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"model.layers.7.mlp.up_proj": "ternary"}, "which the model does not have"),
        ({"model.layers.0.mlp": "ternary"}, "expected an nn.Linear or Conv1D, got"),
        ({"model.layers.0.mlp.up_proj": "quinary"}, "Unknown format 'quinary'"),
        ({"model.layers.0.mlp.up_proj": "int4:group=32"}, "up_proj: group=32 does not divide the 48 inputs"),
        ({"model.layers.0.mlp.up_proj": "int4:keep=2:4"}, "its support is missing"),
        ({"model.layers.0.mlp.up_proj": "dense"}, "no format to train in"),
        ("ternary", "should map layers to formats"),
    ],
)
def test_formats_that_do_not_go_with_the_folder_are_refused(tmp_path, edit, message: str) -> None:
    model = ZOO["llama"]()
    quantize_(model, "ternary")
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"peelwise_formats": edit}))
    with pytest.raises(ModelError, match=message):
        open_model(tmp_path, with_tokenizer=False)


def test_scales_of_another_format_are_refused(tmp_path) -> None:
    model = ZOO["llama"]()
    name = quantize_(model, "int4", choose=lambda name, m: name.endswith("0.mlp.up_proj"))[0]
    layer = model.get_submodule(name)
    layer.hold_(layer.encoded())
    save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{name}.scales"] = tensors[f"{name}.scales"].float()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"up_proj: int4:channel,symmetric: expected scales .* in float16, got .* float32"
    ):
        open_model(tmp_path, with_tokenizer=False)


def test_codes_of_another_format_or_support_are_not_held() -> None:
    layer = IntLinear(8, 4)
    other = parse_format("int8").encode(layer.weight.detach())
    with pytest.raises(FormatError, match="none of its 16 codes"):
        layer.hold_(other)
    masked = IntLinear(8, 4, form="int4:band=2")
    with pytest.raises(FormatError, match="another support"):
        masked.hold_(parse_format("int4:band=3").encode(layer.weight.detach()))
    coarse = IntLinear(64, 64, form="int8:minimum", dtype=torch.bfloat16)
    finer = coarse.format.encode(torch.randn(64, 64) + 20)
    with pytest.raises(FormatError, match="bfloat16 cannot tell its levels apart"):
        coarse.hold_(finer)
