"""What is read from a file of `torch.save` is what was saved, bit for bit. Hostile: test_hostile_files.py."""

import collections

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from ultralytics.nn.tasks import DetectionModel, SegmentationModel

from fiftyone_mobilesamv2.modeling.checkpoints.saved_tensors import named_tensors, read_saved

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16),
]


@st.composite
def saved_tensors(draw) -> torch.Tensor:
    """A tensor of any type, perhaps a part of another one, transposed, expanded, or a parameter."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    values = torch.randint(-100, 100, [size + 2 for size in shape], generator=torch.Generator().manual_seed(0))
    found = values.to(draw(st.sampled_from(DTYPES)))
    for dim, size in enumerate(shape):
        start = draw(st.integers(0, 2))
        found = found.narrow(dim, start, size)
    if draw(st.booleans()):
        found = found.transpose(0, -1) if found.ndim else found
    if draw(st.booleans()):
        found = found[None].expand(3, *found.shape)
    if draw(st.booleans()):
        found = found.clone()
    return nn.Parameter(found) if found.is_floating_point() and draw(st.booleans()) else found


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="."), max_size=5) | st.integers(0, 10)
OTHERS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.sampled_from([(1, (2,)), {1, 2}, 1j, torch.Size([2]), torch.float16, bytearray(b"a"), torch.device("cpu")]),
)
CONTENTS = st.recursive(
    saved_tensors() | OTHERS | st.lists(OTHERS, max_size=3),
    lambda inside: st.dictionaries(NAMES, inside, max_size=4).flatmap(
        lambda found: st.sampled_from([found, collections.OrderedDict(found)])
    ),
    max_leaves=10,
)


def flattened(content, prefix="") -> dict[str, torch.Tensor]:
    found = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found |= flattened(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            found[f"{prefix}{key}"] = value.detach()
    return found


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all bits are."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.dictionaries(NAMES, CONTENTS, max_size=4))
def test_what_was_saved(tmp_path, content):
    torch.save(content, tmp_path / "saved.pt")
    found = dict(named_tensors(read_saved(tmp_path / "saved.pt")))
    expected = flattened(content)
    assert found.keys() == expected.keys()
    assert all(equal(found[name], tensor) for name, tensor in expected.items())


def test_tensors_of_one_storage(tmp_path):
    whole = torch.arange(12.0)
    torch.save({"whole": whole, "part": whole[2:5], "rows": whole.view(3, 4).T}, tmp_path / "saved.pt")
    found = dict(named_tensors(read_saved(tmp_path / "saved.pt")))
    assert torch.equal(found["part"], whole[2:5]) and torch.equal(found["rows"], whole.view(3, 4).T)
    found["whole"][2] = -1  # storages are read once, whatever shows parts of them
    assert found["part"][0] == -1 and found["rows"][2, 0] == -1


def test_tensors_with_attributes(tmp_path):
    tensor, parameter = torch.arange(3.0), nn.Parameter(torch.arange(4.0))
    tensor.note, parameter.note = "mine", "mine"
    torch.save({"tensor": tensor, "parameter": parameter}, tmp_path / "saved.pt")
    found = dict(named_tensors(read_saved(tmp_path / "saved.pt")))
    assert torch.equal(found["tensor"], tensor) and torch.equal(found["parameter"], parameter)
    assert not hasattr(found["tensor"], "note")


def test_tensors_that_are_no_weights_are_left_out(tmp_path):
    content = {
        "complex": torch.ones(2, dtype=torch.complex64),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "meta": torch.ones(2, device="meta"),
        "sparse": torch.ones(2).to_sparse(),
        "kept": torch.ones(2),
    }
    torch.save(content, tmp_path / "saved.pt")
    assert list(dict(named_tensors(read_saved(tmp_path / "saved.pt")))) == ["kept"]


@pytest.mark.parametrize("build", [DetectionModel, SegmentationModel])
def test_pickled_models(tmp_path, build):
    """As ultralytics saves them, half precision and all."""
    model = build({DetectionModel: "yolov8n.yaml", SegmentationModel: "yolov8n-seg.yaml"}[build], verbose=False).half()
    torch.save({"epoch": 3, "ema": None, "model": model, "train_args": {"lr0": 0.01}}, tmp_path / "saved.pt")
    found = dict(named_tensors(read_saved(tmp_path / "saved.pt")["model"]))
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(equal(found[name], tensor) for name, tensor in expected.items())


def test_legacy_files_are_refused(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "saved.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(Exception, match="not a zip file"):
        read_saved(tmp_path / "saved.pt")
