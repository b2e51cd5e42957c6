"""Results of an evaluation of proposals: metrics, tables, plots, and views of missed objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import fiftyone.utils.eval.detection as foud
import numpy as np
from bson import ObjectId
from fiftyone import ViewField as F

from ..errors import ArgumentError
from ..fiftyone_internals import (
    is_generated,
    label_root,
    restored_view,
    root_dataset,
    serialized_view,
    view_stages,
)
from ..labels.fields import with_lists
from ..modeling.arrays import AnyArray, IntArray, MaskArray
from .average_recall import IOU_THRESHOLDS, AverageRecall
from .figures import Line, recall_by_iou, recall_by_k

if TYPE_CHECKING:
    import fiftyone as fo
    import pandas as pd
    import plotly.graph_objects as go
    from fiftyone.core.collections import SampleCollection
    from numpy.typing import ArrayLike

    from ..labels.documents import Skipped
    from .measuring import Match
    from .proposals import ProposalEvaluationConfig


class FoundDifference(NamedTuple):
    """Views of the objects that only one of two runs finds.

    Attributes:
        gained: objects found by this run but not by the other.
        lost: objects found by the other run but not by this one.
    """

    gained: fo.DatasetView
    lost: fo.DatasetView


class ProposalResults(foud.DetectionResults):
    """AR@K, and which proposal finds which object.

    Attributes:
        recall: the counts of :class:`~fiftyone_mobilesamv2.evaluation.average_recall.AverageRecall`, as JSON;
            `AverageRecall.from_dict` restores them, for example to merge them with those of other datasets.
        ranks: int64 [objects, thresholds]: the rank, from 0, of the proposal that finds the object; -1 if none does.
        skipped: id, filepath and cause of each image that couldn't be measured.
    """

    def __init__(
        self,
        samples: SampleCollection,
        config: ProposalEvaluationConfig,
        eval_key: str | None,
        matches: Sequence[Match],
        recall: dict[str, Any],
        ranks: ArrayLike,
        skipped: list[Skipped],
        **kwargs: Any,
    ) -> None:
        super().__init__(samples, config, eval_key, matches, **kwargs)
        self.recall = recall
        self.ranks = np.array(ranks, np.int64).reshape(-1, len(IOU_THRESHOLDS))
        self.skipped = skipped

    def __str__(self) -> str:
        """The table of AR@K; FiftyOne would print everything that is stored."""
        return str(self.report())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.key!r} of {len(self.ytrue):,} objects>"

    @property
    def gt_field(self) -> str:
        """The field of the objects, by its current name. Raises ValueError if it is gone or can't be recognized."""
        return self.field_in(self.samples, "gt_field")

    def field_in(self, samples: SampleCollection, role: str) -> str:
        """The current name of the "gt_field" or "pred_field". Raises ValueError likewise."""
        all_ids = (self._ytrue_ids_orig, self._ypred_ids_orig) if self.has_subset else (self.ytrue_ids, self.ypred_ids)
        name: str = self.backend.current_field(samples, role, all_ids[role == "pred_field"])
        return name

    def _filterable_samples(self) -> SampleCollection:
        """`samples`. Raises ArgumentError if they are a view that needs a field that is gone."""
        if view_stages(self.samples) and not is_generated(self.samples):
            try:
                restored_view(root_dataset(self.samples), serialized_view(self.samples))
            except ValueError as error:  # FiftyOne would not complain, and filter labels that do not exist
                raise ArgumentError(
                    f"The view of evaluation '{self.key}' needs a field that was renamed or deleted: {error}. Rename "
                    "the field back, or evaluate again."
                ) from error
        return self.samples

    def use_subset(self, subset_def: object) -> ProposalResults:
        for role in ("gt_field", "pred_field"):  # which FiftyOne reads
            setattr(self.config, role, self.field_in(self.samples, role))
        results: ProposalResults = super().use_subset(subset_def)
        return results

    @property
    def average_recall(self) -> AverageRecall:
        """The counts over all images; within `use_subset`, of the subset's objects, as matched in the whole run."""
        if self.has_subset:
            return AverageRecall.of_ranks(self.config.ks, self._ranks)
        return AverageRecall.from_dict(self.recall)

    @property
    def _ranks(self) -> IntArray:
        """The ranks of the objects in `ytrue`."""
        return self.ranks[np.isin(self._ytrue_ids_orig, self.ytrue_ids)] if self.has_subset else self.ranks

    def metrics(
        self, classes: Sequence[str] | None = None, average: str | None = "micro", beta: float = 1.0
    ) -> dict[str, float]:
        """AR@K by group of objects, e.g. `{"AR@10", "AR", "ARs@10", ...}`; NaN for a group without objects.

        "AR" is the mean over K. "recall" is the share of objects found at IoU 0.5 within the largest K, "support" the
        number of objects.

        Args:
            classes: count only objects of these classes, as a single group ("AR@10"); by default, all objects count,
                also grouped by size. Matches are those among the objects of all classes, as within `use_subset`.
            average, beta: ignored; FiftyOne passes them to every method. Each object counts the same, and proposals
                have no precision, so there is no F-score.
        """
        chosen = self._of_classes(classes)
        if classes is None:
            custom = {} if self.has_subset else self._get_custom_metrics()
            recall = self.average_recall
        else:
            custom, recall = {}, AverageRecall.of_ranks(self.config.ks, self._ranks[chosen])
        totals = {"recall": _mean((self.ytrue == self.ypred)[chosen]), "support": int(chosen.sum())}
        return custom | recall.metrics() | totals

    def print_metrics(
        self, classes: Sequence[str] | None = None, average: str | None = "micro", beta: float = 1.0, digits: int = 3
    ) -> None:
        """Prints :meth:`metrics`."""
        self._print_metrics(self.metrics(classes, average, beta), digits=digits)

    def mAR(self, classes: Sequence[str] | None = None) -> float:
        """AR at the largest K, shown by the App as mAR."""
        return self.metrics(classes)[f"AR@{self.config.ks[-1]}"]

    def _of_classes(self, classes: Sequence[str] | None) -> MaskArray:
        """bool, for each object in `ytrue`."""
        return np.ones(len(self.ytrue), bool) if classes is None else np.isin(self.ytrue, list(classes))

    def report(self, classes: Sequence[str] | None = None) -> Report:
        """The table of AR@K, and for each ground truth class the share of objects found at IoU 0.5."""
        found = self.ytrue == self.ypred
        by_class = {}
        for name in self._parse_classes(classes):
            members = self.ytrue == name
            # Proposals have no class, so there is no precision, but the App's panel fails without the key.
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
        """A row for each group of objects, K and IoU threshold: "group", "k", "iou", "recall", "objects"."""
        import pandas as pd

        recall = self.average_recall
        table: pd.DataFrame = pd.DataFrame(
            [
                {"group": group, "k": k, "iou": iou, "recall": share, "objects": total}
                for group, total in recall.totals.items()
                for k in recall.ks
                for iou, share in zip(IOU_THRESHOLDS.round(2), recall.recalls(k, group))
            ]
        )
        return table

    def plot(self, *others: ProposalResults) -> go.Figure:
        """Plots AR against K, and recall against IoU at the largest K: by group of objects, or for several runs."""
        from plotly.subplots import make_subplots

        if others:
            runs = (self, *others)
            lines = [Line(results.key or results.config.pred_field, results.average_recall) for results in runs]
        else:
            recall = self.average_recall
            lines = [Line(f"{group} ({total})", recall, group) for group, total in recall.totals.items() if total]
        k = min((line.recall.ks[-1] for line in lines), default=self.config.ks[-1])
        figure = make_subplots(1, 2, subplot_titles=("AR by number of proposals K", f"Recall by IoU, K={k}"))
        for column, part in enumerate((recall_by_k(lines), recall_by_iou(lines, k)), 1):
            for number, trace in enumerate(part.data):
                shown = {"legendgroup": str(number), "showlegend": column == 1}  # once for both
                figure.add_trace(trace | shown, 1, column)
        figure.update_xaxes(type="log", title_text="K", row=1, col=1)
        figure.update_xaxes(title_text="IoU threshold", row=1, col=2)
        figure.update_yaxes(range=[0, 1])
        return figure

    def missed(self, iou: float = 0.5, k: int | None = None) -> fo.DatasetView:
        """The objects that none of the `k` best-ranked proposals of their image finds at this IoU.

        Args:
            iou: 0.5, 0.55, ... or 0.95.
            k: default: the largest K of the run.
        """
        missed, samples, gt_field = ~self._found(iou, k), self._filterable_samples(), self.gt_field
        states, ranks = (f"{self.key}{end}" for end in ("", "_rank"))
        has_attributes = self.config.stored_as == self.key  # otherwise, storing or renaming them was interrupted
        has_attributes &= samples.has_field(f"{label_root(samples, gt_field)[0]}.{ranks}")
        if self.has_subset or _threshold_index(iou) or not has_attributes:
            return self._objects(missed)
        # The labels' attributes contain the same information, and MongoDB compares them faster than a long list of ids.
        not_found = F(states) == "fn"
        if k is not None:
            not_found |= F(ranks) > k
        return with_lists(samples, gt_field).filter_labels(gt_field, not_found)

    def compare(self, other: ProposalResults, iou: float = 0.5, k: int | None = None) -> FoundDifference:
        """The objects that this run finds with an image's `k` best-ranked proposals but `other` doesn't, and vice
        versa.

        Raises:
            ValueError: the runs don't have the same ground truth.
        """
        if other.gt_field != self.gt_field or set(other.ytrue_ids) != set(self.ytrue_ids):
            raise ArgumentError(
                f"Runs '{self.key}' and '{other.key}' have different ground truth objects "
                f"({len(self.ytrue_ids)} of '{self.gt_field}', {len(other.ytrue_ids)} of "
                f"'{other.gt_field}'): evaluate both on the same view."
            )
        found_by_other = set(other.ytrue_ids[other._found(iou, k)])
        by_this, by_other = self._found(iou, k), np.array([id in found_by_other for id in self.ytrue_ids], bool)
        return FoundDifference(gained=self._objects(by_this & ~by_other), lost=self._objects(by_other & ~by_this))

    def _found(self, iou: float, k: int | None) -> MaskArray:
        """bool, for each object in `ytrue`."""
        max_k = self.config.ks[-1]
        k = max_k if k is None else k
        if not 1 <= k <= max_k:
            raise ArgumentError(
                f"k={k} is not between 1 and {max_k}, the number of best-ranked proposals that were matched."
            )
        ranks = self._ranks[:, _threshold_index(iou)]
        return (ranks >= 0) & (ranks < k)

    def _objects(self, chosen: MaskArray) -> fo.DatasetView:
        ids = [ObjectId(id) for id in self.ytrue_ids[chosen]]
        samples = with_lists(self._filterable_samples(), self.gt_field)
        return samples.filter_labels(self.gt_field, F("_id").is_in(ids))

    @classmethod
    def _from_dict(
        cls,
        d: dict[str, Any],
        samples: SampleCollection,
        config: ProposalEvaluationConfig,
        eval_key: str,
        **kwargs: Any,
    ) -> ProposalResults:
        stored = {name: d[name] for name in ("recall", "ranks", "skipped")}
        results: ProposalResults = super()._from_dict(d, samples, config, eval_key, **stored, **kwargs)
        return results


class Report(dict[str, dict[str, float | None]]):
    """`{"precision": None, "recall", "support"}` by class, as in FiftyOne's reports. Prints as the table of AR@K.

    Attributes:
        table: a pandas DataFrame with a row for each K, one for their mean and one for the number of objects, and a
            column for each group of objects.
    """

    def __init__(self, by_class: dict[str, dict[str, float | None]], recall: AverageRecall) -> None:
        import pandas as pd

        super().__init__(by_class)
        columns = {}
        for group, total in recall.totals.items():
            rows = {f"AR@{k}": float(recall.recalls(k, group).mean()) for k in recall.ks}
            columns[group] = {**rows, "AR": _mean(list(rows.values())), "objects": total}
        self.table = pd.DataFrame(columns)

    def rounded(self, digits: int = 3) -> pd.DataFrame:
        """The table as text."""
        text: pd.DataFrame = self.table.map(lambda value: f"{value:.{digits}f}")
        text.loc["objects"] = [f"{number:.0f}" for number in self.table.loc["objects"]]
        return text

    def __repr__(self) -> str:
        return self.rounded().to_string()

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return self.rounded().to_html()


def comparison_table(runs: Mapping[str, ProposalResults]) -> pd.DataFrame:
    """The metrics of several runs, for example with two promptings, encoders or thresholds; a row for each run.

    Example:
        `comparison_table({key: dataset.load_evaluation_results(key) for key in ("grid", "object_aware")})`
    """
    import pandas as pd

    table: pd.DataFrame = pd.DataFrame({name: results.average_recall.metrics() for name, results in runs.items()}).T
    return table


def _threshold_index(iou: float) -> int:
    """The index of `iou` in `IOU_THRESHOLDS`. Raises ValueError if it is not one of them."""
    index = int(np.abs(IOU_THRESHOLDS - iou).argmin())
    if abs(IOU_THRESHOLDS[index] - iou) > 1e-6:
        raise ArgumentError(f"iou={iou}: one of {', '.join(f'{t:.2f}' for t in IOU_THRESHOLDS)} was expected.")
    return index


def _mean(values: Sequence[float] | AnyArray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
