"""Checks of a model's environment: versions, devices, the database, and the parts of the App that need no browser."""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

from ..errors import message_of
from .segmentation_check import Check

PACKAGES = (
    "fiftyone-mobilesamv2",
    "fiftyone",
    "torch",
    "torchvision",
    "ultralytics",
    "timm",
    "numpy",
    "pycocotools",
    "opencv-python",
    "opencv-python-headless",
)
SERVER_START = 90  # seconds for the App's server to start


def machine_checks(device: str | None) -> Iterator[Check]:
    """Yields the checks as they complete. A failing check does not prevent the others.

    Args:
        device: the requested device, or None.
    """
    yield Check(None, f"Python {platform.python_version()} on {platform.platform()}")
    yield Check(None, ", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    for problem, check in (
        ("The device can't be used", lambda: _device(device)),
        ("The database can't be used", _database),
        ("The plugin can't be loaded", _plugin),
        ("The App's server doesn't start", _server),
    ):
        yield _attempt(problem, check)


def _attempt(problem: str, check: Callable[[], str]) -> Check:
    try:
        return Check(True, check())
    except Exception as error:  # any error means that this machine lacks something
        return Check(False, f"{problem}: {message_of(error)}", f"{problem}: see above.")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _device(name: str | None) -> str:
    import torch

    from ..modeling.devices import available_devices, usable_device

    device = usable_device(name)
    text = f"Device {device} (available: {', '.join(available_devices())}); {torch.get_num_threads()} threads"
    return f"{text}; {torch.cuda.get_device_name(device)}" if device.type == "cuda" else text


def _database() -> str:
    import fiftyone as fo
    import fiftyone.core.odm as foo

    count = len(fo.list_datasets())
    server = foo.get_db_conn().client.server_info()["version"]
    return f"FiftyOne's database answers: MongoDB {server}, {count} datasets"


def _plugin() -> str:
    import fiftyone as fo
    from fiftyone.operators import Operator
    from fiftyone.plugins.context import build_plugin_contexts

    from ..operators import OPERATORS
    from ..registration import PLUGIN

    for context in build_plugin_contexts():
        if context.name == PLUGIN:
            if context.errors:
                raise RuntimeError("; ".join(map(str, context.errors)))
            count = sum(isinstance(instance, Operator) for instance in context.instances)
            return f"The plugin is linked into {fo.config.plugins_dir}, and registers {count} operators and panels"
    return (
        f"{len(OPERATORS)} operators can be loaded. The plugin is not linked into {fo.config.plugins_dir}: "
        "run fiftyone-mobilesamv2 install to have it in the App"
    )


def _server() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fiftyone.server.main", "--port", str(port), "--address", "127.0.0.1"]
    start = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        while True:
            try:
                with direct.open(f"http://127.0.0.1:{port}/fiftyone", timeout=5) as response:
                    response.read()
                return f"The App's server answers after {time.monotonic() - start:.0f} s"
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                if process.poll() is not None:
                    raise RuntimeError(f"it exited with status {process.returncode}") from None
                if time.monotonic() - start > SERVER_START:
                    raise RuntimeError(f"it did not answer within {SERVER_START} s") from None
                time.sleep(0.5)
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
