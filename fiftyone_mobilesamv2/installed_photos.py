"""Photos that installed packages carry: real images to try a model on, without a download."""

from __future__ import annotations

import importlib.util
from pathlib import Path

# (package, path in it): people, a cat, a cup and spoons, vehicles, buildings, a flower.
PHOTOS = (
    ("ultralytics", "assets/bus.jpg"),
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("ultralytics", "assets/zidane.jpg"),
    ("skimage", "data/motorcycle_left.png"),
    ("sklearn", "datasets/images/china.jpg"),
    ("skimage", "data/rocket.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
)


def installed_photos() -> list[Path]:
    """Those that this machine has: which ones packages carry differs among their versions.

    >>> all(path.is_file() for path in installed_photos())
    True
    """
    return [path for photo in PHOTOS if (path := find_photo(*photo))]


def find_photo(package: str, path: str) -> Path | None:
    """A file in the folder of an installed package, which is not imported; None if there is no such file."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    found = Path(folders[0], path) if folders else None
    return found if found is not None and found.is_file() else None
