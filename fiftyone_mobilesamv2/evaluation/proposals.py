"""FiftyOne's evaluation method "proposals": AR@K of class-agnostic masks or boxes, as a run of the dataset."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import fiftyone.core.fields as fof
import fiftyone.core.utils as fou
import fiftyone.core.validation as fov
import fiftyone.utils.eval.detection as foud
import numpy as np
from bson import ObjectId
from pymongo import UpdateOne

from ..errors import ArgumentError
from ..fiftyone_internals import (
    FRAMES_PREFIX,
    bulk_write,
    delete_empty_sidebar_group,
    frame_collection,
    is_clips_view,
    is_frame_field,
    is_frames_view,
    is_generated,
    is_patches_view,
    label_root,
    rename_sidebar_group,
    root_dataset,
    sample_collection,
    source_dataset,
    split_frame_field,
)
from ..labels.documents import StoredImage, ensure_metadata, is_crowd, log_skipped, number_of, visit_shard
from ..labels.fields import check_shapes_field
from ..labels.masks import boxes_may_overlap, boxes_of, masks_of
from ..runs.cluster import check_workers, on_cluster
from ..runs.shards import Shard
from .average_recall import IOU_THRESHOLDS, KS, NOT_FOUND, AverageRecall, ranking
from .proposal_results import ProposalResults
from .ranking import RANKINGS

if TYPE_CHECKING:
    import fiftyone as fo
    from fiftyone.core.collections import SampleCollection

logger = logging.getLogger(__name__)
UNLABELED = "object"  # of objects without a class, which the App counts by their class
_FOUND_AT = 0  # the place of IoU 0.5, of "tp" and "fn", in IOU_THRESHOLDS
_UPDATES_AT_ONCE = 200
_LABELS_IN_AN_UPDATE = 100  # MongoDB looks for each of them among all labels of the document


def evaluate_proposals(
    samples: SampleCollection,
    pred_field: str,
    gt_field: str = "ground_truth",
    eval_key: str | None = None,
    ks: Sequence[int] = KS,
    use_masks: bool = True,
    rank_by: str = "confidence",
    area_field: str | None = None,
    progress: bool | Callable | None = None,
    cluster: str | None = None,
    workers: int | None = None,
) -> ProposalResults:
    """Measures class-agnostic proposals against ground truth: AR@K, by COCO's rules.

    An earlier run of that key is replaced only after everything has been measured.

    An image with a label that can't be used (a file that is no mask, a score that is no number, a mask that isn't
    cropped to its box) is skipped, logged, and listed in `results.skipped`. Masks of proposals whose boxes meet no
    object are not looked at. What a view hides isn't seen: neither samples and labels nor attributes such as `iscrowd`.

    Args:
        samples: a dataset or view of images or videos. Where image sizes are missing, metadata is computed and stored.
        pred_field: the proposals: detections or polylines, of samples or, as "frames.x", of frames.
        gt_field: the objects, likewise. `iscrowd` marks regions that are ignored; "r", "c" or "f" in `frequency` puts
            objects into LVIS's groups.
        eval_key: the key of the run. Then each object gets `<eval_key>` ("tp" or "fn" at IoU 0.5), `<eval_key>_iou`
            (its best IoU with any proposal), `<eval_key>_rank` (from 1) and `<eval_key>_id` of the proposal that finds
            it, and that proposal the same; each sample gets `<eval_key>_tp`, `_fp` (proposals that match nothing),
            `_fn` and `_recall_at_<K>`, its AR@K. None stores nothing of these.
        ks: how many proposals of an image count.
        use_masks: compares masks; else boxes.
        rank_by: "confidence": the detector's score, by which MobileSAMv2 caps its prompts, so that the K best are what
            a run of K prompts would have found, and which labels of any model have; "predicted_iou"; "stability"; or
            "sam", the mean of these two, by which SAM ranks.
        area_field: the objects' attribute that holds their area in pixels; default: their mask's, or their box's.
        progress: as everywhere in FiftyOne.
        cluster: measures on a Ray cluster: "auto" for the one that this machine belongs to, its address, or "local" for
            processes on this machine. The results are the same, to the last digit.
        workers: how many of the cluster; None: one for each GPU, or, without any, for each machine.

    Returns:
        the results; `results.metrics()` are the figures.

    Raises:
        ValueError: a field is missing or of the wrong type; a mask, a score or an area is missing; what a run of this
            key would store is there already and no earlier run's; or every image had to be skipped.
    """
    check_workers(cluster, workers)
    method = ProposalEvaluationConfig(
        pred_field, gt_field, ks=ks, use_masks=use_masks, rank_by=rank_by, area_field=area_field
    ).build()
    method.cluster, method.workers = cluster, workers
    method.register_run(samples, eval_key, progress=progress)
    method.register_samples(samples, eval_key)
    if eval_key is not None:
        method.add_fields_to_sidebar_group(samples, eval_key)
    return method.results


class ProposalEvaluationConfig(foud.DetectionEvaluationConfig):
    """See :func:`evaluate_proposals`. FiftyOne's `evaluate_detections(method="proposals")` makes one, too.

    Attributes:
        view: "frames" or "patches" if the run was over such a view, whose labels are in other fields of its dataset.
        stored_as: the key in the names of the fields, which isn't the run's if those of a new key were taken.
    """

    def __init__(
        self,
        pred_field: str,
        gt_field: str,
        ks: Sequence[int] = KS,
        use_masks: bool = False,
        rank_by: str = "confidence",
        area_field: str | None = None,
        view: str | None = None,
        stored_as: str | None = None,
        # What FiftyOne passes to any method:
        iou: float = 0.5,
        classwise: bool = False,
        use_boxes: bool = False,
        custom_metrics: list | dict | None = None,
    ) -> None:
        super().__init__(pred_field, gt_field, iou=iou, classwise=False, custom_metrics=custom_metrics)
        self.ks = list(AverageRecall(ks).ks)
        self.use_masks = use_masks and not use_boxes
        self.rank_by = rank_by
        self.area_field = area_field
        self.view = view
        self.stored_as = stored_as
        if rank_by not in RANKINGS:
            raise ArgumentError(f"rank_by={rank_by!r}: one of {', '.join(map(repr, RANKINGS))} was expected.")
        if iou != IOU_THRESHOLDS[_FOUND_AT]:
            raise ArgumentError(f'iou={iou}: "tp" and "fn" are told at 0.5; the results have recall at 0.5 to 0.95.')
        if pred_field == gt_field:
            raise ArgumentError(f"The proposals and the ground truth are the same field, '{gt_field}'.")

    @property
    def method(self) -> str:
        return "proposals"


@dataclass
class _Object:
    id: ObjectId
    label: str
    best_iou: float
    ranks: np.ndarray  # [thresholds], from 0
    match_id: ObjectId | None  # of the proposal that finds it at IoU 0.5; the next two are of this match
    match_iou: float | None
    match_confidence: float | None

    @property
    def rank(self) -> int | None:
        """From 1, as users count."""
        return None if self.match_id is None else int(self.ranks[_FOUND_AT]) + 1

    @property
    def match(self) -> tuple:
        """FiftyOne's (label of the object, of the proposal, IoU, confidence, id of the object, of the proposal).

        The proposal is given the object's label, or FiftyOne would not count it as a true positive.
        """
        if self.match_id is None:
            return self.label, None, None, None, str(self.id), None
        return self.label, self.label, self.match_iou, self.match_confidence, str(self.id), str(self.match_id)


@dataclass
class _Image:
    """A sample, or a frame of a video: what was found in it.

    Attributes:
        sample_id: of the dataset's sample that it is, or belongs to.
        recalls: its AR at each K; None without objects.
        fp: how many proposals match nothing at IoU 0.5.
    """

    id: ObjectId
    sample_id: ObjectId
    frame_number: int | None
    recalls: list[float] | None
    fp: int
    objects: list[_Object] = field(default_factory=list)


class ProposalEvaluation(foud.DetectionEvaluation):
    """The method. It reads labels from the database itself, and each mask once.

    FiftyOne calls `register_run`, which would delete an earlier run, then `register_samples`, and then, having loaded
    every label, `evaluate` for each sample. Here the first measures, the second stores, and the third tells.
    """

    def __init__(self, config: ProposalEvaluationConfig) -> None:
        super().__init__(config)
        self.cluster: str | None = None
        self.workers: int | None = None
        self.results: ProposalResults | None = None
        self._recall = AverageRecall(config.ks)
        self._images: list[_Image] = []
        self._skipped: list[dict] = []

    def register_run(self, samples, key, overwrite=True, cleanup=True, progress=None):
        if key is not None:
            self.validate_run(samples, key, overwrite=overwrite)
        self.check_fields(samples)
        if is_generated(samples):
            self.config.view = "frames" if is_frames_view(samples) else "patches"
        if key is not None:
            self._check_names(samples, key)
        self.config.stored_as = key
        self._measure(samples, progress)
        self.results = self._results(samples, key)
        super().register_run(samples, key, overwrite=overwrite, cleanup=cleanup)

    def register_samples(self, samples, eval_key, dynamic=True):
        if eval_key is None:
            return
        try:
            self._write(samples, eval_key)
            self.save_run_results(samples, eval_key, self.results)
        except BaseException:
            self.delete_run(samples, eval_key)
            raise

    def evaluate(self, doc, eval_key=None):
        # FiftyOne counts these, and stores the counts once more.
        image = self._by_id.get(doc.id)
        return [] if image is None else [o.match for o in image.objects] + [(None, UNLABELED, *[None] * 4)] * image.fp

    def generate_results(self, samples, matches, eval_key=None, classes=None, missing=None, progress=None):
        if eval_key is not None:
            self._forget_counts_of_skipped(samples, eval_key)
        self.results = self._results(samples, eval_key, classes, missing)
        return self.results

    # Checks ---------------------------------------------------------------------------------------------------------

    def check_fields(self, samples: SampleCollection) -> None:
        """Raises ValueError where the fields of the configuration can't be compared in these samples."""
        fov.validate_non_grouped_collection(samples)
        config = self.config
        check_shapes_field(samples, config.pred_field, "proposals")
        check_shapes_field(samples, config.gt_field, "ground truth")
        if is_frame_field(samples, config.pred_field) != is_frame_field(samples, config.gt_field):
            raise ArgumentError(f"'{config.pred_field}' and '{config.gt_field}' must both be of frames, or of samples.")
        if is_clips_view(samples) or (is_patches_view(samples) and root_dataset(samples).media_type == "video"):
            raise ArgumentError("Clips, and patches of frames, can't be measured: evaluate the frames of the videos.")

    def _check_names(self, samples: SampleCollection, eval_key: str) -> None:
        """That nothing of the user's is where the run is going to store, and at last delete, its own."""
        dataset = root_dataset(samples)
        for name in self._label_names(dataset):
            if dataset.get_field(name).read_only:
                raise ArgumentError(f"'{name}' is read-only: nothing can be noted on its labels. Use eval_key=None.")
        names, attributes = set(self._fields(dataset, eval_key)), set(self._attributes(dataset, eval_key))
        if eval_key in dataset.list_evaluations():
            earlier = dataset.get_evaluation_info(eval_key).config
            names -= set(earlier.build()._fields(dataset, earlier.stored_as))
            attributes &= names
        taken = [name for name in sorted(names) if dataset.has_field(name)]
        if attributes and not taken:
            # Attributes of labels needn't be declared.
            paths = {split_frame_field(dataset, name)[0]: name for name in attributes}
            collection = frame_collection(dataset) if self._is_of_frames(dataset) else sample_collection(dataset)
            if collection.find_one({"$or": [{path: {"$exists": True}} for path in paths]}, {"_id": True}):
                taken = [name for path, name in paths.items() if collection.find_one({path: {"$exists": True}})]
        if taken:
            raise ArgumentError(f"'{taken[0]}' exists, and is no earlier evaluation's. Choose another eval_key.")

    # Measuring ------------------------------------------------------------------------------------------------------

    def _measure(self, samples: SampleCollection, progress: bool | Callable | None) -> None:
        """Reads and matches everything, and stores nothing but missing metadata."""
        if self.cluster is None:
            total = self._measure_part(samples, progress)
        else:
            total = self._measure_on_cluster(samples, progress)
        log_skipped(self._skipped, total)
        self._by_id = {str(image.id): image for image in self._images}

    def _measure_part(self, samples: SampleCollection, progress: bool | Callable | None) -> int:
        fields = [self.config.pred_field, self.config.gt_field]
        skipped, total = visit_shard(samples, fields, lambda each: self._images.append(self._measured(each)), progress)
        self._skipped += skipped
        return total

    def _measure_on_cluster(self, samples: SampleCollection, progress: bool | Callable | None) -> int:
        if is_generated(samples):
            raise ArgumentError("Patches and frames can't be spread over a cluster: evaluate what they are of.")
        ensure_metadata(samples, progress)
        parts = on_cluster(samples, _measurer, (self.config,), uuid.uuid4().hex, self.cluster, self.workers)
        total = 0
        with fou.ProgressBar(total=len(samples), progress=progress) as bar, closing(parts):
            for recall, images, skipped, count, num_samples in parts:
                self._recall += recall
                self._images += images
                self._skipped += skipped
                total += count
                bar.update(num_samples)
        # As if they had been measured one after the other.
        places = {sample_id: place for place, sample_id in enumerate(samples.values("_id"))}
        self._images.sort(key=lambda image: (places[image.sample_id], image.frame_number or 0))
        self._skipped.sort(key=lambda each: places.get(ObjectId(each["id"]), -1))
        return total

    def _results(
        self,
        samples: SampleCollection,
        eval_key: str | None,
        classes: list[str] | None = None,
        missing: str | None = None,
    ) -> ProposalResults:
        objects = [found for image in self._images for found in image.objects]
        ranks = np.array([found.ranks for found in objects], np.int64).reshape(-1, len(IOU_THRESHOLDS))
        if not objects:
            classes = [UNLABELED]  # the App's panel breaks down without any
        return ProposalResults(
            samples,
            self.config,
            eval_key,
            [found.match for found in objects],
            recall=self._recall.to_dict(),
            ranks=np.where(ranks == NOT_FOUND, -1, ranks),
            skipped=self._skipped,
            classes=classes,
            missing=missing,
            custom_metrics=_panel_metrics(self._recall),
            backend=self,
        )

    def _measured(self, stored: StoredImage) -> _Image:
        """Matches the image's proposals to its objects, and counts them."""
        size = stored.known_size
        config = self.config
        objects = stored.labels(config.gt_field)
        proposals = stored.labels(config.pred_field)
        scores = [number_of(label, RANKINGS[config.rank_by]) for label in proposals]
        # Masks beyond the largest K need no decoding.
        proposals = [proposals[i] for i in ranking(scores, config.ks[-1])]
        crowd = [is_crowd(label) for label in objects]
        areas = None if config.area_field is None else [number_of(label, [config.area_field]) for label in objects]
        frequencies = [label.get("frequency") for label in objects]
        shapes = boxes_of(proposals, size), boxes_of(objects, size)
        if config.use_masks:
            shapes = masks_of(proposals, size, boxes_may_overlap(*shapes).any(1)), masks_of(objects, size)
        matches = self._recall.add(*shapes, crowd, areas, frequencies if any(frequencies) else None)

        counted = [i for i, ignored in enumerate(crowd) if not ignored]
        ranks = matches.ranks[:, counted]
        image = _Image(
            stored.document["_id"],
            stored.sample_id,
            stored.document.get("frame_number"),
            recalls=[float((ranks < k).mean()) for k in config.ks] if counted else None,
            fp=int(matches.unmatched.sum()),
        )
        for i in counted:
            rank = matches.ranks[_FOUND_AT, i]
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

    # Storing --------------------------------------------------------------------------------------------------------

    def _write(self, samples: SampleCollection, eval_key: str) -> None:
        """Notes on objects, on the proposals that find them and on samples what was found.

        The other proposals, most of the labels, stay as they are.
        """
        dataset, root = source_dataset(samples), root_dataset(samples)
        if dataset is not root:
            self._delete_fields(dataset, eval_key)  # an earlier run's that was deleted in the source alone
            of_frames = self._is_of_frames(root)
            self._update(
                root,
                eval_key,
                lambda image: (
                    {"_sample_id": image.sample_id, "frame_number": image.frame_number}
                    if of_frames
                    else {"_id": image.sample_id}
                ),
            )
        self._update(dataset, eval_key, lambda image: {"_id": image.id})
        if self._is_of_frames(dataset):
            videos: dict[ObjectId, list[_Image]] = {}
            for image in self._images:
                videos.setdefault(image.sample_id, []).append(image)
            for name in self._counts([]):
                values = {str(id): self._counts(images)[name] for id, images in videos.items()}
                dataset.set_values(eval_key + name, values, key_field="id")

    def _update(self, dataset: fo.Dataset, eval_key: str, query: Callable[[_Image], dict]) -> None:
        for name, kind in self._fields(dataset, eval_key).items():
            name, of_frame = split_frame_field(dataset, name)
            (dataset.add_frame_field if of_frame else dataset.add_sample_field)(name, kind)
        of_frames = self._is_of_frames(dataset)
        has_counts = bool(self._count_fields(dataset, eval_key))
        paths = []
        for name in self._label_names(dataset):
            path, is_list = label_root(dataset, name)
            paths.append((split_frame_field(dataset, path)[0], is_list))
        ids: list[ObjectId] = []  # of what is in memory, too, and then reloaded
        operations: list[UpdateOne] = []
        for number, image in enumerate(self._images, 1):
            counts = {eval_key + name: value for name, value in self._counts([image]).items()} if has_counts else {}
            operations += _updates(query(image), image, eval_key, *paths, counts)
            ids.append(query(image).get("_id", image.id))  # a frame has its id in a view of frames as well
            if len(operations) >= _UPDATES_AT_ONCE or number == len(self._images):
                bulk_write(dataset, operations, ids=ids, frames=of_frames)
                ids, operations = [], []

    def _forget_counts_of_skipped(self, samples: SampleCollection, eval_key: str) -> None:
        # FiftyOne has stored zeros.
        ends = [f"{eval_key}{end}" for end in ("_tp", "_fp", "_fn")]
        dataset, of_frames = source_dataset(samples), self._is_of_frames(samples)
        nothing = {"$set": dict.fromkeys(ends)}
        if operations := [UpdateOne({"_id": ObjectId(each["id"])}, nothing) for each in self._skipped]:
            bulk_write(dataset, operations, frames=of_frames)
        if of_frames:
            measured = {str(image.sample_id) for image in self._images}
            empty = [id for id in samples.values("id") if id not in measured]
            if empty:
                bulk_write(dataset, [UpdateOne({"_id": ObjectId(id)}, nothing) for id in empty])

    def _counts(self, images: Sequence[_Image]) -> dict[str, float | None]:
        """By the end of the field's name: what `images`, one or those of a video, sum up to."""
        objects = [found for image in images for found in image.objects]
        tp = sum(found.rank is not None for found in objects)
        with_objects = [image for image in images if image.objects]
        weights = [len(image.objects) for image in with_objects]
        recalls = {
            f"_recall_at_{k}": float(np.average([image.recalls[i] for image in with_objects], weights=weights))
            if with_objects
            else None
            for i, k in enumerate(self.config.ks)
        }
        return {"_tp": tp, "_fp": sum(image.fp for image in images), "_fn": len(objects) - tp, **recalls}

    # Fields of a run ------------------------------------------------------------------------------------------------

    def _label_names(self, dataset: fo.Dataset) -> list[str]:
        """The fields of objects and proposals in `dataset`, which may be a view's source; only those that exist."""
        prefix = FRAMES_PREFIX if self.config.view == "frames" and not is_frames_view(dataset) else ""
        names = [prefix + name for name in (self.config.gt_field, self.config.pred_field)]
        return [name for name in names if dataset.has_field(name)]

    def _is_of_frames(self, samples: SampleCollection) -> bool:
        """Whether the labels are of videos' frames there."""
        from_view = self.config.view == "frames" and not is_frames_view(samples)
        return from_view or is_frame_field(samples, self.config.gt_field)

    def _fields(self, dataset: fo.Dataset, eval_key: str) -> dict[str, type[fof.Field]]:
        """Everything that a run stores in `dataset`."""
        return self._count_fields(dataset, eval_key) | self._attributes(dataset, eval_key)

    def _count_fields(self, dataset: fo.Dataset, eval_key: str) -> dict[str, type[fof.Field]]:
        if self.config.view == "patches" and not is_patches_view(dataset):
            return {}  # counts of patches are none of their samples
        fields = {f"{eval_key}{end}": fof.IntField for end in ("_tp", "_fp", "_fn")}
        fields |= {f"{eval_key}_recall_at_{k}": fof.FloatField for k in self.config.ks}
        if not self._is_of_frames(dataset):
            return fields
        of_frames = {FRAMES_PREFIX + name: kind for name, kind in fields.items()}
        return of_frames if self.config.view == "frames" else fields | of_frames

    def _attributes(self, dataset: fo.Dataset, eval_key: str) -> dict[str, type[fof.Field]]:
        fields = {}
        for name in self._label_names(dataset):
            root, _ = label_root(dataset, name)
            fields |= {
                f"{root}.{eval_key}": fof.StringField,
                f"{root}.{eval_key}_id": fof.StringField,
                f"{root}.{eval_key}_iou": fof.FloatField,
                f"{root}.{eval_key}_rank": fof.IntField,
            }
        return fields

    def get_fields(self, samples, eval_key, include_custom_metrics=True):
        fields = list(self._fields(source_dataset(samples), self.config.stored_as))
        return fields + (self.get_custom_metric_fields(samples, eval_key) if include_custom_metrics else [])

    def rename(self, samples, eval_key, new_eval_key):
        renamed = []
        for dataset in _datasets(samples):
            names = zip(self._fields(dataset, self.config.stored_as), self._fields(dataset, new_eval_key))
            renamed.append((dataset, {old: new for old, new in names if dataset.has_field(old)}))
            if taken := [new for new in renamed[-1][1].values() if dataset.has_field(new)]:
                raise ArgumentError(f"'{taken[0]}' exists; the fields keep the name '{self.config.stored_as}'")
        for dataset, names in renamed:
            of_samples, of_frames = fou.split_frame_fields(names)
            if of_samples:
                dataset.rename_sample_fields(of_samples)
            if of_frames:
                dataset.rename_frame_fields(of_frames)
        self.config.stored_as = new_eval_key
        self.update_run_config(samples, eval_key, self.config)
        self.rename_custom_metrics(samples, eval_key, new_eval_key)
        rename_sidebar_group(samples, eval_key, new_eval_key)

    def cleanup(self, samples, eval_key):
        for dataset in _datasets(samples):
            self._delete_fields(dataset, self.config.stored_as)
        self.cleanup_custom_metrics(samples, eval_key)
        delete_empty_sidebar_group(samples, eval_key)

    def _delete_fields(self, dataset: fo.Dataset, eval_key: str) -> None:
        names = [name for name in self._fields(dataset, eval_key) if dataset.has_field(name)]
        of_samples, of_frames = fou.split_frame_fields(names)
        if of_samples:
            dataset.delete_sample_fields(of_samples)
        if of_frames:
            dataset.delete_frame_fields(of_frames)


def _measurer(config: ProposalEvaluationConfig) -> Callable[[SampleCollection, Shard], tuple]:
    """What a worker of a cluster does with each part."""

    def measure(samples: SampleCollection, shard: Shard) -> tuple:
        part, method = shard.of(samples), config.build()
        total = method._measure_part(part, progress=False)
        return method._recall, method._images, method._skipped, total, len(part)

    return measure


def _updates(
    query: dict,
    image: _Image,
    eval_key: str,
    objects_path: tuple[str, bool],
    proposals_path: tuple[str, bool],
    values: dict,
) -> Iterator[UpdateOne]:
    """Of one document: sets `values`, and the attributes of the image's objects and of the proposals that find them.

    Labels are told by id: a view may hide some, and others may have come and gone since they were read.

    Args:
        objects_path, proposals_path: where the labels are in the document, and whether in a list.
    """
    notes = []
    for found in image.objects:
        state = "fn" if found.rank is None else "tp"
        notes.append((objects_path, found.id, state, found.best_iou, found.rank, found.match_id))
        if found.rank is not None:
            notes.append((proposals_path, found.match_id, state, found.match_iou, found.rank, found.id))
    values = {**values, "last_modified_at": datetime.now(timezone.utc)}
    for start in range(0, max(len(notes), 1), _LABELS_IN_AN_UPDATE):
        filters = []
        for (path, is_list), label_id, state, iou, rank, other in notes[start : start + _LABELS_IN_AN_UPDATE]:
            if is_list:
                path += f".$[l{len(filters)}]"
                filters.append({f"l{len(filters)}._id": label_id})
            path += f".{eval_key}"
            values |= {path: state, f"{path}_iou": iou, f"{path}_rank": rank, f"{path}_id": other and str(other)}
        yield UpdateOne(query, {"$set": values}, array_filters=filters or None)
        values = {}


def _datasets(samples: SampleCollection) -> list[fo.Dataset]:
    """The dataset, and that of a view of patches or frames."""
    root, own = root_dataset(samples), source_dataset(samples)
    return [root] if own is root else [root, own]


def _panel_metrics(recall: AverageRecall) -> dict[str, dict]:
    """As the App's panel shows them, where they are numbers."""
    return {
        name: {"key": name, "value": value, "label": name, "lower_is_better": False}
        for name, value in recall.metrics().items()
        if not math.isnan(value)
    }
