"""The Python API: what a batch gives is what each prompt alone gives, and nothing is left behind by what goes wrong."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fgsnap
from fgsnap.bench.budget import keep
from fgsnap.errors import FgsnapError, HostError, NotFound, RequestError, UsageError
from fgsnap.kernels import native
from fgsnap.runtime.budget import host_of
from fgsnap.runtime.counting import PIECE
from fgsnap.runtime.engine import Engine
from fgsnap.runtime.request import SamplingParams
from fgsnap.runtime.shared import Ask, SharedEngine, uninterrupted
from fgsnap.snapshot import open_snapshot
from tests.doubles import ByteText, StubModel
from tests.serving import alive, servable_snapshot, until

BACKENDS = ["reference", *(["native"] if native.available()[0] else [])]
PROMPTS = ["DeepSpeed is", "Seattle is", "a much longer prompt than the others are, of several blocks", "x"]
GREEDY = {"max_new_tokens": 12, "do_sample": False}
KV_MEMORY = 4 << 20


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    return servable_snapshot(tmp_path_factory.mktemp("pipeline") / "snap")


@pytest.fixture(scope="module", params=BACKENDS)
def pipe(request, snapshot):
    options = {"kv_memory": KV_MEMORY, "max_batch_tokens": 16, "threads": 1}
    with fgsnap.load(snapshot, backend=request.param, device="cpu", **options) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    yield
    if "pipe" in request.fixturenames:
        stats = request.getfixturevalue("pipe").stats()
        assert (stats.running, stats.waiting, stats.kv_blocks_free) == (0, 0, stats.kv_blocks)


def ids(responses):
    return [[token.id for token in response.tokens] for response in responses]


def encoded(pipe, text):
    return pipe._text.encode(text)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"seed": 3}, {"seed": 3, "n": 2, "temperature": 2.0}])
def test_a_batch_gives_what_each_prompt_alone_gives(pipe, options):
    together = pipe(PROMPTS, max_new_tokens=12, **options)
    alone = [response for prompt in PROMPTS for response in pipe(prompt, max_new_tokens=12, **options)]
    assert ids(together) == ids(alone)
    assert [r.generated_text for r in together] == [r.generated_text for r in alone]
    assert [r.index for r in together] == list(range(len(PROMPTS) * options.get("n", 1)))


def test_a_batch_is_one_batch(pipe):
    before = pipe.stats().steps
    pipe(["one", "two", "six"], **GREEDY, ignore_eos=True)
    assert pipe.stats().steps - before == 12


def test_a_response_has_the_shape_that_mii_gives_it(pipe):
    [response] = pipe("DeepSpeed is", **GREEDY, ignore_eos=True)
    assert response.prompt_length == len("DeepSpeed is")
    assert response.generated_length == len(response.tokens) == 12
    assert response.finish_reason == "length"
    assert str([response]) == f"[{response.generated_text}]"
    assert pickle.loads(pickle.dumps(response)) == response
    assert pipe.is_rank_0


@pytest.mark.parametrize("options", [{}, {"n": 2, "seed": 1, "do_sample": True}, {"return_full_text": True}])
def test_a_stream_is_the_whole_in_pieces(pipe, options):
    whole = pipe(PROMPTS, **{**GREEDY, **options})
    heard: list[list[fgsnap.Response]] = []
    assert pipe(PROMPTS, streaming_fn=heard.append, **{**GREEDY, **options}) == whole
    pieces = list(pipe.stream(PROMPTS, **{**GREEDY, **options}))
    assert pieces == [piece for step in heard for piece in step]
    assert all(len({piece.index for piece in step}) == len(step) for step in heard)
    for response in whole:
        own = [piece for piece in pieces if piece.index == response.index]
        assert "".join(piece.generated_text for piece in own) == response.generated_text
        assert sum((piece.tokens for piece in own), ()) == response.tokens
        assert own[-1].generated_length == response.generated_length
        assert [piece.finish_reason for piece in own] == ["none"] * (len(own) - 1) + [response.finish_reason]


def test_streams_and_calls_move_on_together(pipe):
    expected = pipe(PROMPTS, **GREEDY, ignore_eos=True)
    streams = [pipe.stream(prompt, **GREEDY, ignore_eos=True) for prompt in PROMPTS[:2]]
    texts = [next(stream).generated_text for stream in streams]
    assert ids(pipe(PROMPTS[2:], **GREEDY, ignore_eos=True)) == ids(expected[2:])
    before = pipe.stats().steps
    texts = [text + "".join(piece.generated_text for piece in s) for text, s in zip(texts, streams, strict=True)]
    assert texts == [response.generated_text for response in expected[:2]]
    assert pipe.stats().steps - before <= 1, "they went on while the call ran"


def test_threads_get_what_they_would_get_alone(pipe):
    prompts = [f"thread {number}" for number in range(8)]
    alone = [pipe(prompt, max_new_tokens=12, seed=number) for number, prompt in enumerate(prompts)]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda number: pipe(prompts[number], max_new_tokens=12, seed=number), range(8))
        assert [ids(each) for each in found] == [ids(each) for each in alone]


def test_a_conversation_goes_through_the_template(pipe):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    text = "system: S\nuser: Hi\nassistant:"
    for asked in (messages, [messages, text, encoded(pipe, text)]):
        assert all(one == ids(pipe(text, **GREEDY))[0] for one in ids(pipe(asked, **GREEDY)))
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert pipe(parts, **GREEDY, return_full_text=True)[0].generated_text.startswith("user: Hi\nassistant:")


def test_an_empty_batch(pipe):
    assert pipe([]) == [] == list(pipe.stream([]))


class TestOptions:
    def test_lengths(self, pipe):
        def length(**options):
            return pipe("0123456789", do_sample=False, ignore_eos=True, **options)[0].generated_length

        assert length(max_new_tokens=5) == 5
        assert length(max_length=17) == 7
        assert length(max_length=17, max_new_tokens=9) == 7
        assert length(max_length=17, max_new_tokens=2) == 2
        assert length(max_new_tokens=1000) == length() == pipe.max_length - 10

    def test_stop_texts(self, pipe):
        [whole] = pipe("tell", **GREEDY, ignore_eos=True)
        end = next(c for c in whole.generated_text[2:] if c != "\ufffd")
        for stop in (end, [end], (end, "never")):
            [cut] = pipe("tell", **GREEDY, ignore_eos=True, stop=stop)
            assert cut.generated_text == whole.generated_text.partition(end)[0]
            assert cut.finish_reason == "stop"

    def test_eos_and_stop_tokens(self, pipe):
        biased = {**GREEDY, "logit_bias": {257: 100.0}}
        assert pipe("a", **biased)[0].generated_length == 0
        assert pipe("a", **biased, min_new_tokens=3)[0].generated_length == 3
        forced = {"logit_bias": {65: 100}, "stop": "bb", "max_new_tokens": 6, "do_sample": False}
        texts = [pipe("a", **forced, min_new_tokens=least)[0].generated_text for least in (0, 2, 3)]
        assert texts == ["", "b", "bb"]
        assert pipe("a", **biased, ignore_eos=True)[0].generated_length == 12
        assert ids(pipe("a", **GREEDY, logit_bias={65: 100.0})) == [[65] * 12]
        first = ids(pipe("a", **GREEDY))[0][0]
        assert pipe("a", **GREEDY, stop_token_ids=[first])[0].finish_reason == "stop"

    @pytest.mark.parametrize("greedy", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
    def test_what_leaves_one_token_is_greedy(self, pipe, greedy):
        assert ids(pipe(PROMPTS, max_new_tokens=12, **greedy)) == ids(pipe(PROMPTS, **GREEDY))

    def test_sampling_has_miis_defaults(self, pipe):
        plain = ids(pipe(PROMPTS, max_new_tokens=12, seed=1))
        assert plain == ids(pipe(PROMPTS, max_new_tokens=12, seed=1, do_sample=True, top_p=0.9, temperature=1.0))
        assert plain == ids(pipe(PROMPTS, max_new_tokens=12, seed=1, top_k=None, stop=None, temperature=None))
        assert plain != ids(pipe(PROMPTS, max_new_tokens=12, seed=1, top_p=0.3))
        assert plain != ids(pipe(PROMPTS, max_new_tokens=12, seed=2))

    def test_answers_of_one_prompt_have_seeds_that_follow(self, pipe):
        both = pipe("a", max_new_tokens=12, seed=5, n=2)
        assert ids(both) == ids(pipe("a", max_new_tokens=12, seed=5) + pipe("a", max_new_tokens=12, seed=6))

    @pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
    def test_penalties(self, pipe, penalty):
        settings = {**GREEDY, "logit_bias": {65: 3.0}}
        assert ids(pipe("a", **settings)) != ids(pipe("a", **settings, **{penalty: 2.0}))

    def test_logprobs(self, pipe):
        [response] = pipe("a", **GREEDY, logprobs=2)
        for token in response.tokens:
            assert token.top[0] == (token.id, token.logprob) and len(token.top) == 2 and token.logprob < 0
        assert pipe("a", **GREEDY)[0].tokens[0].top == ()

    def test_logprobs_of_the_prompt(self, pipe):
        [said] = pipe("abc", **GREEDY, ignore_eos=True, logprobs=0)
        text = [*encoded(pipe, "abc"), *(token.id for token in said.tokens)]
        asked = {"max_new_tokens": 2, "do_sample": False, "ignore_eos": True, "prompt_logprobs": 2}
        whole = pipe([text, [65]], **asked)
        assert [[token.id for token in response.prompt_tokens] for response in whole] == [text, [65]]
        assert all(response.prompt_tokens[0].top == () for response in whole)
        for token, other in zip(whole[0].prompt_tokens[3:], said.tokens, strict=True):
            assert token.logprob == pytest.approx(other.logprob, abs=1e-4) and token.top[0] == (token.id, token.logprob)
        pieces = list(pipe.stream([text, [65]], **asked))
        assert sum((piece.prompt_tokens for piece in pieces if piece.index == 0), ()) == whole[0].prompt_tokens
        assert pipe("abc", **GREEDY)[0].prompt_tokens == ()

    def test_the_best_of_several(self, pipe):
        asked = {"max_new_tokens": 12, "seed": 4, "temperature": 2.0, "ignore_eos": True}
        every = [pipe(prompt, **asked, n=4, logprobs=0) for prompt in PROMPTS[:2]]
        best = pipe(PROMPTS[:2], **asked, n=2, best_of=4)
        assert [response.index for response in best] == [0, 1, 2, 3]
        for made, kept in zip(every, (best[:2], best[2:]), strict=True):
            ranked = sorted(made, key=lambda response: -sum(token.logprob for token in response.tokens))
            assert ids(kept) == ids(ranked[:2])
        assert ids(pipe("a", **asked, n=2, best_of=2)) == ids(pipe("a", **asked, n=2))
        for stream in (lambda: pipe.stream("a", best_of=2), lambda: pipe("a", best_of=2, streaming_fn=print)):
            with pytest.raises(RequestError, match="cannot be streamed") as error:
                stream()
            assert error.value.param == "best_of"

    def test_the_best_are_no_empty_ones_that_were_unlikely_to_end(self, pipe):
        """The token that ended an answer counts; what it was worth is asked of it as one of a prompt."""
        asked = {"max_new_tokens": 4, "seed": 2, "top_p": 1.0, "logit_bias": {257: 5.0}}
        every = pipe("a", **asked, n=16)
        assert 0 < sum(not response.generated_length for response in every) < 16

        def mean(made):
            text = encoded(pipe, "a") + ids([made])[0] + [257] * (made.finish_reason == "stop")
            [read] = pipe(text, max_new_tokens=1, prompt_logprobs=0)
            return sum(token.logprob for token in read.prompt_tokens[1:]) / (len(text) - 1)

        means = sorted(map(mean, every), reverse=True)
        best = pipe("a", **asked, n=4, best_of=16)
        assert [mean(response) for response in best] == pytest.approx(means[:4], abs=1e-4)

    def test_a_timeout_ends_the_call(self, pipe):
        with pytest.raises(RequestError, match="timeout of 1e-09 s is over") as error:
            pipe(PROMPTS, **GREEDY, timeout=1e-9)
        assert (error.value.param, error.value.code) == ("timeout", "deadline_exceeded")
        assert pipe("a", **GREEDY, timeout=600) == pipe("a", **GREEDY)

    def test_a_salt_keeps_beginnings_apart(self, pipe):
        def cached(**options):
            before = pipe.stats().cached_tokens
            pipe("salted " * 8, **GREEDY, **options)
            return pipe.stats().cached_tokens - before

        assert (cached(cache_salt="one"), cached(cache_salt="two")) == (0, 0)
        assert cached(cache_salt="one") == 48

    @pytest.mark.parametrize("prompt", ["Hi", [{"role": "user", "content": "Hi"}], "ids"])
    def test_full_text(self, pipe, prompt):
        prompt = encoded(pipe, "Hi") if prompt == "ids" else prompt
        begin = "Hi" if not isinstance(prompt[0], dict) else "user: Hi\nassistant:"
        [response], [plain] = pipe(prompt, **GREEDY, return_full_text=True), pipe(prompt, **GREEDY)
        assert response.generated_text == begin + plain.generated_text
        assert response.generated_length == plain.generated_length


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": "9"}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"max_length": -1}, "max_length"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", 1]}, "stop[1]"),
        ({"stop_token_ids": [999]}, "stop_token_ids"),
        ({"logit_bias": {999: 1.0}}, "logit_bias"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias"),
        ({"logprobs": 1000}, "logprobs"),
        ({"n": 0}, "n"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"stop": ["a"] * 10**6}, "stop"),
        ({"stop": ["a", "\ud800"]}, "stop"),
        ({"stop_token_ids": [1] * 10**6}, "stop_token_ids"),
        ({"logit_bias": dict.fromkeys(range(10**5), 1.0)}, "logit_bias"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"priority": 2**40}, "priority"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": "\ud800"}, "cache_salt"),
        ({"json_schema": {"const": float("nan")}}, "json_schema"),
        ({"json_schema": {"enum": {1, 2}}}, "json_schema"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"stream": True}, "stream"),
    ],
)
def test_a_wrong_option_is_named_and_nothing_runs(pipe, options, param):
    before = pipe.stats().steps
    for ask in (pipe, lambda *args, **kwargs: list(pipe.stream(*args, **kwargs))):
        with pytest.raises(RequestError) as error:
            ask(PROMPTS, **options)
        assert error.value.param == param
        assert param.partition("[")[0] in str(error.value)
        assert len(error.value.lines()) <= 3
    assert pipe.stats().steps == before


@pytest.mark.parametrize(
    ("prompts", "param"),
    [
        (["fine", ""], "prompts[1]"),
        (["fine", None, "fine"], "prompts[1]"),
        (["fine", "long" * 100], "prompts[1]"),
        (["fine", "half \ud800"], "prompts[1]"),
        (["fine", [72, 999]], "prompts[1]"),
        (["fine", [72, -1]], "prompts[1]"),
        (["fine", ["nested"]], "prompts[1]"),
        (["fine", []], "prompts[1]"),
        (["fine", b"ids"], "prompts[1]"),
        ([72, "a"], "prompt"),
        (["fine", [{"role": "user"}]], "prompts[1][0].content"),
        (["fine", [{"content": "x"}]], "prompts[1][0].role"),
        ("", "prompt"),
        ("long" * 100, "prompt"),
        ([{"role": 1, "content": "x"}], "messages[0].role"),
        (None, "prompts"),
        (b"bytes", "prompts"),
        ({"role": "user"}, "prompts"),
    ],
)
def test_a_wrong_prompt_is_named_and_nothing_runs(pipe, prompts, param):
    before = pipe.stats().steps
    with pytest.raises(RequestError) as error:
        pipe(prompts, **GREEDY)
    assert error.value.param == param
    assert param.split("]")[0] in str(error.value) or param in ("prompt", "prompts")
    assert pipe.stats().steps == before


class Ids(Sequence):
    """Token ids that are far too many, and know how many of them were looked at."""

    looked_at = 0

    def __len__(self):
        return 10**9

    def __getitem__(self, index):
        self.looked_at += 1
        return 72


def test_ids_that_cannot_fit_are_not_looked_at(pipe):
    for wrap in (lambda prompt: prompt, lambda prompt: ["fine", prompt]):
        prompt = Ids()
        with pytest.raises(RequestError, match="It has 1000000000 tokens and the context"):
            pipe(wrap(prompt), max_new_tokens=1)
        assert prompt.looked_at < 10


WRAPS = [lambda text: text, lambda text: [{"role": "user", "content": text}]]


@pytest.fixture
def sizes(pipe, monkeypatch):
    """Of the texts that are tokenized."""
    noted = []
    encode = pipe._text.tokenizer.encode
    monkeypatch.setattr(pipe._text.tokenizer, "encode", lambda text: noted.append(len(text)) or encode(text))
    return noted


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("word", ["word ", "     "])
def test_where_the_length_of_a_text_says_enough_nothing_is_tokenized(pipe, sizes, wrap, word):
    with pytest.raises(RequestError, match=r"It has at least 10000\d tokens and the context 256") as error:
        pipe(wrap(word * 10**5), max_new_tokens=1)
    assert error.value.code == "context_length_exceeded" and sizes == []


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_text_that_cannot_fit_is_not_tokenized_to_its_end(pipe, monkeypatch, sizes, wrap):
    monkeypatch.setattr(pipe._text.tokenizer, "least_tokens", lambda text: 0)
    with pytest.raises(RequestError, match=r"It has at least \d+ tokens and the context 256") as error:
        pipe(wrap("word " * 10**5), max_new_tokens=1)
    assert error.value.code == "context_length_exceeded" and 0 < sum(sizes) <= PIECE


def test_a_text_whose_beginning_has_few_tokens_is_not_tokenized_to_its_end(pipe, monkeypatch):
    """As of spaces, of which a token may be many."""
    sizes = []

    def encode(text, add_special_tokens=True):
        sizes.append(len(text))
        return [72] * (len(text) // 128 + text.count("a"))

    monkeypatch.setattr(pipe._text, "encode", encode)
    monkeypatch.setattr(pipe._text.tokenizer, "least_tokens", lambda text: 0)
    with pytest.raises(RequestError, match="It has at least"):
        pipe(" " * 10_000 + "a" * 10**6, max_new_tokens=1)
    assert sum(sizes) <= 10_000 + 2 * PIECE


def test_a_text_of_few_tokens_may_be_long(pipe, monkeypatch):
    """One of which no count tells is tokenized to its end."""
    monkeypatch.setattr(pipe._text, "encode", lambda text, add_special_tokens: [72] * (len(text) // 40))
    monkeypatch.setattr(pipe._text.tokenizer, "least_tokens", lambda text: 0)
    assert pipe("word " * 900, max_new_tokens=1)[0].prompt_length == 4500 // 40


def test_a_conversation_is_rendered_once(pipe, monkeypatch):
    rendered = []
    render = pipe._text.render_chat
    monkeypatch.setattr(pipe._text, "render_chat", lambda messages: rendered.append(messages) or render(messages))
    pipe([{"role": "user", "content": "Hi"}], **GREEDY)
    assert len(rendered) == 1


def test_what_a_callback_raises_ends_the_call(pipe):
    def fail(pieces):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        pipe(PROMPTS, **GREEDY, streaming_fn=fail)


def test_a_stream_that_is_left_frees_its_blocks(pipe):
    stream = pipe.stream(PROMPTS, **GREEDY)
    next(stream)
    assert pipe.stats().running == len(PROMPTS)
    stream.close()
    assert pipe.stats().running == 0
    cycle = [pipe.stream("a", **GREEDY)]
    next(cycle[0])
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert pipe.stats().running == 0


def test_an_interrupt_leaves_the_pipeline_usable(pipe):
    expected = ids(pipe(PROMPTS, **GREEDY))

    def interrupt(pieces):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        pipe(PROMPTS, **GREEDY, streaming_fn=interrupt)
    assert pipe.stats().running == 0
    assert ids(pipe(PROMPTS, **GREEDY)) == expected


# The following need no real model.

TEXT = ByteText()


def asks(count, tokens=8):
    return [Ask([number, 1, 2], SamplingParams(tokens, temperature=0.0, ignore_eos=True)) for number in range(count)]


class Interrupted(StubModel):
    """A model that is interrupted in its third forward, so many times."""

    times = 0

    def forward(self, batch):
        if len(self.batches) == 2:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)
        return super().forward(batch)


def test_an_interrupt_waits_for_the_end_of_the_step():
    model = Interrupted()
    model.times = 1
    engine = Engine(model)
    shared = SharedEngine(engine, TEXT)
    other = shared.generate(asks(1))
    heard = next(other)
    with pytest.raises(KeyboardInterrupt):
        list(shared.generate(asks(3)))
    assert len(model.batches) == 3 and not shared.closed
    assert shared.stats().running == 1
    heard += [delta for deltas in other for delta in deltas]
    assert len(heard) == 8, "what the step gave another reader is kept for it"
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_cuts_the_step_and_closes():
    model = Interrupted()
    model.times = 2
    shared = SharedEngine(Engine(model), TEXT)
    with pytest.raises(KeyboardInterrupt):
        list(shared.generate(asks(3)))
    assert shared.closed and len(model.batches) == 2
    with pytest.raises(UsageError, match="closed"):
        list(shared.generate(asks(1)))


def test_an_ignored_interrupt_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_step_that_fails_closes():
    class Failing(StubModel):
        def forward(self, batch):
            raise MemoryError

    shared = SharedEngine(Engine(Failing()), TEXT)
    with pytest.raises(MemoryError):
        list(shared.generate(asks(2)))
    assert shared.closed


def test_a_model_that_fails_on_one_prompt_frees_all():
    engine = Engine(StubModel(nan_after=2))
    with pytest.raises(FgsnapError, match="failed on this prompt"):
        list(SharedEngine(engine, TEXT).generate(asks(3)))
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks


def test_a_refused_prompt_takes_back_those_before_it():
    engine = Engine(StubModel())
    with pytest.raises(RequestError, match=r"prompts\[7\]: The prompt holds token id 999"):
        list(SharedEngine(engine, TEXT).generate([*asks(3), Ask([999], SamplingParams(3), "prompts[7]")]))
    assert not engine.has_work() and engine.stats().steps == 0


def test_a_lower_priority_goes_first():
    shared = SharedEngine(Engine(StubModel(), max_sequences=1), TEXT)
    wanted = [ask._replace(priority=priority) for ask, priority in zip(asks(3), (1, 2, 0), strict=True)]
    ended = [delta.answer for deltas in shared.generate(wanted) for delta in deltas if delta.finish]
    assert ended == [2, 0, 1]


def test_no_thread_keeps_the_others_out():
    """One that always has a next step to run lets in another that begins meanwhile."""
    shared = SharedEngine(Engine(StubModel(blocks=256)), TEXT)
    begun, ended = threading.Event(), threading.Event()

    def long():
        for deltas in shared.generate(asks(4, tokens=240)):
            begun.set()
            if deltas and ended.is_set():
                return True
        return False

    def short():
        begun.wait()
        list(shared.generate(asks(1, tokens=2)))
        ended.set()

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(long)
        pool.submit(short).result()
        assert first.result()


# Opening and closing.


def test_a_closed_pipeline_says_so(snapshot):
    with fgsnap.load(str(snapshot), backend=BACKENDS[-1], device="cpu", kv_memory=KV_MEMORY) as pipe:
        stream = pipe.stream("a", **GREEDY)
        next(stream)
    assert pipe.closed
    for use in (lambda: pipe("a"), lambda: next(stream), pipe.stats):
        with pytest.raises(UsageError, match="closed"):
            use()
    pipe.close()
    pipe.destroy()


def test_closing_gives_the_memory_back(snapshot):
    def mapped() -> int:
        return sum("rank" in line for line in Path("/proc/self/maps").read_text().splitlines())

    gc.collect()
    before = mapped()
    pipe = fgsnap.load(snapshot, backend=BACKENDS[-1], device="cpu", kv_memory=KV_MEMORY)
    assert mapped() > before
    pipe.close()
    assert mapped() == before


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"backend": "none"}, "none"),
        ({"dtype": "int4"}, "int4"),
        ({"tp": 0}, "tp: Expected `int` >= 1"),
        ({"threads": "two"}, "threads: Expected `int"),
        ({"kv_memory": "2GiB"}, "kv_memory: Expected `int"),
        ({"admission": "never"}, "admission: Invalid enum value 'never'"),
        ({"max_model_len": 10**6}, r"Use max_model_len 256 or less\."),
    ],
)
def test_what_load_refuses(snapshot, options, match):
    with pytest.raises(UsageError, match=match):
        fgsnap.load(snapshot, **options)


def test_an_error_names_the_arguments_of_load(snapshot):
    with pytest.raises(HostError, match=r"Give more with kv_memory, or ask for less with max_model_len\."):
        fgsnap.load(snapshot, device="cpu", kv_memory=4096)


def test_a_snapshot_that_is_not_there(tmp_path):
    with pytest.raises(NotFound):
        fgsnap.load(tmp_path / "nowhere")


def test_the_engine_is_as_chosen(snapshot):
    options = {"max_num_seqs": 2, "max_batch_tokens": 8, "max_model_len": 64, "admission": "optimistic"}
    with fgsnap.load(
        snapshot, backend=BACKENDS[-1], device="cpu", kv_memory=KV_MEMORY, prefix_caching=False, threads=1, **options
    ) as pipe:
        assert pipe.max_length == 64
        stream = pipe.stream(["a", "b", "c"], **GREEDY, ignore_eos=True)
        next(stream)
        assert (pipe.stats().running, pipe.stats().waiting) == (2, 1)
        stream.close()


def test_the_token_budget_is_as_measured(snapshot, tmp_path, monkeypatch):
    """Where none is asked for, as fgsnap serve has it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def loaded(**options):
        return fgsnap.load(snapshot, backend=BACKENDS[-1], device="cpu", kv_memory=KV_MEMORY, threads=1, **options)

    def steps_of_a_prompt(pipe):
        pipe("x" * 200, max_new_tokens=1)
        return pipe.stats().steps

    with loaded() as pipe:
        assert steps_of_a_prompt(pipe) == 2, "of 128 tokens, the default on a CPU"
        decoder = pipe._engine._engine._model
        host = host_of(decoder)
    opened = open_snapshot(snapshot)
    opened.close()
    keep({"snapshot": opened.id, "host": host, "max_batch_tokens": 50})
    with loaded() as pipe:
        assert steps_of_a_prompt(pipe) == 4
    with loaded(max_batch_tokens=100) as pipe:
        assert steps_of_a_prompt(pipe) == 2


@pytest.mark.skipif("native" not in BACKENDS, reason="the library is not built")
def test_other_ranks_are_processes_that_end_with_the_pipeline(snapshot):
    """In a process of its own, which has no threads yet."""
    program = (
        "import fgsnap, os\n"
        f"with fgsnap.load({str(snapshot)!r}, backend='native', tp=2, threads=2, kv_memory={KV_MEMORY}) as pipe:\n"
        f"    print([[t.id for t in r.tokens] for r in pipe({PROMPTS!r}, **{GREEDY!r})])\n"
        "    print(open(f'/proc/self/task/{os.getpid()}/children').read(), flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, text=True) as process:
        answers, [rank] = process.stdout.readline(), process.stdout.readline().split()
        until(lambda: not alive(int(rank)), what="the other rank has ended")
        process.communicate("\n")
    with fgsnap.load(snapshot, backend="native", kv_memory=KV_MEMORY) as pipe:
        assert answers.strip() == str(ids(pipe(PROMPTS, **GREEDY)))
