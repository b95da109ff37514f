"""Portable, verified, tensor-parallel snapshots of Hugging Face checkpoints, and the runtime that maps them.

``fgsnap.load("snap/")`` gives a pipeline that answers in this process; ``docs/python.md`` is about it.
"""

__version__ = "0.1.0"
__all__ = ["FgsnapError", "Pipeline", "RequestError", "Response", "__version__", "load"]

TYPE_CHECKING = False  # type checkers know the name; typing itself would take longer to import than all of this

if TYPE_CHECKING:
    from fgsnap.errors import FgsnapError, RequestError
    from fgsnap.runtime.pipeline import Pipeline, Response, load
else:

    def __getattr__(name: str) -> object:
        """What __all__ names, imported when it is first asked for."""
        if name not in __all__:
            raise AttributeError(f"module 'fgsnap' has no attribute {name!r}")
        from importlib import import_module

        module = import_module("fgsnap.errors" if name.endswith("Error") else "fgsnap.runtime.pipeline")
        globals()[name] = found = getattr(module, name)
        return found

    def __dir__() -> list[str]:
        return [*globals(), *__all__]
