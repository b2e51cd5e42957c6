"""The core benchmarks also run on a GPU machine without FiftyOne."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ABSENT = ["fiftyone", "pycocotools", "pymongo", "mongoengine", "bson", "lvis", "segment_anything", "plotly"]


@pytest.mark.slow
def test_core_imports_without_fiftyone():
    program = f"import sys\nfor name in {ABSENT}: sys.modules[name] = None\nimport core"
    ran = subprocess.run([sys.executable, "-c", program], cwd=BENCHMARKS, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
