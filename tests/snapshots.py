"""Small real snapshots for tests: random weights through the real writer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from fgsnap.layout import logical_shapes, pieces, stored_tensors
from fgsnap.snapshot import Canary, Layout, Manifest, Provenance, SnapshotWriter, TextSection, plan_rank
from fgsnap.spec import (
    DTYPE_BYTES,
    Attention,
    DecoderSpec,
    DType,
    Embedding,
    Head,
    Layer,
    Mlp,
    Norm,
    Rope,
)


def tiny_spec(
    *,
    width: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    inner: int = 48,
    layers: int = 2,
    vocab_size: int = 61,
    max_length: int = 128,
    tied: bool = False,
    qkv_bias: bool = False,
    mlp_bias: bool = False,
    window: int | None = None,
) -> DecoderSpec:
    """A Llama-shaped spec that is as small as it can be."""
    attention = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=0,
        window=window,
        qkv_bias=qkv_bias,
        out_bias=qkv_bias,
    )
    norm = Norm(kind="rms", eps=1e-5)
    mlp = Mlp(inner=inner, activation="silu", bias=mlp_bias, down_bias=mlp_bias)
    return DecoderSpec(
        vocab_size=vocab_size,
        width=width,
        max_length=max_length,
        embedding=Embedding(width=width),
        layer_kinds=(Layer(attention=attention, mlp=mlp, attn_in=norm, mlp_in=norm),),
        layers=(0,) * layers,
        head=Head(tied=tied),
        final_norm=norm,
        ropes=(Rope(theta=10000.0, dims=head_dim),),
    )


def random_weights(spec: DecoderSpec, dtype: DType = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Logical tensors by name; bfloat16 as uint16. Norm weights lie around 1, matrix products keep their size."""
    random = np.random.default_rng(seed)
    weights = {}
    for name, shape in logical_shapes(spec).items():
        values = random.standard_normal(shape, dtype=np.float32) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
        weights[name] = encode(values + (1.0 if len(shape) == 1 and name.endswith("weight") else 0.0), dtype)
    return weights


def encode(values: np.ndarray, dtype: DType) -> np.ndarray:
    """float32 values in the stored form of ``dtype``, rounded to nearest even."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "float32":
        return values
    if dtype == "float16":
        return values.astype(np.float16)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def make_snapshot(
    path: Path,
    spec: DecoderSpec,
    tp: int = 1,
    dtype: DType = "float32",
    seed: int = 0,
    text_files: Mapping[str, bytes] | None = None,
    *,
    layout: Layout = "row",
    text: TextSection | None = None,
    canary: Canary | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
    spoil: Callable[[int, str, np.ndarray], None] | None = None,
) -> str:
    """Write a snapshot of random (or the given) logical weights to ``path`` and return its id.

    ``canary`` may carry any id: it is replaced by the snapshot's own. ``spoil`` gets each rank, stored tensor's name
    and values before they are written, and may change them.
    """
    weights = random_weights(spec, dtype, seed) if weights is None else weights
    with SnapshotWriter(path, spec, tp) as writer:
        for rank in range(tp):
            plan = plan_rank([(tensor, dtype) for tensor in stored_tensors(spec, tp, rank)], layout)
            with writer.rank(rank, plan) as out:
                for tensor in plan.tensors:
                    array = stored_array(tensor, weights, dtype)
                    if spoil is not None:
                        spoil(rank, tensor.name, array)
                    out.write(
                        tensor.offset, memoryview(words32(array) if tensor.layout == "words32" else array.tobytes())
                    )
        for name, data in sorted((text_files or {}).items()):
            writer.add_file(name, data)
        manifest = Manifest(
            requires=writer.requires,
            spec=spec,
            tp=tp,
            tensors=writer.tensors,
            files=writer.files,
            text=text or TextSection(eos_token_ids=(0,)),
            provenance=Provenance(
                source="tests/random",
                revision=None,
                files={},
                rules=hashlib.sha256(b"").hexdigest(),
                family="llama",
                converter="tests",
            ),
        )
        identity = writer.write_manifest(manifest)
        if canary is not None:
            canary = Canary(identity, canary.tokens, canary.next, canary.margins)
        writer.publish(canary)
    return identity


def stored_array(tensor, weights: Mapping[str, np.ndarray], dtype: DType) -> np.ndarray:
    """One stored tensor put together from logical ones, by the segments."""
    kind = {2: np.float16 if dtype == "float16" else np.uint16, 4: np.float32}[DTYPE_BYTES[dtype]]
    stored = np.zeros(tensor.shape, kind)
    for piece in pieces(tensor.segments, (0,) * len(tensor.shape), tensor.shape):
        if piece.tensor is None:
            continue
        source = tuple(slice(a, a + n) for a, n in zip(piece.logical_start, piece.extent, strict=True))
        target = tuple(slice(a, a + n) for a, n in zip(piece.stored_start, piece.extent, strict=True))
        stored[target] = weights[piece.tensor][source]
    return stored


def words32(matrix: np.ndarray) -> bytes:
    """The matrix, or each of a stack, in panels of 32 rows, word by word as docs/format.md defines it."""
    if matrix.ndim > 2:
        return b"".join(map(words32, matrix))
    data, width, packed = matrix.tobytes(), matrix[0].nbytes, bytearray()
    for panel in range(0, len(matrix), 32):
        for word in range(0, width, 4):
            for row in range(panel, panel + 32):
                at = row * width + word
                packed += data[at : at + 4] if row < len(matrix) else bytes(4)
    return bytes(packed)
