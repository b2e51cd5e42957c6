"""Trains object discovery: ultralytics' trainer and losses on examples, which stay where they are."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel, yaml_model_load
from ultralytics.utils import LOGGER
from ultralytics.utils.loss import v8DetectionLoss
from ultralytics.utils.ops import xywh2xyxy
from ultralytics.utils.tal import make_anchors
from ultralytics.utils.torch_utils import ModelEMA

from ..errors import MobileSAMv2Error
from .examples import Example
from .progress import Curve, Report, Step
from .saved_training import fingerprint, save_training, saved_training
from .yolo_data import IGNORED, OBJECT, EpochLoader, ExampleDataset

logger = logging.getLogger(__name__)

BACKBONE_LAYERS = 10  # of YOLOv8: its first layers, up to and with SPPF
MIN_COVERED = 0.5  # of a prediction that an ignored region must cover for it not to count as a false one
VALIDATIONS = 10  # about as many over a training
STATE = "discovery.pt"
Validate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class DiscoverySettings:
    """How a detector is trained.

    Attributes:
        epochs, batch_size, seed: as usual.
        image_size: pixels of the long side of the network input.
        learning_rate: of AdamW, at its highest.
        frozen_layers: number of the first layers that keep their weights.
        mosaic: share of items that are put together from four images.
        workers: processes that read images; 0 on a CPU, where they would compete with the training.
        device: where to train.
    """

    epochs: int
    batch_size: int = 16
    image_size: int = 640
    learning_rate: float = 0.001
    frozen_layers: int = 0
    mosaic: float = 0.5
    seed: int = 0
    workers: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class TrainedDetector:
    """The result of a training.

    Attributes:
        tensors: the best averaged weights, named as in a YOLOv8's checkpoint.
        score: of these weights.
        curve: one point for each epoch.
        stopped: why the training stopped before its last epoch; None if it didn't.
    """

    tensors: dict[str, Tensor]
    score: float
    curve: Curve
    stopped: str | None


class DiscoveryLoss(v8DetectionLoss):
    """YOLOv8's loss, in which predictions in ignored regions are not false ones.

    A prediction counts neither as right nor as wrong if it belongs to no object and a region covers half of it.
    """

    bce: Any  # replaced by ours
    stride: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.bce = self._scores_loss
        self._is_ignored: Tensor | None = None

    def loss(self, preds: dict[str, Tensor], batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        ignored = batch["cls"].view(-1) == IGNORED
        self._is_ignored = self._covered(preds, batch, ignored) if ignored.any() else None
        objects = {key: batch[key][~ignored] for key in ("batch_idx", "cls", "bboxes")}
        result: tuple[Tensor, dict[str, Tensor]] = super().loss(preds, batch | objects)
        return result

    @torch.no_grad()
    def _covered(self, preds: dict[str, Tensor], batch: dict[str, Any], ignored: Tensor) -> Tensor:
        """bool [B, anchors, 1]: whether an ignored region of the image covers the anchor's predicted box."""
        anchors, strides = make_anchors(preds["feats"], self.stride, 0.5)
        predicted = self.bbox_decode(anchors, preds["boxes"].permute(0, 2, 1).contiguous()) * strides
        height, width = (side * self.stride[0] for side in preds["feats"][0].shape[2:])
        scale = torch.tensor([width, height, width, height], device=predicted.device)
        regions = xywh2xyxy(batch["bboxes"][ignored].to(predicted) * scale)
        images = batch["batch_idx"][ignored].view(-1)
        covered = torch.zeros(predicted.shape[:2], dtype=torch.bool, device=predicted.device)
        for i in images.unique().long().tolist():  # image by image, which bounds the memory
            covered[i] = covered_shares(predicted[i], regions[images == i]).amax(1) >= MIN_COVERED
        return covered[..., None]

    def _scores_loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        losses = nn.functional.binary_cross_entropy_with_logits(scores, targets, reduction="none")
        if self._is_ignored is not None:
            losses = losses.masked_fill(self._is_ignored & (targets == 0), 0)
        return losses


def covered_shares(boxes: Tensor, regions: Tensor) -> Tensor:
    """[N, M]: the share of each box ([N, 4] xyxy) that each region ([M, 4] xyxy) covers; 0 for boxes without area."""
    starts = torch.maximum(boxes[:, None, :2], regions[None, :, :2])
    ends = torch.minimum(boxes[:, None, 2:], regions[None, :, 2:])
    inside = (ends - starts).clamp(min=0).prod(2)
    areas = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
    shares: Tensor = inside / areas[:, None].clamp(min=1e-9)
    return shares


class DiscoveryModel(DetectionModel):
    """A YOLOv8 with one class that is trained with :class:`DiscoveryLoss`."""

    def init_criterion(self) -> DiscoveryLoss:
        return DiscoveryLoss(self)


def new_detector(size: str) -> DiscoveryModel:
    """A YOLOv8 of size "n", "s", "m", "l" or "x" with one class, untrained."""
    return DiscoveryModel(yaml_model_load(f"yolov8{size}.yaml") | {"nc": 1}, verbose=False)


def train_discovery(
    model: DetectionModel,
    examples: Sequence[Example],
    settings: DiscoverySettings,
    folder: Path,
    report: Report,
    validate: Validate,
    cache: Path | None = None,
) -> TrainedDetector:
    """Trains a detector with one class; a training that was interrupted goes on from its last save.

    Args:
        model: a detector as it is trained: :func:`new_detector`, or `load_yolo` of a checkpoint. It is not changed.
        folder: for the state of the training.
        report: called after each step.
        validate: the score, higher is better, of averaged weights; called with a model in evaluation mode.
        cache: folder for images at the size of the network.

    Raises:
        MobileSAMv2Error: no image can be read, or the loss was never finite.
    """
    trainable = DiscoveryModel(model.yaml, verbose=False)
    trainable.load_state_dict(model.state_dict())
    identity = fingerprint(asdict(settings), trainable.state_dict(), examples)
    level = LOGGER.level
    LOGGER.setLevel(logging.ERROR)  # it describes layers, batches and files of its own
    try:
        trainer = _Trainer(trainable, examples, cache, settings, folder / STATE, identity, report, validate)
        if len(trainer.curve) < settings.epochs:
            trainer.train()
    finally:
        LOGGER.setLevel(level)
    if trainer.best_tensors is None:
        raise MobileSAMv2Error("The loss was not finite from the start: nothing was learnt. Lower the learning rate.")
    return TrainedDetector(trainer.best_tensors, trainer.best_score, trainer.curve, trainer.stopped)


class _Trainer(DetectionTrainer):
    """ultralytics' trainer, with data, validation, saves and progress of our own.

    Its own validation computes mAP with a class's labels; its own saves are pickles of half precision, from which a
    training goes on with other weights.
    """

    model: Any  # these are None until the training is set up
    optimizer: Any
    ema: Any
    loss: Any
    tloss: Any

    def __init__(
        self,
        model: DiscoveryModel,
        examples: Sequence[Example],
        cache: Path | None,
        settings: DiscoverySettings,
        state: Path,
        identity: str,
        report: Report,
        validate: Validate,
    ) -> None:
        self.trained, self.examples, self.cache_folder = model, examples, cache
        self.settings, self.report, self.score_of = settings, report, validate
        self.state, self.identity = state, identity
        self.stopped: str | None = None
        self.steps = 0  # since the training started or went on
        self.mean_loss: float | None = None
        self.saved = saved_training(state, identity) or {}
        self.curve: Curve = self.saved.get("curve", [])
        self.best_tensors: dict[str, Tensor] | None = self.saved.get("best")
        self.best_score: float = self.saved.get("best_score", -math.inf)
        super().__init__(overrides=ultralytics_options(settings, state.parent))

    # Data and model ---------------------------------------------------------------------------------------------------

    def get_dataset(self) -> dict[str, Any]:
        return {"train": "", "val": "", "nc": 1, "names": {OBJECT: "object"}, "channels": 3}

    def setup_model(self) -> None:
        self.model = self.trained

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        if mode == "val":
            no_items: Any = []  # validation is ours
            return DataLoader(no_items)
        dataset = ExampleDataset(
            self.examples,
            self.cache_folder,
            self.settings.seed,
            imgsz=self.args.imgsz,
            batch_size=batch_size,
            augment=True,
            hyp=self.args,
        )
        return EpochLoader(dataset, batch_size, self.args.workers)

    def get_validator(self) -> Any:
        return SimpleNamespace(metrics=SimpleNamespace(keys=[]), args=self.args)

    # The course of the training ---------------------------------------------------------------------------------------

    def run_callbacks(self, event: str) -> None:
        """Ours only: ultralytics' own report to services."""
        if event == "on_train_start":
            self.started = time.monotonic()
        elif event == "on_train_epoch_start":
            self.train_loader.start_epoch(self.epoch)
        elif event == "on_train_batch_end":
            self._report_step()

    def _report_step(self) -> None:
        if not self.loss.isfinite():
            self.stopped = f"The loss was not finite in epoch {self.epoch + 1}"
            self.stop = True
            return
        loss = float(sum(self.loss_items.values()))
        self.mean_loss = loss if self.mean_loss is None else 0.98 * self.mean_loss + 0.02 * loss
        self.steps += 1
        steps_per_epoch = len(self.train_loader)
        total = self.epochs * steps_per_epoch
        done = self.start_epoch * steps_per_epoch + self.steps
        seconds = time.monotonic() - self.started
        self.report(
            Step(
                done=done,
                total=total,
                epoch=self.epoch + 1,
                epochs=self.epochs,
                loss=self.mean_loss,
                learning_rate=self.optimizer.param_groups[0]["lr"],
                images_per_second=self.steps * len(self.examples) / steps_per_epoch / seconds,
                seconds_left=seconds / self.steps * (total - done),
            )
        )

    def validate(self) -> tuple[dict[str, float], float | None]:
        """The score of the averaged weights; None in epochs that are not scored."""
        is_last = self.epoch + 1 == self.epochs
        if self.stopped or not (is_last or (self.epoch + 1) % math.ceil(self.epochs / VALIDATIONS) == 0):
            return {}, None
        score = self.score_of(copy.deepcopy(self.ema.ema).eval())
        if score > self.best_score:
            self.best_score, self.best_tensors = score, _copied(self.ema.ema)
        return {}, score

    def save_metrics(self, metrics: dict[str, float]) -> None:
        if not self.stopped:
            self.curve.append(
                {
                    "epoch": self.epoch + 1,
                    "loss": float(sum(self.tloss.values())),
                    "learning_rate": self.optimizer.param_groups[0]["lr"],
                    "score": self.fitness,
                }
            )

    def final_eval(self) -> None:
        """Ours took place during the training."""

    # Saves ------------------------------------------------------------------------------------------------------------

    def save_model(self) -> bool:
        if not self.stopped:
            save_training(
                self.state,
                {
                    "fingerprint": self.identity,
                    "curve": self.curve,
                    "model": self.model.state_dict(),
                    "ema": self.ema.ema.state_dict(),
                    "updates": self.ema.updates,
                    "optimizer": self.optimizer.state_dict(),
                    "best": self.best_tensors,
                    "best_score": self.best_score,
                },
            )
        return False  # nobody is to be told

    def resume_training(self, ckpt: object) -> None:
        """Goes on from our last save, with exactly the state that an uninterrupted training would have."""
        if not self.saved:
            return
        self.model.load_state_dict(self.saved["model"])
        self.ema = ModelEMA(self.model, updates=self.saved["updates"])
        self.ema.ema.load_state_dict(self.saved["ema"])
        self.optimizer.load_state_dict(self.saved["optimizer"])
        self.start_epoch = len(self.curve)

    def _handle_nan_recovery(self, epoch: int) -> bool:
        return False  # the training ends, with the best weights so far


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def ultralytics_options(settings: DiscoverySettings, folder: Path) -> dict[str, Any]:
    """ultralytics' settings. Those that are not named here have its own defaults."""
    is_cuda = torch.device(settings.device).type == "cuda"
    return {
        "task": "detect",
        "model": "yolov8n.yaml",  # a name that it accepts; the model is given
        "epochs": settings.epochs,
        "batch": settings.batch_size,
        "nbs": settings.batch_size,  # a step for each batch: small datasets have few of them
        "imgsz": settings.image_size,
        "device": settings.device,
        "workers": settings.workers,
        "seed": settings.seed,
        "optimizer": "AdamW",
        "lr0": settings.learning_rate,
        "cos_lr": True,
        "warmup_epochs": min(3, settings.epochs / 10),
        "warmup_bias_lr": 0.0,
        "freeze": settings.frozen_layers,
        "mosaic": settings.mosaic,
        "close_mosaic": settings.epochs // 5,
        "patience": 0,
        "amp": "bf16" if is_cuda and torch.cuda.is_bf16_supported() else False,
        "plots": False,
        "project": str(folder.resolve()),
        "name": "ultralytics",
        "exist_ok": True,
    }
