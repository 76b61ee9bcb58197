"""What a failed computation says: that one request asked too much, or that the device is lost."""

from __future__ import annotations

import torch

from services.errors import DeviceMemoryFull

# Names of memory that ran out, in errors that are no OutOfMemoryError: of libraries, and of the driver itself.
MEMORY_TEXTS = ("out of memory", "ALLOC_FAILED")


def is_memory_full(error: BaseException) -> bool:
    """Whether memory ran out, which ends the request it belongs to and nothing else."""
    if isinstance(error, DeviceMemoryFull | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MEMORY_TEXTS)


def failed_allocations(device: torch.device) -> int:
    """Allocations on the device that failed so far, whether or not somebody found another way. A CPU counts none."""
    return int(torch.cuda.memory_stats(device)["num_ooms"]) if device.type == "cuda" else 0


def is_device_fault(error: BaseException) -> bool:
    """Whether the error came from the device and is none of memory."""
    from_device = isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and "CUDA error" in str(error)
    )
    return from_device and not is_memory_full(error)


def is_lost(error: BaseException, device: torch.device) -> bool:
    """Whether a rider's error says that the device can compute no more: it came from there, and another try fails too.

    A launch that is refused for its size is that request's error; after a lost context every call fails.
    """
    return is_device_fault(error) and not answers(device)


def answers(device: torch.device) -> bool:
    """Whether the device still computes. Waits for it. A CPU has no faults of its own: one was planted."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        return bool(torch.ones(1, device=device).item() == 1)
    except RuntimeError:
        return False
