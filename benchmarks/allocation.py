"""Loss against bits on SmolLM2-135M: what an allocation of formats gains over one format for all layers.

`peelwise allocate` at budgets between the formats, on the text of `benchmarks/quantise.py`; the packaged file's own
four-bit blocks are the parent. Codes are by error feedback (what allocate plans with), in the plan as in the uniform
formats. Written are the curve, each point with its interval of damage against the parent, the plan at every budget
against the uniform formats within it, and how damages of single blocks add up. Resumable: each budget is a row, and
finished blocks are kept in the folder.

    python benchmarks/allocation.py --text prose --tokens 4096 [--bits 3.25 3.75] [--folder out/allocation]
"""

import argparse
import json
import time
from pathlib import Path

import torch

from common import RESULTS, environment
from peelwise.model.checkpoints import open_model
from peelwise.model.fingerprint import identify
from peelwise.tasks.allocate.kept import Kept
from peelwise.tasks.allocate.run import run_allocate
from peelwise.tasks.allocate.settings import AllocateSettings
from quantise import probe_of

FILE = RESULTS / "allocation.json"
POINTS = 6


def measured(model, probe, bits, folder):
    """Return one allocation's numbers."""
    began = time.process_time()
    settings = AllocateSettings(bits, points=POINTS)
    # Not removed at the end: the next budget uses the same codes.
    kept = Kept(folder, {"model": identify(model).fingerprint, "probe": probe.fingerprint, "formats": settings.formats})
    record = run_allocate(model, "smollm2", None, probe, settings, kept=kept)
    formats = [layer.format for layer in record.layers]
    return {
        "processor_seconds": round(time.process_time() - began, 1),
        "parent": record.parent_loss,
        "bits_per_weight": record.bits_per_weight,
        "chosen": record.chosen,
        "damage": record.damage.model_dump(),
        "layers": {form: formats.count(form) for form in sorted(set(formats))},
        "better_than": {form: found.model_dump() for form, found in record.better_than.items()},
        "interaction": record.interaction.model_dump(),
        "curve": [point.model_dump() for point in record.curve],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", default=["prose"], choices=["prose", "docstrings"])
    parser.add_argument("--tokens", type=int, default=4_096, help="of the fit part (default: 4096)")
    parser.add_argument("--bits", type=float, nargs="+", default=[3.25, 3.75], help="budgets (default: 3.25 3.75)")
    parser.add_argument("--folder", type=Path, default=Path("out/allocation"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    opened = open_model("smollm2", device="cpu")
    for text in options.text:
        probe = probe_of(opened.tokenizer, text, options.tokens, 0)
        for bits in options.bits:
            rows = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
            key = {"text": text, "fit_tokens": options.tokens, "budget": bits}
            if any(key.items() <= row.items() for row in rows):
                continue
            row = key | measured(opened.model, probe, bits, options.folder / f"{text}-{options.tokens}")
            FILE.write_text(json.dumps(environment() | {"rows": [*rows, row]}, indent=1) + "\n")
            print({name: value for name, value in row.items() if name != "curve"}, flush=True)


if __name__ == "__main__":
    main()
