"""``python -m fgsnap`` and the ``fgsnap`` command."""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and leave with the exit code that the outcome deserves."""
    # Until the command line can say so itself, Ctrl-C just ends the process.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    # What is imported stays. Looking for garbage in it, again and again while it grows, takes a tenth of the time.
    gc.disable()
    begun = None
    if sys.argv[1:2] == ["serve"]:  # its second process has things to do while this one reads the command line
        from fgsnap.runtime import launch, torchrun

        with contextlib.suppress(OSError):  # it is tried again where errors are told
            begun = None if torchrun.follows() else launch.begin()
    from fgsnap.cli import run_cli

    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGINT, handler)
    sys.exit(run_cli(sys.argv[1:], begun))


if __name__ == "__main__":
    main()
