"""Answers in process: on the doubles for how they end, and on a small real snapshot for the whole way."""

from __future__ import annotations

import os
import signal

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fgsnap.cli import run_cli
from fgsnap.errors import FgsnapError, NotFound, RequestError, SnapshotRefused, UsageError
from fgsnap.kernels.ops import Batch, Sampling
from fgsnap.runtime.decoder import load_decoder
from fgsnap.runtime.engine import Engine
from fgsnap.runtime.generate import answer, chat
from fgsnap.runtime.options import EngineOptions
from fgsnap.runtime.request import Request, SamplingParams
from fgsnap.runtime.shared import Ask, Delta, SharedEngine
from fgsnap.runtime.text import Text
from fgsnap.snapshot import TextSection, open_snapshot
from tests.doubles import ByteText, StubModel
from tests.serving import byte_tokenizer, servable_snapshot
from tests.snapshots import make_snapshot, tiny_spec

TEXT = ByteText()
NINE = {"max_new_tokens": 9, "do_sample": False}
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)


class Saying(StubModel):
    """A model that says one text, then EOS."""

    def __init__(self, words: bytes, after: int, **settings) -> None:
        super().__init__(**settings)
        self.words, self.after = words, after

    def _logits(self, batch: Batch, row: int) -> list[float]:
        said = batch.positions[row] + 1 - self.after
        token = self.words[said] if said < len(self.words) else TEXT.eos
        return [float(id == token) for id in range(self.vocab_size)]


def generate(engine, prompt, params, stop=()):
    """The only answer of an engine, step by step."""
    for deltas in SharedEngine(engine, TEXT).generate([Ask(prompt, params)], stop):
        yield from deltas


def say(words: str, stop=(), **params) -> list[Delta]:
    engine = Engine(Saying(words.encode(), after=3), eos_token_ids=TEXT.eos_token_ids)
    settings = SamplingParams(**({"max_tokens": 50, "temperature": 0.0} | params))
    deltas = list(generate(engine, TEXT.encode("abc"), settings, stop))
    assert not engine.has_work()
    assert engine.stats().kv_blocks_free == 64
    return deltas


@pytest.mark.parametrize(
    ("words", "stop", "params", "text", "finish", "tokens"),
    [
        ("Hello", (), {}, "Hello", "stop", 5),
        ("Hello", (), {"max_tokens": 3}, "Hel", "length", 3),
        ("Hello world", (" wor",), {}, "Hello", "stop", 9),
        ("Hello wo", (" wor",), {}, "Hello wo", "stop", 8),
        ("Hello wo", (" wor",), {"max_tokens": 7}, "Hello w", "length", 7),
        ("Hello", ("o",), {"max_tokens": 5}, "Hell", "stop", 5),
        ("né", (), {"max_tokens": 2}, "n\ufffd", "length", 2),
        ("", (), {}, "", "stop", 0),
    ],
)
def test_how_an_answer_ends(words, stop, params, text, finish, tokens):
    deltas = say(words, stop, **params)
    assert "".join(delta.text for delta in deltas) == text
    assert [delta.finish for delta in deltas] == [None] * (len(deltas) - 1) + [finish]
    assert sum(len(delta.tokens) for delta in deltas) == tokens


def test_leaving_early_frees_the_cache():
    engine = Engine(StubModel())
    deltas = generate(engine, [1, 2, 3], GREEDY)
    next(deltas)
    assert engine.stats().running == 1
    deltas.close()
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks


def test_a_request_that_cannot_run_is_refused_at_once():
    with pytest.raises(RequestError, match="context"):
        next(generate(Engine(StubModel()), [1] * 300, GREEDY))


def test_a_model_that_fails_says_so():
    with pytest.raises(FgsnapError, match="failed on this prompt"):
        list(generate(Engine(StubModel(nan_after=3)), [1, 2, 3], GREEDY))


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    """Random weights that speak bytes, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: id for id, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    template = b"<s>{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}bot:"
    path = tmp_path_factory.mktemp("generate") / "snap"
    make_snapshot(
        path,
        tiny_spec(vocab_size=258),
        text_files={"tokenizer.json": tokenizer.to_str().encode(), "chat_template.jinja": template},
        text=TextSection(eos_token_ids=(257,), bos_token_id=256, add_bos=True, template="jinja"),
    )
    return path


@pytest.fixture(scope="module")
def opened(snapshot):
    with_weights = open_snapshot(snapshot)
    yield with_weights
    with_weights.close()


def greedy(opened, prompt: list[int], count: int) -> list[int]:
    """The plainest way to continue a prompt: forward all of it again for every token."""
    decoder = load_decoder(opened, backend="reference", device="cpu", dtype="float32", blocks=8, block_size=16)
    tokens = list(prompt)
    for _ in range(count):
        length = len(tokens)
        batch = Batch(tokens, list(range(length)), [0, length], [length], [list(range(8))], [length - 1])
        [token] = decoder.sample(decoder.forward(batch), [Sampling()], [len(tokens)]).tokens
        if token == 257:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def encoded_chat(text: Text, messages: list[dict[str, str]]) -> list[int]:
    return text.encode(text.render_chat(messages), add_special_tokens=False)


def on_reference(**settings):
    return EngineOptions(backend="reference", device="cpu", **settings)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("budget", [3, 512])
def test_a_snapshot_answers_as_plain_greedy_decoding_does(snapshot, opened, raw, budget):
    text = Text(opened)
    prompt = text.encode("Hi") if raw else encoded_chat(text, [{"role": "user", "content": "Hi"}])
    expected = greedy(opened, prompt, 20)
    pieces: list[str] = []
    result = answer(
        snapshot, "Hi", emit=pieces.append, engine=on_reference(max_batch_tokens=budget), max_new_tokens=20, raw=raw,
        do_sample=False,
    )  # fmt: skip
    assert result.generated_text == "".join(pieces) == text.decode(expected)
    assert result.prompt_length == len(prompt)
    assert result.generated_length == len(expected)
    assert result.finish_reason == ("length" if len(expected) == 20 else "stop")


def test_sampling_is_repeatable_by_its_seed(snapshot):
    def sampled(seed: int) -> str:
        return answer(
            snapshot, "Hi", engine=on_reference(), temperature=1.0, seed=seed, max_new_tokens=12
        ).generated_text

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(4)}) > 1


def test_a_conversation_remembers_what_was_said(snapshot, opened):
    shown: list[str] = []
    questions = iter(["Hi", "And?", None])
    chat(snapshot, read=lambda: next(questions), emit=shown.append, engine=on_reference(), system="S", **NINE)
    text, messages, expected = Text(opened), [{"role": "system", "content": "S"}], ""
    for question in ("Hi", "And?"):
        messages.append({"role": "user", "content": question})
        said = text.decode(greedy(opened, encoded_chat(text, messages), 9))
        messages.append({"role": "assistant", "content": said})
        expected += said + "\n"
    assert "".join(shown) == expected


def test_an_interrupt_ends_the_answer_and_not_the_conversation(snapshot, opened):
    shown: list[str] = []
    questions = iter(["Hi", "And?", None])

    def emit(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    chat(snapshot, read=lambda: next(questions), emit=emit, engine=on_reference(), **NINE)
    cut = "".join(shown[: shown.index("\n")])
    text = Text(opened)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": cut},
        {"role": "user", "content": "And?"},
    ]
    said = text.decode(greedy(opened, encoded_chat(text, messages), 9))
    assert "".join(shown[shown.index("\n") + 1 :]) == said + "\n"


def test_a_second_interrupt_ends_the_conversation(snapshot):
    before = signal.getsignal(signal.SIGINT)
    asked = []

    def read() -> str:
        if asked:
            os.kill(os.getpid(), signal.SIGINT)
        asked.append("Hi")
        return "Hi"

    def emit(piece: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        chat(snapshot, read=read, emit=emit, engine=on_reference(), **NINE)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_conversation_needs_a_template(tmp_path):
    make_snapshot(tmp_path / "snap", tiny_spec(vocab_size=258), text_files={"tokenizer.json": byte_tokenizer()})
    with pytest.raises(UsageError, match="no chat template"):
        chat(tmp_path / "snap", read=lambda: "Hi", emit=print, engine=on_reference(), **NINE)


def test_the_context_ends_an_answer(snapshot):
    result = answer(snapshot, "Hi", engine=on_reference(max_model_len=32), max_new_tokens=500, raw=True)
    assert result.prompt_length + result.generated_length <= 32
    with pytest.raises(RequestError, match="context"):
        answer(snapshot, "Hi" * 40, engine=on_reference(max_model_len=32), raw=True)


@pytest.mark.parametrize(
    ("most", "note"), [("2", "Stopped at --max-tokens 2."), ("500", "Stopped at the end of the context.")]
)
def test_the_command_says_what_cut_an_answer_short(snapshot, capsys, most, note):
    command = ["run", str(snapshot), "Hi", "--raw", "--backend", "reference", "--device", "cpu"]
    assert run_cli([*command, "--max-model-len", "32", "--max-tokens", most]) == 0
    assert capsys.readouterr().err.splitlines() == [note]


def test_a_snapshot_that_is_not_there(tmp_path):
    with pytest.raises(NotFound):
        answer(tmp_path / "nowhere", "Hi")


@pytest.mark.parametrize("budget", [5, 64])
def test_requests_on_a_real_decoder_answer_in_company_as_alone(opened, budget):
    prompts = [[256, *b"one"], list(b"a much longer prompt than that"), [7], list(range(40))]
    decoder = load_decoder(opened, backend="reference", device="cpu", dtype="float32", blocks=24, block_size=4)
    engine = Engine(decoder, eos_token_ids=(257,), token_budget=budget, max_sequences=3)
    for index, prompt in enumerate(prompts):
        engine.submit(Request(str(index), tuple(prompt), SamplingParams(max_tokens=10, temperature=0.0)))
    said: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    while engine.has_work():
        for output in engine.step().outputs():
            said[output.request] += [token.id for token in output.tokens]
    assert list(said.values()) == [greedy(opened, prompt, 10) for prompt in prompts]


def test_an_answer_is_refused_where_the_model_computes_something_else(tmp_path):
    path = servable_snapshot(tmp_path / "snap", canary="wrong")
    with pytest.raises(SnapshotRefused, match="does not compute what it should"):
        answer(path, "hello", max_new_tokens=3, raw=True)


def test_a_prompt_that_fills_the_context_is_refused_with_the_arithmetic(snapshot):
    with pytest.raises(RequestError, match="does not fit the context") as error:
        answer(snapshot, "hello " * 30, engine=EngineOptions(max_model_len=9), raw=True)
    assert "the context 9" in error.value.why
