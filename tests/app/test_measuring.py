"""Measuring proposals, comparing promptings and managing models, with the mouse."""

import re

import pytest

from fiftyone_mobilesamv2.modeling.checkpoints import MODELS, model_files

DEMO = "mobilesamv2-demo-torch"


@pytest.mark.slow
def test_measure_proposals(app, scenes):
    app.open(scenes.name)
    app.operator("Measure proposals (AR@K)")
    assert (app.value("Proposals"), app.value("Ground truth")) == ("proposals", "ground_truth")
    app.fill("K", "10, none")
    assert "whole numbers from 1" in app.errors()[0]
    app.fill("K", "1000 10")
    assert app.errors() == []
    app.screenshot("measure-form")
    app.execute()
    text = app.wait_output("AR@1000 is")
    app.screenshot("measure-summary")
    app.done()
    scenes.reload()
    results = scenes.load_evaluation_results("ar")
    assert results.config.ks == [10, 1000]
    assert f"AR@1000 is {results.mAR():.3f}" in text and f"{results.metrics()['AR@10']:.3f}" in text
    panel = app.panel("segevery")  # opens beside the grid
    panel.locator(".js-plotly-plot").first.wait_for(timeout=90_000)
    assert f"{results.metrics()['AR@10']:.3f}" in panel.inner_text()
    app.screenshot("measure-panel")

    app.operator("Measure proposals (AR@K)")
    assert app.value("Evaluation key") == "ar_2"  # the first evaluation is kept for comparison
    app.execute()
    app.wait_output("AR@1000 is")
    app.done()
    panel.get_by_text("ar_2", exact=True).first.wait_for(timeout=30_000)  # the panel shows it, too


@pytest.mark.slow
def test_compare_prompting(app, scenes):
    app.open(scenes.name)
    app.operator("Compare prompting")
    app.choose("Model", DEMO)
    app.fill("Images", 2)
    app.choose("Grid", "16x16")
    app.toggle("SAM's filters")
    assert app.errors() == []
    app.screenshot("compare-form")
    app.execute()
    text = app.wait_output("times as long")
    app.screenshot("compare-summary")
    assert "the 16x16 grid 256" in text and "AR@1000" in text
    assert float(re.search(r"([\d.]+) times as long", text)[1]) > 2
    app.done()
    schema = set(scenes.get_field_schema())
    scenes.reload()
    assert set(scenes.get_field_schema()) == schema  # the comparison left nothing behind
    assert scenes.list_evaluations() == []


@pytest.mark.slow
def test_manage_models(app, scenes):
    app.open(scenes.name)
    app.operator("Manage models")
    text = app.form_text()
    assert all(name in text for name in MODELS)
    app.screenshot("manage-models-form")
    app.choose("Action", "Delete files")
    assert "can be deleted" in app.errors()[0]
    app.choose("Model", DEMO)
    app.choose("Action", "Verify files")
    app.execute()
    text = app.wait_output(f"All files of {DEMO} can be read")
    app.screenshot("manage-models-summary")
    assert all(weights.filename in text for weights in model_files(DEMO))
    app.done()
