"""Any value of any API or command-line parameter takes effect or is refused with the parameter's name."""

import functools
import math
import numbers
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import bson
import fiftyone as fo
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fiftyone_mobilesamv2 import cli, zoo
from fiftyone_mobilesamv2.errors import ArgumentError
from fiftyone_mobilesamv2.modeling.grid_prompts import GridFilter
from fiftyone_mobilesamv2.training.scenes import TEST_SEED, make_scene
from fiftyone_mobilesamv2.zoo.config import PARAMETERS

MODEL = "mobilesamv2-demo-torch"

texts = st.text() | st.sampled_from(
    ["a\0b", "a\nb", "\udcff", "0.5", "nan", "cpu", "grid", "bfloat16", "../x", "9" * 400]
)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.floats(0, 1) | st.integers(0, 400) | texts
plain |= st.sampled_from([10**400, -(10**400), 2**63, 1e308])
json_values = plain | st.lists(plain, max_size=2) | st.dictionaries(st.text(), plain, max_size=2)
numpy_values = st.sampled_from([np.float32(0.5), np.int64(3), np.bool_(True), np.zeros(2), torch.tensor(3.0)])
values = json_values | numpy_values | st.sampled_from([Decimal("0.5"), Fraction(1, 2), 1j, object(), b"x", Path("x")])


@functools.cache
def model():
    return zoo.load_model(MODEL, device="cpu").model


def is_number(value, low, high, whole=False):
    kind = numbers.Integral if whole else numbers.Real
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


def refusal(call, *words):
    """Returns the result of `call`, or None if it refuses a value with a message that contains these words."""
    try:
        return call()
    except (ValueError, TypeError) as error:
        assert all(word in str(error) for word in words), error


# The model --------------------------------------------------------------------------------------------------------

ALLOWED = {
    **dict.fromkeys(
        ("confidence_thresh", "iou", "pred_iou_thresh", "stability_score_thresh"), lambda v: is_number(v, 0, 1)
    ),
    "max_prompts": lambda v: is_number(v, 1, 30_000, whole=True),
    "points_per_side": lambda v: is_number(v, 1, 256, whole=True),
    "min_area": lambda v: is_number(v, 0, 2**63 - 1, whole=True),
    "max_masks": lambda v: is_number(v, 1, 2**63 - 1, whole=True),
    "raise_failures": lambda v: isinstance(v, bool),
    "masks_on_disk": lambda v: isinstance(v, bool),
    "prompting": lambda v: isinstance(v, str) and v in ("object_aware", "grid"),
    "dtype": lambda v: isinstance(v, str) and v in ("float32", "bfloat16", "float16"),
    **dict.fromkeys(
        ("device", "mask_dir", "encoder_checkpoint", "decoder_checkpoint", "detector_checkpoint"),
        lambda v: isinstance(v, str) and v != "" and "\0" not in v and v != "\udcff",
    ),
    # Or the folder of a trained model.
    "name": lambda v: isinstance(v, Path) or (isinstance(v, str) and v != "" and "\0" not in v and v != "\udcff"),
}


def test_all_parameters_are_covered():
    assert set(ALLOWED) == set(PARAMETERS) == set(vars(zoo.MobileSAMv2ModelConfig({"name": MODEL})))


@pytest.mark.parametrize("name", ALLOWED)
@given(value=values)
@settings(max_examples=40)
def test_configuration_accepts_exactly_the_allowed_values(name, value):
    config = refusal(lambda: zoo.MobileSAMv2ModelConfig({"name": MODEL, name: value}), f"{name} must be ", "not ")
    is_default = value is None and name != "name"
    assert (config is not None) == (is_default or bool(ALLOWED[name](value)))
    if config is not None:
        wanted = getattr(zoo.MobileSAMv2ModelConfig({"name": MODEL}), name) if is_default else value
        assert getattr(config, name) == (str(wanted) if isinstance(wanted, Path) else wanted)
        bson.encode(vars(config))  # a run's record contains it


@pytest.mark.parametrize("name", ALLOWED)
@given(value=values)
@settings(max_examples=40)
def test_changed_parameters_are_checked_as_in_loading(name, value):
    config = zoo.MobileSAMv2ModelConfig({"name": MODEL})
    before = getattr(config, name)
    if PARAMETERS[name].is_fixed:
        with pytest.raises(ArgumentError, match=f"{name} cannot be changed after loading: load the model again"):
            setattr(config, name, value)
        assert getattr(config, name) == before
        return
    allowed = value is None or ALLOWED[name](value)
    accepted = refusal(lambda: setattr(config, name, value) or True, f"{name} must be ", "not ")
    assert bool(accepted) == bool(allowed)
    assert getattr(config, name) == (before if value is None or not allowed else value)


def test_parameters_changed_after_loading_take_effect():
    loaded = zoo.load_model(MODEL, device="cpu")
    image = make_scene(TEST_SEED, 1).image
    everything = loaded.predict(image).detections
    loaded.config.min_area = sorted(label["area_px"] for label in everything)[len(everything) // 2]
    large = loaded.predict(image).detections
    assert [label.bounding_box for label in large] == [
        label.bounding_box for label in everything if label["area_px"] >= loaded.config.min_area
    ]
    loaded.config.max_masks = 2
    assert len(loaded.predict(image).detections) == 2 < len(large)
    loaded.config.min_area = loaded.config.max_masks = None  # the defaults
    assert len(loaded.predict(image).detections) == len(everything)
    with pytest.raises(ArgumentError, match="Unknown parameter threshold of mobilesamv2-demo-torch; it takes name, "):
        loaded.config.threshold = 0.5
    with pytest.raises(ArgumentError, match="masks_on_disk cannot be changed after loading"):
        loaded.config.masks_on_disk = True


@given(name=st.text(min_size=1))
def test_unknown_parameters_are_refused(name):
    with pytest.raises(ValueError, match=re.escape(f"Unknown parameter {name}_ of {MODEL}; it takes name, device, ")):
        zoo.load_model(MODEL, **{f"{name}_": 1})


@pytest.mark.parametrize("device", ["banana", "", "cpu\0", "cuda:-1", "cuda:4096", "meta", 0, True, 5.0, b"cpu", []])
def test_invalid_devices_are_refused(device):
    with pytest.raises(ValueError, match="device must be "):
        zoo.load_model(MODEL, device=device)


@pytest.mark.parametrize("threshold", ["0.5", math.nan, -1, 2, True, [0.5]])
def test_invalid_confidence_of_apply_model_is_refused(dataset, threshold, tmp_path):
    dataset.add_sample(fo.Sample(str(tmp_path / "image.png")))
    model = zoo.load_model(MODEL, device="cpu")
    with pytest.raises(ValueError, match="confidence_thresh must be a number from 0 to 1, not "):
        dataset.apply_model(model, "found", confidence_thresh=threshold, num_workers=0)
    assert model.config.confidence_thresh is None


# Segmenting arrays --------------------------------------------------------------------------------------------------

IMAGE = make_scene(TEST_SEED, 0).image[:150, :100].copy()
ARGUMENTS = {
    "conf": lambda v: is_number(v, 0, 1),
    "iou": lambda v: is_number(v, 0, 1),
    "max_prompts": lambda v: is_number(v, 1, 30_000, whole=True),
    "points_per_side": lambda v: is_number(v, 1, 256, whole=True),
    "prompting": lambda v: isinstance(v, str) and v == "object_aware",
    "grid_filter": lambda v: isinstance(v, GridFilter),
}


@pytest.mark.parametrize("name", ARGUMENTS)
@given(value=values.filter(lambda value: not isinstance(value, str) or value != "grid"))
@settings(max_examples=30, deadline=None)
def test_arguments_of_segment_everything(name, value):
    found = refusal(lambda: model().segment_everything([IMAGE], **{"max_prompts": 5, name: value}), name)
    assert (found is not None) == bool(ARGUMENTS[name](value))
    if found is not None and name == "conf":
        assert (found[0].confidence > value).all()
    if found is not None and name == "max_prompts":
        assert len(found[0]) <= value
    if name in ("conf", "iou", "max_prompts"):
        prompts = refusal(lambda: model().discover([IMAGE], **{name: value}), name)
        assert (prompts is not None) == (found is not None)


@pytest.mark.parametrize("name", list(vars(GridFilter())))
@given(value=values)
@settings(max_examples=30, deadline=None)
def test_grid_filter(name, value):
    def search():
        filters = GridFilter(**{"pred_iou_thresh": 0, "stability_score_thresh": 0, name: value})
        return model().segment_everything([IMAGE], prompting="grid", points_per_side=2, grid_filter=filters)

    found = refusal(search, name)
    assert (found is not None) == is_number(value, -1, 1)
    if found is not None and name == "stability_score_thresh" and value > 0:
        assert (found[0].stability >= value).all()


arrays = values | st.lists(st.lists(st.floats() | st.floats(-500, 500) | plain, max_size=5), max_size=3)
nested = arrays | arrays.map(lambda value: [value]) | arrays.map(lambda value: [[value]])


@given(images=nested)
@settings(max_examples=40, deadline=None)
def test_invalid_images_are_refused(images):
    for call in (model().encode, model().discover, model().segment_everything):
        found = refusal(lambda call=call: call(images), "mage")
        assert found is None or len(images) == 0
    refusal(lambda: model().segment_anything(images, boxes=[[[0, 0, 9, 9]]]), "mage")


@pytest.mark.parametrize("name", ["boxes", "points", "point_labels"])
@given(value=nested)
@settings(max_examples=60, deadline=None)
def test_prompts_are_used_or_refused(name, value):
    arguments = {name: value} if name != "point_labels" else {"points": [[[[50, 50]]]], name: value}
    if name == "point_labels" and value is None:
        return
    words = "prompts" if value is None else name[:5]  # "point" also covers "point_labels"
    found = refusal(lambda: model().segment_anything([IMAGE], **arguments), words)
    if found is None:
        return
    (found,) = found
    if name == "point_labels":  # the only point of the only prompt must be labelled 0 or 1
        assert np.asarray(value).ravel().tolist() in ([0], [1]) and len(found) == 1
        return
    (given_for_image,) = value
    if name == "boxes":
        boxes = np.asarray(given_for_image, float)
        assert len(found) == (boxes.reshape(-1, 4).shape[0] if boxes.size else 0) and np.isfinite(boxes).all()
    else:
        assert len(found) == len(given_for_image)
        assert all(np.isfinite(np.asarray(points, float)).all() for points in given_for_image)
    assert np.isfinite(found.predicted_iou).all()


# The command line ---------------------------------------------------------------------------------------------------

REPRODUCE = ["reproduce", "--annotations", "x.json", "--images", "x", "--model", MODEL]
WHOLE = [
    (["quickstart"], "--scenes"),
    (["quickstart"], "--batch-size"),
    (["segment", "data", "--model", MODEL], "--max-prompts"),
    (["segment", "data", "--model", MODEL], "--batch-size"),
    (["segment", "data", "--model", MODEL], "--workers"),
    (REPRODUCE, "--grids"),
    (REPRODUCE, "--sample"),
    (REPRODUCE, "--batch-size"),
    (["evaluate", "data", "proposals"], "--ks"),
    (["evaluate", "data", "proposals"], "--workers"),
]


def refused(capsys, arguments):
    """Returns the command's error output; it must exit with status 1 or 2."""
    try:
        status = cli.main(arguments)
    except SystemExit as error:
        status = error.code
    assert status in (1, 2)
    return capsys.readouterr().err


any_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)


@pytest.mark.parametrize(("command", "option"), WHOLE, ids=lambda value: value if isinstance(value, str) else value[0])
@given(
    text=st.one_of(st.text(), st.integers(max_value=0).map(str), st.floats().map(str), st.sampled_from(["9" * 5000]))
)
@any_fixture
def test_options_for_whole_numbers_refuse_other_values(capsys, command, option, text):
    if text.isdecimal() and len(text) < 1000 and int(text):
        return
    error = refused(capsys, [*command, f"{option}={text}"])
    assert f"argument {option}: " in error and ("whole number of at least 1" in error or "positive" in error)


@pytest.mark.parametrize(
    ("option", "texts", "words"),
    [
        ("confidence", ["nan", "inf", "-inf", "-0.1", "1.0001", "1e400"], "confidence_thresh must be a number from 0"),
        ("confidence", ["", "x", "0,5", "0x1"], "argument --confidence: invalid float"),
        ("max-prompts", ["30001", "9" * 30], "max_prompts must be a whole number from 1 to 30000"),
        ("prompting", ["", "Grid", "a\nb"], "argument --prompting: invalid choice"),
        ("dtype", ["", "int8", "a\0b"], "argument --dtype: invalid choice"),
        ("device", ["banana", "meta", "cuda:-1"], "device must be available on this machine"),
        ("device", ["", "cpu\0"], "device must be text"),
        ("mask-dir", ["", "a\0b", "\udcff"], "mask_dir must be "),
        ("model", ["x", "../x"], "Unknown model "),
        ("model", ["", "a\0b"], "name must be "),
        ("label-field", ["", "a.b", "_x", "a b", "$a", "a\0b", "frames.x", "id"], "field"),
        ("no-such-option", ["x"], "unrecognized arguments: --no-such-option"),
    ],
)
def test_invalid_options_of_segment_are_refused(dataset, tmp_path, capsys, option, texts, words):
    dataset.add_sample(fo.Sample(str(tmp_path / "image.png")))
    for text in texts:
        assert words in refused(capsys, ["segment", dataset.name, "--model", MODEL, f"--{option}={text}"]), text
    assert dataset.list_runs() == []


@given(name=st.text())
@any_fixture
def test_unknown_datasets_are_reported(mongod, capsys, name):
    for arguments in (["segment", "--model", MODEL, "--", name], ["evaluate", "--", name, "proposals"]):
        assert refused(capsys, arguments) == f"fiftyone-mobilesamv2: There is no dataset '{name}'.\n"
