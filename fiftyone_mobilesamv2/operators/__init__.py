"""The App's operators: each is a form and a call into the layers below."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .operator import CancelWork
from .segment_anything import SegmentAnything
from .segment_everything import SegmentEverything

if TYPE_CHECKING:
    from fiftyone.plugins.context import PluginContext

OPERATORS = (SegmentEverything, SegmentAnything, CancelWork)


def register(plugin: PluginContext) -> None:
    """Registers all of them; FiftyOne takes those that fiftyone.yml lists."""
    for operator in OPERATORS:
        plugin.register(operator)
