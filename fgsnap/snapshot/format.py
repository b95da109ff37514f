"""What a snapshot stores: its values, its names, and where tensors lie in a rank file.

``docs/format.md`` tells the same in prose, for a second implementer.
"""

# Annotations are not postponed here: msgspec would have to compile each one from its text at every start.

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec

from fgsnap.layout import Segment, Shape, StoredTensor
from fgsnap.snapshot.packing import Layout, file_shape, fits, packed_bytes
from fgsnap.spec import DecoderSpec, DType

FORMAT = 1
KNOWN_FEATURES = frozenset(("layout.words32",))
"""Names that may stand in ``requires`` and that this reader understands."""

COMMIT, MANIFEST, CANARY = "snapshot.json", "manifest.json", "canary.json"
CHUNK = 4 << 20
TENSOR_ALIGNMENT, LAYER_ALIGNMENT = 256, 4096
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

DIGEST_BYTES = 32
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", re.ASCII)
UNCOVERED = frozenset((COMMIT, MANIFEST, CANARY, "README.md"))


class FileEntry(msgspec.Struct, frozen=True):
    """One covered file. ``chunks`` is the sha256 of a rank file's ``.chunks`` file; other files have none."""

    bytes: int
    sha256: str
    chunks: str | None = None


class TensorEntry(msgspec.Struct, frozen=True):
    """One tensor of a rank file: ``bytes`` at ``offset`` from the start of ``file``, which lie as ``layout`` says."""

    name: str
    file: str
    offset: int
    bytes: int
    dtype: DType
    shape: Shape
    segments: tuple[Segment, ...]
    layout: Layout = "row"


class TextSection(msgspec.Struct, frozen=True):
    """What the runtime knows of text besides the tokenizer. ``add_bos``: raw-text prompts begin with that token."""

    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None = None
    add_bos: bool = False
    template: Literal["jinja"] | None = None


class Provenance(msgspec.Struct, frozen=True):
    """Where the weights came from. Nothing here changes what the runtime computes.

    Attributes:
        source: repository id, or a GGUF file's own name for its model, or "local"; nothing of a path.
        revision: the resolved commit of a repository.
        files: BLAKE3 of every source file, "sha256:..." of weights on the Hub; a single GGUF file goes by model.gguf.
        rules: sha256 of the conversion rules' canonical form.
        family: the family module that wrote spec and rules.
        converter: the fgsnap version.
        dropped: source tensors that the snapshot has no use for.
        dtype: the cast that was asked for; None means as in the checkpoint.
    """

    source: str
    revision: str | None
    files: dict[str, str]
    rules: str
    family: str
    converter: str
    dropped: tuple[str, ...] = ()
    dtype: DType | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about a snapshot but the bytes. ``tensors`` of all ranks, rank after rank, each in touch order."""

    format: int = FORMAT
    requires: tuple[str, ...] = ()
    spec: DecoderSpec
    tp: int
    tensors: tuple[TensorEntry, ...]
    files: dict[str, FileEntry]
    text: TextSection
    provenance: Provenance


class Canary(msgspec.Struct, frozen=True):
    """A fixed prompt's ``tokens`` and, after each, the float32 reference's ``next`` token and margin to the second."""

    id: str
    tokens: list[int]
    next: list[int]
    margins: list[float]


class Commit(msgspec.Struct, frozen=True):
    """``snapshot.json``. Every key is required, so no changed key can pass for an absent one."""

    format: int
    requires: tuple[str, ...]
    id: str
    manifest: str
    canary: str | None


class Version(msgspec.Struct, frozen=True):
    format: int
    requires: tuple[str, ...] = ()


def canonical(value: Any) -> bytes:
    """The one JSON text of ``value``: keys sorted, no white space, no trailing newline."""
    return msgspec.json.encode(value, order="sorted")


def rank_file(rank: int, tp: int) -> str:
    """The name of one rank's weights."""
    return f"rank-{rank:05d}-of-{tp:05d}.safetensors"


def chunks_file(name: str) -> str:
    """The name of the file of BLAKE3 digests beside a rank file."""
    return name.removesuffix(".safetensors") + ".chunks"


class PlannedTensor(msgspec.Struct, frozen=True):
    """One stored tensor with its place; ``offset`` counts from the start of the file."""

    name: str
    dtype: DType
    shape: Shape
    segments: tuple[Segment, ...]
    starts_layer: bool
    offset: int
    bytes: int
    layout: Layout


class RankLayout(msgspec.Struct, frozen=True):
    """Where everything lies in one rank file of ``size`` bytes; the header fills the first ``data_start``."""

    tensors: tuple[PlannedTensor, ...]
    data_start: int
    size: int


def tensor_entries(file: str, layout: RankLayout) -> tuple[TensorEntry, ...]:
    """The part of the manifest's table that tells of one rank file."""
    return tuple(
        TensorEntry(t.name, file, t.offset, t.bytes, t.dtype, t.shape, t.segments, t.layout) for t in layout.tensors
    )


def required_features(tensors: Iterable[TensorEntry]) -> tuple[str, ...]:
    """What ``requires`` must name for a reader to understand the table."""
    return tuple(sorted({f"layout.{entry.layout}" for entry in tensors if entry.layout != "row"}))


def plan_rank(tensors: Sequence[tuple[StoredTensor, DType]], layout: Layout = "row") -> RankLayout:
    """Place the tensors of one rank file in order: layers on pages, tensors on 256 bytes. Pure arithmetic.

    Args:
        tensors: what to place, and the dtype of each.
        layout: that of the tensors it fits; the others are "row".
    """
    placed, end = [], 0
    for tensor, dtype in tensors:
        lies: Layout = layout if fits(layout, tensor.shape, dtype) else "row"
        start = _align(end, LAYER_ALIGNMENT if tensor.starts_layer else TENSOR_ALIGNMENT)
        end = start + packed_bytes(lies, tensor.shape, dtype)
        placed.append((tensor, dtype, lies, start, end))

    def planned(data_start: int) -> tuple[PlannedTensor, ...]:
        return tuple(
            PlannedTensor(t.name, dtype, t.shape, t.segments, t.starts_layer, data_start + start, stop - start, lies)
            for t, dtype, lies, start, stop in placed
        )

    data_start = len(rank_header(rank_file(0, 1), planned(0), 0))
    return RankLayout(planned(data_start), data_start, data_start + end)


def rank_header(file: str, tensors: Sequence[PlannedTensor | TensorEntry], data_start: int) -> bytes:
    """The safetensors header of ``file``: a function of the table, so that opening can compare it byte by byte.

    Gaps between tensors become ``U8`` tensors, since safetensors allows no holes. Spaces fill the header up to a page.
    A packed tensor has the shape of its bytes as they lie, so that nobody takes it for a row-major matrix.
    The file's own name is in it, so that two ranks which hold equal shapes cannot be taken for one another.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "fgsnap", "fgsnap_format": str(FORMAT), "file": file}}
    end = pads = 0
    for tensor in tensors:
        start = tensor.offset - data_start
        if start > end:
            header[f"__pad.{pads}"] = {"dtype": "U8", "shape": (start - end,), "data_offsets": (end, start)}
            pads += 1
        end = start + tensor.bytes
        header[tensor.name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": file_shape(tensor.layout, tensor.shape, tensor.dtype),
            "data_offsets": (start, end),
        }
    text = msgspec.json.encode(header)
    text = text.ljust(_align(8 + len(text), LAYER_ALIGNMENT) - 8)
    return len(text).to_bytes(8, "little") + text


def _align(value: int, to: int) -> int:
    return -(-value // to) * to


def chunks_size(size: int) -> int:
    """The size of the ``.chunks`` file of a rank file of ``size`` bytes."""
    return -(-size // CHUNK) * DIGEST_BYTES
