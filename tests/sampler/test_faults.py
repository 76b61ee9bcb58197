"""Which errors end a request, and which a replica."""

from __future__ import annotations

import pytest
import torch

from services.errors import DeviceMemoryFull
from services.sampler.faults import is_device_fault, is_lost, is_memory_full

LOST = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: unspecified launch failure"),
]
MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    DeviceMemoryFull("does not fit"),
]
OTHER = [RuntimeError("shapes cannot be multiplied"), ValueError("CUDA error"), KeyError("out of memory")]


@pytest.mark.parametrize("error", [*LOST, *MEMORY, *OTHER], ids=str)
def test_kinds_of_errors(error: Exception) -> None:
    assert is_device_fault(error) == (error in LOST)
    assert is_memory_full(error) == (error in MEMORY)
    assert is_lost(error, torch.device("cpu")) == (error in LOST)


@pytest.mark.gpu
def test_a_device_that_still_computes_is_not_lost(cuda: None) -> None:
    """A refused launch is its request's error."""
    assert not is_lost(LOST[0], torch.device("cuda", 0))
