"""Pictures decoded in tiles: what plain diffusers draws with `vae.enable_tiling()`, for whom it was asked only."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL
from headwater_client import Client
from hypothesis import given
from hypothesis import strategies as st

from services.errors import InvalidRequest
from services.sampler.config import parse_args
from services.sampler.device import tile_rule
from services.sampler.requests import ImageRequest
from services.sampler.tiling import TiledDecode, TileRule, decode_px_bytes, switch_on
from services.sampler.traits import Traits, traits_of
from services.sampler.transfer import ArenaViews
from tests import tiny_models
from tests.sampler.inprocess import attached, under_baton
from tests.sampler.support import pixels, plain_picture, served
from tests.stack import Process, Stack

GIB = 1 << 30
# Larger than the autoencoders' tiles: 32 pixels of the KL ones, 256 of Qwen-Image's.
ASKS = {
    "z_image": ("a red fox", (64, 96), 2, 11),
    "flux": ("a red fox", (96, 64), 2, 12),
    "sdxl_f16": ("a red fox", (64, 64), 2, 13),
    "qwen_image": ("a red fox", (288, 64), 2, 14),
}
ASK = ASKS["z_image"]


# ---- the rule


@given(st.integers(1, 1 << 24), st.integers(1, 4096), st.integers(0, 1 << 38))
def test_the_rule_is_a_share_of_the_budget(area_px: int, px_bytes: int, budget_bytes: int) -> None:
    """Above five eighths of a budget that the configuration names, and never without one."""
    tiles = TileRule(budget_bytes=budget_bytes).tiles(area_px, px_bytes)

    assert tiles == (budget_bytes > 0 and area_px * px_bytes * 8 > budget_bytes * 5)


@pytest.mark.parametrize("mode", [TiledDecode.NEVER, TiledDecode.ALWAYS])
def test_the_operators_word_beats_the_size(mode: TiledDecode) -> None:
    """Neither size nor budget matter then."""
    rules = [TileRule(mode, budget) for budget in (0, 1, 1 << 50)]

    assert {rule.tiles(area, 1536) for rule in rules for area in (1, 1 << 24)} == {mode is TiledDecode.ALWAYS}


@pytest.mark.parametrize(
    ("device", "max_vram", "budget_gib"), [("cuda", "11", 11), ("cuda", "0", 0), ("cuda", "-1", 0), ("cpu", "11", 0)]
)
def test_only_a_positive_budget_counts(device: str, max_vram: str, budget_gib: int) -> None:
    """What depends on what is free must not decide about pixels, and a CPU has no budget."""
    config = parse_args(["--loader", "unix:l", "--listen", "unix:s", "--max-vram", max_vram])

    assert tile_rule(config, torch.device(device)) == TileRule(TiledDecode.AUTO, budget_gib * GIB)


@pytest.mark.parametrize(
    ("config", "channels"),
    [
        ({"block_out_channels": [128, 256, 512, 512]}, 256),
        ({"decoder_block_out_channels": (64, 64, 64, 64)}, 64),
        ({"base_dim": 96, "dim_mult": [1, 2, 4, 4]}, 192),
        ({"block_out_channels": [64]}, 64),
        ({}, 256),
    ],
)
def test_a_decode_costs_its_widest_layer_at_full_resolution(config: dict[str, object], channels: int) -> None:
    """Five buffers of it; an 11 GiB budget tiles Z-Image's 2048x2048 and not its 1536x1536."""
    assert decode_px_bytes(config, 2) == 5 * 2 * channels
    assert TileRule(budget_bytes=11 * GIB).tiles(2048 * 2048, 5 * 2 * 256)
    assert not TileRule(budget_bytes=11 * GIB).tiles(1536 * 1536, 5 * 2 * 256)


def test_tiles_are_small_where_an_autoencoders_own_are_not() -> None:
    """Half a megapixel of one tile is what is to be avoided; smaller tiles stay as they are."""
    large, small = (
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * depth, up_block_types=("UpDecoderBlock2D",) * depth,
            block_out_channels=(8,) * depth, norm_num_groups=4, sample_size=size_px,
        )
        for depth, size_px in ((4, 1024), (2, 32))
    )  # fmt: skip
    for autoencoder in (large, small):
        switch_on(autoencoder)

    assert (large.use_tiling, large.tile_sample_min_size, large.tile_latent_min_size) == (True, 512, 64)
    assert (small.use_tiling, small.tile_sample_min_size, small.tile_latent_min_size) == (True, 32, 16)


# ---- the model


def resolved(traits: Traits, tiled_decode: bool | None, rule: TileRule) -> bool | None:
    request = ImageRequest("m", "a fox", "r", width_px=64, height_px=64, tiled_decode=tiled_decode)
    return traits.resolve(request, rule).tiled_decode


def test_the_request_beats_the_rule(tmp_path: Path) -> None:
    """What a caller says holds; the rule is asked where nothing was said, about the cost in this model's dtype."""
    pipeline = tiny_models.sdxl()
    traits = traits_of(pipeline, tmp_path)
    always, never = TileRule(TiledDecode.ALWAYS), TileRule(TiledDecode.NEVER)

    assert traits.decode_px_bytes == 5 * 4 * 16  # 8 and 16 channels, float32
    assert traits_of(pipeline.to(torch.bfloat16), tmp_path).decode_px_bytes == 5 * 2 * 16
    assert traits_of(pipeline.to(torch.float16), tmp_path).decode_px_bytes == 5 * 4 * 16  # upcast
    assert (resolved(traits, None, always), resolved(traits, None, never)) == (True, False)
    assert (resolved(traits, False, always), resolved(traits, True, never)) == (False, True)
    assert "tiled_decode" in traits.request_fields


def test_an_autoencoder_without_tiles(tmp_path: Path) -> None:
    """Asking for tiles is refused by name, no rule tiles, and the field is not among those that the model takes."""
    pipeline = tiny_models.sdxl()
    pipeline.register_modules(vae=AsymmetricAutoencoderKL(norm_num_groups=4))
    traits = traits_of(pipeline, tmp_path)

    with pytest.raises(InvalidRequest) as refused:
        resolved(traits, True, TileRule())
    assert [field for field, _ in refused.value.violations] == ["tiled_decode"]
    assert resolved(traits, None, TileRule(TiledDecode.ALWAYS)) is False
    assert resolved(traits, False, TileRule()) is False
    assert "tiled_decode" not in traits.request_fields


@pytest.mark.parametrize("name", ASKS)
def test_the_switch_is_the_requests_own(name: str, stack: Stack) -> None:
    """A view that tiles leaves the shared autoencoder, and the next view, as they were."""
    with attached(stack, name, ArenaViews()) as model:
        tiled, plain = (under_baton(model.engine, lambda t=t: model.request_view(t)) for t in (True, False))

    assert (tiled.vae.use_tiling, plain.vae.use_tiling, model.pipeline.vae.use_tiling) == (True, False, False)


# ---- pictures


@pytest.mark.parametrize("way", ["sampler", "ring_sampler"])
@pytest.mark.parametrize("name", ASKS)
def test_equals_diffusers_tiled(
    name: str, way: str, tiny_folders: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    """With and without tiles at the same time, previews too: each is what diffusers draws so."""
    address = request.getfixturevalue(way).addresses[0]
    plain, tiled = (pixels(plain_picture(tiny_folders[name], *ASKS[name], tiled=t)) for t in (False, True))
    assert not np.array_equal(plain, tiled)  # tiles act at this size

    options = [{"tiled_decode": t, "preview_every": p} for t in (True, False) for p in (0, 1)]
    with ThreadPoolExecutor(len(options)) as pool:
        results = list(pool.map(lambda more: served(address, name, *ASKS[name], **more), options))

    for asked, result in zip(options, results, strict=True):
        assert np.array_equal(pixels(result.images[0].pil), tiled if asked["tiled_decode"] else plain), asked


def test_the_echo_draws_the_picture_again_elsewhere(stack: Stack, sampler_unix: str) -> None:
    """A replica that always tiles says so in the parameters, and another replica then draws the same."""
    always = stack.sampler("--tiled-decode", "always").addresses[0]
    first, untiled = served(always, "z_image", *ASK), served(always, "z_image", *ASK, tiled_decode=False)
    plain = served(sampler_unix, "z_image", *ASK)
    with Client(sampler_unix) as client:
        again = client.generate(**first.finished.parameters)

    echoes = [result.finished.parameters["tiled_decode"] for result in (first, untiled, plain, again)]
    assert echoes == [True, False, False, True]
    assert again.images[0].sha256 == first.images[0].sha256
    assert untiled.images[0].sha256 == plain.images[0].sha256 != first.images[0].sha256


def test_models_say_whether_they_tile(sampler: Process) -> None:
    """GetModel lists the field."""
    with Client(sampler.addresses[0]) as client:
        assert "tiled_decode" in client.model("qwen_image").request_fields
