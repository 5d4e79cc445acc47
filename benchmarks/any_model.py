"""Which causal language models of the installed transformers does peelwise handle right?

    python benchmarks/any_model.py [--types qwen3_moe mamba2 ..] [--seconds 180] [--gigabytes 4] [--results FILE]
    python benchmarks/any_model.py --sizes other    # other widths, depths, experts; usual options turned round

Every type is built as a tiny random copy (`tiny_models`) and audited in a process of its own. *Right* means all of: the
loss is the model's own; the gradient norm of every block is autograd's through the whole model; the witness, all blocks
together and each block alone, gives the certified loss when it is written into the weights and the model's own forward
runs; ``verify --full`` holds; no weight of a block that the loss depends on is left out without being counted in a
note; the model is untouched; logits do not depend on later tokens; a monitor measures at three steps of AdamW and the
weights are the same to the bit without it. What is said here is computed without peelwise's blocks, hooks and merging.

One line a type is added to the results as soon as it is known; types that are there already are left out, unless they
are named. A type that takes more time or memory than it may have gets a line that says so.
"""

import argparse
import copy
import json
import multiprocessing
import resource
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

import peelwise
from common import RESULTS, environment
from peelwise.errors import PeelwiseError
from peelwise.model.runner import Runner
from peelwise.tasks.audit.settings import AuditSettings
from tiny_models import LENGTH, OTHER, USUAL, TooLargeError, build, types

TOKENS = 720
SIZES = {"usual": USUAL, "other": OTHER}
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 3e-4, 1e-2


def text_ids():
    """Return bytes of Python's own help texts, which every installation has."""
    from pydoc_data import topics

    text = topics.topics["typesseq"] + topics.topics["objects"]
    return torch.tensor([byte + 1 for byte in text.encode() if byte < 128][: TOKENS + 300])


def probe():
    return peelwise.Probe.from_tokens(text_ids(), sequence_length=LENGTH, tokens=TOKENS, in_distribution=True)


def loss_of(model, split):
    """Return the loss of the model's own forward on a part of the probe, nats per token, in the graph."""
    out = model(split.inputs, **kwargs_of(model))
    losses = F.cross_entropy(out.logits.float().flatten(0, 1), split.targets.flatten(), reduction="none")
    weights = split.weights.flatten()
    return (losses * weights).sum() / weights.sum()


def kwargs_of(model):
    return {"use_cache": False} if Runner(model, ())._accepted("use_cache") else {}


def weight_of(model, name):
    """Return ``(parameter, index, transposed, bias)`` of the linear layer that a record calls so."""
    parent, _, last = name.rpartition(".")
    if last.isdigit() and isinstance(getattr_path(model, parent), torch.nn.Parameter):  # one expert of several
        parameter, index = getattr_path(model, parent), int(last)
        owner = model.get_submodule(parent.rpartition(".")[0])
        return (
            parameter,
            index,
            experts_transposed(owner, parent.rpartition(".")[2]),
            getattr(owner, f"{parent.rpartition('.')[2]}_bias", None),
        )
    module = model.get_submodule(name)
    return module.weight, None, type(module).__name__ == "Conv1D", getattr(module, "bias", None)


def getattr_path(model, path):
    for part in path.split("."):
        model = getattr(model, part)
    return model


def experts_transposed(owner, name):
    """Whether experts keep ``[d_in, d_out]``: the flag of transformers' protocol, or a class that has no flag."""
    dbrx = type(owner).__name__ == "DbrxExpertGLU" and name == "w2"
    return getattr(owner, "is_transposed", type(owner).__name__ == "Llama4TextExperts") or dbrx


def expert_of(tensor, index, sizes):
    """Return what belongs to one expert; DBRX keeps the matrices of all one below the other."""
    if tensor.dim() > 2 or len(tensor) <= sizes.experts:
        return tensor[index]
    return tensor.view(sizes.experts, -1, sizes.width)[index]


def gradient_norms(model, record, split, sizes):
    """Return per block the norm of autograd's gradient at its linear layers, weights and biases."""
    model = copy.deepcopy(model).requires_grad_(True)
    loss_of(model, split).backward()
    norms = []
    for block in record.blocks:
        total = 0.0
        for matrix in block.matrices:
            weight, index, _, bias = weight_of(model, f"{block.name}.{matrix.name}")
            for parameter in (weight, bias):
                if isinstance(parameter, torch.Tensor) and parameter.grad is not None:
                    grad = parameter.grad if index is None else expert_of(parameter.grad, index, sizes)
                    total += float(grad.square().sum())
        norms.append(total**0.5)
    return norms, {name: p.grad for name, p in model.named_parameters()}


@torch.no_grad()
def written_loss(model, witness, kind, split, sizes, inside=""):
    """Return the loss with a witness written into a copy's weights."""
    changed = copy.deepcopy(model)
    some = 0
    for key, change in witness.items():
        label, _, name = key.partition("/")
        if label != kind or not name.startswith(inside):
            continue
        weight, index, transposed, bias = weight_of(changed, name)
        target = weight if index is None else expert_of(weight, index, sizes)
        columns = target.shape[0] if transposed else target.shape[1]
        change, extra = change.float()[:, :columns], change.float()[:, columns:]
        target.add_(change.T if transposed else change)
        if extra.numel():
            (bias if index is None else bias[index]).add_(extra[:, 0])
        some += 1
    return float(loss_of(changed, split)), some


def left_out(model, record, gradients):
    """Return the names of the blocks' weights that the loss depends on and that no linear layer of the record is."""
    covered = set()
    for block in record.blocks:
        for matrix in block.matrices:
            covered.add(id(weight_of(model, f"{block.name}.{matrix.name}")[0]))
    found, seen = [], set()
    for block in record.blocks:
        for name, parameter in model.get_submodule(block.name).named_parameters():
            full, several = f"{block.name}.{name}", sum(size > 1 for size in parameter.shape) > 1
            live = gradients[full] is not None and bool(gradients[full].any()) if full in gradients else True
            if several and live and id(parameter) not in covered and id(parameter) not in seen and "bias" not in name:
                found.append(full)
                seen.add(id(parameter))
    return found


@torch.no_grad()
def earlier_logits_move(model, split):
    ids = split.inputs[:1].clone()
    before, cut = model(ids, **kwargs_of(model)).logits, ids.shape[1] // 2
    ids[:, cut:] = ids[:, cut:].flip(1) ^ 1
    moved = (model(ids, **kwargs_of(model)).logits - before).abs()[0].amax(-1)
    return float(moved[:cut].max()) > 1e-3 * float(moved[cut:].max())


def state_of(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [(module.training, sorted(module.__dict__), len(module._forward_hooks)) for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        str(getattr(model, "config", "")),
    )


def same_state(one, two):
    return one[1:] == two[1:] and one[0].keys() == two[0].keys() and all(
        torch.equal(value, two[0][name]) for name, value in one[0].items()
    )  # fmt: skip


def trained(model, text, *, monitored):
    """Train a copy for three steps; return its weights, and what a monitor measured and could not measure."""
    model = copy.deepcopy(model).requires_grad_(True).train()
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = None
    if monitored:
        schedule = peelwise.every(1)
        monitor = peelwise.Monitor(model, text, optimizer=optimizer, budget=None, schedule=schedule, store=None)
    measured = 0
    for step in range(3):
        loss = loss_of(model, text.fit)
        loss.backward()
        optimizer.step()
        if monitor is not None:
            measured += monitor.step(step, loss=float(loss)) is not None
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()], measured, monitor.events if monitor is not None else ()


def judge(kind, sizes):
    """Return what is wrong with the answers on one type, in words; nothing if all is right."""
    model = build(kind, sizes)
    text = probe()
    with torch.no_grad():
        loss_of(model, text.report)  # some change their own settings when they run for the first time
    before = state_of(model)
    settings = AuditSettings(budget="10m", joint_rounds=1, solo_rounds=1, controls=False)
    report = peelwise.audit(model, text, settings)
    record, wrong = report.record, []
    if not same_state(before, state_of(model)):
        wrong.append("the model is not as it was")
    with torch.no_grad():
        own = float(loss_of(model, text.report))
    if not abs(own - record.loss.current) <= LOSS_TOLERANCE * own:
        wrong.append(f"loss {record.loss.current:.4f}, the model's own is {own:.4f}")
    norms, gradients = gradient_norms(model, record, text.fit, sizes)
    if not any(block.matrices for block in record.blocks):
        wrong.append("nothing is refined")
    for block, norm in zip(record.blocks, norms, strict=True):
        if block.gradient_norm is None and not block.matrices:
            continue
        if block.gradient_norm is None or not abs(block.gradient_norm - norm) <= GRADIENT_TOLERANCE * max(norms):
            wrong.append(f"{block.name}: gradient {block.gradient_norm}, autograd's is {norm:.5f}")
    if record.loss.composed is not None and report.witness:
        got, some = written_loss(model, report.witness, "composed", text.report, sizes)
        if some and not abs(got - record.loss.composed) <= LOSS_TOLERANCE * own:
            wrong.append(f"composed {record.loss.composed:.4f}, written into the weights {got:.4f}")
    for block in record.blocks:
        got, some = written_loss(model, report.witness, "alone", text.report, sizes, f"{block.name}.")
        gain = block.recoverable_nats
        if some and gain is not None and not abs(own - got - gain.mean) <= LOSS_TOLERANCE * own:
            wrong.append(f"{block.name}: gain {gain.mean:.4f}, written into the weights {own - got:.4f}")
    omitted = left_out(model, record, gradients)
    told = sum(int(n.values.get("count", 0)) for n in record.notes if getattr(n, "code", "") == "left-out")
    if len(omitted) > told:
        wrong.append(f"{len(omitted)} weights left out, {told} told: {', '.join(omitted[:4])}")
    with tempfile.TemporaryDirectory() as folder:
        report.save(Path(folder) / "c")
        verified = peelwise.verify(Path(folder) / "c", model, full=True)
    if not verified.holds:
        wrong.append(f"verify --full: {verified.reason}")
    if earlier_logits_move(model, text.fit):
        wrong.append("logits depend on later tokens")
    weights, measured, events = trained(model, text, monitored=True)
    plain, _, _ = trained(model, text, monitored=False)
    if measured != 3:
        wrong.append(f"monitor measured {measured} of 3 times: {[str(event) for event in events][:2]}")
    if not all(torch.equal(one, two) for one, two in zip(weights, plain, strict=True)):
        wrong.append("the monitor changed the training")
    left = {"left_out": len(omitted), "blocks": len(record.blocks)}
    left["without_witness"] = sum(not block.matrices for block in record.blocks)
    left["gain"] = round(record.loss.current - (record.loss.composed or record.loss.current), 4)
    return wrong, left


def outcome(kind, sizes):
    """Return one line of the results."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        model = build(kind, sizes)
        with torch.no_grad():
            logits = model(probe().fit.inputs[:2], **kwargs_of(model)).logits
        assert logits.shape[:2] == (2, LENGTH), "logits of other positions"
        assert bool(logits.isfinite().all()), "logits are not finite"
    except Exception as error:
        how = "too large" if isinstance(error, TooLargeError) or of_memory(error) else "not built"
        return {"type": kind, "outcome": how, "why": f"{type(error).__name__}: {error}"[:300]}
    try:
        wrong, facts = judge(kind, sizes)
    except PeelwiseError as error:
        return {"type": kind, "outcome": "refused", "why": str(error)[:400]}
    except Exception as error:
        how = "too large" if of_memory(error) else "traceback"
        last = traceback.extract_tb(error.__traceback__)[-3:]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(last))
        return {"type": kind, "outcome": how, "why": f"{type(error).__name__}: {error} ({where})"[:500]}
    return {"type": kind, "outcome": "wrong" if wrong else "right", "why": "; ".join(wrong)[:600]} | facts


def of_memory(error):
    """Whether an error is one of too little memory, as Python or torch says it."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


def limited(kind, sizes, gigabytes, answer):
    """Send the outcome of a type, computed with so much more memory than this process has reserved already."""
    reserved = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = reserved + int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    answer.send(outcome(kind, sizes))


def in_process(kind, sizes, seconds, gigabytes):
    """Judge a type in a process of its own, which starts from this one with everything imported."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=limited, args=(kind, sizes, gigabytes, there))
    process.start()
    there.close()  # so that the end of the process is the end of what can be read
    try:
        if here.poll(seconds):
            return here.recv()
        return {"type": kind, "outcome": "too slow", "why": f"more than {seconds:g} s"}
    except EOFError:
        process.join()
        return {"type": kind, "outcome": "died", "why": f"its process ended with code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="*")
    parser.add_argument("--seconds", type=float, default=180.0, help="the most that one type may take")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="the most memory that one type may add")
    parser.add_argument("--sizes", choices=list(SIZES), default="usual")
    parser.add_argument("--results", type=Path, help="default: any_model.json, any_model_other.json")
    arguments = parser.parse_args()
    sizes, usual = SIZES[arguments.sizes], arguments.sizes == "usual"
    arguments.results = arguments.results or RESULTS / ("any_model.json" if usual else "any_model_other.json")
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    earlier = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    lines = earlier.get("types", {})
    before = earlier["environment"]["command"] if earlier and arguments.types else None  # some types are made again
    outcome("llama", sizes)  # whatever is imported late, once and not in every process: two thirds of what a type takes
    for kind in arguments.types or types():
        if kind in lines and not arguments.types:
            continue
        lines[kind] = in_process(kind, sizes, arguments.seconds, arguments.gigabytes)
        print(kind, lines[kind]["outcome"], lines[kind]["why"], flush=True)
        counts = dict(Counter(line["outcome"] for line in lines.values()))
        whole = {"environment": environment(before), "counts": counts, "types": dict(sorted(lines.items()))}
        arguments.results.write_text(json.dumps(whole, indent=1) + "\n")
    print(counts)


if __name__ == "__main__":
    main()
