"""All ranks together hold the source tensors, bit for bit, whatever the shapes, the families' orders and the degree."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgsnap.convert import families, weights
from fgsnap.convert.export import export
from fgsnap.convert.pipeline import convert
from fgsnap.convert.rules import sources
from fgsnap.layout import possible_tp
from fgsnap.snapshot import verify
from tests.convert.models import DTYPES, folder, loaded, same_bits

Config = dict[str, Any]


def common(draw: st.DrawFn) -> Config:
    return {"vocab_size": draw(st.integers(3, 40)), "num_hidden_layers": draw(st.integers(1, 2))}


def heads_of(draw: st.DrawFn, width: bool) -> Config:
    """Grouped heads of any number; those of ``width`` fill the hidden size exactly."""
    keys, group, dim = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.sampled_from((2, 4, 6)))
    queries = keys * group
    hidden = queries * dim if width else draw(st.integers(1, 30))
    return {"num_attention_heads": queries, "num_key_value_heads": keys, "head_dim": dim, "hidden_size": hidden}


def llama(draw: st.DrawFn) -> Config:
    bias = {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    inner = {"intermediate_size": draw(st.integers(1, 50)), "tie_word_embeddings": draw(st.booleans())}
    return {"model_type": "llama", **common(draw), **heads_of(draw, width=False), **inner, **bias}


def falcon(draw: st.DrawFn) -> Config:
    """Groups of queries around a key head, or one key head for all."""
    heads = heads_of(draw, width=True)
    config = {name: heads[name] for name in ("num_attention_heads", "hidden_size")}
    if draw(st.booleans()):
        config |= {"new_decoder_architecture": True, "num_kv_heads": heads["num_key_value_heads"]}
    return {"model_type": "falcon", **common(draw), **config, "bias": draw(st.booleans())}


def gpt_neox(draw: st.DrawFn) -> Config:
    """Query, key and value of each head side by side."""
    heads = heads_of(draw, width=True)
    config = {name: heads[name] for name in ("num_attention_heads", "hidden_size")}
    return {
        "model_type": "gpt_neox", **common(draw), **config, "rotary_pct": 1.0,
        "intermediate_size": draw(st.integers(1, 50)),
    }  # fmt: skip


def gpt2(draw: st.DrawFn) -> Config:
    """Matrices that lie transposed."""
    heads = draw(st.integers(1, 6))
    sizes = {"n_head": heads, "n_embd": heads * draw(st.sampled_from((2, 4))), "n_inner": draw(st.integers(1, 50))}
    own = common(draw)
    return {"model_type": "gpt2", "vocab_size": own["vocab_size"], "n_layer": own["num_hidden_layers"], **sizes}


def mixtral(draw: st.DrawFn) -> Config:
    """A tensor an expert."""
    experts = draw(st.integers(1, 4))
    return {
        "model_type": "mixtral", **common(draw), **heads_of(draw, width=False),
        "intermediate_size": draw(st.integers(1, 30)), "num_local_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, experts)),
    }  # fmt: skip


@st.composite
def conversions(draw: st.DrawFn) -> tuple[Config, int]:
    config = draw(st.sampled_from((llama, falcon, gpt_neox, gpt2, mixtral)))(draw)
    degrees = possible_tp(families.find(config).spec(config), 8)
    return config, draw(st.sampled_from(degrees))


@settings(max_examples=25, deadline=None)
@given(
    conversion=conversions(),
    dtype=st.sampled_from(sorted(DTYPES)),
    slab=st.sampled_from((1, 64, 1000, 4 << 20)),
    target=st.sampled_from(("generic", "cpu")),
    seed=st.integers(0, 99),
)
def test_all_ranks_give_the_source_tensors(
    conversion: tuple[Config, int], dtype: str, slab: int, target: str, seed: int
) -> None:
    config, tp = conversion
    family = families.find(config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator).to(DTYPES[dtype])
        for name, shape in sources(family.rules[0](family.spec(config))).items()
    }
    with tempfile.TemporaryDirectory() as place, patch.object(weights, "SLAB", slab):
        source = folder(Path(place) / "source", config, tensors)
        convert(str(source), Path(place) / "snap", tp=tp, target=target, canary=False)
        verify(Path(place) / "snap")
        export(Path(place) / "snap", Path(place) / "back")
        assert same_bits(loaded(Path(place) / "back"), tensors), (config, tp)
