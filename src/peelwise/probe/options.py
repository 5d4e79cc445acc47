"""The text of a probe and how it is drawn. No torch: the command line makes its options from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peelwise.errors import ProbeError
from peelwise.records.options import option

if TYPE_CHECKING:
    from peelwise.probe.texts import Document

TOKENS, SEQUENCE_LENGTH = 6_400, 128


@dataclass(frozen=True)
class ProbeOptions:
    """From which text a probe is drawn, and how; the model's own tokenizer reads it.

    Attributes:
        text: Files of text: .txt, .jsonl, .parquet or - for standard input. Default: the Python reference prose of the
            standard library.
        field: Field of .jsonl and .parquet files that holds the text, or lists of messages.
        tokens: Tokens of text to use at most.
        sequence_length: Tokens per sequence.
        in_distribution: The text is what the model was trained on.
        seed: Seed that draws and splits the text.

    Raises:
        ProbeError: If a size is not allowed.
    """

    text: Sequence[str | Path] = option(
        (),
        "Files of text: .txt, .jsonl, .parquet or - for standard input.",
        panel="Text",
        rule="the Python reference prose of the standard library",
    )
    field: str = option(
        "text", "Field of .jsonl and .parquet files that holds the text, or lists of messages.", panel="Text"
    )
    tokens: int = option(TOKENS, "Tokens of text to use at most.", panel="Text")
    sequence_length: int = option(SEQUENCE_LENGTH, "Tokens per sequence.", panel="Text")
    in_distribution: bool = option(False, "The text is what the model was trained on.", panel="Text")
    seed: int = option(0, "Seed that draws and splits the text.", panel="Text")

    def __post_init__(self) -> None:
        check_sizes(self.tokens, self.sequence_length)

    @property
    def source(self) -> str:
        """What the text is called in the record."""
        if not self.text:
            return "Python reference prose (pydoc_data.topics)"
        return ", ".join("standard input" if str(path) == "-" else Path(path).name for path in self.text)

    def documents(self) -> list[Document]:
        """Return the texts or conversations of the files; the reference prose if there are none.

        Raises:
            ProbeError: If a file is missing, empty, not UTF-8, malformed or lacks the field.
            MissingExtraError: If a ``.parquet`` file is given and pyarrow is not installed.
        """
        from peelwise.probe.texts import read_texts, reference_prose

        if self.text:
            return read_texts(self.text, field=self.field, seed=self.seed)
        return list(reference_prose())


def check_sizes(tokens: int | None, sequence_length: int) -> None:
    """Refuse a probe without tokens.

    Raises:
        ProbeError: If a size is below 1.
    """
    if sequence_length < 1:
        raise ProbeError(f"The sequence length must be at least 1 token, got {sequence_length}.")
    if tokens is not None and tokens < 1:
        raise ProbeError(f"The number of tokens must be positive, got {tokens}. Leave it out for the default.")
