"""No input reaches a shell, an import, a file other than the chosen one, or an operator of MongoDB."""

import contextlib
import json
import os
import re
import sys
from pathlib import Path

import fiftyone.core.odm as foo
import pytest

import fiftyone_mobilesamv2.modeling.mobilesamv2  # noqa: F401  its imports run processes and write files
from fiftyone_mobilesamv2.operators import OPERATORS
from fiftyone_mobilesamv2.runs.claims import on_record
from fiftyone_mobilesamv2.runs.record import SegmentationRun

WHOLE = ("manage_models", "delete_masks", "repair_dataset")  # they don't work on selected samples
FORMS = [operator.identifier for operator in OPERATORS if operator.identifier != "cancel"]
MARK = "HOSTILE"  # part of every text, to trace it

TEXTS = [
    f"; touch {MARK}",
    f"$(touch {MARK})",
    f"`touch {MARK}`",
    f"../../{MARK}",
    f"/etc/{MARK}",
    f"__import__('antigravity') or '{MARK}'",
    f"antigravity.{MARK}",
    f"{MARK}\0.json",
    f"{MARK}\n.json",
    f"{MARK}\ud800",
    f"${MARK}",
    f"$$ROOT.{MARK}",
    f"{MARK}.$[]",
    f"{MARK}.$",
    f"_{MARK}",
    f'{{"$where": "{MARK}"}}',
    f"<img src=x onerror={MARK}>",
    f"[{MARK}](javascript:{MARK})",
    f"![](http://127.0.0.1:9/{MARK})",
    MARK * 10**6,
]
OTHERS = [{"$where": MARK}, {"$gt": ""}, [f"${MARK}"], {"a": {"b": [MARK] * 1000}}, 5, True, 10**30]

CHOICES = [TEXTS[0], f"${MARK}", {"$gt": ""}]  # all go through the same check

TABLES = ("models", "files")  # display-only texts
# Inputs that accept any text.
FREE = {("promote_to_labels", "label")}

# Audit events that Python raises before these actions: https://docs.python.org/3/library/audit_events.html
PROCESSES = {"os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn"}
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
_actions = None


def record_action(event, arguments):
    if _actions is None:
        return
    if event in PROCESSES or (event == "import" and "antigravity" in str(arguments[0])):
        _actions.append((event, arguments))
    elif event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        if isinstance(arguments[0], (str, bytes)) and not os.fsdecode(arguments[0]).startswith(("/dev/", "/proc/")):
            _actions.append((event, os.fsdecode(arguments[0])))


sys.addaudithook(record_action)


@contextlib.contextmanager
def recorded_actions():
    """Records processes, imports and changes of files as (event, path or arguments)."""
    global _actions
    _actions = actions = []
    try:
        yield actions
    finally:
        _actions = None


@contextlib.contextmanager
def recorded_commands():
    """Records the commands to the database, as parsed by the server."""
    database, commands = foo.get_db_conn(), []
    database.create_collection("system.profile", capped=True, size=100 * 2**20)
    database.command("profile", 2)
    try:
        yield commands
    finally:
        database.command("profile", 0)
        commands += database["system.profile"].find()
        database.drop_collection("system.profile")


def hostile_parts(command, in_pipeline=False):
    """The hostile texts that a command contains as names of fields or operators, or as expressions."""
    if isinstance(command, dict):
        for key, value in command.items():
            if MARK in key or key in ("$where", "$function", "$accumulator"):
                yield key
            if key != "$literal":
                yield from hostile_parts(value, in_pipeline or key in ("pipeline", "$expr"))
    elif isinstance(command, list):
        for value in command:
            yield from hostile_parts(value, in_pipeline)
    elif isinstance(command, str) and in_pipeline and command.startswith("$") and MARK in command:
        yield command


def test_recorders_see_hostile_commands_and_actions(dataset, tmp_path):
    """The tests below rely on this."""
    collection = dataset._sample_collection
    with recorded_commands() as commands, recorded_actions() as actions:
        collection.find_one({f"{MARK}.x": 1})
        list(collection.aggregate([{"$match": {"$expr": {"$eq": [f"${MARK}", 1]}}}]))
        collection.update_one({"label": f"${MARK}"}, {"$set": {"label": f"${MARK}"}})  # a plain value
        os.system("true")
        (tmp_path / "file").touch()
        (tmp_path / "file").read_text()
    assert sorted(hostile_parts([command["command"] for command in commands])) == [f"${MARK}", f"{MARK}.x"]
    assert actions == [("os.system", (b"true",)), ("open", str(tmp_path / "file"))]


@pytest.fixture
def proposed(scenes):
    """Scenes with proposals, a selected label as the App sends it, and a view of patches."""
    scenes.clone_sample_field("ground_truth", "segmentations")
    scenes.tag_samples("held out")
    with on_record(scenes, SegmentationRun("segmentations", {}, images=1)):
        pass
    first = scenes.first()
    label = {"label_id": first.segmentations.detections[0].id, "sample_id": first.id, "field": "segmentations"}
    patches = scenes.to_patches("segmentations")
    return scenes, label, patches


def requests_for(name, proposed):
    """Yields (samples, request arguments) that this operator accepts."""
    scenes, label, patches = proposed
    yield scenes, {"selected_labels": [label] if name == "promote_to_labels" else []}
    if name == "promote_to_labels":
        yield patches, {"selected": patches.values("id")[:1]}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_texts_are_refused_or_treated_as_plain_text(plugin, proposed, name):
    state = {
        "segment_everything": {"existing": "replace", "label_field": "segmentations"},
        "segment_anything": {"place": "new", "replace": True},
        "promote_to_labels": {"label": "cat"},
        "train_on_labels": {"advanced": True, "validation": "tag"},
    }.get(name, {})
    with recorded_commands() as commands, recorded_actions() as actions:
        for samples, request in requests_for(name, proposed):
            inputs = plugin.form(name, samples, state, **request).inputs
            kinds = {key: type(each.type).__name__ for key, each in inputs.items() if key not in TABLES}
            texts = [key for key, kind in kinds.items() if kind in ("String", "Enum")]
            assert texts
            for key in texts:
                for value in [*TEXTS, *OTHERS] if kinds[key] == "String" else CHOICES:
                    errors = plugin.form(name, samples, state | {key: value}, **request).errors
                    if errors:
                        assert all(10 < len(error) < 6000 for error in errors), (key, value)
                        assert not any("\0" in error or "\n" in error for error in errors)
                    else:
                        assert (name, key) in FREE and isinstance(value, str) and value.isprintable(), (key, value)
            refused = state | {texts[0]: f"{MARK}.$[]"}
            with pytest.raises(ValueError, match=re.escape(MARK)):
                list(plugin.run_in_app(name, samples, refused, **request))
    assert list(hostile_parts([command.get("command", {}) for command in commands])) == []
    assert actions == []


@pytest.mark.parametrize("name", [name for name in FORMS if name not in WHOLE])
def test_invalid_ids_are_refused(plugin, proposed, name):
    """The IDs are those of selected samples and labels."""
    scenes, label, patches = proposed
    with recorded_commands() as commands:
        for bad in ("; touch x", "$where", {"$where": "1"}, {"$gt": ""}, None, "../x"):
            requests = [(scenes, {"params": {"view_target": "SELECTED_SAMPLES"}, "selected": [bad]})]
            if name in ("promote_to_labels", "segment_anything"):
                requests += [(scenes, {"selected_labels": [{**label, key: bad}]}) for key in label]
                requests += [(patches, {"selected_labels": [{**label, key: bad}]}) for key in label]
            if name == "promote_to_labels":
                requests.append((patches, {"selected": [bad]}))
            for samples, request in requests:
                params = {"label": "cat", **request.pop("params", {})}
                errors = plugin.form(name, samples, params, **request).errors
                assert errors and all(len(error) > 10 for error in errors), (bad, request)
    assert list(hostile_parts([command.get("command", {}) for command in commands])) == []


def test_cancelling_unknown_work_does_nothing(plugin, proposed):
    for work in ("; touch x", {"$where": "1"}, ["x"], None, 5):
        context = plugin.context("cancel", proposed[0], {"work": work})
        assert plugin.operators["cancel"].execute(context) == {"cancelled": False}


def test_class_names_are_stored_and_shown_verbatim(plugin, proposed):
    scenes, _, _ = proposed
    labels = [(sample.id, label.id) for sample in scenes for label in sample.segmentations.detections]
    texts = [text for text in TEXTS if text.isprintable() and len(text) < 1000]
    assert len(texts) > 10
    with recorded_commands() as commands, recorded_actions() as actions:
        for text, (sample_id, label_id) in zip(texts, labels):
            selected = [{"label_id": label_id, "sample_id": sample_id, "field": "segmentations"}]
            params = {"label": text, "gt_field": "found"}
            dialog, _ = plugin.run_to_the_end("promote_to_labels", scenes, params, selected_labels=selected)
            assert text.replace("`", "'") in dialog and MARK not in re.sub("`[^`]*`", "", dialog)
    assert sorted(label for labels in scenes.values("found.detections.label") if labels for label in labels) == sorted(
        texts
    )
    assert list(hostile_parts([command.get("command", {}) for command in commands])) == []
    assert actions == []


def test_file_names_are_shown_verbatim(plugin, proposed):
    """The creator of a dataset controls the paths and causes in a summary."""
    scenes, _, _ = proposed
    name = f"/tmp/`![](http://127.0.0.1:9/{MARK})`\n# {MARK}<img src=x>.png"
    for sample in scenes.limit(1):
        sample.filepath = name
        sample.segmentations.detections[0].bounding_box = [0.5, 0.5, -1, 0.1]
        sample.segmentations.detections[0].mask = None
        sample.save()
    for operator, params in (
        ("image_coverage", {"field": "segmentations", "use_masks": False}),
        ("find_duplicates", {}),
    ):
        dialog, _ = plugin.run_to_the_end(operator, scenes, {"field": "segmentations", "use_masks": False, **params})
        assert "1 image skipped" in dialog and MARK in dialog
        assert MARK not in re.sub("`[^`\n]*`", "", dialog)


# Files --------------------------------------------------------------------------------------------------------------


def test_export_writes_only_the_chosen_file(plugin, proposed, tmp_path, monkeypatch):
    scenes, _, _ = proposed
    folder = tmp_path / "a" / "chosen"
    monkeypatch.chdir(tmp_path)
    names = [f"; touch {MARK}.json", f"$(touch {MARK}).json", f"`{MARK}`.json", f"-{MARK}.json", f"{MARK}|x.json"]
    with recorded_actions() as actions:
        for name in names:
            result = plugin.call("export_masks", scenes, field="segmentations", path=str(folder / name))
            assert result["path"] == str(folder / name)
            assert json.loads((folder / name).read_text())["annotations"]
    assert {path for path in tmp_path.rglob("*")} == {tmp_path / "a", folder, *(folder / name for name in names)}
    assert all(event not in PROCESSES and Path(path).is_relative_to(tmp_path) for event, path in actions)


def test_export_replaces_a_link_but_not_its_target(plugin, proposed, tmp_path):
    scenes, _, _ = proposed
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "masks.json").symlink_to(tmp_path / "secret")
    params = {"field": "segmentations", "path": str(tmp_path / "masks.json")}
    assert any("exists" in error for error in plugin.form("export_masks", scenes, params).errors)
    plugin.call("export_masks", scenes, **params, overwrite=True)
    assert (tmp_path / "secret").read_text() == "mine" and not (tmp_path / "masks.json").is_symlink()


def test_export_to_forbidden_paths_is_refused(plugin, proposed):
    scenes, _, _ = proposed
    with recorded_actions() as actions:
        for path in ("/etc/passwd", "/dev/null", "/proc/self/mem", "~nobody-here/x.json", "x.json", "//"):
            assert plugin.form("export_masks", scenes, {"field": "segmentations", "path": path}).errors
            with pytest.raises(Exception, match="File: "):
                plugin.call("export_masks", scenes, field="segmentations", path=path)
    assert actions == []


@pytest.mark.parametrize("model", ["../victim", "/victim", "../../victim", "mobilesamv2-demo-torch/../../victim", "."])
@pytest.mark.parametrize("action", ["delete", "download", "verify", "../victim"])
def test_only_listed_models_are_accepted(plugin, tmp_path, monkeypatch, model, action):
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setenv("FIFTYONE_MOBILESAMV2_WEIGHTS_DIR", str(folder))
    for victim in (tmp_path / "victim", tmp_path.parent / "victim", folder / "mine.pt"):
        victim.touch()
    with recorded_actions() as actions, pytest.raises(Exception, match="is no longer available"):
        plugin.call("manage_models", None, model=model, action=action, confirm=True)
    assert actions == [] and (tmp_path / "victim").exists() and (folder / "mine.pt").exists()
    assert {path.name for path in tmp_path.rglob("*")} == {"weights", "victim", "mine.pt"}
