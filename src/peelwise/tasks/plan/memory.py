"""Memory that is alive at the same time, bytes. ``b`` is what a weight takes in memory, ``W`` all weights in blocks."""

from __future__ import annotations

from dataclasses import dataclass

from peelwise.records.options import MOST_SUMS
from peelwise.records.plan import Shape
from peelwise.tasks.plan.work import largest

_FLOAT32, _FLOAT64, _PROPOSAL = 4, 8, 2
_LOSS_NUMBERS = 2**22  # logits whose losses are taken at once
_PIECE = 2**22
_COPIES_OF_HEAD = 15  # iterate, gradient, six pairs of both, and what is tried
_COPIES_ON_THE_WAY = 4  # of these in memory where the others are on disk
_CHUNK = 1_024  # tokens whose logits a fit of the head computes at once


@dataclass(frozen=True)
class Memory:
    """What a model keeps in memory while it is measured.

    Attributes:
        shape: the model.
        tokens: of the whole probe.
        micro_batch: tokens that go through the model at a time.
        bytes_per_weight: ``b``: 4 in float32, 2 in half precision.
        streamed: whether weights stay in their files.
        base: interpreter and packages, bytes.
        models: how many are in memory, each with its stations.
        changes_on_disk: whether what is kept of all blocks, proposals and changes of weights, stays in files too, as
            in an audit of a stream.
    """

    shape: Shape
    tokens: float
    micro_batch: int
    bytes_per_weight: int
    streamed: bool
    base: float
    models: int = 1
    changes_on_disk: bool = False

    @property
    def block(self) -> float:
        """Weights of one block on average, a number."""
        return self.shape.linear_weights / self.shape.depth

    @property
    def weights(self) -> float:
        """``b P``; where they stay in files ``b`` times those of a block, or of the head where that is larger."""
        one = max(self.block, self.shape.head_weights)
        return self.bytes_per_weight * (one if self.streamed else self.shape.parameters)

    @property
    def kept(self) -> float:
        """Which part of the changes of all blocks is in memory: all, or where they are on disk that of one block."""
        return 1 / self.shape.depth if self.changes_on_disk else 1.0

    @property
    def stations(self) -> float:
        """``n d (L + 1) b``: what enters every block and leaves the last, for all tokens; of a stream at one block."""
        blocks = 1 if self.streamed else self.shape.depth
        return self.tokens * self.shape.width * (blocks + 1) * self.bytes_per_weight

    @property
    def held(self) -> float:
        """What is there throughout: packages, weights, stations."""
        return self.base + self.models * (self.weights + self.stations)

    @property
    def opening(self) -> float:
        """A tensor in float32 on its way into memory, or what is looked at for NaN at a time: at most 2^22 numbers.

        Of the latter also their sizes, and what is true of them. What stays in its file is not made anything else.
        """
        group, outputs = largest(self.shape)
        tensor = max(self.shape.head_weights, group.inputs * outputs)
        looked_at = (self.bytes_per_weight + 3) * min(_PIECE, tensor)
        return looked_at if self.streamed else max(looked_at, _FLOAT32 * tensor)

    def logits(self, tokens: float) -> float:
        """Logits of a micro-batch and losses of a piece: ``b N + 4 min(N, 2^22)``, ``N = n V``; 8 in half precision."""
        numbers = min(self.micro_batch, tokens) * self.shape.vocabulary
        return self.bytes_per_weight * numbers + (1 + self.hooked) * _FLOAT32 * min(numbers, _LOSS_NUMBERS)

    def logits_back(self, tokens: float) -> float:
        """Logits of a micro-batch and the way back: ``max(3 b N, (b + 4) N + 8 min(N, 2^22))``, ``N = n V``.

        Either logits, their gradients in pieces and as a whole; or logits, their logarithms, and two gradients of the
        first piece. In half precision ``4 N`` more, for what the CPU's products of it keep beside PyTorch's tensors.
        """
        b, numbers = self.bytes_per_weight, min(self.micro_batch, tokens) * self.shape.vocabulary
        first = (b + _FLOAT32) * numbers + 2 * _FLOAT32 * min(numbers, _LOSS_NUMBERS)
        return max(3 * b * numbers, first) + _FLOAT32 * numbers * self.hooked

    def activations(self, tokens: float) -> float:
        """What a block keeps of a micro-batch for its pass back: about ``b n (4 sum o + 3 sum d)``.

        Outputs of layers, what activations and positions make of them, gradients of all; inputs, norms, the stream.
        """
        groups = self.shape.groups
        wide = sum(g.count * g.routed * (3 * g.inputs + 4 * sum(g.outputs)) for g in groups) / self.shape.depth
        return self.bytes_per_weight * min(self.micro_batch, tokens) * wide

    @property
    def hooked(self) -> bool:
        """Whether changes lie beside the weights, since half precision cannot hold their sums."""
        return self.bytes_per_weight != _FLOAT32

    # -- stages ----------------------------------------------------------------------------------------

    def spectrum(self) -> float:
        """Signals of weights: ``max(16 o d, 8 o d + 24 r^2)`` in float64, ``r = min(o, d)``.

        In half precision a block in float32 besides, once as matrices and once as both sides of neurons.
        """
        group, outputs = largest(self.shape)
        numbers, r = group.inputs * outputs, min(group.inputs, outputs)
        copies = 2 * _FLOAT32 * self.block if self.hooked else 0.0
        return copies + max(2 * _FLOAT64 * numbers, _FLOAT64 * (numbers + 3 * r * r))

    def pass_signals(self, seen: float) -> float:
        """Signals of a pass over ``seen`` tokens: gradients at stations, of weights, and the stream in float64."""
        d, single = self.shape.width, [g for g in self.shape.groups if not g.expert]
        gradients = 2 * seen * d * self.bytes_per_weight
        matrices = sum(g.count * g.weights for g in single) / self.shape.depth
        rows = sum(g.count * (len(g.outputs) * g.inputs + sum(g.outputs)) for g in single) / self.shape.depth
        group, outputs = largest(self.shape)
        # Rows of the first micro-batch stay, of which curvature along a gradient is measured on 256.
        own = _FLOAT32 * (matrices + group.inputs * outputs + rows * min(self.micro_batch, seen))
        stream = _FLOAT32 * 8 * seen * d + 3 * _FLOAT64 * seen * d
        return gradients + max(self.logits_back(seen), own + max(self.activations(seen), stream, 3 * _FLOAT32 * d * d))

    @property
    def numbers_in_sums(self) -> tuple[float, float, float]:
        """Numbers in ``S``, ``C`` and ``F`` of one block: ``sum d^2`` of inputs, ``sum o d``, ``sum o^2``."""
        groups, L = self.shape.groups, self.shape.depth
        inputs = sum(group.count * group.inputs**2 for group in groups)
        outputs = sum(group.count * o * o for group in groups for o in group.outputs)
        return inputs / L, self.block, outputs / L

    def sums(self, targets: int, two_sided: bool = True) -> float:
        """Sums of one block in float64, and the proposals made of them, whichever is more.

        ``S`` of inputs, ``C`` of weights, ``F`` of outputs squared, per block, of fit and of select: ``8 (2 S + (t + 1)
        (C + F))``; while they are added up the activations of a micro-batch beside them, while proposals are made ``12
        S + 16 C`` and one factorisation.

        Of a stream they are of as many layers as `MOST_SUMS` has room for, one at least. Where these are not all, those
        of fit go to disk before those of select are made, and both before proposals are (``28 S + 40 C + 8 m^2``).
        """
        most = max(max(group.inputs, *group.outputs) for group in self.shape.groups) ** 2
        activations = self.activations(self.tokens)
        if self.streamed and len(parts := self.parts_of_sums(targets, two_sided)) > 1:
            return max(
                max(
                    _FLOAT64 * (S + targets * (C + two_sided * F)) + activations,
                    _FLOAT32 * (7 * S + 10 * C + 2 * min(most, max(S, F))),
                )
                for S, C, F in parts
            )
        S, C, F = self.numbers_in_sums
        both = _FLOAT64 * (2 * S + (targets + 1) * (C + two_sided * F))
        return both + max(activations, _FLOAT32 * (3 * S + 4 * C + 3 * most))

    def parts_of_sums(self, targets: int, two_sided: bool = True) -> list[tuple[float, float, float]]:
        """Return what `numbers_in_sums` are of the layers whose sums are there together, part by part of a block.

        Experts are one part, and so is a layer that is larger than there is room for.
        """
        L, experts, parts, held = self.shape.depth, [0.0, 0.0, 0.0], [[0.0, 0.0, 0.0]], 0.0
        for group in self.shape.groups:
            d = group.inputs
            if group.expert:
                own = d * d, group.weights, sum(o * o for o in group.outputs)
                experts = [a + group.count / L * b for a, b in zip(experts, own, strict=True)]
                continue
            for o in group.outputs * max(1, round(group.count / L)):
                size = _FLOAT64 * (2 * d * d + (targets + 1) * (o * d + two_sided * o * o))
                if held and held + size > MOST_SUMS:
                    parts.append([0.0, 0.0, 0.0])
                    held = 0.0
                parts[-1] = [a + b for a, b in zip(parts[-1], (d * d, o * d, o * o), strict=True)]
                held += size
        return [(S, C, F) for S, C, F in (*parts, experts) if C]

    def proposals(self, directions: int = 2) -> float:
        """Proposals of all blocks, in half precision: ``2 W`` per direction."""
        return _PROPOSAL * directions * self.shape.linear_weights * self.kept

    def changes(self, sets: float = 1.0) -> float:
        """Changes of all blocks, in float32: ``4 W`` each."""
        return _FLOAT32 * sets * self.shape.linear_weights * self.kept

    def splice(self) -> float:
        """Changes in place: in float32 their sums with the weights, ``4 W``; else they are added as they are."""
        return self.changes(0.0 if self.hooked else 1.0)

    @property
    def one_change(self) -> float:
        """A change of one matrix in place: itself, and its sum with the weight."""
        group, outputs = largest(self.shape)
        return 2 * _FLOAT32 * group.inputs * outputs

    def changes_of_kind(self) -> float:
        """Kinds of change: both models' largest matrix in float32, and a spectrum in float64 beside them."""
        ends, (group, outputs) = self.shape.head_weights, largest(self.shape)
        numbers = max(ends, group.inputs * outputs)
        return 3 * _FLOAT32 * numbers + 3 * _FLOAT64 * numbers

    @property
    def blank_head(self) -> float:
        """What a fit of the head may take at most, where there is one from nothing: 15 copies of it."""
        return _FLOAT32 * _COPIES_OF_HEAD * self.shape.head_weights

    def curvatures(self) -> float:
        """What the loss minds in the outputs of every layer, in float32: ``4 sum o^2``."""
        return _FLOAT32 * sum(group.count * o * o for group in self.shape.groups for o in group.outputs)

    def curvatures_kept(self) -> float:
        """What of `curvatures` is in memory: all, or where changes are on disk those of one block."""
        return self.curvatures() * self.kept

    def own_stations(self, tokens: float) -> float:
        """One station of a second model that is walked beside its parent."""
        return tokens * self.shape.width * self.bytes_per_weight

    def layer_codes(self) -> float:
        """Codes of one layer ``[o, d]`` on their way down, in float32: about ``4 (16 o d + 8 d^2 + 4 o^2)``.

        Two descents of a target, weights, gradient and codes each, candidates, and sums of three parts.
        """
        return max(
            _FLOAT32 * (16 * o * group.inputs + 8 * group.inputs**2 + 4 * o * o)
            for group in self.shape.groups
            for o in group.outputs
        )

    def head(self, seen: float) -> float:
        """A fit of the head: 15 copies of it, four times the logits of 1,024 tokens, and the inputs of ``seen``."""
        shape, chunk = self.shape, min(_CHUNK, self.micro_batch, seen)
        copies = _COPIES_ON_THE_WAY if self.changes_on_disk else _COPIES_OF_HEAD
        return _FLOAT32 * (copies * shape.head_weights + 4 * chunk * shape.vocabulary + seen * shape.width)
