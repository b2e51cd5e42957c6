"""The files of models: which ones a model has, whether they are intact, and what deleting a model removes."""

import hashlib
import os

import pytest
from filelock import FileLock

from fiftyone_mobilesamv2.errors import CheckpointError
from fiftyone_mobilesamv2.modeling.checkpoints.catalog import MODELS, PretrainedModel, Weights
from fiftyone_mobilesamv2.modeling.checkpoints.files import (
    WEIGHTS_DIR_VARIABLE,
    deletable_files,
    delete_model,
    fetch_model,
    local_path,
    old_paths,
    verified_sha256,
    weights_sha256,
)
from fiftyone_mobilesamv2.modeling.checkpoints.lookup import model_files
from fiftyone_mobilesamv2.modeling.checkpoints.verification import verify

CONTENT = bytes(range(256)) * 100
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NOWHERE = ("http://127.0.0.1:9/",)
TINY, L0, DEMO = "mobilesamv2-tinyvit-torch", "mobilesamv2-efficientvit-l0-torch", "mobilesamv2-demo-torch"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(WEIGHTS_DIR_VARIABLE, str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


def put(*names):
    """Creates the files of these models."""
    for name in names:
        for weights in model_files(name):
            local_path(weights).write_bytes(CONTENT)


def names_of(files):
    return {weights.filename for weights in files}


def test_files_of_models():
    assert [weights.filename for weights in model_files(TINY)] == [
        "mobile_sam.pt",
        "Prompt_guided_Mask_Decoder.pt",
        "ObjectAwareModel.pt",
    ]
    assert names_of(model_files(DEMO)) == {"demo_sam.safetensors", "demo_detector.safetensors"}
    assert len(model_files(DEMO)) == 2  # its encoder and decoder share a file


# Verifying ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [{"sha256": SHA256}, {}], ids=str)
def test_every_byte_is_read_again(folder, known):
    """This holds even if size and modification time equal those of the verified file."""
    path, wanted = folder / "w.pt", Weights("w.pt", NOWHERE, megabytes=1, **known)
    path.write_bytes(CONTENT)
    assert verified_sha256(wanted) == SHA256
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=times)
    verify(path, wanted)  # loading trusts size and time
    with pytest.raises(CheckpointError, match="has changed since" if not known else r"is not w\.pt") as refusal:
        verified_sha256(wanted)
    assert hashlib.sha256(CONTENT[::-1]).hexdigest() in str(refusal.value)


def test_packaged_file_is_hashed_without_a_record():
    for weights in model_files(DEMO):
        assert verified_sha256(weights) == hashlib.sha256(local_path(weights).read_bytes()).hexdigest()
        assert not local_path(weights).with_name(f"{weights.filename}.verified.json").exists()


def test_missing_file_is_reported():
    with pytest.raises(CheckpointError, match="can't be read"):
        verified_sha256(Weights("w.pt", NOWHERE, megabytes=1))


# Old names ----------------------------------------------------------------------------------------------------------

RENAMED = Weights("new.pt", NOWHERE, megabytes=1, sha256=SHA256, old_names=("older.pt", "old.pt"))


def test_file_under_an_old_name_is_used(folder, monkeypatch):
    monkeypatch.setitem(MODELS, "test", PretrainedModel("tiny_vit", *[RENAMED] * 3, "a test", ""))
    (folder / "older.pt").write_bytes(b"something else")
    (folder / "old.pt").write_bytes(CONTENT)
    assert set(fetch_model("test").values()) == {folder / "old.pt"}
    assert set(weights_sha256("test", {}).values()) == {SHA256} == {verified_sha256(RENAMED)}
    assert delete_model("test") == [RENAMED] and not (folder / "old.pt").exists()
    assert (folder / "older.pt").read_bytes() == b"something else"  # an unknown file is left alone


def test_other_file_under_an_old_name_is_not_used(folder):
    (folder / "old.pt").write_bytes(CONTENT[::-1])
    assert local_path(RENAMED) == folder / "new.pt" and old_paths(RENAMED) == [folder / "old.pt"]


def test_old_name_without_a_published_hash_is_not_used(folder):
    (folder / "old.pt").write_bytes(CONTENT)
    assert local_path(Weights("new.pt", NOWHERE, megabytes=1, old_names=("old.pt",))) == folder / "new.pt"


@pytest.mark.parametrize("name", MODELS)
def test_old_names(name):
    """The hub's names until October 2024, those of the release's script, and Meta's."""
    old = {weights.filename: weights.old_names for weights in model_files(name)}
    expected = {
        "efficientvit_sam_l0.pt": "l0.pt",
        "efficientvit_sam_l1.pt": "l1.pt",
        "efficientvit_sam_l2.pt": "l2.pt",
        "sam_vit_h_4b8939.pth": "sam_vit_h.pt",
    }
    assert all(expected[filename] in names for filename, names in old.items() if filename in expected)


# Deleting -----------------------------------------------------------------------------------------------------------


def test_deleting_the_only_model_deletes_all_its_files(folder):
    put(TINY)
    (folder / "notes.txt").touch()
    assert names_of(delete_model(TINY)) == names_of(model_files(TINY))
    assert {path.name for path in folder.iterdir() if not path.name.endswith(".lock")} == {"notes.txt"}
    assert delete_model(TINY) == []


def test_shared_files_stay_while_another_model_needs_them(folder):
    put(TINY, L0)
    assert names_of(deletable_files(TINY)) == {"mobile_sam.pt"}
    assert names_of(delete_model(TINY)) == {"mobile_sam.pt"}
    assert all(local_path(weights).is_file() for weights in model_files(L0))
    # Now no other model needs the shared files.
    assert names_of(delete_model(L0)) == {
        "efficientvit_sam_l0.pt",
        "Prompt_guided_Mask_Decoder.pt",
        "ObjectAwareModel.pt",
    }


def test_incomplete_model_keeps_no_shared_files(folder):
    put(TINY, L0)
    (folder / "efficientvit_sam_l0.pt").unlink()
    assert names_of(delete_model(TINY)) == names_of(model_files(TINY))


def test_partial_download_is_deleted(folder):
    (folder / "mobile_sam.pt.partial").write_bytes(CONTENT)
    assert names_of(delete_model(TINY)) == {"mobile_sam.pt"}
    assert not (folder / "mobile_sam.pt.partial").exists()


def test_packaged_files_are_never_deleted():
    assert deletable_files(DEMO) == delete_model(DEMO) == []
    assert all(local_path(weights).is_file() for weights in model_files(DEMO))


def test_file_that_is_being_downloaded_is_not_deleted(folder):
    (folder / "mobile_sam.pt.partial").write_bytes(CONTENT)
    with FileLock(folder / "mobile_sam.pt.lock"):
        with pytest.raises(CheckpointError, match=r"mobile_sam\.pt is being downloaded"):
            delete_model(TINY)
    assert (folder / "mobile_sam.pt.partial").read_bytes() == CONTENT


def test_record_of_first_use_outlives_its_file(folder, monkeypatch):
    """Otherwise a file without a published hash could be replaced by another one unnoticed."""
    unpinned = Weights("encoder.pt", NOWHERE, megabytes=1)
    monkeypatch.setitem(MODELS, "test", PretrainedModel("tiny_vit", unpinned, unpinned, unpinned, "a test", ""))
    (folder / "encoder.pt").write_bytes(CONTENT)
    verified_sha256(unpinned)
    assert delete_model("test") == [unpinned]
    (folder / "encoder.pt").write_bytes(CONTENT[::-1])
    with pytest.raises(CheckpointError, match=r"has changed since encoder\.pt was first used"):
        verify(folder / "encoder.pt", unpinned)


def test_unknown_model():
    for function in (model_files, deletable_files, delete_model):
        with pytest.raises(ValueError, match="Unknown model 'sam'"):
            function("sam")
