"""Hub names against a real HTTP server on loopback, each in a fresh process.

The library reads its environment once, at import, so a process is what a setting lasts.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

from fgsnap.convert.opening import open_source
from fgsnap.convert.source import MAX_TEXT_BYTES
from fgsnap.errors import UsageError
from tests.convert.checkpoints import CONFIG, float_file
from tests.convert.hub_server import Hub, serving

OPEN = """
import json, sys
from fgsnap.convert.opening import open_source
from fgsnap.errors import FgsnapError
name, revision, config_only, download = json.loads(sys.argv[1])
try:
    source = open_source(name, revision, config_only=config_only, download=download)
    tensors = {name: source.rows(name, 0, t.shape[0]).tolist() for name, t in source.tensors.items()}
    print(json.dumps({"label": source.label, "revision": source.revision, "config": source.config, "tensors": tensors,
                      "digests": source.file_digests(lambda: None), "texts": sorted(source.text_files())}))
except FgsnapError as error:
    print(json.dumps({"error": type(error).__name__, "code": error.exit_code, "lines": error.lines()}))
"""
ROOT = Path(__file__).parents[2]
SHARDS = {
    "model-00001-of-00002.safetensors": float_file(a=[1.0]),
    "model-00002-of-00002.safetensors": float_file(b=[2.0]),
}
INDEX = json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}).encode()
MODEL = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": float_file(a=[1.0, 2.0])}


@pytest.fixture
def hub():
    with serving() as hub:
        yield hub


class Reader:
    """Opens sources in fresh processes that share one Hub cache."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def __call__(
        self,
        hub: Hub,
        name: str,
        revision: str | None = None,
        *,
        plan: bool = False,
        download: bool = False,
        **env: str,
    ) -> Any:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        settings = {"HF_HOME": str(self.home), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1", **env}
        command = [sys.executable, "-W", "error", "-c", OPEN, json.dumps([name, revision, plan, download])]
        done = subprocess.run(command, env=inherited | settings, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def read(tmp_path: Path) -> Reader:
    return Reader(tmp_path / "hf")


@pytest.mark.parametrize("download", [False, True])
def test_a_branch_is_resolved_to_its_commit_once(hub: Hub, read: Reader, download: bool) -> None:
    sha = hub.commit("org/tiny", {**MODEL, "tokenizer.json": b"{}", "README.md": b"x", "train.py": b"x", "a.bin": b"x"})
    found = read(hub, "org/tiny", download=download)
    assert (found["label"], found["revision"]) == ("org/tiny", sha)
    assert found["config"] == CONFIG
    assert found["tensors"] == {"a": [1.0, 2.0]}
    assert found["texts"] == ["config.json", "tokenizer.json"]
    assert sorted(hub.downloads()) == sorted(["config.json", *["model.safetensors"] * download, "tokenizer.json"])
    assert all(f"/resolve/{sha}/" in path for _, path, _ in hub.requests if "/resolve/" in path)


def test_a_revision_in_the_name_or_beside_it(hub: Hub, read: Reader) -> None:
    old = hub.commit("org/tiny", {**MODEL, "model.safetensors": float_file(a=[7.0])}, ref="v1")
    new = hub.commit("org/tiny", MODEL)
    assert read(hub, "hf://org/tiny@v1")["revision"] == old
    assert read(hub, "org/tiny", "v1")["tensors"] == {"a": [7.0]}
    assert read(hub, f"hf://org/tiny@{old}")["tensors"] == {"a": [7.0]}
    assert read(hub, "hf://org/tiny")["revision"] == new
    clash = read(hub, "hf://org/tiny@v1", "main")
    assert (clash["error"], clash["code"]) == ("UsageError", 2)


@pytest.mark.parametrize("download", [False, True])
def test_shards_come_by_their_index_and_no_other_file_comes(hub: Hub, read: Reader, download: bool) -> None:
    extra = {"consolidated.safetensors": float_file(z=[0.0]), "original/model.safetensors": float_file(z=[0.0])}
    hub.commit(
        "org/big", {"config.json": MODEL["config.json"], "model.safetensors.index.json": INDEX, **SHARDS, **extra}
    )
    found = read(hub, "org/big", download=download)
    assert found["tensors"] == {"a": [1.0], "b": [2.0]}
    whole = SHARDS if download else ()
    assert sorted(hub.downloads()) == sorted(["config.json", "model.safetensors.index.json", *whole])
    assert {served.file for served in hub.served} == set(() if download else SHARDS)


def test_a_plan_fetches_only_the_config(hub: Hub, read: Reader) -> None:
    hub.commit("org/tiny", {**MODEL, "tokenizer.json": b"{}"})
    found = read(hub, "org/tiny", plan=True)
    assert found["config"] == CONFIG
    assert found["tensors"] == {}
    assert hub.downloads() == ["config.json"]


@pytest.mark.parametrize("plan", [False, True])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_small_file_that_is_large_does_not_come(hub: Hub, read: Reader, file: str, plan: bool) -> None:
    hub.commit("org/large", {**MODEL, file: b"x" * (MAX_TEXT_BYTES + 1)})
    error = read(hub, "org/large", plan=plan)
    assert (error["error"], error["code"], len(error["lines"])) == ("SourceError", 1, 3)
    assert file in error["lines"][0] and not hub.downloads()


def test_a_model_that_cannot_be_converted_fetches_only_the_config(hub: Hub, tmp_path: Path) -> None:
    hub.commit("org/new", {**MODEL, "config.json": b'{"model_type": "new"}', "tokenizer.json": b"{}"})
    settings = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "fgsnap", "convert", "org/new", "--download", "--no-canary", "-o", "snap"]
    environment = {**settings, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "The model type 'new' is not supported." in done.stderr
    assert hub.downloads() == ["config.json"] and not hub.served


def test_offline_reads_the_cache_without_a_request(hub: Hub, read: Reader) -> None:
    sha = hub.commit("org/tiny", MODEL)
    online = read(hub, "org/tiny", download=True)
    hub.requests.clear()
    assert read(hub, "org/tiny", HF_HUB_OFFLINE="1") == online
    assert read(hub, f"hf://org/tiny@{sha}", HF_HUB_OFFLINE="1")["revision"] == sha
    missing = read(hub, "org/other", HF_HUB_OFFLINE="1")
    assert (missing["error"], missing["code"]) == ("NotFound", 4)
    assert "HF_HUB_OFFLINE" in missing["lines"][1]
    assert hub.requests == []


def test_offline_with_half_a_checkpoint_is_refused(hub: Hub, read: Reader) -> None:
    hub.commit("org/tiny", MODEL)
    read(hub, "org/tiny", plan=True)
    half = read(hub, "org/tiny", HF_HUB_OFFLINE="1")
    assert half["code"] in (1, 4)
    assert "tensors" not in half


def test_the_token_is_sent_and_a_private_model_needs_it(hub: Hub, read: Reader) -> None:
    hub.commit("org/secret", MODEL)
    hub.private["org/secret"] = "hf_test_token"
    refused = read(hub, "org/secret")
    assert (refused["error"], refused["code"]) == ("NotFound", 4)
    assert "HF_TOKEN" in refused["lines"][2]
    hub.requests.clear()
    assert read(hub, "org/secret", HF_TOKEN="hf_test_token")["tensors"] == {"a": [1.0, 2.0]}
    assert {token for _, _, token in hub.requests} == {"Bearer hf_test_token"}
    assert {token for _, _, token in hub.storage_requests} == {None}


@pytest.mark.parametrize(("name", "words"), [("org/none", "org/none"), ("hf://org/tiny@v9", "'v9'")])
def test_what_the_hub_does_not_have_is_not_found(hub: Hub, read: Reader, name: str, words: str) -> None:
    hub.commit("org/tiny", MODEL)
    error = read(hub, name)
    assert (error["error"], error["code"]) == ("NotFound", 4)
    assert words in error["lines"][0]


def test_a_hub_that_fails_or_is_down_is_a_network_error(hub: Hub, read: Reader) -> None:
    hub.commit("org/tiny", MODEL)
    hub.failing = True
    failing = read(hub, "org/tiny")
    assert (failing["error"], failing["code"]) == ("NetworkError", 5)
    with serving() as gone:
        pass
    down = read(gone, "org/tiny")
    assert (down["error"], down["code"]) == ("NetworkError", 5)
    assert "again" in down["lines"][2]


def test_a_hub_that_is_down_is_no_reason_to_use_an_old_commit_silently(read: Reader) -> None:
    with serving() as hub:
        hub.commit("org/tiny", MODEL)
        read(hub, "org/tiny", download=True)
    error = read(hub, "org/tiny")
    assert (error["error"], error["code"]) == ("NetworkError", 5)
    assert "HF_HUB_OFFLINE=1" in error["lines"][2]
    assert read(hub, "org/tiny", HF_HUB_OFFLINE="1")["tensors"] == {"a": [1.0, 2.0]}


def state_dict(**tensors: list[float]) -> bytes:
    file = io.BytesIO()
    torch.save({name: torch.tensor(values) for name, values in tensors.items()}, file)
    return file.getvalue()


@pytest.mark.parametrize("download", [False, True])
def test_a_repository_with_pytorch_files_only(hub: Hub, read: Reader, download: bool) -> None:
    """By ranges, headers of the archive's entries included; as one file, or as shards with their index."""
    config = MODEL["config.json"]
    hub.commit("org/old", {"config.json": config, "pytorch_model.bin": state_dict(a=[1.0, 2.0], b=[3.0])})
    assert read(hub, "org/old", download=download)["tensors"] == {"a": [1.0, 2.0], "b": [3.0]}
    shards = {"pytorch_model-1.bin": state_dict(a=[1.0]), "pytorch_model-2.bin": state_dict(b=[2.0])}
    index = {"pytorch_model.bin.index.json": json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}).encode()}
    hub.commit("org/shards", {"config.json": config, **index, **shards})
    found = read(hub, "org/shards", download=download)
    assert found["tensors"] == {"a": [1.0], "b": [2.0]}
    assert sorted(found["digests"]) == sorted(["config.json", *index, *shards])
    hub.commit("org/both", {**MODEL, "pytorch_model.bin": state_dict(a=[9.0])})
    assert read(hub, "org/both", download=download)["tensors"] == {"a": [1.0, 2.0]}


def test_weights_of_no_known_name_and_gguf_are_refused_before_anything_is_downloaded(hub: Hub, read: Reader) -> None:
    hub.commit("org/old", {"config.json": MODEL["config.json"], "weights.pt": b"x"})
    unknown = read(hub, "org/old")
    assert unknown["error"] == "SourceError"
    assert "weights.pt" in unknown["lines"][0]
    assert "safetensors" in unknown["lines"][2]
    hub.commit("org/quant", {"model.gguf": b"x"})
    assert "config.json" in read(hub, "org/quant")["lines"][0]
    assert hub.downloads() == ["config.json"]


def test_a_repository_that_lacks_a_listed_shard_is_refused_by_its_name(hub: Hub, read: Reader) -> None:
    first = next(iter(SHARDS))
    hub.commit("org/big", {**MODEL, "model.safetensors.index.json": INDEX, first: SHARDS[first]})
    del hub.commits["org/big"][hub.refs["org/big"]["main"]]["model.safetensors"]
    error = read(hub, "org/big")
    assert error["error"] == "SourceError"
    assert "model-00002-of-00002.safetensors" in error["lines"][0]


def test_digests_are_those_by_which_the_hub_knows_the_weights(hub: Hub, read: Reader) -> None:
    hub.commit("org/tiny", MODEL)
    weights = "sha256:" + hashlib.sha256(MODEL["model.safetensors"]).hexdigest()
    wanted = {"config.json": blake3(MODEL["config.json"]).hexdigest(), "model.safetensors": weights}
    assert read(hub, "org/tiny")["digests"] == wanted
    assert read(hub, "org/tiny", download=True)["digests"] == wanted


@pytest.mark.parametrize("name", ["hf://", "hf://org", "hf://org/../x", "hf://org/a/b", "hf://-x/y", "hf://org/a--b"])
def test_bad_hub_names_are_usage_errors(name: str) -> None:
    with pytest.raises(UsageError, match="is not a Hub name"):
        open_source(name)


def test_what_the_cache_holds_is_read_there(hub: Hub, read: Reader) -> None:
    hub.commit("org/big", {"config.json": MODEL["config.json"], "model.safetensors.index.json": INDEX, **SHARDS})
    before = read(hub, "org/big", download=True)
    hub.served.clear()
    assert read(hub, "org/big") == before
    assert not hub.served


def test_a_file_in_the_cache_that_is_not_what_it_was_is_refused(hub: Hub, read: Reader) -> None:
    hub.commit("org/tiny", MODEL)
    read(hub, "org/tiny", download=True)
    cached = next(read.home.rglob("model.safetensors")).resolve()
    cached.write_bytes(cached.read_bytes()[:-4] + b"\0\0\0\0")
    error = read(hub, "org/tiny")
    assert error["error"] == "SourceError" and "damaged" in error["lines"][0]


def test_weights_that_the_hub_names_no_sha256_of_are_downloaded(hub: Hub, read: Reader) -> None:
    hub.without_sha256.add("model.safetensors")
    hub.commit("org/tiny", MODEL)
    found = read(hub, "org/tiny")
    assert found["tensors"] == {"a": [1.0, 2.0]} and not hub.served
    assert found["digests"]["model.safetensors"] == "sha256:" + hashlib.sha256(MODEL["model.safetensors"]).hexdigest()
