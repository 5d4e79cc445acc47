"""The gain slopes of all blocks together: which block has evidence of its own that its scales are wrong.

A damaged block disturbs what is behind it, so that many blocks have large slopes. Their products per token are
correlated, though: with ``s`` the mean of the products ``[gates]`` over ``n`` tokens and ``F = E[c c']`` their second
moments (the empirical Fisher of one scale per gate), ``n s' F^-1 s`` is the evidence of all gates together, and what of
it is lost without the gates of one block is that block's own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peelwise.model.parts import Parts

# In units of the gates' own second moments: tokens are few for as many gates, and correlations are noisy.
_DAMPING = 1.0


def gates_of(parts: Parts) -> tuple[str, ...]:
    """Return the parts of a block whose slopes are not the same by construction.

    Both branches, the norms, and the first layer of every branch: queries have the slope of keys, values that of
    attention, and so on.
    """
    names = {id(linear): name for name, linear in parts.linears.items()}
    first = [names[id(branch.linears[0])] for branch in parts.branches if len(branch.linears) > 1]
    return (*(branch.name for branch in parts.branches), *first, *parts.norms)


def marginal_evidence(products: Mapping[int, Tensor], damping: float = _DAMPING) -> dict[int, float]:
    """Return for every block ``n (s' F^-1 s - s_o' F_oo^-1 s_o) / gates``, ``o`` the gates of all other blocks.

    ``F`` has its diagonal scaled to 1 and ``damping`` added there. About 1 or less by chance, whatever other blocks do.
    Cost: one factorisation of ``[gates, gates]`` per block.

    Args:
        products: per block ``[n, gates]``, ``<g_t, y_t>`` of its gates; gates without any product are left out.
        damping: no unit.
    """
    blocks = sorted(products)
    alive = {block: products[block][:, products[block].square().sum(0) > 0].double() for block in blocks}
    if not any(each.shape[1] for each in alive.values()):
        return {}
    whole = torch.cat([alive[block] for block in blocks], dim=1)  # [n, gates]
    n = len(whole)
    size = whole.square().mean(0).sqrt()
    s = whole.mean(0) / size
    F = whole.T @ whole / n / torch.outer(size, size)
    F.diagonal().add_(damping)
    inverse = torch.linalg.inv(F)
    solved = inverse @ s
    found, start = {}, 0
    for block in blocks:
        own = slice(start, start + alive[block].shape[1])
        start = own.stop
        if own.stop > own.start:
            # s' F^-1 s - s_o' F_oo^-1 s_o = x_b' (F^-1)_bb^-1 x_b with x = F^-1 s, by the inverse of a partitioned F.
            x = solved[own]
            found[block] = float(n * (x @ torch.linalg.solve(inverse[own, own], x)) / (own.stop - own.start))
    return found
