"""The paper's tables on scenes with known masks: figures, stored results, and refused input."""

import json
import re

import cv2
import fiftyone as fo
import numpy as np
import pytest

from fiftyone_mobilesamv2 import cli, evaluate_proposals, zoo
from fiftyone_mobilesamv2.evaluation.reproduction import PAPER_AR, PAPER_AR_BY_PROMPTS, Reproduction, reproduce
from fiftyone_mobilesamv2.labels.detections import LABEL_BYTES_PER_SAMPLE
from fiftyone_mobilesamv2.training.scenes import TEST_SEED, make_scene, write_coco

MODEL = "mobilesamv2-demo-torch"
COUNT = 3
PREFIX = "mobilesamv2-reproduce"


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A folder with `val2017/`, coco.json and lvis.json. The annotated areas are four times those of the masks."""
    folder = tmp_path_factory.mktemp("coco")
    images, file = write_coco(folder, COUNT)
    images.rename(folder / "val2017")
    content = json.loads(file.read_text())
    for image in content["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{image['file_name']}"
    for number, annotation in enumerate(content["annotations"]):
        annotation["area"] *= 4
        annotation["category_id"] = 1 + number % 2
    categories = content["categories"] = [{"id": 1, "name": "thing"}, {"id": 2, "name": "other"}]
    (folder / "coco.json").write_text(json.dumps(content))
    for category, frequency in zip(categories, "rf"):
        category["frequency"] = frequency
    (folder / "lvis.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def datasets(mongod):
    yield
    for name in fo.list_datasets(f"{PREFIX}*"):
        fo.delete_dataset(name)


@pytest.fixture(scope="module")
def model():
    return zoo.load_model(MODEL, device="cpu", pred_iou_thresh=0, stability_score_thresh=0)


@pytest.fixture(scope="module")
def run(coco, datasets, model, tmp_path_factory):
    """A reproduction with object-aware and 4x4 grid prompting on all scenes, and its output folder."""
    output = tmp_path_factory.mktemp("reproduction") / "new" / "folder"
    return reproduce(coco / "coco.json", coco / "val2017", model, output, grids=[4]), output


@pytest.fixture
def results(run):
    return json.loads((run[1] / "reproduction.json").read_text())


@pytest.mark.slow
def test_fewer_prompts_give_the_most_confident_masks_of_more_prompts(coco, dataset):
    """Hence AR with at most N prompts equals AR@N of a run with more prompts, bit by bit."""
    scene = make_scene(TEST_SEED, 0)
    size = np.array(scene.labels.shape[::-1])
    sample = fo.Sample(str(coco / "val2017" / "000.png"), ground_truth=fo.Detections())
    for mask, (x0, y0, x1, y1) in zip(scene.masks(), scene.boxes().astype(int)):
        box = [*((x0, y0) / size), *((x1 - x0, y1 - y0) / size)]
        sample.ground_truth.detections.append(fo.Detection(bounding_box=box, mask=mask[y0:y1, x0:x1]))
    dataset.add_sample(sample)
    recalls, detections = {}, {}
    for most in (320, 128, 64):
        # Such a low threshold yields more boxes than the allowed number of prompts.
        model = zoo.load_model(MODEL, device="cpu", max_prompts=most, confidence_thresh=0.0001)
        dataset.apply_model(model, f"most_{most}", num_workers=0)
        recalls[most] = evaluate_proposals(dataset, f"most_{most}").average_recall
        detections[most] = sorted(dataset.first()[f"most_{most}"].detections, key=lambda d: -d.confidence)
    for most in (128, 64):
        assert len(detections[320]) > most == len(detections[most])
        for a, b in zip(detections[320], detections[most]):
            assert (a.confidence, a.bounding_box, a.predicted_iou) == (b.confidence, b.bounding_box, b.predicted_iou)
            np.testing.assert_array_equal(a.mask, b.mask)
        for group, total in recalls[most].totals.items():
            if total:
                np.testing.assert_array_equal(recalls[320].recalls(most, group), recalls[most].recalls(1000, group))


@pytest.mark.slow
def test_model_is_unchanged(run, model):
    unused = zoo.MobileSAMv2ModelConfig({"name": MODEL, "pred_iou_thresh": 0, "stability_score_thresh": 0})
    expected = vars(unused) | {"device": "cpu"}
    assert {name: vars(model.config)[name] for name in expected} == expected
    assert model.writer.label_bytes == LABEL_BYTES_PER_SAMPLE


@pytest.mark.slow
def test_figures_equal_those_of_evaluate_proposals(run, results):
    assert results["images"] == COUNT
    dataset = fo.load_dataset(results["dataset"])
    assert results["dataset"] == f"{PREFIX}-coco-demo"
    assert dataset.persistent
    assert dataset.list_evaluations() == ["ar_grid_4", "ar_object_aware"]
    for field, rank_by in (("object_aware", "confidence"), ("grid_4", "sam")):
        expected = evaluate_proposals(dataset, field, rank_by=rank_by, area_field="area").metrics()
        metrics = results["measurements"][field]["metrics"]
        assert expected | metrics == expected and len(metrics) == 16
        stored = dataset.load_evaluation_results(f"ar_{field}")
        assert stored.metrics() == expected
        assert stored.config.rank_by == rank_by
    # Few objects are small by the annotated areas, but many are by their masks.
    by_mask = evaluate_proposals(dataset, "object_aware").average_recall.totals
    assert results["measurements"]["object_aware"]["objects"]["small"] < by_mask["small"]


def test_cost_is_measured(run, results):
    aware, grid = (results["measurements"][name] for name in ("object_aware", "grid_4"))
    dataset = fo.load_dataset(results["dataset"])
    assert grid["prompts_per_image"] == 16
    assert aware["prompts_per_image"] == dataset.count("object_aware.detections") / COUNT > 1
    assert grid["masks_per_image"] == dataset.count("grid_4.detections") / COUNT > 1
    assert set(aware["seconds_per_image"]) == {"encode", "discover", "decode", "crop"}
    assert aware["decoder_ms_per_image"] == 1000 * aware["seconds_per_image"]["decode"] > 0
    for costs in (aware, grid):  # like the paper, this includes object discovery but not the encoder
        seconds = sum(costs["seconds_per_image"].values()) - costs["seconds_per_image"]["encode"]
        assert costs["ms_per_image_without_encoder"] == pytest.approx(1000 * seconds)
        ratio = costs["ms_per_image_without_encoder"] / aware["ms_per_image_without_encoder"]
        assert costs["times_object_aware"] == pytest.approx(ratio)


def test_tables_show_the_papers_figures(run):
    reproduction, _ = run
    aware = reproduction.measurements["object_aware"]
    about = reproduction.about | {"model": "mobilesamv2-tinyvit-torch", "encoder": "tiny_vit"}
    names = ["object_aware", "grid_16", "grid_32", "grid_64"]
    tables = Reproduction(about, dict.fromkeys(names, aware)).tables()
    metrics = aware.recall.metrics()

    ar = tables["Mask AR by object size"]
    for name, key, k in (("object_aware", "@10", 10), ("grid_64", "@1000", 1000), ("grid_64", "", None)):
        for group, metric, paper in zip(
            ("all", "small", "medium", "large"), ("AR", "ARs", "ARm", "ARl"), PAPER_AR[name][k]
        ):
            assert ar.loc[f"{name} AR{key}", group] == f"{100 * metrics[metric + key]:.1f} ({paper})"
    assert ar.loc["grid_32 AR@10", "all"].endswith(" (-)")
    sampling = tables["AR@1000 by sampling"]["all"]
    papers = {"grid_16": "40.0", "grid_32": "57.2", "grid_64": "59.2", "320 boxes": "59.3", "256 boxes": "58.5"}
    assert {row: re.search(r"\((.*)\)", cell)[1] for row, cell in sampling.items()} == papers
    by_prompts = tables["AR@1000 by the maximum number of prompts"]["all"]
    assert list(by_prompts.index) == ["320", "256", "192", "128", "64"]
    for most, paper in PAPER_AR_BY_PROMPTS.items():
        assert by_prompts[str(most)] == f"{100 * aware.recall.recalls(most).mean():.1f} ({paper})"
    assert tables["AR@1000 by encoder"].loc["tiny_vit", "all"] == f"{100 * metrics['AR@1000']:.1f} (51.1)"
    costs = tables["Cost per image"]
    assert costs.loc["grid_64", "times object-aware"] == "1.0 (66.6)"
    assert costs.loc["object_aware", "all but encoder ms"] == f"{aware.ms:.1f} (97.0)"

    # The text says when the figures are comparable.
    assert "LVIS val" in str(reproduction) and "only on synthetic scenes" in str(reproduction)
    assert "only on synthetic scenes" not in str(Reproduction(about, {"object_aware": aware}))


def test_picture_shows_every_prompting(run):
    picture = cv2.imread(str(run[1] / "reproduction.png"))[:, :, ::-1]
    for color in ((0xFF, 0x6D, 0x04), (0x86, 0x8E, 0x96)):
        assert (picture == color).all(2).sum() > 1000


@pytest.mark.slow
def test_command_on_lvis(coco, datasets, tmp_path, capsys):
    def command(*more):
        arguments = ["--annotations", str(coco / "lvis.json"), "--images", str(coco), "--model", MODEL]
        output = ["--output", str(tmp_path / "output"), "--device", "cpu", "--batch-size", "1"]
        assert cli.main(["reproduce", *arguments, *output, "--prompting", "grid", "--grids", "4", *more]) == 0
        results = json.loads((tmp_path / "output" / "reproduction.json").read_text())
        return results, fo.load_dataset(results["dataset"]).values("filepath"), capsys.readouterr().out

    results, first, printed = command("--sample", "2")
    assert list(results["measurements"]) == ["grid_4"]
    objects = results["measurements"]["grid_4"]["objects"]
    assert objects["rare"] > 0 and objects["rare"] + objects["frequent"] == objects["all"] and not objects["common"]
    assert results["measurements"]["grid_4"]["metrics"]["ARc@10"] is None
    assert len(first) == results["images"] == 2
    assert re.search(r"^grid_4 AR@10 .*\d\.\d \(-\) .* - \(-\)", printed, re.M)
    assert f"fiftyone app launch {PREFIX}-lvis-demo\n" in printed
    assert str(tmp_path / "output" / "reproduction.png") in printed
    filtered = results["measurements"]["grid_4"]["masks_per_image"]

    assert ("--no-grid-filters keeps all" in printed) == (filtered < 1)

    # A second call replaces the dataset with the same images; more masks remain without SAM's filters.
    results, second, _ = command("--sample", "2", "--no-grid-filters")
    assert second == first
    assert results["measurements"]["grid_4"]["masks_per_image"] > filtered
    assert (results["pred_iou_thresh"], results["stability_score_thresh"]) == (0, 0)


def test_failed_images_are_reported(coco, datasets, model, tmp_path):
    for index in range(COUNT):
        content = (coco / "val2017" / f"{index:03d}.png").read_bytes()
        (tmp_path / f"{index:03d}.png").write_bytes(content if index else content[:200])
    arguments = {"object_aware": False, "grids": [2]}
    output = tmp_path / "output"
    reproduction = reproduce(coco / "coco.json", tmp_path, model, output, **arguments)
    (failure,) = reproduction.measurements["grid_2"].failures
    assert failure.filepath == str(tmp_path / "000.png")
    dataset = fo.load_dataset(reproduction.about["dataset"])
    assert reproduction.measurements["grid_2"].masks == dataset.count("grid_2.detections") / 2
    assert reproduction.measurements["grid_2"].recall.images == COUNT
    first = f"1 images were not segmented and count as having no proposals; the first: '{failure.filepath}' is damaged"
    assert first in str(reproduction)

    for index in range(COUNT):
        (tmp_path / f"{index:03d}.png").write_bytes((tmp_path / f"{index:03d}.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"No image could be segmented; the first: '.*000\.png' is damaged"):
        reproduce(coco / "coco.json", tmp_path, model, output, **arguments)


def reproduction_datasets():
    return [(dataset["name"], dataset["created_at"]) for dataset in fo.list_datasets(f"{PREFIX}*", info=True)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--annotations", "missing.json"], "missing.json"),
        (["--annotations", "notes.json"], "notes.json: it isn't in COCO format"),
        (["--images", "missing"], "3 of the 3 images .* don't exist: 'missing/000.png'"),
        (["--model", "mobilesamv2-huge-torch"], "Unknown model 'mobilesamv2-huge-torch'"),
        (["--output", "notes.json"], "notes.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_clear_line(coco, datasets, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.json").write_text("{}")
    given = ["--annotations", str(coco / "coco.json"), "--images", str(coco / "val2017"), "--model", MODEL]
    before = reproduction_datasets()
    assert cli.main(["reproduce", *given, "--device", "cpu", *arguments]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fiftyone-mobilesamv2: ")]
    assert re.search(message, line)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.json"]
    assert reproduction_datasets() == before


def test_dataset_of_the_user_is_not_overwritten(coco, datasets, model, tmp_path):
    (tmp_path / "mine.json").write_text((coco / "coco.json").read_text())
    mine = fo.Dataset(f"{PREFIX}-mine-demo", persistent=True)
    with pytest.raises(ValueError, match=f"The dataset '{mine.name}' exists and is not a reproduction's"):
        reproduce(tmp_path / "mine.json", coco / "val2017", model, tmp_path)
    assert not mine.deleted and len(mine) == 0
    with pytest.raises(ValueError, match="Nothing to measure"):
        reproduce(coco / "coco.json", coco / "val2017", model, tmp_path, object_aware=False, grids=())
