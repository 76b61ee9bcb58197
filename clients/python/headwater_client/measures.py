"""What requests took, as plain values: a Sample for each, a Summary for all. Knows no server and no terminal."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from .errors import HeadwaterError
from .events import Event, Finished, Image, Progress, Started
from .options import Parameters

# What a latency ends with, in the order in which it comes.
MARKS = ("started", "progress", "picture", "whole")
# What differs from request to request.
OWN = ("prompt", "seed", "request_id")


@dataclass(frozen=True)
class Failure:
    """Requests that ended with one code and reason, see HeadwaterError; message is the first one's."""

    code: str
    reason: str
    message: str
    count: int = 1


@dataclass(frozen=True)
class Sample:
    """One request as its client saw it. It is done if it has `finished`, else `failure` says why not.

    times_s: seconds from sending it to the first Started, Progress and byte of a picture, and to its end ("whole").
    """

    times_s: Mapping[str, float]
    replica: str = ""
    finished: Finished | None = None
    failure: Failure | None = None


@dataclass
class Watch:
    """Times one request, from when it is made; takes its events. `clock` gives seconds."""

    clock: Callable[[], float] = time.monotonic
    times_s: dict[str, float] = field(default_factory=dict)
    replica: str = ""

    def __post_init__(self) -> None:
        self._sent_s = self.clock()

    def __call__(self, event: Event) -> None:
        """Take in what happened, as it happens."""
        match event:
            case Started():
                self.replica = event.replica
                self._mark("started")
            case Progress():
                self._mark("progress")
            case Image():
                self._mark("picture", event.transfer_s)

    def stop(self, outcome: Finished | HeadwaterError) -> Sample:
        """The request has ended."""
        self._mark("whole")
        if isinstance(outcome, HeadwaterError):
            # Not the error itself: its traceback would keep the pictures of a failed request in memory.
            failure = Failure(outcome.code, outcome.reason, outcome.text)
            return Sample(self.times_s, self.replica, failure=failure)
        return Sample(self.times_s, self.replica, finished=outcome)

    def _mark(self, name: str, ago_s: float = 0) -> None:
        self.times_s.setdefault(name, self.clock() - ago_s - self._sent_s)


@dataclass(frozen=True)
class Spread:
    """How some times are spread; see nearest_rank. Seconds."""

    p50_s: float
    p90_s: float
    p99_s: float
    max_s: float


@dataclass(frozen=True)
class Summary:
    """All of a run. Failed requests count in `failures` and in elapsed_s only; without a done one, figures are None.

    replica_counts: requests done by each replica. parameters: the options that all requests had, defaults filled in,
    as the server told them. elapsed_s: the first request sent to the last one ended. step_count: denoise steps of all
    pictures. latencies_s: for each of MARKS. mean_run_time_s, mean_stall_time_s: of a request, as Finished has them;
    streamed_bytes_per_image: Finished's too, so bytes of a sweep count for every request that rode it.
    """

    done_count: int
    failures: tuple[Failure, ...]
    elapsed_s: float
    replica_counts: Mapping[str, int]
    parameters: Mapping[str, object]
    image_count: int
    step_count: int
    images_per_second: float | None
    steps_per_second: float | None
    latencies_s: Mapping[str, Spread | None]
    mean_run_time_s: float | None
    mean_stall_time_s: float | None
    streamed_bytes_per_image: float | None


def summarize(samples: Sequence[Sample], elapsed_s: float) -> Summary:
    """The figures of `samples`, which took elapsed_s together."""
    done = [sample for sample in samples if sample.finished is not None]
    finished = [sample.finished for sample in done if sample.finished is not None]
    images = sum(len(each.seeds) for each in finished)
    steps = sum((each.parameters.get("steps") or 0) * len(each.seeds) for each in finished)
    return Summary(
        done_count=len(done),
        failures=failures(samples),
        elapsed_s=elapsed_s,
        replica_counts=dict(sorted(Counter(sample.replica for sample in done).items())),
        parameters=_shared(finished[0].parameters) if finished else {},
        image_count=images,
        step_count=steps,
        images_per_second=_rate(images, elapsed_s),
        steps_per_second=_rate(steps, elapsed_s),
        latencies_s={mark: _spread([s.times_s[mark] for s in done if mark in s.times_s]) for mark in MARKS},
        mean_run_time_s=_mean([each.run_time_s for each in finished]),
        mean_stall_time_s=_mean([each.stall_time_s for each in finished]),
        streamed_bytes_per_image=sum(each.streamed_bytes for each in finished) / images if images else None,
    )


def failures(samples: Sequence[Sample]) -> tuple[Failure, ...]:
    """The failed ones: one for each code and reason, the most frequent first."""
    failed = [sample.failure for sample in samples if sample.failure is not None]
    first = {(each.code, each.reason): each for each in reversed(failed)}
    counts = Counter((each.code, each.reason) for each in failed)
    return tuple(replace(first[key], count=count) for key, count in counts.most_common())


def nearest_rank(values: Sequence[float], percent: int) -> float:
    """The smallest of `values` that at least `percent` % (1 to 100) of them do not exceed.

    This is the nearest-rank definition (Hyndman and Fan 1996, definition 1; numpy's "inverted_cdf"): nothing is
    interpolated, so each answer is a time that some request took; of fewer than 100 values the 99th is the largest.
    """
    rank = -(-percent * len(values) // 100)  # rounded up, in integers: 0.07 * 100 is above 7 in floats
    return sorted(values)[rank - 1]


def _spread(values: Sequence[float]) -> Spread | None:
    return Spread(*(nearest_rank(values, percent) for percent in (50, 90, 99, 100))) if values else None


def _rate(count: int, elapsed_s: float) -> float | None:
    return count / elapsed_s if count and elapsed_s else None


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _shared(parameters: Parameters) -> dict[str, object]:
    return {name: value for name, value in parameters.items() if name not in OWN}
