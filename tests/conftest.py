"""What every test stands on."""

from __future__ import annotations

import signal

# A shell starts what runs in the background with interrupts ignored, and nohup does so with hangups; tests send both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
