"""Workflows and issue forms have valid schemas and name existing commands."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fiftyone_mobilesamv2 import cli

GITHUB = Path(__file__).resolve().parents[1] / ".github"


@pytest.mark.parametrize(
    "schema, folder", [("vendor.github-workflows", "workflows"), ("vendor.github-issue-forms", "ISSUE_TEMPLATE")]
)
def test_files_match_the_schema_of_github(schema, folder):
    files = sorted(map(str, (GITHUB / folder).glob("*.yml")))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert files and ran.returncode == 0, ran.stdout + ran.stderr


def test_weekly_check_runs_an_existing_command(monkeypatch):
    workflow = yaml.safe_load((GITHUB / "workflows" / "check-sources.yml").read_text())
    assert "schedule" in workflow[True]  # YAML reads "on" as a boolean
    *_, command = [step["run"] for step in workflow["jobs"]["check"]["steps"] if "run" in step]
    program, *arguments = shlex.split(command)
    assert program == "fiftyone-mobilesamv2"
    ran = []
    monkeypatch.setattr(cli, "run_models", lambda args: ran.append(args.check_sources) or 0)
    assert cli.main(arguments) == 0 and ran == [True]


def test_check_needs_only_what_the_workflow_installs():
    """The check imports the packages that the workflow names but not torch, FiftyOne and other large ones."""
    workflow = (GITHUB / "workflows" / "check-sources.yml").read_text()
    installed = re.search(r"pip install (filelock .*)", workflow)[1].split()
    code = """
import sys
from fiftyone_mobilesamv2 import cli
try:
    cli.main(["models", "--check-sources"])
finally:
    print(sorted(name for name in sys.modules if "." not in name), file=sys.stderr)
"""
    environment = {"PYTHONPATH": str(GITHUB.parent), "HF_HUB_OFFLINE": "1", "HOME": "/nonexistent"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "offline mode" in ran.stdout, ran.stderr
    imported = set(re.findall(r"'([^']+)'", ran.stderr.splitlines()[-1]))
    assert set(installed) <= imported and not imported & {"torch", "fiftyone", "numpy", "pandas", "ultralytics"}


def test_issue_form_asks_for_the_doctor():
    form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / "released_model.yml").read_text())
    assert form["name"] == "A released model does not work"
    fields = {field.get("id"): field for field in form["body"]}
    assert "fiftyone-mobilesamv2 doctor" in fields["doctor"]["attributes"]["description"]
    assert fields["doctor"]["validations"]["required"]
