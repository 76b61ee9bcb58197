"""Figures of a run from its samples, without a server."""

import numpy
import pytest
from headwater_client import (
    Finished,
    Image,
    ImageFormat,
    Numerics,
    Phase,
    Progress,
    Queued,
    QueueFull,
    Started,
    Unavailable,
)
from headwater_client.measures import MARKS, Failure, Sample, Spread, Watch, nearest_rank, summarize


def finished(*seeds: int, run_s: float = 2, stall_s: float = 0.5, streamed: int = 600, steps: int = 9) -> Finished:
    parameters = {"prompt": "a fox", "model": "demo", "steps": steps, "seed": seeds[0], "request_id": "r"}
    return Finished(seeds, 0.25, run_s, stall_s, streamed, Numerics.EAGER, parameters, {})  # type: ignore[arg-type]


def sample(whole_s: float, **fields: int) -> Sample:
    return Sample({"started": 0.1, "whole": whole_s}, "a", finished=finished(7, **fields))


@pytest.mark.parametrize("percent", [50, 90, 99, 100])
def test_percentiles_are_numpys_inverted_cdf(percent: int) -> None:
    """On values in no order, some of them equal."""
    for count in range(1, 301):
        values = [float(each) for each in numpy.random.default_rng(count).integers(0, count, count)]
        assert nearest_rank(values, percent) == numpy.percentile(values, percent, method="inverted_cdf"), count


def test_a_rank_is_counted_in_integers() -> None:
    """7 % of 100 values is the 7th; in floats 0.07 * 100 is above 7, and numpy answers the 8th."""
    assert nearest_rank(range(1, 101), 7) == 7


def test_a_request_is_timed_by_its_first_events() -> None:
    """Later ones of a kind change nothing; a picture began when its first part came."""
    times = iter([100.0, 101.0, 102.0, 103.0, 110.0, 111.0, 112.0])
    watch = Watch(lambda: next(times))
    for event in (
        Queued(1, None),
        Started("a", "demo", "r"),
        Progress(0, Phase.ENCODING, 0, 0, None, 0, 0),
        Progress(0, Phase.DECODING, 0, 0, None, 0, 0),
        Image(0, b"", "", ImageFormat.PNG, 1, 1, 7, transfer_s=3),
        Image(1, b"", "", ImageFormat.PNG, 1, 1, 8, transfer_s=0),
    ):
        watch(event)
    done = watch.stop(finished(7, 8))

    assert done.times_s == {"started": 1, "progress": 2, "picture": 7, "whole": 12}
    assert (done.replica, done.failure) == ("a", None)


def test_rates_count_pictures_and_steps_of_done_requests() -> None:
    """Over the time that all took together; means are of requests, bytes of pictures."""
    samples = [
        Sample({"whole": 1}, "b", finished=finished(7, 8, run_s=1, streamed=600)),
        Sample({"whole": 3}, "a", finished=finished(9, run_s=2, stall_s=1.5, streamed=300)),
        Watch().stop(QueueFull("full", code="RESOURCE_EXHAUSTED", reason="QUEUE_FULL")),
    ]
    summary = summarize(samples, elapsed_s=6)

    assert (summary.done_count, summary.image_count, summary.step_count) == (2, 3, 27)
    assert (summary.images_per_second, summary.steps_per_second) == (0.5, 4.5)
    assert (summary.mean_run_time_s, summary.mean_stall_time_s) == (1.5, 1)
    assert summary.streamed_bytes_per_image == 300
    assert summary.replica_counts == {"a": 1, "b": 1}
    assert summary.parameters == {"model": "demo", "steps": 9}


def test_latencies_are_those_of_done_requests() -> None:
    """A request that failed at once makes no server look fast."""
    samples = [sample(whole_s) for whole_s in range(200, 0, -1)] + [Watch().stop(Unavailable("gone"))] * 50
    latencies_s = summarize(samples, 1).latencies_s

    assert list(latencies_s) == list(MARKS)
    assert latencies_s["whole"] == Spread(100, 180, 198, 200)
    assert latencies_s["started"] == Spread(0.1, 0.1, 0.1, 0.1)
    assert latencies_s["picture"] is None


def test_failures_are_counted_by_code_and_reason() -> None:
    """The most frequent first, with the first message."""
    errors = [Unavailable("one", code="UNAVAILABLE")]
    errors += [QueueFull(f"full {n}", code="RESOURCE_EXHAUSTED", reason="QUEUE_FULL") for n in range(3)]  # type: ignore[misc]
    summary = summarize([Watch().stop(error) for error in errors], 1)

    assert summary.failures == (
        Failure("RESOURCE_EXHAUSTED", "QUEUE_FULL", "full 0", 3),
        Failure("UNAVAILABLE", "", "one", 1),
    )


def test_nothing_done_has_no_figures() -> None:
    """None, not 0: nobody measured anything."""
    summary = summarize([], 0)

    assert (summary.images_per_second, summary.steps_per_second, summary.mean_run_time_s) == (None, None, None)
    assert set(summary.latencies_s.values()) == {None}
