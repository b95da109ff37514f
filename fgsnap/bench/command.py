"""The command line of ``fgsnap bench``. Each command imports what it measures with in its own body."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fgsnap.cli import (
    JSON_SCHEMA_VERSION,
    Command,
    engine_of,
    engine_options,
    json_option,
    option,
    print_json,
    progress_option,
    unwind_on_signals,
)
from fgsnap.errors import UsageError

if TYPE_CHECKING:
    from fgsnap.runtime.options import EngineOptions

Show = Callable[[dict[str, Any]], None]
Tell = Callable[[str], None]


class Numbers(click.ParamType[tuple[float, ...]]):
    """Numbers above 0, separated by commas. ``kind`` is int or float."""

    name = "numbers"

    def __init__(self, kind: type[float]) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            numbers = tuple(self._kind(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(0 < number < 1 << 31 for number in numbers):
            self.fail(f"{value!r} is no list of numbers above 0; write it as 1,8,32.", param, ctx)
        return numbers


def rounds_option(default: int) -> Callable[[Command], Command]:
    return option(
        "--rounds", type=click.IntRange(min=1), default=default, help="Counted repetitions, after one to warm up."
    )


def length_options(prompt: str, answer: str, shortest_answer: int = 1) -> Callable[[Command], Command]:
    """--prompt-tokens and --max-tokens, with their help."""

    def decorate(command: Command) -> Command:
        lengths = option("--max-tokens", type=click.IntRange(min=shortest_answer), default=128, help=answer)(command)
        return option("--prompt-tokens", type=click.IntRange(min=1), default=512, help=prompt)(lengths)

    return decorate


def common_options(command: Command) -> Command:
    """The options that all measurements share."""
    output = option("-o", "--output", type=click.Path(path_type=Path), help="Also write the result to this JSON file.")
    return engine_options(output(json_option(progress_option(command))))


@click.command()
@click.argument("snapshot", type=click.Path(path_type=Path))
@rounds_option(7)
@common_options
def startup(snapshot: Path, rounds: int, **settings: Any) -> None:
    """Measure exec to the first token, phase by phase.

    Each round starts a fresh 'fgsnap serve', takes one token over HTTP and stops it. The page cache is warm.

    \b
    Examples:
      fgsnap bench startup snap/
      fgsnap bench startup snap/ --rounds 21 --json
    """
    engine, tell, finish = _begin("startup", settings)
    from fgsnap.bench import show
    from fgsnap.bench.startup import measure

    finish(measure(snapshot, engine, rounds, tell), show.startup)


@click.command()
@click.argument("snapshot", type=click.Path(path_type=Path))
@length_options("Length of every prompt.", "Length of every answer.", shortest_answer=2)
@option("--batch", type=click.IntRange(min=1), default=1, help="Requests that run at once.")
@rounds_option(5)
@common_options
def latency(snapshot: Path, prompt_tokens: int, max_tokens: int, batch: int, rounds: int, **settings: Any) -> None:
    """Measure the engine alone, at one batch size.

    It runs in this process, without HTTP: time to the first token, prefill, time between tokens, decode.

    \b
    Examples:
      fgsnap bench latency snap/
      fgsnap bench latency snap/ --prompt-tokens 2048 --batch 8
    """
    engine, tell, finish = _begin("latency", settings)
    from fgsnap.bench import local, show

    finish(local.latency(snapshot, engine, local.Shape(prompt_tokens, max_tokens), batch, rounds, tell), show.latency)


@click.command()
@click.argument("snapshot", type=click.Path(path_type=Path))
@length_options("Length of every prompt.", "Length of every answer.")
@option("--batch", type=Numbers(int), default="1,8,32", help="Requests that run at once, one size after the other.")
@option("--requests", type=click.IntRange(min=1), help="Requests of a round; default: twice the batch size.")
@rounds_option(3)
@common_options
def throughput(
    snapshot: Path,
    prompt_tokens: int,
    max_tokens: int,
    batch: tuple[int, ...],
    requests: int | None,
    rounds: int,
    **settings: Any,
) -> None:
    """Measure the engine alone, at several batch sizes.

    It runs in this process, without HTTP: prefill and decode tokens a second.

    \b
    Examples:
      fgsnap bench throughput snap/
      fgsnap bench throughput snap/ --batch 1,8,32,64 --requests 128
    """
    engine, tell, finish = _begin("throughput", settings)
    from fgsnap.bench import local, show

    if requests is not None and requests < max(batch):
        raise UsageError(
            f"{requests} requests do not fill a batch of {max(batch)}.", "", "Raise --requests, or lower --batch."
        )
    shape = local.Shape(prompt_tokens, max_tokens)
    finish(local.throughput(snapshot, engine, shape, batch, requests, rounds, tell), show.throughput)


@click.command()
@click.argument("snapshot", type=click.Path(path_type=Path), required=False)
@option("--url", help="Measure this OpenAI-compatible endpoint instead, such as http://127.0.0.1:8000/v1")
@option("--model", help="Name to ask for; default: the first that the endpoint lists.")
@option("--api-key-file", type=click.Path(path_type=Path), help="File that holds the endpoint's API key.")
@option("--clients", type=Numbers(int), default="1,2,4,8,16,32", help="Clients at once, one level after the other.")
@option("--requests", type=click.IntRange(min=1), default=8, help="Requests a client, after one to warm up.")
@length_options("Mean length of the prompts, drawn from Normal(mean, 0.3 mean).", "Mean length of the answers.")
@option("--context", type=click.IntRange(min=3), help="Cut prompt and answer to this; default: what the endpoint says.")
@option("--seed", type=int, default=0, help="Of all lengths, prompts and pauses.")
@option("--temperature", type=click.FloatRange(0, 2), default=0.0, help="0 is greedy.")
@option("--tokenizer", type=click.Path(path_type=Path), help="The model's tokenizer.json; prompts are words of it.")
@option(
    "--prompt-format", type=click.Choice(("ids", "text")), default="ids",
    help="Send prompts as token ids, or as text of so many tokens.",
)  # fmt: skip
@option("--ignore-eos/--no-ignore-eos", default=True, help="Ask for answers of exactly the drawn length.")
@option("--timeout", type=click.FloatRange(min=0, min_open=True), default=600.0, help="Seconds an answer may take.")
@option(
    "--sla-prompt-rate", type=click.FloatRange(min=0, min_open=True), default=512.0,
    help="Prompt tokens/s until the first token.",
)  # fmt: skip
@option("--sla-generation-rate", type=Numbers(float), default="2,4,6", help="Tokens/s after it; each is an SLA.")
@option("--plot", type=click.Path(path_type=Path), help="Draw the curve into this PNG (needs the extra 'bench').")
@common_options
def serve(snapshot: Path | None, url: str | None, plot: Path | None, **settings: Any) -> None:
    """Measure an endpoint under load.

    Closed-loop clients ask for streamed completions: of a 'fgsnap serve' that is started over SNAPSHOT with the engine
    options below, or of any OpenAI-compatible endpoint with --url. The method is that of DeepSpeed-FastGen;
    docs/benchmarking.md tells how to read the result.

    \b
    Examples:
      fgsnap bench serve snap/ --plot curve.png
      fgsnap bench serve --url http://127.0.0.1:8000/v1 --prompt-tokens 1200 --max-tokens 60
    """
    if (snapshot is None) == (url is None):
        raise UsageError("Give a SNAPSHOT or --url, and not both.", "It is what is measured.")
    if snapshot is None:
        _refuse_engine_options(click.get_current_context())
    _check_folder(plot, "--plot")
    if plot is not None:
        import matplotlib.figure  # noqa: F401 - where it is missing, nothing is measured first
    engine, tell, finish = _begin("serve", settings)
    from fgsnap.bench import show, target

    options = target.LoadOptions(**settings)
    if snapshot is not None:
        result = target.measure_snapshot(snapshot, engine, options, tell)
    else:
        result = target.measure_url(str(url), options, tell)
    finish(result, show.serve)
    if plot is not None:
        from fgsnap.bench.plot import draw

        draw({result["model"]: result["levels"]}, plot)


@click.command()
@click.argument("snapshot", type=click.Path(path_type=Path))
@option(
    "--share", type=click.FloatRange(0, 1, min_open=True), default=0.9,
    help="Of the best tokens/s; the smallest forward that has it is the budget.",
)  # fmt: skip
@rounds_option(5)
@common_options
def budget(snapshot: Path, share: float, rounds: int, **settings: Any) -> None:
    """Measure how many tokens a forward should carry.

    Forwards of 1 to 2048 tokens are timed: pieces of prompts with some decodes beside. The fewest tokens with nearly
    the best throughput are kept in the user's cache, for this snapshot on this host; 'fgsnap serve', 'run' and 'bench'
    use them wherever --max-batch-tokens is not given.

    \b
    Examples:
      fgsnap bench budget snap/
      fgsnap bench budget snap/ --share 0.8 --threads 4
    """
    engine, tell, finish = _begin("budget", settings)
    from fgsnap.bench import show
    from fgsnap.bench.budget import budget as measure

    finish(measure(snapshot, engine, share, rounds, tell), show.budget)


COMMANDS: dict[str, click.Command] = {
    "startup": startup,
    "latency": latency,
    "throughput": throughput,
    "budget": budget,
    "serve": serve,
}


def _begin(name: str, settings: dict[str, Any]) -> tuple[EngineOptions, Tell, Callable[[dict[str, Any], Show], None]]:
    """Take the common options out of the settings: the engine's, where to tell progress, and how to end."""
    unwind_on_signals()
    output, as_json, progress = (settings.pop(key) for key in ("output", "as_json", "progress"))
    _check_folder(output, "--output")

    def finish(result: dict[str, Any], show: Show) -> None:
        from fgsnap.bench.record import record, write

        whole = record(name, result)
        if as_json:
            print_json(whole)
        else:
            show(result)
        if output is not None:
            write(output, {"schema_version": JSON_SCHEMA_VERSION, **whole})

    return engine_of(settings), _teller(progress), finish


def _teller(wanted: bool | None) -> Tell:
    shown = sys.stderr.isatty() if wanted is None else wanted

    def tell(line: str) -> None:
        if shown:
            click.echo(line, err=True)

    return tell


def _check_folder(path: Path | None, flag: str) -> None:
    """What has been measured must not be lost at the end."""
    if path is not None and not path.absolute().parent.is_dir():
        raise UsageError(f"{flag} {path} cannot be written.", "Its folder does not exist.")


def _refuse_engine_options(context: click.Context) -> None:
    from fgsnap.runtime.options import EngineOptions

    for name in EngineOptions.__struct_fields__:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} has no meaning with --url.", "It is for a server that is started over SNAPSHOT.")
