"""How long does opening a GGUF file take with our reader, and with that of the package gguf?

    python benchmarks/opening.py [--repetitions 3]

SmolLM2-135M as packaged, weights and tokenizer, in turn in one process: what both need once (imports of transformers)
is paid before. The header alone is timed too. Weights and tokenizer are compared, to the bit. All times are the
processor's, so that other work on the machine does not count.
"""

import argparse
import statistics
import time

from common import median_ratio, write
from peelwise.model import loading
from peelwise.model.checkpoints import gguf_file, open_model
from peelwise.model.fingerprint import fingerprint
from peelwise.model.weights.gguf_reader import FileReader


def opened(read_quickly):
    """Open the model with the replacements that the function makes."""
    ours = loading._read_quickly
    loading._read_quickly = read_quickly
    try:
        return open_model("smollm2")
    finally:
        loading._read_quickly = ours


def seconds(work):
    """Return the processor's time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def said(model):
    return fingerprint(model.model), model.tokenizer.backend_tokenizer.to_str()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    repetitions = parser.parse_args().repetitions
    import gguf

    package, ours, file = gguf.GGUFReader, loading._read_quickly, gguf_file("smollm2")
    ways = {"package": lambda stack: None, "peelwise": ours}
    assert len({said(opened(way)) for way in ways.values()}) == 1
    works = {name: lambda way=way: opened(way) for name, way in ways.items()}
    works |= {"header, package": lambda: package(file), "header, peelwise": lambda: FileReader(file)}
    times = {name: [] for name in works}
    for _ in range(repetitions):
        for name, work in works.items():
            times[name].append(seconds(work))
    write(
        "opening",
        {
            "repetitions": repetitions,
            "same_to_the_bit": True,
            "median_processor_seconds": {name: statistics.median(found) for name, found in times.items()},
            "ratio_to_package": {
                "opening": median_ratio(times, "peelwise", "package"),
                "header": median_ratio(times, "header, peelwise", "header, package"),
            },
        },
    )


if __name__ == "__main__":
    main()
