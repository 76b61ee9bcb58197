"""Each family in the names under which its files circulate, plain and packed: params are diffusers' own bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.loaders import single_file_model
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file

from tests import original_names
from tests.sampler.bound import Tensors, assert_equal, bound
from tests.sampler.narrow_flux_sampler import narrow
from tests.sampler.packings import scaled_fp8, write_gguf
from tests.tiny_models import kl_vae, randomise

UNET: dict[str, Any] = {
    "block_out_channels": (16, 32), "layers_per_block": 2, "sample_size": 16, "cross_attention_dim": 64,
    "norm_num_groups": 4, "attention_head_dim": (2, 4),
}  # fmt: skip


def sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **UNET, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )  # fmt: skip


def sd_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **UNET, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1, in_channels=32, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    )  # fmt: skip


def sd3() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, num_layers=3, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=64, pooled_projection_dim=64, out_channels=16,
        pos_embed_max_size=16, dual_attention_layers=(0, 1), qk_norm="rms_norm",
    )  # fmt: skip


def qwen_image() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        patch_size=2, in_channels=32, out_channels=8, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip


def comfy(tensors: Tensors) -> Tensors:
    return {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}


def first_stage(tensors: Tensors) -> Tensors:
    return {f"first_stage_model.{name}": tensor for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Family:
    """A tiny model of it and what its tensors are called in a single file."""

    make: Callable[[], Any]
    names: Callable[[Tensors], Tensors]
    kinds: tuple[str, ...] = ("BF16", "Q8_0")


FAMILIES = {
    "flux": Family(flux, original_names.flux, ("BF16", "F16", "Q8_0", "Q4_0", "F8_E4M3")),
    "flux_comfy": Family(flux, lambda tensors: comfy(original_names.flux(tensors))),
    "sd3": Family(sd3, original_names.sd3),
    "sdxl": Family(sdxl_unet, lambda tensors: comfy(original_names.unet(tensors)), ("BF16", "F16", "Q8_0")),
    "sdxl_alone": Family(sdxl_unet, original_names.unet, ("F16", "Q8_0")),
    "sd1": Family(sd_unet, lambda tensors: comfy(original_names.unet(tensors)), ("F16", "Q8_0")),
    "qwen_image": Family(qwen_image, comfy, ("BF16", "Q8_0", "F8_E4M3")),
    "vae": Family(lambda: kl_vae(4), lambda tensors: first_stage(original_names.vae(tensors)), ("F16",)),
    "vae_flux": Family(
        lambda: kl_vae(16, use_quant_conv=False, use_post_quant_conv=False), original_names.vae, ("BF16",)
    ),
}  # fmt: skip
# Halves of these are put together in another order: as runs where they are unpacked on arrival, else as copies.
SWAPPED = {
    **dict.fromkeys(("flux", "flux_comfy"), ("norm_out.linear",)),
    "sd3": ("norm_out.linear", "transformer_blocks.2.norm1_context.linear"),
}
PLAIN = {"BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
CASES = [(name, kind) for name, family in FAMILIES.items() for kind in family.kinds]


def write(folder: Path, tensors: Tensors, kind: str) -> tuple[Path, Tensors]:
    """A file, and the numbers in it as they are computed with."""
    if kind not in PLAIN:
        return folder / "model.gguf", write_gguf(folder / "model.gguf", tensors, Kind[kind])
    stored = {name: tensor.to(PLAIN[kind]).contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors")
    computed = torch.float16 if kind == "F16" else torch.bfloat16
    return folder / "model.safetensors", {name: tensor.to(computed) for name, tensor in stored.items()}


@pytest.fixture(autouse=True)
def tiny_flux(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' converter has FLUX.1's width as a constant; nothing else of it is changed."""
    convert = single_file_model.convert_flux_transformer_checkpoint_to_diffusers
    monkeypatch.setattr(convert, "__code__", convert.__code__)  # so that it is put back
    narrow(flux().inner_dim)


def reference_of(model: Any, folder: Path, numbers: Tensors) -> Any:
    """What diffusers' own from_single_file makes of unpacked numbers."""
    dtype = next(iter(numbers.values())).dtype
    if isinstance(model, QwenImageTransformer2DModel):  # it knows no prefix, and strips none
        numbers = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in numbers.items()}
    elif not any(name.startswith("model.diffusion_model.") for name in numbers) and isinstance(
        model, UNet2DConditionModel
    ):
        numbers = comfy(numbers)
    return type(model).from_single_file(dict(numbers), config=str(folder), torch_dtype=dtype)


def test_scales_of_rows_go_with_their_rows(memory: Path, tmp_path: Path) -> None:
    """Where q, k and v are one tensor of fp8, each gets its own part of the scales."""
    model = flux()
    randomise(model)
    model.save_config(tmp_path)
    stored, numbers = scaled_fp8(original_names.flux(model.state_dict()), "weight_scale", by_row=True)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, tmp_path / "model.safetensors")
    reference = reference_of(model, tmp_path, numbers)

    with bound(memory, tmp_path, "diffusers", type(model), tmp_path / "model.safetensors") as component:
        assert_equal(component, reference)
        assert not component.outside


def test_rows_that_were_made_to_fit_blocks_get_their_shapes_back(memory: Path, tmp_path: Path) -> None:
    """As converters of SD and SDXL do it for the kernels of convolutions."""
    model = sdxl_unet()
    randomise(model)
    model.save_config(tmp_path)
    named = original_names.unet(model.state_dict())
    shapes = {name: tensor.shape for name, tensor in named.items()}
    fit = {n: t for n, t in named.items() if t.ndim > 1 and t.numel() % 256 == 0 and t.shape[-1] % 256}
    file, numbers = write(tmp_path, named | {n: t.reshape(-1, 256) for n, t in fit.items()}, "Q8_0")
    reference = reference_of(model, tmp_path, {name: tensor.view(shapes[name]) for name, tensor in numbers.items()})

    with bound(memory, tmp_path, "diffusers", type(model), file) as component:
        assert len(fit) > 50
        assert_equal(component, reference)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_params_are_what_diffusers_makes_of_the_file(name: str, kind: str, memory: Path, tmp_path: Path) -> None:
    """Renamed, split, swapped and put together: what of it is no run of the file's bytes is little, and is listed."""
    family = FAMILIES[name]
    model = family.make()
    randomise(model)
    model.save_config(tmp_path)
    file, numbers = write(tmp_path, family.names(model.state_dict()), kind)
    reference = reference_of(model, tmp_path, numbers)

    with bound(memory, tmp_path, "diffusers", type(model), file) as component:
        assert_equal(component, reference)
        outside = {o.name: o.reason for o in component.outside}

    swapped = SWAPPED.get(name, ()) if kind in ("BF16", "F16") else ()
    assert outside.keys() == {f"{module}.{part}" for module in swapped for part in ("weight", "bias")}
    assert set(outside.values()) <= {"computed by the library's converter (cat)"}
