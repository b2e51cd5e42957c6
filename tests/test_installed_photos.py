"""Photos of installed packages: real ones, found without importing their packages."""

import subprocess
import sys

import pytest

from fiftyone_mobilesamv2.images import read_image
from fiftyone_mobilesamv2.installed_photos import find_photo, installed_photos


def test_photos_can_be_read():
    paths = installed_photos()
    assert len(paths) >= 8 and len(set(paths)) == len(paths)
    for path in paths:
        image = read_image(path)
        assert min(image.shape[:2]) >= 250 and image.std() > 30 and (image[..., 0] != image[..., 2]).any()


@pytest.mark.parametrize("photo", [("no_such_package", "a.png"), ("skimage", "data/none.png"), ("json", "a.png")])
def test_missing_ones_are_left_out(photo):
    assert find_photo(*photo) is None


def test_packages_are_not_imported():
    code = """
import sys
from fiftyone_mobilesamv2.installed_photos import installed_photos
installed_photos()
print(*{"ultralytics", "skimage", "sklearn", "matplotlib", "torch"} & set(sys.modules))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []
