"""Whether a picture is decoded in overlapping tiles when its request does not say. Pure: knows sizes, no torch.

Tiles change pixels at their seams, so this is a function of the size and of the configuration. What happens to be free
on the device has no say: a picture that is short of memory waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

# A decode is at its peak in its last block, at full resolution: input, normalised input and activation of one layer.
BUFFERS = 3
# Channels there, of most autoencoders, where the config has them under no name known here.
USUAL_CHANNELS = 256
# A decode may take a half of the budget before it is tiled; the rest holds CUDA's own, slots and residents.
BUDGET_PARTS = 2


class TiledDecode(Enum):
    """What the operator says."""

    AUTO = "auto"
    NEVER = "never"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class TileRule:
    """The replica's configuration, as far as tiles depend on it."""

    mode: TiledDecode = TiledDecode.AUTO
    budget_bytes: int = 0  # of VRAM as configured; 0: the configuration names none

    def tiles(self, area_px: int, decode_px_bytes: int) -> bool:
        """Whether to tile a picture whose decode takes `decode_px_bytes` for each of its pixels."""
        if self.mode is not TiledDecode.AUTO:
            return self.mode is TiledDecode.ALWAYS
        return 0 < self.budget_bytes < BUDGET_PARTS * area_px * decode_px_bytes


UNTILED = TileRule()


def decode_px_bytes(config: Mapping[str, Any], item_bytes: int) -> int:
    """What a decode without tiles takes for a pixel, about; `config` is the autoencoder's, `item_bytes` its dtype's."""
    channels = config.get("decoder_block_out_channels") or config.get("block_out_channels")
    base = config.get("decoder_base_dim") or config.get("base_dim")
    if not channels and base:
        channels = [base * factor for factor in config.get("dim_mult") or ()]
    # The last block but one hands on its channels at full resolution.
    return BUFFERS * item_bytes * (max(channels[:2]) if channels else USUAL_CHANNELS)
