"""Image files -> RGB pixels, oriented as the FiftyOne App shows them."""

from __future__ import annotations

import io
import os
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, TiffTags
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from .errors import ArgumentError, message_of

MAX_SIDE = 65_535  # JPEG's limit. Masks are upsampled with a matrix that has a row for each pixel of a side.

# The formats whose EXIF orientation browsers apply, and with them the App; that of WEBP, for example, they ignore. PIL
# gives an AVIF image's own rotation as an EXIF orientation. It turns TIFF images itself; the App doesn't show them.
_TURNED_FORMATS = ("JPEG", "MPO", "PNG", "AVIF")
_STRIP_PIXELS = 2**22  # converted at a time; converting whole images would need three to five times their memory


def read_image(path: str | PathLike[str]) -> npt.NDArray[np.uint8]:
    """Reads the pixels of an image file.

    EXIF orientation is applied where browsers do: in JPEG, PNG and AVIF, not in WEBP. 16-bit images keep their upper 8
    bits; the range of finite values of float images is scaled to 0..255; transparency is dropped; of an animation, the
    first frame is used.

    Returns:
        uint8 RGB [H, W, 3]

    Raises:
        OSError: the file does not exist, can't be read, or is not an image.
        ValueError: the image is too large to be decoded safely (see :data:`MAX_SIDE` and `PIL.Image.MAX_IMAGE_PIXELS`);
            or the path is invalid.
    """
    with _opened(path) as image:
        if image.format == "EPS":  # PIL would run the file, a program, in Ghostscript
            raise OSError("PostScript is not supported")
        if max(image.size) > MAX_SIDE:
            raise Image.DecompressionBombError(
                f"a side of {max(image.size)} pixels exceeds the limit of {MAX_SIDE} pixels"
            )
        orientation = _orientation(image)  # before loading, which adds what follows the pixels, unlike in browsers
        image.load()
        to_rgb = _conversion(image)
        pixels = np.empty((*_shown_size(image, orientation), 3), np.uint8)
        as_stored = _as_stored(pixels, orientation)
        for rows, strip in _strips(image):
            as_stored[rows] = to_rgb(strip)
        return pixels


def shown_size(path: str | PathLike[str]) -> tuple[int, int]:
    """(height, width) of the pixels that :func:`read_image` returns, without decoding them.

    FiftyOne's metadata may have them the other way round, as for PNG images with an EXIF orientation. Raises the same
    errors as :func:`read_image`.
    """
    with _opened(path) as image:
        return _shown_size(image, _orientation(image))


def size_of(path: str | PathLike[str]) -> tuple[int, int]:
    """(height, width) of an image file as stored, without decoding it. Raises the same errors as :func:`read_image`."""
    with _opened(path) as image:
        return image.height, image.width


def check_is_file(path: str | PathLike[str]) -> None:
    """Raises OSError or ValueError unless there is a regular file; reading anything else may never end."""
    name = repr(os.fspath(path))
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # the path contains invalid characters
        raise ArgumentError(f"{name} is not a valid path: {message_of(error)}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name} doesn't exist") from error
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{name} is a folder")
    if not stat.S_ISREG(mode):  # opening a pipe blocks until there is a writer; reading a device may never end
        raise OSError(f"{name} is not a regular file")


@contextmanager
def _opened(path: str | PathLike[str]) -> Iterator[Image.Image]:
    """Opens an image file. Raises the errors of :func:`read_image`, whatever PIL raises."""
    name = repr(os.fspath(path))
    check_is_file(path)
    # When imported, ultralytics replaces PIL's `open` with a function that installs a package from the network if a
    # file is not an image.
    patches = sys.modules.get("ultralytics.utils.patches")
    try:
        with getattr(patches, "_image_open", Image.open)(path) as image:
            yield image
    except Image.DecompressionBombError as error:
        raise ArgumentError(f"{name} is too large: {error}") from error
    except PermissionError as error:
        raise PermissionError(f"{name} can't be read: permission denied") from error
    except Exception as error:  # PIL's decoders raise exceptions of all kinds on damaged files
        cause = " ".join(str(error).replace(name, "").split()) or type(error).__name__
        raise OSError(f"{name} is damaged or not an image: {cause}") from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that browsers apply, 1 to 8, of an image that has not been loaded.

    Like them, and unlike PIL, ignores orientations in XMP, of another type than SHORT, and in damaged EXIF data.
    """
    if image.format not in _TURNED_FORMATS or not (exif := image.info.get("exif")):
        return 1
    stream = io.BytesIO(exif.removeprefix(b"Exif\0\0"))
    try:
        directory = ImageFileDirectory_v2(stream.read(8))
        stream.seek(directory.next)
        directory.load(stream)
    except (SyntaxError, ValueError, struct.error):
        return 1
    tag = ExifTags.Base.Orientation
    if directory.tagtype.get(tag) != TiffTags.SHORT:
        return 1
    orientation = directory[tag]
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _shown_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    return (image.width, image.height) if orientation >= 5 else (image.height, image.width)


def _as_stored(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """A view of an image's pixels, [H, W, 3] as shown, in which they are arranged as stored in the file.

    An orientation says at which edges of the shown image the first row and column that are stored lie: for example, 6
    means right and top (Exif 2.32, 4.6.4 A).
    """
    if orientation >= 5:  # rows are stored as columns
        pixels = pixels.swapaxes(0, 1)
    row_step = -1 if orientation in (3, 4, 6, 7) else 1
    column_step = -1 if orientation in (2, 3, 7, 8) else 1
    return pixels[::row_step, ::column_step]


def _strips(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """Yields the image in horizontal strips, as (rows, strip)."""
    step = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, step):
        bottom = min(top + step, image.height)
        yield slice(top, bottom), image.crop((0, top, image.width, bottom))


def _conversion(image: Image.Image) -> Callable[[Image.Image], npt.NDArray[np.uint8]]:
    """The function that converts strips of this image to uint8 RGB: [h, W, 3], or [h, W, 1] if it is greyscale."""
    if image.mode.startswith("I"):  # 16-bit greyscale, which PIL's own conversion would clip to white
        return lambda strip: (np.clip(np.asarray(strip), 0, 65535) >> 8).astype(np.uint8)[:, :, None]
    if image.mode == "F":
        low, high = _finite_range(image)
        return lambda strip: _stretch(np.asarray(strip), low, high)[:, :, None]
    if image.mode == "P" and "transparency" in image.info:
        return lambda strip: np.asarray(strip.convert("RGBA").convert("RGB"))
    return lambda strip: np.asarray(strip.convert("RGB"))


def _finite_range(image: Image.Image) -> tuple[float, float]:
    """The minimum and maximum of the finite values; zeros if no value is finite."""
    low, high = np.inf, -np.inf
    for _, strip in _strips(image):
        values = np.asarray(strip)
        values = values[np.isfinite(values)]
        low, high = float(values.min(initial=low)), float(values.max(initial=high))
    return (low, high) if low <= high else (0.0, 0.0)


def _stretch(values: npt.NDArray[Any], low: float, high: float) -> npt.NDArray[np.uint8]:
    """float32 [h, w] -> uint8 [h, w]"""
    values = np.where(np.isfinite(values), values, low).astype(np.float64)
    return np.round(255 * (values - low) / ((high - low) or 1)).astype(np.uint8)
