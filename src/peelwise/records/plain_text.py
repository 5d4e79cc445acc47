"""Text from outside, made fit for a terminal."""

from __future__ import annotations


def clean(text: str) -> str:
    """Return ``text`` without characters that could steer a terminal or reorder a line.

    A model name may come from anywhere; an escape sequence or a right-to-left override in it must not be
    able to make one verdict look like another.

    Args:
        text: Any string of a record.

    Returns:
        The same text, white space made plain and unprintable characters replaced by U+FFFD.
    """
    return "".join(" " if c.isspace() else c if c.isprintable() else "\ufffd" for c in text)
