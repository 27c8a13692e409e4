"""TIFFs of any bands and samples become the channels asked for, or one clear reason; nothing else is opened."""

from __future__ import annotations

import base64
import io
import socket
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from configs.errors import UsageError
from tests.geotiff import geotiff
from training.decode import check_image, decode_image, decode_tiles, image_extension, picture
from training.encoded import Bands, TileError, channels, parse_bands, tiff_bands
from training.rasters import MAX_RASTER_BYTES

SIDE = 24
REFLECTANCE = np.random.default_rng(0).integers(0, 10_000, (13, SIDE, SIDE), dtype=np.uint16)
SENTINEL = Bands(numbers=(4, 3, 2, 8), highest=3000)
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deflate": {"compress": "deflate"},
    "deflate, predictor": {"compress": "deflate", "predictor": 2},
    "lzw, predictor": {"compress": "lzw", "predictor": 2},
    "zstd": {"compress": "zstd"},
    "packbits": {"compress": "packbits"},
    "tiled": {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "lzw"},
    "planar": {"interleave": "band", "compress": "deflate"},
    "planar, tiled": {"interleave": "band", "tiled": True, "blockxsize": 16, "blockysize": 16},
    "one row a strip": {"blockysize": 1},
    "big-endian": {"ENDIANNESS": "BIG"},
    "BigTIFF": {"BIGTIFF": "YES", "compress": "deflate"},
    "big-endian BigTIFF": {"BIGTIFF": "YES", "ENDIANNESS": "BIG"},
}


def expected(samples: NDArray[Any], bands: Bands) -> NDArray[np.uint8]:
    chosen = samples[[number - 1 for number in bands.numbers]].astype(np.float64)
    span = bands.highest - bands.lowest
    return np.rint(np.clip((chosen - bands.lowest) / span, 0, 1) * 255).astype(np.uint8)


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bands_come_in_the_order_asked_for_from_any_layout(layout: str) -> None:
    data = geotiff(REFLECTANCE, **LAYOUTS[layout])
    found = decode_image(data, SENTINEL)
    assert (found.dtype, found.shape) == (torch.uint8, (4, SIDE, SIDE))
    assert np.array_equal(found.numpy(), expected(REFLECTANCE, SENTINEL))
    assert (tiff_bands(data), image_extension(data)) == (13, "tif")


@pytest.mark.parametrize("kind", ["u1", "u2", "u4", "i1", "i2", "i4", "f4", "f8", "u8", "i8"])
@pytest.mark.parametrize("bands", [Bands(numbers=(2, 1), lowest=-50, highest=90), Bands(numbers=(1,), highest=255)])
def test_any_real_samples_are_scaled_clipped_and_rounded(kind: str, bands: Bands) -> None:
    least, most = (-128, 127) if kind[0] in "if" else (0, 255)
    samples = np.random.default_rng(1).integers(least, most, (2, SIDE, SIDE), endpoint=True).astype(kind)
    assert np.array_equal(decode_image(geotiff(samples), bands).numpy(), expected(samples, bands))


def test_the_ends_of_wide_samples_are_not_lost() -> None:
    samples = np.array([[[0, 1, 2**31 - 1, 2**32 - 1]]], np.uint32)
    assert decode_image(geotiff(samples), Bands(numbers=(1,), highest=2**32 - 1)).flatten().tolist() == [0, 0, 127, 255]


def test_complex_samples_are_refused_by_name() -> None:
    with pytest.raises(TileError, match="pixel format not supported: complex numbers"):
        decode_image(geotiff(np.ones((2, 4, 4), np.complex64)), Bands(numbers=(1,), highest=1))


@pytest.mark.parametrize(("kind", "nodata"), [("f4", -9999.25), ("f4", 0.1), ("u2", 65535), ("i2", -32768), ("u8", 7)])
def test_no_data_becomes_zero(kind: str, nodata: float) -> None:
    samples = np.full((2, 4, 4), 100, kind)
    samples[0, 1, 2] = nodata
    found = decode_image(geotiff(samples, nodata=nodata), Bands(numbers=(1, 2), lowest=-70_000, highest=100))
    assert found[0, 1, 2] == 0
    assert (found == 255).sum() == 31


def test_what_is_no_finite_number_becomes_zero() -> None:
    samples = np.array([[[np.nan, np.inf, -np.inf, 1.0]]], np.float32)
    assert decode_image(geotiff(samples), Bands(numbers=(1,), highest=1)).flatten().tolist() == [0, 0, 0, 255]


def test_a_band_that_is_missing_is_named() -> None:
    four = geotiff(REFLECTANCE[:4])
    with pytest.raises(TileError, match=r"^band 13 asked for, the image has 4$"):
        decode_image(four, Bands(numbers=(1, 13), highest=1))
    with pytest.raises(TileError, match=r"^band 8 asked for, the image has 3$"):
        decode_image(encode(Image.new("RGB", (4, 4)), "PNG"), SENTINEL)


def test_without_bands_an_image_that_is_not_rgb_says_how_many_it_has_and_what_to_do() -> None:
    for data in (geotiff(REFLECTANCE), geotiff(REFLECTANCE, BIGTIFF="YES", ENDIANNESS="BIG")):
        with pytest.raises(TileError, match=r"^not an RGB image: 13 bands; .*pack --bands"):
            decode_image(data)
        check_image(data)
        with pytest.raises(TileError, match="cut short or damaged"):
            check_image(data[: len(data) // 2])


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP"])
def test_the_bands_of_an_rgb_image_are_red_green_and_blue(form: str) -> None:
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    data = encode(image, form)
    plain = Bands(numbers=(1, 2, 3), highest=255)
    assert torch.equal(decode_image(data, plain), decode_image(data))
    assert torch.equal(decode_tiles([data], 16, plain)[0], decode_tiles([data], 16)[0])


@pytest.mark.parametrize(
    ("mode", "form", "count"),
    [("L", "PNG", 1), ("LA", "PNG", 2), ("RGBA", "PNG", 4), ("RGBA", "WEBP", 4), ("CMYK", "JPEG", 4), ("L", "JPEG", 1)],
)
def test_other_images_give_the_bands_of_their_own_mode(mode: str, form: str, count: int) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (SIDE, SIDE, count), dtype=np.uint8)
    lossless = {"lossless": True, "exact": True} if form == "WEBP" else {}
    data = encode(Image.fromarray(noise.squeeze(), mode), form, **lossless)
    own = np.atleast_3d(np.asarray(Image.open(io.BytesIO(data)))).transpose(2, 0, 1)
    assert len(own) == count
    backwards = Bands(numbers=tuple(range(count, 0, -1)), highest=255)
    assert np.array_equal(decode_image(data, backwards).numpy(), own[::-1])
    assert form == "JPEG" or np.array_equal(own, noise.transpose(2, 0, 1))


def test_sixteen_bit_grey_and_palettes_have_bands_too() -> None:
    deep = REFLECTANCE[0]
    found = decode_image(encode(Image.fromarray(deep), "PNG"), Bands(numbers=(1,), highest=3000))
    assert np.array_equal(found.numpy(), expected(deep[None], Bands(numbers=(1,), highest=3000)))
    flat = Image.new("RGB", (4, 4), (10, 20, 30)).quantize()
    assert decode_image(encode(flat, "PNG"), Bands(numbers=(3, 1), highest=255))[:, 0, 0].tolist() == [30, 10]


def test_a_batch_of_bands_keeps_its_good_tiles_and_is_resized() -> None:
    good, small = geotiff(REFLECTANCE), geotiff(REFLECTANCE[:, :8, :8])
    pixels, errors = decode_tiles([good, good[:-500], geotiff(REFLECTANCE[:4]), b"", small], SIDE, SENTINEL)
    lacking = "band 8 asked for, the image has 4"
    assert errors == [None, "image is cut short or damaged", lacking, "empty file", None]
    assert np.array_equal(pixels[0].numpy(), expected(REFLECTANCE, SENTINEL))
    assert not pixels[1:4].any()
    assert pixels[4].any()


@pytest.mark.parametrize("layout", ["plain", "deflate, predictor", "tiled", "planar", "BigTIFF"])
def test_a_tiff_cut_anywhere_is_refused(layout: str) -> None:
    whole = geotiff(REFLECTANCE[:, :16, :16], **LAYOUTS[layout])
    everything = Bands(numbers=tuple(range(1, 14)), highest=10_000)
    right, causes = decode_image(whole, everything), set[str]()
    for length in range(0, len(whole), 7):
        try:
            found = decode_image(whole[:length], everything)
        except TileError as error:
            causes.add(str(error))
        else:
            assert torch.equal(found, right), f"{length} of {len(whole)} bytes gave other pixels"
    assert causes <= {"empty file", "not an image", "image is cut short or damaged"}


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(LAYOUTS)), st.data())
def test_damage_of_any_kind_raises_nothing_but_a_tile_error(layout: str, data: st.DataObject) -> None:
    broken = bytearray(geotiff(REFLECTANCE[:5], **LAYOUTS[layout]))
    for _ in range(data.draw(st.integers(1, 20))):
        place = data.draw(st.one_of(st.integers(0, 400), st.integers(0, len(broken) - 1)))
        broken[min(place, len(broken) - 1)] = data.draw(st.integers(0, 255))
    for bands in (Bands(numbers=(5, 1), highest=3000), None):
        try:
            image = decode_image(bytes(broken), bands)
        except TileError:
            continue
        assert (image.dtype, image.shape[0]) == (torch.uint8, channels(bands))


@given(st.binary(max_size=64))
def test_any_bytes_have_bands_or_none(tail: bytes) -> None:
    for start in (b"", b"II*\0", b"MM\0*", b"II+\0\x08\0\0\0", b"MM\0+\0\x08\0\0"):
        count = tiff_bands(start + tail)
        assert count is None or count >= 0


def tiff_that_claims(width: int, height: int, bands: int, rows: int | None = None, tile: int | None = None) -> bytes:
    """A TIFF without data, whose tags say these sizes."""
    tags = {256: width, 257: height, 258: 16, 259: 8, 262: 1, 277: bands, 284: 1, 339: 1}
    tags |= {322: tile, 323: tile, 324: 8, 325: 8} if tile else {273: 8, 278: rows or height, 279: 8}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


BOMBS = [
    (tiff_that_claims(60_000, 60_000, 4), "image over the pixel limit: 60000x60000"),
    (tiff_that_claims(4096, 4096, 60), "image over the byte limit: 4096x4096 of 60 bands"),
    (tiff_that_claims(90, 64, 65_535), "image over the byte limit: 90x64 of 65535 bands in blocks of 90x64"),
    (
        tiff_that_claims(64, 64, 13, tile=1 << 14),
        "image over the byte limit: 64x64 of 13 bands in blocks of 16384x16384",
    ),
    (tiff_that_claims(0, 64, 13), "image is cut short or damaged"),
    (tiff_that_claims(1, 1, 65_535), "image is cut short or damaged"),
]
OUT_OF_THE_WAY = """
import base64, resource, sys
from training.decode import decode_tiles
from training.encoded import Bands
for line in sys.stdin:
    [error] = decode_tiles([base64.b64decode(line)], 8, Bands(numbers=(1,), highest=255))[1]
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, error)
"""


def test_bombs_are_refused_before_they_take_memory() -> None:
    lines = [base64.b64encode(data) for data in (geotiff(REFLECTANCE), *(data for data, _ in BOMBS))]
    command = [sys.executable, "-c", OUT_OF_THE_WAY]
    result = subprocess.run(command, input=b"\n".join(lines), capture_output=True, check=True)
    (before, _), *said = (line.split(" ", 1) for line in result.stdout.decode().splitlines())
    for (taken, error), (_, reason) in zip(said, BOMBS, strict=True):
        assert error.startswith(reason)
        assert (int(taken) - int(before)) * 1024 < MAX_RASTER_BYTES / 8, reason
    assert not result.stderr


def test_pages_are_refused_and_overviews_and_masks_are_not_pages(tmp_path: Path) -> None:
    pages = [Image.fromarray(REFLECTANCE[0].astype(np.uint8))] * 3
    several = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    with pytest.raises(TileError, match="animated or multi-page image: 3 frames"):
        decode_image(several, Bands(numbers=(1,), highest=255))
    (tmp_path / "one.tif").write_bytes(geotiff(REFLECTANCE))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(tmp_path / "one.tif", "r+") as raster:
        raster.build_overviews([2, 4])
        raster.write_mask(REFLECTANCE[0] > 3000)
    found = decode_image((tmp_path / "one.tif").read_bytes(), SENTINEL)
    assert np.array_equal(found.numpy(), expected(REFLECTANCE, SENTINEL))


@pytest.mark.parametrize("domain", ["OVERVIEWS", "SUBDATASETS", "GEOLOCATION", ""])
def test_no_name_in_a_file_is_followed(domain: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        elsewhere = f"/vsicurl/http://127.0.0.1:{server.getsockname()[1]}/other.tif"
        data = geotiff(REFLECTANCE, {domain: {"OVERVIEW_FILE": elsewhere, "SUBDATASET_1_NAME": elsewhere}})
        assert elsewhere.encode() in data
        assert decode_tiles([data], SIDE, SENTINEL)[1] == [None]
        with pytest.raises(BlockingIOError):  # nobody has knocked
            server.accept()


def test_other_formats_of_gdal_are_not_read() -> None:
    vrt = b"<VRTDataset rasterXSize='4' rasterYSize='4'><VRTRasterBand dataType='Byte' band='1'/></VRTDataset>"
    for data in (vrt, b"II*\0" + vrt, b"GIF89a" + vrt):
        with pytest.raises(TileError, match=r"not an image|cut short or damaged"):
            decode_image(data, Bands(numbers=(1,), highest=255))


def test_nothing_is_said_on_stderr_and_rasterio_is_loaded_only_for_tiffs_of_bands() -> None:
    damaged = bytearray(geotiff(REFLECTANCE, compress="deflate"))
    damaged[2000:2100] = bytes(100)
    damaged[300:320] = b"\xff" * 20
    xml = geotiff(REFLECTANCE, {"": {"name": "value"}}).replace(b"<Item name", b"\xff<Item \xff<")
    program = "import logging; logging.basicConfig(level=logging.INFO)\n" + OUT_OF_THE_WAY
    program += "print('rasterio' in sys.modules)\n"
    png = encode(Image.new("RGB", (4, 4)), "PNG")
    cut = [bytes(damaged[:length]) for length in range(len(damaged), 0, -501)]
    for files, loaded in (([png], "False"), ([xml, *cut], "True")):
        lines = b"\n".join(map(base64.b64encode, files))
        result = subprocess.run([sys.executable, "-c", program], input=lines, capture_output=True, check=True)
        assert (result.stdout.decode().split()[-1], result.stderr) == (loaded, b"")


def test_many_threads_decode_as_one_does() -> None:
    tiles = [geotiff(REFLECTANCE[:, : 8 + number % 9, :8]) for number in range(40)]
    alone = [decode_image(data, SENTINEL) for data in tiles]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: decode_image(data, SENTINEL), tiles * 5))
    assert all(torch.equal(found, right) for found, right in zip(together, alone * 5, strict=True))


@pytest.mark.parametrize(
    ("numbers", "span"),
    [
        ("4,3", None),
        (None, "0,1"),
        ("0,1", "0,1"),
        ("-1", "0,1"),
        ("1.5", "0,1"),
        ("red", "0,1"),
        ("", "0,1"),
        (",".join(["1"] * 65), "0,1"),
        ("1", "1,1"),
        ("1", "2,1"),
        ("1", "3000"),
        ("1", "0,1,2"),
        ("1", "0,inf"),
        ("1", "nan,1"),
        ("1", "-1e308,1e308"),
    ],
)
def test_bands_that_make_no_sense_are_refused(numbers: str | None, span: str | None) -> None:
    with pytest.raises(UsageError, match=r"--bands|--range") as refused:
        parse_bands(numbers, span)
    assert "\n" not in str(refused.value)


def test_bands_are_read_from_the_command_line_and_survive_json() -> None:
    assert parse_bands(None, None) is None
    bands = parse_bands("4,3,2,8", "0,3000")
    assert bands == SENTINEL
    assert bands.model_dump_json() == Bands.model_validate_json(bands.model_dump_json()).model_dump_json()
    assert (channels(bands), channels(None)) == (4, 3)


def test_a_picture_shows_three_bands_in_colour_and_fewer_in_grey() -> None:
    pixels = torch.arange(5 * 4, dtype=torch.uint8).view(5, 2, 2)
    for count, shown in ((5, [0, 4, 8]), (3, [0, 4, 8]), (2, [0, 0, 0]), (1, [0, 0, 0])):
        image = picture(pixels[:count])
        assert (image.mode, image.size, list(image.getpixel((0, 0)))) == ("RGB", (2, 2), shown)
