"""No message or log contains the database's password. modeling/checkpoints/test_downloads.py tests other secrets."""

import os
import subprocess
import sys

import pytest

URI = "mongodb://user:S3CRET@127.0.0.1:9/?serverSelectionTimeoutMS=300&appName=S3CRET"
PROGRAM = """
import logging, threading, traceback
import fiftyone as fo
import fiftyone.core.odm as foo
from fiftyone_mobilesamv2 import cli
from fiftyone_mobilesamv2.runs.retry import retry_while_unavailable

logging.basicConfig()
logging.getLogger("fiftyone_mobilesamv2").setLevel(logging.DEBUG)
assert "S3CRET" in fo.config.database_uri
given_up = threading.Event()

def wait():
    threading.Timer(5, given_up.set).start()
    retry_while_unavailable(lambda: foo.get_db_conn().command("ping"), given_up)

for attempt in (
    lambda: cli.main(["evaluate", "dataset", "segmentations"]),
    lambda: cli.main(["segment", "dataset", "--model", "mobilesamv2-demo-torch"]),
    lambda: cli.main(["segment", "dataset", "--model", "mobilesamv2-demo-torch", "--cluster", "local"]),
    wait,
):
    try:
        print("status", attempt())
    except Exception:
        traceback.print_exc()
"""


@pytest.mark.slow
def test_unreachable_database_reveals_no_password():
    """This covers the commands that connect, and the log while a run waits for the database."""
    environment = os.environ | {"FIFTYONE_DATABASE_URI": URI, "FIFTYONE_DO_NOT_TRACK": "true"}
    ran = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=180)
    output = ran.stdout + ran.stderr
    assert "fiftyone-mobilesamv2: Could not connect" in output and "status 1" in output, output
    assert "The database doesn't answer; waiting" in output and output.count("127.0.0.1:9") > 2, output
    assert "S3CRET" not in output
