"""The scripts of bench/ with tiny shapes: they run, their last line has what it must have, and equalities hold.

Their figures mean nothing here.
"""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from bench.disk import cached_pages, drop_page_cache

ROOT = Path(__file__).resolve().parents[1]
MACHINE = {"script", "device", "torch", "diffusers", "transformers", "commit"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Z-Image folder as bench/checkpoint.py writes it, of tiny shapes."""
    from bench import checkpoint

    target = tmp_path_factory.mktemp("bench") / "z-image"
    list(checkpoint.write("z-image", target, tiny=True))
    return target


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a script's main with --tiny; what its last line says."""

    def call(script: str, *arguments: str | Path) -> dict[str, Any]:
        importlib.import_module(f"bench.{script}").main([*map(str, arguments), "--tiny"])
        line = capsys.readouterr().out.splitlines()[-1]
        figures: dict[str, Any] = json.loads(line)
        assert figures.keys() >= MACHINE
        assert figures["script"] == script
        return figures

    return call


# ---- checkpoints


@pytest.mark.parametrize("model", ["z-image", "sdxl"])
def test_a_checkpoint_is_a_pipeline_that_draws(model: str, run: Any, tmp_path: Path) -> None:
    figures = run("checkpoint", model, tmp_path / model)
    assert figures["bytes"] == sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a fox", width=64, height=64, num_inference_steps=2, output_type="pt").images[0]
    assert picture.isfinite().all()
    assert picture.std() > 0.01


def test_a_checkpoint_that_is_complete_is_left_alone_and_another_is_made_whole(folder: Path, run: Any) -> None:
    files = sorted(folder.rglob("*.safetensors"))
    before = [file.stat().st_mtime_ns for file in files]
    run("checkpoint", "z-image", folder)
    assert [file.stat().st_mtime_ns for file in files] == before
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[:100])
    run("checkpoint", "z-image", folder)
    assert files[0].read_bytes() == whole
    assert [file.stat().st_mtime_ns for file in files[1:]] == before[1:]


def test_shards_and_a_single_file_hold_the_same_tensors(folder: Path, run: Any, tmp_path: Path) -> None:
    run("checkpoint", "z-image", tmp_path, "--format", "single")
    (single,) = (tmp_path / "transformer").glob("*.safetensors")
    shards = [load_file(file) for file in (folder / "transformer").glob("*.safetensors")]
    assert len(shards) > 1
    together = {name: tensor for shard in shards for name, tensor in shard.items()}
    alone = load_file(single)
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[name], alone[name]) for name in alone)


def test_q8_0_blocks_have_the_deviation_of_the_weights_that_they_stand_for(run: Any, tmp_path: Path) -> None:
    run("checkpoint", "qwen-image-edit", tmp_path, "--format", "q8_0")
    assert not list((tmp_path / "transformer").glob("*.safetensors"))
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "qwen-image-edit-Q8_0.gguf").tensors}
    weight = tensors["transformer_blocks.0.attn.to_q.weight"]
    assert weight.tensor_type == gguf.GGMLQuantizationType.Q8_0
    values = gguf.quants.dequantize(weight.data, weight.tensor_type)
    assert values.shape == (64, 64)
    assert 0.018 < values.std() < 0.022
    assert tensors["transformer_blocks.0.attn.to_q.bias"].tensor_type == gguf.GGMLQuantizationType.F32


# ---- steps


def test_stream(folder: Path, run: Any) -> None:
    figures = run("stream", "--folder", folder)
    assert figures["all_bit_equal"] is True
    by_name = {(row["what"], row["riders"]): row for row in figures["rows"]}
    assert by_name.keys() >= {
        ("plain diffusers, resident", 1), ("plain diffusers, resident", 2), ("group offload, block level", 2),
        ("group offload, leaf level", 2), ("sequential offload", 2), ("ours, nothing resident", 1),
        ("ours, nothing resident", 2), ("ours, resident", 1), ("ours, resident", 2), ("ours, 50% resident", 2),
    }  # fmt: skip
    streamed = by_name["ours, nothing resident", 2]
    assert streamed["resident_share"] == 0
    assert 0.9 * streamed["step_bytes"] < streamed["counted_bytes"] <= streamed["step_bytes"]
    assert by_name["ours, resident", 2]["counted_bytes"] == 0
    assert 0.4 < by_name["ours, 50% resident", 2]["resident_share"] <= 0.5
    for key in ("streamed_to_floor", "streamed_to_group_block", "half_resident_to_group_block", "batch_of_two_ms"):
        assert figures[key] > 0


def test_sweep(folder: Path, run: Any) -> None:
    figures = run("sweep", "--folder", folder)
    assert [row["riders"] for row in figures["steps"]] == [1, 2, 4, 8]
    assert figures["riders_bit_equal"] is True
    assert figures["pictures_bit_equal"] is True
    # However many ride, a step's params come once.
    assert len({row["streamed_bytes"] for row in figures["steps"]}) == 1
    assert len(figures["requests"]) == 4
    for key in ("four_riders_to_one", "eight_riders_throughput", "all_to_slowest_alone"):
        assert figures[key] > 0


def test_timeline_of_another_model(run: Any, tmp_path: Path) -> None:
    figures = run("timeline", "--model", "sdxl", "--output", tmp_path / "t", "--steps", "2")
    assert figures["model"] == "sdxl"
    assert set(figures["requests"]) == {"1", "4"}


def test_timeline(folder: Path, run: Any, tmp_path: Path) -> None:
    figures = run("timeline", "--folder", folder, "--output", tmp_path / "t", "--steps", "2")
    for count in ("1", "4"):
        assert figures["requests"][count].keys() >= {"total_ms", "bus_busy_ms", "longest_stall_ms"}
        with Image.open(tmp_path / f"t-{count}.png") as picture:
            assert picture.width == 1800
        events = json.loads((tmp_path / f"t-{count}.json").read_text())["traceEvents"]
        lanes = {event["args"]["name"] for event in events if event["ph"] == "M"}
        assert lanes == {"bus", "stalls", *(f"rider {n + 1}" for n in range(int(count)))}
        computed = [e for e in events if e["ph"] == "X" and e["cat"].startswith("rider")]
        # One baton: no two riders compute at once.
        ends = sorted((e["ts"], e["ts"] + e["dur"]) for e in computed)
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(ends))
        layers = [e["name"] for e in computed if e["name"].startswith("transformer.layers.0")]
        assert len(layers) == 2 * int(count)  # steps


# ---- whole pipelines


def test_only_the_checkpoint_leaves_the_page_cache(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.cache is not None
    disk = pytestconfig.cache.mkdir("page-cache")  # beside the sources: /tmp may be in memory
    dropped, kept = disk / "checkpoint" / "vae" / "weights", disk / "library"
    dropped.parent.mkdir(parents=True, exist_ok=True)
    for file in (dropped, kept):
        file.write_bytes(bytes(1_000_000))
    assert cached_pages(dropped) == cached_pages(kept) > 0

    assert drop_page_cache(disk / "checkpoint")
    assert cached_pages(dropped) == 0
    assert cached_pages(kept) > 0


def test_files_in_memory_are_not_said_to_be_dropped() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        (Path(memory) / "weights").write_bytes(bytes(1_000_000))
        assert not drop_page_cache(Path(memory))


def test_generate(folder: Path, run: Any) -> None:
    figures = run("generate", "--folder", folder)
    assert figures["bit_equal_to_plain"] is True
    assert figures["four_clients_bit_equal"] is True
    assert figures["same_prompt_encodes"] is False
    assert figures["text_encoder_bytes"] > 0
    for key in ("warm_to_group_offload", "cold_to_limit", "eager_rate_to_disk_rate"):
        assert figures[key] > 0


def test_budgets(folder: Path, run: Any) -> None:
    figures = run("generate", "--folder", folder, "--budgets", "0", "2")
    refused, least, unlimited = figures["budgets"]
    assert refused["least_gib"] == least["max_vram_gib"] == "2.01"  # 2 are for work
    assert figures["never_exceeded"] is True
    assert figures["refused"] == ["2"]
    assert figures["least_works"] is True
    for row in (least, unlimited):
        assert row["two_pictures_s"] > 0


def test_replicas(folder: Path, run: Any) -> None:
    rows = run("replicas", "--folder", folder, "--count", "2")["replicas"]
    assert [row["samplers"] for row in rows] == [1, 2]
    for row in rows:
        assert row["within_limit"] is True
        assert row["same_picture"] is True
        assert 0 < row["attached_s"] < row["sweep_begins_s"] < row["sweep_ends_s"] < row["first_step_ends_s"]


def test_fill_methods(run: Any) -> None:
    """Every way fills, but for the one that file systems refuse between each other."""
    rows = run("fill_methods", "--rounds", "1", "--target", "/dev/shm")["ways"]
    refused = {row["way"] for row in rows if row["to_plain"] is None}
    assert refused <= {"copy_file_range"}
    assert {row["from"] for row in rows if row["to_plain"]} == {"disk", "page cache"}


def test_provision(run: Any) -> None:
    rows = run("provision", "--threads", "2")["rows"]
    assert {"fallocate", "pwrite", "populate"} <= {row["way"] for row in rows}
    assert all(row["gb_s"] > 0 for row in rows)


def test_numa(run: Any) -> None:
    """Every placement, with its policy and all of the pages somewhere."""
    figures = run("numa")
    rows = {row["numa"]: row for row in figures["rows"]}
    assert rows.keys() == {"off", "interleave", *map(str, figures["nodes"])}
    assert rows["off"]["policy"] == "default"
    assert rows["interleave"]["policy"].startswith("interleave:")
    for node in figures["nodes"]:
        assert rows[str(node)]["policy"] == f"prefer:{node}"
    for row in rows.values():
        assert sum(row.get(f"node{node}", 0) for node in figures["nodes"]) == pytest.approx(1)


def test_fill(run: Any) -> None:
    figures = run("fill", "--rounds", "1")
    assert [row["from"] for row in figures["rounds"]] == ["disk", "page cache"]
    assert figures["memory_within_limit"] is True
    for row in figures["rounds"]:
        assert row["fill_to_plain"] > 0


def test_loader(run: Any) -> None:
    figures = run("loader", "--rest", "0.1")
    assert 0 < figures["restart_serving_s"] < figures["restart_verified_s"]
    assert figures["idle_own_mib"] > 0


def test_budget(run: Any) -> None:
    figures = run("budget", "--seconds", "1.5")
    assert figures["budget_kept"] is figures["leases_kept"] is figures["bytes_right"] is True
    assert figures["prepares"] > 3


def test_evict(run: Any) -> None:
    figures = run("evict")
    assert figures["locked"]["refused"] is True
    assert figures["without_lease"]["same_bytes"] is True
    for row in (figures["idle"]["after_eviction"], figures["without_lease"]["after_unmapping"]):
        assert row.keys() == {"memory", "tmpfs"}


def test_flag_check(run: Any) -> None:
    figures = run("flag_check")
    for key in ("empty_ns", "extent_ns", "gate_ns", "gate_first_ns"):
        assert figures[key] > 0


def test_unpack(run: Any) -> None:
    """Every packing; all of them are written."""
    figures = run("unpack")
    packings = [row["packing"] for row in figures["rows"]]
    assert {"Q8_0", "Q4_K", "IQ1_M", "NVFP4", "BF16", "F8_E4M3"} <= set(packings)
    assert len(set(packings)) == len(packings)
    assert all(row["gb_s"] > 0 and row["moved_to_copy"] > 0 for row in figures["rows"])


def test_abuse(run: Any) -> None:
    figures = run("abuse")
    assert figures["all_refused"] is True
    assert figures["over_memory"] == []
    assert len(figures["slowest"]) == len(figures["largest"]) == 5


def test_soak(folder: Path, run: Any) -> None:
    figures = run("soak", "--folder", folder, "--count", "24")
    assert figures["rerun_bit_equal"] is True
    assert figures["outcomes"].keys() == {"finish: finished", "cancel: cancelled"}
    assert sum(figures["outcomes"].values()) == 24
    assert figures["rerun_count"] == figures["outcomes"]["finish: finished"]
    assert [row["after"] for row in figures["at_rest"]] == [0, 6, 12, 18, 24]
    assert figures["threads_grew"] <= 8  # as many clients there are


def test_a_script_runs_from_the_command_line() -> None:
    """As its docstring says, without the repository on the path."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "checkpoint.py"), "--help"], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert "--format" in done.stdout


def test_packed(run: Any) -> None:
    """Each form draws streamed what it draws resident, and brings the bytes that its file has."""
    figures = run("packed")
    rows = figures["rows"]

    assert [(row["form"], row["riders"]) for row in rows] == [(f, n) for f in ("bf16", "q8_0", "q4_k") for n in (1, 2)]
    assert all(row["equals_resident"] for row in rows)
    assert figures.keys() >= {"q8_0_to_bf16", "q4_k_to_bf16"}


def test_shares(run: Any) -> None:
    """Pictures do not depend on what stays."""
    rows = run("shares")["rows"]
    assert [row["resident"] for row in rows] == [0.0, 0.5, "all"]
    assert all(row["bit_equal"] for row in rows)


def test_transcode(run: Any) -> None:
    """What is packed is the package's; a type of more bits loses less; fills are smaller."""
    figures = run("transcode", "--types", "q8_0", "q4_0", "--rounds", "1", "--threads", "2", "--pictures", "1")
    assert all(row["equal"] for row in figures["core"])
    plain, *packed = figures["fills"]
    assert all(row["memory"] < plain["memory"] and row["files_gb_s"] > 0 for row in packed)
    eight, four = figures["losses"]
    assert 0 < eight["weight_error"] < four["weight_error"] < 0.2
    assert eight["pixel_mean"] < four["pixel_mean"]


def test_edit(run: Any) -> None:
    """A whole edit within a budget; what is drawn again is the same."""
    figures = run("edit", "--takes", "1")["eager"]
    assert figures["same_again"] is True
    assert figures["streamed_bytes"] > 0
    assert figures["sweep_to_left"] <= 1.01
