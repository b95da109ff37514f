"""The command line as scripts see it: output, exit codes, three-line errors, and what it does not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import click
import pytest

from fgsnap import __version__
from fgsnap.cli import EXTRAS, ByteSize, TextOrFile, WholeText, cli, run_cli, size
from fgsnap.convert.families import FAMILIES
from fgsnap.environment import _numa_nodes
from fgsnap.runtime import generate
from fgsnap.runtime.pipeline import CONSTRAINING, Response
from tests.commands import every_command
from tests.snapshots import make_snapshot, tiny_spec

COMMANDS = (
    "convert", "serve", "run", "chat", "inspect", "verify", "diff", "export", "families", "bench", "env", "version",
)  # fmt: skip
TEXT = {"config.json": b"{}"}
HEAVY = (
    "torch", "transformers", "huggingface_hub", "numpy", "gguf", "starlette", "h11", "tokenizers", "fgsnap.bench",
)  # fmt: skip


def fgsnap(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fgsnap", *arguments], capture_output=True, text=True, env={**os.environ, **env}
    )


def test_help_lists_every_command_and_the_exit_codes():
    done = fgsnap("--help")
    assert done.returncode == 0
    assert all(f"  {command}" in done.stdout for command in COMMANDS)
    assert "3 snapshot refused" in " ".join(done.stdout.split())


@pytest.mark.parametrize("command", ["bench", *every_command()])
def test_every_command_explains_itself(command):
    done = fgsnap(*command.split(), "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: ")


def test_version_is_printed_by_both_spellings_and_as_json():
    assert fgsnap("version").stdout == fgsnap("--version").stdout == f"fgsnap {__version__}\n"
    assert json.loads(fgsnap("version", "--json").stdout) == {"schema_version": 1, "version": __version__}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["conver"], 2, "Did you mean 'fgsnap convert'"),
        (["convert"], 2, "SOURCE"),
        (["convert", "x"], 2, "-o DIR"),
        (["serve", "--prt", "1"], 2, "--port"),
        (["serve", "x", "--kv-memory", "lots"], 2, "is not a size"),
        (["serve", "x", "--tp", "0"], 2, "--tp"),
        (["serve", "x", "--tp", "two"], 2, "'two' is not a whole number."),
        (["run", "x", "hello", "--temperature", "hot"], 2, "'hot' is not a number."),
        (["run", "x", "hello", "--temperature", "nan"], 2, "nan is not a finite number."),
        (["serve", "x", "--grace", "inf"], 2, "inf is not a finite number."),
        (["serve", "x", "--max-batch-tokens", "1048577"], 2, "1048577 is not in the range 1<=x<=1048576."),
        (["run", "x", "hello", "--json-schema", "@nowhere"], 2, "'nowhere' cannot be read: No such file"),
        (["chat", "nowhere"], 4, "nowhere"),
        (["inspect", "nowhere"], 4, "nowhere"),
        (["verify", "nowhere"], 4, "nowhere"),
        (["diff", "nowhere", "nowhere"], 4, "nowhere"),
        (["diff", "nowhere.gguf", "nowhere.gguf"], 4, "nowhere.gguf"),
        (["serve", "nowhere"], 4, "nowhere"),
        (["run", "nowhere", "hello"], 4, "nowhere"),
        (["export", "nowhere", "-o", "out"], 4, "nowhere"),
        (["convert", "./nowhere", "-o", "out"], 4, "nowhere"),
        (["convert", "nowhere.gguf", "-o", "out"], 4, "'nowhere.gguf' does not exist"),
        (["convert", "/dev/null", "-o", "out"], 2, "'/dev/null' is not a checkpoint"),
    ],
)
def test_an_error_is_three_short_lines_and_its_exit_code(arguments, code, words, tmp_path):
    done = subprocess.run([sys.executable, "-m", "fgsnap", *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    lines = done.stderr.strip().splitlines()
    assert 1 <= len(lines) <= 3
    assert lines[0].startswith("Error: ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_trace():
    assert "Traceback" in fgsnap("inspect", "nowhere", FGSNAP_DEBUG="1").stderr


def test_every_flag_has_an_environment_twin():
    for command in every_command().values():
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                flag = next(name for name in parameter.opts if name.startswith("--"))
                assert parameter.envvar == "FGSNAP_" + flag[2:].replace("-", "_").upper()


def test_a_flag_can_come_from_the_environment():
    assert json.loads(fgsnap("version", FGSNAP_JSON="1").stdout)["version"] == __version__


def test_a_bad_value_from_the_environment_is_laid_to_its_variable():
    done = fgsnap("serve", "nowhere", FGSNAP_PORT="abc")
    assert done.returncode == 2 and "It was set by FGSNAP_PORT in the environment." in done.stderr.splitlines()
    assert "FGSNAP" not in fgsnap("serve", "nowhere", "--port", "abc", FGSNAP_PORT="1").stderr


def test_help_version_and_env_import_nothing_heavy():
    for arguments in (["--help"], ["version"], ["env"]):
        program = (
            "import sys; from fgsnap.cli import run_cli; code = run_cli(sys.argv[1:]);"
            f"loaded = [m for m in {HEAVY!r} if m in sys.modules]; sys.exit(code or (9 if loaded else 0))"
        )
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, (arguments, done.stderr)


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (["convert", "here", "-o", "out"], "numpy", "convert"),
        (["convert", "here", "--dry-run"], "numpy", "convert"),
        (["export", "snap", "-o", "out"], "numpy", "convert"),
        (["diff", "snap", "here"], "numpy", "convert"),
        (["diff", "snap", "snap", "--values"], "numpy", "convert"),
        (["families"], "numpy", "convert"),
    ],
)
def test_a_plain_installation_names_the_extra_that_is_missing(arguments, package, extra, tmp_path):
    """As after ``pip install fgsnap``: what an extra would bring cannot be imported."""
    make_snapshot(tmp_path / "snap", tiny_spec(), text_files=TEXT)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").write_text("{}")
    block = f"import sys; sys.modules.update(dict.fromkeys({tuple(EXTRAS)!r}))"
    program = f"{block}; from fgsnap.cli import run_cli; sys.exit(run_cli(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 6, done.stderr
    assert f"needs the package {package}" in done.stderr
    assert f"pip install 'fgsnap[{extra}]'" in done.stderr
    assert len(done.stderr.splitlines()) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"snap", "here"}


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["diff", "one"]], ids=lambda command: command[0])
def test_what_these_commands_never_import(command, tmp_path):
    make_snapshot(tmp_path / "snap", tiny_spec(), text_files=TEXT)
    make_snapshot(tmp_path / "one", tiny_spec(), 2, text_files=TEXT)
    program = (
        "import sys; from fgsnap.cli import run_cli; code = run_cli(sys.argv[1:]);"
        f"loaded = [m for m in {HEAVY!r} if m in sys.modules]; print(loaded, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command, "snap"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0
    assert done.stderr == "[]\n"


def test_a_failure_is_json_too_where_json_was_asked_for():
    done = fgsnap("inspect", "nowhere", "--json")
    assert json.loads(done.stdout)["error"]["exit_code"] == done.returncode == 4
    assert "nowhere" in json.loads(done.stdout)["error"]["lines"][0]


def test_no_arguments_show_the_help():
    done = fgsnap()
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: fgsnap")


def test_several_stop_texts_may_hold_blanks_in_the_environment():
    assert WholeText().split_envvar_value("capital of\nthe end") == ["capital of", "the end"]


def test_a_text_may_be_in_a_file(tmp_path):
    file = tmp_path / "schema.json"
    file.write_text('{"type": "é"}', "utf-8")
    assert TextOrFile().convert(f"@{file}", None, None) == '{"type": "é"}'
    assert TextOrFile().convert("{}", None, None) == "{}"
    file.write_bytes(b"ab\xff")
    with pytest.raises(click.BadParameter, match="is not UTF-8 text: byte 2 is not"):
        TextOrFile().convert(f"@{file}", None, None)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--json-schema", "@schema.json"], {"json_schema": '{"const": 1}'}),
        (["--grammar", "@schema.json"], {"grammar": '{"const": 1}'}),
        (["--json-schema", "{}"], {"json_schema": "{}"}),
        (["--regex", "@[a-z]+"], {"regex": "@[a-z]+"}),
        (["--choice", "quite so", "--choice", "@no"], {"choice": ("quite so", "@no")}),
        ([], {}),
    ],
)
def test_run_has_what_constrains_an_answer(arguments, option, tmp_path, monkeypatch):
    (tmp_path / "schema.json").write_text('{"const": 1}')
    monkeypatch.chdir(tmp_path)
    asked = {}
    monkeypatch.setattr(generate, "answer", lambda *arguments, **options: asked.update(options) or Response(
        generated_text="", prompt_length=1, generated_length=0, finish_reason="stop"
    ))  # fmt: skip
    assert run_cli(["run", "snap", "Hi", *arguments]) == 0
    assert {name: value for name, value in asked.items() if name in CONSTRAINING} == option


def test_env_names_backends_and_hides_secrets():
    done = fgsnap("env", "--json", HF_TOKEN="hf_secret_value")
    report = json.loads(done.stdout)
    assert report["fgsnap"] == __version__
    assert report["backend native"].startswith(("yes", "no: "))
    assert "hf_secret_value" not in done.stdout
    assert "HF_TOKEN=(set)" in report["environment"]


@pytest.mark.parametrize(
    ("setting", "threads"), [("1,2", "1: OMP_NUM_THREADS"), ("none", "cannot be told: OMP_NUM_THREADS is 'none'.")]
)
def test_env_says_how_many_threads_there_would_be_and_why(setting, threads):
    assert json.loads(fgsnap("env", "--json", OMP_NUM_THREADS=setting).stdout)["threads"] == threads


def test_memory_nodes_are_listed_in_their_order(tmp_path):
    for number, processors in ((0, "0-15"), (10, "32-47"), (2, "16-31")):
        (tmp_path / f"node{number}").mkdir()
        (tmp_path / f"node{number}" / "cpulist").write_text(processors + "\n")
    assert _numa_nodes(tmp_path) == ["0: 0-15", "2: 16-31", "10: 32-47"]
    assert _numa_nodes(tmp_path / "none") == []


@pytest.mark.parametrize(("text", "value"), [("2GiB", 2 << 30), ("512M", 512 << 20), ("4096", 4096), ("1.5kb", 1536)])
def test_byte_sizes(text, value):
    assert ByteSize().convert(text, None, None) == value


def test_sizes_are_printed_for_people():
    assert [size(n) for n in (0, 1023, 1536, 5 << 30)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]


@pytest.mark.parametrize(("interrupt", "code"), [(KeyboardInterrupt, 130), (SystemExit(143), 143)])
def test_an_interrupt_that_another_error_replaced_is_still_one(monkeypatch, capsys, interrupt, code):
    """As when a signal comes while a lock is taken, and leaving the lock fails."""

    def cut_short(*arguments, **settings):
        try:
            raise interrupt
        finally:
            raise RuntimeError("cannot release un-acquired lock")

    monkeypatch.setattr(cli, "main", cut_short)
    assert run_cli(["version"]) == code
    assert capsys.readouterr().err == "Interrupted.\n"


def test_families_is_a_table_that_fits_a_terminal():
    done = fgsnap("families", COLUMNS="100")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and max(map(len, lines)) <= 100
    assert lines[0].split("  ")[0] == "model type"
    [falcon] = [line for line in lines if line.startswith("falcon ")]
    assert "Falcon-7B" in falcon and "not: " in done.stdout
    assert lines[-1].startswith(f"{len(FAMILIES)} model types; ")


def test_families_as_json_hold_their_checkpoints_and_features():
    listed = json.loads(fgsnap("families", "--json").stdout)["families"]
    falcon = next(row for row in listed if row["model_type"] == "falcon")
    assert "tiiuae/falcon-180B" in falcon["checkpoints"]
    assert {"attention.alibi", "layer.parallel", "norm.ln"} <= {*falcon["features"]}
