"""Bad files in a data set: each is named, and none ends the run."""

from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from porting.evaluation.decoding import REFUSED, REMARKS, RefusedImageError, decode
from porting.evaluation.items import Item
from porting.evaluation.samples import load_images
from tests.evaluation.conftest import block_of

RNG = np.random.default_rng(0)
COLOURS = Image.fromarray(RNG.integers(0, 255, (20, 30, 3)).astype(np.uint8))


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(COLOURS, "JPEG", exif=exif)


def huge_png() -> bytes:
    """A file whose header states 60,000 x 60,000 pixels, with almost no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


USED = {
    "grayscale": saved(COLOURS.convert("L")),
    "palette": saved(COLOURS.convert("P")),
    "CMYK": saved(COLOURS.convert("CMYK"), "JPEG"),
    "16-bit": saved(Image.fromarray(RNG.integers(0, 65535, (20, 30)).astype(np.uint16))),
    "alpha": saved(COLOURS.convert("RGBA")),
    "EXIF-rotated": rotated(),
    "animated": saved(COLOURS, "GIF", save_all=True, append_images=[COLOURS.rotate(90)]),
}
LEFT_OUT = {
    "empty": b"",
    "not an image": b"this is text, whatever the name says",
    "truncated": saved(COLOURS, "JPEG")[:400],
    "too large": huge_png(),
}


@pytest.mark.parametrize("remark", USED)
def test_what_is_remarkable_is_used_and_said(remark: str) -> None:
    found = decode(USED[remark])
    assert remark in found.remarks
    assert found.image.mode == "RGB"
    assert found.image.size == (30, 20)
    assert remark in REMARKS


@pytest.mark.parametrize("cause", LEFT_OUT)
def test_what_is_broken_is_left_out_and_named(cause: str) -> None:
    with pytest.raises(RefusedImageError) as caught:
        decode(LEFT_OUT[cause])
    assert caught.value.cause == cause
    assert cause in REFUSED


def test_a_plain_photo_is_not_remarkable() -> None:
    assert decode(saved(COLOURS, "JPEG")).remarks == ()


def test_sixteen_bits_keep_their_contrast() -> None:
    values = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    found = np.asarray(decode(saved(Image.fromarray(values))).image)[..., 0]
    assert abs(found.astype(int) - values.astype(int) // 256).max() == 0


def cause_of(data: bytes) -> str:
    try:
        decode(data)
    except RefusedImageError as error:
        return error.cause
    return ""


@pytest.mark.parametrize("size", [0, 50, 200])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_no_beginning_of_a_file_is_more_than_left_out(form: str, size: int) -> None:
    whole = saved(COLOURS, form)
    assert cause_of(whole[:size]) in {*REFUSED, ""}


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF"])
def test_no_damaged_byte_is_more_than_left_out(form: str) -> None:
    whole = saved(COLOURS, form)
    rng = np.random.default_rng(3)
    for _ in range(40):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 4):
            damaged[place] = int(rng.integers(0, 256))
        assert cause_of(bytes(damaged)) in {*REFUSED, ""}


def test_a_block_goes_on_behind_what_is_broken() -> None:
    good = Item("good", 1, data=saved(COLOURS))
    missing = Item("missing", 1, "/nowhere/at/all.png")
    empty = Item("empty", 1, data=b"")

    def prepare(image: Image.Image) -> np.ndarray:
        return np.asarray(image, np.float32)

    batch = load_images(block_of(missing, good, empty), prepare)
    assert [sample.name for sample in batch.samples] == ["good"]
    assert [(number, name, cause) for number, name, cause, _ in batch.refused] == [
        (0, "missing", "cannot be read"),
        (2, "empty", "empty"),
    ]


def test_code_that_fails_on_an_image_leaves_it_out() -> None:
    def prepare(image: Image.Image) -> np.ndarray:
        raise ZeroDivisionError("no crop of such a size")

    batch = load_images(block_of(Item("odd", 1, data=saved(COLOURS))), prepare)
    assert [cause for _, _, cause, _ in batch.refused] == ["cannot be prepared"]
