"""Forms and operators on every kind of view that the App shows."""

import re
import uuid

import cv2
import fiftyone as fo
import fiftyone.brain as fob
import numpy as np
import pytest
from fiftyone import ViewField as F

from fiftyone_mobilesamv2 import evaluate_proposals, load_coco
from fiftyone_mobilesamv2.fiftyone_internals import is_patches_view
from fiftyone_mobilesamv2.operators import OPERATORS

FORMS = [operator.identifier for operator in OPERATORS if operator.identifier not in ("cancel", "manage_models")]
DEMO = {"model": "mobilesamv2-demo-torch", "device": "cpu"}


@pytest.fixture(scope="module")
def images(mongod, scene_files):
    """Four scenes, two of each of the scenes "a" and "b", with proposals and evaluations."""
    dataset = load_coco(*scene_files)
    dataset.clone_sample_field("ground_truth", "proposals")
    confidences = [[0.9 - 0.01 * i for i in range(n)] for n in dataset.values(F("proposals.detections").length())]
    dataset.set_values("proposals.detections.confidence", confidences)
    dataset.set_values("scene", ["a", "a", "b", "b"])
    dataset.set_values("number", [4, 3, 2, 1])
    dataset.set_values("embedding", list(np.eye(4)))
    evaluate_proposals(dataset, "proposals", eval_key="ar", progress=False)
    dataset.evaluate_detections("proposals", gt_field="ground_truth", eval_key="eval", progress=False)
    fob.compute_similarity(dataset, embeddings="embedding", brain_key="similarity", backend="sklearn")
    dataset.save_view("late", dataset.match(F("number") <= 2))
    dataset.save_view("scenes", dataset.group_by("scene"))
    yield dataset
    dataset.delete()


@pytest.fixture(scope="module")
def groups(images):
    """Two groups with the slices "left" and "right"."""
    dataset = fo.Dataset()
    dataset.add_group_field("group", default="left")
    pairs = [(fo.Group(), list(images)[start : start + 2]) for start in (0, 2)]
    for group, pair in pairs:
        for sample, name in zip(pair, ("left", "right")):
            copy = fo.Sample(sample.filepath, group=group.element(name), scene=sample.scene)
            for field in ("ground_truth", "proposals"):
                copy[field] = sample[field].copy()
            dataset.add_sample(copy)
    yield dataset
    dataset.delete()


@pytest.fixture(scope="module")
def videos(images, tmp_path_factory):
    """A video of three frames with labels, and an event of two frames."""
    folder = tmp_path_factory.mktemp("video")
    writer = cv2.VideoWriter(str(folder / "video.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5, (320, 256))
    metadata = fo.VideoMetadata(total_frame_count=3, frame_width=320, frame_height=256, frame_rate=5)
    video = fo.Sample(str(folder / "video.mp4"), metadata=metadata)
    for number, sample in enumerate(images.limit(3), 1):
        image = cv2.resize(cv2.imread(sample.filepath), (320, 256))
        writer.write(image)
        cv2.imwrite(str(folder / f"{number}.png"), image)
        frame = video.frames[number] = fo.Frame(filepath=str(folder / f"{number}.png"))
        for field in ("ground_truth", "proposals"):
            frame[field] = sample[field].copy()
            for label in frame[field].detections:
                label.mask = None  # the frame has another size
    writer.release()
    video["events"] = fo.TemporalDetections(detections=[fo.TemporalDetection(label="x", support=[1, 2])])
    dataset = fo.Dataset()
    dataset.add_sample(video)
    yield dataset
    dataset.delete()


def by_similarity(dataset):
    return dataset.sort_by_similarity(dataset.first().id, brain_key="similarity", k=3)


SIDEBAR = {"scene": {"values": ["a"], "exclude": False, "isMatching": True}}
SORTED = {"fiftyone.core.stages.SortBy": {"field_or_expr": "number", "reverse": False}}

# Kind of view -> (dataset, its view, what the App sends besides, how many images it stands for). None: not for images.
KINDS = {
    "dataset": ("images", lambda d: d, {}, 4),
    "dynamic groups": ("images", lambda d: d.group_by("scene"), {}, 4),
    "ordered dynamic groups": ("images", lambda d: d.group_by("scene", order_by="number"), {}, 4),
    "dynamic groups of a view": ("images", lambda d: d.match(F("number") > 1).group_by("scene"), {}, 3),
    "view of dynamic groups": ("images", lambda d: d.group_by("scene").limit(1), {}, 2),
    "dynamic groups and sidebar": ("images", lambda d: d.group_by("scene"), {"filters": SIDEBAR}, 2),
    "dynamic groups, sorted": ("images", lambda d: d.group_by("scene"), {"extended": SORTED}, 4),
    "saved dynamic groups": ("images", lambda d: d, {"view_name": "scenes"}, 4),
    "dynamic group, opened": ("images", lambda d: d.group_by("scene").get_dynamic_group("a"), {}, 2),
    "flattened groups": ("images", lambda d: d.group_by("scene").flatten(), {}, 4),
    "saved view": ("images", lambda d: d, {"view_name": "late"}, 2),
    "sidebar": ("images", lambda d: d, {"filters": SIDEBAR}, 2),
    "sorted": ("images", lambda d: d.sort_by("number"), {}, 4),
    "sorted by similarity": ("images", by_similarity, {}, 3),
    "patches": ("images", lambda d: d.to_patches("proposals"), {}, 4),
    "evaluation patches": ("images", lambda d: d.to_evaluation_patches("eval"), {}, 4),
    "dynamic groups of patches": ("images", lambda d: d.to_patches("proposals").group_by("proposals.label"), {}, 4),
    "groups": ("groups", lambda d: d, {"group_slice": "left"}, 2),
    "another slice": ("groups", lambda d: d, {"group_slice": "right"}, 2),
    "groups as a whole": ("groups", lambda d: d, {"view_target": "DATASET"}, None),
    "groups of one slice": ("groups", lambda d: d.select_group_slices("right", flat=False), {}, None),
    "all slices": ("groups", lambda d: d.select_group_slices(), {}, 4),
    "dynamic groups of groups": ("groups", lambda d: d.group_by("scene"), {"group_slice": "left"}, 2),
    "dynamic groups of slices": ("groups", lambda d: d.select_group_slices().group_by("scene"), {}, 4),
    "patches of a slice": ("groups", lambda d: d.select_group_slices("left").to_patches("proposals"), {}, 2),
    "videos": ("videos", lambda d: d, {}, None),
    "dynamic groups of videos": ("videos", lambda d: d.group_by("id"), {}, None),
    "clips": ("videos", lambda d: d.to_clips("events"), {}, None),
    "frames": ("videos", lambda d: d.to_frames(), {}, None),
    "patches of frames": ("videos", lambda d: d.to_frames().to_patches("proposals"), {}, None),
}


UNPREPARED = {"promote_to_labels", "delete_masks"}  # no labels are selected, no run is recorded
QUICK = (
    "dynamic groups",
    "view of dynamic groups",
    "saved dynamic groups",
    "sorted by similarity",
    "evaluation patches",
    "another slice",
    "groups as a whole",
    "dynamic groups of slices",
    "clips",
    "frames",
)
ALL = [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS]


@pytest.fixture
def shown(request):
    """(view, what the App sends besides, number of images) of a kind of view."""
    name, view, sent, size = KINDS[request.param]
    return view(request.getfixturevalue(name)), {"group_slice": None} | sent, size


def is_in_words(text):
    return re.search(r"Error|Exception|Traceback|<class|object at 0x", text) is None


@pytest.mark.parametrize("shown", ALL, indirect=True)
def test_every_form_is_shown(plugin, shown):
    view, sent, size = shown
    for name in FORMS:
        form = plugin.form(name, view, {"place": "new"}, **sent)
        for text in form.errors + form.messages:
            assert len(text) > 10 and is_in_words(text), name
        if size is not None and name not in UNPREPARED:
            assert form.errors == [], name
        plugin.operators[name].resolve_execution_options(plugin.context(name, view, **sent))


@pytest.mark.parametrize("shown", [each for each in ALL if KINDS[each.values[0]][3]], indirect=True)
def test_operators_see_the_images_behind_a_view(plugin, shown):
    view, sent, size = shown
    text, _ = plugin.run_to_the_end("image_coverage", view, {"field": "proposals"}, **sent)
    assert f"**{size} images measured**" in text


def test_selected_samples_of_dynamic_groups(plugin, images):
    chosen = images.values("id")[1:3]  # the second is not the one that its group shows
    request = {"selected": chosen, "view_target": "SELECTED_SAMPLES"}
    text, _ = plugin.run_to_the_end("image_coverage", images.group_by("scene"), {"field": "proposals"}, **request)
    assert "**2 images measured**" in text


STATES = {
    "segment_everything": DEMO | {"label_field": "masks", "existing": "replace"},
    "segment_anything": DEMO | {"place": "new", "prompt_field": "ground_truth", "label_field": "prompted"},
    "compare_prompting": DEMO | {"images": 1, "grid": "16"},
    "promote_to_labels": {"label": "cat"},
    "train_on_labels": DEMO | {"epochs": 1},
    "export_masks": {"overwrite": True},
}
FRAMES = {"pred_field": "frames.proposals", "gt_field": "frames.ground_truth", "label_field": "frames.masks"}


EXECUTED = (
    "dynamic groups",
    "view of dynamic groups",
    "sorted by similarity",
    "patches",
    "another slice",
    "dynamic groups of slices",
    "videos",
    "clips",
    "frames",
)


@pytest.mark.slow
@pytest.mark.parametrize("shown", EXECUTED, indirect=True)
def test_every_operator_ends_with_a_summary(plugin, shown, tmp_path):
    view, sent, size = shown
    if is_patches_view(view):
        sent = sent | {"selected": view.values("id")[:1]}
    ended = []
    for name in FORMS:
        params = STATES.get(name, {}) | ({"path": str(tmp_path / "masks.json")} if name == "export_masks" else {})
        params |= {"eval_key": f"run_{uuid.uuid4().hex}"} | (FRAMES if size is None else {})
        if not plugin.form(name, view, params, **sent).errors:
            *_, (operator, last) = plugin.run_in_app(name, view, params, **sent)
            fault = last["outputs"]["type"]["properties"].get("error")
            assert operator == "show_output" and fault is None, (name, fault["view"]["description"])
            assert is_in_words(last["results"]["text"]), name
            ended.append(name)
    assert set(FORMS) - set(ended) <= UNPREPARED if size else "evaluate_proposals" in ended
