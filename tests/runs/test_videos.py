"""Videos that are damaged, missing or rotated."""

import shutil
import struct

import cv2
import fiftyone as fo
import numpy as np
import pytest

from fiftyone_mobilesamv2 import evaluate_proposals, zoo
from fiftyone_mobilesamv2.errors import MobileSAMv2Error
from fiftyone_mobilesamv2.runs.record import failed_samples, recorded_runs
from fiftyone_mobilesamv2.runs.segment import segment_everything
from fiftyone_mobilesamv2.runs.videos import read_frames
from fiftyone_mobilesamv2.training.scenes import TEST_SEED, make_scene

FIELD = "frames.segmentations"
WIDTH, HEIGHT = 120, 80
needs_ffmpeg = pytest.mark.skipif(not (shutil.which("ffmpeg") and shutil.which("ffprobe")), reason="needs ffmpeg")


@pytest.fixture(scope="module")
def model():
    return zoo.load_model("mobilesamv2-demo-torch", device="cpu")


def write_video(path, count):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 5, (WIDTH, HEIGHT))
    for index in range(count):
        writer.write(cv2.resize(make_scene(TEST_SEED, index % 3).image, (WIDTH, HEIGHT))[:, :, ::-1])
    writer.release()
    return path


def frames_of(path):
    return [frame for batch in read_frames(str(path), 4) for frame in batch]


@needs_ffmpeg
@pytest.mark.slow
def test_unreadable_videos_are_listed_and_the_others_stored(dataset, model, tmp_path):
    content = bytearray(write_video(tmp_path / "first.mp4", 3).read_bytes())
    shutil.copy(tmp_path / "first.mp4", tmp_path / "last.mp4")
    (tmp_path / "junk.mp4").write_bytes(np.random.default_rng(0).bytes(2000))
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) * 3 // 4])  # the index is at the end
    broken = bytearray(write_video(tmp_path / "broken.mp4", 10).read_bytes())
    middle = slice(len(broken) // 2, len(broken) * 3 // 4)
    broken[middle] = np.random.default_rng(0).bytes(middle.stop - middle.start)
    (tmp_path / "broken.mp4").write_bytes(broken)
    names = ["first.mp4", "junk.mp4", "cut.mp4", "broken.mp4", "missing.mp4", "last.mp4"]
    dataset.add_samples([fo.Sample(str(tmp_path / name)) for name in names])

    run = segment_everything(dataset, model, FIELD, batch_size=4, progress=False)
    counts = [sum(frame.segmentations is not None for frame in sample.frames.values()) for sample in dataset]
    assert (counts[0], counts[-1]) == (3, 3) and 0 < counts[3] < 10
    errors = {failure.filepath: failure.error for failure in run.failures}
    assert list(errors) == [str(tmp_path / name) for name in names[1:5]]
    for path, problem in zip(errors, ["or not a video: ", "or not a video: ", f"{counts[3]} of its frames", "exist"]):
        assert errors[path].startswith(repr(path)) and problem in errors[path] and errors[path].count(path) == 1
    assert (run.images, run.num_failures, run.cancelled) == (sum(counts) + 4, 4, False)
    assert run.objects == dataset.count(f"{FIELD}.detections") > 0
    assert recorded_runs(dataset, FIELD)[-1] == run
    assert failed_samples(dataset, FIELD).values("filepath") == list(errors)


@pytest.mark.parametrize("installed", [[], ["ffmpeg"]])
def test_missing_ffmpeg_is_an_error_at_the_start(dataset, model, tmp_path, monkeypatch, installed):
    dataset.add_sample(fo.Sample(str(tmp_path / "video.mp4")))
    for name in installed:
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = "ffprobe" if installed else "ffmpeg and ffprobe"
    with pytest.raises(MobileSAMv2Error, match=rf"but {missing} can't be found in PATH. Install them"):
        segment_everything(dataset, model, FIELD, progress=False)
    assert recorded_runs(dataset, FIELD) == []


@needs_ffmpeg
def test_rotated_video_is_segmented_as_it_is_shown(dataset, model, tmp_path):
    plain = frames_of(write_video(tmp_path / "video.mp4", 2))
    content = bytearray((tmp_path / "video.mp4").read_bytes())
    matrix = content.index(b"tkhd") + 44  # ISO/IEC 14496-12, 8.3.2
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # clockwise
    (tmp_path / "video.mp4").write_bytes(content)
    rotated = frames_of(tmp_path / "video.mp4")
    assert len(rotated) == len(plain) == 2
    for frame, stored in zip(rotated, plain):
        np.testing.assert_array_equal(frame, np.rot90(stored, -1))

    dataset.add_sample(fo.Sample(str(tmp_path / "video.mp4")))
    segment_everything(dataset, model, FIELD, progress=False)
    video = dataset.first()
    assert (video.metadata.frame_width, video.metadata.frame_height) == (HEIGHT, WIDTH)
    (expected,) = model.model.segment_everything([rotated[0]])
    masks = [detection.mask for detection in video.frames[1].segmentations.detections]
    assert len(masks) == len(expected) > 0
    assert all(np.array_equal(mask, of_array) for mask, of_array in zip(masks, expected.masks))
    count = dataset.count(f"{FIELD}.detections")
    segment_everything(dataset, model, FIELD, replace=True, progress=False)
    assert dataset.count(f"{FIELD}.detections") == count
    dataset.clone_frame_field("segmentations", "ground_truth")
    results = evaluate_proposals(dataset, FIELD, gt_field="frames.ground_truth", eval_key="ar", progress=False)
    assert results.skipped == [] and results.metrics()["AR@1000"] == 1
