"""DeepSpeed-FastGen's scheduling rules, re-created over a model that only counts tokens.

Written anew from what these files do, not copied: DeepSpeed-MII at 8abdd98 (2025-07-01, its last commit),
``mii/batching/ragged_batching.py`` (``generate``, ``schedule_requests``, ``_schedule_token_gen``,
``_schedule_prompts``, ``reset_request_status``) and ``mii/batching/data_classes.py``; DeepSpeed,
``deepspeed/inference/v2/model_implementations/inference_transformer_base.py`` (``get_kv_requirements``,
``get_remaining_block_capacity``). The rules:

- Nothing is reserved. Who generates goes first: with room in its last block at once, else with a free block, else it
  waits.
- Prompts follow in the order of the buffer, until no block is free. One whose whole rest does not fit the free blocks
  ends the search, for all behind it too. Of the first that fits, as much is taken as the budget has left; its rest goes
  to the front of the buffer.
- Where nothing can be scheduled, the last in the buffer that holds blocks loses them, and goes to the end of the buffer
  as a prompt of all its tokens. Where nobody there holds any, an assertion fails, and the thread that schedules ends.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


class Dead(Exception):
    """The assertion failed: the scheduler's thread has ended, and nobody is answered any more."""


@dataclass
class Job:
    """A request.

    Attributes:
        prompt, most: tokens of its prompt, and of the answer that is still wanted of it.
        new: tokens that it forwards next.
        seen: tokens that it has in the cache.
        last: whether the next forward gives a token.
        answered: tokens of the answer since it last began anew.
    """

    name: int
    prompt: int
    most: int
    new: int
    seen: int = 0
    last: bool = True
    answered: int = 0

    @property
    def generated(self) -> int:
        return self.seen - self.prompt + 1 if self.seen >= self.prompt else 0


class FastGen:
    """The scheduler and its cache.

    Args:
        blocks, block_size: of the KV cache.
        budget: most tokens of a forward (max_ragged_batch_size).
        most_sequences: most sequences of a forward (max_ragged_sequence_count).
        flush_at_once: give back the blocks of who has finished before the next forward is scheduled. The original does
            so one step later, and sometimes finds nothing to schedule meanwhile.
    """

    def __init__(self, blocks: int, block_size: int, budget: int, most_sequences: int, *, flush_at_once: bool) -> None:
        self.free = blocks
        self.evictions = 0
        self.forwarded = 0
        self.answered = 0
        self.finished: list[int] = []
        self._block_size = block_size
        self._budget = budget
        self._most_sequences = most_sequences
        self._flush_at_once = flush_at_once
        self._held: dict[int, int] = {}  # blocks by request
        self._buffer: deque[Job] = deque()
        self._queue: list[Job] = []
        self._scheduled: list[Job] = []
        self._flush: list[int] = []  # requests whose blocks the next step gives back
        self._flush_later: list[int] = []

    def submit(self, name: int, prompt: int, most: int) -> None:
        self._queue.append(Job(name, prompt, most, prompt))

    def step(self) -> None:
        """One forward, and the schedule of the next one. Dead: it can never go on."""
        for name in self._flush:
            self.free += self._held.pop(name, 0)
        self._flush, self._flush_later = self._flush_later, []
        running = self._scheduled
        for job in running:
            self._allocate(job)
            job.seen += job.new
            self.forwarded += job.new
        for job in running:
            if job.last:
                self._token(job)
        if self._flush_at_once:
            for name in self._flush_later:
                self.free += self._held.pop(name, 0)
            self._flush_later = []
        self._schedule()

    def _allocate(self, job: Job) -> None:
        needed = self._blocks(job, job.new)
        self._held[job.name] = self._held.get(job.name, 0) + needed
        self.free -= needed
        assert self.free >= 0

    def _blocks(self, job: Job, tokens: int) -> int:
        """Blocks to be had for so many more tokens."""
        return -(-(job.seen + tokens) // self._block_size) - self._held.get(job.name, 0)

    def _token(self, job: Job) -> None:
        job.answered += 1
        self.answered += 1
        if job.generated >= job.most:
            self.finished.append(job.name)
            self._flush_later.append(job.name)
        else:
            job.new = 1
            self._queue.append(job)

    def _schedule(self) -> None:
        self._buffer.extend(self._queue)
        self._queue = []
        self._scheduled = []
        waiting = list(self._buffer)
        blocks = self._schedule_decodes([job for job in waiting if job.generated])
        self._schedule_prompts([job for job in waiting if not job.generated], blocks)
        if self._buffer and not self._scheduled and not self._flush:
            self._recover()
        taken = {id(job) for job in self._scheduled}
        self._buffer = deque(job for job in self._buffer if id(job) not in taken)

    def _schedule_decodes(self, jobs: list[Job]) -> int:
        """Who generates; returns the blocks that they need."""
        needed = 0
        for job in jobs[: min(self._most_sequences, self._budget)]:
            if job.seen % self._block_size:
                self._scheduled.append(job)
            elif needed < self.free:
                needed += 1
                self._scheduled.append(job)
        return needed

    def _schedule_prompts(self, jobs: list[Job], needed: int) -> None:
        room = self._budget - len(self._scheduled)
        for job in jobs:
            if self.free == 0 or len(self._scheduled) >= self._most_sequences or room <= 0:
                return
            if job.new > 1 and self._fitting(job, job.new, self.free - needed) < job.new:
                return
            taken = self._fitting(job, min(job.new, room), self.free - needed)
            if taken <= 0:
                continue
            needed += max(0, min(self._blocks(job, taken), self.free - needed))
            room -= taken
            self._scheduled.append(job)
            rest = job.new - taken
            job.new, job.last = taken, rest == 0
            if rest:
                seen = job.seen + taken
                self._buffer.appendleft(Job(job.name, job.prompt, job.most, rest, seen, True, job.answered))

    def _fitting(self, job: Job, tokens: int, blocks: int) -> int:
        """How many of its next tokens fit into its own blocks and so many more."""
        if self._blocks(job, tokens) <= blocks:
            return tokens
        return (blocks + self._held.get(job.name, 0)) * self._block_size - job.seen

    def _recover(self) -> None:
        """Take the blocks of the last in the buffer that has any; all its tokens become its prompt."""
        holder = next((job for job in reversed(self._buffer) if job.seen > 0), None)
        if holder is None:
            raise Dead
        self.evictions += 1
        self._flush.append(holder.name)
        prompt = holder.prompt + holder.answered
        again = Job(holder.name, prompt, holder.most - holder.answered, prompt)
        self._buffer = deque([*(job for job in self._buffer if job.name != holder.name), again])
