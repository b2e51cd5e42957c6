"""Labels as the database holds them -> prompts: each becomes what it says, or is refused by name."""

import zlib

import numpy as np
import pytest
from bson import ObjectId

from fiftyone_mobilesamv2.labels.prompts import check_prompts, keypoint_prompt, prompts_of

ID = ObjectId()


def box(value, **changes):
    return {
        "_id": ID,
        "_cls": "Detection",
        "tags": [],
        "attributes": {},
        "label": "cat",
        "bounding_box": value,
    } | changes


def clicks(points, **changes):
    return {"_id": ID, "_cls": "Keypoint", "tags": [], "attributes": {}, "label": "cat", "points": points} | changes


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (box(["0.1", "0.1", "0.5", "0.5"]), "can't be read|unusable bounding box"),
        (box([True, False, True, True]), "can't be read|unusable bounding box"),
        (box([[0.1], 0.1, 0.5, 0.5]), "can't be read|unusable bounding box"),
        (box("0.10.10.50.5"), "can't be read|unusable bounding box"),
        (box([0.1, 0.1, 0.5, 0.5] * 1000), "can't be read|unusable bounding box"),
        (box([0.1, 0.1, 0.5, 0.5], tags=5), "tags=5: a list of texts was expected"),
        (box([0.1, 0.1, 0.5, 0.5], tags=["a", b""]), "tags=.*: a list of texts was expected"),
        (box([0.1, 0.1, 0.5, 0.5], label=["cat"]), "label=.*text was expected"),
        (box([0.1, 0.1, 0.5, 0.5], index=1e308), r"index=1e\+308: a whole number was expected"),
        (box([0.1, 0.1, 0.5, 0.5], label=b"junk"), "label=b'junk': text was expected"),
        (box([0.1, 0.1, 0.5, 0.5], confidence="two\nlines"), "can't be read: .*two lines"),
        (box([0.1, 0.1, 0.5, 0.5], _cls="Polyline"), "neither a detection nor a keypoint"),
        (box([0.1, 0.1, 0.5, 0.5], _cls=["Detection"]), "neither a detection nor a keypoint"),
        (clicks([["0.3", "0.4"]]), "pairs"),
        (clicks([["a", "b"]]), "pairs"),
        (clicks([[True, 0.4]]), "pairs"),
        (clicks([[0.3, 0.4, 0.5, 0.6]]), "pairs"),
        (clicks([0.3, 0.4, 0.5, 0.6]), "pairs|can't be read"),
        (clicks([[0.3, 0.4], [0.5]]), "pairs"),
        (clicks([None, [0.3, 0.4]]), "pairs"),
        (clicks("text"), "pairs|can't be read"),
        (clicks([[0.3, 0.4]], sam_labels="1"), "sam_labels='1'"),
        (clicks([[0.3, 0.4]], sam_labels=[2] * 9999), "sam_labels="),
    ],
)
def test_unusable_prompt_is_named(label, message):
    with pytest.raises(ValueError, match=message) as error:
        check_prompts(prompts_of([label]))
    assert str(ID) in str(error.value) and len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_prompts_of_different_types_are_refused():
    with pytest.raises(ValueError, match=f"Keypoint {ID} is not of the same type as Detection"):
        prompts_of([box([0.1, 0.1, 0.5, 0.5]), clicks([[0.3, 0.4]])])


def test_hidden_points_are_dropped():
    (keypoint,) = prompts_of([clicks([[0.25, 0.5], [None, None], [float("nan"), 0.5], [0.75, 1]])]).keypoints
    points, inside = keypoint_prompt(keypoint)
    np.testing.assert_array_equal(points, [[0.25, 0.5], [0.75, 1]])
    assert inside.tolist() == [1, 1]


def test_mask_of_a_prompt_is_not_read():
    """It might be of any size: FiftyOne would expand this one to 64 MB."""
    (detection,) = prompts_of([box([0.1, 0.1, 0.5, 0.5], mask=zlib.compress(bytes(2**26)), index=7)]).detections
    assert (detection.mask, detection.bounding_box, detection.index) == (None, [0.1, 0.1, 0.5, 0.5], 7)
    assert prompts_of([]) is None
