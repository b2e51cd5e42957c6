"""Images with an EXIF orientation: the pixels that are segmented are those that the browser and the App show."""

import base64
import io
import struct
import zlib

import fiftyone as fo
import numpy as np
import pytest
from PIL import ExifTags, Image, features

from fiftyone_mobilesamv2.images import read_image

WIDTH, HEIGHT = 96, 64
COLORS = np.array([(255, 0, 0), (0, 160, 0), (0, 0, 255), (255, 255, 0)], np.uint8)  # of the quarters
XMP = '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="%d"/>'
OPTIONS = {"JPEG": {"quality": 95}, "PNG": {}, "WEBP": {"lossless": True}, "AVIF": {"quality": 95}}


def quarters():
    return COLORS.reshape(2, 2, 3).repeat(HEIGHT // 2, 0).repeat(WIDTH // 2, 1)


def exif_of(orientation, kind=3, order="<"):
    """EXIF data whose orientation is a number of 16 bits, or of 32 bits as browsers don't expect it (kind=4)."""
    value = struct.pack(order + ("HH" if kind == 3 else "I"), *((orientation, 0) if kind == 3 else (orientation,)))
    entry = struct.pack(order + "HHHI", 1, ExifTags.Base.Orientation, kind, 1) + value + bytes(4)
    return b"Exif\0\0" + {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8) + entry


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def saved(kind, **options):
    content = io.BytesIO()
    Image.fromarray(quarters()).save(content, kind, **options)
    return content.getvalue()


def images():
    """Name -> content of images in each format with each orientation, and of images that state it in unusual ways."""
    contents = {}
    for kind in [kind for kind in OPTIONS if kind != "AVIF" or features.check("avif")]:
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = orientation
            contents[f"{kind} {orientation}"] = saved(kind, exif=exif, **OPTIONS[kind])
    png = saved("PNG")
    start, end = png.index(b"IDAT") - 4, png.index(b"IEND") - 4
    for orientation in (3, 6):
        exif = exif_of(orientation)
        raw = b"\nexif\n%8d\n%s\n" % (len(exif), exif.hex().encode())
        chunks = {
            "eXIf": chunk(b"eXIf", exif[6:]),
            "raw profile": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)),
            "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + (XMP % orientation).encode()),
        }
        contents |= {f"PNG {name} {orientation}": png[:start] + data + png[start:] for name, data in chunks.items()}
        contents[f"PNG late {orientation}"] = png[:end] + chunks["eXIf"] + png[end:]
        contents[f"JPEG 32 bits {orientation}"] = saved("JPEG", exif=exif_of(orientation, kind=4))
        contents[f"JPEG big-endian {orientation}"] = saved("JPEG", exif=exif_of(orientation, order=">"))
        contents[f"JPEG cut {orientation}"] = saved("JPEG", exif=exif[:20])
        contents[f"JPEG XMP {orientation}"] = saved("JPEG", xmp=(XMP % orientation).encode())
        more = {"save_all": True, "append_images": [Image.new("RGB", (WIDTH, HEIGHT))], "exif": exif}
        contents[f"MPO {orientation}"] = saved("MPO", **more)
        contents[f"animated PNG {orientation}"] = saved("PNG", **more)
    return contents


DRAW = """async content => {
    const image = new Image();
    image.src = `data:;base64,${content}`;
    await image.decode();
    const width = image.naturalWidth, height = image.naturalHeight;
    const context = new OffscreenCanvas(width, height).getContext("2d");
    context.drawImage(image, 0, 0);
    const middles = [[1, 1], [3, 1], [1, 3], [3, 3]].map(([x, y]) => [x * width / 4, y * height / 4]);
    return [width, height, middles.map(([x, y]) => [...context.getImageData(x, y, 1, 1).data.slice(0, 3)])];
}"""


def layout(width, height, middles):
    """The size, and the nearest of COLORS of the middle of each quarter."""
    distances = np.abs(np.array(middles, int)[:, None] - COLORS.astype(int)).sum(-1)
    return width, height, distances.argmin(-1).tolist()


def test_images_are_read_as_the_browser_shows_them(context, tmp_path):
    page, path = context.new_page(), tmp_path / "image"
    shown, read = {}, {}
    for name, content in images().items():
        shown[name] = layout(*page.evaluate(DRAW, base64.b64encode(content).decode()))
        path.write_bytes(content)
        pixels = read_image(path)
        height, width, _ = pixels.shape
        read[name] = layout(width, height, pixels[height // 4 :: height // 2, width // 4 :: width // 2].reshape(4, 3))
    page.close()
    assert read == shown
    sideways = {name for name, (width, height, _) in shown.items() if height > width}
    assert {"JPEG 5", "PNG 6", "MPO 6", "JPEG big-endian 6"} <= sideways
    assert not {"WEBP 6", "JPEG XMP 6", "PNG late 6", "PNG raw profile 6", "JPEG 32 bits 6"} & sideways


def is_color(pixels, color):
    return np.abs(pixels.astype(int) - np.array(color, int)).sum(-1) < 150


def extent(mask):
    """xyxy of the rows and columns of which at least 20 pixels are set: of areas, not of icons and text."""
    rows, columns = np.flatnonzero(mask.sum(1) >= 20), np.flatnonzero(mask.sum(0) >= 20)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def sample_with_mask(path, metadata):
    """A sample with a mask of what is red in the image that is read."""
    pixels = read_image(path)
    height, width, _ = pixels.shape
    mask = is_color(pixels, COLORS[0])
    x0, y0, x1, y1 = extent(mask)
    box = [x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height]
    width, height = (width, height) if metadata == "right" else (height, width)
    sample = fo.Sample(str(path), metadata=fo.ImageMetadata(width=width, height=height))
    sample["masks"] = fo.Detections(detections=[fo.Detection(bounding_box=box, mask=mask[y0:y1, x0:x1])])
    return sample


@pytest.mark.slow
@pytest.mark.parametrize("metadata", ["right", "swapped"])
def test_masks_lie_on_the_objects_in_the_app(app, mongod, tmp_path, metadata):
    dataset = fo.Dataset(persistent=True)
    try:
        for kind in ("JPEG", "PNG", "WEBP"):
            for orientation in (3, 6, 7):
                path = tmp_path / f"{orientation}.{kind.lower()}"
                path.write_bytes(saved(kind, exif=exif_of(orientation), **OPTIONS[kind]))
                dataset.add_sample(sample_with_mask(path, metadata))
        dataset.app_config.color_scheme = fo.ColorScheme(color_pool=["#ff00ff"], opacity=1)
        dataset.save()
        app.open(dataset.name)
        app.page.locator('[data-cy="looker"]').first.click()
        canvas = app.page.locator('[data-cy="modal"] canvas[canvas-loaded="true"]').first
        canvas.wait_for()
        app.page.wait_for_timeout(1500)  # for the opening animation
        for sample in dataset:
            screenshot = Image.open(io.BytesIO(app.page.screenshot(clip=canvas.bounding_box())))
            pixels = np.asarray(screenshot.convert("RGB"))
            mask = is_color(pixels, (255, 0, 255))
            left, top, right, bottom = extent(
                np.any([mask, *(is_color(pixels, color) for color in COLORS[1:])], axis=0)
            )
            x, y, w, h = sample.masks.detections[0].bounding_box
            expected = np.array([x, y, x + w, y + h]) * np.tile([right - left, bottom - top], 2) + np.tile(
                [left, top], 2
            )
            np.testing.assert_allclose(extent(mask), expected, atol=8, err_msg=sample.filename)
            assert is_color(pixels, COLORS[0]).sum() < mask.sum() / 50, f"{sample.filename}: not all red is covered"
            app.page.keyboard.press("ArrowRight")
            app.page.wait_for_timeout(1000)
    finally:
        dataset.delete()
