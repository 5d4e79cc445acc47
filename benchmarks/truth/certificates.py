"""Does a certificate hold where the arithmetic is another? Threads, micro-batches, kernels and number formats.

    python benchmarks/truth/certificates.py

Audits a few models on one thread, writes their certificates, and verifies them in full under other settings.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import own
import training
from cases import KEPT_SEED, SMALL, Case, probe_of
from common import write
from peelwise.pipeline.certificate import verify_certificate, write_certificate

CASES = (
    Case(SMALL, "healthy", "healthy", KEPT_SEED, 2400),
    Case(SMALL, "healthy", "healthy", KEPT_SEED, 600),
    Case(SMALL, "after training", "noise 0.5", KEPT_SEED, 2400, 3),
    Case(SMALL, "after training", "sign flip", KEPT_SEED, 2400, 2),
)
FORMATS = (torch.float32, torch.bfloat16)  # what the audited model holds; verified in the same, its fingerprint says so
TOKENS = 9_600


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# name -> (setting, tokens of a micro-batch)
SETTINGS: dict[str, tuple[Callable[[], Any], int]] = {
    "as audited": (contextlib.nullcontext, 1024),
    "2 threads": (lambda: threads(2), 1024),
    "4 threads": (lambda: threads(4), 1024),
    "micro-batches of 128 tokens": (contextlib.nullcontext, 128),
    "micro-batches of 8,192 tokens": (contextlib.nullcontext, 8192),
    "other kernels (no oneDNN)": (lambda: torch.backends.mkldnn.flags(enabled=False), 1024),
    "float32 products in bfloat16 where the processor can": (lambda: matmul_precision("medium"), 1024),
    "autocast to bfloat16": (lambda: torch.autocast("cpu", torch.bfloat16), 1024),
}


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for number_format in FORMATS:
        for case in CASES:
            model = case.model().to(number_format)
            outcome = own.audited(model, probe_of(SMALL, TOKENS), joint_rounds=2, alone_rounds=1)
            name = f"{case.name}-{str(number_format).removeprefix('torch.')}"
            folder = training.ROOT / "out" / "truth" / "certificates" / name
            folder.parent.mkdir(parents=True, exist_ok=True)
            write_certificate(folder, outcome.record, outcome.witness, outcome.probe)
            for setting, (entered, tokens) in SETTINGS.items():
                with entered():
                    found = verify_certificate(folder, model, full=True, micro_batch_tokens=tokens)
                farthest = max((abs(c.found - c.recorded) for c in found.checks), default=float("nan"))
                rows.append(
                    {
                        "certificate": name,
                        "setting": setting,
                        "status": found.status,
                        "farthest": farthest,
                        "tolerance": found.tolerance,
                        "reason": found.reason,
                    }
                )
                print(f"{name}: {setting}: {found.status} (farthest {farthest:.1e} nats)", flush=True)
    held = sum(row["status"] == "holds" for row in rows)
    write("truth/certificates", {"held": held, "checked": len(rows), "rows": rows})


if __name__ == "__main__":
    main()
