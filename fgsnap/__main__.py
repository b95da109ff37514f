"""``python -m fgsnap`` and the ``fgsnap`` command."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and leave with the exit code that the outcome deserves."""
    # Until the command line can say so itself, Ctrl-C just ends the process.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fgsnap.cli import run_cli

    signal.signal(signal.SIGINT, handler)
    sys.exit(run_cli(sys.argv[1:]))


if __name__ == "__main__":
    main()
