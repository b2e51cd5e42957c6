"""With any JSON value for any input, the form is still shown and names the problem."""

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fiftyone_mobilesamv2.operators import OPERATORS
from fiftyone_mobilesamv2.runs.claims import on_record
from fiftyone_mobilesamv2.runs.record import SegmentationRun

FORMS = [operator.identifier for operator in OPERATORS if operator.identifier != "cancel"]
STATES = [  # parameters that make other inputs appear
    {},
    {"prompting": "grid", "label_field": "segmentations", "existing": "replace"},
    {"look_for": "labels", "place": "new", "prompts": "field", "verdict": "dismiss"},
    {"action": "delete", "model": "mobilesamv2-tinyvit-torch"},
    {"part": "masks", "advanced": True, "validation": "tag"},
]

plain = st.none() | st.booleans() | st.integers() | st.floats() | st.floats(0, 1) | st.text()
plain |= st.sampled_from(
    [10**400, -(10**4200), 2**63, 1e308, "9" * 5000, "a\0b", "a\nb", "\ud800", "ground_truth", "_x"]
)
values = plain | st.lists(plain, max_size=2) | st.dictionaries(st.text(), plain, max_size=2)


def is_number(value, whole):
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or (math.isfinite(value) and not (whole and value % 1))


FITS = {  # FiftyOne's input type -> whether a value fits
    "String": lambda value, kind: isinstance(value, str),
    "Number": lambda value, kind: is_number(value, kind.int),
    "Boolean": lambda value, kind: isinstance(value, bool),
    "Enum": lambda value, kind: isinstance(value, str) and value in kind.values,
}


@pytest.fixture
def requests(scenes):
    """(samples, request arguments): scenes with ground truth and proposals, with no label or one label selected."""
    scenes.clone_sample_field("ground_truth", "segmentations")
    scenes.tag_samples("held out")
    with on_record(scenes, SegmentationRun("segmentations", {}, images=1)):
        pass
    first = scenes.first()
    label = {"label_id": first.segmentations.detections[0].id, "sample_id": first.id, "field": "segmentations"}
    return [(scenes, {}), (scenes, {"selected_labels": [label]})]


@pytest.mark.parametrize("name", FORMS)
@given(data=st.data())
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_form_survives_any_value(plugin, requests, name, data):
    samples, request = data.draw(st.sampled_from(requests)) if name != "promote_to_labels" else requests[1]
    state = data.draw(st.sampled_from(STATES))
    inputs = plugin.form(name, samples, state, **request).inputs
    # The target is FiftyOne's own input.
    names = [key for key, each in inputs.items() if type(each.type).__name__ in FITS and key != "view_target"]
    given_values = data.draw(st.dictionaries(st.sampled_from(names), values, min_size=1, max_size=3))
    form = plugin.form(name, samples, state | given_values, **request)
    for error in form.errors:
        assert isinstance(error, str) and 10 < len(error) < 6000
    wrong = [
        key
        for key, value in given_values.items()
        if key in form.inputs
        and value not in (None, "")
        and not FITS[type(inputs[key].type).__name__](value, inputs[key].type)
    ]
    assert form.errors or not wrong, (wrong, given_values)
