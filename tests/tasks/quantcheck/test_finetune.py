"""How much of a fine-tune survives quantisation, and in which blocks it is lost."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import peelwise
from audits import Snapshot, part_of
from peelwise.errors import ModelError
from peelwise.model.architectures import find_blocks
from peelwise.nn import IntLinear, quantize_
from peelwise.show.quantcheck.words import survival
from peelwise.show.words import note_words
from peelwise.tasks.quantcheck.settings import QuantcheckSettings
from zoo import ZOO

QUICK = QuantcheckSettings(max_sweeps=1)


@pytest.fixture
def probe(training_probe):
    return part_of(training_probe, fit=8, select=4, report=16)


def _mean_loss(model: torch.nn.Module, part) -> float:
    """Every token that is to be predicted, one row at a time."""
    total = tokens = 0.0
    for ids, mask in zip(part.ids, part.mask, strict=True):
        with torch.no_grad():
            logits = model(ids[None, :-1])
            logits = getattr(logits, "logits", logits)[0].double()
        rows = mask[1:] if mask.shape == ids.shape else mask
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        total, tokens = total + float(losses[rows.bool()].sum()), tokens + float(rows.sum())
    return total / tokens


def test_the_share_is_that_of_the_losses_and_the_block_is_named(small_gpt, probe) -> None:
    base, tuned = small_gpt("middle")[0], small_gpt("final")[0]
    quantised = copy.deepcopy(tuned)
    others = [m.name for block in find_blocks(tuned) for m in block.linears if block.index != 2]
    quantize_(quantised, "int2", skip=others)
    before = [Snapshot.of(model) for model in (base, tuned, quantised)]
    record = peelwise.quantcheck(quantised, tuned, probe, QUICK, base=base).record
    for snapshot, model in zip(before, (base, tuned, quantised), strict=True):
        snapshot.assert_unchanged(model)
    found = record.fine_tune
    losses = [_mean_loss(model.eval(), probe.report) for model in (base, tuned, quantised)]
    assert found.loss == pytest.approx(losses[0], abs=1e-5)
    assert found.survives == pytest.approx((losses[0] - losses[2]) / (losses[0] - losses[1]), abs=1e-4)
    assert found.low < found.survives < found.high
    assert found.survives < 0.9
    assert [block.index for block in found.blocks] == [2]
    assert found.blocks[0].lost.mean == pytest.approx(losses[2] - losses[1], abs=1e-5)
    said = survival(record)
    assert f"{100 * found.survives:.0f} % (" in said[0]
    assert said[1].startswith("Lost in blocks 2 (")
    layer = next(layer for layer in record.layers if layer.name.endswith("up") or "up" in layer.name)
    assert layer.fine_tune > 0
    assert found.blocks[0].noise == pytest.approx(
        sum(each.error / each.fine_tune for each in record.layers) / len(record.layers)
    )


def test_more_bits_keep_more_of_it(small_gpt, probe) -> None:
    base, tuned = small_gpt("middle")[0], small_gpt("final")[0]
    kept = []
    for form in ("int8", "int3"):
        quantised = copy.deepcopy(tuned)
        quantize_(quantised, form)
        kept.append(peelwise.quantcheck(quantised, tuned, probe, QUICK, base=base, budget=1e-6).record.fine_tune)
    assert kept[0].survives == pytest.approx(1, abs=0.02)
    assert kept[1].survives < kept[0].low


def test_nothing_is_claimed_where_the_fine_tune_gains_nothing(small_gpt, probe) -> None:
    tuned = small_gpt("final")[0]
    quantised = copy.deepcopy(tuned)
    quantize_(quantised, "int4")
    record = peelwise.quantcheck(quantised, tuned, probe, QUICK, base=small_gpt("final")[0], budget=1e-6).record
    assert record.fine_tune.survives is None
    assert "not shown to gain anything on this text" in survival(record)[0]
    assert survival(peelwise.quantcheck(quantised, tuned, probe, QUICK, budget=1e-6).record) == []


def test_another_models_base_is_refused() -> None:
    from audits import tiny_probe

    tuned, other = ZOO["llama"](), ZOO["llama"]()
    quantised = copy.deepcopy(tuned)
    quantize_(quantised, "int4")
    del other.model.layers[-1]
    with pytest.raises(ModelError, match="it is not its parent"):
        peelwise.quantcheck(quantised, tuned, tiny_probe(), QUICK, base=other)


def _adapted(tmp_path):
    """Return a fine-tune by adapters, that of a folder, and its quantised model with the adapters merged."""
    peft = pytest.importorskip("peft")
    plain = ZOO["llama"]()
    plain.save_pretrained(tmp_path / "plain")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(copy.deepcopy(plain), settings).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    said["base_model_name_or_path"] = str(tmp_path / "plain")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(said))
    quantised = copy.deepcopy(tuned).merge_and_unload()
    quantize_(quantised, "int4:group=16")
    return plain, tuned, quantised


def test_a_parent_with_adapters_is_merged_and_brings_its_base(tmp_path) -> None:
    from audits import tiny_probe

    plain, tuned, quantised = _adapted(tmp_path)
    merged = copy.deepcopy(tuned).merge_and_unload()
    by_hand = peelwise.quantcheck(quantised, merged, tiny_probe(), QUICK, base=plain).record
    before = Snapshot.of(tuned)
    in_memory = peelwise.quantcheck(quantised, tuned, tiny_probe(), QUICK).record
    before.assert_unchanged(tuned)
    of_folder = peelwise.quantcheck(quantised, tmp_path / "adapter", tiny_probe(), QUICK).record
    assert by_hand.fine_tune.gained.mean != 0
    assert all(layer.fine_tune > 0 for layer in by_hand.layers if "q_proj" in layer.name)
    assert all(layer.fine_tune == pytest.approx(0, abs=1e-6) for layer in by_hand.layers if "k_proj" in layer.name)
    for record in (in_memory, of_folder):
        assert record.loss.parent == pytest.approx(by_hand.loss.parent, abs=1e-5)
        assert record.fine_tune.loss == pytest.approx(by_hand.fine_tune.loss, abs=1e-5)
        assert record.fine_tune.gained.mean == pytest.approx(by_hand.fine_tune.gained.mean, abs=1e-5)
    assert of_folder.parent.name == "adapter"


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("case", ["bitsandbytes-nf4", "gptq"])
def test_adapters_on_a_base_of_codes_are_added_to_the_numbers_that_these_stand_for(tmp_path, case, dora) -> None:
    from audits import tiny_probe
    from gguf_files import llama_of_whole_blocks
    from packed_files import CASES, write_packed
    from peelwise.api.inputs import open_target

    peft = pytest.importorskip("peft")
    plain = llama_of_whole_blocks()
    write_packed(plain, tmp_path / "packed", *CASES[case])
    base = open_target(tmp_path / "packed").model
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, use_dora=dora)
    tuned = peft.get_peft_model(copy.deepcopy(base), settings).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "packed")}))
    trained = _mean_loss(tuned, tiny_probe().report)

    quantised = copy.deepcopy(plain)
    quantize_(quantised, "int4:group=32")
    before = Snapshot.of(tuned)
    for parent in (tuned, tmp_path / "adapter"):
        record = peelwise.quantcheck(quantised, parent, tiny_probe(), QUICK).record
        assert record.loss.parent == pytest.approx(trained, abs=1e-5)
        assert record.fine_tune.loss == pytest.approx(_mean_loss(base, tiny_probe().report), abs=1e-5)
        (said,) = (note for note in record.notes if note.code == "adapters-on-codes")
        assert said.values["layers"] == 14
        assert "as it was trained" in note_words(said)
        changed = {layer.name.rpartition(".")[2] for layer in record.layers if layer.fine_tune > 1e-6}
        assert changed == {"q_proj", "up_proj"}
    before.assert_unchanged(tuned)

    # The quantised model itself has adapters beside its codes: those are looked at without, the others with parts.
    for deployed in (tuned, tmp_path / "adapter"):
        record = peelwise.quantcheck(deployed, plain, tiny_probe(), QUICK, base=plain).record
        assert record.loss.quantised == pytest.approx(trained, abs=1e-5)
        beside = [layer for layer in record.layers if layer.name.endswith(("q_proj", "up_proj"))]
        assert all(layer.split is None and not layer.codes for layer in beside)
        assert all(layer.split is not None for layer in record.layers if layer not in beside)
        own = {layer.block: layer.bits_per_weight for layer in record.layers if layer.name.endswith("gate_proj")}
        sizes = 32 * (4 * (64 + 96) + (96 if dora else 0)) / (64 * 96)
        up = next(layer for layer in beside if layer.name.endswith("up_proj"))
        assert up.bits_per_weight == pytest.approx(own[up.block] + sizes)
    before.assert_unchanged(tuned)


def test_adapters_that_were_merged_in_place_are_taken_out_again(tmp_path) -> None:
    from audits import tiny_probe

    _, tuned, quantised = _adapted(tmp_path)
    apart = peelwise.quantcheck(quantised, tuned, tiny_probe(), QUICK).record
    tuned.merge_adapter()
    merged = peelwise.quantcheck(quantised, tuned, tiny_probe(), QUICK).record
    assert tuned.base_model.model.model.layers[0].mlp.down_proj.merged
    assert merged.loss.parent == pytest.approx(apart.loss.parent, abs=1e-5)
    assert merged.fine_tune.loss == pytest.approx(apart.fine_tune.loss, abs=1e-5)
    layer = tuned.base_model.model.model.layers[0].mlp.down_proj
    layer.base_layer = IntLinear.from_linear(layer.base_layer, "int4:group=16")
    with pytest.raises(ModelError, match="its adapter was merged into codes of few bits"):
        peelwise.quantcheck(quantised, tuned, tiny_probe(), QUICK)


def test_an_adapter_whose_base_is_unknown_is_refused(tmp_path) -> None:
    from audits import tiny_probe

    _, _, quantised = _adapted(tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(file.read_text())
    for base, words in ((None, "names no base model"), (str(tmp_path / "gone"), "not found")):
        file.write_text(json.dumps(said | {"base_model_name_or_path": base}))
        with pytest.raises(ModelError, match=words):
            peelwise.quantcheck(quantised, tmp_path / "adapter", tiny_probe(), QUICK)


def test_an_adapter_without_its_weights_is_refused_and_not_asked_of_the_network(tmp_path) -> None:
    from audits import tiny_probe

    _, _, quantised = _adapted(tmp_path)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no adapter_model\.safetensors"):
        peelwise.quantcheck(quantised, tmp_path / "adapter", tiny_probe(), QUICK)
