"""What a capture holds, and that it leaves no hook."""

import pytest
import torch
from torch import nn

from audits import Snapshot, block_of
from peelwise.model.architectures import find_blocks
from peelwise.model.capture import captured
from peelwise.model.layers import Block, LinearLayer
from zoo import ZOO, sample_ids

# Per architecture the maps of a block that are fed one and the same tensor.
SHARED = {
    "llama": [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)],
    "qwen2": [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)],
    "gpt2": [("c_attn",), ("attn.c_proj",), ("c_fc",), ("mlp.c_proj",)],
    "neox-parallel": [("query_key_value",), ("attention.dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)],
    "plain": [("qkv",), ("out",), ("feed_forward.0",), ("feed_forward.2",)],
}


class Twice(nn.Module):
    """Two maps of one input, one of which has a bias; the first may run twice, or be called by keyword."""

    def __init__(self, times: int = 1, keyword: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3, bias=False)
        self.unused = nn.Linear(4, 4)
        self.times, self.keyword = times, keyword

    def forward(self, x):
        y = self.b(x)
        for _ in range(self.times):
            y = y + (self.a(input=x) if self.keyword else self.a(x))
        return y


def maps_of(module):
    return [LinearLayer(name, child, False) for name, child in module.named_children()]


def test_maps_of_one_input_share_a_sum_only_where_both_or_neither_has_a_bias():
    module, x = Twice(), torch.randn(2, 5, 4)
    a, b, unused = maps_of(module)
    with captured([a, b, unused]) as capture:
        y = module(x)
    ((of_a,), (of_b,)) = capture.calls[a], capture.calls[b]
    assert of_a.x is x
    assert capture.groups == {b: b, a: a}
    torch.testing.assert_close(of_a.y + of_b.y, y)
    assert unused not in capture.calls


@pytest.mark.parametrize("name", SHARED)
def test_groups_of_real_blocks(name):
    model = ZOO[name]()
    blocks = find_blocks(model)
    with captured(blocks[0].linears) as capture:
        model(sample_ids())
    groups: dict[LinearLayer, set[LinearLayer]] = {}
    for linear, first in capture.groups.items():
        groups.setdefault(first, set()).add(linear)
    expected = [{block_of(blocks, name) for name in names} for names in SHARED[name]]
    assert sorted(map(len, groups.values())) == sorted(map(len, expected))
    assert all(group in expected for group in groups.values())


def test_outputs_stay_in_the_graph():
    module = Twice()
    a = maps_of(module)[0]
    with captured([a]) as capture:
        loss = module(torch.randn(6, 4)).square().sum()
    (call,) = capture.calls[a]
    g, W = torch.autograd.grad(loss, [call.y, module.a.weight])
    torch.testing.assert_close(g.T @ call.x, W)


def test_keyword_input():
    module, x = Twice(keyword=True), torch.randn(6, 4)
    a = maps_of(module)[0]
    with captured([a]) as capture:
        module(x)
    assert capture.calls[a][0].x is x


def test_every_run_of_a_layer_is_kept():
    module = Twice(times=2)
    a = maps_of(module)[0]
    with captured([a]) as capture:
        loss = module(torch.randn(6, 4)).square().sum()
    one, two = capture.calls[a]
    *g, W = torch.autograd.grad(loss, [one.y, two.y, module.a.weight])
    torch.testing.assert_close(g[0].T @ one.x + g[1].T @ two.x, W)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_no_hook_remains(error):
    model = ZOO["llama"]()
    before = Snapshot.of(model)
    blocks: tuple[Block, ...] = find_blocks(model)
    try:
        with captured([linear for block in blocks for linear in block.linears]):
            with pytest.raises(AssertionError):
                before.assert_unchanged(model)  # the control: hooks are seen while they are there
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    before.assert_unchanged(model)
