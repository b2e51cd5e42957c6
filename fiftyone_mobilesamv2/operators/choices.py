"""Inputs and texts that several operators share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import fiftyone as fo
import fiftyone.core.stages as fosg
from bson import ObjectId
from fiftyone import ViewField as F

from ..errors import FormError, with_file
from ..evaluation.ranking import RANKINGS
from ..fiftyone_internals import FRAMES_PREFIX, all_view_stages, is_frame_field, root_dataset
from ..labels.fields import GROUND_TRUTH_FIELD, SHAPE_TYPES, have_masks, label_fields
from .app_work import Button, Outcome, Progress
from .form import Form, code, count

if TYPE_CHECKING:
    from fiftyone.core.collections import SampleCollection

    from ..labels.documents import Skipped
    from ..runs.record import SegmentationRun
    from ..zoo.config import MobileSAMv2ModelConfig


def model_choice(form: Form, label: str = "Model", description: str | None = None) -> str:
    """The model. Each choice has a hint and says how much must be downloaded, if anything."""
    from ..modeling.checkpoints.catalog import DEMO_MODEL, MODELS
    from ..modeling.checkpoints.files import is_complete

    # The default suits photos and, if possible, needs no download, so that it works at once.
    local = (name for name in MODELS if is_complete(name) and name != DEMO_MODEL)
    default = next(local, "mobilesamv2-tinyvit-torch")
    name = form.choice("model", model_texts(), default, label, description)
    if name == DEMO_MODEL:
        form.warn("The demo model was trained only on synthetic scenes: don't expect good masks on photos.")
    download_note(form, name)
    return name


def model_texts() -> dict[str, str]:
    """Model -> the text of its choice."""
    from ..modeling.checkpoints.catalog import MODELS
    from ..modeling.checkpoints.files import is_complete
    from ..modeling.checkpoints.lookup import models

    missing, choices = _megabytes_to_download(), {}
    for name, entry in models().items():
        notes = [entry.hint]
        if missing[name]:
            notes.append(f"{missing[name]:,} MB to download")
        elif name in MODELS:
            notes.append("downloaded" if is_complete(name) else "not part of this installation")
        choices[name] = f"{name} ({'; '.join(notes)})"
    return choices


def download_note(form: Form, name: str) -> None:
    """Says what must be downloaded for a model, if anything."""
    from ..modeling.checkpoints.files import weights_dir

    if megabytes := _megabytes_to_download().get(name):
        form.note(f"First, {megabytes:,} MB will be downloaded to {weights_dir()} and verified.")


def _megabytes_to_download() -> dict[str, int]:
    from ..modeling.checkpoints.files import megabytes_to_download
    from ..modeling.checkpoints.lookup import models

    return {name: megabytes_to_download(name) for name in models()}


def runtime_choices(form: Form) -> None:
    """The device and the precision of the model."""
    from ..zoo.config import PARAMETERS

    device_choice(form)
    form.parameter(PARAMETERS["dtype"])


def device_choice(form: Form) -> None:
    """The device of the model."""
    from ..modeling.devices import available_devices
    from ..zoo.config import PARAMETERS

    devices = available_devices()
    names = {"cuda": "GPU (cuda)", "mps": "GPU (mps)", "cpu": "CPU"}
    title = PARAMETERS["device"].title
    form.choice("device", {device: names[device] for device in devices}, devices[0], title)


def storage_choice(form: Form) -> None:
    """The parameter `masks_on_disk`, worded as a choice of where masks go."""
    choices = {"database": "In the database; masks that don't fit go to disk", "disk": "On disk, as PNG files"}
    form.choice("storage", choices, "database", "Where masks are stored", radio=True)


def advanced_parameters(form: Form, prompting: str) -> None:
    """The parameters declared as advanced, if the user asks for them or has set one of them."""
    from ..zoo.config import PARAMETERS

    advanced = [p for p in PARAMETERS.values() if p.is_advanced and p.applies_to in (None, prompting)]
    is_given = any(form.ctx.params.get(p.name) not in (None, "") for p in advanced)
    if form.switch("advanced", is_given, "Advanced settings"):
        for parameter in advanced:
            form.parameter(parameter)


def model_config(form: Form) -> MobileSAMv2ModelConfig:
    """The configuration from the values of a form with the inputs above."""
    from ..zoo.config import PARAMETERS, MobileSAMv2ModelConfig

    values = form.values
    given = {"name": values["model"], "masks_on_disk": values["storage"] == "disk"}
    return MobileSAMv2ModelConfig(given | {name: values[name] for name in PARAMETERS if name in values})


def fetch_with_progress(name: str, progress: Progress) -> None:
    """Downloads the model's missing files."""
    from ..modeling.checkpoints.files import fetch_model

    def report(filename: str, done: int, total: int | None) -> None:
        size = f" of {total / 1e6:,.0f}" if total else ""
        progress.tell(done / total if total else None, f"Downloading {filename}: {done / 1e6:,.0f}{size} MB")

    fetch_model(name, progress=report)


SHAPES = (fo.Detections, fo.Polylines)
_HIDING = (fosg.FilterLabels, fosg.SelectLabels, fosg.ExcludeLabels, fosg.LimitLabels)


def proposals_choice(form: Form, kinds: tuple[type, ...] = SHAPES) -> str:
    """The field of proposals. The default is a field that a recorded run has segmented, if possible."""
    from ..runs.record import segmented_fields

    fields = label_fields(form.samples, kinds)
    likely = [name for name in fields if name.endswith("segmentations")]
    likely += [name for name in fields if not name.endswith(GROUND_TRUTH_FIELD)]
    default = next((name for name in (*segmented_fields(form.samples), *likely) if name in fields), None)
    if default is None:
        raise FormError(f"{form.dataset.name} has no field of proposals yet. Run 'Segment everything' first.")
    return form.label_field("pred_field", kinds, "Proposals", "Masks from 'Segment everything'", default)


def ground_truth_choice(form: Form, pred_field: str, kinds: tuple[type, ...] = SHAPES) -> str:
    """The field of labels to compare the proposals with."""
    prefix = FRAMES_PREFIX if pred_field.startswith(FRAMES_PREFIX) else ""
    field = form.label_field("gt_field", kinds, "Ground truth", "The labels", prefix + GROUND_TRUTH_FIELD, pred_field)
    warn_of_hidden_labels(form, "compared")
    return field


def warn_of_hidden_labels(form: Form, participle: str) -> None:
    """Warns if the view may hide labels, which are then not `participle`."""
    stages = all_view_stages(form.samples.view())
    if any(isinstance(stage, _HIDING) for stage in stages):
        form.warn(f"The view may hide labels. Only visible labels are {participle}.")


def scheduling_note(form: Form, reason: str) -> None:
    """Suggests scheduling; `reason` is what takes long, such as "500 images take"."""
    form.note(
        f"{reason} a while, and the tab must stay open. "
        + (
            "Consider scheduling this for a 'fiftyone delegated launch' worker."
            if fo.config.allow_legacy_orchestrators
            else "To schedule it instead, start the App with FIFTYONE_ALLOW_LEGACY_ORCHESTRATORS=true and a 'fiftyone "
            "delegated launch' worker."
        )
    )


def use_masks_switch(form: Form, *field_names: str) -> bool:
    """Whether to compare masks. Fields without masks can only be compared by boxes."""
    known = label_fields(form.samples, SHAPE_TYPES)
    without = [name for name in field_names if name in known and not have_masks(form.samples, name)]
    use_masks = form.switch("use_masks", not without, "Compare masks", "Otherwise bounding boxes")
    if without:
        reason = f"Labels in {' and '.join(map(repr, without))} have no masks"
        if use_masks:
            form.problem(f"{reason}: compare boxes. 'Segment from prompts' turns boxes into masks.")
        else:
            form.note(f"{reason}: boxes are compared. 'Segment from prompts' turns boxes into masks.")
    return use_masks


def ranking_choice(form: Form, title: str, description: str) -> str:
    """The ranking of proposals or labels."""
    choices = {name: ranking.title for name, ranking in RANKINGS.items()}
    return form.choice("rank_by", choices, "confidence", title, description)


def field_of_selected(labels: Sequence[Mapping[str, Any]]) -> str:
    """The field of the labels selected in the App. Raises FormError if they are in several fields, or in none."""
    ids = [label.get(name) for label in labels for name in ("sample_id", "label_id")]
    if not all(map(ObjectId.is_valid, ids)) or not all(isinstance(label.get("field"), str) for label in labels):
        raise FormError("The selected labels no longer exist. Select others.")
    fields: list[str] = sorted({label["field"] for label in labels})
    if len(fields) > 1:
        raise FormError(
            f"The selected labels are in several fields: {', '.join(fields)}. Select labels in one field; you can hide "
            f"the others in the sidebar."
        )
    return fields[0]


def skipped_text(skipped: Sequence[Skipped]) -> list[str]:
    """The paragraph of a summary about skipped images; an empty list if none were skipped."""
    if not skipped:
        return []
    first = skipped[0]
    cause = with_file(first["filepath"], first["cause"])
    return [f"**{count(len(skipped), 'image')} skipped.** The first: {code(cause)}"]


def skipped_button(skipped: Sequence[Skipped]) -> list[Button]:
    """The button that shows the skipped samples; an empty list if none were skipped."""
    return samples_button(SKIPPED, [each["id"] for each in skipped])


def skipped_samples(samples: SampleCollection, field_name: str, skipped: Sequence[Skipped]) -> list[str]:
    """The ids of the samples that were skipped: of frames, those of their videos."""
    ids = [each["id"] for each in skipped]
    if ids and is_frame_field(samples, field_name):
        ids = samples.match_frames(F("_id").is_in(list(map(ObjectId, ids)))).values("id")
    return ids


SKIPPED = "Show skipped samples"
FAILED = "Show failed samples"
SHOW_SAMPLES = "@voxel51/operators/show_samples"


def samples_button(label: str, ids: Sequence[str]) -> list[Button]:
    """The button that shows these samples; an empty list without samples."""
    return [(label, SHOW_SAMPLES, {"samples": ids})] if ids else []


def detections_fields(samples: SampleCollection, prefix: str = "") -> list[str]:
    """The fields that masks can be stored in."""
    names = label_fields(root_dataset(samples), (fo.Detections,))
    return [name for name in names if name.startswith(prefix) and "." not in name.removeprefix(prefix)]


def segmentation_outcome(run: SegmentationRun, replaced: bool) -> Outcome:
    """The summary of a run of segment_everything or segment_anything."""
    lines = [
        f"**{count(run.objects, 'object')} in {count(run.images - run.num_failures, 'image')}**",
        f"Stored in {code(run.label_field)}, {run.images_per_second:.2g} images per second.",
    ]
    if run.cancelled:
        rest = "The other images keep their labels" if replaced else "Run it again to continue"
        lines.append(f"**Cancelled before the end.** Everything stored so far is kept. {rest}.")
    stages = [f"{name} {seconds:.1f} s" for name, seconds in run.seconds.items() if name != "total"]
    if stages:
        lines.append(f"Time: {run.seconds['total']:.1f} s, of which {', '.join(stages)}.")
    if run.failures:
        first = run.failures[0]
        lines.append(f"**{count(run.num_failures, 'image')} failed** and kept their labels. The first: {code(first)}")
    result = {
        "label_field": run.label_field,
        "images": run.images,
        "objects": run.objects,
        "images_per_second": run.images_per_second,
        "seconds": run.seconds,
        "cancelled": run.cancelled,
        "failures": [vars(failure) for failure in run.failures],
    }
    buttons = samples_button(FAILED, [failure.sample_id for failure in run.failures if failure.sample_id])
    return Outcome("\n\n".join(lines), result, buttons=buttons)
