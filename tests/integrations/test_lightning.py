"""The monitor in Lightning's real Trainer."""

import logging
import subprocess
import sys
import warnings

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import peelwise
from audits import tiny_probe
from example_models import images, vit
from peelwise.store.reader import RunReader
from zoo import ZOO, sample_ids

BATCHES = 12


def run(folder, callbacks=(), *, accumulate=1, fail_at=None):
    """Train a tiny GPT-2 with dropout; return module, logger and trainer."""
    from lightning.pytorch import LightningModule, Trainer, seed_everything
    from lightning.pytorch.loggers import CSVLogger

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = ZOO["gpt2"]().train()

        def training_step(self, ids, index):
            if index == fail_at:
                raise ZeroDivisionError
            logits = self.model(ids[:, :-1]).logits
            return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    seed_everything(0, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logger = CSVLogger(folder)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        callbacks=list(callbacks),
        accumulate_grad_batches=accumulate,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    module = Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(sample_ids(2 * BATCHES, 13), batch_size=2))
    return module, logger


def callback_of(folder, **options):
    from peelwise.integrations.lightning import PeelwiseCallback

    settings = {"budget": None, "schedule": peelwise.every(2), "store": folder / "run.db"}
    return PeelwiseCallback(tiny_probe(), **(settings | options))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_callback(accumulate, tmp_path):
    callback = callback_of(tmp_path)
    watched, logger = run(tmp_path, [callback], accumulate=accumulate)
    plain, _ = run(tmp_path / "plain", accumulate=accumulate)
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), plain.parameters(), strict=True))
    steps = BATCHES // accumulate
    with RunReader(tmp_path / "run.db") as reader:
        assert reader.latest().status == "finished"
        assert reader.latest().info.architecture == "GPT2LMHeadModel"
        rows = reader.steps(1)
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        assert all(4.0 < row["loss"] < 8.0 for row in rows)  # means, not halves of them
        probes = [row["step"] for row in reader.probes(1)]
        assert probes == list(range(2, steps + 1, 2))
    kinds = {event.kind for event in callback.monitor.events}
    assert not kinds & {"not-measured", "no-gradients-seen", "not-optimised"}
    logger.save()
    metrics = logger.experiment.metrics_file_path
    with open(metrics) as file:
        header, *lines = file.read().splitlines()
    assert "peelwise/probe_loss" in header.split(",")
    assert "peelwise/natural_energy/block_02" in header.split(",")
    place = header.split(",").index("step")
    assert [int(line.split(",")[place]) for line in lines] == probes


def test_a_run_that_fails_says_so(tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, [callback_of(tmp_path)], fail_at=3)
    with RunReader(tmp_path / "run.db") as reader:
        assert reader.latest().status == "failed"
        assert len(reader.steps(1)) == 3


def test_another_model_may_be_named(tmp_path):
    callback = callback_of(tmp_path, model=lambda module: module.model, store=None)
    run(tmp_path, [callback])
    assert callback.monitor.last is not None


def test_without_lightning():
    code = "import sys; sys.modules['lightning'] = None; import peelwise.integrations.lightning"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "peelwise[lightning]"' in done.stderr


def test_a_classifier_of_images_is_watched_on_batches(tmp_path):
    from lightning.pytorch import LightningModule, Trainer

    from peelwise.integrations.lightning import PeelwiseCallback

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = vit().train()

        def training_step(self, batch, index):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    columns = images(48)
    rows = [{name: column[i] for name, column in columns.items()} for i in range(48)]
    probe = peelwise.Probe.from_batches([images(40, seed=9)], in_distribution=True, unit="nats per image")
    callback = PeelwiseCallback(probe, budget=None, schedule=peelwise.every(2), store=tmp_path / "run.db")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(
            max_epochs=1, accelerator="cpu", logger=False, callbacks=[callback], enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False,
        ).fit(Module(), DataLoader(rows, batch_size=8))  # fmt: skip
    with RunReader(tmp_path / "run.db") as reader:
        assert [row["step"] for row in reader.probes(1)] == [2, 4, 6]
        assert reader.latest().info.probe["unit"] == "nats per image"
        assert reader.latest().status == "finished"
    assert not [e for e in callback.monitor.events if e.kind in ("not-measured", "not-monitored")]
