"""Tiny checkpoints of every family, one for each way in which its members differ; the parity tests and the parity table
stand on them. ``...`` stands for a setting that a model type does not have."""

from __future__ import annotations

from typing import Any, NamedTuple

VOCABULARY = 97


class Case(NamedTuple):
    """A tiny checkpoint: its model type, changes to its config, and the deployment's context."""

    family: str
    config: dict[str, Any]
    max_length: int = 128


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **parameters}}


OWN = {"intermediate_size": ..., "num_key_value_heads": ...}  # of families with names of their own
OPT = {**OWN, "ffn_dim": 80}
GROUPS = {**OWN, "num_kv_heads": 2, "new_decoder_architecture": True}
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
SHARED = {**EXPERTS, "num_experts": 6, "shared_expert_intermediate_size": 44}
ROUTED = {
    "n_group": 2,
    "topk_group": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    **EXPERTS,
}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12, "num_key_value_heads": 8}
GEMMA = {"head_dim": 12, "sliding_window": 11, "query_pre_attn_scalar": 20}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.3,
    "attention_multiplier": 0.2,
}
LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = _rope("yarn", factor=8.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=0.9)
# Of an original length of 1, so that transformers too uses the long factors throughout.
LONGROPE = {
    **_rope("longrope", attention_factor=1.3, short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.5, 2.0, 3.0, 4.0]),
    "original_max_position_embeddings": 1,
}
PARTIAL_LONGROPE = {
    **_rope(
        "longrope",
        attention_factor=1.3,
        short_factor=[1.0, 1.1, 1.2],
        long_factor=[1.5, 2.0, 3.0],
        partial_rotary_factor=0.75,
    ),
    "original_max_position_embeddings": 1,
}

_CASES = {
    "falcon 7B": Case("falcon", {**OWN, "multi_query": True, "num_attention_heads": 15, "hidden_size": 60}),
    "falcon 40B": Case("falcon", GROUPS),
    "falcon2 11B": Case("falcon", {**GROUPS, "num_ln_in_parallel_attn": 1}),
    "falcon RW": Case("falcon", {**OWN, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}),
    "falcon, sequential": Case("falcon", {**OWN, "multi_query": False, "parallel_attn": False}),
    "mixtral": Case("mixtral", {"num_local_experts": 4}),
    "phi": Case("phi", _rope("default", partial_rotary_factor=0.5)),
    "phi, norms": Case("phi", {"qk_layernorm": True, "partial_rotary_factor": 0.5}),
    "phi3": Case("phi3", {"sliding_window": 11}),
    "phi3, longrope": Case("phi3", LONGROPE),
    "phi3, partial longrope": Case("phi3", {**PARTIAL_LONGROPE, "tie_word_embeddings": True}),
    "llama": Case("llama", LLAMA3),
    "llama, biases, tied": Case(
        "llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 12}
    ),
    "mistral": Case("mistral", {"sliding_window": 11, "head_dim": 12}),
    "opt": Case("opt", OPT),
    "opt 350m": Case("opt", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "opt, no affine": Case(
        "opt",
        {**OPT, "enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    ),
    "qwen": Case("qwen", {}),
    "qwen, stretched": Case("qwen", {"seq_length": 32}),
    "qwen2": Case("qwen2", {}),
    "qwen2, windows": Case("qwen2", {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}),
    "qwen2_moe": Case("qwen2_moe", SHARED),
    "qwen2_moe, dense layers": Case("qwen2_moe", {**SHARED, "mlp_only_layers": [1], "norm_topk_prob": True}),
    "qwen2_moe, windows": Case("qwen2_moe", {**SHARED, "use_sliding_window": True, "sliding_window": 11}),
    "qwen3": Case("qwen3", {"head_dim": 12}),
    "qwen3_moe": Case("qwen3_moe", {**EXPERTS, "num_experts": 6, "norm_topk_prob": True, "head_dim": 12}),
    "qwen3_moe, windows": Case(
        "qwen3_moe", {**EXPERTS, "num_experts": 6, "use_sliding_window": True, "sliding_window": 11}
    ),
    "gemma2": Case("gemma2", GEMMA),
    "gemma3": Case("gemma3_text", {**GEMMA, "num_hidden_layers": 6}),
    "gemma3, stretched": Case(
        "gemma3_text", {**GEMMA, "num_hidden_layers": 6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    ),
    "gpt_oss": Case(
        "gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 11, "head_dim": 12}
    ),
    "smollm3": Case("smollm3", {"num_hidden_layers": 4}),
    "smollm3, windows": Case("smollm3", {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 11}),
    "stablelm": Case("stablelm", {"partial_rotary_factor": 0.5, "use_qkv_bias": True}),
    "stablelm, parallel": Case("stablelm", {"partial_rotary_factor": 0.5, "use_parallel_residual": True}),
    "starcoder2": Case("starcoder2", {"sliding_window": 11}),
    "deepseek_v2": Case(
        "deepseek_v2", {**ROUTED, **LATENT, "topk_method": "group_limited_greedy", "q_lora_rank": None}
    ),
    "deepseek_v2, greedy": Case("deepseek_v2", {**ROUTED, **LATENT, "topk_method": "greedy", "q_lora_rank": 20}),
    "deepseek_v3": Case("deepseek_v3", {**ROUTED, **LATENT, "q_lora_rank": 20}),
    "deepseek_v2, yarn": Case("deepseek_v2", {**ROUTED, **LATENT, **YARN, "topk_method": "greedy", "q_lora_rank": 20}),
    "deepseek_v3, yarn": Case("deepseek_v3", {**ROUTED, **LATENT, **YARN, "q_lora_rank": 20}),
    "deepseek_v3, plain queries": Case("deepseek_v3", {**ROUTED, **LATENT, "q_lora_rank": None}),
    "glm": Case("glm", {"head_dim": 8, "attention_bias": True}),
    "glm4": Case("glm4", {"head_dim": 8, "attention_bias": True}),
    "glm4_moe": Case("glm4_moe", {**ROUTED, "head_dim": 8, "use_qk_norm": True, "attention_bias": True}),
    "granite": Case("granite", MULTIPLIERS),
    "granitemoe": Case("granitemoe", {**MULTIPLIERS, "num_local_experts": 4}),
    "olmo2": Case("olmo2", {}),
    "olmo3": Case("olmo3", {"sliding_window": 11, "num_hidden_layers": 4}),
    "olmo3, stretched": Case(
        "olmo3",
        {
            "sliding_window": 11,
            "num_hidden_layers": 4,
            "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
        },
    ),
    "exaone4": Case("exaone4", {"sliding_window": 11, "num_hidden_layers": 4}),
    "exaone4, no window": Case("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "exaone4, llama3": Case("exaone4", {"sliding_window": 11, "num_hidden_layers": 4, **LLAMA3}),
    "llama4": Case(
        "llama4_text",
        {
            "intermediate_size_mlp": 40,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "num_hidden_layers": 4,
            "attention_chunk_size": 11,
            "floor_scale": 8,
            "head_dim": 8,
        },
    ),
    "gpt2": Case("gpt2", OWN),
    "gpt2, by layer": Case("gpt2", {**OWN, "scale_attn_by_inverse_layer_idx": True}),
    "gptj": Case("gptj", {**OWN, "rotary_dim": 4}),
    "gptj, tied": Case("gptj", {**OWN, "rotary_dim": 8, "n_inner": 80, "tie_word_embeddings": True}),
    "gpt_neox": Case("gpt_neox", {"num_key_value_heads": ...}),
    "gpt_neox, sequential": Case(
        "gpt_neox", {"num_key_value_heads": ..., "use_parallel_residual": False, "attention_bias": False}
    ),
}
# Of eight heads, so that eight ranks divide every family.
CASES = {
    name: case._replace(config={"hidden_size": 64, "num_attention_heads": 8, **case.config})
    for name, case in _CASES.items()
}
