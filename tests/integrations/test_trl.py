"""The monitor in TRL's SFTTrainer: LoRA on answers only, rows padded or packed. Where trl and peft are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models

import peelwise
from zoo import ZOO

pytest.importorskip("trl")
pytest.importorskip("peft")
pytestmark = pytest.mark.slow

STEPS = 8


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Return rows of ids of which the second half are answers."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(8, 15, (1,), generator=generator))
        ids = torch.randint(2, 90, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "completion_mask": [int(i >= length // 2) for i in range(length)]})
    return found


def trainer_of(folder: Path, *, packing: bool) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {f"w{i}": i for i in range(96)} | {"<pad>": 96}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="<pad>", eos_token="w1"
    )
    torch.manual_seed(0)
    arguments = SFTConfig(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, save_strategy="no", seed=0,
        use_cpu=True, disable_tqdm=True, report_to="none", learning_rate=1e-2, packing=packing, max_length=32,
        completion_only_loss=True, bf16=False, dataloader_pin_memory=False, gradient_checkpointing=False,
    )  # fmt: skip
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    return SFTTrainer(
        ZOO["llama"]().train(), arguments, train_dataset=Dataset.from_list(rows(64, 0)), processing_class=tokenizer,
        peft_config=adapters,
    )  # fmt: skip


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_answers_and_adapters_are_followed_without_an_alarm(packing: bool, tmp_path: Path) -> None:
    text = rows(60, 9)
    labels = [
        [i if asked else -100 for i, asked in zip(row["input_ids"], row["completion_mask"], strict=True)]
        for row in text
    ]
    probe = peelwise.Probe.from_tokens([row["input_ids"] for row in text], labels=labels, in_distribution=True)
    trainer = trainer_of(tmp_path, packing=packing)
    callback = peelwise.attach(trainer, probe, budget=None, schedule=peelwise.every(2), store=None)
    trainer.train()
    plain = trainer_of(tmp_path / "plain", packing=packing)
    plain.train()
    pairs = zip(trainer.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert callback.monitor is not None
    assert callback.monitor.last is not None
    assert callback.monitor.last.step == STEPS
    # That the base is frozen is told; zeros that lora_B begins with, a base without gradients and padding are not.
    assert {event.kind for event in callback.monitor.events} == {"frozen-layers"}
