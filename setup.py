"""The one thing that pyproject.toml can't say: a wheel carries fiftyone.yml and the skills inside the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPluginManifest(build_py):
    """FiftyOne finds a plugin by the fiftyone.yml in its folder; once installed, that folder is the package."""

    def run(self):
        super().run()
        if not self.editable_mode:
            manifest = Path("fiftyone.yml").read_text().replace("fiftyone_mobilesamv2/__init__.py", "__init__.py")
            package = Path(self.build_lib, "fiftyone_mobilesamv2")
            (package / "fiftyone.yml").write_text(manifest)
            shutil.copytree("skills", package / "skills", dirs_exist_ok=True)

    def get_source_files(self):
        return [*super().get_source_files(), "fiftyone.yml", *map(str, Path("skills").rglob("*.md"))]


setup(cmdclass={"build_py": BuildWithPluginManifest})
