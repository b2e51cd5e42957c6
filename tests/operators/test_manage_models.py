"""Managing models, without a dataset and with a loopback server."""

import functools
import hashlib
import http.server
import threading

import pytest

from fiftyone_mobilesamv2.modeling.checkpoints import MODELS, PretrainedModel, Weights, model_files
from fiftyone_mobilesamv2.modeling.checkpoints.files import local_path
from fiftyone_mobilesamv2.modeling.checkpoints.trained import register, trained_dir

NAME = "manage_models"
ENCODER, REST = b"encoder" * 100_000, b"the rest" * 100_000
SHA256 = hashlib.sha256(ENCODER).hexdigest()
BLOB = hashlib.sha1(b"blob %d\0" % len(REST) + REST).hexdigest()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The weights folder; connections to the loopback bypass any proxy."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("FIFTYONE_MOBILESAMV2_WEIGHTS_DIR", str(tmp_path / "weights"))
    return tmp_path / "weights"


@pytest.fixture
def served(tmp_path):
    """A server's folder and URL."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "encoder.pt").write_bytes(ENCODER)
    (folder / "rest.pt").write_bytes(REST)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def models(served, monkeypatch):
    """Two models on that server, "one" and "two", that share a file."""
    _, url = served
    monkeypatch.setenv("FIFTYONE_MOBILESAMV2_DOWNLOAD_HOSTS", url)
    rest = Weights("rest.pt", (f"{url}/rest.pt",), megabytes=1, git_blob=BLOB)
    for name in ("one", "two"):
        encoder = Weights(f"{name}.pt", (f"{url}/encoder.pt",), megabytes=2, sha256=SHA256)
        monkeypatch.setitem(MODELS, name, PretrainedModel("tiny_vit", encoder, rest, rest, "a test", ""))


def rows(markdown):
    """The cells of a Markdown table: {first cell: {column: text}}."""
    lines = [line for line in markdown.splitlines() if line[:1] == "|"]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): dict(zip(cells[0][1:], row[1:])) for row in cells[2:]}


def dialog(plugin, **params):
    return plugin.run_to_the_end(NAME, None, params)[0]


def test_form_needs_no_dataset(plugin, folder):
    form = plugin.form(NAME, None)
    assert form.errors == []
    assert form.choices("model") == list(MODELS) and form.default("action") == "download"
    assert f"Downloaded weights are in {folder}." in form.messages
    assert "196 MB will be downloaded and verified." in form.messages


def test_form_lists_models_and_files(plugin, folder):
    folder.mkdir()
    (folder / "ObjectAwareModel.pt").touch()
    form = plugin.form(NAME, None)
    models, files = rows(form.default("models")), rows(form.default("files"))
    assert list(models) == list(MODELS)
    assert models["mobilesamv2-vith-torch"] == {
        "MB": "2,720",
        "speed": "slowest, most accurate",
        "available": "ObjectAwareModel.pt",
        "missing": "sam_vit_h_4b8939.pth, Prompt_guided_Mask_Decoder.pt",
    }
    demo = models["mobilesamv2-demo-torch"]
    assert (demo["available"], demo["missing"]) == ("demo_sam.safetensors, demo_detector.safetensors", "")
    assert len(files) == 13
    assert files["ObjectAwareModel.pt"] == {"MB": "140", "available": "yes", "hash": "sha256 4d99244a9c7a..."}
    assert files["Prompt_guided_Mask_Decoder.pt"] == {"MB": "15", "available": "", "hash": "git blob c13b15a3a449..."}
    assert files["sam_vit_b_01ec64.pth"]["hash"] == "sha256 ec2df6273261..."
    assert files["demo_sam.safetensors"]["hash"] == "none: part of the package"


@pytest.mark.parametrize(
    "params, error",
    [
        ({"model": "sam"}, "Model: 'sam' is no longer available"),
        ({"action": "burn"}, "Action: 'burn' is no longer available"),
        ({"action": "verify"}, "No file of mobilesamv2-tinyvit-torch is downloaded: there is nothing to verify"),
        ({"action": "delete"}, "No file of mobilesamv2-tinyvit-torch can be deleted"),
        ({"model": "mobilesamv2-demo-torch", "action": "download"}, "are already downloaded"),
        ({"model": "mobilesamv2-demo-torch", "action": "delete"}, "No file of mobilesamv2-demo-torch can be deleted"),
    ],
)
def test_form_says_what_is_wrong(plugin, params, error):
    (message,) = plugin.form(NAME, None, params).errors
    assert error in message


def test_demo_weights_are_never_deleted(plugin):
    form = plugin.form(NAME, None, {"model": "mobilesamv2-demo-torch", "action": "delete"})
    assert "demo_sam.safetensors stays: it comes with the package." in form.messages
    with pytest.raises(Exception, match="can be deleted"):
        plugin.call(NAME, None, model="mobilesamv2-demo-torch", action="delete", confirm=True)
    assert all(local_path(weights).is_file() for weights in model_files("mobilesamv2-demo-torch"))


def test_download_stores_all_files(plugin, models, folder):
    assert "3 MB will be downloaded and verified." in plugin.form(NAME, None, {"model": "one"}).messages
    result = plugin.call(NAME, None, model="one")
    assert result["files"] == {"one.pt": str(folder / "one.pt"), "rest.pt": str(folder / "rest.pt")}
    assert ((folder / "one.pt").read_bytes(), (folder / "rest.pt").read_bytes()) == (ENCODER, REST)
    form = plugin.form(NAME, None, {"model": "one"})
    assert form.errors == [] and form.default("action") == "verify"
    assert rows(form.default("models"))["two"] == {"MB": "3", "speed": "", "available": "rest.pt", "missing": "two.pt"}
    text = dialog(plugin, model="two", action="download")
    assert "two is downloaded" in text and str(folder / "two.pt") in text


def test_failed_download_is_explained(plugin, models, served, folder):
    (served[0] / "rest.pt").write_bytes(b"something else")
    *_, (operator, params) = plugin.run_in_app(NAME, None, {"model": "one", "action": "download"})
    view = params["outputs"]["type"]["properties"]["error"]["view"]
    assert operator == "show_output" and view["label"] == "Manage models failed"
    assert "rest.pt" in view["description"] and BLOB in view["description"] and str(folder) in view["description"]
    assert not (folder / "rest.pt").exists()


def test_verify_reports_each_file(plugin, models, folder):
    plugin.call(NAME, None, model="one")
    text = dialog(plugin, model="one", action="verify")
    assert "All files of one are correct" in text
    files = rows(text)
    assert files["one.pt"]["sha256"] == f"`{SHA256}`"
    assert files["rest.pt"] == {
        "sha256": f"`{hashlib.sha256(REST).hexdigest()}`",
        "hash": f"git blob {BLOB[:12]}...",
    }
    (folder / "one.pt").write_bytes(REST)
    (folder / "rest.pt").unlink()
    form = plugin.form(NAME, None, {"model": "one", "action": "verify"})
    assert form.errors == []
    result = plugin.call(NAME, None, model="one", action="verify")
    assert result["files"]["rest.pt"] == {"sha256": None, "problem": "is missing"}
    problem = result["files"]["one.pt"]["problem"]
    assert hashlib.sha256(REST).hexdigest() in problem and SHA256 in problem and "move it away" in problem
    text = dialog(plugin, model="one", action="verify")
    assert "**2 files wrong or missing**" in text and problem in text


def test_verify_the_demo_model(plugin):
    result = plugin.call(NAME, None, model="mobilesamv2-demo-torch", action="verify")
    for weights in model_files("mobilesamv2-demo-torch"):
        expected = hashlib.sha256(local_path(weights).read_bytes()).hexdigest()
        assert result["files"][weights.filename] == {"sha256": expected, "problem": None}


def test_check_sources_reports_each_source(plugin, models, served, folder):
    """Nothing is downloaded, and missing files are reported."""
    params = {"model": "one", "action": "check_sources"}
    assert plugin.form(NAME, None, params).errors == []
    text = dialog(plugin, **params)
    assert "**All sources are correct**" in text and "exists (700,000 bytes), content not checked" in text
    (served[0] / "rest.pt").unlink()
    text = dialog(plugin, **params)
    assert "**1 source wrong or unreachable**" in text and "HTTP status 404" in text
    result = plugin.call(NAME, None, **params)
    assert [row["source is"] for row in result["sources"]] == ["right", "wrong"]
    assert not folder.exists()
    (problem,) = plugin.form(NAME, None, {"model": "mobilesamv2-demo-torch", "action": "check_sources"}).errors
    assert "comes with the package" in problem


def test_delete_needs_confirmation(plugin, models, folder):
    plugin.call(NAME, None, model="one")
    params = {"model": "one", "action": "delete"}
    assert plugin.form(NAME, None, params).errors == ["Confirm that one.pt, rest.pt should be deleted."]
    with pytest.raises(Exception, match="Confirm that"):
        plugin.call(NAME, None, **params)
    assert (folder / "one.pt").is_file()
    form = plugin.form(NAME, None, {**params, "confirm": True})
    assert form.errors == []
    assert plugin.call(NAME, None, confirm=True, **params) == {"model": "one", "deleted": ["one.pt", "rest.pt"]}
    assert not (folder / "one.pt").exists() and not (folder / "rest.pt").exists()


def test_shared_file_is_not_deleted(plugin, models, folder):
    for name in ("one", "two"):
        plugin.call(NAME, None, model=name)
    params = {"model": "one", "action": "delete", "confirm": True}
    form = plugin.form(NAME, None, params)
    assert form.errors == [] and "rest.pt stays: another downloaded model needs it." in form.messages
    text = dialog(plugin, **params)
    assert "one.pt, about 2 MB" in text and "rest.pt" not in text
    assert not (folder / "one.pt").exists() and (folder / "rest.pt").read_bytes() == REST
    assert plugin.call(NAME, None, model="two", action="verify")["files"]["rest.pt"]["problem"] is None


def test_open_dataset_does_not_matter(plugin, models, scenes, folder):
    assert plugin.form(NAME, scenes, {"model": "one"}).errors == []
    assert plugin.call(NAME, scenes, model="one")["model"] == "one"


# Trained models -----------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(model_zoo, tmp_path, make_trained):
    """A registered trained model in a folder of its own, whose dataset's name contains Markdown."""
    make_trained(tmp_path / "training", dataset="my|*cells*")
    return register(tmp_path / "training")


def test_trained_model_is_listed(plugin, trained):
    form = plugin.form(NAME, None, {"model": "my-cells"})
    assert form.errors == [] and form.choices("model") == [*MODELS, "my-cells"] and form.default("action") == "verify"
    models, files = form.default("models"), rows(form.default("files"))
    assert "| `my-cells` " in models and r"trained on my\|\*cells\*" in models
    assert files["my-cells/detector.safetensors"]["hash"].startswith("sha256 ")


def test_trained_model_is_verified(plugin, trained):
    result = plugin.call(NAME, None, model="my-cells", action="verify")
    assert set(result["files"]) == {"demo_sam.safetensors", "detector.safetensors"}
    (trained.folder / "detector.safetensors").write_bytes(b"damaged")
    text = dialog(plugin, model="my-cells", action="verify")
    assert "**1 file wrong or missing**" in text and "copy the trained model's whole folder again" in text


@pytest.mark.parametrize(
    "action, error",
    [
        ("download", "All files of my-cells are already downloaded"),
        ("check_sources", "my-cells has no files to download and has no sources"),
    ],
)
def test_trained_model_has_no_sources(plugin, trained, action, error):
    (message,) = plugin.form(NAME, None, {"model": "my-cells", "action": action}).errors
    assert error in message


def test_deleting_a_trained_model_needs_confirmation(plugin, trained, tmp_path):
    import fiftyone.zoo as foz

    params = {"model": "my-cells", "action": "delete"}
    (error,) = plugin.form(NAME, None, params).errors
    assert error == f"Confirm that my-cells should be deleted with its folder, {tmp_path / 'training'}."
    with pytest.raises(Exception, match="Confirm that"):
        plugin.call(NAME, None, **params)
    assert "my-cells" in foz.list_zoo_models()
    (trained.folder / "notes.txt").touch()
    result = plugin.call(NAME, None, confirm=True, **params)
    assert result["kept"] == ["notes.txt"] and "detector.safetensors" in result["deleted"]
    assert [path.name for path in (tmp_path / "training").iterdir()] == ["notes.txt"]
    assert "my-cells" not in foz.list_zoo_models()
    (error,) = plugin.form(NAME, None, {"model": "my-cells"}).errors
    assert error.startswith("Model: 'my-cells' is no longer available")


def test_file_that_a_trained_model_needs_stays(plugin, model_zoo, models, make_trained):
    one = MODELS["one"]
    files = {"encoder_checkpoint": one.encoder_weights, "decoder_checkpoint": one.decoder_weights}
    make_trained(trained_dir() / "my-cells", files=files | {"detector_checkpoint": one.detector_weights})
    plugin.call(NAME, None, model="one")
    form = plugin.form(NAME, None, {"model": "one", "action": "delete"})
    assert {"one.pt stays: my-cells needs it.", "rest.pt stays: my-cells needs it."} <= set(form.messages)
    assert form.errors == ["No file of one can be deleted."]
    assert plugin.form(NAME, None, {"model": "my-cells", "action": "check_sources"}).errors == []
