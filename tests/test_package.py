"""Package basics: a light import, lazy names, and accurate manifests."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest

import fiftyone_mobilesamv2

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fiftyone_mobilesamv2"
MANIFEST = json.loads((PACKAGE / "manifest.json").read_text())
MODELS = {model["base_name"]: model for model in MANIFEST["models"]}
ENCODERS = ["tinyvit", "efficientvit-l0", "efficientvit-l1", "efficientvit-l2", "vitb", "vitl", "vith", "nano", "demo"]


def test_import_is_light():
    code = """
import sys, time
start = time.perf_counter()
import fiftyone_mobilesamv2
print(time.perf_counter() - start, *sorted({"torch", "fiftyone", "eta", "numpy", "cv2"} & set(sys.modules)))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    runs = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    outputs = [run.stdout.split() for run in runs]
    assert [modules for _, *modules in outputs] == [[], [], []]
    assert min(float(seconds) for seconds, *_ in outputs) < 0.3


def test_names_are_imported_when_used():
    from fiftyone_mobilesamv2.modeling.masks import Segmentation
    from fiftyone_mobilesamv2.modeling.mobilesamv2 import MobileSAMv2

    assert fiftyone_mobilesamv2.MobileSAMv2 is MobileSAMv2
    assert fiftyone_mobilesamv2.Segmentation is Segmentation
    assert all(getattr(fiftyone_mobilesamv2, name) is not None for name in fiftyone_mobilesamv2.__all__)
    assert set(fiftyone_mobilesamv2.__all__) | {"__version__"} <= set(dir(fiftyone_mobilesamv2))
    with pytest.raises(AttributeError, match="no attribute 'MobileSAMv3'"):
        fiftyone_mobilesamv2.MobileSAMv3  # noqa: B018
    with pytest.raises(ImportError, match="MobileSAMv3"):
        from fiftyone_mobilesamv2 import MobileSAMv3  # noqa: F401


def test_version_is_the_same_everywhere():
    import yaml

    # Searches the text because Python 3.10 has no tomllib.
    assert f'version = "{fiftyone_mobilesamv2.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert yaml.safe_load((ROOT / "fiftyone.yml").read_text())["version"] == fiftyone_mobilesamv2.__version__


def test_plugin_manifest():
    from fiftyone.plugins.definitions import PluginDefinition
    from packaging.requirements import Requirement

    plugin = PluginDefinition.from_disk(str(ROOT / "fiftyone.yml"))
    assert plugin.name == "@mobilesamv2/fiftyone_mobilesamv2"
    assert Path(plugin.py_entry_path) == PACKAGE / "__init__.py"
    assert plugin.has_py
    assert plugin.license == "Apache-2.0"
    assert version("fiftyone") in Requirement(plugin.fiftyone_requirement).specifier
    assert [path.relative_to(ROOT) for path in ROOT.glob("*/fiftyone.y*ml")] == []  # the only one is at the top


def test_every_model_is_in_the_manifest():
    from fiftyone_mobilesamv2.modeling import checkpoints

    assert list(MODELS) == [f"mobilesamv2-{name}-torch" for name in ENCODERS]
    assert len(MANIFEST["models"]) == len(MODELS)
    assert set(MODELS) == set(checkpoints.MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_manifest_matches_the_files(name):
    from fiftyone_mobilesamv2.modeling.checkpoints.files import local_path
    from fiftyone_mobilesamv2.modeling.checkpoints.lookup import model_files

    model = MODELS[name]
    files = model_files(name)
    if all(weights.is_packaged for weights in files):
        size = sum(local_path(weights).stat().st_size for weights in files)
    else:
        size = sum(weights.size or weights.megabytes * 1e6 for weights in files)
    assert model["size_bytes"] == pytest.approx(size, rel=0.05)

    assert model["base_filename"] == f"{name}.json"
    assert model["default_deployment_config_dict"]["config"]["name"] == name
    weights = "CC BY-NC 4.0" if name == "mobilesamv2-nano-torch" else "Apache 2.0"
    assert model["license"].split(",") == [weights, "AGPL-3.0"]  # FiftyOne's format and spelling
    assert {"segmentation", "instances", "torch", "mobilesamv2"} <= set(model["tags"])
    assert len(model["description"]) > 40
    assert ("not for photos" in model["description"]) == (name == "mobilesamv2-demo-torch")
    assert model["requirements"]["cpu"]["support"] and model["requirements"]["gpu"]["support"]


def test_manifest_and_readme_match_the_catalog():
    command = [sys.executable, "tools/write_generated.py", "--check"]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_requirements_are_installed_and_complete():
    from packaging.requirements import Requirement

    for model in MODELS.values():
        packages = model["requirements"]["packages"]
        assert all(version(package) for package in packages)  # raises if pip does not know this name
    # Zoo sources are not installed by pip, so the manifest's packages must bring all that the package imports.
    installed = {"fiftyone", *packages}
    installed |= {Requirement(r).name for name in installed for r in requires(name) or [] if "extra ==" not in r}
    missing = {Requirement(r).name for r in _project_dependencies()} - installed
    assert missing - {"huggingface_hub"} <= {"opencv-python"}  # fiftyone brings opencv-python-headless


def _project_dependencies():
    text = (ROOT / "pyproject.toml").read_text()
    block = text.split("\ndependencies = [", 1)[1].split("\n]", 1)[0]
    return [line.split('"')[1] for line in block.splitlines() if '"' in line]


def test_fiftyone_reads_the_manifest():
    from fiftyone.zoo.models import RemoteZooModelsManifest

    manifest = RemoteZooModelsManifest.from_json(str(PACKAGE / "manifest.json"))
    assert manifest.name == "mobilesamv2/fiftyone_mobilesamv2"
    assert manifest.url is None  # FiftyOne adds it when registering a source
    assert [model.name for model in manifest] == list(MODELS)
    for model in manifest:
        assert model.filename == f"mobilesamv2/fiftyone_mobilesamv2/{model.name}.json"
        assert model.supports_cpu and model.supports_gpu
        assert model.date_added is not None
        model.ensure_requirements(error_level=0)


def test_every_promise_has_a_test():
    promises, _ = (ROOT / "docs" / "quality" / "reliability.md").read_text().split("\n## Faults\n")
    lines = [line for section in promises.split("\n## ")[1:] for line in section.split("\n- ")[1:]]
    assert len(lines) > 25
    for line in lines:
        names = re.findall(r"`([\w/]+\.py)?::(test_\w+)`", line)
        assert names, line
        path = None
        for file, name in names:
            path = ROOT / "tests" / file if file else path
            assert f"\ndef {name}(" in path.read_text(), f"{path} has no {name}"
