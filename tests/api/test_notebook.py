"""Results shown by a real notebook: a kernel runs the cells, and what it would display is looked at."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
NotebookClient = pytest.importorskip("nbclient").NotebookClient

TESTS = Path(__file__).resolve().parents[1]
SETUP = f"""
import sys
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent / "src")!r}]
sys.modules["matplotlib"] = None  # none is needed
import torch, peelwise
from audits import tiny_probe
from peelwise.nn import quantize_
from zoo import ZOO, sample_ids
torch.set_num_threads(1)
model, probe = ZOO["llama"](), tiny_probe()
"""
CELLS = {
    "audit": (
        'peelwise.audit(model, probe, peelwise.AuditSettings("1m", 1, 1, controls=False), name="<b>mine</b>")',
        ("&lt;b&gt;mine&lt;/b&gt;", "<svg", "solo gain"),
    ),
    "peel": (
        'peelwise.peel(model, probe, peelwise.PeelSettings("1m", [[1, 2, 3]], rounds=1, controls=False))',
        ("1 2 3", "gain over model"),
    ),
    "check": (
        "peelwise.check(model, probe, peelwise.CheckSettings(('gain_slope',)))",
        ("no depth to compare with", "LlamaForCausalLM"),
    ),
    "quantcheck": (
        "low = ZOO['llama'](); quantize_(low, 'int3')\n"
        "peelwise.quantcheck(low, model, probe, peelwise.QuantcheckSettings('1m', max_sweeps=1))",
        ("recoverable at the same bit width", "int3"),
    ),
    "monitor": (
        "net = ZOO['llama']().train()\n"
        "optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)\n"
        "often = {'budget': None, 'schedule': peelwise.every(1)}\n"
        "monitor = peelwise.Monitor(net, probe, optimizer=optimizer, store=None, **often)\n"
        "for step in range(2):\n"
        "    loss = net(sample_ids(2, 13), labels=sample_ids(2, 13)).loss\n"
        "    loss.backward(); optimizer.step(); monitor.step(step, loss=loss); optimizer.zero_grad()\n"
        "monitor.close()\n"
        "monitor.last",
        ("Step 1", "nats per token on the probe"),
    ),
    "monitor itself": ("monitor", ("Step 1", "model.layers.0")),
    "yes": (
        "torch.manual_seed(0)\n"
        "net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))\n"
        "x = torch.randn(400, 4)\n"
        "peelwise.yes_bounds(net, x, x[:, :3].abs(), controls=False)",
        ("YES-0", "cloud: "),
    ),
}


@pytest.fixture(scope="module")
def executed():
    """The notebook after its kernel ran every cell."""
    cells = [nbformat.v4.new_code_cell(source) for source in (SETUP, *(code for code, _ in CELLS.values()))]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
    nbformat.validate(notebook)
    return dict(zip(CELLS, notebook.cells[1:], strict=True))


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_shows_the_result(executed, name):
    shown = [output for output in executed[name].outputs if output.output_type == "execute_result"]
    assert len(shown) == 1
    data = shown[0].data
    assert data["text/html"].startswith('<div class="peelwise"')
    assert all(words in data["text/html"] for words in CELLS[name][1])
    assert "<script" not in data["text/html"]
    assert data["text/plain"]
