"""Trees of dicts and lists with one value that is wrong, and lists of such cases."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

Case = TypeVar("Case")

NUMBERS = [0, 1, -1, 2, 0.5, 1.0, -0.0, 3.7, 7, 70, 1e3, 2e8, -2e8, 1e10, 1e308, -1e308, 2**31, 2**53, -(2**63)]
VALUES = [
    *(None, True, False, float("nan"), float("inf"), float("-inf"), *NUMBERS),
    *("", "0", "1", "0.5", "false", "text", "two\nlines", "unlabeled", "\0", "\u00e9\U0001f600", "long" * 5000),
    *([], [0], [None], ["text"], [[]], [[0.1, 0.1]], [float("nan")], [1] * 3000, [[[[]]]], {}, {"a": 1}, {"_id": None}),
]


@st.composite
def mutated(draw: st.DrawFn, tree: dict[str, Any], values: Sequence[object]) -> tuple[dict[str, Any], list[str | int]]:
    """A copy of a tree in which one value is replaced, removed, repeated or changed, and the path of that value."""
    tree = copy.deepcopy(tree)
    parent: Any = tree
    path = [draw(_key(parent))]
    while isinstance(parent[path[-1]], (dict, list)) and parent[path[-1]] and draw(st.integers(0, 5)):
        parent = parent[path[-1]]
        path.append(draw(_key(parent)))
    key, value = path[-1], parent[path[-1]]
    kind = draw(st.sampled_from(["replace"] * 7 + ["remove", "repeat", "change"]))
    if kind == "remove":
        del parent[key]
    elif kind == "repeat" and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(value))
    elif kind == "repeat":
        parent[key] = copy.deepcopy(parent[draw(st.sampled_from(sorted(parent)))])
    elif kind == "change" and isinstance(value, (int, float)):
        parent[key] = draw(st.sampled_from([-value, value + 1, value * 1000, value / 3, float(value), str(value)]))
    elif kind == "change" and isinstance(value, (str, bytes)) and value:
        position = draw(st.integers(0, len(value) - 1))
        middle = draw(st.sampled_from("0P\x7f~ \n")) if draw(st.booleans()) else ""
        middle = middle.encode() if isinstance(value, bytes) else middle
        parent[key] = value[:position] + middle + value[position + 1 :]
    else:
        parent[key] = copy.deepcopy(draw(st.sampled_from(values)))
    return tree, path


def _key(parent: Any) -> st.SearchStrategy[Any]:
    """A key of a dict, or an index of a list; those of dicts and lists inside are more likely."""
    keys = sorted(parent) if isinstance(parent, dict) else range(len(parent))
    return st.sampled_from([key for key in keys for _ in range(3 if isinstance(parent[key], (dict, list)) else 1)])


def cases_of(strategy: st.SearchStrategy[Case], count: int) -> list[Case]:
    """As many cases; the same ones every time."""
    cases: list[Case] = []

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(case: Case) -> None:
        cases.append(case)

    collect()
    return cases[:count]
