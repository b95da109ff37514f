"""Qwen, the first: Llama's shape under names of its own; its code lives beside its weights and is not run.

Beyond the trained length its rotation stretches (dynamic NTK, in steps of powers of two) and its queries grow with the
logarithm of their position, both as the published code does it.
"""

from __future__ import annotations

from fgsnap.convert.families.config import ASK, Config, check_keys, flag, integer, number
from fgsnap.convert.families.family import Family
from fgsnap.convert.families.naming import Make, by_name, rows_of
from fgsnap.convert.families.parts import decoder, depth
from fgsnap.convert.rules import Rule
from fgsnap.errors import SourceError, UnsupportedModel
from fgsnap.spec import Attention, DecoderSpec, DynamicNtk, Layer, Mlp, Norm, QueryTemperature, Rope

KNOWN = frozenset(
    """
    vocab_size hidden_size num_hidden_layers num_attention_heads kv_channels intermediate_size layer_norm_epsilon
    max_position_embeddings seq_length rotary_emb_base rotary_pct use_dynamic_ntk use_logn_attn no_bias
    scale_attn_weights tie_word_embeddings
    emb_dropout_prob attn_dropout_prob onnx_safe bf16 fp16 fp32 softmax_in_fp32 use_cache_quantization
    use_cache_kernel bias_dropout_fusion
    """.split()
)
OUTER = {"embed": "transformer.wte", "final_norm": "transformer.ln_f", "head": "lm_head"}
INNER = {
    "attn_in": "ln_1",
    **dict.fromkeys(("q", "k", "v"), "attn.c_attn"),
    "out": "attn.c_proj",
    "mlp_in": "ln_2",
    "gate": "mlp.w2",
    "up": "mlp.w1",
    "down": "mlp.c_proj",
}


def spec(config: Config) -> DecoderSpec:
    """What a Qwen config.json says is computed."""
    check_keys(config, KNOWN)
    _refuse_unknown_code(config)
    queries, dim = integer(config, "num_attention_heads"), integer(config, "kv_channels", 128)
    inner = integer(config, "intermediate_size")  # of both halves of the gated MLP together
    if dim % 2 or dim <= 2 or inner % 2:
        raise SourceError(
            f"{dim} head dims or {inner} MLP dims cannot be halved.",
            "Both have to be even, and a head wider than 2.",
            "Check kv_channels and intermediate_size in config.json.",
        )
    trained = integer(config, "seq_length", 2048)
    norm = Norm(kind="rms", eps=number(config, "layer_norm_epsilon", 1e-6))
    growing = QueryTemperature("logn", trained) if flag(config, "use_logn_attn", default=True) else None
    attention = Attention(queries, queries, dim, dim**-0.5, rope=0, qkv_bias=True, query_temperature=growing)
    mlp = Mlp(inner=inner // 2, activation="silu")
    stretched = DynamicNtk(1.0, trained, powers_of_two=True) if flag(config, "use_dynamic_ntk", default=True) else None
    return decoder(
        config,
        [Layer(attention=attention, mlp=mlp, attn_in=norm, mlp_in=norm)] * depth(config),
        norm,
        [Rope(number(config, "rotary_emb_base", 10000.0), dim, dynamic=stretched)],
        max_length=integer(config, "max_position_embeddings", 8192),
    )


def _refuse_unknown_code(config: Config) -> None:
    """Options that no published checkpoint uses, so that nobody could say what they do."""
    if number(config, "rotary_pct", 1.0) != 1.0 or not flag(config, "no_bias", default=True):
        raise UnsupportedModel(
            "The config keys 'rotary_pct' and 'no_bias' of this Qwen are not those of the published models.",
            "fgsnap does not run its code, so what they change is unknown.",
            ASK,
        )
    if not flag(config, "scale_attn_weights", default=True):
        raise UnsupportedModel(
            "The config key 'scale_attn_weights' is false.", "fgsnap does not know such a Qwen.", ASK
        )


def rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How the logical tensors are made of a checkpoint's."""
    width = spec.layer_kinds[0].attention.query_width
    how: dict[str, Make] = {part: rows_of(3 * width, at * width) for at, part in enumerate(("q", "k", "v"))}
    return by_name(spec, OUTER, INNER, how, "transformer.h.{layer}.")


FAMILY = Family(
    "Qwen-1.8B, Qwen-7B, Qwen-14B, Qwen-72B",
    spec,
    (rules,),
    refused="Qwen-VL, and the Int4 and Int8 checkpoints.",
    tied_head=("lm_head.weight", "transformer.wte.weight"),
)
