"""Kinds of change: each is recognised on uneven weights, exactly and under rounding, and not seen where it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peelwise.tasks.compare.kinds import Change, Kind, joint_kind, kind_of
from peelwise.tasks.compare.lattice import lattice_of
from peelwise.tasks.compare.matching import matched_rows, moved_group
from peelwise.tasks.compare.spectra import is_random_like, rank_within, singular_values

ROWS, COLUMNS, HEAD = 192, 96, 24


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _trained(seed: int = 0) -> Tensor:
    """Return a matrix whose spectrum falls as those of trained ones do, with rows of uneven size."""
    core = _draw(ROWS, COLUMNS, seed=seed) @ torch.diag(torch.linspace(2.0, 0.2, COLUMNS)) @ _draw(COLUMNS, COLUMNS)
    return (0.5 + torch.rand(ROWS, 1, generator=torch.Generator().manual_seed(seed))) * core / 100


def _order(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(1))


def _heads_in_another_order(w: Tensor) -> Tensor:
    return w.reshape(-1, HEAD, COLUMNS).flip(0).reshape(w.shape)


def _to_bits(w: Tensor, bits: int, group: int = COLUMNS) -> Tensor:
    rows = w.reshape(-1, group)
    step = rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((rows / step).round() * step).reshape(w.shape)


def _update(w: Tensor, rank: int, relative: float) -> Tensor:
    d = _draw(ROWS, rank, seed=2) @ _draw(rank, COLUMNS, seed=3)
    return w + relative * w.norm() / d.norm() * d


def _cut(w: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def _rows_only(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def changed(w: Tensor) -> Tensor:
        out = w.clone()
        out[HEAD : 2 * HEAD] = change(w[HEAD : 2 * HEAD])
        return out

    return changed


CASES: dict[str, tuple[Callable[[Tensor], Tensor], str, dict[str, object]]] = {
    "all zero": (torch.zeros_like, "zeroed", {"share": 1.0}),
    "rows zero": (_rows_only(torch.zeros_like), "zeroed", {"rows": HEAD}),
    "scaled": (lambda w: 1.25 * w, "scale", {"factor": 1.25}),
    "a few rows scaled": (_rows_only(lambda w: 2 * w), "scale", {"factor": 2.0, "rows": HEAD}),
    "columns scaled": (lambda w: w * torch.linspace(0.5, 2.0, COLUMNS), "scale", {"by": "columns"}),
    "negated": (lambda w: -w, "sign", {}),
    "rows of both signs": (lambda w: w * (2.0 * (_draw(ROWS, 1) > 0) - 1), "sign", {}),
    "rows permuted": (lambda w: w[_order(ROWS)], "permutation", {"of": "rows", "group": 1}),
    "columns permuted": (lambda w: w[:, _order(COLUMNS)], "permutation", {"of": "columns", "group": 1}),
    "heads permuted": (_heads_in_another_order, "permutation", {"of": "rows", "group": HEAD}),
    "rows copied over others": (lambda w: w[torch.arange(ROWS) // 2], "duplicated", {}),
    "three bits": (lambda w: _to_bits(w, 3), "lattice", {"group": 0, "steps": 6}),
    "four bits in groups": (lambda w: _to_bits(w, 4, 32), "lattice", {"group": 32}),
    "eight bits": (lambda w: _to_bits(w, 8), "lattice", {"group": 0}),
    "cut": (lambda w: _cut(w, 30), "truncated", {"rank": 30}),
    "updated at rank 4": (lambda w: _update(w, 4, 0.1), "low-rank", {"rank": 4}),
    "re-drawn": (lambda w: w.std() * _draw(ROWS, COLUMNS, seed=9), "re-drawn", {}),
    "of another run": (lambda w: _trained(seed=5), "replaced", {}),
    "noise": (lambda w: w + 0.2 * w.std() * _draw(ROWS, COLUMNS, seed=9), "noise", {}),
    "copied": (lambda w: _trained(seed=4), "copied", {"block": 7}),
}
# Rounding on top would round away what tells these apart from other kinds, or is that kind itself.
NOT_AFTER_ROUNDING = {"eight bits"}
ELSEWHERE = {3: _trained(seed=3), 7: _trained(seed=4)}


@pytest.mark.parametrize("name", CASES)
def test_every_kind_is_recognised_exactly(name: str) -> None:
    change, code, values = CASES[name]
    old = _trained()
    kind = kind_of(old, change(old), ELSEWHERE)
    assert kind.code == code
    for key, value in values.items():
        assert kind.values[key] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value)


@pytest.mark.parametrize("name", sorted(set(CASES) - NOT_AFTER_ROUNDING))
def test_every_kind_is_recognised_in_a_copy_rounded_to_bfloat16(name: str) -> None:
    change, code, _ = CASES[name]
    old = _trained()
    assert kind_of(old, change(old).bfloat16().float(), ELSEWHERE).code == code


def test_nothing_is_named_where_nothing_or_only_rounding_happened() -> None:
    old = _trained()
    assert kind_of(old, old.clone()) == Kind("unchanged")
    for name, dtype in (
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        ("float8_e4m3fn", torch.float8_e4m3fn),
    ):
        assert kind_of(old, old.to(dtype).float()) == Kind("rounding", {"dtype": name})


def test_training_has_none_of_the_kinds_that_a_fault_has(small_gpt) -> None:
    """Late steps of Adam can be as random as noise (in no direction more than in another); early ones are not."""
    stages = [dict(small_gpt(stage)[0].model.layers.named_parameters()) for stage in ("early", "middle", "final")]
    matrices = [name for name, p in stages[0].items() if p.dim() == 2]
    for earlier, later, allowed in ((*stages[:2], 6), (*stages[1:], len(matrices))):
        codes = [kind_of(earlier[n].detach(), later[n].detach()).code for n in matrices]
        assert set(codes) <= {"other", "noise"}
        assert codes.count("noise") <= allowed
        assert "other" in codes


def test_vectors() -> None:
    gains = 1 + 0.1 * _draw(64)
    assert kind_of(gains, gains + 0.5).code == "shifted"
    assert kind_of(gains, 2 * gains) == Kind("scale", {"factor": pytest.approx(2.0)})
    assert kind_of(gains, gains[_order(64)]).code == "permutation"
    assert kind_of(gains, torch.zeros(64)).code == "zeroed"
    assert kind_of(gains, gains + 0.1 * _draw(64, seed=3)).code == "other"  # training or noise: nobody can tell
    assert kind_of(gains, 1 + 0.1 * _draw(64, seed=8), {2: 1 + 0.1 * _draw(64, seed=8)}).values == {"block": 2}


def test_a_lattice_that_was_there_before_explains_nothing() -> None:
    old = _to_bits(_trained(), 4, 32)
    assert lattice_of(old) is not None
    assert kind_of(old, 1.25 * old).code == "scale"
    assert kind_of(old, _to_bits(old, 2)).code == "lattice"
    assert lattice_of(_trained()) is None


def test_ranks_and_spectra_are_those_of_a_singular_value_decomposition() -> None:
    w = _trained()
    torch.testing.assert_close(singular_values(w), torch.linalg.svdvals(w.double()), rtol=1e-6, atol=1e-9)
    exact = torch.linalg.svdvals(w.double())
    for tolerance in (0.5, 0.1, 0.01):
        slow = next(r for r in range(len(exact) + 1) if float(exact[r:].norm()) <= tolerance)
        assert rank_within(singular_values(w), tolerance) == slow
    assert is_random_like(_draw(96, 48))
    assert not is_random_like(w)


def test_rows_are_matched_as_a_search_over_all_pairs_does() -> None:
    w = _trained()
    order = _order(ROWS)
    shuffled = w[order]
    slow = [min(range(ROWS), key=lambda j: float((w[j] - row).norm())) for row in shuffled]
    found = matched_rows(w, shuffled)
    assert found is not None
    assert found.tolist() == slow == order.tolist()
    assert matched_rows(w, _trained(seed=6)) is None
    assert moved_group(torch.arange(ROWS).reshape(-1, HEAD).flip(0).flatten()) == HEAD
    assert moved_group(order) == 1


def test_a_part_is_called_after_most_of_its_change() -> None:
    kinds = {"a": Kind("scale", {"factor": 2.0}), "b": Kind("noise"), "c": Kind("scale", {"factor": 2.001})}
    assert joint_kind(kinds, {"a": 1.0, "b": 1.5, "c": 1.0}) == Kind("scale", {"factor": 2.0})
    assert joint_kind(kinds, {"a": 1.0, "b": 2.5, "c": 1.0}).code == "noise"


def test_rounding_names_a_part_only_where_nothing_else_happened_to_it() -> None:
    kinds = {"matrix": Kind("rounding", {"dtype": "bfloat16"}), "gains": Kind("copied", {"block": 18})}
    assert joint_kind(kinds, {"matrix": 9000.0, "gains": 400.0}) == Kind("copied", {"block": 18})
    assert joint_kind({"matrix": kinds["matrix"]}, {"matrix": 9000.0}).code == "rounding"
    assert joint_kind({"a": Kind("unchanged")}, {"a": 0.0}) == Kind("unchanged")


def test_a_change_is_looked_at_where_it_is() -> None:
    old = _trained()
    new = old.clone()
    new[5:9, 10:30] *= 3
    part = Change(old, new).part
    assert part.old.shape == (4, 20)
    assert kind_of(old, new).values["rows"] == 4
