"""The FiftyOne App in a real Chromium: the plugin as users install it, a server, a browser, and pages to drive.

One server and one browser serve all tests here, and end with them: Playwright runs an asyncio loop in this thread, and
FiftyOne's operators start their own. Tests and server share the database: a test makes persistent datasets with
fiftyone, and looks at what the App did to them after `dataset.reload()`.
"""

import contextlib
import functools
import http.server
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fiftyone as fo
import playwright.sync_api
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, expect, sync_playwright
from playwright.sync_api import TimeoutError as PlaywrightTimeoutError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CHROMIUM = runpy.run_path(str(ROOT / "tools" / "ensure_chromium.py"))

FIFTYONE = Path(sys.executable).with_name("fiftyone")
PLUGIN = "@mobilesamv2/fiftyone_mobilesamv2"
TIMEOUT = 60_000  # ms that a page may take for any one step, beside other tests on two cores
DRAWN = 300  # ms after which the page shows that a change is being looked at, or what came of it
VALIDATED = 800  # ms: the App validates a form every 750 ms at most

# Set by the package where a test has imported it, to point at this checkout: the server is to find its own copy.
OFFERED = (
    "FIFTYONE_MODEL_ZOO_MANIFEST_PATHS",
    "FIFTYONE_DETECTION_BACKENDS",
    "FIFTYONE_DETECTION_PROPOSALS_CONFIG_CLS",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("app")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    app = item.funcargs.get("app")
    if report.failed and app:
        if call.when == "call":
            try:
                picture = str(app.screenshot(f"failed-{item.name}"))
            except playwright.sync_api.Error as error:  # the page may be what failed
                picture = str(error)
            report.sections.append(("Screenshot", picture))
        for log in app.server.log.parent.glob("*.log"):
            report.sections.append((f"End of {log.name}", log.read_text(errors="replace")[-4000:]))
    return report


@dataclass
class Server:
    """A running App.

    Attributes:
        url: its address.
        log: the file of what it prints.
        environment: the variables it runs with, which a worker needs too.
    """

    url: str
    log: Path
    environment: dict[str, str]


@pytest.fixture(scope="session")
def server_environment(mongod, tmp_path_factory) -> dict[str, str]:
    """The plugin downloaded by FiftyOne, from an archive as GitHub makes them, and nothing else of this checkout."""
    git = ["git", "-C", str(ROOT), "ls-files", "-coz", "--exclude-standard"]
    listed = subprocess.run(git, capture_output=True, text=True)
    if listed.returncode:
        pytest.fail(
            f"The tests of the App need a git checkout, to know the plugin's files: {listed.stderr}", pytrace=False
        )
    folder = tmp_path_factory.mktemp("server")
    (folder / "site").mkdir()
    with zipfile.ZipFile(folder / "site" / "main.zip", "w") as archive:
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():  # and not deleted since the last commit
                archive.write(ROOT / name, f"fiftyone_mobilesamv2-main/{name}")

    environment = {key: value for key, value in os.environ.items() if key not in OFFERED} | {
        "FIFTYONE_PLUGINS_DIR": str(folder / "plugins"),
        "FIFTYONE_MODEL_ZOO_DIR": str(folder / "model-zoo"),
        "FIFTYONE_DEFAULT_DATASET_DIR": str(folder / "datasets"),
        "FIFTYONE_MOBILESAMV2_WEIGHTS_DIR": str(folder / "weights"),
        "FIFTYONE_ALLOW_LEGACY_ORCHESTRATORS": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(folder / "plugins" / PLUGIN),
    }
    (folder / "plugins").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder / "site")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        download = [FIFTYONE, "plugins", "download", f"http://127.0.0.1:{site.server_port}/main.zip"]
        subprocess.run(download, env=environment, cwd=folder, check=True, timeout=120)
        site.shutdown()

    where = "import importlib.util; print(importlib.util.find_spec('fiftyone_mobilesamv2').origin)"
    found = subprocess.check_output([sys.executable, "-c", where], env=environment, cwd=folder, text=True).strip()
    expected = folder / "plugins" / PLUGIN / "fiftyone_mobilesamv2" / "__init__.py"
    assert Path(found) == expected, "the server would import the package from elsewhere than the downloaded plugin"
    return environment


@contextlib.contextmanager
def running(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    """A process, until the block ends, and then none of it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=log.parent,  # `-m` puts it first in sys.path: it must not be this checkout
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        # The App's server would wait for open connections.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=3)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=10)


@pytest.fixture(scope="package")
def server(server_environment, tmp_path_factory):
    """The App's server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    server = Server(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("log") / "server.log", server_environment)
    command = [sys.executable, "-m", "fiftyone.server.main", "--port", port, "--address", "127.0.0.1"]
    with running(command, server.log, server_environment) as process:
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"{server.url}/fiftyone", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"The App's server did not start:\n{server.log.read_text()[-4000:]}", pytrace=False)
                time.sleep(0.2)
        yield server


@pytest.fixture
def worker(server):
    """A worker for what is scheduled in the App; it takes its time to start. The path of its log."""
    log = server.log.with_name("worker.log")
    with running([str(FIFTYONE), "delegated", "launch"], log, server.environment):
        yield log


@pytest.fixture(scope="package")
def browser():
    chromium = CHROMIUM["find_chromium"]()
    if not chromium:
        pytest.skip(f"needs Chromium: {CHROMIUM['MISSING']}")
    with sync_playwright() as started:
        # As root, Chromium starts only without its sandbox. By the rule, no name resolves: the App asks for web fonts.
        arguments = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        browser = started.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def context(browser: Browser):
    context = browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme="dark", reduced_motion="reduce")
    context.set_default_timeout(TIMEOUT)
    # The App advertises another product over the page, once. The theme is that of the last page, else.
    context.add_init_script(
        "localStorage.setItem('fiftyone-enterprise-tooltip-seen', 'true'); localStorage.setItem('mui-mode', 'dark')"
    )
    yield context
    context.close()


@pytest.fixture
def app(context, server):
    """A fresh page. Fails the test, when it is over, if the page has met errors."""
    app = App(context.new_page(), server)
    yield app
    app.page.close()
    if app.problems:
        pytest.fail("The browser's console has errors:\n" + "\n".join(dict.fromkeys(app.problems)), pytrace=False)


NOISE = (
    # The App's own router, where a view is asked for while another is still on its way.
    "entry is loading",
    # The App's own drawing of samples, now and then, where one is loaded again while it is on its way to a worker.
    "An ArrayBuffer is detached and could not be cloned.",
)


class App:
    """A page of the App, used as people do. Every wait is bounded.

    Attributes:
        page: Playwright's page, for what has no method here.
        form: the dialog of an operator's form.
        output: the dialog of what an operator shows.
        problems: what went wrong in the page.
    """

    def __init__(self, page: Page, server: Server) -> None:
        self.page, self.server = page, server
        self.form = page.locator('[data-cy="operators-prompt-modal"]')
        self.output = page.locator('[data-cy="operators-prompt-view-modal"]')
        self.problems: list[str] = []
        page.on("pageerror", self._fail)
        page.on("console", self._hear)
        self._resolving: set[Request] = set()  # what the form waits for
        page.on("request", lambda request: "/operators/resolve" in request.url and self._resolving.add(request))
        for ending in ("requestfinished", "requestfailed"):
            page.on(ending, lambda request: self._resolving.discard(request))

    def _fail(self, error: playwright.sync_api.Error) -> None:
        self._note(str(error))

    def _hear(self, message: ConsoleMessage) -> None:
        url = message.location["url"]
        font = "net::ERR_NAME_NOT_RESOLVED" in message.text and url.startswith("https://fonts.googleapis.com/")
        if message.type == "error" and not font:
            self._note(f"{message.text} ({url})")

    def _note(self, problem: str) -> None:
        if not any(noise in problem for noise in NOISE):
            self.problems.append(problem)

    def open(self, dataset_name: str) -> None:
        """Opens a dataset that has samples, without panels. A view opened earlier stays: the server remembers it."""
        self.page.goto(f"{self.server.url}/datasets/{dataset_name}")
        self.wait_grid()
        self.close_panels()

    def wait_grid(self) -> None:
        """Until the grid shows samples."""
        self.page.wait_for_selector('[data-cy="looker"] canvas[canvas-loaded="true"]')

    def theme(self, mode: str) -> None:
        """Switches this page, which shows a grid, to the "dark" or the "light" theme."""
        self.page.add_init_script(f"localStorage.setItem('mui-mode', '{mode}')")
        self.page.reload()
        self.wait_grid()

    def screenshot(self, name: str) -> Path:
        """Saves what the page shows as a PNG in $MOBILESAMV2_SCREENSHOTS, or in a folder for temporary files."""
        folder = os.environ.get("MOBILESAMV2_SCREENSHOTS") or Path(tempfile.gettempdir(), "mobilesamv2-screenshots")
        path = Path(folder) / (re.sub(r"[^\w.-]+", "-", name) + ".png")
        self.page.screenshot(path=path)
        return path

    # Samples

    def samples(self) -> str:
        """How many the grid has, as it says it, such as "8 samples"."""
        return self.page.locator('[data-cy="entry-counts"]').inner_text()

    def wait_samples(self, text: str) -> None:
        """Until the grid says that it has so many, such as "8 samples"."""
        expect(self.page.locator('[data-cy="entry-counts"]')).to_have_text(text, timeout=TIMEOUT)

    def select_samples(self, count: int) -> None:
        """Selects the first samples of the grid."""
        for index in range(count):
            looker = self.page.locator('[data-cy="looker"]').nth(index)
            looker.hover()
            looker.locator('label[data-cy^="looker-checkbox"]').click()

    def click_label(self, sample: fo.Sample, label: fo.Detection) -> None:
        """Clicks the middle of a label's box in the opened sample, which selects the label."""
        area = self.page.locator('[data-cy="modal"] canvas[canvas-loaded="true"]').first.bounding_box()
        width, height = sample.metadata.width, sample.metadata.height
        scale = min(area["width"] / width, area["height"] / height)  # the image as large as fits, in the middle
        x, y, box_width, box_height = label.bounding_box
        self.page.mouse.click(
            area["x"] + area["width"] / 2 + (x + box_width / 2 - 0.5) * width * scale,
            area["y"] + area["height"] / 2 + (y + box_height / 2 - 0.5) * height * scale,
        )

    def sidebar(self) -> str:
        """What it says."""
        return self.page.locator('[data-cy="sidebar"]').inner_text()

    # Panels

    def close_panels(self) -> None:
        """Closes all panels but the grid; the server remembers them from page to page."""
        close = self.page.locator('[data-cy^="panel-tab-"] [title="Close"]')
        while count := close.count():
            close.first.click()
            expect(close).to_have_count(count - 1, timeout=TIMEOUT)

    def open_panel(self, name: str) -> Locator:
        """Opens a panel by its name, not its label. Returns its content."""
        self.page.locator('[data-cy="new-panel-btn"]').first.click()
        self.page.locator(f'[data-cy="new-panel-option-{name}"]').click()
        self.panel(name).wait_for()
        return self.panel(name)

    def panel(self, name: str) -> Locator:
        """The content of an open panel."""
        return self.page.locator(f'[data-cy="panel-content-{name}"]')

    # Operators

    def operator(self, label: str) -> None:
        """Opens an operator's form, from the list that the toolbar's button opens."""
        button = self.page.locator('[data-cy="action-browse-operations"]').last  # an open sample has its own
        try:
            button.click(timeout=2000)
        except PlaywrightTimeoutError:  # in a narrow grid, something else is over it
            self.page.keyboard.press("Backquote")
        self.page.fill('[data-cy="operators-browser-search"]', label)
        self.page.locator('[data-cy="operators-browser"]').get_by_text(label, exact=True).first.click()
        self.wait_form()

    def wait_form(self) -> None:
        """Until the form that was asked for is there."""
        self.form.wait_for()
        self._settle()

    def _settle(self) -> None:
        """Until the server has answered to what was changed: meanwhile, something turns beside the buttons."""
        self.page.wait_for_timeout(DRAWN)
        expect(self.form.get_by_role("progressbar")).to_have_count(0, timeout=TIMEOUT)
        deadline = time.monotonic() + TIMEOUT / 1000
        while self._resolving and time.monotonic() < deadline:
            self.page.wait_for_timeout(50)
        assert not self._resolving, "the server does not answer for the form"
        self.page.wait_for_timeout(DRAWN)

    def _control(self, field: str, condition: str) -> Locator:
        label = self.form.locator("form p").filter(has_text=re.compile(f"^{re.escape(field)}$"))
        return label.first.locator(f"xpath=following::*[{condition}][1]")

    def choose(self, field: str, option: str) -> None:
        """Chooses in a dropdown or between radio buttons; of the option, its first words are enough."""
        control = self._control(field, '@role="combobox" or @role="radiogroup"')
        if control.get_attribute("role") == "combobox":
            control.click()
            control = self.page.get_by_role("listbox")
        control.get_by_text(re.compile(rf"^{re.escape(option)}(\W|$)")).click()
        self._settle()

    def fill(self, field: str, value: object) -> None:
        """Types into a field for text or numbers, or into one that suggests values."""
        control = self._control(field, "self::input or self::textarea")
        control.fill(str(value))
        control.press("Tab")  # closes suggestions
        self._settle()

    def toggle(self, field: str) -> None:
        """Clicks a checkbox or switch."""
        self.form.get_by_text(field, exact=True).click()
        self._settle()

    def value(self, field: str) -> str:
        """What a field for text or numbers, or a dropdown, holds: of a dropdown, the value and not its text."""
        return self._control(field, "self::input or self::textarea").input_value()

    def form_text(self) -> str:
        """What the form says, without what its fields hold."""
        return self.form.inner_text()

    def errors(self) -> list[str]:
        """Why the form can't be executed, as its button tells: "name of the input: message"."""
        self.page.wait_for_timeout(VALIDATED)
        button = self.form.get_by_role("button", name=re.compile("^(Execute|Schedule)$"))
        if button.is_enabled():
            return []
        button.hover(force=True)
        tooltip = self.page.get_by_role("tooltip")
        tooltip.wait_for()
        return re.split(r"\s*params\.", tooltip.inner_text())[1:]

    def execute(self) -> None:
        """Executes the operator now; does not wait for it."""
        self._run("Execute")

    def schedule(self) -> None:
        """Leaves the operator to a worker."""
        self._run("Schedule")

    def _run(self, how: str) -> None:
        button = self.form.get_by_role("button", name=how, exact=True)
        if not button.count():  # the other one is in front
            self.form.locator('button[aria-haspopup="menu"]').click()
            self.page.get_by_role("menuitem").filter(has_text=re.compile(f"^{how}")).click()
        button.click()

    def cancel(self) -> None:
        """Closes the form."""
        self.form.get_by_role("button", name="Cancel").click()
        expect(self.form).to_have_count(0, timeout=TIMEOUT)

    def wait_output(self, text: str, timeout: float = 60_000) -> str:
        """Until an operator shows `text`, for so many ms. Returns all it shows then."""
        self.output.filter(has_text=text).wait_for(timeout=timeout)
        return self.output.inner_text()

    def done(self) -> None:
        """Closes what an operator shows."""
        self.output.get_by_role("button", name="Done").click()
        expect(self.output).to_have_count(0, timeout=TIMEOUT)


@pytest.fixture(scope="session")
def scenes_template(mongod, tmp_path_factory):
    from fiftyone_mobilesamv2 import load_coco, zoo
    from fiftyone_mobilesamv2.training.scenes import write_coco

    images, annotations = write_coco(tmp_path_factory.mktemp("scenes"), 6)
    template = load_coco(images, annotations, name=f"scenes-template-{os.getpid()}")
    template.apply_model(zoo.load_model("mobilesamv2-demo-torch", device="cpu"), "proposals", batch_size=3)
    yield template
    fo.delete_dataset(template.name)


@pytest.fixture
def scenes(scenes_template):
    """Six synthetic scenes with masks as `ground_truth`, and the demo model's `proposals`: a copy for one test."""
    copy = scenes_template.clone(f"scenes-{uuid.uuid4().hex[:4]}", persistent=True)
    yield copy
    copy.delete()
