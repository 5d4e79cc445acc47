"""The target of a layer that is quantised after others: what it gets is not what its parent got.

With inputs ``x`` of the layer in the parent and ``z`` in the model that is quantised so far, weights ``W`` of the
parent and ``W'`` looked for:

    E|W x + e - W' z|^2  =  tr((W' - T) S (W' - T)^T) + const
    S = E[z z^T]      T = W + E[(W (x - z) + e) z^T] S^-1

so a layer can make up for part of what the layers before it lost (arXiv:2504.02692, arXiv:2504.09629). ``e`` is what
the stream itself has lost so far, where the layer's output is added to it, and 0 elsewhere. From few tokens ``T``
learns noise, hence ``S + damping``, and a share of the way from ``W`` to ``T`` that other tokens choose.

Where it is known which directions of the output the loss minds, ``M = E[g g^T] + damping``, errors are weighted with
it: ``tr(M (W' - T) S (W' - T)^T)``, the Kronecker-factored curvature of the loss (arXiv:1503.05671).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from peelwise.formats.base import Encoded, Format
from peelwise.formats.membership import scaled_part
from peelwise.references.coded import damped
from peelwise.references.quantized import solve
from peelwise.references.weighed import weighed_descent
from peelwise.stats.linalg import DampedFactor

TARGET_DAMPINGS = (0.01, 0.1, 1.0)
FEEDBACK_DAMPINGS = (0.0, 0.05, 0.3)
# With less, directions that the fit tokens hardly mind get errors that other tokens do mind.
CURVATURE_DAMPING = 0.1
LEAST_WEIGHED_DAMPING = 0.01
WEIGHED_SWEEPS = 2  # the first gives most of the gain, each of the next about half of the one before


@dataclass(frozen=True, eq=False)
class InputSums:
    """What a layer is given: means over tokens.

    Attributes:
        zz: ``E[z z^T] [d_in, d_in]`` of its inputs ``z`` in the model that is quantised so far.
        lost: ``E[(x - z) z^T] [d_in, d_in]``, ``x`` being its inputs in the parent; ``None`` if these are the same
            (nothing before it is quantised) or other tokens (of an expert whose router chose others).
        stream: ``E[e z^T] [d_out, d_in]`` where the layer's output is added to the stream of the block: ``e`` is what
            the parent's stream has there and this one lacks.
        tokens: how many were summed; 0 for an expert that none was routed to, whose sums are zero.
    """

    zz: Tensor
    lost: Tensor | None = None
    stream: Tensor | None = None
    tokens: int = 1

    def missing(self, W: Tensor) -> Tensor | None:
        """Return ``E[(W (x - z) + e) z^T] [d_out, d_in]``, what the layer's output lacks; ``None`` for nothing."""
        if self.lost is None:
            return None
        missing = W.to(self.lost) @ self.lost
        return missing if self.stream is None else missing + self.stream

    def excess(self, W: Tensor, coded: Tensor, M: Tensor | None = None) -> float:
        """Return ``E|W x + e - W' z|^2 - E|W x + e - W z|^2``: what other weights cost beyond the parent's.

        Args:
            W: the parent's weights ``[d_out, d_in]``.
            coded: the weights ``W'`` in question ``[d_out, d_in]``.
            M: the metric of the outputs ``[d_out, d_out]``; all alike if it is ``None``.
        """
        D = (coded - W).to(self.zz)
        weighed = D if M is None else M.to(D) @ D
        total = ((D @ self.zz) * weighed).sum()
        missing = self.missing(W)
        return float(total if missing is None else total - 2 * (missing * weighed).sum())

    def energy(self, W: Tensor) -> float:
        """Return ``E|W z|^2``, the mean squared output of the parent's weights at these inputs."""
        W = W.to(self.zz)
        return float(((W @ self.zz) * W).sum())


@dataclass(frozen=True, eq=False)
class Target:
    """Where a layer's weights should be.

    Attributes:
        T: ``[d_out, d_in]``.
        damping: of ``S``, in units of its mean diagonal; 0 where ``T`` is ``W``.
        share: how far from ``W`` towards the damped optimum, 0 to 1.
    """

    T: Tensor
    damping: float = 0.0
    share: float = 0.0


def targets(
    weights: Sequence[Tensor], fit: InputSums, select: InputSums, dampings: Sequence[float] = TARGET_DAMPINGS
) -> list[Target]:
    """Return where the weights of layers that share their input should be.

        T = W + share * E[(W (x - z) + e) z^T] (S + damping * tr(S)/d I)^-1

    Sums of the fit tokens make the direction; those of the select tokens choose ``damping`` and ``share``, whose best
    value is known in closed form because the error is a parabola in it.

    Args:
        weights: the parent's ``W [d_out, d_in]`` of each layer.
        fit: sums of the fit tokens.
        select: of the select tokens.
        dampings: to choose from, in units of the mean diagonal.

    Source: arXiv:2504.02692, with damping and share chosen per layer.
    """
    best = [Target(W) for W in weights]
    gains = [0.0] * len(best)
    for damping in dampings:
        factor = DampedFactor(fit.zz, damping, name="inputs")
        for i, W in enumerate(weights):
            lacks, lacks_there = fit.missing(W), select.missing(W)
            if lacks is None or lacks_there is None:
                continue
            moved = factor.solve_right(lacks).to(W)
            slope = float((lacks_there * moved.to(lacks_there)).sum())
            curvature = float(((moved.to(select.zz) @ select.zz) * moved.to(select.zz)).sum())
            if slope <= 0 or curvature <= 0:
                continue
            share = min(slope / curvature, 1.0)
            gain = 2 * share * slope - share**2 * curvature
            if gain > gains[i]:
                gains[i], best[i] = gain, Target(W + share * moved, damping, share)
    return best


@dataclass(frozen=True, eq=False)
class LayerCodes:
    """Codes found for one layer, and what they were found with.

    Attributes:
        encoded: the codes.
        target: where the weights should have been.
        damping: of ``S`` in error feedback and descent, in units of its mean diagonal.
        steps: what each step came to, by name, in the order they were made in; the last is ``encoded``.
    """

    encoded: Encoded
    target: Target
    damping: float
    steps: dict[str, Encoded]


def coded(
    W: Tensor,
    target: Target,
    fit: InputSums,
    select: InputSums,
    form: Format,
    *,
    curvature: Tensor | None = None,
    starts: Sequence[Encoded] = (),
    dampings: Sequence[float] = FEEDBACK_DAMPINGS,
    max_sweeps: int = 5,
    tolerance: float = 0.01,
) -> LayerCodes:
    """Return the codes of a layer with the lowest error on select among those that fit proposes.

    Rounding with error feedback is made with each damping; descent goes on from the best of them, and then once more
    where errors are weighed with the curvature, by what the loss minds. What each step finds is taken if select agrees.
    So are the codes among ``starts``.

    Args:
        W: the parent's weights ``[d_out, d_in]``.
        target: where they should be, from `targets`.
        fit, select: sums of what the layer is given.
        form: the format.
        curvature: ``F = E[g g^T] [d_out, d_out]`` of the loss's gradients at the layer's output, if it is known.
        starts: codes in use, where there are any.
        dampings: of error feedback to choose from, in units of the mean diagonal.
        max_sweeps: most sweeps of descent; 0 for none.
        tolerance: the sweep that lowers the error by less than this part is the last.

    Raises:
        FormatError: If the format does not go with the shape.
    """

    M = None if curvature is None else damped(curvature, CURVATURE_DAMPING).to(fit.zz)

    def cost(encoded: Encoded) -> float:
        return select.excess(W, form.decode(encoded), M)

    T = target.T
    supports = [each.support for each in starts[:1]]
    rounded = form.encode(W, *supports)
    fed = {d: solve(damped(fit.zz, d), T, form, starts=starts, max_sweeps=0).encoded for d in dampings}
    damping = min(fed, key=lambda d: cost(fed[d]))
    steps = {"rounded": rounded, "fed-back": fed[damping]}
    best = min((rounded, *starts, fed[damping]), key=cost)
    if max_sweeps and damping in fed:
        moved = solve(
            damped(fit.zz, damping), T, form, starts=[best], feedback=False, max_sweeps=max_sweeps, tolerance=tolerance
        ).encoded
        best = min((best, moved), key=cost)
        steps["descended"] = best
    if M is not None and (inner := scaled_part(form)) is not None:
        S = damped(fit.zz, max(damping, LEAST_WEIGHED_DAMPING))
        moved = weighed_descent(M, S, T, inner, best, max_sweeps=WEIGHED_SWEEPS, tolerance=tolerance)
        best = min((best, moved), key=cost)
        steps["weighed"] = best
    return LayerCodes(best, target, damping, steps)
