"""Every family: a checkpoint that transformers wrote, converted and run by every backend, says what it says there."""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest

from benchmarks.compare import ABSENT, Fgsnap, Transformers, random_sequences, relative_error, tiny_checkpoint
from fgsnap.convert.pipeline import convert
from fgsnap.kernels import native
from fgsnap.runtime.decoder import load_decoder
from fgsnap.snapshot import open_snapshot

BACKENDS = ["reference", *(["native"] if native.available()[0] else [])]
LENGTHS = (50, 1, 23)
# No length above is a multiple of the block size or of the chunk.
BLOCK_SIZE, CHUNK = 7, 9


class Case(NamedTuple):
    """A tiny checkpoint: its model type, changes to its config, and the deployment's context."""

    family: str
    config: dict
    max_length: int = 128


FALCON = {"num_kv_heads": 2}
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
GROUPED = {
    "n_group": 2, "topk_group": 1, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7, **EXPERTS,
}  # fmt: skip
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12, "num_key_value_heads": 6}
OWN = {"intermediate_size": ABSENT, "num_key_value_heads": ABSENT}  # of families with names of their own
CASES = {
    "falcon 7B": Case("falcon", {**OWN, "multi_query": True, "num_attention_heads": 5, "hidden_size": 40}),
    "falcon 40B": Case("falcon", {**OWN, **FALCON, "new_decoder_architecture": True}),
    "falcon2 11B": Case("falcon", {**OWN, **FALCON, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
    "falcon RW": Case("falcon", {**OWN, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}),
    "mixtral": Case("mixtral", {"num_local_experts": 4}),
    "phi": Case(
        "phi", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}
    ),
    "phi, norms": Case("phi", {"qk_layernorm": True, "partial_rotary_factor": 0.5}),
    "phi3": Case("phi3", {"sliding_window": 11}),
    "opt": Case(
        "opt",
        {
            **OWN,
        },
    ),
    "opt 350m": Case("opt", {**OWN, "do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "galactica": Case(
        "opt", {**OWN, "enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"}
    ),
    "qwen2": Case("qwen2", {}),
    "qwen2, windows": Case("qwen2", {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}),
    "qwen2_moe": Case("qwen2_moe", {**EXPERTS, "num_experts": 6, "shared_expert_intermediate_size": 20}),
    "qwen2_moe, dense layers": Case(
        "qwen2_moe",
        {
            **EXPERTS,
            "num_experts": 6,
            "shared_expert_intermediate_size": 20,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    "qwen3": Case("qwen3", {"head_dim": 12}),
    "qwen3_moe": Case("qwen3_moe", {**EXPERTS, "num_experts": 6, "norm_topk_prob": True, "head_dim": 12}),
    "gemma2": Case("gemma2", {"head_dim": 12, "sliding_window": 11, "query_pre_attn_scalar": 20}),
    "gemma3": Case(
        "gemma3_text", {"head_dim": 12, "sliding_window": 11, "query_pre_attn_scalar": 20, "num_hidden_layers": 6}
    ),
    "gpt_oss": Case(
        "gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 11, "head_dim": 12}
    ),
    "smollm3": Case("smollm3", {"num_hidden_layers": 4}),
    "deepseek_v2": Case(
        "deepseek_v2", {**GROUPED, **LATENT, "topk_method": "group_limited_greedy", "q_lora_rank": None}
    ),
    "deepseek_v2, greedy": Case("deepseek_v2", {**GROUPED, **LATENT, "topk_method": "greedy", "q_lora_rank": 20}),
    "deepseek_v3": Case("deepseek_v3", {**GROUPED, **LATENT, "q_lora_rank": 20}),
    "glm": Case("glm", {"head_dim": 8, "attention_bias": True}),
    "glm4": Case("glm4", {"head_dim": 8, "attention_bias": True}),
    "glm4_moe": Case("glm4_moe", {**GROUPED, "head_dim": 8, "use_qk_norm": True, "attention_bias": True}),
    "granite": Case(
        "granite",
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2},
    ),
    "granitemoe": Case(
        "granitemoe",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
            "num_local_experts": 4,
        },
    ),
    "olmo2": Case("olmo2", {}),
    "olmo3": Case("olmo3", {"sliding_window": 11, "num_hidden_layers": 4}),
    "exaone4": Case("exaone4", {"sliding_window": 11, "num_hidden_layers": 4}),
    "exaone4, no window": Case("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
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
    "gpt2": Case(
        "gpt2",
        {
            **OWN,
        },
    ),
    "gpt2, by layer": Case("gpt2", {**OWN, "scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": Case(
        "gpt_neox",
        {
            "num_key_value_heads": ABSENT,
        },
    ),
    "gpt_neox, sequential": Case(
        "gpt_neox", {"num_key_value_heads": ABSENT, "use_parallel_residual": False, "attention_bias": False}
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    @functools.cache
    def make(name, dtype="float32", tp=1):
        case = CASES[name]
        folder = tmp_path_factory.mktemp("families")
        tiny_checkpoint(folder / "checkpoint", case.family, dtype, **case.config)
        convert(str(folder / "checkpoint"), folder / "snapshot", tp=tp, canary=False)
        return folder / "checkpoint", folder / "snapshot"

    return make


def decoder(path, backend, dtype, max_length):
    return load_decoder(
        open_snapshot(path), backend=backend, device="cpu", dtype=dtype, blocks=60, block_size=BLOCK_SIZE,
        max_length=max_length, threads=1,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_float32_logits_and_greedy_tokens(made, name, backend):
    checkpoint, snapshot = made(name)
    sequences = random_sequences(LENGTHS, 97)
    theirs = Transformers(checkpoint, "float32")
    ours = Fgsnap(decoder(snapshot, backend, "float32", CASES[name].max_length))
    error = relative_error(ours.logits(sequences, CHUNK), theirs.logits(sequences))
    assert error <= 1e-4, error
    assert error <= 2e-5, f"{error}: within the promise, but far from what float32 can do"
    prompt = sequences[2]
    assert ours.greedy(prompt, 64) == theirs.greedy(prompt, 64)
