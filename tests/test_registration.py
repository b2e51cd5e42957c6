"""How FiftyOne gets to know the package: by import, by `install`, as a source of models, and as a plugin.

What counts is what a new process finds, so most of this runs in processes of two Pythons: one that has the package's
dependencies but not the package, and one into which pip has installed its wheel.
"""

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fiftyone_mobilesamv2"
MODELS = [model["base_name"] for model in json.loads((PACKAGE / "manifest.json").read_text())["models"]]
DEMO = "mobilesamv2-demo-torch"

# What every process starts with. `report` goes to the test.
PRELUDE = f"""
import json, sys
import numpy as np
from PIL import Image
DEMO = {DEMO!r}

def report(**values):
    print("REPORT " + json.dumps(values))

def listed(foz):
    return [name for name in foz.list_zoo_models() if name.startswith("mobilesamv2-")]

def objects(model):
    return len(model.predict(np.array(Image.open("scene.png"))).detections)

def plugins():
    from fiftyone.plugins.context import build_plugin_contexts
    return {{context.name: context.errors for context in build_plugin_contexts() if "mobilesamv2" in context.name}}
"""
PLUGIN = "@mobilesamv2/fiftyone_mobilesamv2"


def make_python(folder):
    """A virtual environment with everything that is installed here but this package."""
    venv.create(folder, symlinks=True)
    schemes = {"base": str(folder), "platbase": str(folder)}
    for kind in {"purelib", "platlib"}:
        site = Path(sysconfig.get_path(kind, vars=schemes))
        for entry in Path(sysconfig.get_path(kind)).iterdir():
            if "mobilesamv2" not in entry.name and not os.path.lexists(site / entry.name):
                (site / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    return make_python(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what a clone of the repository holds, as far as building and registering go."""
    folder = tmp_path_factory.mktemp("checkout") / "repository"
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "fiftyone.yml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "skills", folder / "skills")
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(checkout, tmp_path_factory.mktemp("build") / "repository")  # building leaves things in it
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    command = [*pip, "wheel", str(source), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def wheel_python(wheel, tmp_path_factory):
    python = make_python(tmp_path_factory.mktemp("installed"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    return python


@pytest.fixture
def user(tmp_path):
    """A user's FiftyOne folders, and a working folder that must not be taken for the package: it is in sight there."""
    folder = tmp_path / "user"
    (folder / "work" / "fiftyone_mobilesamv2" / "docs").mkdir(parents=True)
    for name in ("zoo", "plugins/another"):
        (folder / name).mkdir(parents=True)
    (folder / "zoo" / "another.pt").write_text("the user's")
    (folder / "plugins" / "another" / "fiftyone.yml").write_text('name: "@user/another"\n')
    from fiftyone_mobilesamv2.training.scenes import TEST_SEED, make_scene

    Image.fromarray(make_scene(TEST_SEED, 0).image).save(folder / "work" / "scene.png")
    return folder


def run(user, command, **environment):
    """Runs a command with the user's folders. Returns the process and what it reported."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        # This process has imported the package.
        if name not in ("PYTHONPATH", "FIFTYONE_MODEL_ZOO_MANIFEST_PATHS") and "FIFTYONE_DETECTION_" not in name
    }
    folders = {"FIFTYONE_MODEL_ZOO_DIR": str(user / "zoo"), "FIFTYONE_PLUGINS_DIR": str(user / "plugins")}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=user / "work",
        env=inherited | folders | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    values = {}
    for line in result.stdout.splitlines():
        if line.startswith("REPORT "):
            values |= json.loads(line.removeprefix("REPORT "))
    return result, values


def run_code(user, python, code, **environment):
    """Runs code that must succeed, and in which FiftyOne must not meet a model twice. Returns what it reported."""
    result, values = run(user, [python, "-c", PRELUDE + code], **environment)
    assert result.returncode == 0, result.stdout
    assert "already contains" not in result.stdout
    return values


def tree(folder):
    """What is in a folder: relative path -> content, or a link's target. Python's caches don't count."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


# By import ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "imports", ["package, then fiftyone", pytest.param("fiftyone, then package", marks=pytest.mark.slow)]
)
def test_import_offers_the_models(bare_python, user, imports):
    own = user / "own.json"
    own.write_text(json.dumps({"models": [{"base_name": "own-model", "date_added": "2026-01-01 00:00:00"}]}))
    config = user / "config.json"
    config.write_text("{}")
    names = ["fiftyone_mobilesamv2", "fiftyone.zoo as foz"]
    environment = {"PYTHONPATH": str(ROOT), "FIFTYONE_CONFIG_PATH": str(config)}
    if imports.startswith("package"):
        config.write_text(json.dumps({"model_zoo_manifest_paths": [str(own)]}))
    else:
        names.reverse()
        environment["FIFTYONE_MODEL_ZOO_MANIFEST_PATHS"] = str(own)
    code = f"""
import {names[0]}
import {names[1]}
import os
report(imported=sorted({{"torch", "fiftyone_mobilesamv2.zoo"}} & set(sys.modules) - {{"torch"}}))
report(names=listed(foz), own="own-model" in foz.list_zoo_models())
report(inherited=os.environ["FIFTYONE_MODEL_ZOO_MANIFEST_PATHS"])
model = foz.load_zoo_model(DEMO, device="cpu")
report(type=type(model).__module__, objects=objects(model), again=foz.load_zoo_model(DEMO, device="cpu") is model)
"""
    found = run_code(user, bare_python, code, **environment)
    assert found["names"] == sorted(MODELS)
    assert found["own"]
    assert found["inherited"].split(":") == [str(own), str(PACKAGE / "manifest.json")]
    assert found["imported"] == []
    assert found["type"] == "fiftyone_mobilesamv2.zoo.model"
    assert found["objects"] > 0
    assert found["again"]


@pytest.mark.slow
@pytest.mark.parametrize("imports", ["package, then fiftyone", "fiftyone, then package"])
@pytest.mark.parametrize("variable", [None, "coco,own"])
def test_import_offers_the_evaluation_method(bare_python, user, imports, variable):
    config = user / "evaluation_config.json"
    config.write_text(json.dumps({"detection_backends": {"own": {"config_cls": "users.own"}}}))
    environment = {"PYTHONPATH": str(ROOT), "FIFTYONE_EVALUATION_CONFIG_PATH": str(config)}
    if variable:
        environment["FIFTYONE_DETECTION_BACKENDS"] = variable
    names = ["fiftyone_mobilesamv2", "fiftyone as fo"]
    if imports.startswith("fiftyone"):
        names.reverse()
    code = f"""
import {names[0]}
import {names[1]}
report(methods={{name: d.get("config_cls") for name, d in fo.evaluation_config.detection_backends.items()}})
"""
    methods = run_code(user, bare_python, code, **environment)["methods"]
    expected = {"coco", "own", "proposals"} if variable else {"activitynet", "coco", "open-images", "own", "proposals"}
    assert set(methods) == expected and methods["own"] == "users.own"
    assert methods["proposals"] == "fiftyone_mobilesamv2.evaluation.proposals.ProposalEvaluationConfig"


@pytest.mark.slow
def test_import_from_within_fiftyones_import(bare_python, user):
    """FiftyOne's setting `module_path` names packages that it imports before it has its config."""
    environment = {"PYTHONPATH": str(ROOT), "FIFTYONE_MODULE_PATH": "fiftyone_mobilesamv2"}
    result, _ = run(user, [bare_python, "-c", "import fiftyone"], **environment)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("config", "variable", "expected"),
    [
        (None, None, []),
        ({"model_zoo_manifest_paths": ["/a.json", "/b.json"]}, None, ["/a.json", "/b.json"]),
        ({"model_zoo_manifest_paths": None}, None, []),
        ({"model_zoo_manifest_paths": ["/a.json"]}, "/c.json:/d.json", ["/c.json", "/d.json"]),  # as FiftyOne has it
        ({"model_zoo_manifest_paths": ["/a.json"]}, "", ["/a.json"]),
        ("{ no JSON", None, []),
    ],
)
def test_settings_without_fiftyone(user, config, variable, expected):
    path = user / "config.json"
    if config is not None:
        path.write_text(config if isinstance(config, str) else json.dumps(config))
    environment = {"PYTHONPATH": str(ROOT), "FIFTYONE_CONFIG_PATH": str(path)}
    if variable is not None:
        environment["FIFTYONE_MODEL_ZOO_MANIFEST_PATHS"] = variable
    code = """
import json, os, fiftyone_mobilesamv2
print("REPORT " + json.dumps({"paths": os.environ["FIFTYONE_MODEL_ZOO_MANIFEST_PATHS"]}))
"""
    result, values = run(user, [sys.executable, "-c", code], **environment)
    assert result.returncode == 0, result.stdout
    assert values["paths"].split(":") == [*expected, str(PACKAGE / "manifest.json")]


# By `install` -------------------------------------------------------------------------------------------------------


def test_wheel_holds_what_registration_needs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        manifest = archive.read("fiftyone_mobilesamv2/fiftyone.yml").decode()
    shipped = {f"fiftyone_mobilesamv2/weights/{path.name}" for path in (PACKAGE / "weights").iterdir()}
    shipped |= {f"fiftyone_mobilesamv2/icons/{path.name}" for path in (PACKAGE / "icons").iterdir()}
    shipped |= {f"fiftyone_mobilesamv2/{path.relative_to(ROOT)}" for path in (ROOT / "skills").rglob("*.md")}
    assert shipped | {"fiftyone_mobilesamv2/manifest.json"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fiftyone_mobilesamv2"}  # nothing beside it
    assert "py_entry: __init__.py" in manifest
    assert manifest.replace("__init__.py", "fiftyone_mobilesamv2/__init__.py") == (ROOT / "fiftyone.yml").read_text()


@pytest.mark.slow
def test_install_from_a_wheel(wheel_python, user):
    before = tree(user)
    installed = next(wheel_python.parents[1].glob("lib/python*/site-packages/fiftyone_mobilesamv2"))
    package = tree(installed)
    command = wheel_python.parent / "fiftyone-mobilesamv2"
    result, _ = run(user, [command, "install"])
    assert result.returncode == 0, result.stdout
    links = sorted(set(tree(user)) - set(before))
    for link in ("plugins/fiftyone_mobilesamv2", "zoo/mobilesamv2/fiftyone_mobilesamv2/manifest.json"):
        assert link in links
        assert f"Linked {user / link}\n" in result.stdout

    found = run_code(
        user,
        wheel_python,
        """
import fiftyone.zoo as foz
import fiftyone.plugins as fop
report(names=listed(foz))
states = [foz.is_zoo_model_downloaded(DEMO)]
_, path = foz.download_zoo_model(DEMO)
states.append(foz.is_zoo_model_downloaded(DEMO))
report(downloaded=list(foz.list_downloaded_zoo_models()), imported="torch" in sys.modules)
foz.delete_zoo_model(DEMO)
states.append(foz.is_zoo_model_downloaded(DEMO))
report(objects=objects(foz.load_zoo_model(DEMO, device="cpu")), path=path)
states.append(foz.is_zoo_model_downloaded(DEMO))
report(states=states, found=[plugin.name for plugin in fop.list_plugins()], plugins=plugins())
report(skills=[skill.name for skill in fop.list_skills(plugin="@mobilesamv2/fiftyone_mobilesamv2")])
from fiftyone_mobilesamv2.operators import SegmentEverything
report(icon=SegmentEverything().config.icon)
report(package=sys.modules["fiftyone_mobilesamv2"].__file__)
""",
    )
    assert found["names"] == sorted(MODELS)
    assert found["states"] == [False, True, False, True]
    assert found["downloaded"] == [DEMO]
    assert found["objects"] > 0
    assert sorted(found["found"]) == [PLUGIN, "@user/another"]
    assert found["plugins"] == {PLUGIN: []}
    assert found["skills"] == ["segment-and-curate"]
    assert (installed / found["icon"].removeprefix("/")).is_file()
    assert Path(found["package"]) == installed / "__init__.py"
    assert Path(found["path"]).is_file()
    assert Path(found["path"]).is_relative_to(user)
    assert tree(installed) == package  # FiftyOne has deleted no weights and left no notes there

    # Now that FiftyOne takes it for downloaded, it imports the package by name.
    found = run_code(
        user,
        wheel_python,
        """
import fiftyone_mobilesamv2
import fiftyone.plugins as fop
import fiftyone.zoo as foz
from fiftyone_mobilesamv2 import registration
report(names=listed(foz), objects=objects(foz.load_zoo_model(DEMO, download_if_necessary=False, device="cpu")))
report(plugins=plugins())
fop.delete_plugin("@mobilesamv2/fiftyone_mobilesamv2")  # does not follow links
report(removed=[str(link) for link in registration.uninstall()])
report(left=listed(foz), again=registration.uninstall())
""",
    )
    assert found["names"] == sorted(MODELS)
    assert found["objects"] > 0
    assert found["plugins"] == {PLUGIN: []}
    assert found["left"] == found["again"] == []
    assert {str(user / "plugins" / "fiftyone_mobilesamv2")} < set(found["removed"])
    assert tree(user) == before
    assert tree(installed) == package


@pytest.mark.slow
def test_install_from_a_checkout_without_pip(bare_python, checkout, user):
    before = tree(checkout)
    result, _ = run(user, [bare_python, "-m", "fiftyone_mobilesamv2.cli", "install"], PYTHONPATH=str(checkout))
    assert result.returncode == 0, result.stdout
    assert os.readlink(user / "plugins" / "fiftyone_mobilesamv2") == str(checkout)
    code = """
import fiftyone.zoo as foz
report(names=listed(foz), objects=objects(foz.load_zoo_model(DEMO, device="cpu")), plugins=plugins())
"""
    for _ in range(2):  # a note that it is downloaded would break the second: nothing has put the package on the path
        found = run_code(user, bare_python, code)
        assert found == {"names": sorted(MODELS), "objects": found["objects"], "plugins": {PLUGIN: []}}
        assert found["objects"] > 0
    assert tree(checkout) == before


@pytest.fixture
def registration(user, monkeypatch):
    """The module, with this process's FiftyOne on the user's folders, and without what importing the package offers."""
    import fiftyone as fo

    from fiftyone_mobilesamv2 import registration

    monkeypatch.setattr(fo.config, "model_zoo_dir", str(user / "zoo"))
    monkeypatch.setattr(fo.config, "plugins_dir", str(user / "plugins"))
    monkeypatch.setattr(fo.config, "model_zoo_manifest_paths", None)
    monkeypatch.delenv("FIFTYONE_MODEL_ZOO_MANIFEST_PATHS", raising=False)
    return registration


@pytest.mark.parametrize(
    "path", ["plugins/fiftyone_mobilesamv2", "zoo/mobilesamv2/fiftyone_mobilesamv2/manifest.json"], ids=Path
)
def test_something_in_the_way(registration, user, path):
    (user / path).parent.mkdir(parents=True, exist_ok=True)
    (user / path).write_text("the user's")
    before = tree(user)
    with pytest.raises(FileExistsError, match=rf"{user / path} exists and is not a link.*Move it elsewhere"):
        registration.install()
    assert tree(user) == before  # not half of it
    assert registration.uninstall() == []
    assert tree(user) == before


def test_links_of_before_are_replaced(registration, user):
    (user / "zoo" / "mobilesamv2").mkdir()
    (user / "zoo" / "mobilesamv2" / "fiftyone_mobilesamv2").symlink_to(PACKAGE)
    (user / "plugins" / "fiftyone_mobilesamv2").symlink_to(user / "gone")
    links = registration.install()
    assert [link.resolve() for link in links] == [PACKAGE / "__init__.py", PACKAGE / "manifest.json", ROOT]
    assert not (user / "zoo" / "mobilesamv2" / "fiftyone_mobilesamv2").is_symlink()
    once = tree(user)
    assert registration.install() == links
    assert tree(user) == once
    assert registration.uninstall() == links


def test_folders_that_do_not_exist_yet(registration, user):
    shutil.rmtree(user / "zoo")
    shutil.rmtree(user / "plugins")
    links = registration.install()
    assert all(link.exists() for link in links)
    assert registration.uninstall() == links
    assert tree(user / "zoo") == tree(user / "plugins") == {}


# The App's form -----------------------------------------------------------------------------------------------------


@pytest.fixture
def zoo_model(registration):
    """What the App's "apply zoo model" gets for a registered source's model."""
    import fiftyone.zoo as foz

    registration.install()
    model = foz.get_zoo_model(DEMO)
    assert isinstance(model, foz.RemoteZooModel)
    return model


@pytest.fixture
def context():
    from fiftyone.operators.executor import ExecutionContext

    return ExecutionContext(request_params={"params": {}})


def test_form(zoo_model, context):
    import fiftyone.zoo as foz
    from fiftyone.operators import types

    from fiftyone_mobilesamv2.zoo.config import MobileSAMv2ModelConfig

    form = types.Object()
    form.add_property("remote_params", zoo_model.resolve_input(context))
    fields = form.to_json()["properties"]["remote_params"]["type"]["properties"]
    assert set(fields) <= set(vars(MobileSAMv2ModelConfig({"name": DEMO})))
    assert not any(field["required"] for field in fields.values())

    # Untouched, a form yields its defaults; cleared, None or an empty text. Both mean the model's defaults.
    untouched = foz.load_zoo_model(DEMO, device="cpu")
    for values in (
        {name: field["default"] for name, field in fields.items() if field["default"] is not None},
        dict.fromkeys(fields),
        dict.fromkeys(fields, ""),
    ):
        zoo_model.parse_parameters(context, values)
        model = foz.load_zoo_model(DEMO, **values | {"device": "cpu"})
        assert vars(model.config) == vars(untouched.config)

    filled = {"prompting": "grid", "confidence_thresh": 0, "max_prompts": 7, "iou": 0.5, "points_per_side": 4}
    filled |= {"max_masks": 3, "device": "cpu", "dtype": "bfloat16", "min_area": 5, "masks_on_disk": True}
    filled |= {"pred_iou_thresh": 0, "stability_score_thresh": 0.5, "mask_dir": "/tmp/masks"}
    assert set(filled) == set(fields)
    values = dict(filled)
    zoo_model.parse_parameters(context, values)
    assert values == filled  # 0 is no empty field
    model = foz.load_zoo_model(DEMO, **values)
    assert {name: getattr(model.config, name) for name in filled} == filled


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16"),
        ({"max_prompts": 0}, "max_prompts must be a whole number from 1 to 30000, not 0"),
        ({"max_masks": -1}, "max_masks must be a whole number of at least 1, not -1"),
        ({"points_per_side": 0}, "points_per_side must be a whole number from 1 to 256, not 0"),
        ({"confidence_thresh": 2}, "confidence_thresh must be a number from 0 to 1, not 2"),
        ({"iou": -0.1}, "iou must be a number from 0 to 1, not -0.1"),
        ({"prompting": "boxes"}, "prompting must be one of object_aware, grid, not 'boxes'"),
        ({"confidence": 0.5}, "Unknown parameter confidence of mobilesamv2-demo-torch; it takes .*confidence_thresh"),
        ({"max_prompts": "many"}, "max_prompts must be a whole number from 1 to 30000, not 'many'"),
        ({"confidence_thresh": "high"}, "confidence_thresh must be a number from 0 to 1, not 'high'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_parameters(zoo_model, parameters, message):
    import fiftyone.zoo as foz

    with pytest.raises(ValueError, match=message):
        foz.load_zoo_model(DEMO, **parameters)


def test_unknown_model():
    from fiftyone_mobilesamv2 import MobileSAMv2

    with pytest.raises(ValueError, match=f"Unknown model 'mobilesamv2-huge-torch'; choose one of .*{DEMO}"):
        MobileSAMv2.from_pretrained("mobilesamv2-huge-torch")


# As a source of models, and as a plugin, without pip ----------------------------------------------------------------


@pytest.fixture
def archive_url(checkout, tmp_path):
    """The repository as an archive on a server of this test's own."""
    folder = tmp_path / "served"
    folder.mkdir()
    shutil.make_archive(str(folder / "archive"), "zip", checkout.parent, checkout.name)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/archive.zip"
        server.shutdown()


@pytest.mark.slow
def test_source(bare_python, user, archive_url):
    before = tree(user)
    found = run_code(
        user,
        bare_python,
        f"""
import importlib.util
import fiftyone.zoo as foz
spec = importlib.util.find_spec("fiftyone_mobilesamv2")
report(importable=bool(spec and spec.origin))
foz.register_zoo_model_source({archive_url!r})
report(sources=foz.list_zoo_model_sources(), names=listed(foz))
report(objects=objects(foz.load_zoo_model(DEMO, device="cpu")), package=sys.modules["fiftyone_mobilesamv2"].__file__)
""",
    )
    copy = user / "zoo" / "mobilesamv2" / "fiftyone_mobilesamv2"
    assert not found["importable"]
    assert found["sources"] == [archive_url]
    assert found["names"] == sorted(MODELS)
    assert found["objects"] > 0
    assert Path(found["package"]) == copy / "__init__.py"

    # A new process knows only what is on disk. Workers that are spawned unpickle the model's reader by name.
    found = run_code(
        user,
        bare_python,
        f"""
import fiftyone.zoo as foz
from torch.utils.data import DataLoader
foz.download_zoo_model(DEMO)
model = foz.load_zoo_model(DEMO, device="cpu")
loader = DataLoader(
    [{{"id": "1", "filepath": "scene.png"}}], batch_size=None, collate_fn=model.build_get_item(),
    num_workers=1, multiprocessing_context="spawn",
)
report(objects=[len(model.predict(item).detections) for item in loader], plugins=plugins())
foz.delete_zoo_model_source({archive_url!r})
report(left=listed(foz))
""",
    )
    assert len(found["objects"]) == 1
    assert found["objects"][0] > 0
    assert found["left"] == []
    assert set(tree(user)) <= set(before)


@pytest.mark.slow
def test_plugin_folder(bare_python, checkout, user):
    plugin = user / "plugins" / "@mobilesamv2" / "fiftyone_mobilesamv2"  # where `fiftyone plugins download` copies it
    shutil.copytree(checkout, plugin)
    found = run_code(
        user,
        bare_python,
        """
import fiftyone.zoo as foz
report(before=listed(foz), plugins=plugins(), after=listed(foz))
report(objects=objects(foz.load_zoo_model(DEMO, device="cpu")), package=sys.modules["fiftyone_mobilesamv2"].__file__)
""",
    )
    assert found["before"] == []
    assert found["plugins"] == {PLUGIN: []}
    assert found["after"] == sorted(MODELS)
    assert found["objects"] > 0
    assert Path(found["package"]) == plugin / "fiftyone_mobilesamv2" / "__init__.py"
