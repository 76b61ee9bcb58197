"""The sampler's command line: configure, open the device, serve until a signal, let everything go.

Exits with 0 after a signal, 1 for what the operator has to mend, DEVICE_GONE_EXIT for its supervisor to start it anew.
"""

from __future__ import annotations

import asyncio
import os
import sys
import warnings
from collections.abc import Sequence

from services.errors import DeviceGone
from services.rpc import logs
from services.sampler import heap
from services.sampler.config import ConfigError, parse_args

DEVICE_GONE_EXIT = 75  # EX_TEMPFAIL of sysexits.h: try again


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sampler and return its exit code; with 1 there is one line on stderr."""
    try:
        config = parse_args(argv)
        logs.configure(config.log_format, config.log_level)
        heap.share_heaps()
        settle_libraries()
        from services.sampler.server import serve  # seconds of imports, after the flags were checked

        asyncio.run(serve(config))
    except ConfigError as error:
        print(f"headwater-sampler: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except OSError as error:
        print(f"headwater-sampler: {error.strerror}", file=sys.stderr)  # noqa: T201
        return 1
    except DeviceGone:
        # Libraries let go of the device at exit, and abort or hang when it answers no more.
        os._exit(DEVICE_GONE_EXIT)
    return 0


def settle_libraries() -> None:
    """No bars and no hints on stderr, and no look at a hub: it carries our log lines only. Before they are imported."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    # Pictures of many sizes leave holes in memory of fixed pieces, and a plan that fits by the sum would not.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # Arenas are mapped read-only on purpose; a write through one would be a segmentation fault, not a wrong picture.
    warnings.filterwarnings("ignore", message="The given buffer is not writable")


if __name__ == "__main__":
    sys.exit(main())
