"""Trained models: their folders, finding them by name in every process, and deleting them."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fiftyone_mobilesamv2.errors import ArgumentError, CheckpointError
from fiftyone_mobilesamv2.modeling.checkpoints.catalog import DEMO_MODEL, MODELS, OBJECT_AWARE_MODEL, Weights
from fiftyone_mobilesamv2.modeling.checkpoints.files import (
    PACKAGED_WEIGHTS,
    WEIGHTS_DIR_VARIABLE,
    deletable_files,
    delete_model,
    fetch_model,
    kept_files,
    local_path,
    megabytes_to_download,
    verify_model,
)
from fiftyone_mobilesamv2.modeling.checkpoints.lookup import (
    all_files,
    model_files,
    model_name,
    models,
    pretrained_model,
)
from fiftyone_mobilesamv2.modeling.checkpoints.trained import (
    check_name,
    delete_trained,
    read_trained,
    register,
    trained_dir,
    trained_models,
    unregister,
)
from fiftyone_mobilesamv2.modeling.mobilesamv2 import MobileSAMv2
from fiftyone_mobilesamv2.training.scenes import TEST_SEED, make_scene

ROOT = Path(__file__).resolve().parents[3]
SHIFT = 0.5
TINY = "mobilesamv2-tinyvit-torch"
pytestmark = pytest.mark.usefixtures("model_zoo")


@pytest.fixture(scope="module")
def image():
    return make_scene(TEST_SEED, 0).image


@pytest.fixture
def trained(tmp_path, make_trained):
    """A trained model in a folder of its own, and registered."""
    make_trained(tmp_path / "training", shift=SHIFT)
    return register(tmp_path / "training")


def change(folder, **values):
    """Changes values of a folder's configuration; None removes one."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def mask_pixels(model, image):
    (result,) = model.segment_everything([image])
    return [(tuple(box), mask.tobytes()) for box, mask in zip(result.boxes.tolist(), result.masks)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# Loading ------------------------------------------------------------------------------------------------------------


def test_loads_by_name_and_folder(trained, tmp_path, image, monkeypatch):
    """The scores of boxes show that the weights are the trained ones: they are higher by the known shift in logits."""
    demo = MobileSAMv2.from_pretrained(DEMO_MODEL, "cpu")
    model = MobileSAMv2.from_pretrained("my-cells", "cpu")
    before, after = (each.discover([image], conf=0.4)[0] for each in (demo, model))
    assert len(after) >= len(before) > 3
    scores = {tuple(box): score for box, score in zip(after.boxes.round().tolist(), after.scores.tolist())}
    found = [(score, scores[tuple(box)]) for box, score in zip(before.boxes.round().tolist(), before.scores.tolist())]
    logits = [np.log(score) - np.log1p(-np.array(score)) for score in zip(*found)]
    np.testing.assert_allclose(logits[1] - logits[0], SHIFT, atol=0.02)  # half precision

    expected = mask_pixels(model, image)
    copy = shutil.copytree(tmp_path / "training", tmp_path / "elsewhere" / "copied")
    monkeypatch.chdir(copy.parent)
    for name in (copy, str(copy), "copied", Path("copied"), f".{os.sep}copied"):
        assert mask_pixels(MobileSAMv2.from_pretrained(name, "cpu"), image) == expected
    assert contents(copy) == contents(tmp_path / "training")  # nothing is written there


def test_loads_from_the_zoo_in_a_new_process(trained, model_zoo, tmp_path, image):
    np.save(tmp_path / "image.npy", image)
    code = f"""
import json, sys
import numpy as np
import fiftyone.zoo as foz
assert "fiftyone_mobilesamv2" not in sys.modules
names = foz.list_zoo_models()
model = foz.load_zoo_model("my-cells", device="cpu")
labels = model.predict(np.load({str(tmp_path / "image.npy")!r}))
foz.download_zoo_model("my-cells", overwrite=True)  # a trained model has nothing to download, and is left as it is
info = foz.get_zoo_model("my-cells")
print("REPORT " + json.dumps([names, model.config.name, [d.confidence for d in labels.detections], info.tags]))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    names, name, confidences, tags = json.loads(ran.stdout.rpartition("REPORT ")[2])
    assert "my-cells" in names and name == "my-cells" and {"trained", "mobilesamv2"} <= set(tags)
    (expected,) = MobileSAMv2.from_pretrained("my-cells", "cpu").segment_everything([image])
    assert confidences == pytest.approx(expected.confidence.tolist(), abs=1e-5)
    assert read_trained(trained.folder) == trained
    assert trained.folder.resolve() == tmp_path / "training" and trained.folder.parent == trained_dir()


def test_requirements_and_description_for_the_zoo(trained):
    from fiftyone.zoo.models import RemoteZooModelsManifest

    (model,) = RemoteZooModelsManifest.from_json(str(trained.folder / "manifest.json"))
    assert model.filename == os.path.join("mobilesamv2", "trained", "my-cells", "config.json")
    assert "object discovery trained on cells" in model.description and model.date_added is not None
    model.ensure_requirements(error_level=0)


def test_entry_of_a_trained_model(trained):
    model = pretrained_model("my-cells")
    recorded = {"epochs": 3, "ar": {"before": 0.5, "after": 0.75}, "contents": {"trained_on": [], "held_out": []}}
    assert (model, trained.training) == (trained.model, recorded)
    assert (model.encoder, model.detector_size, model.images, model.hint) == (
        *("resnet_demo", 320, "scenes"),
        "trained on cells",
    )
    demo = MODELS[DEMO_MODEL]
    assert model.weights == demo.weights | {"detector_checkpoint": trained.own_files[0]}
    (own,) = trained.own_files
    assert not own.is_packaged and local_path(own) == trained.folder / "detector.safetensors"
    assert list(models()) == [*MODELS, "my-cells"]
    assert own in all_files() and own in model_files("my-cells")
    assert megabytes_to_download("my-cells") == 0
    assert [verified.problem for verified in verify_model("my-cells").values()] == [None, None]


def test_missing_file_of_the_catalog_is_downloaded(tmp_path, make_trained, monkeypatch):
    monkeypatch.setenv(WEIGHTS_DIR_VARIABLE, str(tmp_path / "weights"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    files = {"encoder_checkpoint": MODELS[DEMO_MODEL].encoder_weights, "detector_checkpoint": OBJECT_AWARE_MODEL}
    make_trained(
        tmp_path / "training", files=files | {"decoder_checkpoint": tmp_path / "training/detector.safetensors"}
    )
    folder = str(tmp_path / "training")
    assert megabytes_to_download(folder) == 140
    assert pretrained_model(folder).detector_weights is OBJECT_AWARE_MODEL
    fetched = fetch_model(folder, skip=["detector_checkpoint"])
    assert fetched["decoder_checkpoint"] == tmp_path / "training" / "detector.safetensors"


@pytest.mark.parametrize("fault", ["changed", "longer", "missing"])
def test_wrong_file_is_refused(trained, tmp_path, fault):
    path = tmp_path / "training" / "detector.safetensors"
    data = bytearray(path.read_bytes())
    if fault == "missing":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data + (b"" if fault == "changed" else b"!"))
    for name in ("my-cells", tmp_path / "training"):
        with pytest.raises(
            CheckpointError, match=r"detector\.safetensors .*copy the trained model's whole folder again"
        ):
            MobileSAMv2.from_pretrained(name, "cpu")
    with pytest.raises(CheckpointError, match="folder again"):
        register(tmp_path / "training")
    assert sum(verified.problem is not None for verified in verify_model("my-cells").values()) == 1
    assert megabytes_to_download("my-cells") == 0  # it can't be downloaded


def test_record_has_the_registered_name(trained, tmp_path, make_trained):
    """A run continues wherever its model is given by: the same model has the same name."""
    from fiftyone_mobilesamv2.zoo.config import MobileSAMv2ModelConfig

    assert model_name(tmp_path / "training") == "my-cells" == model_name(trained.folder) == model_name("my-cells")
    assert MobileSAMv2ModelConfig({"name": tmp_path / "training"}).name == "my-cells"
    make_trained(tmp_path / "other")
    assert model_name(tmp_path / "other") == str(tmp_path / "other")  # another folder with the same name
    assert model_name("sam") == "sam"


def test_unknown_model_lists_what_there_is(trained):
    for name in ("sam", "", ".", "\0", "x" * 5000, "\ud800"):
        with pytest.raises((ArgumentError, CheckpointError)):
            pretrained_model(name)
    with pytest.raises(
        ArgumentError, match=rf"Unknown model 'sam'; choose one of {TINY}, .*, my-cells, or give a trained"
    ):
        pretrained_model("sam")
    for name in ("./nowhere", Path("nowhere")):
        with pytest.raises(ArgumentError, match=r"Unknown model '[./]*nowhere'"):
            pretrained_model(name)
    with pytest.raises(
        CheckpointError, match=r"config\.json does not exist, so .* is not the folder of a trained model"
    ):
        pretrained_model(trained.folder.parent)


# Configurations -----------------------------------------------------------------------------------------------------


def test_truncated_configuration_is_refused(trained, tmp_path):
    path = tmp_path / "training" / "config.json"
    content = path.read_bytes()
    for end in range(0, len(content) - 1, 10):
        path.write_bytes(content[:end])
        with pytest.raises(CheckpointError, match=r"config\.json"):
            read_trained(tmp_path / "training")


OWN = {"filename": "detector.safetensors", "size": 1, "sha256": "0" * 64}
FAULTS = {
    "newer format": ({"format": 2}, "has format 2, and this version reads format 1: update fiftyone_mobilesamv2"),
    "no format": ({"format": None}, "is not the configuration of a trained model"),
    "format is true": ({"format": True}, "is not the configuration of a trained model"),
    "no encoder": ({"encoder": None}, "lacks encoder"),
    "unknown encoder": ({"encoder": "vgg"}, "unknown encoder 'vgg', expected one of tiny_vit, "),
    "size is text": ({"detector_size": "320"}, "detector_size is '320', but should be a valid integer"),
    "size is tiny": ({"detector_size": 1}, "detector_size is 1, but should be greater than or equal to 32"),
    "unknown part": ({"part": "both"}, "part is 'both', but should be 'discovery' or 'masks'"),
    "bad name": ({"name": "my cells"}, "name is 'my cells', but should be at most 100 letters"),
    "name of the catalog": ({"name": DEMO_MODEL}, "is that of a model of the catalog"),
    "no time": ({"created": "yesterday"}, "created is 'yesterday', expected a time in ISO format"),
    "files is a list": ({"files": []}, "files is [], but should be a valid dictionary"),
    "no detector": ({"files": {"encoder_checkpoint": {}, "decoder_checkpoint": {}}}, "lacks files.detector_checkpoint"),
    **{
        f"file {filename}": (
            {"files": dict.fromkeys(MODELS[TINY].weights, OWN | {"filename": filename})},
            f"files.encoder_checkpoint.filename is {filename!r}, but should be the name of a .safetensors file in the",
        )
        for filename in ("../x.safetensors", "/x.safetensors", "a/x.safetensors", "x.pt", "", ".safetensors")
    },
    "no hash": (
        {"files": dict.fromkeys(MODELS[TINY].weights, OWN | {"sha256": "0"})},
        "files.encoder_checkpoint.sha256 is '0', but should be 64 hexadecimal digits",
    ),
    "unknown file": (
        {"files": {key: {"catalog": "x.pt"} for key in MODELS[TINY].weights}},
        "files.encoder_checkpoint.catalog is 'x.pt', expected one of mobile_sam.pt, ",
    ),
    "contents are text": (
        {"training": {"contents": {"trained_on": "abc"}}},
        "training.contents.trained_on is 'abc', but should be a valid list",
    ),
    "training is a list": ({"training": [1]}, "training is [1], but should be a valid dictionary"),
}


@pytest.mark.parametrize("values, message", FAULTS.values(), ids=FAULTS)
def test_faulty_configuration_is_explained(tmp_path, make_trained, values, message):
    make_trained(tmp_path / "training")
    change(tmp_path / "training", **values)
    with pytest.raises(CheckpointError) as error:
        read_trained(tmp_path / "training")
    assert str(error.value).startswith(str(tmp_path / "training" / "config.json")) and message in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
KEYS = [
    "format",
    "name",
    "encoder",
    "detector_size",
    "part",
    "base",
    "dataset",
    "images",
    "created",
    "files",
    "training",
]


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from([None, *KEYS, *MODELS[TINY].weights, *OWN]), value=JSON)
def test_any_configuration_is_read_or_refused(tmp_path, make_trained, key, value):
    folder = tmp_path / "training"
    if not folder.exists():
        make_trained(folder)
        (folder / "valid.json").write_bytes((folder / "config.json").read_bytes())
    content = json.loads((folder / "valid.json").read_text())
    if key is None:
        content = value
    elif key in KEYS:
        content[key] = value
    elif key in OWN:
        content["files"]["detector_checkpoint"][key] = value
    else:
        content["files"][key] = value
    (folder / "config.json").write_text(json.dumps(content))
    try:
        read = read_trained(folder)
    except CheckpointError as error:
        assert "config.json" in str(error)
    else:
        assert read.model.hint.isprintable()
        assert all(local_path(weights).parent in (folder, PACKAGED_WEIGHTS) for weights in read.model.weights.values())


def test_deeply_nested_configuration_is_refused(tmp_path, make_trained):
    make_trained(tmp_path / "training")
    for text in ("[" * 100_000, '{"format": 1, "training": ' + '{"a": ' * 100_000):
        (tmp_path / "training" / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="can't be read"):
            read_trained(tmp_path / "training")


# Writing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a b", "", ".hidden", "-x", "a@1", "a/b", "a\n", "ä", "x" * 101, None, 5])
def test_names_that_the_zoo_can_not_take(tmp_path, make_trained, name):
    with pytest.raises(ArgumentError, match="can't have the name"):
        make_trained(tmp_path / "training", name=name)
    assert not (tmp_path / "training" / "config.json").exists()


@pytest.mark.parametrize("name", [DEMO_MODEL, "yolov8n-coco-torch"])
def test_names_of_the_zoo_are_taken(name):
    with pytest.raises(ArgumentError, match="already has the name"):
        check_name(name)


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True))
def test_other_names_are_fine(name):
    check_name(name)


def test_only_files_of_the_folder_or_the_catalog_are_written(tmp_path, make_trained):
    other = make_trained(tmp_path / "other").own_files[0]
    for file in (
        tmp_path / "other" / "detector.safetensors",
        tmp_path / "training" / "missing.safetensors",
        tmp_path / "training" / "config.json",
        other,
        Weights("x.pt", (), 1),
    ):
        with pytest.raises(ArgumentError, match="is not a"):
            make_trained(tmp_path / "training", files={"detector_checkpoint": file})
    with pytest.raises(ArgumentError, match="files lacks decoder_checkpoint, encoder_checkpoint, and 'my-base' is not"):
        make_trained(tmp_path / "training", base="my-base")
    assert {path.name for path in (tmp_path / "training").iterdir()} == {"detector.safetensors"}


def test_arguments_that_could_not_be_read_are_not_written(tmp_path, make_trained):
    for arguments in ({"part": "both"}, {"images": "cells"}, {"encoder": "vgg"}, {"detector_size": 0}, {"dataset": ""}):
        with pytest.raises(CheckpointError):
            make_trained(tmp_path / "training", **arguments)
    with pytest.raises(TypeError):
        make_trained(tmp_path / "training", training={"model": object()})
    assert {path.name for path in (tmp_path / "training").iterdir()} == {"detector.safetensors"}


def test_what_is_written_is_read(tmp_path, make_trained):
    made = make_trained(tmp_path / "training", dataset="cells\n|*")
    assert read_trained(tmp_path / "training") == made
    assert made.dataset == "cells\n|*" and made.model.hint == "trained on cells?|*"


# Registering --------------------------------------------------------------------------------------------------------


def test_folder_in_the_zoo_needs_no_link(make_trained):
    folder = trained_dir() / "my-cells"
    make_trained(folder)
    before = sorted(folder.parent.iterdir())
    assert register(folder).folder == folder
    assert [path for path in folder.parent.iterdir() if path.name != ".lock"] == before
    folder.rename(folder.with_name("renamed"))
    with pytest.raises(CheckpointError, match="has the model 'my-cells', whose folder must have the same name"):
        register(folder.with_name("renamed"))
    with pytest.raises(ArgumentError, match=r"No trained model is registered as 'my-cells'\."):
        unregister("my-cells")


def test_name_of_another_model_is_refused_or_replaced(trained, tmp_path, make_trained):
    make_trained(tmp_path / "second", shift=1)
    before = contents(tmp_path / "training")
    with pytest.raises(ArgumentError, match=r"'my-cells' is already the name of the trained model in .*training"):
        register(tmp_path / "second")
    assert register(tmp_path / "training") == trained  # again
    register(tmp_path / "second", replace=True)
    assert (trained_dir() / "my-cells").resolve() == tmp_path / "second"
    assert contents(tmp_path / "training") == before
    assert unregister("my-cells") == tmp_path / "second" and trained_models() == {}
    shutil.move(tmp_path / "training", trained_dir() / "my-cells")
    with pytest.raises(ArgumentError, match="is already the name"):
        register(tmp_path / "second", replace=True)
    with pytest.raises(ArgumentError, match="is the model's own folder"):
        unregister("my-cells")
    assert contents(trained_dir() / "my-cells") == before


def test_moved_folder_is_registered_again(trained, tmp_path):
    (tmp_path / "training").rename(tmp_path / "moved")
    assert trained_models() == {}
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        pretrained_model("my-cells")
    assert register(tmp_path / "moved").folder.resolve() == tmp_path / "moved"
    assert list(trained_models()) == ["my-cells"]


def test_one_of_several_processes_wins(tmp_path, make_trained):
    folders = [tmp_path / str(index) for index in range(8)]
    for folder in folders:
        make_trained(folder)
    results, barrier = [], threading.Barrier(len(folders))

    def attempt(folder):
        barrier.wait()
        try:
            results.append(register(folder).folder.resolve())
        except ArgumentError as error:
            assert "is already the name" in str(error)

    threads = [threading.Thread(target=attempt, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [(trained_dir() / "my-cells").resolve()]


def test_broken_folder_does_not_hide_others(trained, make_trained, caplog):
    broken = trained_dir() / "broken"
    make_trained(broken, name="broken")
    (broken / "config.json").write_text("{")
    (trained_dir() / "in-progress").mkdir()
    (trained_dir() / "notes.txt").touch()
    (trained_dir() / "dangling").symlink_to(trained_dir() / "nowhere")
    for _ in range(3):
        assert list(trained_models()) == ["my-cells"]
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 2 and str(broken / "config.json") in warnings[0] and "dangling" in warnings[1]
    with pytest.raises(CheckpointError, match="can't be read"):
        pretrained_model("broken")


@pytest.mark.parametrize("imports", [False, True], ids=["without FiftyOne", "with FiftyOne"])
@pytest.mark.parametrize("setting", ["variable", "config file", "default_dataset_dir"])
def test_zoo_folder_is_that_of_fiftyone(tmp_path, make_trained, setting, imports):
    zoo = tmp_path / ("zoo" if setting != "default_dataset_dir" else "datasets/__models__")
    folder = zoo / "mobilesamv2" / "trained" / "my-cells"
    make_trained(folder)
    config = tmp_path / "config.json"
    environment = {key: value for key, value in os.environ.items() if "MODEL_ZOO_DIR" not in key}
    environment |= {"PYTHONPATH": str(ROOT), "FIFTYONE_CONFIG_PATH": str(config)}
    if setting == "variable":
        environment["FIFTYONE_MODEL_ZOO_DIR"] = str(zoo)
        config.write_text('{"model_zoo_dir": "/elsewhere"}')
    else:
        environment.pop("FIFTYONE_DEFAULT_DATASET_DIR", None)
        key = "model_zoo_dir" if setting == "config file" else setting
        config.write_text(json.dumps({key: str(zoo if setting == "config file" else zoo.parent)}))
    code = "import fiftyone, sys\n" if imports else "import sys\n"
    code += "from fiftyone_mobilesamv2.modeling.checkpoints.trained import trained_models\n"
    code += "print([str(each.folder) for each in trained_models().values()], 'fiftyone' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == f"{[str(folder)]} {imports}", ran.stderr


# Deleting -----------------------------------------------------------------------------------------------------------


def test_deleting_one_model_leaves_the_others(trained, tmp_path, make_trained, image):
    make_trained(trained_dir() / "second", name="second", shift=0.25)
    packaged, second = contents(PACKAGED_WEIGHTS), contents(trained_dir() / "second")
    (tmp_path / "training" / "README.md").touch()
    (tmp_path / "training" / "__pycache__").mkdir()  # of FiftyOne's import
    result = delete_trained(trained)
    assert result.folder == tmp_path / "training" and result.kept == []
    assert set(result.deleted) == {"detector.safetensors", "README.md", "__init__.py", "manifest.json", "config.json"}
    assert not (tmp_path / "training").exists() and not os.path.lexists(trained.folder)
    assert contents(PACKAGED_WEIGHTS) == packaged and contents(trained_dir() / "second") == second
    assert mask_pixels(MobileSAMv2.from_pretrained("second", "cpu"), image)
    assert delete_model("second") and not (trained_dir() / "second").exists() and trained_models() == {}
    assert contents(PACKAGED_WEIGHTS) == packaged


def test_files_that_are_not_the_models_are_kept(trained, tmp_path):
    (tmp_path / "training" / "notes.txt").write_text("mine")
    (tmp_path / "training" / "plots").mkdir()
    assert delete_trained(trained).kept == ["notes.txt", "plots"]
    assert sorted(path.name for path in (tmp_path / "training").iterdir()) == ["notes.txt", "plots"]
    assert trained_models() == {} and not os.path.lexists(trained.folder)


def test_deleting_by_folder_removes_only_its_own_link(trained, tmp_path, make_trained):
    make_trained(tmp_path / "other")
    delete_trained(read_trained(tmp_path / "other"))
    assert list(trained_models()) == ["my-cells"]
    delete_trained(read_trained(tmp_path / "training"))
    assert not os.path.lexists(trained.folder)


def test_files_that_a_trained_model_needs_are_kept(tmp_path, make_trained, monkeypatch):
    monkeypatch.setenv(WEIGHTS_DIR_VARIABLE, str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    files = dict.fromkeys(MODELS[TINY].weights, MODELS[TINY].decoder_weights)
    make_trained(trained_dir() / "my-cells", encoder="tiny_vit", files=files)
    for weights in model_files(TINY):
        local_path(weights).touch()
    decoder = MODELS[TINY].decoder_weights
    assert kept_files(TINY) == {decoder: "my-cells needs it"} and decoder not in deletable_files(TINY)
    make_trained(trained_dir() / "more-cells", name="more-cells", encoder="tiny_vit", files=files)
    assert kept_files(TINY) == {decoder: "more-cells, my-cells need it"}
    assert decoder not in delete_model(TINY) and local_path(decoder).exists()
    for name in ("my-cells", "more-cells"):
        assert delete_model(name) == [] and local_path(decoder).exists()
    assert delete_model(TINY) == [decoder]
