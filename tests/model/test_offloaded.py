"""Models that accelerate offloads: the same numbers as in memory, and afterwards every hook and weight as it was."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import peelwise
from audits import tiny_probe
from peelwise.errors import ModelError, PeelwiseError, UnsupportedModelError
from peelwise.model import offloaded, spill
from peelwise.model.carried import Carried
from peelwise.model.fingerprint import fingerprint
from peelwise.model.offloaded import brought
from peelwise.model.whereabouts import check_in_memory
from plain_gpt import PlainGPT
from second_device import second_device
from zoo import ZOO, sample_ids

accelerate = pytest.importorskip("accelerate")

Placed = Callable[[Path], nn.Module]
BUDGET, FORMATS = "10m", ("int2:group=16", "int4:group=16")
SETTINGS = peelwise.AuditSettings(BUDGET, joint_rounds=2, solo_rounds=1)
TASKS: dict[str, Callable[[nn.Module, peelwise.Probe], Any]] = {
    "check": lambda model, probe: peelwise.check(model, probe).record,
    "audit": lambda model, probe: peelwise.audit(model, probe, SETTINGS).record,
    "peel": lambda model, probe: peelwise.peel(model, probe, budget=BUDGET).record,
    "anatomy": lambda model, probe: peelwise.anatomy(model, probe, budget=BUDGET).record,
    "quantise": lambda model, probe: peelwise.quantise(model, probe, int3()).record,
    "allocate": lambda model, probe: peelwise.allocate(model, probe, peelwise.AllocateSettings(4.0, FORMATS)).record,
}


def int3() -> peelwise.QuantiseSettings:
    return peelwise.QuantiseSettings("int3:group=16")


def saved(path: Path, kind: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    ZOO[kind]().to(dtype).save_pretrained(path)  # type: ignore[operator]
    return path


def in_memory(path: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model


def by_transformers(path: Path, **places: str) -> nn.Module:
    """Open a folder with some modules on the disk, the rest in memory: hooks on all of them."""
    from transformers import AutoModelForCausalLM

    names = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "lm_head")
    device_map = dict.fromkeys((*names, "model.rotary_emb"), "cpu") | {
        name: place for key, place in places.items() for name in names if name.endswith(key)
    }
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, device_map=device_map, offload_folder=path / "offloaded"
    )
    return model.eval()


def dispatched(path: Path) -> nn.Module:
    """Disperse a model that is in memory: what goes to the disk is written there by accelerate."""
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.layers.2": "disk", "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk"}
    model: nn.Module = accelerate.dispatch_model(in_memory(path), device_map, offload_dir=path / "offloaded")
    return model


def in_dictionary(path: Path) -> nn.Module:
    model: nn.Module = accelerate.cpu_offload(in_memory(path), execution_device="cpu", offload_buffers=True)
    return model


def on_disk(path: Path) -> nn.Module:
    model: nn.Module = accelerate.disk_offload(in_memory(path), path / "offloaded", execution_device="cpu")
    return model


def one_block(path: Path) -> nn.Module:
    model = in_memory(path)
    whole = ["LlamaDecoderLayer"]  # brought at once
    accelerate.cpu_offload(model.model.layers[1], execution_device="cpu", preload_module_classes=whole)  # type: ignore[union-attr, index]
    return model


WAYS: dict[str, Placed] = {
    "transformers: blocks on disk": lambda path: by_transformers(path, **{"0": "disk", "1": "disk", "lm_head": "disk"}),
    "dispatch_model": dispatched,
    "cpu_offload": in_dictionary,
    "disk_offload": on_disk,
    "one block": one_block,
}
every_way = pytest.mark.parametrize("way", list(WAYS))


def state(model: nn.Module) -> list[object]:
    """Return what of a model must be as before: hooks, forwards, methods, flags, and the parameters themselves."""
    found: list[object] = []
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if not key.startswith("_") or key.startswith("_hf")}
        found.append((name, own, getattr(module, "_old_forward", None)))
        tensors = (*module._parameters.items(), *module._buffers.items())
        found += [(name, key, id(t), None if t is None else (t.device, t.requires_grad)) for key, t in tensors]
    return found


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(sample_ids(2, 9)).logits
    return out


def numbers(record: Any) -> Any:
    """Return a record without what a clock has a say in."""
    return without(json.loads(record.to_json()), {"created", "cost", "digest", "wall_seconds"})


def without(plain: Any, keys: set[str]) -> Any:
    if isinstance(plain, dict):
        return {key: without(value, keys) for key, value in plain.items() if key not in keys}
    return [without(each, keys) for each in plain] if isinstance(plain, list) else plain


@every_way
def test_a_model_is_itself_inside_and_as_it_was_outside(tmp_path: Path, way: str) -> None:
    path = saved(tmp_path / "m")
    resident, model = in_memory(path), WAYS[way](path)
    assert any(p.is_meta for p in model.parameters())
    out, before = logits(model), state(model)
    with brought(model):
        check_in_memory(model)
        assert fingerprint(model) == fingerprint(resident)
        for (name, a), (other, b) in zip(model.named_parameters(), resident.named_parameters(), strict=True):
            assert name == other
            assert torch.equal(a, b)
        assert torch.equal(logits(model), logits(resident))
        assert not any("forward" in vars(m) or hasattr(m, "_hf_hook") for m in model.modules())
        with brought(model, None, "path", model):  # nothing is left to do
            assert fingerprint(model) == fingerprint(resident)
    assert state(model) == before
    assert torch.equal(logits(model), out)


@every_way
def test_a_check_and_an_audit_are_those_of_the_model_in_memory(tmp_path: Path, way: str) -> None:
    path, probe = saved(tmp_path / "m"), tiny_probe()
    resident, model = in_memory(path), WAYS[way](path)
    before, names = state(model), {"name": "m"}
    for run in (TASKS["check"], TASKS["audit"]):
        one, other = (numbers(run(each, probe)) for each in (model, resident))
        assert one == other
        assert state(model) == before
    report = peelwise.audit(resident, probe, SETTINGS, **names)
    report.save(tmp_path / "out")
    assert peelwise.verify(tmp_path / "out", model, full=True).holds
    assert state(model) == before


BY_NIGHT = ("quantise", "allocate", "anatomy", "peel")  # which take longer


def by_night(task: str, *more: str) -> object:
    marks = [pytest.mark.nightly, pytest.mark.slow] if task in BY_NIGHT else []
    return pytest.param(*more, task, marks=marks)


@pytest.mark.parametrize("task", [by_night(task) for task in TASKS if task not in ("check", "audit")])
def test_what_else_measures_one_model(tmp_path: Path, task: str) -> None:
    path, probe = saved(tmp_path / "m"), tiny_probe()
    resident, model = in_memory(path), dispatched(path)
    before = state(model)
    one, other = (numbers(TASKS[task](each, probe)) for each in (model, resident))
    assert one == other
    assert state(model) == before


@pytest.mark.nightly
@pytest.mark.slow
def test_two_models_of_which_one_or_both_are_offloaded(tmp_path: Path) -> None:
    path, probe = saved(tmp_path / "m"), tiny_probe()
    resident, model = in_memory(path), dispatched(path)
    same = peelwise.compare(model, resident, probe, budget=BUDGET).record
    assert same.loss.damage.mean == 0.0
    assert same.first_difference is None
    made = peelwise.quantise(model, probe, int3())  # with its copy, which has no hooks
    quantised = made.quantised()
    assert not any(p.is_meta for p in quantised.parameters())
    made.save(tmp_path / "int3")
    again = peelwise.quantise(resident, probe, int3()).quantised()
    assert fingerprint(quantised) == fingerprint(again)
    before = state(model)
    one, other = (peelwise.quantcheck(quantised, each, probe, budget=BUDGET).record for each in (model, resident))
    assert numbers(one) == numbers(other)
    one, other = (peelwise.compare(each, quantised, probe, budget=BUDGET).record for each in (model, resident))
    assert numbers(one) == numbers(other)
    assert state(model) == before


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        *(by_night(task, "llama") for task in TASKS),
        *(pytest.param(k, "audit", marks=[pytest.mark.nightly, pytest.mark.slow]) for k in ("mixtral", "gpt2")),
        ("gpt2", "check"),
    ],
)
def test_weights_that_are_carried_at_every_use_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, task: str
) -> None:
    """As on an accelerator, with the computer's memory in its place."""
    made = list[Carried]()
    monkeypatch.setattr(offloaded, "_seen_on", lambda device, value: made.append(Carried(value, device)) or made[-1])
    path, probe = saved(tmp_path / "m", kind), tiny_probe()
    resident, model = in_memory(path), on_disk(path)
    before = state(model)
    one, other = (numbers(TASKS[task](each, probe)) for each in (model, resident))
    assert one == other
    assert len(made) > 20
    assert state(model) == before


class Carrying(TorchDispatchMode):
    """Has operations copy carried weights to the second device, as they do to a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view:
            return func(*args, **(kwargs or {}))
        args, kwargs = (tree_map(there, given) for given in (args, kwargs or {}))
        return func(*args, **kwargs)


def there(one: Any) -> Any:
    return one.held.to("cuda") if isinstance(one, Carried) else one


@pytest.mark.timeout(900)
@pytest.mark.parametrize("task", ["check", pytest.param("audit", marks=[pytest.mark.nightly, pytest.mark.slow])])
def test_nothing_is_left_where_the_weights_lie(monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    """As on a GPU, played by a second device that refuses tensors of the first."""
    resident, model = (ZOO["llama"]() for _ in range(2))
    accelerate.cpu_offload(model, execution_device="cpu")
    hooks = [hook for module in model.modules() for hook in offloaded._hooks(module)]
    for hook in hooks:
        hook.execution_device = torch.device("cuda:0")
    # To C++ a carried weight is on what stands for the device there.
    monkeypatch.setattr(offloaded, "_seen_on", lambda device, value: Carried(value, torch.device("cpu", 1)))
    monkeypatch.setattr(Carried, "device", property(lambda _: torch.device("cuda:0")), raising=False)
    with second_device() as device:
        resident.to(device)
        rotary = model.model.rotary_emb  # type: ignore[union-attr]
        for name, buffer in rotary.named_buffers():  # as hooks do when they are made for another device
            rotary._buffers[name] = buffer.to(device)
        before, wanted = state(model), numbers(TASKS[task](resident, tiny_probe()))
        with Carrying():
            found = numbers(TASKS[task](model, tiny_probe()))
        assert found == wanted
        assert state(model) == before


def test_a_model_stored_in_another_dtype_is_converted_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "m", dtype=torch.bfloat16)
    model = by_transformers(path, **{"1": "disk"})
    monkeypatch.setattr(spill, "_SMALL", 1)
    kept = list[torch.Size]()
    empty = spill.Spill.empty
    monkeypatch.setattr(
        spill.Spill, "empty", lambda self, shape, dtype: kept.append(shape) or empty(self, shape, dtype)
    )
    with brought(model):
        assert fingerprint(model) == fingerprint(in_memory(path))
    assert len(kept) == 9  # tensors of a block


@pytest.mark.parametrize("way", ["transformers: blocks on disk", "dispatch_model", "cpu_offload", "disk_offload"])
def test_tied_weights_are_one_parameter(tmp_path: Path, way: str) -> None:
    path = saved(tmp_path / "m", "llama-tied")
    resident = in_memory(path)
    places = {"embed_tokens": "disk", "lm_head": "disk", "1": "disk"}
    model = by_transformers(path, **places) if way.startswith("transformers") else WAYS[way](path)
    before = state(model)
    with brought(model):
        assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]
        assert fingerprint(model) == fingerprint(resident)
    one, other = (numbers(peelwise.check(each, tiny_probe()).record) for each in (model, resident))
    assert one == other
    assert state(model) == before


def test_a_model_that_is_none_of_transformers(tmp_path: Path) -> None:
    resident = PlainGPT().eval()
    models = [copy.deepcopy(resident) for _ in range(2)]
    accelerate.cpu_offload(models[0], execution_device="cpu")
    accelerate.disk_offload(models[1], tmp_path / "offloaded", execution_device="cpu")
    wanted = numbers(peelwise.check(resident, tiny_probe()).record)
    for model in models:
        before = state(model)
        assert numbers(peelwise.check(model, tiny_probe()).record) == wanted
        assert state(model) == before


def test_experts_and_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    path = saved(tmp_path / "moe", "mixtral")
    model = by_transformers(path, **{"0": "disk", "1": "disk"})  # its experts are put together and written anew
    assert list((path / "offloaded").glob("*experts*"))
    one, other = (numbers(peelwise.check(each, tiny_probe()).record) for each in (model, in_memory(path)))
    assert one == other

    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    resident = peft.get_peft_model(ZOO["llama"](), settings).eval()
    model = accelerate.disk_offload(copy.deepcopy(resident), tmp_path / "offloaded", execution_device="cpu")
    before = state(model)
    one, other = (numbers(peelwise.check(each, tiny_probe()).record) for each in (model, resident))
    assert one == other
    assert state(model) == before
    loaded = dispatched(saved(tmp_path / "m"))
    resident.save_pretrained(tmp_path / "adapter")
    above = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter", offload_folder=str(tmp_path / "m" / "more"))
    before = state(above)
    assert numbers(peelwise.check(above, tiny_probe()).record)["loss"] == other["loss"]
    assert state(above) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_an_interrupt_in_the_middle_everything_is_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    model, seen = dispatched(saved(tmp_path / "m")), []
    out, before = logits(model), state(model)

    def stop(progress: object) -> None:
        seen.append(progress)
        if len(seen) == 3:
            raise error

    with pytest.raises(error):
        peelwise.check(model, tiny_probe(), progress=stop)
    assert state(model) == before
    assert torch.equal(logits(model), out)
    assert spill.spill_of(model) is None


def test_an_interrupt_at_any_line_leaves_everything_as_it_was(tmp_path: Path) -> None:
    model = on_disk(saved(tmp_path / "m"))
    before, interrupted, line = state(model), 0, 0
    while True:
        line += 1 + line // 8  # all of the first ones, fewer of what is done for every tensor
        left = [line]

        def trace(frame: FrameType, event: str, _: object, left: list[int] = left) -> Any:
            if frame.f_code.co_filename != offloaded.__file__:
                return None
            left[0] -= event == "line"
            if not left[0]:
                left[0] = -1
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            with brought(model):
                pass
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(None)
        assert state(model) == before
        if left[0] > 0:  # it came to the end
            break
    assert interrupted > 20


def test_bounds_of_a_chain_of_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    resident = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(90, 6)
    y = torch.randint(3, (90,))
    model = accelerate.disk_offload(copy.deepcopy(resident), tmp_path, execution_device="cpu")
    before = state(model)
    ours, theirs = (peelwise.yes_bounds(each, x, y, loss="cross_entropy") for each in (model, resident))
    assert str(ours) == str(theirs)
    assert state(model) == before


@pytest.mark.parametrize("way", ["transformers: blocks on disk", "dispatch_model"])
@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_damaged_file_is_one_sentence_and_nothing_is_written(tmp_path: Path, way: str, damage: str) -> None:
    path = saved(tmp_path / "m")
    model = WAYS[way](path)
    before = state(model)
    file = next((path / "offloaded").glob("*layers.1.mlp.up_proj.weight*"), path / "model.safetensors")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-100])
    said = r"^model\.layers\.\S+ was offloaded: \S+ is (missing|damaged or cut short)"
    with pytest.raises(ModelError, match=said) as caught:
        peelwise.audit(model, tiny_probe(), SETTINGS, out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert state(model) == before


def test_what_cannot_be_brought_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path, probe = saved(tmp_path / "m"), tiny_probe()
    model = dispatched(path)
    model.model.layers[1].mlp.up_proj._hf_hook.execution_device = torch.device("cuda:0")  # type: ignore[union-attr, index]
    with pytest.raises(
        UnsupportedModelError, match=r"^Not yet: .* several devices .* model\.layers\.1\.\S+ on cuda:0\."
    ):
        peelwise.check(model, probe)
    model = dispatched(path)
    accelerate.hooks.add_hook_to_module(model.model.norm, accelerate.hooks.ModelHook(), append=True)  # type: ignore[union-attr]
    with pytest.raises(UnsupportedModelError, match=r"^Not yet: model\.norm has a hook of accelerate \(ModelHook\)"):
        peelwise.audit(model, probe, SETTINGS)
    model = dispatched(path)
    before = state(model)
    with pytest.raises(PeelwiseError, match=r"^Not yet: \S+ has no values .* Load the whole model onto one device\.$"):
        peelwise.Monitor(model, probe, store=None)
    assert state(model) == before


def test_a_forward_that_was_replaced_since_is_refused(tmp_path: Path) -> None:
    model = dispatched(saved(tmp_path / "m"))
    block = model.model.layers[2]  # type: ignore[union-attr, index]
    own = block.mlp.down_proj.forward
    block.mlp.down_proj.forward = lambda x: 2 * own(x)
    with pytest.raises(UnsupportedModelError, match=r"forward of model\.layers\.2\.mlp\.down_proj was replaced after"):
        peelwise.check(model, tiny_probe())


def test_a_model_on_two_devices_is_refused_with_both() -> None:
    model = ZOO["llama"]()
    with FakeTensorMode():
        model.model.norm.weight = nn.Parameter(torch.ones(48, device="cuda"))  # type: ignore[union-attr]
    with pytest.raises(UnsupportedModelError, match=r"^Not yet: \S+ is on cpu, model\.norm\.weight is on cuda:0\."):
        check_in_memory(model)


# The largest private memory in MB of an audit, beyond that after the imports.
AUDITS = """
import sys, threading, time, torch, peelwise
from transformers import AutoModelForCausalLM
def private():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024
def opened(path):
    place = {"device_map": {"": "disk"}, "offload_folder": path + "/offloaded"} if sys.argv[2] == "disk" else {}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **place)
torch.set_num_threads(1)
torch.manual_seed(0)
probe = peelwise.Probe.from_tokens(torch.randint(300, (24, 17)))
settings = peelwise.AuditSettings("10m", joint_rounds=1, solo_rounds=0, controls=False)
peelwise.audit(opened(sys.argv[3]), probe, settings)  # the imports
before, most, ended = private(), [0.0], threading.Event()
def watch():
    while not ended.is_set():
        most[0] = max(most[0], private())
        time.sleep(0.01)
watching = threading.Thread(target=watch)
watching.start()
peelwise.audit(opened(sys.argv[1]), probe, settings)
ended.set()
watching.join()
print(most[0] - before)
"""


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="private memory is asked of Linux")
@pytest.mark.timeout(900)
def test_memory_of_an_audit_does_not_grow_with_depth(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "vocab_size": 300}
    # Offloaded weights in another dtype than the stored one are the harder case: they are converted.
    for depth in (1, 2, 10):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=depth, **sizes))
        model.to(torch.bfloat16).save_pretrained(tmp_path / str(depth))
    found = {}
    for depth in (2, 10):
        for how in ("disk", "memory"):
            command = [sys.executable, "-c", AUDITS, str(tmp_path / str(depth)), how, str(tmp_path / "1")]
            out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
            found[depth, how] = float(out)
    grown = {how: found[10, how] - found[2, how] for how in ("disk", "memory")}
    print(found)  # MB, for NOTES.md
    assert grown["memory"] > 60  # of 8 blocks: weights, proposals, changes
    assert grown["disk"] < grown["memory"] / 3
