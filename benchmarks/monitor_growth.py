"""How does what a look costs grow with the number of blocks and with their width?

    python benchmarks/monitor_growth.py [--repetitions 3] [--tokens 2400] [--sizes 2x64 4x64]

Times each kind of look, and a forward pass of the same model over the whole probe, in turn; the medians of their
ratios say how many such passes a look takes. Models are random Llamas with a vocabulary of 512: what is done does not
hang on what they know, but how many steps are tried does, a little.
"""

import argparse
from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peelwise
from common import interleaved, median_ratio, write
from peelwise.model.architectures import find_blocks
from peelwise.model.guard import untouched
from peelwise.model.layers import parameter_count
from peelwise.model.runner import MICRO_BATCH_TOKENS, Runner
from peelwise.tasks.monitor.measure import measure as measure_model

KINDS = ("ranking", "alone", "joint")
VOCABULARY, LENGTH = 512, 64
SIZES = [(blocks, 128) for blocks in (2, 4, 8, 16)] + [(4, width) for width in (64, 256, 512)]


def model_of(blocks, width):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    )


def forward(model, blocks, probe):
    with untouched(model):
        runner = Runner(model, blocks)
        for part in (probe.fit, probe.select, probe.report):
            runner.trace(part)


def measure(size, tokens, repetitions):
    model = model_of(*size)
    blocks = find_blocks(model)
    ids = torch.randint(VOCABULARY, (2 * tokens,), generator=torch.Generator().manual_seed(1))
    probe = peelwise.Probe.from_tokens(ids, tokens=tokens, sequence_length=LENGTH, in_distribution=True)
    order = list(range(len(blocks)))
    works = {
        kind: partial(measure_model, model, blocks, probe, kind, order, micro_batch_tokens=MICRO_BATCH_TOKENS)
        for kind in KINDS
    }
    times = interleaved({"forward": partial(forward, model, blocks, probe), **works}, repetitions)
    return {
        "blocks": size[0],
        "width": size[1],
        "parameters": parameter_count(model),
        "forward_seconds": sorted(times["forward"])[repetitions // 2],
        "forward_equivalents": {kind: median_ratio(times, kind, "forward") for kind in KINDS},
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2400)
    parser.add_argument("--sizes", nargs="+", default=[f"{blocks}x{width}" for blocks, width in SIZES])
    options = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in options.sizes]
    rows = [measure(size, options.tokens, options.repetitions) for size in sizes]
    write("monitor_growth", {"probe_tokens": options.tokens, "repetitions": options.repetitions, "sizes": rows})


if __name__ == "__main__":
    main()
