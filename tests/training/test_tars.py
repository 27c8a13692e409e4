"""Headers that are read quickly are read as the standard library reads them."""

from __future__ import annotations

import io
import tarfile
import time
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training import tars
from training.tars import TarScan, scan_tar

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
NAMES = st.one_of(
    st.text("ab./é", min_size=1, max_size=8),
    st.sampled_from(["d/" * 60 + "n.jpg", "x" * 99, "y" * 100, "z" * 130 + ".jpg"]),
)
TYPES = [tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.CONTTYPE]


@st.composite
def tar(draw: st.DrawFn) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=draw(st.sampled_from(FORMATS)), errors="replace") as out:
        for _ in range(draw(st.integers(1, 6))):
            info = tarfile.TarInfo(draw(NAMES))
            info.type = draw(st.one_of(st.just(tarfile.REGTYPE), st.sampled_from(TYPES)))
            info.mtime = draw(st.sampled_from([0, 1.5, 1 << 31]))
            info.uid = draw(st.sampled_from([0, 1000, 1 << 22]))
            info.size = draw(st.integers(0, 1100)) if info.type == tarfile.REGTYPE else 0
            if out.format == tarfile.USTAR_FORMAT:
                info.uid, info.mtime, info.name = min(info.uid, 1000), int(info.mtime), info.name[-90:]
            out.addfile(info, io.BytesIO(bytes(info.size)))
    return buffer.getvalue()


def by_tarfile(data: bytes) -> TarScan:
    with patch.object(tars, "_plain_header", lambda block: None):
        return scan_tar(io.BytesIO(data))


@given(tar())
def test_a_whole_tar_is_read_as_tarfile_reads_it(data: bytes) -> None:
    scan = scan_tar(io.BytesIO(data))
    assert scan == by_tarfile(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as stock:
        members = [info for info in stock if not info.isdir()]
    assert [(m.name, m.offset, m.size) for m in scan.members] == [(i.name, i.offset_data, i.size) for i in members]


@given(tar(), st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=4), st.integers(0, 20000))
def test_a_damaged_tar_is_read_as_tarfile_reads_it(data: bytes, flips: list[tuple[int, int]], length: int) -> None:
    changed = bytearray(data)
    for place, value in flips:
        changed[place % len(changed)] = value
    assert scan_tar(io.BytesIO(changed[:length])) == by_tarfile(bytes(changed[:length]))


@given(tar(), st.integers(100, 511), st.sampled_from(b" \0/079\xff"))
def test_a_header_with_its_checksum_mended_is_judged_as_tarfile_judges_it(data: bytes, place: int, value: int) -> None:
    header = bytearray(data[:512])
    header[place] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    changed = bytes(header) + data[512:]
    assert scan_tar(io.BytesIO(changed)) == by_tarfile(changed)


def test_an_extended_header_cannot_ask_for_memory_or_time() -> None:
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 1 << 32
    assert "an extended header of 4294967296 bytes" in str(scan_tar(io.BytesIO(info.tobuf() + bytes(1024))).damage)
    info.size = 1 << 20
    began = time.monotonic()
    assert scan_tar(io.BytesIO(info.tobuf() + b"1" * info.size + bytes(1024))).damage
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_an_extended_header_of_negative_size_is_damage(kind: bytes) -> None:
    info = tarfile.TarInfo("././@PaxHeader")
    info.type = kind
    header = bytearray(info.tobuf())
    header[124:136] = (-5000).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    assert "an extended header of" in str(scan_tar(io.BytesIO(bytes(header) + bytes(1 << 20))).damage)


@pytest.mark.parametrize("form", FORMATS)
def test_folders_between_files_are_passed_over(form: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as out:
        for name in ("d", "d/e"):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE
            out.addfile(info)
            out.addfile(tarfile.TarInfo(f"{name}/a.jpg"))
    scan = scan_tar(io.BytesIO(buffer.getvalue()))
    assert [member.name for member in scan.members] == ["d/a.jpg", "d/e/a.jpg"]
    assert scan.damage is None
