"""The reference's ops against transformers' own modules, with small random weights.

test_ops and its neighbours hold every backend against float64 arithmetic written by us; this file holds that arithmetic
to what models really compute. Weights are put into the order that conversion would give them.
"""

from __future__ import annotations

import pytest
import torch
from transformers import masking_utils
from transformers.models.deepseek_v2 import configuration_deepseek_v2, modeling_deepseek_v2
from transformers.models.deepseek_v3 import configuration_deepseek_v3, modeling_deepseek_v3
from transformers.models.falcon import configuration_falcon, modeling_falcon
from transformers.models.gemma2 import configuration_gemma2, modeling_gemma2
from transformers.models.gpt_oss import configuration_gpt_oss, modeling_gpt_oss
from transformers.models.granitemoe import configuration_granitemoe, modeling_granitemoe
from transformers.models.llama4 import configuration_llama4, modeling_llama4
from transformers.models.mixtral import configuration_mixtral, modeling_mixtral
from transformers.models.olmo2 import configuration_olmo2, modeling_olmo2
from transformers.models.opt import modeling_opt
from transformers.models.qwen2_moe import configuration_qwen2_moe, modeling_qwen2_moe
from transformers.models.qwen3 import configuration_qwen3, modeling_qwen3

from fgsnap.kernels.ops import (
    ActivationArgs,
    AlibiArgs,
    AttentionArgs,
    Batch,
    ExpertsArgs,
    LatentArgs,
    NormArgs,
    QkNormArgs,
    RouterArgs,
    TemperatureArgs,
)
from tests.kernels.backends import assert_close, exact, exact_one, tensor, values_of, weight, whole

WIDTH, HEADS, KV_HEADS, HEAD_DIM, ROWS, THETA = 32, 4, 2, 8, 21, 100.0
EPSILON = 1e-6
SIZES = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "attn_implementation": "eager",
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
}


@pytest.fixture
def ops():
    return exact_one("reference")


def randomized(module):
    """The module with weights of a size that keeps what passes it, and norms around one."""
    drawn = torch.Generator().manual_seed(3)
    for name, values in [*module.named_parameters(), *module.named_buffers()]:
        spread = max(values.shape[-1], values.shape[-2]) ** -0.5 if values.dim() > 1 else 0.5
        values.data = torch.randn(values.shape, generator=drawn) * spread + (1.0 if "norm" in name else 0.0)
    return module.float().eval()


def given(ops, *parts):
    """Parameters as one weight, side by side along the first axis."""
    return weight(ops, torch.cat([part.detach() for part in parts]))


def rms(ops, norm):
    return NormArgs("rms", norm.variance_epsilon, given(ops, norm.weight), None)


@torch.no_grad()
def theirs(module, *arguments, **named):
    found = module(*arguments, **named)
    return (found[0] if isinstance(found, tuple) else found).double()


def frequencies(dims=HEAD_DIM):
    return [THETA ** (-2 * i / dims) for i in range(dims // 2)]


def rotation(rows, dims=HEAD_DIM):
    """cos and sin as transformers hands them to attention."""
    angles = torch.arange(rows)[:, None] * torch.tensor(frequencies(dims))
    angles = torch.cat((angles, angles), -1)[None]
    return angles.cos(), angles.sin()


def hidden(rows):
    return exact(rows, WIDTH, seed=9)


def additive(allowed, rows):
    """What attention adds to scores, of one of transformers' mask functions."""
    q, k = torch.arange(rows)[:, None], torch.arange(rows)
    return torch.zeros(1, 1, rows, rows).masked_fill_(~allowed(0, 0, q, k), -torch.inf)


def causal(rows):
    return additive(masking_utils.causal_mask_function, rows)


def halves(values, heads, dims=HEAD_DIM):
    """Rows of pairs in the order of halves, head by head."""
    split = values.detach().view(heads, dims // 2, 2, -1)
    return split.transpose(1, 2).reshape(heads * dims, -1)


def attended(ops, rows, qkv, bias, args, rope=None, heads_norm=None):
    """What our ops make of ``hidden`` between the two projections."""
    plan = ops.plan(whole(rows), rows)
    found = ops.linear(tensor(ops, hidden(rows)), qkv, bias)
    if heads_norm is not None:
        found = ops.norm_heads(found, args, *heads_norm, args.heads)
    cache = ops.kv_cache(1, rows, args.kv_heads, args.head_dim)
    q = ops.append(found, cache, plan, args, rope)
    return ops.attend(q, cache, plan, args)


def projected(ops, attention, x, rows):
    bias = None if attention.o_proj.bias is None else given(ops, attention.o_proj.bias)
    return values_of(ops, ops.linear(x, given(ops, attention.o_proj.weight), bias), rows, WIDTH)


def qkv_of(ops, attention):
    return given(ops, attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)


ARGS = AttentionArgs(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5)


# attention


def test_norms_of_heads_as_in_qwen3(ops):
    config = configuration_qwen3.Qwen3Config(**SIZES, num_hidden_layers=1)
    attention = randomized(modeling_qwen3.Qwen3Attention(config, 0))
    args = ARGS._replace(qk_norm=QkNormArgs(rms(ops, attention.q_norm), rms(ops, attention.k_norm)))
    found = attended(ops, ROWS, qkv_of(ops, attention), None, args, ops.rope(frequencies(), 1.0))
    expected = theirs(attention, hidden(ROWS)[None].float(), rotation(ROWS), causal(ROWS))[0]
    assert_close(projected(ops, attention, found, ROWS), expected, EPSILON, 8)


def test_norms_of_whole_projections_as_in_olmo2(ops):
    config = configuration_olmo2.Olmo2Config(**SIZES, num_hidden_layers=1)
    attention = randomized(modeling_olmo2.Olmo2Attention(config, 0))
    norms, rope = (rms(ops, attention.q_norm), rms(ops, attention.k_norm)), ops.rope(frequencies(), 1.0)
    found = attended(ops, ROWS, qkv_of(ops, attention), None, ARGS, rope, heads_norm=norms)
    expected = theirs(attention, hidden(ROWS)[None].float(), rotation(ROWS), causal(ROWS))[0]
    assert_close(projected(ops, attention, found, ROWS), expected, EPSILON, 8)


def test_softcap_and_window_as_in_gemma2(ops):
    config = configuration_gemma2.Gemma2Config(
        **SIZES, num_hidden_layers=1, attn_logit_softcapping=0.8, query_pre_attn_scalar=5, sliding_window=6
    )
    attention = randomized(modeling_gemma2.Gemma2Attention(config, 0))
    args = ARGS._replace(scale=5**-0.5, softcap=0.8, window=6)
    found = attended(ops, ROWS, qkv_of(ops, attention), None, args, ops.rope(frequencies(), 1.0))
    mask = additive(masking_utils.sliding_window_causal_mask_function(6), ROWS)
    expected = theirs(attention, hidden(ROWS)[None].float(), rotation(ROWS), mask)[0]
    assert_close(projected(ops, attention, found, ROWS), expected, EPSILON, 8)


def test_sinks_as_in_gpt_oss(ops):
    config = configuration_gpt_oss.GptOssConfig(**SIZES, num_hidden_layers=1, attention_bias=True)
    attention = randomized(modeling_gpt_oss.GptOssAttention(config, 0))
    bias = given(ops, attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias)
    args = ARGS._replace(sinks=given(ops, attention.sinks), window=5)
    found = attended(ops, ROWS, qkv_of(ops, attention), bias, args, ops.rope(frequencies(), 1.0))
    cos, sin = (part[..., : HEAD_DIM // 2] for part in rotation(ROWS))
    mask = additive(masking_utils.sliding_window_causal_mask_function(5), ROWS)
    expected = theirs(attention, hidden(ROWS)[None].float(), (cos, sin), mask)[0]
    assert_close(projected(ops, attention, found, ROWS), expected, EPSILON, 8)


@pytest.mark.parametrize("heads", [4, 12])
def test_alibi_as_in_falcon(ops, heads):
    """Some slopes of twelve heads are no powers of two; 300 positions are more than bfloat16 counts."""
    rows, dim = 300, 8
    config = configuration_falcon.FalconConfig(
        hidden_size=heads * dim, num_attention_heads=heads, alibi=True, multi_query=False, parallel_attn=False,
        attn_implementation="eager",
    )  # fmt: skip
    attention = randomized(modeling_falcon.FalconAttention(config, 0))
    x, present = exact(rows, heads * dim, seed=9), torch.ones(1, rows, dtype=torch.int64)
    bias = modeling_falcon.build_alibi_tensor(present, heads, torch.float32)
    expected = theirs(attention, x[None].float(), bias, causal(rows))[0]

    fused = attention.query_key_value.weight.detach().view(heads, 3, dim, -1).transpose(0, 1).flatten(0, 2)
    # At position one the bias is the slope itself, as the author rounded it.
    slopes = bias.view(heads, rows)[:, 1].contiguous()
    args = AttentionArgs(heads, heads, dim, dim**-0.5, alibi=AlibiArgs(weight(ops, slopes), dim**-0.5, True))
    plan, cache = ops.plan(whole(rows), rows), ops.kv_cache(1, rows, heads, dim)
    q = ops.append(ops.linear(tensor(ops, x), weight(ops, fused)), cache, plan, args, None)
    found = ops.linear(ops.attend(q, cache, plan, args), given(ops, attention.dense.weight))
    assert_close(values_of(ops, found, rows, heads * dim), expected, EPSILON, 16)


def llama4(**changes):
    config = configuration_llama4.Llama4TextConfig(
        **SIZES,
        num_hidden_layers=4,
        intermediate_size=12,
        intermediate_size_mlp=12,
        num_local_experts=5,
        num_experts_per_tok=1,
        **changes,
    )
    return config, lambda index: randomized(modeling_llama4.Llama4TextAttention(config, index))


def test_norms_after_pairwise_rotation_and_chunks_as_in_llama4(ops):
    config, layer = llama4(use_qk_norm=True, no_rope_layers=[1, 1, 1, 0])
    attention = layer(0)
    l2 = NormArgs("l2", config.rms_norm_eps, None, None)
    args = ARGS._replace(qk_norm=QkNormArgs(l2, l2, after_rope=True), chunk=8)
    q, k = halves(attention.q_proj.weight, HEADS), halves(attention.k_proj.weight, KV_HEADS)
    qkv = given(ops, q, k, attention.v_proj.weight)
    found = attended(ops, ROWS, qkv, None, args, ops.rope(frequencies(), 1.0))
    angles = torch.arange(ROWS)[:, None] * torch.tensor(frequencies())
    turns = torch.polar(torch.ones_like(angles), angles)[None]
    mask = additive(masking_utils.chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.int64)), ROWS)
    expected = theirs(attention, hidden(ROWS)[None].float(), turns, mask)[0]
    assert_close(projected(ops, attention, found, ROWS), expected, EPSILON, 8)


def test_query_temperature_as_in_llama4(ops):
    _, layer = llama4(attn_temperature_tuning=True, floor_scale=4, attn_scale=0.3, no_rope_layers=[1, 1, 1, 0])
    attention = layer(3)
    args = ARGS._replace(temperature=TemperatureArgs("step", 4, 0.3))
    found = attended(ops, ROWS, qkv_of(ops, attention), None, args)
    expected = theirs(attention, hidden(ROWS)[None].float(), None, causal(ROWS))[0]
    assert_close(projected(ops, attention, found, ROWS), expected, EPSILON, 8)


@pytest.mark.parametrize("query_rank", [None, 12])
def test_latent_attention_as_in_deepseek_v3(ops, query_rank):
    nope, rope, value, rank = 8, 4, 6, 16
    config = configuration_deepseek_v3.DeepseekV3Config(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=HEADS, q_lora_rank=query_rank,
        qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=value, kv_lora_rank=rank,
        rope_parameters=SIZES["rope_parameters"], attn_implementation="eager",
    )  # fmt: skip
    attention = randomized(modeling_deepseek_v3.DeepseekV3Attention(config, 0))
    expected = theirs(attention, hidden(ROWS)[None].float(), rotation(ROWS, rope), causal(ROWS))[0]

    def reordered(parameter, heads, before):
        """Each head's last ``rope`` rows of pairs in the order of halves."""
        each = parameter.detach().view(heads, before + rope, -1)
        turned = halves(each[:, before:].reshape(heads * rope, -1), heads, rope).view(heads, rope, -1)
        return torch.cat((each[:, :before], turned), 1).flatten(0, 1)

    x = tensor(ops, hidden(ROWS))
    if query_rank is None:
        q = ops.linear(x, weight(ops, reordered(attention.q_proj.weight, HEADS, nope)))
    else:
        low = ops.norm(ops.linear(x, given(ops, attention.q_a_proj.weight)), rms(ops, attention.q_a_layernorm))
        q = ops.linear(low, weight(ops, reordered(attention.q_b_proj.weight, HEADS, nope)))
    latent = ops.linear(x, weight(ops, reordered(attention.kv_a_proj_with_mqa.weight, 1, rank)))
    up = attention.kv_b_proj.weight.detach().view(HEADS, nope + value, rank)
    norm = rms(ops, attention.kv_a_layernorm)
    args = LatentArgs(
        HEADS, nope, rope, value, rank, (nope + rope) ** -0.5, norm,
        weight(ops, up[:, :nope].transpose(1, 2).contiguous()), weight(ops, up[:, nope:].contiguous()),
    )  # fmt: skip
    plan, cache = ops.plan(whole(ROWS), ROWS), ops.latent_cache(1, ROWS, args)
    q = ops.latent_append(q, latent, cache, plan, args, ops.rope(frequencies(rope), 1.0))
    found = projected(ops, attention, ops.latent_attend(q, cache, plan, args), ROWS)
    assert_close(found, expected, EPSILON, 8)


# embeddings


def test_learned_positions_as_in_opt(ops):
    learned = randomized(modeling_opt.OPTLearnedPositionalEmbedding(30, WIDTH))
    table, tokens = exact(11, WIDTH), [3, 4, 10]
    at = torch.tensor([[17, 18, 19]])
    expected = table[tokens] + theirs(learned, torch.ones(1, 20, dtype=torch.int64), 17, at)[0]
    plan = ops.plan(Batch(tokens, (17, 18, 19), (0, 3), (20,), ((0, 1, 2),), ()), 8)
    found = ops.add(ops.embed(plan, weight(ops, table), 1.0), ops.positions(plan, given(ops, learned.weight), 2))
    assert_close(values_of(ops, found, 3, WIDTH), expected, EPSILON)


# experts


def gated(ops, experts, activation="silu", **changes):
    """Experts whose parameters lie as ours do."""
    numbers = given(ops, experts.gate_up_proj), None, given(ops, experts.down_proj), None
    return ExpertsArgs(*numbers, ActivationArgs(activation), **changes)


def routed(ops, router, args):
    return values_of(ops, ops.experts(tensor(ops, hidden(ROWS)), router, args), ROWS, WIDTH)


def test_experts_as_in_mixtral(ops):
    config = configuration_mixtral.MixtralConfig(
        hidden_size=WIDTH, intermediate_size=12, num_local_experts=6, num_experts_per_tok=2
    )
    block = randomized(modeling_mixtral.MixtralSparseMoeBlock(config))
    router = RouterArgs(given(ops, block.gate.weight), None, None, "softmax", 2, renormalize=True)
    found = routed(ops, router, gated(ops, block.experts))
    assert_close(found, theirs(block, hidden(ROWS)[None].float())[0], EPSILON, 8)


@pytest.mark.parametrize("renormalize", [False, True])
def test_experts_and_a_gated_shared_one_as_in_qwen2_moe(ops, renormalize):
    config = configuration_qwen2_moe.Qwen2MoeConfig(
        hidden_size=WIDTH, moe_intermediate_size=12, shared_expert_intermediate_size=14, num_experts=6,
        num_experts_per_tok=3, norm_topk_prob=renormalize,
    )  # fmt: skip
    block = randomized(modeling_qwen2_moe.Qwen2MoeSparseMoeBlock(config))
    router = RouterArgs(given(ops, block.gate.weight), None, None, "softmax", 3, renormalize=renormalize)
    x, shared = tensor(ops, hidden(ROWS)), block.shared_expert
    inner = ops.linear(x, given(ops, shared.gate_proj.weight, shared.up_proj.weight))
    passed = ops.linear(ops.activate(inner, ActivationArgs("silu")), given(ops, shared.down_proj.weight))
    passed = ops.gate(passed, x, given(ops, block.shared_expert_gate.weight))
    found = values_of(ops, ops.add(ops.experts(x, router, gated(ops, block.experts)), passed), ROWS, WIDTH)
    assert_close(found, theirs(block, hidden(ROWS)[None].float())[0], EPSILON, 8)


def test_experts_as_in_granite_moe(ops):
    config = configuration_granitemoe.GraniteMoeConfig(
        hidden_size=WIDTH, intermediate_size=12, num_local_experts=6, num_experts_per_tok=3
    )
    block = randomized(modeling_granitemoe.GraniteMoeMoE(config))
    router = RouterArgs(given(ops, block.router.weight), None, None, "softmax", 3, select_first=True)
    found = routed(ops, router, gated(ops, block.experts))
    assert_close(found, theirs(block, hidden(ROWS)[None].float())[0], EPSILON, 8)


def test_experts_as_in_gpt_oss(ops):
    """Biases everywhere, gate and up interleaved, and a clamp that bites."""
    config = configuration_gpt_oss.GptOssConfig(
        hidden_size=WIDTH, intermediate_size=12, num_local_experts=6, num_experts_per_tok=3, swiglu_limit=0.9
    )
    block = randomized(modeling_gpt_oss.GptOssMLP(config))
    apart = torch.cat((torch.arange(0, 24, 2), torch.arange(1, 24, 2)))
    args = ExpertsArgs(
        weight(ops, block.experts.gate_up_proj.detach().transpose(1, 2)[:, apart].contiguous()),
        weight(ops, block.experts.gate_up_proj_bias.detach()[:, apart].contiguous()),
        weight(ops, block.experts.down_proj.detach().transpose(1, 2).contiguous()),
        given(ops, block.experts.down_proj_bias),
        ActivationArgs("clamped_swiglu", True, 0.9),
    )
    router = RouterArgs(
        given(ops, block.router.weight), given(ops, block.router.bias), None, "softmax", 3, select_first=True
    )
    assert_close(routed(ops, router, args), theirs(block, hidden(ROWS)[None].float())[0], EPSILON, 8)


def test_experts_that_weigh_their_input_as_in_llama4(ops):
    config, _ = llama4()
    block = randomized(modeling_llama4.Llama4TextMoe(config))
    everything = theirs(block, hidden(ROWS)[None].float())
    expected = everything - theirs(block.shared_expert, hidden(ROWS).float())
    numbers = (part.detach().transpose(1, 2).contiguous() for part in block.experts.parameters())
    gate_up, down = (weight(ops, part) for part in numbers)
    args = ExpertsArgs(gate_up, None, down, None, ActivationArgs("silu"), weigh_input=True)
    router = RouterArgs(given(ops, block.router.weight), None, None, "sigmoid", 1, select_first=True)
    assert_close(routed(ops, router, args), expected, EPSILON, 8)


@pytest.mark.parametrize("grouped", [False, True])
def test_experts_as_in_deepseek_v2(ops, grouped):
    config = configuration_deepseek_v2.DeepseekV2Config(
        hidden_size=WIDTH, moe_intermediate_size=12, n_routed_experts=12, num_experts_per_tok=4, n_shared_experts=1,
        routed_scaling_factor=16.0, n_group=4, topk_group=2,
        topk_method="group_limited_greedy" if grouped else "greedy",
    )  # fmt: skip
    block = randomized(modeling_deepseek_v2.DeepseekV2Moe(config))
    groups = {"groups": 4, "kept_groups": 2} if grouped else {}
    router = RouterArgs(given(ops, block.gate.weight), None, None, "softmax", 4, scale=16.0, **groups)
    x = hidden(ROWS)[None].float()
    expected = theirs(block, x)[0] - theirs(block.shared_experts, x)[0]
    assert_close(routed(ops, router, gated(ops, block.experts)), expected, EPSILON, 8)


@pytest.mark.parametrize("renormalize", [False, True])
def test_experts_as_in_deepseek_v3(ops, renormalize):
    config = configuration_deepseek_v3.DeepseekV3Config(
        hidden_size=WIDTH, moe_intermediate_size=12, n_routed_experts=16, num_experts_per_tok=4, n_shared_experts=1,
        routed_scaling_factor=2.5, n_group=4, topk_group=2, norm_topk_prob=renormalize,
    )  # fmt: skip
    block = randomized(modeling_deepseek_v3.DeepseekV3MoE(config))
    selection = given(ops, block.gate.e_score_correction_bias)
    router = RouterArgs(
        given(ops, block.gate.weight), None, selection, "sigmoid", 4, groups=4, kept_groups=2, group_rank="top2_sum",
        renormalize=renormalize, scale=2.5,
    )  # fmt: skip
    x = hidden(ROWS)[None].float()
    expected = theirs(block, x)[0] - theirs(block.shared_experts, x)[0]
    assert_close(routed(ops, router, gated(ops, block.experts)), expected, EPSILON, 8)
    assert block.gate.e_score_correction_bias.abs().max() > 0.1, "the bias takes part"
