"""Tiny random copies of every causal language model that the installed transformers knows.

Sizes are set by the names that configurations give them, all alike, whatever the type; ``_own`` holds what a type needs
besides. Weights are random and large enough that every block matters to the loss.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

LENGTH = 32
SEED = 7


@dataclass(frozen=True)
class Sizes:
    """How large the copies are, and which of the usual options are turned round.

    Args:
        vocabulary, width, inner, blocks, heads, key_value_heads: of every kind of block; a head is 8 wide.
        experts, chosen: of a mixture, and how many of them a token is given to.
        options: settings instead of the usual ones, where a type has them; a bool that is ``None`` is turned round.
    """

    vocabulary: int = 257
    width: int = 32
    inner: int = 48
    blocks: int = 4
    heads: int = 4
    key_value_heads: int = 2
    experts: int = 4
    chosen: int = 2
    options: tuple[tuple[str, Any], ...] = ()

    def in_turn(self, *kinds: str) -> list[str]:
        """Return a kind per block, one after the other."""
        return [kinds[place % len(kinds)] for place in range(self.blocks)]


USUAL = Sizes()
# Another draw of everything: what was mended for the usual sizes alone would be found by it.
OTHER = Sizes(
    vocabulary=301,
    width=48,
    inner=80,
    blocks=5,
    heads=6,
    key_value_heads=3,
    experts=6,
    chosen=3,
    options=(
        ("tie_word_embeddings", None),
        ("attention_bias", None),
        ("mlp_bias", None),
        ("use_bias", None),
        ("norm_topk_prob", None),
        ("decoder_sparse_step", 2),
        ("first_k_dense_replace", 2),
        ("n_shared_experts", 2),
        ("num_shared_experts", 2),
        ("sliding_window", 8),
        ("attn_implementation", "eager"),
    ),
)


def _named(s: Sizes) -> dict[str, Any]:
    """Return sizes by the attribute's name. Lists are cut or repeated to the number of blocks."""
    return {
        **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "text_vocab_size", "n_vocab", "shape_vocab_size",
                         "pronunciation_vocab_size", "encoder_hash_byte_group_vocab"), s.vocabulary),
        **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim", "n_embed",
                         "dim_model", "hidden_dim", "attention_hidden_size", "lru_width", "embed_dim",
                         "cross_attention_hidden_size", "backbone_hidden_size", "residual_embedding_size",
                         "adapter_in_dim",
                         "adapter_out_dim", "adapter_input_size", "input_embedding_size", "output_embedding_size",
                         "hidden_size_global", "shape_embed_dim", "pronunciation_embed_dim", "router_hidden_size"),
                         s.width),
        **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "dim_ff",
                         "d_inner",
                         "feed_forward_size", "shared_intermediate_size", "ffn_hidden_size", "dense_intermediate_size",
                         "expert_ffn_hidden_size", "intermediate_size_mlp", "moe_intermediate_size", "ffn_size",
                         "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "block_ff_dim",
                         "prefix_dense_intermediate_size", "zaya_intermediate_size",
                         "shared_experts_intermediate_size"), s.inner),
        **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
                         "num_decoder_layers",
                         "encoder_layers", "num_encoder_layers", "num_blocks", "depth"), s.blocks),
        **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
                         "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads",
                         "swa_num_attention_heads", "linear_num_value_heads", "num_ssm_heads"), s.heads),
        **dict.fromkeys(("num_key_value_heads", "n_head_kv", "kv_n_heads", "num_global_key_value_heads",
                         "linear_num_key_heads", "swa_num_key_value_heads", "attention_sink_heads"), s.key_value_heads),
        **dict.fromkeys(("head_dim", "global_head_dim", "d_kv", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
                         "linear_key_head_dim", "linear_value_head_dim", "kv_channels", "attention_head_dim",
                         "dim_head",
                         "swa_head_dim", "swa_v_head_dim", "index_head_dim", "rotary_dim", "mamba_d_state",
                         "mamba_d_head",
                         "state_size", "ssm_state_size", "mamba_head_dim", "mamba_headdim", "o_lora_rank",
                         "qk_head_dim"), 8),
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
                         "ffn_num_experts"), s.experts),
        **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k", "moe_k", "moe_top_k", "num_selected_experts",
                         "num_experts_per_token", "router_topk", "ffn_moe_top_k"), s.chosen),
        **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_groups", "mamba_n_groups", "mamba_ngroups"),
                         1),
        **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "context_length", "max_seq_len",
                         "max_target_positions", "max_source_positions", "seq_length"), 64),
        **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "time_step_rank", "mamba_dt_rank", "dt_rank"), 8),
        **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "index_n_heads"), s.heads),
        **dict.fromkeys(("sliding_window", "attention_chunk_size", "attention_window_size", "window_size", "index_topk",
                         "chunk_size", "mamba_chunk_size", "local_window", "index_block_size"), 16),
        "first_k_dense_replace": 1, "num_dense_layers": 1, "n_shared_experts": 1, "num_shared_experts": 1,
        "zero_expert_num": 1,
        "hidden_size_per_layer_input": 8, "laurel_rank": 8, "conv_dim": s.width, "block_dim": s.width,
        "conv_dim_out": s.width, "mamba_d_ssm": s.width, "expand": 1, "mamba_expand": 1, "num_memory_blocks": 1,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1,
        "attention_dropout": 0.0, "dropout": 0.0, "activation_dropout": 0.0, "hidden_dropout": 0.0,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "layerdrop": 0.0, "decoder_layerdrop": 0.0, "encoder_layerdrop": 0.0,
        "router_jitter_noise": 0.0, "input_jitter_noise": 0.0,
    }  # fmt: skip


def _own(s: Sizes) -> dict[str, dict[str, Any]]:
    """Return what a type needs besides, or instead (``None`` leaves the attribute as it is by default)."""
    indexer = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
               "indexer_compress_ratio": 4}  # fmt: skip
    # Layers of another kind than the rest have sizes of their own, given by arguments that are kept nowhere.
    sliding = {"num_key_value_heads": s.heads, "swa_num_attention_heads": s.heads, "swa_num_key_value_heads": s.heads,
               "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8,
               "swa_v_head_dim": 8}  # fmt: skip
    shared = {"global_head_dim": 16, "num_kv_shared_layers": 2}
    one_book = {"num_codebooks": 1, "audio_channels": 1}  # of audio codes, which are then tokens like others
    return {
        "dots3_note": {"text_config": sliding, "vision_config": {"mlp_bias": False}},
        "dots3_note_text": sliding,
        "gemma4": {"text_config": shared}, "gemma4_text": shared,
        "gemma4_unified": {"text_config": shared}, "gemma4_unified_text": shared,
        "musicgen": {"decoder": one_book}, "musicgen_melody": {"decoder": one_book},
        "dots1": {"n_routed_experts": s.experts, "moe_intermediate_size": s.inner, "num_experts_per_tok": s.chosen,
                  "n_shared_experts": 1},
        "gemma3n_text": {"layer_types": s.in_turn("sliding_attention", "full_attention"), "num_kv_shared_layers": 2,
                         "activation_sparsity_pattern": [0.0] * s.blocks, "intermediate_size": [s.inner] * s.blocks},
        "hunyuan_v1_dense": {"head_dim": 8}, "hunyuan_v1_moe": {"head_dim": 8}, "ministral": {"head_dim": 8},
        "nemotron": {"head_dim": 8, "num_key_value_heads": s.key_value_heads},
        "qwen4_exp": {"text_config": indexer}, "qwen4_exp_text": indexer,
        "zamba": {"attention_hidden_size": 2 * s.width, "attention_head_dim": 2 * s.width // s.heads},
        "zamba2": {"attention_hidden_size": 2 * s.width, "attention_head_dim": 2 * s.width // s.heads},
        "lfm2_moe": {"num_dense_layers": 1, "layer_types": s.in_turn("conv", "full_attention")},
        "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, s.width - 16],
                     "attn_layers": ["local"] * s.blocks, "local_attn_chunk_length": 16, "attention_head_size": 8,
                     "num_attention_heads": s.heads},
        "xmod": {"default_language": "en_XX", "is_decoder": True},
        "xlm": {"n_words": s.vocabulary, "causal": True, "emb_dim": s.width, "n_heads": s.heads,
                "max_position_embeddings": 64},
        "zaya": {"num_experts_per_tok": 1},
        "mpt": {"attn_config": {"attn_pdrop": 0}, "expansion_ratio": 2},
        "xlnet": {"attn_type": "uni"},
        "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": s.chosen, "moe_intermediate_size": s.inner},
        "kimi_linear": {
            "linear_attn_config": {"head_dim": 8, "num_heads": s.heads, "short_conv_kernel_size": 4,
                                   "kda_layers": list(range(1, s.blocks)),
                                   "full_attn_layers": [s.blocks]}},
        "codegen": {"n_head": 4},  # its shards
        "ctrl": {"dff": s.inner},
        "cohere_compass_text": {
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
                for kind in ("full_attention", "sliding_attention")
            }
        },
        "longcat_flash": {"head_dim": 8, "num_key_value_heads": s.heads, "num_layers": 2, "qk_head_dim": 16,
                          "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
        "diffllama": {"num_key_value_heads": 2},
        "dbrx": {"tie_word_embeddings": False,
                 "attn_config": {"kv_n_heads": s.key_value_heads, "clip_qkv": 8.0, "rope_theta": 10000.0},
                 "ffn_config": {"ffn_hidden_size": s.inner, "moe_num_experts": s.experts, "moe_top_k": s.chosen,
                                "hidden_size": s.width}},
    }  # fmt: skip


DECODERS = {"is_decoder": True}  # encoders that are causal only if they are told so
DECODER_ALONE = ("musicgen", "musicgen_melody")  # types whose causal model is configured by a part of their settings
ASSISTANTS = ("gemma4_assistant", "gemma4_unified_assistant")
LARGEST = 5_000_000  # parameters of a copy; the sums over tokens of wider layers would take gigabytes


class TooLargeError(ValueError):
    """A tiny copy is not tiny: some size is configured by a name that ``_named`` does not know."""


def types() -> list[str]:
    """Return the types that ``AutoModelForCausalLM`` knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(kind: str, sizes: Sizes = USUAL) -> Any:
    """Return a configuration of a type with all its sizes small."""
    from transformers import AutoConfig

    if kind in ASSISTANTS:
        raise ValueError("it is given hidden states and keys of the model that it assists, and no tokens")
    usual = AutoConfig.for_model(kind)
    own = dict(_own(sizes).get(kind, {}))
    if getattr(usual, "is_decoder", None) is False:
        own |= DECODERS
    if _read(usual, "kv_lora_rank"):
        own.setdefault("num_key_value_heads", sizes.heads)  # latent attention has as many of both
    settings = _small(usual, own, sizes)
    return type(usual)(**settings)


def build(kind: str, sizes: Sizes = USUAL) -> nn.Module:
    """Return a tiny random model of a type, in eval mode, the same at every call."""
    config = tiny_config(kind, sizes)
    how = {key: value for key, value in sizes.options if key == "attn_implementation"}
    with torch.device("meta"):
        parameters = sum(p.numel() for p in _of_config(kind, copy.deepcopy(config), **how).parameters())
    if parameters > LARGEST:
        raise TooLargeError(f"{parameters:,} parameters: a size that tiny_models does not know by its name")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = _of_config(kind, config, dtype=torch.float32, **how).eval()
        _enliven(model)
    return model


def _of_config(kind: str, config: Any, **how: Any) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if kind in DECODER_ALONE:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config.decoder, **how)
    return AutoModelForCausalLM.from_config(config, **how)


@torch.no_grad()
def _enliven(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "A_log" not in name and parameter.is_floating_point():
            parameter.normal_(0.0, 0.2)
        elif "bias" in name and "dt" not in name:
            parameter.add_(0.05 * torch.randn_like(parameter))


def _small(usual: Any, own: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    named, turned = _named(sizes), dict(sizes.options)
    known = {**usual.__dict__, **_of_signature(usual)}
    own = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | own
    for name in ("layers_block_type", "layer_types", "mlp_layer_types", "block_types"):
        usual_list = _read(usual, name)
        if isinstance(usual_list, (list, tuple)) and name not in own and name in _of_signature(usual):
            own[name] = _spread(list(usual_list), sizes.blocks)
    settings: dict[str, Any] = {}
    names = {usual.attribute_map.get(name, name) for name in known} | set(known)
    for name in sorted(names):
        value = known.get(name, _read(usual, name))
        if name in own and not hasattr(value, "attribute_map"):
            continue
        if hasattr(value, "attribute_map"):  # a configuration inside of a configuration
            settings[name] = _small(value, own.get(name, {}), sizes) | {"model_type": value.model_type}
        elif name in turned and value is not None:
            settings[name] = not value if isinstance(value, bool) else turned[name]
        elif name in named and (value is not None or name in ("pad_token_id",)):
            size, several = named[name], isinstance(value, (list, tuple))
            settings[name] = [size] * min(len(value), sizes.blocks) if several else size
        elif isinstance(value, (list, tuple)) and len(value) == _layers_of(usual) and len(value) > 2:
            settings[name] = _spread(list(value), sizes.blocks)
    return settings | {n: v for n, v in own.items() if v is not None and not hasattr(known.get(n), "attribute_map")}


def _of_signature(usual: Any) -> dict[str, Any]:
    found = inspect.signature(type(usual).__init__).parameters
    return {name: _read(usual, name) for name in found if name not in ("self", "kwargs")}


def _read(config: Any, name: str) -> Any:
    """Return what a configuration says; what it keeps per layer may not be asked of the whole."""
    try:
        return getattr(config, name, None)
    except Exception:  # a class of its own, for configurations with layers of several kinds
        return config.__dict__.get(name)


def _layers_of(config: Any) -> int:
    return int(getattr(config, "num_hidden_layers", 0) or 0)


def _spread(values: list[Any], blocks: int) -> list[Any]:
    """Return a value per block: of each kind that there is at least one, in their order."""
    kinds = list(dict.fromkeys(map(str, values)))
    first = {kind: next(v for v in values if str(v) == kind) for kind in kinds}
    if len(kinds) == 1:
        return values[:blocks]
    return [first[kinds[place % len(kinds)]] for place in range(blocks)]
