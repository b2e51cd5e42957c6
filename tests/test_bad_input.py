"""Bad files, paths and labels of every kind: a clear message refuses each, and other images are not affected."""

import os
import struct
import tempfile
import threading
import zlib
from contextlib import contextmanager
from pathlib import Path

import cv2
import fiftyone as fo
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_utils

from fiftyone_mobilesamv2 import zoo
from fiftyone_mobilesamv2.images import MAX_SIDE, read_image
from fiftyone_mobilesamv2.labels.detections import mask_in_box
from fiftyone_mobilesamv2.labels.masks import masks_of
from fiftyone_mobilesamv2.modeling.masks import Segmentation
from fiftyone_mobilesamv2.runs.segment import segment_anything, segment_everything
from fiftyone_mobilesamv2.training.scenes import TEST_SEED, make_scene
from fiftyone_mobilesamv2.zoo.reading import ImageGetItem

MODEL = "mobilesamv2-demo-torch"
MAX_MEMORY = 2e9  # bytes. PIL takes 4 per pixel, and twice that while rotating: 1.4e9 for the largest image.
WITHOUT_OBJECTS = ("nan.tiff", "bits.png", "bits.tiff", "pixel.png", "wide.png", "wide-1.png", "tall.png", "large.png")
PICTURE = np.asarray(Image.fromarray(make_scene(TEST_SEED, 0).image).resize((120, 160)))


@pytest.fixture(scope="module")
def model():
    return zoo.load_model(MODEL, device="cpu")


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(TEST_SEED, index).image for index in (1, 2)]


def within(seconds, call):
    """Returns the result of `call`; fails if it takes longer than `seconds`."""
    returned, raised = [], []

    def work():
        try:
            returned.append(call())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    assert returned, f"still going on after {seconds} s"
    return returned[0]


@contextmanager
def bounded_memory():
    """Fails if the process's memory grows by more than `MAX_MEMORY`."""
    process, ended = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch():
        nonlocal peak
        while not ended.wait(0.01):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    assert peak - before < MAX_MEMORY


def content(labels):
    """The stored labels without IDs, in a form that can be compared."""
    return labels and [
        (d.confidence, d.predicted_iou, d.area_px, tuple(d.bounding_box), d.mask.shape, d.mask.tobytes())
        for d in labels.detections
    ]


def assert_is_clear_message(error, path):
    assert repr(path) in error
    assert "\n" not in error and 10 < len(error.replace(repr(path), "")) < 300, error


# Files --------------------------------------------------------------------------------------------------------------


def write_readable(folder):
    """Writes unusual but valid images. Returns {path: pixels}."""
    expected = {}
    rgb = Image.fromarray(PICTURE)
    grey = rgb.convert("L")
    levels = np.asarray(grey).astype(int)

    def add(name, image, pixels=None, **options):
        image.save(folder / name, **options)
        if pixels is None:
            pixels = np.asarray(Image.open(folder / name).convert("RGB"))
        expected[str(folder / name)] = np.repeat(pixels[..., None], 3, 2) if pixels.ndim == 2 else pixels

    for suffix in ("png", "bmp", "tiff", "ppm"):
        add(f"rgb.{suffix}", rgb, PICTURE)
    add("rgb.webp", rgb, PICTURE, lossless=True)
    for suffix in ("gif", "jpg", "jp2"):
        add(f"rgb.{suffix}", rgb)
    add("progressive.jpg", rgb, progressive=True)
    add("cmyk.jpg", rgb.convert("CMYK"))
    add("grey.jpg", grey)
    for suffix in ("png", "tiff"):
        add(f"grey16.{suffix}", Image.fromarray((levels * 256 + 77).astype(np.uint16)), levels.astype(np.uint8))
    add("int32.tiff", Image.fromarray((levels * 256 + 77).astype(np.int32)), levels.astype(np.uint8))
    stretched = np.round(255 * (levels - levels.min()) / np.ptp(levels)).astype(np.uint8)
    floats = (levels * 4.0 - 900).astype(np.float32)
    add("float.tiff", Image.fromarray(floats), stretched)
    floats[0, :3], stretched[0, :3] = (np.nan, np.inf, -np.inf), 0
    add("holes.tiff", Image.fromarray(floats), stretched)
    add("nan.tiff", Image.fromarray(np.full_like(floats, np.nan)), np.zeros_like(stretched))
    add("rgba.png", Image.merge("RGBA", (*rgb.split(), grey)), PICTURE)
    add("la.png", Image.merge("LA", (grey, grey)), levels.astype(np.uint8))
    palette = rgb.quantize(32)
    add("palette.png", palette, np.asarray(palette.convert("RGB")), transparency=3)
    for suffix in ("png", "tiff"):
        add(f"bits.{suffix}", grey.convert("1"))
    for suffix in ("gif", "webp", "png", "tiff"):
        add(f"frames.{suffix}", rgb, save_all=True, append_images=[Image.new("RGB", rgb.size, "blue")])
    add("pixel.png", Image.new("RGB", (1, 1), "red"))
    noise = np.random.default_rng(0).integers(0, 256, (20, 20_000, 3), np.uint8)
    add("wide.png", Image.fromarray(noise))
    add("wide-1.png", Image.fromarray(noise[:1]))
    add("tall.png", Image.fromarray(noise.transpose(1, 0, 2).copy()))
    add("large.png", Image.new("1", (5000, 5000)), np.zeros((5000, 5000, 3), np.uint8))  # 3 KB
    add("jpeg.png", rgb, format="JPEG")
    add("new\nline, 'quoted', \u00fc\U0001f600.png", rgb, PICTURE)
    (folder / "link.png").symlink_to(folder / "rgb.png")
    expected[str(folder / "link.png")] = PICTURE
    return expected


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width, height, data):
    """A PNG with this width and height in its header, and this compressed pixel data."""
    header = png_chunk(b"IHDR", struct.pack(">2I5B", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def zeros_packed(count):
    compressor = zlib.compressobj(9)
    return b"".join(compressor.compress(bytes(2**20)) for _ in range(count >> 20)) + compressor.flush()


def write_unreadable(folder):
    """Writes files that are not images or can't be read safely. Returns their paths."""
    Image.fromarray(PICTURE).save(folder / "whole.eps")
    contents = {
        "text.png": b"This is no image.",
        "page.jpg": b"<html><body>404 Not Found</body></html>",
        "vector.png": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        "noise.webp": np.random.default_rng(0).bytes(5000),
        "zeros.png": bytes(10_000),
        "bomb.png": png_of(30_000, 30_000, zeros_packed(30_000 * 3_751)),  # 900 million pixels in 0.1 MB
        "lies-large.png": png_of(2**31 - 1, 2**31 - 1, zlib.compress(bytes(100))),
        "lies.png": png_of(12_000, 12_000, zlib.compress(bytes(100))),
        "long.png": png_of(MAX_SIDE + 1, 1, zlib.compress(bytes(MAX_SIDE))),
        "no-pixels.png": png_of(0, 10, zlib.compress(b"")),
        "program.png": (folder / "whole.eps").read_bytes(),
        "stream.jpg": b"\x00\x00\x01\xb3\x14\x00\xf0\x13" + bytes(1000),  # MPEG, which PIL recognizes but can't read
    }
    for name in ("whole.jpg", "whole.png", "whole.webp", "whole.tiff", "whole.bmp", "whole.gif"):
        Image.fromarray(PICTURE).save(folder / name)
        whole = (folder / name).read_bytes()
        for percent in (0, 1, 10, 50, 90):
            contents[f"cut-{percent}-{name}"] = whole[: len(whole) * percent // 100]
    for name, data in contents.items():
        (folder / name).write_bytes(data)

    frames = cv2.VideoWriter(str(folder / "video.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5, (120, 160))
    frames.write(PICTURE)
    frames.release()
    (folder / "video.mp4").rename(folder / "video.jpg")
    (folder / "folder.png").mkdir()
    (folder / "dangling.png").symlink_to(folder / "nothing.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "device.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    others = ["video.jpg", "folder.png", "dangling.png", "loop.png", "device.png", "pipe.png"]
    others += ["gone.png", "nul\0.png", "long" * 2000 + ".png", "http://127.0.0.1/picture.png"]
    return [str(folder / name) for name in [*contents, *others]]


@pytest.fixture(scope="module")
def readable(tmp_path_factory):
    return write_readable(tmp_path_factory.mktemp("readable"))


@pytest.fixture(scope="module")
def unreadable(tmp_path_factory):
    return write_unreadable(tmp_path_factory.mktemp("unreadable"))


@pytest.fixture(scope="module")
def good(tmp_path_factory, scenes):
    """Files of valid scenes: {path: pixels}."""
    folder = tmp_path_factory.mktemp("good")
    for number, image in enumerate(scenes):
        Image.fromarray(image).save(folder / f"{number}.png")
    return {str(folder / f"{number}.png"): image for number, image in enumerate(scenes)}


@pytest.mark.slow
def test_each_file_is_segmented_correctly_or_refused(dataset, model, readable, unreadable, good):
    odd = [*readable, *unreadable]
    assert len(odd) > 60
    order = np.random.default_rng(0).permutation(odd).tolist()
    beside = list(good) * len(order)
    paths = [path for i, name in enumerate(order) for path in ([beside[i], name] if i % 6 == 0 else [name])]
    dataset.add_samples([fo.Sample(path) for path in paths])
    with bounded_memory():
        run = within(300, lambda: segment_everything(dataset, model, "own", batch_size=8))
    assert run.images == len(paths) and not run.cancelled

    wanted = {path: content(model.predict(pixels)) for path, pixels in (readable | good).items()}
    assert all(bool(found) != path.endswith(WITHOUT_OBJECTS) for path, found in wanted.items())
    for sample in dataset:
        assert content(sample.own) == wanted.get(sample.filepath), sample.filepath
    errors = {failure.filepath: failure.error for failure in run.failures}
    assert len(errors) == len(run.failures) and set(errors) == {os.path.abspath(path) for path in unreadable}
    for path, error in errors.items():
        assert_is_clear_message(error, path)


def test_data_loader_worker_skips_bad_files(dataset, model, readable, unreadable, good):
    names = ("pipe.png", "device.png", "folder.png", "bomb.png", "nul\0.png", "program.png", "cut-50-whole.webp")
    bad = [path for path in unreadable if path.endswith(names)]
    dataset.add_samples([fo.Sample(path) for path in (*bad, *good)])
    within(120, lambda: dataset.apply_model(model, "own", batch_size=len(bad) + 1, num_workers=1))
    for sample in dataset:
        assert content(sample.own) == (
            content(model.predict(good[sample.filepath])) if sample.filepath in good else None
        )
    assert {failure.filepath for failure in model.failures} == set(bad) and len(bad) == len(names)
    for failure in model.failures:
        assert_is_clear_message(failure.error, failure.filepath)


@contextmanager
def unprivileged():
    """Drops root's privileges, because root may read everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_unreadable_file_is_reported():
    with tempfile.TemporaryDirectory() as folder:  # only root can enter pytest's own folder
        os.chmod(folder, 0o755)
        path = Path(folder, "secret.png")
        Image.fromarray(PICTURE).save(path)
        path.chmod(0)
        with unprivileged(), pytest.raises(PermissionError) as error:
            read_image(path)
        assert_is_clear_message(str(error.value), str(path))


def test_file_name_that_is_not_utf8(dataset, tmp_path, good):
    """Such a file can be read, but FiftyOne refuses to add it because the database can't store its name."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    Image.fromarray(PICTURE).save(path)
    np.testing.assert_array_equal(read_image(path), PICTURE)
    Path(path).unlink()
    with pytest.raises(OSError) as error:
        read_image(path)
    assert_is_clear_message(str(error.value), path)
    dataset.add_samples([fo.Sample(name) for name in good])
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        dataset.add_sample(fo.Sample(path))
    assert dataset.values("filepath") == list(good)


def test_largest_allowed_image_is_read_in_bounded_memory(tmp_path):
    side = int((2 * Image.MAX_IMAGE_PIXELS) ** 0.5)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (side, side), "red").save(tmp_path / "red.png", exif=exif, compress_level=1)
    with bounded_memory():
        pixels = read_image(tmp_path / "red.png")
    assert pixels.shape == (side, side, 3)
    assert (pixels[:: side // 50, :: side // 50] == (255, 0, 0)).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_flipped_bits_give_pixels_or_a_clear_message(tmp_path, suffix):
    rng = np.random.default_rng(0)
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(PICTURE).save(path)
    whole, read = path.read_bytes(), 0
    for _ in range(200):
        flipped = bytearray(whole)
        flipped[rng.integers(len(flipped))] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        try:
            pixels = read_image(path)
        except (OSError, ValueError) as error:
            assert_is_clear_message(str(error), str(path))
        else:
            read += 1
            assert pixels.dtype == np.uint8 and pixels.shape == (*Image.open(path).size[::-1], 3)
    assert 0 < read < 200


# Labels as prompts --------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")

BOXES = {  # the boxes of one image each; valid prompts here, invalid ones below
    "inside": [[0.1, 0.1, 0.5, 0.5], [0.4, 0.3, 0.5, 0.6]],
    "partly outside": [[-0.3, 0.2, 0.8, 0.5], [0.5, 0.5, 0.9, 0.9], [-0.5, -0.5, 2, 2]],
    "at the border": [[1, 0.2, 0, 0.5], [0.999999, 0.999999, 1e-9, 1e-9], [-0.5, 0.2, 0.5, 0.1]],
    "without area": [[0.5, 0.5, 0, 0], [0.2, 0.5, 0.6, 0]],
    "none": [],
}
BAD_BOXES = {
    "outside": [1.2, 0.1, 0.3, 0.3],
    "above": [0.1, -0.5, 0.3, 0.3],
    "in pixels": [100, 50, 200, 300],
    "far": [-1e30, 0, 2e30, 1],
    "huge": [0, 0, 1e308, 1e308],
    "not a number": [0.1, NAN, 0.5, 0.5],
    "infinite": [0.1, 0.1, INF, 0.5],
    "negative width": [0.5, 0.5, -0.2, 0.3],
    "three numbers": [0.1, 0.1, 0.5],
    "missing": None,
}


def detections(boxes):
    return fo.Detections(detections=[fo.Detection(label="prompt", bounding_box=box) for box in boxes])


def corners(boxes, pixels):
    """Relative boxes as float32 [N, 4], xyxy in pixels."""
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes * np.float32([pixels.shape[1], pixels.shape[0]] * 2)


def assert_masks(labels, segmentation):
    """Each label has its mask of the Segmentation and a tight box; labels of empty masks have no mask."""
    height, width = segmentation.size
    assert len(labels.detections) == len(segmentation)
    for detection, mask, box in zip(labels.detections, segmentation.masks, segmentation.boxes):
        if not mask.size:
            assert detection.mask is None
            continue
        np.testing.assert_array_equal(detection.mask, mask)
        x, y, w, h = detection.bounding_box
        np.testing.assert_allclose([x * width, y * height, (x + w) * width, (y + h) * height], box, atol=1e-6)


@pytest.fixture
def boxed(dataset, good):
    """A sample of the same scene for each kind of box; every bad box comes with a good one."""
    (path, _), *_ = good.items()
    kinds = BOXES | {name: [[0.2, 0.2, 0.5, 0.5], box] for name, box in BAD_BOXES.items()}
    for name, boxes in kinds.items():
        dataset.add_sample(fo.Sample(path, kind=name, boxes=detections(boxes)))
    dataset.add_sample(fo.Sample(path, kind="no field"))
    return dataset


def assert_bad_ones_are_refused(run, dataset, bad):
    by_kind = {dataset[failure.sample_id].kind: failure.error for failure in run.failures}
    assert set(by_kind) == set(bad)
    for kind, error in by_kind.items():
        sample = dataset.match(fo.ViewField("kind") == kind).first()
        prompt = (sample.boxes.detections if sample.has_field("boxes") else sample.clicks.keypoints)[-1]
        assert prompt.id in error and "\n" not in error and len(error) < 300, error


def test_boxes_become_masks_in_another_field(boxed, model, good):
    (_, pixels), *_ = good.items()
    run = segment_anything(boxed, model, "boxes", "masks", batch_size=8)
    assert_bad_ones_are_refused(run, boxed, BAD_BOXES)
    for sample in boxed:
        if not BOXES.get(sample.kind):
            assert sample.masks is None
            continue
        (segmentation,) = model.model.segment_anything([pixels], boxes=[corners(BOXES[sample.kind], pixels)])
        assert_masks(sample.masks, segmentation)


def test_boxes_get_their_masks_in_place(boxed, model, good):
    (_, pixels), *_ = good.items()
    height, width = pixels.shape[:2]
    run = segment_anything(boxed, model, "boxes", batch_size=8)
    assert_bad_ones_are_refused(run, boxed, BAD_BOXES)
    for sample in boxed:
        if sample.kind in BAD_BOXES:
            assert all(d.mask is None for d in sample.boxes.detections)
        if not BOXES.get(sample.kind):
            continue
        boxes = corners(BOXES[sample.kind], pixels)
        (segmentation,) = model.model.segment_anything([pixels], boxes=[boxes])
        for i, (detection, old, (x0, y0, x1, y1)) in enumerate(
            zip(sample.boxes.detections, BOXES[sample.kind], boxes.round().astype(int))
        ):
            assert detection.bounding_box == old
            if not segmentation.masks[i].size:
                assert detection.mask is None
                continue
            inside = np.zeros((height, width), bool)
            inside[max(y0, 0) : max(y1, y0 + 1, 0), max(x0, 0) : max(x1, x0 + 1, 0)] = True
            assert detection.mask.shape == (max(y1 - y0, 1), max(x1 - x0, 1))
            if sample.kind in ("inside", "partly outside"):  # as read by the evaluation and drawn by the App
                (rle,) = masks_of([detection.to_mongo()], (height, width))
                np.testing.assert_array_equal(mask_utils.decode(rle), segmentation.full_mask(i) & inside)
            assert detection.area_px == np.count_nonzero(segmentation.full_mask(i) & inside)


CLICKS = {  # points and their `sam_labels`
    "inside": ([(0.3, 0.4)], None),
    "one outside": ([(0.3, 0.4), (0.6, 0.6)], [1, 0]),
    "all outside the object": ([(0.3, 0.4)], [0]),
    "not all visible": ([(0.3, 0.4), (NAN, NAN), (1.5, 0.2), (0.2, -INF), (0.6, 0.6)], [1, 0, 1, 1, True]),
    "at the corners": ([(0, 0), (1, 1)], [1.0, False]),
}
BAD_CLICKS = {
    "no points": ([], None),
    "none visible": ([(NAN, NAN), (7, 0.5), (None, None)], None),
    "label missing": ([(0.3, 0.4), (0.6, 0.6)], [1]),
    "label too many": ([(0.3, 0.4)], [1, 1]),
    "other number": ([(0.3, 0.4)], [2]),
    "negative": ([(0.3, 0.4)], [-1]),
    "part": ([(0.3, 0.4)], [0.5]),
    "no number": ([(0.3, 0.4)], [NAN]),
    "text": ([(0.3, 0.4)], ["1"]),
    "no list": ([(0.3, 0.4)], 1),
    "label is none": ([(0.3, 0.4)], [None]),
}


def keypoint(points, labels):
    return fo.Keypoint(points=points, **({} if labels is None else {"sam_labels": labels}))


def point_prompts(clicks, pixels):
    """The arguments of `segment_anything` for these clicks on one image."""
    scale = np.float32(pixels.shape[1::-1])
    shown = [[0 <= x <= 1 and 0 <= y <= 1 for x, y in points] for points, _ in clicks]
    points = [np.float32(points)[is_shown] * scale for (points, _), is_shown in zip(clicks, shown)]
    labels = [np.array(labels or [1] * len(is_shown))[is_shown] for (_, labels), is_shown in zip(clicks, shown)]
    return {"points": [points], "point_labels": [labels]}


@pytest.mark.parametrize("api", ["segment_anything", "apply_model"])
def test_clicks_become_masks_or_are_refused(dataset, model, good, api):
    (path, pixels), *_ = good.items()
    first = fo.Keypoint(points=[(0.3, 0.4)], sam_labels=None)
    for name, click in (CLICKS | BAD_CLICKS).items():
        dataset.add_sample(fo.Sample(path, kind=name, clicks=fo.Keypoints(keypoints=[first.copy(), keypoint(*click)])))
    if api == "apply_model":
        dataset.apply_model(model, "masks", prompt_field="clicks", batch_size=8, num_workers=0)
        run = model
    else:
        run = segment_anything(dataset, model, "clicks", "masks", batch_size=8)
    assert_bad_ones_are_refused(run, dataset, BAD_CLICKS)
    for sample in dataset:
        if sample.kind in BAD_CLICKS:
            assert sample.masks is None
            continue
        clicks = [([(0.3, 0.4)], None), CLICKS[sample.kind]]
        (segmentation,) = model.model.segment_anything([pixels], **point_prompts(clicks, pixels))
        assert_masks(sample.masks, segmentation)


numbers = st.floats() | st.floats(-2, 2) | st.floats(0, 1)
relative_boxes = st.lists(numbers, max_size=5) | st.tuples(*[st.floats(-1, 1)] * 2, *[st.floats(0, 2)] * 2).map(list)


@given(boxes=st.lists(relative_boxes, max_size=3))
@settings(max_examples=20, deadline=None)
def test_any_boxes_become_masks_or_are_refused(model, good, boxes):
    (path, pixels), (other, beside) = good.items()
    get_item = ImageGetItem({"prompt_field": "boxes"})
    item = get_item({"id": "0" * 24, "filepath": path, "prompt_field": detections(boxes)})
    box = [0.2, 0.2, 0.5, 0.5]
    neighbour = get_item({"id": "1" * 24, "filepath": other, "prompt_field": detections([box])})
    with model:
        labels, labels_beside = model.predict_all([item, neighbour])
        failures = [failure.sample_id for failure in model.failures]
    assert_masks(labels_beside, model.model.segment_anything([beside], boxes=[corners([box], beside)])[0])

    def is_prompt(box):
        if len(box) != 4 or not np.isfinite(box).all() or not all(0 <= side <= 2 for side in box[2:]):
            return False
        return all(start <= 1 and start + side >= 0 for start, side in zip(box[:2], box[2:]))

    if not all(map(is_prompt, boxes)):
        assert labels is None and failures == ["0" * 24]
    elif not boxes:
        assert labels is None and failures == []
    else:
        assert failures == []
        assert_masks(labels, model.model.segment_anything([pixels], boxes=[corners(boxes, pixels)])[0])


@given(
    place=st.tuples(st.integers(0, 9), st.integers(0, 13), st.integers(1, 10), st.integers(1, 14)),
    box=st.tuples(*[st.floats(-2, 1)] * 2, *[st.floats(0, 2)] * 2),
    seed=st.integers(0, 99),
)
def test_mask_is_cropped_to_any_box(place, box, seed):
    """The crop is the same as from a larger canvas with the image in its middle."""
    height, width = 10, 14
    y, x, h, w = place
    h, w = min(h, height - y), min(w, width - x)
    mask = np.random.default_rng(seed).random((h, w)) < 0.7
    canvas = np.zeros((5 * height, 5 * width), bool)
    canvas[2 * height + y :, 2 * width + x :][:h, :w] = mask
    ones = np.ones(1, np.float32)
    segmentation = Segmentation(np.array([[x, y, x + w, y + h]]), [mask], ones, ones, ones, (height, width))
    left, right = round(box[0] * width), round((box[0] + box[2]) * width)
    top, bottom = round(box[1] * height), round((box[1] + box[3]) * height)
    expected = canvas[2 * height + top :, 2 * width + left :][: max(bottom - top, 1), : max(right - left, 1)]
    np.testing.assert_array_equal(mask_in_box(segmentation, 0, box), expected)


@pytest.mark.slow
def test_5000_prompts_on_one_image(dataset, model, good):
    (path, pixels), (other, _) = good.items()
    rng = np.random.default_rng(0)
    starts = rng.random((5000, 2))
    boxes = np.concatenate([starts, rng.random((5000, 2)) * (1 - starts)], 1).tolist()
    few = [[0.1, 0.1, 0.5, 0.5]]
    for name, its_boxes in ((other, few), (path, boxes), (other, few)):
        dataset.add_sample(fo.Sample(name, boxes=detections(its_boxes)))
    with bounded_memory():
        run = segment_anything(dataset, model, "boxes", batch_size=3)
    assert (run.objects, run.failures) == (5002, [])
    first, crowded, last = dataset
    assert content(first.boxes) == content(last.boxes) and first.boxes.detections[0].mask.any()
    every = list(range(0, 5000, 250))
    (segmentation,) = model.model.segment_anything([pixels], boxes=[corners([boxes[i] for i in every], pixels)])
    for number, i in enumerate(every):
        detection = crowded.boxes.detections[i]
        assert detection.bounding_box == boxes[i]
        if segmentation.masks[number].size:
            np.testing.assert_array_equal(detection.mask, mask_in_box(segmentation, number, boxes[i]))
