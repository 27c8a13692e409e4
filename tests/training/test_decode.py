"""Any image becomes RGB pixels or one clear reason; nothing that a file holds can raise anything else."""

from __future__ import annotations

import contextlib
import struct
import zlib
from io import BytesIO
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from training import decode
from training.decode import decode_image, decode_tiles, image_extension, resize
from training.encoded import TileError, is_image_name, jpeg_shape

SIDE = 16
NOISE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
SMOOTH = np.repeat(np.linspace(0, 255, SIDE, dtype=np.uint8)[:, None, None], SIDE, axis=1).repeat(3, axis=2)
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif", "BMP": "bmp", "GIF": "gif", "JPEG2000": "jp2"}


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pillow(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(SMOOTH).convert(mode)


def pixels(data: bytes) -> np.ndarray:
    return decode_image(data).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("form", FORMATS)
def test_each_format_decodes_and_is_known_by_its_content(form: str) -> None:
    data = encode(pillow(), form)
    image = decode_image(data)
    assert (image.shape, image.dtype) == ((3, SIDE, SIDE), torch.uint8)
    assert abs(pixels(data).astype(int) - SMOOTH).max() <= 8
    assert image_extension(data) == FORMATS[form]


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_keep_every_pixel(form: str) -> None:
    assert np.array_equal(pixels(encode(Image.fromarray(NOISE), form)), NOISE)


@pytest.mark.parametrize(
    ("mode", "form"),
    [("L", "PNG"), ("L", "JPEG"), ("LA", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("CMYK", "TIFF")],
)
def test_grey_alpha_palette_and_cmyk_become_rgb(mode: str, form: str) -> None:
    data = encode(pillow(mode), form)
    assert abs(pixels(data).astype(int) - SMOOTH).max() <= 12


def test_a_palette_is_looked_up() -> None:
    assert np.array_equal(pixels(encode(pillow().quantize(), "PNG")), SMOOTH)


def test_a_bilevel_image_becomes_black_and_white() -> None:
    assert set(pixels(encode(pillow("1"), "PNG")).ravel().tolist()) == {0, 255}


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_samples_keep_their_high_byte(form: str) -> None:
    deep = NOISE[:, :, 0].astype(np.uint16) * 256 + 77
    found = pixels(encode(Image.fromarray(deep), form))
    assert np.array_equal(found, NOISE[:, :, :1].repeat(3, axis=2))


def test_float_samples_are_refused_by_name() -> None:
    with pytest.raises(TileError, match="floating point"):
        decode_image(encode(Image.fromarray(NOISE[:, :, 0].astype(np.float32)), "TIFF"))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_images_of_several_frames_are_refused(form: str) -> None:
    frames = [Image.fromarray(NOISE), Image.fromarray(SMOOTH), Image.fromarray(NOISE[::-1])]
    data = encode(frames[0], form, save_all=True, append_images=frames[1:])
    with pytest.raises(TileError, match="animated or multi-page image: 3 frames"):
        decode_image(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty file"), (b"text that is no image", "not an image"), (b"\xff\xd8", "cut short|not an image")],
)
def test_what_is_no_image_has_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(TileError, match=reason):
        decode_image(data)


def test_a_file_over_the_byte_limit_is_not_looked_at() -> None:
    with pytest.raises(TileError, match="over the limit"):
        decode_image(bytes(decode.MAX_ENCODED_BYTES + 1))


def png_that_claims(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def jpeg_that_claims(width: int, height: int) -> bytes:
    data = bytearray(encode(pillow(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("make", [png_that_claims, jpeg_that_claims])
@pytest.mark.parametrize(("width", "height"), [(4097, 4096), (60_000, 60_000)])
def test_an_image_over_the_pixel_limit_is_refused_before_it_is_decoded(make, width: int, height: int) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TileError, match="over the pixel limit"):
        decode_image(make(width, height))


@pytest.mark.parametrize("form", FORMATS)
def test_an_image_cut_anywhere_is_refused_or_whole(form: str) -> None:
    whole = encode(Image.fromarray(NOISE), form)
    for length in range(len(whole)):
        try:
            image = decode_image(whole[:length])
        except TileError:
            continue
        assert torch.equal(image, decode_image(whole)), f"{length} of {len(whole)} bytes gave other pixels"


@given(st.sampled_from(sorted(FORMATS)), st.data())
def test_damage_of_any_kind_raises_nothing_but_a_tile_error(form: str, data: st.DataObject) -> None:
    damaged = bytearray(encode(Image.fromarray(NOISE), form))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    for use in (decode_image, image_extension):
        with contextlib.suppress(TileError):
            use(bytes(damaged))


@given(st.binary(max_size=64))
def test_any_bytes_have_a_jpeg_shape_or_none(data: bytes) -> None:
    for candidate in (data, b"\xff\xd8" + data, b"\xff\xd8\xff" + data):
        shape = jpeg_shape(candidate)
        assert shape is None or len(shape) == 3


def test_a_jpeg_shape_is_read_from_its_header() -> None:
    wide = Image.fromarray(NOISE[:5])
    assert jpeg_shape(encode(wide, "JPEG")) == (5, SIDE, 3)
    assert jpeg_shape(encode(wide, "JPEG", progressive=True)) == (5, SIDE, 3)
    assert jpeg_shape(encode(wide.convert("L"), "JPEG")) == (5, SIDE, 1)
    assert jpeg_shape(encode(wide, "PNG")) is None


def test_a_batch_is_the_same_as_its_tiles_one_by_one() -> None:
    encoded = [encode(Image.fromarray(image), form) for image in (NOISE, SMOOTH) for form in ("JPEG", "PNG", "WEBP")]
    batch, errors = decode_tiles(encoded, SIDE)
    assert errors == [None] * 6
    assert torch.equal(batch, torch.stack([decode_image(data) for data in encoded]))


def test_a_damaged_tile_spoils_only_its_own_place_in_a_batch() -> None:
    good = encode(Image.fromarray(NOISE), "JPEG")
    batch, errors = decode_tiles([good, good[: len(good) // 2], b"", good], SIDE)
    assert errors == [None, "image is cut short or damaged", "empty file", None]
    assert torch.equal(batch[0], batch[3])
    assert not batch[1:3].any()


def test_tiles_of_another_size_are_resized_and_an_empty_batch_is_fine() -> None:
    batch, errors = decode_tiles([encode(Image.fromarray(SMOOTH), "PNG")], 8)
    assert (batch.shape, errors) == ((1, 3, 8, 8), [None])
    assert decode_tiles([], 8)[0].shape == (0, 3, 8, 8)
    image = torch.from_numpy(NOISE).permute(2, 0, 1)
    assert resize(image, SIDE) is image


@pytest.mark.parametrize("name", ["a.jpg", "A/b.JPEG", "./a.png", "x.tif", "x.jp2"])
def test_image_names(name: str) -> None:
    assert is_image_name(name)


@pytest.mark.parametrize("name", ["a.txt", ".a.jpg", "A/.b/c.jpg", "__MACOSX/a.jpg", "jpg", "a.jpg/readme"])
def test_other_names(name: str) -> None:
    assert not is_image_name(name)
    assert PurePosixPath(name)
