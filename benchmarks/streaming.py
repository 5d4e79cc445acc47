"""How much memory does a check take when weights stay in their files? A Llama of 1.1 billion parameters under a limit.

    python benchmarks/streaming.py --limit 2.5 --out out/streaming    # needs Linux, root and 3 GB of disk
    python benchmarks/streaming.py --resident                         # and in float32, which ends badly

The model is made once, random, in bfloat16. Then `peelwise check --no-text` runs in a control group of its own that may
take so many GB, page cache included: with `--stream` and, if asked for, in float32. What is written: seconds, the
largest private memory, and whether the command ended or was killed.
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
_TOO_LONG = 600  # seconds: a command that only reads pages again and again is as good as killed


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


def limited(group: Path, gigabytes: float) -> Callable[[], None]:
    """Return what a child calls to be in a control group that may take so much."""
    first = group == _V1
    group.mkdir(exist_ok=True)
    limit = group / ("memory.limit_in_bytes" if first else "memory.max")
    limit.write_text(str(int(gigabytes * 1e9)))
    return lambda: (group / ("tasks" if first else "cgroup.procs")).write_text(str(os.getpid())) and None


def run(command: list[str], inside: Callable[[], None]) -> dict[str, float | bool | str]:
    """Run a command and return how it went."""
    began, largest = time.perf_counter(), 0.0
    child = subprocess.Popen(command, preexec_fn=inside, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    killer = threading.Timer(_TOO_LONG, child.kill)
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
    options = parser.parse_args()
    model = made(options.out / "llama-1b")
    group = _V1 if _V1.parent.exists() else _V2
    inside = limited(group, options.limit)
    check = [
        str(Path(sys.executable).with_name("peelwise")),
        "check",
        str(model),
        "--no-text",
        "--signals",
        "weight_rms",
    ]
    ways = [["--stream"], ["--dtype", "float32"]][: 1 + options.resident]
    found = [run([*check, *how], inside) for how in ways]
    size = (model / "model.safetensors").stat().st_size
    result = environment() | {"limit, GB": options.limit, "weights, GB": round(size / 1e9, 2), "runs": found}
    (RESULTS / "streaming.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
