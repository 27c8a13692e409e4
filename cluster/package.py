"""What leaves this machine with a job: our own modules, configs and pages, and nothing else.

The files are named one by one, so no data, run, token or ``.venv`` can slip in, wherever the project lies. The same
files make the same package, which Ray then finds uploaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from configs.errors import UsageError

ROOT = Path(__file__).parent.parent

PATTERNS = (
    "tilefleet.py",
    *("cluster/*.py", "training/*.py"),
    *("configs/*.py", "configs/*.yaml"),
    *("inference/*.py", "inference/*.html"),
)

LIMIT = 4 << 20
"""Bytes of a package; ours have a tenth of that."""


def stage(folder: str | Path, files: Mapping[str, str]) -> int:
    """Fill the empty ``folder`` with the package and ``files`` (name -> text); its bytes.

    Raises :class:`UsageError` where it is more than :data:`LIMIT`.
    """
    target, size = Path(folder), 0
    for source in sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern)):
        copy = target / source.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, copy)
        size += copy.stat().st_size
    for name, text in files.items():
        (target / name).write_text(text)
        size += len(text.encode())
    if size > LIMIT:
        largest = max((path for path in target.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        name = largest.relative_to(target).as_posix()
        raise UsageError(f"{ROOT / name}: makes the package of the job {size >> 20} MiB, over {LIMIT >> 20}; move it")
    return size
