"""What a model's components have to be, told from configs: those of a folder, or of a family that is built in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.errors import BadCheckpoint
from services.loader.index import parts_of, read_index
from services.params.dimensions import Dimensions, measure
from services.params.recognise import Architecture, Role, recognise
from services.params.specs import Checkpoint

BUILT_IN = Path(__file__).parent / "families"
# A denoiser is taken for the first family that it fits.
NAMES = (
    "z-image-turbo",
    "z-image",
    "qwen-image",
    "qwen-image-edit",
    "qwen-image-edit-2509",
    "qwen-image-edit-2511",
    "flux.1-dev",
    "flux.1-kontext-dev",
    "flux.1-schnell",
    "flux.2-klein-4b",
    "flux.2-klein-9b",
    "sd3.5-medium",
    "sd3.5-large",
    "sdxl",
    "sd1.5",
)
_MAX_CONFIG_BYTES = 1 << 20
# By class: the architecture, and which key of the config says which dimension.
_FLUX = {"depth": "num_layers", "channels": "in_channels", "width": "joint_attention_dim"}
_LANGUAGE = {"depth": "num_hidden_layers", "width": "hidden_size"}
_CLASSES: dict[str, tuple[str, Role, dict[str, str]]] = {
    "ZImageTransformer2DModel": (
        "Z-Image",
        Role.DENOISER,
        {"depth": "n_layers", "channels": "in_channels", "width": "cap_feat_dim"},
    ),
    "QwenImageTransformer2DModel": ("Qwen-Image", Role.DENOISER, _FLUX),
    "FluxTransformer2DModel": ("FLUX.1", Role.DENOISER, {**_FLUX, "guided": "guidance_embeds"}),
    "Flux2Transformer2DModel": ("FLUX.2", Role.DENOISER, {**_FLUX, "guided": "guidance_embeds"}),
    "SD3Transformer2DModel": ("SD3", Role.DENOISER, _FLUX),
    "UNet2DConditionModel": (
        "SD 1 or 2",
        Role.DENOISER,
        {"channels": "in_channels", "width": "cross_attention_dim"},
    ),
    "AutoencoderKL": ("AutoencoderKL", Role.VAE, {"channels": "latent_channels"}),
    "AutoencoderKLFlux2": ("AutoencoderKL", Role.VAE, {"channels": "latent_channels"}),
    "AutoencoderKLQwenImage": ("VAE of Wan or Qwen-Image", Role.VAE, {"channels": "z_dim"}),
    "Qwen3Model": ("Qwen3", Role.TEXT_ENCODER, _LANGUAGE),
    "Qwen3ForCausalLM": ("Qwen3", Role.TEXT_ENCODER, _LANGUAGE),
    "Qwen2_5_VLForConditionalGeneration": ("Qwen2.5-VL", Role.TEXT_ENCODER, _LANGUAGE),
    "CLIPTextModel": ("CLIP", Role.TEXT_ENCODER, _LANGUAGE),
    "CLIPTextModelWithProjection": ("CLIP", Role.TEXT_ENCODER, _LANGUAGE),
    "T5EncoderModel": ("T5", Role.TEXT_ENCODER, {"depth": "num_layers", "width": "d_model"}),
}
# Where a config tells one architecture from another of the same class.
_SWITCHES = {"addition_embed_type": ("SD 1 or 2", "SDXL"), "qk_norm": ("SD3", "SD3.5")}
# GGUF's words for text encoders, whose tensors' names do not tell; and what may be any of them.
_WORDS = {"qwen3": "Qwen3", "qwen2vl": "Qwen2.5-VL", "t5": "T5", "t5encoder": "T5"}
_ANY = ("", "Llama, or a relative")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a file is, or has to be."""

    architecture: Architecture
    dimensions: Dimensions

    def __str__(self) -> str:
        dimensions = str(self.dimensions)
        return f"{self.architecture} of {dimensions}" if dimensions else str(self.architecture)

    def fits(self, wanted: Shape) -> bool:
        """Whether this is surely `wanted`."""
        own = self.architecture
        name = _WORDS.get(own.name, own.name)
        return (name, own.role) == (wanted.architecture.name, wanted.architecture.role) and self.dimensions.fits(
            wanted.dimensions
        )

    def contradicts(self, wanted: Shape) -> bool:
        """Whether this can be told to be something else."""
        own = self.architecture
        if own.role in (Role.UNKNOWN, Role.VISION_TOWER) or own.name in _ANY:
            return False
        return not self.fits(wanted)


def shape_of(checkpoint: Checkpoint) -> Shape:
    """What a checkpoint's tensors are, by their names and shapes."""
    found = recognise((tensor.name for tensor in checkpoint.tensors), checkpoint.files[0].stated)
    return Shape(found, measure(checkpoint.tensors, found))


@dataclass(frozen=True, slots=True)
class Family:
    """Configs of a model. `wanted`: by component, what its files have to be, where the class says."""

    name: str
    folder: Path
    index: Mapping[str, Any]
    parts: tuple[str, ...]
    wanted: Mapping[str, Shape] = field(default_factory=dict)

    def class_of(self, part: str) -> str:
        return str(self.index[part][1])

    @property
    def denoiser(self) -> Shape | None:
        return next((s for s in self.wanted.values() if s.architecture.role is Role.DENOISER), None)


def family_in(folder: Path, name: str) -> Family:
    """The family that a folder's configs describe. Raises BadCheckpoint, OSError."""
    index = read_index(folder)
    parts = tuple(parts_of(index))
    shapes = {part: _wanted(str(index[part][1]), folder / part / "config.json") for part in parts}
    return Family(name, folder, index, parts, {part: shape for part, shape in shapes.items() if shape})


def built_in(name: str, root: Path = BUILT_IN) -> Family:
    """Raises BadCheckpoint for a family that there is not."""
    if name not in NAMES:
        raise BadCheckpoint(f"no family {name[:64]!r} is built in; there are {', '.join(NAMES)}")
    return family_in(root / name, name)


def families_for(denoiser: Shape) -> list[Family]:
    """The built-in families that a denoiser fits, the one that it is taken for first."""
    families = map(built_in, NAMES)
    return [family for family in families if family.denoiser and denoiser.fits(family.denoiser)]


def _wanted(class_name: str, path: Path) -> Shape | None:
    known = _CLASSES.get(class_name)
    config = _config(path) if known else None
    if known is None or config is None:
        return None
    name, role, keys = known
    for key, (without, with_it) in _SWITCHES.items():
        name = with_it if name == without and config.get(key) else name
    numbers: dict[str, Any] = {n: config[key] for n, key in keys.items() if isinstance(config.get(key), int)}
    return Shape(Architecture(name, role), Dimensions(**numbers))


def _config(path: Path) -> dict[str, Any] | None:
    """A component's config; None if there is none to be read, which is for samplers to say."""
    try:
        config = json.loads(path.read_bytes()) if path.stat().st_size <= _MAX_CONFIG_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None
