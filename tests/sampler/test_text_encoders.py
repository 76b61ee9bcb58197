"""Text encoders in the names under which their files circulate, plain and packed, against the libraries' own bits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
import transformers
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file

from services.errors import UnsupportedModel
from services.sampler.model import tell_copies
from tests.sampler.bound import Tensors, assert_equal, bound, outside_share
from tests.sampler.packings import scaled_fp8, write_gguf
from tests.tiny_models import clip, randomise, t5

QWEN_LAYER = (
    ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"), ("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"), ("input_layernorm", "attn_norm"), ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"), ("layers.", "blk."), ("embed_tokens", "token_embd"),
)  # fmt: skip
T5_LAYER = (
    ("encoder.block.", "enc.blk."), ("layer.0.SelfAttention.relative_attention_bias", "attn_rel_b"),
    ("layer.0.SelfAttention.", "attn_"), ("layer.0.layer_norm", "attn_norm"), ("layer.1.layer_norm", "ffn_norm"),
    ("layer.1.DenseReluDense.wi_0", "ffn_gate"), ("layer.1.DenseReluDense.wi_1", "ffn_up"),
    ("layer.1.DenseReluDense.wo", "ffn_down"), ("encoder.final_layer_norm", "enc.output_norm"),
    ("shared", "token_embd"),
)  # fmt: skip
VISION = (
    ("model.visual.", ""), ("blocks.", "v.blk."), ("norm1", "ln1"), ("norm2", "ln2"), ("attn.proj", "attn_out"),
    ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"),
    ("merger.ln_q", "v.post_ln"), ("merger.mlp.", "mm."), ("patch_embed.proj", "v.patch_embd"),
)  # fmt: skip
OPEN_CLIP = (
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"), ("text_model.embeddings.", ""),
    ("text_model.final_layer_norm", "ln_final"), ("text_model.encoder.layers.", "transformer.resblocks."),
    ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), (".fc1.", ".c_fc."), (".fc2.", ".c_proj."),
    ("self_attn.", "attn."), ("text_projection.weight", "text_projection"),
)  # fmt: skip


def replaced(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for old, new in rules:
        name = name.replace(old, new)
    return name


def llama_t5(tensors: Tensors) -> Tensors:
    return {replaced(n, T5_LAYER): t for n, t in tensors.items() if n != "encoder.embed_tokens.weight"}


def llama_qwen(tensors: Tensors) -> Tensors:
    """The words' part of a Qwen."""
    found = {}
    for name, tensor in tensors.items():
        if ".visual." not in name:
            name = name.removeprefix("model.").removeprefix("language_model.")
            name = {"norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}.get(name, name)
            found[replaced(name, QWEN_LAYER)] = tensor
    return found


def llama_vision(tensors: Tensors) -> Tensors:
    """The pictures' part of a Qwen2.5-VL: q, k and v apart, and a kernel for each of the two pictures of a patch."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if ".visual." not in name:
            continue
        new = replaced(name, VISION)
        if ".attn.qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                found[new.replace("attn.qkv", f"attn_{part}")] = rows
        elif "patch_embed" in name:
            found |= {new: tensor[:, :, 0], f"{new}.1": tensor[:, :, 1]}
        else:
            found[new] = tensor
    return found


def from_vision(numbers: Tensors) -> Tensors:
    """The same again in transformers' names."""
    found: Tensors = {}
    for name in list(numbers):
        own = replaced(name, tuple((new, old) for old, new in VISION[1:]))
        if re.search(r"attn_[qkv]\.", name):
            if "attn_q" not in name:
                continue
            tensor = torch.cat([numbers[name.replace("attn_q", f"attn_{part}")] for part in "qkv"])
            own = own.replace("attn_q", "attn.qkv")
        elif name.endswith(".1"):
            continue
        elif "patch_embd" in name:
            tensor = torch.stack([numbers[name], numbers[f"{name}.1"]], 2)
        else:
            tensor = numbers[name]
        found[f"model.visual.{own}"] = tensor
    return found


def open_clip(tensors: Tensors) -> Tensors:
    found: Tensors = {}
    for name, tensor in tensors.items():
        new = replaced(name, OPEN_CLIP)
        if ".q_proj." in new:
            rows = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            new, tensor = new.replace("q_proj.", "in_proj_"), torch.cat(rows)
        elif ".k_proj." in new or ".v_proj." in new:
            continue
        found[new] = tensor.T if new == "text_projection" else tensor
    return found


def qwen_vl() -> Any:
    shape = {"hidden_size": 64, "intermediate_size": 64}
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default", "rope_theta": 1e6}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config=dict(
                **shape, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rope_parameters=rope,
                vocab_size=512, bos_token_id=1, eos_token_id=2,
            ),
            vision_config=dict(**shape, depth=2, num_heads=2, out_hidden_size=64),
            hidden_size=64, vocab_size=512, vision_start_token_id=259, vision_end_token_id=260, image_token_id=261,
        )
    )  # fmt: skip


def qwen3() -> Any:
    return transformers.Qwen3Model(
        transformers.Qwen3Config(
            vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def made(make: Callable[[], Any], folder: Path) -> tuple[Any, Tensors]:
    """A tiny model, its config in the folder, and its tensors by transformers' names."""
    model = make()
    randomise(model)
    model.config.save_pretrained(folder)
    return model, {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def loaded(model: Any, tensors: Tensors, dtype: torch.dtype = torch.bfloat16) -> Any:
    """What transformers makes of the numbers."""
    return type(model).from_pretrained(None, config=model.config, state_dict=dict(tensors), dtype=dtype)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.BF16, Kind.F16])
def test_a_t5_in_gguf(kind: Kind, memory: Path, tmp_path: Path) -> None:
    """By llama.cpp's names, which other programs use for T5 too; the table stands in the file once."""
    model, tensors = made(t5, tmp_path)
    numbers = write_gguf(tmp_path / "t5.gguf", llama_t5(tensors), kind)
    back = {name: numbers[replaced(name, T5_LAYER)] for name in tensors if "embed_tokens" not in name}

    with bound(memory, tmp_path, "transformers", type(model), tmp_path / "t5.gguf") as component:
        assert_equal(component, loaded(model, back))
        assert not component.outside


@pytest.mark.parametrize(("kind", "seen"), [(Kind.Q8_0, Kind.F16), (Kind.Q4_0, Kind.Q8_0), (Kind.BF16, Kind.F16)])
def test_a_qwen2_5_vl_in_two_gguf_files(kind: Kind, seen: Kind, memory: Path, tmp_path: Path) -> None:
    """q, k and v of the vision tower are put together where they are unpacked; only the first kernel is a copy."""
    model, tensors = made(qwen_vl, tmp_path)
    files = tmp_path / "words.gguf", tmp_path / "mmproj.gguf"
    numbers = write_gguf(files[0], llama_qwen(tensors), kind)
    own = {name: next(iter(llama_qwen({name: tensor}))) for name, tensor in tensors.items() if ".visual." not in name}
    back = {name: numbers[theirs] for name, theirs in own.items()}
    back |= from_vision(write_gguf(files[1], llama_vision(tensors), seen))

    with bound(memory, tmp_path, "transformers", type(model), *files) as component:
        assert_equal(component, loaded(model, back))
        assert [outside.name for outside in component.outside] == ["model.visual.patch_embed.proj.weight"]
        assert component.outside[0].reason == "computed by the library's converter (stack)"


def test_gguf_of_an_architecture_whose_numbers_are_changed_is_refused(memory: Path, tmp_path: Path) -> None:
    """llama.cpp adds one to Gemma's norms, which no name tells."""
    config = transformers.Gemma2Config(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=64)
    config.save_pretrained(tmp_path)
    write_gguf(tmp_path / "gemma.gguf", {"blk.0.attn_q.weight": torch.ones(32, 32)}, Kind.Q8_0)

    with (
        pytest.raises(UnsupportedModel, match=r"type gemma2 are not read from GGUF, only qwen2, .*: name safetensors"),
        bound(memory, tmp_path, "transformers", transformers.Gemma2Model, tmp_path / "gemma.gguf"),
    ):
        pass


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("last", ["scale_weight", "weight_scale"])
def test_scaled_fp8(last: str, by_row: bool, memory: Path, tmp_path: Path) -> None:
    """A product of fp8 and scale in float32, rounded once; scales for activations are not used."""
    model, tensors = made(t5, tmp_path)
    del tensors["encoder.embed_tokens.weight"]
    stored, numbers = scaled_fp8(tensors, last, by_row)
    save_file(stored, tmp_path / "t5.safetensors")

    with bound(memory, tmp_path, "transformers", type(model), tmp_path / "t5.safetensors") as component:
        assert_equal(component, loaded(model, numbers))
        assert not component.outside


def test_scaled_fp8_of_a_qwen2_5_vl(memory: Path, tmp_path: Path) -> None:
    """In ComfyUI's names; a head that it lacks is none that an encoder would need."""
    model, tensors = made(qwen_vl, tmp_path)
    head = tensors.pop("lm_head.weight")
    stored, numbers = scaled_fp8(tensors, "scale_weight")
    older = (("model.language_model.", "model."), ("model.visual.", "visual."))
    named = {replaced(name, older): tensor for name, tensor in stored.items()}
    save_file(named, tmp_path / "qwen.safetensors")
    numbers["lm_head.weight"] = numbers["model.language_model.embed_tokens.weight"]

    with bound(memory, tmp_path, "transformers", type(model), tmp_path / "qwen.safetensors") as component:
        assert head.shape == numbers["lm_head.weight"].shape
        assert_equal(component, loaded(model, numbers))
        assert not component.outside


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_without_scales(dtype: torch.dtype, memory: Path, tmp_path: Path) -> None:
    model, tensors = made(t5, tmp_path)
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items() if "embed_tokens" not in name}
    save_file(stored, tmp_path / "t5.safetensors")

    with bound(memory, tmp_path, "transformers", type(model), tmp_path / "t5.safetensors") as component:
        assert_equal(component, loaded(model, {name: tensor.bfloat16() for name, tensor in stored.items()}))


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("weight_scale_inv", torch.ones(2, 2), "a scale of this kind"),
        ("weight_scale", torch.ones(3), "a scale of 3 F32 numbers"),
        ("layer.weight_scale", torch.ones(1), "the scale of no weight"),
        ("scale_weight", torch.ones(1, dtype=torch.float8_e5m2), "a scale of 1 F8_E5M2 numbers"),
    ],
)
def test_other_scales_are_refused(name: str, tensor: torch.Tensor, said: str, memory: Path, tmp_path: Path) -> None:
    """A scale that was not used would draw another picture without a word."""
    model, tensors = made(t5, tmp_path)
    module = "encoder.block.0.layer.0.SelfAttention.q"
    tensors = {n: t for n, t in tensors.items() if "embed_tokens" not in n}
    tensors[f"{module}.weight"] = tensors[f"{module}.weight"].to(torch.float8_e4m3fn)
    save_file(tensors | {f"{module}.{name}": tensor}, tmp_path / "t5.safetensors")

    with (
        pytest.raises(UnsupportedModel, match=f"{module}.*{said}"),
        bound(memory, tmp_path, "transformers", type(model), tmp_path / "t5.safetensors"),
    ):
        pass


def flat(tensors: Tensors) -> Tensors:
    """As in files made before CLIPTextModel lost a level."""
    return {n if n.startswith("text_") else f"text_model.{n}": t for n, t in tensors.items()}


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def without(part: str, tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


def big_clip() -> Any:
    return clip(projection=True)


NAMED: dict[str, tuple[Callable[[], Any], Callable[[Tensors], Tensors]]] = {
    "clip_l": (clip, flat),
    "clip_l_of_sd1": (clip, lambda t: under("cond_stage_model.transformer.", flat(t))),
    "clip_l_of_sdxl": (clip, lambda t: under("conditioner.embedders.0.transformer.", flat(t))),
    "clip_l_of_sd3": (big_clip, lambda t: under("text_encoders.clip_l.transformer.", without("projection", t))),
    "clip_g_of_sd3": (big_clip, lambda t: under("text_encoders.clip_g.transformer.", t)),
    "t5_of_sd3": (t5, lambda t: under("text_encoders.t5xxl.transformer.", without("embed_tokens", t))),
    "t5_twice": (t5, lambda t: t),
    "qwen_3_4b": (qwen3, lambda t: {**under("model.", t), "lm_head.weight": t["embed_tokens.weight"].clone()}),
    "qwen_3_in_one": (qwen3, lambda t: under("text_encoders.qwen3_4b.transformer.model.", t)),
}


@pytest.mark.parametrize("kind", ["plain", "Q8_0"])
@pytest.mark.parametrize("name", NAMED)
def test_names_that_circulate(name: str, kind: str, memory: Path, tmp_path: Path) -> None:
    """Under any prefix; what is a copy is what the file does not have."""
    make, names = NAMED[name]
    model, tensors = made(make, tmp_path)
    own = {next(iter(names({n: t, "embed_tokens.weight": t})), ""): n for n, t in tensors.items()}
    tensors = {n: t.bfloat16().clone() for n, t in tensors.items()}
    named, file = names(tensors), tmp_path / ("model.safetensors" if kind == "plain" else "model.gguf")
    if kind == "plain":
        save_file(named, file)
        numbers = named
    else:
        numbers = write_gguf(file, named, Kind[kind])
    back = {own[theirs]: tensor for theirs, tensor in numbers.items() if theirs in own}
    if name == "clip_l_of_sd3":
        back["text_projection.weight"] = torch.eye(32).bfloat16()

    with bound(memory, tmp_path, "transformers", type(model), file) as component:
        assert_equal(component, loaded(model, back))
        made_up = ["text_projection.weight"] if name == "clip_l_of_sd3" else []
        assert [outside.name for outside in component.outside] == made_up


@pytest.mark.parametrize(
    ("prefix", "projection"), [("conditioner.embedders.1.model.", True), ("cond_stage_model.model.", False)]
)
@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_open_clip(prefix: str, projection: bool, kind: str, memory: Path, tmp_path: Path) -> None:
    """SDXL's second encoder and SD 2's: q, k and v are rows of one tensor, and a transposed projection is a copy."""
    model, tensors = made(lambda: clip(projection), tmp_path)
    if not projection:
        tensors = flat(tensors)
    named = under(prefix, open_clip(tensors))
    named[f"{prefix}logit_scale"] = torch.ones(1)
    file = tmp_path / ("clip.safetensors" if kind == "F16" else "clip.gguf")
    if kind == "F16":
        numbers = {name: tensor.half().contiguous() for name, tensor in named.items()}
        save_file(numbers, file)
    else:
        numbers = write_gguf(file, named, Kind[kind])
    dtype = numbers[f"{prefix}token_embedding.weight"].dtype
    checkpoint = dict(numbers)
    reference = create_diffusers_clip_model_from_ldm(
        type(model), checkpoint, config=str(tmp_path), torch_dtype=dtype, local_files_only=True
    )

    with bound(memory, tmp_path, "transformers", type(model), file) as component:
        assert_equal(component, reference)
        assert [outside.name for outside in component.outside] == (["text_projection.weight"] if projection else [])
        assert outside_share(component) < 0.05


@pytest.mark.parametrize(("rows", "level"), [(600, "warning"), (60_000, "info")])
def test_private_copies_are_told(rows: int, level: str, memory: Path, tmp_path: Path) -> None:
    """With their size and reason, and louder if one is more than 1 % of its component."""
    model, tensors = made(lambda: clip(projection=True), tmp_path)
    tensors["text_model.embeddings.token_embedding.weight"] = torch.zeros(rows, 32)
    model.config.vocab_size = rows
    model.config.save_pretrained(tmp_path)
    save_file({f"a.{n}": t.contiguous() for n, t in open_clip(tensors).items()}, tmp_path / "clip.safetensors")

    with (
        bound(memory, tmp_path, "transformers", type(model), tmp_path / "clip.safetensors") as component,
        structlog.testing.capture_logs() as logs,
    ):
        tell_copies("sdxl", component)

    assert logs == [
        {
            "event": "private copies", "log_level": level, "model": "sdxl", "component": "part", "count": 1,
            "size_bytes": 4096, "largest": "text_projection.weight", "largest_bytes": 4096,
            "reason": "computed by the library's converter (clone)",
        }
    ]  # fmt: skip


def test_what_t5_keeps_in_float32_becomes_so_on_arrival(memory: Path, tmp_path: Path) -> None:
    """Two fifths of a T5 in float16 would else be copied, in twice the bytes."""
    model, tensors = made(t5, tmp_path)
    halves = {name: tensor.half() for name, tensor in without("embed_tokens", tensors).items()}
    save_file(halves, tmp_path / "t5.safetensors")
    reference = loaded(model, halves, torch.float16)

    with bound(memory, tmp_path, "transformers", type(model), tmp_path / "t5.safetensors") as component:
        assert_equal(component, reference)
        assert not component.outside
    assert reference.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype is torch.float32
