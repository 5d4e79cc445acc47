"""A small Llama or Mixtral written as a complete GGUF file; transformers opens that of a Llama."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralForCausalLM


def llama_of_whole_blocks() -> LlamaForCausalLM:
    """Return a random Llama all of whose widths are multiples of 32."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=97, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    ).eval()


def write_llama_gguf(
    model: LlamaForCausalLM | MixtralForCausalLM,
    file: Path,
    kind: str,
    *,
    others: str = "F32",
    vocabulary: list[str] | None = None,
) -> None:
    """Write block matrices in the blocks of ``kind``, embeddings in those of ``others``, and norms in float32.

    With a vocabulary, which is that of bytes and single merges of its first two tokens, comes a tokenizer.
    """
    gguf = pytest.importorskip("gguf")
    config, type_ = model.config, gguf.GGMLQuantizationType[kind]
    heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if vocabulary is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(vocabulary)
        writer.add_token_types([gguf.TokenType.NORMAL] * len(vocabulary))
        writer.add_token_scores([-0.5 * n for n in range(len(vocabulary))])
        # Twice: transformers before 5.21 takes a list of one for a single text.
        writer.add_token_merges([f"{vocabulary[0]} {vocabulary[1]}"] * 2)
        writer.add_bos_token_id(2)
        writer.add_add_bos_token(True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    if isinstance(model, MixtralForCausalLM):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    for name, weight in model.state_dict().items():
        if ".experts." in name:
            for part, matrices in _experts(name, weight).items():
                stored = name.split(".experts.")[0].replace("model.layers", "blk").replace("mlp", part)
                writer.add_tensor(f"{stored}.weight", matrices.contiguous().numpy())
            continue
        if "q_proj" in name or "k_proj" in name:
            weight = _interleaved(weight, heads if "q_proj" in name else key_value_heads)
        stored = names.get_name(name, try_suffixes=(".weight",))
        data = weight.float().numpy()
        if weight.ndim == 2:
            form = type_ if "_proj" in name else gguf.GGMLQuantizationType[others]
            writer.add_tensor(stored, gguf.quants.quantize(data, form), raw_dtype=form)
        else:
            writer.add_tensor(stored, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """GGUF turns neighbouring coordinates of a head, transformers those half a head apart."""
    d_out, d_in = weight.shape
    return weight.reshape(heads, 2, d_out // heads // 2, d_in).swapaxes(1, 2).reshape(d_out, d_in).contiguous()


def _experts(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Return the matrices of all experts ``[experts, d_out, d_in]`` under GGUF's names for them."""
    if name.endswith("down_proj"):
        return {"ffn_down_exps": weight}
    gate, up = weight.chunk(2, dim=1)
    return {"ffn_gate_exps": gate, "ffn_up_exps": up}
