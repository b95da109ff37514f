"""Answers in a Python program, without a server: a batch of prompts, then a conversation as it streams in.

Usage: python examples/pipeline.py SNAPSHOT_DIR
"""

from __future__ import annotations

import sys

import fgsnap


def main(snapshot: str) -> None:
    with fgsnap.load(snapshot) as pipe:
        # One call is one batch, however many prompts it has.
        for response in pipe(["The capital of France is", "One, two, three,"], max_new_tokens=8, do_sample=False):
            print(f"{response.generated_text!r} ({response.generated_length} tokens, {response.finish_reason})")

        question = {"role": "user", "content": "What is the capital of France?"}
        for piece in pipe.stream([question], max_new_tokens=64, do_sample=False):
            print(piece.generated_text, end="", flush=True)
        print()

        try:
            pipe(["fine", ""])
        except fgsnap.RequestError as error:
            print(f"{error.param} was refused: {error.what}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except fgsnap.FgsnapError as error:
        sys.exit(str(error))
