"""Instruments as Prometheus reads them."""

from __future__ import annotations

import threading

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from headway.server.telemetry.instruments import Counter, Histogram, Instrument, Reading

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def expose(*instruments: Instrument) -> Series:
    """What a scraper reads: (name, sorted labels) → value."""

    class Collector:
        def collect(self):  # type: ignore[no-untyped-def]
            return (one.family({"model_name": "m"}) for one in instruments)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def test_a_counter_sums_by_labels() -> None:
    counter = Counter("pages_total", "Pages.", ("kind",))
    counter.add(("odd",))
    counter.add(("even",), 0)
    counter.add(("odd",), 2.5)
    model = ("model_name", "m")
    assert expose(counter) == {
        ("headway:pages_total", (("kind", "odd"), model)): 3.5,
        ("headway:pages_total", (("kind", "even"), model)): 0,
    }


def test_a_counter_without_labels_is_there_before_it_counts() -> None:
    assert expose(Counter("pages_total", "Pages.")) == {
        ("headway:pages_total", (("model_name", "m"),)): 0
    }


def test_bounds_are_inclusive_and_buckets_cumulative() -> None:
    histogram = Histogram("age_seconds", "Age.", (1, 2.5))
    for value, count in ((1, 1), (1.0001, 2), (2.5, 1), (2.6, 4)):
        histogram.observe((), value, count)
    model = ("model_name", "m")
    assert expose(histogram) == {
        ("headway:age_seconds_bucket", (("le", "1.0"), model)): 1,
        ("headway:age_seconds_bucket", (("le", "2.5"), model)): 4,
        ("headway:age_seconds_bucket", (("le", "+Inf"), model)): 8,
        ("headway:age_seconds_count", (model,)): 8,
        ("headway:age_seconds_sum", (model,)): pytest.approx(1 + 2.0002 + 2.5 + 10.4),
    }


@pytest.mark.parametrize(("name", "kind"), [("pages_total", "counter"), ("pages", "gauge")])
def test_a_reading_is_a_counter_if_its_name_says_so(name: str, kind: str) -> None:
    pages = {("odd",): 1.0}
    reading = Reading(name, "Pages.", lambda: pages, ("kind",))
    assert reading.family({}).type == kind
    pages[("odd",)] = 7
    labels = (("kind", "odd"), ("model_name", "m"))
    assert expose(reading) == {(f"headway:{name}", labels): 7}


def test_label_values_may_be_any_text() -> None:
    counter = Counter("pages_total", "Pages.", ("kind",))
    counter.add(('a "b"\\\n{c}',))
    ((_, labels),) = expose(counter)
    assert dict(labels)["kind"] == 'a "b"\\\n{c}'


def test_one_thread_writes_while_another_reads() -> None:
    counter = Counter("pages_total", "Pages.", ("page",))
    histogram = Histogram("age_seconds", "Age.", range(50), ("page",))
    num_pages = 20_000

    def write() -> None:
        for page in range(num_pages):
            counter.add((str(page % 977),))
            histogram.observe((str(page % 977),), page % 60)

    writer = threading.Thread(target=write)
    writer.start()
    is_over, last = False, 0.0
    while not is_over:
        is_over = not writer.is_alive()
        total = sum(sample.value for sample in counter.family({}).samples)
        assert total >= last
        last = total
        histogram.family({})
    assert total == num_pages
    counts = [one.value for one in histogram.family({}).samples if one.name.endswith("_count")]
    assert sum(counts) == num_pages
