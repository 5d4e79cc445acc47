"""A whole anatomy: the model is left as it was, what is damaged is named, what is healthy is not, budgets are kept."""

import pytest
import torch

from audits import Snapshot, tiny_probe
from peelwise.errors import OptionError, OutputError
from peelwise.records.anatomy import ABLATIONS, BENDS, AnatomyRecord
from peelwise.tasks.anatomy import recover
from peelwise.tasks.anatomy import run as running
from peelwise.tasks.anatomy.run import run_anatomy
from peelwise.tasks.anatomy.settings import STUDIES, AnatomySettings
from peelwise.tasks.anatomy.unfinished import FOUND, TRAINING, TrainingMemory
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


class Killed(BaseException):
    """What a kill is to a process: nothing is caught, nothing is written down."""


def killed_after(monkeypatch, name, calls):
    """Let a function of the run be called so often, and then never again."""
    work, seen = getattr(running, name), []

    def counted(*arguments, **named):
        if len(seen) == calls:
            raise Killed
        seen.append(name)
        return work(*arguments, **named)

    monkeypatch.setattr(running, name, counted)
    return seen


@pytest.mark.parametrize(
    ("name", "calls"), [("ablations", 2), ("predictability", 3), ("predicted", 4), ("best_scale", 3), ("recovery", 4)]
)
def test_a_killed_anatomy_goes_on_where_it_stopped(tmp_path, monkeypatch, record, name, calls):
    folder = tmp_path / "unfinished"
    with monkeypatch.context() as patched:
        killed_after(patched, name, calls)
        with pytest.raises(Killed):
            run_anatomy(deep_llama(), tiny_probe(), WHOLE, name="deep", unfinished=folder)
    kinds = {"predictability": len(record.predictability)}
    left = kinds.get(name, 6) - calls
    again = killed_after(monkeypatch, name, 100)
    found = run_anatomy(deep_llama(), tiny_probe(), WHOLE, name="deep", unfinished=folder)
    assert len(again) == left
    assert found.blocks == record.blocks
    assert found.predictability == record.predictability
    assert found.correlations == record.correlations
    assert "resumed" in [note.code for note in found.notes]
    assert "resumed" not in [note.code for note in record.notes]


def test_a_training_that_was_killed_ends_as_it_would_have(tmp_path, monkeypatch, record):
    settings, folder = AnatomySettings("10m", ("recovery",)), tmp_path / "unfinished"
    steps = []

    def loss(*arguments):
        steps.append(arguments)
        if len(steps) == 7:  # of the first training; its state is kept every fifth
            raise Killed
        return whole(*arguments)

    whole = recover._loss
    monkeypatch.setattr(recover, "_loss", loss)
    with pytest.raises(Killed):
        run_anatomy(deep_llama(), tiny_probe(), settings, unfinished=folder)
    assert (folder / TRAINING).is_file()
    rounds = []
    monkeypatch.setattr(recover, "_round", lambda *a, _round=recover._round: rounds.append(a) or _round(*a))
    found = run_anatomy(deep_llama(), tiny_probe(), settings, unfinished=folder)
    assert [block.recovery for block in found.blocks] == [block.recovery for block in record.blocks]
    trained = [block.index for block in record.blocks if block.recovery.retrained is not None]
    assert len(rounds) == 5 - trained[0]  # those before it, and its own, were known
    each = [record.blocks[index].recovery.retrained for index in trained]
    taken = sum(done.steps or min(recover.MOST_STEPS, done.best_step + 20) for done in each)  # with its patience
    assert len(steps) == taken + 2  # the seventh in vain, and the sixth again


def test_pieces_of_something_else_are_refused_and_replaced_only_by_force(tmp_path):
    settings, folder = AnatomySettings("10m", ("ablation",)), tmp_path / "unfinished"
    first = run_anatomy(deep_llama(), tiny_probe(), settings, unfinished=folder)
    other = deep_llama()
    with torch.no_grad():
        other.lm_head.weight.mul_(2.0)
    with pytest.raises(OutputError, match=r"unfinished anatomy of something else \(model differ\)"):
        run_anatomy(other, tiny_probe(), settings, unfinished=folder)
    anew = run_anatomy(other, tiny_probe(), settings, unfinished=folder, force=True)
    assert anew.blocks != first.blocks
    assert "resumed" not in [note.code for note in anew.notes]
    (folder / FOUND).write_text('{"about": ')
    with pytest.raises(OutputError, match="cannot be read"):
        run_anatomy(other, tiny_probe(), settings, unfinished=folder)


def test_a_state_of_a_training_that_was_cut_is_not_used(tmp_path):
    memory = TrainingMemory(tmp_path / TRAINING, 2)
    assert memory.load() is None
    memory.save({"block": 2, "step": 5})
    assert memory.load() == {"block": 2, "step": 5}
    assert TrainingMemory(tmp_path / TRAINING, 1).load() is None
    (tmp_path / TRAINING).write_bytes((tmp_path / TRAINING).read_bytes()[:40])
    assert memory.load() is None


@pytest.mark.parametrize("name", sorted(ZOO))
def test_models_of_the_zoo(name):
    model = ZOO[name]()
    before = Snapshot.of(model)
    found = run_anatomy(model, tiny_probe(), AnatomySettings("10m", ("ablation", "predictability")))
    before.assert_unchanged(model)
    assert found.complete
    assert all("skipped" in block.ablation for block in found.blocks)
