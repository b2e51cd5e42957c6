"""Texts of forms and summaries."""

from hypothesis import given
from hypothesis import strategies as st

from fiftyone_mobilesamv2.operators.form import cell, code, without_links


@given(st.text())
def test_code_quotes_any_text(text):
    quoted = code(text)
    assert quoted[0] == quoted[-1] == "`" and "`" not in quoted[1:-1]
    assert "\n" not in quoted and quoted.isprintable() and len(quoted) == len(text) + 2


def test_code_quotes_markdown_of_a_field_name():
    assert code("x`![p](http://host/p.png)`") == "`x'![p](http://host/p.png)'`"


def test_cell_does_not_end_at_a_pipe_of_a_name():
    assert cell("a|b`") == "`a\\|b'`"


def test_names_in_notices_become_neither_links_nor_images():
    """The App renders notices and errors as Markdown."""
    assert without_links("No run in x![p](http://a/leak)[q](b).") == "No run in x![p]\\(http://a/leak)[q]\\(b)."
    assert without_links("bounding_box=[0, 1]: [x, y] was expected") == "bounding_box=[0, 1]: [x, y] was expected"
