"""Which tokens of a sequence count as targets, where that is not all of them: the answers in conversations.

A training on conversations takes the loss of what the assistant says and lets the model read all the rest: labels of
the rest are -100 (``ignore_index``). A probe of such a training asks for the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peelwise.errors import ProbeError

IGNORED = -100
ANSWERS_BY = "assistant"  # the role whose messages are answers
# Keys under which data sets that were tokenised for such a training keep what counts.
_MASKS = ("assistant_masks", "completion_mask")


@dataclass(frozen=True)
class Row:
    """A sequence of ids, and which of them count as targets; ``None`` for all."""

    ids: list[int]
    asked: tuple[bool, ...] | None = None

    @property
    def labels(self) -> list[int]:
        """The ids, -100 where they do not count."""
        asked = self.asked or (True,) * len(self.ids)
        return [one if wanted else IGNORED for one, wanted in zip(self.ids, asked, strict=True)]

    @property
    def is_asked(self) -> bool:
        """Whether anything of it is to be predicted; the first token never is."""
        return len(self.ids) > 1 if self.asked is None else any(self.asked[1:])


def labelled(ids: Sequence[int], labels: Any, where: str) -> Row:
    """Return a row of which those tokens count whose label is not -100.

    Args:
        ids: of the sequence.
        labels: one per id, -100 or the id itself: not shifted, as transformers' models take them.
        where: how an error names the row.

    Raises:
        ProbeError: If there are not as many, or a label is another token than its own.
    """
    wanted = torch.as_tensor(labels).flatten().tolist()
    if len(wanted) != len(ids):
        raise ProbeError(f"{where}: {len(wanted)} labels for {len(ids)} token ids, expected one for each.")
    for place, (label, one) in enumerate(zip(wanted, ids, strict=True)):
        if label not in (IGNORED, one):
            raise ProbeError(
                f"{where}: label {label} at position {place}, where the token is {one}. Expected the token or "
                f"{IGNORED}: labels are not shifted."
            )
    return Row(list(ids), tuple(label != IGNORED for label in wanted))


def masked(item: Mapping[str, Any], ids: Sequence[int], where: str) -> Row:
    """Return the row of an item of a data set that was tokenised for a training, by its labels or masks if it has any.

    Raises:
        ProbeError: If they do not fit the ids.
    """
    if item.get("labels") is not None:
        return labelled(ids, item["labels"], where)
    for key in _MASKS:
        if item.get(key) is not None:
            asked = torch.as_tensor(item[key]).flatten().tolist()
            if len(asked) != len(ids):
                raise ProbeError(f"{where}: {key} has {len(asked)} entries for {len(ids)} token ids.")
            return Row(list(ids), tuple(map(bool, asked)))
    return Row(list(ids))


def conversation_rows(conversations: Iterable[Any], tokenizer: Any, longest: int) -> Iterator[Row]:
    """Yield conversations as their tokenizer's chat template writes them, asking for the assistant's messages alone.

    What an answer is made of is found by writing the conversation up to it and with it, so any template will do of
    which the one text begins with the other. A conversation is cut after ``longest`` predicted tokens, and left out
    where no answer begins before.

    Args:
        conversations: lists of messages, each with ``role`` and ``content``; or mappings with these as ``messages``.
        tokenizer: with a chat template.
        longest: predicted tokens of a sequence, at most.

    Raises:
        ProbeError: If the tokenizer has no chat template, a conversation is none, or the template writes a conversation
            otherwise once it goes on.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ProbeError(
            f"{type(tokenizer).__name__} has no chat template to write conversations with. Use the tokenizer of a chat "
            "model, or give token ids and labels to Probe.from_tokens."
        )
    for number, conversation in enumerate(conversations):
        where = f"Conversation {number}"
        row = _written(_messages(conversation, where), tokenizer, where)
        row = Row(row.ids[: longest + 1], None if row.asked is None else row.asked[: longest + 1])
        if row.is_asked:
            yield row


def _messages(conversation: Any, where: str) -> list[Mapping[str, Any]]:
    if isinstance(conversation, Mapping):
        conversation = conversation.get("messages")
    if isinstance(conversation, str) or not isinstance(conversation, Sequence):
        raise ProbeError(f"{where}: expected a list of messages, or a mapping with one as 'messages'.")
    for message in conversation:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ProbeError(f"{where}: expected messages with 'role' and 'content', got {str(message)[:60]!r}.")
    return list(conversation)


def _written(messages: Sequence[Mapping[str, Any]], tokenizer: Any, where: str) -> Row:
    """Return a whole conversation, asking for its answers."""
    ids: list[int] = []
    asked: list[bool] = []
    for place, message in enumerate(messages):
        if message["role"] != ANSWERS_BY:
            continue
        before = _template(tokenizer, messages[:place], where, opened=True)
        after = _template(tokenizer, messages[: place + 1], where, opened=False)
        if after[: len(before)] != before or before[: len(ids)] != ids:
            raise ProbeError(
                f"{where}: the chat template of {type(tokenizer).__name__} writes its beginning otherwise once the "
                "conversation goes on, so it cannot be told which tokens are answers. Give token ids and labels to "
                "Probe.from_tokens."
            )
        asked += [False] * (len(before) - len(ids)) + [True] * (len(after) - len(before))
        ids = after
    return Row(ids, tuple(asked))


def _template(tokenizer: Any, messages: Sequence[Mapping[str, Any]], where: str, *, opened: bool) -> list[int]:
    """Return the ids of some messages; with ``opened``, and the words that an answer begins behind."""
    if not messages:
        return []  # templates want a message: an answer to nothing is asked for as a whole
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opened)
    except Exception as error:  # templates raise what they like
        raise ProbeError(f"{where}: its chat template cannot write it: {str(error)[:120]}") from error
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
