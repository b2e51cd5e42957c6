"""Duplicates, parts and wholes: hand-drawn cases, a comparison with full masks in numpy, and what is stored."""

import re

import fiftyone as fo
import numpy as np
import pytest

from fiftyone_mobilesamv2.curation.duplicates import find_duplicates


def notes(dataset, field="proposals"):
    """{name of a label: (its tags, the name of the label it duplicates, the name of the label it is part of)}"""
    lists = [sample[field] for sample in dataset.exists(field)]
    labels = [label for each in lists for label in each[each._LABEL_LIST_FIELD]]
    names = {label.id: label.label for label in labels}
    return {
        label.label: (
            set(label.tags),
            names.get(label.get_attribute_value("duplicate_of", None)),
            names.get(label.get_attribute_value("part_of", None)),
        )
        for label in labels
    }


@pytest.fixture
def by_hand(dataset, add_image, detection, rectangle):
    def labels(**drawn):
        return [detection(rectangle(*box), label=name, confidence=score) for name, (box, score) in drawn.items()]

    add_image(
        proposals=labels(
            twin=((0, 0, 40, 36), 0.8),  # IoU 0.9 with car
            car=((0, 0, 40, 40), 0.9),
            chained=((0, 0, 40, 32), 0.7),  # IoU 0.8 with car
            cousin=((0, 0, 40, 30), 0.6),  # IoU 0.75 with car, more with the two duplicates
            wheel=((0, 0, 12, 10), 0.5),
            hub=((4, 4, 4, 4), 0.4),
            across=((36, 20, 20, 8), 0.3),  # a fifth of it lies in car
            mostly=((20, 33, 10, 10), 0.2),  # 7 of its 10 rows lie in car
            alone=((100, 80, 30, 30), 0.1),
        )
    )
    add_image(proposals=None)
    add_image(proposals=[])
    return dataset


EXPECTED = {
    "twin": ({"duplicate"}, "car", None),
    "car": ({"whole"}, None, None),
    "chained": ({"duplicate"}, "car", None),
    "cousin": ({"part", "whole"}, None, "car"),
    "wheel": ({"part", "whole"}, None, "cousin"),
    "hub": ({"part"}, None, "wheel"),
    "across": (set(), None, None),
    "mostly": (set(), None, None),
    "alone": (set(), None, None),
}


@pytest.mark.parametrize("use_masks", [True, False])
def test_by_hand(by_hand, use_masks):
    result = find_duplicates(by_hand, "proposals", use_masks=use_masks, progress=False)
    assert notes(by_hand) == EXPECTED
    assert result.counts == {"duplicate": 2, "part": 3, "whole": 3}
    names = {tag: [patch.proposals.label for patch in result.patches(tag)] for tag in ("duplicate", "part", "whole")}
    assert names["duplicate"] == ["twin", "chained"]
    assert set(names["part"]) == {"cousin", "wheel", "hub"}
    assert names["whole"] == ["car", "cousin", "wheel"]  # have 3, 2 and 1 parts
    assert result.patches("part").values("id") == result.ids["part"]


def test_thresholds(by_hand):
    find_duplicates(by_hand, "proposals", iou=0.85, containment=0.7, progress=False)
    found = notes(by_hand)
    assert found["chained"] == ({"part", "whole"}, None, "car")
    assert found["cousin"] == ({"duplicate"}, "chained", None)
    assert found["mostly"] == ({"part"}, None, "car")
    find_duplicates(by_hand, "proposals", iou=0.75, progress=False)
    assert notes(by_hand)["cousin"] == ({"duplicate"}, "car", None)


@pytest.mark.parametrize("seed", range(3))
def test_result_equals_full_mask_computation(dataset, add_image, detection, seed):
    rng = np.random.default_rng(seed)
    expected = {}
    for _ in range(3):
        masks = []
        for _ in range(25):
            y, x = np.ogrid[:120, :160]
            radii, centers = rng.uniform(4, 45, 2), rng.uniform((0, 0), (120, 160))
            masks.append(((y - centers[0]) / radii[0]) ** 2 + ((x - centers[1]) / radii[1]) ** 2 <= 1.2)
        masks += [np.roll(mask, int(rng.integers(1, 4)), 1) for mask in masks[:8]]
        scores = rng.permutation(len(masks)) / 100
        labels = [detection(mask, confidence=float(score)) for mask, score in zip(masks, scores)]
        add_image(proposals=labels)

        # The definitions, applied literally to one label after another.
        kept = []
        for i in np.argsort(-scores):
            first = [k for k in kept if (masks[i] & masks[k]).sum() / (masks[i] | masks[k]).sum() >= 0.8]
            expected[labels[i].id] = {"duplicate": labels[first[0]].id} if first else {}
            if not first:
                kept.append(i)
        for i in kept:
            wholes = [
                k
                for k in kept
                if masks[k].sum() > masks[i].sum() and (masks[i] & masks[k]).sum() / masks[i].sum() >= 0.9
            ]
            if wholes:
                expected[labels[i].id]["part"] = labels[min(wholes, key=lambda k: masks[k].sum())].id
            for k in wholes:
                expected[labels[k].id]["whole"] = None

    find_duplicates(dataset, "proposals", progress=False)
    assert {tag for relations in expected.values() for tag in relations} == {"duplicate", "part", "whole"}
    for sample in dataset:
        for label in sample.proposals.detections:
            assert set(label.tags) == set(expected[label.id])
            assert label.get_attribute_value("duplicate_of", None) == expected[label.id].get("duplicate")
            assert label.get_attribute_value("part_of", None) == expected[label.id].get("part")


def test_ground_truth_is_ranked_by_area(by_hand, dataset):
    dataset.set_values("proposals.detections.confidence", [[None] * 9, None, []])
    find_duplicates(dataset, "proposals", progress=False)
    assert notes(dataset) == EXPECTED  # the car is the largest
    dataset.set_label_values("proposals.detections.confidence", {dataset.first().proposals.detections[0].id: 0.5})
    with pytest.raises(ValueError, match="has no confidence"):
        find_duplicates(dataset, "proposals", progress=False)


def test_ranking_decides_which_duplicate_is_kept(by_hand):
    label_ids = by_hand.first().proposals.detections
    values = {label.id: float(label.label == "chained") for label in label_ids}
    by_hand.set_label_values("proposals.detections.stability", values, dynamic=True)
    find_duplicates(by_hand, "proposals", rank_by="stability", progress=False)
    found = notes(by_hand)
    # All others tie, so their order decides.
    assert found["chained"][1] is None and found["twin"][1] == found["car"][1] == found["cousin"][1] == "chained"


def test_crowd_regions_are_ignored(by_hand):
    sample = by_hand.first()
    sample.proposals.detections[1]["iscrowd"] = 1  # the car
    sample.save()
    find_duplicates(by_hand, "proposals", progress=False)
    found = notes(by_hand)
    assert found["car"] == (set(), None, None)
    assert found["chained"] == ({"duplicate"}, "twin", None)
    assert found["cousin"][1] == "twin"
    assert found["wheel"] == ({"part", "whole"}, None, "twin")


def test_second_run_writes_nothing(by_hand, stored):
    first = find_duplicates(by_hand, "proposals", progress=False)
    before = stored()
    assert find_duplicates(by_hand, "proposals", progress=False).ids == first.ids
    assert stored() == before


def test_run_replaces_results_of_the_previous_one(by_hand, detection, rectangle):
    by_hand.tag_labels("mine", "proposals")
    find_duplicates(by_hand, "proposals", progress=False)
    held = by_hand.first()
    find_duplicates(by_hand, "proposals", iou=0.95, containment=1, progress=False)
    assert notes(by_hand) == {
        "twin": ({"mine", "part", "whole"}, None, "car"),
        "car": ({"mine", "whole"}, None, None),
        "chained": ({"mine", "part", "whole"}, None, "twin"),
        "cousin": ({"mine", "part", "whole"}, None, "chained"),
        "wheel": ({"mine", "part", "whole"}, None, "cousin"),
        "hub": ({"mine", "part"}, None, "wheel"),
        "across": ({"mine"}, None, None),
        "mostly": ({"mine"}, None, None),
        "alone": ({"mine"}, None, None),
    }
    assert held.proposals.detections[0].duplicate_of is None  # samples in memory are updated, too
    sample = by_hand.first()
    sample.proposals.detections = sample.proposals.detections[-1:]
    sample.save()
    find_duplicates(by_hand, "proposals", progress=False)
    assert notes(by_hand) == {"alone": ({"mine"}, None, None)}


def test_only_the_view_is_compared(by_hand, add_image, detection, rectangle):
    find_duplicates(by_hand, "proposals", progress=False)
    view = by_hand.filter_labels("proposals", fo.ViewField("label").is_in(["twin", "chained"]))
    find_duplicates(view, "proposals", progress=False)
    found = notes(by_hand)
    assert found["chained"] == ({"duplicate"}, "twin", None)
    assert found["twin"] == (set(), None, None)
    # Labels hidden by the view keep their results.
    assert {name: found[name] for name in ("car", "hub")} == {name: EXPECTED[name] for name in ("car", "hub")}


def test_polylines(by_hand):
    for sample in by_hand.exists("proposals"):
        drawn = []
        for label in sample.proposals.detections:
            x, y, w, h = label.bounding_box
            points = [[(x, y), (x + w, y), (x + w, y + h), (x, y + h)]]
            drawn.append(fo.Polyline(label=label.label, points=points, closed=True, filled=True))
        sample["drawn"] = fo.Polylines(polylines=drawn)
        sample.save()
    result = find_duplicates(by_hand, "drawn", progress=False)
    assert result.counts == {"duplicate": 2, "part": 3, "whole": 3}
    assert notes(by_hand, "drawn") == EXPECTED
    assert result.patches("duplicate").values("drawn.label") == ["twin", "chained"]


def test_bad_label_skips_only_its_image(by_hand, add_image, detection, rectangle, stored):
    add_image(proposals=[detection(rectangle(0, 0, 9, 9), label=str(i), confidence=i / 2) for i in range(2)])
    find_duplicates(by_hand, "proposals", progress=False)
    sample = by_hand.first()
    sample.proposals.detections[0].confidence = float("nan")
    sample.save()
    result = find_duplicates(by_hand, "proposals", progress=False)
    assert result.counts == {"duplicate": 1, "part": 0, "whole": 0}
    assert [each["id"] for each in result.skipped] == [sample.id] and "confidence=nan" in result.skipped[0]["cause"]
    assert notes(by_hand[:1]) == dict.fromkeys(EXPECTED, (set(), None, None))
    before = stored()
    with pytest.raises(ValueError, match="No image could be used"):
        find_duplicates(by_hand[:1], "proposals", progress=False)
    assert stored() == before


@pytest.mark.parametrize(
    ("path", "value", "cause"),
    [
        ("proposals.detections", "text", "something else than labels"),
        ("proposals.detections.0.tags", "duplicate", "tags='duplicate'"),
        ("proposals.detections.0.tags", [5], r"tags=\[5\]"),
        ("proposals.detections.0.iscrowd", "false", "iscrowd='false'"),
        ("proposals.detections.0.confidence", True, "confidence=True"),
    ],
)
def test_value_of_another_type_costs_its_image(by_hand, add_image, detection, rectangle, path, value, cause):
    odd = add_image(proposals=[detection(rectangle(0, 0, 9, 9), confidence=0.5, tags=["duplicate"])])
    before = find_duplicates(by_hand, "proposals", progress=False)
    by_hand._sample_collection.update_one({"_id": odd._id}, {"$set": {path: value}})
    result = find_duplicates(by_hand, "proposals", progress=False)
    (skipped,) = result.skipped
    assert skipped["id"] == odd.id and re.search(cause, skipped["cause"])
    assert result.ids == before.ids and notes(by_hand.limit(1)) == EXPECTED
    assert result.patches("duplicate").values("proposals.label") == ["twin", "chained"]


def test_invalid_input_is_refused(by_hand, stored):
    by_hand.add_sample_field("single", fo.EmbeddedDocumentField, embedded_doc_type=fo.Polyline)
    for options, message in [
        ({"field": "gone"}, "no field 'gone' for the labels to compare. Possible fields: proposals"),
        ({"field": "single"}, "single labels"),
        ({"rank_by": "area"}, "rank_by='area'"),
        ({"iou": 0}, "iou=0"),
        ({"containment": 1.1}, r"containment=1\.1"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_duplicates(by_hand, **({"field": "proposals", "progress": False} | options))
    with pytest.raises(ValueError, match="patches or frames"):
        find_duplicates(by_hand.to_patches("proposals"), "proposals")

    # An attribute of the same name but another type belongs to the user, so nothing is stored.
    by_hand.add_sample_field("proposals.detections.part_of", fo.IntField)
    before = stored()
    with pytest.raises(ValueError, match="part_of"):
        find_duplicates(by_hand, "proposals", progress=False)
    assert stored() == before
    by_hand.delete_sample_field("proposals.detections.part_of")
    find_duplicates(by_hand, "proposals", progress=False)
    field = by_hand.get_field("proposals.detections.part_of")
    field.read_only = True
    field.save()
    with pytest.raises(ValueError, match=r"'proposals.detections.part_of' is read-only"):
        find_duplicates(by_hand, "proposals", progress=False)


def test_empty_view(by_hand):
    result = find_duplicates(by_hand.limit(1).skip(1), "proposals", progress=False)
    assert result.counts == {"duplicate": 0, "part": 0, "whole": 0}
    assert len(result.patches("part")) == 0
