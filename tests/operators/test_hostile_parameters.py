"""Whatever a form is given reaches no shell, no import, no file but the chosen one, and no operator of MongoDB."""

import contextlib
import json
import os
import re
import sys
from pathlib import Path

import fiftyone.core.odm as foo
import pytest

import fiftyone_mobilesamv2.modeling.mobilesamv2  # noqa: F401  what it imports runs and writes things of its own
from fiftyone_mobilesamv2.operators import OPERATORS

FORMS = [operator.identifier for operator in OPERATORS if operator.identifier != "cancel"]
MARK = "HOSTILE"  # in every text, so that it is found wherever it goes

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

CHOICES = [TEXTS[0], f"${MARK}", {"$gt": ""}]  # of which there is one check

TABLES = ("models", "files")  # texts that are shown
# Texts that are anything a user likes.
FREE = {("promote_to_labels", "label")}

# What Python tells its audit hooks before it does it: https://docs.python.org/3/library/audit_events.html
PROCESSES = {"os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn"}
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
_heard = None


def listen(event, arguments):
    if _heard is None:
        return
    if event in PROCESSES or (event == "import" and "antigravity" in str(arguments[0])):
        _heard.append((event, arguments))
    elif event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        if isinstance(arguments[0], (str, bytes)) and not os.fsdecode(arguments[0]).startswith(("/dev/", "/proc/")):
            _heard.append((event, os.fsdecode(arguments[0])))


sys.addaudithook(listen)


@contextlib.contextmanager
def heard():
    """What is done meanwhile: processes, imports, and changes of files, as (event, path or arguments)."""
    global _heard
    _heard = found = []
    try:
        yield found
    finally:
        _heard = None


@contextlib.contextmanager
def commands():
    """What the server is told meanwhile, as it has understood it."""
    database, found = foo.get_db_conn(), []
    database.create_collection("system.profile", capped=True, size=100 * 2**20)
    database.command("profile", 2)
    try:
        yield found
    finally:
        database.command("profile", 0)
        found += database["system.profile"].find()
        database.drop_collection("system.profile")


def reached(command, in_pipeline=False):
    """The hostile texts that a command has as names of fields or operators, or as expressions."""
    if isinstance(command, dict):
        for key, value in command.items():
            if MARK in key or key in ("$where", "$function", "$accumulator"):
                yield key
            if key != "$literal":
                yield from reached(value, in_pipeline or key in ("pipeline", "$expr"))
    elif isinstance(command, list):
        for value in command:
            yield from reached(value, in_pipeline)
    elif isinstance(command, str) and in_pipeline and command.startswith("$") and MARK in command:
        yield command


def test_what_the_tests_below_watch(dataset, tmp_path):
    """They would see it."""
    collection = dataset._sample_collection
    with commands() as told, heard() as done:
        collection.find_one({f"{MARK}.x": 1})
        list(collection.aggregate([{"$match": {"$expr": {"$eq": [f"${MARK}", 1]}}}]))
        collection.update_one({"label": f"${MARK}"}, {"$set": {"label": f"${MARK}"}})  # a text
        os.system("true")
        (tmp_path / "file").touch()
        (tmp_path / "file").read_text()
    assert sorted(reached([command["command"] for command in told])) == [f"${MARK}", f"{MARK}.x"]
    assert done == [("os.system", (b"true",)), ("open", str(tmp_path / "file"))]


@pytest.fixture
def proposed(scenes):
    """The scenes, with proposals; and three ways in which the App shows them, as arguments of its requests."""
    scenes.clone_sample_field("ground_truth", "segmentations")
    first = scenes.first()
    label = {"label_id": first.segmentations.detections[0].id, "sample_id": first.id, "field": "segmentations"}
    patches = scenes.to_patches("segmentations")
    return scenes, label, patches


def shown(name, proposed):
    """(samples, arguments) that this operator's form is open for."""
    scenes, label, patches = proposed
    yield scenes, {"selected_labels": [label] if name == "promote_to_labels" else []}
    if name == "promote_to_labels":
        yield patches, {"selected": patches.values("id")[:1]}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_texts_are_refused_in_words_or_taken_as_texts(plugin, proposed, name):
    state = {
        "segment_everything": {"existing": "replace", "label_field": "segmentations"},
        "segment_anything": {"place": "new", "replace": True},
        "promote_to_labels": {"label": "cat"},
    }.get(name, {})
    with commands() as told, heard() as done:
        for samples, request in shown(name, proposed):
            inputs = plugin.form(name, samples, state, **request).inputs
            kinds = {key: type(found.type).__name__ for key, found in inputs.items() if key not in TABLES}
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
    assert list(reached([command.get("command", {}) for command in told])) == []
    assert done == []


@pytest.mark.parametrize("name", [name for name in FORMS if name != "manage_models"])
def test_ids_that_are_none(plugin, proposed, name):
    """Of samples and labels that are said to be selected."""
    scenes, label, patches = proposed
    with commands() as told:
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
    assert list(reached([command.get("command", {}) for command in told])) == []


def test_cancelling_what_is_not_there(plugin, proposed):
    for work in ("; touch x", {"$where": "1"}, ["x"], None, 5):
        context = plugin.context("cancel", proposed[0], {"work": work})
        assert plugin.operators["cancel"].execute(context) == {"cancelled": False}


def test_classes_are_stored_and_shown_as_they_are(plugin, proposed):
    scenes, _, _ = proposed
    labels = [(sample.id, label.id) for sample in scenes for label in sample.segmentations.detections]
    texts = [text for text in TEXTS if text.isprintable() and len(text) < 1000]
    assert len(texts) > 10
    with commands() as told, heard() as done:
        for text, (sample_id, label_id) in zip(texts, labels):
            selected = [{"label_id": label_id, "sample_id": sample_id, "field": "segmentations"}]
            params = {"label": text, "gt_field": "found"}
            dialog, _ = plugin.run_to_the_end("promote_to_labels", scenes, params, selected_labels=selected)
            assert text.replace("`", "'") in dialog and MARK not in re.sub("`[^`]*`", "", dialog)
    assert sorted(label for labels in scenes.values("found.detections.label") if labels for label in labels) == sorted(
        texts
    )
    assert list(reached([command.get("command", {}) for command in told])) == []
    assert done == []


def test_what_files_are_called_is_shown_as_it_is(plugin, proposed):
    """Paths and causes in a summary come from whoever has made the dataset."""
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


def test_an_export_writes_the_chosen_file_alone(plugin, proposed, tmp_path, monkeypatch):
    scenes, _, _ = proposed
    folder = tmp_path / "a" / "chosen"
    monkeypatch.chdir(tmp_path)
    names = [f"; touch {MARK}.json", f"$(touch {MARK}).json", f"`{MARK}`.json", f"-{MARK}.json", f"{MARK}|x.json"]
    with heard() as done:
        for name in names:
            result = plugin.call("export_masks", scenes, field="segmentations", path=str(folder / name))
            assert result["path"] == str(folder / name)
            assert json.loads((folder / name).read_text())["annotations"]
    assert {path for path in tmp_path.rglob("*")} == {tmp_path / "a", folder, *(folder / name for name in names)}
    assert all(event not in PROCESSES and Path(path).is_relative_to(tmp_path) for event, path in done)


def test_an_export_replaces_a_link_and_not_what_it_leads_to(plugin, proposed, tmp_path):
    scenes, _, _ = proposed
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "masks.json").symlink_to(tmp_path / "secret")
    params = {"field": "segmentations", "path": str(tmp_path / "masks.json")}
    assert any("exists" in error for error in plugin.form("export_masks", scenes, params).errors)
    plugin.call("export_masks", scenes, **params, overwrite=True)
    assert (tmp_path / "secret").read_text() == "mine" and not (tmp_path / "masks.json").is_symlink()


def test_exports_that_go_nowhere(plugin, proposed):
    scenes, _, _ = proposed
    with heard() as done:
        for path in ("/etc/passwd", "/dev/null", "/proc/self/mem", "~nobody-here/x.json", "x.json", "//"):
            assert plugin.form("export_masks", scenes, {"field": "segmentations", "path": path}).errors
            with pytest.raises(Exception, match="File: "):
                plugin.call("export_masks", scenes, field="segmentations", path=path)
    assert done == []


@pytest.mark.parametrize("model", ["../victim", "/victim", "../../victim", "mobilesamv2-demo-torch/../../victim", "."])
@pytest.mark.parametrize("action", ["delete", "download", "verify", "../victim"])
def test_models_are_those_of_the_list(plugin, tmp_path, monkeypatch, model, action):
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setenv("FIFTYONE_MOBILESAMV2_WEIGHTS_DIR", str(folder))
    for victim in (tmp_path / "victim", tmp_path.parent / "victim", folder / "mine.pt"):
        victim.touch()
    with heard() as done, pytest.raises(Exception, match="is no longer available"):
        plugin.call("manage_models", None, model=model, action=action, confirm=True)
    assert done == [] and (tmp_path / "victim").exists() and (folder / "mine.pt").exists()
    assert {path.name for path in tmp_path.rglob("*")} == {"weights", "victim", "mine.pt"}
