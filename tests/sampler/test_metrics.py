"""A sampler's numbers, as Prometheus reads them."""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from tests.sampler.support import draw
from tests.stack import ROOT, Stack


def test_metrics_say_what_was_drawn_and_how_params_travel(stack: Stack) -> None:
    """Pictures are counted, and the way of the params stands beside the device."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sampler = stack.sampler("--metrics", f"127.0.0.1:{port}")
    for seed in (1, 2):
        draw(sampler.addresses[0], seed=seed)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    samples = {s.name: s for family in text_string_to_metric_families(text) for s in family.samples}

    assert samples["headwater_images_total"].value == 2
    assert samples["headwater_transfer_info"].labels == {"way": "arena views", "device": "CPU"}
    assert samples["headwater_loader_connected"].value == 1
    assert sampler.stop() == 0


def test_an_address_that_is_taken_is_one_line(stack: Stack) -> None:
    """The sampler ends at once and says which address it could not have."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "services.sampler", "--loader", stack.loader_address, "--device", "cpu"]
        command += ["--listen", f"unix:{stack.memory}/m.sock", "--metrics", address, "--log-level", "error"]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)

    assert ended.returncode == 1
    assert ended.stderr.strip() == f"headwater-sampler: cannot serve metrics on {address}: Address already in use"
