"""The App's operators. Each is a form and a call into the layers below."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .app_work import CancelWork
from .compare_prompting import ComparePrompting
from .delete_masks import DeleteMasks
from .evaluate_proposals import EvaluateProposals
from .export_masks import ExportMasks
from .find_duplicates import FindDuplicates
from .find_unlabeled_objects import FindUnlabeledObjects
from .image_coverage import ImageCoverage
from .manage_models import ManageModels
from .promote_to_labels import PromoteToLabels
from .repair_dataset import RepairDataset
from .segment_anything import SegmentAnything
from .segment_everything import SegmentEverything
from .train_on_labels import TrainOnLabels

if TYPE_CHECKING:
    from fiftyone.plugins.context import PluginContext

OPERATORS = (
    SegmentEverything,
    SegmentAnything,
    EvaluateProposals,
    ComparePrompting,
    FindUnlabeledObjects,
    FindDuplicates,
    PromoteToLabels,
    TrainOnLabels,
    ImageCoverage,
    ExportMasks,
    ManageModels,
    DeleteMasks,
    RepairDataset,
    CancelWork,
)


def register(plugin: PluginContext) -> None:
    """Registers all operators; FiftyOne uses the ones that fiftyone.yml lists."""
    for operator in OPERATORS:
        plugin.register(operator)
