"""A tiny Z-Image pipeline with random weights, and its parts as batched functions to train.

The pipeline is diffusers' own, unmodified; the functions here do what it does for one prompt, for a whole batch
of prompts of one length, because the transformer's own forward takes lists and spends most of its time on them.
"""

import itertools
import re

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from models.demo.draw import (
    BACKGROUND_PHRASES,
    COLOURS,
    CORNER_PHRASES,
    LEADS,
    PLACES,
    RELATION_PHRASES,
    SHAPES,
    SIDE_PHRASES,
    SIZE_WORDS,
)

PATCH = "2-1"  # the transformer's only patch size: 2 x 2 latents, 1 frame
TEXT_MULTIPLE = 32  # the transformer pads captions to a multiple of this (its SEQ_MULTI_OF)

# A space before the prompt makes its first word a token like any other; small letters need no tokens of their own.
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|> {{ m['content'] | lower | trim }}<|im_end|>{% endfor %}"


def vocabulary() -> list[str]:
    """Return every word that a caption can hold, in a fixed order."""
    phrases = [*COLOURS, *SHAPES, "a an the upper lower", *" ".join(PLACES).split()]
    phrases += [*CORNER_PHRASES, *(text for text, _ in (*BACKGROUND_PHRASES, *LEADS))]
    phrases += itertools.chain(*SIZE_WORDS.values(), *SIDE_PHRASES.values(), *RELATION_PHRASES.values())
    words = itertools.chain.from_iterable(re.findall(r"[a-z]+", re.sub(r"{\w*}", "", phrase)) for phrase in phrases)
    return list(dict.fromkeys(words))


def make_tokenizer() -> Qwen2Tokenizer:
    """Make a byte-level BPE that has one token for each word it was made for; other words become pieces and bytes."""
    vocab = {symbol: index for index, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    merges = []
    for word in vocabulary():
        left = "Ġ"  # the byte alphabet's space
        for letter in word:
            if left + letter not in vocab:
                vocab[left + letter] = len(vocab)
                merges.append((left, letter))
            left += letter
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        vocab[token] = len(vocab)
    special = ["<|im_start|>", "<|im_end|>"]
    # PreTrainedTokenizerFast guesses a padding side from the model's name; the batched functions need "right".
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, padding_side="right", extra_special_tokens=special)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_text_encoder(vocab_size: int) -> Qwen3Model:
    """Make a Qwen3 of three layers; the pipeline takes hidden_states[-2], so the last of them only has to exist."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
    )
    return Qwen3Model(config)


def make_transformer(channels: int, text_width: int) -> ZImageTransformer2DModel:
    """Make the denoiser; its modulation starts at zero, so that every block starts as the identity."""
    transformer = ZImageTransformer2DModel(
        in_channels=channels,
        dim=192,
        n_layers=8,
        n_refiner_layers=1,
        n_heads=6,
        n_kv_heads=6,
        cap_feat_dim=text_width,
        axes_dims=[8, 12, 12],
        axes_lens=[1024, 128, 128],
    )
    for block in (*transformer.noise_refiner, *transformer.layers):
        torch.nn.init.zeros_(block.adaLN_modulation[0].weight)
        torch.nn.init.zeros_(block.adaLN_modulation[0].bias)
    torch.nn.init.zeros_(transformer.all_final_layer[PATCH].linear.weight)
    return transformer


def make_vae() -> AutoencoderKL:
    """Make the autoencoder: 128 x 128 pixels to 16 x 16 latents of 8 channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 48, 64, 96),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def make_pipeline() -> ZImagePipeline:
    """Put the pipeline together, with random weights."""
    tokenizer, vae = make_tokenizer(), make_vae()
    text_encoder = make_text_encoder(len(tokenizer))
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=make_transformer(vae.config.latent_channels, text_encoder.config.hidden_size),
    )


def tokenize(tokenizer: Qwen2Tokenizer, prompts: list[str]) -> list[list[int]]:
    """Turn prompts into token ids as ZImagePipeline does, without its padding."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    return tokenizer(texts).input_ids


def encode_text(text_encoder: Qwen3Model, ids: torch.Tensor) -> torch.Tensor:
    """Return what the pipeline takes from the text encoder, hidden_states[-2].

    ids: (batch, length), padded on the right; a causal model needs no mask for that. Returns (batch, length, width).
    """
    hidden = text_encoder.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rotary = text_encoder.rotary_emb(hidden, positions)
    for layer in text_encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, position_ids=positions)
    return hidden


def velocity(
    transformer: ZImageTransformer2DModel,
    latents: torch.Tensor,
    time: torch.Tensor,
    text: torch.Tensor,
    said: torch.Tensor,
) -> torch.Tensor:
    """Return ZImageTransformer2DModel's answer for a batch: it is trained to be data - noise.

    latents: (batch, channels, height, width), height * width / 4 a multiple of 32; time: (batch,), 1 - sigma;
    text: (batch, length, width), length a multiple of 32; said: (batch, length), False where text is padding.
    """
    batch, channels, height, width = latents.shape
    length = text.shape[1]
    modulation = transformer.t_embedder(time * transformer.t_scale).type_as(latents)

    x = transformer.all_x_embedder[PATCH](_patchify(latents))
    x_rope = _rope(transformer, (1, height // 2, width // 2), (length + 1, 0, 0), latents.device)
    for block in transformer.noise_refiner:
        x = block(x, None, x_rope, modulation)

    text = transformer.cap_embedder(text)
    text = torch.where(said[..., None], text, transformer.cap_pad_token.to(text.dtype))
    text_rope = _rope(transformer, (length, 1, 1), (1, 0, 0), latents.device)
    for block in transformer.context_refiner:
        text = block(text, None, text_rope)

    x = torch.cat((x, text.to(x.dtype)), dim=1)
    rope = torch.cat((x_rope, text_rope), dim=1)
    for block in transformer.layers:
        x = block(x, None, rope, modulation)
    x = transformer.all_final_layer[PATCH](x, c=modulation)[:, : height * width // 4]
    return x.view(batch, height // 2, width // 2, 2, 2, channels).permute(0, 5, 1, 3, 2, 4).reshape(latents.shape)


def modulation_size(transformer: ZImageTransformer2DModel, time: torch.Tensor) -> torch.Tensor:
    """Return the mean square of the time's embedding and of all that blocks make of it. time: (batch,).

    Norms and tanh gates hide the size of these numbers from the loss, so that nothing else holds them.
    """
    embedded = transformer.t_embedder(time * transformer.t_scale)
    blocks = (*transformer.noise_refiner, *transformer.layers, transformer.all_final_layer[PATCH])
    made = [embedded, *(block.adaLN_modulation(embedded) for block in blocks)]
    return torch.stack([numbers.float().square().mean() for numbers in made]).sum()


def _patchify(latents: torch.Tensor) -> torch.Tensor:
    """Cut (batch, c, h, w) into (batch, h w / 4, 4 c) patches, channels last as the transformer does."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(batch, height * width // 4, 4 * channels)


def _rope(
    transformer: ZImageTransformer2DModel,
    size: tuple[int, int, int],
    start: tuple[int, int, int],
    device: torch.device,
) -> torch.Tensor:
    """Return the rotary factors (1, tokens, head width / 2) of a grid of positions."""
    grid = transformer.create_coordinate_grid(size, start, device).flatten(0, 2)
    return transformer.rope_embedder(grid)[None]
