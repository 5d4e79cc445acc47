"""The shape of a model, read from its config: built on the meta device, where tensors have sizes and no values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from peelwise.errors import UnsupportedModelError
from peelwise.model.architectures import find_blocks, find_head, refuse_text
from peelwise.model.checkpoint_config import checked_config, on_meta
from peelwise.model.checkpoint_files import read_config
from peelwise.model.checkpoints import gguf_options, locate
from peelwise.model.experts import ExpertLinear
from peelwise.model.layers import Block, LinearLayer, named_embedding, parameter_count, vocabulary_size
from peelwise.model.loading import contained
from peelwise.model.parts import ATTENTION, parts_of
from peelwise.records.plan import InputGroup, Shape

_BYTES = {"float32": 4.0, "float64": 8.0}  # of a weight; all others that configs name have two
_CHOSEN = ("num_experts_per_tok", "moe_top_k", "top_k", "moe_topk", "num_experts_per_token", "num_selected_experts")


def read_shape(source: str | Path) -> Shape:
    """Return the shape of a model from its config; no weight is read.

    Args:
        source: a folder with ``config.json``, that file itself, a ``.gguf`` file, or ``"smollm2"``.

    Raises:
        ModelError: If it cannot be found, or its config is damaged.
        UnsupportedModelError: If it is no causal language model of transformers, or has no blocks.
        MissingExtraError: If transformers, gguf or the packaged model is not installed.
    """
    path, name = _located(source)
    with contained():
        if path.is_file():
            config, streamable, stored = gguf_options(path)[0], False, float(path.stat().st_size)
        else:
            said = read_config(path)
            config, streamable = checked_config(path, said), "quantization_config" not in said
            stored = float(sum(file.stat().st_size for file in path.glob("*.safetensors")))
        model = on_meta(path, config)
    stored = stored or _bytes_of(config) * parameter_count(model)
    return shape_of(model, name, stored / parameter_count(model), streamable=streamable)


def shape_of(model: nn.Module, name: str, stored_bytes_per_weight: float, *, streamable: bool = True) -> Shape:
    """Return the shape of a model, whose tensors need no values.

    Within a branch of a block the layers before the last that have inputs of one width are taken to share them, as
    queries, keys and values, and gate and up do.

    Args:
        model: a decoder-only language model; see `find_blocks`.
        name: for people.
        stored_bytes_per_weight: what a weight takes in the file.
        streamable: whether its weights can stay there.

    Raises:
        UnsupportedModelError: If it has no blocks, or no embedding tells its vocabulary.
    """
    refuse_text(model)
    blocks = find_blocks(model)
    vocabulary = vocabulary_size(model)
    if vocabulary is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no embedding that tells how many tokens it knows.")
    share = _routed(getattr(model, "config", None))
    groups: Counter[tuple[int, tuple[int, ...], float, bool]] = Counter()
    attention = 0
    for block in blocks:
        for linears in _sharing(block):
            outputs = tuple(sorted((linear.weight().shape[0] for linear in linears), reverse=True))
            expert = linears[0].is_expert
            groups[linears[0].weight().shape[1], outputs, share(linears[0]) if expert else 1.0, expert] += 1
        attention += sum(b.writer.weight().shape[1] for b in parts_of(block).branches if b.name == ATTENTION)
    head, embedding = find_head(model, blocks), named_embedding(model, "input")
    return Shape(
        name=name,
        architecture=type(model).__name__,
        parameters=parameter_count(model),
        width=_width(blocks),
        depth=len(blocks),
        vocabulary=vocabulary,
        tied=head is not None and embedding is not None and head.weight is embedding.weight,
        attention_width=attention,
        groups=tuple(
            InputGroup(inputs=inputs, outputs=outputs, count=count, routed=routed, expert=expert)
            for (inputs, outputs, routed, expert), count in groups.items()
        ),
        stored_bytes_per_weight=stored_bytes_per_weight,
        streamable=streamable,
    )


def _located(source: str | Path) -> tuple[Path, str]:
    """Return the folder or ``.gguf`` file that a source names, and a name for it."""
    path = Path(source)
    alone = path.name == "config.json" and path.is_file()
    return locate(path.absolute().parent if alone else source)


def _sharing(block: Block) -> Iterator[list[LinearLayer]]:
    """Yield the layers of a block that are given one input; experts have each their own."""
    for branch in parts_of(block).branches:
        *readers, writer = branch.linears
        by_width: dict[int, list[LinearLayer]] = {}
        for linear in readers:
            by_width.setdefault(linear.weight().shape[1], []).append(linear)
        yield from by_width.values()
        yield [writer]
    yield from ([linear] for linear in block.linears if linear.is_expert)


def _routed(config: Any) -> Any:
    """Return what tells which share of the tokens one expert's matrix is given."""
    config = getattr(config, "text_config", config)
    chosen = next((found for key in _CHOSEN if isinstance(found := getattr(config, key, None), int)), 1)

    def share(linear: LinearLayer) -> float:
        assert isinstance(linear.module, ExpertLinear)
        return min(1.0, chosen / linear.module.stack.count)

    return share


def _width(blocks: tuple[Block, ...]) -> int:
    """Return the channels of the residual stream: what the layers that write to it have as outputs."""
    for block in blocks:
        for branch in parts_of(block).branches:
            return int(branch.writer.weight().shape[0])
    raise UnsupportedModelError("None of the blocks has a linear layer, so there is nothing to plan.")


def _bytes_of(config: Any) -> float:
    dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return _BYTES.get(dtype, 2.0)
