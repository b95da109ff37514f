"""Checkpoints on the Hugging Face Hub, fetched into the Hub's own cache by its own library.

A name is no identity, so the revision is resolved to a commit once and every file comes from that commit. Token, cache
folder, endpoint, proxy and offline mode are the library's conventions (HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE).
Only the files that conversion reads are fetched: never code, never pickles.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars

from fgsnap.convert.folder import INDEX, SINGLE, TEXT_FILES, no_weights, shard_names
from fgsnap.convert.source import brief, read_json
from fgsnap.errors import HostError, NetworkError, NotFound, SourceError, UsageError


def fetch(repository: str, revision: str | None, *, config_only: bool) -> tuple[Path, str]:
    """Bring a checkpoint's files here; returns their folder in the cache and the commit they belong to."""
    if not sys.stderr.isatty():
        disable_progress_bars()
    with _errors(repository, revision):
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=["config.json"]))
        commit = folder.name
        if not config_only:
            _fetch_weights(repository, commit, folder)
    if not (folder / "config.json").is_file():
        raise SourceError(
            f"{repository} has no config.json at {commit[:12]}.",
            "It says what the weights compute; a repository of GGUF files only has none.",
            "Name the repository of the original checkpoint, or download a .gguf file and give its path.",
        )
    return folder, commit


def _fetch_weights(repository: str, commit: str, folder: Path) -> None:
    """Fetch text files and weights; offline, what the cache holds has to do."""
    try:
        files = HfApi().model_info(repository, revision=commit).siblings or []
    except OfflineModeIsEnabled:
        return
    names = {file.rfilename for file in files if "/" not in file.rfilename}
    wanted = [name for name in TEXT_FILES if name in names]
    if SINGLE in names:
        wanted.append(SINGLE)
    elif INDEX in names:
        _fetch(repository, commit, [INDEX])
        wanted += [INDEX, *_listed_shards(repository, folder, names)]
    elif "config.json" in names:
        raise no_weights(repository, names)
    _fetch(repository, commit, wanted)


def _listed_shards(repository: str, folder: Path, names: set[str]) -> list[str]:
    shards = shard_names(read_json(folder / INDEX), INDEX)
    absent = [shard for shard in shards if shard not in names]
    if absent:
        raise SourceError(
            f"{repository} lacks the shard {absent[0]}.",
            f"Its {INDEX} lists {len(shards)} shards, {len(absent)} of them absent.",
            "The repository is incomplete: try another revision, or tell its owner.",
        )
    return shards


def _fetch(repository: str, commit: str, names: list[str]) -> None:
    snapshot_download(repository, revision=commit, allow_patterns=names)


@contextmanager
def _errors(repository: str, revision: str | None) -> Iterator[None]:
    """The library's failures as ours: what is absent, what may work later, what this host lacks."""
    where = f"{repository}@{revision}" if revision else repository
    try:
        yield
    except HFValidationError as error:
        raise UsageError(f"{where!r} is not a Hub name.", f"{brief(error)}.", "Write org/name.") from error
    except RevisionNotFoundError as error:
        raise NotFound(
            f"{repository} has no revision {revision!r}.",
            "The Hub knows the repository, but no such branch, tag or commit.",
        ) from error
    except RepositoryNotFoundError as error:
        raise NotFound(
            f"The Hub has no {where}, or it is private or gated.",
            f"The answer was {error.response.status_code}.",
            "Check the name; for a private or gated model set HF_TOKEN to a token that may read it.",
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise _not_cached(where, error) from error
    except EntryNotFoundError as error:
        raise NotFound(f"{where} lacks a file that it lists.", f"{brief(error)}.", "Try again later.") from error
    except _TRANSPORT as error:
        raise _transport_error(where, error) from error


# The HTTP library under the Hub's has changed its name before (httpx, httpx2), so its base error is taken from there.
_TRANSPORT: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, RuntimeError)


def _not_cached(where: str, error: Exception) -> NotFound | NetworkError:
    """Offline, a file that is not in the cache does not exist; online, its absence only hides why the Hub failed."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return NotFound(
            f"{where} is not in the Hub cache, or not completely.",
            "HF_HUB_OFFLINE is set, so nothing is downloaded.",
            "Unset HF_HUB_OFFLINE, or run once with network.",
        )
    return _unreachable(where, error.__cause__ or error)


def _transport_error(where: str, error: Exception) -> NetworkError | NotFound | HostError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HostError(
            f"The disk is full while downloading {where}.",
            "The files go to the Hub cache (HF_HOME).",
            "Free some space, or set HF_HOME to a larger disk; the download resumes.",
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return NotFound(
            f"The Hub refused access to {where}.",
            f"The answer was {error.response.status_code}.",
            "Set HF_TOKEN to a token that may read it.",
        )
    return _unreachable(where, error)


def _unreachable(where: str, error: BaseException) -> NetworkError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return NetworkError(
        f"The Hub did not deliver {where}.",
        f"{reason[:160]}",
        "Run the same command again; finished files are kept. HF_HUB_OFFLINE=1 uses only what is cached.",
    )
