"""What ``fgsnap bench serve`` measures: an endpoint that is there, or a server that it starts over a snapshot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from fgsnap.bench import client
from fgsnap.bench.load import Workload, curve
from fgsnap.bench.server import serving
from fgsnap.bench.sla import SPAN, Sla
from fgsnap.bench.workload import COMMON_IDS, DEVIATION, Prompts, of_ids, of_tokenizer
from fgsnap.errors import FgsnapError, NotFound, UsageError
from fgsnap.runtime.options import EngineOptions
from fgsnap.snapshot import open_snapshot

MODEL_SECONDS = 30.0  # for an endpoint to name its model

Check = Callable[[], None]
Tell = Callable[[str], None]


class LoadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of ``fgsnap bench serve`` that say what to ask, and what to ask for; None: as the endpoint says."""

    model: str | None
    api_key_file: Path | None
    clients: tuple[int, ...]
    requests: int
    prompt_tokens: int
    max_tokens: int
    context: int | None
    seed: int
    temperature: float
    tokenizer: Path | None
    prompt_format: str
    ignore_eos: bool
    timeout: float
    sla_prompt_rate: float
    sla_generation_rate: tuple[float, ...]


def measure_snapshot(snapshot: Path, engine: EngineOptions, options: LoadOptions, tell: Tell) -> dict[str, Any]:
    """Start a server over the snapshot, measure it and end it. The snapshot's tokenizer makes the prompts.

    Raises:
        FgsnapError: the server ended by itself; see also ``measure_url``.
    """
    open_snapshot(snapshot).close()  # what is wrong with it is told as by every other command
    if options.tokenizer is None:
        options = msgspec.structs.replace(options, tokenizer=snapshot / "tokenizer.json")
    tell("starting the server")
    with serving(snapshot, engine) as server:
        report = server.wait_until_ready()
        try:
            result = measure_url(server.url, options, tell, server.check)
        except FgsnapError:
            server.check(patience=1.0)  # that it ended is more to the point than one that does not answer
            raise
    served = {name: report[name] for name in ("snapshot", "backend", "device", "canary")}
    chosen = {name: value for name, value in msgspec.structs.asdict(engine).items() if value is not None}
    return {**served, "engine": chosen, **result}


def measure_url(url: str, options: LoadOptions, tell: Tell, check: Check = lambda: None) -> dict[str, Any]:
    """Measure the endpoint at ``url``. ``check`` is called after each level, and raises where it has ended.

    Raises:
        NetworkError: it cannot be reached.
        UsageError, NotFound: an option cannot be followed.
        FgsnapError: it answers no request.
    """
    target = client.endpoint(url, _key(options.api_key_file))
    prompts = _prompts(options)
    model, context = _model(target, options.model)
    how = client.Asking(model, options.temperature, options.ignore_eos, options.timeout)
    workload = Workload(
        prompts,
        prompt_mean=options.prompt_tokens,
        answer_mean=options.max_tokens,
        context=options.context or context,
        requests=options.requests,
        seed=options.seed,
    )
    slas = [Sla(options.sla_prompt_rate, rate) for rate in options.sla_generation_rate]
    levels = curve(target, how, workload, options.clients, slas, check, tell)
    facts = {
        "prompt_mean": options.prompt_tokens,
        "answer_mean": options.max_tokens,
        "deviation": DEVIATION,
        "context": workload.context,
        "requests_per_client": options.requests,
        "seed": options.seed,
        "prompt_format": options.prompt_format,
        "prompts_of": "any tokens" if options.tokenizer is None else "words of the tokenizer",
        "temperature": options.temperature,
        "ignore_eos": options.ignore_eos,
        "sla_span": SPAN,
    }
    return {"url": url, "model": model, "workload": facts, "levels": levels}


def _prompts(options: LoadOptions) -> Prompts:
    as_text = options.prompt_format == "text"
    if options.tokenizer is not None:
        return of_tokenizer(options.tokenizer, as_text=as_text)
    if as_text:
        raise UsageError(
            "--prompt-format text needs --tokenizer.",
            "Without the model's tokenizer, nobody knows how many tokens a text has.",
            "Name its tokenizer.json, or leave --prompt-format out.",
        )
    return of_ids(COMMON_IDS)


def _model(target: client.Endpoint, wanted: str | None) -> tuple[str, int | None]:
    """The name to ask for, and the context of that model where the endpoint tells it."""
    listed = asyncio.run(client.models(target, MODEL_SECONDS))
    card = next((card for card in listed if wanted in (None, card.get("id"))), {})
    name = wanted or card.get("id")
    if not name:
        raise UsageError("The endpoint lists no model.", "", "Name the one to ask for with --model.")
    context = card.get("max_model_len")
    return str(name), context if isinstance(context, int) else None


def _key(file: Path | None) -> str:
    if file is None:
        return ""
    try:
        lines = file.read_text().split()
    except OSError as error:
        raise NotFound(f"The API key file {file} cannot be read.", f"{error.strerror}.") from error
    if not lines:
        raise UsageError(f"The API key file {file} holds no key.", "", "Write the key into its first line.")
    return lines[0]
