"""Layers that decide together, with codes and predicted damage in each format.

Layers that share their input (queries, keys and values; gate and up) are often fused into one matrix, and experts whose
matrices are parts of one parameter are stored and run as one tensor: each such group gets one format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from peelwise.engine.in_order import Walk
from peelwise.engine.session import Changes, change_to
from peelwise.formats.base import Encoded, Format
from peelwise.formats.dense import Dense
from peelwise.model.layers import Block, LinearLayer
from peelwise.references.allocation import predicted_damage
from peelwise.references.asymmetric import InputSums, Target, coded

FLOAT_BITS = 16.0  # what a layer that is left alone takes per weight, as models are shipped


@dataclass(frozen=True, eq=False)
class Member:
    """One layer of a group.

    Attributes:
        linear: the layer.
        tokens: of fit that it was given.
        codes: in each format.
        predicted: damage in each format, nats per token; 0 for an expert that no token was routed to.
        bits: that it takes in each format.
    """

    linear: LinearLayer
    tokens: int
    codes: list[Encoded] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that decide together."""

    block: int
    members: list[Member]

    @property
    def bits(self) -> list[float]:
        """Bits of all members together in each format."""
        return [sum(of_format) for of_format in zip(*(member.bits for member in self.members), strict=True)]

    @property
    def predicted(self) -> list[float]:
        """Predicted damage of all members together in each format, nats per token."""
        return [sum(of_format) for of_format in zip(*(member.predicted for member in self.members), strict=True)]

    @property
    def weights(self) -> int:
        """Weights of all members together."""
        return sum(member.linear.weight().numel() for member in self.members)

    def changes(self, at: int, form: Format) -> Changes:
        """Return what format number ``at`` changes."""
        return {member.linear: change_to(member.linear, form.decode(member.codes[at])) for member in self.members}


def groups_of(
    walk: Walk, block: Block, forms: Sequence[Format], curvatures: Mapping[LinearLayer, Tensor]
) -> list[Group]:
    """Return the groups of one block; one group's sums are alive at a time.

    Args:
        walk: the parent on fit and select, up to the block.
        block: the block.
        forms: formats that a group may get.
        curvatures: ``E[g g^T]`` of the loss's gradients at each layer's outputs; empty if they are unknown.
    """
    together: dict[tuple[int, ...], list[Member]] = {}
    for shared, (fit, select) in walk.groups(block):
        share = fit.tokens / walk.parts[0].predicted
        members = [_member(m, forms, fit, select, share, curvatures.get(m)) for m in shared]
        together.setdefault(tuple(map(_place, shared)), []).extend(members)
    seen = {member.linear for members in together.values() for member in members}
    for linear in (m for m in block.linears if m.is_expert and m not in seen):
        key = next((key for key in together if _place(linear) in key), (_place(linear),))
        none = InputSums(linear.weight().new_zeros(0), tokens=0)
        together.setdefault(key, []).append(_member(linear, forms, none, none, 0.0, None))
    return [Group(block.index, members) for members in together.values()]


def is_asked(linear: LinearLayer) -> bool:
    """Whether a layer takes part: it can be given other weights."""
    return linear.is_plain or linear.is_expert


def _place(linear: LinearLayer) -> int:
    """Return what is the same for all experts of one parameter, and for no other layer."""
    return id(linear.parameter) if linear.is_expert else id(linear)


def _member(
    linear: LinearLayer, forms: Sequence[Format], fit: InputSums, select: InputSums, share: float, F: Tensor | None
) -> Member:
    """Return a layer with its codes: those of an expert that fit or select gives no token are rounded to nearest.

    Args:
        linear: the layer.
        forms: the formats.
        fit, select: sums of its inputs, means over the tokens that it is given.
        share: how many of all tokens of fit these are.
        F: its curvature, a mean over the same.
    """
    W, made = linear.weight().float(), Member(linear, fit.tokens)
    for form in forms:
        made.codes.append(_codes(W, form, fit, select))
        change = form.decode(made.codes[-1]) - W
        made.predicted.append(share * predicted_damage(change, fit.zz, F) if fit.tokens else 0.0)
        made.bits.append(bits_in(form, linear))
    return made


def _codes(W: Tensor, form: Format, fit: InputSums, select: InputSums) -> Encoded:
    if isinstance(form, Dense) or not (fit.tokens and select.tokens):
        return form.encode(W)
    return coded(W, Target(W), fit, select, form, max_sweeps=0).encoded


def bits_in(form: Format, linear: LinearLayer) -> float:
    """Return the bits that a layer takes in a format."""
    d_out, d_in = linear.weight().shape
    return FLOAT_BITS * d_out * d_in if isinstance(form, Dense) else form.bits(d_out, d_in)
