"""Train the small Llama whose checkpoints serve the tests and the documentation.

    python examples/small_gpt/train.py --help

About a quarter of an hour on two cores. An interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from evaluate import mean_loss, token_losses, token_stream, windows
from text import held_out_documents, training_documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a run."""

    steps: int = 2400
    early_step: int = 100
    middle_step: int = 600
    batch: int = 32  # windows per step
    context: int = 128  # tokens per window
    vocabulary: int = 512
    width: int = 96
    blocks: int = 6
    heads: int = 4
    key_value_heads: int = 2
    mlp_width: int = 256
    peak_rate: float = 4e-3
    floor: float = 0.02  # last learning rate / highest
    warmup: int = 60
    decayed_by: int = 0  # step at which the rate reaches the floor; 0: the last one
    weight_decay: float = 0.1
    clip: float = 1.0
    evaluate_every: int = 100
    seed: int = 20261

    @property
    def stages(self) -> list[int]:
        """Steps after which a checkpoint is kept."""
        return sorted({step for step in (self.early_step, self.middle_step) if step < self.steps} | {self.steps})


def main(arguments: list[str] | None = None) -> int:
    """Train, or continue training, and write the stages."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()  # it would overwrite the progress line
    settings = Settings(steps=options.steps, seed=options.seed)
    train(Run(settings, options.out / "resume.pt", options.fresh), options.out, options.held_out)
    return 0


def train(run: Run, out: Path, held_out_windows: int | None = None) -> None:
    """Bring a run to its end, and write its stages and what there is to know about them."""
    settings = run.settings
    tokenizer = train_tokenizer(training_documents(), settings)
    tokenizer.save_pretrained(out / "tokenizer")
    stream = token_stream(tokenizer, training_documents())
    held_out = held_out_documents()
    held_out_stream = token_stream(tokenizer, held_out)
    test = windows(held_out_stream, settings.context)[:held_out_windows]
    tokens_per_byte = len(held_out_stream) / sum(len(document.encode()) for document in held_out)
    print(f"{len(stream):,} tokens to train on, {len(held_out_stream):,} held out")
    print(f"{sum(p.numel() for p in run.model.parameters()):,} parameters, from step {run.step}")
    while run.step < settings.steps:
        run.advance(stream)
        if run.step % settings.evaluate_every == 0 or run.step in settings.stages:
            run.evaluate(test)
        if run.step in settings.stages:
            run.stages.append(save_stage(run, tokenizer, test, tokens_per_byte, out))
        if run.step % settings.evaluate_every == 0:
            run.save()
    report = summary(run, len(stream), test.shape[0] * settings.context, tokens_per_byte)
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    run.resume_file.unlink(missing_ok=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a Llama of 0.66 M parameters on the text of Python's standard library.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=Settings.steps, help="training steps of 4,096 tokens")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="seed of weights and batches")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--out", type=Path, default=HERE / "checkpoints", help="folder of the stages")
    parser.add_argument("--held-out", type=int, help="windows of held-out text to evaluate on, to try; default: all")
    parser.add_argument("--fresh", action="store_true", help="ignore an interrupted run in the folder")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    return options


def train_tokenizer(documents: list[str], settings: Settings) -> PreTrainedTokenizerFast:
    """Byte-level pairs merged on the training text alone: any text can be written, none is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=settings.context,
        clean_up_tokenization_spaces=False,
    )


def new_model(settings: Settings) -> LlamaForCausalLM:
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.width,
        intermediate_size=settings.mlp_width,
        num_hidden_layers=settings.blocks,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.04,  # the usual 0.02 is meant for widths of a thousand
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def new_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() == 1]  # pulling a gain to zero only slows the block
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.peak_rate, betas=(0.9, 0.95))


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then half a cosine down to the floor, then the floor."""
    if step < settings.warmup:
        return settings.peak_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, (settings.decayed_by or settings.steps) - settings.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.peak_rate * (settings.floor + (1 - settings.floor) * cosine)


class Run:
    """The state of a training run: advanced step by step, saved and resumed."""

    largest_rounding = 1e-3  # nats per token that saving as float16 may cost

    def __init__(self, settings: Settings, resume_file: Path, fresh: bool) -> None:
        self.settings, self.resume_file = settings, resume_file
        resume_file.parent.mkdir(parents=True, exist_ok=True)
        self.model = self.new_model()
        self.optimizer = new_optimizer(self.model, settings)
        self.step, self.seconds = 0, 0.0
        self.curve: list[dict[str, float]] = []
        self.stages: list[dict[str, Any]] = []
        self.recent: list[float] = []  # training losses since the last evaluation
        if resume_file.exists() and not fresh:
            self._resume(torch.load(resume_file, weights_only=True))

    def new_model(self) -> nn.Module:
        """Return the model as it is before the first step."""
        return new_model(self.settings)

    def advance(self, stream: Tensor) -> None:
        """Take one step."""
        started, settings = time.perf_counter(), self.settings
        rate = learning_rate(self.step, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # One generator per step: a resumed run sees the batches it would have seen.
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + self.step)
        starts = torch.randint(len(stream) - settings.context, (settings.batch, 1), generator=generator)
        batch = stream[starts + torch.arange(settings.context + 1)]  # [batch, context + 1]
        self.model.train()
        loss = token_losses(self.model, batch).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.recent.append(loss.item())
        self.seconds += time.perf_counter() - started
        if self.step % 10 == 0:
            left = self.seconds / self.step * (settings.steps - self.step)
            print(f"\rstep {self.step:5d}  train {loss:.3f}  {left / 60:5.1f} min left", end="", flush=True)

    def evaluate(self, test: Tensor) -> None:
        """Add a point to the curve."""
        held_out = mean_loss(self.model, test)
        train = sum(self.recent) / len(self.recent)
        self.recent = []
        rate = learning_rate(self.step - 1, self.settings)
        self.curve.append(
            {
                "step": self.step,
                "train": round(train, 5),
                "held_out": round(held_out, 5),
                "rate": round(rate, 7),
            }
        )
        print(
            f"\rstep {self.step:5d}  train {train:.4f}  held out {held_out:.4f} nats/token" + " " * 12,
            flush=True,
        )

    def opened(self, folder: Path) -> nn.Module:
        """Open a stage of this run."""
        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model

    def save(self) -> None:
        """Write the state; an interruption while writing leaves the previous one."""
        state = {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": (self.step, self.seconds, self.curve, self.stages),
        }
        partial = self.resume_file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.resume_file)

    def _resume(self, state: dict[str, Any]) -> None:
        if state["settings"] != asdict(self.settings):
            sys.exit(f"{self.resume_file} is from a run with other settings; give --fresh or another --out.")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.curve, self.stages = state["progress"]


def save_stage(
    run: Run, tokenizer: PreTrainedTokenizerFast, test: Tensor, tokens_per_byte: float, out: Path
) -> dict[str, Any]:
    """Write a folder that transformers opens, and measure what it holds rather than what was in memory."""
    folder = out / f"step-{run.step:05d}"
    copy.deepcopy(run.model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stored = mean_loss(run.opened(folder), test)
    rounding = stored - mean_loss(run.model, test)
    if abs(rounding) > run.largest_rounding:
        sys.exit(f"{folder}: float16 changed the loss by {rounding:.5f} nats, more than {run.largest_rounding}.")
    return {
        "step": run.step,
        "folder": folder.name,
        "held_out_nats_per_token": round(stored, 5),
        "held_out_nats_per_byte": round(stored * tokens_per_byte, 5),
        "float16_rounding_nats": round(rounding, 7),
    }


def summary(run: Run, training_tokens: int, held_out_tokens: int, tokens_per_byte: float) -> dict[str, Any]:
    return {
        "settings": asdict(run.settings),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "training_tokens": training_tokens,
        "held_out_tokens": held_out_tokens,
        "held_out_tokens_per_byte": round(tokens_per_byte, 5),
        "training_seconds": round(run.seconds, 1),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "stages": run.stages,
        "curve": run.curve,
    }


if __name__ == "__main__":
    sys.exit(main())
