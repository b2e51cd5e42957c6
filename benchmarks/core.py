"""Compares the model's speed with the released code on the same machine: encode, discover, decode, crop.

    python benchmarks/core.py --device cuda

Needs only torch, torchvision, timm, numpy, opencv and ultralytics, so that it also runs on GPU machines without
FiftyOne. `make bench` runs it first. Weights are random, except the demo model's, which are part of the package.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import box_iou

# On a GPU machine, the package may not be installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from measure import (
    Report,
    Row,
    exponent,
    in_new_process,
    in_turns,
    machine,
    matrix_gflops,
    peak_memory,
    photo,
    photos,
    random_boxes,
    section,
    speedup,
    timed,
    turned,
)
from released import (
    CONFIDENCE,
    PlausibleMasks,
    Released,
    make_detector,
    make_sam,
    object_like_logits,
    write_checkpoints,
)
from ultralytics.utils import ASSETS

from fiftyone_mobilesamv2 import MobileSAMv2
from fiftyone_mobilesamv2.modeling.defaults import CONFIDENCE as OBJECT_CONFIDENCE
from fiftyone_mobilesamv2.modeling.devices import default_device
from fiftyone_mobilesamv2.modeling.object_discovery import BoxPrompts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOWER = 0.3
STAGES = ("discover", "encode", "decode", "crop")

# Prompts of an image with many objects, and the paper's maximum; number of timed runs of each.
RUNS_BY_PROMPTS = {64: 3, 320: 1}

# Images per batch, and number of runs. A ViT-B takes 10 s per image on two cores; ViT-L and ViT-H use the same code.
ENCODERS = {
    "tiny_vit": (8, 2),
    "efficientvit_l0": (2, 2),
    "efficientvit_l1": (2, 2),
    "efficientvit_l2": (2, 2),
    "sam_vit_b": (1, 1),
}
GPU_ENCODERS = dict.fromkeys([*ENCODERS, "sam_vit_l", "sam_vit_h"], (8, 5))
ENCODER_TARGETS = {"float32": 1.6, "bfloat16": None}
TINY_VIT_TARGETS = {"float32": 1.6, "bfloat16": 4.5}
DECODE_TARGETS = {"float32": 4, "bfloat16": 8}
DISCOVER_TARGETS = {"float32": 1.5, "bfloat16": 3.5}

LARGE = (1500, 2250)  # height, width
PROMPT_COUNTS = (64, 128, 256, 512, 1000)

# Dense bfloat16 TFLOP/s, from NVIDIA's data sheets.
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989}


def load(folder: Path, dtype: str, device: str, encoder: str = "tiny_vit", detector: bool = True) -> MobileSAMv2:
    files = write_checkpoints(folder, encoder)
    if not detector:
        del files["detector_checkpoint"]
    return MobileSAMv2.from_checkpoints(encoder, **files, device=device, dtype=DTYPES[dtype])


# Same results ---------------------------------------------------------------------------------------------------------


def check(report: Report, released: Released, ours: dict[str, MobileSAMv2]) -> None:
    """Compares logits and masks with the released code's, then bfloat16 with float32."""
    image = photo()
    size, boxes = image.shape[:2], random_boxes(64, image.shape[:2])
    embeddings = ours["float32"].encode([image])
    logits, _ = ours["float32"].decode(embeddings, [boxes])
    expected = released.decode(
        embeddings.features, torch.from_numpy(boxes).to(released.device), size, embeddings.input_sizes[0]
    )
    difference = (logits[0] - expected[:, 0]).abs().max() / expected.std()
    report.add(Row(1, "float32 logits differ by", float(difference), "std", 1e-3, "64 boxes", at_most=True))
    bank = object_like_logits(len(boxes)).to(released.device)
    with ours["float32"].decoder.register_forward_hook(PlausibleMasks(bank)):
        (segmentation,) = ours["float32"].segment_anything([image], [boxes])
    masks = released.postprocess(bank[:, None], size, embeddings.input_sizes[0]).cpu().numpy() > 0
    unequal = sum(not np.array_equal(segmentation.full_mask(i), mask) for i, mask in enumerate(masks))
    how = f"of {len(masks)}, against all upsampled to full size"
    report.add(Row(4, "masks with another pixel", unequal, "", 0, how, at_most=True))
    name, images = photos(4)
    boxes = [random_boxes(16, image.shape[:2]) for image in images]
    compare_masks(report, f"random weights at SAM's size, {name}", ours, images, boxes)
    demo = {
        dtype: MobileSAMv2.from_pretrained("mobilesamv2-demo-torch", released.device, DTYPES[dtype]) for dtype in DTYPES
    }
    name, images = photos(128)
    expected = demo["float32"].discover(images)
    compare_masks(report, f"demo model, {name}", demo, images, [prompts.boxes for prompts in expected])
    compare_boxes(report, f"demo model, {name}", expected, demo["bfloat16"], images)


def compare_masks(
    report: Report,
    name: str,
    models: dict[str, MobileSAMv2],
    images: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray | torch.Tensor],
) -> None:
    """Mask IoU of bfloat16 with float32, for the same boxes."""
    ious = []
    for image, image_boxes in zip(images, boxes):
        first, second = (model.segment_anything([image], [image_boxes])[0] for model in models.values())
        pairs = ((first.full_mask(i), second.full_mask(i)) for i in range(len(image_boxes)))
        ious += [np.count_nonzero(a & b) / np.count_nonzero(a | b) for a, b in pairs if (a | b).any()]
    how = f"{name}, {len(ious)} masks"
    report.add(
        Row(1, "bfloat16 mask IoU with float32, mean", float(np.mean(ious)), "", 0.99, how),
        Row(1, "bfloat16 mask IoU with float32, worst", float(np.min(ious)), "", 0.95, how),
    )


def compare_boxes(
    report: Report, name: str, expected: Sequence[BoxPrompts], model: MobileSAMv2, images: Sequence[np.ndarray]
) -> None:
    """The share of the boxes from float32 that bfloat16 also finds, at an IoU of at least 0.95."""
    total = sum(map(len, expected))
    # Near the threshold, the last digits of a score decide, so the comparison is repeated with a lower threshold.
    for title, conf, wanted in (("", OBJECT_CONFIDENCE, 0.98), (f" above confidence {LOWER}", LOWER, None)):
        discovered = model.discover(images, conf=conf)
        matched = sum(count_pairs(a.boxes, b.boxes) for a, b in zip(expected, discovered))
        report.add(
            Row(3, f"float32's boxes found by bfloat16{title}", matched / total, "", wanted, f"{name}, {total} boxes")
        )


def count_pairs(first: torch.Tensor, second: torch.Tensor) -> int:
    """The number of boxes [N, 4] that can be paired one to one with boxes [M, 4] at an IoU of at least 0.95."""
    overlap = box_iou(first, second)
    pairs = 0
    while overlap.numel() and overlap.max() >= 0.95:
        row, column = divmod(int(overlap.argmax()), overlap.shape[1])
        overlap[row], overlap[:, column] = 0, 0
        pairs += 1
    return pairs


# Encoders -------------------------------------------------------------------------------------------------------------


def measure_encoder(report: Report, folder: Path, encoder: str, count: int, runs: int, device: str) -> None:
    released = Released(make_sam(encoder), device=device)
    ours = {dtype: load(folder, dtype, device, encoder, detector=False) for dtype in DTYPES}
    images = turned(photo())[:count]
    features = {}

    def encode(name: str) -> None:
        if name == "released":
            embeddings = [released.encode(image)[0] for image in images]
        else:
            embeddings = ours[name].encode(images).features
        features[name] = embeddings[0].clone()

    seconds = in_turns({name: lambda name=name: encode(name) for name in ("released", *ours)}, runs)
    expected = features["released"].reshape(features["float32"].shape)
    difference = (features["float32"] - expected).abs().max() / expected.std()
    cosine = torch.cosine_similarity(features["bfloat16"], features["float32"], dim=0).min()
    seconds = {name: [value / count for value in values] for name, values in seconds.items()}
    for dtype, wanted in (TINY_VIT_TARGETS if encoder == "tiny_vit" else ENCODER_TARGETS).items():
        name = f"encode, {encoder}, {dtype}, {count} image{'s' * (count > 1)}"
        report.add(speedup(2, name, wanted, seconds["released"], seconds[dtype]))
    report.add(
        Row(2, f"{encoder}, float32 embedding differs by", float(difference), "std", 1e-3, at_most=True),
        Row(2, f"{encoder}, bfloat16 cosine similarity, worst", float(cosine), "", 0.999),
    )


# Whole images ---------------------------------------------------------------------------------------------------------


def measure_images(report: Report, released: Released, ours: dict[str, MobileSAMv2]) -> dict[int, list[float]]:
    """Times the stages from image file to masks. Returns the released code's seconds by number of prompts."""
    hook = PlausibleMasks(object_like_logits().to(released.device))
    released.sam.mask_decoder.register_forward_hook(hook)
    for model in ours.values():
        model.decoder.register_forward_hook(hook)
    totals, stages = {}, {}
    for prompts, runs in RUNS_BY_PROMPTS.items():
        if released.device != "cpu":  # warm-up: the first calls choose kernels, compile and record
            time_images(released, ours, prompts, 2)
        seconds, stages[prompts] = time_images(released, ours, prompts, runs)
        totals[prompts] = seconds["released"]
        for name in ours:
            title, slow, fast = f"{prompts} prompts, {name}", stages[prompts]["released"], stages[prompts][name]
            whole = None if released.device == "cpu" else 5
            report.add(
                speedup(1, f"decode, {title}", DECODE_TARGETS.get(name), slow["decode"], fast["decode"]),
                speedup(4, f"crop, {title}", None, slow["crop"], fast["crop"]),
                speedup(9, f"model alone, {title}", whole, seconds["released"], seconds[name]),
            )
    discover = {name: [s for each in stages.values() for s in each[name]["discover"]] for name in ("released", *ours)}
    for name in ours:
        row = speedup(3, f"discover, {name}", DISCOVER_TARGETS.get(name), discover["released"], discover[name])
        report.add(row)
    report.steps = steps(stages[max(RUNS_BY_PROMPTS)])
    for dtype in DTYPES:
        measure_shares(report, ours[dtype], {stage: median(s) for stage, s in stages[min(stages)][dtype].items()})
    return totals


def measure_shares(report: Report, model: MobileSAMv2, seconds: dict[str, float]) -> None:
    """Each stage's speed as a share of that of large matrix products, from its time with the fewest prompts."""
    peak = matrix_gflops(model.device, model.dtype)
    image, boxes = photo(), random_boxes(min(RUNS_BY_PROMPTS), photo().shape[:2])
    embeddings = model.encode([image])
    calls = {
        "discover": lambda: model.discover([image]),
        "encode": lambda: model.encode([image]),
        "decode": lambda: model.decode(embeddings, [boxes]),
    }
    for target, (stage, call) in zip((3, 2, 1), calls.items()):
        gflop = count_flops(call) / 1e9
        name = f"{stage}, {str(model.dtype).removeprefix('torch.')}, share of this machine's matrix products"
        how = f"{gflop:.0f} GFLOP at {gflop / seconds[stage]:.0f} of {peak:.0f} GFLOP/s"
        report.add(Row(target, name, gflop / seconds[stage] / peak, "", None, how))


def count_flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def time_images(
    released: Released, ours: dict[str, MobileSAMv2], prompts: int, runs: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, list[float]]]]:
    """Seconds per image and per stage, by model."""
    models = {"released": released, **ours}
    stages: dict[str, dict[str, list[float]]] = {name: {stage: [] for stage in STAGES} for name in models}

    def run(name: str) -> None:
        model = models[name]
        model.seconds.clear()
        if name == "released":
            masks = released(ASSETS / "bus.jpg", prompts)
        else:
            (masks,) = model.segment_everything([photo()], conf=CONFIDENCE, max_prompts=prompts)
        if len(masks) != prompts:
            raise RuntimeError(f"{name}: {len(masks)} masks instead of {prompts}")
        for stage, seconds in stages[name].items():
            seconds.append(model.seconds[stage])

    return in_turns({name: lambda name=name: run(name) for name in models}, runs), stages


def steps(stages: dict[str, dict[str, list[float]]]) -> list[tuple[str, float]]:
    """Seconds per image as this package's stages replace the released ones one by one, in float32, then bfloat16."""
    now = {stage: median(seconds) for stage, seconds in stages["released"].items()}
    totals = [("released", sum(now.values()))]
    for dtype in DTYPES:
        for stage in STAGES:
            if dtype == "bfloat16" and stage == "crop":  # the same in both
                continue
            now[stage] = median(stages[dtype][stage])
            totals.append((f"{stage}, {dtype}", sum(now.values())))
    return totals


def measure_growth(report: Report, model: MobileSAMv2) -> None:
    image = photo()
    embeddings = model.encode([image])
    boxes = {count: random_boxes(count, image.shape[:2]) for count in PROMPT_COUNTS}
    seconds = [timed(lambda c=count: model.decode(embeddings, [boxes[c]])) for count in PROMPT_COUNTS]
    add_growth(report, "time by prompts", list(PROMPT_COUNTS), seconds, "prompts of an image", "s to decode, bfloat16")


def add_growth(report: Report, name: str, x: list[float], y: list[float], xlabel: str, ylabel: str) -> None:
    """Adds a curve of times and a row with its exponent, which is 1 for linear growth."""
    power = exponent(x, y)
    report.curves[name] = {"x": x, "y": y, "xlabel": xlabel, "ylabel": ylabel, "exponent": power}
    how = f"{y[0]:.3g} s at {x[0]}, {y[-1]:.3g} s at {x[-1]}"
    report.add(Row(8, f"{name}, exponent", power, "", 1.05, how, at_most=True))


# Memory ---------------------------------------------------------------------------------------------------------------


def measure_memory(report: Report, folder: Path, device: str) -> None:
    for prompts, wanted in ((320, 400), (1000, 600)):
        megabytes = in_new_process(image_memory, folder, prompts, device)
        name = f"peak memory over the loaded model, {prompts} prompts"
        report.add(Row(4, name, megabytes, "MB", wanted, f"{LARGE[1]}x{LARGE[0]}, float32", at_most=True))
    megabytes = in_new_process(upsampling_memory, 64, device)
    report.add(Row(4, "peak memory of the released way, upsampling of 64 masks alone", megabytes, "MB", None))


def image_memory(folder: Path, prompts: int, device: str) -> float:
    """Peak memory in MB of encoding, decoding and cropping, without the model, in a separate process."""
    image, boxes = np.zeros((*LARGE, 3), np.uint8), random_boxes(prompts, LARGE)
    model = load(folder, "float32", device, detector=False)
    model.decoder.register_forward_hook(PlausibleMasks(object_like_logits().to(device)))
    return _peak(lambda: model.segment_anything([image], [boxes]), device)


def upsampling_memory(masks: int, device: str) -> float:
    """Peak memory in MB of the released code's masks, without decoding."""
    logits = object_like_logits(masks).to(device)[:, None]
    released = Released(make_sam("tiny_vit"), device=device)
    return _peak(lambda: released.postprocess(logits, LARGE, (683, 1024)), device)


def _peak(call: Callable[[], object], device: str) -> float:
    if device == "cpu":
        return peak_memory(call)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


# GPU ------------------------------------------------------------------------------------------------------------------


def measure_stages(report: Report, model: MobileSAMv2) -> None:
    """Times each stage at batch sizes 1 and 8 with 320 prompts per image, and its share of the card's peak speed."""
    for batch in (1, 8):
        images = turned(photo())[:batch]
        boxes = [random_boxes(320, image.shape[:2]) for image in images]
        embeddings = model.encode(images)
        calls = {
            "discover": lambda images=images: model.discover(images, CONFIDENCE),
            "encode": lambda images=images: model.encode(images),
            "decode": lambda embeddings=embeddings, boxes=boxes: model.decode(embeddings, boxes),
            "segment everything": lambda images=images: model.segment_everything(images, conf=CONFIDENCE),
        }
        flops = {}
        for name, call in calls.items():
            flops[name] = count_flops(call)
        for name, seconds in in_turns(calls, runs=5).items():
            tflops = flops[name] / median(seconds) / 1e12
            how = f"{batch / median(seconds):.2f} images/s, {tflops:.2f} TFLOP/s{_share_of_peak(tflops, model.device)}"
            title = f"{name}, batch of {batch}, bfloat16"
            report.add(Row(9, title, 1000 * median(seconds) / batch, "ms an image", None, how, runs=5))


def compiled(model: MobileSAMv2, plain: MobileSAMv2, report: Report) -> MobileSAMv2:
    """The model with its decoder compiled and recorded as CUDA graphs. Hooks are not compiled."""
    model.decoder.forward = torch.compile(model.decoder.forward, mode="reduce-overhead")
    image, boxes = photo(), random_boxes(64, photo().shape[:2])
    expected, actual = (m.decode(m.encode([image]), [boxes])[0][0] for m in (plain, model))
    difference = (actual - expected).abs().max() / expected.std()
    report.add(Row(1, "logits of the compiled decoder differ by", float(difference), "std", 0.1, at_most=True))
    return model


def _share_of_peak(tflops: float, device: torch.device) -> str:
    card = torch.cuda.get_device_name(device)
    return next((f", {tflops / peak:.1%} of its peak" for name, peak in PEAK_TFLOPS.items() if name in card), "")


# All ------------------------------------------------------------------------------------------------------------------


def measure(report: Report, folder: Path, device: str) -> dict[int, list[float]]:
    """Adds all rows about the model alone. Returns the released code's seconds per image by number of prompts.

    Args:
        folder: the folder for checkpoints.
    """
    on_gpu = device.startswith("cuda")
    with section("Comparing results with the released code, and bfloat16 with float32"):
        released = Released(make_sam("tiny_vit"), make_detector().fuse(verbose=False), device)
        ours = {dtype: load(folder, dtype, device) for dtype in DTYPES}
        check(report, released, ours)
    with section("Time by prompts"):
        measure_growth(report, ours["bfloat16"])
    if on_gpu:
        with section("Stages at batch 1 and 8"):
            measure_stages(report, ours["bfloat16"])
        ours["bfloat16, compiled"] = compiled(load(folder, "bfloat16", device), ours["bfloat16"], report)
    with section("Whole images, stage by stage"):
        totals = measure_images(report, released, ours)
    with section("Detector without merged batch norms"):
        measure_unfused(report, released, ours)
    del released, ours
    for encoder, (count, runs) in (GPU_ENCODERS if on_gpu else ENCODERS).items():
        with section(f"Encoder {encoder}"):
            measure_encoder(report, folder, encoder, count, runs, device)
    with section("Memory of a large image"):
        measure_memory(report, folder, device)
    return totals


def measure_unfused(report: Report, released: Released, ours: dict[str, MobileSAMv2]) -> None:
    """The detector as stored in its file, for comparison: its predictor merges batch norms into convolutions first."""
    plain = Released(released.sam, make_detector(), released.device)
    image = photo()
    calls = {"plain": lambda: plain.discover(image, 320)}
    calls |= {dtype: lambda dtype=dtype: ours[dtype].discover([image], CONFIDENCE) for dtype in DTYPES}
    calls["plain"]()  # warm-up; the others have already run
    seconds = in_turns(calls, runs=1)
    for dtype in DTYPES:
        name = f"discover, {dtype}, against a detector that isn't fused"
        report.add(speedup(3, name, None, seconds["plain"], seconds[dtype]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=str(default_device()))
    parser.add_argument("--output", type=Path, default=Path("runs/core_benchmark.json"))
    args = parser.parse_args()
    report = Report(machine(torch.device(args.device)))
    with tempfile.TemporaryDirectory() as folder:
        measure(report, Path(folder), args.device)
    print(f"\n{report.machine}\n\n{report.markdown()}")
    report.write(args.output)


if __name__ == "__main__":
    main()
