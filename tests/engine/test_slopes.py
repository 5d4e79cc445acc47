"""First-order gains against differences of losses, sequence by sequence, and against convex losses."""

from __future__ import annotations

import pytest
import torch

from peelwise.engine.opening import open_report
from peelwise.engine.slopes import first_order_gains
from peelwise.model.architectures import find_blocks
from peelwise.model.guard import untouched
from peelwise.probe.rows import Split
from zoo import ZOO, sample_ids

STEP = 2e-3


# Large enough for losses that are added up in float32, small enough for a line, and for the choices of a router.
@pytest.mark.parametrize(
    ("name", "size"), [("plain", 0.1), ("gpt2", 0.1), ("llama", 0.1), ("lfm2", 0.1), ("mixtral", 0.005)]
)
def test_they_are_the_slope_of_the_losses_of_every_sequence(name: str, size: float) -> None:
    model, ids = ZOO[name]().double(), sample_ids(5, 20)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[3, 12:] = False  # padding counts for nothing
    blocks = find_blocks(model)
    with untouched(model):
        session = open_report(model, blocks, Split(ids, mask), micro_batch_tokens=40)
        generator = torch.Generator().manual_seed(0)
        changes = {}
        for block in blocks:
            changes[block.index] = {
                m: torch.randn(m.weight().shape[0], m.weight().shape[1] + m.has_bias, generator=generator).double()
                * size
                for m in block.linears
            }
        found = first_order_gains(session, session.report, changes)
        assert set(found) == {block.index for block in blocks}
        for index, of_block in changes.items():
            up, down = (
                session.losses(session.report, {m: sign * STEP * c for m, c in of_block.items()}, index)
                for sign in (1, -1)
            )
            torch.testing.assert_close(found[index], (down - up) / (2 * STEP), rtol=3e-3, atol=5e-3)


def test_no_step_along_a_change_of_the_last_layer_gains_more_than_the_line() -> None:
    """A softmax regression is convex in its weights, and so is the loss in those of the last block's last layer."""

    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(17, 12)
            self.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(12, 12)) for _ in range(2))
            self.head = torch.nn.Linear(12, 17)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    torch.manual_seed(0)
    model = Bare()
    ids = torch.randint(17, (6, 15))
    with untouched(model):
        blocks = find_blocks(model)
        session = open_report(model, blocks, Split(ids, torch.ones_like(ids, dtype=torch.bool)))
        linear = blocks[1].linears[0]
        for seed in range(10):
            generator = torch.Generator().manual_seed(seed)
            direction = torch.randn(12, 13, generator=generator)
            line = first_order_gains(session, session.report, {1: {linear: direction}})[1]
            for step in (0.01, 0.1, 1.0, -0.3):
                gained = session.report.losses - session.losses(session.report, {linear: step * direction}, 1)
                assert bool((gained <= step * line + 1e-4).all())
