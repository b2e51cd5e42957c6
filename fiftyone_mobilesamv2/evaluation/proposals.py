"""FiftyOne's evaluation method "proposals": AR@K of class-agnostic masks or boxes, as a run of the dataset."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import fiftyone.core.fields as fof
import fiftyone.core.labels as fol
import fiftyone.core.utils as fou
import fiftyone.core.validation as fov
import fiftyone.utils.eval.detection as foud
import numpy as np
from bson import ObjectId
from pymongo import UpdateOne

from .average_recall import IOU_THRESHOLDS, KS, NOT_FOUND, AverageRecall, Matches, ranking
from .label_shapes import LabelError, MissingError, boxes_of, masks_of, name_of
from .proposal_results import ProposalResults, threshold_index

if TYPE_CHECKING:
    import fiftyone as fo

logger = logging.getLogger(__name__)

# How proposals are ranked -> the attributes whose mean is the score.
RANKINGS = {
    "confidence": ("confidence",),
    "predicted_iou": ("predicted_iou",),
    "stability": ("stability",),
    "sam": ("predicted_iou", "stability"),
}
LABEL_TYPES = (fol.Detections, fol.Polylines, fol.Detection, fol.Polyline)
UNLABELED = "object"  # of objects without a class, which the App counts by their class
_WRITES_AT_ONCE = 200


def evaluate_proposals(
    samples: fo.core.collections.SampleCollection,
    pred_field: str,
    gt_field: str = "ground_truth",
    eval_key: str | None = None,
    ks: Sequence[int] = KS,
    use_masks: bool = True,
    rank_by: str = "confidence",
    area_field: str | None = None,
    progress: bool | Callable | None = None,
) -> ProposalResults:
    """Measures class-agnostic proposals against ground truth: AR@K, by COCO's rules.

    Nothing is stored before everything has been measured, so an earlier run of that key is replaced by a complete one
    or stays.

    Args:
        samples: a dataset or view of images or videos.
        pred_field: the proposals: detections or polylines, of samples or, as "frames.x", of frames.
        gt_field: the objects, likewise. `iscrowd` marks regions that are ignored; "r", "c" or "f" in `frequency` puts
            objects into LVIS's groups.
        eval_key: the key of the run. Then each object gets `<eval_key>` ("tp" or "fn" at IoU 0.5), `<eval_key>_iou`
            (its best IoU with any proposal), `<eval_key>_rank` (from 1) and `<eval_key>_id` of the proposal that finds
            it, and that proposal the same; each sample gets `<eval_key>_tp`, `_fp` (proposals that match nothing),
            `_fn` and `_recall_at_<K>`, its AR@K. None stores nothing.
        ks: how many proposals of an image count.
        use_masks: compares masks; else boxes.
        rank_by: "confidence": the detector's score, by which MobileSAMv2 caps its prompts, so that the K best are what
            a run of K prompts would have found, and which labels of any model have; "predicted_iou"; "stability"; or
            "sam", the mean of these two, by which SAM ranks.
        area_field: the objects' attribute that holds their area in pixels; default: their mask's, or their box's.
        progress: as everywhere in FiftyOne.

    Returns:
        the results; `results.metrics()` are the figures.

    Raises:
        ValueError: a field is missing or of the wrong type, objects have no masks, or nothing could be measured.
    """
    config = ProposalEvaluationConfig(
        pred_field, gt_field, ks=ks, use_masks=use_masks, rank_by=rank_by, area_field=area_field
    )
    method = config.build()
    if eval_key is not None:
        method.validate_run(samples, eval_key)
    measured = method.measure(samples, eval_key, progress)
    results = method.results_of(samples, measured, eval_key)
    if eval_key is not None:
        method.register_run(samples, eval_key)
        try:
            method.write(samples, measured, eval_key)
            method.save_run_results(samples, eval_key, results)
            method.add_fields_to_sidebar_group(samples, eval_key)
        except BaseException:
            method.delete_run(samples, eval_key)
            raise
    return results


class ProposalEvaluationConfig(foud.DetectionEvaluationConfig):
    """See :func:`evaluate_proposals`; what FiftyOne's `evaluate_detections(method="proposals")` makes.

    Args:
        iou: one of 0.5, 0.55, ..., 0.95: where an object counts as found in "tp" and "fn".
    """

    def __init__(
        self,
        pred_field: str,
        gt_field: str,
        ks: Sequence[int] = KS,
        use_masks: bool = False,
        rank_by: str = "confidence",
        area_field: str | None = None,
        iou: float = 0.5,
        classwise: bool = False,  # FiftyOne passes True by default; classes never count here
        **kwargs,
    ) -> None:
        super().__init__(pred_field, gt_field, iou=iou, classwise=False, **kwargs)
        self.ks = list(AverageRecall(ks).ks)
        self.use_masks = use_masks
        self.rank_by = rank_by
        self.area_field = area_field
        if rank_by not in RANKINGS:
            raise ValueError(f"rank_by={rank_by!r}: one of {', '.join(map(repr, RANKINGS))} was expected.")
        threshold_index(iou)
        if pred_field == gt_field:
            raise ValueError(f"The proposals and the ground truth are the same field, '{gt_field}'.")

    @property
    def method(self) -> str:
        return "proposals"


@dataclass
class _Image:
    """What was measured in one image: a sample, or a frame of a video."""

    id: ObjectId
    sample_id: ObjectId
    found_at_k: list[float] | None  # its AR at each K; None without objects
    fp: int
    objects: list[_Object] = field(default_factory=list)


@dataclass
class _Object:
    id: ObjectId
    label: str
    best_iou: float
    ranks: np.ndarray  # [thresholds], from 0
    match_id: ObjectId | None
    match_iou: float | None
    match_confidence: float | None


@dataclass
class _Measured:
    recall: AverageRecall
    images: list[_Image]
    skipped: list[dict]


class ProposalEvaluation(foud.DetectionEvaluation):
    """The method. It reads labels from the database itself, and each mask once."""

    def measure(
        self, samples: fo.core.collections.SampleCollection, eval_key: str | None, progress: bool | Callable | None
    ) -> _Measured:
        """Reads and matches everything, and writes nothing but missing metadata."""
        self._check(samples, eval_key)
        measured = _Measured(AverageRecall(self.config.ks), [], [])
        _ensure_metadata(samples)
        with fou.ProgressBar(total=_num_images(samples, self.config.gt_field), progress=progress) as bar:
            for document, sample_id, path, size in bar(self._documents(samples)):
                try:
                    measured.images.append(self._match(document, sample_id, size, measured.recall))
                except MissingError as error:
                    raise ValueError(f"{path}: {error}") from error
                except LabelError as error:
                    measured.skipped.append({"id": str(document["_id"]), "filepath": path, "cause": str(error)})
        self._report_skipped(measured)
        return measured

    def _documents(
        self, samples: fo.core.collections.SampleCollection
    ) -> Iterator[tuple[dict, ObjectId, str, tuple[int, int] | None]]:
        """Of each image: its document, its sample's id, what messages call it, and its (height, width)."""
        names = [samples._handle_frame_field(name)[0] for name in (self.config.pred_field, self.config.gt_field)]
        keep = dict.fromkeys([*names, "filepath", "metadata", "frame_number", "_sample_id"], True)
        if not samples._is_frame_field(self.config.gt_field):
            for document in samples._aggregate(pipeline=[{"$project": keep}]):
                metadata = document.get("metadata") or {}
                size = (metadata["height"], metadata["width"]) if metadata.get("width") else None
                yield document, document["_id"], document["filepath"], size
            return
        paths = ["id", "filepath", "metadata.frame_height", "metadata.frame_width"]
        videos = {ObjectId(id): (path, (h, w) if w else None) for id, path, h, w in zip(*samples.values(paths))}
        for document in samples._aggregate(frames_only=True, post_pipeline=[{"$project": keep}]):
            path, size = videos[document["_sample_id"]]
            yield document, document["_sample_id"], f"{path}, frame {document['frame_number']}", size

    def _check(self, samples: fo.core.collections.SampleCollection, eval_key: str | None) -> None:
        fov.validate_non_grouped_collection(samples)
        config = self.config
        for name, role in ((config.pred_field, "proposals"), (config.gt_field, "ground truth")):
            found = samples.get_field(name)
            if found is None:
                labels = [p for p, f in samples.get_field_schema(embedded_doc_type=LABEL_TYPES).items()]
                raise ValueError(
                    f"{samples._root_dataset.name} has no field '{name}' for the {role}. Fields that could be meant: "
                    f"{', '.join(sorted(labels)) or 'none'}."
                )
            if not (isinstance(found, fof.EmbeddedDocumentField) and issubclass(found.document_type, LABEL_TYPES)):
                kind = found.document_type.__name__ if isinstance(found, fof.EmbeddedDocumentField) else found
                raise ValueError(f"Field '{name}' holds {kind}; detections or polylines were expected as {role}.")
        if samples._is_frame_field(config.pred_field) != samples._is_frame_field(config.gt_field):
            raise ValueError(f"'{config.pred_field}' and '{config.gt_field}' must both be of frames, or of samples.")
        if eval_key is not None and eval_key not in samples.list_evaluations():
            for name in self.get_fields(samples, eval_key):
                if samples.get_field(name) is not None:
                    raise ValueError(f"'{name}' exists, and is no earlier evaluation's. Choose another eval_key.")
        for name in (config.pred_field, config.gt_field):
            if eval_key is not None and samples.get_field(name).read_only:
                raise ValueError(f"'{name}' is read-only: nothing can be noted on its labels. Use eval_key=None.")

    def _match(
        self, document: Mapping, sample_id: ObjectId, size: tuple[int, int] | None, recall: AverageRecall
    ) -> _Image:
        if size is None:
            raise LabelError("it has no metadata, and its size can't be read from its file")
        config = self.config
        objects = _labels_in(document, config.gt_field)
        proposals = _labels_in(document, config.pred_field)
        scores = [_number(label, RANKINGS[config.rank_by]) for label in proposals]
        # Masks beyond the largest K need no decoding.
        proposals = [proposals[i] for i in ranking(scores, config.ks[-1])]
        frequencies = [label.get("frequency") for label in objects]
        shapes = boxes_of(proposals, size), boxes_of(objects, size)
        if config.use_masks:
            shapes = masks_of(proposals, size, near=shapes[1]), masks_of(objects, size)
        matches = recall.add(
            *shapes,
            is_crowd=[bool(label.get("iscrowd")) for label in objects],
            areas=None if config.area_field is None else [_number(label, [config.area_field]) for label in objects],
            frequencies=frequencies if any(frequencies) else None,
        )
        return self._image(document["_id"], sample_id, objects, proposals, matches)

    def _image(
        self, id: ObjectId, sample_id: ObjectId, objects: list[Mapping], proposals: list[Mapping], matches: Matches
    ) -> _Image:
        threshold = threshold_index(self.config.iou)
        counted = [i for i, label in enumerate(objects) if not label.get("iscrowd")]
        ranks = matches.ranks[:, counted]
        image = _Image(
            id,
            sample_id,
            [float((ranks < k).mean()) for k in self.config.ks] if counted else None,
            int(matches.unmatched.sum()),
        )
        for i in counted:
            rank = matches.ranks[threshold, i]
            match = proposals[rank] if rank != NOT_FOUND else {}
            image.objects.append(
                _Object(
                    objects[i]["_id"],
                    objects[i].get("label") or UNLABELED,
                    float(matches.best_ious[i]),
                    matches.ranks[:, i],
                    match.get("_id"),
                    float(matches.ious[rank, i]) if match else None,
                    match.get("confidence"),
                )
            )
        return image

    def _report_skipped(self, measured: _Measured) -> None:
        if not measured.skipped:
            return
        first = measured.skipped[0]
        told = f"{len(measured.skipped)} images were skipped, the first: {first['filepath']}: {first['cause']}"
        if not measured.images:
            raise ValueError(f"Nothing could be measured; {told}.")
        logger.warning("%s. All are in `results.skipped`.", told)

    def register_samples(self, samples, eval_key, dynamic=True):
        # FiftyOne calls this before it loads every label for `evaluate`, which then needs none of them.
        try:
            self._measured = self.measure(samples, eval_key, progress=None)
            if eval_key is not None:
                self.write(samples, self._measured, eval_key)
        except BaseException:
            if eval_key is not None:
                self.delete_run(samples, eval_key)
            raise
        self._by_id = {str(image.id): image for image in self._measured.images}

    def evaluate(self, doc, eval_key=None):
        # FiftyOne only counts these.
        image = self._by_id.get(doc.id)
        if image is None:
            return []
        unmatched = [(None, UNLABELED, None, None, None, None)] * image.fp
        return [self._match_tuple(found) for found in image.objects] + unmatched

    def generate_results(self, samples, matches, eval_key=None, classes=None, missing=None, progress=None):
        return self.results_of(samples, self._measured, eval_key)

    def results_of(
        self, samples: fo.core.collections.SampleCollection, measured: _Measured, eval_key: str | None
    ) -> ProposalResults:
        objects = [found for image in measured.images for found in image.objects]
        ranks = np.array([found.ranks for found in objects], np.int64).reshape(-1, len(IOU_THRESHOLDS))
        return ProposalResults(
            samples,
            self.config,
            eval_key,
            [self._match_tuple(found) for found in objects],
            recall=measured.recall.to_dict(),
            ranks=np.where(ranks == NOT_FOUND, -1, ranks),
            skipped=measured.skipped,
            # The App's panel breaks down without any class.
            classes=None if objects else [UNLABELED],
            custom_metrics=_panel_metrics(measured.recall),
            backend=self,
        )

    def write(self, samples: fo.core.collections.SampleCollection, measured: _Measured, eval_key: str) -> None:
        """Notes on objects, on the proposals that find them and on samples what was found.

        Attributes on every proposal would cost 50 s for a sample of 1000.
        """
        dataset, of_frames = samples._dataset, samples._is_frame_field(self.config.gt_field)
        for name, kind in self._fields(samples, eval_key).items():
            name, of_frame = samples._handle_frame_field(name)
            (dataset.add_frame_field if of_frame else dataset.add_sample_field)(name, kind)
        ids, operations = [], []
        for image in measured.images:
            ids.append(image.id)
            operations.append(self._update(samples, image, eval_key))
            if len(ids) == _WRITES_AT_ONCE or image is measured.images[-1]:
                dataset._bulk_write(operations, ids=ids, frames=of_frames)
                ids, operations = [], []
        if of_frames:
            self._write_video_counts(samples, measured, eval_key)
        if samples._is_generated:
            # A view of patches or frames has a dataset of its own, whose source is to know as well.
            for name in self._fields(samples, eval_key):
                samples._sync_source_field_schema(name)
            fields = sorted({name.split(".")[0] for name in self._fields(samples, eval_key)})
            samples._sync_source(fields=fields, ids=[str(image.id) for image in measured.images])

    def _update(self, samples: fo.core.collections.SampleCollection, image: _Image, eval_key: str) -> UpdateOne:
        values = {f"{eval_key}{name}": value for name, value in self._counts([image]).items()}
        values["last_modified_at"] = datetime.now(timezone.utc)
        filters = []

        def note(field_name: str, label_id: ObjectId, state: str, iou: float, rank: int | None, other: ObjectId | None):
            path, is_list = samples._get_label_field_root(field_name)
            path, _ = samples._handle_frame_field(path)
            if is_list:
                # By id, since a view may hide labels, and others may have been added since.
                path += f".$[l{len(filters)}]"
                filters.append({f"l{len(filters)}._id": label_id})
            path += f".{eval_key}"
            values.update({path: state, f"{path}_iou": iou, f"{path}_rank": rank, f"{path}_id": other and str(other)})

        for found in image.objects:
            rank = self._rank(found)
            note(self.config.gt_field, found.id, "fn" if rank is None else "tp", found.best_iou, rank, found.match_id)
            if rank is not None:
                note(self.config.pred_field, found.match_id, "tp", found.match_iou, rank, found.id)
        return UpdateOne({"_id": image.id}, {"$set": values}, array_filters=filters or None)

    def _write_video_counts(
        self, samples: fo.core.collections.SampleCollection, measured: _Measured, eval_key: str
    ) -> None:
        videos: dict[ObjectId, list[_Image]] = {}
        for image in measured.images:
            videos.setdefault(image.sample_id, []).append(image)
        counts = {sample_id: self._counts(images) for sample_id, images in videos.items()}
        for name in self._counts([]):
            values = {str(sample_id): values[name] for sample_id, values in counts.items()}
            samples.set_values(f"{eval_key}{name}", values, key_field="id")

    def _counts(self, images: Sequence[_Image]) -> dict[str, float | None]:
        """By the end of the field's name: what `images`, one or those of a video, sum up to."""
        objects = [found for image in images for found in image.objects]
        tp = sum(self._rank(found) is not None for found in objects)
        with_objects = [image for image in images if image.found_at_k is not None]
        weights = [len(image.objects) for image in with_objects]
        recalls = {
            f"_recall_at_{k}": float(np.average([image.found_at_k[i] for image in with_objects], weights=weights))
            if with_objects
            else None
            for i, k in enumerate(self.config.ks)
        }
        return {"_tp": tp, "_fp": sum(image.fp for image in images), "_fn": len(objects) - tp, **recalls}

    def _match_tuple(self, found: _Object) -> tuple:
        """FiftyOne's (label of the object, of the proposal, IoU, confidence, id of the object, of the proposal).

        The proposal has the object's label, or it would not count as a true positive.
        """
        label = None if found.match_id is None else found.label
        match_id = None if found.match_id is None else str(found.match_id)
        return found.label, label, found.match_iou, found.match_confidence, str(found.id), match_id

    def _rank(self, found: _Object) -> int | None:
        """From 1, as users count."""
        rank = found.ranks[threshold_index(self.config.iou)]
        return None if rank == NOT_FOUND else int(rank) + 1

    def _fields(self, samples: fo.core.collections.SampleCollection, eval_key: str) -> dict[str, type[fof.Field]]:
        """Everything that a run stores, on labels of fields that still exist."""
        frames = samples._FRAMES_PREFIX
        label_fields = [self.config.gt_field, self.config.pred_field]
        if samples._has_frame_fields() and not any(samples.has_field(name) for name in label_fields):
            label_fields = [frames + name for name in label_fields]  # the run was over a view of the videos' frames
        fields = {f"{eval_key}{end}": fof.IntField for end in ("_tp", "_fp", "_fn")}
        fields |= {f"{eval_key}_recall_at_{k}": fof.FloatField for k in self.config.ks}
        if samples._is_frame_field(label_fields[0]):
            fields |= {frames + name: kind for name, kind in fields.items()}
        for name in label_fields:
            if samples.has_field(name):
                root, _ = samples._get_label_field_root(name)
                fields |= {
                    f"{root}.{eval_key}": fof.StringField,
                    f"{root}.{eval_key}_id": fof.StringField,
                    f"{root}.{eval_key}_iou": fof.FloatField,
                    f"{root}.{eval_key}_rank": fof.IntField,
                }
        return fields

    def get_fields(self, samples, eval_key, include_custom_metrics=True):
        return list(self._fields(samples, eval_key))

    def rename(self, samples, eval_key, new_eval_key):
        dataset = samples._dataset
        names = zip(self._fields(dataset, eval_key), self._fields(dataset, new_eval_key))
        names = {old: new for old, new in names if dataset.has_field(old)}
        of_samples, of_frames = fou.split_frame_fields(names)
        if of_samples:
            dataset.rename_sample_fields(of_samples)
        if of_frames:
            dataset.rename_frame_fields(of_frames)
        samples._rename_sidebar_group(eval_key, new_eval_key)

    def cleanup(self, samples, eval_key):
        dataset = samples._dataset
        of_samples, of_frames = fou.split_frame_fields(
            [name for name in self._fields(dataset, eval_key) if dataset.has_field(name)]
        )
        dataset.delete_sample_fields(of_samples)
        if of_frames:
            dataset.delete_frame_fields(of_frames)
        samples._delete_empty_sidebar_group(eval_key)


def _ensure_metadata(samples: fo.core.collections.SampleCollection) -> None:
    missing = samples.exists("metadata.width" if samples.media_type == "image" else "metadata.frame_width", False)
    if len(missing):
        missing.compute_metadata()


def _num_images(samples: fo.core.collections.SampleCollection, gt_field: str) -> int:
    return samples.count("frames") if samples._is_frame_field(gt_field) else len(samples)


def _labels_in(document: Mapping, field_name: str) -> list[dict]:
    labels = document.get(field_name.removeprefix("frames."))
    for name in ("detections", "polylines"):
        if labels and name in labels:
            return labels[name] or []  # None where a view hides all
    return [labels] if labels else []


def _number(label: Mapping, names: Sequence[str]) -> float:
    """The mean of these attributes."""
    values = [label.get(name) for name in names]
    for name, value in zip(names, values):
        if value is None:
            raise MissingError(f"{name_of(label)} has no {name}")
        if not isinstance(value, (int, float)) or math.isnan(value):
            raise LabelError(f"{name_of(label)} has {name}={value!r}: a number was expected")
    return sum(values) / len(values)


def _panel_metrics(recall: AverageRecall) -> dict[str, dict]:
    """As the App's panel shows them, where they are numbers."""
    return {
        name: {"key": name, "value": value, "label": name, "lower_is_better": False}
        for name, value in recall.metrics().items()
        if not math.isnan(value)
    }
