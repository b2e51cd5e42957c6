"""Train a model on the labels of the dataset."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, NamedTuple

from fiftyone import ViewField as F

from ..errors import ArgumentError
from ..fiftyone_internals import FRAMES_PREFIX, label_path
from ..labels.fields import GROUND_TRUTH_FIELD, SHAPE_TYPES, have_masks, with_lists
from ..registration import PLUGIN
from .app_work import Button, Outcome, Progress
from .choices import (
    SKIPPED,
    device_choice,
    download_note,
    fetch_with_progress,
    model_choice,
    model_texts,
    samples_button,
    scheduling_note,
    skipped_samples,
    skipped_text,
    warn_of_hidden_labels,
)
from .evaluate_proposals import PANEL
from .form import Form, cached, code, count
from .operator import Operator

if TYPE_CHECKING:
    from fiftyone.core.collections import SampleCollection

    from ..training.train import TrainingRun

PARTS = {
    "discovery": "Object discovery: which objects are found",
    "masks": "Masks: how the objects are outlined",
}
VALIDATIONS = {
    "share": "A share of them, chosen by their content",
    "tag": "Those with a tag",
}
_VALIDATION = "They measure the model, and are never trained on"
UNLABELED = {
    "ignore": "Ignore it: labels may be missing",
    "background": "Learn that it is no object: every object is labeled",
}
SAME_SIZE, IN_EMBEDDING = "same", "embedding"
SIZES = {
    SAME_SIZE: "The detector of the model to start from",
    IN_EMBEDDING: "One in the image embedding, the fastest",
} | {
    size: f"A new one, YOLOv8{size}, {text}"
    for size, text in (
        ("n", "the smallest and fastest"),
        ("s", "small"),
        ("m", "medium"),
        ("l", "large"),
        ("x", "the largest and slowest"),
    )
}
LEARN = {
    "decoder": "The mask decoder",
    "neck": "The mask decoder and the last layers of the image encoder",
    "encoder": "The mask decoder and the whole image encoder",
}
NO_TEACHER = "(none)"


class TrainOnLabels(Operator):
    identifier = "train_on_labels"
    title = "Train on my labels"
    description = "Train a model on the labels of this dataset, and measure it before and after"
    icon = "train"
    if_cancelled = "Repeat it with the same settings to go on from the last save."

    def form(self, form: Form) -> None:
        form.target("Train on")
        field = form.label_field("gt_field", SHAPE_TYPES, "Labels", "Their classes don't matter", _default_field(form))
        warn_of_hidden_labels(form, "trained on")
        part = form.choice("part", PARTS, "discovery", "What to train", radio=True)
        if not form.problems and not have_masks(form.samples, field):
            reason = f"Labels in '{field}' have no masks, from which masks are learned"
            if part == "masks":
                form.problem(f"{reason}. 'Segment from prompts' turns boxes into masks.")
            else:
                form.note(
                    f"{reason}: only object discovery can be trained. 'Segment from prompts' makes masks of boxes."
                )
        model_choice(form, "Model to start from")
        self._name(form)
        self._validation(form)
        self._advanced(form, part)
        if not form.problems:
            self._counts(form)
            scheduling_note(form, "Training takes")

    def _name(self, form: Form) -> None:
        from ..modeling.checkpoints.trained import check_name

        default = _free_name(form.dataset.name)
        name = form.text("name", default, "Name of the new model", "To find it by, wherever a model is chosen")
        with form.checks("Name of the new model: "):
            check_name(name)
            if _is_taken(name):
                raise ArgumentError(f"the trained model '{name}' exists. Choose another name, or delete it first.")
            if _is_unfinished(name):
                form.note(
                    f"An earlier training of '{name}' has not become a model. With the same settings and labels, this "
                    f"one goes on from its last save."
                )

    def _validation(self, form: Form) -> None:
        tags = [tag for tag in cached(_tags, form.samples) if tag]
        is_choice = bool(tags or form.ctx.params.get("validation"))
        how = "share"
        if is_choice:
            choices = VALIDATIONS if tags else {"share": VALIDATIONS["share"]}
            how = form.choice("validation", choices, "share", "Validation images", _VALIDATION, radio=True)
        if how == "tag" and tags:
            form.choice("tag", {tag: tag for tag in tags}, tags[0], "Tag of the validation images")
        else:
            text = None if is_choice else _VALIDATION
            form.number("share", 0.2, "Share of validation images", text, min=0.01, max=0.9)

    def _advanced(self, form: Form, part: str) -> None:
        params = form.ctx.params
        is_given = any(params.get(name) not in (None, "") for name in _ADVANCED)
        if not form.switch("advanced", is_given, "Advanced settings"):
            return
        form.number(
            "epochs", None, "Epochs", "Times each image is seen; empty: what suits their number", min=1, whole=True
        )
        form.number("batch_size", None, "Batch size", "Images per step; empty: the default", min=1, whole=True)
        form.number("learning_rate", None, "Learning rate", "Its highest; empty: the default", min=1e-8, max=1)
        if part == "discovery":
            title = "What the model finds without a label"
            form.choice("unlabeled", UNLABELED, "ignore", title, radio=True)
            form.choice("size", SIZES, SAME_SIZE, "Detector", "A new one needs many labeled images")
            choices = {NO_TEACHER: "None: images without labels are not used"} | model_texts()
            text = "A model whose finds are the labels of the images without labels"
            teacher = form.choice("teacher", choices, NO_TEACHER, "Teacher", text)
            if teacher != form.values["model"]:
                download_note(form, teacher)
        else:
            form.choice("learn", LEARN, "encoder", "What learns", "The more learns, the more labels it needs")
        form.number("seed", 0, "Seed", "Of the order of the images, and how they are varied", min=0, whole=True)
        form.switch("keep_worse", False, "Keep the model even if it is not better")
        device_choice(form)

    def _counts(self, form: Form) -> None:
        """Says how many images have labels, and how many of them are for validation."""
        values, samples = form.values, form.samples
        field, tag = values["gt_field"], values.get("tag")
        found = cached(_count, samples, field)
        noun = "frame" if field.startswith(FRAMES_PREFIX) else "image"
        if tag is None:
            held_out = max(1, round(values["share"] * found.divisible))
        else:
            held_out = cached(_count, samples.match_tags(tag), field).divisible
        text = f"{found.labeled:,} of {count(found.total, noun)} have labels in '{field}'"
        text += f", {count(found.objects, 'object')}"
        if noun == "frame":
            text += f", in {count(found.divisible, 'video')}"
        has_teacher = values.get("teacher", NO_TEACHER) != NO_TEACHER
        if not has_teacher and (not found.objects or not 0 < held_out < found.divisible):
            form.problem(f"{text}: there must be some to train on, and some for validation.")
            return
        if found.divisible:
            about = "" if tag else "about "
            trained_on = found.divisible - held_out
            form.note(f"{text}: {about}{trained_on:,} to train on, {about}{held_out:,} for validation.")
        if has_teacher:
            form.note(f"The teacher labels the other {count(found.total - found.labeled, noun)}.")

    def run(self, form: Form, progress: Progress) -> Outcome:
        from ..training.train import train

        values = form.values
        settings = {name: values[name] for name in _ADVANCED if name in values}
        if (detector := settings.pop("size", SAME_SIZE)) == IN_EMBEDDING:
            settings["discovery"] = "embedding"
        elif detector != SAME_SIZE:
            settings |= {"discovery": "detector", "size": detector}
        if settings.get("teacher") == NO_TEACHER:
            settings["teacher"] = None
        for model in filter(None, (values["model"], settings.get("teacher"))):
            fetch_with_progress(model, progress)
        run = train(
            form.samples,
            values["gt_field"],
            name=values["name"],
            part=values["part"],
            base=values["model"],
            validation=values.get("tag", values.get("share")),
            progress=progress.tell,
            **settings,
        )
        return _outcome(form, run)


_ADVANCED = (
    "epochs",
    "batch_size",
    "learning_rate",
    "unlabeled",
    "size",
    "teacher",
    "learn",
    "seed",
    "keep_worse",
    "device",
)


def _default_field(form: Form) -> str:
    return FRAMES_PREFIX + GROUND_TRUTH_FIELD if form.samples.media_type == "video" else GROUND_TRUTH_FIELD


def _tags(samples: SampleCollection) -> list[str]:
    tags: list[str] = samples.distinct("tags")
    return tags


class _Counts(NamedTuple):
    """Numbers of images or frames: those with a value in the field, and all; of objects; and of what can be divided
    into training and validation: images with labels, or videos with labeled frames, which stay together."""

    labeled: int
    total: int
    objects: int
    divisible: int


def _count(samples: SampleCollection, field: str) -> _Counts:
    labeled: int = samples.count(field)
    objects: int = with_lists(samples, field).count(label_path(samples, field))
    if not field.startswith(FRAMES_PREFIX):
        return _Counts(labeled, len(samples), objects, labeled)
    has_labels = F(field.removeprefix(FRAMES_PREFIX)) != None  # noqa: E711
    videos = samples.match(F("frames").filter(has_labels).length() > 0)
    return _Counts(labeled, samples.count("frames"), objects, len(videos))


# Names ---------------------------------------------------------------------------------------------------------------


def _free_name(dataset_name: str) -> str:
    """A name for a model of this dataset that no model has."""
    from ..modeling.checkpoints.trained import check_name

    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", dataset_name).strip("._-")[:90] or "model"
    for number in itertools.count(1):
        name = stem if number == 1 else f"{stem}-{number}"
        try:
            check_name(name)
        except ArgumentError:  # a model of the zoo
            continue
        if not _is_taken(name):
            return name
    raise AssertionError  # numbers don't end


def _is_taken(name: str) -> bool:
    from ..modeling.checkpoints.trained import trained_dir
    from ..modeling.checkpoints.trained_files import CONFIG

    folder = trained_dir() / name
    return folder.is_symlink() or (folder / CONFIG).exists()


def _is_unfinished(name: str) -> bool:
    from ..modeling.checkpoints.trained import trained_dir

    return (trained_dir() / name).is_dir()


# The outcome ---------------------------------------------------------------------------------------------------------


def _outcome(form: Form, run: TrainingRun) -> Outcome:
    from ..training.card import measures_table

    counts = run.counts
    before, after = run.before.to_dict(), run.after.to_dict()
    images, objects = (count(counts[f"{noun}s to train on"], noun) for noun in ("image", "object"))
    trained_on = (
        f"Trained on {images} with {objects} in {_duration(run.seconds)}; measured on "
        f"{count(run.after.images, 'other image')} with {count(run.after.objects, 'object')}."
    )
    lines = [f"**{_verdict(run)}**", measures_table(before, after), trained_on]
    lines += run.caveats
    if run.stopped:
        lines.append(f"It ended before its last epoch: {code(run.stopped)}. The best weights until then are used.")
    if run.registered:
        lines.append(f"The model is in {code(run.folder)}, and {code(run.name)} is listed wherever a model is chosen.")
    else:
        lines.append(
            "More labels, or labels without mistakes, help most. To keep this model, repeat this with *Keep the model "
            "even if it is not better*, under *Advanced settings*: nothing is trained twice."
        )
    result = {
        "name": run.name,
        "folder": str(run.folder),
        "part": run.part,
        "base": run.base,
        "before": before,
        "after": after,
        "registered": run.registered,
        "counts": counts,
        "curve": run.curve,
        "stopped": run.stopped,
        "seconds": run.seconds,
        "skipped": run.skipped,
    }
    buttons = _next_steps(form, run) if run.registered else []
    return Outcome(
        "\n\n".join(lines + skipped_text(run.skipped)),
        result,
        panel=PANEL,
        buttons=buttons + samples_button(SKIPPED, skipped_samples(form.samples, form.values["gt_field"], run.skipped)),
    )


def _verdict(run: TrainingRun) -> str:
    if run.is_better:
        verb = "finds more of the objects" if run.part == "discovery" else "outlines the objects better"
        return f"{code(run.name)} {verb} than {code(run.base)}"
    kept = "It was kept all the same" if run.registered else "It was not kept"
    return f"{code(run.name)} is not better than {code(run.base)}. {kept}."


def _next_steps(form: Form, run: TrainingRun) -> list[Button]:
    steps: list[Button] = [("Segment the view with it", f"{PLUGIN}/segment_everything", {"model": run.name})]
    values = form.values
    if run.part == "discovery" and have_masks(form.samples, values["gt_field"]):
        # The same images for validation: others would be among those that discovery was trained on.
        same = {name: values[name] for name in ("gt_field", "validation", "tag", "share") if name in values}
        given = same | {"part": "masks", "model": run.name}
        steps.append(("Train masks next", f"{PLUGIN}/{TrainOnLabels.identifier}", given))
    return steps


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
