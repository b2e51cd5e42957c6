"""Finds the browser for the tests that drive the App, or installs it if that needs no interaction."""

import os
import shutil
import subprocess

COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = (
    "No working Chromium or Chrome in PATH: the tests that drive the App in a browser will be skipped. Install one, "
    "for example with `apt-get install chromium`, to run them."
)


def ends_well(command: list[str], timeout: int) -> bool:
    """Whether the command exits with status 0 within `timeout` seconds."""
    try:
        return subprocess.run(command, capture_output=True, timeout=timeout).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def find_chromium() -> str | None:
    """The first working browser in PATH: on Ubuntu, `chromium-browser` may be a stub that requests a snap."""
    paths = filter(None, map(shutil.which, COMMANDS))
    return next((path for path in paths if ends_well([path, "--version"], 60)), None)


def install(package: str, purpose: str) -> None:
    """Tries to install the package with apt-get, unless that needs a password."""
    if not shutil.which("apt-get"):
        return
    apt_get = [*([] if os.geteuid() == 0 else ["sudo", "-n"]), "env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]
    print(f"Installing {package} with apt-get, {purpose}", flush=True)
    if ends_well([*apt_get, "update"], 300):
        ends_well([*apt_get, "install", "-y", "--no-install-recommends", package], 600)


def main() -> None:
    browser = find_chromium()
    if not browser:
        install("chromium", "for the tests that drive the App")
        browser = find_chromium()
    print(f"Browser for the tests of the App: {browser}" if browser else MISSING)


if __name__ == "__main__":
    main()
