"""Metrics of a service, as Prometheus reads them. Knows nothing of what it counts."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16_384, 65_536)


class Monitor:
    """Counters of one service."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"bertray_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"bertray_{name}", text, labels, registry=registry, buckets=buckets)

        self._requests = counter("requests", "requests answered, by route and status", "route", "status")
        self._latency = histogram("request_seconds", "from a request's arrival to its answer", _SECONDS, "route")
        self._answers = counter("answers", "inputs that a head answered", "head", "version")
        self._head_latency = histogram("head_seconds", "from a head's inputs to its answers", _SECONDS, "head")
        self._abstained = counter("abstained", "inputs that a head was not sure enough of", "head")
        self._outliers = counter("outliers", "inputs unlike a head's training texts", "head")
        self._judged = counter("judged", "inputs that were held against a head's training texts", "head")
        self._errors = counter("errors", "requests refused or failed, by kind of error", "kind")
        self._texts = histogram("batch_texts", "texts encoded together", _TEXTS)
        self._tokens = histogram("batch_tokens", "tokens encoded together", _TOKENS)
        self._encode = histogram("encode_seconds", "from a batch's departure to its vectors", _SECONDS)
        self._encoded = counter("tokens", "tokens encoded")
        self._lookups = counter("cache_lookups", "texts looked for among those read lately", "found")
        self._again = counter("tried_again", "texts given to another encoder since one ended over them")

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Show a number as it is when it is looked at."""
        Gauge(f"bertray_{name}", text, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def refused(self, kind: str) -> None:
        """A request was answered with an error of that kind."""
        self._errors.labels(kind).inc()

    def predicted(self, head: str, version: int, inputs: int, abstained: int, seconds: float) -> None:
        """A head answered inputs."""
        self._head_latency.labels(head).observe(seconds)
        self._answers.labels(head, str(version)).inc(inputs)
        self._abstained.labels(head).inc(abstained)

    def judged(self, head: str, inputs: int, outliers: int) -> None:
        """Inputs were held against a head's training texts."""
        self._judged.labels(head).inc(inputs)
        self._outliers.labels(head).inc(outliers)

    # What `batcher.Watch` asks for.

    def encoded(self, texts: int, tokens: int, seconds: float) -> None:
        """A batch was encoded."""
        self._texts.observe(texts)
        self._tokens.observe(tokens)
        self._encode.observe(seconds)
        self._encoded.inc(tokens)

    def looked_up(self, found: int, missed: int) -> None:
        """Texts were looked for in the cache."""
        self._lookups.labels("yes").inc(found)
        self._lookups.labels("no").inc(missed)

    def tried_again(self, texts: int) -> None:
        """Texts go to another encoder."""
        self._again.inc(texts)
