import pytest
from fiftyone import ViewField as F

from fiftyone_mobilesamv2 import evaluate_proposals


@pytest.mark.slow
def test_panel_shows_average_recalls_and_opens_missed_objects(app, scenes):
    results = evaluate_proposals(scenes, "proposals", gt_field="ground_truth", eval_key="ar")
    expected = results.metrics()
    assert expected["AR@10"] < expected["AR@100"], "else rows that are mixed up would not be seen"
    missed = F("ground_truth.detections").filter(F("ar") == "fn").length()
    with_missed = scenes.match(missed > 0)
    assert 0 < len(with_missed) < len(scenes)

    app.open(scenes.name)
    panel = app.open_panel("model_evaluation_panel_builtin")
    panel.get_by_text("ar", exact=True).click()
    rows = panel.locator("tbody tr")
    rows.first.wait_for()
    table = dict(rows.evaluate_all("rows => rows.map(row => [row.cells[0].innerText, row.cells[1].innerText.trim()])"))
    for name in ("AR@10", "AR@100", "AR@1000"):
        assert float(table[name]) == pytest.approx(expected[name], abs=0.0005), "the panel shows three decimals"
    assert int(table["False Negatives"]) == scenes.sum(missed)
    app.screenshot("model-evaluation")

    rows.filter(has_text="False Negatives").get_by_title("Load view").click()
    app.wait_samples(f"{len(with_missed)} samples")
