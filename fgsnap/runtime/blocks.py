"""Who holds which blocks of the KV cache, and what is in those that nobody holds: integers and digests only.

Progress is proven here. A sequence is admitted by promising it the most blocks it can still need, and draws them as it
grows; so what runs never waits for another. A block that is full of known tokens can be found again: its digest is that
of its tokens and of all before them, keyed with a secret of the process, so nobody can aim for a block of another's
text. Blocks without a user keep what they hold until they are needed, the least recently used first.
"""

from __future__ import annotations

import os
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from fgsnap.kernels.ops import BlockTable

DIGEST_BYTES = 16
"""Two texts share a digest by chance once in 2^64 pairs, and nobody can search for them without the key."""


class BlockPool:
    """A fixed number of KV blocks of ``block_size`` tokens each.

    ``caching`` False forgets what a block holds when its last user lets go of it.
    """

    def __init__(self, blocks: int, block_size: int, *, caching: bool = True) -> None:
        assert blocks > 0 and block_size > 0
        self.blocks = blocks
        self.block_size = block_size
        self.caching = caching
        self._key = os.urandom(32)
        # A stack, lowest index on top: a lightly loaded engine keeps reusing the same, warm, memory.
        self._free = list(range(blocks - 1, -1, -1))
        self._users = [0] * blocks
        self._digests: list[bytes | None] = [None] * blocks
        self._found: dict[bytes, int] = {}
        # Blocks without users that hold known tokens, the longest unused first. A dict would look for its first entry
        # among all that were taken from its front.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._promised = 0

    @property
    def available(self) -> int:
        """Blocks that nobody uses and nobody has been promised."""
        return len(self._free) + len(self._idle) - self._promised

    def needed(self, tokens: int) -> int:
        """How many blocks hold ``tokens`` tokens."""
        return -(-tokens // self.block_size)

    def root(self, salt: str) -> bytes:
        """The digest of no tokens; texts under different salts share nothing."""
        return blake2b(salt.encode(), digest_size=DIGEST_BYTES, key=self._key, person=b"root").digest()

    def digests(self, parent: bytes, tokens: Sequence[int], start: int, stop: int) -> list[bytes]:
        """The digests of the blocks ``start`` to ``stop`` of a text, of which ``parent`` is that of the one before."""
        data, step = array("I", tokens[start * self.block_size : stop * self.block_size]).tobytes(), 4 * self.block_size
        found = []
        for at in range(0, (stop - start) * step, step):
            parent = blake2b(parent + data[at : at + step], digest_size=DIGEST_BYTES, key=self._key).digest()
            found.append(parent)
        return found

    def holds(self, digest: bytes) -> bool:
        """Whether a block with this digest can be shared."""
        return digest in self._found

    def take(self, digests: Sequence[bytes], blocks: int) -> BlockTable | None:
        """The blocks that hold a text's beginning, with a promise of those that are missing to ``blocks``.

        None, and nothing is taken, where so many are not available now.
        """
        shared = BlockTable()
        for digest in digests:
            if (block := self._found.get(digest)) is None:
                break
            shared.append(block)
        idle = sum(not self._users[block] for block in shared)
        if blocks - len(shared) > self.available - idle:
            return None
        for block in shared:
            self._users[block] += 1
            self._idle.pop(block, None)
        self._promised += blocks - len(shared)
        return shared

    def draw(self) -> int:
        """One of the promised blocks."""
        self._promised -= 1
        assert self._promised >= 0, "a sequence outgrew what it was promised"
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        self._users[block] = 1
        return block

    def promise(self, blocks: int) -> bool:
        """Promise more blocks, or say that they are not available."""
        if blocks > self.available:
            return False
        self._promised += blocks
        return True

    def note(self, block: int, digest: bytes) -> None:
        """Say what a full block holds, so that others find it. Of two that hold the same, the first is found."""
        if self.caching and digest not in self._found and self._digests[block] is None:
            self._digests[block] = digest
            self._found[digest] = block

    def release(self, table: BlockTable, promised: int) -> None:
        """Take back a table, and what was promised and not drawn. The end of a text is forgotten before its start."""
        self._promised -= promised
        for block in reversed(table):
            self._users[block] -= 1
            if self._users[block]:
                continue
            if self._digests[block] is None:
                self._free.append(block)
            else:
                self._idle[block] = None

    def discard(self, table: Sequence[int]) -> None:
        """Let nobody find these blocks any more: what they hold cannot be trusted."""
        for block in table:
            self._forget(block)

    def _forget(self, block: int) -> None:
        digest = self._digests[block]
        if digest is not None:
            self._digests[block] = None
            del self._found[digest]
            if block in self._idle:
                del self._idle[block]
                self._free.append(block)
