import shutil
import subprocess

import fiftyone as fo
import pytest
from PIL import Image

from fiftyone_mobilesamv2 import evaluate_proposals
from fiftyone_mobilesamv2.operators.evaluate_proposals import whole_numbers
from fiftyone_mobilesamv2.runs.claims import on_record
from fiftyone_mobilesamv2.runs.record import SegmentationRun

NAME = "evaluate_proposals"


@pytest.fixture
def proposed(scenes):
    """Scenes whose `segmentations` are copies of each scene's first two objects, so the AR is known."""
    for sample in scenes:
        objects = sample.ground_truth.detections[:2]
        sample["segmentations"] = fo.Detections(
            detections=[
                fo.Detection(label="object", bounding_box=d.bounding_box, mask=d.mask, confidence=0.9 - 0.1 * i)
                for i, d in enumerate(objects)
            ]
        )
        sample.save()
    return scenes


@pytest.fixture
def boxed(proposed):
    """The same scenes with only boxes in the ground truth."""
    for sample in proposed:
        for detection in sample.ground_truth.detections:
            detection.mask = None
        sample.save()
    return proposed


def table(text):
    """The figures of a Markdown table: {column: {row: text}}."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {column: {row[0]: row[i] for row in rows[2:]} for i, column in enumerate(rows[0]) if i}


def test_form_has_defaults(plugin, proposed):
    form = plugin.form(NAME, proposed)
    assert form.errors == [] and form.messages == []
    assert (form.default("pred_field"), form.default("gt_field")) == ("segmentations", "ground_truth")
    assert (form.default("ks"), form.default("eval_key")) == ("10, 100, 1000", "ar")
    assert (form.default("use_masks"), form.default("rank_by")) == (True, "confidence")
    assert form.choices("gt_field") == ["ground_truth"]


def test_recorded_proposals_are_the_default(plugin, proposed):
    proposed.clone_sample_field("segmentations", "another")
    assert plugin.form(NAME, proposed).default("pred_field") == "segmentations"
    proposed.clone_sample_field("segmentations", "masks")
    with on_record(proposed, SegmentationRun("masks", {"prompting": "object_aware"}, images=1)):
        pass
    assert plugin.form(NAME, proposed).default("pred_field") == "masks"


@pytest.mark.parametrize(
    "params, error",
    [
        ({"ks": "ten"}, "K: whole numbers from 1 to 10,000 were expected, such as '10, 100, 1000', not 'ten'"),
        ({"ks": "10, 0"}, "not '10, 0'"),
        ({"ks": "10, -5"}, "not '10, -5'"),
        ({"ks": "1.5"}, "not '1.5'"),
        ({"ks": "10001"}, "not '10001'"),
        ({"ks": ","}, "not ','"),
        ({"eval_key": "my run"}, "Evaluation key: 'my run' is not valid"),
        ({"eval_key": "other"}, "'other' is an evaluation of another kind"),
        ({"pred_field": "gone"}, "Proposals: 'gone' is no longer available"),
        ({"pred_field": "ground_truth", "gt_field": "ground_truth"}, "Ground truth: 'ground_truth' is no longer"),
        ({"rank_by": "beauty"}, "Ranking: 'beauty' is no longer available"),
    ],
)
def test_form_says_what_is_wrong(plugin, proposed, params, error):
    proposed.evaluate_detections("segmentations", "ground_truth", eval_key="other", progress=False)
    (message,) = plugin.form(NAME, proposed, params).errors
    assert error in message


@pytest.mark.parametrize("text", ["1000, 10,100", "10 100 1000", "1000;100;10;10", " 100,10,1000, "])
def test_numbers_are_sorted_and_deduplicated(text):
    assert whole_numbers(text) == [10, 100, 1000]


def test_form_without_fields(plugin, scenes, dataset):
    assert "Open a dataset" in plugin.form(NAME, None).errors[0]
    assert "has no samples" in plugin.form(NAME, dataset).errors[0]
    assert "no field of proposals yet" in plugin.form(NAME, scenes).errors[0]
    scenes.clone_sample_field("ground_truth", "segmentations")
    scenes.delete_sample_field("ground_truth")
    (error,) = plugin.form(NAME, scenes).errors
    assert "no field of Detections or Polylines or Detection or Polyline other than 'segmentations'" in error
    scenes.delete_sample_field("segmentations")
    assert "no field of proposals yet" in plugin.form(NAME, scenes).errors[0]


def test_form_accepts_grouped_datasets(plugin, dataset):
    dataset.add_group_field("group", default="left")
    dataset.add_sample(fo.Sample("a.png", group=fo.Group().element("left")))
    for name in ("ground_truth", "segmentations"):
        dataset.add_sample_field(name, fo.EmbeddedDocumentField, embedded_doc_type=fo.Detections)
    assert plugin.form(NAME, dataset).errors == []


def test_summary_shows_the_figures(plugin, proposed):
    objects = proposed.count("ground_truth.detections")
    text, calls = plugin.run_to_the_end(NAME, proposed, {"ks": "10, 1"})
    figures = table(text)["all"]
    assert figures == {
        "AR@1": f"{4 / objects:.3f}",
        "AR@10": f"{8 / objects:.3f}",
        "AR": f"{6 / objects:.3f}",
        "objects": str(objects),
    }
    assert f"**AR@10 is {8 / objects:.3f}" in text and f"{objects} objects of `ground_truth` in 4 images" in text
    assert calls["open_panel"]["name"] == "segevery"
    proposed.reload()
    assert proposed.load_evaluation_results("ar").metrics()["AR@1"] == pytest.approx(4 / objects)
    assert proposed.count_values("ground_truth.detections.ar") == {"tp": 8, "fn": objects - 8}
    assert "skipped" not in text


def test_result_equals_that_of_evaluate_proposals(plugin, proposed):
    params = {"ks": "2", "rank_by": "confidence", "eval_key": "mine"}
    result = plugin.call(NAME, proposed, **params)
    expected = evaluate_proposals(proposed, "segmentations", ks=[2])
    assert result["eval_key"] == "mine" and result["skipped"] == [] and result["images"] == 4
    assert result["metrics"]["AR@2"] == expected.metrics()["AR@2"] > 0
    large = expected.average_recall.totals["large"]
    assert (result["metrics"]["ARl@2"] is None) == (large == 0)
    info = proposed.get_evaluation_info("mine").config
    assert (info.ks, info.use_masks, info.rank_by) == ([2], True, "confidence")


def test_size_groups_without_objects_show_no_figure(plugin, proposed):
    for sample in proposed:  # leaves no large objects
        objects = sample.ground_truth.detections
        sample.ground_truth.detections = [d for d in objects if d.mask.sum() <= 96**2]
        sample.save()
    text, _ = plugin.run_to_the_end(NAME, proposed)
    assert table(text)["large"] == {"AR@10": "-", "AR@100": "-", "AR@1000": "-", "AR": "-", "objects": "0"}
    proposed.set_values("ground_truth", [fo.Detections()] * 4)
    text, _ = plugin.run_to_the_end(NAME, proposed)
    assert "**No objects in `ground_truth`" in text


def test_only_selected_samples_are_measured(plugin, proposed):
    ids = proposed.values("id")
    params = {"view_target": "SELECTED_SAMPLES", "ks": "1"}
    result = plugin.call(NAME, proposed, selected=ids[:1], **params)
    assert result["metrics"]["AR@1"] == pytest.approx(1 / len(proposed.first().ground_truth.detections))


def test_earlier_evaluation_is_replaced(plugin, proposed):
    plugin.call(NAME, proposed, ks="1")
    form = plugin.form(NAME, proposed)
    assert form.errors == form.messages == [] and form.default("eval_key") == "ar_2"
    form = plugin.form(NAME, proposed, {"eval_key": "ar"})
    assert form.errors == [] and form.messages == ["The existing evaluation 'ar' will be replaced."]
    plugin.call(NAME, proposed, ks="2", eval_key="ar")
    assert proposed.get_evaluation_info("ar").config.ks == [2]


def test_field_of_the_user_is_not_overwritten(plugin, proposed):
    proposed.set_values("ar_tp", [7] * 4)
    *_, (operator, params) = plugin.run_in_app(NAME, proposed)
    view = params["outputs"]["type"]["properties"]["error"]["view"]
    assert operator == "show_output" and view["label"] == "Measure proposals (AR@K) failed"
    assert (
        "'ar_tp' exists and does not belong to an earlier evaluation. Choose another eval_key." in view["description"]
    )
    assert proposed.values("ar_tp") == [7] * 4 and proposed.list_evaluations() == []


def test_ground_truth_without_masks(plugin, boxed):
    objects = boxed.count("ground_truth.detections")
    form = plugin.form(NAME, boxed)
    assert form.errors == [] and form.default("use_masks") is False
    assert any("'ground_truth' have no masks: boxes are compared" in message for message in form.messages)
    assert any("'Segment from prompts' turns boxes into masks" in message for message in form.messages)
    (error,) = plugin.form(NAME, boxed, {"use_masks": True}).errors
    assert "'ground_truth' have no masks: compare boxes" in error
    result = plugin.call(NAME, boxed, ks="10")
    assert result["metrics"]["AR@10"] == pytest.approx(8 / objects)
    assert not boxed.get_evaluation_info("ar").config.use_masks


def test_polylines_need_no_masks(plugin, proposed):
    for sample in proposed:
        polylines = [d.to_polyline() for d in sample.ground_truth.detections]
        sample["outlines"] = fo.Polylines(polylines=polylines)
        sample.save()
    form = plugin.form(NAME, proposed, {"gt_field": "outlines"})
    assert form.errors == [] and form.default("use_masks") is True and form.messages == []


def test_unusable_label_skips_only_its_image(plugin, proposed, tmp_path):
    bad = proposed.first()
    bad.ground_truth.detections[0].mask = None
    bad.ground_truth.detections[0].mask_path = str(tmp_path / "gone.png")
    bad.save()
    text, calls = plugin.run_to_the_end(NAME, proposed)
    assert "1 image skipped" in text and bad.filepath in text and "gone.png" in text
    properties = calls["show_output"]["outputs"]["type"]["properties"]
    (button,) = [each for each in properties.values() if each["view"].get("label") == "Show skipped samples"]
    assert button["view"]["operator"] == "@voxel51/operators/show_samples"
    assert button["view"]["params"] == {"samples": [bad.id]}
    objects = proposed.skip(1).count("ground_truth.detections")
    assert table(text)["all"]["AR@10"] == f"{6 / objects:.3f}"


def test_cancel_stores_nothing(plugin, proposed):
    from fiftyone_mobilesamv2.errors import Cancelled
    from fiftyone_mobilesamv2.operators.app_work import Progress
    from fiftyone_mobilesamv2.operators.form import Form

    operator = plugin.operators[NAME]
    form = Form(plugin.context(NAME, proposed))
    operator.form(form)
    progress = Progress()
    progress.cancelled.set()
    with pytest.raises(Cancelled):
        operator.run(form, progress)
    assert proposed.list_evaluations() == [] and not proposed.has_field("ar_tp")


def test_video_frames_are_measured(plugin, proposed, tmp_path):
    if shutil.which("ffmpeg") is None:
        pytest.skip("needs ffmpeg")
    for i in range(2):
        Image.new("RGB", (64, 48), (40 * i, 90, 30)).save(tmp_path / f"{i}.png")
    video = tmp_path / "video.mp4"
    subprocess.run(["ffmpeg", "-loglevel", "error", "-i", tmp_path / "%d.png", video], check=True)
    dataset = fo.Dataset()
    try:
        sample = fo.Sample(str(video))
        for number in (1, 2):
            boxes = [[0.1, 0.1, 0.3, 0.3], [0.5, 0.5, 0.3, 0.3]]
            objects = [fo.Detection(label="thing", bounding_box=box) for box in boxes]
            proposals = [fo.Detection(label="object", bounding_box=boxes[0], confidence=0.5)]
            sample.frames[number] = fo.Frame(
                ground_truth=fo.Detections(detections=objects), segmentations=fo.Detections(detections=proposals)
            )
        sample.frames[2].segmentations.detections[0].confidence = float("nan")
        dataset.add_sample(sample)
        form = plugin.form(NAME, dataset)
        assert form.errors == []
        assert (form.default("pred_field"), form.default("gt_field")) == (
            "frames.segmentations",
            "frames.ground_truth",
        )
        text, calls = plugin.run_to_the_end(NAME, dataset, {"use_masks": False})
        assert table(text)["all"]["AR@10"] == "0.500"
        buttons = [each["view"] for each in calls["show_output"]["outputs"]["type"]["properties"].values()]
        (button,) = [view for view in buttons if view.get("label") == "Show skipped samples"]
        assert button["params"] == {"samples": [dataset.first().id]}
    finally:
        dataset.delete()
