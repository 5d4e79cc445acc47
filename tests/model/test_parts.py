"""The parts of a block have names of their own, whatever the modules are called."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peelwise.engine.depth.passes import observe
from peelwise.model.architectures import find_blocks
from peelwise.model.parts import parts_of
from peelwise.model.runner import Runner
from peelwise.probe.rows import Split

WIDTH = 16


class GatedNorm(nn.Module):
    """A normalisation with a gate of two linear layers, as A.X K2 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.down, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x * torch.sigmoid(self.up(torch.tanh(self.down(x))))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))
        self.post_mlp_layernorm = GatedNorm()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.post_mlp_layernorm(self.mlp(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(5))
        self.head = nn.Linear(WIDTH, 31)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_a_norm_that_is_called_after_the_mlp_is_a_branch_of_its_own() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    blocks = find_blocks(model)
    assert [branch.name for branch in parts_of(blocks[0]).branches] == ["mlp", "post_mlp_layernorm"]
    ids = torch.randint(0, 31, (3, 9), generator=torch.Generator().manual_seed(1))
    runner = Runner(model, blocks)
    trace = runner.trace(Split(ids, torch.ones_like(ids, dtype=torch.bool)))
    for parts, seen in observe(runner, [parts_of(block) for block in blocks], trace):
        before = seen.stream.before
        with torch.no_grad():
            mlp = model.layers[parts.block.index].mlp(before)
        assert torch.allclose(seen.stream.updates["mlp"], mlp, atol=1e-6)
        assert seen.stream.updates["post_mlp_layernorm"].shape == before.shape
