"""Tables of models, files and sources for the command line and the App; each row is a dictionary."""

from __future__ import annotations

from collections.abc import Iterable

from .catalog import Weights
from .files import is_local
from .lookup import all_files, models
from .sources import SourceCheck

_HASH_DIGITS = 12  # shown here; verifying shows the whole hash


def model_rows() -> list[dict[str, str]]:
    """All models, and which of their files are on this machine."""
    rows = []
    for name, model in models().items():
        files = dict.fromkeys(model.weights.values())
        is_available = {weights: is_local(weights) for weights in files}
        rows.append(
            {
                "model": name,
                "MB": f"{sum(weights.megabytes for weights in files):,}",
                "speed": model.hint,
                "available": names(weights for weights in files if is_available[weights]),
                "missing": names(weights for weights in files if not is_available[weights]),
            }
        )
    return rows


def file_rows() -> list[dict[str, str]]:
    """All weights files, and the hash that pins each."""
    return [
        {
            "file": weights.filename if weights.folder is None else f"{weights.folder.name}/{weights.filename}",
            "MB": f"{weights.megabytes:,}",
            "available": "yes" if is_local(weights) else "",
            "hash": pin(weights),
        }
        for weights in all_files()
    ]


def source_row(check: SourceCheck) -> dict[str, str]:
    """The result of checking one source."""
    return {
        "source is": check.verdict,
        "file": check.weights.filename,
        "result": check.result,
        "source": check.source,
    }


def pin(weights: Weights) -> str:
    """The hash that pins a file, abbreviated."""
    for kind, digest in (("sha256", weights.sha256), ("git blob", weights.git_blob)):
        if digest is not None:
            return f"{kind} {digest[:_HASH_DIGITS]}..."
    return "none: part of the package" if weights.is_packaged else "recorded on first download"


def names(files: Iterable[Weights]) -> str:
    """File names, comma-separated."""
    return ", ".join(weights.filename for weights in files)
