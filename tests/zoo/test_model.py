"""`apply_model` on real datasets in a real database."""

import logging
import os
import shutil
from collections import Counter
from pathlib import Path

import cv2
import fiftyone as fo
import numpy as np
import pytest
from PIL import Image

from fiftyone_mobilesamv2 import zoo
from fiftyone_mobilesamv2.errors import ArgumentError
from fiftyone_mobilesamv2.labels.detections import DETECTION_BYTES, ImageMasks
from fiftyone_mobilesamv2.labels.mask_files import MaskFiles
from fiftyone_mobilesamv2.modeling.masks import Segmentation
from fiftyone_mobilesamv2.runs.record import recorded_runs
from fiftyone_mobilesamv2.runs.segment import segment_everything
from fiftyone_mobilesamv2.training.scenes import TEST_SEED, make_scene
from fiftyone_mobilesamv2.zoo import model as zoo_model

MODEL = "mobilesamv2-demo-torch"
FIELD = "segmentations"


@pytest.fixture(scope="module")
def model():
    return zoo.load_model(MODEL, device="cpu")


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(TEST_SEED, index) for index in range(6)]


@pytest.fixture
def files(tmp_path, scenes):
    paths = [str(tmp_path / f"scene{i}.png") for i in range(len(scenes))]
    for path, scene in zip(paths, scenes):
        Image.fromarray(scene.image).save(path)
    return paths


@pytest.fixture
def filled(dataset, files):
    dataset.add_samples([fo.Sample(path) for path in files])
    return dataset


def content(labels):
    """The stored labels without IDs, in a form that can be compared."""
    return [
        (d.label, d.confidence, d.predicted_iou, d.stability, d.area_px, tuple(d.bounding_box), d.mask.tobytes())
        for d in labels.detections
    ]


def full_mask(detection, image):
    """bool [H, W], as the App shows it: the mask stretched over the relative box."""
    height, width = image.shape[:2]
    x, y, w, h = detection.bounding_box
    x0, y0, x1, y1 = (round(v) for v in (x * width, y * height, (x + w) * width, (y + h) * height))
    assert detection.mask.shape == (y1 - y0, x1 - x0)  # no actual stretching
    full = np.zeros((height, width), bool)
    full[y0:y1, x0:x1] = detection.mask
    return full


def test_stored_detections_equal_those_of_the_model(filled, model, scenes):
    filled.apply_model(model, FIELD, batch_size=4, num_workers=0)
    for sample, scene in zip(filled, scenes):
        (segmentation,) = model.model.segment_everything([scene.image])
        stored = sample[FIELD].detections
        assert len(stored) == len(segmentation) > 0
        for i, detection in enumerate(stored):
            assert detection.label == "object"
            assert detection.confidence == pytest.approx(segmentation.confidence[i])
            assert detection.predicted_iou == pytest.approx(segmentation.predicted_iou[i])
            assert detection.stability == pytest.approx(segmentation.stability[i])
            assert detection.area_px == segmentation.areas[i] == detection.mask.sum()
            assert detection.mask.dtype == bool
            np.testing.assert_array_equal(full_mask(detection, scene.image), segmentation.full_mask(i))
    assert model.failures == []
    assert model.num_labels == filled.count(f"{FIELD}.detections")


@pytest.mark.slow
@pytest.mark.parametrize("batch_size, num_workers", [(None, 0), (1, 0), (4, 2), (8, 2)])
def test_batches_and_workers_do_not_change_results(filled, model, batch_size, num_workers):
    filled.apply_model(model, FIELD, batch_size=4, num_workers=0)
    filled.apply_model(model, "again", batch_size=batch_size, num_workers=num_workers)
    for sample in filled:
        assert content(sample["again"]) == content(sample[FIELD])


@pytest.mark.slow
def test_spawned_workers(filled, model):
    import torch.multiprocessing as multiprocessing

    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        filled.limit(2).apply_model(model, FIELD, batch_size=2, num_workers=2)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert all(sample[FIELD].detections for sample in filled.limit(2))


def test_view_max_masks_and_confidence(filled, model):
    view = filled.limit(2)
    view.apply_model(model, FIELD, batch_size=2, num_workers=0)
    assert [sample[FIELD] is not None for sample in filled] == [True, True, False, False, False, False]

    capped = zoo.load_model(MODEL, device="cpu", max_masks=3)
    view.apply_model(capped, "capped", num_workers=0)
    view.apply_model(model, "sure", num_workers=0, confidence_thresh=0.7)
    view.apply_model(model, "any", num_workers=0, confidence_thresh=0.1)
    for sample in view:
        confidences = [d.confidence for d in sample[FIELD].detections]
        assert [d.confidence for d in sample["capped"].detections] == confidences[:3]
        assert [d.confidence for d in sample["sure"].detections] == [c for c in confidences if c >= 0.7]
        # The default of 0.4 does not limit lower thresholds.
        assert len(sample["any"].detections) > len(confidences)
    assert model.config.confidence_thresh is None


def test_grid_prompting(filled, scenes):
    model = zoo.load_model(MODEL, device="cpu", prompting="grid", points_per_side=4)
    filled.limit(1).apply_model(model, FIELD, num_workers=0)
    (segmentation,) = model.model.segment_everything([scenes[0].image], prompting="grid", points_per_side=4)
    assert [d.confidence for d in filled.first()[FIELD].detections] == pytest.approx(
        segmentation.predicted_iou.tolist()
    )


def test_masks_of_all_file_types_lie_on_the_objects_in_the_app(dataset, model, scenes, tmp_path):
    image = Image.fromarray(scenes[0].image)
    exif = image.getexif()
    exif[0x0112] = 6  # shown rotated clockwise by 90 degrees
    image.save(tmp_path / "rotated.png", exif=exif)
    image.save(tmp_path / "plain.png")
    image.convert("L").save(tmp_path / "grey.png")
    image.convert("RGBA").save(tmp_path / "rgba.png")
    image.quantize(64).save(tmp_path / "palette.png")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    grey16 = np.asarray(image.convert("L")).astype(np.uint16) << 8
    Image.fromarray(grey16).save(tmp_path / "grey16.png")
    Image.fromarray(scenes[1].image).resize((1000, 30)).save(tmp_path / "wide.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "pixel.png")
    paths = sorted(tmp_path.iterdir())
    dataset.add_samples([fo.Sample(str(path)) for path in paths])
    dataset.apply_model(model, FIELD, batch_size=5, num_workers=0)
    labels = {Path(sample.filepath).stem: sample[FIELD] for sample in dataset}

    turned = np.ascontiguousarray(np.rot90(scenes[0].image, -1))
    (expected,) = model.model.segment_everything([turned])
    masks = [full_mask(d, turned) for d in labels["rotated"].detections]
    assert len(masks) == len(expected) > 0
    assert all(np.array_equal(mask, expected.full_mask(i)) for i, mask in enumerate(masks))
    assert content(labels["rgba"]) == content(labels["plain"])
    assert content(labels["grey16"]) == content(labels["grey"])
    for name in ("palette", "cmyk"):  # the same objects in slightly different colours
        union = [np.any([full_mask(d, scenes[0].image) for d in labels[k].detections], axis=0) for k in (name, "plain")]
        assert (union[0] & union[1]).sum() / (union[0] | union[1]).sum() > 0.7
    assert labels["wide"] is not None and labels["pixel"] is not None


def test_failed_batch_is_retried_one_by_one_and_logged(filled, model, monkeypatch, caplog):
    segment = model.model.segment_everything

    def one_at_a_time(images, **parameters):
        if len(images) > 1:
            raise RuntimeError("out of memory")
        return segment(images, **parameters)

    monkeypatch.setattr(model.model, "segment_everything", one_at_a_time)
    with caplog.at_level(logging.WARNING):
        filled.apply_model(model, FIELD, batch_size=len(filled), num_workers=0)
    assert not model.failures and all(sample[FIELD] is not None for sample in filled)
    assert f"{len(filled)} images failed as a batch" in caplog.text and "by itself: out of memory" in caplog.text


def test_bad_file_fails_only_its_own_sample(filled, model, files, tmp_path, caplog):
    filled.apply_model(model, FIELD, batch_size=6, num_workers=0)
    before = {sample.id: content(sample[FIELD]) for sample in filled}
    Path(files[1]).write_bytes(Path(files[1]).read_bytes()[:2000])
    Path(files[3]).unlink()
    Path(files[4]).write_text("no image")
    bad = {files[1], files[3], files[4]}
    filled.clear_sample_field(FIELD)
    keeps = filled.match(fo.ViewField("filepath") == files[3]).first()
    keeps[FIELD] = fo.Detections(detections=[fo.Detection(label="mine", bounding_box=[0, 0, 1, 1])])
    keeps.save()
    with caplog.at_level(logging.WARNING):
        filled.apply_model(model, FIELD, batch_size=6, num_workers=2)
    assert {failure.filepath for failure in model.failures} == bad
    for failure in model.failures:
        assert filled[failure.sample_id].filepath == failure.filepath
        assert failure.filepath in caplog.text and failure.error
    for sample in filled:
        if sample.filepath not in bad:
            assert content(sample[FIELD]) == before[sample.id]
    keeps.reload()
    assert [d.label for d in keeps[FIELD].detections] == ["mine"]
    # The next run starts with an empty list of failures.
    filled.limit(1).apply_model(model, FIELD, num_workers=0)
    assert model.failures == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_failures_raise_with_raise_failures(filled, model, files, num_workers):
    """`skip_failures` of `apply_model` is not passed to models, so the model has its own parameter."""
    Path(files[1]).write_text("no image")
    strict = zoo.load_model(MODEL, device="cpu", raise_failures=True)
    with pytest.raises(Exception, match=r"scene1\.png"):
        filled.apply_model(strict, FIELD, batch_size=3, num_workers=num_workers, skip_failures=False)
    filled.apply_model(model, FIELD, batch_size=3, num_workers=num_workers)
    assert sum(sample[FIELD] is not None for sample in filled) == 5


def test_predict_on_arrays_raises(model, scenes):
    assert len(model.predict(scenes[0].image).detections) == len(model.model.segment_everything([scenes[0].image])[0])
    with pytest.raises(ValueError, match="must be a uint8 RGB array"):
        model.predict(scenes[0].image[..., 0])


def test_required_keys_do_not_affect_prompts(filled, model):
    get_item = model.build_get_item({"prompt_field": "boxes"})
    assert model.required_keys == ["id", "filepath"]
    box = fo.Detections(detections=[fo.Detection(label="mine", bounding_box=[0.1, 0.1, 0.5, 0.5])])
    item = get_item({"id": "0" * 24, "filepath": filled.first().filepath, "prompt_field": box})
    assert [d.label for d in model.predict(item).detections] == ["mine"]


def test_output_dir_receives_the_masks(filled, model, scenes, tmp_path):
    folder = tmp_path / "masks"
    filled.limit(1).apply_model(model, FIELD, num_workers=0, output_dir=str(folder))
    (segmentation,) = model.model.segment_everything([scenes[0].image])
    stored = filled.first()[FIELD].detections
    assert len(stored) == len(segmentation) == len(list(folder.iterdir()))
    for i, detection in enumerate(stored):
        assert detection.mask is None
        np.testing.assert_array_equal(cv2.imread(detection.mask_path, 0) > 0, segmentation.masks[i])


def test_masks_beyond_the_budget_go_to_disk(filled, model, scenes, tmp_path, monkeypatch, caplog):
    filled.apply_model(model, FIELD, num_workers=0)
    monkeypatch.setattr(zoo_model, "LABEL_BYTES_PER_SAMPLE", DETECTION_BYTES * 16 + 1500)
    small = zoo.load_model(MODEL, device="cpu", mask_dir=str(tmp_path / "masks"))
    with caplog.at_level(logging.INFO):
        filled.limit(1).apply_model(small, "small", num_workers=0)
    sample = filled.first()
    stored, reference = sample["small"].detections, sample[FIELD].detections
    on_disk = [d.mask is None for d in stored]
    assert any(on_disk) and not all(on_disk)
    for detection, expected in zip(stored, reference):
        mask = detection.mask if detection.mask is not None else cv2.imread(detection.mask_path, 0) > 0
        np.testing.assert_array_equal(mask, expected.mask)
    assert sum("don't fit into its document" in message for message in caplog.messages) == 1


def test_leftover_files_of_a_killed_apply_model_are_deleted(filled, tmp_path):
    """Files in use and files of unknown samples are kept; other unconfirmed files are deleted after a day."""
    folder = tmp_path / "masks" / "apply_model"
    model = zoo.load_model(MODEL, device="cpu", masks_on_disk=True, mask_dir=str(tmp_path / "masks"))
    filled.apply_model(model, FIELD, num_workers=0)
    stored = {Path(path) for path in filled.values(f"{FIELD}.detections.mask_path", unwind=True)}
    assert stored and all(path.is_file() and folder in path.parents for path in stored)
    assert list((folder / "unconfirmed").iterdir()) == []  # the run is complete

    written = {}
    for kind, sample_id in (("nobody's", filled.first().id), ("unknown", "a" * 24), ("new", filled.first().id)):
        files = MaskFiles(str(folder), sample_id, "apply_model")
        written[kind] = Path(files.add(np.ones((2, 2), bool)))
    notes = sorted((folder / "unconfirmed").iterdir(), key=lambda note: note.stat().st_mtime_ns)
    for note in notes[:2]:
        os.utime(note, (0, 0))
    with model:
        pass
    assert [path.is_file() for path in written.values()] == [False, True, True]
    assert all(path.is_file() for path in stored) and list((folder / "unconfirmed").iterdir()) == notes[2:]


@pytest.mark.slow
def test_document_stays_below_the_limit_of_mongodb(filled, tmp_path):
    """Each of two fields has 150 noise masks of 640x640, 9.8 MB when compressed."""
    rng = np.random.default_rng(0)
    model = zoo.load_model(MODEL, device="cpu", mask_dir=str(tmp_path / "masks"))
    ones = np.ones(150, np.float32)
    masks = [rng.random((640, 640)) > 0.5 for _ in range(150)]
    noise = Segmentation(np.tile([0, 0, 640, 640], (150, 1)), masks, ones, ones, ones, (640, 640))
    sample = filled.first()
    sample[FIELD] = model.writer.detections(ImageMasks(noise), MaskFiles(str(tmp_path / "masks"), sample.id, FIELD))
    sample.save()
    sample["second"] = sample[FIELD].copy()
    sample.save()
    places = Counter(d.mask is None for d in sample[FIELD].detections)
    assert places[True] and places[False]


def test_boxes_become_masks_and_keep_their_attributes(filled, model, scenes):
    for sample, scene in zip(filled, scenes):
        size = np.array(scene.labels.shape[::-1])
        sample["ground_truth"] = fo.Detections(
            detections=[
                fo.Detection(
                    label=f"thing{i}",
                    bounding_box=[*(box[:2] / size), *((box[2:] - box[:2]) / size)],
                    tags=["checked"],
                    mood="good",
                    iscrowd=0,
                )
                for i, box in enumerate(scene.boxes())
            ]
        )
        sample.save()
    without = filled.last()
    without["ground_truth"] = None
    without.save()
    filled.apply_model(model, FIELD, prompt_field="ground_truth", batch_size=4, num_workers=0)
    for sample, scene in list(zip(filled, scenes))[:-1]:
        (segmentation,) = model.model.segment_anything([scene.image], boxes=[scene.boxes()])
        prompts, stored = sample["ground_truth"].detections, sample[FIELD].detections
        assert [(d.id, d.label, d.tags, d.mood, d.iscrowd) for d in stored] == [
            (d.id, d.label, d.tags, d.mood, d.iscrowd) for d in prompts
        ]
        for i, detection in enumerate(stored):
            if segmentation.masks[i].size:
                np.testing.assert_array_equal(full_mask(detection, scene.image), segmentation.full_mask(i))
                assert detection.area_px == segmentation.areas[i]
                assert detection.confidence == pytest.approx(float(segmentation.predicted_iou[i]))
        assert all(d.mask is None for d in prompts)
    without.reload()
    assert without[FIELD] is None
    # Without prompts, the same model again segments everything.
    filled.limit(1).apply_model(model, "everything", num_workers=0)
    assert {d.label for d in filled.first()["everything"].detections} == {"object"}


def test_keypoints_become_masks(filled, model, scenes):
    sample, scene = filled.first(), scenes[0]
    size = np.array(scene.labels.shape[::-1])
    inside = [np.argwhere(mask)[len(np.argwhere(mask)) // 2][::-1] + 0.5 for mask in scene.masks()[:3]]
    outside = np.array([1.5, 1.5])
    prompts = [
        fo.Keypoint(label="lone", points=[tuple(inside[0] / size)]),
        fo.Keypoint(
            label="pair", points=[tuple(inside[1] / size), tuple(outside / size)], sam_labels=[1, 0], mood="ok"
        ),
        fo.Keypoint(label="hidden", points=[tuple(inside[2] / size), (float("nan"), float("nan"))]),
    ]
    sample["clicks"] = fo.Keypoints(keypoints=prompts)
    sample.save()
    filled.limit(1).apply_model(model, FIELD, prompt_field="clicks", num_workers=0)
    sample.reload()
    (segmentation,) = model.model.segment_anything(
        [scene.image],
        points=[[inside[0][None], np.stack([inside[1], outside]), inside[2][None]]],
        point_labels=[[np.array([1]), np.array([1, 0]), np.array([1])]],
    )
    stored = sample[FIELD].detections
    assert [d.label for d in stored] == ["lone", "pair", "hidden"]
    assert [d.id for d in stored] == [k.id for k in prompts]
    assert stored[1].mood == "ok"
    for i, detection in enumerate(stored):
        if segmentation.masks[i].size:
            np.testing.assert_array_equal(full_mask(detection, scene.image), segmentation.full_mask(i))


def test_bad_prompts_fail_only_their_own_sample(filled, model):
    values = [
        fo.Detections(detections=[fo.Detection(label="ok", bounding_box=[0.1, 0.1, 0.5, 0.5])]),
        fo.Detections(detections=[fo.Detection(label="nan", bounding_box=[float("nan"), 0.1, 0.5, 0.5])]),
        fo.Detections(detections=[]),
        fo.Detections(detections=[fo.Detection(label="outside", bounding_box=[-0.5, 0.9, 2, 2])]),
        fo.Detections(detections=[fo.Detection(label="empty", bounding_box=[0.5, 0.5, 0, 0])]),
        fo.Detections(detections=[fo.Detection(label="none", bounding_box=None)]),
    ]
    filled.set_values("prompts", values)
    filled.apply_model(model, FIELD, prompt_field="prompts", batch_size=6, num_workers=0)
    samples = list(filled)
    assert {f.sample_id for f in model.failures} == {samples[1].id, samples[5].id}
    assert all("bounding box" in f.error for f in model.failures)
    assert samples[0][FIELD].detections[0].label == "ok"
    assert samples[3][FIELD].detections[0].label == "outside"
    assert samples[4][FIELD].detections[0].label == "empty"


def test_group_slices_are_segmented(mongod, model, files):
    dataset = fo.Dataset()
    try:
        dataset.add_group_field("group", default="left")
        group = fo.Group()
        left = fo.Sample(files[0], group=group.element("left"))
        right = fo.Sample(files[1], group=group.element("right"))
        dataset.add_samples([left, right])
        dataset.select_group_slices(["left", "right"]).apply_model(model, FIELD, num_workers=0)
        stored = dataset.select_group_slices(["left", "right"])
        assert all(sample[FIELD].detections for sample in stored)
    finally:
        dataset.delete()


@pytest.fixture
def video(dataset, scenes, tmp_path):
    """A dataset with a video of three frames, which also exist as image files."""
    path, frames = str(tmp_path / "video.mp4"), []
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), 5, (320, 256))
    sample = fo.Sample(path)
    for number, scene in enumerate(scenes[:3], 1):
        image = cv2.resize(scene.image, (320, 256))
        writer.write(image[:, :, ::-1])
        frames.append(str(tmp_path / f"frame{number}.png"))
        Image.fromarray(image).save(frames[-1])
        sample.frames[number] = fo.Frame(filepath=frames[-1])
    writer.release()
    dataset.add_sample(sample)
    return dataset


def test_sampled_frames_are_segmented(video, model):
    frames = video.to_frames()
    # Without workers, FiftyOne 1.22 loses track of the new field of a frames view.
    frames.apply_model(model, FIELD, batch_size=2, num_workers=1)
    for frame in frames:
        (segmentation,) = model.model.segment_everything([np.asarray(Image.open(frame.filepath))])
        assert len(frame[FIELD].detections) == len(segmentation) > 0
    # A frames view writes to the video's dataset, but the asynchronous writes of FiftyOne 1.22 may skip frames.
    frames.save()
    video.reload()
    stored = video.first().frames
    assert [len(stored[n][FIELD].detections) for n in (1, 2, 3)] == [len(f[FIELD].detections) for f in frames]


def refused(samples, model, expected, **options):
    """FiftyOne passes no samples to a model, and would fail only after all images are segmented, or not at all."""
    with pytest.raises(ArgumentError, match=expected):
        samples.apply_model(model, **{"label_field": FIELD, "num_workers": 0} | options)
    assert model.num_images == 0


def test_apply_model_refuses_images_whose_masks_would_be_lost(filled, model):
    with model:
        pass  # forgets the images of other tests
    box = fo.Detection(label="x", bounding_box=[0.1, 0.1, 0.2, 0.2])
    filled.set_values("boxes", [fo.Detections(detections=[box.copy()]) for _ in filled])
    filled.evaluate_detections("boxes", gt_field="boxes", eval_key="eval", progress=False)
    flattened = filled.group_by("filepath").flatten()
    refused(filled.to_patches("boxes"), model, "Patches can't be segmented: segment the samples")
    refused(filled.to_evaluation_patches("eval"), model, "Patches can't be segmented: segment the samples")
    refused(flattened, model, r"dataset\.select\(view\.values\('id'\)\)")
    refused(filled, model, "'tags' contains ListField, not Detections", label_field="tags")
    filled.select(flattened.limit(1).values("id")).apply_model(model, FIELD, num_workers=0)
    assert filled.count(f"{FIELD}.detections") > 0


def test_apply_model_refuses_frames_whose_masks_would_be_lost(video, model):
    with model:
        pass
    video.add_frame_field("boxes", fo.EmbeddedDocumentField, embedded_doc_type=fo.Detections)
    refused(video.to_frames().to_patches("boxes"), model, "Patches can't be segmented: segment the samples")
    refused(video.to_frames(), model, "pass num_workers=1 or more")
    refused(video, model, r"apply it to a frames view, dataset\.to_frames\(", prompt_field="frames.boxes")
    refused(video, model, "'frames.frame_number' contains FrameNumberField", label_field="frame_number")
    video.to_frames().apply_model(model, "boxes", batch_size=2, num_workers=0)  # a field that exists
    # From the database: frames that a refusal's traceback keeps alive would be shown as they were.
    assert all(video.values("frames[].boxes.detections"))
    assert not video.has_frame_field(FIELD)


@pytest.mark.skipif(not (shutil.which("ffmpeg") and shutil.which("ffprobe")), reason="needs ffmpeg")
def test_clips_are_segmented(video, model):
    video.to_clips([[[2, 3]]]).apply_model(model, FIELD)
    video.reload()
    assert [bool(video.first().frames[number][FIELD]) for number in (1, 2, 3)] == [False, True, True]


@pytest.mark.skipif(not (shutil.which("ffmpeg") and shutil.which("ffprobe")), reason="needs ffmpeg")
def test_video_is_segmented(video, model):
    video.apply_model(model, f"frames.{FIELD}", batch_size=2)
    stored = video.first().frames
    assert all(stored[number][FIELD].detections for number in (1, 2, 3))


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("ffmpeg") and shutil.which("ffprobe")), reason="needs ffmpeg")
def test_interrupted_video_is_resumed(video, model, monkeypatch):
    video.apply_model(model, "frames.reference", batch_size=1)
    segment, calls = model._segment, []

    def interrupt(items):
        calls.append(items)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return segment(items)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model, "_segment", interrupt)
        segment_everything(video, model, f"frames.{FIELD}", batch_size=1)
    assert recorded_runs(video, f"frames.{FIELD}")[-1].cancelled
    assert not segment_everything(video, model, f"frames.{FIELD}", batch_size=1).cancelled
    stored = video.first().frames
    assert [content(stored[n][FIELD]) for n in (1, 2, 3)] == [content(stored[n]["reference"]) for n in (1, 2, 3)]
    assert segment_everything(video, model, f"frames.{FIELD}").images == 0
