"""Objects without labels and labels without objects: compared with full masks in numpy, and what is stored."""

import fiftyone as fo
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiftyone_mobilesamv2.curation import overlaps
from fiftyone_mobilesamv2.curation.unlabeled import DISMISSED, PROMOTED, find_unlabeled_objects, find_unsupported_labels
from fiftyone_mobilesamv2.errors import Cancelled
from fiftyone_mobilesamv2.evaluation.average_recall import areas_of
from fiftyone_mobilesamv2.labels.masks import masks_of


def found_names(result):
    return [patch[result.label_field].label for patch in result.patches]


def tagged_names(dataset, field, tag):
    return set(dataset.select_labels(tags=tag, fields=field).values(f"{field}.detections.label", unwind=True))


@pytest.fixture
def by_hand(dataset, add_image, detection, rectangle):
    """Two images; each proposal is named for how it relates to the labels."""

    def proposals(**drawn):
        return [detection(rectangle(*box), label=name, confidence=score) for name, (box, score) in drawn.items()]

    add_image(
        ground_truth=[
            detection(rectangle(0, 0, 40, 40), label="left"),
            detection(rectangle(40, 0, 40, 40), label="right"),
            detection(rectangle(100, 60, 50, 50), label="crowd", iscrowd=1),
        ],
        proposals=proposals(
            match=((0, 0, 40, 39), 0.9),
            part=((5, 5, 10, 10), 0.8),
            across=((30, 10, 20, 20), 0.8),  # half in each of two labels
            within_crowd=((110, 70, 20, 20), 0.9),
            mostly_inside=((0, 30, 20, 14), 0.7),  # 10 of its 14 rows lie in a label
            half_inside=((0, 35, 20, 10), 0.5),
            free=((0, 80, 20, 20), 0.6),
            faint=((40, 80, 20, 20), 0.1),
            small=((80, 80, 3, 3), 0.4),
        ),
    )
    add_image(ground_truth=[], proposals=proposals(lonely=((10, 10, 30, 30), 0.95)))
    return dataset


def test_by_hand(by_hand):
    result = find_unlabeled_objects(by_hand, "proposals", min_score=0.2, min_area=10, progress=False)
    assert found_names(result) == ["lonely", "free", "half_inside"]
    assert (len(result), result.num_samples, result.skipped) == (3, 2, [])
    assert tagged_names(by_hand, "proposals", "unlabeled") == {"lonely", "free", "half_inside"}


def test_each_threshold(by_hand):
    def found(**options):
        return set(found_names(find_unlabeled_objects(by_hand, "proposals", progress=False, **options)))

    default = {"lonely", "free", "half_inside", "faint", "small"}
    assert found() == default
    assert found(max_inside=0.75) == default | {"mostly_inside"}
    assert found(max_inside=0.5) == default - {"half_inside"}  # a share equal to the threshold counts as inside
    assert found(min_score=0.1, min_area=9) == default
    assert found(min_score=0.11, min_area=10) == default - {"faint", "small"}
    # `match` covers 39 of 40 rows and lies entirely inside.
    assert found(iou=1, max_inside=1) == default | {"mostly_inside"}
    # Boxes give the same result because all shapes are rectangles.
    assert found(use_masks=False) == default


def test_iou_equal_to_the_threshold_is_a_match(dataset, add_image, detection, rectangle):
    twice = detection(rectangle(10, 10, 20, 40), confidence=0.5)  # half of it is the label
    add_image(ground_truth=[detection(rectangle(10, 10, 20, 20))], proposals=[twice])
    assert find_unlabeled_objects(dataset, "proposals", iou=0.5, progress=False).ids == []
    assert find_unlabeled_objects(dataset, "proposals", iou=0.51, progress=False).ids == [twice.id]


@pytest.mark.parametrize("seed", range(3))
def test_result_equals_full_mask_computation(dataset, add_image, detection, seed):
    rng = np.random.default_rng(seed)

    def blob():
        y, x = np.ogrid[:120, :160]
        radii, centers = rng.uniform(3, 50, 2), rng.uniform((0, 0), (120, 160))
        return ((y - centers[0]) / radii[0]) ** 2 + ((x - centers[1]) / radii[1]) ** 2 <= 1.2

    expected, unsupported = {}, {}
    for _ in range(4):
        objects = [(blob(), bool(rng.random() < 0.2)) for _ in range(4)]
        shapes = [blob() for _ in range(30)] + [np.roll(mask, 3, 1) for mask, _ in objects]
        proposals = [detection(mask, confidence=float(rng.random())) for mask in shapes]
        ground_truth = [detection(mask, iscrowd=crowd) for mask, crowd in objects]
        add_image(ground_truth=ground_truth, proposals=proposals)
        union = np.any([mask for mask, _ in objects], 0)
        for mask, proposal in zip(shapes, proposals):
            overlaps = [(mask & other).sum() / (mask | other).sum() for other, crowd in objects if not crowd]
            if max(overlaps, default=0) < 0.5 and (mask & union).sum() / mask.sum() < 0.7:
                expected[proposal.id] = -proposal.confidence
        for (mask, crowd), label in zip(objects, ground_truth):
            best = max((mask & other).sum() / (mask | other).sum() for other in shapes)
            if not crowd and best < 0.8:
                unsupported[label.id] = best

    result = find_unlabeled_objects(dataset, "proposals", progress=False)
    assert 0 < len(expected) < 136
    assert result.ids == sorted(expected, key=expected.get)
    assert result.patches.values("id") == result.ids
    result = find_unsupported_labels(dataset, "proposals", iou=0.8, progress=False)
    assert 0 < len(unsupported) < 16
    assert result.ids == sorted(unsupported, key=unsupported.get)


@given(data=st.data())
def test_overlap_shares_equal_full_mask_computation(data):
    """This includes empty masks and empty lists."""
    size = 6, 7
    masks = st.lists(st.lists(st.booleans(), min_size=42, max_size=42), max_size=4)
    full = [[np.array(mask, bool).reshape(size) for mask in data.draw(masks)] for _ in range(2)]
    labels = [[fo.Detection(bounding_box=[0, 0, 1, 1], mask=mask).to_dict() for mask in drawn] for drawn in full]
    shapes, others = (masks_of(each, size) for each in labels)
    union = np.any([np.zeros(size, bool), *full[1]], 0)
    inside = overlaps.shares_inside(shapes, others)
    assert inside.shape == (len(shapes), len(others))
    for i, mask in enumerate(full[0]):
        area = max(mask.sum(), 1)
        assert areas_of(shapes)[i] == mask.sum()
        assert overlaps.shares_inside_any(shapes, others, size)[i] == pytest.approx((mask & union).sum() / area)
        for j, other in enumerate(full[1]):
            assert inside[i, j] == pytest.approx((mask & other).sum() / area)
            both = max((mask | other).sum(), 1)
            assert overlaps.ious(shapes, others)[i, j] == pytest.approx((mask & other).sum() / both)
    assert len(overlaps.shares_inside_any(shapes, others, size)) == len(shapes)


def test_decided_proposals_are_not_found_again(by_hand):
    first = find_unlabeled_objects(by_hand, "proposals", progress=False)
    by_hand.select_labels(ids=first.ids[0], fields="proposals").tag_labels(PROMOTED)
    by_hand.select_labels(ids=first.ids[1], fields="proposals").tag_labels(DISMISSED)
    by_hand.select_labels(ids=first.ids[2], fields="proposals").tag_labels("duplicate")
    # A decided proposal needs no score.
    by_hand.set_label_values("proposals.detections.confidence", {first.ids[0]: None})
    again = find_unlabeled_objects(by_hand, "proposals", progress=False)
    assert again.ids == first.ids[3:]
    assert by_hand.count_label_tags("proposals") == {"unlabeled": len(again), PROMOTED: 1, DISMISSED: 1, "duplicate": 1}


def test_second_run_writes_nothing(by_hand, stored):
    first = find_unlabeled_objects(by_hand, "proposals", progress=False)
    before = stored()
    assert find_unlabeled_objects(by_hand, "proposals", progress=False).ids == first.ids
    assert stored() == before


def test_tags_are_updated_with_each_run(by_hand, stored, detection, rectangle):
    by_hand.tag_labels("mine", "proposals")
    find_unlabeled_objects(by_hand, "proposals", progress=False)
    untouched = stored()[0]
    sample = by_hand.last()
    sample.ground_truth.detections.append(detection(rectangle(10, 10, 30, 30), label="new"))
    sample.save()
    result = find_unlabeled_objects(by_hand, "proposals", progress=False)
    assert "lonely" not in found_names(result)
    assert sample.proposals.detections[0].tags == ["mine"]  # samples in memory are updated, too
    assert stored()[0] == untouched
    assert by_hand.count_label_tags("proposals")["mine"] == 10


def test_only_the_view_is_searched(by_hand):
    find_unlabeled_objects(by_hand, "proposals", progress=False)
    view = by_hand[:1].filter_labels("proposals", fo.ViewField("label").is_in(["free", "faint"]))
    result = find_unlabeled_objects(view, "proposals", min_score=0.2, progress=False)
    assert found_names(result) == ["free"]
    # Hidden proposals and other samples keep their tags.
    assert tagged_names(by_hand, "proposals", "unlabeled") == {"free", "half_inside", "small", "lonely"}


def test_ranked_by_sams_mean(by_hand):
    values = {id: place / 10 for place, id in enumerate(by_hand.values("proposals.detections.id", unwind=True))}
    by_hand.set_label_values("proposals.detections.stability", values, dynamic=True)
    by_hand.set_label_values("proposals.detections.predicted_iou", dict.fromkeys(values, 0.5), dynamic=True)
    result = find_unlabeled_objects(by_hand, "proposals", rank_by="sam", progress=False)
    assert found_names(result) == ["lonely", "small", "faint", "free", "half_inside"]
    # (0.6 + 0.5) / 2 is the score of `free`.
    result = find_unlabeled_objects(by_hand, "proposals", rank_by="sam", min_score=0.55, progress=False)
    assert found_names(result) == ["lonely", "small", "faint", "free"]


def test_patches_exclude_untagged_proposals(by_hand):
    result = find_unlabeled_objects(by_hand, "proposals", progress=False)
    by_hand.select_labels(ids=result.ids[1], fields="proposals").untag_labels("unlabeled")
    assert result.patches.values("id") == [result.ids[0], *result.ids[2:]]


def test_null_tags_are_handled(by_hand):
    """FiftyOne's own `tag_labels` deletes the other labels of such a sample."""
    names = by_hand.values("proposals.detections.label")
    paths = {f"proposals.detections.{place}.tags": None for place in (0, 6)}  # `match` and `free`
    by_hand._sample_collection.update_one({"_id": by_hand.first()._id}, {"$set": paths})
    by_hand.reload()
    find_unlabeled_objects(by_hand, "proposals", min_score=0.2, min_area=10, progress=False)
    assert tagged_names(by_hand, "proposals", "unlabeled") == {"lonely", "free", "half_inside"}
    assert by_hand.values("proposals.detections.label") == names


def test_labels_of_other_tools(dataset, by_hand):
    """Nested fields and polylines."""
    by_hand.reload()
    for sample in by_hand:
        sample["model"] = fo.DynamicEmbeddedDocument(found=sample.proposals)
        boxes = [label.bounding_box for label in sample.ground_truth.detections]
        corners = [[(x, y), (x + w, y), (x + w, y + h), (x, y + h)] for x, y, w, h in boxes]
        sample["drawn"] = fo.Polylines(polylines=[fo.Polyline(points=[points], filled=True) for points in corners])
        sample.save()
    by_hand.add_dynamic_sample_fields()
    result = find_unlabeled_objects(by_hand, "model.found", "drawn", min_score=0.2, min_area=10, progress=False)
    labels = dict(zip(*(by_hand.values(f"model.found.detections.{name}", unwind=True) for name in ("id", "label"))))
    # As a polyline, the crowd region is an ordinary label, so proposals inside it are parts.
    assert [labels[id] for id in result.ids] == ["lonely", "free", "half_inside"]
    assert by_hand.count_label_tags("model.found") == {"unlabeled": 3}
    assert result.patches.values("id") == result.ids
    assert len(find_unsupported_labels(by_hand, "proposals", "drawn", progress=False)) == 2


# Labels without objects ---------------------------------------------------------------------------------------------


@pytest.fixture
def labels_by_hand(dataset, add_image, detection, rectangle):
    def labels(**boxes):
        return [detection(rectangle(*box), label=name) for name, box in boxes.items()]

    objects = labels(exact=(0, 0, 40, 40), half=(50, 0, 40, 40), less=(100, 0, 40, 40), none=(0, 60, 40, 40))
    crowd = detection(rectangle(60, 60, 50, 50), label="crowd", iscrowd=True)
    add_image(ground_truth=[*objects, crowd], proposals=labels(a=(0, 0, 40, 40), b=(50, 0, 40, 20), c=(100, 0, 40, 19)))
    add_image(ground_truth=labels(nothing_found=(0, 0, 10, 10)), proposals=[])
    add_image(ground_truth=labels(never_segmented=(0, 0, 10, 10)), proposals=None)
    add_image(ground_truth=None, proposals=labels(d=(0, 0, 10, 10)))
    return dataset


@pytest.mark.parametrize("use_masks", [True, False])
def test_unsupported_by_hand(labels_by_hand, use_masks):
    result = find_unsupported_labels(labels_by_hand, "proposals", use_masks=use_masks, progress=False)
    assert found_names(result) == ["none", "nothing_found", "less"]
    assert (result.num_samples, result.left_out, result.tag) == (2, 1, "unsupported")
    # A label whose IoU equals the threshold is supported: `half` has 0.5.
    result = find_unsupported_labels(labels_by_hand, "proposals", iou=0.51, use_masks=use_masks, progress=False)
    assert found_names(result) == ["none", "nothing_found", "less", "half"]
    assert tagged_names(labels_by_hand, "ground_truth", "unsupported") == {"none", "nothing_found", "less", "half"}


def test_unsupported_labels_are_retagged_by_each_run(labels_by_hand, stored):
    labels_by_hand.tag_labels("unsupported", "ground_truth")  # including crowds and labels that the run leaves out
    first = find_unsupported_labels(labels_by_hand, "proposals", progress=False)
    assert labels_by_hand.count_label_tags("ground_truth") == {"unsupported": 3}
    before = stored()
    assert find_unsupported_labels(labels_by_hand, "proposals", progress=False).ids == first.ids
    assert stored() == before


# Errors -------------------------------------------------------------------------------------------------------------


def test_bad_label_skips_only_its_image(by_hand, caplog):
    find_unlabeled_objects(by_hand, "proposals", progress=False)
    sample = by_hand.first()
    sample.ground_truth.detections[1].bounding_box = [0.2, 0.2, 0, 0]
    sample.save()
    result = find_unlabeled_objects(by_hand, "proposals", progress=False)
    assert found_names(result) == ["lonely"]
    assert [each["id"] for each in result.skipped] == [sample.id]
    assert sample.ground_truth.detections[1].id in result.skipped[0]["cause"]
    assert "images skipped: 1" in caplog.text and sample.filepath in caplog.text
    # Results of the earlier run in the skipped image are removed.
    assert by_hand.count_label_tags("proposals") == {"unlabeled": 1}


def test_nothing_is_stored_when_all_images_are_skipped(by_hand, stored):
    find_unlabeled_objects(by_hand, "proposals", progress=False)
    sample = by_hand.first()
    sample.proposals.detections[1].confidence = float("nan")
    sample.save()
    before = stored()
    with pytest.raises(ValueError, match=r"No image could be used.*0\.png.*confidence=nan"):
        find_unlabeled_objects(by_hand[:1], "proposals", progress=False)
    assert stored() == before


def test_cancelling_stores_nothing(by_hand, stored):
    def cancel(bar):
        if bar.iteration == 1:
            raise Cancelled

    before = stored()
    with pytest.raises(Cancelled):
        find_unlabeled_objects(by_hand, "proposals", progress=cancel)
    assert stored() == before


@pytest.mark.parametrize(
    ("attribute", "options", "message"),
    [("confidence", {}, "has no confidence"), ("mask", {}, "has no mask"), (None, {"rank_by": "sam"}, "predicted_iou")],
)
def test_missing_attributes_are_reported(by_hand, stored, attribute, options, message):
    if attribute:
        by_hand.set_values(f"proposals.detections.{attribute}", [[None] * 9, [None]])
    before = stored()
    with pytest.raises(ValueError, match=message):
        find_unlabeled_objects(by_hand, "proposals", progress=False, **options)
    assert stored() == before
    if attribute == "mask":
        assert len(find_unlabeled_objects(by_hand, "proposals", use_masks=False, progress=False)) == 5


@pytest.mark.parametrize("find", [find_unlabeled_objects, find_unsupported_labels])
def test_invalid_fields_and_options_are_refused(by_hand, find):
    by_hand.add_sample_field("single", fo.EmbeddedDocumentField, embedded_doc_type=fo.Detection)
    by_hand.add_sample_field("score", fo.FloatField)
    searched = "pred" if find is find_unlabeled_objects else "gt"
    fields = {"pred": "proposals", "gt": "ground_truth"}
    for changed, message in [
        ({"pred": "gone"}, "no field 'gone' for the proposals.*proposals"),
        ({"gt": "gone"}, "no field 'gone' for the ground truth"),
        ({"pred": "score"}, "'score' contains.*Float"),
        ({"gt": "proposals"}, "the same field, 'proposals'"),
        ({searched: "single"}, "'single' contains single labels"),
    ]:
        names = fields | changed
        with pytest.raises(ValueError, match=message):
            find(by_hand, names["pred"], names["gt"], progress=False)
    for options, message in [({"iou": 0}, "iou=0"), ({"iou": 1.5}, "iou=1.5"), ({"iou": float("nan")}, "iou=nan")]:
        with pytest.raises(ValueError, match=message):
            find(by_hand, "proposals", progress=False, **options)
    with pytest.raises(ValueError, match="rank_by='size': one of 'confidence'"):
        find_unlabeled_objects(by_hand, "proposals", rank_by="size")
    with pytest.raises(ValueError, match="max_inside=70"):
        find_unlabeled_objects(by_hand, "proposals", max_inside=70)

    name = fields[searched] if searched == "pred" else fields["gt"]
    field = by_hand.get_field(name)
    field.read_only = True
    field.save()
    with pytest.raises(ValueError, match=f"'{name}' is read-only"):
        find(by_hand, "proposals", progress=False)


def test_patches_and_videos_are_refused(by_hand, dataset):
    with pytest.raises(ValueError, match="patches or frames"):
        find_unlabeled_objects(by_hand.to_patches("proposals", other_fields=True), "proposals")
    videos = fo.Dataset()
    videos.add_sample(fo.Sample("/nowhere/0.mp4"))
    with pytest.raises(ValueError, match="'video', not images"):
        find_unsupported_labels(videos, "frames.proposals")
    videos.delete()


def test_empty_view(by_hand, dataset):
    nothing = by_hand.limit(1).skip(1)
    for find in (find_unlabeled_objects, find_unsupported_labels):
        result = find(nothing, "proposals", progress=False)
        assert (result.ids, result.num_samples, len(result.patches)) == ([], 0, 0)
    by_hand.delete_samples(by_hand.values("id"))
    assert len(find_unlabeled_objects(dataset, "proposals", progress=False).patches) == 0
