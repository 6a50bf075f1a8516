"""Decode the bytes of an untrusted image file to the same pixels as PyTorch's loaders."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# About twice the area above which Pillow warns of a decompression bomb.
MAX_PIXELS = 178_956_970
_ORIENTATION = 0x0112

# Reasons to leave out a sample, and remarks on samples that are used, each with an explanation.
REFUSED = {
    "empty": "the file has no bytes",
    "not an image": "Pillow does not recognise the format",
    "truncated": "the file ends before the image does, or is damaged",
    "too large": f"more than {MAX_PIXELS:,} pixels, or too many bytes",
    "cannot be read": "the file is missing, or its storage fails",
    "cannot be prepared": "resizing or cropping fails for its size",
}
REMARKS = {
    "grayscale": "its channel is repeated",
    "palette": "its colours are looked up in the palette",
    "CMYK": "converted to RGB by Pillow, without a colour profile",
    "16-bit": "divided by 256",
    "alpha": "transparency is dropped",
    "EXIF-rotated": "the orientation is ignored, as in PyTorch's and TensorFlow's loaders",
    "animated": "the first frame is used",
}


class RefusedImageError(Exception):
    """A sample must be left out. `cause` is a key of `REFUSED`."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause = cause
        self.detail = detail


@dataclass(frozen=True)
class Decoded:
    """An RGB image, and remarks on its file, which are keys of `REMARKS`."""

    image: Image.Image
    remarks: tuple[str, ...]


def decode(data: bytes) -> Decoded:
    """Decode an image; raises RefusedImageError for bytes that are not a complete image."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise RefusedImageError("empty", "0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes below the limit, and about unusual transparency
            with Image.open(io.BytesIO(data)) as file:
                width, height = file.size
                if width * height > MAX_PIXELS:
                    raise RefusedImageError("too large", f"{width}x{height} pixels")
                remarks = _remarks(file)
                file.load()
                return Decoded(_rgb(file), remarks)
    except UnidentifiedImageError:
        raise RefusedImageError("not an image", f"{len(data):,} bytes that Pillow does not recognise") from None
    except Image.DecompressionBombError as error:
        raise RefusedImageError("too large", str(error)) from None
    except RefusedImageError:
        raise
    except Exception as error:  # Pillow's plugins raise anything on damaged files
        raise RefusedImageError("truncated", str(error) or type(error).__name__) from None


def _remarks(file: Image.Image) -> tuple[str, ...]:
    found = []
    if getattr(file, "is_animated", False):
        found.append("animated")
    if file.mode in {"1", "L", "LA"}:
        found.append("grayscale")
    if file.mode == "P":
        found.append("palette")
    if file.mode == "CMYK":
        found.append("CMYK")
    if file.mode.startswith("I"):
        found.append("16-bit")
    if file.mode in {"RGBA", "LA", "PA"} or "transparency" in file.info:
        found.append("alpha")
    if file.getexif().get(_ORIENTATION, 1) not in {0, 1}:
        found.append("EXIF-rotated")
    return tuple(found)


def _rgb(file: Image.Image) -> Image.Image:
    """Convert to RGB like `Image.convert`, which would clip 16-bit values at 255, so these are divided first."""
    from PIL import Image

    if file.mode.startswith("I"):
        values = np.asarray(file).astype(np.int64)
        return Image.fromarray((np.clip(values, 0, 65535) // 256).astype(np.uint8)).convert("RGB")
    return file.convert("RGB")
