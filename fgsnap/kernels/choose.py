"""Which backend computes: decided once at start-up, and told as a table of op, backend and reason.

Knows what each backend needs of the host. Imports a backend only when it is chosen: importing torch costs seconds.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from fgsnap.errors import HostError, UnsupportedModel, UsageError, missing_extra
from fgsnap.kernels.ops import Ops

if TYPE_CHECKING:
    from fgsnap.kernels.ranks import Ranks

Backend = Literal["auto", "native", "reference"]
BACKENDS: tuple[Backend, ...] = ("auto", "native", "reference")
OPS = tuple(name for name, member in vars(Ops).items() if callable(member) and not name.startswith("_"))


class Choice(NamedTuple):
    """One line of the table."""

    op: str
    backend: str
    reason: str


def choose(
    prefer: str,
    device: str,
    features: Iterable[str],
    dtype: str,
    threads: int | None = None,
    ranks: Ranks | None = None,
) -> tuple[Ops, list[Choice]]:
    """The backend to compute with, and why each of its ops is there.

    Args:
        prefer: "auto", "native" or "reference".
        device: "auto", "cpu", "cuda" or "cuda:N". "auto" is cuda where this host has one that torch can use.
        features: what the model needs, as spec.features names it.
        dtype: of activations and KV cache.
        threads: CPU threads; None: library.default_threads().
        ranks: the part in a tensor parallel group; None: all of it.

    Raises:
        HostError: the backend or device is not to be had here.
        UnsupportedModel: the backend does not compute a feature of the model.
        UsageError: no such backend, or one that does not run on the device.
    """
    if prefer not in BACKENDS:
        raise UsageError(f"There is no backend {prefer!r}.", "", f"Choose one of {', '.join(BACKENDS)} with --backend.")
    needed = frozenset(features)
    wanted = settled_device(prefer, device)
    if prefer == "reference":
        return _settled(_reference(wanted, needed, dtype, threads, ranks), "asked for")
    obstacle = _native_obstacle(wanted, needed, dtype, ranks)
    if obstacle is None:
        reason = "asked for" if prefer == "native" else f"computes this model on {wanted} without torch"
        return _settled(_native(dtype, threads, ranks), reason)
    if prefer == "native":
        raise obstacle
    why = obstacle.why if isinstance(obstacle, HostError) else obstacle.what.rstrip(".")
    return _settled(_reference(wanted, needed, dtype, threads, ranks), f"native cannot: {why}")


def _settled(ops: Ops, reason: str) -> tuple[Ops, list[Choice]]:
    return ops, [Choice(op, ops.name, reason) for op in OPS]


def settled_device(prefer: str, device: str) -> str:
    """The device that "auto" stands for on this host; any other stands for itself."""
    if device != "auto":
        return device
    # The driver's device file is looked for first: asking torch would import it on hosts that have no use for it.
    if prefer == "native" or not Path("/dev/nvidiactl").exists():
        return "cpu"
    return "cuda" if cuda_devices() else "cpu"


def cuda_devices() -> int:
    """How many CUDA devices torch can use. This process may fork afterwards, for it has not touched them."""
    if importlib.util.find_spec("torch") is None:
        return 0
    import torch

    return int(torch.cuda.device_count())


def _reference(device: str, needed: frozenset[str], dtype: str, threads: int | None, ranks: Ranks | None) -> Ops:
    if importlib.util.find_spec("torch") is None:
        raise missing_extra("torch", "torch", "The reference backend")
    from fgsnap.kernels.library import default_threads

    threads = threads or default_threads()  # before torch is loaded, which has words of its own for a wrong setting
    from fgsnap.kernels.reference import Reference

    _refuse_unsupported("reference", Reference.supports, needed)
    return Reference(device, dtype, threads, ranks)


def _native(dtype: str, threads: int | None, ranks: Ranks | None) -> Ops:
    from fgsnap.kernels.native import Native

    return Native(dtype=dtype, threads=threads, ranks=ranks)


def _native_obstacle(
    device: str, needed: frozenset[str], dtype: str, ranks: Ranks | None
) -> HostError | UnsupportedModel | UsageError | None:
    """Why the native backend cannot compute this model here; None when it can."""
    if device != "cpu":
        return UsageError(
            "The native backend runs on the CPU alone.", f"The device is {device}.", "Use --backend reference."
        )
    from fgsnap.kernels import native

    present, reason = native.available()
    if not present:
        return HostError(
            "The native backend is not to be had here.",
            reason,
            "Reinstall fgsnap with a C++ compiler, or use --backend reference.",
        )
    if ranks is not None and ranks.memory is None:
        return UsageError(
            "The native backend does not compute in processes that torchrun has started.",
            "Its ranks share memory, as only processes do that fgsnap itself has started.",
            "Leave torchrun out: --tp N starts N ranks. Or use --backend reference.",
        )
    if dtype not in native.DTYPES:
        return UsageError(
            f"The native backend does not compute in {dtype}.",
            f"It computes with {' or '.join(native.DTYPES)}.",
            "Use --dtype with one of these, or --backend reference.",
        )
    try:
        _refuse_unsupported("native", native.Native.supports, needed)
    except UnsupportedModel as error:
        return error
    return None


def _refuse_unsupported(backend: str, supports: frozenset[str], needed: frozenset[str]) -> None:
    lacking = sorted(needed - supports)
    if lacking:
        raise UnsupportedModel(
            f"The {backend} backend does not compute {', '.join(lacking)}.",
            "The model's spec needs it.",
            "Use another --backend, or a newer fgsnap.",
        )
