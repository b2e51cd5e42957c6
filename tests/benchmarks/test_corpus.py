"""Files and labels with wrong values, given to everything that reads them: see benchmarks/corpus.

MOBILESAMV2_CASES sets the number of cases of the slow test.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

CORPUS = Path(__file__).resolve().parents[2] / "benchmarks" / "corpus"
CONSUMERS = 12


def run(cases, timeout):
    command = [sys.executable, str(CORPUS), "--cases", str(cases)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    print(ran.stdout)  # the number of cases of each consumer
    assert ran.returncode == 0 and ran.stdout, ran.stdout[-20_000:] + ran.stderr[-2000:]
    total, violations = re.search(r"^([\d,]+) cases, (\d+) violations$", ran.stdout, re.MULTILINE).groups()
    rows = re.findall(r"^\| (?!consumer|---)([^|]+) \| (\d+) \| (\d+) \| (\d+) \|", ran.stdout, re.MULTILINE)
    assert violations == "0" and int(total.replace(",", "")) >= cases and len(rows) == CONSUMERS
    return rows


@pytest.mark.slow
def test_every_case_is_used_correctly_or_refused_clearly(mongod):
    cases = int(os.environ.get("MOBILESAMV2_CASES", "2000"))
    for name, total, used, refused in run(cases, timeout=600 + cases):
        assert int(used) > int(total) / 10 and int(refused) > int(total) / 10, name


# The corpus notices what it looks for ---------------------------------------------------------------------------------


@pytest.fixture
def modules(monkeypatch):
    """The corpus's modules can be imported."""
    monkeypatch.syspath_prepend(str(CORPUS))
    yield
    for name in ("consumers", "files", "labels", "mutations", "workers"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_worker_that_dies_or_hangs_is_started_again(modules):
    from workers import Worker, WorkerError

    with Worker(partial(partial, eval), max_seconds=5, max_memory=500_000_000) as worker:
        for call, problem in [
            ("__import__('os').abort()", "exit code -6"),
            ("__import__('time').sleep(100)", "did not end within 5 s"),
            ("len(bytearray(10**9))", "MemoryError"),
            ("{}['mask']", "KeyError: 'mask'"),
        ]:
            assert worker("6 * 7") == 42
            with pytest.raises(WorkerError, match=problem):
                worker(call)
        assert worker("len(bytearray(10**8))") == 10**8
        assert worker.starts == 3 and worker.peak_memory > 9 * 10**7


def test_file_that_is_loaded_wrongly_is_noticed(mongod, modules, tmp_path):
    from files import Loading, Violation

    loading = Loading("load_coco", tmp_path)
    annotation = {"id": 1, "image_id": 2, "category_id": 5, "segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]], "iscrowd": 0}
    annotation["area"] = 64
    content = {
        "images": [{"id": 2, "file_name": "2.png", "width": 40, "height": 30}],
        "annotations": [annotation],
        "categories": [{"id": 5, "name": "dog"}],
    }
    assert loading([json.dumps(content)]) == ["used"]
    load = loading.load
    for changes, problem in [
        ({"segmentation": [[1, 1, 9, 1, 9, 8, 1, 8]]}, "other pixels in annotation 1"),
        ({"iscrowd": 1}, "crowd of annotation 1"),
        ({"area": 5}, "area of annotation 1"),
        ({"iscrowd": "0"}, "the file is not named"),
    ]:

        def load_other(folder, file, name, changes=changes):
            other = file.with_name("other.json")
            other.write_text(json.dumps(content | {"annotations": [annotation | changes]}))
            return load(folder, other, name=name)

        loading.load = load_other
        with pytest.raises(Violation, match=problem):
            loading([json.dumps(content)])


@pytest.mark.slow
def test_label_that_is_used_wrongly_is_noticed(mongod, modules, tmp_path):
    from consumers import Consuming
    from labels import PREDICTIONS, Case, stored

    good, wrong = stored("Detections", PREDICTIONS), stored("Detections", PREDICTIONS)
    wrong["detections"][1]["bounding_box"] = ["0.1", 0.1, 0.2, 0.2]
    cases = [Case("Detections", PREDICTIONS, good, "index"), Case("Detections", PREDICTIONS, wrong, "bounding_box")]
    consuming = Consuming("image_coverage", tmp_path)
    used, skipped = consuming(cases)
    assert used == "used" and skipped.startswith("skipped: Detection") and "bounding_box=['0.1'" in skipped

    def changing(change):
        def call(dataset, folder):
            skipped, numbers = coverage(dataset, folder)
            change(dataset, skipped, numbers)
            return skipped, numbers

        return call

    def lose(dataset, skipped, numbers):
        dataset._sample_collection.update_many({}, {"$pop": {"predictions.detections": 1}})

    coverage = consuming.consumer.call
    consuming.consumer = dataclasses.replace(consuming.consumer, call=changing(lose))
    assert all("labels were changed" in outcome for outcome in consuming(cases))
    consuming.consumer = dataclasses.replace(consuming.consumer, call=changing(lambda d, skipped, n: skipped.clear()))
    assert consuming(cases)[1].startswith("violation: used although bounding_box=")
    neighbour = changing(lambda d, s, numbers: numbers.update((id, [0]) for id in numbers))
    consuming.consumer = dataclasses.replace(consuming.consumer, call=neighbour)
    with pytest.raises(AssertionError, match="a good image got"):
        consuming(cases)
