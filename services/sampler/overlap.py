"""How well the copies of a sweep hide behind its compute, gate by gate. Pure: seconds in, seconds out.

A sum over all gates says too much. A UNet has most of its bytes where it computes little and computes most where it has
few, and slots hold copies for a few gates ahead only: the bus rests in one stretch and is waited for in the other,
though there is time for both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

# Loads that are tried; each is nearer to the one that hides the bus.
ROUNDS = 3
# Of a pass: less waiting than that is not worth another rider.
TOLERANCE = 0.02


def pass_s(copies_s: Sequence[float], computes_s: Sequence[float], slot_count: int) -> float:
    """Seconds of one pass over gates in this order, of many that follow each other.

    copies_s: what each gate keeps the bus busy, 0 for one that is there; computes_s: what riders compute behind it. A
    copy needs the bus, and a slot that the compute of an earlier gate has left.
    """
    bus_s = clock_s = start_s = 0.0
    free_s = deque([0.0] * slot_count)
    for _ in range(2):  # the first pass finds nothing brought ahead
        start_s = clock_s
        for copy_s, compute_s in zip(copies_s, computes_s, strict=True):
            if copy_s:
                bus_s = max(bus_s, free_s.popleft()) + copy_s
                clock_s = max(clock_s, bus_s) + compute_s
                free_s.append(clock_s)
            else:
                clock_s += compute_s
    return clock_s - start_s


def hiding_load_s(copies_s: Sequence[float], computes_s: Sequence[float], slot_count: int) -> float:
    """Compute of a pass, with `computes_s` as its profile, that leaves hardly any of the copies to be waited for.

    Where compute is spread as the bytes are, or is not known (all 0), that is what the copies take. At most what
    ROUNDS steps towards it reach: load and time of a pass are equal when nobody waits.
    """
    load_s, whole_s = sum(copies_s), sum(computes_s)
    if not whole_s:
        return load_s
    for _ in range(ROUNDS):
        took_s = pass_s(copies_s, [each * load_s / whole_s for each in computes_s], slot_count)
        if took_s <= load_s * (1 + TOLERANCE):
            break
        load_s = took_s
    return load_s
