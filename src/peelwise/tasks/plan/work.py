"""Operations and weights read, of what the stages are made of.

A product of ``[a, b]`` and ``[b, c]`` is ``2 a b c`` operations. Decompositions of ``n x n`` are ``9 n^3`` with
eigenvectors, ``4/3 n^3`` for eigenvalues alone, ``n^3 / 3`` for a Cholesky factor and ``2 n^2 m`` for a solve of ``m``
columns with it (Golub and Van Loan, Matrix Computations). What is done element by element is left out: it takes time on
small models and vanishes beside products on large ones.

Symbols: ``n`` tokens, ``T`` tokens of a sequence, ``d`` width, ``L`` depth, ``V`` vocabulary, ``W`` weights of all
linear layers in blocks (``A`` of which one token goes through), ``a`` the sum of heads x head_dim over blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from peelwise.records.plan import InputGroup, Shape

EIGENVECTORS, EIGENVALUES, CHOLESKY = 9.0, 4 / 3, 1 / 3
_TILE = 256  # of symmetric products, of which one triangle of tiles is computed
_BACK_OF_ATTENTION = 2.5  # of what its forward pass takes: five products instead of two
_MOST_ROWS, _TRIED = 2**16, 32  # that are compared with each other, after so many of them
_CURVED = 256  # tokens that curvature along a gradient is measured on


@dataclass(frozen=True)
class Work:
    """Operations, and how often weights go through.

    Attributes:
        operations: those of products, attention and decompositions.
        blocks: passes over the linear layers of all blocks.
        heads: passes over the output head.
        whole: passes over every parameter.
    """

    operations: float = 0.0
    blocks: float = 0.0
    heads: float = 0.0
    whole: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.operations + other.operations,
            self.blocks + other.blocks,
            self.heads + other.heads,
            self.whole + other.whole,
        )

    def __mul__(self, times: float) -> Work:
        return Work(self.operations * times, self.blocks * times, self.heads * times, self.whole * times)

    def read_bytes(self, shape: Shape, bytes_per_weight: float) -> float:
        """Return what is read from disk where memory has room for one block: passes times the weights they go through.

        Of an embedding only the rows of the tokens are read, which are few.
        """
        inside = self.blocks * shape.linear_weights + self.heads * shape.head_weights
        return bytes_per_weight * (inside + self.whole * shape.parameters)


@dataclass(frozen=True)
class Part:
    """Tokens of one part of a probe, how long a sequence is, and in how many micro-batches they go through."""

    tokens: float
    length: int
    micro_batch_tokens: int

    @property
    def batches(self) -> int:
        """Micro-batches: whole sequences, as many as fit."""
        each = max(1, self.micro_batch_tokens // self.length)
        return math.ceil(self.tokens / (each * self.length))

    def first(self, tokens: float) -> Part:
        """Return the beginning of the part."""
        return Part(min(tokens, self.tokens), self.length, self.micro_batch_tokens)


def forward(shape: Shape, part: Part, share: float = 1.0, heads: float = 1.0, *, hooked: bool = False) -> Work:
    """Return a pass forward, ``n (2 A + 4 T a) share + 2 n V d heads``, ``4 A`` instead of ``2 A`` where hooked.

    Every micro-batch reads all weights that it goes through.

    Args:
        shape: the model.
        part: the tokens.
        share: of the blocks.
        heads: 0 where no logits are computed.
        hooked: whether all layers have changes beside their weights, as in half precision, where both cannot be added.
    """
    n = part.tokens
    blocks = 2 * (1 + hooked) * shape.active_weights + 4 * part.length * shape.attention_width
    return Work(
        n * (blocks * share + 2 * shape.head_weights * heads), share * part.batches, part.batches * min(heads, 1.0)
    )


def head_gradients(shape: Shape, part: Part) -> Work:
    """Return the gradients at the last station: logits, and back through the head, ``4 n V d``.

    Nothing else goes through in between, so the head is read once.
    """
    return Work(4 * part.tokens * shape.head_weights, 0.0, 1.0)


def block_gradients(shape: Shape, part: Part, targets: int = 1) -> Work:
    """Return a pass over the blocks from the top down: once forward, and back for each set of targets.

    ``n (2 A + 4 T a) + targets n (2 A + 10 T a)``. It goes block by block, so weights are read once.
    """
    a = 4 * part.length * shape.attention_width
    ahead, back = 2 * shape.active_weights + a, 2 * shape.active_weights + _BACK_OF_ATTENTION * a
    return Work(part.tokens * (ahead + targets * back), 1.0, 0.0)


def gram(n: float, d: float) -> float:
    """Return a symmetric product of ``[n, d]``, one triangle of its tiles: ``n d (d + min(d, 256))``."""
    return n * d * (d + min(d, _TILE))


def sums(shape: Shape, part: Part, targets: int = 1, outputs: bool = True) -> Work:
    """Return the sums ``S = sum x x'`` per input and ``C = sum g x'``, ``F = sum g g'`` per layer and set of targets.

    Args:
        shape: the model.
        part: the tokens.
        targets: sets of targets that share ``S``.
        outputs: whether ``F`` is wanted.
    """
    total = 0.0
    for group in shape.groups:
        n, d = part.tokens * group.routed, group.inputs
        of_targets = sum(2 * n * d * o + (gram(n, o) if outputs else 0.0) for o in group.outputs)
        total += group.count * (gram(n, d) + targets * of_targets)
    return Work(total)


def proposals(shape: Shape, targets: int = 1, two_sided: bool = True) -> Work:
    """Return what replacement weights take once sums are known, whatever the number of tokens.

    Per input ``13 d^3`` (eigenvectors of ``S``, another part's sums in their basis); per layer ``[o, d]`` and set of
    targets ``6 o d^2`` (turned, weighed, turned back) and, for the other part, ``2 o d^2`` once; two-sided beside it
    ``o^3 / 3 + 4 o^2 d + 4 o d^2`` (a factor of ``F``, its solve, and two norms).
    """
    total = 0.0
    for group in shape.groups:
        d = group.inputs
        per_layer = 0.0
        for o in group.outputs:
            whitened = 6 * o * d * d
            outputs = CHOLESKY * o**3 + 4 * o * o * d + 4 * o * d * d if two_sided else 0.0
            per_layer += 2 * o * d * d + targets * (whitened + outputs)
        total += group.count * ((EIGENVECTORS + 4) * d**3 + per_layer)
    return Work(total)


def spectra(shape: Shape) -> Work:
    """Return the singular values of all matrices but those of experts, ``2 o d r + 4/3 r^3`` with ``r = min(o, d)``."""
    return Work(sum(_each(shape, lambda o, d: 2 * o * d * min(o, d) + EIGENVALUES * min(o, d) ** 3)), 1.0, 0.0)


def changes(shape: Shape) -> Work:
    """Return what telling the kind of a change takes at most, per matrix ``[o, d]``.

    Four spectra, and ``2 o d (o + d)`` for comparing rows and columns, which is left out above 65,536 of them.
    Embedding and head are looked at too; every tensor of both models is read.
    """

    def kind(o: float, d: float) -> float:
        r = min(o, d)
        matched = sum(2 * o * d * (_TRIED + rows) for rows in (o, d) if rows <= _MOST_ROWS)
        return 4 * (2 * o * d * r + EIGENVALUES * r**3) + matched

    ends = kind(shape.vocabulary, shape.width) * (2 - shape.tied)
    everything = [group.count * kind(o, group.inputs) for group in shape.groups for o in group.outputs]
    return Work(sum(everything) + ends, whole=2.0)


def pass_signals(shape: Shape, part: Part) -> Work:
    """Return the signals of one pass forward and back: gradients, those of weights, and what blocks do to the stream.

    Beside the pass itself, per matrix ``2 n o d`` (its gradient), a spectrum of that, and ``2 o d`` for each of 256
    tokens; per block ``6 n d^2`` (CKA), ``2 n d min(n, d) + 4/3 min(n, d)^3`` (rank of the update) and a ridge
    regression on half of the tokens.
    """
    n, d = part.tokens, shape.width
    gradients = sum(_each(shape, lambda o, d: 2 * n * o * d + 2 * min(n, _CURVED) * o * d))
    stream = 6 * n * d * d + 2 * n * d * min(n, d) + EIGENVALUES * min(n, d) ** 3 + _ridge(n / 2, d)
    own = Work(gradients + spectra(shape).operations + shape.depth * stream)
    return head_gradients(shape, part) + block_gradients(shape, part) + own


def _ridge(half: float, d: int) -> float:
    """Return a ridge regression of ``[half, d]`` on as much, and its error on as many others."""
    small = min(half, d)
    solve = CHOLESKY * small**3 + 2 * small * small * d
    if half <= d:  # through the kernel of tokens: x x', the other tokens' x x', and the product with what is solved
        return solve + 6 * half * half * d
    return solve + 6 * half * d * d


def head_fit(shape: Shape, fit: Part, select: Part, report: Part, steps: int, blank: bool = False) -> Work:
    """Return softmax regression on the head's inputs by ``steps`` steps of L-BFGS.

    Once: the head's inputs of all parts, a metric ``9 d^3 + 2 d^3``, and the report loss before and after; per step
    ``n (2 d^2 + 6 V d)`` on fit, ``2 V d^2`` and ``4 V d`` per token of select.

    Args:
        shape: the model.
        fit, select, report: the tokens.
        steps: of L-BFGS; each takes one evaluation as a rule, and there is one before the first.
        blank: from nothing instead of the model's head, whose logits are then not computed.
    """
    d, H, own = shape.width, shape.head_weights, 0 if blank else 1
    inputs = 2 * (fit.tokens + select.tokens + report.tokens) * shape.head_weights
    metric = gram(fit.tokens, d) + (EIGENVECTORS + 2) * d**3
    per_step = fit.tokens * (2 * d * d + (4 + 2 * own) * H)
    on_select = 2 * H * d + select.tokens * (2 + 2 * own) * H
    before = 2 * own * select.tokens * H
    on_report = report.tokens * 2 * H * (1 if blank else 3)
    total = inputs + metric + (steps + 1) * per_step + steps * on_select + before + on_report + 2 * H * d
    return Work(total, 0.0, 1.0)


def _each(shape: Shape, cost: Callable[[int, int], float]) -> list[float]:
    single = [group for group in shape.groups if not group.expert]
    return [group.count * cost(o, group.inputs) for group in single for o in group.outputs]


def largest(shape: Shape) -> tuple[InputGroup, int]:
    """Return the largest matrix, by its group and its outputs."""
    return max(((g, o) for g in shape.groups for o in g.outputs), key=lambda each: each[0].inputs * each[1])
