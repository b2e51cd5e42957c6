"""What reads labels: each consumer's calls on a dataset of mutated labels beside good ones, and what it may change."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bson
from bson import ObjectId
from labels import (
    FOLDER,
    GROUND_TRUTH,
    HEIGHT,
    PREDICTIONS,
    SCORES,
    WIDTH,
    Case,
    Document,
    covered,
    defects,
    labels_in,
    lacks_something,
    stored,
)

NEIGHBOURS = 4  # good images beside a batch's cases
MAX_LENGTH = 500  # of a cause, without paths in it
_SHAPE = {"_id", "bounding_box", "points", "mask", "mask_path", "closed", "filled", "_cls"}
_FLAGS = frozenset({"closed", "filled"})  # of a polyline
_FINDINGS = {"duplicate_of", "part_of"}

Skipped = Mapping[str, str]  # id of a sample -> cause
Call = Callable[[Any, Path], tuple[Skipped, Mapping[str, object]]]


@dataclass(frozen=True)
class Consumer:
    """Something that reads labels.

    Attributes:
        call: (dataset, folder for files) -> skipped samples, and what was computed for samples with file names or ids.
        reads: field -> the attributes that are read.
        kinds: the kinds of labels that it accepts.
        changes: attributes of labels that it may change.
        validated: further attributes of labels that must be of FiftyOne's types.
        by_id: whether it reads only the labels whose ids are given.
        optional: attributes that labels need not have.
        of_detections: fields that contain detections, whatever kind of labels the others contain.
    """

    call: Call
    reads: Mapping[str, set[str]]
    kinds: tuple[str, ...] = ("Detections", "Polylines")
    changes: frozenset[str] = frozenset()
    validated: frozenset[str] = frozenset()
    by_id: bool = False
    optional: frozenset[str] = frozenset()
    of_detections: frozenset[str] = frozenset()

    def kind_in(self, field: str, kind: str) -> str:
        """The kind of labels of a field in a dataset of labels of this kind."""
        return "Detections" if field in self.of_detections else kind


# Calls ---------------------------------------------------------------------------------------------------------------


def _evaluate(dataset: Any, folder: Path) -> tuple[Skipped, Mapping[str, object]]:
    from fiftyone_mobilesamv2 import evaluate_proposals

    for _ in range(2):  # the second replaces the first
        results = evaluate_proposals(dataset, PREDICTIONS, GROUND_TRUTH, "eval", ks=(1, 10), progress=False)
    numbers = {
        str(document["_id"]): [document.get(f"eval{end}") for end in ("_tp", "_fp", "_fn", "_recall_at_1")]
        + [(each.get("eval"), each.get("eval_iou")) for each in labels_in(document[GROUND_TRUTH])]
        for document in documents(dataset)
    }
    dataset.load_evaluation_results("eval", cache=False)
    dataset.delete_evaluation("eval")
    return _causes(results.skipped), numbers


def _coverage(dataset: Any, folder: Path) -> tuple[Skipped, Mapping[str, object]]:
    from fiftyone_mobilesamv2.curation.coverage import NUMBERS, image_coverage

    result = image_coverage(dataset, PREDICTIONS, progress=False)
    names = [f"{PREDICTIONS}_{name}" for name in NUMBERS]
    numbers = {str(document["_id"]): [document.get(name) for name in names] for document in documents(dataset)}
    return _causes(result.skipped), numbers


def _unlabeled(dataset: Any, folder: Path) -> tuple[Skipped, Mapping[str, object]]:
    from fiftyone_mobilesamv2.curation.unlabeled import find_unlabeled_objects

    result = find_unlabeled_objects(dataset, PREDICTIONS, GROUND_TRUTH, progress=False)
    len(result.patches)
    return _causes(result.skipped), _values(dataset, PREDICTIONS, "tags")


def _unsupported(dataset: Any, folder: Path) -> tuple[Skipped, Mapping[str, object]]:
    from fiftyone_mobilesamv2.curation.unlabeled import find_unsupported_labels

    result = find_unsupported_labels(dataset, PREDICTIONS, GROUND_TRUTH, progress=False)
    len(result.patches)
    return _causes(result.skipped), _values(dataset, GROUND_TRUTH, "tags")


def _duplicates(dataset: Any, folder: Path) -> tuple[Skipped, Mapping[str, object]]:
    from fiftyone_mobilesamv2.curation.duplicates import find_duplicates

    result = find_duplicates(dataset, PREDICTIONS, progress=False)
    len(result.patches())
    return _causes(result.skipped), _values(dataset, PREDICTIONS, "tags")


def _promote(dataset: Any, folder: Path) -> tuple[Skipped, Mapping[str, object]]:
    from fiftyone_mobilesamv2.curation.promote import promote_to_labels

    ids = _label_ids(dataset)
    first = promote_to_labels(dataset, ids, PREDICTIONS, GROUND_TRUTH, label="new", progress=False)
    again = promote_to_labels(dataset, ids, PREDICTIONS, GROUND_TRUTH, label="other", progress=False)
    if again.promoted or again.already != first.promoted:
        raise AssertionError(f"{again} promoted again what {first} had promoted")
    tags = _values(dataset, PREDICTIONS, "tags")
    names = _values(dataset, GROUND_TRUTH, "label")
    return _causes(first.skipped), {id: (tags[id], names[id].count("new")) for id in tags}


def _dismiss(dataset: Any, folder: Path) -> tuple[Skipped, Mapping[str, object]]:
    from fiftyone_mobilesamv2.curation.promote import dismiss

    dismiss(dataset, _label_ids(dataset), PREDICTIONS)
    tags = _values(dataset, PREDICTIONS, "tags")
    return {id: "" for id, values in tags.items() if "dismissed" not in str(values)}, tags


def _export(dataset: Any, folder: Path) -> tuple[Skipped, Mapping[str, object]]:
    from fiftyone_mobilesamv2.curation.export import export_masks

    export = export_masks(dataset, PREDICTIONS, folder / "export.json", overwrite=True, progress=False)
    content = json.loads(export.path.read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    if not all(isinstance(name, str) for name in names.values()):
        raise AssertionError(f"names of categories: {names}")
    ids = {Path(path).name: id for path, id in zip(*dataset.values(["filepath", "id"]))}
    numbers: dict[str, list[object]] = {ids[image["file_name"]]: [] for image in content["images"]}
    images = {image["id"]: ids[image["file_name"]] for image in content["images"]}
    for annotation in content["annotations"]:
        own = {key: value for key, value in annotation.items() if key not in ("id", "image_id", "category_id")}
        numbers[images[annotation["image_id"]]].append((names[annotation["category_id"]], own))
    return _causes(export.skipped), numbers


class _Prompts:
    """Turns labels into masks, in another field or in place."""

    def __init__(self, in_place: bool) -> None:
        self.in_place = in_place

    def __call__(self, dataset: Any, folder: Path) -> tuple[Skipped, Mapping[str, object]]:
        from fiftyone_mobilesamv2.runs.segment import segment_anything

        field = PREDICTIONS if self.in_place else "masks"
        to = None if self.in_place else field
        run = segment_anything(dataset, _model(), PREDICTIONS, to, replace=True, batch_size=16, progress=False)
        return {str(each.sample_id): each.error for each in run.failures}, _values(dataset, field, "mask")


def _model() -> Any:
    global _loaded
    if _loaded is None:
        from fiftyone_mobilesamv2 import zoo

        _loaded = zoo.load_model("mobilesamv2-demo-torch", device="cpu")
    return _loaded


_loaded: Any = None
_MASK = frozenset({"mask", "mask_path", "predicted_iou", "stability", "area_px", "confidence"})
_TAGS = frozenset({"tags"})
_PROMPT = {"_id", "_cls", "bounding_box", "points", "sam_labels", "tags", "label"}
_VALIDATED = frozenset({"confidence", "index", "attributes", "mask_path", "iscrowd", "predicted_iou", "stability"})
CONSUMERS = {
    "evaluate_proposals": Consumer(
        _evaluate,
        # Proposals whose boxes overlap no object are not drawn.
        {
            PREDICTIONS: (_SHAPE | {"confidence"}) - _FLAGS,
            GROUND_TRUTH: _SHAPE | {"iscrowd", "label", "frequency"},
        },
        validated=_FLAGS,
    ),
    "image_coverage": Consumer(_coverage, {PREDICTIONS: _SHAPE}),
    "find_unlabeled_objects": Consumer(
        _unlabeled,
        {PREDICTIONS: _SHAPE | {"confidence", "tags"}, GROUND_TRUTH: _SHAPE | {"iscrowd"}},
        changes=_TAGS,
    ),
    "find_unsupported_labels": Consumer(
        _unsupported, {PREDICTIONS: _SHAPE, GROUND_TRUTH: _SHAPE | {"iscrowd", "tags"}}, changes=_TAGS
    ),
    "find_duplicates": Consumer(
        _duplicates,
        {PREDICTIONS: _SHAPE | {"confidence", "tags", "iscrowd"} | _FINDINGS},
        changes=_TAGS | _FINDINGS,
    ),
    "promote_to_labels": Consumer(
        _promote,
        {PREDICTIONS: _SHAPE | {"tags"}, GROUND_TRUTH: {"promoted_from"}},
        changes=_TAGS,
        by_id=True,
        of_detections=frozenset({PREDICTIONS}),  # proposals of which some are promoted; objects may be polylines
    ),
    "dismiss": Consumer(_dismiss, {PREDICTIONS: {"_id", "tags"}}, changes=_TAGS, by_id=True),
    "export_masks": Consumer(
        _export, {PREDICTIONS: _SHAPE | SCORES | {"label", "iscrowd"}}, optional=frozenset(SCORES)
    ),
    "segment_anything": Consumer(
        _Prompts(False), {PREDICTIONS: _PROMPT}, ("Detections", "Keypoints"), validated=_VALIDATED
    ),
    "segment_anything in place": Consumer(_Prompts(True), {PREDICTIONS: _PROMPT}, ("Detections",), _MASK, _VALIDATED),
}


# A batch of cases -----------------------------------------------------------------------------------------------------


class Consuming:
    """Calls a consumer on batches of cases of one kind, and looks for what should not have happened."""

    def __init__(self, name: str, folder: Path) -> None:
        import fiftyone as fo
        from PIL import Image

        fo.config.show_progress_bars = False
        self.fo, self.name, self.consumer = fo, name, CONSUMERS[name]
        self.folder = folder / name.replace(" ", "-")
        self.folder.mkdir()
        os.mkfifo(self.folder / "pipe")
        Image.new("RGB", (WIDTH, HEIGHT), "white").save(self.folder / "0.png")
        for field in (PREDICTIONS, GROUND_TRUTH):
            for label in stored("Detections", field)["detections"]:
                _, _, w, h = label["bounding_box"]
                size = round(w * WIDTH), round(h * HEIGHT)
                Image.new("L", size, 255).save(self.folder / f"mask-{label['_id']}.png")
        # What good images get; and this imports everything, before memory is limited.
        self.reference = {kind: self._numbers(kind) for kind in self.consumer.kinds}

    def __call__(self, cases: Sequence[Case]) -> list[str]:
        """For each case: "used", "skipped: ...", "refused: ..." or "violation: ...".

        Raises:
            AssertionError: good images did not get what they get without the cases.
        """
        (kind,) = {case.kind for case in cases}
        refused: dict[int, str] = {}
        while True:
            left = {number: case for number, case in enumerate(cases) if number not in refused}
            outcome = self._outcome(kind, left)
            if isinstance(outcome, tuple):  # a case for which the whole call is refused
                number, message = outcome
                refused[number] = f"refused: {message}"
            else:
                return [(refused | outcome)[number] for number in range(len(cases))]

    def _numbers(self, kind: str) -> object:
        dataset, ids = self._dataset(kind, {})
        try:
            _, numbers = self.consumer.call(dataset, self.folder)
            return numbers[str(ids[-1])]
        finally:
            dataset.delete()

    def _outcome(self, kind: str, cases: Mapping[int, Case]) -> dict[int, str] | tuple[int, str]:
        from fiftyone_mobilesamv2.errors import ArgumentError

        dataset, ids = self._dataset(kind, cases)
        try:
            before = {document["_id"]: document for document in documents(dataset)}
            try:
                skipped, numbers = self.consumer.call(dataset, self.folder)
            except ArgumentError as error:
                for number, case in cases.items():
                    if before[ids[number]]["filepath"] in str(error) and lacks_something(case.value):
                        _check_message(str(error), str(self.folder), before[ids[number]])
                        return number, str(error)
                raise
            after = {document["_id"]: document for document in documents(dataset)}
            for number, id in ids.items():
                if number < 0:
                    _expect(str(id) not in skipped, f"a good image was skipped: {skipped.get(str(id))}")
                    _expect(
                        _equal(numbers[str(id)], self.reference[kind]), f"a good image got {numbers[str(id)]!r:.500}"
                    )
            outcomes = {}
            for number, case in cases.items():
                id = ids[number]
                try:
                    outcomes[number] = self._checked(case, id, before[id], after[id], skipped, numbers)
                except AssertionError as error:
                    outcomes[number] = f"violation: {error}"
            return outcomes
        finally:
            dataset.delete()

    def _checked(
        self,
        case: Case,
        id: ObjectId,
        before: Document,
        after: Document,
        skipped: Skipped,
        numbers: Mapping[str, object],
    ) -> str:
        """The outcome of a case."""
        consumer, shown = self.consumer, f"{case.kind} in {case.field}, {case.attribute}: {case.value!r:.3000}"
        reads = consumer.reads.get(case.field, set())
        if (cause := skipped.get(str(id))) is not None:
            for field in (PREDICTIONS, GROUND_TRUTH):
                # Findings of an earlier call are removed from skipped images, too.
                is_kept = _contains(after[field], before[field], consumer.changes & _TAGS)
                _expect(is_kept, f"a skipped image's labels were changed: {shown}")
            if cause:
                _check_message(cause, str(self.folder), before)
            needed = case.attribute is None or case.attribute in reads | consumer.validated
            _expect(needed, f"skipped although {case.attribute} is not read: {cause}: {shown}")
            return f"skipped: {cause}"
        for field in (PREDICTIONS, GROUND_TRUTH):
            what = f"{after[field]!r:.2000} was left of {before[field]!r:.2000}"
            _expect(_contains(after[field], before[field], consumer.changes), f"labels were changed: {what}")
        if case.attribute is not None and case.attribute not in reads | consumer.validated and _has_same_shape(case):
            found = numbers[str(id)]
            _expect(_equal(found, self.reference[case.kind]), f"other numbers, {found!r:.500}: {shown}")
        if consumer.call is _coverage and (expected := covered(after[PREDICTIONS])) is not None:
            (found, *_), (pixels, outline) = numbers[str(id)], expected
            differs = abs((found or 0) * WIDTH * HEIGHT - pixels) > outline
            _expect(not differs, f"{found} of the image is covered, not {pixels} pixels: {shown}")
        for defect in defects(case.value, reads, consumer.optional, consumer.by_id):
            _expect(False, f"used although {defect}: {shown}")
        return "used"

    def _dataset(self, kind: str, cases: Mapping[int, Case]) -> tuple[Any, dict[int, ObjectId]]:
        """A dataset of the cases' images and of good ones, and the id of each; good ones have negative numbers."""
        dataset = self.fo.Dataset(f"corpus-{uuid.uuid4().hex}")
        kinds = {field: self.consumer.kind_in(field, kind) for field in (PREDICTIONS, GROUND_TRUTH)}
        for field, its_kind in kinds.items():
            dataset.add_sample_field(field, self.fo.EmbeddedDocumentField, embedded_doc_type=getattr(self.fo, its_kind))
        good = range(-NEIGHBOURS, 0)
        order = [*cases]
        for place, number in enumerate(good):
            order.insert(place * len(order) // NEIGHBOURS, number)
        filepaths = {number: str(self.folder / f"image{number}.png") for number in order}
        for path in filepaths.values():
            if not os.path.exists(path):
                os.link(self.folder / "0.png", path)
        samples = [
            self.fo.Sample(filepaths[number], metadata=self.fo.ImageMetadata(width=WIDTH, height=HEIGHT))
            for number in order
        ]
        ids = {number: ObjectId(id) for number, id in zip(order, dataset.add_samples(samples))}
        updates = []
        for number, id in ids.items():
            values: Document = {field: stored(its_kind, field) for field, its_kind in kinds.items()}
            if number in cases:
                values[cases[number].field] = cases[number].value
            updates.append((id, self._own(values, {})))
        from pymongo import UpdateOne

        dataset._sample_collection.bulk_write([UpdateOne({"_id": id}, {"$set": values}) for id, values in updates])
        return dataset, ids

    def _own(self, value: Any, ids: dict[ObjectId, ObjectId]) -> Any:
        """A value with ids of its own, and this folder in place of the one in texts."""
        if isinstance(value, dict):
            return {key: self._own(each, ids) for key, each in value.items()}
        if isinstance(value, list):
            return [self._own(each, ids) for each in value]
        if isinstance(value, ObjectId):
            return ids.setdefault(value, ObjectId())
        return value.replace(FOLDER, str(self.folder)) if isinstance(value, str) else value


def documents(dataset: Any) -> list[Document]:
    return list(dataset._sample_collection.find({}))


def _values(dataset: Any, field: str, attribute: str) -> dict[str, object]:
    """An attribute of each label, by the sample's id."""
    return {
        str(document["_id"]): [label.get(attribute) for label in labels_in(document.get(field))]
        for document in documents(dataset)
    }


def _label_ids(dataset: Any) -> list[str]:
    labels = [label for document in documents(dataset) for label in labels_in(document[PREDICTIONS])]
    return [str(label["_id"]) for label in labels if isinstance(label.get("_id"), ObjectId)]


def _causes(skipped: Sequence[Mapping[str, str]]) -> Skipped:
    return {each["id"]: each["cause"] for each in skipped}


def _check_message(message: str, folder: str, document: Document) -> None:
    _expect(message.isprintable(), f"not one line: {message[:1000]!r}")
    _expect(len(message.replace(folder, "")) <= MAX_LENGTH, f"longer than {MAX_LENGTH}: {message[:1000]!r}")
    ids = [str(label.get("_id")) for field in (PREDICTIONS, GROUND_TRUTH) for label in labels_in(document[field])]
    named = any(id in message for id in ids) or f"'{PREDICTIONS}'" in message or f"'{GROUND_TRUTH}'" in message
    _expect(named, f"no label and no field is named: {message}")


def _has_same_shape(case: Case) -> bool:
    """Whether the masks are those of the good images: masks in files have no hole."""
    return not any(FOLDER in str(label.get("mask_path")) for label in labels_in(case.value))


def _equal(one: object, other: object) -> bool:
    """Equality in which NaN equals itself."""
    return bson.encode({"value": one}) == bson.encode({"value": other})


def _contains(after: Any, before: Any, changes: frozenset[str]) -> bool:
    """Whether nothing of a stored value was lost, but for attributes that may change; labels may have been added."""
    if isinstance(before, dict) and isinstance(after, dict):
        return all(
            key in changes or (key in after and _contains(after[key], value, changes)) for key, value in before.items()
        )
    if isinstance(before, list) and isinstance(after, list):
        return len(after) >= len(before) and all(_contains(a, b, changes) for a, b in zip(after, before))
    return before is None or _equal(after, before)


def _expect(is_true: bool, problem: str) -> None:
    if not is_true:
        raise AssertionError(re.sub(r"\s+", " ", problem))
