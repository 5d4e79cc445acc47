"""What kind of change leads from a weight of OLD to that of NEW. Pure functions on tensors.

Each kind is a test; the first in `_MATRIX_TESTS` (simple causes before general ones) that explains the change names it.
Every test allows for what rounding to bfloat16 does on top, so that a converted copy does not hide a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from peelwise.records.base import Value
from peelwise.records.compare import KindOfChange
from peelwise.tasks.compare.lattice import lattice_at, lattice_of
from peelwise.tasks.compare.matching import matched_rows, moved_group
from peelwise.tasks.compare.spectra import is_cut, is_random_like, rank_within, singular_values

ROUNDING = 2.0**-8  # relative: the most that rounding to bfloat16 changes one number
_CLOSE = 5e-3  # of a norm: what counts as equal, up to that rounding
_EXPLAINED = 0.3  # of the difference's norm that an explanation may leave
_UNCORRELATED = 0.1  # cosine
_EXACT = 1e-3  # of a norm: float32 arithmetic on large sums
_FEWEST = 8  # numbers that a factor or a row must be judged by

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Kind:
    """A kind of change with the numbers that belong to it, such as a factor or a rank."""

    code: KindOfChange
    values: dict[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Change:
    """A weight before and after, ``[m, n]`` or ``[n]``, float32, and the same weight of OLD's other blocks."""

    old: Tensor
    new: Tensor
    elsewhere: Mapping[int, Tensor] = field(default_factory=dict)

    @cached_property
    def changed(self) -> Tensor:
        """Where the weight differs by more than rounding, bool of the weight's shape."""
        return (self.new - self.old).abs() > ROUNDING * torch.maximum(self.old.abs(), self.new.abs())

    @cached_property
    def part(self) -> Change:
        """The rows and columns of a matrix in which something changed by more than rounding; all if nothing did."""
        if self.old.dim() == 1:
            return self
        rows, columns = self.changed.any(dim=1), self.changed.any(dim=0)
        if not bool(rows.any()) or bool(rows.all() and columns.all()):
            return self
        return Change(self.old[rows][:, columns], self.new[rows][:, columns])

    @cached_property
    def size(self) -> float:
        """Norm of the difference."""
        return float((self.new - self.old).norm())

    @cached_property
    def spectrum(self) -> Tensor:
        """Singular values of the difference."""
        return singular_values(self.new - self.old)

    @cached_property
    def cosine(self) -> float:
        """Cosine between old and new."""
        both = float(self.old.norm()) * float(self.new.norm())
        return float((self.old * self.new).sum()) / both if both else 0.0

    def explains(self, guess: Tensor) -> bool:
        """Whether ``guess`` is the new weight up to rounding, and most of the change with it."""
        left = float((self.new - guess).norm())
        return left <= min(_CLOSE * float(self.new.norm()), _EXPLAINED * self.size)


@torch.no_grad()
def kind_of(old: Tensor, new: Tensor, elsewhere: Mapping[int, Tensor] | None = None) -> Kind:
    """Return how a weight of NEW came from OLD's.

    Args:
        old: the effective weight ``[d_out, d_in]`` or a vector ``[n]``.
        new: the same of the other model, same shape.
        elsewhere: the same tensor of OLD's other blocks, by block, to recognise a copy.

    Returns:
        The first kind of the table that explains the change up to rounding to bfloat16, else ``other``.
    """
    if torch.equal(old, new):
        return Kind("unchanged")
    tests = _MATRIX_TESTS if old.dim() == 2 and min(old.shape) > 1 else _VECTOR_TESTS
    shape = old.shape if tests is _MATRIX_TESTS else (-1,)
    dtype = _rounded(old, new)
    if dtype is not None:
        return dtype
    before, after = (t.float().reshape(shape) for t in (old, new))
    change = Change(before, after, _same_shape(old, elsewhere or {}))
    return next((kind for test in tests if (kind := test(change)) is not None), Kind("other"))


def _same_shape(old: Tensor, elsewhere: Mapping[int, Tensor]) -> dict[int, Tensor]:
    return {block: tensor for block, tensor in elsewhere.items() if tensor.shape == old.shape}


def _rounded(old: Tensor, new: Tensor) -> Kind | None:
    for name, dtype in _DTYPES.items():
        if torch.equal(old.float().to(dtype).float(), new.float()):
            return Kind("rounding", {"dtype": name})
    return None


def _zeroed(change: Change) -> Kind | None:
    if not bool(change.changed.any()) or bool((change.new[change.changed] != 0).any()):
        return None
    share = float(change.changed.float().mean())
    if change.new.dim() == 1:
        return Kind("zeroed", {"share": share})
    rows, columns = change.changed.any(dim=1), change.changed.any(dim=0)
    found: dict[str, Value] = {"share": share}
    if bool((change.new[rows] == 0).all()) and not bool(rows.all()):
        found["rows"] = int(rows.sum())
    elif bool((change.new[:, columns] == 0).all()) and not bool(columns.all()):
        found["columns"] = int(columns.sum())
    return Kind("zeroed", found)


def _copied(change: Change) -> Kind | None:
    size = float(change.new.norm())
    for block, other in change.elsewhere.items():
        if abs(float(other.norm()) - size) > _CLOSE * size:
            continue
        if change.explains(other.float().reshape(change.new.shape)):
            return Kind("copied", {"block": block})
    return None


def _scaled(change: Change) -> Kind | None:
    part = change.part
    own = float(part.old.square().sum())
    factor = float((part.old * part.new).sum()) / own if own else 1.0
    if part.explains(factor * part.old):
        if abs(factor + 1) <= _CLOSE:
            return Kind("sign", _affected(change))
        return Kind("scale", {"factor": factor, **_affected(change)})
    for name, along in (("rows", 1), ("columns", 0)) if part.old.dim() == 2 else ():
        if part.old.shape[along] < _FEWEST:
            continue  # a factor for so few numbers explains anything
        own_each = part.old.square().sum(along, keepdim=True)
        factors = (part.old * part.new).sum(along, keepdim=True) / own_each.clamp_min(torch.finfo(torch.float32).tiny)
        if part.explains(factors * part.old):
            if bool(((factors.abs() - 1).abs() <= _CLOSE).all()):
                return Kind("sign", {"by": name})
            return Kind("scale", {"by": name, "least": float(factors.min()), "largest": float(factors.max())})
    return None


def _affected(change: Change) -> dict[str, Value]:
    """Return how many rows or columns a change is confined to; nothing where it is in all of them."""
    if change.old.dim() != 2 or change.part is change:
        return {}
    (m, n), (rows, columns) = change.old.shape, change.part.old.shape
    found: dict[str, Value] = {"rows": rows} if rows < m else {}
    return found | ({"columns": columns} if columns < n else {})


def _transposed(change: Change) -> Kind | None:
    m, n = change.old.shape
    return Kind("transposed") if m == n and change.explains(change.old.T) else None


def _permuted(change: Change) -> Kind | None:
    rows, columns = change.changed.any(dim=1), change.changed.any(dim=0)
    for name, old, new, where in (
        ("rows", change.old, change.new, rows),
        ("columns", change.old.T, change.new.T, columns),
    ):
        found = matched_rows(old, new[where]) if old.shape[1] >= _FEWEST and bool(where.any()) else None
        if found is None:
            continue
        source = torch.arange(len(old), device=old.device)
        source[where] = found
        if not Change(old, new).explains(old[source]):
            continue
        if len(torch.unique(source)) < len(source):
            return Kind("duplicated", {"of": name})
        return Kind("permutation", {"of": name, "moved": int(where.sum()), "group": moved_group(source)})
    return None


def _on_lattice(change: Change) -> Kind | None:
    found = lattice_of(change.new)
    if found is None or change.cosine < _EXPLAINED:
        return None
    before = lattice_at(change.old, found.group)
    if before is not None and before.size <= found.size:
        return None  # OLD was as coarse: rounding again explains nothing
    values: dict[str, Value] = {"group": found.group}
    values |= {"steps": found.steps} if found.steps is not None else {"levels": found.levels or 0}
    return Kind("lattice", values)


def _truncated(change: Change) -> Kind | None:
    ranks, spectra = [], [singular_values(w) for w in (change.old, change.new)]
    for values in spectra:
        ranks.append(rank_within(values, _CLOSE * float(values.norm())))
    cut = is_cut(spectra[1], ranks[1], _EXPLAINED)
    return Kind("truncated", {"rank": ranks[1]}) if cut and ranks[1] < 0.9 * ranks[0] else None


def _low_rank(change: Change) -> Kind | None:
    values, whole = change.spectrum, float(change.old.norm())
    # Rounding on top of the update is as large as some updates are, so it is allowed for where the update is larger.
    rounding = _CLOSE * whole if change.size > 4 * _CLOSE * whole else 0.0
    for tolerance in (_EXACT * change.size, rounding):
        rank = rank_within(values, tolerance) if tolerance else 0
        if 0 < rank <= len(values) // 4 and is_cut(values, rank, _EXPLAINED):
            return Kind("low-rank", {"rank": rank})
    return None


def _redrawn(change: Change) -> Kind | None:
    part = change.part
    if abs(part.cosine) >= _UNCORRELATED:
        return None
    return Kind("re-drawn" if is_random_like(part.new) else "replaced")


def _noise(change: Change) -> Kind | None:
    part = change.part
    if not is_random_like(part.new - part.old):
        return None
    return Kind("noise", {"relative": part.size / max(float(part.old.norm()), torch.finfo(torch.float32).tiny)})


def _shifted(change: Change) -> Kind | None:
    shift = float((change.new - change.old).mean())
    return Kind("shifted", {"by": shift}) if change.explains(change.old + shift) else None


def _reordered(change: Change) -> Kind | None:
    """Tell a permuted vector by its sorted values."""
    old, new = (t.sort().values for t in (change.old, change.new))
    left = float((new - old).norm())
    same = left <= min(_CLOSE * float(new.norm()), 0.1 * change.size)
    return Kind("permutation", {"of": "entries"}) if same and len(old) >= _FEWEST else None


def _replaced_vector(change: Change) -> Kind | None:
    return Kind("replaced") if abs(change.cosine) < _UNCORRELATED and len(change.old) >= _FEWEST else None


_Test = Callable[[Change], Kind | None]
_MATRIX_TESTS: tuple[_Test, ...] = (
    *(_zeroed, _copied, _scaled, _transposed, _permuted),
    *(_on_lattice, _truncated, _low_rank, _redrawn, _noise),
)
_VECTOR_TESTS: tuple[_Test, ...] = (_zeroed, _copied, _scaled, _shifted, _reordered, _replaced_vector)


def joint_kind(kinds: Mapping[str, Kind], weights: Mapping[str, float]) -> Kind:
    """Return what is true of most of the change of a part.

    Args:
        kinds: of its tensors.
        weights: how much of the change each tensor holds: its numbers times its relative distance.

    Returns:
        The kind with most of the change in it, with the values that all its tensors agree on. What is merely rounded
        counts only where nothing else happened: in a converted copy all numbers are, and the gains of a norm are few.
    """
    changed = {name: kind for name, kind in kinds.items() if kind.code != "unchanged"}
    if not changed:
        return Kind("unchanged")
    changed = {name: kind for name, kind in changed.items() if kind.code != "rounding"} or changed
    totals: dict[KindOfChange, float] = {}
    for name, kind in changed.items():
        totals[kind.code] = totals.get(kind.code, 0.0) + weights[name]
    code = max(totals, key=lambda each: totals[each])
    values = [kind.values for kind in changed.values() if kind.code == code]
    agreed = {k: v for k, v in values[0].items() if all(_agrees(other.get(k), v) for other in values)}
    return Kind(code, agreed)


def _agrees(one: Value | None, other: Value) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= _CLOSE * max(abs(one), abs(other))
    return one == other
