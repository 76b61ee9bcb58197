"""Tiny random-weight diffusers folders: real architectures, real names, a second to make and milliseconds to run.

Each function writes a pipeline folder and returns it. `circulating_names` rewrites a folder's tensor names to older
ones that are still found in the wild.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

CHAT = (
    "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def randomise(*modules: nn.Module) -> None:
    """Seeded weights for every parameter: activations stay finite, pictures are not flat, and a lost tensor shows."""
    generator = torch.Generator().manual_seed(0)
    for module in modules:
        module.eval().requires_grad_(False)
        for name, param in module.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if name.endswith("bias"):
                param.copy_(0.02 * noise)
            elif "norm" in name or name.endswith("gamma"):
                param.copy_(1 + 0.1 * noise)
            else:
                param.copy_(0.05 * noise)


def qwen_tokenizer() -> transformers.Qwen2Tokenizer:
    vocab = {c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}
    vocab |= {token: 256 + i for i, token in enumerate(QWEN_TOKENS)}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN_TOKENS[1:])})
    tokenizer.chat_template = CHAT
    return tokenizer


def clip_tokenizer() -> transformers.CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)


def t5_tokenizer() -> transformers.T5Tokenizer:
    letters = string.ascii_letters + string.digits + ",.!"
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in letters)]
    tokenizer = transformers.T5Tokenizer(vocab=vocab, extra_ids=0)
    tokenizer.model_max_length = 64
    return tokenizer


def clip(projection: bool = False) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        projection_dim=32, max_position_embeddings=77, bos_token_id=512, eos_token_id=513, pad_token_id=1,
        hidden_act="gelu" if projection else "quick_gelu",
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def t5() -> nn.Module:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4,
            feed_forward_proj="gated-gelu", is_gated_act=True,
        )
    )  # fmt: skip


def kl_vae(latent_channels: int, **options: object) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16], layers_per_block=1, latent_channels=latent_channels, norm_num_groups=4, **options,
    )  # fmt: skip


def z_image() -> DiffusionPipeline:
    transformer = ZImageTransformer2DModel(
        dim=64, n_layers=4, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=48, axes_dims=[8, 12, 12]
    )
    encoder = transformers.Qwen3Model(
        transformers.Qwen3Config(
            vocab_size=512, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=12,
        )
    )  # fmt: skip
    vae = kl_vae(16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159)
    randomise(transformer, encoder, vae)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, text_encoder=encoder,
        tokenizer=qwen_tokenizer(), transformer=transformer,
    )  # fmt: skip


def qwen_image() -> DiffusionPipeline:
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=16, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 1.5, 0.5, 2.0],
    )  # fmt: skip
    shape = {"hidden_size": 16, "intermediate_size": 16}
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default", "rope_theta": 1e6}
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config=dict(
                **shape, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, rope_parameters=rope,
                vocab_size=512,
            ),
            vision_config=dict(**shape, depth=2, num_heads=2, out_hidden_size=16),
            hidden_size=16, vocab_size=512, vision_start_token_id=259, vision_end_token_id=260, image_token_id=261,
        )
    )  # fmt: skip
    randomise(transformer, vae, encoder)
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=encoder, tokenizer=qwen_tokenizer(),
        transformer=transformer,
    )  # fmt: skip


def flux() -> DiffusionPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    )  # fmt: skip
    vae = kl_vae(1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5)
    encoder, encoder_2 = clip(), t5()
    randomise(transformer, vae, encoder, encoder_2)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=encoder, text_encoder_2=encoder_2,
        tokenizer=clip_tokenizer(), tokenizer_2=t5_tokenizer(), transformer=transformer, vae=vae,
    )  # fmt: skip


def sdxl() -> DiffusionPipeline:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=2, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=80,
        cross_attention_dim=64, norm_num_groups=4,
    )  # fmt: skip
    vae = kl_vae(4, force_upcast=True)
    encoder, encoder_2 = clip(), clip(projection=True)
    randomise(unet, vae, encoder, encoder_2)
    return StableDiffusionXLPipeline(
        vae=vae, text_encoder=encoder, text_encoder_2=encoder_2, tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), unet=unet, scheduler=EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip


ARCHITECTURES: dict[str, Callable[[], DiffusionPipeline]] = {
    "z_image": z_image,
    "qwen_image": qwen_image,
    "flux": flux,
    "sdxl": sdxl,
}
# Arguments of the pipeline call that make the tiny models do all that the real ones do.
CALLS: dict[str, dict[str, object]] = {
    "z_image": {"guidance_scale": 3.0, "negative_prompt": "a dog", "max_sequence_length": 64},
    "qwen_image": {"true_cfg_scale": 2.5, "negative_prompt": "a dog", "max_sequence_length": 64},
    "flux": {"guidance_scale": 3.0, "max_sequence_length": 48},
    "sdxl": {"guidance_scale": 5.0, "negative_prompt": "a dog"},
}


def write_folder(name: str, folder: Path, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB") -> Path:
    """Write the tiny model of an architecture as a pipeline folder; a small shard size makes an index and shards."""
    pipeline = ARCHITECTURES[name]()
    pipeline.to(dtype)
    pipeline.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def rename(file: Path, change: Callable[[str], str | None]) -> None:
    """Rewrite a safetensors file's names; None drops a tensor."""
    tensors = {new: t for old, t in load_file(file).items() if (new := change(old)) is not None}
    save_file(tensors, file, metadata={"format": "pt"})


def circulating_names(name: str, folder: Path) -> Path:
    """Give text encoders the older names under which they circulate; returns the folder."""

    def clip_prefix(old: str) -> str:
        return old if old.startswith(("text_model.", "text_projection")) else f"text_model.{old}"

    def t5_shared(old: str) -> str | None:
        return None if old == "encoder.embed_tokens.weight" else old

    def qwen_vl(old: str) -> str:
        return old.replace("model.language_model.", "model.").replace("model.visual.", "visual.")

    changes: dict[str, dict[str, Callable[[str], str | None]]] = {
        "z_image": {"text_encoder": lambda old: f"model.{old}"},
        "qwen_image": {"text_encoder": qwen_vl},
        "flux": {"text_encoder": clip_prefix, "text_encoder_2": t5_shared},
        "sdxl": {"text_encoder": clip_prefix, "text_encoder_2": clip_prefix},
    }
    for component, change in changes[name].items():
        rename(folder / component / "model.safetensors", change)
    return folder
