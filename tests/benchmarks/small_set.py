"""A small pre-split folder of class folders, cut from a zip of class folders: material for the ``folder_cnn*`` recipes.

    python tests/benchmarks/small_set.py EuroSAT_RGB.zip OUT [CLASS ...]

takes the first 50 images of each class by name, 35 for ``train``, 10 for ``validate`` and 5 for ``test``: with five
classes the 175, 50 and 25 images of the published course set.
"""

from __future__ import annotations

import sys
import zipfile
from collections import defaultdict
from pathlib import Path, PurePosixPath

CLASSES = ("AnnualCrop", "HerbaceousVegetation", "Highway", "PermanentCrop", "River")
PARTS = {"train": 35, "validate": 10, "test": 5}


def main(source: str, out: str, *classes: str) -> None:
    """Write ``out/{train,validate,test}/CLASS/*``."""
    with zipfile.ZipFile(source) as archive:
        images: dict[str, list[str]] = defaultdict(list)
        for name in sorted(archive.namelist()):
            if not name.endswith("/"):
                images[PurePosixPath(name).parent.name].append(name)
        for label in classes or CLASSES:
            names = iter(images[label])
            for part, count in PARTS.items():
                folder = Path(out, part, label)
                folder.mkdir(parents=True)
                for _ in range(count):
                    name = next(names)
                    (folder / PurePosixPath(name).name).write_bytes(archive.read(name))


if __name__ == "__main__":
    main(*sys.argv[1:])
