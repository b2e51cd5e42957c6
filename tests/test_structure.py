"""House rules that no linter checks."""

from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fiftyone_mobilesamv2"
MAX_LINES = 400
ROOT_MODULES = {
    *("__init__", "errors", "fiftyone_internals", "fiftyone_settings", "images", "installed_photos", "quickstart"),
    "registration",
}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_root_contains_only_the_agreed_modules():
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT_MODULES


@pytest.mark.parametrize("folder", ["operators", "panels"])
def test_names_in_markdown_are_escaped(folder):
    """Names of fields, tags and files may contain Markdown: `code()` quotes them, backticks of our own would not."""
    for path in (PACKAGE / folder).rglob("*.py"):
        assert "`{" not in path.read_text(), path
