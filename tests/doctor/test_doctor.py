"""The doctor command: output, picture and exit status."""

import cv2
import huggingface_hub.constants
import pytest

from fiftyone_mobilesamv2 import cli, doctor
from fiftyone_mobilesamv2.doctor.segmentation_check import Check
from fiftyone_mobilesamv2.modeling.checkpoints.files import WEIGHTS_DIR_VARIABLE


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    """Uses an empty weights folder and replaces the checks of the machine, which test_machine.py tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(WEIGHTS_DIR_VARIABLE, str(tmp_path / "weights"))
    monkeypatch.setattr(doctor, "machine_checks", lambda device: [Check(True, f"machine of {device}")])


@pytest.mark.slow
def test_demo_model_works(tmp_path, capsys):
    assert cli.main(["doctor", "mobilesamv2-demo-torch", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "mobilesamv2-demo-torch: works"
    assert "ok   machine of cpu" in lines and not any(line.startswith("FAIL") for line in lines)
    assert sum("sha256" in line for line in lines) == 2
    assert any("have a mean IoU of 0.67" in line and "filled box has 0.46" in line for line in lines)
    assert any(line.startswith("     Seconds per image: encode 0.") for line in lines)
    assert cv2.imread(str(tmp_path / "doctor.png")).shape[1] == 3 * 364


@pytest.mark.slow
def test_trained_model_works(model_zoo, make_trained, tmp_path, capsys):
    make_trained(tmp_path / "training", shift=0.1)
    arguments = ["doctor", str(tmp_path / "training"), "--device", "cpu", "--output", str(tmp_path / "doctor.png")]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "detector.safetensors: sha256" in out and "Segmentation of scenes" in out and "training: works" in out


def test_failed_download_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert cli.main(["doctor", "mobilesamv2-vith-torch"]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "mobilesamv2-vith-torch: Files are missing or are not the expected ones: see above."
    assert "sam_vit_h_4b8939.pth (2,565 MB) from https://dl.fbaipublicfiles.com" in out and "offline mode" in out


def test_wrong_file_is_reported(tmp_path, capsys):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "sam_vit_b_01ec64.pth").write_bytes(b"<html>")
    assert cli.main(["doctor", "mobilesamv2-vitb-torch"]) == 1
    assert "sam_vit_b_01ec64.pth is not sam_vit_b_01ec64.pth: it has 6 bytes of a web page" in capsys.readouterr().out


def test_failed_machine_check_decides_the_verdict(monkeypatch, capsys):
    lacking = [Check(False, "The database can't be used: gone", "The database can't be used: see above.")]
    monkeypatch.setattr(doctor, "machine_checks", lambda device: lacking)
    monkeypatch.setattr(doctor, "_segmentation", lambda *args: [])
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("The database can't be used: see above.")


def test_unknown_model(capsys):
    assert cli.main(["doctor", "sam"]) == 1
    assert "Unknown model 'sam'" in capsys.readouterr().err
