"""What the service counts, and its Prometheus form.

Counting is plain arithmetic, so that serving pays nothing for it; prometheus-client is imported by the first scrape.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fgsnap.runtime.request import EngineStats

if TYPE_CHECKING:
    from prometheus_client.core import Metric

LATENCY_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class Histogram:
    """How many observations fell at or below each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, observations up to it), the last bound infinite."""
        total, rows = 0, []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            rows.append((bound, float(total)))
        return rows


class Facts(NamedTuple):
    """The state of the service at the moment of a scrape.

    ``info`` describes the snapshot and the engine; ``phases`` are (process, name, seconds) of the start.
    """

    ready: bool
    held: int
    restarts: int
    engine: EngineStats | None
    info: dict[str, str]
    phases: Sequence[tuple[str, str, float]]


class Metrics:
    """Counters and histograms of the requests since the server started."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, str]] = Counter()  # (route, HTTP status)
        self.finished: Counter[str] = Counter()  # by finish reason
        self.first_token = Histogram(LATENCY_SECONDS)
        self.between_tokens = Histogram(TOKEN_SECONDS)
        self.whole_request = Histogram(LATENCY_SECONDS)


def render(metrics: Metrics, facts: Facts) -> tuple[bytes, str]:
    """The exposition and its content type."""
    from prometheus_client import CollectorRegistry, ProcessCollector
    from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=registry)
    registry.register(_Now(metrics, facts))
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Now:
    """The collector that prometheus-client asks."""

    def __init__(self, metrics: Metrics, facts: Facts) -> None:
        self._metrics = metrics
        self._facts = facts

    def collect(self) -> Iterator[Metric]:
        yield from _service(self._facts)
        if self._facts.engine is not None:
            yield from _engine(self._facts.engine)
        yield from _requests(self._metrics)


def _service(facts: Facts) -> Iterator[Metric]:
    yield _family("gauge", "fgsnap_ready", "Whether requests are being answered.", [({}, facts.ready)])
    yield _family("gauge", "fgsnap_requests_held", "Requests that wait for a ready engine.", [({}, facts.held)])
    yield _family("counter", "fgsnap_worker_restarts", "Times the engine was replaced.", [({}, facts.restarts)])
    yield _family("gauge", "fgsnap_snapshot_info", "The snapshot that is served, and by what.", [(facts.info, 1)])
    phases = {(process, name): seconds for process, name, seconds in facts.phases}
    yield _family(
        "gauge",
        "fgsnap_startup_seconds",
        "Length of each phase of the start.",
        [({"process": process, "phase": name}, seconds) for (process, name), seconds in phases.items()],
    )


def _engine(stats: EngineStats) -> Iterator[Metric]:
    rows = (
        ("gauge", "fgsnap_requests_running", "Requests in the engine's batch.", stats.running),
        ("gauge", "fgsnap_requests_waiting", "Requests queued in the engine.", stats.waiting),
        ("gauge", "fgsnap_tokens_waiting", "Most tokens that the queued requests can have.", stats.waiting_tokens),
        ("gauge", "fgsnap_kv_blocks", "KV cache blocks.", stats.kv_blocks),
        ("gauge", "fgsnap_kv_blocks_free", "KV cache blocks not promised to a request.", stats.kv_blocks_free),
        ("counter", "fgsnap_prompt_tokens", "Prompt tokens computed or found cached.", stats.prompt_tokens),
        ("counter", "fgsnap_prompt_tokens_cached", "Prompt tokens found in the prefix cache.", stats.cached_tokens),
        ("counter", "fgsnap_generated_tokens", "Tokens generated.", stats.generated_tokens),
        ("counter", "fgsnap_preemptions", "Requests that gave up their KV blocks for another one.", stats.preemptions),
        ("counter", "fgsnap_recomputed_tokens", "Tokens computed again after preemptions.", stats.recomputed_tokens),
        ("counter", "fgsnap_steps", "Forwards run.", stats.steps),
    )
    for kind, name, help, value in rows:
        yield _family(kind, name, help, [({}, value)])


def _requests(metrics: Metrics) -> Iterator[Metric]:
    yield _family(
        "counter",
        "fgsnap_http_responses",
        "HTTP responses.",
        [({"route": route, "status": status}, count) for (route, status), count in metrics.responses.items()],
    )
    yield _family(
        "counter",
        "fgsnap_choices_finished",
        "Answers by why they ended.",
        [({"reason": reason}, count) for reason, count in metrics.finished.items()],
    )
    yield _histogram("fgsnap_time_to_first_token_seconds", "From request to first token.", metrics.first_token)
    yield _histogram("fgsnap_inter_token_seconds", "Between two tokens of an answer.", metrics.between_tokens)
    yield _histogram("fgsnap_request_seconds", "From request to its last token.", metrics.whole_request)


def _family(kind: str, name: str, help: str, samples: Sequence[tuple[dict[str, str], float]]) -> Metric:
    from prometheus_client.core import Metric

    family = Metric(name, help, kind)
    for labels, value in samples:
        family.add_sample(name + "_total" * (kind == "counter"), labels, float(value))
    return family


def _histogram(name: str, help: str, histogram: Histogram) -> Metric:
    from prometheus_client.core import HistogramMetricFamily

    return HistogramMetricFamily(name, help, buckets=histogram.cumulative(), sum_value=histogram.sum)
