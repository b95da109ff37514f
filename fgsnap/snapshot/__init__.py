"""The snapshot format, version 1: write it, open it by mmap, verify it. Bytes only: no torch, no numpy.

A snapshot is a directory. ``snapshot.json`` is written last and commits it: it holds the digests of ``manifest.json``
(whose digest is the snapshot's id) and of ``canary.json``. The manifest holds the decoder spec, the table of tensors
and the digests of every other covered file. Nothing read from disk is believed before it is checked: a damaged or
hostile snapshot raises SnapshotRefused.

    format      the stored values, the names, and where tensors lie in a rank file
    packing     how a tensor's values lie in its bytes
    writing     SnapshotWriter
    checks      whether a manifest is one that its own spec implies
    reading     open_snapshot, Snapshot
    gathering   the same weights at another degree, or by logical tensors
    agreement   whether ranks hold the same where they should
    verifying   every byte of every covered file
"""

from fgsnap.snapshot.format import (
    CANARY,
    CHUNK,
    COMMIT,
    FORMAT,
    LAYER_ALIGNMENT,
    MANIFEST,
    TENSOR_ALIGNMENT,
    Canary,
    FileEntry,
    Manifest,
    PlannedTensor,
    Provenance,
    RankLayout,
    TensorEntry,
    TextSection,
    canonical,
    chunks_file,
    plan_rank,
    rank_file,
    rank_header,
)
from fgsnap.snapshot.gathering import TensorBytes, gathered, opened_at, read_logical
from fgsnap.snapshot.packing import PANEL_ROWS, Layout, packed_bytes, panel_bytes
from fgsnap.snapshot.reading import Snapshot, open_snapshot
from fgsnap.snapshot.verifying import Report, verify
from fgsnap.snapshot.writing import RankWriter, SnapshotWriter

__all__ = [
    "CANARY",
    "CHUNK",
    "COMMIT",
    "FORMAT",
    "LAYER_ALIGNMENT",
    "MANIFEST",
    "PANEL_ROWS",
    "TENSOR_ALIGNMENT",
    "Canary",
    "FileEntry",
    "Layout",
    "Manifest",
    "PlannedTensor",
    "Provenance",
    "RankLayout",
    "RankWriter",
    "Report",
    "Snapshot",
    "SnapshotWriter",
    "TensorBytes",
    "TensorEntry",
    "TextSection",
    "canonical",
    "chunks_file",
    "gathered",
    "open_snapshot",
    "opened_at",
    "packed_bytes",
    "panel_bytes",
    "plan_rank",
    "rank_file",
    "rank_header",
    "read_logical",
    "verify",
]
