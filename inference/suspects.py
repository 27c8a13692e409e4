"""Tiles that end the process that decodes them: found by decoding each in a process of its own that may die.

In come the tiles of a chunk that has ended a worker, out come the places of those that did it, and how. The process is
this module, started for as many tiles as it survives.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

from inference.readers import Tile
from training.encoded import Bands

TRIES = 2
"""How often a tile may end a process before it is given up."""

_LENGTH_BYTES = 8


def find_deadly(tiles: Iterable[Tile], size: int, bands: Bands | None = None) -> dict[int, str]:
    """The places of ``tiles`` that end a process whenever they are decoded to ``size`` pixels, with the error of each.

    Each is tried :data:`TRIES` times. Raises :class:`RuntimeError` where no process can be started.
    """
    deadly: dict[int, str] = {}
    decoder = _Decoder(size, bands)
    try:
        for number, tile in enumerate(tiles):
            if tile.data is None:
                continue
            for _ in range(TRIES):
                if decoder.survives(tile.data):
                    break
                end = decoder.end()
                decoder = _Decoder(size, bands)
            else:
                deadly[number] = f"ends the process that decodes it: {end}, tried {TRIES} times"
    finally:
        decoder.end()
    return deadly


class _Decoder:
    """A process that decodes one tile after the other and says so after each."""

    def __init__(self, size: int, bands: Bands | None) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        chosen = [] if bands is None else [bands.model_dump_json()]
        command = [sys.executable, "-m", "inference.suspects", str(size), *chosen]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        if self._answer() != b"+":
            raise RuntimeError(f"a process to decode tiles in could not be started ({self.end()})")

    def survives(self, data: bytes) -> bool:
        """Whether the process is still there once it has decoded ``data``, whether to pixels or to an error."""
        assert self._process.stdin
        with suppress(BrokenPipeError):
            self._process.stdin.write(len(data).to_bytes(_LENGTH_BYTES) + data)
            self._process.stdin.flush()
        return self._answer() == b"+"

    def end(self) -> str:
        """End the process, if it still runs; how it ended, in words."""
        with suppress(BrokenPipeError):
            self._process.communicate()
        code = self._process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def _answer(self) -> bytes:
        assert self._process.stdout
        return self._process.stdout.read(1)


def main(size: int, bands: Bands | None, tiles: IO[bytes], answers: IO[bytes]) -> None:
    """Decode what comes from ``tiles``, each after its length, and answer each with a byte."""
    from training.decode import decode_tiles

    with suppress(OSError):  # where memory runs out, this process is to go before its parent
        Path("/proc/self/oom_score_adj").write_text("1000")
    answers.write(b"+")
    answers.flush()
    while head := tiles.read(_LENGTH_BYTES):
        decode_tiles([tiles.read(int.from_bytes(head))], size, bands)
        answers.write(b"+")
        answers.flush()


if __name__ == "__main__":
    chosen = Bands.model_validate_json(sys.argv[2]) if len(sys.argv) > 2 else None
    main(int(sys.argv[1]), chosen, sys.stdin.buffer, sys.stdout.buffer)
