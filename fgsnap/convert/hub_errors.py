"""The Hub library's failures as ours: what is absent, what may work later, what this host lacks."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fgsnap.convert.source import brief
from fgsnap.errors import HostError, NetworkError, NotFound, UsageError

# The HTTP library under the Hub's has changed its name before (httpx, httpx2), so its base error is taken from there.
HTTP_ERRORS: tuple[type[Exception], ...] = HfHubHTTPError.__bases__
FAILURES: tuple[type[Exception], ...] = (*HTTP_ERRORS, RuntimeError)


@contextmanager
def hub_errors(repository: str, revision: str | None) -> Iterator[None]:
    """Raise what the library raises in the block as an error of ours."""
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
    except FAILURES as error:
        raise _transport_error(where, error) from error


def _not_cached(where: str, error: Exception) -> NotFound | NetworkError:
    """Offline, a file that is not in the cache does not exist; online, its absence only hides why the Hub failed."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return NotFound(
            f"{where} is not in the Hub cache, or not completely.",
            "HF_HUB_OFFLINE is set, so nothing is downloaded.",
            "Unset HF_HUB_OFFLINE, or run once with network.",
        )
    return unreachable(where, error.__cause__ or error)


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
    return unreachable(where, error)


_AGAIN = "Run the same command again; finished files are kept. HF_HUB_OFFLINE=1 uses only what is cached."


def unreachable(where: str, error: BaseException | str, next_step: str = _AGAIN) -> NetworkError:
    """The error for bytes that did not come, whose cause may be gone when they are asked for again."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return NetworkError(f"The Hub did not deliver {where}.", f"{reason[:160]}", next_step)
