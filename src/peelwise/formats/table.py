"""The formats by name, and what users write: ``int4:group=64,affine``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from peelwise.errors import FormatError
from peelwise.formats.base import Format
from peelwise.formats.binary import Binary
from peelwise.formats.dense import Dense
from peelwise.formats.integer import Integer
from peelwise.formats.layout import Layout
from peelwise.formats.masked import Banded, BlockDiagonal, Masked, NOfM, Pattern
from peelwise.formats.scaled import SCALE_DTYPES
from peelwise.formats.superblock import TYPES, SuperBlock
from peelwise.formats.ternary import Ternary
from peelwise.formats.uneven import UNEVEN, Uneven

_LAYOUTS: Mapping[str, Layout] = {per: Layout(per) for per in ("model", "tensor", "channel")}
_PATTERNS: Mapping[str, Callable[[str], Pattern]] = {
    "blocks": lambda text: BlockDiagonal(int(text)),
    "band": lambda text: Banded(int(text)),
    "keep": lambda text: NOfM(*map(int, text.split(":"))),
}


def _dense(options: dict[str, Any]) -> Format:
    return Dense(options.pop("dtype", Dense.dtype))


def _binary(options: dict[str, Any]) -> Format:
    return Binary(options.pop("layout", Layout("channel")), **_scale(options))


def _ternary(options: dict[str, Any]) -> Format:
    measure = options.pop("measure", "absmean")
    return Ternary(options.pop("layout", Layout("tensor")), **_scale(options), measure=measure)


def _integer(width: int) -> Callable[[dict[str, Any]], Format]:
    def make(options: dict[str, Any]) -> Format:
        kind = options.pop("kind", "symmetric")
        return Integer(options.pop("layout", Layout("channel")), **_scale(options), width=width, kind=kind)

    return make


def _uneven(table: str) -> Callable[[dict[str, Any]], Format]:
    def make(options: dict[str, Any]) -> Format:
        eight_bits = table.startswith("float8")
        layout = options.pop("layout", Layout("channel") if eight_bits else Layout("group", 64))
        # The largest eight-bit number is 448 or more, so half precision would leave few digits of a scale.
        scale = {"scale_dtype": torch.float32} if eight_bits else {}
        return Uneven(layout, **(scale | _scale(options)), table=table)

    return make


def _superblock(kind: str) -> Callable[[dict[str, Any]], Format]:
    return lambda options: SuperBlock.of(kind)


# A family takes the options that it knows; what it leaves is an error.
FAMILIES: Mapping[str, Callable[[dict[str, Any]], Format]] = {
    "dense": _dense,
    "binary": _binary,
    "ternary": _ternary,
    **{f"int{width}": _integer(width) for width in range(2, 9)},
    **{table: _uneven(table) for table in UNEVEN},
    **{kind: _superblock(kind) for kind in TYPES},
}

_WORDS: Mapping[str, tuple[str, Any]] = {
    **{word: ("layout", layout) for word, layout in _LAYOUTS.items()},
    **{word: ("measure", word) for word in ("absmean", "absmedian")},
    **{word: ("kind", word) for word in ("symmetric", "affine", "minimum")},
    **{word: ("dtype", dtype) for word, dtype in SCALE_DTYPES.items()},
}

SYNTAX = """NAME or NAME:OPTION,OPTION... Names: dense, binary, ternary, int2 to int8, nf4, fp4,
float8_e4m3, float8_e5m2, and GGUF's q2_k to q6_k. One scale per: model, tensor, channel, group=N, block=N (N x N
weights). Stored scales: scale=float16 (default), bfloat16, float32.
ternary: absmean (default), absmedian. int2 to int8: symmetric (default), affine, minimum.
dense: float32 (default), float16, bfloat16.
Fixed support, for any of them: blocks=N (block-diagonal), band=N, keep=N:M.
Examples: binary   ternary:channel   int4:group=64,affine   binary:model,blocks=8"""


def parse_format(text: str) -> Format:
    """Return the format that ``text`` names; `SYNTAX` says how.

    Args:
        text: such as ``"int4:group=64,symmetric"``. Defaults: a scale per channel (ternary: per tensor), stored as
            float16, symmetric, absmean.

    Raises:
        FormatError: With the word that was not understood.

    Example:
        >>> parse_format("ternary").name
        'ternary:tensor'
    """
    family, _, rest = text.strip().lower().partition(":")
    if family not in FAMILIES:
        raise FormatError(f"Unknown format {text!r}: expected one of {', '.join(FAMILIES)}. Example: int4:group=64.")
    options: dict[str, Any] = {}
    for word in filter(None, (word.strip() for word in rest.split(","))):
        key, value = _option(word, text)
        if key in options:
            raise FormatError(f"{text!r}: {word!r} contradicts an option before it. Give one of the two.")
        options[key] = value
    pattern = options.pop("pattern", None)
    made = FAMILIES[family](options)
    if options:
        raise FormatError(f"{text!r}: {family} has no option {next(iter(options))!r}. {SYNTAX.splitlines()[0]}")
    return made if pattern is None else Masked(made, pattern)


def _option(word: str, text: str) -> tuple[str, Any]:
    """Return what one option sets, and to what."""
    if word in _WORDS:
        return _WORDS[word]
    key, _, value = word.partition("=")
    try:
        if key == "group":
            return "layout", Layout("group", int(value))
        if key == "block":
            return "layout", Layout("block", int(value))
        if key == "scale" and value in SCALE_DTYPES:
            return "scale_dtype", SCALE_DTYPES[value]
        if key in _PATTERNS:
            return "pattern", _PATTERNS[key](value)
    except (ValueError, TypeError) as error:
        if isinstance(error, FormatError):
            raise
    raise FormatError(
        f"{text!r}: {word!r} is not understood. Expected one of {', '.join(_WORDS)}, group=N, block=N, scale=float32, "
        "blocks=N, band=N, keep=N:M."
    )


def _scale(options: dict[str, Any]) -> dict[str, Any]:
    """Take the option that all scaled formats have."""
    return {key: options.pop(key) for key in ("scale_dtype",) if key in options}
