"""What a run has learned, to see at a glance: the same tiles with what its model says before and after training.

In comes the recipe of a finished run, out goes ``predictions.png`` beside its bundle. The model before training is made
anew from the recipe.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from cluster import storage
from configs.errors import TilefleetError
from configs.schema import Recipe
from training.bundle import BundleInfo, judge_pixels, load_bundle
from training.cache import EncodedTiles
from training.judge import Judge
from training.learner import untrained
from training.shards import TileReader, load_index
from training.show import ALARM, FRAME, Frame, choose, draw, framed, save

TILES, COLUMNS = 32, 8
RIGHT = "#1c7a4a"


def prediction_grids(recipe: Recipe, out: str) -> str | None:
    """Write a PNG of :data:`TILES` tiles, twice, with what the model makes of them before and after training.

    They are of the val split (of test, where there is none), classes in equal parts. Returns why the first half is
    missing, which it is where the weights that training started from cannot be read any more. Raises
    :class:`TilefleetError` where a tile or the bundle is damaged.
    """
    index = load_index(recipe.shards)
    split = next((name for name in ("val", "test", "train") if index.tiles(name)), "val")
    reader = TileReader(recipe.shards, split)
    chosen = np.array(choose([index.classes[label] for label in reader.labels], TILES), dtype=np.int64)
    pixels = EncodedTiles(reader, index.tile_size, room=0).load(chosen)
    truth = reader.labels[chosen].tolist()
    trained, info = load_bundle(storage.join(recipe.run, "bundle"))
    sheets, missing = [], None
    try:
        start = Judge(untrained(recipe, index)).eval()
        sheets.append(_sheet("before training", start, info, pixels, truth))
    except TilefleetError as error:  # of the weights it started from: the rest is as good without
        missing = str(error)
    sheets.append(_sheet(f"after training, on tiles of {split}", trained, info, pixels, truth))
    whole = Image.new("RGB", (sheets[0].width, sum(sheet.height for sheet in sheets)))
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    save(out, whole)
    return missing


def _sheet(title: str, judge: Judge, info: BundleInfo, pixels: Tensor, truth: list[int]) -> Image.Image:
    """One grid for uint8 ``[N, channels, size, size]`` and the true classes ``[N]``."""
    judge.to(memory_format=torch.channels_last)
    confidence, predicted = torch.softmax(judge_pixels(judge, info, pixels, "cpu")[0], dim=1).max(dim=1)
    tiles = zip(pixels, truth, predicted.tolist(), confidence.tolist(), strict=True)
    frames = [_frame(tile, info.classes[true], info.classes[said], sure) for tile, true, said, sure in tiles]
    right = sum(true == said for true, said in zip(truth, predicted.tolist(), strict=True))
    return draw(frames, COLUMNS, f"{title}: {right} of {len(frames)} right")


def _frame(pixels: Tensor, truth: str, said: str, sure: float) -> Frame:
    right = said == truth
    colour = RIGHT if right else ALARM
    picture = framed(pixels)
    ImageDraw.Draw(picture).rectangle((0, 0, FRAME - 1, FRAME - 1), outline=colour, width=4)
    captions = (f"{'✓' if right else '✗'} {said} {sure:.0%}", f"is {truth}")
    return Frame(picture, captions, colour)
