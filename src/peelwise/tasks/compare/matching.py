"""Which row of one matrix is which row of another."""

from __future__ import annotations

import torch
from torch import Tensor

_PIECE = 1024  # rows compared at a time
_TRIED = 32  # rows that must find a partner before all are compared
_ALIKE = 0.9999  # cosine of rows that are the same up to rounding
_MOST_ROWS = 1 << 16


def matched_rows(old: Tensor, new: Tensor) -> Tensor | None:
    """Return for each row of ``new [k, d]`` the row of ``old [r, d]`` with the largest cosine, int64 ``[k]``.

    ``None`` if a few tried rows have no partner, so that the whole comparison, ``k r d``, is only paid where it leads
    somewhere.
    """
    if len(old) > _MOST_ROWS:
        return None
    unit_old, unit_new = (torch.nn.functional.normalize(w.float(), dim=1) for w in (old, new))
    tried = torch.linspace(0, len(new) - 1, min(_TRIED, len(new))).long()
    if float((unit_new[tried] @ unit_old.T).amax(dim=1).quantile(0.1)) < _ALIKE:
        return None
    return torch.cat([(piece @ unit_old.T).argmax(dim=1) for piece in torch.split(unit_new, _PIECE)])


def moved_group(source: Tensor) -> int:
    """Return the largest ``g`` such that a permutation ``[n]`` moves aligned groups of ``g`` neighbours as they are.

    Heads that changed places have the size of a head, neurons 1.
    """
    n = len(source)
    for group in sorted((g for g in range(1, n + 1) if n % g == 0), reverse=True):
        rows = source.reshape(-1, group)
        as_they_are = (rows - rows[:, :1] == torch.arange(group, device=source.device)).all()
        if bool(as_they_are) and bool((rows[:, 0] % group == 0).all()):
            return group
    return 1
