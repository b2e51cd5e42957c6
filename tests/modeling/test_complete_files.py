"""A file that is written appears, or replaces an earlier one, only when it is complete."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from fiftyone_mobilesamv2.errors import CheckpointError
from fiftyone_mobilesamv2.modeling.complete_files import complete_file
from fiftyone_mobilesamv2.training import demo
from fiftyone_mobilesamv2.training.scenes import write_coco


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_failure_keeps_the_earlier_file(tmp_path, error):
    path = tmp_path / "results.json"
    path.write_text("earlier")
    with pytest.raises(error), complete_file(path) as temporary:
        assert temporary.suffix == ".json"  # from which writers of images choose their format
        temporary.write_text("half of the new")
        raise error
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]
    with complete_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_killed_process_keeps_the_earlier_file(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("earlier")
    code = f"""
import os, signal
from pathlib import Path
from fiftyone_mobilesamv2.errors import CheckpointError
from fiftyone_mobilesamv2.modeling.complete_files import complete_file
with complete_file(Path({str(path)!r})) as temporary:
    temporary.write_text("half of the new")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -9
    assert path.read_text() == "earlier"


def test_weights_that_do_not_load_replace_none(tmp_path):
    """The packaged weights stay as they are if a training's weights are of another model."""
    runs, output = tmp_path / "runs", tmp_path / "weights"
    for part, file in (("masks", demo.SAM), ("discovery", demo.DETECTOR)):
        (runs / part).mkdir(parents=True)
        save_file({"wrong": torch.ones(2)}, runs / part / file)
    output.mkdir()
    (output / "demo_sam.safetensors").write_text("earlier")
    with pytest.raises(CheckpointError, match="demo_sam"):  # once both files are written
        demo.package(runs, output)
    assert {path.name: path.read_text() for path in output.iterdir()} == {"demo_sam.safetensors": "earlier"}


def test_scenes_leave_no_temporary_files(tmp_path):
    images, annotations = write_coco(tmp_path, 1)
    assert [path.name for path in images.iterdir()] == ["000.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "scenes.json"]
    assert json.loads(annotations.read_text())["images"][0]["file_name"] == "000.png"
