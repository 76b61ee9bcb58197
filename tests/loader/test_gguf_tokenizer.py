"""The tokenizer that a GGUF file brings, in the files that samplers get, against the one that it was made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import transformers
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel

from services.errors import BadCheckpoint
from services.loader.catalog import read_model
from services.loader.entries import ModelEntry
from services.loader.gguf_tokenizer import tokenizer_files
from tests.loader.published import EXTENT, published, write_files, write_llama
from tests.tiny_models import CHAT

MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ã ©")
SPECIAL, PLAIN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), ("<think>", "</think>")


def real_tokenizer() -> transformers.Qwen2Tokenizer:
    """With merges, special tokens, added ones that are not special, and a chat template."""
    words = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
    vocab = {word: number for number, word in enumerate(words)}
    real = transformers.Qwen2Tokenizer(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in MERGES])
    real.add_tokens([AddedToken(word, normalized=False, special=True) for word in SPECIAL])
    real.add_tokens([AddedToken(word, normalized=False, special=False) for word in PLAIN])
    real.eos_token, real.chat_template = "<|im_end|>", CHAT
    return real


def tell_words(writer: gguf.GGUFWriter, split: str = "qwen2") -> None:
    """As llama.cpp's converter writes it, with words that only fill the table up."""
    real = real_tokenizer()
    words = [real.convert_ids_to_tokens(number) for number in range(len(real))] + ["[PAD300]", "[PAD301]"]
    kinds = {**dict.fromkeys(SPECIAL, 3), **dict.fromkeys(PLAIN, 4), **dict.fromkeys(words[-2:], 5)}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(words)
    writer.add_token_types([kinds.get(word, 1) for word in words])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(words.index(SPECIAL[0]))
    writer.add_pad_token_id(words.index(SPECIAL[0]))
    writer.add_eos_token_id(words.index(SPECIAL[2]))
    writer.add_chat_template(CHAT)


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three files of a Z-Image."""
    return write_files(tmp_path_factory.mktemp("z-image"), "z-image")


@pytest.fixture(scope="module")
def made(z_image: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> transformers.Qwen2Tokenizer:
    """The tokenizer that samplers find in the config folder of a model whose text encoder is a GGUF file."""
    root = tmp_path_factory.mktemp("gguf")
    encoder = write_llama(root / "Qwen3-4B.gguf", width=2560, depth=36, words=tell_words)
    files = (z_image["transformer"], z_image["vae"], encoder)
    folder = published(read_model(ModelEntry("m", checkpoint=files), EXTENT), root)
    return transformers.Qwen2Tokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)


@pytest.mark.parametrize(
    "text",
    [
        "hello world, 12345",
        "<|im_start|>user\nhello <think>wor</think> <|im_end|>",
        "<|im_start|>user\nhello <|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "Cafe\u0301, decomposed, and café", "  a\n\n\tdon't  ", "日本語 😀 Ωμέγα", "[PAD300]", "",
    ],
)  # fmt: skip
def test_a_gguf_files_tokenizer_is_the_real_one(made: transformers.Qwen2Tokenizer, text: str) -> None:
    """The same numbers for words, special tokens and signs that Unicode writes in two ways."""
    real = real_tokenizer()

    assert made(text).input_ids == real(text).input_ids
    padded = {"padding": "max_length", "max_length": 99, "truncation": True}
    assert made([text], **padded) == real([text], **padded)


def test_a_gguf_files_tokenizer_speaks_as_the_real_one(made: transformers.Qwen2Tokenizer) -> None:
    """Its chat template, the tokens that end and fill, and the size of the vocabulary."""
    real = real_tokenizer()
    chat = [{"role": "user", "content": "hello world"}]

    assert made.apply_chat_template(chat, tokenize=False) == real.apply_chat_template(chat, tokenize=False)
    assert (made.eos_token, made.pad_token, made.bos_token, len(made)) == (
        real.eos_token, real.pad_token, real.bos_token, len(real)
    )  # fmt: skip
    words = [*SPECIAL, *PLAIN]
    assert made.convert_tokens_to_ids(words) == real.convert_tokens_to_ids(words)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (None, " (te.gguf brings none)"),
        (lambda writer: tell_words(writer, "llama-bpe"), " (te.gguf brings one that is not Qwen's)"),
    ],
)
def test_a_gguf_file_without_a_tokenizer_needs_a_folder(
    z_image: dict[str, Path], tmp_path: Path, words: Callable[[gguf.GGUFWriter], None] | None, why: str
) -> None:
    """Or with one that is cut in another way."""
    encoder = write_llama(tmp_path / "te.gguf", width=2560, depth=36, words=words)

    with pytest.raises(BadCheckpoint) as caught:
        read_model(ModelEntry("m", checkpoint=(z_image["transformer"], z_image["vae"], encoder)), EXTENT)

    assert str(caught.value) == f'z-image-turbo needs tokenizer = "...", the folder of a Qwen2 tokenizer{why}'


@pytest.mark.parametrize(
    ("words", "kinds", "why"),
    [(["a", "b"], [1], "is not whole"), ([], [], "is not whole"), (["a", "b", "a"], [1, 1, 3], "has a word twice")],
)
def test_a_tokenizer_that_is_not_whole_is_refused(tmp_path: Path, words: list[str], kinds: list[int], why: str) -> None:
    """Words without a kind, none at all, or two numbers for one."""

    def tell(writer: gguf.GGUFWriter) -> None:
        if words:
            writer.add_token_list(words)
            writer.add_token_types(kinds)

    with pytest.raises(BadCheckpoint, match=f"te.gguf: its tokenizer {why}"):
        tokenizer_files(write_llama(tmp_path / "te.gguf", 8, 1, tell))
