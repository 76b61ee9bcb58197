"""Files of tests/abuse: each is refused in plain words."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.errors import BadCheckpoint
from services.params.checkpoint import read_checkpoint
from tests.abuse import gguf, safetensors

FILES = {"safetensors": safetensors.FILES, "gguf": gguf.FILES}


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind, files in FILES.items() for case in files])
def test_abuse_is_refused_in_plain_words(kind: str, case: str, tmp_path: Path) -> None:
    """BadCheckpoint that says what is wrong, and names the file but no folder."""
    raw, words = FILES[kind][case]
    path = tmp_path / f"model.{kind}"
    path.write_bytes(raw)

    with pytest.raises(BadCheckpoint) as caught:
        read_checkpoint(path)

    assert words in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert len(str(caught.value)) < 500
