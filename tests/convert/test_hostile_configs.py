"""A config.json that is damaged, or made to do harm: refused in words, before anything large is made of it."""

from __future__ import annotations

import json
import math
import tracemalloc

import msgspec
import pytest
import transformers

from benchmarks import qwen1
from benchmarks.compare import TINY
from benchmarks.family_cases import CASES
from fgsnap.convert import families
from fgsnap.convert.plan import plan
from fgsnap.errors import SourceError, UnsupportedModel
from fgsnap.layout import possible_tp
from fgsnap.spec import rope_frequencies

ABSENT = object()
VALUES = [
    None, ABSENT, True, False, -1, 0, 1, 2, 3, 7, 10**9, 10**12, -(10**12), 10**400, 0.0, 0.5, -0.5, 1.5, 1e-320, 1e308,
    math.nan, math.inf, -math.inf, "", "x", "full_attention", [], [1], [0, 1, 1], [-1, 10**12, 0], [None], ["x"] * 3,
    ["chunked_attention"] * 3, ["sliding_attention"] * 3, [[]], {}, {"x": 1}, {"rope_type": "yarn"}, {"rope_type": []},
    {"full_attention": None}, {"sliding_attention": [1]},
]  # fmt: skip
ROPES = [
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0, "partial_rotary_factor": 1.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 0.9,
     "beta_fast": 32, "beta_slow": 1, "attention_factor": 1.5, "truncate": True},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
     "original_max_position_embeddings": 16},
    {"rope_type": "proportional", "factor": 2.0},
]  # fmt: skip


def config_of(name):
    """A case's config.json, with every key that transformers writes."""
    case = CASES[name]
    if case.family == "qwen":
        return {**qwen1.TINY, **{key: value for key, value in case.config.items() if value is not ...}}
    settings = {key: value for key, value in {**TINY, **case.config}.items() if value is not ...}
    copied = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
    made = transformers.AutoConfig.for_model(case.family, **copied)
    return json.loads(made.to_json_string(use_diff=False))


FIRST = {case.family: name for name, case in reversed(CASES.items())}


def checked(config, seen):
    """Everything that planning and settling compute of a config; ``seen`` are specs that were computed before."""
    family = families.find(config)
    spec = family.spec(config)
    if spec in seen:
        return
    seen.add(spec)
    for tp in {1, possible_tp(spec, 8)[-1]}:
        plan(spec, tp, "bfloat16")
    for rope in spec.ropes:
        rope_frequencies(rope, spec.max_length)
    for rules in family.rules:
        rules(spec)
    assert msgspec.json.decode(msgspec.json.encode(spec), type=type(spec)) == spec, "what the manifest holds"


def mishaps(configs):
    """What went wrong other than by a SourceError, with what was changed."""
    found, seen = [], set()
    for change, config in configs:
        try:
            checked(config, seen)
        except SourceError as error:
            assert len(error.lines()) == 3 and all(len(line) <= 500 for line in error.lines()), change
        except Exception as error:
            found.append((change, repr(error)))
    return found


def changed(config):
    for key in config:
        for value in VALUES:
            other = {**config, key: value}
            if value is ABSENT:
                del other[key]
            yield f"{key} = {value!r:.40}", other


@pytest.mark.parametrize("family", FIRST)
def test_a_damaged_config_is_refused_or_planned(family):
    config = config_of(FIRST[family])
    checked(config, set())
    assert mishaps(changed(config)) == []


@pytest.mark.parametrize(("family", "inner"), [("gemma3", "gemma3_text"), ("llama4", "llama4_text")])
def test_a_damaged_config_inside_one_is_refused_or_planned(family, inner):
    config = config_of(FIRST[inner])
    assert mishaps((what, {"model_type": family, "text_config": damaged}) for what, damaged in changed(config)) == []
    assert mishaps((value, {"model_type": family, "text_config": value}) for value in VALUES) == []


@pytest.mark.parametrize(("family", "inner"), [("gemma3", "gemma3_text"), ("llama4", "llama4_text")])
def test_a_decoder_of_another_type_inside_one_is_refused(family, inner):
    text = config_of(FIRST[inner])
    whole = {"model_type": family, "text_config": text}
    for same in (whole, {**whole, "text_config": {key: value for key, value in text.items() if key != "model_type"}}):
        assert families.find(whole).spec(same) == families.find(text).spec(text)
    with pytest.raises(UnsupportedModel, match="gemma3n_text"):
        families.find(whole).spec({**whole, "text_config": {**text, "model_type": "gemma3n_text"}})


@pytest.mark.parametrize("dialect", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("family", ["llama", "phi3", "deepseek_v3", "gemma3_text", "olmo3"])
def test_a_damaged_rotation_is_refused_or_planned(family, dialect):
    config = {key: value for key, value in config_of(FIRST[family]).items() if not key.startswith("rope")}
    damaged = (
        (what, {**config, dialect: keyed})
        for rope in ROPES
        for what, inner in changed(rope)
        for keyed in (inner, {"full_attention": inner, "sliding_attention": {"rope_type": "default"}})
    )
    assert mishaps(damaged) == []


SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings num_experts num_local_experts n_routed_experts n_shared_experts num_experts_per_tok "
    "n_layer n_head n_embd n_positions kv_channels first_k_dense_replace sliding_window_pattern"
).split()


@pytest.mark.parametrize("family", FIRST)
def test_huge_sizes_take_no_memory(family):
    config = config_of(FIRST[family])
    keys = [key for key in SIZES if key in config]
    tracemalloc.start()
    try:
        for size in (10**5, 10**9, 10**12):
            assert mishaps((key, {**config, key: size}) for key in keys) == []
        assert mishaps([("all of them", {**config, **dict.fromkeys(keys, 10**9)})]) == []
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("family", "change", "name"),
    [
        ("deepseek_v2", {"topk_method": "random"}, "topk_method"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek_v3", {"rope_interleave": False}, "rotation"),
        ("falcon", {"activation": "quick_gelu"}, "quick_gelu"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "shared expert"),
        ("opt", {"learned_embeddings": False, "scale_embeddings": False}, "learned_embeddings"),
        ("opt", {"learned_embeddings": True, "scale_embeddings": True}, "scale_embeddings"),
        ("phi3", {"rope_scaling": {"rope_type": "mrope", "factor": 2.0}}, "mrope"),
        ("mixtral", {"num_experts_per_tok": 9}, "9 of 4 experts"),
        ("glm4_moe", {"n_group": 3}, "3 groups"),
    ],
)
def test_what_no_spec_expresses_is_refused_by_name(family, change, name):
    config = {key: value for key, value in config_of(FIRST[family]).items() if not key.startswith("rope_")}
    with pytest.raises(SourceError) as caught:
        families.find(config).spec({**config, **change})
    assert name in caught.value.what


def test_galactica_says_more_than_opt_and_means_the_same():
    config = config_of("opt")
    galactica = {**config, "learned_embeddings": True, "scale_embeddings": False}
    assert families.find(config).spec(galactica) == families.find(config).spec(config)


# Families whose code in transformers reads partial_rotary_factor.
PARTIAL = {"glm", "glm4", "glm4_moe", "gpt_neox", "phi", "phi3", "stablelm"}
OWN_WAY = {"gpt2", "gptj", "opt", "qwen"}  # of these, two have no rotation, and two keys of their own


@pytest.mark.parametrize("dialect", ["beside", "rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("family", sorted({*FIRST} - OWN_WAY))
def test_a_part_of_a_head_rotates_only_where_the_models_code_knows_of_it(family, dialect):
    partial = {"partial_rotary_factor": 0.5}
    change = partial if dialect == "beside" else {dialect: {"rope_type": "default", "rope_theta": 500.0, **partial}}
    if family in ("gemma3_text", "olmo3") and dialect == "rope_parameters":
        change = {dialect: {"full_attention": change[dialect]}}
    config = {key: value for key, value in config_of(FIRST[family]).items() if not key.startswith(("rope_", "partial"))}
    if family in PARTIAL:
        spec = families.find(config).spec({**config, **change})
        assert spec.ropes[0].dims == spec.layer_kinds[0].attention.head_dim // 2
        return
    with pytest.raises(UnsupportedModel, match="partial_rotary_factor"):
        families.find(config).spec({**config, **change})


def test_an_unknown_family_is_told_those_there_are():
    with pytest.raises(UnsupportedModel, match="mamba") as caught:
        families.find({"model_type": "mamba"})
    assert "falcon" in caught.value.why
