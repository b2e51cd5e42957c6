"""Tensors read from `torch.save` files equal the saved ones bit for bit. Malicious files: test_hostile_files.py."""

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
    """A tensor of any dtype, possibly a slice of another tensor, transposed, expanded, or a parameter."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    values = torch.randint(-100, 100, [size + 2 for size in shape], generator=torch.Generator().manual_seed(0))
    tensor = values.to(draw(st.sampled_from(DTYPES)))
    for dim, size in enumerate(shape):
        start = draw(st.integers(0, 2))
        tensor = tensor.narrow(dim, start, size)
    if draw(st.booleans()):
        tensor = tensor.transpose(0, -1) if tensor.ndim else tensor
    if draw(st.booleans()):
        tensor = tensor[None].expand(3, *tensor.shape)
    if draw(st.booleans()):
        tensor = tensor.clone()
    return nn.Parameter(tensor) if tensor.is_floating_point() and draw(st.booleans()) else tensor


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
        lambda content: st.sampled_from([content, collections.OrderedDict(content)])
    ),
    max_leaves=10,
)


def flattened(content, prefix="") -> dict[str, torch.Tensor]:
    tensors = {}
    for key, value in content.items():
        if isinstance(value, dict):
            tensors |= flattened(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            tensors[f"{prefix}{key}"] = value.detach()
    return tensors


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether dtype, shape and all bits are equal."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    # A clone: of a single element, contiguous() keeps whatever stride it has, and such a view is refused.
    return tensor.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.dictionaries(NAMES, CONTENTS, max_size=4))
def test_loaded_tensors_equal_the_saved_ones(tmp_path, content):
    torch.save(content, tmp_path / "saved.pt")
    loaded = dict(named_tensors(read_saved(tmp_path / "saved.pt")))
    expected = flattened(content)
    assert loaded.keys() == expected.keys()
    assert all(equal(loaded[name], tensor) for name, tensor in expected.items())


def test_tensors_of_one_storage_still_share_it(tmp_path):
    whole = torch.arange(12.0)
    torch.save({"whole": whole, "part": whole[2:5], "rows": whole.view(3, 4).T}, tmp_path / "saved.pt")
    loaded = dict(named_tensors(read_saved(tmp_path / "saved.pt")))
    assert torch.equal(loaded["part"], whole[2:5]) and torch.equal(loaded["rows"], whole.view(3, 4).T)
    loaded["whole"][2] = -1  # a shared storage is read only once
    assert loaded["part"][0] == -1 and loaded["rows"][2, 0] == -1


def test_attributes_of_tensors_are_ignored(tmp_path):
    tensor, parameter = torch.arange(3.0), nn.Parameter(torch.arange(4.0))
    tensor.note, parameter.note = "mine", "mine"
    torch.save({"tensor": tensor, "parameter": parameter}, tmp_path / "saved.pt")
    loaded = dict(named_tensors(read_saved(tmp_path / "saved.pt")))
    assert torch.equal(loaded["tensor"], tensor) and torch.equal(loaded["parameter"], parameter)
    assert not hasattr(loaded["tensor"], "note")


def test_tensors_that_cannot_be_weights_are_ignored(tmp_path):
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
def test_pickled_models_are_read(tmp_path, build):
    """These models are saved as ultralytics saves them, in half precision."""
    model = build({DetectionModel: "yolov8n.yaml", SegmentationModel: "yolov8n-seg.yaml"}[build], verbose=False).half()
    torch.save({"epoch": 3, "ema": None, "model": model, "train_args": {"lr0": 0.01}}, tmp_path / "saved.pt")
    loaded = dict(named_tensors(read_saved(tmp_path / "saved.pt")["model"]))
    expected = model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(equal(loaded[name], tensor) for name, tensor in expected.items())


def test_legacy_files_are_refused(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "saved.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(Exception, match="not a zip file"):
        read_saved(tmp_path / "saved.pt")
