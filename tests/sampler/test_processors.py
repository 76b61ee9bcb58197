"""Processors of vision-language encoders, composed without torchvision."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from services.sampler.processors import processors_of
from tests.sampler.test_tasks import picture
from tests.tiny_models import qwen_tokenizer

PROMPT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>make it red<|im_end|>\n"


def circulating(folder: Path, image_processor: str) -> Path:
    """A processor's folder as it is found with Qwen-Image-Edit: a file for each part, one for videos among them."""
    images = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
    for part in (images, qwen_tokenizer()):
        part.save_pretrained(folder / "processor")
    file = folder / "processor" / "preprocessor_config.json"
    config = json.loads(file.read_text()) | {"image_processor_type": image_processor}
    file.write_text(json.dumps(config | {"processor_class": "Qwen2_5_VLProcessor"}))
    videos = config | {"video_processor_type": "Qwen2VLVideoProcessor"}
    (folder / "processor" / "video_preprocessor_config.json").write_text(json.dumps(videos))
    return folder


@pytest.mark.parametrize("name", ["Qwen2VLProcessor", "Qwen2_5_VLProcessor"])
@pytest.mark.parametrize("image_processor", ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast"])
def test_a_pipelines_call_gets_what_the_parts_give(name: str, image_processor: str, tmp_path: Path) -> None:
    """As the edit pipelines call it: each image's pixels, and as many placeholders as it has merged patches."""
    folder = circulating(tmp_path, image_processor)
    index = {"_class_name": "X", "processor": ["transformers", name], "vae": ["diffusers", "AutoencoderKL"]}
    processor = processors_of(index, folder)["processor"]
    images = [picture(1, (120, 60)), picture(2, (64, 64))]
    prompt = PROMPT.replace("<|image_pad|>", "<|image_pad|>" * 2)

    got = processor(text=[prompt], images=images, padding=True, return_tensors="pt")

    alone = [transformers.Qwen2VLImageProcessor.from_pretrained(folder / "processor")(image) for image in images]
    grids = np.concatenate([each["image_grid_thw"] for each in alone])
    tokens = qwen_tokenizer()(prompt)["input_ids"]
    pad = qwen_tokenizer().convert_tokens_to_ids("<|image_pad|>")
    first = tokens.index(pad)
    pads = [pad] * int(sum(grid.prod() // 4 for grid in grids))
    assert isinstance(processor, getattr(transformers, name))
    assert torch.equal(got["image_grid_thw"], torch.tensor(grids))
    assert got["input_ids"][0].tolist() == [*tokens[:first], *pads, *tokens[first + 2 :]]
    assert np.array_equal(got["pixel_values"], np.concatenate([each["pixel_values"] for each in alone]))


def test_others_are_left_to_the_libraries(tmp_path: Path) -> None:
    """Tokenizers, feature extractors and what is null are built as ever."""
    index = {
        "_class_name": "X", "tokenizer": ["transformers", "Qwen2Tokenizer"], "image_encoder": [None, None],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }  # fmt: skip

    assert processors_of(index, tmp_path) == {}
