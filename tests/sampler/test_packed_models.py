"""Models whose denoiser is a GGUF file: packed in the shared copy, and drawn as from the unpacked numbers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from transformers import Qwen3Model

from services.errors import UnsupportedModel
from services.params.layout import PlacedTensor
from services.sampler import gates
from services.sampler.budget import Budget
from services.sampler.phantoms import Phantoms
from services.sampler.ring import Ring
from services.sampler.transfer import ArenaViews
from tests.sampler.inprocess import attached, under_baton
from tests.sampler.packings import scaled_fp8, write_gguf
from tests.sampler.support import pixels, plain_picture, plain_pipeline, served
from tests.stack import Stack, running
from tests.tiny_models import write_folder

SIZE, STEPS, SEED, PROMPT = (64, 64), 3, 7, "a red fox"


def circulating(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Z-Image's tensors by the names that its authors and other programs use: q, k and v in one."""
    renames = {
        "all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder.",
        ".attention.to_out.0.": ".attention.out.",
        ".attention.norm_k.": ".attention.k_norm.", ".attention.norm_q.": ".attention.q_norm.",
    }  # fmt: skip
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if ".attention.to_k." in name or ".attention.to_v." in name:
            continue
        if ".attention.to_q." in name:
            parts = [tensors[name.replace("to_q", f"to_{part}")] for part in "qkv"]
            name, tensor = name.replace("to_q", "qkv"), torch.cat(parts)
        for new, old in renames.items():
            name = name.replace(new, old)
        found[f"model.diffusion_model.{name}"] = tensor
    return found


def llama(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Qwen3's tensors by llama.cpp's names."""
    renames = {
        "layers.": "blk.", "embed_tokens": "token_embd", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    found = {}
    for name, tensor in tensors.items():
        for new, old in renames.items():
            name = name.replace(new, old)
        found["output_norm.weight" if name == "norm.weight" else name] = tensor
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a GGUF transformer for each layout and type, and beside it the same numbers, unpacked, in bf16."""
    root = tmp_path_factory.mktemp("packed")
    base = write_folder("z_image", root / "z_image", torch.bfloat16)
    file = next((base / "transformer").glob("*.safetensors"))
    tensors, found = load_file(file), {}
    encoder = next((base / "text_encoder").glob("*.safetensors"))
    encoded = load_file(encoder)
    for kind in (Kind.Q8_0, Kind.Q4_0):
        unpacked = None
        for layout, named in (("diffusers", tensors), ("circulating", circulating(tensors))):
            folder = Path(shutil.copytree(base, root / f"{layout}_{kind.name.lower()}"))
            (folder / "transformer" / file.name).unlink()
            numbers = write_gguf(folder / "transformer" / "model.gguf", named, kind)
            unpacked = unpacked or numbers
            (folder / "text_encoder" / encoder.name).unlink()
            words = write_gguf(folder / "text_encoder" / "model.gguf", llama(encoded), kind)
            found[folder.name] = folder
        plain = Path(shutil.copytree(base, root / f"plain_{kind.name.lower()}" / "z_image_bf16"))
        save_file(unpacked, plain / "transformer" / file.name)
        save_file({name: words[next(iter(llama({name: tensor})))] for name, tensor in encoded.items()},
                  plain / "text_encoder" / encoder.name)  # fmt: skip
        found[f"plain_{kind.name.lower()}"] = plain
    folder = Path(shutil.copytree(base, root / "circulating_fp8"))
    plain = Path(shutil.copytree(base, root / "plain_fp8" / "z_image_bf16"))
    stored, numbers = scaled_fp8(circulating(tensors), "scale_weight")
    save_file(stored, folder / "transformer" / file.name)
    save_file(clones(convert_z_image_transformer_checkpoint_to_diffusers(numbers)), plain / "transformer" / file.name)
    stored, numbers = scaled_fp8(encoded, "weight_scale", by_row=True)
    save_file({f"model.{name}": tensor for name, tensor in stored.items()}, folder / "text_encoder" / encoder.name)
    save_file(numbers, plain / "text_encoder" / encoder.name)
    return found | {"circulating_fp8": folder, "plain_fp8": plain}


def clones(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def packed(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    models = {f"z_image_{name}": folder for name, folder in folders.items() if not name.startswith("plain")}
    with running(tmp_path_factory.mktemp("stack"), models) as stack:
        stack.loader("--eager-load")
        yield stack


@pytest.mark.parametrize("flags", [(), ("--test-ring",), ("--test-ring", "--no-stream-layers")])
def test_pictures_equal_diffusers_on_the_unpacked_numbers(
    packed: Stack, folders: dict[str, Path], flags: tuple[str, ...]
) -> None:
    """Whatever names the file uses, streamed and resident; q, k and v that are packed in one are split as they lie."""
    sampler = packed.sampler(*flags)
    for kind in ("q8_0", "q4_0", "fp8"):
        plain_pipeline.cache_clear()
        plain = pixels(plain_picture(folders[f"plain_{kind}"], PROMPT, SIZE, STEPS, SEED))
        for layout in ("diffusers", "circulating")[kind == "fp8" :]:
            result = served(sampler.addresses[0], f"z_image_{layout}_{kind}", PROMPT, SIZE, STEPS, SEED)
            assert np.array_equal(pixels(result.images[0].pil), plain), (layout, kind)
    sampler.stop()


@pytest.mark.parametrize("is_ring", [False, True])
@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_rows_of_a_packed_table_are_looked_up_on_the_host(
    kind: str, is_ring: bool, packed: Stack, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what a prompt asks for is unpacked, and no table is brought; words are encoded as by transformers."""
    monkeypatch.setattr(gates, "HOST_LOOKUP_BYTES", 4096)
    transfer = (
        Ring(torch.device("cpu"), Budget(1 << 40), keep_residents=False, poison=True) if is_ring else ArenaViews()
    )
    ids = torch.tensor([[3, 500, 3, 17]])
    theirs = Qwen3Model.from_pretrained(folders[f"plain_{kind}"] / "text_encoder", dtype=torch.bfloat16)
    with attached(packed, f"z_image_circulating_{kind}", transfer) as model:
        tables = [gate for gate in model.gates if gate.host]
        ours = under_baton(model.engine, lambda: model.pipeline.text_encoder(ids).last_hidden_state)
        assert [gate.name for gate in tables] == ["embed_tokens"]
        assert is_ring == bool(transfer.streamed_bytes)

    with torch.no_grad():
        assert torch.equal(ours, theirs(ids).last_hidden_state)


def test_a_packing_that_nothing_unpacks_is_refused_before_a_picture() -> None:
    """By name, when the component is bound; ggml computes with Q8_K, and keeps no weights in it."""
    tensor = PlacedTensor("blk.0.weight", "Q8_K", (2, 256), 0, 584, 0)
    with pytest.raises(UnsupportedModel, match="packed as Q8_K"):
        Phantoms([tensor], torch.zeros(584, dtype=torch.uint8), {})
