"""A contact sheet: a PNG grid of tiles, to see at a glance what a data set holds or what a recipe makes of it.

In comes a shard set, a tar of images, a folder of images (its sub-folders are the labels), a single image, or a recipe.
Which tiles are shown depends on the set alone: classes in equal parts, and within a class evenly spread over the set.

Command: ``tilefleet show SHARDS_OR_IMAGES [-o grid.png]``
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from cluster import storage
from configs.errors import TilefleetError, UsageError
from configs.schema import Recipe
from training.augment import augment, require_colours
from training.cache import EncodedTiles
from training.decode import decode_image, picture
from training.encoded import Bands, TileError
from training.images import Entry, list_images
from training.sampler import Epoch, Positions, Sampler
from training.shards import INDEX, TileReader, load_index

FRAME = 128
"""Side of the square that holds one tile, in pixels."""

_GAP = 10
_LINE = 16
INK, ALARM, _PAPER, _MUTED = "#1b2a3a", "#b3261e", "#ffffff", "#eef1f4"


@dataclass(frozen=True)
class Frame:
    """One square of a sheet: a picture of :data:`FRAME` pixels, and the lines of words below it in their colour."""

    picture: Image.Image
    captions: tuple[str, ...]
    colour: str = INK


def contact_sheet(location: str, out: str, *, tiles: int = 64, split: str | None = None) -> int:
    """Write a PNG of at most ``tiles`` tiles of ``location`` to ``out``; returns how many it shows.

    ``split`` limits a shard set to one of its splits. A tile that cannot be decoded becomes a frame with the
    reason in it. Raises :class:`UsageError` where there is no such path or split, :class:`TilefleetError` where there
    are no images.
    """
    _check(out, tiles=tiles)
    entries = list_images(location, split)
    bands = load_index(location).bands if storage.exists(storage.join(location, INDEX)) else None
    chosen = [entries[i] for i in choose([entry.group for entry in entries], tiles)]
    frames = [Frame(_picture(entry, bands), (entry.caption,)) for entry in chosen]
    save(out, draw(frames, columns=math.ceil(math.sqrt(len(frames)))))
    return len(chosen)


def augmented_sheet(recipe: Recipe, out: str, *, tiles: int = 8, variants: int = 8) -> int:
    """Write a PNG of what ``recipe`` does to training tiles to ``out``; returns how many tiles it shows.

    A row for each tile: as it is, then as the model is shown it in each of the first ``variants`` epochs. Raises
    :class:`UsageError` where there are no such shards, or no colours in them for the recipe to change,
    :class:`TilefleetError` where a tile is damaged.
    """
    _check(out, tiles=tiles, variants=variants)
    index, reader = load_index(recipe.shards), TileReader(recipe.shards, "train")
    require_colours(recipe.augment, index.channels)
    chosen = np.array(choose([index.classes[label] for label in reader.labels], tiles), dtype=np.int64)
    if not len(chosen):
        raise TilefleetError(f"{recipe.shards}: no tiles in split 'train'")
    pixels = EncodedTiles(reader, index.tile_size, room=0).load(chosen)
    columns = [pixels]
    for epoch in range(variants):
        keys = _training_keys(Sampler.of(recipe, index).epoch(epoch), chosen)
        columns.append(augment(pixels, keys, recipe.augment))
    names = [index.classes[label] for label in reader.labels[chosen]]
    frames = [
        Frame(framed(column[row]), (f"epoch {epoch}" if epoch else name,))
        for row, name in enumerate(names)
        for epoch, column in enumerate(columns)
    ]
    save(out, draw(frames, len(columns)))
    return len(chosen)


def choose(groups: Sequence[str], wanted: int) -> list[int]:
    """Positions of ``wanted`` tiles (or of all, if fewer), sorted by group.

    Groups get equal parts as far as they have tiles for it, and a group's tiles are evenly spread over its positions.
    """
    members: dict[str, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    quotas = dict.fromkeys(sorted(members), 0)
    left = min(wanted, len(groups))
    while left:
        for group in [g for g in quotas if quotas[g] < len(members[g])][:left]:
            quotas[group] += 1
            left -= 1
    return [members[g][i * len(members[g]) // quota] for g, quota in quotas.items() for i in range(quota)]


def _training_keys(epoch: Epoch, positions: Positions) -> Tensor:
    """The keys that the tiles at ``positions`` (int64 ``[n]``) have in training in ``epoch``: int64 ``[n]``."""
    turns = np.argsort(epoch.order)[positions]
    size = epoch.sampler.batch_size
    keys = np.array([epoch.share(turn // size, 0, 1)[1][turn % size] for turn in turns.tolist()])
    return torch.from_numpy(keys.view(np.int64))


def _check(out: str, **counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"{name}: at least 1 is needed to show something, not {count}")
    if storage.is_dir(out):
        raise UsageError(f"{out}: is a folder; name the PNG file to write")


def draw(frames: Sequence[Frame], columns: int, title: str = "") -> Image.Image:
    """A sheet of ``frames`` in rows of ``columns``, below its title where it has one."""
    rows, lines = math.ceil(len(frames) / columns), max((len(frame.captions) for frame in frames), default=1)
    width, height, above = FRAME + _GAP, FRAME + lines * _LINE + _GAP, _GAP + (2 * _LINE if title else 0)
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + above), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, _GAP), title, INK, _font(16))
    for number, frame in enumerate(frames):
        left, top = _GAP + number % columns * width, above + number // columns * height
        sheet.paste(frame.picture, (left, top))
        for line, caption in enumerate(frame.captions):
            place = (left + FRAME / 2, top + FRAME + 3 + line * _LINE)
            pen.text(place, _shorten(caption), frame.colour, _font(), anchor="ma")
    return sheet


def save(out: str, sheet: Image.Image) -> None:
    """Write a sheet as a PNG."""
    stream = io.BytesIO()
    sheet.save(stream, format="PNG")
    storage.write_bytes(out, stream.getvalue())


def _picture(entry: Entry, bands: Bands | None) -> Image.Image:
    """The tile, or the reason why it cannot be decoded, in a square of :data:`FRAME` pixels."""
    try:
        return framed(decode_image(entry.read(), bands))
    except TileError as error:
        return _notice(str(error))


def framed(pixels: Tensor) -> Image.Image:
    """uint8 ``[channels, height, width]`` in a square of :data:`FRAME` pixels, its proportions kept."""
    return ImageOps.pad(picture(pixels), (FRAME, FRAME), Image.Resampling.BICUBIC, color=_MUTED)


def _notice(reason: str) -> Image.Image:
    image = Image.new("RGB", (FRAME, FRAME), _MUTED)
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, FRAME - 1, FRAME - 1), outline=ALARM, width=2)
    lines = "\n".join(textwrap.wrap(reason, width=16, max_lines=6, placeholder=" …"))
    pen.multiline_text((FRAME / 2, FRAME / 2), lines, ALARM, _font(), anchor="mm", align="center")
    return image


@cache
def _font(size: int = 11) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)


def _shorten(text: str) -> str:
    """``text`` on one line of the frame's width, its middle left out where it is longer: endings tell files apart."""
    text = " ".join(text.split())
    kept = len(text)
    shortened = text
    while _font().getlength(shortened) > FRAME and kept > 2:
        kept -= 1
        shortened = f"{text[: kept // 2]}…{text[-(kept - kept // 2) :]}"
    return shortened
