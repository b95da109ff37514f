"""Any model of any family comes back: all ranks of its snapshot, put together, are the checkpoint, bit for bit.

test_layout.py holds this of the segments and test_rules.py of the rules, each alone and of generated ones. Here real
conversions of real families go through both, and through packing, files, casts to nothing and export.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgsnap.convert import families, weights
from fgsnap.convert.export import export
from fgsnap.convert.pipeline import convert
from fgsnap.convert.rules import sources
from fgsnap.layout import logical_shapes, possible_tp
from fgsnap.snapshot import Snapshot, open_snapshot, read_logical
from tests.convert.models import DTYPES, folder, loaded, same_bits
from tests.snapshots import stored_array, words32

KINDS = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}
sizes = st.integers(1, 40)
flags = st.booleans()


@st.composite
def attentions(draw: st.DrawFn, heads: int = 12) -> dict[str, int]:
    """Query heads in groups around key heads, of any even width; the residual stream is as wide as the queries."""
    keys = draw(st.integers(1, 4))
    queries, dim = keys * draw(st.integers(1, heads // keys)), draw(st.sampled_from((2, 4, 6)))
    return {
        "num_attention_heads": queries, "num_key_value_heads": keys, "head_dim": dim, "hidden_size": queries * dim,
    }  # fmt: skip


@st.composite
def wider(draw: st.DrawFn) -> dict[str, int]:
    """A residual stream of its own width."""
    return {**draw(attentions()), "hidden_size": 2 * draw(st.integers(1, 20))}


@st.composite
def falcon(draw: st.DrawFn) -> dict:
    """Three orders of queries, keys and values in one tensor; one norm or two."""
    attention, grouped, parallel = draw(attentions()), draw(flags), draw(flags)
    return {
        "hidden_size": attention["hidden_size"],
        "num_attention_heads": attention["num_attention_heads"],
        "num_kv_heads": attention["num_key_value_heads"],
        "new_decoder_architecture": grouped,
        "parallel_attn": grouped or parallel,
        "multi_query": draw(flags),
        "num_ln_in_parallel_attn": draw(st.sampled_from((1, 2))) if grouped else None,
        "bias": draw(flags),
        "ffn_hidden_size": draw(sizes),
    }


@st.composite
def deepseek(draw: st.DrawFn) -> dict:
    """Latents, with queries compressed or not; dense layers before those with experts."""
    heads, groups = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    return {
        "hidden_size": draw(sizes),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": draw(st.one_of(st.none(), st.integers(1, 9))),
        "kv_lora_rank": 2 * draw(st.integers(1, 6)),
        "qk_nope_head_dim": 2 * draw(st.integers(1, 4)),
        "qk_rope_head_dim": 2 * draw(st.integers(1, 3)),
        "v_head_dim": draw(st.integers(1, 6)),
        "intermediate_size": draw(sizes),
        "moe_intermediate_size": draw(sizes),
        "n_routed_experts": groups * draw(st.integers(2, 3)),
        "n_shared_experts": draw(st.sampled_from((None, 1, 2))),
        "n_group": groups,
        "topk_group": 1,
        "num_experts_per_tok": 1,
        "first_k_dense_replace": draw(st.integers(0, 2)),
    }


def merged(base: st.SearchStrategy[dict], **more: st.SearchStrategy) -> st.SearchStrategy[dict]:
    return st.builds(lambda one, two: {**one, **two}, base, st.fixed_dictionaries(more))


experts = {"num_experts_per_tok": st.just(1), "intermediate_size": sizes}
CONFIGS: dict[str, st.SearchStrategy[dict]] = {
    "deepseek_v3": deepseek(),
    "falcon": falcon(),
    "gpt_neox": merged(
        attentions().map(lambda found: {**found, "num_key_value_heads": found["num_attention_heads"]}),
        intermediate_size=sizes,
        rotary_pct=st.just(1.0),
        attention_bias=flags,
    ),
    "llama": merged(wider(), intermediate_size=sizes, attention_bias=flags, mlp_bias=flags, tie_word_embeddings=flags),
    "mixtral": merged(wider(), num_local_experts=st.integers(1, 4), **experts),
    "phi3": merged(wider(), intermediate_size=sizes),
    "qwen2_moe": merged(
        wider(),
        num_experts=st.integers(1, 4),
        moe_intermediate_size=sizes,
        shared_expert_intermediate_size=sizes,
        mlp_only_layers=st.sampled_from(([], [0], [1])),
        **experts,
    ),
}


@pytest.mark.parametrize("family", CONFIGS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_all_ranks_together_are_the_checkpoint(family: str, data: st.DataObject) -> None:
    config = {
        "model_type": family,
        "vocab_size": data.draw(st.integers(1, 50), "vocabulary"),
        "num_hidden_layers": 2,
        "max_position_embeddings": 16,
        **data.draw(CONFIGS[family], "config"),
    }
    spec = families.find(config).spec(config)
    names = data.draw(st.sampled_from(families.find(config).rules), "names")
    dtype, tp = data.draw(st.sampled_from(sorted(KINDS))), data.draw(st.sampled_from(possible_tp(spec, 8)), "tp")
    tensors = {name: random_bits(at, shape, dtype) for at, (name, shape) in enumerate(sources(names(spec)).items())}
    with TemporaryDirectory() as name:
        source = folder(Path(name) / "model", config, tensors, shards=data.draw(st.sampled_from((1, 2))))
        target = data.draw(st.sampled_from(("generic", "cpu")), "target")
        with patch.object(weights, "SLAB", data.draw(st.sampled_from((200, weights.SLAB)), "slab")):
            convert(str(source), Path(name) / "snap", tp=tp, target=target, canary=False)
        export(Path(name) / "snap", Path(name) / "back")
        assert same_bits(loaded(Path(name) / "back"), tensors)
        with open_snapshot(Path(name) / "snap") as snapshot:
            check_every_rank(snapshot)


def random_bits(seed: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Any bits: numbers, infinities and NaNs with payloads."""
    raw = bytearray(np.random.default_rng(seed).bytes(prod(shape) * KINDS[dtype]().itemsize))
    return torch.frombuffer(raw, dtype=DTYPES[dtype]).reshape(shape)


def check_every_rank(snapshot: Snapshot) -> None:
    """Export reads a value once; here each rank has all that is its own, copies of what others have, and zeros."""
    manifest = snapshot.manifest
    dtype = manifest.tensors[0].dtype
    logical = {name: np.empty(shape, KINDS[dtype]) for name, shape in logical_shapes(manifest.spec).items()}
    for name, array in logical.items():
        read_logical(snapshot, name, (0,) * array.ndim, array.shape, memoryview(array))
    for entry in manifest.tensors:
        wanted = stored_array(entry, logical, dtype)
        pack: Callable[[np.ndarray], bytes] = words32 if entry.layout == "words32" else np.ndarray.tobytes
        assert bytes(snapshot.tensor(entry)) == pack(wanted), f"{entry.name} in {entry.file}"
