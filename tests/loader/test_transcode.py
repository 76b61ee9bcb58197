"""Weights that are packed while they are read: which, how they lie in the arena, and what makes an arena another."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from headwater.loader.v1 import loader_pb2 as pb
from safetensors.numpy import save_file

from services import errors
from services.loader import inspection
from services.loader.catalog import read_model
from services.loader.config import Inspect
from services.loader.entries import ConfigError, ModelEntry, parse_added, read_models
from services.loader.transcode import TypeRules, plan
from services.params.arena import AttachedArena
from services.params.recognise import Role
from services.params.specs import Checkpoint, TensorSpec
from services.rpc.loader_client import LoaderClient
from tests.loader.support import (
    Tensors,
    Workbench,
    attach_component,
    component,
    make_model,
    prepared,
    tensor_bytes,
    terminate,
)
from tests.loader.test_loader_faults import refused
from tests.loader.weights_files import write_gguf

Q8 = 'type = "q8_0"'


def holds(arena: AttachedArena, tensors: Tensors, types: dict[str, str]) -> None:
    """Every tensor has its type and the package's bytes; those without one have the checkpoint's."""
    assert {tensor.name for tensor in arena.tensors} == set(tensors)
    for placed in arena.tensors:
        numbers, kind = tensors[placed.name], types.get(placed.name)
        raw = gguf.quants.quantize(numbers, Kind[kind]).tobytes() if kind else numbers.tobytes()
        held = bytes(arena.data[placed.offset : placed.offset + placed.size_bytes])
        assert held == raw, placed.name
        assert placed.shape == numbers.shape
        assert kind in (None, placed.dtype)


def matrices(tensors: Tensors, kind: str = "Q8_0") -> dict[str, str]:
    return {name: kind for name in tensors if name.endswith(".weight")}


# ---- which


def chosen(component: str, rules: TypeRules, role: Role | None, *specs: tuple[str, str, tuple[int, ...]]) -> list[str]:
    """Of specs (name, dtype, shape), those that change."""
    tensors = tuple(TensorSpec(name, dtype, shape, 0, 0, 1) for name, dtype, shape in specs)
    return list(plan(component, Checkpoint((), tensors), rules, role).types)


@pytest.mark.parametrize(
    "name",
    ["x_embedder.weight", "time_text_embed.guidance_embedder.linear_1.weight", "position_embedding.weight",
     "label_emb.0.0.weight", "img_in.weight", "final_layer.linear.weight", "proj_out.weight",
     "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "norm_out.linear.weight",
     "scale_shift_table", "layers.0.attention.to_q.bias"],
)  # fmt: skip
def test_a_type_leaves_alone_what_is_delicate(name: str) -> None:
    """Embeddings, the first and the last layers, and what is no weight of a matrix."""
    assert not chosen("transformer", TypeRules("Q8_0"), Role.DENOISER, (name, "BF16", (64, 64)))


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "embed_tokens.weight",
        "shared.weight",
        "text_model.embeddings.token_embedding.weight",
    ],
)
def test_tables_of_words_are_matrices_too(name: str) -> None:
    """Of which a prompt needs some rows; they are a tenth of an encoder."""
    assert chosen("text_encoder", TypeRules("Q8_0"), Role.TEXT_ENCODER, (name, "BF16", (64, 64))) == [name]


def test_a_type_is_for_matrices_of_denoisers_and_text_encoders() -> None:
    """Of whole blocks; modulations and projections inside of blocks are matrices as any."""
    tensors = [
        ("blocks.0.attn.to_q.weight", "BF16", (64, 64)),
        ("blocks.0.norm1.linear.weight", "F16", (64, 64)),
        ("attentions.0.proj_out.weight", "F32", (64, 64)),
        ("experts.weight", "BF16", (4, 64, 64)),
        ("blocks.0.norm1.weight", "BF16", (64,)),
        ("pad_token.weight", "BF16", (1, 64)),
        ("blocks.0.odd.weight", "BF16", (64, 48)),
        ("conv.weight", "BF16", (64, 64, 3, 3)),
        ("packed.weight", "Q4_0", (64, 64)),
        ("indices.weight", "I64", (64, 64)),
    ]
    for role in (Role.DENOISER, Role.TEXT_ENCODER):
        assert chosen("any", TypeRules("Q8_0"), role, *tensors) == [name for name, *_ in tensors[:4]]
    for role in (Role.VAE, None):
        assert not chosen("any", TypeRules("Q8_0"), role, *tensors)


def test_a_float_type_is_for_all_floats() -> None:
    """A module computes with one: biases and embeddings go with the matrices."""
    tensors = [("a.weight", "F32", (3, 5)), ("a.bias", "F32", (3,)), ("embed.weight", "F16", (4, 4)),
               ("ids", "I64", (4,)), ("same", "BF16", (2,))]  # fmt: skip
    assert chosen("unet", TypeRules("BF16"), Role.DENOISER, *tensors) == ["a.weight", "a.bias", "embed.weight"]


def test_the_first_rule_that_matches_wins_over_the_type_and_over_what_it_leaves_alone() -> None:
    rules = TypeRules("Q8_0", ((r"^vae\..*embed", "Q4_0"), (r"to_[qk]\.", "Q5_1"), ("to_q", "Q4_0"), ("embed", "F16")))
    tensors = tuple(
        TensorSpec(name, "BF16", (64, 64), 0, 0, 1) for name in ("to_q.weight", "to_v.weight", "embed.weight")
    )

    def types(component: str, role: Role) -> dict[str, str]:
        return dict(plan(component, Checkpoint((), tensors), rules, role).types)

    assert types("transformer", Role.DENOISER) == {"to_q.weight": "Q5_1", "to_v.weight": "Q8_0", "embed.weight": "F16"}
    assert types("vae", Role.VAE) == {"to_q.weight": "Q5_1", "embed.weight": "Q4_0"}


# ---- what the operator writes


def entry_of(tmp_path: Path, lines: str) -> ModelEntry:
    path = tmp_path / "models.toml"
    path.write_text(f'[models.toy]\nfolder = "toy"\n{lines}\n')
    return read_models(path)[0]


def test_types_are_read_in_their_order(tmp_path: Path) -> None:
    entry = entry_of(tmp_path, f'{Q8}\n[models.toy.types]\n"^vae" = "f16"\n"to_q" = "q4_0"')
    assert entry.types == TypeRules("Q8_0", (("^vae", "F16"), ("to_q", "Q4_0")))
    make_model(tmp_path / "toy")
    assert parse_added(f"a={tmp_path}/toy,type=q5_0").types == TypeRules("Q5_0")
    assert not parse_added(f"a={tmp_path}/toy").types


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('type = "q9_0"', "models.toy: type: 'q9_0' is no type that is written here; q8_0, q4_0"),
        ("type = 8", "models.toy: type: 8 is no type"),
        ('types = "q8_0"', "models.toy.types is no table"),
        ('[models.toy.types]\n"(" = "q8_0"', r"models.toy.types: '\(' is no regular expression: missing \)"),
        ('[models.toy.types]\na = "Q8"', "models.toy: type: 'Q8' is no type"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(tmp_path: Path, lines: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        entry_of(tmp_path, lines)
    assert "\n" not in str(raised.value)


def test_an_added_models_type_is_checked_too(tmp_path: Path) -> None:
    make_model(tmp_path / "toy")
    with pytest.raises(ConfigError, match=r"--add a=.*: type: 'q9' is no type"):
        parse_added(f"a={tmp_path}/toy,type=q9")


def test_a_type_without_its_packages_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not when the first read comes; models without one need neither."""
    monkeypatch.setattr("services.loader.entries.find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(ConfigError, match=r"models.toy: a type needs gguf: pip install 'headwater\[transcode\]'"):
        entry_of(tmp_path, Q8)
    assert not entry_of(tmp_path, "").types


def test_a_rule_that_is_about_no_tensor_makes_the_model_unfit(tmp_path: Path) -> None:
    """A name that was mistyped must not go unnoticed: all would be served, but not as it was meant."""
    make_model(tmp_path / "toy")
    rules = TypeRules("", (("blocks", "Q8_0"), ("^tranformer", "Q8_0")))
    with pytest.raises(errors.BadCheckpoint, match=r"no tensor's name has '\^tranformer' .* are text_encoder, transf"):
        read_model(ModelEntry("toy", tmp_path / "toy", types=rules), 16384)


# ---- in the arena


def test_an_arena_holds_what_the_package_packs(bench: Workbench) -> None:
    """However it is read: around the page cache and through it, in large reads and in small, a tensor in many."""
    tensors = bench.add_model("toy", width=256)  # 256 KiB a matrix, in extents of 16 KiB
    bench.options["toy"] = f'{Q8}\n[models.toy.types]\n"blocks.2.weight" = "q5_1"\n"scale$" = "f16"'

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            model = await prepared(client, "toy")
            for name in ("text_encoder", "transformer"):
                types = matrices(tensors[name]) | {"blocks.2.weight": "Q5_1", "scale": "F16"}
                with attach_component(bench, model, name) as arena:
                    holds(arena, tensors[name], types)
            # What was read from disk, and what it became.
            assert model.read_bytes == tensor_bytes(tensors)
            sizes = sum(part.size_bytes for part in model.components)
            assert sizes < 0.3 * model.read_bytes  # of float32

    for flags in ((), ("--buffered-io", "--fill-threads", "1"), ("--max-fill-rate", "3MB", "--fill-threads", "3")):
        with bench.loader(*flags) as process:
            asyncio.run(use())
            terminate(process)
    assert bench.log.read_text().count("packed as it is read") == 2 * 3


def test_bf16_takes_little_more_than_half(bench: Workbench) -> None:
    """34 bytes for 64, the header and the padding of an arena included."""
    bench.add_model("toy")
    save_bf16(bench.folders["toy"], width=512)
    bench.options["toy"] = Q8

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            part = component(await prepared(client, "toy"), "text_encoder")
            source = (bench.folders["toy"] / "text_encoder" / "model.safetensors").stat().st_size
            assert (bench.arena_dir / part.arena).stat().st_blocks * 512 <= 0.54 * source

    with bench.loader("--host-budget", "4MB"):  # 4 MiB of bf16 would not fit
        asyncio.run(use())


def save_bf16(folder: Path, width: int) -> None:
    """Eight matrices, as a safetensors file has bf16."""
    import torch
    from safetensors.torch import save_file as save

    weights = {f"blocks.{n}.weight": torch.randn(width, width).bfloat16() for n in range(8)}
    save(weights, folder / "text_encoder" / "model.safetensors")


def test_what_cannot_be_packed_stays_and_is_told(bench: Workbench) -> None:
    """Rows that are no whole blocks, and files that are packed already: once a component, with count and bytes."""
    tensors = bench.add_model("toy")
    odd = {"a.weight": np.ones((40, 33), np.float32), "b.weight": np.ones((4, 31), np.float32)}
    save_file(odd, bench.folders["toy"] / "text_encoder" / "model.safetensors")
    file = write_gguf(bench.disk / "model.gguf", kind=Kind.Q4_0)
    bench.options["toy"] = f'{Q8}\n[models.toy.files]\ntransformer = "{file}"'
    del tensors

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            model = await prepared(client, "toy")
            with attach_component(bench, model, "text_encoder") as arena:
                holds(arena, odd, {})
            with attach_component(bench, model, "transformer") as arena:
                assert {tensor.dtype for tensor in arena.tensors} == {"Q4_0", "F32"}
            await client.reload()

    with bench.loader():
        asyncio.run(use())
    told = [line for line in bench.log.read_text().splitlines() if "tensors stay as they are" in line]
    assert len(told) == 2
    assert any(
        "rows are no multiple of 32" in line and "count=2" in line and "size_bytes=5776" in line for line in told
    )
    assert any("Q4_0 already" in line and "count=8" in line for line in told)


# ---- one arena or another


def test_plain_and_packed_are_two_arenas_and_equal_types_are_one(bench: Workbench) -> None:
    """Of the same files: the transform is part of what an arena is made of."""
    tensors = bench.add_model("plain")["transformer"]
    for name, options in (("a", Q8), ("b", '[models.b.types]\n"^(transformer|text_encoder).*weight$" = "q8_0"')):
        bench.folders[name], bench.options[name] = bench.folders["plain"], options

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            models = [await prepared(client, name) for name in ("plain", "a", "b")]
            plain, a, b = (component(model, "transformer") for model in models)
            assert a.arena == b.arena
            assert plain.identity != a.identity
            assert models[2].read_bytes == models[1].read_bytes
            for model, types in ((models[0], {}), (models[1], matrices(tensors))):
                with attach_component(bench, model, "transformer") as arena:
                    holds(arena, tensors, types)

    with bench.loader():
        asyncio.run(use())


def test_a_restarted_loader_takes_packed_arenas_over_and_fills_what_is_missing(bench: Workbench) -> None:
    """Killed in the middle: what is READY is verified, by the packed bytes' digest, and the rest is packed again."""
    parts = bench.add_model("toy", block_count=20)
    bench.options["toy"] = Q8

    async def begin() -> pb.Model:
        async with LoaderClient(bench.address) as client:
            async for message in client.prepare("toy"):
                if message.HasField("model"):
                    model = message.model
                if message.ready_bytes > message.total_bytes // 3:
                    return model
        raise AssertionError

    async def end(before: pb.Model) -> None:
        async with LoaderClient(bench.address) as client:
            after = await prepared(client, "toy")
            assert component(after, "transformer").generation == component(before, "transformer").generation
            assert 0 < after.read_bytes < tensor_bytes(parts)
            for name, tensors in parts.items():
                with attach_component(bench, after, name) as arena:
                    holds(arena, tensors, matrices(tensors))

    with bench.loader("--max-fill-rate", "1MB", "--fill-threads", "2") as process:
        before = asyncio.run(begin())
        process.kill()
        process.wait()
    with bench.loader():
        asyncio.run(end(before))


def test_a_changed_type_is_a_new_generation_at_the_reload(bench: Workbench) -> None:
    """Who maps the old one keeps it; a rule that cannot be used changes nothing."""
    tensors = bench.add_model("toy")["transformer"]

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            plain = await prepared(client, "toy")
            mapped = attach_component(bench, plain, "transformer")
            bench.options["toy"] = 'type = "q4_0"'
            bench.write_models()
            assert list((await client.reload()).changed) == ["toy"]
            packed = await prepared(client, "toy")
            assert component(packed, "transformer").generation != component(plain, "transformer").generation
            with attach_component(bench, packed, "transformer") as arena:
                holds(arena, tensors, matrices(tensors, "Q4_0"))
            holds(mapped, tensors, {})
            mapped.close()

            now = component(packed, "transformer").arena
            bench.options["toy"] = 'type = "q9"'
            bench.write_models()
            await refused(client.reload(), errors.BadConfig, "nothing was changed")
            assert component(await prepared(client, "toy"), "transformer").arena == now

    with bench.loader():
        asyncio.run(use())


def test_a_models_toml_is_inspected_as_it_will_be_in_memory(
    bench: Workbench, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is served: types and bytes by component; a model that cannot be served says why."""
    bench.add_model("toy")
    bench.add_model("bad", seed=2)
    bench.options |= {"toy": Q8, "bad": '[models.bad.types]\n"typo" = "q8_0"'}

    assert inspection.run(Inspect((bench.write_models(),), as_json=True)) == 1
    bad, toy = json.loads(capsys.readouterr().out)
    assert "no tensor's name has 'typo'" in bad["reason"]
    types = toy["components"]["transformer"]["types"]
    assert types["Q8_0"] == {"count": 6, "size_bytes": 6 * 64 * 64 // 32 * 34}
    assert types.keys() == {"Q8_0", "U8", "F32"}
