"""The SegEvery panel as the App uses it: registration, events, and the operators it triggers in the App."""

import json
import re
import shutil
from datetime import datetime
from pathlib import Path

import fiftyone as fo
import fiftyone.core.odm as foo
import numpy as np
import pytest
from bson import json_util
from fiftyone.operators.executor import ExecutionContext, Executor

from fiftyone_mobilesamv2 import evaluate_proposals, load_coco, zoo
from fiftyone_mobilesamv2.evaluation.proposals import ProposalEvaluationConfig
from fiftyone_mobilesamv2.modeling.checkpoints.trained import trained_dir, write_trained
from fiftyone_mobilesamv2.panels import queries
from fiftyone_mobilesamv2.runs import segment as segmentation
from fiftyone_mobilesamv2.runs.record import recorded_runs
from fiftyone_mobilesamv2.training.scenes import write_coco

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "@mobilesamv2/fiftyone_mobilesamv2"
SIDE = 200  # of each image, in pixels


@pytest.fixture(scope="module")
def panel(mongod, tmp_path_factory):
    import fiftyone.plugins.context as fopc

    folder = tmp_path_factory.mktemp("plugins")
    (folder / "fiftyone_mobilesamv2").symlink_to(ROOT, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fo.config, "plugins_dir", str(folder))
        (context,) = (c for c in fopc.build_plugin_contexts() if c.name == PLUGIN)
    assert context.errors == []
    (panel,) = (each for each in context.instances if each.name == "segevery")
    return panel


class Response:
    """What the panel sends to the App in response to an event.

    Attributes:
        calls: name of an App operator -> its parameters.
        contents: name -> property of the panel; None if the panel was not redrawn.
    """

    def __init__(self, panel, dataset, event, runs=None, chosen_model=None, **params):
        executor = Executor()
        state = {"runs": runs, "model": chosen_model} if runs is not None else {"model": chosen_model}
        params |= {"panel_id": "p", "panel_state": state, "__method__": event}
        request = {"params": params} | ({} if dataset is None else {"dataset_name": dataset.name})
        panel.execute(ExecutionContext(request, executor=executor, operator_uri=panel.uri))
        self.calls = {each.operator_uri.split("/")[-1]: each.params for each in executor._requests}
        output = self.calls.get("show_panel_output")
        self.contents = output and output["output"]["type"]["properties"]
        self._dataset = dataset

    def plot(self, name):
        """The plot's traces by name."""
        view = self.contents[name]["type"]["properties"]["plot"]["view"]
        return {trace["name"]: trace for trace in view["data"]}

    def text(self, name):
        return self.contents[name]["default"]

    @property
    def view(self):
        stages = json_util.loads(json.dumps(self.calls["set_view"]["view"]))  # as the App's server parses them
        return fo.DatasetView._build(self._dataset, stages)

    def objects(self, field="ground_truth"):
        """The `note` of each object in the view of patches, sorted."""
        return sorted(self.view.values(f"{field}.note"))


def box(x, y, width, height, **attributes):
    """A label with a mask that fills its box, given in pixels."""
    bounding_box = [value / SIDE for value in (x, y, width, height)]
    return fo.Detection(label="object", bounding_box=bounding_box, mask=np.ones((height, width), bool), **attributes)


@pytest.fixture
def measured(dataset):
    """Five objects in three images. `good` finds three exactly and one with IoU 0.775; `few` finds one."""
    small, medium, large = (0, 0, 10, 10), (0, 50, 50, 50), (100, 100, 100, 100)
    images = [
        {
            "ground_truth": [
                box(*small, note="small0", frequency="r"),
                box(*medium, note="medium0", frequency="c"),
                box(*large, note="large0", frequency="f"),
            ],
            "good": [box(*large, confidence=0.9), box(*medium, confidence=0.8), box(*small, confidence=0.7)],
            "few": [box(*large, confidence=0.9)],
        },
        {"ground_truth": [box(0, 0, 20, 20, note="small1", frequency="r", area=5000.0)], "good": [], "few": []},
        {
            "ground_truth": [box(0, 0, 40, 40, note="medium2", frequency="c")],
            "good": [box(0, 0, 40, 31, confidence=0.5)],
        },
    ]
    for number, fields in enumerate(images):
        sample = fo.Sample(f"/nowhere/{number}.png", metadata=fo.ImageMetadata(width=SIDE, height=SIDE))
        for name, labels in fields.items():
            sample[name] = fo.Detections(detections=labels)
        dataset.add_sample(sample)
    evaluate_proposals(dataset, "good", eval_key="good_ar")
    evaluate_proposals(dataset, "few", eval_key="few_ar")
    return dataset


BOTH = ["good_ar", "few_ar"]


def test_latest_evaluation_is_selected(panel, measured):
    for event in ("on_load", "on_change_dataset"):
        response = Response(panel, measured, event)
        assert response.calls["patch_panel_state"]["state"] == {"runs": ["few_ar"]}
        assert [choice["value"] for choice in response.contents["runs"]["view"]["choices"]] == ["few_ar", "good_ar"]
        assert list(response.plot("by_k")) == ["few_ar"]


def test_selection_of_evaluations_is_kept(panel, measured):
    response = Response(panel, measured, "choose", runs=["few_ar"], value=BOTH)
    assert response.calls["patch_panel_state"]["state"] == {"runs": BOTH}
    assert list(response.plot("by_k")) == BOTH
    assert list(Response(panel, measured, "choose", runs=BOTH, value=[]).plot("by_k")) == ["few_ar"]


def test_evaluations_of_other_methods_are_not_listed(panel, measured):
    measured.evaluate_detections("good", gt_field="ground_truth", eval_key="coco_run", method="coco")
    assert queries.evaluations(measured) == ["few_ar", "good_ar"]


def test_plots_and_table_show_the_recall(panel, measured):
    response = Response(panel, measured, "refresh", runs=BOTH)
    good, few = (response.plot("by_iou")[key] for key in BOTH)
    assert good["x"] == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
    assert good["y"] == [0.8] * 6 + [0.6] * 4
    assert few["y"] == [0.2] * 10
    good = dict(zip(response.plot("by_k")["good_ar"]["x"], response.plot("by_k")["good_ar"]["y"]))
    # The best proposal of each image finds one object at all IoUs and one up to 0.75.
    assert good[1] == pytest.approx((6 * 0.4 + 4 * 0.2) / 10)
    assert good[2] == pytest.approx(good[1] + 0.2)
    assert good[10] == good[100] == good[1000] == pytest.approx((6 * 0.8 + 4 * 0.6) / 10)
    assert len(good) <= 103
    groups = dict(zip(response.plot("by_group")["good_ar"]["x"], response.plot("by_group")["good_ar"]["y"]))
    expected = {"all": 0.72, "small": 0.5, "medium": 0.8, "large": 1, "rare": 0.5, "common": 0.8, "frequent": 1}
    assert groups == pytest.approx(expected)
    assert response.plot("by_group")["good_ar"]["hovertext"][1] == "2 objects"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in response.text("table").splitlines()]
    assert rows[0] == ["Evaluation", "AR@10", "AR@100", "AR@1000", "AR"]
    assert rows[2:] == [["`good_ar`", *["0.720"] * 4], ["`few_ar`", *["0.200"] * 4]]


def test_names_are_shown_literally_and_found_when_clicked(panel, measured):
    name = "x`|<a href='http://host/'>p</a>&amp;"
    measured.rename_sample_field("good", name)
    results = evaluate_proposals(measured, name, eval_key="hostile")
    database = foo.get_db_conn()
    database.datasets.update_one({"name": measured.name}, {"$rename": {"evaluations.hostile": f"evaluations.{name}"}})
    database.runs.update_one({"key": "hostile"}, {"$set": {"key": name}})
    measured.reload()
    response = Response(panel, measured, "refresh", runs=[name])
    escaped = "x`|&lt;a href='http://host/'&gt;p&lt;/a&gt;&amp;amp;"
    assert list(response.plot("by_k")) == list(response.plot("counts")) == [escaped]
    assert r"| `x'\|<a href='http://host/'>p</a>&amp;` |" in response.text("table")
    assert f"The time for `{name.replace('`', chr(39))}` is unknown" in response.text("unknown")
    missed = Response(panel, measured, "show_missed_by_k", runs=[name], trace=escaped, x=1)
    assert len(missed.view) == results.missed(k=1).count("ground_truth.detections") > 0
    images = Response(panel, measured, "show_images", runs=[name], trace=escaped, id="0-0")
    assert images.view.values("filepath") == ["/nowhere/1.png"]


@pytest.mark.parametrize(
    "event, clicked, objects",
    [
        ("show_missed_by_k", {"x": 1}, ["medium0", "small0", "small1"]),
        ("show_missed_by_k", {"x": 1000}, ["small1"]),
        ("show_missed_by_iou", {"x": 0.5}, ["small1"]),
        ("show_missed_by_iou", {"x": 0.8}, ["medium2", "small1"]),
        ("show_missed_by_group", {"x": "all", "id": "all"}, ["small1"]),
        ("show_missed_by_group", {"x": "small", "id": "small"}, ["small1"]),
        ("show_missed_by_group", {"x": "rare", "id": "rare"}, ["small1"]),
    ],
)
def test_click_shows_missed_objects(panel, measured, event, clicked, objects):
    response = Response(panel, measured, event, runs=BOTH, trace="good_ar", **clicked)
    assert response.objects() == objects
    assert response.contents is None  # the panel itself is not redrawn


def test_click_applies_to_the_clicked_evaluation(panel, measured):
    response = Response(panel, measured, "show_missed_by_group", runs=BOTH, trace="few_ar", id="medium")
    assert response.objects() == ["medium0", "medium2"]


def test_click_on_a_size_without_missed_objects_only_notifies(panel, measured):
    response = Response(panel, measured, "show_missed_by_group", runs=BOTH, trace="good_ar", id="large")
    assert set(response.calls) == {"notify"}


@pytest.mark.parametrize("options", [{"use_masks": False}, {"area_field": "area"}])
def test_sizes_match_those_of_the_evaluation(panel, measured, options):
    for sample in measured:
        for number, label in enumerate(sample.ground_truth.detections):
            label["area"] = 5000.0 + number  # all of them medium
            label.mask = None if "use_masks" in options else label.mask
        sample.save()
    evaluate_proposals(measured, "good", eval_key="other", **options)
    response = Response(panel, measured, "show_missed_by_group", runs=["other"], trace="other", id="medium")
    if "area_field" in options:
        assert response.objects() == ["small1"]
    else:
        assert set(response.calls) == {"notify"}
        assert Response(panel, measured, "show_missed_by_group", trace="other", id="small").objects() == ["small1"]


def test_sizes_exclude_images_without_metadata(panel, measured):
    measured.clear_sample_field("metadata")
    response = Response(panel, measured, "show_missed_by_group", trace="good_ar", id="small")
    assert set(response.calls) == {"notify"}  # the image is skipped


def test_click_on_a_count_shows_its_images(panel, measured):
    response = Response(panel, measured, "refresh", runs=BOTH)
    bars = response.plot("counts")
    assert bars["good_ar"]["x"] == bars["few_ar"]["x"] == [0, 1, 2, 3]
    assert bars["good_ar"]["y"] == [1, 1, 0, 1]
    assert bars["few_ar"]["y"] == [1, 1, 0, 0]  # the third image was not evaluated
    ids = measured.values("id")
    for bar, expected in ((0, [ids[1]]), (1, [ids[2]]), (3, [ids[0]])):
        clicked = {"trace": "good_ar", "id": bars["good_ar"]["ids"][bar]}
        assert Response(panel, measured, "show_images", runs=BOTH, **clicked).view.values("id") == expected


def test_bars_cover_ranges_of_large_counts():
    from fiftyone_mobilesamv2.evaluation.figures import objects_per_image

    counts = [0, 4, 5, 99, 100]
    (trace,) = objects_per_image({"a": counts}).data
    assert len(trace["x"]) <= 20
    for name, images in zip(trace["ids"], trace["y"]):
        low, high = map(int, name.split("-"))
        assert images == sum(low <= count <= high for count in counts)
    assert sum(trace["y"]) == 5


def test_evaluation_of_a_view_is_shown(panel, measured):
    evaluate_proposals(measured.limit(1), "good", eval_key="part")
    response = Response(panel, measured, "refresh", runs=["part"])
    assert response.plot("counts")["part"]["y"] == [0, 0, 0, 1]
    clicked = {"trace": "part", "id": "0-0"}
    assert set(Response(panel, measured, "show_images", runs=["part"], **clicked).calls) == {"notify"}


def test_evaluation_of_frames_is_shown(panel, dataset):
    for number, counts in enumerate([(1, 2), (2, 2)]):
        video = fo.Sample(f"/nowhere/{number}.mp4", metadata=fo.VideoMetadata(frame_width=SIDE, frame_height=SIDE))
        for frame, count in enumerate(counts, 1):
            boxes = [box(50 * i, 0, 40, 40, confidence=0.5) for i in range(count)]
            truth = [box(50 * i, 0, 40, 40) for i in range(2)]
            masks = fo.Detections(detections=boxes)
            video.frames[frame] = fo.Frame(masks=masks, ground_truth=fo.Detections(detections=truth))
        video.frames[3] = fo.Frame()
        dataset.add_sample(video)
    evaluate_proposals(dataset, "frames.masks", "frames.ground_truth", eval_key="ar")
    response = Response(panel, dataset, "on_load")
    assert response.plot("counts")["ar"]["y"] == [0, 1, 3]
    response = Response(panel, dataset, "show_images", trace="ar", id="1-1")
    assert response.view.values("id") == [dataset.first().id]
    assert response.view.count("frames") == 1


def test_replaced_evaluation_is_reloaded(panel, measured):
    assert Response(panel, measured, "refresh", runs=["few_ar"]).plot("by_iou")["few_ar"]["y"][0] == 0.2
    measured.set_values("few", measured.values("good"))
    evaluate_proposals(measured, "few", eval_key="few_ar")
    assert Response(panel, measured, "refresh", runs=["few_ar"]).plot("by_iou")["few_ar"]["y"][0] == 0.8


def test_deleted_evaluation_disappears(panel, measured):
    measured.delete_evaluation("good_ar")
    assert list(Response(panel, measured, "refresh", runs=BOTH).plot("by_k")) == ["few_ar"]
    response = Response(panel, measured, "show_missed_by_iou", runs=BOTH, trace="good_ar", x=0.5)
    assert "good_ar" in response.calls["notify"]["message"] and list(response.plot("by_k")) == ["few_ar"]


def test_renamed_fields_are_followed(panel, measured):
    before = Response(panel, measured, "on_load").plot("counts")
    measured.rename_sample_fields({"ground_truth": "gt", "few": "masks"})
    response = Response(panel, measured, "on_load")
    assert not [name for name in response.contents if name.endswith("error")]
    assert response.plot("counts")["few_ar"]["y"] == before["few_ar"]["y"]
    click = Response(panel, measured, "show_missed_by_iou", trace="few_ar", x=0.5)
    assert click.objects("gt") == ["medium0", "medium2", "small0", "small1"]


def test_evaluation_that_was_interrupted_is_not_listed(panel, measured):
    """A killed process leaves an evaluation without results."""
    interrupted = ProposalEvaluationConfig("few", "ground_truth").build()
    info = interrupted.run_info_cls()("interrupted", timestamp=datetime.now(), config=interrupted.config)
    interrupted.save_run_info(measured, info)
    assert "interrupted" in measured.list_evaluations() and queries.evaluations(measured) == ["few_ar", "good_ar"]
    evaluate_proposals(measured, "few", eval_key="interrupted")
    assert queries.evaluations(measured)[0] == "interrupted"


def test_deleted_field_is_reported(panel, measured):
    measured.delete_sample_field("few")
    response = Response(panel, measured, "on_load")
    assert "few" in response.contents["objects_error"]["view"]["description"]
    assert response.plot("by_iou")["few_ar"]["y"] == [0.2] * 10
    measured.delete_sample_field("ground_truth")
    response = Response(panel, measured, "show_missed_by_iou", trace="few_ar", x=0.5)
    assert "ground_truth" in response.calls["notify"]["message"]
    assert response.plot("by_iou")["few_ar"]["y"] == [0.2] * 10


def test_panel_without_samples_or_dataset(panel, dataset):
    assert "No field has been segmented yet" in Response(panel, dataset, "on_load").text("text")
    assert "Open a dataset" in Response(panel, None, "on_load").text("text")


def test_ground_truth_without_objects(panel, dataset):
    sample = fo.Sample("/nowhere/0.png", metadata=fo.ImageMetadata(width=SIDE, height=SIDE))
    sample["ground_truth"] = fo.Detections()
    sample["masks"] = fo.Detections(detections=[box(0, 0, 10, 10, confidence=0.5)])
    dataset.add_sample(sample)
    evaluate_proposals(dataset, "masks", eval_key="ar")
    response = Response(panel, dataset, "on_load")
    assert response.plot("by_iou")["ar"]["y"] == [None] * 10
    assert re.search(r"\| +`ar` \| +- \| +- \| +- \| +- \|", response.text("table"))
    assert response.plot("counts")["ar"]["y"] == [0, 1]


@pytest.fixture(scope="module")
def segmented_scenes(mongod, tmp_path_factory):
    """Two scenes with `ground_truth` and a recorded run in `segmentations`."""
    dataset = load_coco(*write_coco(tmp_path_factory.mktemp("scenes"), 2))
    segmentation.segment_everything(dataset, zoo.load_model("mobilesamv2-demo-torch", device="cpu"))
    yield dataset
    dataset.delete()


def test_segmented_field_without_an_evaluation(panel, segmented_scenes):
    response = Response(panel, segmented_scenes, "on_load")
    assert "Evaluate `segmentations`" in response.text("text")
    buttons = response.contents["buttons"]["type"]["properties"]
    assert [name for name, each in buttons.items() if each["view"]["variant"] == "contained"] == ["evaluate_proposals"]
    assert "runs" not in response.contents and "by_k" not in response.contents
    counts = [len(sample.segmentations.detections) for sample in segmented_scenes]
    bars = response.plot("counts")["segmentations"]
    for name, images in zip(bars["ids"], bars["y"]):
        low, high = map(int, name.split("-"))
        assert images == sum(low <= count <= high for count in counts)
    clicked = bars["ids"][bars["y"].index(max(bars["y"]))]
    low, high = map(int, clicked.split("-"))
    response = Response(panel, segmented_scenes, "show_images", trace="segmentations", id=clicked)
    expected = [id for id, count in zip(segmented_scenes.values("id"), counts) if low <= count <= high]
    assert response.view.values("id") == expected


def test_plot_shows_the_time_of_each_stage(panel, segmented_scenes):
    (run,) = recorded_runs(segmented_scenes, "segmentations")
    stages = Response(panel, segmented_scenes, "on_load").plot("stages")
    assert list(stages) == ["encode", "discover", "decode", "crop", "other"]
    for stage in ("encode", "discover", "decode", "crop"):
        assert stages[stage]["x"] == [pytest.approx(500 * run.seconds[stage])]  # ms per image, for two images
    assert sum(each["x"][0] for each in stages.values()) == pytest.approx(500 * run.seconds["total"])


def test_panel_without_ground_truth(panel, segmented_scenes):
    copy = segmented_scenes.clone()
    copy.delete_sample_field("ground_truth")
    response = Response(panel, copy, "on_load")
    assert "no labels to compare" in response.text("text")
    assert list(response.plot("counts")) == ["segmentations"] and "stages" in response.contents
    copy.delete_sample_field("segmentations")
    assert "No field has been segmented yet" in Response(panel, copy, "on_load").text("text")
    copy.delete()


def test_field_without_a_recorded_run(panel, measured):
    response = Response(panel, measured, "refresh", runs=BOTH)
    assert "`good`, `few`" in response.text("unknown") and "stages" not in response.contents


def test_buttons_open_forms_and_clear_the_view(panel, measured):
    response = Response(panel, measured, "open_form", operator="segment_everything")
    assert response.calls["prompt_user_for_operation"]["operator_uri"] == f"{PLUGIN}/segment_everything"
    assert response.calls["prompt_user_for_operation"]["on_success"] == f"{panel.uri}#on_load"
    assert set(Response(panel, measured, "show_everything").calls) == {"clear_view"}


def test_panel_sends_little_data(panel, measured):
    output = Response(panel, measured, "refresh", runs=BOTH).calls["show_panel_output"]
    assert len(json.dumps(output, allow_nan=False)) < 60_000


# Trained models ------------------------------------------------------------------------------------------------------


def write_model(name, dataset, created, part="discovery"):
    """Registers a model without weights of its own, with the curve and the figures of a training."""
    measured = {"images": 2, "objects": 9, "AR@10": 0.4, "AR@100": 0.5, "AR@1000": 0.5, "of": "boxes"}
    training = {
        "field": "`gt`<b>",
        "before": measured | {"IoU from boxes": None},
        "after": measured | {"AR@10": 0.6, "IoU from boxes": None},
        "curve": [
            {"epoch": 1, "loss": 3.5, "learning_rate": 0.002, "score": None},
            {"epoch": 2, "loss": 2.5, "learning_rate": 0.001, "score": 0.55},
        ],
    }
    folder = trained_dir() / name
    folder.mkdir(parents=True)
    write_trained(
        folder,
        name=name,
        encoder="resnet_demo",
        detector_size=320,
        part=part,
        base="mobilesamv2-demo-torch",
        dataset=dataset,
        images="scenes",
        files={},
        training=training,
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"created": created}))


@pytest.fixture
def models(measured, tmp_path, monkeypatch):
    """Two models of the dataset and one of another; the last of the names is the latest."""
    monkeypatch.setattr(fo.config, "model_zoo_dir", str(tmp_path))
    write_model("late", measured.name, "2026-01-02T00:00:00+00:00", part="masks")
    write_model("early", measured.name, "2026-01-01T00:00:00+00:00")
    write_model("others", "another-dataset", "2026-01-03T00:00:00+00:00")
    return measured


def test_panel_shows_the_latest_trained_model(panel, models):
    response = Response(panel, models, "refresh")
    shown = response.contents["training"]["type"]["properties"]
    assert "`late`: masks of `mobilesamv2-demo-torch`, trained on `'gt'<b>`" in shown["title"]["default"]
    assert shown["model"]["type"]["values"] == ["late", "early"] and shown["model"]["default"] == "late"
    loss, score = response.plot("training")["loss"], response.plot("training")["IoU from boxes"]
    assert (loss["x"], loss["y"]) == ([1, 2], [3.5, 2.5]) and (score["x"], score["y"]) == ([2], [0.55])
    assert score["yaxis"] == "y2"
    rows = [line.strip("| ").split(" | ") for line in shown["measures"]["default"].splitlines()]
    assert rows[0] == ["measure", "before", "after"]
    assert rows[2:] == [
        [f"AR@{k} of boxes", old, new]
        for k, old, new in ((10, "0.400", "0.600"), (100, "0.500", "0.500"), (1000, "0.500", "0.500"))
    ]
    assert shown["use"]["view"]["params"] == {"operator": "segment_everything", "model": "late"}
    response = Response(panel, models, "open_form", operator="segment_everything", model="late")
    assert response.calls["prompt_user_for_operation"]["params"] == {"model": "late"}


def test_trained_models_can_be_chosen(panel, models):
    response = Response(panel, models, "choose_model", value="early")
    assert response.calls["patch_panel_state"]["state"]["model"] == "early"
    assert list(response.plot("training")) == ["loss", "AR of boxes"]
    for event, chosen in (("refresh", "gone"), ("on_load", "early")):  # loaded anew after a training
        shown = Response(panel, models, event, chosen_model=chosen).contents["training"]["type"]["properties"]
        assert shown["model"]["default"] == "late"


def test_panel_without_trained_models(panel, models, tmp_path):
    shutil.rmtree(tmp_path / "mobilesamv2")
    assert "training" not in Response(panel, models, "refresh").contents
    write_model("only", models.name, "2026-01-02T00:00:00+00:00")
    config = trained_dir() / "only" / "config.json"
    assert "model" not in Response(panel, models, "refresh").contents["training"]["type"]["properties"]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"training": {}}))  # of another program
    response = Response(panel, models, "refresh")
    assert "training_error" in response.contents and "by_k" in response.contents
