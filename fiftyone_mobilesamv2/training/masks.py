"""Trains the prompt-guided decoder from masks of objects, optionally with the image encoder, and with object discovery
from the embedding."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ArgumentError, MobileSAMv2Error
from ..modeling.devices import usable_device
from .examples import Example
from .gradients import Gradients
from .learning import Learn, average_weights, parameter_groups, schedule, set_learning
from .networks import Networks
from .progress import Report, Step
from .prompted_images import PromptedImage, PromptedImages, UnreadableImage, prefetched
from .saved_training import Progress, fingerprint, save_training, saved_training

logger = logging.getLogger(__name__)

_WEIGHT_DECAY = 0.02
_MAX_GRADIENT_NORM = 1.0
_VALIDATIONS = 10
# A long epoch is saved this often, but saving never takes more than a tenth of the time.
_SAVE_SECONDS = 60.0
_MAX_SHARE_OF_SAVING = 0.1


@dataclass(frozen=True)
class MaskSettings:
    """How to train.

    The defaults are what held when the demo model learned 70 photos of a domain that it had never seen: the whole
    encoder at 1e-4 to 1e-3, with 1e-4 to 3e-4 best; the decoder alone hardly gained at 1e-4 and lost at 1e-3.

    Attributes:
        epochs: how often each image is seen.
        batch_size: images per step.
        learning_rate: the highest, after the warm-up.
        learn: what learns: the decoder alone, or with the encoder's neck, or with the whole encoder. A detector learns
            whenever there is one; "detector": nothing else.
        prompts_per_image: with fewer objects, an object is prompted several times.
        seed: of the order, the augmentations and the prompts.
        device: None selects the fastest available one.
        workers: threads that read images; 0 reads them between steps.
        untrained: submodules of :class:`Networks` whose weights are untrained, such as "image_encoder.fuse": the
            statistics of their batch norms are learned too, and they learn faster than what else learns.
        frozen: submodules that don't learn.
    """

    epochs: int = 20
    batch_size: int = 4
    learning_rate: float = 1e-4
    learn: Learn = "encoder"
    prompts_per_image: int = 16
    seed: int = 0
    device: str | None = None
    workers: int = 2
    untrained: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True)
class MaskTraining:
    """The result.

    Attributes:
        tensors: name of each network of :class:`Networks` that learned -> its tensors.
        curve: for each epoch, "epoch" (from 1), "step", "loss" (mean), "learning_rate", and "score", which is None
            where the weights were not validated.
        best_score: of the returned weights; None without validation.
        skipped: name of each image that could not be used -> the cause.
        stopped: why the training ended early; None if it did not.
    """

    tensors: dict[str, dict[str, Tensor]]
    curve: list[dict[str, Any]]
    best_score: float | None
    skipped: dict[str, str]
    stopped: str | None


def train_masks(
    networks: Networks,
    examples: Sequence[Example],
    settings: MaskSettings,
    folder: Path,
    report: Report,
    validate: Callable[[Networks], float] | None,
) -> MaskTraining:
    """Trains on examples with masks; others are left out unless a detector learns from their boxes.

    A training that was interrupted at any moment goes on from its last save. On a CPU it ends with the same weights, to
    the last bit, if torch has as many threads as before; on a GPU, the order of additions is not fixed.

    Args:
        networks: what to start from. They are changed.
        examples: may be lazy; it is read through once at the start, without reading pixels.
        folder: holds the state of the training.
        report: called after each step.
        validate: gets copies with averaged weights, which it may change, and returns a score, higher being better.
            Called about ten times, and at the end. The weights with the best score are returned; without it, the last.

    Raises:
        ValueError: no example has masks, or none of the images can be used.
        StorageError: the state can't be saved.
        MobileSAMv2Error: the device's memory is too small for one image.
    """
    return _Trainer(networks, examples, settings, folder, report, validate).run()


class _Trainer:
    def __init__(
        self,
        networks: Networks,
        examples: Sequence[Example],
        settings: MaskSettings,
        folder: Path,
        report: Report,
        validate: Callable[[Networks], float] | None,
    ) -> None:
        self.networks, self.settings, self.report, self.validate = networks, settings, report, validate
        self.images = PromptedImages(examples, networks.config, settings.prompts_per_image, settings.seed)
        self.path = folder / "masks.pt"
        self.device = usable_device(settings.device)
        self.model = networks.modules
        self.indices: list[int] = []
        decisive = {k: v for k, v in asdict(settings).items() if k not in ("device", "workers")}
        self.fingerprint = fingerprint(decisive, self.model.state_dict(), self._usable_ones(examples))
        if not self.indices:
            raise ArgumentError("None of the images to train on has an object with a mask.")
        self.model.to(self.device).to(memory_format=torch.channels_last)
        set_learning(self.model, networks.config, settings.learn, settings.untrained, settings.frozen)
        self.gradients = Gradients(networks, settings.learn != "detector", self.device, settings.batch_size)

        names = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        is_untrained = tuple(f"{name}." for name in settings.untrained)
        names |= {name for name, _ in self.model.named_buffers() if name.startswith(is_untrained)}
        self.learned = {name: tensor for name, tensor in self.model.state_dict().items() if name in names}
        self.averaged = {name: tensor.clone() for name, tensor in self.learned.items()}
        self.best: dict[str, Tensor] | None = None
        groups = parameter_groups(self.model, settings.learning_rate, settings.untrained)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=_WEIGHT_DECAY)

        self.steps_per_epoch = math.ceil(len(self.indices) / settings.batch_size)
        self.steps = settings.epochs * self.steps_per_epoch
        self.progress = Progress(images_at_once=settings.batch_size)
        self.saved_at, self.saving_took = time.monotonic(), 0.0

    def _usable_ones(self, examples: Iterable[Example]) -> Iterator[Example]:
        """The examples to learn from, whose indices are noted: going through lazy examples takes time."""
        for index, example in enumerate(examples):
            if example.masks or self.networks.detector is not None:
                self.indices.append(index)
                yield example

    def run(self) -> MaskTraining:
        state = saved_training(self.path, self.fingerprint)
        if state is not None:
            self._restore(state)
        with self.gradients:
            self._train_on_batches()
        return self._result()

    def _train_on_batches(self) -> None:
        started, first = time.monotonic(), self.progress.step
        images_done = 0
        for batch in self._batches():
            rate = self._set_learning_rate()
            images = self._usable(batch)
            loss = self._train(images) if images else None
            if loss is not None and not math.isfinite(loss):
                self._stop()
                break
            self._finish_step(loss, rate)
            images_done += len(images)
            seconds = time.monotonic() - started
            progress = self.progress
            self.report(
                Step(
                    done=progress.step,
                    total=self.steps,
                    epoch=(progress.step - 1) // self.steps_per_epoch + 1,
                    epochs=self.settings.epochs,
                    loss=math.nan if progress.loss is None else progress.loss,
                    learning_rate=rate,
                    images_per_second=images_done / seconds,
                    seconds_left=(self.steps - progress.step) * seconds / (progress.step - first),
                )
            )

    def _batches(self) -> Iterator[list[PromptedImage | UnreadableImage]]:
        """The remaining steps' items."""
        size = self.settings.batch_size
        remaining = range(self.progress.step, self.steps if self.progress.stopped is None else self.progress.step)

        def keys() -> Iterator[tuple[int, int]]:
            for step in remaining:
                epoch, place = divmod(step, self.steps_per_epoch)
                order = np.random.default_rng((self.settings.seed, epoch)).permutation(self.indices)
                yield from ((epoch, int(i)) for i in order[place * size : (place + 1) * size])

        ahead = 2 * max(size, self.settings.workers)
        items = prefetched(keys(), lambda key: self.images.item(*key), self.settings.workers, ahead)
        last = len(self.indices) - (self.steps_per_epoch - 1) * size  # images of an epoch's last step
        for step in remaining:
            yield [next(items) for _ in range(last if (step + 1) % self.steps_per_epoch == 0 else size)]

    def _usable(self, batch: Sequence[PromptedImage | UnreadableImage]) -> list[PromptedImage]:
        """Of a batch, the images to learn from; notes those that can't be read."""
        images = []
        for item in batch:
            if isinstance(item, UnreadableImage):
                self.progress.skipped[item.name] = item.cause
            elif item.prompts or self.networks.detector is not None:
                images.append(item)
        return images

    def _set_learning_rate(self) -> float:
        factor = schedule(self.progress.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest"] * factor
        return self.settings.learning_rate * factor

    def _train(self, images: Sequence[PromptedImage]) -> float:
        """One optimizer step. Returns the loss; where it or its gradient is not finite, that, and nothing changes."""
        while True:
            try:
                loss = self.gradients.backward(images, self.progress.images_at_once)
                break
            except torch.OutOfMemoryError as error:
                self._halve_images_at_once(error)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, _MAX_GRADIENT_NORM))
        if not math.isfinite(loss + norm):
            return loss + norm
        self.optimizer.step()
        return loss

    def _halve_images_at_once(self, error: torch.OutOfMemoryError) -> None:
        self.optimizer.zero_grad(set_to_none=True)  # frees memory
        at_once = self.progress.images_at_once
        if at_once == 1:
            raise MobileSAMv2Error(
                f"{self.device} has too little memory to train on one image at a time: train less of the model, or "
                f"with fewer than {self.settings.prompts_per_image} prompts an image."
            ) from error
        self.progress.images_at_once = max(1, at_once // 2)
        logger.warning(
            "%s has too little memory for %d images at once. Training goes on with %d, and as many passes a step as "
            "%d images need.",
            self.device,
            at_once,
            self.progress.images_at_once,
            self.settings.batch_size,
        )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _finish_step(self, loss: float | None, rate: float) -> None:
        progress = self.progress
        progress.step += 1
        if loss is not None:
            average_weights(self.averaged, self.learned, progress.step)
            progress.loss = loss if progress.loss is None else 0.95 * progress.loss + 0.05 * loss
            progress.epoch_losses.append(loss)
        ended = progress.step % self.steps_per_epoch == 0
        if ended:
            self._finish_epoch(rate)
        since = time.monotonic() - self.saved_at
        due = (ended or since > _SAVE_SECONDS) and self.saving_took <= _MAX_SHARE_OF_SAVING * since
        if due or progress.step == self.steps:
            self._save()

    def _finish_epoch(self, rate: float) -> None:
        """Adds the epoch to the curve, and validates if it is one of about ten after which that is done."""
        progress, epochs = self.progress, self.settings.epochs
        if not progress.epoch_losses:
            raise ArgumentError(
                next((f"No image can be trained on. {n}: {cause}" for n, cause in progress.skipped.items()), None)
                or "No object is large enough to be trained on: each covers less than half a cell of the masks' grid."
            )
        epoch = math.ceil(progress.step / self.steps_per_epoch)
        is_validated = progress.stopped is not None or epoch * _VALIDATIONS // epochs > (
            (epoch - 1) * _VALIDATIONS // epochs
        )
        loss = math.fsum(progress.epoch_losses) / len(progress.epoch_losses)
        score = self._score() if is_validated else None
        progress.curve.append(
            {"epoch": epoch, "step": progress.step, "loss": loss, "learning_rate": rate, "score": score}
        )
        progress.epoch_losses = []

    def _score(self) -> float | None:
        """The score of the averaged weights, which are kept if it is the best."""
        if self.validate is None:
            return None
        copied = self.networks.copied()  # because the caller may prepare it for inference
        copied.modules.load_state_dict(self.averaged, strict=False)
        score = float(self.validate(copied))
        best = self.progress.best_score
        if math.isfinite(score) and (best is None or score > best):
            self.progress.best_score = score
            self.best = {name: tensor.clone() for name, tensor in self.averaged.items()}
        return score

    def _stop(self) -> None:
        """Ends the training because of a loss that is not finite."""
        progress = self.progress
        progress.stopped = (
            f"The loss or its gradient became infinite or NaN at step {progress.step + 1} of {self.steps}, so training "
            f"stopped; the best weights until then are kept. Try a lower learning rate than "
            f"{self.settings.learning_rate:g}."
        )
        if progress.epoch_losses:
            self._finish_epoch(self.optimizer.param_groups[0]["lr"])
        self._save()

    def _save(self) -> None:
        started = time.monotonic()
        state = {
            "fingerprint": self.fingerprint,
            "progress": asdict(self.progress),
            "learned": self.learned,
            "averaged": self.averaged,
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
        }
        save_training(self.path, state)
        self.saved_at = time.monotonic()
        self.saving_took = self.saved_at - started

    def _restore(self, state: dict[str, Any]) -> None:
        self.progress = Progress(**state["progress"])
        with torch.no_grad():
            for tensors, saved in ((self.learned, state["learned"]), (self.averaged, state["averaged"])):
                for name, tensor in tensors.items():
                    tensor.copy_(saved[name])
        if state["best"] is not None:
            self.best = state["best"]
        self.optimizer.load_state_dict(state["optimizer"])

    def _result(self) -> MaskTraining:
        tensors = self.model.state_dict() | (self.averaged if self.best is None else self.best)
        learned = {name.split(".", 1)[0] for name in self.learned}
        of_parts: dict[str, dict[str, Tensor]] = {name: {} for name in learned}
        for name, tensor in tensors.items():
            part, key = name.split(".", 1)
            if part in learned:
                of_parts[part][key] = tensor.cpu().clone(memory_format=torch.contiguous_format)
        return MaskTraining(
            tensors=of_parts,
            curve=self.progress.curve,
            best_score=self.progress.best_score,
            skipped=self.progress.skipped,
            stopped=self.progress.stopped,
        )
