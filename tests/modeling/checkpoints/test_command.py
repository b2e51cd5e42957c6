"""`fiftyone-mobilesamv2 models` lists, downloads, verifies and deletes; test_sources.py tests `--check-sources`."""

import hashlib
import os
import subprocess
import sys

import pytest

from fiftyone_mobilesamv2 import cli
from fiftyone_mobilesamv2.modeling.checkpoints.catalog import MODELS, PretrainedModel, Weights
from fiftyone_mobilesamv2.modeling.checkpoints.lookup import all_files
from fiftyone_mobilesamv2.modeling.checkpoints.trained import trained_dir

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def model(server, folder, monkeypatch):
    """A model "one" on that server; no other model uses its second file."""
    server.files |= {"/a.pt": CONTENT, "/b.pt": CONTENT[::-1]}
    first = Weights("a.pt", (f"{server.url}/a.pt",), megabytes=1, sha256=SHA256)
    second = Weights("b.pt", (f"{server.url}/elsewhere", f"{server.url}/b.pt"), megabytes=1)
    monkeypatch.setitem(MODELS, "one", PretrainedModel("tiny_vit", first, first, second, "a test", "quick"))


def run(capsys, *arguments):
    """Returns the exit status, stdout, and stderr without progress bars."""
    status = cli.main(["models", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err.rpartition("\r")[2]


def test_list(capsys, folder):
    status, out, _ = run(capsys)
    assert status == 0 and out.splitlines()[-1] == f"Downloaded weights are in {folder}."
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert rows["one"] == ["one", "2", "quick", "a.pt,", "b.pt"]
    assert set(MODELS) | {weights.filename for weights in all_files()} <= set(rows)


def test_download_verify_delete(capsys, folder):
    status, out, _ = run(capsys, "--download", "one")
    assert status == 0 and out.splitlines() == [str(folder / "a.pt"), str(folder / "b.pt")]
    assert (folder / "a.pt").read_bytes() == CONTENT

    status, out, _ = run(capsys, "--verify", "one")
    assert status == 0 and f"a.pt: correct, sha256 {SHA256}" in out
    (folder / "a.pt").write_bytes(b"damaged")
    status, out, _ = run(capsys, "--verify", "one")
    assert status == 1 and "a.pt is not a.pt: its sha256 is" in out

    status, out, _ = run(capsys, "--delete", "one")
    assert status == 0 and out == "Deleted a.pt, b.pt.\n" and not (folder / "a.pt").exists()
    assert run(capsys, "--delete", "one")[1] == "No file of one can be deleted.\n"
    status, out, _ = run(capsys, "--verify", "one")
    assert status == 1 and "a.pt: is missing" in out


def test_failed_download_is_explained(capsys, server, folder):
    """The message has one line per file, says where to put them and what else to try; --details shows everything."""
    server.files.clear()
    status, _, err = run(capsys, "--download", "one")
    assert status == 1
    assert err.splitlines() == [
        "fiftyone-mobilesamv2: Files of one are missing and could not be downloaded:",
        f"- a.pt (1 MB) from {server.url}/a.pt: HTTP status 404 (Not Found)",
        f"- b.pt (1 MB) from {server.url}/elsewhere: HTTP status 404 (Not Found)",
        f"Put the missing files into {folder} (or set FIFTYONE_MOBILESAMV2_WEIGHTS_DIR to another folder).",
        "Or try the model that is included in the package, mobilesamv2-nano-torch.",
        "All sources, hashes and reasons: fiftyone-mobilesamv2 models --download one --details",
    ]
    _, _, err = run(capsys, "--download", "one", "--details")
    assert SHA256 in err and f"{server.url}/b.pt: HTTP status 404" in err


def test_trained_model(capsys, model_zoo, make_trained, tmp_path):
    folder = tmp_path / "training"
    make_trained(folder)
    assert run(capsys, "--add", str(folder))[:2] == (0, f"my-cells: {folder}\n")
    assert "trained on cells" in run(capsys)[1] and "my-cells/detector.safetensors" in run(capsys)[1]
    status, out, _ = run(capsys, "--verify", "my-cells")
    assert status == 0 and "detector.safetensors: correct, sha256 " in out
    assert run(capsys, "--remove", "my-cells")[:2] == (0, f"my-cells is no longer known; {folder} is kept.\n")
    assert run(capsys, "--verify", "my-cells")[0] == 1 and run(capsys, "--verify", str(folder))[0] == 0

    run(capsys, "--add", str(folder))
    assert f"Would delete my-cells with its folder, {folder}." in run(capsys, "--delete", "my-cells")[1]
    assert (folder / "config.json").exists()
    (folder / "notes.txt").touch()
    status, out, _ = run(capsys, "--delete", "my-cells", "--yes")
    assert status == 0 and out.endswith(f"{folder} stays, with files that are not the model's: notes.txt.\n")
    make_trained(folder)
    (folder / "notes.txt").unlink()
    assert run(capsys, "--delete", str(folder), "--yes")[1] == f"Deleted my-cells with its folder, {folder}.\n"
    assert not folder.exists()
    status, _, err = run(capsys, "--add", str(folder))
    assert status == 1 and "config.json does not exist" in err and err.count("\n") == 1


def test_file_that_a_trained_model_needs_stays(capsys, model_zoo, make_trained):
    one = MODELS["one"]
    files = {"encoder_checkpoint": one.encoder_weights, "decoder_checkpoint": one.decoder_weights}
    make_trained(trained_dir() / "my-cells", files=files)
    run(capsys, "--download", "one")
    assert run(capsys, "--delete", "one")[1] == "a.pt stays: my-cells needs it.\nDeleted b.pt.\n"


@pytest.mark.parametrize("action", ["--download", "--verify", "--delete"])
def test_unknown_model(capsys, action):
    status, _, err = run(capsys, action, "sam")
    assert status == 1 and err.startswith("fiftyone-mobilesamv2: Unknown model 'sam'; choose one of ")


def test_actions_are_mutually_exclusive():
    with pytest.raises(SystemExit):
        cli.main(["models", "--download", "one", "--delete", "one"])


def test_listing_does_not_import_torch():
    code = "import sys; from fiftyone_mobilesamv2 import cli; cli.main(['models']); print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == "False", ran.stderr
