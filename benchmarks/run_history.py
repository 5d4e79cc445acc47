"""How fast is the run history written while others read it, and how fast is what a live page asks for read?

    python benchmarks/run_history.py [--probes 10000]

60 blocks, three free statistics each, four blocks refined per probe; once without and once with four processes
that read what is new ten times a second. The queries are those of a page: medians of five. All times are the
processor's, so that other work on the machine does not count.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

from common import write
from peelwise.records.run import MatrixShare, Measurement, RunInfo, Statistic, StepRow
from peelwise.records.signals import SWEPT, of_kinds
from peelwise.store.reader import RunReader
from peelwise.store.writer import RunWriter

BLOCKS, READERS = 60, 4
FREE = [signal.name for signal in of_kinds(SWEPT) if signal.in_history]


def row(step):
    rows = [Statistic(n, b, 1.0 + step / 7, to_median=1.1, to_trend=0.9) for n in FREE for b in range(BLOCKS)]
    refined = [(4 * step + k) % BLOCKS for k in range(4)]
    rows += [Statistic("recoverable", block, 0.01, 0.005, 0.015, 0.001, 0.0) for block in refined]
    matrices = tuple(MatrixShare(block, f"matrix_{m}", 1 / 7) for block in refined for m in range(7))
    return Measurement(step, "alone", 2.0, 1.0, 0.03, "RYG?" * 15, statistics=tuple(rows), matrices=matrices)


def fill(path, probes):
    """Write a run and return records per second of the processor's time, the process that writes included."""
    rows = [row(step) for step in range(probes)]  # made beforehand: only writing is timed
    start = sum(os.times()[:4])  # of this process and of those that it has waited for
    with RunWriter(path, RunInfo("run", "Model", 1, tuple(f"layers.{b}" for b in range(BLOCKS)))) as writer:
        for step, each in enumerate(rows):
            writer.step(StepRow(step, 2.0, 0.03))
            writer.measurement(each)
    return 2 * probes / (sum(os.times()[:4]) - start)


def follow(path, stop, counts):
    """Read what is new ten times a second, as a page does; count the looks."""
    after = looks = 0
    while not stop.is_set():
        time.sleep(0.1)
        if path.exists():
            with RunReader(path) as reader:
                for probe in reader.probes(1, after=after, most=100):
                    after = probe["id"]
                reader.steps(1, most=1000)
            looks += 1
    counts.put(looks)


def cpu(work):
    """Return the processor's seconds of one call: others may use the machine too."""
    start = time.process_time()
    work()
    return time.process_time() - start


def with_readers(path, probes):
    stop, counts = multiprocessing.Event(), multiprocessing.Queue()
    readers = [multiprocessing.Process(target=follow, args=(path, stop, counts)) for _ in range(READERS)]
    for reader in readers:
        reader.start()
    rate = fill(path, probes)
    stop.set()
    looks = sum(counts.get() for _ in readers)
    for reader in readers:
        reader.join()
    return rate, looks


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--probes", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        alone, shared = Path(folder) / "alone.db", Path(folder) / "shared.db"
        rate = fill(alone, options.probes)
        rate_shared, looks = with_readers(shared, options.probes)
        with RunReader(alone) as reader:
            run = reader.latest()
            queries = {
                "heat map: verdict letters of all probes": lambda: reader.measurements(1),
                "heat map: one statistic of all probes": lambda: reader.to_median(run, "energy"),
                "heat map: one statistic, 500 columns": lambda: reader.statistics(1, "energy", most=500),
                "one block's values, all probes": lambda: reader.values(run, "energy", 7),
                "one block, all probes": lambda: reader.statistics(1, "energy", block=7),
                "one block, 1,000 points": lambda: reader.statistics(1, "energy", block=7, most=1000),
                "one block's matrices": lambda: reader.matrices(1, 7),
                "loss, 1,000 points": lambda: reader.steps(1, most=1000),
                "what is new: one probe": lambda: reader.statistics(1, "energy", after=options.probes - 1),
            }
            times = {name: 1000 * statistics.median(cpu(query) for _ in range(5)) for name, query in queries.items()}
        size = alone.stat().st_size
    result = {
        "probes": options.probes,
        "megabytes": size / 1e6,
        "records_per_processor_second": {
            "alone": rate,
            f"with {READERS} readers": rate_shared,
            "ratio": rate_shared / rate,
        },
        "looks_of_readers": looks,
        "query_processor_milliseconds": times,
    }
    write("run_history", result)


if __name__ == "__main__":
    main()
