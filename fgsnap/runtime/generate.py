"""Answers and conversations in this process, for ``fgsnap run`` and ``fgsnap chat``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Unpack

from fgsnap.errors import UsageError
from fgsnap.runtime.options import EngineOptions
from fgsnap.runtime.pipeline import Options, Pipeline, Response, opened
from fgsnap.runtime.worker import end_when_unreadable
from fgsnap.snapshot import open_snapshot

_DEFAULT_ENGINE = EngineOptions()


def answer(
    path: Path | str,
    prompt: str,
    *,
    emit: Callable[[str], None] | None = None,
    engine: EngineOptions = _DEFAULT_ENGINE,
    raw: bool = False,
    **options: Unpack[Options],
) -> Response:
    """Open a snapshot, check its canary, answer one prompt, and close it.

    Args:
        path: the snapshot's directory.
        prompt: a user's message where the snapshot has a chat template, unless ``raw``; else plain text to continue.
        emit: called with each piece of text as it appears.
        engine: how to run it, as ``fgsnap serve`` would be told.
        raw: continue the prompt as plain text.
        options: of the pipeline.
    """

    def show(pieces: list[Response]) -> None:
        if emit is not None and pieces[0].generated_text:
            emit(pieces[0].generated_text)

    with _opened(path, engine) as pipe:
        asked = prompt if raw or not pipe.has_chat_template else [_user(prompt)]
        return pipe(asked, streaming_fn=show, **options)[0]


def chat(
    path: Path | str,
    *,
    read: Callable[[], str | None],
    emit: Callable[[str], None],
    engine: EngineOptions = _DEFAULT_ENGINE,
    system: str | None = None,
    **options: Unpack[Options],
) -> None:
    """Hold a conversation: read a message, answer it, and so on until ``read`` gives None.

    SIGINT during an answer ends the answer and not the conversation; what came stays said.

    Raises:
        UsageError: the snapshot has no chat template.
        RequestError: the conversation no longer fits the context.
    """
    with _opened(path, engine) as pipe:
        if not pipe.has_chat_template:
            raise UsageError(
                "This snapshot has no chat template.",
                "It was made from a model that continues text.",
                'Use fgsnap run SNAPSHOT "...".',
            )
        messages = [] if system is None else [{"role": "system", "content": system}]
        while (said := read()) is not None:
            messages.append(_user(said))
            heard = ""
            try:
                for piece in pipe.stream(messages, **options):
                    heard += piece.generated_text
                    emit(piece.generated_text)
            except KeyboardInterrupt:
                if pipe.closed:  # a second one has cut a step
                    raise
            emit("\n")
            messages.append({"role": "assistant", "content": heard})


def _opened(path: Path | str, engine: EngineOptions) -> Pipeline:
    snapshot = open_snapshot(path)
    end_when_unreadable(snapshot)
    return opened(snapshot, engine)


def _user(prompt: str) -> dict[str, str]:
    return {"role": "user", "content": prompt}
