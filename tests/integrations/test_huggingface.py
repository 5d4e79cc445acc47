"""The monitor in the real Trainer of transformers."""

import subprocess
import sys

import pytest
import torch

import peelwise
from audits import tiny_probe
from example_models import bert, masked
from peelwise.errors import OptionError, ProbeError
from peelwise.store.reader import RunReader
from zoo import ZOO, sample_ids

STEPS = 12


def trainer_of(folder, callbacks=(), **options):
    from transformers import Trainer, TrainingArguments

    ids = sample_ids(32, 13)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        save_strategy="no",
        seed=0,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        learning_rate=1e-3,
        **({"report_to": "none", "logging_steps": 2} | options),
    )
    return Trainer(ZOO["gpt2"]().train(), arguments, train_dataset=rows, callbacks=list(callbacks))


def reporter():
    """A reporter as users give them: it sees what the trainer logs."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, logs=None, **found):
            self.seen.append((state.global_step, dict(logs)))

    return Reporter()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_attach(accumulate, tmp_path):
    user, options = reporter(), {"gradient_accumulation_steps": accumulate}
    trainer = trainer_of(tmp_path, [user], report_to="tensorboard", **options)
    callback = peelwise.attach(
        trainer, tiny_probe(), budget=None, schedule=peelwise.every(4), store=tmp_path / "run.db", name="mine"
    )
    trainer.train()
    plain = trainer_of(tmp_path / "plain", **options)
    plain.train()
    pairs = zip(trainer.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with RunReader(tmp_path / "run.db") as reader:
        assert (reader.latest().info.name, reader.latest().status) == ("mine", "finished")
        steps = [(row["step"], row["loss"]) for row in reader.steps(1)]
        assert [step for step, _ in steps] == list(range(1, STEPS + 1))
        losses = [loss for _, loss in steps]  # of every step, where the trainer logs the mean of two
        means = [(one + other) / 2 for one, other in zip(losses[::2], losses[1::2], strict=True)]
        assert means == pytest.approx([logs["loss"] for _, logs in user.seen if "loss" in logs], abs=1e-3)
        assert [row["step"] for row in reader.probes(1)] == [4, 8, 12]
    assert not [e for e in callback.monitor.events if e.kind in ("not-measured", "no-gradients-seen", "not-optimised")]
    # Metrics reach the user's reporter and TensorBoard, each visit's once.
    with_probe = {step: logs for step, logs in user.seen if "peelwise/probe_loss" in logs}
    assert list(with_probe) == [4, 8, 12]
    assert "peelwise/natural_energy/block_02" in with_probe[4]
    assert any("recoverable" in key for key in with_probe[8])
    assert all("peelwise/share" in logs for _, logs in user.seen if "loss" in logs)
    assert "peelwise/probe_loss" in tensorboard_tags(tmp_path)


def tensorboard_tags(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = set()
    for file in folder.rglob("events.out.*"):
        tags |= {tag.removeprefix("train/") for tag in EventAccumulator(str(file)).Reload().Tags()["scalars"]}
    return tags


def test_the_loss_of_every_step_is_had_where_the_trainer_logs_none(tmp_path):
    trainer = trainer_of(tmp_path, logging_steps=500)
    peelwise.attach(trainer, tiny_probe(), store=tmp_path / "run.db")
    trainer.train()
    with RunReader(tmp_path / "run.db") as reader:
        losses = [row["loss"] for row in reader.steps(1)]
    assert len(losses) == STEPS
    assert sum(losses) / STEPS == pytest.approx(trainer.state.log_history[-1]["train_loss"], rel=1e-4)


def test_a_mistake_is_named_whatever_kernels_the_optimiser_has(tmp_path):
    trainer = trainer_of(tmp_path, weight_decay=50.0)
    assert "fused" in trainer.args.optim  # the Trainer's default: its steps move no version counter
    callback = peelwise.attach(trainer, tiny_probe(), store=None)
    trainer.train()
    assert [e.kind for e in callback.monitor.events if e.kind == "decay-too-strong"] == ["decay-too-strong"]


def test_refusals(tmp_path):
    trainer = trainer_of(tmp_path)
    with pytest.raises(ProbeError, match="Token ids must lie in"):
        peelwise.attach(trainer, peelwise.Probe.from_tokens(sample_ids(28, 10) + 50))
    peelwise.attach(trainer, tiny_probe(), store=None)
    with pytest.raises(OptionError, match="attached to this trainer already"):
        peelwise.attach(trainer, tiny_probe(), store=None)


def test_a_monitor_that_cannot_be_made_ends_no_training(tmp_path, caplog):
    trainer, told = trainer_of(tmp_path), []
    options = {"budget": 3, "store": tmp_path / "run.db", "on_event": told.append}
    callback = peelwise.attach(trainer, tiny_probe(), **options)  # refused, but only when training begins
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert callback.monitor is None
    assert sum("training goes on unmonitored" in record.message for record in caplog.records) == 1
    with RunReader(tmp_path / "run.db") as reader:
        assert reader.latest().status == "failed"
        (row,) = reader.events(1)
    assert [event.kind for event in told] == [row["kind"]] == ["not-monitored"]
    assert "share of wall time above 0 and up to 1" in row["text"]


def test_a_monitor_measures_in_the_models_own_precision_where_training_is_in_another(tmp_path):
    """With bf16=True the forward is wrapped; for some probes, replay and forward would not agree."""
    trainer = trainer_of(tmp_path, bf16=True)
    callback = peelwise.attach(trainer, tiny_probe(), budget=None, schedule=peelwise.every(STEPS), store=None)
    trainer.train()
    assert not [e for e in callback.monitor.events if e.kind in ("not-measured", "not-monitored", "autocast")]
    model, report = ZOO["gpt2"](), tiny_probe().report
    model.load_state_dict(trainer.model.state_dict())
    with torch.no_grad():
        logits = model(report.inputs).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), report.targets.flatten(), reduction="none")
    exact = float(losses.double().view(report.targets.shape)[report.weights].mean())
    assert callback.monitor.last.probe_loss == pytest.approx(exact, abs=1e-6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = model(report.inputs).logits.float()
    losses = torch.nn.functional.cross_entropy(rounded.flatten(0, 1), report.targets.flatten())
    assert abs(float(losses) - exact) > 1e-6  # the control


def test_without_transformers():
    code = "import sys; sys.modules['transformers'] = None; import peelwise; peelwise.attach"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "peelwise[hf]"' in done.stderr


def test_a_masked_model_is_watched_on_batches(tmp_path):
    from transformers import Trainer, TrainingArguments

    def trainer_of_masked(folder):
        columns = masked(64)
        rows = [{name: column[i] for name, column in columns.items()} for i in range(64)]
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=6, per_device_train_batch_size=8, save_strategy="no", seed=0,
            use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, learning_rate=1e-3, report_to="none",
        )  # fmt: skip
        return Trainer(bert().train(), arguments, train_dataset=rows)

    trainer = trainer_of_masked(tmp_path)
    probe = peelwise.Probe.from_batches([masked(40, seed=9)], in_distribution=True)
    callback = peelwise.attach(trainer, probe, budget=None, schedule=peelwise.every(2), store=tmp_path / "run.db")
    trainer.train()
    plain = trainer_of_masked(tmp_path / "plain")  # its making sets the seeds
    plain.train()
    pairs = zip(trainer.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not [e for e in callback.monitor.events if e.kind in ("not-measured", "not-monitored", "labels-shifted")]
    with RunReader(tmp_path / "run.db") as reader:
        assert [row["step"] for row in reader.probes(1)] == [2, 4, 6]
        last = reader.probes(1)[-1]["probe_loss"]
    model = trainer.model.eval()
    batch = probe.report.taken(probe.report.inputs)
    with torch.no_grad():
        own = [model(**{n: c[i : i + 1] for n, c in batch.items()}).loss.item() for i in range(probe.report.sequences)]
    assert last == pytest.approx(sum(own) / len(own), rel=1e-5)
