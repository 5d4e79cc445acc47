from __future__ import annotations

import pytest
import torch

from peelwise.stats.projection import Projector


def _designs() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    plain = torch.rand(300, 20, dtype=torch.float64)
    low = plain[:, :5] @ torch.randn(5, 20, dtype=torch.float64)
    dead = plain.clone()
    dead[:, ::3] = 0
    stretched = plain * torch.logspace(0, -10, 20, dtype=torch.float64)
    nearly = plain.clone()
    nearly[:, 3] = nearly[:, 4] + 1e-5 * torch.randn(300, dtype=torch.float64)
    return {
        "normal": plain,
        "svd": low,
        "dead": dead,
        "stretched": stretched,
        "normal+correction": nearly,
        "zero": torch.zeros(300, 4, dtype=torch.float64),
    }


@pytest.mark.parametrize("name", list(_designs()))
def test_projector_has_the_semantics_of_a_pseudo_inverse(name: str) -> None:
    design, targets = _designs()[name], torch.rand(300, 6, dtype=torch.float64)
    projector = Projector(design)
    expected = design @ (torch.linalg.pinv(design) @ targets)
    torch.testing.assert_close(projector.fit(targets), expected, rtol=1e-9, atol=1e-9)
    if name in ("normal", "svd", "normal+correction"):
        assert projector.method == name
