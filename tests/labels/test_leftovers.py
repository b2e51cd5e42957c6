"""Mask files that killed runs left behind."""

import os
from pathlib import Path

import numpy as np
import pytest

from fiftyone_mobilesamv2.labels import leftovers
from fiftyone_mobilesamv2.labels.leftovers import settle
from fiftyone_mobilesamv2.labels.mask_files import MaskFiles

SAMPLES = ["a" * 24, "b" * 24, "c" * 24]
LONG = "图像分割结果字段名称很长的一个例子图像分割结果字段名"  # 26 characters, 234 bytes in a quoted file name


def left_behind(folder, sample_id, field="own"):
    files = MaskFiles(str(folder), sample_id, field)
    return Path(files.add(np.ones((2, 3), bool)))


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_files_that_cannot_be_deleted_do_not_keep_the_others(tmp_path, caplog, monkeypatch):
    """They may belong to another user. Root, which runs tests in containers, may delete them all the same."""
    masks = [left_behind(tmp_path, sample_id) for sample_id in SAMPLES]
    remove = leftovers.remove

    def refuse_the_second(folder, note):
        if folder == masks[1].parent:
            raise PermissionError(13, os.strerror(13), str(folder))
        remove(folder, note)

    monkeypatch.setattr(leftovers, "remove", refuse_the_second)
    assert settle(str(tmp_path), lambda *_: True, lambda *_: False) == 2
    assert [path.exists() for path in masks] == [False, True, False]
    assert f"can't be deleted: [Errno 13] Permission denied: '{masks[1].parent}'" in caplog.text
    monkeypatch.undo()
    assert settle(str(tmp_path), lambda *_: True, lambda *_: False) == 1 and files_in(tmp_path) == []


@pytest.mark.parametrize("field", ["own", "my masks", LONG, "a" * 200, "=x", "frames.x"])
def test_marker_files_have_valid_names_and_tell_their_field(tmp_path, field):
    left_behind(tmp_path, SAMPLES[0], field)
    told = []
    assert settle(str(tmp_path), lambda *note: told.append(note), lambda *_: False) == 0
    assert told == [(SAMPLES[0], field)]
    assert all(len(os.fsencode(path.name)) <= 255 - len(".gone") for path in files_in(tmp_path))
    assert settle(str(tmp_path), lambda *_: True, lambda *_: False) == 1 and files_in(tmp_path) == []
