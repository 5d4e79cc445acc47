"""Do the formulas of `peelwise plan` say what its commands take? Four sizes, each run in a process of its own.

    python benchmarks/planning.py [--only small-gpt] [--folder /tmp]    # resumable; then prints formula over measured

Measured, stage by stage: operations of products, attention and decompositions as they run (`audit_stages.Counting`);
the largest resident memory (`VmHWM`, reset at every stage) and the largest private one (`RssAnon`, sampled); and the
weights that would be read from disk if there were room for one block: those that operations touch, in a cache of that
size from which the ones used longest ago are dropped. What the operating system read is written beside it.

Sizes: the small GPT (0.7 M), a random Llama (20 M), SmolLM2 (135 M), and a random Llama in bfloat16 (1.1 B, made in a
temporary folder, weights alone, left in their file). It needs Linux, and 5 GB of disk.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils._python_dispatch import _disable_current_modes

import peelwise
from audit_stages import SMALL, Counting, watched
from common import RESULTS, environment
from peelwise.engine import heads, refine
from peelwise.engine.proposals import Solves
from peelwise.formats import parse_format
from peelwise.model import fingerprint
from peelwise.model.architectures import find_blocks
from peelwise.model.checkpoints import open_model, open_tokenizer
from peelwise.model.shape import shape_of
from peelwise.probe.texts import reference_prose
from peelwise.records.options import MICRO_BATCH_TOKENS
from peelwise.records.plan import Shape
from peelwise.references import quantized
from peelwise.show.plan.words import TASKS, conclusion
from peelwise.tasks.anatomy import recover
from peelwise.tasks.plan.run import planned
from peelwise.tasks.plan.shapes import Decoder
from peelwise.tasks.plan.stages import Loops, Probe
from peelwise.tasks.plan.work import Part

OF_20M = {
    "vocab_size": 8_192, "hidden_size": 384, "intermediate_size": 1_024, "num_hidden_layers": 8,
    "num_attention_heads": 6, "num_key_value_heads": 3,
}  # fmt: skip
# Narrow and deep: what a check of weights computes grows with the cube of the width.
OF_1B = {
    "vocab_size": 32_000, "hidden_size": 1_024, "intermediate_size": 8_192, "num_hidden_layers": 37,
    "num_attention_heads": 16, "num_key_value_heads": 4,
}  # fmt: skip
# Run before anything is measured, so that what is imported and kept for the first model is there.
OF_WARM_UP = {
    "vocab_size": 512, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
MADE = {
    "llama-20m": (torch.float32, OF_20M),
    "llama-20m-bf16": (torch.bfloat16, OF_20M),
    "llama-1b": (torch.bfloat16, OF_1B),
}
# Tokens of each run; none for a check of the weights alone. Models in bfloat16 stay in their files.
RUNS = {
    "small-gpt": {
        "check-weights": 0,
        "check": 2_048,
        "audit": 6_400,
        "compare": 2_048,
        "quantise": 2_048,
        "quantcheck": 2_048,
        "anatomy": 2_048,
    },
    "llama-20m": {
        "check-weights": 0,
        "check": 2_048,
        "audit": 2_048,
        "compare": 2_048,
    },
    "llama-20m-bf16": {"check-weights": 0, "check": 2_048, "audit": 2_048},
    "smollm2": {"check-weights": 0, "check": 2_048, "audit": 512},
    "llama-1b": {"check-weights": 0},
}
FORMAT = "int4:group=16,symmetric"  # for models of any width
LENGTH = 64
SAMPLED_SECONDS = 0.01


def random_llama(dtype, sizes):
    """Return a random Llama, always the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(LlamaConfig(**sizes))
    finally:
        torch.set_default_dtype(torch.float32)


def source_of(name, folder):
    """Return what a model is opened from: a folder made for it, unless it is there."""
    if name not in MADE:
        return str(SMALL) if name == "small-gpt" else name
    path = Path(folder) / name
    if not (path / "model.safetensors").exists():
        random_llama(*MADE[name]).save_pretrained(path)
    return str(path)


def status(key):
    """Return an entry of this process's status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


class Cache:
    """What would be read from disk with room for so many bytes of weights: the longest unused are dropped."""

    def __init__(self, model):
        blocks = [sum(p.numel() * p.element_size() for p in b.module.parameters()) for b in find_blocks(model)]
        sizes = {p.untyped_storage().data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
        self.sizes, self.room = sizes, max(*blocks, *sizes.values())
        self.held, self.read = OrderedDict(), 0

    def touch(self, tensor):
        """Read a weight, unless it is held."""
        where = tensor.untyped_storage().data_ptr()
        if where not in self.sizes:
            return
        if where not in self.held:
            self.read += self.sizes[where]
        self.held[where] = self.sizes[where]
        self.held.move_to_end(where)
        while sum(self.held.values()) > self.room:
            self.held.popitem(last=False)


class Measuring(Counting):
    """Also memory and weights read, by stage."""

    def __init__(self, cache):
        self.cache, self.peak, self.private, self.read = cache, Counter(), Counter(), Counter()
        self._read, self._sampled, self.ended = 0, 0, False
        self.head_steps, self.evaluations = [], Counter()
        self.sweeps, self.steps = Counter(), 0
        super().__init__()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self):
        while not self.ended:
            self._sampled = max(self._sampled, status("RssAnon"))
            time.sleep(SAMPLED_SECONDS)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view and func._overloadpacket is not torch.ops.aten.embedding:  # which reads some rows
            for each in torch.utils._pytree.tree_leaves((args, kwargs or {})):
                if isinstance(each, torch.Tensor) and each.device.type == "cpu":
                    self.cache.touch(each)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def enter(self, stage):
        self.peak[self.stage] = max(self.peak[self.stage], status("VmHWM"))
        self.private[self.stage] = max(self.private[self.stage], self._sampled, status("RssAnon"))
        self.read[self.stage] += self.cache.read - self._read
        self._read, self._sampled = self.cache.read, 0
        Path("/proc/self/clear_refs").write_text("5")
        super().enter(stage)


@contextmanager
def apart(counting):
    """Tell ``counting`` about what is no stage of a clock: proposals, weights that are hashed, steps of a fit."""
    asked, made, pieces_of, values_of = Solves.ask, Solves.made, fingerprint._pieces, torch.linalg.eigvalsh
    fitted, searched, descended = heads.fit_head, refine.search_step, quantized._descend
    trained = recover._loss

    def proposing(of):
        def proposals(*args):
            outer = counting.stage
            counting.enter("proposals" if outer == "statistics" else outer)
            try:
                return of(*args)
            finally:
                counting.enter(outer)

        return proposals

    def pieces(tensor):
        counting.cache.touch(tensor)
        yield from pieces_of(tensor)

    def eigenvalues(A):
        # While operations are watched PyTorch computes eigenvectors too, which takes seven times as many.
        counting.operations[counting.stage][(1, *3 * A.shape[-1:])] += 4 / 3 * A.shape[-1] ** 3
        with _disable_current_modes():
            return values_of(A)

    def fit_head(*args, **options):
        found = fitted(*args, **options)
        counting.head_steps.append(found.steps)
        return found

    def search_step(*args, **options):
        found = searched(*args, **options)
        counting.evaluations[counting.stage] += found.evaluations
        return found

    def descend(descents, most, tolerance):
        history = descended(descents, most, tolerance)
        if most:  # else error feedback alone
            counting.sweeps[counting.stage] += len(history) - 1
        return history

    def loss(*args):
        counting.steps += 1
        return trained(*args)

    Solves.ask, Solves.made = proposing(asked), proposing(made)
    fingerprint._pieces, torch.linalg.eigvalsh = pieces, eigenvalues
    recover._loss = loss
    heads.fit_head, refine.search_step, quantized._descend = fit_head, search_step, descend
    try:
        yield
    finally:
        recover._loss = trained
        Solves.ask, Solves.made, fingerprint._pieces, torch.linalg.eigvalsh = asked, made, pieces_of, values_of
        heads.fit_head, refine.search_step, quantized._descend = fitted, searched, descended


def system_read():
    """Return the bytes that this process had the operating system read from disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def forget(source):
    """Let the operating system drop what it holds of a model's files."""
    for file in Path(source).glob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(model, probe, kind):
    """Run a command; comparisons are with the model before noise, or rounding, changed all of its matrices."""
    if kind == "quantise":
        return peelwise.quantise(model, probe, peelwise.QuantiseSettings(FORMAT)).record
    if kind == "quantcheck":
        new = copy.deepcopy(model)
        form = parse_format(FORMAT)
        with torch.no_grad():
            for block in find_blocks(new):
                for linear in block.linears:
                    linear.parameter.copy_(form.project(linear.weight()))
        return peelwise.quantcheck(new, model, probe, peelwise.QuantcheckSettings("10h", FORMAT)).record
    if kind == "anatomy":
        return peelwise.anatomy(model, probe, peelwise.AnatomySettings("10h")).record
    if kind == "compare":
        new = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in new.parameters():
                parameter.mul_(1 + 0.01 * torch.randn_like(parameter)) if parameter.dim() > 1 else None
        return peelwise.compare(model, new, probe, peelwise.CompareSettings("10h")).record
    if kind == "audit":
        return peelwise.audit(model, probe, peelwise.AuditSettings("10h", joint_rounds=1, solo_rounds=1)).record
    return peelwise.check(model, probe, text=kind == "check").record


def measured(source, kind, tokens, streamed):
    """Return what one check or audit takes in this process."""
    torch.set_num_threads(1)
    words = open_tokenizer(SMALL)  # any ids will do for a random model
    warm = peelwise.Probe.from_text(reference_prose(), words, tokens=1_024, sequence_length=LENGTH)
    run(random_llama(torch.float32, OF_WARM_UP), warm if tokens else None, kind)
    forget(source)
    base = {"private_bytes": status("RssAnon"), "peak_bytes": status("VmRSS")}
    Path("/proc/self/clear_refs").write_text("5")
    before, began = system_read(), time.process_time()
    opened = open_model(source, device="cpu", dtype="auto" if streamed else "float32", stream=streamed)
    opening = {"private_bytes": status("RssAnon"), "peak_bytes": status("VmHWM")}
    probe = None
    if tokens:
        found = reference_prose(), opened.tokenizer or words
        probe = peelwise.Probe.from_text(*found, tokens=tokens, sequence_length=LENGTH, in_distribution=True)
    counting = Measuring(Cache(opened.model))
    with watched(counting), apart(counting), counting:
        counting.enter("identity")  # until the first stage of a clock
        record = run(opened.model, probe, kind)
    counting.enter("after")
    counting.ended = True
    stages = {
        stage: {
            "operations": sum(counting.operations[stage].values()), "read_bytes": counting.read[stage],
            "peak_bytes": counting.peak[stage], "private_bytes": counting.private[stage],
            "processor_seconds": counting.seconds[stage],
        }
        for stage in counting.peak if stage not in ("before", "after")
    }  # fmt: skip
    parts = [0, 0, 0] if probe is None else [probe.fit.tokens, probe.select.tokens, probe.report.tokens]
    shape = shape_of(opened.model, source, opened.model.lm_head.weight.element_size())
    return {
        "tokens": parts, "base": base, "opening": opening, "read_by_the_system": system_read() - before,
        "room_bytes": counting.cache.room, "processor_seconds": time.process_time() - began,
        "named": len(getattr(record, "unlike", None) or ()), "head_steps": counting.head_steps,
        "evaluations": dict(counting.evaluations), "loops": loops_of(record, counting),
        "shape": shape.model_dump(mode="json"), "stages": stages,
    }  # fmt: skip


def loops_of(record, counting):
    """Return how often what depends on the model was done: sweeps of a layer, bends and training steps of a block."""
    blocks = getattr(record, "blocks", ())
    if record.kind == "anatomy":
        bends = [sum(len(way.costs) for way in block.bent) for block in blocks if block.bent]
        return {"bends": sum(bends) / len(blocks), "trained_steps": counting.steps / len(blocks)}
    if not counting.sweeps:
        return {}
    layers = len(record.layers) * (2 if record.kind == "quantcheck" else 1)
    return {"sweeps": sum(counting.sweeps.values()) / layers}


def in_a_process(*arguments):
    """Measure in a process of its own, which gives back all memory that it frees: glibc would keep pieces for later."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    surroundings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=surroundings, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def formulas(name, run):
    """Return the stages of a run as the formulas have them, and what is in memory throughout, packages left out."""
    kind, parts = name.split()[1], run["tokens"]
    shape = Shape.model_validate(run["shape"])
    own_steps, blank_steps = (run["head_steps"] or (0, 0))[:2]
    loops = Loops(named=run["named"], joint_rounds=1, solo_rounds=1, head_steps=own_steps, blank_steps=blank_steps)
    loops = replace(loops, **run.get("loops", {}))
    way = "stream" if run["streamed"] else "float32"
    probe = Probe(*(Part(tokens, LENGTH, MICRO_BATCH_TOKENS) for tokens in parts))
    memory, stages = planned(shape, kind, way, (sum(parts), LENGTH), 1, loops, 0.0, probe)
    return {
        stage.name: {
            "operations": stage.work.operations,
            "read_bytes": stage.work.read_bytes(shape, memory.bytes_per_weight),
            "memory": memory.held + stage.memory - (memory.weights if run["streamed"] else 0.0),
        }
        for stage in stages
    }


def compared(name, run):
    """Return formula and measured by stage, and of the whole run under ``all``.

    Memory is that above what packages take: the resident one, and of a stream the private one without weights, which
    the operating system maps from their files as far as there is room. Bytes read are compared in streams alone:
    weights in memory are read once.
    """
    key, found = "private_bytes" if run["streamed"] else "peak_bytes", {}
    base = run["base"][key]
    for stage, formula in formulas(name, run).items():
        seen = run["stages"].get(stage)
        if stage == "identity":  # and what opening took before
            seen = seen | {key: max(seen[key], run["opening"][key])}
        if seen is not None:
            found[stage] = {
                "operations": (formula["operations"], seen["operations"]),
                "memory": (formula["memory"], seen[key] - base),
                "read_bytes": (formula["read_bytes"], seen["read_bytes"]),
            }
    added = {
        what: tuple(sum(each[what][place] for each in found.values()) for place in (0, 1))
        for what in ("operations", "read_bytes")
    }
    largest = tuple(max(each["memory"][place] for each in found.values()) for place in (0, 1))
    return found | {"all": added | {"memory": largest, "resident": tuple(base + each for each in largest)}}


def ratio(formula, seen):
    return f"{formula / seen:.2f}" if seen else ""


def show(runs):
    """Print formula over measured: a line per run, then a line per stage."""
    print("| run | operations | memory | memory with packages | bytes read |\n|---|---:|---:|---:|---:|")
    for name, run in runs.items():
        all_of = compared(name, run)["all"]
        read = ratio(*all_of["read_bytes"]) if run["streamed"] else ""
        operations, memory = all_of["operations"], all_of["memory"]
        print(
            f"| {name} | {ratio(*operations)} of {operations[1] / 1e9:,.1f} G | {ratio(*memory)} of "
            f"{memory[1] / 1e6:,.0f} MB | {ratio(*all_of['resident'])} | {read} |"
        )
    for name, run in runs.items():
        print(f"\n{name}\n\n| stage | operations | memory | bytes read |\n|---|---:|---:|---:|")
        for stage, each in compared(name, run).items():
            read = ratio(*each["read_bytes"]) if run["streamed"] else ""
            print(f"| {stage} | {ratio(*each['operations'])} | {ratio(*each['memory'])} | {read} |")


# Of 7 B on one device, and of 70 B whose weights are spread over eight.
COMPUTED = {
    "7 B": (Decoder(4_096, 11_008, 32, 32, 32, 32_000), 1),
    "70 B": (Decoder(8_192, 28_672, 80, 64, 8, 128_256), 8),
}


def compute():
    """Print what the formulas give for models that were not measured, with 80 GB for each process."""
    print("\n| model | command | Tflop | GB in float32 | in bfloat16 | with `--stream` | GB read with `--stream` |")
    print("|---|---|---:|---:|---:|---:|---:|")
    said = []
    for name, (decoder, processes) in COMPUTED.items():
        settings = peelwise.PlanSettings(memory="80GB", processes=processes)
        record = peelwise.plan(decoder.shape(name), settings).record
        for task in record.tasks:
            ways = {plan.way: plan for plan in record.ways(task)}
            cells = [
                f"{ways[way].largest.peak_bytes / 1e9:,.0f}" if way in ways else ""
                for way in ("float32", "bfloat16", "stream")
            ]
            read = f"{ways['stream'].read_bytes / 1e9:,.0f}" if "stream" in ways else ""
            operations = ways["float32"].operations / 1e12
            print(f"| {name} | {TASKS[task]} | {operations:,.0f} | {' | '.join(cells)} | {read} |")
        said.append(f"{name}. {conclusion(record)}")
    print("\n" + "\n".join(said))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--folder", type=Path, help="where the random models are made; default: a temporary folder")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        source, kind, tokens, streamed = options.child
        print(json.dumps(measured(source, kind, int(tokens), streamed == "True")))
        return
    path = RESULTS / "planning.json"
    found = json.loads(path.read_text())["runs"] if path.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.only:
            for kind, tokens in RUNS[name].items():
                if f"{name} {kind}" in found:
                    continue
                source = source_of(name, options.folder or temporary)
                streamed = MADE.get(name, (None,))[0] == torch.bfloat16
                found[f"{name} {kind}"] = in_a_process(source, kind, tokens, streamed) | {"streamed": streamed}
                path.write_text(json.dumps(environment() | {"runs": found}, indent=1) + "\n")
    show(found)
    compute()


if __name__ == "__main__":
    main()
