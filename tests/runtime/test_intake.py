"""Texts on their way to token ids: where they are too long, how soon that is found out, and what is dropped."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgsnap.errors import RequestError
from fgsnap.runtime import counting, intake, protocol
from fgsnap.runtime.counting import pieces
from fgsnap.runtime.intake import Dropped, Errand, Intake
from tests.doubles import ByteText
from tests.serving import StubWorkers, ask, send_only, stub_service, until

VOCAB = 258


class Counting(ByteText):
    """Notes how many characters it is given, and on which threads."""

    def __init__(self) -> None:
        super().__init__()
        self.given = 0
        self.threads: set[str] = set()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.given += len(text)
        self.threads.add(threading.current_thread().name.partition("_")[0])
        return super().encode(text, add_special_tokens)


class Dense(Counting):
    """A token for every sixteen characters, and one for what is left."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        super().encode(text)
        return [1] * -(-len(text) // 16)


def call(**fields) -> protocol.Call:
    chat = "messages" in fields
    parse = protocol.parse_chat if chat else protocol.parse_completion
    return parse(json.dumps(fields).encode(), VOCAB)


def prompts(text: ByteText, called: protocol.Call, context: int, size: int = 10**6) -> list[tuple[int, ...]]:
    return asyncio.run(Intake(text, lambda: context).prompts(called, size))


@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 20))
def test_pieces_are_the_text(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "PIECE", size)
        patch.setattr(counting, "SEAM", size // 2)
        parts = list(pieces(text))
    assert "".join(parts) == text and all(len(part) <= size for part in parts)


def test_a_cut_is_before_a_space_where_one_is_near():
    text = "word " * 2000
    assert all(part.startswith(" word") for part in list(pieces(text))[1:])


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("letters", ["a", "word "])
def test_a_text_is_tokenized_no_further_than_the_context_goes(letters, chat):
    text, long = Counting(), letters * (4_000_000 // len(letters))
    fields = {"messages": [{"role": "user", "content": long}]} if chat else {"prompt": long}
    with pytest.raises(RequestError, match="is 10000 tokens; the prompt has at least 1") as caught:
        prompts(text, call(**fields), 10_000)
    assert text.given <= 10_000 + 2 * counting.PIECE
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    assert caught.value.param == ("messages" if chat else "prompt")


def test_where_the_length_says_enough_nothing_is_tokenized():
    text = Dense()
    text.least_tokens = lambda text: len(text) // 50
    with pytest.raises(RequestError, match="is 10000 tokens; the prompt has at least 20000"):
        prompts(text, call(prompt=" " * 1_000_000), 10_000)
    assert text.given == 0


def test_a_text_that_is_to_be_cut_is_not_too_long():
    fields = {"truncate_prompt_tokens": 5, "max_tokens": 1}
    assert len(prompts(Counting(), call(prompt="a" * 100_000, **fields), 10_000)[0]) == 100_000
    ids = protocol.parse_completion(json.dumps({"prompt": [1] * 100_000, **fields}).encode(), VOCAB, 10_000).prompts
    assert len(ids[0]) == 100_000
    with pytest.raises(RequestError, match="a prompt that is cut may have 160000; the prompt has at least 1"):
        prompts(Counting(), call(prompt="a" * 10_000_000, **fields), 10_000)
    long = json.dumps({"prompt": [1] * 200_000, **fields}).encode()
    with pytest.raises(RequestError, match="the prompt has 200000"):
        protocol.parse_completion(long, VOCAB, 10_000)
    with pytest.raises(RequestError, match="length is 10000 tokens; the prompt has 200000"):  # null is as if left out
        protocol.parse_completion(long.replace(b'_tokens": 5', b'_tokens": null'), VOCAB, 10_000)


def test_a_long_text_of_few_tokens_is_taken():
    text = Dense()
    assert prompts(text, call(prompt="a" * 160_000), 10_000) == [(1,) * 10_000]
    with pytest.raises(RequestError, match="at least"):
        prompts(text, call(prompt="a" * 200_000), 10_000)


def test_a_text_that_only_its_cuts_make_too_long_is_taken(monkeypatch):
    """Each piece has a token that is half of one of the whole text."""
    monkeypatch.setattr(counting, "PIECE", 1000)  # 63 tokens where the whole has 62.5
    assert len(prompts(Dense(), call(prompt="a" * 160_000), 10_000)[0]) == 10_000


def test_little_is_tokenized_at_once_and_much_aside():
    text = Counting()
    assert prompts(text, call(prompt=["a", "bc"]), 100, size=20) == [(97,), (98, 99)]
    assert text.threads == {"MainThread"}
    prompts(text, call(prompt="a"), 100)
    assert text.threads == {"MainThread", "tokenize"}


def test_a_template_that_makes_much_of_little_is_tokenized_aside():
    text = Counting()
    text.render_chat = lambda messages, **how: "x" * (intake.INLINE + 1)
    prompts(text, call(messages=[{"role": "user", "content": "a"}]), 10**6, size=50)
    assert text.threads == {"tokenize"}


def test_token_ids_need_no_thread():
    assert prompts(SimpleNamespace(encode=len), call(prompt=[1, 2, 3]), 100) == [(1, 2, 3)]


def test_what_nobody_waits_for_is_dropped_between_pieces():
    errand = Errand()

    class Leaving(Dense):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            errand.over = self.given > 20_000
            return super().encode(text)

    text = Leaving()
    with pytest.raises(Dropped):
        Intake(text, lambda: 10**5)._tokens(call(prompt="a" * 10**6), ("a" * 10**6,), errand)
    assert text.given < 40_000


def test_no_more_than_a_few_long_texts_are_tokenized_at_once_and_clients_that_left_have_no_turn(monkeypatch):
    may_go_on, begun = threading.Event(), []

    def slow(self, text: str, add_special_tokens: bool = True) -> list[int]:
        begun.append(text)
        may_go_on.wait(10)
        return [*text.encode()]

    with stub_service(StubWorkers(max_length=4096, blocks=2048)) as service:
        until(lambda: service.link.state == "ready")
        monkeypatch.setattr(ByteText, "encode", slow)
        monkeypatch.setattr(intake, "INLINE", 50)
        waiting = [
            send_only(service.url, "/v1/completions", {"prompt": f"{number} " * 30, "max_tokens": 1})
            for number in range(6)
        ]
        until(lambda: service.app.open == 6 and len(begun) == intake.AT_ONCE)
        assert ask(service.url, "GET", "/health/live").status == 200
        for connection in waiting:
            connection.close()
        until(lambda: service.app.open == 0)
        may_go_on.set()
        assert ask(service.url, "POST", "/v1/completions", {"prompt": "last " * 20, "max_tokens": 1}).status == 200
        assert len(begun) == intake.AT_ONCE + 1 and begun[-1].startswith("last")
