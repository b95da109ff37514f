"""Where the libraries lie that were compiled when fgsnap was installed."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def built_library(name: str, package: str, switch: str) -> Path | None:
    """The file ``name`` of a package, or None where it was not built. In an editable install a package has two folders.

    A development switch comes first: the environment variable ``switch`` names another build, such as that of
    ``make sanitize``.
    """
    if chosen := os.environ.get(switch):
        return Path(chosen)
    folders = map(Path, sys.modules[package].__path__)
    return next((folder / name for folder in folders if (folder / name).is_file()), None)
