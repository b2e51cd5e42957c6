"""Samples -> images and prompts, in a data loader's workers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import fiftyone.core.labels as fol
import fiftyone.utils.torch as fout

from ..errors import ArgumentError, message_of
from ..images import read_image
from ..labels.prompts import check_prompts
from ..modeling.arrays import ImageArray


@dataclass(frozen=True)
class ImageItem:
    """An image and its prompts from a worker of the data loader, or the error that occurred instead.

    Attributes:
        prompted: whether to segment the prompts instead of all objects.
        skip_failures: whether to record a failure; otherwise it is raised.
    """

    sample_id: str | None = None
    filepath: str | None = None
    image: ImageArray | None = None
    prompts: fol.Label | None = None
    error: str | None = None
    prompted: bool = False
    skip_failures: bool = False

    @property
    def pixels(self) -> ImageArray:
        """`image`. Raises ArgumentError if it could not be read."""
        if self.image is None:
            raise ArgumentError(f"{self.filepath} could not be read: {self.error}")
        return self.image


class ImageGetItem(fout.GetItem):
    """Reads the image of a sample, and its prompts if `prompt_field` is mapped.

    Args:
        field_mapping: may map "prompt_field" to a field of detections or keypoints.
        skip_failures: whether to return the error of an unreadable image; raised, it would fail the whole batch.
    """

    def __init__(self, field_mapping: dict[str, str] | None = None, skip_failures: bool = True) -> None:
        self.has_prompts = "prompt_field" in (field_mapping or {})
        self.skip_failures = skip_failures
        super().__init__(field_mapping=field_mapping)

    @property
    def required_keys(self) -> list[str]:
        return ["id", "filepath"] + (["prompt_field"] if self.has_prompts else [])

    def __call__(self, d: dict[str, Any]) -> ImageItem:
        item = ImageItem(d["id"], d["filepath"], prompted=self.has_prompts, skip_failures=self.skip_failures)
        try:
            if self.has_prompts:
                check_prompts(d["prompt_field"])
            return replace(item, image=read_image(d["filepath"]), prompts=d.get("prompt_field"))
        except (OSError, TypeError, ValueError, MemoryError) as error:
            if not self.skip_failures:
                raise
            return replace(item, error=message_of(error))
