"""Verifying: every byte of every covered file is digested again, and ranks are compared where they hold the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from fgsnap.errors import SnapshotRefused
from fgsnap.progress import Progress, counted
from fgsnap.snapshot.agreement import refuse_disagreement
from fgsnap.snapshot.files import changed, check_size, listed, opened, refused
from fgsnap.snapshot.format import CHUNK, DIGEST_BYTES, FileEntry, Manifest, TensorEntry, chunks_file, chunks_size
from fgsnap.snapshot.reading import chunk_digests, open_snapshot


class Report(NamedTuple):
    """What ``verify`` found sound. ``bytes`` are those of covered files, ``canary`` says whether there is one."""

    id: str
    files: int
    bytes: int
    canary: bool


def verify(path: Path | str, progress: Progress | None = None) -> Report:
    """Compare every covered byte with the digests, and slices that several ranks hold with each other.

    SnapshotRefused names the file, and a rank file's chunk and tensors, or the tensor in which ranks differ.

    Args:
        path: the snapshot directory.
        progress: told (bytes checked so far, bytes in all) after each chunk.
    """
    path = Path(path)
    with open_snapshot(path) as snapshot:
        manifest = snapshot.manifest
        total = sum(entry.bytes for entry in manifest.files.values())
        advance = counted(progress, total)
        _refuse_strays(path, manifest)
        for name, entry in manifest.files.items():
            if entry.chunks is None:
                snapshot.read_text(name)
                advance(entry.bytes)
            else:
                verify_rank(path, name, entry, manifest.tensors, advance)
        refuse_disagreement(snapshot)
        return Report(snapshot.id, len(manifest.files), total, snapshot.canary is not None)


def _refuse_strays(path: Path, manifest: Manifest) -> None:
    known = {*manifest.files, *map(chunks_file, manifest.files)}
    strays = [name for name in listed(path) if name.endswith((".safetensors", ".chunks")) and name not in known]
    if strays:
        raise refused(path, f"{strays[0]} does not belong to it.")


def verify_rank(
    path: Path, name: str, entry: FileEntry, tensors: Iterable[TensorEntry], advance: Callable[[int], None]
) -> None:
    """Digest one rank file and its chunks; SnapshotRefused names the chunk and the ``tensors`` that are damaged."""
    from concurrent.futures import Future, ThreadPoolExecutor  # brings logging, which opening can do without

    recorded = chunk_digests(path, name, entry)
    sha256 = hashlib.sha256()
    buffers = [memoryview(bytearray(min(CHUNK, entry.bytes))) for _ in range(2)]
    with opened(path, name) as descriptor, ThreadPoolExecutor(1) as pool:
        check_size(path, name, descriptor, entry.bytes)
        hashing: Future[None] | None = None
        for index in range(chunks_size(entry.bytes) // DIGEST_BYTES):
            chunk = _read_chunk(descriptor, buffers[index % 2])
            if blake3(chunk).digest() != recorded[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]:
                raise _bad_chunk(path, name, index, tensors)
            if hashing is not None:
                hashing.result()
            hashing = pool.submit(sha256.update, chunk)
            advance(len(chunk))
    if sha256.hexdigest() != entry.sha256:
        raise changed(path, name)


def _read_chunk(descriptor: int, buffer: memoryview) -> memoryview:
    at = 0
    while at < len(buffer) and (count := os.readv(descriptor, [buffer[at:]])):
        at += count
    return buffer[:at]


def _bad_chunk(path: Path, name: str, index: int, tensors: Iterable[TensorEntry]) -> SnapshotRefused:
    start, stop = index * CHUNK, (index + 1) * CHUNK
    hit = [e.name for e in tensors if e.file == name and e.offset < stop and start < e.offset + e.bytes]
    where = f", in {hit[0]}" + (f" to {hit[-1]}" if len(hit) > 1 else "") if hit else ""
    return refused(path, f"{name} is damaged in chunk {index} (bytes {start} to {stop}{where}).")
