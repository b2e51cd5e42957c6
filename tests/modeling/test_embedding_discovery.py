"""Object discovery from the embedding: boxes are in pixels of the image, and one encoding is enough."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from fiftyone_mobilesamv2.errors import CheckpointError
from fiftyone_mobilesamv2.modeling.checkpoints.files import PACKAGED_WEIGHTS
from fiftyone_mobilesamv2.modeling.checkpoints.loading import load_discovery
from fiftyone_mobilesamv2.modeling.embedding_discovery import EmbeddingDetector, EmbeddingDiscovery
from fiftyone_mobilesamv2.modeling.image_encoders import encoder_config
from fiftyone_mobilesamv2.modeling.mobilesamv2 import MobileSAMv2
from fiftyone_mobilesamv2.modeling.object_discovery import ObjectDiscovery
from fiftyone_mobilesamv2.modeling.prompt_guided_decoder import PromptGuidedDecoder

ENCODER = "efficientnet_lite0"


@pytest.fixture
def networks():
    torch.manual_seed(0)
    config = encoder_config(ENCODER)
    detector = EmbeddingDetector(config.embed_dim, 16)
    nn.init.normal_(detector.detect.cv3[1][-1].weight, std=3)  # so that some scores are high
    decoder = PromptGuidedDecoder(config.embed_dim, config.embed_size, config.image_size)
    return config, config.build(), decoder, detector


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (240, 320, 3)).astype(np.uint8)


class FixedDetector(nn.Module):
    """Finds the same boxes, given as xyxy in network pixels, everywhere."""

    def __init__(self, *boxes):
        super().__init__()
        corners = torch.tensor(boxes, dtype=torch.float32)
        self.raw = nn.Parameter(
            torch.cat([(corners[:, :2] + corners[:, 2:4]) / 2, corners[:, 2:4] - corners[:, :2], corners[:, 4:]], 1).T
        )

    def forward(self, embedding):
        return self.raw[None], {}


def test_boxes_are_in_pixels_of_the_image():
    found = EmbeddingDiscovery(
        FixedDetector(
            (0, 0, 256, 192, 0.9),
            (400, 300, 600, 500, 0.8),  # ends in the padding
            (100, 400, 200, 500, 0.7),  # lies in it
            (-20, 10, 30, 20, 0.6),
        )
    )(torch.zeros(128, 32, 32), (384, 512), (480, 640), 0.5, 0.9, 10)
    assert found.boxes.tolist() == [[0, 0, 320, 240], [500, 375, 640, 480], [0, 12.5, 37.5, 25]]
    assert found.scores.tolist() == pytest.approx([0.9, 0.8, 0.6])


def test_an_anchor_sees_its_place(networks):
    """A change of one cell of the embedding changes the scores around it most, at every stride."""
    config, _, _, detector = networks
    detector.eval()
    embedding = torch.zeros(2, config.embed_dim, 32, 32)
    embedding[1, :, 24, 8] = 50
    with torch.no_grad():
        raw, _ = detector(embedding)
    assert raw.shape == (2, 5, 64**2 + 32**2 + 16**2)
    changes = (raw[1, 4] - raw[0, 4]).abs().split([64**2, 32**2, 16**2])
    for change, side in zip(changes, (64, 32, 16)):
        row, column = divmod(int(change.argmax()), side)
        assert abs((row + 0.5) / side - 24.5 / 32) < 2.5 / side + 1 / 32
        assert abs((column + 0.5) / side - 8.5 / 32) < 2.5 / side + 1 / 32


def test_one_encoding_serves_discovery_and_masks(networks, image):
    config, encoder, decoder, detector = networks
    calls = []
    encoder.register_forward_hook(lambda *args: calls.append(1))
    model = MobileSAMv2(encoder, decoder, config, EmbeddingDiscovery(detector), device="cpu")
    (prompts,) = model.discover([image], conf=0.001, max_prompts=5)
    assert len(prompts) == 5 and len(calls) == 1
    (found,) = model.segment_everything([image], conf=0.001, max_prompts=5)
    assert len(calls) == 2
    assert set(found.confidence) <= set(prompts.scores.numpy())
    # In a batch, the boxes are the same.
    other = np.ascontiguousarray(image[:200, ::-1])
    batch = model.discover([other, image], conf=0.001, max_prompts=5)
    assert torch.equal(batch[1].boxes, prompts.boxes) and torch.equal(batch[1].scores, prompts.scores)


def test_prepared_for_inference_it_finds_the_same(networks):
    config, encoder, decoder, detector = networks
    embedding = torch.randn(1, config.embed_dim, 32, 32)
    with torch.no_grad():
        expected = detector.eval()(embedding)[0]
        prepared = MobileSAMv2(encoder, decoder, config, EmbeddingDiscovery(detector), device="cpu").discovery
        torch.testing.assert_close(prepared.detector(embedding)[0], expected, rtol=1e-4, atol=1e-3)


def test_the_content_of_a_file_decides_what_it_is(networks, tmp_path):
    _, _, _, detector = networks
    save_file(detector.state_dict(), path := tmp_path / "detector.safetensors")
    loaded = load_discovery(path, ENCODER, 320)
    assert isinstance(loaded, EmbeddingDiscovery)
    assert all(
        torch.equal(tensor, detector.state_dict()[name]) for name, tensor in loaded.detector.state_dict().items()
    )
    assert isinstance(load_discovery(PACKAGED_WEIGHTS / "demo_detector.safetensors", ENCODER, 320), ObjectDiscovery)
    with pytest.raises(CheckpointError, match="does not match the detector in the embedding of tiny_vit"):
        load_discovery(path, "tiny_vit", 1024)


@pytest.mark.parametrize("encoder", ["tiny_vit", "resnet_demo"])
def test_strides_are_those_of_the_embedding(encoder):
    config = encoder_config(encoder)
    stride = config.image_size // config.embed_size
    detector = EmbeddingDetector(config.embed_dim, stride).eval()
    with torch.no_grad():
        raw, _ = detector(torch.randn(1, config.embed_dim, config.embed_size, config.embed_size))
    centers = raw[0, :2]
    assert 0.9 * config.image_size < centers.max() < 1.1 * config.image_size


def test_other_detectors_do_not_change_it(networks, tmp_path):
    """ultralytics sets which convolutions a head has on its class, when it builds a model."""
    _, _, _, detector = networks
    save_file(detector.state_dict(), path := tmp_path / "detector.safetensors")
    for name in ("yolov8n.yaml", "yolo11n.yaml"):
        DetectionModel(name, verbose=False)
        assert EmbeddingDetector(128, 16).state_dict().keys() == detector.state_dict().keys()
        load_discovery(path, ENCODER, 320)
