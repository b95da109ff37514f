"""Checkpoints on the Hugging Face Hub: small files in the Hub's own cache, weights read by ranges or from there.

A name is no identity, so the revision is resolved to a commit once and every file comes from that commit. Token, cache
folder, endpoint, proxy and offline mode are the library's conventions (HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE).
Only the files that conversion reads are fetched: never code, and PyTorch's files only where there is nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, hf_hub_url, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars

from fgsnap.convert.folder import INDICES, TEXT_FILES, no_weights, shard_names, weights_file
from fgsnap.convert.hub_errors import hub_errors
from fgsnap.convert.ranges import HubFile, HubFiles
from fgsnap.convert.source import read_json, refuse_large_text
from fgsnap.errors import SourceError


class Fetched(NamedTuple):
    """A checkpoint's commit, the folder in the cache that holds its small files, and what reads its weights."""

    folder: Path
    commit: str
    files: HubFiles


def fetch(repository: str, revision: str | None, *, config_only: bool, download: bool) -> Fetched:
    """Bring a checkpoint's small files here, and make its weights readable.

    Args:
        repository: ``org/name``.
        revision: branch, tag or commit; None: the default branch.
        config_only: no more than config.json is needed.
        download: bring the weights into the cache, too, instead of reading by ranges what it does not hold.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    with hub_errors(repository, revision):
        _listed(repository, revision)  # which refuses what is too large to come
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=["config.json"]))
        commit = folder.name
        remote = {} if config_only else _fetch_rest(repository, commit, folder, download)
    if not (folder / "config.json").is_file():
        raise SourceError(
            f"{repository} has no config.json at {commit[:12]}.",
            "It says what the weights compute; a repository of GGUF files only has none.",
            "Name the repository of the original checkpoint, or download a .gguf file and give its path.",
        )
    return Fetched(folder, commit, HubFiles(repository, folder, remote))


def _listed(repository: str, revision: str | None) -> dict[str, Any] | None:
    """The files by name, none of the small ones larger than any that is read. None when offline."""
    try:
        files = HfApi().model_info(repository, revision=revision, files_metadata=True).siblings or []
    except OfflineModeIsEnabled:
        return None
    listed = {file.rfilename: file for file in files if "/" not in file.rfilename}
    for name in (*TEXT_FILES, *INDICES):
        if name in listed:
            refuse_large_text(name, listed[name].size or 0)
    return listed


def _fetch_rest(repository: str, commit: str, folder: Path, download: bool) -> dict[str, HubFile]:
    """Fetch all but the weights; returns those to read by ranges. Offline, what the cache holds has to do."""
    listed = _listed(repository, commit)
    if listed is None:
        return {}
    wanted = [name for name in TEXT_FILES if name in listed]
    found = weights_file(listed.__contains__)
    if found is None and "config.json" in listed:
        raise no_weights(repository, listed)
    weights = [] if found is None else [found]
    if found in INDICES:
        _fetch(repository, commit, weights)
        weights = _listed_shards(repository, folder, found, listed)
    remote = {} if download else {
        name: HubFile(hf_hub_url(repository, name, revision=commit), listed[name].lfs.size, listed[name].lfs.sha256)
        for name in weights
        if listed[name].lfs and not (folder / name).exists()
    }  # fmt: skip
    _fetch(repository, commit, [*wanted, *(name for name in weights if name not in remote)])
    return remote


def _listed_shards(repository: str, folder: Path, index: str, listed: dict[str, Any]) -> list[str]:
    shards = shard_names(read_json(folder / index), index)
    absent = [shard for shard in shards if shard not in listed]
    if absent:
        raise SourceError(
            f"{repository} lacks the shard {absent[0]}.",
            f"Its {index} lists {len(shards)} shards, {len(absent)} of them absent.",
            "The repository is incomplete: try another revision, or tell its owner.",
        )
    return shards


def _fetch(repository: str, commit: str, names: list[str]) -> None:
    snapshot_download(repository, revision=commit, allow_patterns=names)
