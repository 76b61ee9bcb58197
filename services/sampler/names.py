"""Tensor names as other programs write them, made the libraries' own, by the converters of those who know them.

Pieces are renamed, split and put together; call these inside a `Conversion`, which copies only what is computed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers.loaders import single_file_utils
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

from services.params.recognise import DENOISER_PREFIX
from services.sampler.llama_names import is_llama, of_llama

Views = dict[str, torch.Tensor]

# A class whose files have the names of another's, which diffusers knows: Qwen-Image's VAE is Wan's.
_SAME_NAMES = {"AutoencoderKLQwenImage": "AutoencoderKLWan"}
_OPEN_CLIP_LAYERS = "transformer.resblocks."
REARRANGED = 256
# A name's last parts that tell one tensor of a model from the others, more or less.
_TELLING_PARTS = 3


def of_diffusers(cls: Any, views: Views, wanted: Mapping[str, object], config: Mapping[str, Any]) -> Views:
    """Names of a single file (`double_blocks.`, `model.diffusion_model.`, ...), by diffusers' own converter.

    As they are, but for a prefix, if all of `wanted` is there, or if no other names give more of it: most of Z-Image's
    names are its authors' own.
    """
    renamed = without_prefixes(views, wanted)
    known = SINGLE_FILE_LOADABLE_CLASSES.get(_SAME_NAMES.get(cls.__name__, cls.__name__))
    if known is None or wanted.keys() <= renamed.keys():
        return renamed
    convert = known["checkpoint_mapping_fn"]
    # The UNet's finds nothing without the prefix, FLUX.2's nothing with it.
    bare = {name.removeprefix(DENOISER_PREFIX): view for name, view in views.items()}
    best = renamed
    for source in (views, bare, {DENOISER_PREFIX + name: view for name, view in bare.items()}):
        if wanted.keys() <= best.keys():
            break
        try:
            found: Views = convert(checkpoint=dict(source), config=dict(config))
        except (KeyError, IndexError, UnboundLocalError):  # names that it does not know
            continue
        best = max(best, found, key=lambda names: len(wanted.keys() & names.keys()))
    return best


def as_wanted(views: Views, wanted: Mapping[str, torch.Tensor]) -> Views:
    """Rows of 256 in the module's shapes: GGUF files have them where a type's blocks would not fit into the rows.

    The numbers stay in their order. Source: the shape fix of ComfyUI-GGUF's converter.
    """
    return {
        name: view.view(wanted[name].shape) if name in wanted and _is_rearranged(view, wanted[name]) else view
        for name, view in views.items()
    }


def _is_rearranged(view: torch.Tensor, wanted: torch.Tensor) -> bool:
    is_same = view.shape == wanted.shape or view.numel() != wanted.numel()
    return not is_same and view.ndim == 2 and view.shape[1] == REARRANGED and wanted.shape[-1] % REARRANGED != 0


def of_transformers(cls: Any, views: Views, config: Any) -> Views:
    """llama.cpp's and OpenCLIP's names, and others under a prefix; those that transformers itself maps stay.

    config: the model's transformers config. Raises UnsupportedModel.
    """
    with torch.device("meta"):
        module = cls(config)
    wanted = module.state_dict()
    if is_llama(views):
        found = of_llama(views, wanted, config)
    elif any(_OPEN_CLIP_LAYERS in name for name in views):
        found = _of_open_clip(module, views, wanted)
    else:
        found = without_prefixes(views, wanted)
    return found | _left_out(found, wanted)


def _of_open_clip(module: Any, views: Views, wanted: Mapping[str, object]) -> Views:
    name = next(name for name in views if _OPEN_CLIP_LAYERS in name)
    prefix = name[: name.index(_OPEN_CLIP_LAYERS)]
    found: Views = single_file_utils.convert_open_clip_checkpoint(module, dict(views), prefix=prefix)
    return without_prefixes(found, wanted)


def _left_out(found: Views, wanted: Mapping[str, torch.Tensor]) -> Views:
    """What files leave out of models that are used as encoders, and that changes nothing there.

    A head makes words, which nobody asks an encoder for: the embedding is as good a matrix. SD3's CLIP-L projects by
    the identity, as diffusers has it.
    """
    more: Views = {}
    embedding = next((found[name] for name in found if name.endswith("embed_tokens.weight")), None)
    if "lm_head.weight" in wanted and "lm_head.weight" not in found and embedding is not None:
        more["lm_head.weight"] = embedding
    projection = wanted.get("text_projection.weight")
    embeddings = found.get("text_model.embeddings.token_embedding.weight")
    if projection is not None and embeddings is not None and "text_projection.weight" not in found:
        more["text_projection.weight"] = torch.eye(*projection.shape, dtype=embeddings.dtype)
    return more


def is_most(names: Mapping[str, object], wanted: Mapping[str, object]) -> bool:
    return 2 * len(wanted.keys() & names.keys()) > len(wanted)


def without_prefixes(views: Views, wanted: Mapping[str, object]) -> Views:
    """With the names of `wanted`, where most of it is there and only stands under other prefixes; else as they are."""
    if is_most(views, wanted):
        return views
    pairs = _prefixes(views, wanted)
    found: Views = {}
    for name in wanted:
        others = (theirs + name.removeprefix(own) for theirs, own in pairs if name.startswith(own))
        if (other := next((other for other in others if other in views), None)) is not None:
            found[name] = views[other]
    return found if is_most(found, wanted) else views


def _prefixes(views: Views, wanted: Mapping[str, object]) -> list[tuple[str, str]]:
    """(prefix in the file, prefix in the module) by which names differ, the commonest first."""
    by_tail = defaultdict(list)
    for name in views:
        for tail in _tails(name):
            by_tail[tail].append(name)
    pairs = Counter[tuple[str, str]]()
    for own in wanted:
        for tail in _tails(own):
            if len(by_tail[tail]) == 1:
                pairs[by_tail[tail][0].removesuffix(tail), own.removesuffix(tail)] += 1
                break
    # Of a prefix with a number in it there would be many: that is another layout, not another prefix.
    return [pair for pair, _ in pairs.most_common() if not any(c.isdigit() for c in pair[1])]


def _tails(name: str) -> Iterator[str]:
    """The name, and what is left of it without its first parts while that is still telling."""
    yield name
    parts = name.split(".")
    for count in range(1, len(parts) - _TELLING_PARTS + 1):
        yield ".".join(parts[count:])
