"""Checks that a model works on this machine: ``fiftyone-mobilesamv2 doctor [MODEL]``."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import cv2
import torch

from ..errors import CheckpointError, MobileSAMv2Error
from ..modeling.checkpoints.catalog import PretrainedModel
from ..modeling.checkpoints.files import fetch_model, included_model, local_path, verify_model
from ..modeling.checkpoints.lookup import pretrained_model
from ..modeling.mobilesamv2 import MobileSAMv2
from .ground_truth import known_images
from .machine import machine_checks
from .picture import picture
from .segmentation_check import Check, checks, measure, verdict

_MARKS = {True: "ok  ", False: "FAIL", None: "    "}


def run(name: str | None, device: str | None, dtype: str, output: Path) -> int:
    """Checks the machine, the model's files, and the model's results on images with known objects.

    Prints each result as it becomes available, and a verdict at the end.

    Args:
        name: the name of a model, or the folder of a trained one; None for the one that is part of the package.
        output: path of the picture.

    Returns:
        0 if the model works, otherwise 1.

    Raises:
        ValueError: no model has that name.
    """
    name = name or included_model()
    model = pretrained_model(name)
    print("Machine", flush=True)
    results = _print_checks(machine_checks(device))

    print(f"\nFiles of {name}", flush=True)
    files = _print_checks(_file_checks(name))
    results += files
    if all(check.passed for check in files):
        print(f"\nSegmentation of {model.images}", flush=True)
        results += _segmentation(name, model, device, dtype, output)
    sentence = verdict(results)
    print(f"\n{name}: {sentence}")
    return int(sentence != "works")


def _segmentation(name: str, model: PretrainedModel, device: str | None, dtype: str, output: Path) -> list[Check]:
    images = known_images(model.images)
    if not images:
        raise MobileSAMv2Error("No installed package contains the test photos: pip install scikit-image")
    start = time.perf_counter()
    try:
        loaded = MobileSAMv2.from_pretrained(name, device, getattr(torch, dtype))
    except CheckpointError as error:
        return _print_checks([Check(False, str(error), "The files do not match the model: see above.")])
    measured = measure(loaded, images)
    results = _print_checks(checks(measured, model.known_iou, model.known_fingerprint))
    stages = ", ".join(f"{stage} {seconds / len(images):.2f}" for stage, seconds in measured.seconds.items())
    print(f"     Seconds per image: {stages}; {time.perf_counter() - start:.0f} s in total")
    cv2.imwrite(str(output), picture(images, measured)[:, :, ::-1])
    print(f"     Picture: {output}")
    return results


def _print_checks(results: Iterable[Check]) -> list[Check]:
    """Prints each check as it becomes available, and returns them all."""
    printed = []
    for check in results:
        print(f"{_MARKS[check.passed]} {check.text}", flush=True)
        printed.append(check)
    return printed


def _file_checks(name: str) -> list[Check]:
    try:
        fetch_model(name)
    except CheckpointError as error:
        return [Check(False, str(error), "Files are missing or are not the expected ones: see above.")]
    return [
        Check(verified.problem is None, f"{local_path(weights)}: {verified.problem or f'sha256 {verified.sha256}'}")
        for weights, verified in verify_model(name).items()
    ]
