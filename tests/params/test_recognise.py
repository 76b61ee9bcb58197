"""What a checkpoint is, by the names that diffusers, transformers and the models' authors give to its tensors."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
import transformers

from services.params.recognise import UNKNOWN, Architecture, Role, recognise

TEXT = {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32}
BLOCKS = {"block_out_channels": (32, 32), "norm_num_groups": 8}
UNET = {**BLOCKS, "cross_attention_dim": 32, "attention_head_dim": 2}
UNET |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
ADDED = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}


def names_of(kind: str, options: dict[str, Any]) -> list[str]:
    """Names of the params of a diffusers or transformers class, made without memory."""
    with torch.device("meta"):
        if hasattr(diffusers, kind):
            return list(getattr(diffusers, kind)(**options).state_dict())
        config = getattr(transformers, kind).config_class(**options)
        return list(getattr(transformers, kind)(config).state_dict())


@pytest.mark.parametrize(
    ("kind", "options", "name", "role"),
    [
        ("ZImageTransformer2DModel", {"n_layers": 1}, "Z-Image", Role.DENOISER),
        ("QwenImageTransformer2DModel", {"num_layers": 1, **HEADS}, "Qwen-Image", Role.DENOISER),
        ("FluxTransformer2DModel", {"num_layers": 1, "num_single_layers": 1, **HEADS}, "FLUX.1", Role.DENOISER),
        ("Flux2Transformer2DModel", {"num_layers": 1, "num_single_layers": 1, **HEADS}, "FLUX.2", Role.DENOISER),
        ("SD3Transformer2DModel", {"num_layers": 2, **HEADS, "caption_projection_dim": 32}, "SD3", Role.DENOISER),
        ("UNet2DConditionModel", UNET, "SD 1 or 2", Role.DENOISER),
        ("UNet2DConditionModel", UNET | ADDED, "SDXL", Role.DENOISER),
        ("AutoencoderKL", BLOCKS, "AutoencoderKL", Role.VAE),
        ("AutoencoderKLQwenImage", {"base_dim": 8}, "VAE of Wan or Qwen-Image", Role.VAE),
        ("Qwen3Model", TEXT, "Qwen3", Role.TEXT_ENCODER),
        ("Qwen3ForCausalLM", TEXT, "Qwen3", Role.TEXT_ENCODER),
        ("LlamaForCausalLM", TEXT, "Llama, or a relative", Role.TEXT_ENCODER),
        ("Qwen2_5_VLForConditionalGeneration", {}, "Qwen2.5-VL", Role.TEXT_ENCODER),
        ("T5EncoderModel", {}, "T5", Role.TEXT_ENCODER),
        ("CLIPTextModel", TEXT, "CLIP", Role.TEXT_ENCODER),
        ("CLIPTextModelWithProjection", TEXT, "CLIP", Role.TEXT_ENCODER),
    ],
)
def test_the_libraries_own_names_are_recognised(kind: str, options: dict[str, Any], name: str, role: Role) -> None:
    """Each class that Headwater may meet in a diffusers folder."""
    assert recognise(names_of(kind, options)) == Architecture(name, role)


ORIGINAL = {
    "FLUX.1": ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight", "img_in.weight"),
    "SDXL": ("input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight", "label_emb.0.0.weight"),
    "SD 1 or 2": ("input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight", "time_embed.0.weight"),
    "SD3": ("joint_blocks.0.x_block.attn.qkv.weight", "context_embedder.weight"),
    "Z-Image": ("noise_refiner.0.a", "context_refiner.0.a", "cap_embedder.0.weight", "cap_pad_token"),
    "Lumina 2": ("noise_refiner.0.a", "context_refiner.0.a", "cap_embedder.0.weight"),
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(("name", "tensors"), ORIGINAL.items())
def test_the_authors_own_names_are_recognised_with_and_without_a_prefix(
    name: str, tensors: tuple[str, ...], prefix: str
) -> None:
    """As in files for other programs."""
    assert recognise(prefix + tensor for tensor in tensors) == Architecture(name, Role.DENOISER)


@pytest.mark.parametrize("part", ["first_stage_model.", "cond_stage_model.", "conditioner.", "vae.", "text_encoders."])
def test_a_file_with_all_components_is_no_denoiser(part: str) -> None:
    """It names the denoiser inside, and is told from one that has the same prefix."""
    names = [f"model.diffusion_model.{name}" for name in ORIGINAL["SDXL"]]

    assert recognise([*names, f"{part}encoder.down.0.block.0.norm1.weight"]) == Architecture("SDXL", Role.ALL_IN_ONE)


@pytest.mark.parametrize(
    "names",
    [
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "transformer.txt_norm.weight"),
        ("diffusion_model.layers.0.attention.qkv.lora_down.weight",),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight", "lora_unet_double_blocks_0_img_attn_qkv.alpha"),
        ("unet.down_blocks.0.attentions.0.to_q.lora.up.weight",),
        ("lycoris_blocks_0_ff.lokr_w1",),
    ],
)
def test_a_lora_is_one_whatever_model_it_is_for(names: tuple[str, ...]) -> None:
    """Its names hold those of the model, so they are looked at first."""
    assert recognise(names, "flux") == Architecture("", Role.LORA)


@pytest.mark.parametrize(
    ("names", "stated", "found"),
    [
        (("blk.0.attn_q.weight",), "qwen3", Architecture("qwen3", Role.TEXT_ENCODER)),
        (("v.blk.0.attn_q.weight", "mm.0.weight"), "clip", Architecture("clip", Role.VISION_TOWER)),
        (("enc.blk.0.attn_q.weight",), "", Architecture("T5", Role.TEXT_ENCODER)),
        (("blk.0.attn_q.weight",), "pig", Architecture("pig", Role.UNKNOWN)),
        (ORIGINAL["Z-Image"], "lumina2", Architecture("Z-Image", Role.DENOISER)),
        (("encoder.down.0.block.0.norm1.weight",), "", Architecture("AutoencoderKL", Role.VAE)),
        (("decoder.up.0.block.0.norm1.weight",), "", Architecture("AutoencoderKL", Role.VAE)),
    ],
)
def test_a_files_own_word_counts_where_its_names_do_not_tell(
    names: tuple[str, ...], stated: str, found: Architecture
) -> None:
    """Z-Image's GGUF files call themselves lumina2."""
    assert recognise(names, stated) == found


@pytest.mark.parametrize("names", [(), ("a",), ("transformer_blocks.0.a",), ("my.down_blocks.1.a",)])
def test_what_is_not_known_is_unknown(names: tuple[str, ...]) -> None:
    """Nothing is guessed."""
    assert recognise(names) is UNKNOWN
