"""Modules prepared for inference give the results of the plain modules."""

import copy

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torchvision.ops import box_iou
from ultralytics.models.sam.modules.encoders import ImageEncoderViT
from ultralytics.models.sam.modules.tiny_encoder import TinyViT
from ultralytics.nn.tasks import SegmentationModel, yaml_model_load

from fiftyone_mobilesamv2.images import read_image
from fiftyone_mobilesamv2.modeling.checkpoints.files import PACKAGED_WEIGHTS
from fiftyone_mobilesamv2.modeling.checkpoints.loading import load_detector
from fiftyone_mobilesamv2.modeling.image_encoders import ENCODERS as REGISTRY
from fiftyone_mobilesamv2.modeling.image_encoders import encoder_config
from fiftyone_mobilesamv2.modeling.inference import InFloat32, Strips, prepare_for_inference
from fiftyone_mobilesamv2.modeling.object_discovery import ObjectDiscovery

CPU = torch.device("cpu")

# The parity suite covers the released geometries. A smaller image exercises the same parts, including padded windows.
ENCODERS = {
    "tiny_vit": lambda: TinyViT(
        256, embed_dims=(64, 128, 160, 320), depths=(1, 1, 1, 1), num_heads=(2, 4, 5, 10), window_sizes=(7, 7, 14, 7)
    ),
    "sam_vit": lambda: ImageEncoderViT(
        256, embed_dim=96, depth=2, num_heads=3, use_rel_pos=True, window_size=14, global_attn_indexes=(1,)
    ),
    "efficientvit_l0": encoder_config("efficientvit_l0").build,
    "efficientnet_lite0": encoder_config("efficientnet_lite0").build,
    "resnet_demo": encoder_config("resnet_demo").build,
}
# {encoder of the registry: the encoder above that has the same parts}
SAME_PARTS = {
    "tiny_vit": "tiny_vit",
    **dict.fromkeys(("efficientvit_l0", "efficientvit_l1", "efficientvit_l2"), "efficientvit_l0"),
    **dict.fromkeys(("sam_vit_b", "sam_vit_l", "sam_vit_h"), "sam_vit"),
    "efficientnet_lite0": "efficientnet_lite0",
    "resnet_demo": "resnet_demo",
}


def test_every_encoder_is_covered():
    assert set(SAME_PARTS) == set(REGISTRY) and set(SAME_PARTS.values()) == set(ENCODERS)


def test_batch_norm_without_a_convolution_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
            self.norm = nn.BatchNorm2d(4)

    for module in (Odd(), nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(3))):
        with pytest.raises(ValueError, match="does not follow a convolution"):
            prepare_for_inference(module, CPU, torch.float32)


def randomised(module: nn.Module) -> nn.Module:
    """Gives the module nontrivial statistics, biases and relative positions, as in a trained one."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.normal_(child.running_mean, std=0.2)
            nn.init.uniform_(child.running_var, 0.5, 2)
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.normal_(child.bias, std=0.2)
    for name, parameter in module.named_parameters():
        if "attention_biases" in name or "rel_pos" in name:
            nn.init.normal_(parameter)
    return module.requires_grad_(False).eval()


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """An encoder, an input, and the output for that input."""
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        module = randomised(ENCODERS[request.param]())
        pixels = torch.randn(1, 3, 256, 256)
        return module, pixels, module(pixels)


@torch.inference_mode()
def test_prepared_encoder_gives_the_same_embedding(encoder):
    module, pixels, expected = encoder
    prepared = copy.deepcopy(module)
    prepare_for_inference(prepared, CPU, torch.float32)
    assert not any(isinstance(child, nn.BatchNorm2d) for child in prepared.modules())
    embedding = prepared(pixels)
    torch.testing.assert_close(embedding, expected, rtol=0, atol=3e-5 * float(expected.std()))

    # Another model may be built from modules that are already prepared.
    layers = [type(child) for child in prepared.modules()]
    prepare_for_inference(prepared, CPU, torch.float32)
    assert [type(child) for child in prepared.modules()] == layers
    assert torch.equal(prepared(pixels), embedding)


@pytest.mark.slow
@torch.inference_mode()
def test_bfloat16_embedding_is_close(encoder):
    module, pixels, expected = encoder
    prepared = copy.deepcopy(module)
    prepare_for_inference(prepared, CPU, torch.bfloat16)
    assert torch.cosine_similarity(prepared(pixels.bfloat16()).float(), expected, dim=1).min() >= 0.999


@pytest.mark.parametrize("size", [5, 8, 17])
@torch.inference_mode()
def test_strips_are_seamless(size):
    """Two convolutions need a halo of two rows; biases would reveal a strip border treated as the image's border."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1))
    pixels = torch.randn(1, 3, size, 6)
    torch.testing.assert_close(Strips(module, rows=4, halo=2, dim=2)(pixels), module(pixels))


def test_in_float32_keeps_float32():
    weight = torch.tensor([[1 + 2**-12]])
    layer = InFloat32(nn.Linear(1, 1, bias=False))
    layer.module.weight.data = weight.clone()
    model = nn.Sequential(nn.Linear(1, 1), layer).to(torch.bfloat16).half()
    assert model[0].weight.dtype == torch.float16
    assert torch.equal(layer.module.weight.data, weight)
    assert layer(torch.ones(1, 1, dtype=torch.bfloat16)).dtype == torch.float32


@torch.inference_mode()
def test_prepared_detector_gives_the_same_boxes(tmp_path):
    """The reference is the full segmentation model with its batch norms."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = yaml_model_load("yolov8n-seg.yaml") | {"nc": 1, "reg_max": 26}
        detector = randomised(SegmentationModel(config, verbose=False))
        pixels = torch.rand(1, 3, 96, 128)
    torch.save(detector.state_dict(), tmp_path / "detector.pt")
    prepared = load_detector(tmp_path / "detector.pt")
    prepare_for_inference(prepared, CPU, torch.float32)
    raw = detector(pixels)[0][0]
    torch.testing.assert_close(prepared(pixels)[0], raw[:, :5], rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=r"prepared for \('cpu', torch.float32\): load another one"):
        prepare_for_inference(prepared, CPU, torch.bfloat16)
    prepared = load_detector(tmp_path / "detector.pt")
    prepare_for_inference(prepared, CPU, torch.bfloat16)
    assert prepared(pixels.bfloat16())[0].dtype == torch.float32
    # Anchors must be float32, too: in bfloat16 they would be off by 4 px at the far end of a large image.
    prepared(torch.zeros(1, 3, 32, 4096, dtype=torch.bfloat16))
    assert prepared.model[-1].head.anchors[0, :512].tolist() == [x + 0.5 for x in range(512)]


@pytest.mark.slow
@torch.inference_mode()
def test_bfloat16_boxes_are_close(photos):
    """Nearly every float32 box has its own bfloat16 box with an IoU of at least 0.95."""
    plain, prepared = (
        ObjectDiscovery(load_detector(PACKAGED_WEIGHTS / "demo_detector.safetensors"), 320) for _ in "ab"
    )
    prepare_for_inference(prepared.detector, CPU, torch.bfloat16)
    boxes = matched = 0
    for path in sorted(photos.rglob("*.jpg"))[::4]:
        image = read_image(path)
        overlap = box_iou(plain(image).boxes, prepared(image).boxes).numpy()
        rows, columns = linear_sum_assignment(overlap, maximize=True)
        boxes += len(overlap)
        matched += int((overlap[rows, columns] >= 0.95).sum())
    assert boxes > 200
    assert matched >= 0.98 * boxes
