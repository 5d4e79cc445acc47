"""A small Llama with a tokenizer, as a folder of transformers has them, and ways to spoil its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from peelwise.probe.texts import reference_prose

SIZES = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_llama(tied: bool = False) -> Any:
    """Return a random Llama of two layers, always the same."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, intermediate_size=32, num_key_value_heads=1, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def tiny_tokenizer() -> Any:
    """Return a byte-level tokenizer of 300 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=letters)
    backend.train_from_iterator(reference_prose()[:2], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def edit(file: Path, **changes: Any) -> None:
    """Change entries of a JSON file; None takes one out."""
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def cut(file: Path, keep: int) -> None:
    """Keep the first bytes of a file."""
    file.write_bytes(file.read_bytes()[:keep])
