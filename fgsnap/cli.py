"""The command line: what users type, and nothing of how it is done.

Only click and the errors are imported here; each command imports what it runs in its own body, so that ``--help`` costs
what Python and click cost. Results go to stdout, bars and hints to stderr.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from fgsnap import __version__
from fgsnap.errors import FgsnapError, UsageError, missing_extra

if TYPE_CHECKING:
    from fgsnap.convert.pipeline import Result
    from fgsnap.runtime.launch import Begun
    from fgsnap.runtime.options import EngineOptions
    from fgsnap.snapshot import Manifest, Snapshot

JSON_SCHEMA_VERSION = 1
BACKENDS = ("auto", "native", "reference")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("bfloat16", "float16", "float32")
TARGETS = ("generic", "cpu")
EXTRAS = {
    "torch": "torch", "numpy": "convert", "gguf": "convert", "huggingface_hub": "convert", "matplotlib": "bench",
}  # fmt: skip
"""Packages that a plain installation lacks, and the extra that brings each."""

_NUMBERS = {"integer": "is not a whole number.", "float": "is not a number."}

Command = Callable[..., None]


def option(*names: str, **settings: Any) -> Callable[[Command], Command]:
    """A click option whose environment twin is FGSNAP_ and its long name, and whose default shows in the help."""
    long_name = next(name for name in names if name.startswith("--")).split("/")[0]
    settings.setdefault("envvar", "FGSNAP_" + long_name.removeprefix("--").replace("-", "_").upper())
    settings.setdefault("show_default", settings.get("default") is not None and not settings.get("is_flag"))
    return click.option(*names, **settings)


json_option = option("--json", "as_json", is_flag=True, envvar="FGSNAP_JSON", help="Print the result as JSON.")
progress_option = option(
    "--progress/--no-progress", default=None, envvar="FGSNAP_PROGRESS", show_default=False,
    help="Show a progress bar (default: only on a terminal).",
)  # fmt: skip


class Number(click.FloatRange):
    """A float within bounds; NaN, which no comparison excludes, and infinity are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def engine_options(command: Command) -> Command:
    """The options that ``serve`` and ``run`` share."""
    for decorate in reversed(
        (
            option("--backend", type=click.Choice(BACKENDS), default="auto", help="Which kernels compute."),
            option("--device", type=click.Choice(DEVICES), default="auto", help="Where the reference computes."),
            option(
                "--dtype", type=click.Choice(("auto", *DTYPES)), default="auto",
                help="Precision of activations and KV cache; auto: the weights', but float32 for float16 on a CPU.",
            ),
            option(
                "--tp", type=click.IntRange(min=1),
                help="Tensor parallel degree; default: the snapshot's, or what this host has processors or GPUs for.",
            ),
            option("--max-model-len", type=click.IntRange(min=1), help="Longest context; default: the model's."),
            option(
                "--max-batch-tokens", type=click.IntRange(1, 1 << 20),
                help="Token budget of one forward; default: what 'fgsnap bench budget' measured here, else 128 on a "
                "CPU and 512 on a GPU.",
            ),
            option("--kv-memory", type=ByteSize(), help="KV cache; default: 2GiB, or half of what the weights leave."),
            option("--threads", type=click.IntRange(min=1), help="CPU threads of all ranks; default: those there are."),
        )
    ):  # fmt: skip
        command = decorate(command)
    return command


def sampling_options(command: Command) -> Command:
    """The options that ``run`` and ``chat`` share."""
    for decorate in reversed(
        (
            option("--max-tokens", type=click.IntRange(min=1), default=256, help="Most tokens to generate."),
            option("--temperature", type=Number(0, 2), default=0.0, help="0 is greedy."),
            option("--top-k", type=click.IntRange(min=0), default=0, help="Sample among the k most likely; 0: off."),
            option(
                "--top-p", type=Number(0, 1, min_open=True), default=1.0,
                help="Sample within this probability.",
            ),
            option("--seed", type=int, help="Makes sampling repeatable."),
        )
    ):  # fmt: skip
        command = decorate(command)
    return command


class ByteSize(click.ParamType[int]):
    """Bytes, as ``2GiB``, ``512M`` or a plain number; units are powers of 1024."""

    name = "size"
    _units: ClassVar[dict[str, int]] = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip().upper().removesuffix("B").removesuffix("I")
        unit = text[-1:] if text[-1:] in self._units else ""
        try:
            size = int(float(text.removesuffix(unit)) * self._units[unit])
        except (ValueError, OverflowError):
            size = 0
        if size <= 0:
            self.fail(f"{value!r} is not a size; write it as 2GiB or 512MiB.", param, ctx)
        return size


class RankList(click.ParamType[tuple[int, ...]]):
    """Tensor parallel ranks, as ``0,3`` or ``0-3``."""

    name = "ranks"
    _span = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?", re.ASCII)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        ranks: list[int] = []
        for word in str(value).split(","):
            span = self._span.fullmatch(word.strip())
            named = range(int(span[1]), int(span[2] or span[1]) + 1) if span else ()
            if not named:
                self.fail(f"{value!r} is not a list of ranks; write it as 0,3 or 0-3.", param, ctx)
            ranks += named
        return tuple(ranks)


class WholeText(click.ParamType[str]):
    """A text that may hold blanks; several of them in one environment variable are split at newlines."""

    name = "text"
    envvar_list_splitter = "\n"


class TextOrFile(click.ParamType[str]):
    """A text, or after an ``@`` the file that holds it, as curl has it."""

    name = "text|@file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not text.startswith("@"):
            return text
        try:
            return Path(text[1:]).read_bytes().decode()
        except OSError as error:
            self.fail(f"{text[1:]!r} cannot be read: {error.strerror}.", param, ctx)
        except UnicodeDecodeError as error:
            self.fail(f"{text[1:]!r} is not UTF-8 text: byte {error.start} is not.", param, ctx)


class SuggestingGroup(click.Group):
    """A group that answers a mistyped command with the ones that exist."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            from difflib import get_close_matches

            own, close = ctx.command_path, get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f"Did you mean '{own} {close[0]}'?" if close else f"Run '{own} --help' for what each one does."
            raise UsageError(
                f"There is no command '{args[0]}'.", f"Commands: {', '.join(self.list_commands(ctx))}.", hint
            )
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of a user's first day, not of the alphabet


class BenchGroup(SuggestingGroup):
    """The commands of ``fgsnap bench``, which are imported when one of them is looked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from fgsnap.bench.command import COMMANDS

        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        from fgsnap.bench.command import COMMANDS

        return COMMANDS.get(cmd_name)


@click.group(
    cls=SuggestingGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Start with: fgsnap convert ORG/NAME -o snap/ --target cpu && fgsnap serve snap/",
)
@click.version_option(__version__, "--version", prog_name="fgsnap", message="%(prog)s %(version)s")
def cli() -> None:
    """Turn a Hugging Face checkpoint into a verified snapshot, and serve it at once.

    Exit codes: 0 ok, 1 failed, 2 usage, 3 snapshot refused, 4 not found, 5 network (try again), 6 this host cannot,
    129, 130 and 143 interrupted. FGSNAP_DEBUG=1 shows the trace of an error.
    """


@cli.command()
@click.argument("source")
@option("-o", "--output", type=click.Path(path_type=Path), help="Directory of the new snapshot.")
@option("--tp", type=click.IntRange(min=1), default=1, help="Tensor parallel degree: one rank file each.")
@option("--ranks", type=RankList(), help="Convert only these ranks (0,3 or 0-3); who converts the last one publishes.")
@option("--dtype", type=click.Choice(DTYPES), help="Cast the weights; default: as in the checkpoint.")
@option(
    "--target",
    type=click.Choice(TARGETS),
    default="generic",
    help="Whose kernels the weights are laid out for; any read them.",
)
@option("--revision", help="Branch, tag or commit of a Hub repository.")
@option("--download", is_flag=True, help="Keep a Hub repository in the Hub cache; else its weights are streamed.")
@option("--dry-run", is_flag=True, help="Print the plan and write nothing; needs only config.json.")
@option("--workers", type=click.IntRange(min=1), help="Threads that read and cast ahead of the writer.")
@option("--canary/--no-canary", default=True, help="Record a float32 forward for every start to be checked against.")
@json_option
@progress_option
def convert(
    source: str,
    output: Path | None,
    tp: int,
    ranks: tuple[int, ...] | None,
    dtype: str | None,
    target: str,
    revision: str | None,
    download: bool,
    dry_run: bool,
    workers: int | None,
    canary: bool,
    as_json: bool,
    progress: bool | None,
) -> None:
    """Turn a checkpoint into a snapshot.

    SOURCE is a local Hugging Face folder, a .gguf file, ORG/NAME or hf://ORG/NAME@REV.

    \b
    Examples:
      fgsnap convert HuggingFaceTB/SmolLM2-135M-Instruct -o snap/ --target cpu
      fgsnap convert ./checkpoint --tp 4 --dtype bfloat16 -o snap/
      fgsnap convert ./checkpoint --tp 8 --ranks 0-3 -o snap/
      fgsnap convert ./checkpoint --tp 8 --dry-run
    """
    if dry_run:
        _print_plan(
            as_json, source, tp=tp, ranks=ranks, dtype=dtype, target=target, revision=revision, workers=workers,
            canary=canary,
        )  # fmt: skip
        return
    if output is None:
        raise UsageError("convert needs -o DIR.", "It names the directory of the new snapshot.", "Add: -o snap/")
    unwind_on_signals()
    from fgsnap.convert.pipeline import convert as run_conversion

    result = run_conversion(
        source, output, tp=tp, ranks=ranks, dtype=dtype, target=target, revision=revision, download=download,
        workers=workers, canary=canary, progress=_bar(progress, "convert"), stage=_tell_canary,
    )  # fmt: skip
    for note in result.notes:
        click.echo(f"Note: {note}", err=True)
    if as_json:
        print_json(_facts(result))
    else:
        _print_result(output, result, tp)


def _facts(result: Result) -> dict[str, Any]:
    network = None
    if result.fetched is not None:
        network = {"fetched": result.fetched, "needed": result.needed, "amplification": _amplification(result)}
    return {
        "id": result.id or None,
        "path": str(result.path),
        "bytes": result.bytes,
        "seconds": result.seconds,
        "missing": list(result.missing),
        "network": network,
        "notes": list(result.notes),
    }


def _amplification(result: Result) -> float | None:
    """Bytes that came over the network for each that was needed."""
    if result.fetched is None or not result.needed:
        return None
    return round(result.fetched / result.needed, 4)


def _print_result(output: Path, result: Result, tp: int) -> None:
    written = f"{size(result.bytes)} in {result.seconds:.1f} s"
    if result.missing:
        click.echo(f"{result.path}  {tp - len(result.missing)} of {tp} ranks  {written}")
    else:
        click.echo(f"{output}  id {result.id[:12]}  {written}")
    if result.fetched is not None:
        factor = _amplification(result)
        of_what = f", {factor:.2f} times what these ranks are made of" if factor else ""
        click.echo(f"streamed {size(result.fetched)}{of_what}")
    missing = ",".join(map(str, result.missing))
    next_step = f"convert the others, here or elsewhere: --ranks {missing}" if missing else f"fgsnap serve {output}"
    click.echo(f"Next: {next_step}", err=True)


def _tell_canary(stage: str) -> None:
    """The weights have a bar; the float32 forward that follows has none, and on a big model takes a while."""
    if stage == "canary" and sys.stderr.isatty():
        click.echo("Checking the snapshot in a fresh process: one float32 forward ...", err=True)


def _print_plan(as_json: bool, source: str, **settings: Any) -> None:
    import msgspec

    from fgsnap.convert.pack import TARGETS as LAYOUTS
    from fgsnap.convert.plan import plan_source

    plan = plan_source(source, **settings)
    if as_json:
        print_json(msgspec.to_builtins(plan))
        return
    for rank in plan.ranks:
        click.echo(f"{rank.file}  {len(rank.tensors)} tensors  {size(rank.bytes)}")
    assumed = {
        "assumed": ", assumed: config.json states no dtype",
        "unknown": ", assumed: the dtype that config.json states is unknown",
    }.get(plan.dtype_from, "")
    click.echo(f"total      {size(plan.bytes)} in {len(plan.ranks)} rank file(s), {plan.dtype}{assumed}")
    click.echo(f"target     {plan.target}, layout {LAYOUTS[plan.target]}")
    click.echo(f"KV cache   {plan.kv_bytes_per_token} bytes a token")
    click.echo(f"peak memory of the conversion about {size(plan.conversion_memory)}")
    if plan.canary_memory is not None:
        click.echo(f"peak memory of the canary, after it, about {size(plan.canary_memory)}")
    click.echo(f"tensor parallel degrees that work: {', '.join(map(str, plan.possible_tp))}")


@cli.command()
@click.argument("snapshot", type=click.Path(path_type=Path))
@option("--host", default="127.0.0.1", help="Address to listen on.")
@option("--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen on; 0 picks a free one.")
@engine_options
@option(
    "--max-num-seqs", type=click.IntRange(min=1),
    help="Most requests in one forward, for which a token budget that is left out has room; default: 256, or the "
    "budget if that is less.",
)  # fmt: skip
@option(
    "--max-waiting",
    type=click.IntRange(min=1),
    default=4096,
    help="Most requests queued beside those; more get status 429.",
)
@option(
    "--admission", type=click.Choice(("reserve", "optimistic")), default="reserve",
    help="reserve: start a request when the KV cache has room for it all; optimistic: sooner, but it may be preempted.",
)  # fmt: skip
@option(
    "--prefix-caching/--no-prefix-caching", default=True,
    help="Compute equal beginnings of prompts once.",
)  # fmt: skip
@option("--served-model-name", help="Name clients use; default: that on the Hub, else the directory's.")
@option("--api-key-file", type=click.Path(path_type=Path), help="File of accepted API keys, one a line.")
@option(
    "--verify", type=click.Choice(("manifest", "touch", "full")), default="manifest",
    help="What is hashed: before start only the manifest; touch: the rest too, while serving; full: all before start.",
)  # fmt: skip
@option("--startup-report", type=click.Path(path_type=Path), help="Write the phases of start-up to this JSON file.")
@option("--grace", type=Number(min=0), default=30.0, help="Seconds that SIGTERM lets open requests finish.")
@option("--default-max-tokens", type=click.IntRange(min=1), default=2048, help="Length of a chat that names none.")
def serve(snapshot: Path, **settings: Any) -> None:
    """Serve a snapshot over the OpenAI API.

    \b
    Examples:
      fgsnap serve snap/
      fgsnap serve snap/ --port 8080 --backend native --kv-memory 4GiB
    """
    unwind_on_signals()
    from fgsnap.runtime.launch import serve as run_server
    from fgsnap.runtime.options import ServeOptions

    engine = engine_of(settings)
    begun = click.get_current_context().obj
    sys.exit(run_server(ServeOptions(snapshot=str(snapshot), engine=engine, **_plain(settings)), begun))


@cli.command()
@click.argument("snapshot", type=click.Path(path_type=Path))
@click.argument("prompt")
@engine_options
@sampling_options
@option("--stop", type=WholeText(), multiple=True, help="End at this text; may be given several times.")
@option("--json-schema", type=TextOrFile(), help="Answer in JSON that this schema describes.")
@option("--regex", help="Answer with a whole match of this regular expression.")
@option("--choice", type=WholeText(), multiple=True, help="Answer with this text; may be given several times.")
@option("--grammar", type=TextOrFile(), help="Answer with what this Lark grammar derives.")
@option("--raw", is_flag=True, help="Continue the prompt as plain text, without the chat template.")
@json_option
def run(snapshot: Path, prompt: str, **settings: Any) -> None:
    """Answer one prompt on stdout, without a server.

    A snapshot with a chat template answers as a chat; --raw continues the text instead. A prompt of '-' is read from
    stdin, and a schema or grammar of '@FILE' from that file.

    \b
    Examples:
      fgsnap run snap/ "What is the capital of France?"
      fgsnap run snap/ "Once upon a time" --raw --temperature 0.8 --seed 7
      fgsnap run snap/ "Is Paris in France?" --choice yes --choice no
      fgsnap run snap/ "Describe Ada Lovelace." --json-schema @person.json
    """
    engine = engine_of(settings)
    if prompt == "-":
        prompt = _standard_input()
    if not prompt:
        raise UsageError("The prompt is empty.", "A model continues at least one token.", "Give it some text.")
    _answer(snapshot, prompt, engine, settings)


@cli.command()
@click.argument("snapshot", type=click.Path(path_type=Path))
@engine_options
@sampling_options
@option("--system", help="What the model is told before the conversation.")
def chat(snapshot: Path, system: str | None, **settings: Any) -> None:
    """Hold a conversation on the terminal, without a server.

    Ctrl-C ends an answer, Ctrl-D or an empty line the conversation. Messages may also be piped in, one a line.

    \b
    Example:
      fgsnap chat snap/ --system "Answer in one sentence."
    """
    from fgsnap.runtime.generate import chat as hold

    engine = engine_of(settings)
    hold(snapshot, read=_read_line, emit=_emit, engine=engine, system=system, **_options(settings))


@cli.command()
@click.argument("snapshot", type=click.Path(path_type=Path))
@option("--tensors", is_flag=True, help="List every stored tensor.")
@json_option
def inspect(snapshot: Path, tensors: bool, as_json: bool) -> None:
    """Show what a snapshot holds, from its manifest and the headers of its files."""
    from fgsnap.snapshot import open_snapshot

    opened = open_snapshot(snapshot)
    try:
        if as_json:
            import msgspec

            print_json({"id": opened.id, "manifest": msgspec.to_builtins(opened.manifest)})
        else:
            _print_summary(opened, tensors)
    finally:
        opened.close()


def _print_summary(opened: Snapshot, tensors: bool) -> None:
    from fgsnap.spec import DTYPE_BYTES

    manifest = opened.manifest
    spec, origin = manifest.spec, manifest.provenance
    kind = spec.layer_kinds[0].attention
    weights = sum(entry.bytes for entry in manifest.files.values() if entry.chunks is not None)
    first = manifest.tensors[0]
    kv_bytes = spec.kv_values_per_token() * DTYPE_BYTES[first.dtype]
    dtypes = ", ".join(sorted({entry.dtype for entry in manifest.tensors}))
    layouts = {entry.layout for entry in manifest.tensors if len(entry.shape) > 1}
    packed = "cpu" if "words32" in layouts else "generic"
    revision = f" at {origin.revision[:12]}" if origin.revision else ""
    rows = {
        "id": opened.id,
        "source": f"{origin.source}{revision}",
        "weights": f"{size(weights)} in {manifest.tp} rank file(s), {dtypes}, "
        f"layout {', '.join(sorted(layouts))} (--target {packed})",
        "decoder": f"{spec.depth} layers, width {spec.width}, {kind.heads} heads, {kind.kv_heads} KV heads, "
        f"vocabulary {spec.vocab_size}",
        "context": f"{spec.max_length} tokens, KV cache {kv_bytes} bytes a token in {first.dtype}",
        "text": f"eos {', '.join(map(str, manifest.text.eos_token_ids)) or 'none'}, "
        f"chat template {manifest.text.template or 'none'}",
        "canary": "none: recorded without one" if opened.canary is None else f"{len(opened.canary.tokens)} positions",
        "converter": f"fgsnap {origin.converter}",
    }
    for name, value in rows.items():
        click.echo(f"{name:<10} {value}")
    if tensors:
        _print_tensors(manifest)


def _print_tensors(manifest: Manifest) -> None:
    click.echo(f"{'file':<35}  {'offset':>12}  {'bytes':>12}  {'dtype':<9} {'layout':<8} {'shape':<14} tensor")
    for entry in manifest.tensors:
        shape, form = "x".join(map(str, entry.shape)), f"{entry.dtype:<9} {entry.layout:<8}"
        click.echo(f"{entry.file}  {entry.offset:>12}  {entry.bytes:>12}  {form} {shape:<14} {entry.name}")


@cli.command()
@click.argument("snapshot", type=click.Path(path_type=Path))
@json_option
@progress_option
def verify(snapshot: Path, as_json: bool, progress: bool | None) -> None:
    """Hash every byte that a snapshot's manifest covers, and compare; also ranks, where they hold the same."""
    from fgsnap.snapshot import verify as run_verification

    report = run_verification(snapshot, progress=_bar(progress, "verify"))
    if as_json:
        print_json({"id": report.id, "files": report.files, "bytes": report.bytes})
    else:
        click.echo(f"ok  id {report.id}  {report.files} files, {size(report.bytes)}")


@cli.command()
@click.argument("a")
@click.argument("b")
@option("--values", is_flag=True, help="Read what differs to its end, and count the numbers that do.")
@option("--all", "everything", is_flag=True, help="List every difference, each tensor in a line of its own.")
@json_option
@progress_option
def diff(a: str, b: str, values: bool, everything: bool, as_json: bool, progress: bool | None) -> None:
    """Show what two snapshots differ in: spec, tensors, text, files.

    A and B may be of any tensor parallel degree, dtype and layout. One of them may be a checkpoint (a folder, a .gguf
    file, hf://ORG/NAME@REV): it is compared as what it would be converted to.

    Tensors are read where the recorded digests leave it open whether they are equal, up to the first difference of
    each. The digests are believed; 'fgsnap verify' compares them with the bytes.

    Ends with 0 if serving computes the same from both, with 1 if not.

    \b
    Examples:
      fgsnap diff snap/ snap-tp4/
      fgsnap diff snap/ finetuned/ --values
      fgsnap diff snap/ ./checkpoint
    """
    from fgsnap.diff import WIDTH, lines
    from fgsnap.diff import diff as find_differences

    found = find_differences(a, b, values=values, progress=_bar(progress, "diff"))
    if as_json:
        import msgspec

        print_json(msgspec.to_builtins(found))
    else:
        import shutil

        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
        for line in lines(found, everything=everything, width=width):
            click.echo(line)
    click.get_current_context().exit(0 if found.equal else 1)


@cli.command()
@click.argument("snapshot", type=click.Path(path_type=Path))
@option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory of the new checkpoint.")
@json_option
@progress_option
def export(snapshot: Path, output: Path, as_json: bool, progress: bool | None) -> None:
    """Write a snapshot back as a Hugging Face checkpoint.

    Every tensor comes back bit for bit, unless it was cast or dequantised when it was converted.
    """
    unwind_on_signals()
    from fgsnap.convert.export import export as run_export

    result = run_export(snapshot, output, progress=_bar(progress, "export"))
    for note in result.notes:
        click.echo(f"Note: {note}", err=True)
    if as_json:
        print_json({"path": str(result.path), "bytes": result.bytes, "notes": list(result.notes)})
    else:
        click.echo(f"{output}  {result.tensors} tensors, {size(result.bytes)}")


@cli.command()
@json_option
def families(as_json: bool) -> None:
    """List the model families that can be converted, what they need, and what of them is refused.

    The model type is that of config.json. What a model needs beyond a plain decoder is named as in the decoder spec.
    """
    from fgsnap.convert.families.published import listing

    listed = listing()
    if as_json:
        import msgspec

        print_json({"families": msgspec.to_builtins(listed)})
        return
    refused = {row.model_type: f" (not: {row.refused})" if row.refused else "" for row in listed}
    _print_columns(
        ("model type", "models", "needs beyond a plain decoder"),
        [(row.model_type, row.models + refused[row.model_type], row.needs) for row in listed],
    )
    planned = sum(len(row.checkpoints) for row in listed)
    click.echo(f"{len(listed)} model types; the configs of {planned} published checkpoints are planned by the tests")


def _print_columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table as wide as the terminal: the first column as wide as it needs, the others wrapped to equal shares."""
    import shutil
    import textwrap
    from itertools import zip_longest

    first = max(len(row[0]) for row in (heads, *rows))
    share = (max(shutil.get_terminal_size((100, 24)).columns, 60) - first) // (len(heads) - 1) - 2
    for row in (heads, *rows):
        cells = [[row[0]], *(textwrap.wrap(cell, share) for cell in row[1:])]
        for line in zip_longest(*cells, fillvalue=""):
            padded = (f"{part:<{share}}" for part in line[1:])
            click.echo("  ".join((f"{line[0]:<{first}}", *padded)).rstrip())


@cli.group(cls=BenchGroup)
def bench() -> None:
    """Measure start-up, latency, throughput, or any OpenAI endpoint under load."""


@cli.command()
@json_option
def env(as_json: bool) -> None:
    """Describe this host and installation, for a report."""
    from fgsnap.environment import describe

    report = describe()
    if as_json:
        print_json(report)
        return
    for name, value in report.items():
        click.echo(f"{name:<22} {value if isinstance(value, str) else ', '.join(value) or 'none'}")


@cli.command()
@json_option
def version(as_json: bool) -> None:
    """Print the version."""
    if as_json:
        print_json({"version": __version__})
    else:
        click.echo(f"fgsnap {__version__}")


def _answer(path: Path, prompt: str, engine: EngineOptions, settings: dict[str, Any]) -> None:
    from fgsnap.runtime.generate import answer

    streamed = not settings.pop("as_json")
    emitted = False

    def emit(text: str) -> None:
        nonlocal emitted
        emitted = True
        _emit(text)

    try:
        result = answer(path, prompt, emit=emit if streamed else None, engine=engine, **_options(settings))
    finally:
        if emitted:  # what goes wrong in the middle has a line of its own, too
            click.echo()
    if result.finish_reason == "length":
        most = settings["max_tokens"]
        limit = f"--max-tokens {most}" if result.generated_length >= most else "the end of the context"
        click.echo(f"Stopped at {limit}.", err=True)
    if not streamed:
        print_json(
            {
                "text": result.generated_text,
                "finish_reason": result.finish_reason,
                "prompt_tokens": result.prompt_length,
                "completion_tokens": result.generated_length,
            }
        )


def _emit(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _read_line() -> str | None:
    """The next message, None when there are no more. A terminal is asked for it, with its own editing of lines."""
    if sys.stdin.isatty():
        import contextlib

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() uses it when it is there)
    try:
        return input("> " if sys.stdin.isatty() else "") or None
    except EOFError:
        return None


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UsageError("The prompt on stdin is not UTF-8 text.", f"Byte {error.start} is not.") from None


def engine_of(settings: dict[str, Any]) -> EngineOptions:
    """The engine's options among the settings, taken out of them. Only ``serve`` has those of its queue."""
    from fgsnap.runtime.options import EngineOptions

    return EngineOptions(**{name: settings.pop(name) for name in EngineOptions.__struct_fields__ if name in settings})


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    """What ``sampling_options`` and others added to the settings, by the names of the pipeline's options."""
    given = {name: value for name, value in settings.items() if value not in (None, ())}
    return {"max_new_tokens" if name == "max_tokens" else name: value for name, value in given.items()}


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with paths as strings, for values that cross a process border."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}


def unwind_on_signals() -> None:
    """Let SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that what is half written is removed."""
    import signal

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, leave)


def size(count: float) -> str:
    """A byte count for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def print_json(value: dict[str, Any]) -> None:
    import json

    click.echo(json.dumps({"schema_version": JSON_SCHEMA_VERSION, **value}, indent=2))


def _bar(wanted: bool | None, title: str) -> Callable[[int, int], None] | None:
    """A progress callback (bytes done, bytes in all), or None where no bar is wanted."""
    if wanted is None:
        wanted = sys.stderr.isatty()
    if not wanted:
        return None
    from tqdm import tqdm

    bar: Any = None

    def advance(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=title, file=sys.stderr)
            # However the command ends, the bar is finished before anything is written below it.
            click.get_current_context().call_on_close(bar.close)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return advance


def run_cli(arguments: Sequence[str], begun: Begun | None = None) -> int:
    """Run one command line and return its exit code; every foreseen error is at most three lines on stderr.

    ``begun`` is a service that has been begun ahead of the command line.
    """
    as_json = "--json" in arguments
    try:
        result = cli.main(list(arguments), prog_name="fgsnap", standalone_mode=False, obj=begun)
        return result if isinstance(result, int) else 0
    except FgsnapError as error:
        return _fail(error, error.lines(), error.exit_code, as_json)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        absent = missing_extra(package, EXTRAS[package], "This command")
        return _fail(absent, absent.lines(), absent.exit_code, as_json)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.UsageError as error:
        return _fail(error, _usage_lines(error), 2, as_json)
    except click.ClickException as error:
        return _fail(error, [_sentence(error.format_message())], error.exit_code, as_json)
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted.", err=True)
        return 130
    except BrokenPipeError:
        # The reader left (fgsnap ... | head): nothing more to say, and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return _fail(error, [f"{error.strerror or error}{where}.", "Set FGSNAP_DEBUG=1 to see where."], 1, as_json)
    except Exception as error:
        code = _interrupted(error)
        if code is None:
            raise
        click.echo("Interrupted.", err=True)
        return code


def _interrupted(error: BaseException) -> int | None:
    """The exit code of an interrupt that the error replaced, as happens where one comes while a lock is being taken."""
    context = error.__context__
    if context is None or isinstance(context, KeyboardInterrupt):
        return None if context is None else 130
    if isinstance(context, SystemExit) and isinstance(context.code, int):
        return context.code
    return _interrupted(context)


def _usage_lines(error: click.UsageError) -> list[str]:
    command = error.ctx.command_path if error.ctx else "fgsnap"
    lines = [_sentence(_plain_words(error.format_message())), f"Run '{command} --help' for its options."]
    if isinstance(error, click.BadParameter) and error.ctx and error.param and error.param.name:
        source = error.ctx.get_parameter_source(error.param.name)
        if source is click.core.ParameterSource.ENVIRONMENT:
            lines.insert(1, f"It was set by {error.param.envvar} in the environment.")
    return lines


def _plain_words(text: str) -> str:
    """What click says of a value that is no number, without the names of its types."""
    return re.sub(r"is not a valid (integer|float)( range)?\.", lambda found: _NUMBERS[found[1]], text)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", ")")) else text + "."


def _fail(error: Exception, lines: list[str], code: int, as_json: bool) -> int:
    if os.environ.get("FGSNAP_DEBUG"):
        import traceback

        traceback.print_exception(error)
    click.echo("Error: " + "\n".join(lines), err=True)
    if as_json:
        print_json({"error": {"lines": lines, "exit_code": code}})
    return code
