"""Published checkpoints: their configs are read as their authors mean them, and the plans of some are kept."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

import fgsnap
from benchmarks.manifests import DEPLOYMENTS, MANIFESTS, manifests
from fgsnap.convert.families import FAMILIES
from fgsnap.convert.families.published import PLAIN, listing, parameter_count, published
from fgsnap.convert.plan import plan
from fgsnap.convert.rules import sources
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


def test_a_plain_decoder_is_the_first_llama():
    assert features(CHECKPOINTS["huggyllama/llama-7b"].spec()) == PLAIN


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
