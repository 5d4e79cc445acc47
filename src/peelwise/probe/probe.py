"""Probes: token sequences or other examples split into ``fit``, ``select`` and ``report``, with a fingerprint.

Statistics come from ``fit``, every choice is made on ``select``, and every number shown is from ``report``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peelwise.errors import FewSequencesWarning, ProbeError
from peelwise.probe.answers import Row, conversation_rows, labelled
from peelwise.probe.batches import split_examples
from peelwise.probe.examples import Examples, Loss
from peelwise.probe.options import SEQUENCE_LENGTH, TOKENS, ProbeOptions, check_sizes
from peelwise.probe.rows import Split, padded
from peelwise.probe.sequences import as_rows, cut, sequences_of
from peelwise.probe.split import PARTS, Pool, draw_parts, split_faults
from peelwise.probe.stored import fingerprint, restored, stored
from peelwise.probe.texts import Document, text_of
from peelwise.records.base import NATS, ProbeRecord

if TYPE_CHECKING:
    from peelwise.probe.rolling import RollingProbe

MESSAGES_LENGTH = 1024  # predicted tokens of a conversation
SHARES = (0.5, 0.15, 0.35)  # of fit, select and report
_FEW_REPORT_SEQUENCES = 8
_CHARACTERS_PER_TOKEN = 200  # read from a data set: some fifty times what is needed, so streams end


@dataclass(frozen=True, eq=False)
class Probe:
    """What an audit measures on, split by sequence or example into three disjoint parts.

    Args:
        fit: Sequences for statistics.
        select: Sequences for the choice of damping, step length and rounds.
        report: Sequences for every number shown.
        source: Where the text comes from, for the record.
        in_distribution: Whether the model was trained on text of this kind.
        seed: The seed that drew and split the sequences.
        pool: What they were drawn from; ``None`` if that is not known.
        documents: Number of the document of each sequence by part, ``[sequences]``, where documents were split.
    """

    fit: Split
    select: Split
    report: Split
    source: str
    in_distribution: bool = False
    seed: int = 0
    pool: Pool | None = None
    documents: Mapping[str, Tensor] | None = None

    @classmethod
    def from_text(
        cls,
        text: str | Sequence[str],
        tokenizer: Any,
        *,
        tokens: int | None = TOKENS,
        sequence_length: int = SEQUENCE_LENGTH,
        seed: int = 0,
        in_distribution: bool = False,
        source: str = "text",
        shares: Sequence[float] = SHARES,
    ) -> Probe:
        """Tokenise documents, cut them into sequences and split those.

        Sequences do not overlap or cross documents; only documents shorter than one sequence are joined, with
        the tokenizer's end-of-text token between them. A tokenizer that opens every text with a
        beginning-of-text token has it put in front of every sequence. Of more than 4 Mi characters, random pieces
        from everywhere are tokenised, several times what ``tokens`` asks for.

        Args:
            text: One document or several.
            tokenizer: A Hugging Face tokenizer, or anything with ``encode(text)``.
            tokens: Upper limit of predicted tokens in all parts together; ``None`` takes all.
            sequence_length: Predicted tokens per sequence; a sequence has one id more.
            seed: Draws and splits the sequences; the global generators are not touched.
            in_distribution: Whether the model was trained on text of this kind.
            source: Where the text comes from, for the record.
            shares: Shares of ``fit``, ``select`` and ``report`` among the sequences.

        Raises:
            ProbeError: If the text is empty, or too short for 2 + 1 + 2 different sequences.
        """
        sequences, numbers = sequences_of(text, tokenizer, tokens=tokens, sequence_length=sequence_length, seed=seed)
        return cls._assemble(
            sequences, numbers, tokens, shares, source=source, in_distribution=in_distribution, seed=seed
        )

    @classmethod
    def from_options(
        cls, options: ProbeOptions, tokenizer: Any, *, documents: Sequence[Document] | None = None
    ) -> Probe:
        """Draw a probe as the command line does: from files, or the reference prose if there are none.

        Conversations are sequences of their own, cut after 1,024 tokens or the sequence length if that is more.

        Args:
            options: Which text, and how it is drawn.
            tokenizer: A Hugging Face tokenizer, or anything with ``encode(text)``.
            documents: The text, if it was read already.

        Raises:
            ProbeError: If the text cannot be read, is empty or too short.
        """
        found: list[Any] = options.documents() if documents is None else list(documents)
        about: dict[str, Any] = {
            "tokens": options.tokens,
            "seed": options.seed,
            "in_distribution": options.in_distribution,
            "source": options.source,
        }
        if found and isinstance(found[0], list):
            longest = max(options.sequence_length, MESSAGES_LENGTH)
            return cls.from_messages(found, tokenizer, sequence_length=longest, **about)
        return cls.from_text(found, tokenizer, sequence_length=options.sequence_length, **about)

    @classmethod
    def from_tokens(
        cls,
        sequences: Tensor | Sequence[Sequence[int]] | Sequence[int],
        *,
        labels: Tensor | Sequence[Sequence[int]] | None = None,
        tokens: int | None = TOKENS,
        sequence_length: int = SEQUENCE_LENGTH,
        seed: int = 0,
        in_distribution: bool = False,
        source: str = "tokens",
        shares: Sequence[float] = SHARES,
    ) -> Probe:
        """Split token ids; the other arguments are those of :meth:`from_text`.

        Args:
            sequences: Rows of ids (a matrix or ragged lists) are kept whole, whatever their length, and
                padded on the right; one long stream is cut into sequences of ``sequence_length + 1``.
            labels: For rows: the ids again, with -100 for each that the model reads and is not asked for, as in a
                training on answers only. Not shifted. Rows that ask for nothing are left out.
            tokens: Upper limit of tokens in all parts together, those that are only read included; ``None`` takes all.
            sequence_length: Predicted tokens per sequence; used for a stream only.
            seed: Draws and splits the sequences.
            in_distribution: Whether the model was trained on text of this kind.
            source: Where the tokens come from, for the record.
            shares: Shares of ``fit``, ``select`` and ``report`` among the sequences.

        Raises:
            ProbeError: If ids are no integers, negative, or too few for 2 + 1 + 2 different sequences; if labels do not
                fit them.
        """
        check_sizes(tokens, sequence_length)
        ids = as_rows(sequences)
        if labels is not None:
            if not isinstance(ids, list) or len(labels) != len(ids):
                raise ProbeError("Labels belong to rows of token ids: expected one row of them for each.")
            rows = [labelled(row, own, f"Row {i}") for i, (row, own) in enumerate(zip(ids, labels, strict=True))]
        else:
            rows = [Row(row) for row in (ids if isinstance(ids, list) else cut(ids.tolist(), sequence_length + 1))]
        rows = [row for row in rows if row.is_asked]  # a single id predicts nothing
        if not rows:
            raise ProbeError(
                f"The tokens are too few: one sequence needs {sequence_length + 1} from a stream, "
                "or a row of at least 2 of which one is asked for. Give more tokens or a shorter sequence length."
            )
        return cls._of_rows(rows, tokens, shares, source=source, in_distribution=in_distribution, seed=seed)

    @classmethod
    def from_messages(
        cls,
        conversations: Iterable[Any],
        tokenizer: Any,
        *,
        tokens: int | None = TOKENS,
        sequence_length: int = MESSAGES_LENGTH,
        seed: int = 0,
        in_distribution: bool = False,
        source: str = "conversations",
        shares: Sequence[float] = SHARES,
    ) -> Probe:
        """Write conversations with the tokenizer's chat template, and ask for the assistant's messages alone.

        A conversation is one sequence, cut after ``sequence_length`` predicted tokens; the model reads all of it, and
        losses, statistics of targets and gains are of the answers. The other arguments are those of :meth:`from_text`.

        Args:
            conversations: Lists of messages with ``role`` and ``content``, or mappings with such a list as
                ``messages``.
            tokenizer: A Hugging Face tokenizer with a chat template.
            tokens: Upper limit of tokens in all parts together, those that are only read included; ``None`` takes all.
            sequence_length: Predicted tokens of a conversation at most.
            seed: Draws and splits the conversations.
            in_distribution: Whether the model was trained on conversations of this kind.
            source: Where they come from, for the record.
            shares: Shares of ``fit``, ``select`` and ``report`` among the conversations.

        Raises:
            ProbeError: If there is no chat template, one that cannot write them, or too few conversations.
        """
        check_sizes(tokens, sequence_length)
        rows = list(conversation_rows(conversations, tokenizer, sequence_length))
        if not rows:
            raise ProbeError("No conversation has an answer of the assistant to predict. Give more conversations.")
        return cls._of_rows(rows, tokens, shares, source=source, in_distribution=in_distribution, seed=seed)

    @classmethod
    def from_dataset(
        cls,
        rows: Iterable[Mapping[str, Any] | str],
        tokenizer: Any,
        *,
        field: str = "text",
        tokens: int | None = TOKENS,
        sequence_length: int = SEQUENCE_LENGTH,
        seed: int = 0,
        in_distribution: bool = False,
        source: str = "dataset",
        shares: Sequence[float] = SHARES,
    ) -> Probe:
        """Read rows of a data set as documents; the other arguments are those of :meth:`from_text`.

        Rows are read in order until they hold 200 characters per token asked for, so an endless stream will
        do; with ``tokens=None`` all are read.

        Raises:
            ProbeError: If a row lacks ``field``, or for the reasons of :meth:`from_text`.
        """
        check_sizes(tokens, sequence_length)
        enough = math.inf if tokens is None else _CHARACTERS_PER_TOKEN * tokens
        documents, characters = [], 0
        for number, row in enumerate(rows):
            documents.append(text_of(row, field, f"Row {number}"))
            characters += len(documents[-1])
            if characters >= enough:
                break
        return cls.from_text(
            documents,
            tokenizer,
            tokens=tokens,
            sequence_length=sequence_length,
            seed=seed,
            in_distribution=in_distribution,
            source=source,
            shares=shares,
        )

    @classmethod
    def rolling(cls, text: Any, tokenizer: Any | None = None, **options: Any) -> RollingProbe:
        """Draw a large probe of which a monitor measures another part each time, and puts together what it finds.

        A few sequences to report on are kept for the curve of the loss. An audit measures on all of it.

        Args:
            text: Documents, or rows or a stream of token ids, as for :meth:`from_text` and :meth:`from_tokens`; or a
                data set with ``len(data)`` and ``data[i]``, such as the one that is trained on, which is read by random
                index: texts, mappings with ``field``, which holds a text or a list of messages, token ids, or mappings
                with ``input_ids`` (and ``labels``). Random states are the same afterwards.
            tokenizer: As for :meth:`from_text`; ``None`` for token ids.
            options: ``tokens`` (of the corpus, 200,000), ``each`` (of one measurement at most, 8,192), ``field`` (of a
                data set's text), and the other arguments of :meth:`from_text`.

        Raises:
            ProbeError: If there are not enough sequences for two measurements, or as :meth:`from_text` does.
        """
        from peelwise.probe.rolling import rolling_probe  # which is made from probes

        return rolling_probe(text, tokenizer, **options)

    @classmethod
    def from_batches(
        cls,
        batches: Iterable[Mapping[str, Any]],
        loss: Loss | None = None,
        *,
        unit: str = "loss",
        seed: int = 0,
        in_distribution: bool = False,
        source: str = "batches",
        shares: Sequence[float] = SHARES,
    ) -> Probe:
        """Split batches of a model that predicts no next tokens by example: masked models, classifiers, images, pairs.

        Losses and gains are means over examples, in ``unit``. `peelwise.check` and `peelwise.audit` take such a probe.

        Args:
            batches: Mappings of keyword arguments for the model's forward, such as those of a data loader; all are
                read. The first dimension of every tensor is that of the examples; a tensor that the forward does not
                take is for the loss alone. Beside an ``attention_mask`` (of an encoder-decoder:
                ``decoder_attention_mask``) rows of ids may be of different lengths, and padding does not count for the
                statistics of layers. Equal examples count once.
            loss: Maps what the model returns and the batch to the loss of each example, ``[examples]``, that can be
                differentiated and whose mean is not below 0. ``None``: the mean cross-entropy of the ``labels`` of
                each, those of -100 left out, where that is what the model computes itself; examples that ask for
                nothing are left out.
            unit: What the loss is in, in a few words, for the record and its pages.
            seed: Draws and splits the examples.
            in_distribution: Whether the model was trained on examples of this kind.
            source: Where they come from, for the record.
            shares: Shares of ``fit``, ``select`` and ``report`` among the examples.

        Raises:
            ProbeError: If tensors of a batch disagree about the number of examples, or hold NaN or Inf; if there are
                fewer than 2 + 1 + 2 different examples; if there is neither a loss nor labels of classes.

        Example:
            >>> batches = [{"pixel_values": images, "labels": classes} for images, classes in loader]
            >>> peelwise.check(vit, peelwise.Probe.from_batches(batches))
        """
        (fit, select, report), pool = split_examples(batches, loss, unit, shares, seed)
        return cls(fit, select, report, source, in_distribution, seed, pool)

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        source: str,
        in_distribution: bool = False,
        seed: int = 0,
        pool: Pool | None = None,
        loss: Loss | None = None,
        unit: str = "loss",
    ) -> Probe:
        """Restore what :meth:`to_tensors` wrote, with the same fingerprint.

        ``loss`` and ``unit`` are those of :meth:`from_batches`, which no tensor says.

        Raises:
            ProbeError: If a tensor is missing, or its shape or values cannot be a probe.
        """
        splits, documents = restored(tensors, loss, unit)
        return cls(
            **splits,
            source=source,
            in_distribution=in_distribution,
            seed=seed,
            pool=pool,
            documents=documents,
        )

    @classmethod
    def _of_rows(cls, rows: Sequence[Row], tokens: int | None, shares: Sequence[float], **about: Any) -> Probe:
        """Split rows; of two with the same ids the first counts."""
        probe = cls._assemble([row.ids for row in rows], None, tokens, shares, **about)
        asked = {tuple(row.ids): row.asked for row in reversed(rows)}
        if all(each is None for each in asked.values()):
            return probe

        def asking(split: Split) -> Split:
            found = torch.zeros_like(split.mask)
            for place, row in enumerate(split.rows()):
                wanted = asked[tuple(row)]
                found[place, : len(row)] = True if wanted is None else torch.tensor(wanted)
            return replace(split, asked=found)

        return replace(probe, fit=asking(probe.fit), select=asking(probe.select), report=asking(probe.report))

    @classmethod
    def _assemble(
        cls,
        sequences: list[list[int]],
        numbers: list[int] | None,
        tokens: int | None,
        shares: Sequence[float],
        *,
        source: str,
        in_distribution: bool,
        seed: int,
    ) -> Probe:
        drawn = draw_parts(sequences, numbers, tokens, shares, seed)
        fit, select, report = drawn.parts
        positions = max(map(len, [*fit, *select, *report]))
        if len(report) < _FEW_REPORT_SEQUENCES:
            warnings.warn(
                f"Only {len(report)} sequences to report on, {_FEW_REPORT_SEQUENCES} or more are advised: "
                "intervals will be wide. Give more text, more tokens or a shorter sequence length.",
                FewSequencesWarning,
                stacklevel=3,
            )
        return cls(
            fit=padded(fit, positions),
            select=padded(select, positions),
            report=padded(report, positions),
            source=source,
            in_distribution=in_distribution,
            seed=seed,
            pool=drawn.pool,
            documents=None if drawn.documents is None else _by_part(drawn.documents),
        )

    @property
    def examples(self) -> Examples | None:
        """The examples that statistics are of, if the probe is of batches; ``None`` of token sequences."""
        return self.fit if isinstance(self.fit, Examples) else None

    @property
    def unit(self) -> str:
        """What losses are in."""
        return NATS if self.examples is None else self.examples.unit

    def split_faults(self) -> str | None:
        """Return what is wrong with how its sequences were assigned to the parts, or ``None``; see `probe.split`."""
        documents = None if self.documents is None else [self.documents[part].tolist() for part in PARTS]
        return split_faults([split.rows() for split in self._splits().values()], documents, self.pool, self.seed)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes, ids, masks (what is asked for, documents) of the parts as int64, padding as 0.

        Of batches: over name, dtype, shape and bytes of every tensor. The loss is no part of it.
        """
        return fingerprint(self._splits(), self.documents)

    def record(self) -> ProbeRecord:
        """Return the sizes and the fingerprint as plain values."""
        return ProbeRecord(
            fingerprint=self.fingerprint,
            source=self.source,
            sequence_length=self.fit.ids.shape[1] - 1,
            fit_tokens=self.fit.tokens,
            select_tokens=self.select.tokens,
            report_tokens=self.report.tokens,
            fit_sequences=self.fit.sequences,
            select_sequences=self.select.sequences,
            report_sequences=self.report.sequences,
            in_distribution=self.in_distribution,
            pool_sequences=self.pool.sequences if self.pool else None,
            pool_sha256=self.pool.sha256 if self.pool else None,
            pool_left_out=self.pool.left_out if self.pool else None,
            documents=self.pool.documents if self.pool else None,
            unit=self.unit,
            loss=None if self.examples is None else "labels" if self.examples.loss is None else "given",
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """Return ``<part>.ids [sequences, positions]`` and ``<part>.lengths [sequences]``, int32 on CPU.

        Where not every token is asked for, ``<part>.asked [sequences, positions]`` too, uint8. Of batches:
        ``<part>.column.<name> [examples, ...]``.
        """
        return stored(self._splits(), self.documents)

    def to(self, device: torch.device | str) -> Probe:
        """Return the same probe on ``device``."""
        return replace(self, fit=self.fit.to(device), select=self.select.to(device), report=self.report.to(device))

    def _splits(self) -> dict[str, Split]:
        return {part: getattr(self, part) for part in PARTS}


def _by_part(numbers: Iterable[Sequence[int]]) -> dict[str, Tensor]:
    return {part: torch.tensor(values) for part, values in zip(PARTS, numbers, strict=True)}
