"""The released MobileSAMv2, rebuilt from ultralytics' modules: the baseline.

Computes the same as the release's `Inference.py` up to the masks (ChaoningZhang/MobileSAM at 34bbbfd):

- The detector is a segmentation model. Its predictor passes it to ultralytics' `AutoBackend`, which merges convolutions
  and batch norms. Mask coefficients and prototypes are computed but not used.
- `SamPredictor.set_image` encodes the image.
- `MaskDecoder` decodes 320 boxes at a time, each with a copy of the image's embedding.
- All masks are upsampled to full size in float32 at once, compared with 0 and converted to float32 again.

Weights are random: the released ones are not available everywhere, and random ones take the same time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from measure import photo, random_boxes, read_rgb, synchronize
from torch import Tensor, nn
from ultralytics.models.sam.build import build_mobile_sam, build_sam_vit_b, build_sam_vit_h, build_sam_vit_l
from ultralytics.models.sam.modules.sam import SAMModel
from ultralytics.nn.tasks import SegmentationModel, yaml_model_load
from ultralytics.utils.nms import non_max_suppression

from fiftyone_mobilesamv2 import MobileSAMv2
from fiftyone_mobilesamv2.modeling.defaults import NMS_IOU
from fiftyone_mobilesamv2.modeling.image_encoders import encoder_config, preprocess
from fiftyone_mobilesamv2.modeling.masks import upsample
from fiftyone_mobilesamv2.modeling.object_discovery import letterbox, snap_to_border, to_image

# With weights of this seed, the detector finds hundreds of boxes above this confidence on the photo of measure.py.
SEED = 0
CONFIDENCE = 0.002

_SAMS = {
    "tiny_vit": build_mobile_sam,
    "sam_vit_b": build_sam_vit_b,
    "sam_vit_l": build_sam_vit_l,
    "sam_vit_h": build_sam_vit_h,
}
_PROMPTS_PER_BATCH = 320


def make_sam(encoder: str) -> SAMModel:
    """A whole SAM with random weights."""
    torch.manual_seed(SEED)
    if encoder in _SAMS:
        return _with_lively_weights(_SAMS[encoder]())
    sam = build_mobile_sam()
    # EfficientViT-SAM's own code is not used: its encoder is built from timm's blocks and this package's neck.
    sam.image_encoder = encoder_config(encoder).build()
    return _with_lively_weights(sam.eval())


def make_detector() -> SegmentationModel:
    """The object-aware model's architecture, YOLOv8x-seg with one class and 26 bins per side, with random weights."""
    torch.manual_seed(SEED)
    config = yaml_model_load("yolov8x-seg.yaml") | {"nc": 1, "reg_max": 26}
    return _with_lively_weights(SegmentationModel(config, verbose=False).eval())


def _with_lively_weights(module: nn.Module) -> nn.Module:
    """Applies Kaiming initialisation: with PyTorch's default, a deep network's output hardly depends on its input."""
    for name, weight in module.named_parameters():
        if weight.ndim > 1 and weight.requires_grad and "attention_biases" not in name:
            nn.init.kaiming_normal_(weight)
    return module.requires_grad_(False)


def write_checkpoints(folder: Path, encoder: str = "tiny_vit") -> dict[str, Path]:
    """Writes these weights to files. Returns argument of `MobileSAMv2.from_checkpoints` -> path."""
    # ultralytics determines the model type by the end of the name.
    sam, detector = folder / f"{encoder}_mobile_sam.pt", folder / "detector.pt"
    if not sam.exists():
        torch.save(make_sam(encoder).state_dict(), sam)
    if not detector.exists():
        torch.save(make_detector().state_dict(), detector)
    return {"encoder_checkpoint": sam, "decoder_checkpoint": sam, "detector_checkpoint": detector}


class Released:
    """The released pipeline.

    Attributes:
        seconds: wall time per stage ("discover", "encode", "decode", "crop") since it was last cleared.
    """

    def __init__(self, sam: SAMModel, detector: SegmentationModel | None = None, device: str = "cpu") -> None:
        self.sam = sam.to(device)
        self.detector = detector if detector is None else detector.to(device)
        self.device = device
        self.seconds: Counter[str] = Counter()

    @torch.inference_mode()
    def __call__(self, path: Path, max_prompts: int) -> Tensor:
        """Masks [N, H, W], 0 or 1 in float32, of the image in a file."""
        image = read_rgb(path)
        boxes = self.discover(image, max_prompts)
        features, input_size = self.encode(image)
        masks = []
        for batch in boxes.split(_PROMPTS_PER_BATCH):
            logits = self.decode(features, batch, image.shape[:2], input_size)
            masks.append(self.postprocess(logits, image.shape[:2], input_size))
        return torch.cat(masks)

    @torch.inference_mode()
    def discover(self, image: np.ndarray, max_prompts: int, conf: float = CONFIDENCE) -> Tensor:
        """Boxes [N, 4] xyxy in pixels of the image."""
        with self._timed("discover"):
            pixels = letterbox(image, 1024).contiguous().to(self.device)
            boxes = non_max_suppression(self.detector(pixels)[0], conf, NMS_IOU, max_det=max_prompts, nc=1)[0][:, :4]
            size = tuple(pixels.shape[-2:])
            return to_image(snap_to_border(boxes, size), size, image.shape[:2])

    @torch.inference_mode()
    def encode(self, image: np.ndarray) -> tuple[Tensor, tuple[int, int]]:
        """The embedding [1, C, G, G], and the size of the resized image in the network input."""
        with self._timed("encode"):
            pixels, input_size = preprocess(image, 1024)
            return self.sam.image_encoder(pixels[None].contiguous().to(self.device)), input_size

    @torch.inference_mode()
    def decode(self, features: Tensor, boxes: Tensor, size: tuple[int, int], input_size: tuple[int, int]) -> Tensor:
        """Low-res logits [N, 1, L, L] of boxes in pixels of an image of `size` (h, w)."""
        with self._timed("decode"):
            scale = torch.tensor([i / s for i, s in zip(input_size[::-1], size[::-1])] * 2, device=self.device)
            sparse, dense = self.sam.prompt_encoder(points=None, boxes=boxes * scale, masks=None)
            return self.sam.mask_decoder(
                image_embeddings=features,  # ultralytics' decoder makes the copies itself
                image_pe=self.sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )[0]

    @torch.inference_mode()
    def postprocess(self, logits: Tensor, size: tuple[int, int], input_size: tuple[int, int]) -> Tensor:
        """Masks [N, H, W], 0 or 1 in float32."""
        with self._timed("crop"):
            return (upsample(logits[:, 0], 1024, input_size, size) > 0) * 1.0

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = perf_counter()
        yield
        synchronize()
        self.seconds[stage] += perf_counter() - start


class PlausibleMasks:
    """Replaces a decoder's logits with those of masks that look like objects.

    Random weights produce noise that fills the image. Cropping and storing such masks costs far more than masks of a
    trained model.

    Args:
        bank: [K, L, L]; prompt i of a call gets map i modulo K.
    """

    def __init__(self, bank: Tensor) -> None:
        self.bank = bank

    def __call__(self, decoder: nn.Module, inputs: tuple, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """A forward hook."""
        for logits in output[0].split(len(self.bank)):
            logits.copy_(self.bank[: len(logits), None])
        return output


def object_like_logits(count: int = 64) -> Tensor:
    """The demo model's low-res logits for boxes on the photo, resized to SAM's: [count, 256, 256]."""
    demo = MobileSAMv2.from_pretrained("mobilesamv2-demo-torch", device="cpu")
    logits, _ = demo.decode(demo.encode([photo()]), [random_boxes(count, photo().shape[:2])])
    return F.interpolate(logits[0][None], (256, 256), mode="bilinear", align_corners=False)[0].contiguous()
