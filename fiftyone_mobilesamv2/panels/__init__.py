"""The App's panels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .segevery import SegEvery

if TYPE_CHECKING:
    from fiftyone.plugins.context import PluginContext


def register(plugin: PluginContext) -> None:
    """Registers the panels; FiftyOne only uses those listed in fiftyone.yml."""
    plugin.register(SegEvery)
