"""What every test shares: an environment that leaves the user's own FiftyOne alone, a database, the reference data."""

import atexit
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

pytest_plugins = ["pytester"]
ROOT = Path(__file__).resolve().parents[1]
PARITY = Path(__file__).resolve().parent / "data" / "parity"
SHARED = ROOT.parent / "shared"

SCRATCH = Path(tempfile.mkdtemp(prefix="fiftyone-mobilesamv2-tests-"))

# The user's; of workers of pytest-xdist, which inherit what is set below, the one that their parent was started with.
OWN_DATABASE_URI = os.environ.setdefault("MOBILESAMV2_TESTS_URI", os.environ.get("FIFTYONE_DATABASE_URI", ""))
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    PORT = probe.getsockname()[1]

# Set here and not in a fixture: fiftyone and ultralytics read these once, when they are first imported, which may be at
# the top of a test module. FiftyOne connects only when a database is first used, and without a URI it would attach to
# one of the user's that already runs.
os.environ |= {
    "FIFTYONE_DO_NOT_TRACK": "true",
    "FIFTYONE_CONFIG_PATH": str(SCRATCH / "fiftyone-config.json"),
    "FIFTYONE_DATABASE_NAME": "fiftyone-mobilesamv2-tests",
    "FIFTYONE_DATABASE_DIR": str(SCRATCH / "fiftyone-db"),
    "FIFTYONE_DEFAULT_DATASET_DIR": str(SCRATCH / "datasets"),
    "FIFTYONE_DATASET_ZOO_DIR": str(SCRATCH / "dataset-zoo"),
    "FIFTYONE_MODEL_ZOO_DIR": str(SCRATCH / "model-zoo"),
    "FIFTYONE_PLUGINS_DIR": str(SCRATCH / "plugins"),
    "YOLO_CONFIG_DIR": str(SCRATCH / "ultralytics"),
    "YOLO_AUTOINSTALL": "false",
    "MPLBACKEND": "Agg",
    "FIFTYONE_DATABASE_URI": OWN_DATABASE_URI or f"mongodb://127.0.0.1:{PORT}/?serverSelectionTimeoutMS=10000",
}
(SCRATCH / "plugins").mkdir()


@atexit.register
def remove_scratch() -> None:
    shutil.rmtree(SCRATCH, ignore_errors=True)


class FileScheduling(LoadScopeScheduling):
    """For pytest-xdist: the tests of a file stay on one worker, because they share fixtures.

    So do those of the App, which share a browser, and those of models of gigabytes, which memory holds one at a time.
    """

    LARGE = ("tests/modeling/test_parity.py", "tests/modeling/checkpoints/test_catalog.py")

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::")[0]
        if path.startswith("tests/app/"):
            return "tests/app"
        return "large models" if path in self.LARGE else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> FileScheduling:
    return FileScheduling(config, log)


def skip_reasons(reports: Iterable[pytest.TestReport]) -> Counter[str]:
    """How many tests were skipped for each reason."""
    return Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports)


def unnamed_reasons(reasons: Iterable[str], readme: str) -> list[str]:
    """The reasons that the README's list of what is skipped does not name."""
    named = re.findall(r"^- `(needs [^`]+)`", readme, re.MULTILINE)
    return [reason for reason in reasons if not any(reason.startswith(name) for name in named)]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Counts what was skipped, and fails where a reason is not in the README: nothing goes untested unnoticed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"):  # a worker's reports reach its parent
        return
    reasons = skip_reasons(reporter.stats.get("skipped", []))
    for reason, count in reasons.items():
        reporter.write_line(f"\n{count} skipped: {reason}")
    if unnamed := unnamed_reasons(reasons, (ROOT / "README.md").read_text()):
        reporter.write_line(f"The README does not say that this is skipped: {'; '.join(unnamed)}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def mongod():
    """The URI of a database for these tests: FIFTYONE_DATABASE_URI if set, else a mongod of their own."""
    if OWN_DATABASE_URI:
        return OWN_DATABASE_URI

    fiftyone = Path(importlib.util.find_spec("fiftyone").submodule_search_locations[0])
    binary = fiftyone / "db" / "bin" / "mongod"
    if not binary.is_file():
        pytest.fail(f"{binary} is missing: run `make setup` or set FIFTYONE_DATABASE_URI", pytrace=False)

    dbpath, log = SCRATCH / "mongod", SCRATCH / "mongod.log"
    dbpath.mkdir()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(binary, "--dbpath", dbpath, "--port", str(PORT), "--bind_ip", "127.0.0.1", "--nounixsocket"),
                *("--setParameter", "enableTestCommands=1"),  # so that tests can make it fail
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    # At exit and not in the fixture's teardown: FiftyOne cleans its database up at exit, and would wait for one
    # that is gone. Functions run in reverse order, so this one, registered before FiftyOne's, comes after it.
    @atexit.register
    def stop() -> None:
        process.kill()
        process.wait(timeout=10)

    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", PORT), timeout=1).close()
            break
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{binary} did not start:\n{log.read_text()[-2000:]}", pytrace=False)
            time.sleep(0.1)
    return os.environ["FIFTYONE_DATABASE_URI"]


@pytest.fixture
def dataset(mongod):
    """An empty, non-persistent fiftyone.Dataset of this test's own."""
    import fiftyone as fo

    dataset = fo.Dataset(f"test-{uuid.uuid4().hex}")
    yield dataset
    if not dataset.deleted:
        dataset.delete()


@pytest.fixture
def model_zoo(tmp_path, monkeypatch) -> Path:
    """The folder of a model zoo of this test's own, for this process and its children."""
    import fiftyone as fo

    folder = tmp_path / "model-zoo"
    monkeypatch.setenv("FIFTYONE_MODEL_ZOO_DIR", str(folder))
    monkeypatch.setattr(fo.config, "model_zoo_dir", str(folder))
    return folder


@pytest.fixture
def make_trained():
    """Makes a trained model of the demo model: its detector is `shift` more confident, in logits, of everything."""

    def make(folder: Path, name: str = "my-cells", shift: float = 0.5, **arguments):
        from safetensors.torch import load_file, save_file

        from fiftyone_mobilesamv2.modeling.checkpoints.catalog import DEMO_MODEL, MODELS
        from fiftyone_mobilesamv2.modeling.checkpoints.files import PACKAGED_WEIGHTS
        from fiftyone_mobilesamv2.modeling.checkpoints.trained import write_trained

        folder.mkdir(parents=True, exist_ok=True)
        tensors = load_file(PACKAGED_WEIGHTS / "demo_detector.safetensors")
        for level in range(3):
            tensors[f"model.22.cv3.{level}.2.bias"] += shift
        save_file(tensors, folder / "detector.safetensors")
        defaults = {
            "encoder": "resnet_demo",
            "detector_size": MODELS[DEMO_MODEL].detector_size,
            "part": "discovery",
            "base": DEMO_MODEL,
            "dataset": "cells",
            "images": "scenes",
            "files": {"detector_checkpoint": folder / "detector.safetensors"},
            "training": {"epochs": 3, "ar": {"before": 0.5, "after": 0.75}},
        }
        return write_trained(folder, name=name, **(defaults | arguments))

    return make


def shared_folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"needs the folder ../shared/{name} beside the repository")
    return folder


@pytest.fixture(scope="session")
def photos() -> Path:
    """The folder of photos with annotated instances."""
    return shared_folder("photos")


class Seeded:
    """The parity data: its weights, as checkpoints in the released layouts, its images, what the release computes."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        spec = importlib.util.spec_from_file_location("parity_seeded", PARITY / "seeded.py")
        seeded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(seeded)
        self.tensor, self.image = seeded.seeded_tensor, seeded.test_image
        self.model = lru_cache(maxsize=2)(self._model)

    def path(self, name: str) -> Path:
        """A file of tests/data/parity, or one of those that are too large for it."""
        path = PARITY / name
        return path if path.is_file() else shared_folder("parity") / name

    def json(self, name: str) -> dict:
        return json.loads(self.path(name).read_text())

    def encoder_tensors(self, encoder: str) -> dict:
        keys = self.json(f"{encoder}.keys.json")
        return {key: self.tensor(f"image_encoder.{key}", tuple(shape)) for key, shape in keys.items()}

    def decoder_tensors(self) -> dict[str, dict]:
        prefixes = {"PromtEncoder": "prompt_encoder.", "MaskDecoder": "mask_decoder."}
        return {
            part: {key: self.tensor(prefixes[part] + key, tuple(shape)) for key, shape in keys.items()}
            for part, keys in self.json("prompt_guided_decoder.keys.json").items()
        }

    def encoder_checkpoint(self, encoder: str) -> Path:
        path = self.scratch / f"{encoder}.pt"
        if not path.exists():
            import torch

            torch.save(self.encoder_tensors(encoder), path)
        return path

    def decoder_checkpoint(self) -> Path:
        path = self.scratch / "decoder.pt"
        if not path.exists():
            import torch

            torch.save(self.decoder_tensors(), path)
        return path

    @property
    def detector_checkpoint(self) -> Path:
        return self.path("object_aware_model_n_seeded.pt")

    def _model(self, encoder: str):
        from fiftyone_mobilesamv2 import MobileSAMv2

        return MobileSAMv2.from_checkpoints(
            encoder, self.encoder_checkpoint(encoder), self.decoder_checkpoint(), device="cpu"
        )


@pytest.fixture(scope="session")
def seeded(tmp_path_factory) -> Seeded:
    return Seeded(tmp_path_factory.mktemp("seeded"))
