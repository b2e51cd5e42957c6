"""Image files -> RGB pixels, oriented as the FiftyOne App shows them."""

from __future__ import annotations

import sys
from os import PathLike

import numpy as np
from PIL import Image, ImageOps


def read_image(path: str | PathLike) -> np.ndarray:
    """The pixels of an image file.

    EXIF orientation is applied, as browsers do. 16-bit images keep their upper 8 bits; float images are stretched from
    their least to their greatest finite value; transparency is dropped; of an animation the first frame counts.

    Returns:
        uint8 RGB [H, W, 3]

    Raises:
        OSError: the file can't be read, or is no image.
        ValueError: the image is too large to be decoded safely (see `PIL.Image.MAX_IMAGE_PIXELS`).
    """
    try:
        with _open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey, which PIL's own conversion would clip to white
                pixels = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
                return _grey((pixels >> 8).astype(np.uint8))
            if image.mode == "F":
                return _grey(_stretch(np.asarray(image)))
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            return np.array(image.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}") from error
    except (SyntaxError, EOFError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        # What PIL's decoders raise on files that are damaged in ways they did not foresee.
        raise OSError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _open(path: str | PathLike) -> Image.Image:
    # Where it is imported, ultralytics has replaced PIL's `open` by one that installs a package from the network when
    # it meets a file that is no image.
    patches = sys.modules.get("ultralytics.utils.patches")
    return getattr(patches, "_image_open", Image.open)(path)


def _grey(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels[:, :, None], 3, axis=2)


def _stretch(pixels: np.ndarray) -> np.ndarray:
    """float [H, W] -> uint8 [H, W]"""
    finite = np.isfinite(pixels)
    if not finite.any():
        return np.zeros(pixels.shape, np.uint8)
    low, high = float(pixels[finite].min()), float(pixels[finite].max())
    scaled = (np.where(finite, pixels, low) - low) / max(high - low, np.finfo(np.float32).tiny)
    return np.round(255 * scaled).astype(np.uint8)
