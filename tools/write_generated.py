"""Generates files from the code: manifest.json, the README's table of models, docs/parameters.md.

python tools/write_generated.py          writes them
python tools/write_generated.py --check  exits with 1 if one of them is out of date
"""

from __future__ import annotations

import json
import re
import sys
from datetime import datetime
from pathlib import Path

from fiftyone_mobilesamv2.modeling.checkpoints.catalog import DEMO_MODEL, MODELS, PHOTO_MODEL, PretrainedModel
from fiftyone_mobilesamv2.modeling.checkpoints.files import local_path
from fiftyone_mobilesamv2.modeling.checkpoints.lookup import model_files
from fiftyone_mobilesamv2.modeling.checkpoints.manifest import manifest_entry
from fiftyone_mobilesamv2.zoo.config import PARAMETERS, Parameter

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = ROOT / "fiftyone_mobilesamv2" / "manifest.json"
README = ROOT / "README.md"
PARAMETERS_PAGE = ROOT / "docs" / "parameters.md"

DATE_ADDED = datetime(2026, 11, 22)


def main() -> int:
    """Writes or checks the files. Returns the exit status."""
    contents = {
        MANIFEST: f"{json.dumps(manifest(), indent=4)}\n",
        README: with_table(README.read_text()),
        PARAMETERS_PAGE: parameters_page(),
    }
    outdated = [path for path, content in contents.items() if not path.exists() or path.read_text() != content]
    if "--check" in sys.argv:
        for path in outdated:
            print(f"{path} is out of date: run python tools/write_generated.py", file=sys.stderr)
        return int(bool(outdated))
    for path in outdated:
        path.write_text(contents[path])
        print(path)
    return 0


def manifest() -> dict:
    """The zoo's manifest, in FiftyOne's format."""
    models = [_manifest_entry(name, model) for name, model in MODELS.items()]
    return {"name": "mobilesamv2/fiftyone_mobilesamv2", "models": models}


def _manifest_entry(name: str, model: PretrainedModel) -> dict:
    tag = {DEMO_MODEL: "demo", PHOTO_MODEL: "coco"}.get(name, "sa-1b")
    entry = manifest_entry(name, model, f"{name}.json", tag, _size(name), DATE_ADDED)
    loader = {"type": "fiftyone_mobilesamv2.zoo.MobileSAMv2Model", "config": {"name": name}}
    return {**entry, "default_deployment_config_dict": loader}


def _size(name: str) -> int:
    return sum(
        local_path(weights).stat().st_size if weights.is_packaged else weights.size or weights.megabytes * 10**6
        for weights in model_files(name)
    )


def with_table(readme: str) -> str:
    """The README with its table of models generated from the catalog."""
    lines = ["| name | image encoder | files, MB |", "|---|---|---|"]
    lines += [f"| `{name}` | {model.description} | {_size(name) / 1e6:,.0f} |" for name, model in MODELS.items()]
    table = "\n".join(["<!-- models -->", *lines, "<!-- /models -->"])
    return re.sub(r"<!-- models -->.*<!-- /models -->", lambda _: table, readme, flags=re.DOTALL)


def parameters_page() -> str:
    """The documentation page of a model's parameters."""
    lines = [
        "# Parameters of a model",
        "",
        "Pass them to `load_zoo_model`, set them in the App's forms, or give them as options of",
        "`fiftyone-mobilesamv2 segment`.",
        "`tools/write_generated.py` generates this page from their declaration, `fiftyone_mobilesamv2/zoo/config.py`.",
        "",
        '`model.config.max_prompts = 100` changes a loaded model. Parameters marked "fixed" take effect when a model',
        "is loaded; setting them afterwards raises an error. A run continues the work in a field only if all",
        "parameters that change results are the same as in the previous run.",
        "",
        "| name | default | values | | fixed | changes results |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_parameter_row, PARAMETERS.values())]) + "\n"


def _parameter_row(parameter: Parameter) -> str:
    default = "required" if parameter.name == "name" else f"`{parameter.default!r}`"
    only = f" ({parameter.applies_to} only)" if parameter.applies_to else ""
    marks = ["yes" if mark else "" for mark in (parameter.is_fixed, parameter.changes_results)]
    if parameter.name.endswith("_checkpoint"):
        marks[1] = "by the file's hash"
    text = f"{parameter.title}: {parameter.description}{only}"
    return f"| `{parameter.name}` | {default} | {parameter.expected} | {text} | {' | '.join(marks)} |"


if __name__ == "__main__":
    sys.exit(main())
