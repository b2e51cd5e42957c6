"""Files of weights: every layout loads to the same tensors, what does not fit is refused, and nothing is executed."""

import builtins
import io
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.serialization import get_safe_globals, safe_globals
from ultralytics.nn.modules import Conv
from ultralytics.nn.tasks import DetectionModel, SegmentationModel, yaml_model_load

from fiftyone_mobilesamv2.modeling.checkpoints import (
    CheckpointError,
    load_decoder,
    load_detector,
    load_encoder,
    read_tensors,
)
from fiftyone_mobilesamv2.modeling.image_encoders import encoder_config


def prefixed(prefix: str, tensors: dict) -> dict:
    return {prefix + key: value for key, value in tensors.items()}


def whole_sam(encoder: dict, decoder: dict) -> dict:
    """MobileSAM v1's layout, which is Meta's."""
    return (
        prefixed("image_encoder.", encoder)
        | prefixed("prompt_encoder.", decoder["PromtEncoder"])
        | prefixed("mask_decoder.", decoder["MaskDecoder"])
    )


def assert_holds(module: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


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


def test_safetensors_in_half_precision(seeded, tmp_path):
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


def test_pickled_detector_and_its_tensors(seeded, tmp_path):
    # What the pickle holds, by unpickling it in full: the file is the project's own.
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
    """Meta's ViT by its published numbers: heads of 64 or 80 channels, windows of 14, 64 x 64 patches of 16 px."""
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
def test_vit_structure(seeded, name, dim, depth, global_blocks):
    expected = vit_shapes(dim, depth, global_blocks)
    if name != "sam_vit_l":  # the two that the reference has confirm the rule
        assert {key: tuple(shape) for key, shape in seeded.json(f"{name}.keys.json").items()} == expected
    with torch.device("meta"):
        module = encoder_config(name).build()
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == expected
    assert module.blocks[0].attn.num_heads == {768: 12, 1024: 16, 1280: 16}[dim]


# What does not fit --------------------------------------------------------------------------------------------------


def spoiled(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    first = next(iter(tensors))
    if how == "missing":
        return {key: value for key, value in tensors.items() if key != first}
    if how == "surplus":
        return tensors | {"intruder.weight": torch.zeros(1)}
    shape = torch.zeros(7) if how == "of the wrong shape" else torch.empty(tensors[first].shape, device="meta")
    return tensors | {first: shape}


@pytest.mark.parametrize("how", ["missing", "surplus", "of the wrong shape"])
def test_strictness_names_file_encoder_and_tensor(seeded, tmp_path, how):
    path = tmp_path / "weights.pt"
    encoder = seeded.encoder_tensors("tiny_vit")
    torch.save(spoiled(encoder, how), path)
    key = "intruder.weight" if how == "surplus" else next(iter(encoder))
    with pytest.raises(CheckpointError, match="tiny_vit") as refusal:
        load_encoder(path, "tiny_vit")
    assert str(path) in str(refusal.value) and f"1 {how}: {key}" in str(refusal.value)

    decoder = seeded.decoder_tensors()
    torch.save({**decoder, "MaskDecoder": spoiled(decoder["MaskDecoder"], how)}, path)
    key = "intruder.weight" if how == "surplus" else next(iter(decoder["MaskDecoder"]))
    with pytest.raises(CheckpointError, match="tiny_vit") as refusal:
        load_decoder(path, "tiny_vit")
    assert str(path) in str(refusal.value) and f"1 {how}: mask_decoder.{key}" in str(refusal.value)


def test_checkpoint_of_another_encoder(seeded, tmp_path):
    torch.save({"model": seeded.encoder_tensors("efficientvit_l0")}, tmp_path / "l0.pt")
    with pytest.raises(
        CheckpointError, match=r"l0\.pt does not fit the image encoder tiny_vit: .* missing: .* surplus"
    ):
        load_encoder(tmp_path / "l0.pt", "tiny_vit")
    with pytest.raises(
        CheckpointError, match=r"l0\.pt does not fit the prompt-guided decoder of tiny_vit: 137 missing"
    ):
        load_decoder(tmp_path / "l0.pt", "tiny_vit")
    with pytest.raises(CheckpointError, match=r"l0\.pt holds no YOLOv8 detector: found tensors backbone"):
        load_detector(tmp_path / "l0.pt")


def test_two_encoders_in_one_file(seeded, tmp_path):
    encoder = seeded.encoder_tensors("tiny_vit")
    torch.save(prefixed("image_encoder.", encoder) | prefixed("ema.image_encoder.", encoder), tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match="more than one image encoder"):
        load_encoder(tmp_path / "two.pt", "tiny_vit")


def test_tensors_without_data_count_as_missing(seeded, tmp_path):
    """A tensor on "meta" or a sparse one has the right name and shape, and can't be copied."""
    tensors = seeded.encoder_tensors("tiny_vit")
    first, second = list(tensors)[:2]
    tensors |= {first: tensors[first].to("meta"), second: tensors[second].to_sparse()}
    torch.save(tensors, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=f"2 missing: {first}, {second}"):
        load_encoder(tmp_path / "weights.pt", "tiny_vit")


def test_detector_of_many_classes(tmp_path):
    detector = DetectionModel("yolov8n.yaml", verbose=False)
    save_file({key: value.clone() for key, value in detector.state_dict().items()}, tmp_path / "coco.safetensors")
    with pytest.raises(CheckpointError, match=r"coco\.safetensors detects 80 classes"):
        load_detector(tmp_path / "coco.safetensors")


@pytest.mark.parametrize("shape", [(), (16,), (3, 3, 3, 3), (0, 3, 3, 3)])
def test_detector_with_absurd_tensors(tmp_path, shape):
    names = ("model.0.conv.weight", "model.22.cv3.0.2.weight", "model.22.dfl.conv.weight")
    save_file({name: torch.zeros(shape) for name in names}, tmp_path / "absurd.safetensors")
    with pytest.raises(CheckpointError, match="no YOLOv8 detector"):
        load_detector(tmp_path / "absurd.safetensors")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"<!doctype html><title>Not found</title>", b"PK\x03\x04", None, "folder"])
def test_what_is_no_checkpoint(tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match="There is no file" if content in (None, "folder") else "is not"
    ) as refusal:
        read_tensors(path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("value", [[1, 2], "text", torch.zeros(2), None])
def test_checkpoint_of_something_else(tmp_path, value):
    torch.save(value, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="not tensors by name"):
        read_tensors(tmp_path / "weights.pt")


def test_names_that_are_no_strings(tmp_path):
    torch.save({0: torch.zeros(1), None: {1.5: torch.ones(1)}}, tmp_path / "weights.pt")
    assert list(read_tensors(tmp_path / "weights.pt")) == ["0", "None.1.5"]
    with pytest.raises(CheckpointError, match="does not fit"):
        load_encoder(tmp_path / "weights.pt", "tiny_vit")


def test_containers_that_hold_themselves(tmp_path):
    content = {"weight": torch.zeros(1)}
    content["model"] = content["other"] = content
    torch.save(content, tmp_path / "weights.pt")
    assert list(read_tensors(tmp_path / "weights.pt")) == ["weight"]

    fan = {"weight": torch.zeros(1)}
    for _ in range(60):  # 2 ** 60 paths to one tensor
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
    """A zip file with `change` applied to its pickle, and checksums that are right again."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name.endswith("data.pkl") else old.read(name))
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["tensors", "pickled module", "safetensors"])
def test_damaged_files_load_or_are_refused(tmp_path, kind):
    """Bytes flipped anywhere, files cut anywhere, and pickles damaged behind a valid checksum."""
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
    assert refused > 150  # every cut one at least: the damage reaches the reader


# Hostile pickles ----------------------------------------------------------------------------------------------------


def call(name: str, *args: object) -> bytes:
    """The opcodes that call `name` ("module attribute") with `args`; bytes in `args` are opcodes themselves."""
    pushed = b"".join(arg if isinstance(arg, bytes) else pickle.dumps(arg, protocol=2)[2:-1] for arg in args)
    return b"c" + name.replace(" ", "\n").encode() + b"\n(" + pushed + b"tR"


def archive(program: bytes) -> bytes:
    """A file as torch.save writes it, around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in (
            ("data.pkl", b"\x80\x02" + program + b"."),
            ("byteorder", b"little"),
            ("version", b"3\n"),
        ):
            file.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def legacy(program: bytes) -> bytes:
    """A file as torch.save wrote it before 1.6: five pickles in a row."""
    header = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    pickles = [pickle.dumps(part, protocol=2) for part in header] + [b"\x80\x02" + program + b"."]
    return b"".join(pickles) + pickle.dumps([], protocol=2)


GETATTR = b"cbuiltins\ngetattr\n"

# name -> (opcodes given the marker's path, what the refusal names)
ATTACKS = {
    "os.system": (lambda marker: call("os system", f"touch {marker}"), "os.system"),
    "exec": (lambda marker: call("builtins exec", f"open({marker!r}, 'w')"), "builtins.exec"),
    "eval": (lambda marker: call("builtins eval", f"open({marker!r}, 'w')"), "builtins.eval"),
    "open": (lambda marker: call("builtins open", marker, "w"), "builtins.open"),
    "python 2 name": (lambda marker: call("__builtin__ open", marker, "w"), "builtins.open"),
    "numpy": (lambda marker: call("numpy.core.multiarray _reconstruct", marker), "_reconstruct"),
    "through a module's global": (lambda marker: call("torch.serialization os.system", f"touch {marker}"), "os.system"),
    "through an allowed prefix": (
        lambda marker: call("torch.nn.modules.module functools.os.system", f"touch {marker}"),
        None,
    ),
    "a re-exported torch.load": (lambda marker: call("torch.nn.modules.module torch.load", marker), None),
    "through ultralytics": (
        lambda marker: call("ultralytics.nn.tasks contextlib.os.system", f"touch {marker}"),
        None,
    ),
    "AutoBackend": (lambda marker: call("ultralytics.nn.autobackend AutoBackend", marker), None),
    "getattr chain": (
        lambda marker: (
            b"cbuiltins\ngetattr\n("
            + call("builtins getattr", b"ctorch.nn.modules\nmodule\n", "os")
            + pickle.dumps("system", protocol=2)[2:-1]
            + b"tR("
            + pickle.dumps(f"touch {marker}", protocol=2)[2:-1]
            + b"tR"
        ),
        None,
    ),
    "parse_model's eval": (
        lambda marker: call(
            "ultralytics.nn.tasks SegmentationModel",
            yaml_model_load("yolov8n-seg.yaml") | {"activation": f"open({marker!r}, 'w')"},
        ),
        None,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("container", [archive, legacy])
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_executed(tmp_path, attack, container):
    marker, path = tmp_path / "marker", tmp_path / "weights.pt"
    program, named = ATTACKS[attack]
    path.write_bytes(container(program(str(marker))))
    with pytest.raises(CheckpointError) as refusal:
        load_detector(path)
    assert str(path) in str(refusal.value)
    if named and container is archive:
        assert named in str(refusal.value)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("container", [archive, legacy])
@pytest.mark.parametrize("attack", ["os.system", "exec", "eval", "open", "parse_model's eval"])
def test_the_attacks_are_real(tmp_path, monkeypatch, attack, container):
    """Unpickled without protection, the same files do what the test above says that they don't."""
    monkeypatch.setattr(Conv, "default_act", Conv.default_act)  # parse_model changes it
    marker, path = tmp_path / "marker", tmp_path / "weights.pt"
    path.write_bytes(container(ATTACKS[attack][0](str(marker))))
    try:
        torch.load(path, weights_only=False)
    except Exception as error:
        assert attack == "parse_model's eval", error  # which goes on with a file for an activation
    assert marker.exists()


def test_plain_pickle_is_refused(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "weights.pt"
    path.write_bytes(b"\x80\x02" + call("os system", f"touch {marker}") + b".")
    with pytest.raises(CheckpointError, match=r"weights\.pt"):
        read_tensors(path)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore")
def test_what_others_allowed_does_not_count(tmp_path, seeded):
    """ultralytics puts its real classes on torch's allowlist for as long as the process lives."""
    marker, path = tmp_path / "marker", tmp_path / "weights.pt"
    path.write_bytes(archive(ATTACKS["parse_model's eval"][0](str(marker))))
    evil = tmp_path / "evil.pt"
    evil.write_bytes(archive(call("builtins open", str(marker), "w")))
    with safe_globals([SegmentationModel, (builtins.open, "builtins.open")]):
        before = set(get_safe_globals())
        with pytest.raises(CheckpointError):
            load_detector(path)
        with pytest.raises(CheckpointError, match=r"builtins\.open"):
            read_tensors(evil)
        assert not marker.exists()
        assert load_detector(seeded.detector_checkpoint) is not None
        assert set(get_safe_globals()) == before
        torch.load(evil, weights_only=True)  # theirs is as it was
        assert marker.exists()


def test_attributes_of_a_module_are_not_called(tmp_path):
    """A pickled module's hooks and shadowed methods are data like any other."""
    layer = nn.Linear(2, 1)
    layer.__dict__ |= {"state_dict": bytearray, "_state_dict_hooks": {0: bytearray}, "_modules": {}}
    torch.save({"model": layer}, tmp_path / "weights.pt")
    tensors = read_tensors(tmp_path / "weights.pt")
    assert tensors.keys() == {"weight", "bias"} and torch.equal(tensors["weight"], layer.weight)


def test_non_persistent_buffers_are_left_out(tmp_path):
    layer = nn.Linear(2, 1)
    layer.register_buffer("kept", torch.ones(1))
    layer.register_buffer("cache", torch.ones(1), persistent=False)
    torch.save({"model": layer}, tmp_path / "weights.pt")
    assert read_tensors(tmp_path / "weights.pt").keys() == layer.state_dict().keys() == {"weight", "bias", "kept"}
