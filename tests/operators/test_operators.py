"""Requirements for all operators."""

import re
from pathlib import Path

import pytest
import yaml

from fiftyone_mobilesamv2.operators import OPERATORS
from fiftyone_mobilesamv2.runs.claims import on_record
from fiftyone_mobilesamv2.runs.record import SegmentationRun

ROOT = Path(__file__).resolve().parents[2]

NAMES = [operator.identifier for operator in OPERATORS]
FORMS = [name for name in NAMES if name != "cancel"]
SKILL = (ROOT / "skills" / "segment-and-curate" / "SKILL.md").read_text()


def test_operators_are_in_the_manifest_and_registered(plugin):
    assert yaml.safe_load((ROOT / "fiftyone.yml").read_text())["operators"] == NAMES
    assert {name for name in plugin.operators if name != "segevery"} == set(NAMES)


@pytest.mark.parametrize("name", FORMS)
def test_operators_have_icons_titles_and_descriptions(plugin, name):
    config = plugin.operators[name].config
    for icon in (config.icon, config.light_icon, config.dark_icon):
        assert icon.startswith("/") and (ROOT / icon.removeprefix("/")).is_file()
    assert config.light_icon != config.dark_icon
    assert config.label != name and len(config.description) > 20
    assert config.allow_delegated_execution and config.dynamic


@pytest.mark.parametrize("name", [name for name in FORMS if name != "manage_models"])
def test_form_refuses_missing_and_empty_data(plugin, scenes, dataset, name):
    """Without a dataset, or with an empty dataset or view, the form says so and execution is refused."""
    whole_dataset = name in ("delete_masks", "repair_dataset")
    for samples in (None, dataset) if whole_dataset else (None, dataset, scenes.limit(0)):
        form = plugin.form(name, samples)
        assert form.errors and all(isinstance(error, str) and len(error) > 10 for error in form.errors)
        assert all(error in form.messages for error in form.errors)
        with pytest.raises(ValueError, match=re.escape(form.errors[0])):
            list(plugin.run_in_app(name, samples))


def test_skill_documents_every_operator_and_input(plugin, scenes, tmp_path, monkeypatch):
    import fiftyone.plugins.skills as fops

    (skill,) = fops.list_skills(plugin="@mobilesamv2/fiftyone_mobilesamv2")
    assert skill.name == "segment-and-curate" and skill.content == SKILL
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (`.*`) \|$", SKILL, re.MULTILINE))
    assert list(rows) == FORMS
    scenes.clone_sample_field("ground_truth", "segmentations")
    scenes.tag_samples("held out")
    with on_record(scenes, SegmentationRun("segmentations", {}, images=1)):
        pass
    first = scenes.first().segmentations.detections[0]
    selected = [{"label_id": first.id, "sample_id": scenes.first().id, "field": "segmentations"}]
    monkeypatch.setenv("FIFTYONE_MOBILESAMV2_WEIGHTS_DIR", str(tmp_path))
    for name in ("mobile_sam.pt", "masks.json"):
        (tmp_path / name).touch()
    states = [
        {},
        {"path": str(tmp_path / "masks.json")},
        {"prompting": "grid", "label_field": "segmentations", "existing": "replace", "advanced": True},
        {"look_for": "labels"},
        {"place": "new", "prompts": "field"},
        {"action": "delete", "model": "mobilesamv2-tinyvit-torch"},
        {"part": "masks", "advanced": True, "validation": "tag"},
        {"part": "discovery", "advanced": True},
    ]
    for name in FORMS:
        names = set()
        for params in states:
            for labels in ((), selected):
                inputs = plugin.form(name, scenes, params, selected_labels=labels).inputs
                names |= {key for key, value in inputs.items() if type(value.type).__name__ != "Void"}
        names -= {"view_target"}
        assert set(re.findall(r"`(\w+)`", rows[name])) == names, name
