"""The SegEvery panel in the App: appearance and clicks."""

import pytest
from fiftyone import ViewField as F
from playwright.sync_api import TimeoutError as PlaywrightTimeoutError

from fiftyone_mobilesamv2 import evaluate_proposals

FIRST_PLOT = 90_000  # ms: the server first imports PyTorch


def open_panel(app):
    panel = app.open_panel("segevery")
    panel.locator(".js-plotly-plot").first.wait_for(timeout=FIRST_PLOT)
    return panel


def plot(panel, title):
    """The plot under this title."""
    return panel.get_by_text(title, exact=True).locator('xpath=following::*[contains(@class, "js-plotly-plot")][1]')


def test_clicks_change_the_view(app, scenes):
    results = evaluate_proposals(scenes, "proposals", eval_key="ar")
    counts = [len(sample.proposals.detections) for sample in scenes]
    app.open(scenes.name)
    panel = open_panel(app)
    app.screenshot("segevery-dark")

    bars = plot(panel, "Masks per image").locator(".bars .point")
    width = max(counts) // bars.count() + 1  # number of mask counts per bar
    fullest = counts.index(max(counts))
    bars.nth(counts[fullest] // width).click(force=True)
    shown = sum(count // width == counts[fullest] // width for count in counts)
    assert shown < len(counts)
    app.wait_samples(f"{shown} sample{'s' if shown > 1 else ''}")
    panel.get_by_role("button", name="Show everything").click()
    app.wait_samples("6 samples")

    small = [
        label.id for sample in results.missed() for label in sample.ground_truth.detections if label["area"] <= 32**2
    ]
    assert small
    plot(panel, "AR by size").locator(".bars .point").nth(1).click(force=True)
    app.wait_samples(patches(len(small)))
    panel.get_by_role("button", name="Show everything").click()
    app.wait_samples("6 samples")

    missed = results.missed(iou=0.5).count("ground_truth.detections")
    assert missed
    plot(panel, "Recall by IoU").locator(".scatterlayer .point").first.click(force=True)
    app.wait_samples(patches(missed))
    app.wait_grid()
    app.screenshot("segevery-clicked")


def patches(count):
    return f"{count} patch{'es' if count > 1 else ''}"


def select(app, panel, evaluation):
    """Picks an evaluation; a panel that is still loading closes its list when it is drawn anew."""
    option = app.page.get_by_role("option", name=evaluation)
    for _ in range(10):
        panel.get_by_role("combobox").click()
        try:
            option.click(timeout=5000)
            return
        except PlaywrightTimeoutError:
            app.page.keyboard.press("Escape")
    raise AssertionError(f"{evaluation} could not be selected")


@pytest.mark.slow
def test_evaluations_can_be_selected(app, scenes):
    scenes.clone_sample_field("proposals", "sure")
    scenes.filter_labels("sure", F("confidence") > 0.7, only_matches=False).save("sure")
    evaluate_proposals(scenes, "sure", eval_key="sure_ar")
    evaluate_proposals(scenes, "proposals", eval_key="all_ar")
    app.open(scenes.name)
    panel = open_panel(app)
    legend = plot(panel, "Recall by IoU").locator(".legendtext")
    assert legend.count() == 0
    select(app, panel, "sure_ar")
    legend.nth(1).wait_for()
    assert legend.all_text_contents() == ["all_ar", "sure_ar"]
    app.page.keyboard.press("Escape")
    app.theme("light")
    panel.locator(".js-plotly-plot").first.wait_for()
    app.screenshot("segevery-light")
    app.theme("dark")


@pytest.mark.slow
def test_empty_panel_offers_the_first_step(app, scenes):
    scenes.delete_sample_field("proposals")
    app.open(scenes.name)
    panel = app.open_panel("segevery")
    panel.get_by_text("No field has been segmented yet").wait_for(timeout=FIRST_PLOT)
    app.screenshot("segevery-nothing-yet")
    panel.get_by_role("button", name="Segment everything").click()
    app.form.get_by_text("Label field").wait_for()
    app.cancel()
