"""Whether a text has more tokens than there is room for, found out without tokenizing much more of it than that.

Tokenizing takes a second for every one or two megabytes, of which a context holds a small part. So a text that is long
beside the room is judged by its length, where that tells, and else counted piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

PIECE = 1 << 12  # characters, a few milliseconds' work
SEAM = 1 << 8  # characters at the end of a piece among which a space is looked for, to cut there
CUT_TOKENS = 16  # by which a cut may raise the count: of a word, a number, a special token in two, with a BOS each
DENSE = 8  # characters a token that few texts have; below, a text that is too long is found out by tokenizing it


def tokens_beyond(
    text: str,
    most: int,
    least_tokens: Callable[[str], int],
    encode: Callable[[str], list[int]],
    go_on: Callable[[], object] = lambda: None,
) -> int:
    """How many tokens a text that has more than ``most`` has at least; 0 where it is to be tokenized to find out.

    Args:
        text: the text.
        most: tokens that there is room for.
        least_tokens: how many tokens a text has at least, by its length.
        encode: the tokens of a text.
        go_on: called before each piece; what it raises ends the counting.
    """
    if len(text) <= DENSE * most:
        return 0
    least = least_tokens(text)
    if least <= most:
        least = _counted(text, most, encode, go_on)
    return least if least > most else 0


def _counted(text: str, most: int, encode: Callable[[str], list[int]], go_on: Callable[[], object]) -> int:
    """How many tokens the text has at least, as far as it was counted: until they are more than ``most``."""
    counted = 0
    for cuts, piece in enumerate(pieces(text)):
        go_on()
        counted += len(encode(piece)) - (CUT_TOKENS if cuts else 0)
        if counted > most:
            break
    return counted


def pieces(text: str) -> Iterator[str]:
    """The text in pieces, cut before a space or a line's end where one is near."""
    start = 0
    while len(text) - start > PIECE:
        end = start + PIECE
        near = max(text.rfind(space, end - SEAM, end) for space in " \n")
        end = near if near > start else end
        yield text[start:end]
        start = end
    yield text[start:]
