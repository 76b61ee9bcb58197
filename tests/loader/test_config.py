"""models.toml and flags: what is read and what is refused in one sentence."""

from pathlib import Path

import pytest

from services.loader.config import Config, Upkeep, parse_args, parse_size
from services.loader.entries import ConfigError, ModelEntry, read_models


def test_folders_are_relative_to_the_file(tmp_path: Path) -> None:
    """Sorted by name; the variant is optional."""
    path = tmp_path / "models.toml"
    path.write_text('[models.b]\nfolder = "sub/b"\npin = true\n[models.a]\nfolder = "/abs/a"\nvariant = "fp16"\n')

    a, b = read_models(path)

    assert a == ModelEntry("a", Path("/abs/a"), "fp16", pin=False)
    assert b == ModelEntry("b", tmp_path / "sub/b", "", pin=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[models.toy\n", "no valid TOML"),
        ("", "no \\[models.NAME\\] table"),
        ("models = 1", "no \\[models.NAME\\] table"),
        ("[models.toy]\n", "models.toy needs folder"),
        ("[models.toy]\nfolder = 1\n", "models.toy needs folder"),
        (
            '[models.toy]\nfolder = "x"\nfolde = 1\n',
            "unknown key folde .known: checkpoint, family, files, folder, pin, tokenizer, type, types, variant.",
        ),
        ('[models.toy]\nfolder = "x"\npin = 1\n', "pin is true or false"),
        ('[models.toy]\nfolder = "x"\n[model.more]\n', "unknown key model "),
        ('[models.toy]\nfolder = "x"\nvariant = "a/b"\n', "variant is a word"),
        ('[models."../toy"]\nfolder = "x"\n', "a name is up to 64"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    """The message names the file, the model and the key."""
    path = tmp_path / "models.toml"
    path.write_text(text)

    with pytest.raises(ConfigError, match=words) as caught:
        read_models(path)
    assert str(path) in str(caught.value)


def test_sizes_have_units() -> None:
    """Binary and decimal units, any case."""
    assert [parse_size(text) for text in ("4096", "64GiB", "1.5 mib", "100MB")] == [4096, 64 << 30, 3 << 19, 10**8]
    for text in ("", "-1", "1 XB", "GiB", "1e9"):
        with pytest.raises(ValueError, match="is no size"):
            parse_size(text)


def test_flags_become_one_frozen_config(tmp_path: Path) -> None:
    """Defaults are the documented ones; nonsense ends with argparse's own exit."""
    path = tmp_path / "models.toml"
    path.write_text('[models.a]\nfolder = "a"\n')
    flags = ["--models", str(path), "--listen", "unix:/run/l.sock"]

    config = parse_args([*flags, "--host-budget", "64GiB", "--max-fill-rate", "100MiB"])

    assert isinstance(config, Config)
    assert config.host_budget_bytes == 64 << 30
    assert config.max_fill_rate == 100 << 20
    assert config.arena_dir == Path("/dev/shm/headwater")
    assert config.extent_bytes == 64 << 20
    assert config.numa is None
    assert parse_args(["--check", "--arena-dir", "/dev/shm/x"]) == Upkeep("check", Path("/dev/shm/x"), 8)
    for bad in (
        ["--extent-bytes", "1000"],
        ["--fill-threads", "0"],
        ["--host-budget", "0"],
        ["--pressure-limit", "101"],
        ["--numa", "both"],
        ["--nonsense"],
    ):
        with pytest.raises(SystemExit):
            parse_args([*flags, *bad])
    for bad in ([], flags[:2], flags[2:], ["--check", "--clean"]):
        with pytest.raises(SystemExit):
            parse_args(bad)
