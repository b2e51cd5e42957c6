"""Which weights are here; downloading, verifying and deleting them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fiftyone.operators import types

from .models import fetch_with_progress, megabytes_to_download
from .operator import Form, Operator, Outcome, Progress, count

if TYPE_CHECKING:
    from ..modeling.checkpoints import Weights

ACTIONS = {
    "download": "Download the files that are missing",
    "verify": "Verify the files: read every byte of them, and compare hashes",
    "delete": "Delete the files, but those that another model here needs",
}
_HASH_DIGITS = 12  # in the form; verifying shows all of them


class ManageModels(Operator):
    identifier = "manage_models"
    title = "Manage models"
    description = "Which weights are here: download them, verify them, delete them"
    icon = "models"
    risk = "high"

    def form(self, form: Form) -> None:
        from ..modeling.checkpoints import MODELS, model_files, weights_dir

        model = form.choice("model", {name: name for name in MODELS}, next(iter(MODELS)), "Model")
        if model in MODELS:
            missing = megabytes_to_download(model)
            action = form.choice("action", ACTIONS, "download" if missing else "verify", "Action", radio=True)
            if action == "download":
                self._download_form(form, model, missing)
            elif action == "verify" and not any(map(_is_here, model_files(model))):
                form.problem(f"No file of {model} is here: there is nothing to verify.")
            elif action == "delete":
                self._delete_form(form, model)
        for name, table in (("models", _models_table()), ("files", _files_table())):
            form.inputs.view(name, types.MarkdownView(), default=table)
        form.note(f"Downloaded weights are in {weights_dir()}.")

    def _download_form(self, form: Form, model: str, missing: int) -> None:
        if missing:
            form.note(f"{missing:,} MB will be downloaded, and verified.")
        else:
            form.problem(f"All files of {model} are here: there is nothing to download.")

    def _delete_form(self, form: Form, model: str) -> None:
        from ..modeling.checkpoints import deletable_files, model_files

        files = deletable_files(model)
        for weights in model_files(model):
            if _is_here(weights) and weights not in files:
                why = "another model here needs it" if weights.sources else "it comes with the package"
                form.note(f"{weights.filename} stays: {why}.")
        if not files:
            form.problem(f"No file of {model} can be deleted.")
            return
        size = sum(weights.megabytes for weights in files)
        if not form.switch("confirm", False, f"Delete {_names(files)}", f"About {size:,} MB"):
            form.problem(f"Confirm that {_names(files)} shall be deleted.")

    def run(self, form: Form, progress: Progress) -> Outcome:
        work = {"download": _download, "verify": _verify, "delete": _delete}
        return work[form.values["action"]](form.values["model"], progress)


def _download(model: str, progress: Progress) -> Outcome:
    from ..modeling.checkpoints import local_path, model_files

    fetch_with_progress(model, progress)
    files = {weights.filename: str(local_path(weights)) for weights in model_files(model)}
    paths = "\n".join(f"- `{path}`" for path in files.values())
    return Outcome(f"**{model} is here**\n\n{paths}", {"model": model, "files": files})


def _verify(model: str, progress: Progress) -> Outcome:
    from ..modeling.checkpoints import CheckpointError, model_files, verified_sha256

    files = {weights: {"sha256": None, "problem": None} for weights in model_files(model)}
    for number, (weights, found) in enumerate(files.items()):
        progress.tell(number / len(files), f"Reading {weights.filename}, {weights.megabytes:,} MB")
        if not _is_here(weights):
            found["problem"] = "is not here"
            continue
        try:
            found["sha256"] = verified_sha256(weights)
        except CheckpointError as error:
            found["problem"] = str(error)
    rows = [
        {"file": f"`{w.filename}`", "sha256": f"`{found['sha256']}`", "hash": _pin(w)}
        for w, found in files.items()
        if found["sha256"]
    ]
    wrong = {weights.filename: found["problem"] for weights, found in files.items() if found["problem"]}
    pinned = all(weights.sha256 or weights.git_blob for weights in files)  # else there is nothing to compare with
    bad, good = (
        f"**{count(len(wrong), 'file')} wrong or missing**",
        f"**All files of {model} {'are right' if pinned else 'can be read'}**",
    )
    lines = [bad if wrong else good]
    if rows:
        lines.append(_markdown(rows))
    lines += [f"**`{name}`**: {problem}" for name, problem in wrong.items()]
    result = {"model": model, "files": {weights.filename: found for weights, found in files.items()}}
    return Outcome("\n\n".join(lines), result)


def _delete(model: str, progress: Progress) -> Outcome:
    from ..modeling.checkpoints import delete_model

    deleted = delete_model(model)
    size = sum(weights.megabytes for weights in deleted)
    text = f"**Deleted:** {_names(deleted)}, about {size:,} MB."
    return Outcome(text, {"model": model, "deleted": [weights.filename for weights in deleted]})


def _models_table() -> str:
    from ..modeling.checkpoints import MODELS, model_files

    rows = []
    for name in MODELS:
        files = model_files(name)
        rows.append(
            {
                "model": f"`{name}`",
                "MB": f"{sum(weights.megabytes for weights in files):,}",
                "here": _names(weights for weights in files if _is_here(weights)),
                "missing": _names(weights for weights in files if not _is_here(weights)),
            }
        )
    return _markdown(rows)


def _files_table() -> str:
    from ..modeling.checkpoints import MODELS, model_files

    files = dict.fromkeys(weights for name in MODELS for weights in model_files(name))
    rows = [
        {"file": f"`{w.filename}`", "MB": f"{w.megabytes:,}", "here": "yes" if _is_here(w) else "", "hash": _pin(w)}
        for w in files
    ]
    return _markdown(rows)


def _pin(weights: Weights) -> str:
    """By what the file is known, in short."""
    for kind, digest in (("sha256", weights.sha256), ("git blob", weights.git_blob)):
        if digest is not None:
            return f"{kind} {digest[:_HASH_DIGITS]}{'...' if len(digest) > _HASH_DIGITS else ''}"
    return "that of its first use: none is published" if weights.sources else "none: it comes with the package"


def _is_here(weights: Weights) -> bool:
    from ..modeling.checkpoints import local_path

    return local_path(weights).is_file()


def _names(files: Iterable[Weights]) -> str:
    return ", ".join(weights.filename for weights in files)


def _markdown(rows: list[dict[str, str]]) -> str:
    import pandas as pd

    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
