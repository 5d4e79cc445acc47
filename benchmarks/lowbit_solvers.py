"""Solvers inside a weight format, on real layers with inputs from real text: quality and time in one run.

Compared at 1, 1.58, 2, 3 and 4 bits per weight, one scale per output channel:

    rounding          to nearest, with the format's own rule for the scale
    error feedback    rounding column after column, the error carried to the columns not yet rounded (the idea of
                      GPTQ, arXiv:2210.17323, written for this comparison), at the scales that rounding likes best;
                      in the order of the inputs, and largest S_jj first
    descent           coordinate descent with re-fitted scales, as peelwise does it: from error feedback, largest first
    descent, rounding the same from rounding at its best scales

Quality is q(W) / q(0) for q(W) = tr((W - T) S (W - T)^T), on the tokens of S and on others.

Example: python benchmarks/lowbit_solvers.py --tokens 4096 --repetitions 3
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import peelwise
from common import median_ratio, write
from peelwise.formats.base import Encoded
from peelwise.formats.scaled import Scaled
from peelwise.formats.table import parse_format
from peelwise.model.architectures import find_blocks
from peelwise.model.checkpoints import open_model
from peelwise.model.guard import untouched
from peelwise.model.layers import LinearLayer
from peelwise.probe.rows import Split
from peelwise.probe.texts import reference_prose
from peelwise.references.quantized import quadratic, shrunk, solve
from peelwise.stats.gram import GramSum

FORMATS = {"1": "binary", "1.58": "ternary:channel", "2": "int2", "3": "int3", "4": "int4"}
MAPS = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
BLOCK = 15
_FEEDBACK_DAMPING = 0.01
_COLUMNS = 128


@dataclass(frozen=True)
class Layer:
    """One linear map: its weights and the second moments of its inputs on two sets of tokens."""

    name: str
    T: Tensor  # [d_out, d_in]
    S: Tensor  # [d_in, d_in]
    S_other: Tensor

    def quality(self, W: Tensor) -> tuple[float, float]:
        """Return ``q(W) / q(0)`` on the tokens of ``S`` and on the others."""
        T = self.T.double()
        pairs = [(quadratic(S, W.double() - T).sum(), quadratic(S, T).sum()) for S in (self.S, self.S_other)]
        own, other = (float(error / whole) for error, whole in pairs)
        return own, other


def layers(source: str, tokens: int) -> list[Layer]:
    """Return the chosen maps of a model with the moments of their inputs on reference prose."""
    opened = open_model(source, dtype="float32", device="cpu", with_tokenizer=True)
    probe = peelwise.Probe.from_text(reference_prose(), opened.tokenizer, tokens=2 * tokens)
    maps = [m for m in find_blocks(opened.model)[BLOCK].linears if m.name.endswith(MAPS)]
    with untouched(opened.model), torch.no_grad():
        own, other = (moments(opened.model, maps, split) for split in (probe.fit, probe.report))
    return [Layer(m.name, m.weight().clone(), own[m], other[m]) for m in maps]


def moments(model: torch.nn.Module, maps: list[LinearLayer], split: Split) -> dict[LinearLayer, Tensor]:
    """Return ``E[x x^T]`` of every map over a split."""
    sums = {m: GramSum() for m in maps}
    weights: Tensor = split.weights

    def keep(m: LinearLayer) -> Callable[..., None]:
        def after(module: torch.nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            sums[m].update(args[0][weights].double())

        return after

    handles = [m.module.register_forward_hook(keep(m)) for m in maps]
    for rows in range(0, split.sequences, 8):
        weights = split.weights[rows : rows + 8]
        model(split.inputs[rows : rows + 8], use_cache=False)
    for handle in handles:
        handle.remove()
    return {m: total.mean() for m, total in sums.items()}


def error_feedback(S: Tensor, T: Tensor, form: Scaled, *, largest_first: bool) -> Encoded:
    """Round column after column and let the columns that follow make up for the error, as well as they can.

    With ``(S + damping)^-1 = U^T U``, ``U`` upper triangular, rounding column ``j`` by ``e`` is made up for best by
    adding ``-e U_jk / U_jj`` to every later column ``k``.
    """
    start = shrunk(form, S, T, form.encode(T))
    order = S.diagonal().argsort(descending=True) if largest_first else torch.arange(len(S))
    H = S[order[:, None], order]
    H = H + _FEEDBACK_DAMPING * float(H.diagonal().mean()) * torch.eye(len(H), dtype=S.dtype)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    left = T.to(S)[:, order].T.contiguous()  # [d_in, d_out], what is still to be rounded
    scales = start.scales[:, 0].to(S)
    codes = torch.zeros_like(left)
    for begin in range(0, len(left), _COLUMNS):
        end = min(begin + _COLUMNS, len(left))
        errors = torch.zeros(end - begin, left.shape[1], dtype=S.dtype)
        for j in range(begin, end):
            codes[j] = form.levels.nearest(left[j] / scales)
            errors[j - begin] = (left[j] - codes[j] * scales) / U[j, j]
            left[j + 1 : end].addr_(U[j, j + 1 : end], errors[j - begin], alpha=-1)
        left[end:].addmm_(U[begin:end, end:].T, errors, alpha=-1)
    found = torch.zeros_like(codes)
    found[order] = codes
    return Encoded(found.T.contiguous().to(form.levels.dtype), start.scales)


def compare(layer: Layer, name: str, repetitions: int) -> dict[str, Any]:
    """Return qualities of all solvers on one layer in one format, and their times against rounding."""
    form = parse_format(name)
    assert isinstance(form, Scaled)
    works: dict[str, Callable[[], Encoded]] = {
        "rounding": partial(form.encode, layer.T),
        "error feedback": partial(error_feedback, layer.S, layer.T, form, largest_first=False),
        "error feedback, largest first": partial(error_feedback, layer.S, layer.T, form, largest_first=True),
        "descent, rounding": lambda: solve(layer.S, layer.T, form, feedback=False).encoded,
        "descent": lambda: solve(layer.S, layer.T, form).encoded,
    }
    found: dict[str, Encoded] = {}
    times: dict[str, list[float]] = {solver: [] for solver in works}
    for _ in range(repetitions):
        for solver, work in works.items():
            # Of the processor, not the wall: one thread, and nothing here waits for anything.
            start = time.process_time()
            found[solver] = work()
            times[solver].append(time.process_time() - start)
    return {
        "layer": layer.name,
        "shape": list(layer.T.shape),
        "format": form.name,
        "quality": {solver: layer.quality(form.decode(encoded)) for solver, encoded in found.items()},
        "median_processor_seconds": {solver: statistics.median(t) for solver, t in times.items()},
        "time_against_error_feedback": {solver: median_ratio(times, solver, "error feedback") for solver in times},
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return per number of bits the geometric mean over layers of every solver's error against rounding's."""
    out: dict[str, Any] = {}
    for bits, name in FORMATS.items():
        own = [row for row in rows if row["format"] == parse_format(name).name]
        out[bits] = {
            solver: [
                round(statistics.geometric_mean(r["quality"][solver][i] / r["quality"]["rounding"][i] for r in own), 4)
                for i in (0, 1)
            ]
            for solver in own[0]["quality"]
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="smollm2")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of S; as many again for the others")
    parser.add_argument("--repetitions", type=int, default=3, help="timed repetitions, one thread")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for layer in layers(arguments.source, arguments.tokens):
        for name in FORMATS.values():
            rows.append(compare(layer, name, arguments.repetitions))
            print(rows[-1], flush=True)
    write("lowbit_solvers", {"tokens": arguments.tokens, "error_against_rounding": summary(rows), "layers": rows})


if __name__ == "__main__":
    main()
