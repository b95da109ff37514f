"""Which reader a checkpoint needs, by what its name says: a folder, a ``.gguf`` file, or a repository on the Hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgsnap.convert.source import LOCAL, Source, parse_json, read_text
from fgsnap.errors import NotFound, SourceError, UsageError, missing_extra

if TYPE_CHECKING:
    from fgsnap.convert.files import Files

Check = Callable[[dict[str, Any]], object]

HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def open_source(
    name: str,
    revision: str | None = None,
    *,
    config_only: bool = False,
    download: bool = False,
    check: Check | None = None,
) -> Source:
    """Open a checkpoint by path or Hub name.

    Args:
        name: a folder, a ``.gguf`` file, ``org/name``, or ``hf://org/name@revision``.
        revision: branch, tag or commit on the Hub.
        config_only: read config.json and no weights (a plan needs no more).
        download: keep a Hub repository's weights in the Hub's cache; else those that are not there are read by ranges.
        check: called with what config.json says before weights are looked for or fetched; raises what is wrong with it.
    """
    if name.startswith("hf://"):
        return _open_hub(name.removeprefix("hf://"), revision, config_only, download, check)
    if not name or not _exists(Path(name)):
        if HUB_NAME.fullmatch(name.partition("@")[0]) and not name.endswith(".gguf"):
            return _open_hub(name, revision, config_only, download, check)
        if name.endswith(".gguf"):
            raise NotFound(f"The file {name!r} does not exist.", "Nothing of that name is there.", "Check the path.")
        raise NotFound(
            f"There is no checkpoint {name!r}.",
            "It is neither a folder, a .gguf file nor a Hub name (org/name).",
            "Check the path, or write hf://org/name for a Hub repository.",
        )
    if revision is not None:
        raise UsageError("--revision was given for a local checkpoint.", f"{name!r} exists here.", "Leave it out.")
    path = Path(name)
    if (path / "snapshot.json").exists():
        raise UsageError(
            f"{name!r} is a snapshot already.",
            "It was converted before.",
            "Serve it, or turn it back into a checkpoint with 'fgsnap export'.",
        )
    try:
        if not path.is_dir():
            return _open_file(path)
        if (path / "config.json").is_file():
            parse_json(read_text(path / "config.json"), str(path / "config.json"))  # its reader does not say which
        if check is not None:
            _check_config(path, check)
        return _open_folder(path, LOCAL, None, config_only)
    except OSError as error:
        raise SourceError(f"The checkpoint {name!r} cannot be read.", f"{error.strerror or error}.") from error


def _exists(path: Path) -> bool:
    """Whether something is there; a name that no file system takes is not there."""
    try:
        return path.exists()
    except OSError:
        return False


def _open_file(path: Path) -> Source:
    """A GGUF file; nothing else is a whole checkpoint in one file."""
    if not path.is_file() or (path.suffix != ".gguf" and not _starts_with(path, b"GGUF")):
        raise UsageError(
            f"{str(path)!r} is not a checkpoint.",
            "A single file has to be GGUF; any other checkpoint is a folder with its config.json.",
            "Give the folder that holds the file.",
        )
    _require("numpy", "gguf")
    from fgsnap.convert.gguf import Gguf

    return Gguf(path)


def _open_hub(name: str, revision: str | None, config_only: bool, download: bool, check: Check | None) -> Source:
    """Fetch what is small into the Hub's own cache, at one commit, and open that folder."""
    repository, _, pinned = name.partition("@")
    if not HUB_NAME.fullmatch(repository):
        raise UsageError(f"{name!r} is not a Hub name.", "A Hub name is org/name or org/name@revision.")
    if pinned and revision is not None and pinned != revision:
        raise UsageError(
            f"Two revisions were given for {repository}.", f"{pinned!r} in the name, {revision!r} in --revision."
        )
    _require("huggingface_hub")
    from fgsnap.convert import hub

    asked, early = revision or pinned or None, config_only or check is not None
    folder, commit, files = hub.fetch(repository, asked, config_only=early, download=download)
    if check is not None:
        _check_config(folder, check)
    if early and not config_only:
        folder, commit, files = hub.fetch(repository, commit, config_only=False, download=download)
    return _open_folder(folder, repository, commit, config_only, files)


def _check_config(path: Path, check: Check) -> None:
    with closing(_open_folder(path, LOCAL, None, config_only=True)) as source:
        check(source.config)


def _open_folder(path: Path, label: str, revision: str | None, config_only: bool, files: Files | None = None) -> Source:
    _require("numpy")
    from fgsnap.convert.dequantised import dequantised
    from fgsnap.convert.folder import Folder

    return dequantised(Folder(path, label=label, revision=revision, config_only=config_only, files=files))


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _require(*packages: str) -> None:
    """Conversion's own packages come with an extra; say so instead of failing on an import later."""
    from importlib.util import find_spec

    for package in packages:
        if find_spec(package) is None:
            raise missing_extra(package, "convert", "Conversion")
