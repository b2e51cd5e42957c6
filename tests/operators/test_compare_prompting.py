import re

import fiftyone as fo
import pytest
from PIL import Image

NAME = "compare_prompting"
DEMO = {"model": "mobilesamv2-demo-torch", "device": "cpu", "grid": "16", "filters": False, "images": 1}
KEPT = ["compare_object_aware", "compare_grid_16"]


def table(text):
    """The cells of a Markdown table: {row: {column: text}}."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: dict(zip(rows[0][1:], row[1:])) for row in rows[2:]}


def buttons(calls):
    properties = calls["show_output"]["outputs"]["type"]["properties"]
    views = [each["view"] for each in properties.values() if each["view"].get("operator")]
    return {view["label"]: (view["operator"], view["params"]) for view in views}


def test_form_has_defaults(plugin, scenes):
    form = plugin.form(NAME, scenes)
    assert form.errors == []
    assert (form.default("images"), form.default("grid"), form.default("filters")) == (16, "32", True)
    assert form.choices("grid") == ["16", "32", "64"]
    assert form.default("gt_field") == "ground_truth" and form.choices("gt_field") == ["(none)", "ground_truth"]
    assert form.default("use_masks") is True and form.default("keep") is False
    description = form.inputs["keep"].view.description
    assert description == "In compare_object_aware and compare_grid_32, with their evaluations"


@pytest.mark.parametrize(
    "params, error",
    [
        ({"images": 0}, "Images: a whole number of at least 1 was expected, not 0"),
        ({"grid": "48"}, "Grid: '48' is no longer available"),
        ({"gt_field": "gone"}, "Ground truth: 'gone' is no longer available"),
        ({"model": "sam"}, "Model: 'sam' is no longer available"),
    ],
)
def test_form_says_what_is_wrong(plugin, scenes, params, error):
    (message,) = plugin.form(NAME, scenes, params).errors
    assert error in message


def test_form_needs_images(plugin, scenes, dataset):
    assert "Open a dataset" in plugin.form(NAME, None).errors[0]
    assert "has no samples" in plugin.form(NAME, dataset).errors[0]
    assert "works on the whole dataset" in plugin.form(NAME, scenes.to_patches("ground_truth")).messages[0]
    dataset.add_sample(fo.Sample("video.mp4"))
    assert "not images" in plugin.form(NAME, dataset).errors[0]


def test_form_without_ground_truth(plugin, scenes):
    scenes.delete_sample_field("ground_truth")
    form = plugin.form(NAME, scenes)
    assert form.errors == [] and form.default("gt_field") == "(none)" and "use_masks" not in form.inputs


def test_ground_truth_without_masks(plugin, scenes):
    for sample in scenes:
        for detection in sample.ground_truth.detections:
            detection.mask = None
        sample.save()
    form = plugin.form(NAME, scenes)
    assert form.errors == [] and form.default("use_masks") is False
    assert any("'Segment from prompts'" in message for message in form.messages)
    result = plugin.call(NAME, scenes, **DEMO)
    assert result["measurements"]["object_aware"]["metrics"]["AR@1000"] > 0


def test_comparison_leaves_nothing_behind(plugin, scenes):
    datasets, fields = fo.list_datasets(), set(scenes.get_field_schema(flat=True))
    text, calls = plugin.run_to_the_end(NAME, scenes, DEMO)
    prompts, seconds, grid_seconds, times = re.search(
        r"\*\*Object-aware prompting decoded (\d+) prompts per image in ([\d.]+) s; the 16x16 grid 256 in ([\d.]+) s: "
        r"([\d.]+) times as long\.\*\*",
        text,
    ).groups()
    cells = table(text)
    aware, grid = cells["object-aware"], cells["grid 16x16"]
    assert float(aware["prompts"]) == int(prompts) > 1 and grid["prompts"] == "256.0"  # for one image
    assert (aware["decoder, s"], grid["decoder, s"]) == (seconds, grid_seconds)
    assert float(times) == pytest.approx(float(grid_seconds) / float(seconds), rel=0.2)  # computed from rounded figures
    assert 0 < float(aware["AR@10"]) <= float(aware["AR@1000"]) <= 1
    assert "1 image by `mobilesamv2-demo-torch` on cpu" in text
    scenes.reload()
    assert fo.list_datasets() == datasets and set(scenes.get_field_schema(flat=True)) == fields
    assert scenes.list_evaluations() == [] and "set_view" not in calls
    operator, params = buttons(calls)["Show these images"]
    assert operator == "@voxel51/operators/show_samples"
    assert len(params["samples"]) == 1 and params["samples"][0] in scenes.values("id")


@pytest.mark.slow
def test_kept_results_are_stored_and_shown(plugin, scenes):
    text, calls = plugin.run_to_the_end(NAME, scenes, {**DEMO, "keep": True})
    scenes.reload()
    assert scenes.list_evaluations() == sorted(f"ar_{name}" for name in KEPT)
    cells = table(text)
    for row, name in zip(("object-aware", "grid 16x16"), KEPT):
        assert scenes.count(f"{name}.detections") == float(cells[row]["objects"]) > 1
        stored = scenes.load_evaluation_results(f"ar_{name}").metrics()["AR@1000"]
        assert cells[row]["AR@1000"] == f"{stored:.3f}"
    view = fo.DatasetView._build(scenes, calls["set_view"]["view"])
    assert view.values("id") == scenes.exists(KEPT[0]).values("id")

    form = plugin.form(NAME, scenes, {**DEMO, "keep": True})
    assert form.errors == [] and form.choices("gt_field") == ["(none)", "ground_truth"]
    for name in KEPT:
        labels = scenes.count(f"{name}.detections")
        assert any(f"{labels} labels of these images in '{name}' will be replaced" in m for m in form.messages)
    assert not any("replaced" in message for message in plugin.form(NAME, scenes, DEMO).messages)


def test_field_of_the_user_is_not_overwritten(plugin, scenes):
    scenes.add_sample_field("compare_grid_16", fo.StringField)
    (error,) = plugin.form(NAME, scenes, {**DEMO, "keep": True}).errors
    assert "'compare_grid_16' contains StringField, not Detections" in error
    assert plugin.form(NAME, scenes, DEMO).errors == []


@pytest.mark.slow
def test_image_without_objects(plugin, dataset, tmp_path):
    Image.new("RGB", (64, 64), (90, 90, 90)).save(tmp_path / "grey.png")
    dataset.add_sample(fo.Sample(str(tmp_path / "grey.png")))
    text, _ = plugin.run_to_the_end(NAME, dataset, {**DEMO, "filters": True})
    cells = table(text)
    assert cells["object-aware"]["objects"] == cells["grid 16x16"]["objects"] == "0.0"
    assert "Object-aware prompting found no object to decode; the 16x16 grid 256 in " in text
    assert "SAM's filters keep 0.0 of the grid's masks per image" in text and "Switch the filters off" in text
    assert "AR@10" not in cells["object-aware"]
    unfiltered, _ = plugin.run_to_the_end(NAME, dataset, DEMO)
    assert float(table(unfiltered)["grid 16x16"]["objects"]) > 0 and "Switch the filters off" not in unfiltered


@pytest.mark.slow
def test_failed_images_are_reported(plugin, scenes, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    scenes.add_sample(fo.Sample(str(bad)))
    target = scenes.select([scenes.first().id, scenes.last().id])
    text, calls = plugin.run_to_the_end(NAME, target, {**DEMO, "images": 2})
    assert "**1 image failed**" in text and "bad.png" in text
    _, params = buttons(calls)["Show failed samples"]
    assert params == {"samples": [scenes.last().id]}


@pytest.mark.slow
def test_cancelled_comparison_leaves_nothing_behind(plugin, scenes):
    datasets, cancelled = fo.list_datasets(), False
    for operator, params in plugin.run_in_app(NAME, scenes, {**DEMO, "images": 4}):
        if operator != "show_output":
            continue
        properties = params["outputs"]["type"]["properties"]
        label = properties["share"]["view"]["label"] if "share" in properties else ""
        if label.startswith("grid 16x16") and not cancelled:
            ctx = plugin.context("cancel", scenes, properties["cancel"]["view"]["params"])
            cancelled = plugin.operators["cancel"].execute(ctx)["cancelled"]
    assert cancelled and "was cancelled" in params["results"]["text"]
    assert fo.list_datasets() == datasets and not scenes.has_field(KEPT[0])
