"""How large a recognised model is, told from the shapes of its tensors. Pure: no file, no torch."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from services.params.recognise import DENOISER_PREFIX, Architecture, Role
from services.params.specs import TensorSpec


@dataclass(frozen=True, slots=True)
class Dimensions:
    """What tells models of one architecture apart; None where it does not apply or is not known.

    depth: blocks. channels: of a VAE its latent, of a denoiser its input. width: of the text's encoding, which a
    denoiser takes and a text encoder gives. guided: whether a denoiser takes a guidance scale as input.
    """

    depth: int | None = None
    channels: int | None = None
    width: int | None = None
    guided: bool | None = None

    def __str__(self) -> str:
        known = [f"{self.depth} block{'s' if self.depth > 1 else ''}"] if self.depth else []
        known += [f"{self.channels} channels"] if self.channels is not None else []
        known += [f"width {self.width}"] if self.width is not None else []
        known += ["with guidance" if self.guided else "without guidance"] if self.guided is not None else []
        return ", ".join(known)

    def fits(self, wanted: "Dimensions") -> bool:
        """Whether all that `wanted` says is so; what is not known here does not count against it."""
        pairs = (
            (self.depth, wanted.depth),
            (self.channels, wanted.channels),
            (self.width, wanted.width),
            (self.guided, wanted.guided),
        )
        return all(own is None or other is None or own == other for own, other in pairs)


@dataclass(frozen=True, slots=True)
class _Marks:
    """Where an architecture's numbers stand: the second dimension of tensors whose name ends so, numbers of blocks."""

    depth: str = ""
    channels: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    guided: str = ""
    patch: int = 1  # pixels of the latent that a channel of the input stands for


_UNET = _Marks(channels=("input_blocks.0.0.weight", "conv_in.weight"), width=("attn2.to_k.weight",))
_DENOISERS = {
    "Z-Image": _Marks(
        r"layers\.(\d+)\.", ("x_embedder.weight", "all_x_embedder.2-1.weight"), ("cap_embedder.1.weight",), patch=4
    ),
    "Qwen-Image": _Marks(r"transformer_blocks\.(\d+)\.", ("img_in.weight",), ("txt_in.weight",)),
    "FLUX.1": _Marks(
        r"(?:double|transformer)_blocks\.(\d+)\.",
        ("img_in.weight", "x_embedder.weight"),
        ("txt_in.weight", "context_embedder.weight"),
        r"guidance_in\.|time_text_embed\.guidance_embedder\.",
    ),
    "FLUX.2": _Marks(
        r"(?:double|transformer)_blocks\.(\d+)\.",
        ("img_in.weight", "x_embedder.weight"),
        ("txt_in.weight", "context_embedder.weight"),
        r"guidance_in\.|time_guidance_embed\.guidance_embedder\.",
    ),
    "SD3.5": _Marks(
        r"(?:joint|transformer)_blocks\.(\d+)\.",
        ("x_embedder.proj.weight", "pos_embed.proj.weight"),
        ("context_embedder.weight",),
    ),
    "SDXL": _UNET,
    "SD 1 or 2": _UNET,
}
_BY_ROLE = {
    Role.VAE: _Marks(channels=("decoder.conv_in.weight", "decoder.conv1.weight")),
    Role.TEXT_ENCODER: _Marks(
        r"(?!visual\.|model\.visual\.)(?:.*\.)?(?:layers|blk|resblocks|block)\.(\d+)\.",
        width=("embed_tokens.weight", "token_embd.weight", "shared.weight", "token_embedding.weight"),
    ),
}


def measure(tensors: Iterable[TensorSpec], found: Architecture) -> Dimensions:
    """The dimensions of tensors that were recognised as `found`; nothing is known of what was not recognised."""
    marks = _DENOISERS.get(found.name) if found.role is Role.DENOISER else _BY_ROLE.get(found.role)
    if marks is None:
        return Dimensions()
    shapes = {tensor.name.removeprefix(DENOISER_PREFIX): tensor.shape for tensor in tensors}
    channels = _second(shapes, marks.channels)
    return Dimensions(
        depth=_count(shapes, marks.depth) if marks.depth else None,
        channels=channels // marks.patch if channels else None,
        width=_second(shapes, marks.width),
        guided=any(re.match(marks.guided, name) for name in shapes) if marks.guided else None,
    )


def _count(names: Iterable[str], pattern: str) -> int | None:
    return len({match[1] for name in names if (match := re.match(pattern, name))}) or None


def _second(shapes: Mapping[str, tuple[int, ...]], endings: tuple[str, ...]) -> int | None:
    """The second dimension of the first tensor with such a name."""
    for name, shape in shapes.items():
        if len(shape) > 1 and any(name == ending or name.endswith(f".{ending}") for ending in endings):
            return shape[1]
    return None
