"""How long does the live page take to appear, to follow, and to answer a click, at 60 blocks by 10,000 looks?

    python benchmarks/dashboard.py [--probes 10000] [--repetitions 5]

A real server and a real Chromium, whose performance interface tells the times; beside it the same for 6 blocks by
100 looks in the same run, so that the machine's share can be told apart. Medians.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

from common import write
from peelwise.records.run import MatrixShare, Measurement, RunInfo, Statistic, StepRow
from peelwise.records.signals import SWEPT, of_kinds
from peelwise.show.dashboard.serve import Address, Server
from peelwise.store.writer import RunWriter

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
UPDATES = 30
FREE = [signal.name for signal in of_kinds(SWEPT) if signal.in_history]
WATCH = """() => { window.seen = []; window.frames_ = []; let last = performance.now();
    const note = (list) => window.seen.push(...list.getEntriesByName('peelwise update').map((e) => e.duration));
    new PerformanceObserver(note).observe({ entryTypes: ['measure'] });
    const frame = (now) => { window.frames_.push(now - last); last = now; requestAnimationFrame(frame); };
    requestAnimationFrame(frame); }"""

# Timed within the page, so that what drives the browser does not count.
ACT = """async ([selector, value, where, words]) => { const element = document.querySelector(selector);
    const start = performance.now();
    if (value === null) element.click();
    else { element.value = value; element.dispatchEvent(new Event('change')); }
    while (!document.querySelector(where).textContent.includes(words)) await new Promise(requestAnimationFrame);
    return performance.now() - start; }"""


def row(step, blocks):
    """Return a look whose letters change now and then, with free statistics and four refined blocks."""
    rows = [
        Statistic(n, b, 1 + b / 9 + step % 7, to_median=1 + (step * b) % 9 / 9) for n in FREE for b in range(blocks)
    ]
    refined = [(4 * step + k) % blocks for k in range(4)]
    rows += [Statistic("recoverable", block, 0.01, 0.005, 0.015, 0.001, 0.0) for block in refined]
    matrices = tuple(MatrixShare(block, f"matrix_{m}", 1 / 7) for block in refined for m in range(7))
    letters = "".join("GGGGYGR?"[(b * 7 + step // 90) % 8] for b in range(blocks))
    return Measurement(step, "alone", 2 + 9 / (9 + step), 1.0, 0.03, letters, statistics=tuple(rows), matrices=matrices)


def filled(path, blocks, probes):
    writer = RunWriter(path, RunInfo("run", "Model", 1, tuple(f"layers.{b}" for b in range(blocks)), budget=0.03))
    for step in range(probes):
        writer.step(StepRow(step, 2 + 9 / (9 + step), 0.03))
        writer.measurement(row(step, blocks))
    return writer


def opened(browser, url):
    """Load the page; return it, and the milliseconds from the request to first paint and to all charts drawn."""
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(url)
    page.wait_for_selector("html[data-ready]")
    page.wait_for_selector(".small-chart")
    drawn = page.evaluate("(() => { const e = performance.getEntriesByName('peelwise update')[0];"
                          " return e.startTime + e.duration })()")  # fmt: skip
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    return page, paint, drawn


def followed(page, writer, blocks, first):
    """Write looks while the page is open; return milliseconds of drawing, from disk to screen, and between frames."""
    page.evaluate(WATCH)
    page.wait_for_timeout(300)
    delays = []
    for step in range(first, first + UPDATES):
        before = page.evaluate("window.seen.length")
        writer.step(StepRow(step, 2.0, 0.03))
        writer.measurement(row(step, blocks))
        start = time.perf_counter()
        while page.evaluate("window.seen.length") == before:
            time.sleep(0.005)
        delays.append(1000 * (time.perf_counter() - start))
    frames = page.evaluate("window.frames_")
    return page.evaluate("window.seen"), delays, frames


def clicked(page, blocks, repetitions):
    """Return milliseconds from choosing a block, and from another colouring, to the chart being drawn."""
    choose, colour = [], []
    for k in range(repetitions):
        block = (7 * k + 1) % blocks
        choose.append(page.evaluate(ACT, [f".pick[data-block='{block}']", None, ".block h3", f"Block {block} "]))
        name = FREE[k % len(FREE)]
        colour.append(page.evaluate(ACT, ["#colour-by", name, ".heat h3", "against its own median"]))
        page.evaluate(ACT, ["#colour-by", "", ".heat h3", "Verdicts"])
    return choose, colour


def measured(browser, path, blocks, probes, repetitions):
    writer = filled(path, blocks, probes)
    server = Server([path], Address(port=0))
    thread = server.beside()
    loads = []
    for _ in range(repetitions):
        page, paint, drawn = opened(browser, server.url)
        loads.append((paint, drawn))
        if len(loads) < repetitions:
            page.close()
    drawing, delays, frames = followed(page, writer, blocks, probes)
    choose, colour = clicked(page, blocks, 2 * repetitions)
    page.close()
    server.stop()
    thread.join(10)
    writer.close()
    median = statistics.median
    return {
        "blocks": blocks,
        "probes": probes,
        "first_contentful_paint": median(paint for paint, _ in loads),
        "all_charts_drawn": median(drawn for _, drawn in loads),
        "update_script": median(drawing),
        "update_script_longest": max(drawing),
        "from_disk_to_screen": median(delays),
        "longest_frame_while_updating": max(frames[1:]),
        "choosing_a_block": median(choose),
        "another_colouring": median(colour),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--probes", type=int, default=10_000)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        small = measured(browser, Path(folder) / "small.db", 6, 100, options.repetitions)
        large = measured(browser, Path(folder) / "large.db", 60, options.probes, options.repetitions)
        version = browser.version
        browser.close()
    ratios = {key: large[key] / small[key] for key in large if key not in ("blocks", "probes")}
    write("dashboard", {"chromium": version, "load": os.getloadavg(), "milliseconds": [small, large], "ratios": ratios})


if __name__ == "__main__":
    main()
