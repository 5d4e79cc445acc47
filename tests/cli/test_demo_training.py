"""The demonstration, in a shortened form."""

import itertools
import urllib.request

import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("uvicorn", reason="the live page needs starlette and uvicorn")

from peelwise.cli import demo_training
from peelwise.cli.demo_training import BLOCKS, Plan, SmallGPT, demonstrate, mend, train
from peelwise.probe.texts import reference_prose
from peelwise.show.dashboard.serve import Address
from peelwise.store.reader import RunReader

SHORT = Plan(steps=10, cut_off=1, from_step=4, mended_at=8, probe_tokens=1_500, audit_tokens=1_500, every=2, budget=0.9)


class Noting:
    """Stands in for a monitor and notes which blocks have gradients, and the weights."""

    def __init__(self, model):
        self.model, self.fed, self.weights = model, [], []

    def step(self, step, loss):
        blocks = self.model.blocks
        self.fed.append([all(p.grad is not None for p in block.parameters()) for block in blocks])
        self.weights.append(torch.cat([p.detach().flatten() for p in blocks[SHORT.cut_off].parameters()]))


def followed(monkeypatch, mend):
    """Train as planned with something else in the place of mending, and return what was noted."""
    torch.manual_seed(0)
    model = SmallGPT()
    noting, stream = Noting(model), torch.randint(256, (5_000,))
    monkeypatch.setattr(demo_training, "mend", mend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert list(train(noting, model, optimizer, stream, SHORT)) == list(range(SHORT.steps))
    return noting


def test_one_block_is_cut_off_until_it_is_mended_and_no_other(monkeypatch):
    noting = followed(monkeypatch, lambda *_: None)
    for step, fed in enumerate(noting.fed):
        for block, is_fed in enumerate(fed):
            cut_off = SHORT.from_step <= step < SHORT.mended_at and block == SHORT.cut_off
            assert is_fed != cut_off
    broken = noting.weights[SHORT.from_step : SHORT.mended_at]
    for before, after in itertools.pairwise(broken):
        assert torch.allclose(after, before * (1 + SHORT.growth))


def test_mending_changes_the_linear_layers_of_that_block_alone():
    torch.manual_seed(0)
    model, stream = SmallGPT(), torch.tensor(list("\n\n".join(reference_prose()).encode()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for starts in torch.randint(4_000, (30, 16, 1)):  # a model that has learnt nothing has nothing to find
        batch = stream[starts + torch.arange(65)]
        cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mend(model, optimizer, stream, SHORT)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    layers = [f"blocks.{SHORT.cut_off}.{layer}" for layer in ("qkv", "out", "up", "down")]
    assert changed == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


def test_it_trains_serves_and_ends(tmp_path):
    store, said, pages = tmp_path / "run.db", [], []

    def look(url):
        pages.append(urllib.request.urlopen(url.partition("#")[0]).read())

    demonstrate(store, Address(port=0), browser=True, stay=False, say=said.append, plan=SHORT, open_browser=look)
    assert b"peelwise runs" in pages[0]
    assert said[0].startswith("Open http://127.0.0.1:")
    assert said[0].endswith("/#block=1")
    assert "Step 4: block 1 gets no gradient from now on." in said
    assert "Step 8: block 1 has the weights that an audit found for it, and trains again." in said
    assert said[-1] == f"The history is kept: peelwise serve {store}"
    with RunReader(store) as reader:
        run = reader.latest()
        assert (run.status, len(run.info.blocks)) == ("finished", BLOCKS)
        assert len(reader.steps(run.id)) == SHORT.steps
        assert reader.probes(run.id)


def test_control_c_ends_it_cleanly(tmp_path):
    store, said = tmp_path / "run.db", []

    def say(line):
        said.append(line)
        if line.startswith("Step 4"):
            raise KeyboardInterrupt

    demonstrate(store, Address(port=0), browser=False, stay=True, say=say, plan=SHORT)
    assert said[-2] == "Ended."
    with RunReader(store) as reader:
        assert reader.latest().status == "finished"
        assert len(reader.steps(1)) == 5
