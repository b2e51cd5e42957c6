"""Average recall of class-agnostic proposals by COCO's rules (`COCOeval` with `useCats=0`), with NumPy and pycocotools.

A match depends only on better-ranked proposals, so one pass over an image gives its recall at every K. An object that
COCO ignores (a crowd region, or an object outside the area range) never takes a proposal from one that counts, so each
group of objects is matched as if it contained all objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from ..errors import ArgumentError, plain
from ..modeling.arrays import FloatArray, IntArray, MaskArray
from ..modeling.rle import RLE

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # COCO's
KS = (10, 100, 1000)
MAX_K = 100_000

# In pixels. Limits belong to both adjacent ranges, as in COCOeval.
AREA_RANGES = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
# LVIS: categories with fewer than 10, with 10 to 99, and with 100 or more training images.
FREQUENCIES = {"rare": "r", "common": "c", "frequent": "f"}
METRIC_NAMES = {
    "all": "AR",
    "small": "ARs",
    "medium": "ARm",
    "large": "ARl",
    "rare": "ARr",
    "common": "ARc",
    "frequent": "ARf",
}

NOT_FOUND = np.iinfo(np.int32).max  # a rank that exceeds every K

# [N, 4] boxes as x, y, width, height in pixels, or N masks of one image as COCO RLE
Shapes = FloatArray | Sequence[RLE]


@dataclass(frozen=True)
class Matches:
    """The matches between the proposals and objects of one image.

    Attributes:
        ious: float64 [proposals, objects], proposals in order of rank; for crowds, the share of the proposal inside.
        ranks: int64 [thresholds, objects]: the rank, from 0, of the proposal that finds the object at each of
            `IOU_THRESHOLDS`; `NOT_FOUND` if none does, and for crowds.
        unmatched: bool [proposals]: whether it neither finds an object at IoU 0.5 nor lies on a crowd.
    """

    ious: FloatArray
    ranks: IntArray
    unmatched: MaskArray

    @property
    def best_ious(self) -> FloatArray:
        """float64 [objects]: the highest IoU of each object with any proposal; 0 without proposals."""
        best: FloatArray = self.ious.max(0, initial=0.0)
        return best


class AverageRecall:
    """Counts over images, from which AR@K can be computed for every K up to the largest of `ks`.

    Its size does not depend on the number of images, and sums are exact in any grouping: the sum over shards equals the
    counts over all images.

    Attributes:
        ks: numbers of proposals per image to evaluate, ascending.
        images: number of images added.
        totals: group -> number of objects.
        found: group -> int64 [thresholds, max(ks)], the number of objects that proposals of each rank found.
    """

    def __init__(self, ks: Iterable[int] = KS) -> None:
        """Raises ValueError unless `ks` are whole numbers from 1 to 100,000; there is one count for each rank."""
        ks = tuple(ks)
        if not ks or any(isinstance(k, bool) or not isinstance(k, Integral) or not 1 <= k <= MAX_K for k in ks):
            raise ArgumentError(f"ks must be whole numbers from 1 to {MAX_K:,}, such as {KS}; got {plain(ks)}.")
        self.ks = tuple(sorted({int(k) for k in ks}))
        self.images = 0
        self.totals = dict.fromkeys(AREA_RANGES, 0)
        self.found = {name: self._no_counts() for name in AREA_RANGES}

    def add(
        self,
        proposals: Shapes,
        objects: Shapes,
        is_crowd: Sequence[bool] | None = None,
        areas: Sequence[float] | None = None,
        frequencies: Sequence[str | None] | None = None,
    ) -> Matches:
        """Matches an image's proposals to its objects and adds them to the counts.

        Args:
            proposals: best-ranked first; those beyond the largest K are ignored.
            objects: the ground truth; masks if proposals are masks, boxes if they are boxes.
            is_crowd: whether each object is a crowd region, which is ignored as in COCO. Default: none are.
            areas: the area of each object in pixels; default: that of its mask or box.
            frequencies: LVIS's "r", "c" or "f" of each object's category.
        """
        proposals = proposals[: self.ks[-1]]
        crowd = np.zeros(len(objects), bool) if is_crowd is None else np.asarray(is_crowd, bool)
        sizes = areas_of(objects) if areas is None else np.asarray(areas, float)
        ious = ious_of(proposals, objects, crowd)

        groups: dict[str, MaskArray] = {}
        for name, (low, high) in AREA_RANGES.items():
            groups[name] = (sizes >= low) & (sizes <= high)
        if frequencies is not None:
            groups |= {name: np.array([f == key for f in frequencies], bool) for name, key in FREQUENCIES.items()}
        first = _first_ranks(ious)
        ranks = np.full(first.shape, NOT_FOUND)
        ranks[:, ~crowd] = _settle(first[:, ~crowd], ious[:, ~crowd])
        for name, members in groups.items():
            members &= ~crowd
            self._count(name, ranks[:, ~crowd] if name == "all" else _settle(first[:, members], ious[:, members]))
        self.images += 1

        unmatched = ~(ious[:, crowd] >= IOU_THRESHOLDS[0]).any(1)
        unmatched[ranks[0][ranks[0] != NOT_FOUND]] = False
        return Matches(ious, ranks, unmatched)

    def __add__(self, other: AverageRecall) -> AverageRecall:
        if self.ks != other.ks:
            raise ArgumentError(f"Counts for ks={self.ks} and ks={other.ks} can't be merged.")
        merged = AverageRecall(self.ks)
        merged.images = self.images + other.images
        for part in (self, other):
            for name, total in part.totals.items():
                merged.totals[name] = merged.totals.get(name, 0) + total
                merged.found[name] = merged.found.get(name, self._no_counts()) + part.found[name]
        return merged

    def recalls(self, k: int, group: str = "all") -> FloatArray:
        """float64 [thresholds]: the share of the group's objects found within rank `k`; NaN without objects."""
        if not 1 <= k <= self.ks[-1]:
            raise ArgumentError(
                f"K={k} is not between 1 and {self.ks[-1]}, the number of best-ranked proposals that were matched."
            )
        found = self.found[group][:, :k].sum(1)
        return found / self.totals[group] if self.totals[group] else np.full(len(found), np.nan)

    def curve(self, group: str = "all") -> FloatArray:
        """float64 [max(ks)]: the group's AR@1, AR@2, ..."""
        found = self.found[group].cumsum(1).mean(0)
        return found / self.totals[group] if self.totals[group] else np.full(len(found), np.nan)

    def metrics(self) -> dict[str, float]:
        """AR@K of every group and K, and their mean over K: `{"AR@10": ..., "AR": ..., "ARs@10": ...}`.

        "AR" without a K is the average in MobileSAMv2's tables. NaN for a group without objects.
        """
        metrics: dict[str, float] = {}
        for group in self.totals:
            values = {f"{METRIC_NAMES[group]}@{k}": float(self.recalls(k, group).mean()) for k in self.ks}
            metrics |= values | {METRIC_NAMES[group]: float(np.mean(list(values.values())))}
        return metrics

    def to_dict(self) -> dict[str, Any]:
        """The counts as JSON-serializable data."""
        found = {name: counts.tolist() for name, counts in self.found.items()}
        return {"ks": list(self.ks), "images": self.images, "totals": dict(self.totals), "found": found}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> AverageRecall:
        """The inverse of :meth:`to_dict`."""
        recall = cls(d["ks"])
        recall.images = d["images"]
        recall.totals = dict(d["totals"])
        recall.found = {name: np.array(counts, np.int64) for name, counts in d["found"].items()}
        return recall

    @classmethod
    def of_ranks(cls, ks: Iterable[int], ranks: IntArray) -> AverageRecall:
        """The average recall of objects with known ranks, [objects, thresholds], as a single group, "all".

        Args:
            ranks: from 0; -1 if no proposal finds the object.
        """
        recall = cls(ks)
        recall.totals, recall.found = {}, {}
        recall._count("all", np.where(ranks < 0, NOT_FOUND, ranks).T)
        return recall

    def _no_counts(self) -> IntArray:
        return np.zeros((len(IOU_THRESHOLDS), self.ks[-1]), np.int64)

    def _count(self, name: str, ranks: IntArray) -> None:
        self.totals[name] = self.totals.get(name, 0) + ranks.shape[1]
        counts = self.found.setdefault(name, self._no_counts())
        thresholds, objects = np.nonzero(ranks != NOT_FOUND)
        np.add.at(counts, (thresholds, ranks[thresholds, objects]), 1)


def average_recall(images: Iterable[tuple[Shapes, Shapes]], ks: Sequence[int] = KS) -> dict[str, float]:
    """AR@K over images, each given as (proposals, best-ranked first; objects).

    Returns:
        See :meth:`AverageRecall.metrics`.
    """
    recall = AverageRecall(ks)
    for proposals, objects in images:
        recall.add(proposals, objects)
    return recall.metrics()


def ranking(scores: Sequence[float | None] | FloatArray, k: int) -> IntArray:
    """The indices of the `k` highest scores, best first; equal scores keep their order, as in COCOeval.

    Raises:
        ValueError: a score is missing or NaN, so it can't be ranked.
    """
    known = np.array([np.nan if score is None else score for score in scores], float)
    if bad := int(np.isnan(known).sum()):
        raise ArgumentError(f"{bad} of {len(known)} scores are missing or NaN")
    return np.argsort(-known, kind="stable")[:k]


def areas_of(shapes: Shapes) -> FloatArray:
    if isinstance(shapes, np.ndarray):
        return shapes[:, 2] * shapes[:, 3]
    # One at a time: pycocotools' `area` of 256 or more masks fails with NumPy 2.
    return np.array([mask_utils.area(rle) for rle in shapes], float)


def ious_of(proposals: Shapes, objects: Shapes, crowd: MaskArray) -> FloatArray:
    if not len(proposals) or not len(objects):
        return np.zeros((len(proposals), len(objects)))
    pair = (each if isinstance(each, np.ndarray) else list(each) for each in (proposals, objects))
    ious: FloatArray = mask_utils.iou(*pair, crowd.astype(int).tolist())
    return ious


def _first_ranks(ious: FloatArray) -> IntArray:
    """int64 [thresholds, objects]: the rank of the first proposal that overlaps the object enough, or `NOT_FOUND`."""
    best_so_far = np.maximum.accumulate(ious)
    # As in COCOeval, for a threshold of 1.
    thresholds = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)
    ranks = (best_so_far < thresholds[:, None, None]).sum(1)
    return np.where(ranks < len(ious), ranks, NOT_FOUND)


def _settle(first: IntArray, ious: FloatArray) -> IntArray:
    """COCO's greedy matching: each proposal, best-ranked first, takes the free object with which its IoU is highest.

    If each object has a different first proposal (the best-ranked one that overlaps it enough), these pairs are the
    matching, because all other objects that a proposal overlaps are already taken. A loop is needed only where several
    objects have the same first proposal: starting with the best-ranked such proposal, one object wins, and the others
    move on to their next overlapping proposal.

    Args:
        first: [thresholds, objects], the result of :func:`_first_ranks`.
        ious: [proposals, objects].

    Returns:
        int64 [thresholds, objects]: the rank of the proposal that finds the object, or `NOT_FOUND`.
    """
    ranks: IntArray = first.copy()
    for number in np.flatnonzero(_repeated(ranks).any(1)):
        row, threshold = ranks[number], IOU_THRESHOLDS[number]
        while (repeated := _repeated(row)).any():
            rank = np.sort(row)[1:][repeated][0]
            rivals = np.flatnonzero(row == rank)
            # Among equal IoUs, COCO keeps the last object.
            winner = rivals[::-1][ious[rank, rivals[::-1]].argmax()]
            for loser in rivals[rivals != winner]:
                later = np.flatnonzero(ious[rank + 1 :, loser] >= threshold)
                row[loser] = rank + 1 + later[0] if len(later) else NOT_FOUND
    return ranks


def _repeated(ranks: IntArray) -> MaskArray:
    """bool: for each sorted rank (along the last axis) except the first, whether it equals the previous one."""
    ranks = np.sort(ranks)
    repeated: MaskArray = (ranks[..., 1:] == ranks[..., :-1]) & (ranks[..., 1:] != NOT_FOUND)
    return repeated
