"""How much memory each process of an audit takes where the weights are whole in each, and where they are spread.

    python benchmarks/sharded_memory.py [--task check] [--width 512] [--blocks 16] [--tokens 1200]
        [--ways whole sharded on-disk]

A Llama with random weights, saved in bfloat16 and opened in float32, and checked (passes forward, one signal of the
weights and factors where it stands out) or audited (one joint round, no controls) by two processes of one thread each:
`whole` in each of them, `sharded` (--shard), and `on-disk` (--shard --stream: in the stored dtype, and what there is
one of for every block in files). Told are bytes of private memory (`RssAnon`, sampled ten times a second), the
larger of both processes, above what Python and its packages took: the most while it opens, then, and in all. Beside
them the formula: weights, one block of them, and the ends (embedding, head), gathered as long as the model runs.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from common import write

NAME = "sharded_memory"
WAYS = {"whole": {}, "sharded": {"shard": True}, "on-disk": {"shard": True, "stream": True}}


def private():
    """Return the bytes of memory that are this process's alone."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


class Sampled:
    """The most private memory since it was asked for last."""

    def __init__(self):
        self._most = 0
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self):
        while True:
            self._most = max(self._most, private())
            time.sleep(0.1)

    def most(self):
        found, self._most = max(self._most, private()), 0
        return found


def measure(folder, way, task, tokens, out):
    """Check or audit in this process and the others that torchrun has started, and write what it took."""
    from peelwise.api.inputs import open_target
    from peelwise.distributed.processes import together
    from peelwise.model.options import ShardedOptions
    from peelwise.probe.probe import Probe
    from peelwise.tasks.audit.run import run_audit
    from peelwise.tasks.audit.settings import AuditSettings
    from peelwise.tasks.check.run import run_check
    from peelwise.tasks.check.settings import CheckSettings

    torch.distributed.init_process_group("gloo")
    ids = torch.randint(0, 1_000, (max(tokens // 64, 24), 65), generator=torch.Generator().manual_seed(0))
    probe, settings = Probe.from_tokens(ids), AuditSettings(3_600.0, joint_rounds=1, solo_rounds=0, controls=False)

    def measured(model):
        if task == "audit":
            return run_audit(model, probe, settings, processes=processes).record
        return run_check(model, probe, CheckSettings(signals=("weight_rms",)), processes=processes)

    opening = ShardedOptions(device="cpu", **WAYS[way])
    with together() as processes:
        # What packages take of it is no memory of the model.
        measured(open_target(Path(folder) / "tiny", opening).model)
        sampled, base = Sampled(), private()
        model = open_target(folder, opening).model
        most, opened = sampled.most() - base, private() - base
        record = measured(model)
    found = {
        "base_bytes": base,
        "opening_bytes": most,
        "opened_bytes": opened,
        "most_bytes": sampled.most() - base,
        "wall_seconds": record.cost.wall_seconds,
        "loss": record.loss if task == "check" else record.loss.current,
    }
    (Path(out) / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def run(folder, way, task, tokens):
    with tempfile.TemporaryDirectory() as out:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
        measured = ["--measure", folder, way, out, "--task", task, "--tokens", str(tokens)]
        subprocess.run([*start, *measured], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        both = [json.loads(file.read_text()) for file in sorted(Path(out).glob("*.json"))]
    return {key: max(each[key] for each in both) for key in both[0]}


def made(folder, width, blocks):
    """Save a Llama of random weights in bfloat16, and return how large it is in float32."""
    import transformers

    transformers.logging.disable_progress_bar()

    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=2_048,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    of_block = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    weights = 4 * sum(p.numel() for p in model.parameters())
    return {"weights_bytes": weights, "block_bytes": of_block, "ends_bytes": weights - blocks * of_block}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=["check", "audit"], default="check")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1_200)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        folder, way, out = args.measure
        measure(folder, way, args.task, args.tokens, out)
        return
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        size = made(folder, args.width, args.blocks)
        made(Path(folder) / "tiny", 64, 2)
        found = {way: run(folder, way, args.task, args.tokens) for way in args.ways}
    settings = {"task": args.task, "width": args.width, "blocks": args.blocks, "tokens": args.tokens, "processes": 2}
    write(NAME, settings | size | {"ways": found})


if __name__ == "__main__":
    main()
