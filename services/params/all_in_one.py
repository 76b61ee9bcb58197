"""The components of a file that holds all of a model, by the prefixes of their tensors' names. Pure: no file."""

import re
from dataclasses import replace

from services.params.layout import natural_key
from services.params.recognise import DENOISER_PREFIX
from services.params.specs import Checkpoint, TensorSpec

# Those of the authors of SD 1.5, SDXL and SD 3.5, and those that ComfyUI writes.
_PARTS = re.compile(
    re.escape(DENOISER_PREFIX) + r"|first_stage_model\.|vae\.|cond_stage_model\.(?:transformer|model)\."
    r"|conditioner\.embedders\.\d+\.(?:transformer|model)\.|text_encoders\.[^.]+\.transformer\."
)


def split(checkpoint: Checkpoint) -> dict[str, Checkpoint]:
    """The components by their prefix, in natural order; tensors of none, such as averages, are left out.

    Names lose the prefix, but for the denoiser's: files of denoisers alone have it too, so converters expect it.
    """
    parts: dict[str, list[TensorSpec]] = {}
    for tensor in checkpoint.tensors:
        if match := _PARTS.match(tensor.name):
            prefix = match[0]
            bare = tensor.name if prefix == DENOISER_PREFIX else tensor.name.removeprefix(prefix)
            parts.setdefault(prefix, []).append(replace(tensor, name=bare))
    return {
        prefix: replace(checkpoint, tensors=tuple(parts[prefix]), part=prefix)
        for prefix in sorted(parts, key=natural_key)
    }
