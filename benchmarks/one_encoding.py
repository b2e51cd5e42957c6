"""What it saves to find objects in the image embedding rather than with a YOLO detector of its own.

    python benchmarks/one_encoding.py

Compares seconds an image with 64 prompts, from pixels to masks: the photo model as it is and with a YOLOv8n
beside it, and MobileSAM's TinyViT with discovery from its embedding and with the YOLOv8x of the release. Weights are
random where speed doesn't depend on them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from measure import Report, Row, in_turns, machine, photo, random_boxes, speedup
from released import PlausibleMasks, object_like_logits, write_checkpoints
from ultralytics.nn.tasks import DetectionModel, yaml_model_load

from fiftyone_mobilesamv2 import MobileSAMv2
from fiftyone_mobilesamv2.modeling.checkpoints.catalog import PHOTO_MODEL
from fiftyone_mobilesamv2.modeling.embedding_discovery import EmbeddingDetector, EmbeddingDiscovery
from fiftyone_mobilesamv2.modeling.object_discovery import ObjectDiscovery

PROMPTS = 64


def photo_models(input_size: int) -> dict[str, MobileSAMv2]:
    """The photo model as it is, and with a YOLOv8n that sees the same pixels."""
    own, other = (MobileSAMv2.from_pretrained(PHOTO_MODEL, device="cpu") for _ in range(2))
    yolo = DetectionModel(yaml_model_load("yolov8n.yaml") | {"nc": 1}, verbose=False).eval().fuse(verbose=False)
    other = MobileSAMv2(
        other.image_encoder, other.decoder, other.config, ObjectDiscovery(yolo, input_size), device="cpu"
    )
    return {"from the embedding": own, "YOLOv8n": other}


def tiny_vits(folder: Path) -> dict[str, MobileSAMv2]:
    """MobileSAM's architecture with discovery from its embedding, and with the release's detector."""
    files = write_checkpoints(folder)
    own, released = (MobileSAMv2.from_checkpoints("tiny_vit", **files, device="cpu") for _ in range(2))
    config = own.config
    detector = EmbeddingDetector(config.embed_dim, config.image_size // config.embed_size).eval()
    own = MobileSAMv2(own.image_encoder, own.decoder, config, EmbeddingDiscovery(detector), device="cpu")
    for model in (own, released):
        model.decoder.register_forward_hook(PlausibleMasks(object_like_logits()))
    return {"from the embedding": own, "YOLOv8x": released}


@torch.inference_mode()
def segment(model: MobileSAMv2) -> None:
    """All that an image needs, but with the same prompts for every model, whatever it finds."""
    image = photo()
    embeddings = model.encode([image])
    model.discover([image], embeddings=embeddings)
    boxes = torch.from_numpy(random_boxes(PROMPTS, image.shape[:2]))
    masks = model._segment(embeddings, 0, model._embed(embeddings, 0, boxes=boxes))
    assert len(masks) == PROMPTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    report = Report(machine(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as folder:
        for name, models, wanted in (
            ("photo model", photo_models(512), 1.3),
            ("TinyViT", tiny_vits(Path(folder)), 1.6),
        ):
            for model in models.values():
                segment(model)  # memory and kernels
                model.seconds.clear()
            seconds = in_turns({key: lambda model=model: segment(model) for key, model in models.items()}, args.runs)
            own, other = seconds
            report.add(speedup(1, f"{name}, {own} / {other}", wanted, seconds[other], seconds[own]))
            for key, model in models.items():
                for stage, total in model.seconds.items():
                    report.add(Row(1, f"{name}, {key}: {stage}", 1000 * total / args.runs, "ms", None))
    print(report.markdown())


if __name__ == "__main__":
    main()
