"""The import arrows of the package, held statically and in fresh processes.

Import time is a feature of the serve path: what it must never load is named here.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from fgsnap.kernels import native
from tests.serving import servable_snapshot

PACKAGE = Path(__file__).parent.parent / "fgsnap"
STDLIB = sys.stdlib_module_names

# Which of fgsnap's own modules each part may import, by prefix. The first match counts.
INNER = {
    "fgsnap.errors": (),
    "fgsnap.spec": ("fgsnap.errors",),
    "fgsnap.layout": ("fgsnap.errors", "fgsnap.spec"),
    "fgsnap.progress": (),
    "fgsnap.built": (),
    "fgsnap.atomic": ("fgsnap.errors",),
    "fgsnap.tokenizer": ("fgsnap.errors", "fgsnap.built"),
    "fgsnap.snapshot": (
        "fgsnap.errors", "fgsnap.spec", "fgsnap.layout", "fgsnap.progress", "fgsnap.atomic", "fgsnap.snapshot",
    ),
    "fgsnap.kernels": ("fgsnap.errors", "fgsnap.built", "fgsnap.kernels"),
    "fgsnap.convert": (
        "fgsnap.errors", "fgsnap.spec", "fgsnap.layout", "fgsnap.progress", "fgsnap.atomic", "fgsnap.snapshot",
        "fgsnap.tokenizer", "fgsnap.convert", "fgsnap",
    ),
    "fgsnap.runtime": (
        "fgsnap.errors", "fgsnap.spec", "fgsnap.layout", "fgsnap.snapshot", "fgsnap.tokenizer", "fgsnap.kernels",
        "fgsnap.runtime", "fgsnap",
    ),
    "fgsnap.diff": ("fgsnap.spec", "fgsnap.progress", "fgsnap.snapshot", "fgsnap.convert"),
    "fgsnap.bench.command": ("fgsnap.errors", "fgsnap.cli", "fgsnap.bench", "fgsnap.runtime"),
    "fgsnap.bench": (
        "fgsnap.errors", "fgsnap.atomic", "fgsnap.environment", "fgsnap.snapshot", "fgsnap.kernels.ops",
        "fgsnap.runtime", "fgsnap.bench",
    ),
}  # fmt: skip

# Third-party packages each part may name anywhere in its source.
OUTER = {
    "fgsnap.errors": set(),
    "fgsnap.spec": {"msgspec"},
    "fgsnap.layout": {"msgspec"},
    "fgsnap.progress": set(),
    "fgsnap.built": set(),
    "fgsnap.atomic": set(),
    "fgsnap.tokenizer": {"tokenizers"},
    "fgsnap.snapshot": {"msgspec", "blake3"},
    "fgsnap.kernels.reference": {"torch"},
    "fgsnap.kernels.reference_plan": {"torch"},
    "fgsnap.kernels.reference_attention": {"torch"},
    "fgsnap.kernels.reference_experts": {"torch"},
    "fgsnap.kernels.reference_sampling": {"torch"},
    "fgsnap.kernels.reference_ranks": {"torch"},
    "fgsnap.kernels.choose": {"torch"},
    "fgsnap.kernels": set(),
    "fgsnap.convert": {"blake3", "msgspec", "numpy", "gguf", "huggingface_hub", "tokenizers"},
    "fgsnap.runtime.nursery": {"llguidance"},
    "fgsnap.runtime": {"msgspec", "starlette", "h11", "prometheus_client", "tokenizers", "minijinja"},
    "fgsnap.diff": {"msgspec"},
    "fgsnap.bench.plot": {"matplotlib"},
    "fgsnap.bench.command": {"click", "matplotlib"},
    "fgsnap.bench.show": {"click"},
    "fgsnap.bench.workload": {"tokenizers"},
    "fgsnap.bench": {"h11", "msgspec"},
    "fgsnap.cli": {"click", "tqdm", "msgspec"},
    "fgsnap": set(),
}


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append((name, path))
    return found


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import hides where it points"
            found.add(node.module)
    return found


def rule(table: dict, name: str):
    return next((table[prefix] for prefix in table if name == prefix or name.startswith(prefix + ".")), None)


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_the_arrows_between_modules(name, path):
    allowed = rule(INNER, name)
    if allowed is not None:
        inner = {found for found in imports(path) if found.split(".")[0] == "fgsnap"}
        strays = {f for f in inner if not any(f == a or (a != "fgsnap" and f.startswith(a + ".")) for a in allowed)}
        assert not strays, f"{name} may not import {sorted(strays)}"


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_the_libraries_each_part_may_use(name, path):
    outer = {found.split(".")[0] for found in imports(path)} - STDLIB - {"fgsnap"}
    assert outer <= rule(OUTER, name), f"{name} may not import {sorted(outer - rule(OUTER, name))}"


def test_the_table_knows_every_module():
    """A new top-level module must be given its place in the tables above."""
    top = {name for name, _ in modules() if name.count(".") == 1}
    assert top - {"fgsnap.__main__", "fgsnap.cli", "fgsnap.environment"} <= set(INNER)


def test_the_package_itself_imports_nothing():
    """What it has to offer comes when it is asked for."""
    program = (
        "import sys; before = {*sys.modules}\n"
        "import fgsnap; print({m for m in {*sys.modules} - before if m.split('.')[0] not in sys.stdlib_module_names})\n"
        "fgsnap.load, fgsnap.RequestError; print('fgsnap.runtime.pipeline' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["{'fgsnap'}", "True"]


NEVER = (
    "transformers",
    "huggingface_hub",
    "torch",
    "numpy",
    "fastapi",
    "openai",
    "boto3",
    "pydantic",
    "safetensors",
    "llguidance",
)


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("fgsnap.cli", (*NEVER, "msgspec", "tokenizers", "starlette", "h11", "fgsnap.convert", "fgsnap.runtime")),
        ("fgsnap.cli", ("fgsnap.bench", "matplotlib", "h11", "asyncio")),
        ("fgsnap.bench.command", (*NEVER, "matplotlib", "tokenizers", "msgspec", "fgsnap.runtime")),
        ("fgsnap.diff", (*NEVER, "click", "tokenizers", "fgsnap.convert", "fgsnap.runtime")),
        ("fgsnap.snapshot", (*NEVER, "tokenizers", "starlette", "fgsnap.convert", "fgsnap.runtime")),
        ("fgsnap.runtime.engine", (*NEVER, "starlette", "h11", "fgsnap.convert", "fgsnap.runtime.grammars")),
        ("fgsnap.runtime.worker", (*NEVER, "starlette", "h11", "tokenizers", "minijinja", "fgsnap.convert")),
        ("fgsnap.runtime.nursery", (*NEVER, "starlette", "h11", "llguidance", "fgsnap.kernels", "fgsnap.convert")),
        ("fgsnap.runtime.server", (*NEVER, "fgsnap.convert", "fgsnap.kernels.native")),
        (
            "fgsnap.runtime.service",
            ("starlette", "anyio", "prometheus_client", "fgsnap.kernels", "fgsnap.runtime.routes"),
        ),
        ("fgsnap.runtime.text", (*NEVER, "fgsnap.kernels", "fgsnap.convert", "h11")),
        ("fgsnap.runtime.pipeline", (*NEVER, "starlette", "h11", "asyncio", "fgsnap.convert")),
        ("fgsnap.kernels.native", NEVER),
        ("fgsnap.convert.pipeline", ("torch", "transformers", "fgsnap.runtime")),
    ],
)
def test_what_a_module_never_loads(module, forbidden):
    program = f"import {module}, sys; print([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_serve_path_stays_small():
    """Modules loaded by the server process; the usual stack of this field loads 1,543 before torch."""
    program = (
        "import fgsnap.cli, fgsnap.runtime.launch, fgsnap.runtime.service, fgsnap.runtime.text, sys\n"
        "print(len(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 285


@pytest.mark.skipif(not native.available()[0], reason="the reference backend is torch")
@pytest.mark.parametrize("command", [["run", "Hi"], ["chat"]])
def test_answers_of_the_native_backend_come_without_torch(command, tmp_path):
    """As test_launch asks of ``serve``."""
    snapshot = servable_snapshot(tmp_path / "snap")
    name, *prompt = command
    program = (
        "import sys; from fgsnap.cli import run_cli\n"
        f"code = run_cli({[name, str(snapshot), *prompt, '--backend', 'native', '--max-tokens', '3']!r})\n"
        f"sys.exit(code or [m for m in {NEVER!r} if m in sys.modules] or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], input="Hi\n", capture_output=True, text=True)
    told = "Stopped at --max-tokens 3.\n" if name == "run" else ""
    assert (done.returncode, done.stderr) == (0, told)
