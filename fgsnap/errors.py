"""Every error a user can meet, with its exit code.

    FgsnapError                      1  the work failed
    ├── UsageError                   2  the command was wrong
    ├── SourceError                  1  the checkpoint cannot be converted
    │   └── UnsupportedModel         1  ... because the spec cannot express it
    ├── SnapshotRefused              3  the snapshot is damaged, unfinished or too new
    ├── NotFound                     4  no such file, repository or snapshot
    ├── NetworkError                 5  a remote did not answer; the same command may succeed later
    ├── HostError                    6  this host cannot do it (memory, device, missing extra, port)
    └── RequestError                 1  one request is wrong; only that request ends (HTTP 4xx)

An error is three short lines: what went wrong, why, and what to do next. Errors that a file or a user can cause are
raised as one of these; ``assert`` is for what only fgsnap itself can cause.
"""

from __future__ import annotations


class FgsnapError(Exception):
    """A failure the user can act on.

    Args:
        what: what went wrong, naming the file, tensor, key or flag.
        why: the cause, with both sides of a mismatch.
        next_step: what the user can do now.
    """

    exit_code = 1

    def __init__(self, what: str, why: str = "", next_step: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.next_step = next_step

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """The error as at most three lines, without trailing blanks."""
        return [line for line in (self.what, self.why, self.next_step) if line]


class UsageError(FgsnapError):
    exit_code = 2


class SourceError(FgsnapError):
    """The checkpoint is damaged, inconsistent or in a form that cannot be read safely."""


class UnsupportedModel(SourceError):
    """The checkpoint is sound, but the decoder spec or the chosen backend cannot express it."""


class SnapshotRefused(FgsnapError):
    """The snapshot does not match its own digests, is unfinished, or needs a newer reader."""

    exit_code = 3


class NotFound(FgsnapError):
    exit_code = 4


class NetworkError(FgsnapError):
    exit_code = 5


class HostError(FgsnapError):
    """This host lacks what the command needs: memory, disk, a device, a free port or an optional package."""

    exit_code = 6


class RequestError(FgsnapError):
    """One request cannot be served; the service and every other request go on.

    Args:
        status: the HTTP status, 400 by default.
        param: the request field at fault, for the OpenAI error body.
        code: a machine-readable code for the OpenAI error body.
        allow: the methods that the route takes, of an error with status 405.
    """

    def __init__(
        self,
        what: str,
        why: str = "",
        next_step: str = "",
        *,
        status: int = 400,
        param: str = "",
        code: str = "",
        allow: str = "",
    ) -> None:
        super().__init__(what, why, next_step)
        self.status = status
        self.param = param
        self.code = code
        self.allow = allow


def missing_extra(package: str, extra: str, purpose: str) -> HostError:
    """The error for an optional package that is not installed."""
    return HostError(
        f"{purpose} needs the package {package}, which is not installed.",
        f"fgsnap installs it with the extra '{extra}'.",
        f"Run: pip install 'fgsnap[{extra}]'",
    )
