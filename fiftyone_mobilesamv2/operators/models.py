"""Inputs that choose a model and where it runs, and downloading it with the App's bar."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .operator import Form, Progress

PRECISIONS = {
    "float32": "float32: exact",
    "bfloat16": "bfloat16: faster where the processor has it; a few pixels of each outline differ",
    "float16": "float16: for GPUs without bfloat16",
}


def model_choice(form: Form) -> str:
    """Which model, with its size, a hint at its speed, and whether its weights are here."""
    from ..modeling.checkpoints.catalog import DEMO_MODEL, MODELS
    from ..modeling.checkpoints.files import megabytes_to_download, weights_dir

    missing = {name: megabytes_to_download(name) for name in MODELS}
    choices = {}
    for name, entry in MODELS.items():
        here = "weights are here" if not missing[name] else f"{missing[name]:,} MB to download"
        choices[name] = f"{name} ({entry.hint}; {here})"
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


def fetch_with_progress(name: str, progress: Progress) -> None:
    """Downloads what the model lacks."""
    from ..modeling.checkpoints.files import fetch_model

    def report(filename: str, done: int, total: int | None) -> None:
        size = f" of {total / 1e6:,.0f}" if total else ""
        progress.tell(done / total if total else None, f"Downloading {filename}: {done / 1e6:,.0f}{size} MB")

    fetch_model(name, progress=report)
