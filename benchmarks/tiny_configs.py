"""Small configurations of every architecture that transformers knows, from the names of their fields.

A field that says how large something is gets a small value that fits the others (heads times width is the hidden size,
experts divide into groups, ...); everything else keeps its default. A few architectures spell their constraints
in ways that names do not tell; what those need is listed by architecture.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 256
HIDDEN = 64
HEADS = 4
LAYERS = 2
WINDOW = 8
POSITIONS = 64
IMAGE = 32
"""Height and width of images."""
IMAGE_TOKEN = 3
"""Stands for a part of an image in a prompt."""


def _all(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


_DEPTHS = (
    "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers"
)
SIZES: dict[str, Any] = {
    **_all(VOCABULARY, "vocab_size unpadded_vocab_size vocab_size_per_layer_input entity_vocab_size"),
    **_all(HIDDEN, "hidden_size d_model n_embd lru_width emb_dim dim backbone_hidden_size embedding_size"),
    **_all(HIDDEN, "word_embed_proj_dim attention_hidden_size embedding_dim base_size"),
    **_all(2 * HIDDEN, "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner ffn_hidden_size"),
    **_all(2 * HIDDEN, "dff shared_intermediate_size d_inner intermediate_size_mlp dense_intermediate_size"),
    **_all(HIDDEN, "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size"),
    **_all(LAYERS, _DEPTHS),
    **_all(HEADS, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"),
    **_all(HEADS, "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads"),
    **_all(HEADS // 2, "num_key_value_heads swa_num_key_value_heads num_kv_heads multi_query_group_num"),
    **_all(HIDDEN // HEADS, "head_dim swa_head_dim d_kv global_head_dim swa_v_head_dim attention_head_dim"),
    **_all(4, "num_experts n_routed_experts num_local_experts moe_num_experts n_experts"),
    **_all(2, "num_experts_per_tok moe_topk num_experts_per_token moe_k"),
    **_all(1, "n_group topk_group first_k_dense_replace num_dense_layers n_shared_experts num_shared_experts"),
    **_all(WINDOW, "sliding_window attention_window_size sliding_window_size"),
    **_all(POSITIONS, "max_position_embeddings n_positions max_seq_len max_sequence_length block_size n_ctx"),
    **_all(POSITIONS, "max_source_positions max_target_positions max_encoder_position_embeddings"),
    **_all(POSITIONS, "max_decoder_position_embeddings"),
    **_all(16, "q_lora_rank kv_lora_rank"),
    **_all(8, "qk_rope_head_dim qk_nope_head_dim"),
    **_all(IMAGE, "image_size"),
    **_all(IMAGE_TOKEN, "image_token_id image_token_index"),
    **_all(16, "patch_size"),
    "v_head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    **_all(8, "mamba_d_state state_size ssm_state_size"),
    "mamba_dt_rank": 8,
    "time_step_rank": 8,
    **_all(8, "mamba_n_heads mamba_num_heads"),
    **_all(16, "mamba_d_head mamba_head_dim mamba_headdim"),
    **_all(16, "linear_key_head_dim linear_value_head_dim"),
    **_all(2, "linear_num_key_heads linear_num_value_heads"),
    **_all(8, "chunk_size mamba_chunk_size attention_chunk_size"),
    **_all(8, "index_head_dim"),
    **_all(4, "index_n_heads index_topk"),
    "rotary_dim": 8,
    "type_vocab_size": 2,
    **_all(0, "num_mtp_layers num_nextn_predict_layers num_kv_shared_layers"),
    **_all(None, "eos_token_id forced_eos_token_id"),
    "bos_token_id": 1,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
"""Values by the name of the field, whatever the architecture."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "falcon": {"num_kv_heads": None},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_groups": 1},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 2,
        "attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HIDDEN // HEADS,
    },
    **dict.fromkeys(("led", "longformer"), {"attention_window": WINDOW}),
    "zamba2": {"num_hidden_layers": 2, "layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 2 * HIDDEN, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "longcat_flash": {"expert_ffn_hidden_size": HIDDEN, "zero_expert_num": 2},
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [HIDDEN // 2, HIDDEN // 2]},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY, "encoder_hash_byte_group_size": [3, 4]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "recurrent_gemma": {"num_hidden_layers": 3, "num_key_value_heads": 2},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "minicpm3"), {"num_key_value_heads": HEADS}),
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "gemma2": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0],
    },
}  # fmt: skip
"""What names do not tell: which layer is of which kind, and heads that have to multiply to something."""


def tiny_config(model_type: str, *, is_decoder: bool, layers: int = LAYERS) -> PretrainedConfig:
    """A small configuration; raises what its class raises where the sizes do not fit together.

    ``layers`` holds for architectures without an entry in ``OVERRIDES``: those say of which kind each layer is.
    """
    return _tiny(CONFIG_MAPPING[model_type], is_decoder=is_decoder, layers=layers)


def _tiny(kind: type[PretrainedConfig], *, is_decoder: bool, layers: int = LAYERS) -> PretrainedConfig:
    known = inspect.signature(kind).parameters
    depths = {} if kind.model_type in OVERRIDES else dict.fromkeys(_DEPTHS.split(), layers)
    given = {**SIZES, **depths}
    sizes = {name: value for name, value in given.items() if name in known and not _is_several(known[name])}
    decoder = {"is_decoder": is_decoder} if "is_decoder" in known else {}
    given = {**sizes, **decoder, **_parts(kind), **OVERRIDES.get(kind.model_type, {})}
    config: PretrainedConfig = kind(**given)
    return config


def _parts(kind: type[PretrainedConfig]) -> dict[str, Any]:
    """Small configurations of what a model is put together from (text, vision, ...), as dictionaries."""
    return {
        name: _tiny(part, is_decoder=False).to_dict()
        for name, declared in kind.sub_configs.items()
        if (part := _default_part(kind, name) if declared is AutoConfig else declared) is not None
    }


def _default_part(kind: type[PretrainedConfig], name: str) -> type[PretrainedConfig] | None:
    """The class of a part that may be any architecture, by the default of the whole."""
    found = getattr(kind(), name, None)
    return type(found) if isinstance(found, PretrainedConfig) else None


def _is_several(parameter: inspect.Parameter) -> bool:
    """Whether a field holds a size for each layer or stage, by its default."""
    return isinstance(parameter.default, list | tuple | dict)
