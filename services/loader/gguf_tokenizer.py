"""A Qwen tokenizer's own files, made of what a GGUF file says of it.

llama.cpp writes a tokenizer's words, merges and chat template into the metadata of a language model. Samplers get them
in the files that transformers' Qwen2Tokenizer is published in, so that it is that class, with its normalization, that
cuts prompts. Kinds of words: gguf's TokenType.
"""

import json
import os
from pathlib import Path
from typing import Any

from services.errors import BadCheckpoint
from services.params.gguf_header import GgufHeader, read_header

_WORDS, _MERGES, _TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"
# The splits of text that are Qwen2Tokenizer's.
_SPLITS = frozenset({"qwen2"})
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
_NAMES = {"eos_token": "eos", "pad_token": "padding", "bos_token": "bos"}


def check_tokenizer(path: Path) -> None:
    """Raises BadCheckpoint if a GGUF file brings no tokenizer that can be served."""
    header = _read(path, is_whole=False)
    kind, split = (header.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind is None:
        raise BadCheckpoint(f"{path.name} brings none")
    if kind != "gpt2" or split not in _SPLITS:
        raise BadCheckpoint(f"{path.name} brings one that is not Qwen's")


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """The tokenizer's files by name. Raises BadCheckpoint."""
    header = _read(path, is_whole=True)
    words, merges, types = (header.arrays.get(key, []) for key in (_WORDS, _MERGES, _TYPES))
    if not words or len(words) != len(types) or not all(isinstance(text, str) for text in (*words, *merges)):
        raise BadCheckpoint(f"{path.name}: its tokenizer is not whole")
    used = {str(word): number for number, word in enumerate(words) if types[number] != _UNUSED}
    if len(used) != len(words) - types.count(_UNUSED):
        raise BadCheckpoint(f"{path.name}: its tokenizer has a word twice")
    added = {
        str(number): _added(str(words[number]), kind == _CONTROL)
        for number, kind in enumerate(types)
        if kind in (_CONTROL, _USER_DEFINED)
    }
    config: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [entry["content"] for entry in added.values() if entry["special"]],
        **{name: _word(header, words, key) for name, key in _NAMES.items()},
    }
    if isinstance(template := header.metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    lines = ["#version: 0.2", *map(str, merges)]
    return {
        "vocab.json": json.dumps(used, ensure_ascii=False).encode(),
        "merges.txt": "\n".join(lines).encode() + b"\n",
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False).encode(),
    }


def _read(path: Path, is_whole: bool) -> GgufHeader:
    kept = frozenset({_WORDS, _MERGES, _TYPES}) if is_whole else frozenset()
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return read_header(lambda at, n: os.pread(file.fileno(), n, at), path.name, size, kept=kept)
    except OSError as error:
        raise BadCheckpoint(f"{path.name}: {os.strerror(error.errno or 0)}") from error


def _added(word: str, is_special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": word, "special": is_special, **flags}


def _word(header: GgufHeader, words: list[Any], key: str) -> str | None:
    """A word that the metadata names by its number. Qwen's have no first word, though files may name one."""
    number = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
    if key == "bos" or not isinstance(number, int) or not 0 <= number < len(words):
        return None
    return str(words[number])
