"""Published checkpoints: their configs are read as their authors mean them, and the plans of some are kept."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

import fgsnap
from benchmarks.manifests import DEPLOYMENTS, MANIFESTS, manifests
from fgsnap.convert.families import FAMILIES, find
from fgsnap.convert.families.published import PLAIN, listing, parameter_count, published
from fgsnap.convert.plan import plan
from fgsnap.convert.rules import sources
from fgsnap.errors import SourceError
from fgsnap.layout import logical_shapes, possible_tp
from fgsnap.spec import features

CHECKPOINTS = {checkpoint.repo: checkpoint for checkpoint in published()}


@pytest.mark.parametrize("repo", CHECKPOINTS)
def test_a_published_config_is_planned_with_the_published_number_of_parameters(repo):
    checkpoint = CHECKPOINTS[repo]
    spec = checkpoint.spec()
    once = parameter_count(spec)
    # The Hub counts a tied head twice where the file holds it.
    twice = once + math.prod(logical_shapes(spec)["embed.weight"]) * spec.head.tied
    assert min(abs(once - checkpoint.parameters), abs(twice - checkpoint.parameters)) <= checkpoint.parameters / 100
    for tp in possible_tp(spec)[:2]:
        planned = plan(spec, tp, "bfloat16")
        assert len(planned.ranks) == tp and planned.bytes >= 2 * once


@pytest.mark.parametrize("model_type", FAMILIES)
def test_rules_take_every_parameter_of_the_smallest_checkpoint_once(model_type):
    own = [checkpoint for checkpoint in CHECKPOINTS.values() if checkpoint.model_type == model_type]
    if not own:
        assert model_type == "llama4_text", "published inside checkpoints that see"
        return
    spec = min(own, key=lambda checkpoint: checkpoint.parameters).spec()
    for rules in FAMILIES[model_type].rules:
        assert sum(map(math.prod, sources(rules(spec)).values())) == parameter_count(spec)


def test_the_corpus_covers_every_family():
    assert len(CHECKPOINTS) == len(published()) >= 60
    listed = listing()
    assert [row.model_type for row in listed] == sorted(FAMILIES)
    assert all(row.features and row.models for row in listed)
    assert {row.model_type for row in listed if not row.checkpoints} == {"llama4_text"}


def test_the_list_names_what_no_single_field_tells():
    needs = {row.model_type: row.needs for row in listing()}
    assert {name for name, text in needs.items() if "layers without rotation" in text} == {
        "exaone4", "llama4", "llama4_text", "smollm3",
    }  # fmt: skip
    assert {name for name, text in needs.items() if "a part of each head" in text} == {
        "glm", "glm4", "glm4_moe", "gpt_neox", "gptj", "phi", "phi3", "stablelm",
    }  # fmt: skip
    assert "rope.longrope" in needs["phi3"]


def test_a_plain_decoder_is_the_first_llama():
    assert features(CHECKPOINTS["huggyllama/llama-7b"].spec()) == PLAIN


FIRST_FALCON = {
    "alibi": False, "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "bias": False,
    "bos_token_id": 11, "eos_token_id": 11, "hidden_dropout": 0.0, "hidden_size": 4544, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "RefinedWebModel", "multi_query": True, "n_head": 71, "n_layer": 32,
    "parallel_attn": True, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 65024,
}  # fmt: skip
FIRST_FALCONS = {
    "tiiuae/falcon-7b": FIRST_FALCON,
    "tiiuae/falcon-40b": {
        **{key: value for key, value in FIRST_FALCON.items() if key != "multi_query"},
        "model_type": "RefinedWeb", "hidden_size": 8192, "n_head": 128, "n_head_kv": 8, "n_layer": 60,
    },
    "tiiuae/falcon-rw-1b": {
        **FIRST_FALCON, "alibi": True, "bias": True, "hidden_size": 2048, "multi_query": False, "n_head": 32,
        "n_layer": 24, "parallel_attn": False, "vocab_size": 50304,
    },
}  # fmt: skip


@pytest.mark.parametrize("repo", FIRST_FALCONS)
def test_falcon_as_it_was_first_published_is_what_it_is_now(repo):
    config = FIRST_FALCONS[repo]
    assert find(config).spec(config) == CHECKPOINTS[repo].spec()
    missing = [{name: value for name, value in config.items() if name != key} for key in ("n_head", "n_layer")]
    for damaged in (*missing, {**config, "num_hidden_layers": 2}, {**config, "n_head": -1}):
        with pytest.raises(SourceError, match=r"n_head|n_layer|num_hidden_layers"):
            find(config).spec(damaged)


def test_a_first_falcon_is_not_guessed_to_have_groups():
    config = FIRST_FALCONS["tiiuae/falcon-40b"]
    for refused in ({**config, "n_head_kv": None}, {**config, "model_type": "RefinedWebModel"}):
        with pytest.raises(SourceError, match="n_head_kv"):
            find(refused).spec(refused)


def test_the_kept_plans_are_what_is_planned():
    kept = {path.stem: path.read_text() for path in MANIFESTS.glob("*-tp*.json")}
    assert kept == manifests(), "run python benchmarks/manifests.py"


def test_falcon_180b_over_eight_ranks():
    """232 query heads and 8 key heads of 64: 29 and 1 a rank. An MLP of four times the width."""
    plan = json.loads((MANIFESTS / "falcon-180b-tp8.json").read_text())
    tensors = {row["name"]: row for row in plan["tensors_of_a_rank"]}
    qkv, down = tensors["layers.{layer}.qkv.weight"], tensors["layers.{layer}.down.weight"]
    assert (qkv["shape"], qkv["layers"], qkv["of"]) == ([(29 + 2) * 64, 14848], "0-79", "q k v")
    assert down["shape"] == [14848, 4 * 14848 // 8]
    assert plan["kv_bytes_per_token"] == 80 * 2 * 8 * 64 * 2 == 8 * plan["kv_bytes_per_token_of_a_rank"]
    assert 0 <= plan["bytes"] / (2 * plan["parameters"]) - 1 < 1e-3
    assert len(plan["ranks"]) == 8


def test_every_deployment_is_of_a_published_checkpoint():
    assert {deployment.repo for deployment in DEPLOYMENTS.values()} <= {*CHECKPOINTS}


def test_what_serves_knows_no_family_by_name():
    package = Path(fgsnap.__file__).parent
    every = (path for part in ("runtime", "kernels") for path in (package / part).rglob("*"))
    files = [path for path in every if path.suffix in (".py", ".cpp", ".h")]
    assert len(files) > 40
    for path in files:
        assert not {*re.findall(r"\w+", path.read_text().lower())} & {*FAMILIES}, path
