"""The catalog, and every model of it: downloaded from where the catalog says, as the hosts serve it, and run.

The released files can't be had where tests run. Files of the same names and layouts with seeded weights take their
place, behind the real paths of a server on the loopback, under the hashes that these have.
"""

import dataclasses
import hashlib
import re
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import segment_anything
import torch
from ultralytics.nn.tasks import SegmentationModel, yaml_model_load

from fiftyone_mobilesamv2.modeling.checkpoints.catalog import MODELS, HubFile, PretrainedModel, Weights
from fiftyone_mobilesamv2.modeling.checkpoints.lookup import all_files, model_files
from fiftyone_mobilesamv2.modeling.image_encoders import ENCODERS
from fiftyone_mobilesamv2.modeling.masks import crop_masks
from fiftyone_mobilesamv2.modeling.mobilesamv2 import MobileSAMv2
from fiftyone_mobilesamv2.modeling.prompt_guided_decoder import PromptGuidedDecoder

NOTES = Path(__file__).resolve().parents[4] / "shared" / "notes" / "paper.md"
RELEASED = [name for name, model in MODELS.items() if not model.encoder_weights.is_packaged]
WITH_OWN_DECODER = ["mobilesamv2-vitb-torch", "mobilesamv2-vitl-torch"]
BOXES = np.array([[20, 30, 200, 180], [5, 5, 300, 235], [150, 60, 160, 200]], np.float32)

# What is declared ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", all_files(), ids=lambda weights: weights.filename)
def test_every_file_is_pinned(weights):
    if weights.is_packaged:
        return
    assert weights.sha256 or weights.git_blob
    assert weights.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", weights.sha256)
    assert weights.git_blob is None or re.fullmatch(r"[0-9a-f]{40}", weights.git_blob)
    assert weights.size is None or round(weights.size / 1e6) == weights.megabytes
    for source in weights.sources:
        if isinstance(source, HubFile):
            assert source.revision == "main" or re.fullmatch(r"[0-9a-f]{40}", source.revision)


def test_decoder_fits_the_encoder():
    """The prompt-guided one works on ViT-H's embedding; ViT-B and ViT-L have their own, in their own files."""
    for model in MODELS.values():
        if model.encoder in ("sam_vit_b", "sam_vit_l", "efficientnet_lite0", "resnet_demo"):
            assert model.decoder_weights == model.encoder_weights
        else:
            assert model.decoder_weights.filename == "Prompt_guided_Mask_Decoder.pt"


def test_digits_in_names_of_meta_are_no_sha256():
    for weights in all_files():
        if match := re.fullmatch(r"sam_vit_._([0-9a-f]{6})\.pth", weights.filename):
            assert not weights.sha256.startswith(match[1])


@pytest.mark.skipif(not NOTES.is_file(), reason="needs ../shared/notes/paper.md")
def test_catalog_has_the_facts_of_the_notes():
    _, _, text = NOTES.read_text().partition("## Checkpoints")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    hashes = {row: re.findall(r"\b[0-9a-f]{64}\b", row) for row in rows}
    assert sum(map(len, hashes.values())) == 8
    by_hash = {weights.sha256: weights for weights in all_files()}
    for row, found in hashes.items():
        for sha256 in found:
            weights = by_hash[sha256]
            assert f"`{weights.filename}`" in row
            sizes = re.findall(r"\b\d{1,3}(?:,\d{3}){2,}\b", row)
            assert [weights.size] == [int(size.replace(",", "")) for size in sizes] or not sizes
            for revision in re.findall(r"\b[0-9a-f]{40}\b", row):
                assert revision in "".join(map(str, weights.sources))
    assert [weights.git_blob for weights in all_files() if f"git blob {weights.git_blob}" in text]


# Seeded files in the released layouts --------------------------------------------------------------------------------


def seeded(name: str, value: torch.Tensor) -> torch.Tensor:
    """Values that depend on a tensor's name and shape alone, and keep activations in bounds."""
    if not value.is_floating_point():
        return torch.zeros(value.shape, dtype=value.dtype)
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.endswith("positional_encoding_gaussian_matrix"):
        return noise
    if name.endswith("running_var"):
        return 1 + 0.1 * noise.abs()
    if name.endswith(("bias", "running_mean", "rel_pos_h", "rel_pos_w", "pos_embed", "attention_biases")):
        return 0.05 * noise
    return 1 + 0.1 * noise if value.ndim == 1 else noise / value[0].numel() ** 0.5


def seeded_tensors(module: torch.nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + key: seeded(prefix + key, value) for key, value in module.state_dict().items()}


def released_name(key: str) -> str:
    """The name of an EfficientViT's tensor in the released files."""
    key = re.sub(r"^(neck\.(?:input|output)_ops\.\d+)\.", r"\1.op_list.0.", key)
    key = re.sub(r"^neck\.middle\.", "neck.middle.op_list.", key)
    key = key.replace("backbone.stem_in_conv.", "backbone.stages.0.op_list.0.")
    key = re.sub(r"^backbone\.stem_res(\d+)\.", lambda m: f"backbone.stages.0.op_list.{int(m[1]) + 1}.", key)
    return re.sub(r"^backbone\.stages_(\d+)\.blocks\.", lambda m: f"backbone.stages.{int(m[1]) + 1}.op_list.", key)


def released_content(weights: Weights, model: PretrainedModel) -> dict:
    """What is in a file of that name: the layout of its publisher."""
    if weights.filename == "ObjectAwareModel.pt":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            detector = SegmentationModel(yaml_model_load("yolov8x-seg.yaml") | {"nc": 1}, verbose=False)
        return {"model": detector.half(), "epoch": -1, "train_args": {"imgsz": 1024}}
    if weights.filename == "Prompt_guided_Mask_Decoder.pt":
        decoder = seeded_tensors(PromptGuidedDecoder())
        parts = {"PromtEncoder": "prompt_encoder.", "MaskDecoder": "mask_decoder."}
        return {
            part: {key.removeprefix(prefix): value for key, value in decoder.items() if key.startswith(prefix)}
            for part, prefix in parts.items()
        }
    if weights.filename.startswith("sam_vit"):  # by Meta's own code
        with torch.device("meta"):  # only names and shapes: initializing ViT-H takes longer than the seeded values
            sam = segment_anything.sam_model_registry[model.encoder.removeprefix("sam_")]()
        return seeded_tensors(sam)
    encoder = seeded_tensors(ENCODERS[model.encoder].build())
    if weights.filename == "mobile_sam.pt":
        whole = {f"image_encoder.{key}": value for key, value in encoder.items()}
        return whole | seeded_tensors(PromptGuidedDecoder())
    return {"state_dict": {f"image_encoder.{released_name(key)}": value for key, value in encoder.items()}}


@pytest.fixture(scope="session")
def released_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("released")


@pytest.fixture
def served(hub, folder, monkeypatch, released_folder):
    """Serves the files of a model as its hosts do, and points the catalog to this server and these files' hashes."""

    def serve(name: str) -> PretrainedModel:
        model = MODELS[name]
        moved = {weights: serve_file(weights, model) for weights in model_files(name)}
        parts = {
            part: moved[getattr(model, part)] for part in ("encoder_weights", "decoder_weights", "detector_weights")
        }
        small = {"detector_size": 256}  # to be faster: its weights are noise at any size
        monkeypatch.setitem(MODELS, name, dataclasses.replace(model, **parts, **small))
        return MODELS[name]

    def serve_file(weights: Weights, model: PretrainedModel) -> Weights:
        path = released_folder / weights.filename
        if not path.exists():
            torch.save(released_content(weights, model), path)
        content = path.read_bytes()
        sources = []
        for source in weights.sources:
            url = urlsplit(str(source))
            if isinstance(source, HubFile):  # which leads to another host, as large files do
                hub.linked[url.path] = f"/cdn/{weights.filename}"
                hub.files[f"/cdn/{weights.filename}"] = content
                sources.append(source)
            else:
                hub.files[url.path] = content
                sources.append(hub.url + url.path)
        pins = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "git_blob": None}
        return dataclasses.replace(weights, sources=tuple(sources), **pins)

    return serve


def image(height: int = 240, width: int = 320) -> np.ndarray:
    """uint8 RGB [H, W, 3] with waves and edges."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 17 + y / 31), np.sin(x / 7 - y / 13), np.cos((x**2 + y**2) / 9000)], -1)
    waves[60:180, 90:230] *= -1
    return np.uint8(127.5 * (1 + waves))


@pytest.fixture
def downloaded(served, hub, folder):
    """Loads a model of the catalog, and checks that each of its files was asked for once, from its first source."""

    def load(name: str) -> MobileSAMv2:
        model = served(name)
        loaded = MobileSAMv2.from_pretrained(name, device="cpu")
        requested = [path for method, path, _ in hub.requests if method == "GET" and not path.startswith("/api/")]
        sources = {weights: next(iter(weights.sources)) for weights in model_files(name)}
        assert requested == [
            f"/cdn/{weights.filename}" if isinstance(source, HubFile) else urlsplit(source).path  # redirects followed
            for weights, source in sources.items()
        ]
        assert {path.name for path in folder.glob("*.p*t*")} >= {weights.filename for weights in model.weights.values()}
        return loaded

    return load


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RELEASED if name not in WITH_OWN_DECODER])
def test_model_is_downloaded_and_segments(downloaded, name):
    (segmentation,) = downloaded(name).segment_everything([image()], conf=0.0, max_prompts=3)
    assert 0 < len(segmentation) <= 3 and all(mask.any() for mask in segmentation.masks)
    assert np.isfinite(segmentation.predicted_iou).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_OWN_DECODER)
def test_sam_with_its_own_decoder_is_downloaded_and_computes_what_metas_code_does(
    downloaded, released_folder, name, record_property
):
    """Embedding, logits, predicted IoU and masks of the whole SAM in one file, as segment-anything has it."""
    ours = downloaded(name)
    model = MODELS[name]
    theirs = segment_anything.sam_model_registry[model.encoder.removeprefix("sam_")]()
    theirs.load_state_dict(torch.load(released_folder / model.encoder_weights.filename, weights_only=True))
    predictor = segment_anything.SamPredictor(theirs.eval())
    picture = image()
    predictor.set_image(picture)
    boxes = predictor.transform.apply_boxes_torch(torch.from_numpy(BOXES), picture.shape[:2])
    masks, expected_iou, expected_logits = predictor.predict_torch(None, None, boxes, multimask_output=False)

    embeddings = ours.encode([picture])
    expected = predictor.get_image_embedding()
    deviation = float((embeddings.features - expected).abs().max() / expected.std())
    assert deviation < 1e-3
    record_property("embedding", deviation)
    (logits,), (iou,) = ours.decode(embeddings, [BOXES])
    deviation = float((logits - expected_logits[:, 0]).abs().max() / expected_logits.std())
    assert deviation < 1e-3
    record_property("logits", deviation)
    torch.testing.assert_close(iou, expected_iou[:, 0], atol=1e-4, rtol=0)

    found_boxes, cropped, *_ = crop_masks(logits, 1024, embeddings.input_sizes[0], picture.shape[:2])
    for mask, (x0, y0, x1, y1), whole in zip(cropped, found_boxes, masks[:, 0].numpy()):
        full = np.zeros(picture.shape[:2], bool)
        full[y0:y1, x0:x1] = mask
        assert (full & whole).sum() / (full | whole).sum() >= 0.999
