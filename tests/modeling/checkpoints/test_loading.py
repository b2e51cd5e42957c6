"""Weights files: every layout loads to the same tensors, and mismatches are refused."""

import io
import random
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from ultralytics.nn.tasks import DetectionModel, yaml_model_load

from fiftyone_mobilesamv2.errors import CheckpointError
from fiftyone_mobilesamv2.modeling.checkpoints.loading import load_decoder, load_detector, load_encoder, read_tensors
from fiftyone_mobilesamv2.modeling.image_encoders import encoder_config


def prefixed(prefix: str, tensors: dict) -> dict:
    return {prefix + key: value for key, value in tensors.items()}


def whole_sam(encoder: dict, decoder: dict) -> dict:
    """The layout of MobileSAM v1, which is also Meta's."""
    return (
        prefixed("image_encoder.", encoder)
        | prefixed("prompt_encoder.", decoder["PromtEncoder"])
        | prefixed("mask_decoder.", decoder["MaskDecoder"])
    )


def assert_holds(module: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    loaded = module.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())


# Layouts ------------------------------------------------------------------------------------------------------------

ENCODER_LAYOUTS = {
    "whole SAM": whole_sam,
    "v2 archive": lambda encoder, decoder: {"model": encoder},
    "EfficientViT-SAM": lambda encoder, decoder: {"state_dict": prefixed("image_encoder.", encoder), "epoch": 3},
    "wrapped twice": lambda encoder, decoder: {"model": {"state_dict": prefixed("sam.image_encoder.", encoder)}},
    "bare": lambda encoder, decoder: encoder,
}


@pytest.mark.parametrize("name", ["tiny_vit", "efficientvit_l0"])
@pytest.mark.parametrize("layout", ENCODER_LAYOUTS)
def test_encoder_layouts(seeded, tmp_path, name, layout):
    tensors = seeded.encoder_tensors(name)
    torch.save(ENCODER_LAYOUTS[layout](tensors, seeded.decoder_tensors()), tmp_path / "weights.pt")
    rename = encoder_config(name).rename
    expected = {rename(key): value for key, value in tensors.items()}
    assert len(expected) == len(tensors)
    assert_holds(load_encoder(tmp_path / "weights.pt", name), expected)


@pytest.mark.parametrize("layout", ["whole SAM", "PromtEncoder and MaskDecoder", "state_dict"])
def test_decoder_layouts(seeded, tmp_path, layout):
    decoder = seeded.decoder_tensors()
    flat = whole_sam({"patch_embed.weight": torch.zeros(1)}, decoder)
    layouts = {"whole SAM": flat, "PromtEncoder and MaskDecoder": decoder, "state_dict": {"state_dict": flat}}
    torch.save(layouts[layout], tmp_path / "weights.pt")
    expected = {key: value for key, value in flat.items() if not key.startswith("image_encoder.")}
    assert_holds(load_decoder(tmp_path / "weights.pt", "tiny_vit"), expected)


def test_half_precision_safetensors_are_loaded(seeded, tmp_path):
    encoder, decoder = seeded.encoder_tensors("tiny_vit"), seeded.decoder_tensors()
    halves = {
        key: value.half() if value.is_floating_point() else value for key, value in whole_sam(encoder, decoder).items()
    }
    path = tmp_path / "sam.safetensors"
    save_file(halves, path)
    expected = {key: halves[f"image_encoder.{key}"].to(value.dtype) for key, value in encoder.items()}
    assert_holds(load_encoder(path, "tiny_vit"), expected)
    loaded = load_decoder(path, "tiny_vit").state_dict()
    assert all(torch.equal(loaded[key], halves[key].float()) for key in loaded)


def test_pickled_detector_equals_full_unpickling(seeded, tmp_path):
    # Full unpickling is safe here because the file is the project's own.
    whole = torch.load(seeded.detector_checkpoint, map_location="cpu", weights_only=False)["model"].state_dict()
    tensors = read_tensors(seeded.detector_checkpoint)
    assert tensors.keys() == whole.keys()
    assert all(torch.equal(tensors[key], value) for key, value in whole.items())

    save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "detector.safetensors")
    image = torch.linspace(0, 1, 3 * 64 * 96).reshape(1, 3, 64, 96)
    expected = DetectionModel(yaml_model_load("yolov8n.yaml") | {"nc": 1, "reg_max": 26}, verbose=False).eval()
    expected.load_state_dict({key: value for key, value in tensors.items() if not key.startswith("model.22.cv4.")})
    with torch.inference_mode():
        reference = expected(image)[0]
        for path in (seeded.detector_checkpoint, tmp_path / "detector.safetensors"):
            torch.testing.assert_close(load_detector(path)(image)[0], reference, rtol=1e-4, atol=1e-3)


def vit_shapes(dim: int, depth: int, global_blocks: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of Meta's ViT as published: heads of 64 or 80 channels, 14x14 windows, 64x64 patches of 16 px."""
    head = {768: 64, 1024: 64, 1280: 80}[dim]
    shapes = {
        "pos_embed": (1, 64, 64, dim),
        "patch_embed.proj.weight": (dim, 3, 16, 16),
        "patch_embed.proj.bias": (dim,),
        "neck.0.weight": (256, dim, 1, 1),
        "neck.2.weight": (256, 256, 3, 3),
    } | {f"neck.{i}.{kind}": (256,) for i in (1, 3) for kind in ("weight", "bias")}
    for i in range(depth):
        offsets = (2 * 64 - 1 if i in global_blocks else 2 * 14 - 1, head)
        block = {"attn.rel_pos_h": offsets, "attn.rel_pos_w": offsets}
        for name, n_out, n_in in (
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.lin1", 4 * dim, dim),
            ("mlp.lin2", dim, 4 * dim),
        ):
            block |= {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}
        block |= {f"norm{n}.{kind}": (dim,) for n in (1, 2) for kind in ("weight", "bias")}
        shapes |= prefixed(f"blocks.{i}.", block)
    return shapes


@pytest.mark.parametrize(
    "name, dim, depth, global_blocks",
    [
        ("sam_vit_b", 768, 12, (2, 5, 8, 11)),
        ("sam_vit_l", 1024, 24, (5, 11, 17, 23)),
        ("sam_vit_h", 1280, 32, (7, 15, 23, 31)),
    ],
)
def test_vit_has_the_published_structure(seeded, name, dim, depth, global_blocks):
    expected = vit_shapes(dim, depth, global_blocks)
    if name != "sam_vit_l":  # the reference has only the other two
        assert {key: tuple(shape) for key, shape in seeded.json(f"{name}.keys.json").items()} == expected
    with torch.device("meta"):
        module = encoder_config(name).build()
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == expected
    assert module.blocks[0].attn.num_heads == {768: 12, 1024: 16, 1280: 16}[dim]


# Mismatches -----------------------------------------------------------------------------------------------------------


def spoiled(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    first = next(iter(tensors))
    if how == "missing":
        return {key: value for key, value in tensors.items() if key != first}
    if how == "unexpected":
        return tensors | {"intruder.weight": torch.zeros(1)}
    shape = torch.zeros(7) if how == "of the wrong shape" else torch.empty(tensors[first].shape, device="meta")
    return tensors | {first: shape}


@pytest.mark.parametrize("how", ["missing", "unexpected", "of the wrong shape"])
def test_mismatch_names_file_encoder_and_tensor(seeded, tmp_path, how):
    path = tmp_path / "weights.pt"
    encoder = seeded.encoder_tensors("tiny_vit")
    torch.save(spoiled(encoder, how), path)
    key = "intruder.weight" if how == "unexpected" else next(iter(encoder))
    with pytest.raises(CheckpointError, match="tiny_vit") as refusal:
        load_encoder(path, "tiny_vit")
    assert str(path) in str(refusal.value) and f"1 {how}: {key}" in str(refusal.value)

    decoder = seeded.decoder_tensors()
    torch.save({**decoder, "MaskDecoder": spoiled(decoder["MaskDecoder"], how)}, path)
    key = "intruder.weight" if how == "unexpected" else next(iter(decoder["MaskDecoder"]))
    with pytest.raises(CheckpointError, match="tiny_vit") as refusal:
        load_decoder(path, "tiny_vit")
    assert str(path) in str(refusal.value) and f"1 {how}: mask_decoder.{key}" in str(refusal.value)


def test_checkpoint_of_another_encoder_is_refused(seeded, tmp_path):
    torch.save({"model": seeded.encoder_tensors("efficientvit_l0")}, tmp_path / "l0.pt")
    with pytest.raises(
        CheckpointError, match=r"l0\.pt does not match the image encoder tiny_vit: .* missing: .* unexpected"
    ):
        load_encoder(tmp_path / "l0.pt", "tiny_vit")
    with pytest.raises(
        CheckpointError, match=r"l0\.pt does not match the prompt-guided decoder of tiny_vit: 137 missing"
    ):
        load_decoder(tmp_path / "l0.pt", "tiny_vit")
    with pytest.raises(CheckpointError, match=r"l0\.pt does not contain a YOLOv8 detector: found tensors backbone"):
        load_detector(tmp_path / "l0.pt")


def test_file_with_two_encoders_is_refused(seeded, tmp_path):
    encoder = seeded.encoder_tensors("tiny_vit")
    torch.save(prefixed("image_encoder.", encoder) | prefixed("ema.image_encoder.", encoder), tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match="more than one image encoder"):
        load_encoder(tmp_path / "two.pt", "tiny_vit")


def test_tensors_without_data_count_as_missing(seeded, tmp_path):
    """A meta or sparse tensor may have the right name and shape but can't be copied."""
    tensors = seeded.encoder_tensors("tiny_vit")
    first, second = list(tensors)[:2]
    tensors |= {first: tensors[first].to("meta"), second: tensors[second].to_sparse()}
    torch.save(tensors, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=f"2 missing: {first}, {second}"):
        load_encoder(tmp_path / "weights.pt", "tiny_vit")


def test_detector_with_many_classes_is_refused(tmp_path):
    detector = DetectionModel("yolov8n.yaml", verbose=False)
    save_file({key: value.clone() for key, value in detector.state_dict().items()}, tmp_path / "coco.safetensors")
    with pytest.raises(CheckpointError, match=r"coco\.safetensors detects 80 classes"):
        load_detector(tmp_path / "coco.safetensors")


@pytest.mark.parametrize("shape", [(), (16,), (3, 3, 3, 3), (0, 3, 3, 3)])
def test_detector_with_absurd_shapes_is_refused(tmp_path, shape):
    names = ("model.0.conv.weight", "model.22.cv3.0.2.weight", "model.22.dfl.conv.weight")
    save_file({name: torch.zeros(shape) for name in names}, tmp_path / "absurd.safetensors")
    with pytest.raises(CheckpointError, match="not contain a YOLOv8 detector"):
        load_detector(tmp_path / "absurd.safetensors")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"<!doctype html><title>Not found</title>", b"PK\x03\x04", None, "folder"])
def test_missing_and_unrelated_files_are_refused(tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match="does not exist or is not a file" if content in (None, "folder") else "is not"
    ) as refusal:
        read_tensors(path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("value", [[1, 2], "text", torch.zeros(2), None])
def test_file_without_named_tensors_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="not named tensors"):
        read_tensors(tmp_path / "weights.pt")


def test_keys_other_than_strings_are_converted(tmp_path):
    torch.save({0: torch.zeros(1), None: {1.5: torch.ones(1)}}, tmp_path / "weights.pt")
    assert list(read_tensors(tmp_path / "weights.pt")) == ["0", "None.1.5"]
    with pytest.raises(CheckpointError, match="does not match"):
        load_encoder(tmp_path / "weights.pt", "tiny_vit")


def test_recursive_containers_are_read_once(tmp_path):
    content = {"weight": torch.zeros(1)}
    content["model"] = content["other"] = content
    torch.save(content, tmp_path / "weights.pt")
    assert list(read_tensors(tmp_path / "weights.pt")) == ["weight"]

    fan = {"weight": torch.zeros(1)}
    for _ in range(60):  # 2**60 paths to one tensor
        fan = {"a": fan, "b": fan}
    torch.save(fan, tmp_path / "fan.pt")
    assert len(read_tensors(tmp_path / "fan.pt")) == 1


def checkpoint_bytes(kind: str, tmp_path: Path) -> bytes:
    buffer = io.BytesIO()
    layers = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    if kind == "safetensors":
        save_file(layers.state_dict(), tmp_path / "good.safetensors")
        return (tmp_path / "good.safetensors").read_bytes()
    torch.save({"model": layers} if kind == "pickled module" else layers.state_dict(), buffer)
    return buffer.getvalue()


def rewrite(archive: bytes, change) -> bytes:
    """A zip file with `change` applied to its pickle, and correct checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name.endswith("data.pkl") else old.read(name))
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["tensors", "pickled module", "safetensors"])
def test_damaged_files_load_or_are_refused(tmp_path, kind):
    """Damage: changed bytes, truncated files, and pickles changed under a valid checksum."""
    good = checkpoint_bytes(kind, tmp_path)
    path = tmp_path / ("damaged.safetensors" if kind == "safetensors" else "damaged.pt")
    dice = random.Random(0)

    def flip(data: bytes) -> bytes:
        data = bytearray(data)
        for _ in range(dice.choice((1, 1, 4))):
            data[dice.randrange(len(data))] = dice.randrange(256)
        return bytes(data)

    refused = 0
    for attempt in range(600):
        damaged = good[: dice.randrange(len(good))] if attempt % 4 == 0 else flip(good)
        if attempt % 2 and kind != "safetensors":
            damaged = rewrite(good, flip)
        path.write_bytes(damaged)
        try:
            read_tensors(path)
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 150  # at least every truncated file: the damage has an effect
