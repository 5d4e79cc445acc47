"""A whole anatomy: the model is left as it was, what is damaged is named, what is healthy is not, budgets are kept."""

import pytest
import torch

from audits import Snapshot, tiny_probe
from peelwise.errors import OptionError
from peelwise.records.anatomy import ABLATIONS, BENDS, AnatomyRecord
from peelwise.tasks.anatomy import run as running
from peelwise.tasks.anatomy.run import run_anatomy
from peelwise.tasks.anatomy.settings import STUDIES, AnatomySettings
from zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore::peelwise.errors.IllConditionedWarning")
WHOLE = AnatomySettings("10m")


def deep_llama(blocks=6):
    import transformers

    torch.manual_seed(1)
    config = transformers.LlamaConfig(vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=blocks,
                                      num_attention_heads=2, initializer_range=0.15)  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def record():
    model = deep_llama()
    before = Snapshot.of(model)
    found = run_anatomy(model, tiny_probe(), WHOLE, name="deep")
    before.assert_unchanged(model)
    return found


def test_everything_is_measured_of_every_block_and_survives_a_file(record):
    assert record.complete
    assert not any(note.code == "budget-ended" for note in record.notes)
    for block in record.blocks:
        assert set(block.ablation) == set(ABLATIONS)
        assert [each.kind for each in block.bent] == list(BENDS)
        assert block.predicted is not None
        assert block.best_scale is not None
        assert block.recovery is not None
        assert "weight_rms.mlp.up_proj" in block.signals
    assert {each.part for each in record.predictability} == {name.split("layers.0.")[1] for name in matrices()}
    assert {each.target for each in record.correlations} >= {"skipped"}
    again = AnatomyRecord.model_validate_json(record.to_json())
    assert again == record
    assert again.computed_digest() == record.digest


def matrices():
    return [n for n, m in deep_llama(1).named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n]


def test_the_same_model_and_seed_give_the_same_numbers(record):
    again = run_anatomy(deep_llama(), tiny_probe(), WHOLE, name="deep")
    assert again.blocks == record.blocks
    assert again.predictability == record.predictability


@pytest.mark.parametrize("stage", ["final"])
def test_a_block_that_hurts_is_named_and_a_healthy_model_has_none(small_gpt, training_probe, stage):
    model, _ = small_gpt(stage)
    settings = AnatomySettings("10m", ("ablation",))
    healthy = run_anatomy(model, training_probe, settings)
    assert healthy.better_without == ()
    with torch.no_grad():
        block = model.model.layers[3]
        for layer in (block.self_attn.o_proj, block.mlp.down_proj):
            layer.weight.mul_(-3.0)
    broken = run_anatomy(model, training_probe, settings)
    named = {(each.block, each.ablation) for each in broken.better_without}
    assert (3, "skipped") in named
    assert {block for block, _ in named} == {3}


def test_studies_are_chosen(record):
    some = run_anatomy(deep_llama(), tiny_probe(), AnatomySettings("10m", ("predictability",)))
    assert some.predictability == record.predictability
    assert all(not block.ablation and not block.bent and not block.signals for block in some.blocks)
    assert some.better_without == ()
    with pytest.raises(OptionError, match=f"there is no study 'beauty'. Known: {', '.join(STUDIES)}"):
        AnatomySettings(studies=("beauty",))


def test_a_budget_that_ends_is_said_and_what_was_finished_is_kept():
    record = run_anatomy(deep_llama(), tiny_probe(), AnatomySettings(1e-6))
    assert not record.complete
    assert any(note.code == "budget-ended" for note in record.notes)
    assert not record.blocks[-1].bent


def test_an_interrupt_keeps_what_was_finished(monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(running._STUDIES, "structure", stop)
    record = run_anatomy(deep_llama(), tiny_probe(), WHOLE)
    assert not record.complete
    assert [note.code for note in record.notes if note.code in ("stopped", "budget-ended")] == ["stopped"]
    assert all(block.ablation for block in record.blocks)
    assert not any(block.bent for block in record.blocks)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_models_of_the_zoo(name):
    model = ZOO[name]()
    before = Snapshot.of(model)
    found = run_anatomy(model, tiny_probe(), AnatomySettings("10m", ("ablation", "predictability")))
    before.assert_unchanged(model)
    assert found.complete
    assert all("skipped" in block.ablation for block in found.blocks)
