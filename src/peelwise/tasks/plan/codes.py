"""Operations of finding codes of a low-bit format, whatever the format: layers ``[o, d]``, and the sums they need.

Rounding with error feedback and coordinate descent are products with ``S [d, d]``; where errors are weighed by what the
loss minds there are products with ``M [o, o]`` too, and a tile of 64 x 64 codes is walked in 64 steps.
"""

from __future__ import annotations

from peelwise.records.plan import InputGroup, Shape
from peelwise.tasks.plan import work
from peelwise.tasks.plan.work import CHOLESKY, Part, Work, gram

_TILE = 64
_INVERSE_ROOT = CHOLESKY + 1  # of S in error feedback, d^3: a factor, and what it is the inverse of
_TARGET_DAMPINGS, _FEEDBACK_DAMPINGS, _OWN_DAMPINGS = 3, 3, 4
_WEIGHED_SWEEPS = 2
_STEPS_SHOWN = 4


def solved(o: int, d: int, starts: int, sweeps: float = 0.0, *, feedback: bool = True) -> float:
    """Return one search: ``2 o d^2`` per descent begun, ``4 o d^2`` per sweep, ``2 o d^2`` per candidate's error.

    Error feedback takes ``4/3 d^3 + o d (d - 64) + 2 o d^2``. Candidates are plain rounding, and of every descent where
    it begins and where it ends.

    Args:
        o, d: the matrix.
        starts: codes in use, or others, that a descent begins at besides the first.
        sweeps: of all descents together.
        feedback: whether the first begins where error feedback ends.
    """
    products = 2 * (1 + starts) + 4 * sweeps + 2 * (3 + 2 * starts) + 2 * feedback
    carried = o * d * max(d - _TILE, 0) + _INVERSE_ROOT * d**3 if feedback else 0.0
    return products * o * d * d + carried


def excess(o: int, d: int, *, lost: bool = True, weighed: bool = False) -> float:
    """Return the error of codes on other tokens: ``2 o d^2``, as much for what came before, ``2 o^2 d`` if weighed."""
    return 2 * (1 + lost) * o * d * d + 2 * weighed * o * o * d


def weighed_sweeps(o: int, d: int) -> float:
    """Return the descent of weighed errors, sizes rounded up to whole tiles.

    ``2 o^2 d + 2 o d^2`` at the beginning; per sweep ``2 64^2 + 2 64`` per weight, ``o d (o - 64)`` for the rows below
    a tile, ``2 o^2 d + 2 o d^2`` for the columns beyond.
    """
    wide, long = (-(-side // _TILE) * _TILE for side in (o, d))
    sweep = wide * long * (2 * _TILE**2 + 2 * _TILE + wide - _TILE) + 2 * wide * long * (wide + long)
    return 2 * o * d * (o + d) + _WEIGHED_SWEEPS * sweep


def targets(group: InputGroup) -> float:
    """Return where the weights of layers that share their input should be, for each of three dampings.

    A factor ``d^3 / 3``, and per layer ``8 o d^2``: what it lacks on two parts, a solve, and a curvature.
    """
    d = group.inputs
    return _TARGET_DAMPINGS * (CHOLESKY * d**3 + sum(8 * o * d * d for o in group.outputs))


def coded(o: int, d: int, starts: int, sweeps: float, *, weighed: bool) -> float:
    """Return the codes of one layer: error feedback with three dampings, descent, and descent of weighed errors.

    Args:
        o, d: the matrix.
        starts: codes in use.
        sweeps: of both descents together.
        weighed: whether it is known what the loss minds.
    """
    fed = _FEEDBACK_DAMPINGS * solved(o, d, starts)
    descended = solved(o, d, 1, sweeps, feedback=False)
    # One for every damping, then the best of what there is, and after each descent the better of two.
    compared = _FEEDBACK_DAMPINGS + 2 + starts + 2 + 2 * weighed
    found = fed + descended + compared * excess(o, d, weighed=weighed)
    return found + (weighed_sweeps(o, d) if weighed else 0.0)


def in_order(shape: Shape, starts: int, sweeps: float, *, weighed: bool, shown: bool) -> Work:
    """Return targets and codes of all layers, one after the other; with what each step comes to if that is shown."""
    total = 0.0
    for group in shape.groups:
        d = group.inputs
        total += group.count * targets(group)
        for o in group.outputs:
            own = coded(o, d, starts, sweeps, weighed=weighed)
            total += group.count * (own + shown * (_STEPS_SHOWN * excess(o, d) + 2 * o * d * d))
    return Work(total)


def alone(shape: Shape, sweeps: float) -> Work:
    """Return better codes of every layer for itself: feedback with four dampings, descent, and six errors."""
    total = 0.0
    for group in shape.groups:
        d = group.inputs
        for o in group.outputs:
            searched = _OWN_DAMPINGS * (solved(o, d, 1) + 2 * o * d * d) + solved(o, d, 1, sweeps)
            total += group.count * (searched + 6 * 2 * o * d * d)
    return Work(total)


def walked(shape: Shape, part: Part, *, hooked: bool) -> Work:
    """Return the walk of a model and its parent, side by side, over tokens of several parts.

    Of every block the parent runs once, and the other one after each group of layers as far as that goes, and once more
    to its end; sums are ``S`` of the inputs, ``2 n d^2`` for what they have lost, ``2 n o d`` where the stream has.
    """
    n, order = part.tokens, _of_a_block(shape)
    whole = work.forward(shape, part, heads=0.0)
    again = work.forward(shape, part, heads=0.0, hooked=hooked)
    before, runs = 0.0, 0.0
    for group in order:
        runs += before + group.routed * group.inputs * group.outputs[0]
        before += group.routed * group.weights
    attended = 4 * part.length * shape.attention_width * (len(order) - 1)  # behind the first group
    partly = n * (2 * (1 + hooked) * runs * shape.depth + attended)
    sums = 0.0
    for group in shape.groups:
        seen, d = n * group.routed, group.inputs
        stream = 2 * seen * d * shape.width if group.outputs == (shape.width,) and not group.expert else 0.0
        sums += group.count * (gram(seen, d) + 2 * seen * d * d + stream)
    return whole + again + Work(partly + sums, blocks=0.5 * (len(order) + 1))


def _of_a_block(shape: Shape) -> list[InputGroup]:
    """Return the groups of one block, of experts one of each kind, as if all blocks were alike."""
    found: list[InputGroup] = []
    for group in shape.groups:
        found += [group] * (1 if group.expert else max(1, round(group.count / shape.depth)))
    return found
