"""A sampler in numbers."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from services.sampler.device import DeviceFacts
from services.sampler.graphs import Graphs
from services.sampler.sampler import Sampler


def numbers(sampler: Sampler, device: DeviceFacts, graphs: Graphs | None) -> Iterator[Metric]:
    """What GetStatus says, as metrics; names end in their unit."""
    transfer, admission = sampler.engine.transfer, sampler.admission
    facts = {"way": transfer.way, "device": device.name}
    yield InfoMetricFamily("headwater_transfer", "How params reach the device.", facts)
    yield CounterMetricFamily("headwater_streamed_bytes", "Bytes copied to the device.", transfer.streamed_bytes)
    yield CounterMetricFamily("headwater_images", "Pictures drawn.", sampler.image_count)
    yield GaugeMetricFamily("headwater_riding", "Pictures being drawn.", admission.riding_count)
    yield GaugeMetricFamily("headwater_queued", "Requests that wait.", admission.queued_count)
    yield GaugeMetricFamily("headwater_vram_budget_bytes", "VRAM that may be used.", device.budget_bytes)
    yield GaugeMetricFamily("headwater_vram_used_bytes", "VRAM in use, by the driver's count.", device.used_bytes())
    if graphs is not None:
        yield GaugeMetricFamily("headwater_graphs", "CUDA graphs of blocks.", graphs.graph_count)
        yield GaugeMetricFamily("headwater_graph_bytes", "VRAM that graphs work in.", graphs.held_bytes)
        yield CounterMetricFamily("headwater_graph_replays", "Blocks computed by a graph.", graphs.replay_count)
    if device.vram is not None:
        for name, (count, what) in device.vram.shortages().items():
            yield CounterMetricFamily(f"headwater_allocator_{name}", what, count)
    connected = float(sampler.library.loader_connected)
    yield GaugeMetricFamily("headwater_loader_connected", "1 while the loader answers.", connected)
