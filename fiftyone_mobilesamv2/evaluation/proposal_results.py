"""What an evaluation of proposals found: figures, tables, plots, and views of what was missed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import fiftyone.utils.eval.detection as foud
import numpy as np
from bson import ObjectId
from fiftyone import ViewField as F

from ..errors import ArgumentError
from ..fiftyone_internals import label_root
from .average_recall import IOU_THRESHOLDS, AverageRecall

if TYPE_CHECKING:
    import fiftyone as fo
    import pandas as pd
    import plotly.graph_objects as go

_COLORS = ("#ff6d04", "#4263eb", "#2b8a3e", "#c2255c", "#7048e8", "#0b7285", "#5c3d2e")


class Comparison(NamedTuple):
    """Views of the objects that one of two runs finds and the other doesn't.

    Attributes:
        gained: found by this run, not by the other.
        lost: found by the other, not by this.
    """

    gained: fo.DatasetView
    lost: fo.DatasetView


class ProposalResults(foud.DetectionResults):
    """AR@K, and which objects were found by which proposal.

    Attributes:
        recall: counts of :class:`~fiftyone_mobilesamv2.evaluation.average_recall.AverageRecall`, as JSON; with
            `AverageRecall.from_dict` they merge with those of other datasets.
        ranks: int64 [objects, thresholds]: from 0, the rank of the proposal that finds the object; -1 where none does.
        skipped: of each image that couldn't be measured, its id, filepath and cause.
    """

    def __init__(self, samples, config, eval_key, matches, recall, ranks, skipped, **kwargs) -> None:
        super().__init__(samples, config, eval_key, matches, **kwargs)
        self.recall = recall
        self.ranks = np.array(ranks, np.int64).reshape(-1, len(IOU_THRESHOLDS))
        self.skipped = skipped

    @property
    def average_recall(self) -> AverageRecall:
        """The counts over all images; within `use_subset`, those of the subset's objects, matched as in the whole."""
        if self.has_subset:
            return AverageRecall.of_ranks(self.config.ks, self._ranks)
        return AverageRecall.from_dict(self.recall)

    @property
    def _ranks(self) -> np.ndarray:
        """Of the objects in `ytrue`."""
        return self.ranks[np.isin(self._ytrue_ids_orig, self.ytrue_ids)] if self.has_subset else self.ranks

    def metrics(self) -> dict[str, float]:
        """AR@K by group of objects, e.g. `{"AR@10", "AR", "ARs@10", ...}`; NaN for a group without objects.

        "AR" is the mean over K. "recall" is the share of objects found at IoU 0.5 within the largest K, "support" the
        number of objects.
        """
        custom = {} if self.has_subset else self._get_custom_metrics()
        found = {"recall": _mean(self.ytrue == self.ypred), "support": len(self.ytrue)}
        return custom | self.average_recall.metrics() | found

    def print_metrics(self, digits: int = 3) -> None:
        """Prints :meth:`metrics`."""
        self._print_metrics(self.metrics(), digits=digits)

    def mAR(self) -> float:
        """AR at the largest K: the App's row of that name."""
        return self.metrics()[f"AR@{self.config.ks[-1]}"]

    def report(self, classes: Sequence[str] | None = None) -> Report:
        """The table of AR@K; of each class (of the ground truth), the share that was found at IoU 0.5."""
        found = self.ytrue == self.ypred
        by_class = {}
        for name in self._parse_classes(classes):
            members = self.ytrue == name
            # Proposals have no class. The App's panel breaks down where precision isn't mentioned, though.
            by_class[str(name)] = {
                "precision": None,
                "recall": _mean(found[members]) if members.any() else None,
                "support": int(members.sum()),
            }
        return Report(by_class, self.average_recall)

    def print_report(self, classes: Sequence[str] | None = None, digits: int = 3) -> None:
        """Prints the table of :meth:`report`."""
        print(self.report(classes).rounded(digits).to_string())

    def to_pandas(self) -> pd.DataFrame:
        """One row for each group of objects, K and IoU threshold: "group", "k", "iou", "recall", "objects"."""
        import pandas as pd

        recall = self.average_recall
        return pd.DataFrame(
            [
                {"group": group, "k": k, "iou": iou, "recall": share, "objects": total}
                for group, total in recall.totals.items()
                for k in recall.ks
                for iou, share in zip(IOU_THRESHOLDS.round(2), recall.recalls(k, group))
            ]
        )

    def plot(self, *others: ProposalResults) -> go.Figure:
        """AR against K, and recall against IoU at the largest K: by group of objects, or of this and other runs."""
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots

        if others:
            runs = (self, *others)
            lines = [(results.key or results.config.pred_field, results.average_recall, "all") for results in runs]
        else:
            recall = self.average_recall
            lines = [(f"{group} ({total})", recall, group) for group, total in recall.totals.items() if total]
        k = min((recall.ks[-1] for _, recall, _ in lines), default=self.config.ks[-1])
        figure = make_subplots(1, 2, subplot_titles=("AR by number of proposals K", f"Recall by IoU, K={k}"))
        for number, (name, recall, group) in enumerate(lines):
            curve = recall.curve(group)
            style = {
                "name": name,
                "legendgroup": str(number),
                "mode": "lines",
                "line_color": _COLORS[number % len(_COLORS)],
            }
            figure.add_trace(go.Scatter(x=np.arange(1, len(curve) + 1), y=curve, **style), 1, 1)
            figure.add_trace(
                go.Scatter(x=IOU_THRESHOLDS.round(2), y=recall.recalls(k, group), showlegend=False, **style), 1, 2
            )
        figure.update_xaxes(type="log", title_text="K", row=1, col=1)
        figure.update_xaxes(title_text="IoU threshold", row=1, col=2)
        figure.update_yaxes(range=[0, 1])
        return figure

    def missed(self, iou: float = 0.5, k: int | None = None) -> fo.DatasetView:
        """The objects that none of the `k` best-ranked proposals of their image finds at that IoU.

        Args:
            iou: 0.5, 0.55, ... or 0.95.
            k: default: the largest K of the run.
        """
        missed = ~self._found(iou, k)
        states, ranks = (f"{self.config.stored_as}{end}" for end in ("", "_rank"))
        root, _ = label_root(self.samples, self.config.gt_field)
        if self.has_subset or _threshold_index(iou) or not self.samples.has_field(f"{root}.{ranks}"):
            return self._objects(missed)
        # What is noted on the labels says the same, and MongoDB compares it faster than a long list of ids.
        not_found = F(states) == "fn"
        if k is not None:
            not_found |= F(ranks) > k
        return self.samples.filter_labels(self.config.gt_field, not_found)

    def compare(self, other: ProposalResults, iou: float = 0.5, k: int | None = None) -> Comparison:
        """What this run finds among the `k` best-ranked proposals of an image and `other` doesn't, and the reverse.

        Raises:
            ValueError: they don't measure against the same ground truth.
        """
        if other.config.gt_field != self.config.gt_field or set(other.ytrue_ids) != set(self.ytrue_ids):
            raise ArgumentError(
                f"Runs '{self.key}' and '{other.key}' measure against different objects "
                f"({len(self.ytrue_ids)} of '{self.config.gt_field}', {len(other.ytrue_ids)} of "
                f"'{other.config.gt_field}'): evaluate both on the same view."
            )
        found_by_other = set(other.ytrue_ids[other._found(iou, k)])
        here, there = self._found(iou, k), np.array([id in found_by_other for id in self.ytrue_ids], bool)
        return Comparison(gained=self._objects(here & ~there), lost=self._objects(there & ~here))

    def _found(self, iou: float, k: int | None) -> np.ndarray:
        """bool, of the objects in `ytrue`."""
        most = self.config.ks[-1]
        k = most if k is None else k
        if not 1 <= k <= most:
            raise ArgumentError(f"k={k}: the {most} best-ranked proposals of an image were matched.")
        ranks = self._ranks[:, _threshold_index(iou)]
        return (ranks >= 0) & (ranks < k)

    def _objects(self, chosen: np.ndarray) -> fo.DatasetView:
        ids = [ObjectId(id) for id in self.ytrue_ids[chosen]]
        return self.samples.filter_labels(self.config.gt_field, F("_id").is_in(ids))

    @classmethod
    def _from_dict(cls, d, samples, config, eval_key, **kwargs):
        stored = {name: d[name] for name in ("recall", "ranks", "skipped")}
        return super()._from_dict(d, samples, config, eval_key, **stored, **kwargs)


class Report(dict):
    """By class `{"precision": None, "recall", "support"}`, as in FiftyOne's reports; printed, the table of AR@K.

    Attributes:
        table: a pandas DataFrame: a row for each K, one for their mean and one for the number of objects; a column for
            each group of objects.
    """

    def __init__(self, by_class: dict[str, dict], recall: AverageRecall) -> None:
        import pandas as pd

        super().__init__(by_class)
        columns = {}
        for group, total in recall.totals.items():
            rows = {f"AR@{k}": float(recall.recalls(k, group).mean()) for k in recall.ks}
            columns[group] = {**rows, "AR": _mean(list(rows.values())), "objects": total}
        self.table = pd.DataFrame(columns)

    def rounded(self, digits: int = 3) -> pd.DataFrame:
        """The table as text."""
        text = self.table.map(lambda value: f"{value:.{digits}f}")
        text.loc["objects"] = [f"{number:.0f}" for number in self.table.loc["objects"]]
        return text

    def __repr__(self) -> str:
        return self.rounded().to_string()

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return self.rounded().to_html()


def comparison_table(runs: Mapping[str, ProposalResults]) -> pd.DataFrame:
    """The figures of several runs, a row for each: two promptings, two encoders, two thresholds.

    Example:
        `comparison_table({key: dataset.load_evaluation_results(key) for key in ("grid", "object_aware")})`
    """
    import pandas as pd

    return pd.DataFrame({name: results.average_recall.metrics() for name, results in runs.items()}).T


def _threshold_index(iou: float) -> int:
    """The index of `iou` in `IOU_THRESHOLDS`. Raises ValueError if it is not one of them."""
    index = int(np.abs(IOU_THRESHOLDS - iou).argmin())
    if abs(IOU_THRESHOLDS[index] - iou) > 1e-6:
        raise ArgumentError(f"iou={iou}: one of {', '.join(f'{t:.2f}' for t in IOU_THRESHOLDS)} was expected.")
    return index


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
