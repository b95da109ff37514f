"""The neutral decoder spec: what a decoder-only transformer computes, by features and never by family name.

A converter writes it, the manifest stores it, the runtime executes it. Every field that is at its default is left out
of the stored form and an unknown field is refused, so a spec that uses a newer feature is refused by that feature's
name, and one that does not is read by every version.

Shapes below use: T tokens, H width, D head dim, V vocabulary, I inner width of an MLP, E experts.
"""

# Annotations are not postponed here: msgspec would have to compile each one from its text at every start.

import functools
import math
from typing import Literal

import msgspec

DType = Literal["float32", "bfloat16", "float16"]
DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of all spec values: frozen, strict, and stored without its defaults."""


class Norm(Part, frozen=True):
    """A normalisation over the last axis, computed in float32.

    rms: x / sqrt(mean(x^2) + eps); ln: (x - mean) / sqrt(var + eps); l2: x / sqrt(mean(x^2) + eps) without weight.
    ``unit_offset`` multiplies by (1 + w); ``float32_weight`` multiplies before rounding back to the activation dtype.
    """

    kind: Literal["rms", "ln", "l2"]
    eps: float
    weight: bool = True
    bias: bool = False
    unit_offset: bool = False
    float32_weight: bool = False


class Linear(Part, frozen=True):
    """``rope scaling: linear``: every position is divided by ``factor``."""

    factor: float


class DynamicNtk(Part, frozen=True):
    """Dynamic NTK: theta grows with the deployment's longest context beyond ``original_length`` tokens.

    ``powers_of_two``: as for a context twice the next power of two of ``original_length``; so Qwen does it.
    """

    factor: float
    original_length: int
    powers_of_two: bool = False


class Llama3(Part, frozen=True):
    """Llama-3.1 scaling: long wavelengths are divided by ``factor``, short ones kept, the band between interpolated."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int


class Yarn(Part, frozen=True):
    """YaRN (arXiv:2309.00071). ``attention_factor`` multiplies cos and sin and is settled at conversion."""

    factor: float
    original_length: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


class LongRope(Part, frozen=True):
    """LongRoPE (arXiv:2402.13753): one divisor a frequency; the long list serves contexts beyond ``original_length``.

    A deployment uses one table for its whole life, picked by its longest context: switching tables in the middle of a
    sequence would disagree with keys that are already cached.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_length: int
    attention_factor: float


class Rope(Part, frozen=True):
    """A rotary embedding on the first ``dims`` of each head, first half against second half of those dims.

    Snapshots store every checkpoint in that order; adjacent-pair checkpoints are permuted at conversion.
    ``proportional`` spreads ``dims`` frequencies as if the whole head of ``head_dim`` were rotated.
    """

    theta: float
    dims: int
    linear: Linear | None = None
    dynamic: DynamicNtk | None = None
    llama3: Llama3 | None = None
    yarn: Yarn | None = None
    longrope: LongRope | None = None
    proportional_head_dim: int | None = None


class Alibi(Part, frozen=True):
    """Linear attention biases, slope x key position; the flags say how the checkpoint's author rounded them."""

    scaled: bool = False
    bfloat16: bool = False


class QueryTemperature(Part, frozen=True):
    """Queries scaled by position p.

    ``logn``: log_base(p + 1) beyond base; ``step``: 1 + scale ln(1 + floor((p + 1) / base)).
    """

    kind: Literal["logn", "step"]
    base: int
    scale: float = 0.0


class QkNorm(Part, frozen=True):
    """Norm of queries and keys: over each head or over the whole projection, before or after the rotation."""

    norm: Norm
    scope: Literal["head", "projection"] = "head"
    after_rope: bool = False


class Latent(Part, frozen=True):
    """Multi-head latent attention (arXiv:2405.04434): ranks of the query and key-value latents, rotated dims apart."""

    kv_rank: int
    rope_dim: int
    norm: Norm
    query_rank: int | None = None


class Attention(Part, frozen=True):
    """Softmax attention; query head h reads key head h * kv_heads / heads (grouped-query attention).

    ``window`` w: a query at position p sees keys at p - w + 1 ... p. ``chunk`` c: keys of the same multiple of c only.
    ``scale`` multiplies q.k; ``softcap`` s: s tanh(score / s) after the scale. ``sinks``: one learned logit a head in
    the softmax denominator. ``rope`` is an index into DecoderSpec.ropes; None means no rotation.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    value_dim: int | None = None
    rope: int | None = None
    alibi: Alibi | None = None
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: QkNorm | None = None
    query_temperature: QueryTemperature | None = None
    latent: Latent | None = None

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def value_width(self) -> int:
        """Numbers that a head gives."""
        return self.head_dim if self.value_dim is None else self.value_dim


Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "clamped_swiglu"]


class Mlp(Part, frozen=True):
    """down(act(gate(x)) * up(x)) when ``gated``, else down(act(up(x))). ``clamp`` belongs to clamped_swiglu."""

    inner: int
    activation: Activation
    gated: bool = True
    bias: bool = False
    down_bias: bool = False
    clamp: float | None = None


class Router(Part, frozen=True):
    """How tokens pick experts.

    ``score`` over all experts then top-k, or with ``select_first`` top-k of the logits and then score over the k.
    ``groups`` limits the choice to the best ``kept_groups``, ranked by ``group_rank``. ``selection_bias`` is a
    learned bias that picks but does not weigh.
    """

    score: Literal["softmax", "sigmoid"]
    top_k: int
    select_first: bool = False
    bias: bool = False
    selection_bias: bool = False
    groups: int = 1
    kept_groups: int = 1
    group_rank: Literal["max", "top2_sum"] = "max"
    renormalize: bool = False
    scale: float = 1.0
    weigh_input: bool = False


class SharedExpert(Part, frozen=True):
    """An MLP every token passes, multiplied by sigmoid(gate(x)) when ``gated_by_input``."""

    mlp: Mlp
    gated_by_input: bool = False


class Experts(Part, frozen=True):
    count: int
    mlp: Mlp
    router: Router
    shared: SharedExpert | None = None


class Layer(Part, frozen=True):
    """One decoder layer.

    sequential: x += m * attn_out(attention(attn_in(x))); x += m * mlp_out(mlp(mlp_in(x))), m = residual_multiplier.
    parallel: x += attention(attn_in(x)) + mlp(mlp_in(x)), where an absent ``mlp_in`` shares attn_in's result.
    post: x = attn_out(x + attention(x)); x = mlp_out(x + mlp(x)).
    """

    attention: Attention
    mlp: Mlp | None = None
    experts: Experts | None = None
    residual: Literal["sequential", "parallel", "post"] = "sequential"
    attn_in: Norm | None = None
    attn_out: Norm | None = None
    mlp_in: Norm | None = None
    mlp_out: Norm | None = None
    residual_multiplier: float = 1.0


class Embedding(Part, frozen=True):
    """Token rows [V, width], multiplied by ``scale`` (rounded to the dtype computed in first when ``round_scale``).

    ``learned_positions`` rows are added at index position + ``position_offset``. ``width`` differs from the decoder's
    when projections stand between them.
    """

    width: int
    scale: float = 1.0
    round_scale: bool = False
    learned_positions: int = 0
    position_offset: int = 0


class Head(Part, frozen=True):
    """Logits = softcap(multiplier * (lm_head(x) + bias)). ``tied`` reads the embedding rows."""

    tied: bool = False
    bias: bool = False
    multiplier: float = 1.0
    softcap: float | None = None


class DecoderSpec(Part, frozen=True):
    """A whole decoder. ``layers[i]`` is the index into ``layer_kinds`` of layer i, so equal layers are stored once."""

    vocab_size: int
    width: int
    max_length: int
    embedding: Embedding
    layer_kinds: tuple[Layer, ...]
    layers: tuple[int, ...]
    head: Head
    final_norm: Norm | None = None
    ropes: tuple[Rope, ...] = ()

    @property
    def depth(self) -> int:
        return len(self.layers)

    def layer(self, index: int) -> Layer:
        return self.layer_kinds[self.layers[index]]

    def kv_values_per_token(self) -> int:
        """Keys and values cached for one token over all layers, in numbers; times the dtype's size gives bytes."""
        return sum(_kv_values(self.layer(i).attention) for i in range(self.depth))


def _kv_values(attention: Attention) -> int:
    if attention.latent is not None:
        return attention.latent.kv_rank + attention.latent.rope_dim
    return attention.kv_heads * (attention.head_dim + (attention.value_dim or attention.head_dim))


def features(spec: DecoderSpec) -> frozenset[str]:
    """The names of all optional features that ``spec`` uses, for a backend to compare with what it implements.

    A field that is not at its default is a feature named by its place, such as ``attention.window`` or
    ``rope.llama3``; closed choices carry their value, such as ``norm.rms`` or ``mlp.silu``.
    """
    found: set[str] = set()
    for kind in spec.layer_kinds:
        _collect("layer", kind, found)
    for rope in spec.ropes:
        _collect("rope", rope, found)
    _collect("embedding", spec.embedding, found)
    _collect("head", spec.head, found)
    if spec.final_norm is not None:
        _collect("norm", spec.final_norm, found)
    return frozenset(found)


_PART_NAMES = {"Attention": "attention", "Mlp": "mlp", "Norm": "norm", "Experts": "experts"}


@functools.cache
def _fields(kind: type[Part]) -> tuple[msgspec.structs.FieldInfo, ...]:
    """A part's fields; asking msgspec evaluates all annotations, which opening a snapshot should not pay a rank."""
    return msgspec.structs.fields(kind)


def _collect(place: str, part: Part, found: set[str]) -> None:
    for field in _fields(type(part)):
        value = getattr(part, field.name)
        if isinstance(value, Part):
            if field.name != "mlp" and field.name != "attention":
                found.add(f"{place}.{field.name}")
            _collect(_PART_NAMES.get(type(value).__name__, field.name), value, found)
        elif isinstance(value, str):
            found.add(f"{place}.{value}")
        elif field.default is not msgspec.NODEFAULT and value != field.default:
            found.add(f"{place}.{field.name}")


def rope_frequencies(rope: Rope, longest: int) -> tuple[list[float], float]:
    """Inverse frequencies (radians a position, ``dims // 2`` of them) and the factor on cos and sin.

    Args:
        rope: the rotation.
        longest: the longest context of this deployment in tokens; dynamic NTK and LongRoPE pick their table by it.

    The recipes are those of the papers named in the classes above, as published checkpoints are read by transformers.
    """
    half = rope.dims // 2
    span = rope.proportional_head_dim or rope.dims
    theta = rope.theta
    if rope.dynamic is not None and longest > rope.dynamic.original_length:
        theta *= _growth(rope.dynamic, longest) ** (rope.dims / (rope.dims - 2))
    plain = [theta ** (-2 * i / span) for i in range(half)]
    if rope.linear is not None:
        return [f / rope.linear.factor for f in plain], 1.0
    if rope.llama3 is not None:
        return [_llama3(f, rope.llama3) for f in plain], 1.0
    if rope.yarn is not None:
        return _yarn(plain, rope.theta, rope.dims, rope.yarn), rope.yarn.attention_factor
    if rope.longrope is not None:
        long = longest > rope.longrope.original_length
        divisors = rope.longrope.long_factors if long else rope.longrope.short_factors
        return [f / d for f, d in zip(plain, divisors, strict=True)], rope.longrope.attention_factor
    return plain, 1.0


def _growth(scaling: DynamicNtk, longest: int) -> float:
    if scaling.powers_of_two:
        return float(2 ** math.ceil(math.log2(longest / scaling.original_length) + 1) - 1)
    return scaling.factor * longest / scaling.original_length - (scaling.factor - 1)


def alibi_slopes(heads: int) -> list[float]:
    """The slopes of Press et al. (arXiv:2108.12409): a geometric sequence; for other than a power of two, that of the
    next lower one, then every other one of the next higher.
    """
    whole = 1 << heads.bit_length() - 1
    slopes = [2.0 ** (-8 * (i + 1) / whole) for i in range(whole)]
    return slopes + [2.0 ** (-4 * (2 * i + 1) / whole) for i in range(heads - whole)]


def _llama3(frequency: float, scaling: Llama3) -> float:
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original_length / scaling.high_frequency_factor:
        return frequency
    if wavelength > scaling.original_length / scaling.low_frequency_factor or (
        scaling.low_frequency_factor == scaling.high_frequency_factor
    ):
        return frequency / scaling.factor
    smooth = (scaling.original_length / wavelength - scaling.low_frequency_factor) / (
        scaling.high_frequency_factor - scaling.low_frequency_factor
    )
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def _yarn(plain: list[float], theta: float, dims: int, scaling: Yarn) -> list[float]:
    def dimension_of(rotations: float) -> float:
        return dims * math.log(scaling.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001
    blended = []
    for i, frequency in enumerate(plain):
        interpolate = min(max((i - low) / (high - low), 0.0), 1.0)
        blended.append(frequency / scaling.factor * interpolate + frequency * (1 - interpolate))
    return blended
