"""An allocation in the syntax of the tools that will use it. Text made from the record alone.

Layers that are left alone are those in a dense format, beside the output head, which is never asked about. Names of
options are those of the tools' own documentation; each text says which. Experts that are parts of one parameter have
one format, and are named as each tool knows them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from peelwise.records.allocation import AllocatedLayer, AllocationRecord

HEAD = "lm_head"
# The parts of llama.cpp's names for tensors of blocks, by the last part of ours.
_GGUF_PARTS = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
# What the parameters of experts hold; DBRX calls them otherwise.
_EXPERT_PARTS = {
    "gate_up_proj": ("gate", "up", "gate_up"),
    "up_proj": ("up",),
    "down_proj": ("down",),
    "w1": ("gate",),
    "v1": ("up",),
    "w2": ("down",),
}
_GGUF_TYPES = {
    "int2": "q2_K",
    "int3": "q3_K",
    "int4": "q4_K",
    "int5": "q5_K",
    "int6": "q6_K",
    "int7": "q8_0",
    "int8": "q8_0",
    **{f"q{bits}_k": f"q{bits}_K" for bits in range(2, 7)},
    "nf4": "iq4_nl",
    "fp4": "iq4_nl",
    "float8_e4m3": "q8_0",
    "float8_e5m2": "q8_0",
}

_ONNX = '''"""nodes_to_exclude(onnx.load(file)) for ONNX Runtime's quantisers: the layers left alone."""

import ast

LAYERS = [
{listed}
]


def nodes_to_exclude(model):
    """Return the names of the nodes of an `onnx.ModelProto` that compute with the weights of LAYERS."""
    return [n.name for n in model.graph.node if n.op_type in ("MatMul", "Gemm") and _layer(n)]


def _layer(node):
    kept = {{p.key: p.value for p in node.metadata_props}}.get("pkg.torch.onnx.name_scopes")
    scopes = ast.literal_eval(kept) if kept else [node.name.replace("/", ".").rpartition(".")[0]]
    return any(f".{{scope}}".endswith(f".{{layer}}") for scope in scopes for layer in LAYERS)
'''


def exports(record: AllocationRecord) -> dict[str, str]:
    """Return texts by the name of a file: the same plan for several tools."""
    return {
        "llm-compressor.yaml": llm_compressor(record),
        "llama-cpp.txt": llama_cpp(record),
        "onnx_nodes.py": onnx(record),
        "torchao_config.py": torchao(record),
        "transformers.json": transformers(record),
    }


def llm_compressor(record: AllocationRecord) -> str:
    """Return a recipe of llm-compressor: ``ignore`` and one group of ``config_groups`` per format.

    It makes experts modules of their own before it quantises them, which are named by a regular expression here.
    """
    lines = [
        "# Recipe for llm-compressor. Formats without integers of a fixed width are left to `ignore`.",
        "quantization_stage:",
        "  quantization_modifiers:",
        "    GPTQModifier:",
        f"      ignore: {json.dumps([HEAD, *map(_target, _left(record))])}",
        "      config_groups:",
    ]
    for number, (form, layers) in enumerate(_by_format(record)):
        width, group, symmetric = _integer(form)
        strategy = f"strategy: group, group_size: {group}" if group else "strategy: channel"
        lines += [
            f"        group_{number}:",
            f"          targets: {json.dumps([*map(_target, layers)])}",
            f"          weights: {{num_bits: {width}, type: int, symmetric: {str(symmetric).lower()}, {strategy}}}",
        ]
    return "\n".join(lines) + "\n"


def _target(layer: AllocatedLayer) -> str:
    if layer.parameter is None:
        return layer.name
    owner, _, last = layer.parameter.rpartition(".")
    parts = "|".join(f"{part}_proj" for part in _EXPERT_PARTS.get(last, ()) if "_" not in part) or re.escape(last)
    return rf"re:{re.escape(owner)}\.\d+\.({parts})$"


def llama_cpp(record: AllocationRecord) -> str:
    """Return options for llama.cpp's ``llama-quantize``: a ``--tensor-type`` per layer, the nearest type it has.

    Names are whole: a part of one would match others too, as ``ffn_gate`` does the router and the experts.
    """
    lines = []
    for layer in record.stored:
        kind = _GGUF_TYPES.get(layer.format.partition(":")[0], "f16")
        lines += [f"--tensor-type blk.{layer.block}.{part}.weight={kind}" for part in _gguf_parts(layer)]
    return " \\\n".join(lines) + "\n"


def _gguf_parts(layer: AllocatedLayer) -> list[str]:
    last = layer.name.rpartition(".")[2]
    if layer.parameter is not None:
        return [f"ffn_{part}_exps" for part in _EXPERT_PARTS.get(last, ())]
    part = _GGUF_PARTS.get(last)
    return [] if part is None else [f"{part}_shexp" if "shared_expert" in layer.name else part]


def onnx(record: AllocationRecord) -> str:
    """Return a Python file that finds ``nodes_to_exclude`` of ONNX Runtime's quantisers in an exported model.

    Names of nodes depend on the exporter: PyTorch's numbers them and keeps the path of the module in their metadata,
    others make the path the name.
    """
    listed = "\n".join(f"    {json.dumps(name)}," for name in [*_modules_left(record), HEAD])
    return _ONNX.format(listed=listed)


def torchao(record: AllocationRecord) -> str:
    """Return a Python file with a configuration for ``torchao.quantization.quantize_``."""
    lines = [
        '"""quantize_(model, config, filter_fn=None) of torchao, layer by layer."""',
        "",
        "import torch",
        "from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig, PerAxis, PerGroup",
        "",
        "config = FqnToConfig(",
        "    {",
    ]
    for form, layers in _by_format(record):
        width, group, symmetric = _integer(form)
        how = f"PerGroup({group})" if group else "PerAxis(0)"
        if not symmetric:
            lines.append(f"        # {form} has an offset, which this configuration does not have.")
        made = f"IntxWeightOnlyConfig(weight_dtype=torch.int{width}, granularity={how})"
        for layer in layers:
            if layer.parameter is not None:
                lines.append(f"        # {layer.name}: {form}; left alone, as this configuration takes matrices only.")
            else:
                lines.append(f"        {json.dumps(layer.name)}: {made},")
    return "\n".join([*lines, "    }", ")"]) + "\n"


def transformers(record: AllocationRecord) -> str:
    """Return ``modules_to_not_convert`` of the quantisation configurations of transformers."""
    return json.dumps({"modules_to_not_convert": [*_modules_left(record), HEAD]}, indent=2) + "\n"


def _left(record: AllocationRecord) -> list[AllocatedLayer]:
    return [layer for layer in record.stored if not layer.format.startswith("int")]


def _modules_left(record: AllocationRecord) -> list[str]:
    """Return the modules that hold layers left alone: of experts the one that holds all their parameters."""
    names = (layer.name if layer.parameter is None else layer.name.rpartition(".")[0] for layer in _left(record))
    return list(dict.fromkeys(names))


def _by_format(record: AllocationRecord) -> Iterator[tuple[str, list[AllocatedLayer]]]:
    for form in record.formats:
        layers = [layer for layer in record.stored if layer.format == form]
        if layers and form.startswith("int"):
            yield form, layers


def _integer(form: str) -> tuple[int, int, bool]:
    """Return width, group (0 for one scale per channel) and whether it is symmetric, from a format's name."""
    family, _, options = form.partition(":")
    words = options.split(",")
    group = next((int(word.partition("=")[2]) for word in words if word.startswith("group=")), 0)
    return int(family.removeprefix("int")), group, "symmetric" in words
