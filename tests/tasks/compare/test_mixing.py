"""Modules that compute what others compute: whatever those return."""

import torch
from torch import nn

from peelwise.tasks.compare.mixing import lent


class Router(nn.Module):
    """Returns weights and choices, as routers do, or choices alone, as indexers do."""

    def __init__(self, dtype: torch.dtype, *, alone: bool) -> None:
        super().__init__()
        self.gate, self.alone = nn.Linear(4, 3, dtype=dtype), alone

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        weights, choices = self.gate(x).topk(2)
        return choices if self.alone else (weights, choices)


def test_choices_stay_whole_numbers_and_weights_get_the_dtype_of_the_model():
    own, other = (Router(dtype, alone=False) for dtype in (torch.float32, torch.bfloat16))
    x = torch.randn(5, 4)
    with lent({own: other}):
        weights, choices = own(x)
    assert (weights.dtype, choices.dtype) == (torch.float32, torch.int64)
    assert torch.equal(choices, other(x.bfloat16())[1])
    assert own(x)[0].dtype == torch.float32
    assert not torch.equal(own(x)[0], weights)  # the control: its own again


def test_choices_alone_are_not_converted():
    own, other = (Router(torch.float32, alone=True) for _ in range(2))
    with lent({own: other}):
        assert own(torch.randn(5, 4)).dtype == torch.int64
