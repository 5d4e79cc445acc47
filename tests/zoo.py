"""Tiny random language models of many architectures, to see that nothing hangs on one of them.

``ZOO`` holds decoder-only models that peelwise must handle, ``UNSUPPORTED`` models that it must decline with
a clear error. Both map a name to a factory; every call builds a fresh model with the same weights, in
float32 and in eval mode. transformers is imported when a factory is called: collecting tests stays quick.

Attention is what transformers chooses (``sdpa``), but for Gemma 2, whose capped scores need ``eager``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plain_gpt import PlainGPT

VOCABULARY = 97
BLOCKS = 3
SEED = 7
MATRIX_GAIN = 4.0
VECTOR_NOISE = 0.1

Factory = Callable[[], nn.Module]

# What most configurations call by the same names. Two key-value heads for four query heads.
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SPECIAL_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}


class ConvolutionModel(nn.Module):
    """Blocks of causal convolutions: blocks, but no linear layer in them."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(nn.Conv1d(width, width, kernel_size=3) for _ in range(BLOCKS))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids).transpose(1, 2)  # [batch, width, length]
        for block in self.blocks:
            x = x + torch.relu(block(nn.functional.pad(x, (2, 0))))
        return self.head(x.transpose(1, 2))


class RecurrentModel(nn.Module):
    """An LSTM: layers, but neither blocks nor linear modules."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.lstm = nn.LSTM(width, width, num_layers=BLOCKS, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.tokens(ids))[0])


def sample_ids(batch: int = 4, length: int = 24, seed: int = 0) -> Tensor:
    """Return random token ids ``[batch, length]`` that every model here accepts."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def _seeded(build: Factory) -> Factory:
    """Wrap ``build`` so that it is reproducible and leaves the caller's random numbers alone."""

    def factory() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return build().eval()

    return factory


@torch.no_grad()
def _enliven(model: nn.Module) -> nn.Module:
    """Make every parameter of a model of transformers matter to the output.

    Its usual initialisation (0.02) is meant for widths of a thousand: at width 48 a block would add next to
    nothing to its input, and a test could not tell a right answer from none. Biases of zero and gains of one
    would hide a forgotten bias or norm in the same way.
    """
    for parameter in model.parameters():  # tied matrices come once
        if parameter.dim() > 1:
            parameter.mul_(MATRIX_GAIN)
        else:
            parameter.add_(VECTOR_NOISE * torch.randn_like(parameter))
    return model


def _transformer(config_class: str, attention: str = "sdpa", **settings: Any) -> Factory:
    """Return a factory for the causal language model of a configuration class of transformers."""

    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, config_class)(**SPECIAL_TOKENS, **settings)
        return _enliven(transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention))

    return _seeded(build)


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes))


GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 48,
    "n_layer": BLOCKS,
    "n_head": 4,
    "n_positions": 128,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
}
NEOX = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}
OPT = {name: value for name, value in NEOX.items() if name != "intermediate_size"} | {"ffn_dim": 80}
GEMMA = COMMON | {"head_dim": 12}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SLIDING_FIRST = ["sliding_attention", "full_attention", "sliding_attention"]
LFM = {"block_ff_dim": 80, "block_dim": 48, "conv_dim": 48, "block_auto_adjust_ff_dim": False}
WINDOWED = GEMMA | {"sliding_window": 8}  # shorter than the sample, so that the window is felt


class Lora(nn.Module):
    """A frozen linear layer with a trained product of two small ones beside it, named as PEFT names them."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def with_lora(model: nn.Module, ending: str, *, blocks: Sequence[str] = ("",)) -> nn.Module:
    """Freeze a model and put trained adapters beside its linear layers that are called so, in some blocks or in all."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(ending) and any(block in name for block in blocks):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Lora(module))
    return model


ZOO: dict[str, Factory] = {
    "llama": _transformer("LlamaConfig", **COMMON, tie_word_embeddings=False),
    "llama-tied": _transformer("LlamaConfig", **COMMON, tie_word_embeddings=True),
    "gpt2": _transformer("GPT2Config", **GPT2, tie_word_embeddings=True),  # Conv1D, dropout, biases
    "gpt2-untied": _transformer("GPT2Config", **GPT2, tie_word_embeddings=False),
    "neox-parallel": _transformer("GPTNeoXConfig", **NEOX, use_parallel_residual=True),  # biases
    "neox-serial": _transformer("GPTNeoXConfig", **NEOX, use_parallel_residual=False),
    "gemma": _transformer("GemmaConfig", **GEMMA, tie_word_embeddings=True),  # gains of 1 + w
    "gemma2": _transformer("Gemma2Config", "eager", **WINDOWED, tie_word_embeddings=True),  # capped logits
    "gemma3": _transformer("Gemma3TextConfig", **WINDOWED, tie_word_embeddings=True),  # norms behind too
    "qwen2": _transformer("Qwen2Config", **COMMON, tie_word_embeddings=False),  # biases on q, k, v only
    "qwen2-tied": _transformer("Qwen2Config", **COMMON, tie_word_embeddings=True),
    "qwen3": _transformer("Qwen3Config", **COMMON, head_dim=12, tie_word_embeddings=False),  # norms q and k
    "opt": _transformer("OPTConfig", **OPT, word_embed_proj_dim=48, dropout=0.0, tie_word_embeddings=True),
    "mistral": _transformer("MistralConfig", **COMMON, sliding_window=8, tie_word_embeddings=False),
    "plain": _seeded(PlainGPT),
    # Experts are parameters of three dimensions: a search for linear modules finds attention and head only.
    "mixtral": _transformer("MixtralConfig", **COMMON, **EXPERTS),
    # Transposed, with biases, gate and up interleaved; a sink in attention.
    "gpt-oss": _transformer("GptOssConfig", "eager", **WINDOWED, **EXPERTS, layer_types=SLIDING_FIRST),
    # Blocks of two kinds: short convolutions, of which the filter is left as it is, and attention.
    "lfm2": _transformer("Lfm2Config", **COMMON, **LFM, layer_types=["conv", "full_attention", "conv"]),
}
# How many parameters of their blocks are left as they are and named: routers, filters.
LEFT_OUT = {"mixtral": BLOCKS, "gpt-oss": BLOCKS, "lfm2": 2}

# Adapters in the first block and the last; the one between is frozen whole.
LORA = _seeded(lambda: with_lora(_transformer("LlamaConfig", **COMMON)(), "q_proj", blocks=("layers.0.", "layers.2.")))

UNSUPPORTED: dict[str, Factory] = {
    "convolution": _seeded(ConvolutionModel),
    "lstm": _seeded(RecurrentModel),
    "t5": _seeded(_t5),  # needs decoder inputs besides token ids
}
