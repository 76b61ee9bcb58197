"""What compute took, and that nobody waits to know it."""

from __future__ import annotations

import pytest
import torch

from services.sampler.meter import CudaMeter, WallMeter, open_meter


def test_a_cpu_is_measured_by_the_clock() -> None:
    times = iter([10.0, 12.5])
    took: list[float] = []
    meter = WallMeter(clock=lambda: next(times))
    meter.stop(meter.start(), took.append)

    assert took == [2.5]


@pytest.mark.gpu
def test_cuda_is_measured_by_events(cuda: None) -> None:
    """A stretch is heard of at a later call, once it has passed, in order, and is about as long as it was."""
    device = torch.device("cuda", 0)
    meter = open_meter(device)
    assert isinstance(meter, CudaMeter)
    assert meter.bus_bytes_per_s > 1e9
    took: list[tuple[str, float]] = []
    for name, cycles in (("long", 400_000_000), ("short", 4_000_000)):
        mark = meter.start()
        torch.cuda._sleep(cycles)
        meter.stop(mark, lambda seconds, name=name: took.append((name, seconds)))
    assert took == []  # nobody waited
    torch.cuda.synchronize(device)
    meter.start()

    assert [name for name, _ in took] == ["long", "short"]
    assert 30 < took[0][1] / took[1][1] < 300
