"""Names in a dataset are shown as they are: none becomes a link or an image, and no request leaves the page."""

import re
import uuid
from urllib.parse import quote, urlsplit

import fiftyone as fo
import fiftyone.core.odm as foo
import pytest
from playwright.sync_api import expect

from fiftyone_mobilesamv2 import evaluate_proposals
from fiftyone_mobilesamv2.operators import OPERATORS

# Ends a code span, then has an image, a link and HTML. Without a dot, which would be a field inside another one.
HOSTILE = "`![p](http://localhost:9/leak)[p](http://localhost:9/leak)<img src=http://localhost:9/leak>|<b>`"
FIELD, CLASS, TAG, KEY = (f"{kind}{HOSTILE}" for kind in ("f", "c", "t", "e"))
RUNS = {  # what each operator's form needs, by the labels of its inputs
    "Measure proposals (AR@K)": {"Proposals": FIELD},
    "Find unlabeled objects": {"Proposals": FIELD},
    "Find duplicates and parts": {"Labels": FIELD},
    "Measure image coverage": {"Labels": FIELD},
    "Export masks as COCO": {"Masks": FIELD},
}


@pytest.fixture
def hostile(scenes, tmp_path):
    """The scenes with such names. The last image can't be read, so that summaries name its file."""
    # Without a slash, with which the App's addresses don't work.
    name = f"d`![p](leak)[p](leak)<img src=leak>{uuid.uuid4().hex[:4]}"
    dataset = scenes.clone(name, persistent=True)
    folder = tmp_path / "`![p](leak)[p](leak)<img src=leak>`"
    folder.mkdir()
    (folder / "<img src=leak>`![p](leak).png").write_bytes(b"damaged")
    box = fo.Detection(label=CLASS, bounding_box=[0.1, 0.1, 0.2, 0.2], confidence=0.5, tags=[TAG])
    broken = fo.Sample(str(next(folder.iterdir())), tags=[TAG])
    broken["proposals"] = broken["ground_truth"] = fo.Detections(detections=[box])
    dataset.add_sample(broken)
    dataset.rename_sample_field("proposals", FIELD)
    for sample in dataset.limit(2):
        sample.tags = [TAG]
        for label in sample.ground_truth.detections:
            label.label, label.tags = CLASS, [TAG]
        sample.save()
    evaluate_proposals(dataset, FIELD, eval_key="ar", progress=False)
    datasets = foo.get_db_conn().datasets  # FiftyOne refuses such a key, but loads one that is there
    datasets.update_one({"name": dataset.name}, {"$rename": {"evaluations.ar": f"evaluations.{KEY}"}})
    run = datasets.find_one({"name": dataset.name})["evaluations"][KEY]
    foo.get_db_conn().runs.update_one({"_id": run}, {"$set": {"key": KEY}})
    yield dataset
    dataset.delete()


@pytest.fixture
def leaks(app):
    """The addresses of requests that names have caused."""
    found = []

    def note(request):
        if urlsplit(request.url).path.endswith("/leak"):
            found.append(request.url)

    app.page.on("request", note)
    return found


LEAKING = """() => [...document.querySelectorAll("a, img, image, iframe, video, use")].filter(element =>
    [...element.attributes].some(({value}) => value.endsWith("leak"))
).map(element => element.outerHTML)"""


def check_page(app, leaks):
    assert app.page.evaluate(LEAKING) == []
    assert leaks == []


@pytest.mark.slow
def test_names_become_neither_links_nor_images(app, hostile, leaks, tmp_path):
    app.page.goto(f"{app.server.url}/datasets/{quote(hostile.name, safe='')}")
    app.wait_grid()
    app.close_panels()
    for operator in OPERATORS:
        if operator.identifier == "cancel":
            continue
        app.operator(operator.title)
        for label, value in RUNS.get(operator.title, {}).items():
            app.choose(label, value)
        if operator.title == "Measure proposals (AR@K)":
            app.fill("Evaluation key", "other")
        if operator.title == "Export masks as COCO":
            app.fill("File", tmp_path / "masks.json")
        check_page(app, leaks)
        if operator.title not in RUNS:
            app.cancel()
            continue
        assert app.errors() == []
        app.execute()
        text = app.wait_output(re.compile(r"skipped|measured|masks of|AR@"), timeout=120_000)
        assert FIELD.replace("`", "'") in text or operator.title == "Export masks as COCO", text
        app.screenshot(f"hostile-{operator.identifier}")
        check_page(app, leaks)
        app.done()
        app.page.goto(f"{app.server.url}/datasets/{quote(hostile.name, safe='')}")
        app.wait_grid()
    hostile.reload()
    hostile.delete_evaluation("other")  # the panel shows the latest
    app.close_panels()  # measuring has opened it
    panel = app.open_panel("segevery")
    panel.locator(".js-plotly-plot").first.wait_for(timeout=90_000)
    expect(panel.locator("table")).to_contain_text(KEY.replace("`", "'"))
    check_page(app, leaks)
    app.screenshot("hostile-panel")

    app.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=http://localhost:9/leak>')")
    app.page.wait_for_timeout(500)
    assert len(leaks) == len(app.page.evaluate(LEAKING)) == 1  # what the checks above look for
    app.problems.clear()  # the refused request, and queries of the App itself that fail for such names
