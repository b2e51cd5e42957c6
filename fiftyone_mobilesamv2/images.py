"""Image files -> RGB pixels, oriented as the FiftyOne App shows them."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from .errors import ArgumentError

MAX_SIDE = 65_535  # JPEG's limit. Masks are enlarged by a matrix with a row for every pixel of a side.

_STRIP_PIXELS = 2**22  # converted at a time: whole images would be in memory three to five times


def read_image(path: str | PathLike[str]) -> npt.NDArray[np.uint8]:
    """The pixels of an image file.

    EXIF orientation is applied, as browsers do. 16-bit images keep their upper 8 bits; float images are stretched from
    their least to their greatest finite value; transparency is dropped; of an animation the first frame counts.

    Returns:
        uint8 RGB [H, W, 3]

    Raises:
        OSError: there is no such file, it can't be read, or it is no image.
        ValueError: the image is too large to be decoded safely (see :data:`MAX_SIDE` and `PIL.Image.MAX_IMAGE_PIXELS`);
            or no file can have this path.
    """
    name = repr(os.fspath(path))
    _check_is_file(path, name)
    try:
        with _open(path) as image:
            if image.format == "EPS":  # PIL would have Ghostscript run it: it is a program
                raise OSError("PostScript isn't read")
            if max(image.size) > MAX_SIDE:
                raise Image.DecompressionBombError(
                    f"a side of {max(image.size)} pixels exceeds the limit of {MAX_SIDE} pixels"
                )
            ImageOps.exif_transpose(image, in_place=True)
            to_rgb = _conversion(image)
            pixels = np.empty((image.height, image.width, 3), np.uint8)
            for rows, strip in _strips(image):
                pixels[rows] = to_rgb(strip)
            return pixels
    except Image.DecompressionBombError as error:
        raise ArgumentError(f"{name} is too large: {error}") from error
    except PermissionError as error:
        raise PermissionError(f"{name} can't be read: permission is denied") from error
    except Exception as error:  # PIL's decoders raise all kinds on files that are damaged in ways they did not foresee
        cause = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{name} is damaged, or no image: {cause}") from error


def _check_is_file(path: str | PathLike[str], name: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # characters that no path can have
        raise ArgumentError(f"{name} can't be the path of a file: {error}") from error
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{name} is a folder")
    if not stat.S_ISREG(mode):  # opening a pipe waits for a writer; a device may never end
        raise OSError(f"{name} is no regular file")


def _open(path: str | PathLike[str]) -> Image.Image:
    # Where it is imported, ultralytics has replaced PIL's `open` by one that installs a package from the network when
    # it meets a file that is no image.
    patches = sys.modules.get("ultralytics.utils.patches")
    return getattr(patches, "_image_open", Image.open)(path)


def _strips(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """The image in parts: their rows, and these."""
    step = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, step):
        bottom = min(top + step, image.height)
        yield slice(top, bottom), image.crop((0, top, image.width, bottom))


def _conversion(image: Image.Image) -> Callable[[Image.Image], npt.NDArray[np.uint8]]:
    """What makes uint8 RGB of strips of this image: [h, W, 3], or [h, W, 1] where it is grey."""
    if image.mode.startswith("I"):  # 16-bit grey, which PIL's own conversion would clip to white
        return lambda strip: (np.clip(np.asarray(strip), 0, 65535) >> 8).astype(np.uint8)[:, :, None]
    if image.mode == "F":
        low, high = _finite_range(image)
        return lambda strip: _stretch(np.asarray(strip), low, high)[:, :, None]
    if image.mode == "P" and "transparency" in image.info:
        return lambda strip: np.asarray(strip.convert("RGBA").convert("RGB"))
    return lambda strip: np.asarray(strip.convert("RGB"))


def _finite_range(image: Image.Image) -> tuple[float, float]:
    """The least and the greatest finite value; zeros if there is none."""
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
