"""Inputs that choose a model and where it runs, and downloading it with the App's bar."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .operator import Form, Progress

DEMO_MODEL = "mobilesamv2-demo-torch"

# The paper (arXiv 2312.09579) has three of them: TinyViT, EfficientViT-L2 (about 20 ms) and ViT-H (over 400 ms, the
# most exact). The others lie between, by their size.
HINTS = {
    "mobilesamv2-tinyvit-torch": "fastest",
    "mobilesamv2-efficientvit-l0-torch": "fast",
    "mobilesamv2-efficientvit-l1-torch": "fast",
    "mobilesamv2-efficientvit-l2-torch": "fast, more exact",
    "mobilesamv2-vitb-torch": "slow",
    "mobilesamv2-vitl-torch": "slower",
    "mobilesamv2-vith-torch": "slowest, most exact",
    DEMO_MODEL: "tiny, for trying things out, not for photos",
}


PRECISIONS = {
    "float32": "float32: exact",
    "bfloat16": "bfloat16: faster where the processor has it; a few pixels of each outline differ",
    "float16": "float16: for GPUs without bfloat16",
}


def model_choice(form: Form) -> str:
    """Which model, with its size, a hint at its speed, and whether its weights are here."""
    from ..modeling.checkpoints import MODELS, weights_dir

    missing = {name: megabytes_to_download(name) for name in MODELS}
    choices = {}
    for name in MODELS:
        here = "weights are here" if not missing[name] else f"{missing[name]:,} MB to download"
        choices[name] = f"{name} ({HINTS[name]}; {here})"
    # The first click works: what is here already, best first, and photos are what it is for.
    default = next((name for name in MODELS if not missing[name] and name != DEMO_MODEL), "mobilesamv2-tinyvit-torch")
    name = form.choice("model", choices, default, "Model")
    if missing.get(name):
        form.note(f"{missing[name]:,} MB will be downloaded to {weights_dir()} first, and verified.")
    elif name == DEMO_MODEL:
        form.warn("The demo model was trained on synthetic scenes alone: expect little of it on photos.")
    return name


def runtime_choices(form: Form) -> None:
    """Where the model runs, and how exactly."""
    from ..modeling.mobilesamv2 import available_devices

    devices = available_devices()
    names = {"cuda": "GPU (cuda)", "mps": "GPU (mps)", "cpu": "CPU"}
    form.choice("device", {device: names[device] for device in devices}, devices[0], "Device")
    form.choice("dtype", PRECISIONS, "float32", "Precision")


def megabytes_to_download(name: str) -> int:
    """Of the weights of the model `name`: what isn't here yet."""
    from ..modeling.checkpoints import local_path, pretrained_model

    files = set(pretrained_model(name).weights.values())
    return sum(weights.megabytes for weights in files if not local_path(weights).is_file())


def fetch_with_progress(name: str, progress: Progress) -> None:
    """Downloads what the model lacks."""
    from ..modeling.checkpoints import fetch_model

    def report(filename: str, done: int, total: int | None) -> None:
        size = f" of {total / 1e6:,.0f}" if total else ""
        progress.tell(done / total if total else None, f"Downloading {filename}: {done / 1e6:,.0f}{size} MB")

    fetch_model(name, progress=report)
