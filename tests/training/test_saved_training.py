"""States of trainings are kept whole, and used only by the training that they are of."""

import numpy as np
import pytest
import torch

from fiftyone_mobilesamv2.errors import StorageError
from fiftyone_mobilesamv2.training.saved_training import fingerprint, save_training, saved_training

from .conftest import example_of, rectangle, simple_example

SETTINGS = {"epochs": 3, "learning_rate": 1e-4}
TENSORS = {"weight": torch.ones(2, 3), "counter": torch.tensor(3)}


def test_fingerprint():
    examples = [simple_example(0), simple_example(1)]
    first = fingerprint(SETTINGS, TENSORS, examples)
    assert first == fingerprint(dict(reversed(SETTINGS.items())), TENSORS, map(simple_example, range(2)))
    moved = example_of(None, [rectangle((80, 96), (0, 0, 9, 9))], "image 1")
    others = [
        (SETTINGS | {"epochs": 4}, TENSORS, examples),
        (SETTINGS, TENSORS | {"weight": torch.full((2, 3), 1.0000001)}, examples),
        (SETTINGS, TENSORS, examples[:1]),
        (SETTINGS, TENSORS, examples[::-1]),
        (SETTINGS, TENSORS, [examples[0], moved]),  # the same id with another label
    ]
    assert len({first, *(fingerprint(*other) for other in others)}) == 6


def test_a_state_is_read_back(tmp_path):
    path = tmp_path / "new" / "masks.pt"
    assert saved_training(path, "abc") is None
    save_training(path, {"fingerprint": "abc", "tensors": TENSORS, "curve": [{"score": None, "loss": 0.5}]})
    state = saved_training(path, "abc")
    assert torch.equal(state["tensors"]["weight"], TENSORS["weight"]) and state["curve"][0]["loss"] == 0.5
    assert [file.name for file in path.parent.iterdir()] == ["masks.pt"]


def test_a_state_of_another_training_is_not_used(tmp_path, caplog):
    path = tmp_path / "masks.pt"
    save_training(path, {"fingerprint": "abc"})
    assert saved_training(path, "def") is None
    assert f"{path} is of a training with other settings" in caplog.text and "starts afresh" in caplog.text


@pytest.mark.parametrize("content", [b"", b"no checkpoint", np.random.default_rng(0).bytes(1000)])
def test_a_damaged_state_is_not_used(tmp_path, content, caplog):
    path = tmp_path / "masks.pt"
    path.write_bytes(content)
    assert saved_training(path, "abc") is None and "can't be read" in caplog.text


def test_a_state_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="can't be saved"):
        save_training(tmp_path / "file" / "masks.pt", {})
