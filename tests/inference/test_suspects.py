"""A tile that ends the process that decodes it is found, and only that one."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from inference.readers import Tile
from inference.suspects import find_deadly
from training.encoded import Bands

DEADLY = """
import os, signal, sys
import training.decode as decode

real = decode.decode_tiles

def decode_tiles(encoded, size, bands=None):
    for data in encoded:
        if data.startswith(b"segfault"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if data.startswith(b"leave"):
            os._exit(7)
        if data.startswith(b"bands") and bands is not None and bands.numbers == (4, 3):
            os._exit(9)
        if data.startswith(b"once") and not os.path.exists(os.environ["ONCE"]):
            open(os.environ["ONCE"], "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
    return real(encoded, size, bands)

decode.decode_tiles = decode_tiles
"""


def test_only_tiles_that_end_their_process_every_time_are_deadly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("ONCE", str(tmp_path / "once"))
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "JPEG")
    contents = [b"bands", b"segfault", b"once", None, b"leave", b"no image", stream.getvalue() * 100_000]
    tiles = [Tile(str(number), content, None) for number, content in enumerate(contents)]
    found = find_deadly(tiles, 16)
    assert found.keys() == {1, 4}
    assert found[1] == "ends the process that decodes it: SIGSEGV, tried 2 times"
    assert "exit code 7" in found[4]
    assert find_deadly(tiles[:1], 16, Bands(numbers=(4, 3), highest=1)).keys() == {0}
