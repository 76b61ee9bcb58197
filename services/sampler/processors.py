"""Processors of vision-language encoders, on machines without torchvision.

transformers' processors of Qwen2-VL and its kin insist on a video processor, which needs torchvision. Pictures and text
need neither: for them the tokenizer and the image processor, which has a Pillow version, are all that is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import ProcessorMixin
from transformers.utils import is_torchvision_available


def processors_of(index: Mapping[str, object], config: Path) -> dict[str, Any]:
    """The processors of a pipeline folder that the libraries could not build here, by component.

    index: its model_index.json; config: the folder. Raises OSError, ValueError as the libraries do.
    """
    if is_torchvision_available():
        return {}
    found = {name: processor_class(entry) for name, entry in index.items()}
    return {
        name: without_video(cls).from_pretrained(str(config / name), local_files_only=True)
        for name, cls in found.items()
        if cls is not None and "video_processor" in cls.get_attributes()
    }


def processor_class(entry: object) -> Any:
    """The class of a processor that an entry of model_index.json names; None for other entries."""
    if not (isinstance(entry, list) and len(entry) == 2 and entry[0] == "transformers"):
        return None
    found = getattr(transformers, str(entry[1]), None)
    return found if isinstance(found, type) and issubclass(found, ProcessorMixin) else None


def without_video(cls: Any) -> Any:
    """The class with an image processor and a tokenizer only; its `from_pretrained` looks for no other part."""

    def init(self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        cls.__init__(self, image_processor, tokenizer, None, chat_template=chat_template)

    return type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__})
