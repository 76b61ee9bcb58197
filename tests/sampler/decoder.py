"""Decodes files in the working directory with little memory: python -m tests.sampler.decoder BYTES FILE..."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from PIL import Image

from services.errors import InvalidRequest
from services.sampler.references import decode
from tests.sampler.image_files import red_for_green_profile, saved


def outcome(data: bytes, spare_bytes: int) -> str:
    """ "decoded", "refused" or "memory", with so many bytes of address space beyond what is in use."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + spare_bytes, resource.RLIM_INFINITY))
    try:
        decode(data, "image")
    except InvalidRequest:
        return "refused"
    except MemoryError:
        return "memory"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "decoded"


if __name__ == "__main__":
    small = saved(Image.new("RGB", (8, 8)), "WEBP", icc_profile=red_for_green_profile())
    decode(small, "image")  # libraries are loaded from here on
    for name in sys.argv[2:]:
        print(outcome(Path(name).read_bytes(), int(sys.argv[1])))
