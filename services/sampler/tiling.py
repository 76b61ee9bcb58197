"""Whether a picture is decoded in overlapping tiles when its request does not say. Knows sizes, no torch.

Tiles change pixels at their seams, so this is a function of the size and of the configuration. What happens to be free
on the device has no say: a picture that is short of memory waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

# A decode is at its peak in its last block, at full resolution: activations and the scratch memory of convolutions.
# A picture of 1024x688 took 1.8 GB on an H100 with FLUX.1's autoencoder in bfloat16.
BUFFERS = 5
# Channels there, of most autoencoders, where the config has them under no name known here.
USUAL_CHANNELS = 256
# Edge of a tile at most, pixels. Autoencoders would tile from the size that they were trained at, which needs much.
TILE_PX = 512
# A decode may take so much of the budget before it is tiled; the rest holds CUDA's own and slots.
BUDGET_SHARE = 5 / 8


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
        return 0 < self.budget_bytes * BUDGET_SHARE < area_px * decode_px_bytes


UNTILED = TileRule()


def decode_px_bytes(config: Mapping[str, Any], item_bytes: int) -> int:
    """What a decode without tiles takes for a pixel, about; `config` is the autoencoder's, `item_bytes` its dtype's."""
    channels = config.get("decoder_block_out_channels") or config.get("block_out_channels")
    base = config.get("decoder_base_dim") or config.get("base_dim")
    if not channels and base:
        channels = [base * factor for factor in config.get("dim_mult") or ()]
    # The last block but one hands on its channels at full resolution.
    return BUFFERS * item_bytes * (max(channels[:2]) if channels else USUAL_CHANNELS)


def switch_on(autoencoder: Any) -> None:
    """Make one request's autoencoder decode and encode in tiles of at most TILE_PX."""
    autoencoder.enable_tiling()
    edge_px = getattr(autoencoder, "tile_sample_min_size", 0)
    if isinstance(edge_px, int) and edge_px > TILE_PX:
        autoencoder.tile_latent_min_size = autoencoder.tile_latent_min_size * TILE_PX // edge_px
        autoencoder.tile_sample_min_size = TILE_PX
