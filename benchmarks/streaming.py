"""How much memory do check and audit take when weights stay in their files? Each runs under a hard limit.

    python benchmarks/streaming.py --limit 2.5 --out out/streaming    # needs Linux, root and 3 GB of disk
    python benchmarks/streaming.py --resident                         # and in float32, which ends badly
    python benchmarks/streaming.py --case audit --limit 1.0 [--tokens 1536] [--micro 256] [--budget 20m]
    python benchmarks/streaming.py --case audit --model llama-1b --limit 2.5 --tokens 512 --budget 60m

`check` is of a Llama of 1.1 billion random parameters in bfloat16, made once; `audit` of SmolLM2-135M, written once as
safetensors in float32 (0.54 GB), or of that Llama. The command runs in a control group of its own that may take so many
GB, page cache included: with `--stream` and, if asked for, without. What is written, a row for every command: seconds,
the largest private memory, and whether it ended or was killed; of an audit how many blocks are decided.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from common import RESULTS, environment

_V1 = Path("/sys/fs/cgroup/memory/peelwise")
_V2 = Path("/sys/fs/cgroup/peelwise")
_TOO_LONG = {"check": 600, "audit": 10_800}  # seconds: a command that only reads pages is as good as killed
FILE = RESULTS / "streaming.json"
TOKENIZER = Path(__file__).resolve().parent.parent / "examples" / "small_gpt" / "checkpoints" / "tokenizer"


def made(folder: Path) -> Path:
    """Make the model, unless it is there."""
    if (folder / "model.safetensors").exists():
        return folder
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32_000}
    config = LlamaConfig(num_attention_heads=32, num_key_value_heads=4, **sizes)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(folder)
    return folder


def packaged(folder: Path) -> Path:
    """Write SmolLM2 as a folder of safetensors, unless it is there."""
    if not (folder / "model.safetensors").exists():
        from peelwise.model.checkpoints import open_model, save_model

        opened = open_model("smollm2", dtype="float32", device="cpu")
        save_model(opened.model, opened.tokenizer, folder)
    return folder


def limited(group: Path, gigabytes: float) -> Callable[[], None]:
    """Return what a child calls to be in a control group that may take so much."""
    first = group == _V1
    group.mkdir(exist_ok=True)
    limit = group / ("memory.limit_in_bytes" if first else "memory.max")
    limit.write_text(str(int(gigabytes * 1e9)))
    return lambda: (group / ("tasks" if first else "cgroup.procs")).write_text(str(os.getpid())) and None


def run(command: list[str], inside: Callable[[], None], longest: float) -> dict[str, float | bool | str]:
    """Run a command and return how it went."""
    began, largest = time.perf_counter(), 0.0
    child = subprocess.Popen(command, preexec_fn=inside, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    killer = threading.Timer(longest, child.kill)
    killer.start()
    while child.poll() is None:
        largest = max(largest, _private(child.pid))
        time.sleep(0.2)
    killer.cancel()
    said = child.stderr.read() if child.stderr else ""
    return {
        "command": " ".join(["peelwise", *command[1:]]),
        "ended": child.returncode == 0,
        "code": child.returncode,
        "seconds": round(time.perf_counter() - began, 1),
        "largest private memory, GB": round(largest, 2),
        "said": said.strip().splitlines()[-1][:200] if said.strip() and child.returncode else "",
    }


def _private(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("RssAnon")), 0.0)


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=2.5, help="GB of the control group (default: 2.5)")
    parser.add_argument("--out", type=Path, default=Path("out/streaming"), help="where the model is made")
    parser.add_argument("--resident", action="store_true", help="also try it in float32, without streaming")
    parser.add_argument("--case", choices=["check", "audit"], default="check")
    parser.add_argument("--model", choices=["smollm2", "llama-1b"], default="smollm2", help="of the audit")
    parser.add_argument("--tokens", type=int, default=1536, help="of the audit (default: 1536)")
    parser.add_argument("--micro", type=int, default=256, help="tokens of the audit at a time (default: 256)")
    parser.add_argument("--budget", default="20m", help="of the audit (default: 20m)")
    options = parser.parse_args()
    audits, saved = options.case == "audit", options.out / "audit"
    small = audits and options.model == "smollm2"
    model = packaged(options.out / "smollm2") if small else made(options.out / "llama-1b")
    group = _V1 if _V1.parent.exists() else _V2
    inside = limited(group, options.limit)
    how = ["--no-text", "--signals", "weight_rms"]
    if audits:
        how = ["--tokens", str(options.tokens), "--micro-batch-tokens", str(options.micro)]
        how += ["--budget", options.budget, "--out", str(saved), "--force"]
    if audits and not small:  # any ids will do for a random model
        how += ["--tokenizer", str(TOKENIZER), "--sequence-length", "64"]
    command = [str(Path(sys.executable).with_name("peelwise")), options.case, str(model), *how]
    rows = json.loads(FILE.read_text())["runs"] if FILE.exists() else []
    for way in [["--stream"], ["--dtype", "float32"]][: 1 + options.resident]:
        found = run([*command, *way], inside, _TOO_LONG[options.case])
        size = (model / "model.safetensors").stat().st_size
        found |= {"limit, GB": options.limit, "weights, GB": round(size / 1e9, 2)}
        if audits and found["ended"]:
            blocks = json.loads((saved / "certificate.json").read_text())["blocks"]
            found["blocks decided"] = sum(block["verdict"] in ("red", "yellow", "green") for block in blocks)
        rows = [row for row in rows if row["command"] != found["command"]] + [found]
        FILE.write_text(json.dumps(environment() | {"runs": rows}, indent=1) + "\n")
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
