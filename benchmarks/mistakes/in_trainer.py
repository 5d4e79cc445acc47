"""The trainings of trainings.py in the Trainer of transformers, with its default optimiser, on a Llama as small."""

import tempfile
import time

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from trainings import IGNORED

import peelwise
from monitor import BATCH, BLOCKS, BYTES, CONTEXT, HEADS, WIDTH

# What no Trainer can do wrong, and what is made of the other model's own blocks.
LEFT_OUT = ("gradients never cleared", "a head that sees the future", "healthy: dropout and clipping")


def small_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    class SmallLlama(LlamaForCausalLM):
        blocks = property(lambda self: self.model.layers)

    return SmallLlama(
        LlamaConfig(
            vocab_size=BYTES, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=BLOCKS,
            num_attention_heads=HEADS, max_position_embeddings=2 * CONTEXT, use_cache=False,
        )
    )  # fmt: skip


class Rows(IterableDataset):
    """Sequences of all steps in order, with labels as transformers wants them: not shifted."""

    def __init__(self, training, stream, steps, generator):
        self.training, self.stream, self.steps, self.generator = training, stream, steps, generator

    def __iter__(self):
        for step in range(self.steps):
            for ids, labels in zip(*self.training.batch(self.stream, step, self.generator), strict=True):
                yield {"input_ids": ids, "labels": torch.cat([torch.tensor([IGNORED]), labels])}


def trained(training, seed, steps, budget, afterwards, stream):
    """Return events, letters, losses, seconds and share of a training."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class WithSchedule(Trainer):
        def create_optimizer(self, *_, **__):
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = training.groups(self.model, training.rate)
            self.optimizer = kind(groups, **options, weight_decay=self.args.weight_decay)
            return self.optimizer

        def create_scheduler(self, *_, **__):
            self.lr_scheduler = LambdaLR(self.optimizer, lambda step: training.schedule(step, steps))
            return self.lr_scheduler

    class Enough(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            named = [e.step for e in callback.monitor.events if e.kind in training.kinds]
            control.should_training_stop |= bool(named) and state.global_step > named[0] + afterwards

    torch.manual_seed(seed)
    model = small_llama()
    training.change(model)
    generator = torch.Generator().manual_seed(seed)
    probe = peelwise.Probe.from_tokens(stream, sequence_length=CONTEXT, in_distribution=True)
    letters, start = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=training.rate,
            weight_decay=training.decay, max_grad_norm=training.clip or 0.0, save_strategy="no", report_to="none",
            use_cpu=True, disable_tqdm=True, seed=seed, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = WithSchedule(model, arguments, train_dataset=Rows(training, stream, steps, generator))
        callback = peelwise.attach(trainer, probe, budget=budget, store=None, on_measurement=letters.append)
        trainer.add_callback(Enough())
        loss = trainer.train().training_loss
    return {
        "monitor": callback.monitor, "loss": loss, "seconds": time.perf_counter() - start,
        "letters": [{"step": e.step, "kind": e.kind, "loss": e.probe_loss, "letters": e.letters} for e in letters],
    }  # fmt: skip
