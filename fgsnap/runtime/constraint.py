"""What the engine needs of whoever makes grammars out of constraints, and follows them; ``grammars`` has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fgsnap.runtime.request import Constraint


class Matcher(Protocol):
    """The constraint of one answer, and how far the answer has come in it.

    Attributes:
        pending: it is not known yet what may come next.
        complete: nothing may come next but an end. As of the last mask.
        error: why the constraint cannot be followed any further; "" as long as it can.
        code: which kind of error, as request.Output has it.
    """

    @property
    def pending(self) -> bool: ...

    @property
    def complete(self) -> bool: ...

    @property
    def error(self) -> str: ...

    @property
    def code(self) -> str: ...

    def accept(self, token: int) -> None:
        """Take the answer's next token in. What may come after it is found out from the next ``flush`` on."""
        ...

    def mask(self) -> memoryview:
        """Which tokens may come next, as ops.Edits wants it, once it is not pending. None of them after an error."""
        ...

    def close(self) -> None:
        """Forget it: the answer has ended."""
        ...


class Grammars(Protocol):
    """Makes matchers."""

    def matcher(self, constraint: Constraint, *, open_end: bool) -> Matcher:
        """A matcher whose first mask is pending while the constraint is compiled.

        Args:
            open_end: end the answer only where it cannot go on, not where it may end.
        """
        ...

    def flush(self) -> None:
        """Have it found out what may come after the tokens that were accepted."""
        ...

    def hear(self) -> None:
        """Take in what has been found out, without waiting."""
        ...

    def wait(self, matchers: Sequence[Matcher], seconds: float) -> None:
        """Take in what is found out until none of these is pending, or so much time has passed."""
        ...

    def fileno(self) -> int:
        """What can be waited for until there is something to hear."""
        ...

    def close(self) -> None:
        """End whatever makes them."""
        ...
