"""PyTorch's .bin files, read without unpickling them.

``torch.save`` writes a zip archive (since torch 1.6): ``data.pkl`` says which tensors there are, and ``data/0``,
``data/1`` and so on hold their bytes, uncompressed, where they can be mapped. ``data.pkl`` is a pickle: a program that
may call whatever Python can import. Nobody runs it here. ``pickletools`` cuts it into opcodes, and what follows them
knows only what the description of a state dict is made of: it imports nothing, calls nothing, and refuses by name
whatever else there is. Its values are never hashed, compared or printed whole, so their depth does no harm.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

from fgsnap.convert.files import Files
from fgsnap.convert.source import AGAIN, MAX_RANK, FileTensor, brief, show
from fgsnap.errors import SourceError

# Real files have some hundred tensors; the caps keep a hostile one from taking memory or seconds until it is refused.
MAX_TENSORS = 5_000
MAX_BYTES = 1 << 20
"""Most bytes of data.pkl, and of the archive's table of contents; a tensor takes some 150 to 200 of them."""
MAX_STEPS = 64 * MAX_TENSORS
"""Most opcodes of data.pkl; a tensor of four axes takes 48."""
PLACED_AT_ONCE = 8  # each is a round trip where the file is on the Hub
STORAGES = {
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.DoubleStorage": "F64",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
}
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
ORDERED_DICT = "collections.OrderedDict"
TENSOR = "torch._utils._rebuild_tensor_v2"
PARAMETER = "torch._utils._rebuild_parameter"
_LOCAL = struct.Struct("<4s22xHH")  # the header in front of an entry: its signature, bytes of its name, of its extras
Part = Callable[[int, int], bytes]
"""(first byte, byte after the last) -> those bytes of a file, all of them inside it."""
KNOWN = frozenset({*STORAGES, ORDERED_DICT, TENSOR, PARAMETER})
UNSOUND = (ValueError, IndexError, KeyError, DeprecationWarning)
"""What following a damaged pickle raises; the warning is of an odd escape, where warnings are errors."""
WAY_OUT = (
    "Convert it to safetensors where nothing can be harmed (a container without network): load it with "
    "torch.load(weights_only=True) and save with safetensors.torch.save_file."
)


def read_state_dict(files: Files, name: str) -> list[FileTensor]:
    """The tensors of one file, each inside its storage and each storage inside the file. Tied ones share theirs.

    Raises:
        SourceError: the file is damaged, older than the format, or more than a state dict of tensors.
    """
    archive = _Archive(name, files.size(name), lambda start, stop: bytes(files.header(name, start, stop)))
    described = _Follower(name).follow(archive.read("data.pkl"))
    if not isinstance(described, dict):
        raise _more_than_tensors(name, "Its content", described)
    for tensor, value in described.items():
        if not isinstance(value, _Tensor):
            raise _more_than_tensors(name, show(tensor), value)
    if len(described) > MAX_TENSORS:
        raise _too_much(name, f"describes {len(described)} tensors", MAX_TENSORS)
    with ThreadPoolExecutor(PLACED_AT_ONCE, thread_name_prefix="place") as pool:
        return list(pool.map(partial(_placed, archive), described.keys(), described.values()))


def _placed(archive: _Archive, name: str, tensor: _Tensor) -> FileTensor:
    """Where the tensor's values lie in the file."""
    if not name.isprintable():
        raise archive.bad(f"The tensor name {show(name)} has characters that no real name has.")
    storage, item = tensor.storage, ITEM_BYTES[tensor.storage.dtype]
    held = archive.extent(f"data/{storage.key}")
    if storage.size * item > len(held):
        raise archive.bad(
            f"The storage of {show(name)} has {len(held)} bytes, too few for {storage.size} elements of {item}."
        )
    elements, steps = math.prod(tensor.shape), zip(tensor.shape, tensor.strides, strict=True)
    first = tensor.offset if elements else 0  # a tensor of none may lie anywhere
    if elements and first + sum((size - 1) * stride for size, stride in steps) >= storage.size:
        raise archive.bad(f"The tensor {show(name)} ends behind the {storage.size} elements of its storage.")
    if _overlaps(tensor):
        raise archive.bad(f"Elements of the tensor {show(name)} share their bytes (strides {tensor.strides}).")
    return FileTensor(
        name,
        storage.dtype,
        tensor.shape,
        held.start + first * item,
        elements * item,
        _steps(tensor, item),
    )


def _overlaps(tensor: _Tensor) -> bool:
    """Whether an axis steps less far than those within it reach."""
    reach = 0
    for stride, size in sorted(zip(tensor.strides, tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _steps(tensor: _Tensor, item: int) -> tuple[int, ...] | None:
    """Bytes from one index to the next; None where the rows lie one after the other.

    An axis of one index may state any stride, and one without elements any strides: nothing is reached by them.
    """
    strides = tuple(stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    inner, in_order = 1, True
    for size, stride in zip(reversed(tensor.shape), reversed(strides), strict=True):
        in_order = in_order and (size <= 1 or stride == inner)
        inner *= size
    return None if in_order or not inner else tuple(stride * item for stride in strides)


# The archive.


class _File(io.RawIOBase):
    """The archive as zipfile reads one, but in small parts only: zipfile asks for as many bytes as a file claims."""

    def __init__(self, size: int, part: Part) -> None:
        self._size, self._part, self._at = size, part, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if at < 0:
            raise OSError("before the start of the file")
        self._at = at
        return at

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._size - self._at)
        size = left if size is None or size < 0 else min(size, left)
        if size > MAX_BYTES:
            raise zipfile.BadZipFile(f"a part is larger than {MAX_BYTES} bytes")
        data = self._part(self._at, self._at + size)
        self._at += len(data)
        return data


class _Archive:
    """The entries of a zip archive that lie in it as they are."""

    def __init__(self, name: str, size: int, part: Part) -> None:
        self._name, self._size, self._part = name, size, part
        start = part(0, min(4, size))
        if start[:1] == b"\x80":
            raise SourceError(
                f"{name} has the format of PyTorch before 1.6.",
                "It is one pickle, which only unpickling could read, and that runs code from the file.",
                WAY_OUT,
            )
        if start != b"PK\3\4":
            raise self.bad("It does not begin as a zip archive does.")
        self._entries, self._ends = self._table()
        if "byteorder" in self._entries and self.read("byteorder") != b"little":
            raise SourceError(
                f"{name} was written on a big-endian machine.", "fgsnap reads little-endian weights.", WAY_OUT
            )

    def _table(self) -> tuple[dict[str, zipfile.ZipInfo], dict[int, int]]:
        """The entries by name, without the folder that holds all of them; and where what follows each begins."""
        try:
            with zipfile.ZipFile(_File(self._size, self._part)) as archive:
                infos, table = archive.infolist(), archive.start_dir
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
            raise self.bad(f"Its table of contents cannot be read: {brief(error)}.") from None
        found: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            folder, slash, entry = info.filename.partition("/")
            if not slash or folder != infos[0].filename.partition("/")[0] or entry in found:
                raise self.bad(f"The entry {show(info.filename)} is there twice, or outside the archive's folder.")
            found[entry] = info
        return found, dict(itertools.pairwise(sorted([*(info.header_offset for info in infos), table])))

    def extent(self, entry: str) -> range:
        """Where the entry's bytes lie in the file."""
        info = self._entries.get(entry)
        if info is None:
            raise self.bad(f"It has no {show(entry)}.")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise self.bad(f"Its {show(entry)} is compressed or encrypted; PyTorch writes it plain.")
        at, label = info.header_offset, info.filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
        end = self._ends.get(at, 0)
        named = at + _LOCAL.size + len(label)
        header = self._part(at, named) if at >= 0 and named <= end else bytes(_LOCAL.size)
        signature, length, extra = _LOCAL.unpack_from(header)
        start = named + extra
        if (signature, length, header[_LOCAL.size :]) != (b"PK\3\4", len(label), label) or start + info.file_size > end:
            raise self.bad(f"Its {show(entry)} is not where the table of contents says, or longer than there is room.")
        return range(start, start + info.file_size)

    def read(self, entry: str) -> bytes:
        """The bytes of a small entry."""
        extent = self.extent(entry)
        if len(extent) > MAX_BYTES:
            raise self.bad(f"Its {show(entry)} has {len(extent)} bytes, above the limit of {MAX_BYTES}.")
        return self._part(extent.start, extent.stop)

    def bad(self, why: str) -> SourceError:
        return _bad(self._name, why)


# The description.


class _Global(NamedTuple):
    """Something that unpickling would import, one of KNOWN."""

    name: str


class _Storage(NamedTuple):
    """``size`` elements under ``data/key``; the dtype as safetensors spells it."""

    key: str
    dtype: str
    size: int


class _Tensor(NamedTuple):
    """A view of a storage; ``offset`` and ``strides`` count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Follower:
    """Follows a pickle opcode by opcode. Each costs it a byte and makes at most one small value."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def follow(self, pickle: bytes) -> Any:
        """What the pickle describes."""
        try:
            for number, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
                if number == MAX_STEPS:
                    raise _too_much(self._name, f"has more than {MAX_STEPS} opcodes", MAX_STEPS)
                self._step(opcode.name, argument)
            [value] = self._stack
        except UNSOUND as error:
            raise _bad(self._name, f"Its data.pkl cannot be followed: {brief(error)}.") from None
        return value

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self._marks.append(len(stack))
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[opcode]())
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple([stack.pop() for _ in range(int(opcode[-1]))][::-1]))
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "GLOBAL":
                stack.append(self._global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(self._global(module, name))
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._called(function, arguments))
            case "APPEND":
                self._extend([stack.pop()])
            case "APPENDS":
                self._extend(self._since_mark())
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._update([key, value])
            case "SETITEMS":
                self._update(self._since_mark())
            case "BUILD":
                self._ignore(stack.pop())
            case _:
                raise self._foreign(f"the opcode {opcode}")

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise ValueError("it appends to what is no list")
        target.extend(items)

    def _update(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise ValueError("it sets an item of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str) or key in target:
                raise ValueError("a name is no text, or is there twice")
            target[key] = value

    def _ignore(self, state: Any) -> None:
        """Attributes of a state dict are the versions of its modules' code."""
        if not isinstance(self._stack[-1], dict) or not isinstance(state, dict):
            raise self._foreign("an object with a state of its own")

    def _global(self, module: Any, name: Any) -> _Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name to import is no text")
        if f"{module}.{name}" not in KNOWN:
            raise self._foreign(show(f"{module}.{name}"))
        return _Global(f"{module}.{name}")

    def _storage(self, identity: Any) -> _Storage:
        match identity:
            case ("storage", _Global(kind), str(key), str(), int(count)) if kind in STORAGES and _are_sizes((count,)):
                return _Storage(key, STORAGES[kind], count)
        raise ValueError("a storage is described in an unknown way")

    def _called(self, function: Any, arguments: Any) -> Any:
        match function, arguments:
            case _Global(name), () if name == ORDERED_DICT:
                return {}
            case _Global(name), (_Tensor() as tensor, bool(), dict()) if name == PARAMETER:
                return tensor
            # More arguments would say that the values are negated or conjugated.
            case _Global(name), (_Storage() as storage, offset, tuple(shape), tuple(strides), _, _) if name == TENSOR:
                sizes = (offset, *shape, *strides)
                if len(shape) == len(strides) <= MAX_RANK and _are_sizes(sizes):
                    return _Tensor(storage, offset, shape, strides)
        raise ValueError("something is built in an unknown way")

    def _foreign(self, what: str) -> SourceError:
        return SourceError(
            f"{self._name} uses {what}, which no state dict of tensors needs.",
            "Its data.pkl may run code when it is unpickled; fgsnap has only read it.",
            WAY_OUT,
        )


def _are_sizes(values: tuple[Any, ...]) -> bool:
    """Non-negative integers below 2**63 (``True`` is no integer here)."""
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _more_than_tensors(file: str, what: str, value: Any) -> SourceError:
    return SourceError(
        f"{file} is not a state dict of tensors.",
        f"{what} is of type {type(value).__name__.strip('_')}.",
        "Save the model's own state dict, its tensors under their names, without anything around it.",
    )


def _too_much(file: str, what: str, limit: int) -> SourceError:
    return SourceError(
        f"The data.pkl of {file} {what}.",
        f"The limit is {limit}, which is far above what models have in one file.",
        "If the file is sound, save the model in more shards, or as safetensors.",
    )


def _bad(file: str, why: str) -> SourceError:
    return SourceError(f"{file} is not a valid PyTorch file.", why, AGAIN)
