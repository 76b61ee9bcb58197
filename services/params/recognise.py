"""What a checkpoint is for, told from the names of its tensors. Pure: no file, no torch.

A mark is a piece of a tensor's name; `^` stands for the name's beginning, `*` for a number between dots.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

DENOISER_PREFIX = "model.diffusion_model."


class Role(StrEnum):
    """What a file can be to a pipeline."""

    DENOISER = "denoiser"
    TEXT_ENCODER = "text encoder"
    VISION_TOWER = "vision tower of a text encoder"
    VAE = "VAE"
    LORA = "LoRA"
    ALL_IN_ONE = "all-in-one checkpoint"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Architecture:
    """What was recognised. `name` is empty if it is not known."""

    name: str
    role: Role

    def __str__(self) -> str:
        return f"{self.name} ({self.role})" if self.name else self.role


UNKNOWN = Architecture("", Role.UNKNOWN)

# (marks that must all be there, name), the more particular first.
_ADAPTERS = ("lora_A.", "lora_B.", "lora_up.", "lora_down.", "lora.up.", "lora.down.", ".lokr_w", ".hada_w")
_PARTS = ("^first_stage_model.", "^cond_stage_model.", "^conditioner.", "^vae.", "^text_encoders.")
_DENOISERS = (
    (("noise_refiner.", "context_refiner.", "cap_embedder.", "cap_pad_token"), "Z-Image"),
    (("noise_refiner.", "context_refiner."), "Lumina 2"),
    (("transformer_blocks.*.img_mod", "txt_norm."), "Qwen-Image"),
    (("distilled_guidance_layer.",), "Chroma"),
    (("double_stream_modulation_img.",), "FLUX.2"),
    (("^double_blocks.*.img_attn.qkv", "^single_blocks."), "FLUX.1"),
    (("^transformer_blocks.", "^single_transformer_blocks.", "^x_embedder.weight"), "FLUX.1"),
    (("^input_blocks.", "^output_blocks.", "^label_emb."), "SDXL"),
    (("^input_blocks.", "^output_blocks."), "SD 1 or 2"),
    (("^down_blocks.", "^up_blocks.", "^add_embedding."), "SDXL"),
    (("^down_blocks.", "^up_blocks.", "^conv_in."), "SD 1 or 2"),
    (("^joint_blocks.", "x_block.attn.ln_q."), "SD3.5"),
    (("^joint_blocks.",), "SD3"),
    (("^transformer_blocks.", "norm1_context.", "^context_embedder.", ".attn.norm_q."), "SD3.5"),
    (("^transformer_blocks.", "norm1_context.", "^context_embedder."), "SD3"),
)
_VAES = (
    (("^encoder.down_blocks.", "^decoder.up_blocks.", ".gamma"), "VAE of Wan or Qwen-Image"),
    (("^encoder.downsamples.", "^decoder.upsamples."), "VAE of Wan or Qwen-Image"),
    (("^encoder.down.*.block.",), "AutoencoderKL"),
    (("^decoder.up.*.block.",), "AutoencoderKL"),
    (("^encoder.down_blocks.",), "AutoencoderKL"),
    (("^decoder.up_blocks.",), "AutoencoderKL"),
)
_TEXT_ENCODERS = (
    (("visual.", "layers.*.self_attn.q_norm."), "Qwen3-VL"),
    (("visual.", "layers.*.self_attn.q_proj."), "Qwen2.5-VL"),
    (("layers.*.pre_feedforward_layernorm.",), "Gemma"),
    (("layers.*.self_attn.q_norm.",), "Qwen3"),
    (("layers.*.self_attn.q_proj.", "layers.*.mlp.gate_proj."), "Llama, or a relative"),
    (("encoder.block.*.layer.*.SelfAttention.",), "T5"),
    (("^enc.blk.",), "T5"),
    (("text_model.encoder.layers.",), "CLIP"),
    (("^embeddings.token_embedding.", "^encoder.layers.*.layer_norm1."), "CLIP"),
    (("transformer.resblocks.", "token_embedding."), "CLIP"),
)
_RULES = (
    *((marks, Architecture(name, Role.DENOISER)) for marks, name in _DENOISERS),
    *((marks, Architecture(name, Role.VAE)) for marks, name in _VAES),
    *((marks, Architecture(name, Role.TEXT_ENCODER)) for marks, name in _TEXT_ENCODERS),
)
# Words of GGUF's general.architecture. Programs share and borrow them (Z-Image's files say lumina2), so names of
# tensors come first.
_WORDS = {
    **dict.fromkeys(("sd1", "sdxl", "sd3", "flux", "lumina2", "qwen_image", "aura", "hidream"), Role.DENOISER),
    **dict.fromkeys(("wan", "ltxv", "hyvid", "cosmos"), Role.DENOISER),
    **dict.fromkeys(
        ("qwen3", "qwen2", "qwen2vl", "qwen3vl", "llama", "gemma2", "gemma3", "mistral3"), Role.TEXT_ENCODER
    ),
    **dict.fromkeys(("t5", "t5encoder"), Role.TEXT_ENCODER),
    "clip": Role.VISION_TOWER,
}


def recognise(names: Iterable[str], stated: str = "") -> Architecture:
    """What tensors of these names are; `stated` is the file's own word for it, or empty. `UNKNOWN` if neither tells."""
    text = _text_of(names)
    if any(mark in text for mark in _ADAPTERS):
        return Architecture("", Role.LORA)
    if _has("^" + DENOISER_PREFIX, text):
        inside = _by_names(text.replace("\n" + DENOISER_PREFIX, "\n"))
        return Architecture(inside.name, Role.ALL_IN_ONE) if any(_has(part, text) for part in _PARTS) else inside
    found = _by_names(text)
    if found is UNKNOWN and stated:
        return Architecture(stated, _WORDS.get(stated, Role.UNKNOWN))
    return found


def _text_of(names: Iterable[str]) -> str:
    """All names in one text, each behind a line's end, so that a mark is looked for once and not in each of them."""
    return "\n" + "\n".join(sorted({re.sub(r"(?<=\.)[0-9]+(?=\.)", "*", name) for name in names}))


def _by_names(text: str) -> Architecture:
    for marks, architecture in _RULES:
        if all(_has(mark, text) for mark in marks):
            return architecture
    return UNKNOWN


def _has(mark: str, text: str) -> bool:
    return mark.replace("^", "\n") in text
