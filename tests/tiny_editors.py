"""Tiny folders of pipelines that take images, and of further families: as tests/tiny_models.py.

Pipelines that edit bring images to a megapixel, so their autoencoders shrink by 16 to keep sequences short.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from services.sampler.processors import without_video
from tests import tiny_models as tiny


def qwen_edit(pipeline_class: type = QwenImageEditPipeline) -> DiffusionPipeline:
    base = tiny.qwen_image()
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False] * 4,
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 1.5, 0.5, 2.0],
    )  # fmt: skip
    tiny.randomise(vae)
    tokenizer = tiny.qwen_tokenizer()
    images = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
    processor = without_video(transformers.Qwen2VLProcessor)(images, tokenizer)
    return pipeline_class(
        scheduler=base.scheduler, vae=vae, text_encoder=base.text_encoder, tokenizer=tokenizer, processor=processor,
        transformer=base.transformer,
    )  # fmt: skip


def qwen_edit_plus() -> DiffusionPipeline:
    return qwen_edit(QwenImageEditPlusPipeline)


def kontext() -> DiffusionPipeline:
    base = tiny.flux()
    vae = tiny.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 5, up_block_types=["UpDecoderBlock2D"] * 5,
        block_out_channels=[4] * 5, layers_per_block=1, latent_channels=1, norm_num_groups=2, shift_factor=0.06,
        scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    tiny.randomise(vae)
    return FluxKontextPipeline(**{**base.components, "vae": vae, "image_encoder": None, "feature_extractor": None})


def sd15() -> DiffusionPipeline:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, cross_attention_dim=32, norm_num_groups=4,
    )  # fmt: skip
    vae, encoder = tiny.kl_vae(4), tiny.clip()
    tiny.randomise(unet, vae, encoder)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )
    return StableDiffusionPipeline(
        vae=vae, text_encoder=encoder, tokenizer=tiny.clip_tokenizer(), unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sd3() -> DiffusionPipeline:
    transformer = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=96, caption_projection_dim=32, pooled_projection_dim=64, out_channels=16,
    )  # fmt: skip
    vae = tiny.kl_vae(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5)
    encoder, encoder_2 = tiny.clip(projection=True), tiny.clip(projection=True)
    tiny.randomise(transformer, vae, encoder, encoder_2)
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, text_encoder=encoder,
        tokenizer=tiny.clip_tokenizer(), text_encoder_2=encoder_2, tokenizer_2=tiny.clip_tokenizer(),
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def klein() -> DiffusionPipeline:
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    encoder = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=28, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8,
        )
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    tiny.randomise(transformer, encoder, vae)
    vae.bn.running_mean.normal_(generator=torch.Generator().manual_seed(1))
    vae.bn.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae, text_encoder=encoder,
        tokenizer=tiny.qwen_tokenizer(), transformer=transformer,
    )  # fmt: skip


EDITORS: dict[str, Callable[[], DiffusionPipeline]] = {
    "qwen_edit": qwen_edit,
    "qwen_edit_plus": qwen_edit_plus,
    "kontext": kontext,
    "klein": klein,
    "sd15": sd15,
    "sd3": sd3,
}


def write_folder(name: str, folder: Path) -> Path:
    """Write the tiny model as a pipeline folder."""
    pipeline = EDITORS[name]()
    pipeline.to(torch.float32)
    pipeline.save_pretrained(folder)
    if hasattr(pipeline, "processor"):  # as such folders circulate: one file for each part
        shutil.rmtree(folder / "processor")
        for part in (pipeline.processor.image_processor, pipeline.processor.tokenizer):
            part.save_pretrained(folder / "processor")
        (folder / "processor" / "video_preprocessor_config.json").write_text('{"video_processor_type": "None"}')
    return folder
