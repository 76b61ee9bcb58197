"""The shapes of published models, and of tiny ones of the same architecture, as modules on meta with their configs.

Sources: the config.json files of Tongyi-MAI/Z-Image-Turbo, stabilityai/stable-diffusion-xl-base-1.0 and
Qwen/Qwen-Image-Edit. Tokenizers are the tests' byte-level ones: they decide how many tokens a prompt has, not shapes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    QwenImageTransformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from torch import nn

from tests.tiny_models import clip_tokenizer, qwen_tokenizer


@dataclass(frozen=True)
class Recipe:
    """All of a pipeline folder but its weights."""

    pipeline: str  # class name
    dtype: torch.dtype
    modules: dict[str, Any]  # on meta, by component
    small: dict[str, Any]  # schedulers and tokenizers: parts without weights, or (class name, parts) for a processor
    defaults: dict[str, float]  # headwater.json
    architecture: str = ""  # what GGUF calls the denoiser

    def write_configs(self, folder: Path) -> None:
        """Every component's folder with its config."""
        for name, module in self.modules.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            if isinstance(module, transformers.PreTrainedModel):
                module.config.architectures, module.config.dtype = [type(module).__name__], self.dtype
                module.config.save_pretrained(folder / name)
            else:
                module.save_config(folder / name)
        for name, part in self.small.items():
            for each in part[1] if isinstance(part, tuple) else [part]:
                each.save_pretrained(folder / name)
        (folder / "headwater.json").write_text(json.dumps(self.defaults))

    def write_index(self, folder: Path) -> None:
        """model_index.json, the mark of a folder that is complete."""
        index: dict[str, object] = {"_class_name": self.pipeline}
        for name, part in {**self.modules, **self.small}.items():
            index[name] = ["transformers", part[0]] if isinstance(part, tuple) else entry(part)
        (folder / "model_index.json").write_text(json.dumps(index, indent=1))


def entry(part: object) -> list[str]:
    return [type(part).__module__.split(".")[0], type(part).__name__]


def on_meta(build: Callable[..., Any], *arguments: object, **options: object) -> Any:
    """A module without memory."""
    with torch.device("meta"):
        module: nn.Module = build(*arguments, **options)
    return module.eval()


def z_image(tiny: bool) -> Recipe:
    dit: dict[str, Any] = {}
    qwen = {
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    if tiny:
        dit = {
            "dim": 128,
            "n_layers": 8,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 48,
            "axes_dims": [16, 24, 24],
        }
        qwen = {
            "vocab_size": 512,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
        }
    vae = kl_vae(tiny, 16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    size = {"width_px": 64, "height_px": 64} if tiny else {"width_px": 1024, "height_px": 688}
    return Recipe(
        "ZImagePipeline",
        torch.bfloat16,
        {
            "transformer": on_meta(ZImageTransformer2DModel, **dit),
            "text_encoder": on_meta(transformers.Qwen3Model, transformers.Qwen3Config(**qwen)),
            "vae": vae,
        },
        {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "tokenizer": qwen_tokenizer()},
        {**size, "step_count": 9, "guidance_scale": 0},
        architecture="lumina2",
    )


def kl_vae(tiny: bool, latent_channels: int, **options: object) -> Any:
    """The FLUX autoencoder's shapes, and SDXL's: they differ around the latents only."""
    widths = [8, 8, 16, 16] if tiny else [128, 256, 512, 512]
    return on_meta(
        AutoencoderKL,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=widths,
        layers_per_block=1 if tiny else 2,
        latent_channels=latent_channels,
        norm_num_groups=4 if tiny else 32,
        **options,
    )


UNET: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY_UNET: dict[str, Any] = {
    "block_out_channels": (8, 16, 16),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 4),
    "sample_size": 16,
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 8,
    "norm_num_groups": 4,
    "projection_class_embeddings_input_dim": 80,
}


def clip(hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int, **more: Any) -> Any:
    """The config of a CLIP text encoder, for the tests' tokenizer."""
    return transformers.CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, bos_token_id=512, eos_token_id=513, pad_token_id=1, **more,
    )  # fmt: skip


def sdxl(tiny: bool) -> Recipe:
    if tiny:
        text = clip(32, 64, 3, 4, 600, hidden_act="quick_gelu")
        text_2 = clip(32, 64, 3, 4, 600, projection_dim=32, hidden_act="gelu")
    else:
        text = clip(768, 3072, 12, 12, 49408, hidden_act="quick_gelu")
        text_2 = clip(1280, 5120, 32, 20, 49408, projection_dim=1280, hidden_act="gelu")
    edge = 128 if tiny else 1024
    return Recipe(
        "StableDiffusionXLPipeline",
        torch.float16,
        {
            "unet": on_meta(
                UNet2DConditionModel,
                in_channels=4,
                out_channels=4,
                layers_per_block=2,
                use_linear_projection=True,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                addition_embed_type="text_time",
                **(TINY_UNET if tiny else UNET),
            ),
            "text_encoder": on_meta(transformers.CLIPTextModel, text),
            "text_encoder_2": on_meta(transformers.CLIPTextModelWithProjection, text_2),
            "vae": kl_vae(tiny, 4, scaling_factor=0.13025, force_upcast=True),
        },
        {
            "scheduler": EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                steps_offset=1,
                timestep_spacing="leading",
            ),
            "tokenizer": clip_tokenizer(),
            "tokenizer_2": clip_tokenizer(),
        },
        {"width_px": edge, "height_px": edge, "step_count": 30},
    )


QWEN_TEXT: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
TINY_QWEN_TEXT: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
TINY_QWEN_VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}
TINY_QWEN_VAE = {"base_dim": 16, "z_dim": 16, "num_res_blocks": 1}
TINY_QWEN_DIT: dict[str, Any] = {
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "axes_dims_rope": (8, 4, 4),
}


def qwen_vl(text: dict[str, Any], vision: dict[str, Any], sections: list[int]) -> Any:
    """The config of a Qwen2.5-VL, for the tests' tokenizer."""
    rope = {"mrope_section": sections, "rope_type": "default", "type": "default", "rope_theta": 1e6}
    return transformers.Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        vision_start_token_id=259,
        vision_end_token_id=260,
        image_token_id=261,
        tie_word_embeddings=False,
    )


def qwen_image_edit(tiny: bool) -> Recipe:
    config = qwen_vl(QWEN_TEXT, QWEN_VISION, [16, 24, 24])
    if tiny:
        config = qwen_vl(TINY_QWEN_TEXT, TINY_QWEN_VISION, [4, 6, 6])
    tokenizer = qwen_tokenizer()
    return Recipe(
        "QwenImageEditPipeline",
        torch.bfloat16,
        {
            "transformer": on_meta(QwenImageTransformer2DModel, **(TINY_QWEN_DIT if tiny else {})),
            "text_encoder": on_meta(transformers.Qwen2_5_VLForConditionalGeneration, config),
            "vae": on_meta(AutoencoderKLQwenImage, **(TINY_QWEN_VAE if tiny else {})),
        },
        {
            "scheduler": FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
            ),
            "tokenizer": tokenizer,
            "processor": ("Qwen2VLProcessor", [transformers.Qwen2VLImageProcessor(), tokenizer]),
        },
        {"step_count": 20, "true_cfg_scale": 2.5},
        architecture="qwen_image",
    )


MODELS: dict[str, Callable[[bool], Recipe]] = {
    "z-image": z_image,
    "sdxl": sdxl,
    "sdxl-bf16": lambda tiny: replace(sdxl(tiny), dtype=torch.bfloat16),
    "qwen-image-edit": qwen_image_edit,
}
