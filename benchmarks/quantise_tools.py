"""Published quantisers on the tokens of `benchmarks/quantise.py`, paired with its rows.

Three steps, because no tool lives in one environment with all others. The parent and the tokens are written once, each
tool writes the weights that its codes stand for, and these are measured as every other arm is:

    python benchmarks/quantise_tools.py prepare WORK
    VENV/bin/python benchmarks/quantise_tools.py make WORK --tool gptq --bits 4     in the tool's own environment
    python benchmarks/quantise_tools.py measure WORK

Tools, each with groups of 64 and the output head left alone:

    hqq           hqq: no data; a zero point beside every scale, so 4.5 bits at four where symmetric ones take 4.25
    gptq          llm-compressor's GPTQModifier, symmetric, all fit sequences, its own defaults
    gptqmodel     GPTQModel's GPTQ, symmetric, all fit sequences, its own defaults
    auto-round    auto-round, symmetric, all fit sequences, `--iterations` of its 200
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GROUP = 64
RESULT = "quantise_tools.json"


def prepare(work: Path, text: str, tokens: int) -> None:
    """Write the parent as a transformers folder in float32, and the token ids of fit and report."""
    from peelwise.model.checkpoints import open_model
    from quantise import probe_of

    opened = open_model("smollm2", device="cpu")
    probe = probe_of(opened.tokenizer, text, tokens, 0)
    model = opened.model
    model.config.__dict__.pop("quantization_config", None)  # it came from a GGUF file, and is plain floats now
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(work / "parent")
    opened.tokenizer.save_pretrained(work / "parent")
    save_file({"fit": probe.fit.ids.contiguous()}, work / "tokens.safetensors")
    (work / "what.json").write_text(json.dumps({"text": text, "fit_tokens": tokens, "seed": 0}))


def _parent(work: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(work / "parent", dtype=torch.float32).eval()
    return model


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head")}


def hqq(work: Path, bits: int, iterations: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Quantise every layer by itself, without data."""
    import hqq
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=1)
    found = {}
    for name, layer in _linears(_parent(work)).items():
        made = HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
        found[name] = made.dequantize().reshape(layer.weight.shape)
    return found, {"hqq": hqq.__version__, "given": "no data; group_size=64, axis=1, with zero points"}


def gptq(work: Path, bits: int, iterations: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Quantise with llm-compressor's error feedback, in running order."""
    from importlib.metadata import version

    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    rows = load_file(work / "tokens.safetensors")["fit"].tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=GROUP)
    recipe = GPTQModifier(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
    )
    model = _parent(work)
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
        shuffle_calibration_samples=False,
    )
    found = {name: layer.weight.detach().float() for name, layer in _linears(model).items()}
    return found, {"llmcompressor": version("llmcompressor"), "given": f"{len(rows)} sequences; defaults otherwise"}


def gptqmodel(work: Path, bits: int, iterations: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Quantise with GPTQModel's error feedback."""
    import os
    from importlib.metadata import version

    os.cpu_count = lambda: max(os.sysconf("SC_NPROCESSORS_ONLN"), 4)  # its pool takes half of them and needs two
    from gptqmodel import GPTQModel, QuantizeConfig

    rows = load_file(work / "tokens.safetensors")["fit"].tolist()
    config = QuantizeConfig(bits=bits, group_size=GROUP, sym=True, device="cpu")
    model = GPTQModel.load(str(work / "parent"), config)
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
    found = {}
    for name, layer in model.model.named_modules():
        if hasattr(layer, "dequantize_weight"):  # [d_in, d_out]
            found[name] = layer.dequantize_weight().T.float()
    return found, {"gptqmodel": version("gptqmodel"), "given": f"{len(rows)} sequences; defaults otherwise"}


def auto_round(work: Path, bits: int, iterations: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Quantise with learned rounding, block by block."""
    from importlib.metadata import version

    from auto_round import AutoRound
    from transformers import AutoTokenizer

    rows = load_file(work / "tokens.safetensors")["fit"]
    model = _parent(work)
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(work / "parent"),
        bits=bits,
        group_size=GROUP,
        sym=True,
        iters=iterations,
        nsamples=len(rows),
        seqlen=rows.shape[1],
        batch_size=8,
        dataset=[row[None] for row in rows],
        device_map="cpu",
        enable_torch_compile=False,
    )
    made, _ = rounder.quantize()
    found = {name: layer.weight.detach().float() for name, layer in _linears(made).items()}
    given = f"{len(rows)} sequences, batches of 8, {iterations} iterations a block"
    return found, {"auto-round": version("auto-round"), "given": given}


TOOLS = {"hqq": hqq, "gptq": gptq, "gptqmodel": gptqmodel, "auto-round": auto_round}


def make(work: Path, tool: str, bits: int, iterations: int) -> None:
    """Write what a tool's codes stand for, and refuse what they cannot be."""
    start, worked = time.perf_counter(), time.process_time()
    found, said = TOOLS[tool](work, bits, iterations)
    seconds = {
        "seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(time.process_time() - worked, 1),
    }
    for name, weight in found.items():
        groups = weight.reshape(-1, GROUP)[:64]
        most = max(len(group.unique()) for group in groups)
        if most > 2**bits:
            raise SystemExit(f"{tool} left {name} with {most} values in a group of {bits} bits: it is not quantised.")
    said |= seconds | {"tool": tool, "bits": bits, "torch": torch.__version__}
    save_file(
        {name: weight.contiguous() for name, weight in found.items()},
        work / f"{tool}-{bits}.safetensors",
        metadata={"said": json.dumps(said)},
    )
    print(said, flush=True)


def measure(work: Path) -> None:
    """Measure every file of `make` that has no row yet, on the report text of `benchmarks/quantise.py`."""
    from safetensors import safe_open

    from common import RESULTS, environment
    from peelwise.engine.session import ReportSession, change_to
    from peelwise.model.architectures import find_blocks
    from peelwise.model.checkpoints import open_model
    from peelwise.model.runner import Runner
    from quantise import probe_of

    file, what = RESULTS / RESULT, json.loads((work / "what.json").read_text())
    rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    session = None
    for made in sorted(work.glob("*-?.safetensors")):
        with safe_open(made, framework="pt") as opened:
            said = json.loads(opened.metadata()["said"])
        key = what | {"tool": said["tool"], "bits": said["bits"], "given": said["given"]}
        if any(key.items() <= row.items() for row in rows):
            continue
        if session is None:
            parent = open_model("smollm2", device="cpu")
            probe = probe_of(parent.tokenizer, what["text"], what["fit_tokens"], what["seed"])
            if not torch.equal(probe.fit.ids, load_file(work / "tokens.safetensors")["fit"]):
                raise SystemExit(f"{work} holds other tokens than these. Prepare it again.")
            runner = Runner(parent.model, find_blocks(parent.model))
            session = ReportSession(runner, runner.trace(probe.report))
        weights, report = load_file(made), session.report
        changes = {
            linear: change_to(linear, weights[linear.name])
            for block in session.runner.blocks
            for linear in block.linears
        }
        losses = session.losses(report, changes)
        damage = session.gain(losses, report.losses).interval()
        row = key | said
        row |= {
            "parent": round(report.mean, 4),
            "damage": [round(value, 4) for value in (damage.mean, damage.low, damage.high)],
            "per_sequence": [round(value, 3) for value in losses.tolist()],
            "sequence_tokens": [int(value) for value in report.tokens.tolist()],
        }
        rows.append(row)
        file.write_text(json.dumps(environment() | {"rows": rows}, indent=1) + "\n")
        print({k: v for k, v in row.items() if k not in ("per_sequence", "sequence_tokens")}, flush=True)


def summary() -> None:
    """Print how much more each tool loses than `peelwise quantise` at the same bits, paired by sequence."""
    import numpy as np

    from common import RESULTS
    from peelwise.evidence.intervals import paired

    rows, ours = (json.loads((RESULTS / name).read_text())["rows"] for name in (RESULT, "quantise.json"))
    for row in rows:
        line = f"{row['tool']} int{row['bits']} damage {row['damage']} processor {row['processor_seconds']} s"
        for own in ours:
            same = all(own[k] == row[k] for k in ("text", "fit_tokens", "seed"))
            if same and own["format"] == f"int{row['bits']}:group={GROUP},symmetric":
                apart = np.array(row["per_sequence"]) - np.array(own["per_sequence"])
                more = paired(apart, np.array(row["sequence_tokens"], dtype=float)).interval()
                line += f"; {more.mean:+.4f} ({more.low:+.4f} to {more.high:+.4f}) above {own['arm']}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["prepare", "make", "measure", "summary"])
    parser.add_argument("work", type=Path, nargs="?", default=Path("quantise-tools"))
    parser.add_argument("--text", default="prose", choices=["prose", "docstrings"])
    parser.add_argument("--tokens", type=int, default=4_096)
    parser.add_argument("--tool", choices=list(TOOLS))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=200)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.step == "prepare":
        prepare(arguments.work, arguments.text, arguments.tokens)
    elif arguments.step == "make":
        make(arguments.work, arguments.tool, arguments.bits, arguments.iterations)
    elif arguments.step == "measure":
        measure(arguments.work)
    else:
        summary()


if __name__ == "__main__":
    main()
