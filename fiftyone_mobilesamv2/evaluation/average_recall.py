"""Average recall of class-agnostic proposals, by COCO's rules (`COCOeval` with `useCats=0`): numpy and pycocotools.

A match depends on better-ranked proposals only, so one pass over an image tells its recall at every K. And an object
that COCO ignores (a crowd region, one outside the range of areas) never takes a proposal from one that counts, so each
group of objects is matched as if its objects were the only ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from ..errors import ArgumentError
from ..modeling.arrays import FloatArray, IntArray, MaskArray
from ..modeling.rle import RLE

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # COCO's
KS = (10, 100, 1000)
MAX_K = 100_000

# pixels; ends belong to both neighbours, as in COCOeval
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

NOT_FOUND = np.iinfo(np.int32).max  # a rank below no K

# [N, 4] boxes as x, y, width, height in pixels, or N masks of one image as COCO RLE
Shapes = FloatArray | Sequence[RLE]


@dataclass(frozen=True)
class Matches:
    """What the proposals of one image found.

    Attributes:
        ious: float64 [proposals, objects], proposals in order of rank; of crowds the share of the proposal inside.
        ranks: int64 [thresholds, objects]: the rank, from 0, of the proposal that finds the object at each of
            `IOU_THRESHOLDS`; `NOT_FOUND` where none does, and for crowds.
        unmatched: bool [proposals]: finds no object at IoU 0.5 and does not lie on a crowd.
    """

    ious: FloatArray
    ranks: IntArray
    unmatched: MaskArray

    @property
    def best_ious(self) -> FloatArray:
        """float64 [objects]: the highest IoU of each with any proposal; 0 without proposals."""
        best: FloatArray = self.ious.max(0, initial=0.0)
        return best


class AverageRecall:
    """Counts over images from which AR@K follows for every K up to the largest of `ks`.

    It holds as much after a million images as after one, and sums of parts are exact in any grouping:
    `AverageRecall(ks) + ...` of shards equals one over all images.

    Attributes:
        ks: how many proposals of an image count, ascending.
        images: how many were added.
        totals: by group of objects, how many there are.
        found: by group, int64 [thresholds, max(ks)]: how many objects the proposals of each rank found.
    """

    def __init__(self, ks: Iterable[int] = KS) -> None:
        """Raises ValueError if `ks` are not whole numbers from 1 to 100,000: there is a count for each rank."""
        ks = tuple(ks)
        if not ks or any(isinstance(k, bool) or not isinstance(k, Integral) or not 1 <= k <= MAX_K for k in ks):
            raise ArgumentError(f"ks must be whole numbers from 1 to {MAX_K:,}, such as {KS}; got {ks}.")
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
        """Matches an image's proposals to its objects, and counts.

        Args:
            proposals: best-ranked first; those beyond the largest K are left out.
            objects: the ground truth; masks if proposals are masks, boxes if they are boxes.
            is_crowd: of each object; such a region is ignored, as COCO does. Default: none is.
            areas: of each object, in pixels; default: what its mask or box covers.
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
            raise ArgumentError(f"Parts measured with ks={self.ks} and ks={other.ks} can't be merged.")
        merged = AverageRecall(self.ks)
        merged.images = self.images + other.images
        for part in (self, other):
            for name, total in part.totals.items():
                merged.totals[name] = merged.totals.get(name, 0) + total
                merged.found[name] = merged.found.get(name, self._no_counts()) + part.found[name]
        return merged

    def recalls(self, k: int, group: str = "all") -> FloatArray:
        """float64 [thresholds]: the share of the group's objects found within rank `k`; NaN where there are none."""
        if not 1 <= k <= self.ks[-1]:
            raise ArgumentError(f"The {self.ks[-1]} best-ranked proposals were matched; K={k} is not among them.")
        found = self.found[group][:, :k].sum(1)
        return found / self.totals[group] if self.totals[group] else np.full(len(found), np.nan)

    def curve(self, group: str = "all") -> FloatArray:
        """float64 [max(ks)]: AR@1, AR@2, ... of the group."""
        found = self.found[group].cumsum(1).mean(0)
        return found / self.totals[group] if self.totals[group] else np.full(len(found), np.nan)

    def metrics(self) -> dict[str, float]:
        """AR@K of every group and K, and their mean over K: `{"AR@10": ..., "AR": ..., "ARs@10": ...}`.

        "AR" alone is what MobileSAMv2's tables call the average. NaN where a group has no objects.
        """
        metrics: dict[str, float] = {}
        for group in self.totals:
            values = {f"{METRIC_NAMES[group]}@{k}": float(self.recalls(k, group).mean()) for k in self.ks}
            metrics |= values | {METRIC_NAMES[group]: float(np.mean(list(values.values())))}
        return metrics

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
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
        """That of objects whose ranks, [objects, thresholds], are known: one group, "all".

        Args:
            ranks: from 0; -1 where no proposal finds the object.
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
    """AR@K over images, each given by its proposals, best-ranked first, and its objects.

    Returns:
        see :meth:`AverageRecall.metrics`.
    """
    recall = AverageRecall(ks)
    for proposals, objects in images:
        recall.add(proposals, objects)
    return recall.metrics()


def ranking(scores: Sequence[float | None] | FloatArray, k: int) -> IntArray:
    """The indices of the `k` highest scores, best first; equal ones keep their order, as in COCOeval.

    Raises:
        ValueError: a score is missing or NaN: it has no place in a ranking.
    """
    known = np.array([np.nan if score is None else score for score in scores], float)
    if bad := int(np.isnan(known).sum()):
        raise ArgumentError(f"{bad} of {len(known)} scores are missing or NaN")
    return np.argsort(-known, kind="stable")[:k]


def areas_of(shapes: Shapes) -> FloatArray:
    if isinstance(shapes, np.ndarray):
        return shapes[:, 2] * shapes[:, 3]
    # One at a time: pycocotools' `area` of 256 or more fails with numpy 2.
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
    # COCOeval's guard, for a threshold of 1.
    thresholds = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)
    ranks = (best_so_far < thresholds[:, None, None]).sum(1)
    return np.where(ranks < len(ious), ranks, NOT_FOUND)


def _settle(first: IntArray, ious: FloatArray) -> IntArray:
    """COCO's greedy matching: each proposal, best-ranked first, takes the free object that it overlaps most.

    While no two objects name the same proposal as their first, that is the matching: a proposal finds all objects that
    it overlaps taken, but for the one that named it. So only rivals need a loop: of those for the best-ranked contested
    proposal one wins, and the others turn to the next that overlaps them.

    Args:
        first: [thresholds, objects], from :func:`_first_ranks`.
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
            # Among equals COCO keeps the last.
            winner = rivals[::-1][ious[rank, rivals[::-1]].argmax()]
            for loser in rivals[rivals != winner]:
                later = np.flatnonzero(ious[rank + 1 :, loser] >= threshold)
                row[loser] = rank + 1 + later[0] if len(later) else NOT_FOUND
    return ranks


def _repeated(ranks: IntArray) -> MaskArray:
    """bool: of each rank but the first, in ascending order along the last axis, whether it is the one before it."""
    ranks = np.sort(ranks)
    repeated: MaskArray = (ranks[..., 1:] == ranks[..., :-1]) & (ranks[..., 1:] != NOT_FOUND)
    return repeated
