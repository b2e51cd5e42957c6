"""Trains a model on the labels of a dataset: object discovery, or masks."""

from __future__ import annotations

import logging
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from ..errors import ArgumentError
from ..fiftyone_internals import forget_zoo_models, root_dataset
from ..labels.documents import Skipped
from ..labels.fields import GROUND_TRUTH_FIELD
from ..modeling.checkpoints.trained import check_name, register, registered_folder, trained_dir, write_trained
from ..modeling.checkpoints.trained_files import CONFIG
from ..modeling.checkpoints.verification import file_hashes
from ..modeling.devices import usable_device
from .arguments import check_arguments
from .base_model import Base
from .card import write_card, write_curve
from .labeled_images import LabeledImages, Validation, check_not_empty, split
from .measuring import Measures, measure
from .parts import learn_discovery, learn_networks, write_weights
from .progress import Curve, Step

if TYPE_CHECKING:
    from fiftyone.core.collections import SampleCollection

logger = logging.getLogger(__name__)

WORK = "training"  # folder, in the model's own, for what a training needs until it is complete
LOCK = ".lock"
FEW_OBJECTS = 50
SEEN_BEFORE = "validation images that the base was trained on"  # one of the counts

# Called with the finished share of the whole, and what is being done. It may raise errors.Cancelled.
Tell = Callable[[float, str], None]


@dataclass(frozen=True)
class TrainingRun:
    """The result of :func:`train`.

    Attributes:
        name, folder: the new model's name and folder.
        part, base: what was trained, and the model that it started from.
        before, after: the base and the new model, measured on the same validation images.
        registered: whether the model was kept, and `foz.load_zoo_model(name)` loads it.
        counts: numbers of images and objects: trained on, for validation, ignored, and labelled by the teacher.
        curve: one entry for each epoch: "epoch", "loss", "learning_rate" and "score", None in epochs without one.
        skipped: id, filepath and cause of each image that could not be used.
        stopped: why the training ended before its last epoch; None if it didn't.
        seconds: how long the call took.
    """

    name: str
    folder: Path
    part: str
    base: str
    before: Measures
    after: Measures
    registered: bool
    counts: dict[str, int]
    curve: Curve = field(repr=False)
    skipped: list[Skipped] = field(repr=False)
    stopped: str | None
    seconds: float

    @property
    def is_better(self) -> bool:
        """Whether the new model is better at what it was trained for: recall, or masks from boxes."""
        return score_of(self.part, self.after) > score_of(self.part, self.before)

    @property
    def caveats(self) -> list[str]:
        """What makes the comparison unreliable, in sentences."""
        caveats = []
        if seen := self.counts[SEEN_BEFORE]:
            caveats.append(f"{self.base} was trained on {seen:,} of the validation images: both measures are too good.")
        if self.after.objects < FEW_OBJECTS:
            caveats.append("With so few objects for validation, the difference may be due to chance.")
        return caveats

    def __str__(self) -> str:
        lines = [
            f"before: {self.before}",
            f"after:  {self.after}",
            f"on {self.after.images:,} validation images with {self.after.objects:,} objects",
        ]
        lines += self.caveats
        if self.stopped:
            lines.append(f"{self.stopped}: the best weights until then were kept.")
        if self.skipped:
            first = self.skipped[0]
            lines.append(f"images skipped: {len(self.skipped):,}; the first: {first['filepath']}: {first['cause']}")
        if self.registered:
            lines.append(f'The model is in {self.folder}: foz.load_zoo_model("{self.name}")')
        else:
            lines.append(
                "It is not better than its base, so it was not registered. Repeat the training with `keep_worse` to "
                "register it; nothing is trained again."
            )
        return "\n".join(lines)


def score_of(part: str, measures: Measures) -> float:
    """What decides whether a model is better: the mean of AR@K, or for masks the mean IoU from boxes."""
    return measures.recall if part == "discovery" or measures.iou is None else measures.iou


def train(
    samples: SampleCollection,
    gt_field: str = GROUND_TRUTH_FIELD,
    *,
    name: str,
    part: str = "discovery",
    base: str = "mobilesamv2-tinyvit-torch",
    validation: Validation = 0.2,
    epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    unlabeled: str = "ignore",
    discovery: str | None = None,
    size: str | None = None,
    teacher: str | None = None,
    learn: str | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    output: str | PathLike[str] | None = None,
    keep_worse: bool = False,
    progress: bool | Tell | None = None,
) -> TrainingRun:
    """Trains a model on the labels of a dataset, and measures it before and after on images that it never saw.

    A training that was stopped or killed goes on from its last save when the same call is repeated. The model is
    registered if it is better than its base: it is then listed with the other models, and `foz.load_zoo_model(name)`
    loads it. Its folder can be copied to another machine.

    >>> run = train(view, "ground_truth", name="my-cells", base="mobilesamv2-demo-torch")
    >>> print(run)
    >>> segment_everything(view, foz.load_zoo_model("my-cells"), "cells")

    Args:
        samples: a dataset or view of images, or of videos whose frames have labels.
        gt_field: detections with boxes or masks, or polylines; classes don't matter. Crowds, and labels with the tag
            "ignore", count neither as objects nor as background.
        name: of the new model.
        part: "discovery", the detector that finds the objects, or "masks", the decoder that segments them.
        base: the zoo model to start from, or a trained model's name or folder.
        validation: the share of images, the tags of samples, or a view to measure with; they are never trained on.
        epochs, batch_size, learning_rate: by default, they suit the number of images.
        unlabeled: what the base finds with confidence although no label explains it: "ignore" leaves it out of the
            loss, because labels are rarely complete; "background" takes it for a false find. Discovery only.
        discovery: "detector", a network of its own, or "embedding", which finds objects in the image embedding that the
            masks are decoded from, and takes hardly any time; default: what the base has. Discovery only.
        size: start from an untrained YOLOv8 of this size ("n", "s", "m", "l", "x") instead of the base's detector.
        teacher: a model whose boxes are the labels of images without a value in `gt_field`. Discovery only.
        learn: "decoder", "neck" (the decoder and the encoder's neck) or "encoder" (all, the default). Masks only.
        seed: of the order of images and the augmentations.
        output: the new model's folder; default: below FiftyOne's `model_zoo_dir`.
        keep_worse: register the model even if it is not better than its base.
        progress: whether to show a progress bar, or a function that is called with the finished share and a text.

    Raises:
        ValueError: an argument is invalid, there are no labels, or no masks to learn masks from; or a model with this
            name exists.
        CheckpointError: a weights file of the base is missing or damaged.
    """
    started = time.monotonic()
    check_name(name)
    choices = {"unlabeled": unlabeled, "discovery": discovery, "size": size, "teacher": teacher}
    given = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "learn": learn}
    check_arguments(part, {**choices, **given, "seed": seed})
    folder = Path(output) if output is not None else trained_dir() / name
    settings = {"seed": seed, **{key: value for key, value in given.items() if value is not None}}
    with _showing(progress) as tell, _locked(folder, name):
        work = folder / WORK
        model = Base(base, usable_device(device))
        in_embedding = discovery == "embedding" or (discovery is None and size is None and model.finds_in_embedding)
        tell(0, "Reading labels")
        show_reading = _bar(tell, 0, 0.05)
        images, held_out = split(samples, gt_field, validation, work / "frames", show_reading, model.seen)
        if teacher is not None:
            _label(
                images, held_out, Base(teacher, model.device), _part(tell, 0.05, 0.1, "Labeling as the teacher does")
            )
        check_not_empty(images, held_out, gt_field, part)
        examples = images.examples
        if unlabeled == "ignore" and (part == "discovery" or model.finds_in_embedding):
            examples = model.with_ignored(examples, _part(tell, 0.1, 0.15, "Finding objects without labels"))
        before = measure(model.model, held_out.examples, _part(tell, 0.15, 0.2, "Measuring the base"))
        report = _step(tell, 0.2, 0.95)
        if part == "masks" or in_embedding:
            networks = model.networks(part == "discovery", seed)
            if part == "discovery":
                settings["learn"] = "detector"
            learned = learn_networks(model, networks, examples, held_out.examples, settings, work, report)
        else:
            size = size or ("n" if model.finds_in_embedding else None)
            learned = learn_discovery(model, examples, held_out.examples, size, settings, work, report)
        files = write_weights(learned, folder)
        after = measure(model.with_files(files), held_out.examples, _part(tell, 0.95, 1, "Measuring the new model"))
        run = TrainingRun(
            name=name,
            folder=folder,
            part=part,
            base=base,
            before=before,
            after=after,
            registered=keep_worse or score_of(part, after) > score_of(part, before),
            counts={
                "images to train on": len(images.examples),
                "objects to train on": images.num_objects,
                "ignored regions": sum(len(example.ignored) for example in examples),
                "validation images": len(held_out.examples),
                "validation objects": held_out.num_objects,
                SEEN_BEFORE: sum(
                    held_out.contents[example.id] in model.seen.trained_on for example in held_out.examples
                ),
                "images without labels": len(images.unlabeled),
            },
            curve=learned.curve,
            skipped=[*images.skipped, *held_out.skipped, *learned.skipped],
            stopped=learned.stopped,
            seconds=time.monotonic() - started,
        )
        if run.registered:
            _keep(run, model, files, learned.settings, root_dataset(samples).name, gt_field, images, held_out)
    return run


def _label(images: LabeledImages, held_out: LabeledImages, teacher: Base, tell: Callable[[float], None]) -> None:
    """Gives images without labels those that the teacher finds; for validation only if there are no others."""
    groups = [images] if held_out.examples else [images, held_out]
    total = sum(len(group.unlabeled) for group in groups)
    for group in groups:
        for example in group.unlabeled:
            group.examples.append(teacher.labeled(example))
            tell(sum(len(group.examples) for group in groups) / total)
        group.unlabeled = []


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """Only one training at a time in a folder, and none where a model is."""
    work, config = folder / WORK, folder / CONFIG
    holds_model = f"{folder} already holds a model: choose another name or folder than '{name}', or delete it."
    if config.exists() and not work.is_dir():
        raise ArgumentError(holds_model)
    registered = registered_folder(name)
    if registered and registered.resolve() != folder.resolve():
        raise ArgumentError(f"'{name}' is already the name of the model in {registered.resolve()}: choose another one.")
    if folder.is_dir() and any(folder.iterdir()) and not work.is_dir():  # a card could replace somebody's README.md
        raise ArgumentError(f"{folder} has other files: choose a new or empty folder for '{name}'.")
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ArgumentError(
            f"Another process is training '{name}' in {folder}: wait for it, or choose another name."
        ) from None
    try:
        if config.exists():  # it was killed after the last epoch, between its last steps
            _complete(folder)
            raise ArgumentError(holds_model)
        yield
    finally:
        if work.is_dir() and [path.name for path in work.iterdir()] == [LOCK]:  # it didn't come to anything
            shutil.rmtree(work)
            with suppress(OSError):
                folder.rmdir()
        lock.release()


def _keep(
    run: TrainingRun,
    base: Base,
    files: dict[str, Path],
    settings: dict[str, Any],
    dataset: str,
    gt_field: str,
    images: LabeledImages,
    held_out: LabeledImages,
) -> None:
    """Writes what the model's folder lacks, and completes it."""
    training = {
        "field": gt_field,
        "counts": run.counts,
        "settings": settings,
        "before": run.before.to_dict(),
        "after": run.after.to_dict(),
        "stopped": run.stopped,
        "seconds": round(run.seconds),
        "skipped": run.skipped,
        "validation": sorted(example.id for example in held_out.examples),
        "contents": {
            "trained_on": sorted(images.example_contents | base.seen.trained_on),
            "held_out": sorted(held_out.example_contents),
        },
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("fiftyone-mobilesamv2", "fiftyone", "torch", "ultralytics")},
        "curve": run.curve,
    }
    write_curve(run.curve, run.folder)
    hashes = {path.name: file_hashes(path)[0] for path in files.values()}
    write_card(run.folder, run.name, run.part, run.base, dataset, hashes, training)
    entry = base.entry
    write_trained(
        run.folder,
        name=run.name,
        encoder=entry.encoder,
        detector_size=entry.detector_size,
        part=run.part,
        base=run.base,
        dataset=dataset,
        images=entry.images,
        files=base.files_of_new(files, run.folder),
        training=training,
    )
    _complete(run.folder)


def _complete(folder: Path) -> None:
    """Registers the model in a folder, and removes the state of its training."""
    register(folder)
    forget_zoo_models()
    shutil.rmtree(folder / WORK, ignore_errors=True)


# Progress ------------------------------------------------------------------------------------------------------------


@contextmanager
def _showing(progress: bool | Tell | None) -> Iterator[Tell]:
    done = 0.0
    with tqdm(total=1, bar_format="{l_bar}{bar}| {elapsed}", disable=progress is False or callable(progress)) as bar:

        def show(share: float, text: str) -> None:
            nonlocal done
            done = max(done, share)  # reading labels may take several passes
            if callable(progress):
                progress(done, text)
            else:
                bar.set_description(text, refresh=False)
                bar.update(done - bar.n)

        yield show


def _bar(tell: Tell, start: float, end: float) -> Callable[[Any], None]:
    """FiftyOne's kind of progress, which is called with a bar."""
    return lambda bar: tell(start + (end - start) * (bar.iteration / bar.total if bar.total else 1), "Reading labels")


def _part(tell: Tell, start: float, end: float, text: str) -> Callable[[float], None]:
    return lambda share: tell(start + (end - start) * share, text)


def _step(tell: Tell, start: float, end: float) -> Callable[[Step], None]:
    def report(step: Step) -> None:
        left = timedelta(seconds=round(step.seconds_left))
        text = (
            f"Epoch {step.epoch} of {step.epochs}, loss {step.loss:.3f}, {step.images_per_second:.1f} images/s, "
            f"{left} left"
        )
        tell(start + (end - start) * step.done / step.total, text)

    return report
