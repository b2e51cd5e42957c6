"""Checks of the machine report what works and what is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fiftyone_mobilesamv2.doctor import machine
from fiftyone_mobilesamv2.doctor.machine import machine_checks

ROOT = Path(__file__).resolve().parents[2]


def test_all_checks_pass_on_this_machine(mongod):
    texts = {check.text: check.passed for check in machine_checks("cpu")}
    assert False not in texts.values()
    text = "\n".join(texts)
    for words in ("Python 3.", "torch 2.", "Device cpu", "MongoDB 6.", "operators", "The App's server answers"):
        assert words in text


def test_every_failure_is_reported(mongod, monkeypatch):
    """A failed check does not prevent the others."""

    def fail(*args):
        raise RuntimeError("gone")

    for name in ("_database", "_plugin", "_server"):
        monkeypatch.setattr(machine, name, fail)
    failed = [check.text for check in machine_checks("cuda:77") if check.passed is False]
    assert failed[0].startswith("The device can't be used: device must be available on this machine (")
    assert failed[1:] == [
        "The database can't be used: gone",
        "The plugin can't be loaded: gone",
        "The App's server doesn't start: gone",
    ]


def test_server_that_exits_is_reported(mongod, monkeypatch):
    monkeypatch.setattr(machine.sys, "executable", "/bin/false")
    (failed,) = [check.text for check in machine_checks("cpu") if check.passed is False]
    assert failed == "The App's server doesn't start: it exited with status 1"


@pytest.mark.slow
def test_unreachable_database_is_reported(tmp_path):
    """This needs its own process because FiftyOne connects only once."""
    program = """
from fiftyone_mobilesamv2.doctor import machine
machine._server = machine._plugin = lambda: "left out"
for check in machine.machine_checks("cpu"):
    print(check.passed, check.text)
"""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "FIFTYONE_DATABASE_URI": "mongodb://127.0.0.1:9/?serverSelectionTimeoutMS=500",
    }
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert "False The database can't be used: " in ran.stdout, ran.stderr
    assert ran.stdout.count("True ") == 3
