"""Tables of models, files and sources, one row a dictionary: for the command line and for the App."""

from __future__ import annotations

from collections.abc import Iterable

from .catalog import MODELS, Weights, all_files, model_files
from .files import is_here
from .sources import SourceCheck

_HASH_DIGITS = 12  # shown; verifying shows all of them


def model_rows() -> list[dict[str, str]]:
    """Which models there are, and what of each is on this machine."""
    rows = []
    for name, model in MODELS.items():
        files = model_files(name)
        here = {weights: is_here(weights) for weights in files}
        rows.append(
            {
                "model": name,
                "MB": f"{sum(weights.megabytes for weights in files):,}",
                "speed": model.hint,
                "here": names(weights for weights in files if here[weights]),
                "missing": names(weights for weights in files if not here[weights]),
            }
        )
    return rows


def file_rows() -> list[dict[str, str]]:
    """Which files of weights there are, and by what each is known."""
    return [
        {
            "file": weights.filename,
            "MB": f"{weights.megabytes:,}",
            "here": "yes" if is_here(weights) else "",
            "hash": pin(weights),
        }
        for weights in all_files()
    ]


def source_row(check: SourceCheck) -> dict[str, str]:
    """What a host says."""
    return {
        "source is": check.verdict,
        "file": check.weights.filename,
        "result": check.result,
        "source": check.source,
    }


def pin(weights: Weights) -> str:
    """By what a file is known, in short."""
    for kind, digest in (("sha256", weights.sha256), ("git blob", weights.git_blob)):
        if digest is not None:
            return f"{kind} {digest[:_HASH_DIGITS]}..."
    return "none: it comes with the package" if weights.is_packaged else "recorded on first download"


def names(files: Iterable[Weights]) -> str:
    """The names of files, for a sentence."""
    return ", ".join(weights.filename for weights in files)
