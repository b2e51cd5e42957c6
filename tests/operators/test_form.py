"""Texts of forms and summaries."""

from hypothesis import given
from hypothesis import strategies as st

from fiftyone_mobilesamv2.operators.form import cell, code


@given(st.text())
def test_code_quotes_any_text(text):
    quoted = code(text)
    assert quoted[0] == quoted[-1] == "`" and "`" not in quoted[1:-1]
    assert "\n" not in quoted and quoted.isprintable() and len(quoted) == len(text) + 2


def test_code_quotes_markdown_of_a_field_name():
    assert code("x`![p](http://host/p.png)`") == "`x'![p](http://host/p.png)'`"


def test_cell_does_not_end_at_a_pipe_of_a_name():
    assert cell("a|b`") == "`a\\|b'`"
