"""List, download, verify and delete model weights, and check their sources."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fiftyone.operators import types

from .app_work import Outcome, Progress
from .choices import fetch_with_progress
from .form import Form, code, count
from .operator import Operator

if TYPE_CHECKING:
    from ..modeling.checkpoints import Weights
    from ..modeling.checkpoints.trained import TrainedModel

ACTIONS = {
    "download": "Download missing files",
    "verify": "Verify files: read every byte and compare hashes",
    "delete": "Delete files that no other downloaded model needs",
    "check_sources": "Check sources: ask each host whether it has the file, without downloading",
}


class ManageModels(Operator):
    identifier = "manage_models"
    title = "Manage models"
    description = "List, download, verify and delete model weights"
    icon = "models"
    risk = "high"

    def form(self, form: Form) -> None:
        from ..modeling.checkpoints.files import weights_dir
        from ..modeling.checkpoints.lookup import models
        from ..modeling.checkpoints.overview import file_rows, model_rows

        entries = models()
        model = form.choice("model", {name: name for name in entries}, next(iter(entries)), "Model")
        if model in entries:
            self._action_form(form, model)
        for name, rows in (("models", model_rows()), ("files", file_rows())):
            form.inputs.view(name, types.MarkdownView(), default=_markdown(rows))
        form.note(f"Downloaded weights are in {weights_dir()}.")

    def _action_form(self, form: Form, model: str) -> None:
        from ..modeling.checkpoints import model_files
        from ..modeling.checkpoints.files import is_local, megabytes_to_download
        from ..modeling.checkpoints.lookup import find_trained

        missing = megabytes_to_download(model)
        trained = find_trained(model)
        actions = ACTIONS | ({"delete": "Delete this trained model"} if trained else {})
        action = form.choice("action", actions, "download" if missing else "verify", "Action", radio=True)
        if action == "download":
            if missing:
                form.note(f"{missing:,} MB will be downloaded and verified.")
            else:
                form.problem(f"All files of {model} are already downloaded.")
        elif action == "verify" and not any(map(is_local, model_files(model))):
            form.problem(f"No file of {model} is downloaded: there is nothing to verify.")
        elif action == "delete" and trained:
            self._delete_trained_form(form, trained)
        elif action == "delete":
            self._delete_form(form, model)
        elif action == "check_sources" and not any(weights.sources for weights in model_files(model)):
            form.problem(
                f"{model} {'has no files to download' if trained else 'comes with the package'} and has no sources."
            )

    def _delete_form(self, form: Form, model: str) -> None:
        from ..modeling.checkpoints.files import deletable_files, is_local, kept_files
        from ..modeling.checkpoints.overview import names

        files = deletable_files(model)
        for weights, why in kept_files(model).items():
            if is_local(weights):
                form.note(f"{weights.filename} stays: {why}.")
        if not files:
            form.problem(f"No file of {model} can be deleted.")
            return
        size = sum(weights.megabytes for weights in files)
        if not form.switch("confirm", False, f"Delete {names(files)}", f"About {size:,} MB"):
            form.problem(f"Confirm that {names(files)} should be deleted.")

    def _delete_trained_form(self, form: Form, trained: TrainedModel) -> None:
        folder = trained.folder.resolve()
        form.warn("A trained model can't be downloaded again.")
        if not form.switch("confirm", False, f"Delete {trained.name} with its folder, {folder}"):
            form.problem(f"Confirm that {trained.name} should be deleted with its folder, {folder}.")

    def run(self, form: Form, progress: Progress) -> Outcome:
        work = {"download": _download, "verify": _verify, "delete": _delete, "check_sources": _check_sources}
        return work[form.values["action"]](form.values["model"], progress)


def _download(model: str, progress: Progress) -> Outcome:
    from ..modeling.checkpoints import model_files
    from ..modeling.checkpoints.files import local_path

    fetch_with_progress(model, progress)
    files = {weights.filename: str(local_path(weights)) for weights in model_files(model)}
    paths = "\n".join(f"- {code(path)}" for path in files.values())
    return Outcome(f"**{model} is downloaded**\n\n{paths}", {"model": model, "files": files})


def _verify(model: str, progress: Progress) -> Outcome:
    from ..modeling.checkpoints import model_files
    from ..modeling.checkpoints.files import verify_model
    from ..modeling.checkpoints.overview import pin

    total = len(model_files(model))

    def report(number: int, weights: Weights) -> None:
        progress.tell(number / total, f"Reading {weights.filename}, {weights.megabytes:,} MB")

    results = verify_model(model, report)
    rows = [
        {"file": code(weights.filename), "sha256": code(verified.sha256), "hash": pin(weights)}
        for weights, verified in results.items()
        if verified.sha256
    ]
    wrong = {weights.filename: verified.problem for weights, verified in results.items() if verified.problem}
    # Without a published hash, there is nothing to compare with.
    pinned = all(weights.sha256 or weights.git_blob for weights in results)
    bad, good = (
        f"**{count(len(wrong), 'file')} wrong or missing**",
        f"**All files of {model} {'are correct' if pinned else 'can be read'}**",
    )
    lines = [bad if wrong else good]
    if rows:
        lines.append(_markdown(rows))
    lines += [f"**{code(name)}**: {problem}" for name, problem in wrong.items()]
    files = {weights.filename: vars(verified) for weights, verified in results.items()}
    return Outcome("\n\n".join(lines), {"model": model, "files": files})


def _delete(model: str, progress: Progress) -> Outcome:
    from ..fiftyone_internals import forget_zoo_models
    from ..modeling.checkpoints.files import delete_model
    from ..modeling.checkpoints.lookup import find_trained
    from ..modeling.checkpoints.overview import names
    from ..modeling.checkpoints.trained import delete_trained

    if trained := find_trained(model):
        removed = delete_trained(trained)
        forget_zoo_models()
        text = f"**Deleted:** {code(model)}, which was in {code(removed.folder)}."
        if removed.kept:
            text += f"\n\nThe folder stays, with files that are not the model's: {', '.join(map(code, removed.kept))}."
        return Outcome(text, {"model": model, "deleted": removed.deleted, "kept": removed.kept})
    deleted = delete_model(model)
    size = sum(weights.megabytes for weights in deleted)
    text = f"**Deleted:** {names(deleted)}, about {size:,} MB."
    return Outcome(text, {"model": model, "deleted": [weights.filename for weights in deleted]})


def _check_sources(model: str, progress: Progress) -> Outcome:
    from ..modeling.checkpoints import model_files
    from ..modeling.checkpoints.overview import source_row
    from ..modeling.checkpoints.sources import check_sources

    files = model_files(model)
    total = sum(len(weights.sources) for weights in files)
    checks = []
    for check in check_sources(files):
        checks.append(check)
        progress.tell(len(checks) / total, f"Checked {len(checks)} of {count(total, 'source')}")
    wrong = sum(check.verdict != "right" for check in checks)
    verdict = f"**{count(wrong, 'source')} wrong or unreachable**" if wrong else "**All sources are correct**"
    rows = list(map(source_row, checks))
    return Outcome(f"{verdict}\n\n{_markdown(rows)}", {"model": model, "sources": rows})


def _markdown(rows: list[dict[str, str]]) -> str:
    import pandas as pd

    table = pd.DataFrame(rows)
    for column in {"model", "file", "source"} & set(table):
        table[column] = "`" + table[column].str.strip("`") + "`"
    if "speed" in table:  # may contain the name of a dataset
        table["speed"] = table["speed"].str.replace(r"([\\`*_|<>\[\]])", r"\\\1", regex=True)
    markdown: str = table.to_markdown(index=False, disable_numparse=True)
    return markdown
