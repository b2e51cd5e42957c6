"""Comparison of object-aware and grid prompting: figures, sampling of images, and cleanup."""

from pathlib import Path

import fiftyone as fo
import pytest

from fiftyone_mobilesamv2 import evaluate_proposals, load_coco, zoo
from fiftyone_mobilesamv2.errors import Cancelled
from fiftyone_mobilesamv2.evaluation import comparison
from fiftyone_mobilesamv2.evaluation.comparison import Comparison, Measurement, compare_promptings, draw, short
from fiftyone_mobilesamv2.labels.mask_files import MaskFiles
from fiftyone_mobilesamv2.training.scenes import write_coco

MODEL = "mobilesamv2-demo-torch"
SIDE = 4


@pytest.fixture(scope="module")
def scene_files(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("scenes"), 4)


@pytest.fixture
def scenes(mongod, scene_files):
    dataset = load_coco(*scene_files)
    yield dataset
    dataset.delete()


@pytest.fixture(scope="module")
def model():
    """The demo model without SAM's filters, which would remove nearly all of its masks."""
    return zoo.load_model(MODEL, device="cpu", pred_iou_thresh=0, stability_score_thresh=0)


@pytest.fixture
def unchanged(scenes):
    """Checks after the test that the datasets, the fields and the runs are unchanged."""

    def state():
        scenes.reload()
        fields = set(scenes.get_field_schema(flat=True))
        return (
            fo.list_datasets(),
            fields,
            scenes.list_evaluations(),
            scenes.list_runs(),
            scenes.values("metadata.width"),
        )

    scenes.set_values("metadata", [None] * 4)
    before = state()
    yield
    assert state() == before


def measurement(prompts, decode, crop=0.01, recall=None):
    seconds = {"encode": 5.0, "decode": decode, "crop": crop}
    return Measurement(recall, prompts, prompts, seconds, [])


@pytest.mark.slow
def test_figures_equal_those_of_model_and_evaluation(scenes, model, unchanged):
    result = compare_promptings(scenes, model, SIDE, gt_field="ground_truth")
    assert len(result.samples) == 4
    copy = scenes.clone()
    try:
        for name, rank_by in (("object_aware", "confidence"), ("grid", "sam")):
            settings = {"prompting": name, "points_per_side": SIDE}
            other = zoo.load_model(MODEL, device="cpu", pred_iou_thresh=0, stability_score_thresh=0, **settings)
            copy.apply_model(other, name, num_workers=0)
            measured = getattr(result, name)
            assert measured.masks == copy.count(f"{name}.detections") / 4 > 1
            expected = evaluate_proposals(copy, name, rank_by=rank_by)
            assert measured.recall.metrics() == pytest.approx(expected.average_recall.metrics(), nan_ok=True)
    finally:
        copy.delete()
    assert result.object_aware.prompts == result.object_aware.masks and result.grid.prompts == SIDE**2
    for measured in (result.object_aware, result.grid):
        assert measured.ms == pytest.approx(1000 * (sum(measured.seconds.values()) - measured.seconds["encode"]))
    assert result.ratio == result.grid.ms / result.object_aware.ms
    assert result.decoder_ratio == result.grid.seconds["decode"] / result.object_aware.seconds["decode"]
    metrics = result.to_dict()["measurements"]["grid"]["metrics"]
    assert metrics["AR@10"] == result.grid.recall.metrics()["AR@10"]
    assert result.table().loc["grid 4x4", "AR@1000"] == f"{metrics['AR@1000']:.3f}"


def test_model_is_unchanged(scenes, model, unchanged):
    before = dict(vars(model.config)), model.writer.label_bytes
    compare_promptings(scenes, model, SIDE, images=1)
    assert (vars(model.config), model.writer.label_bytes) == before


def test_without_ground_truth(scenes, model, unchanged):
    result = compare_promptings(scenes, model, SIDE, images=1)
    assert result.object_aware.recall is None and result.grid.masks > 1
    assert "metrics" not in result.to_dict()["measurements"]["grid"]
    assert list(result.table().columns) == [
        "prompts",
        "objects",
        "decoder, s",
        "all but encoder, s",
        "all but encoder, times",
    ]


def test_comparison_by_boxes(scenes, model, unchanged):
    result = compare_promptings(scenes, model, SIDE, images=2, gt_field="ground_truth", use_masks=False)
    copy = result.samples.clone()
    try:
        copy.apply_model(zoo.load_model(MODEL, device="cpu"), "proposals", num_workers=0)
        expected = evaluate_proposals(copy, "proposals", use_masks=False).average_recall.metrics()
    finally:
        copy.delete()
    assert result.object_aware.recall.metrics() == pytest.approx(expected, nan_ok=True)


def test_masks_on_disk_are_deleted(scenes, model, unchanged, monkeypatch):
    monkeypatch.setattr(comparison, "LABEL_BYTES", 0)
    written = []
    add = MaskFiles.add

    def record(self, mask):
        written.append(Path(add(self, mask)))
        assert written[-1].is_file()
        return str(written[-1])

    monkeypatch.setattr(MaskFiles, "add", record)
    result = compare_promptings(scenes, model, SIDE, images=1, gt_field="ground_truth")
    assert len(written) == result.object_aware.masks + result.grid.masks
    assert result.object_aware.recall.metrics()["AR@1000"] > 0
    assert not any(path.exists() for path in written)


@pytest.mark.parametrize("end", [Cancelled, RuntimeError])
@pytest.mark.parametrize("share", [0.25, 0.75])
def test_aborted_comparison_leaves_nothing_behind(scenes, model, unchanged, end, share):
    def progress(done, label):
        if done >= share:
            raise end

    with pytest.raises(end):
        compare_promptings(scenes, model, SIDE, images=2, gt_field="ground_truth", progress=progress)


def test_progress_says_what_is_running(scenes, model):
    reports = []
    compare_promptings(scenes, model, SIDE, images=2, progress=lambda share, label: reports.append((share, label)))
    assert list(dict.fromkeys(label for _, label in reports if not label.split(": ")[1].startswith("0"))) == [
        "object-aware: 1 of 2 images",
        "object-aware: 2 of 2 images",
        "grid 4x4: 1 of 2 images",
        "grid 4x4: 2 of 2 images",
    ]
    shares = [share for share, _ in reports]
    assert shares == sorted(shares) and shares[-1] == 1


@pytest.mark.slow
def test_kept_results_are_stored_and_replaced(scenes, model):
    result = compare_promptings(scenes, model, SIDE, images=2, gt_field="ground_truth", keep=True)
    assert scenes.list_evaluations() == ["ar_compare_grid_4", "ar_compare_object_aware"]
    for field, measured in (("compare_object_aware", result.object_aware), ("compare_grid_4", result.grid)):
        assert scenes.count(f"{field}.detections") == 2 * measured.masks
        ids = scenes.exists(field).values("id")
        assert sorted(ids) == sorted(result.samples.values("id"))
        stored = scenes.load_evaluation_results(f"ar_{field}")
        assert stored.average_recall.metrics() == pytest.approx(measured.recall.metrics(), nan_ok=True)
    # A second comparison replaces the stored labels instead of adding to them.
    again = compare_promptings(scenes, model, SIDE, images=2, gt_field="ground_truth", keep=True)
    assert scenes.count("compare_grid_4.detections") == 2 * again.grid.masks


def test_same_images_are_drawn_each_time(scenes):
    first = draw(scenes, 2).values("id")
    assert len(set(first)) == 2
    assert draw(scenes, 2).values("id") == first
    assert draw(scenes, 9).values("id") == scenes.values("id")
    assert set(draw(scenes.limit(2), 1).values("id")) < set(scenes.values("id")[:2])


@pytest.mark.slow
def test_failed_images_are_reported(scenes, model, tmp_path, unchanged):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    scenes.add_sample(fo.Sample(str(bad)))
    try:
        result = compare_promptings(scenes, model, SIDE, gt_field="ground_truth")
        bad_id = scenes.last().id
        for measured in (result.object_aware, result.grid):
            (failure,) = measured.failures
            assert (failure.sample_id, failure.filepath) == (bad_id, str(bad))
        assert result.grid.prompts == SIDE**2
        with pytest.raises(ValueError, match=r"No image could be segmented; the first: '.*bad\.png' is damaged"):
            compare_promptings(scenes.match({"filepath": str(bad)}), model, SIDE)
    finally:
        scenes.delete_samples(scenes.match({"filepath": str(bad)}))


def test_summary_sentence_and_table(scenes):
    result = Comparison(scenes.view(), 32, measurement(16.6, 0.081), measurement(1024, 4.93, crop=0.2))
    assert str(result) == (
        "Object-aware prompting decoded 17 prompts per image in 0.081 s; the 32x32 grid 1024 in 4.9 s: "
        "61 times as long."
    )
    assert result.ratio == pytest.approx(5.13 / 0.091)
    table = result.table()
    assert (
        table.loc["object-aware", "all but encoder, times"] == "1"
        and table.loc["grid 32x32", "all but encoder, times"] == "56"
    )
    assert table.loc["grid 32x32", "all but encoder, s"] == "5.1"


def test_summary_sentence_without_objects(scenes):
    result = Comparison(scenes.view(), 16, measurement(0, 0.001), measurement(256, 1.25))
    assert str(result) == "Object-aware prompting found no object to decode; the 16x16 grid 256 in 1.2 s per image."
    assert result.decoder_ratio is None


@pytest.mark.parametrize("value, text", [(0.0812, "0.081"), (4.93, "4.9"), (61.4, "61"), (152.0, "150"), (0, "0")])
def test_short_rounds_to_two_digits(value, text):
    assert short(value) == text
