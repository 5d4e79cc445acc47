"""How a model is opened. No torch: the command line makes its options from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peelwise.records.options import option

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class OpenOptions:
    """How a model is opened from disk; nothing of it matters for a module that is given as such.

    Attributes:
        device: Where the model runs: auto (CUDA if there is any), cpu, cuda or cuda:N.
        dtype: Dtype of the weights; auto: float32 on the CPU, elsewhere the checkpoint's own.
        allow_pickle: Also open pickled weights.
        as_stored: Keep the codes of a .gguf file instead of dequantising them, so that witnesses have the same bits.
        tokenizer: Folder of the tokenizer. Default: the model's own.
        stream: Leave the weights in their safetensors files, in the stored dtype, and read them as they are needed.
            Default: where a copy in float32 would not fit into memory.
    """

    device: str = option(
        "auto", "Where the model runs: auto (CUDA if there is any), cpu, cuda or cuda:N.", panel="Model"
    )
    dtype: Dtype = option(
        "auto", "Dtype of the weights; auto: float32 on the CPU, elsewhere the checkpoint's own.", panel="Model"
    )
    allow_pickle: bool = option(False, "Also open pickled weights.", panel="Model")
    as_stored: bool = option(
        False,
        "Keep the codes of a .gguf file instead of dequantising them, so that witnesses have the same bits.",
        panel="Model",
    )
    tokenizer: str | Path | None = option(None, "Folder of the tokenizer.", panel="Model", rule="the model's own")
    stream: bool = option(
        False,
        "Leave the weights in their safetensors files, in the stored dtype, and read them as they are needed.",
        panel="Model",
        rule="where a copy in float32 would not fit into memory",
    )


@dataclass(frozen=True)
class ShardedOptions(OpenOptions):
    """How a model is opened from disk by several processes that measure it together (``torch.distributed``).

    Attributes:
        device: Where the model runs: auto (CUDA if there is any), cpu, cuda, cuda:N or mps.
        dtype: Dtype of the weights; auto: float32 on the CPU, elsewhere the checkpoint's own.
        allow_pickle: Also open pickled weights.
        as_stored: Keep the codes of a .gguf file instead of dequantising them, so that witnesses have the same bits.
        tokenizer: Folder of the tokenizer. Default: the model's own.
        stream: Leave the weights in their safetensors files, in the stored dtype, and read them as they are needed.
            Default: where a copy in float32 would not fit into memory.
        shard: Spread the weights over the processes of torchrun: each keeps its part, and gathers a block when it runs.
    """

    shard: bool = option(
        False,
        "Spread the weights over the processes of torchrun: each keeps its part, and gathers a block when it runs.",
        panel="Model",
    )
