"""Average recall of class-agnostic proposals, by COCO's rules (`COCOeval` with `useCats=0`): numpy and pycocotools."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from pycocotools import mask as mask_utils

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # COCO's
KS = (10, 100, 1000)


def match_ranks(ious: np.ndarray) -> np.ndarray:
    """COCO's greedy matching: each proposal, best-ranked first, takes the free object that it overlaps most.

    A match depends on better-ranked proposals only, so one pass tells the recall at every K.

    Args:
        ious: [proposals, objects], proposals in order of rank.

    Returns:
        int [thresholds, objects]: the rank (from 0) of the proposal that finds the object; as many as there are
        proposals where none does.
    """
    count, objects = ious.shape
    ranks = np.full((len(IOU_THRESHOLDS), objects), count)
    for t, threshold in enumerate(IOU_THRESHOLDS):
        free = np.ones(objects, bool)
        for rank in np.flatnonzero((ious >= threshold).any(1)):
            overlaps = np.where(free, ious[rank], -1.0)
            # Among equals COCO keeps the last.
            best = objects - 1 - int(overlaps[::-1].argmax())
            if overlaps[best] >= threshold:
                free[best] = False
                ranks[t, best] = rank
    return ranks


def average_recall(images: Iterable[tuple[Sequence[dict], Sequence[dict]]], ks: Sequence[int] = KS) -> dict[str, float]:
    """AR@K: the share of objects that the K best-ranked proposals of their image find, averaged over IoU thresholds.

    Args:
        images: for each image its proposals, best-ranked first, and its objects, as COCO RLE.
        ks: how many proposals of an image count.

    Returns:
        {"AR@10": ..., ...}; NaN where there are no objects.
    """
    found = np.zeros((len(ks), len(IOU_THRESHOLDS)))
    total = 0
    for proposals, objects in images:
        total += len(objects)
        if not proposals or not objects:
            continue
        proposals = proposals[: max(ks)]
        ranks = match_ranks(mask_utils.iou(list(proposals), list(objects), [0] * len(objects)))
        found += [((ranks < k) & (ranks < len(proposals))).sum(1) for k in ks]
    return {f"AR@{k}": float(found[i].mean() / total) if total else float("nan") for i, k in enumerate(ks)}
