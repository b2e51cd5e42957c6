import hashlib
import shutil

import fiftyone as fo
import numpy as np
import pytest
import torch
from bson import ObjectId
from fiftyone import ViewField as F
from fiftyone.operators.delegated import DelegatedOperationService
from PIL import Image

from fiftyone_mobilesamv2 import MobileSAMv2, zoo
from fiftyone_mobilesamv2.images import read_image
from fiftyone_mobilesamv2.modeling.checkpoints import files
from fiftyone_mobilesamv2.modeling.checkpoints.trained import trained_dir
from fiftyone_mobilesamv2.runs import record as segmentation_runs
from fiftyone_mobilesamv2.runs import segment as segmentation
from fiftyone_mobilesamv2.runs.shards import Shard
from fiftyone_mobilesamv2.zoo.config import PARAMETERS

SIZE = {"$bsonSize": "$$ROOT"}
DEMO = {"model": "mobilesamv2-demo-torch", "device": "cpu"}


@pytest.fixture(scope="session")
def expected(scene_files):
    """The model's own results for the scenes: {file name: Segmentation}."""
    return segmentations_of(scene_files, torch.float32)


def segmentations_of(scene_files, dtype):
    model = MobileSAMv2.from_pretrained("mobilesamv2-demo-torch", device="cpu", dtype=dtype)
    segmentations = {}
    for path in sorted(scene_files[0].iterdir()):
        (segmentations[path.name],) = model.segment_everything([read_image(path)])
    return segmentations


def assert_as_expected(dataset, field, expected):
    for sample in dataset:
        result = expected[sample.filename]
        detections = sample[field].detections
        assert len(detections) == len(result) > 0
        for detection, mask in zip(detections, result.masks):
            assert np.array_equal(detection.get_mask() if detection.mask is None else detection.mask, mask)


def test_form_has_defaults(plugin, scenes):
    form = plugin.form("segment_everything", scenes)
    assert form.errors == []
    assert form.default("label_field") == "segmentations"
    assert form.default("prompting") == "object_aware"
    assert (form.default("max_prompts"), form.default("confidence_thresh"), form.default("iou")) == (320, 0.4, 0.9)
    assert "existing" not in form.inputs and "points_per_side" not in form.inputs
    assert len(form.choices("model")) == 9


def test_form_shows_which_weights_are_downloaded(plugin, scenes, monkeypatch, tmp_path):
    monkeypatch.setenv("FIFTYONE_MOBILESAMV2_WEIGHTS_DIR", str(tmp_path))
    form = plugin.form("segment_everything", scenes)
    labels = {choice.value: choice.label for choice in form.inputs["model"].view.choices}
    assert "downloaded" in labels["mobilesamv2-demo-torch"]
    assert "196 MB to download" in labels["mobilesamv2-tinyvit-torch"]
    assert form.default("model") == "mobilesamv2-nano-torch" and form.messages == []  # works at once
    form = plugin.form("segment_everything", scenes, {"model": "mobilesamv2-tinyvit-torch"})
    assert any("196 MB will be downloaded" in message for message in form.messages)
    for name in ("mobile_sam.pt", "Prompt_guided_Mask_Decoder.pt", "ObjectAwareModel.pt"):
        (tmp_path / name).touch()
    labels = {c.value: c.label for c in plugin.form("segment_everything", scenes).inputs["model"].view.choices}
    assert "downloaded" in labels["mobilesamv2-tinyvit-torch"]
    assert "375 MB to download" in labels["mobilesamv2-vitb-torch"]  # only the encoder
    form = plugin.form("segment_everything", scenes, {"model": "mobilesamv2-demo-torch"})
    assert any("only on synthetic scenes" in message for message in form.messages)


def test_form_of_a_package_without_the_weights_for_photos(plugin, scenes, monkeypatch, tmp_path):
    monkeypatch.setenv("FIFTYONE_MOBILESAMV2_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setattr(files, "PACKAGED_WEIGHTS", tmp_path)
    form = plugin.form("segment_everything", scenes)
    labels = {choice.value: choice.label for choice in form.inputs["model"].view.choices}
    assert "not part of this installation" in labels["mobilesamv2-nano-torch"]
    assert form.default("model") == "mobilesamv2-tinyvit-torch"


def test_trained_models_are_offered(plugin, scenes, model_zoo, make_trained):
    make_trained(trained_dir() / "my-cells")
    form = plugin.form("segment_everything", scenes, {"model": "my-cells", "label_field": "of_cells", "device": "cpu"})
    choices = {choice.value: choice.label for choice in form.inputs["model"].view.choices}
    assert choices["my-cells"] == "my-cells (trained on cells)" and form.errors == []
    assert (
        plugin.call("segment_everything", scenes, model="my-cells", label_field="of_cells", device="cpu")["objects"]
        > 10
    )
    (run,) = segmentation_runs.recorded_runs(scenes, "of_cells")
    assert run.parameters["name"] == "my-cells"
    path = trained_dir() / "my-cells" / "detector.safetensors"
    assert run.parameters["weights"]["detector_checkpoint"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_grid_has_its_own_inputs(plugin, scenes):
    form = plugin.form("segment_everything", scenes, {"prompting": "grid", "points_per_side": 16})
    assert "max_prompts" not in form.inputs
    assert any("256 prompts per image" in message for message in form.messages)


@pytest.mark.parametrize(
    "params, error",
    [
        ({"max_prompts": 0}, "Maximum prompts: a whole number from 1 to 30000 was expected, not 0"),
        ({"max_prompts": float("inf")}, "a whole number from 1 to 30000 was expected, not inf"),
        ({"label_field": 5}, "Label field: text was expected, not 5"),
        ({"model": ["x"]}, "Model: text was expected, not"),
        ({"max_prompts": 2.5}, "a whole number from 1 to 30000 was expected, not 2.5"),
        ({"confidence_thresh": 1.5}, "Minimum confidence: a number from 0 to 1 was expected, not 1.5"),
        ({"iou": -0.1}, "NMS IoU: a number from 0 to 1 was expected"),
        ({"min_area": -1}, "Minimum mask area (pixels): a whole number of at least 0"),
        ({"batch_size": 0}, "Batch size"),
        ({"prompting": "grid", "points_per_side": 0}, "Points per side"),
        ({"label_field": "no name"}, "'no name' is not a valid field name"),
        ({"label_field": "_x"}, "'_x' is not a valid field name"),
        ({"label_field": "filepath"}, "'filepath' contains StringField, not Detections"),
        ({"label_field": "frames.x"}, "Masks of images need a field such as 'x'"),
        ({"model": "sam"}, "Model: 'sam' is no longer available"),
        ({"dtype": "int8"}, "Precision: 'int8' is no longer available"),
    ],
)
def test_form_says_what_is_wrong(plugin, scenes, params, error):
    message, *_ = plugin.form("segment_everything", scenes, params).errors
    assert error in message


def test_form_without_samples(plugin, scenes, dataset):
    assert "has no samples" in plugin.form("segment_everything", dataset).errors[0]
    assert "view has no samples" in plugin.form("segment_everything", scenes.limit(0)).errors[0]
    assert "Open a dataset" in plugin.form("segment_everything", None).errors[0]


def test_patches_view_segments_the_whole_dataset(plugin, scenes):
    patches = scenes.to_patches("ground_truth").limit(1)
    assert "works on the whole dataset" in plugin.form("segment_everything", patches).messages[0]
    assert plugin.call("segment_everything", patches, **DEMO)["images"] == 4
    with pytest.raises(ValueError, match="segment the samples that they come from"):
        segmentation.segment_everything(patches, zoo.load_model("mobilesamv2-demo-torch", device="cpu"))


def test_read_only_field_is_refused(plugin, scenes):
    scenes.add_sample_field("locked", fo.EmbeddedDocumentField, embedded_doc_type=fo.Detections, read_only=True)
    assert "'locked' is read-only" in plugin.form("segment_everything", scenes, {"label_field": "locked"}).errors[0]


def test_masks_equal_those_of_the_model(plugin, scenes, expected):
    result = plugin.call("segment_everything", scenes, **DEMO)
    assert_as_expected(scenes, "segmentations", expected)
    assert result["images"] == 4 and result["failures"] == [] and not result["cancelled"]
    assert result["objects"] == sum(len(each) for each in expected.values())
    (run,) = segmentation_runs.recorded_runs(scenes, "segmentations")
    assert (run.images, run.objects) == (4, result["objects"])
    assert run.parameters["name"] == "mobilesamv2-demo-torch" and run.parameters["confidence_thresh"] == 0.4
    assert {"encode", "discover", "decode", "crop", "total"} == set(run.seconds)


def test_masks_can_be_stored_on_disk(plugin, scenes, expected):
    plugin.call("segment_everything", scenes, storage="disk", **DEMO)
    detections = [d for sample in scenes for d in sample.segmentations.detections]
    assert all(d.mask is None and d.mask_path for d in detections)
    assert_as_expected(scenes, "segmentations", expected)


@pytest.mark.slow
def test_precision_is_applied_and_recorded(plugin, scenes, scene_files, expected):
    form = plugin.form("segment_everything", scenes)
    assert form.choices("dtype") == list(PARAMETERS["dtype"].choices) and form.default("dtype") == "float32"
    plugin.call("segment_everything", scenes, dtype="bfloat16", **DEMO)
    in_bfloat16 = segmentations_of(scene_files, torch.bfloat16)
    assert_as_expected(scenes, "segmentations", in_bfloat16)
    scores = scenes.values("segmentations.detections.predicted_iou", unwind=True)
    assert scores == [float(score) for each in in_bfloat16.values() for score in each.predicted_iou]
    assert set(scores).isdisjoint(float(score) for each in expected.values() for score in each.predicted_iou)
    scenes.add_sample(fo.Sample(scenes.first().filepath))
    assert "dtype bfloat16 then, float32 now" in plugin.form("segment_everything", scenes, DEMO).errors[0]


def test_masks_below_the_minimum_area_are_dropped(plugin, scenes, expected):
    plugin.call("segment_everything", scenes, min_area=400, **DEMO)
    areas = [d.area_px for sample in scenes for d in sample.segmentations.detections]
    assert sorted(areas) == sorted(int(a) for each in expected.values() for a in each.areas if a >= 400)
    assert 0 < len(areas) < sum(len(each) for each in expected.values())


def test_only_the_view_or_selection_is_segmented(plugin, scenes, expected):
    ids = scenes.values("id")
    plugin.call("segment_everything", scenes.limit(1), label_field="of_view", **DEMO)
    assert [labels is not None for labels in scenes.values("of_view")] == [True, False, False, False]
    params = {"label_field": "of_selection", "view_target": "SELECTED_SAMPLES"}
    plugin.call("segment_everything", scenes, selected=ids[2:], **DEMO, **params)
    assert [labels is not None for labels in scenes.values("of_selection")] == [False, False, True, True]


def test_second_run_segments_only_the_rest(plugin, scenes, expected):
    plugin.call("segment_everything", scenes.limit(1), **DEMO)
    first = scenes.first().segmentations.detections[0].id
    form = plugin.form("segment_everything", scenes, DEMO)
    assert form.errors == [] and any("1 of 4 samples are already done; 3 samples to do." in m for m in form.messages)
    assert plugin.call("segment_everything", scenes, **DEMO)["images"] == 3
    assert scenes.first().segmentations.detections[0].id == first
    assert_as_expected(scenes, "segmentations", expected)
    assert "All 4 samples are already done" in plugin.form("segment_everything", scenes, DEMO).errors[0]
    assert [run.images for run in segmentation_runs.recorded_runs(scenes, "segmentations")] == [1, 3]


def test_form_says_how_many_labels_are_replaced(plugin, scenes, expected):
    plugin.call("segment_everything", scenes, **DEMO)
    objects = sum(len(each) for each in expected.values())
    params = {**DEMO, "existing": "replace"}
    form = plugin.form("segment_everything", scenes, params)
    assert form.errors == [] and any(f"{objects} labels of 4 samples in 'segmentations'" in m for m in form.messages)
    before = scenes.values("segmentations.detections.id", unwind=True)
    assert plugin.call("segment_everything", scenes, **params)["objects"] == objects
    assert not set(before) & set(scenes.values("segmentations.detections.id", unwind=True))


def test_other_parameters_are_refused(plugin, scenes):
    plugin.call("segment_everything", scenes.limit(1), **DEMO)
    form = plugin.form("segment_everything", scenes, {"confidence_thresh": 0.2, **DEMO})
    assert "confidence_thresh 0.4 then, 0.2 now" in form.errors[0]
    model = zoo.load_model("mobilesamv2-demo-torch", device="cpu", confidence_thresh=0.2)
    with pytest.raises(ValueError, match=r"confidence_thresh 0.4 then, 0.2 now"):
        segmentation.segment_everything(scenes, model)
    assert [labels is not None for labels in scenes.values("segmentations")] == [True, False, False, False]
    scenes.delete_sample_field("segmentations")
    assert plugin.call("segment_everything", scenes, confidence_thresh=0.2, **DEMO)["images"] == 4


def own_labels(scenes, field):
    """Adds the user's own labels in a field that the views below hide wholly or partly."""
    for sample in scenes:
        sample[field] = fo.Detections(detections=[fo.Detection(label="mine", bounding_box=[0, 0, 1, 1])])
        sample.save()


@pytest.mark.parametrize(
    "hide",
    [
        lambda scenes: scenes.exclude_fields("own"),
        lambda scenes: scenes.select_fields("ground_truth"),
        lambda scenes: scenes.filter_labels("own", F("label") == "other", only_matches=False),
    ],
)
def test_labels_hidden_by_a_view_count_as_done(plugin, scenes, hide):
    own_labels(scenes, "own")
    params = {**DEMO, "label_field": "own"}
    form = plugin.form("segment_everything", hide(scenes), params)
    assert "All 4 samples are already done" in form.errors[0]
    model = zoo.load_model("mobilesamv2-demo-torch", device="cpu")
    assert segmentation.segment_everything(hide(scenes), model, "own").images == 0
    scenes.reload()
    assert scenes.count_values("own.detections.label") == {"mine": 4}
    form = plugin.form("segment_everything", hide(scenes), params | {"existing": "replace"})
    assert any("4 labels of 4 samples in 'own'" in message for message in form.messages)
    plugin.call("segment_everything", hide(scenes), existing="replace", **params)
    assert set(scenes.count_values("own.detections.label")) == {"object"}


def test_field_names_with_spaces_are_supported(plugin, scenes, expected):
    own_labels(scenes, "my masks")
    scenes.set_values("my masks", [None] * 4)
    form = plugin.form("segment_everything", scenes, {**DEMO, "label_field": "my masks"})
    assert form.errors == [] and "my masks" in form.choices("label_field")
    plugin.call("segment_everything", scenes, label_field="my masks", **DEMO)
    plugin.call("segment_everything", scenes.limit(1), label_field="my_masks", **DEMO)
    assert_as_expected(scenes, "my masks", expected)
    assert [run.images for run in segmentation_runs.recorded_runs(scenes, "my masks")] == [4]
    assert [run.images for run in segmentation_runs.recorded_runs(scenes, "my_masks")] == [1]
    assert sorted(segmentation_runs.segmented_fields(scenes)) == ["my masks", "my_masks"]


def test_masks_that_cannot_be_stored_are_failures(plugin, scenes):
    # This document has little room left.
    sample = scenes.first()
    (size,) = scenes._sample_collection.aggregate([{"$match": {"_id": ObjectId(sample.id)}}, {"$project": {"n": SIZE}}])
    sample["large"] = "x" * (16 * 2**20 - size["n"] - 1000)
    sample.save()
    result = plugin.call("segment_everything", scenes, batch_size=1, **DEMO)
    assert [each["sample_id"] for each in result["failures"]] == [sample.id]
    assert result["failures"][0]["error"].startswith("its masks can't be stored: ")
    scenes.reload()
    assert [labels is not None for labels in scenes.values("segmentations")] == [False, True, True, True]


def test_failed_image_is_reported(plugin, scenes, expected, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    scenes.add_sample(fo.Sample(str(bad)))
    text, calls = plugin.run_to_the_end("segment_everything", scenes, DEMO)
    assert "1 image failed" in text and "bad.png" in text
    assert_as_expected(scenes.limit(4), "segmentations", expected)
    assert scenes.last().segmentations is None
    properties = calls["show_output"]["outputs"]["type"]["properties"]
    (button,) = [each for each in properties.values() if each["view"].get("label") == "Show failed samples"]
    assert button["view"]["operator"] == "@voxel51/operators/show_samples"
    assert button["view"]["params"] == {"samples": [scenes.last().id]}


@pytest.mark.slow
def test_cancel_keeps_stored_masks(plugin, scenes):
    grid = {**DEMO, "prompting": "grid", "points_per_side": 12}  # slow enough to be cancelled
    cancelled = False
    for operator, params in plugin.run_in_app("segment_everything", scenes, grid):
        if operator != "show_output":
            continue
        properties = params["outputs"]["type"]["properties"]
        label = properties["share"]["view"]["label"] if "share" in properties else ""
        if " of 4 images" in label and "cancel" in properties and not cancelled:
            button = properties["cancel"]["view"]
            ctx = plugin.context("cancel", scenes, button["params"])
            assert plugin.operators["cancel"].execute(ctx) == {"cancelled": True}
            cancelled = True
    assert cancelled and "Cancelled before the end" in params["results"]["text"]
    done = len(scenes.match(F("segmentations") != None))  # noqa: E711
    assert 1 <= done < 4
    (run,) = segmentation_runs.recorded_runs(scenes, "segmentations")
    assert run.cancelled and run.images == done
    before = scenes.values("segmentations.detections.id")
    assert plugin.call("segment_everything", scenes, **grid)["images"] == 4 - done
    after = scenes.values("segmentations.detections.id")
    assert all(old is None or old == new for old, new in zip(before, after))
    plugin.call("segment_everything", scenes, label_field="at_once", **grid)
    for sample in scenes:
        assert len(sample.segmentations.detections) == len(sample.at_once.detections)
        for one, other in zip(sample.segmentations.detections, sample.at_once.detections):
            assert one.bounding_box == other.bounding_box and np.array_equal(one.mask, other.mask)


def test_closing_the_tab_stops_the_work(plugin, scenes):
    from fiftyone_mobilesamv2.operators.app_work import running

    messages = plugin.run_in_app("segment_everything", scenes, {**DEMO, "batch_size": 1})
    next(messages)
    (work,) = running.values()
    messages.close()
    assert work.finished.wait(30) and running == {}
    assert sum(labels is not None for labels in scenes.values("segmentations")) < 4


def test_missing_weights_are_explained(plugin, scenes, monkeypatch, tmp_path):
    monkeypatch.setenv("FIFTYONE_MOBILESAMV2_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    *_, (operator, params) = plugin.run_in_app("segment_everything", scenes, {"model": "mobilesamv2-tinyvit-torch"})
    view = params["outputs"]["type"]["properties"]["error"]["view"]
    assert operator == "show_output" and view["label"] == "Segment everything failed"
    assert "mobile_sam.pt" in view["description"] and str(tmp_path) in view["description"]
    assert not scenes.has_field("segmentations")


def test_form_recommends_scheduling_large_targets(plugin, scenes, monkeypatch):
    assert not any("schedule" in message for message in plugin.form("segment_everything", scenes).messages)
    big = fo.Dataset()
    big.add_samples([fo.Sample(f"{i}.png") for i in range(501)])
    try:
        for allowed in (True, False):
            monkeypatch.setattr(fo.config, "allow_legacy_orchestrators", allowed)
            form = plugin.form("segment_everything", big)
            assert any("501 images take a while" in message for message in form.messages)
            ctx = plugin.context("segment_everything", big)
            options = plugin.operators["segment_everything"].resolve_execution_options(ctx)
            assert options.default_choice_to_delegated is allowed and options.allow_delegated_execution
    finally:
        big.delete()


def test_operator_has_a_toolbar_button(plugin, scenes):
    placement = plugin.operators["segment_everything"].resolve_placement(plugin.context("segment_everything", scenes))
    view = placement.to_json()["view"]
    assert placement.place == fo.operators.types.Places.SAMPLES_GRID_SECONDARY_ACTIONS
    assert view["label"] == "Segment everything"


@pytest.mark.slow
def test_second_operation_waits_for_the_first(plugin, scenes, expected):
    """This happens with two browser tabs."""
    grid = {"prompting": "grid", "points_per_side": 16}
    slow = plugin.run_in_app("segment_everything", scenes, DEMO | grid)
    next(slow)
    calls = list(plugin.run_in_app("segment_everything", scenes, {**DEMO, "label_field": "other"}))
    labels = [str(params) for operator, params in calls if operator == "show_output"]
    assert any("Waiting for another operation to finish" in label for label in labels)
    *_, (_, last) = slow
    assert "in 4 images" in str(last) and "in 4 images" in labels[-1]
    assert_as_expected(scenes, "other", expected)


def test_failed_samples_can_be_retried_alone(plugin, scenes, expected, scene_files, tmp_path):
    late = tmp_path / sorted(scene_files[0].iterdir())[0].name
    scenes.add_sample(fo.Sample(str(late)))
    plugin.call("segment_everything", scenes, **DEMO)
    form = plugin.form("segment_everything", scenes, DEMO)
    assert any("failed for 1 sample. To retry only these" in message for message in form.messages)
    view = form.inputs["show_failed"].view
    assert view.operator == "@voxel51/operators/show_samples" and view.params == {"samples": [scenes.last().id]}
    failed = segmentation_runs.failed_samples(scenes, "segmentations")
    assert failed.values("filepath") == [str(late)]
    shutil.copy(sorted(scene_files[0].iterdir())[0], late)  # now the file exists
    assert plugin.call("segment_everything", failed, **DEMO)["images"] == 1
    assert_as_expected(scenes, "segmentations", expected)
    assert "show_failed" not in plugin.form("segment_everything", scenes, DEMO).inputs
    assert len(segmentation_runs.failed_samples(scenes, "segmentations")) == 0


def test_shards_are_scheduled(plugin, scenes, expected):
    result = plugin.call("segment_everything", scenes, num_shards=3, **DEMO)
    service = DelegatedOperationService()
    operations = [service.get(ObjectId(id)) for id in result["operations"]]
    assert [operation.label for operation in operations] == [f"Segment everything, shard {i} of 3" for i in (1, 2, 3)]
    assert scenes.has_field("segmentations.detections.predicted_iou") and scenes.count("segmentations") == 0
    samples = {sample.id for sample in scenes}
    for number, operation in enumerate(operations):
        service.execute_operation(operation)
        done = {id for id, labels in zip(*scenes.values(["id", "segmentations"])) if labels is not None}
        shard = Shard(**operation.context.request_params["params"]["shard"])
        samples -= {id for id in samples if shard.has(id)}
        assert done == {sample.id for sample in scenes} - samples
        (run,) = segmentation_runs.recorded_runs(scenes, "segmentations")
        assert run.images == len(done) and run.cancelled == (number < 2)
    assert [service.get(operation.id).run_state for operation in operations] == ["completed"] * 3
    assert_as_expected(scenes, "segmentations", expected)
    undone = scenes.first()  # as if its worker had died
    undone.segmentations = None
    undone.save()
    shards = [Shard(**operation.context.request_params["params"]["shard"]) for operation in operations]
    (number,) = (index for index, shard in enumerate(shards) if shard.has(undone.id))
    again = service.rerun_operation(operations[number].id)
    service.execute_operation(again)
    assert service.get(again.id).run_state == "completed"
    scenes.reload()
    assert_as_expected(scenes, "segmentations", expected)
    (run,) = segmentation_runs.recorded_runs(scenes, "segmentations")
    assert run.images == 4 + 1 and not run.cancelled


@pytest.mark.parametrize("shard", [5, {"index": 3, "count": 3, "group": "x"}, {"index": 0}, {"index": "0", "count": 2}])
def test_invalid_shard_is_refused(plugin, scenes, shard):
    (error,) = plugin.form("segment_everything", scenes, {**DEMO, "shard": shard}).errors
    assert "index, count and group of a shard were expected" in error


def test_killed_run_is_recorded_as_cancelled(plugin, scenes):
    for _ in plugin.run_in_app("segment_everything", scenes, {**DEMO, "batch_size": 1}):
        if runs := segmentation_runs.recorded_runs(scenes, "segmentations"):
            assert (
                runs[0].cancelled and runs[0].parameters["confidence_thresh"] == 0.4
            )  # a killed run would stay like this
            break
    else:
        pytest.fail("no record while it ran")
    scenes.register_run("mobilesamv2_other", scenes.init_run(method="mobilesamv2", label_field="other"))
    scenes.clone_sample_field("ground_truth", "other")  # killed before storing any results
    form = plugin.form("segment_everything", scenes, {**DEMO, "label_field": "other", "existing": "replace"})
    assert form.errors == []


def test_grouped_dataset_segments_the_current_slice(plugin, scene_files):
    dataset = fo.Dataset()
    dataset.add_group_field("group", default="left")
    group = fo.Group()
    paths = sorted(map(str, scene_files[0].iterdir()))
    dataset.add_samples([fo.Sample(p, group=group.element(s)) for p, s in zip(paths, ("left", "right"))])
    try:
        form = plugin.form("segment_everything", dataset, DEMO, group_slice="right")
        assert form.errors == []
        *_, (_, last) = plugin.run_in_app("segment_everything", dataset, DEMO, group_slice="right")
        assert "in 1 image**" in last["results"]["text"]
        samples = {sample.filepath: sample for sample in dataset.select_group_slices(_allow_mixed=True)}
        assert [samples[path].segmentations is not None for path in paths[:2]] == [False, True]
    finally:
        dataset.delete()


def test_video_frames_are_segmented(plugin, mongod, tmp_path):
    if shutil.which("ffmpeg") is None:
        pytest.skip("needs ffmpeg")
    import subprocess

    for i in range(3):
        Image.new("RGB", (64, 48), (40 * i, 90, 30)).save(tmp_path / f"{i}.png")
    video = tmp_path / "video.mp4"
    subprocess.run(["ffmpeg", "-loglevel", "error", "-i", tmp_path / "%d.png", video], check=True)
    dataset = fo.Dataset()
    try:
        dataset.add_sample(fo.Sample(str(video)))
        assert plugin.form("segment_everything", dataset).default("label_field") == "frames.segmentations"
        result = plugin.call("segment_everything", dataset, **DEMO)
        assert result["images"] == 3
        assert all(frame.segmentations is not None for frame in dataset.first().frames.values())
        assert "All 1 samples are already done" in plugin.form("segment_everything", dataset, DEMO).errors[0]
    finally:
        dataset.delete()
