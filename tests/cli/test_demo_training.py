"""The demonstration, in a shortened form."""

import urllib.request

import pytest
import torch

pytest.importorskip("uvicorn", reason="the live page needs starlette and uvicorn")

from peelwise.cli.demo_training import BLOCKS, Plan, SmallGPT, demonstrate, train
from peelwise.show.dashboard.serve import Address
from peelwise.store.reader import RunReader

SHORT = Plan(steps=8, cut_off=1, from_step=4, probe_tokens=1_500, budget=0.9)


class Noting:
    """Stands in for a monitor and notes which blocks have gradients, and the weights."""

    def __init__(self, model):
        self.model, self.fed, self.weights = model, [], []

    def step(self, step, loss):
        blocks = self.model.blocks
        self.fed.append([all(p.grad is not None for p in block.parameters()) for block in blocks])
        self.weights.append(torch.cat([p.detach().flatten() for p in blocks[SHORT.cut_off].parameters()]))


def test_one_block_is_cut_off_from_its_step_on_and_no_other():
    torch.manual_seed(0)
    model = SmallGPT()
    noting = Noting(model)
    stream = torch.randint(256, (5_000,))
    assert list(train(noting, model, torch.optim.AdamW(model.parameters(), lr=1e-3), stream, SHORT)) == list(range(8))
    for step, fed in enumerate(noting.fed):
        for block, is_fed in enumerate(fed):
            assert is_fed == (step < SHORT.from_step or block != SHORT.cut_off)
    for before, after in zip(noting.weights[4:-1], noting.weights[5:], strict=True):
        assert torch.allclose(after, before * (1 + SHORT.growth))


def test_it_trains_serves_and_ends(tmp_path):
    store, said, pages = tmp_path / "run.db", [], []

    def look(url):
        pages.append(urllib.request.urlopen(url.partition("#")[0]).read())

    demonstrate(store, Address(port=0), browser=True, stay=False, say=said.append, plan=SHORT, open_browser=look)
    assert b"peelwise runs" in pages[0]
    assert said[0].startswith("Open http://127.0.0.1:")
    assert said[0].endswith("/#block=1")
    assert "Step 4: block 1 gets no gradient from now on." in said
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
