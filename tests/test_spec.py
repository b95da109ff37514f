"""The neutral spec: what is stored of it, what is refused, what it needs of a backend, and its rotary frequencies."""

from __future__ import annotations

import re

import msgspec
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fgsnap import spec as specs
from fgsnap.spec import (
    Attention,
    DecoderSpec,
    DynamicNtk,
    Embedding,
    Experts,
    Head,
    Latent,
    Layer,
    Linear,
    Llama3,
    LongRope,
    Mlp,
    Norm,
    QkNorm,
    QueryTemperature,
    Rope,
    Router,
    SharedExpert,
    Yarn,
    features,
    rope_frequencies,
)
from tests.snapshots import tiny_spec

RMS = Norm(kind="rms", eps=1e-6, unit_offset=True)


def rich_spec() -> DecoderSpec:
    """A decoder that uses many optional fields at once, as no single family does."""
    local = Attention(
        heads=8,
        kv_heads=2,
        head_dim=16,
        scale=0.25,
        rope=0,
        window=64,
        softcap=50.0,
        sinks=True,
        qk_norm=QkNorm(norm=Norm(kind="l2", eps=1e-6, weight=False), after_rope=True),
        query_temperature=QueryTemperature(kind="step", base=8192, scale=0.1),
    )
    latent = Attention(
        heads=8, kv_heads=8, head_dim=24, value_dim=16, scale=0.2, latent=Latent(kv_rank=32, rope_dim=8, norm=RMS)
    )
    inner = Mlp(inner=64, activation="clamped_swiglu", clamp=7.0)
    experts = Experts(
        count=8,
        mlp=inner,
        router=Router(score="sigmoid", top_k=2, groups=4, kept_groups=2, group_rank="top2_sum", renormalize=True),
        shared=SharedExpert(mlp=inner, gated_by_input=True),
    )
    return DecoderSpec(
        vocab_size=100,
        width=128,
        max_length=4096,
        embedding=Embedding(width=128, scale=11.3125, round_scale=True),
        layer_kinds=(
            Layer(attention=local, mlp=inner, attn_in=RMS, attn_out=RMS, mlp_in=RMS, mlp_out=RMS),
            Layer(attention=latent, experts=experts, residual="parallel", attn_in=RMS, residual_multiplier=0.22),
        ),
        layers=(0, 1, 0, 0, 1),
        head=Head(tied=True, multiplier=0.5, softcap=30.0),
        final_norm=RMS,
        ropes=(Rope(theta=1e6, dims=16, linear=Linear(factor=8.0)),),
    )


@pytest.mark.parametrize("spec", [tiny_spec(), rich_spec()], ids=["llama", "rich"])
def test_round_trip(spec: DecoderSpec) -> None:
    assert msgspec.json.decode(msgspec.json.encode(spec), type=DecoderSpec) == spec


def test_a_field_at_its_default_is_not_stored() -> None:
    stored = msgspec.to_builtins(tiny_spec())
    assert stored["head"] == {}
    assert set(stored["layer_kinds"][0]["attention"]) == {"heads", "kv_heads", "head_dim", "scale", "rope"}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ((), "unknown field `surprise`"),
        (("layer_kinds", 0, "attention"), "unknown field `surprise` - at `$.layer_kinds[0].attention`"),
        (("ropes", 0), "unknown field `surprise` - at `$.ropes[0]`"),
        (("final_norm",), "unknown field `surprise` - at `$.final_norm`"),
    ],
)
def test_an_unknown_field_is_refused_with_its_place(place: tuple, message: str) -> None:
    raw = msgspec.json.decode(msgspec.json.encode(tiny_spec()))
    part = raw
    for key in place:
        part = part[key]
    part["surprise"] = 1
    with pytest.raises(msgspec.ValidationError, match=re.escape(message)):
        msgspec.convert(raw, DecoderSpec)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("vocab_size",), "61"),
        (("head",), {"tied": 1}),
        (("layers",), [0.5]),
        (("layer_kinds", 0, "residual"), "twice"),
    ],
)
def test_a_wrong_type_is_refused(place: tuple, value: object) -> None:
    raw = msgspec.json.decode(msgspec.json.encode(tiny_spec()))
    part = raw
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(raw, DecoderSpec)


def test_values_are_frozen() -> None:
    with pytest.raises(AttributeError):
        tiny_spec().width = 3  # type: ignore[misc]


def test_layers_and_cache_arithmetic() -> None:
    spec = rich_spec()
    assert spec.depth == 5
    assert spec.layer(1) is spec.layer_kinds[1]
    assert spec.kv_values_per_token() == 3 * 2 * 2 * 16 + 2 * (32 + 8)
    assert tiny_spec().kv_values_per_token() == 2 * 2 * 2 * 8
    attention = spec.layer_kinds[0].attention
    assert (attention.query_width, attention.kv_width) == (128, 32)


def test_features_of_a_plain_llama() -> None:
    assert features(tiny_spec(qkv_bias=True, window=7, tied=True)) == {
        "attention.rope",
        "attention.window",
        "attention.qkv_bias",
        "attention.out_bias",
        "layer.attn_in",
        "layer.mlp_in",
        "layer.sequential",
        "mlp.silu",
        "norm.rms",
        "head.tied",
    }


def test_features_name_every_optional_part() -> None:
    found = features(rich_spec())
    assert {
        "attention.sinks",
        "attention.softcap",
        "attention.value_dim",
        "attention.qk_norm",
        "qk_norm.after_rope",
        "attention.query_temperature",
        "query_temperature.step",
        "attention.latent",
        "layer.experts",
        "layer.parallel",
        "layer.residual_multiplier",
        "router.sigmoid",
        "router.groups",
        "experts.shared",
        "mlp.clamped_swiglu",
        "mlp.clamp",
        "norm.unit_offset",
        "norm.l2",
        "rope.linear",
        "embedding.round_scale",
        "head.softcap",
    } <= found


def test_a_new_optional_field_is_a_new_feature() -> None:
    """So that no backend can ignore a field it has never heard of."""
    for name in ("window", "chunk", "softcap"):
        plain, changed = tiny_spec(), tiny_spec().layer_kinds[0].attention
        changed = msgspec.structs.replace(changed, **{name: 5})
        kind = msgspec.structs.replace(plain.layer_kinds[0], attention=changed)
        assert features(msgspec.structs.replace(plain, layer_kinds=(kind,))) - features(plain) == {f"attention.{name}"}


SHORT, LONG = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0), (1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 4096, "attention_factor": 1.1}
LONGROPE = {
    "short_factor": list(SHORT),
    "long_factor": list(LONG),
    "original_max_position_embeddings": 4096,
    "attention_factor": 1.19,
}
KINDS = {
    "default": ({}, Rope(theta=10000.0, dims=16), 4096),
    "partial": ({"factor": 1.0, "partial_rotary_factor": 0.5}, Rope(theta=10000.0, dims=8), 4096),
    "linear": ({"factor": 2.5}, Rope(theta=10000.0, dims=16, linear=Linear(2.5)), 4096),
    "dynamic-short": ({"factor": 2.0}, Rope(theta=10000.0, dims=16, dynamic=DynamicNtk(2.0, 16384)), 4096),
    "dynamic-long": ({"factor": 2.0}, Rope(theta=10000.0, dims=16, dynamic=DynamicNtk(2.0, 16384)), 40000),
    "llama3": (LLAMA3, Rope(theta=500000.0, dims=16, llama3=Llama3(8.0, 1.0, 4.0, 8192)), 16384),
    "yarn": (YARN, Rope(theta=10000.0, dims=16, yarn=Yarn(4.0, 4096, 1.1)), 16384),
    "yarn-untruncated": (
        {**YARN, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
        Rope(theta=10000.0, dims=16, yarn=Yarn(4.0, 4096, 1.1, beta_fast=16.0, beta_slow=2.0, truncate=False)),
        16384,
    ),
    "yarn-one-band": (
        {**YARN, "beta_fast": 1.0},
        Rope(theta=10000.0, dims=16, yarn=Yarn(4.0, 4096, 1.1, beta_fast=1.0)),
        16384,
    ),
    "longrope-short": (LONGROPE, Rope(theta=10000.0, dims=16, longrope=LongRope(SHORT, LONG, 4096, 1.19)), 4096),
    "longrope-long": (LONGROPE, Rope(theta=10000.0, dims=16, longrope=LongRope(SHORT, LONG, 4096, 1.19)), 4097),
    "proportional": (
        {"partial_rotary_factor": 0.25},
        Rope(theta=1e6, dims=4, proportional_head_dim=16),
        4096,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_those_of_transformers(kind: str) -> None:
    parameters, rope, longest = KINDS[kind]
    name = "linear" if kind == "partial" else kind.split("-")[0]
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_hidden_layers=1,
        head_dim=16,
        max_position_embeddings=16384,
        rope_parameters={"rope_type": name, "rope_theta": rope.theta, **parameters},
    )
    if name == "default":
        theirs, factor = LlamaRotaryEmbedding(config).inv_freq, 1.0
    else:
        theirs, factor = ROPE_INIT_FUNCTIONS[name](config, "cpu", seq_len=longest)
    ours, our_factor = rope_frequencies(rope, longest)
    assert our_factor == pytest.approx(factor, rel=1e-6)
    assert len(ours) == rope.dims // 2
    assert ours == pytest.approx(theirs.tolist()[: len(ours)], rel=2e-6)
    assert not any(theirs.tolist()[len(ours) :])


def test_each_scaling_changes_the_frequencies() -> None:
    plain, _ = rope_frequencies(Rope(theta=10000.0, dims=16), 16384)
    for kind in ("linear", "dynamic-long", "llama3", "yarn", "longrope-long"):
        _, rope, longest = KINDS[kind]
        assert rope_frequencies(rope, longest)[0] != plain


def test_the_module_names_no_family() -> None:
    """Families live in ``convert``. Llama3 and Yarn name published scalings, not models."""
    names = {name.lower() for name in vars(specs)}
    assert not names & {"llama", "mistral", "qwen", "gemma", "phi", "deepseek", "falcon", "mixtral"}
