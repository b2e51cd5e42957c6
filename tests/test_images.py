"""Image files of every kind are read as the App shows them; tests/app/test_orientations.py compares with a browser."""

import numpy as np
import pytest
from PIL import ExifTags, Image, features

from fiftyone_mobilesamv2.images import read_image, shown_size


def picture(height=40, width=60):
    """A dark picture with a bright red rectangle in the upper left, to check orientation, channels and brightness."""
    pixels = np.full((height, width, 3), 20, np.uint8)
    pixels[5:15, 10:30] = (230, 40, 40)
    return pixels


def red_box(pixels):
    """xyxy of the pixels that are much redder than green."""
    rows, columns = np.nonzero(pixels[..., 0].astype(int) - pixels[..., 1] > 80)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


# Options that make `Image.save` keep colours, exactly or, for JPEG, as closely as possible.
FAITHFUL = {"webp": {"lossless": True}, "jpg": {"quality": 95, "subsampling": 0}}


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "jpg"])
def test_rgb(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(picture()).save(path, **FAITHFUL.get(suffix, {}))
    pixels = read_image(path)
    assert pixels.dtype == np.uint8 and pixels.shape == (40, 60, 3)
    assert np.abs(pixels.astype(int) - picture()).max() <= (20 if suffix == "jpg" else 0)


def test_palette_alpha_and_grey_images(tmp_path):
    rgb = Image.fromarray(picture())
    transparent = Image.merge("RGBA", (*rgb.split(), Image.new("L", rgb.size, 0)))
    palette = rgb.quantize(8)
    palette_alpha = palette.copy()
    palette_alpha.info["transparency"] = palette.getpixel((0, 0))  # the background's colour
    for name, image in {"palette": palette, "rgba": transparent, "palette-alpha": palette_alpha}.items():
        image.save(tmp_path / f"{name}.png")
        assert red_box(read_image(tmp_path / f"{name}.png")) == red_box(picture()), name
    for mode in ("L", "LA", "1"):
        rgb.convert(mode).save(tmp_path / f"{mode}.png")
        pixels = read_image(tmp_path / f"{mode}.png")
        assert pixels.shape == (40, 60, 3)
        np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])
    np.testing.assert_array_equal(read_image(tmp_path / "L.png")[..., 0], np.asarray(rgb.convert("L")))


def test_cmyk(tmp_path):
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "image.jpg", quality=95)
    pixels = read_image(tmp_path / "image.jpg")
    np.testing.assert_allclose(red_box(pixels), red_box(picture()), atol=1)
    assert pixels[10, 20, 0] > 150 > 100 > pixels[30, 50].max()


def test_16_bit_images_keep_the_upper_byte(tmp_path):
    values = (np.arange(40 * 60).reshape(40, 60) * 27).astype(np.uint16)
    for name in ("image.png", "image.tiff"):
        Image.fromarray(values).save(tmp_path / name)
        np.testing.assert_array_equal(read_image(tmp_path / name)[..., 0], values >> 8)


def test_float_images_are_stretched_to_their_range(tmp_path):
    values = np.linspace(-3, 5, 40 * 60, dtype=np.float32).reshape(40, 60)
    values[0, 1] = np.nan
    Image.fromarray(values).save(tmp_path / "image.tiff")
    pixels = read_image(tmp_path / "image.tiff")[..., 0]
    assert pixels[0, 0] == 0 and pixels[0, 1] == 0 and pixels[-1, -1] == 255
    assert (np.diff(pixels.ravel()[2:].astype(int)) >= 0).all()


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.fromarray(picture()), Image.new("RGB", (60, 40), "blue")]
    for suffix in ("gif", "webp"):
        frames[0].save(tmp_path / f"image.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
        assert red_box(read_image(tmp_path / f"image.{suffix}")) == red_box(picture())


# EXIF orientation -> the shown pixels [H, W, 3] of those that are stored.
ORIENTATIONS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "TIFF", "WEBP", *(["AVIF"] if features.check("avif") else [])])
def test_exif_orientation(tmp_path, kind):
    image, path = Image.fromarray(picture()), tmp_path / "image"
    image.save(path, kind)
    stored = np.asarray(Image.open(path).convert("RGB"))
    assert red_box(stored) == pytest.approx(red_box(picture()), abs=1)
    for orientation, turned in ORIENTATIONS.items():
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        image.save(path, kind, exif=exif)
        expected = stored if kind == "WEBP" else turned(stored)
        np.testing.assert_array_equal(read_image(path), expected)
        assert shown_size(path) == expected.shape[:2]


def test_orientations_that_browsers_ignore(tmp_path):
    image, path = Image.fromarray(picture()), tmp_path / "image.jpg"
    xmp = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    short, long, count = (number.to_bytes(2, "little") for number in (3, 4, 1))
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01%s" + count + b"\0\0\x06\0\0\0\0\0\0\0"
    shown = {}
    for name, options in {
        "short": {"exif": exif % short},
        "long": {"exif": exif % long},
        "cut": {"exif": (exif % short)[:20]},
        "nothing": {"exif": b"Exif\0\0"},
        "XMP": {"xmp": xmp},
    }.items():
        image.save(path, **options)
        shown[name] = shown_size(path)
        assert read_image(path).shape[:2] == shown[name]
    assert shown == {"short": (60, 40), **dict.fromkeys(["long", "cut", "nothing", "XMP"], (40, 60))}


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_file_that_is_not_an_image_raises(tmp_path, content):
    import ultralytics.utils.patches  # noqa: F401  its patched `Image.open` would install a package here

    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises((OSError, ValueError), match=r"image\.png"):
        read_image(path)


def test_damaged_files_are_read_or_fail_cleanly(tmp_path):
    rng = np.random.default_rng(0)
    for suffix in ("jpg", "png", "webp", "tiff", "gif", "bmp"):
        path = tmp_path / f"image.{suffix}"
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(path)
        whole = path.read_bytes()
        for _ in range(60):
            damaged = bytearray(whole[: rng.integers(1, len(whole) + 1)])
            for position in rng.integers(0, len(damaged), 4):
                damaged[position] ^= 1 << rng.integers(8)
            path.write_bytes(damaged)
            try:
                pixels = read_image(path)
            except (OSError, ValueError, MemoryError):
                continue
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


def test_decompression_bomb_is_refused(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (20000, 10000)).save(path)
    with pytest.raises(ValueError, match=r"bomb\.png.*exceeds limit"):
        read_image(path)
