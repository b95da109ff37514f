"""``python -m fgsnap`` and the ``fgsnap`` command."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and leave with the exit code that the outcome deserves."""
    from fgsnap.cli import run_cli

    sys.exit(run_cli(sys.argv[1:]))


if __name__ == "__main__":
    main()
