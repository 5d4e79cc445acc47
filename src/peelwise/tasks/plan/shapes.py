"""The sizes of decoder-only transformers in closed form, for models that nobody has a config of."""

from __future__ import annotations

from dataclasses import dataclass

from peelwise.records.plan import InputGroup, Shape


@dataclass(frozen=True)
class Decoder:
    """A decoder-only transformer with a gated MLP, as Llama and Mixtral have it, without biases.

    Attributes:
        width: ``d``, channels of the residual stream.
        mlp_width: ``m``, neurons of the MLP, or of one expert.
        depth: ``L``, blocks.
        heads, kv_heads: ``h`` heads of queries and ``k`` of keys and values, each ``d / h`` wide.
        vocabulary: ``V``.
        tied: whether embedding and head are one matrix.
        experts, chosen: ``E`` experts, of which a token goes through ``c``; one and one without a mixture.
        bytes_per_weight: in the file.
    """

    width: int
    mlp_width: int
    depth: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False
    experts: int = 1
    chosen: int = 1
    bytes_per_weight: float = 2.0

    @property
    def weights_per_block(self) -> int:
        """``2 d^2 + 2 d^2 k / h + 3 E d m`` and, of a mixture, ``E d`` for its router."""
        d, router = self.width, self.experts * self.width * (self.experts > 1)
        attention = 2 * d * d + 2 * d * d * self.kv_heads // self.heads
        return attention + 3 * self.experts * d * self.mlp_width + router

    @property
    def parameters(self) -> int:
        """``(2 - tied) V d + L (weights per block + 2 d) + d``, the last two terms those of norms."""
        d = self.width
        return (2 - self.tied) * self.vocabulary * d + self.depth * (self.weights_per_block + 2 * d) + d

    def shape(self, name: str = "decoder") -> Shape:
        """Return what the formulas of costs need: its linear layers by what they are given."""
        d, m, L, mixture = self.width, self.mlp_width, self.depth, self.experts > 1
        kv = d * self.kv_heads // self.heads
        routed, first = self.chosen / self.experts, (2 * m,) if mixture else (m, m)
        mlp = (
            InputGroup(inputs=d, outputs=first, count=L * self.experts, routed=routed, expert=mixture),
            InputGroup(inputs=m, outputs=(d,), count=L * self.experts, routed=routed, expert=mixture),
        )
        attention = (
            InputGroup(inputs=d, outputs=(d, kv, kv), count=L),
            InputGroup(inputs=d, outputs=(d,), count=L),
        )
        return Shape(
            name=name,
            architecture="decoder",
            parameters=self.parameters,
            width=d,
            depth=L,
            vocabulary=self.vocabulary,
            tied=self.tied,
            attention_width=L * d,
            groups=(*attention, *mlp),
            stored_bytes_per_weight=self.bytes_per_weight,
        )
