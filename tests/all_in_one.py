"""Tiny SD 1.5 and SDXL with random weights, as pipeline folders and as one file that holds all of a model."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from diffusers import (
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file

from tests import original_names
from tests.tiny_models import clip, clip_tokenizer, kl_vae, randomise

Tensors = dict[str, torch.Tensor]

UNET = {
    "block_out_channels": (8, 16), "layers_per_block": 2, "sample_size": 16, "in_channels": 4, "out_channels": 4,
    "norm_num_groups": 4,
}  # fmt: skip


def sd15() -> DiffusionPipeline:
    unet = UNet2DConditionModel(
        **UNET, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32,
    )  # fmt: skip
    vae, encoder = kl_vae(4), clip()
    randomise(unet, vae, encoder)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=encoder, tokenizer=clip_tokenizer(), unet=unet,
        scheduler=PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl() -> DiffusionPipeline:
    """Its second encoder is wider than its first: that is how diffusers tells them apart in one file."""
    wide = transformers.CLIPTextConfig(
        vocab_size=600, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=48, max_position_embeddings=77, bos_token_id=512, eos_token_id=513, pad_token_id=1,
        hidden_act="gelu",
    )  # fmt: skip
    unet = UNet2DConditionModel(
        **UNET, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=(2, 4),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=96, cross_attention_dim=80,
    )  # fmt: skip
    vae, encoder, encoder_2 = kl_vae(4, force_upcast=True), clip(), transformers.CLIPTextModelWithProjection(wide)
    randomise(unet, vae, encoder, encoder_2)
    return StableDiffusionXLPipeline(
        vae=vae, text_encoder=encoder, text_encoder_2=encoder_2, tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), unet=unet, scheduler=EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip


def open_clip(tensors: Tensors) -> Tensors:
    """A CLIP's tensors by the names of OpenCLIP: q, k and v in one, the projection transposed."""
    renames = {
        "text_model.encoder.layers.": "transformer.resblocks.", "self_attn.out_proj": "attn.out_proj",
        "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
        "text_model.final_layer_norm": "ln_final", "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
    }  # fmt: skip
    found: Tensors = {}
    for name, tensor in tensors.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            tensor = torch.cat([tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
        for new, old in renames.items():
            name = name.replace(new, old)
        found[name] = tensor
    found["text_projection"] = found.pop("text_projection.weight").T.contiguous()
    return found


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor.contiguous() for name, tensor in tensors.items()}


def whole(pipeline: DiffusionPipeline) -> Tensors:
    """All components by their authors' names, and what such files have beside them."""
    words = {
        f"text_model.{name.removeprefix('text_model.')}": t for name, t in pipeline.text_encoder.state_dict().items()
    }
    is_xl = hasattr(pipeline, "text_encoder_2")
    found = {
        **prefixed("model.diffusion_model.", original_names.unet(pipeline.unet.state_dict())),
        **prefixed("first_stage_model.", original_names.vae(pipeline.vae.state_dict())),
        **prefixed("conditioner.embedders.0.transformer." if is_xl else "cond_stage_model.transformer.", words),
        "alphas_cumprod": torch.ones(1000),
    }
    if is_xl:
        found |= prefixed("conditioner.embedders.1.model.", open_clip(pipeline.text_encoder_2.state_dict()))
        found["conditioner.embedders.1.model.logit_scale"] = torch.ones(())
    return found


def write(name: str, root: Path) -> tuple[Path, Path]:
    """(a folder of configs without weights, the one file)."""
    pipeline = {"sd15": sd15, "sdxl": sdxl}[name]()
    folder, file = root / f"{name}-configs", root / f"{name}.safetensors"
    pipeline.save_pretrained(folder)
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    save_file(whole(pipeline), file)
    return folder, file
