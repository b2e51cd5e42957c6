"""How the benchmarks summarize and report their timings."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def measure():
    spec = importlib.util.spec_from_file_location("measure", ROOT / "benchmarks" / "measure.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up their module in sys.modules.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "measure", module)
        spec.loader.exec_module(module)
        yield module


@given(power=st.floats(-1, 3), factor=st.floats(0.01, 100))
def test_exponent_of_a_power_law_is_recovered(measure, power, factor):
    x = np.array([64, 128, 256, 512, 1000])
    assert measure.exponent(x, factor * x**power) == pytest.approx(power, abs=1e-9)


def test_fixed_cost_lowers_the_exponent(measure):
    x = np.array([100, 200, 500, 1000, 2000])
    assert 0.5 < measure.exponent(x, 200.0 + x) < 1


def test_speedup_is_the_ratio_of_medians(measure):
    row = measure.speedup(1, "decode", 4, slow=[8.0, 9.0, 100.0], fast=[2.0, 0.1, 3.0])
    assert (row.value, row.unit, row.runs, row.met) == (4.5, "x", 3, True)
    assert row.cells == ["1", "decode", "4.50x", "at least 4.00x", "met", "9.00 s -> 2.00 s", "3"]


def test_row_that_misses_its_target_says_by_how_much(measure):
    short = measure.speedup(1, "decode", 8, [9.0], [2.0])
    assert not short.met
    assert short.cells[4] == "short by 3.50x"
    above = measure.Row(4, "peak", 450.4, "MB", 400, at_most=True)
    assert not above.met
    assert above.cells[2:5] == ["450 MB", "at most 400 MB", "short by 50 MB"]


def test_row_without_a_target_always_passes(measure):
    row = measure.Row(4, "released", 9000, "MB", None)
    assert row.met
    assert row.cells[3:5] == ["", ""]


def test_calls_take_turns(measure):
    order = []
    seconds = measure.in_turns({name: lambda name=name: order.append(name) for name in "ab"}, runs=3)
    assert order == list("ababab")
    assert {name: len(timings) for name, timings in seconds.items()} == {"a": 3, "b": 3}


def test_peak_memory_includes_freed_allocations_but_not_earlier_ones(measure):
    kept = np.ones(50_000_000, np.uint8)
    np.ones(200_000_000, np.uint8)
    peak = measure.peak_memory(lambda: np.ones(100_000_000, np.uint8).sum())
    assert 95 < peak < 120
    assert len(kept)


def test_report_is_written_completely(measure, tmp_path):
    report = measure.Report({"device": "x"})
    report.rows = [measure.Row(8, "b", 1.0, "", 1.05, at_most=True), measure.speedup(1, "a", 4, [2.0], [1.0])]
    report.steps = [("released", 3.0)]
    report.write(tmp_path / "made" / "report.json")
    written = json.loads((tmp_path / "made" / "report.json").read_text())
    assert [(row["name"], row["met"]) for row in written["rows"]] == [("b", True), ("a", False)]
    assert written["steps"] == [["released", 3.0]]
    assert [line.split(" | ")[1] for line in report.markdown().splitlines()] == ["what", "---", "a", "b"]


def test_text_between_markers_is_replaced(measure):
    text = "before\n<!-- x -->\nold\n<!-- /x -->\nafter\n"
    replaced = measure.replace_between(text, "x", "new")
    assert replaced == "before\n<!-- x -->\nnew\n<!-- /x -->\nafter\n"
    assert measure.replace_between(replaced, "x", "new") == replaced


@pytest.mark.parametrize("text", ["", "<!-- x -->", "<!-- /x --><!-- x -->", "<!-- x --><!-- x --><!-- /x -->"])
def test_unpaired_markers_raise(measure, text):
    with pytest.raises(ValueError, match="<!-- x -->"):
        measure.replace_between(text, "x", "new")


def test_random_boxes_lie_within_the_image(measure):
    boxes = measure.random_boxes(1000, (300, 500))
    assert boxes.shape == (1000, 4)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= (500, 300)).all()
    sides = (boxes[:, 2:] - boxes[:, :2]) / (500, 300)
    assert sides.min() > 0.039
    assert sides.max() < 0.601
