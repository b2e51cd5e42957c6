"""The plugin as the App uses it: registered through fiftyone.yml, with forms and runs requested as the App does."""

from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "@mobilesamv2/fiftyone_mobilesamv2"


@dataclass
class ResolvedForm:
    """A form as the App receives it.

    Attributes:
        inputs: name -> FiftyOne property.
        errors: the messages that prevent execution.
        messages: the notices, warnings and errors that are shown.
    """

    inputs: dict
    errors: list[str]
    messages: list[str]

    def default(self, name):
        return self.inputs[name].default

    def choices(self, name):
        return [choice.value for choice in self.inputs[name].view.choices]


class Plugin:
    """The plugin's operators, called as the App calls them."""

    def __init__(self, folder):
        import fiftyone.plugins.context as fopc

        (folder / "fiftyone_mobilesamv2").symlink_to(ROOT, target_is_directory=True)
        contexts = [c for c in fopc.build_plugin_contexts() if c.name == PLUGIN]
        assert len(contexts) == 1 and contexts[0].errors == []
        self.operators = {each.name: each for each in contexts[0].instances}

    def context(self, name, samples, params=None, selected=(), selected_labels=(), **request):
        import fiftyone as fo
        from fiftyone.operators.executor import ExecutionContext, Executor

        uri = f"{PLUGIN}/{name}"
        request |= {"params": params or {}, "selected": list(selected), "selected_labels": list(selected_labels)}
        if samples is not None:
            view = samples if isinstance(samples, fo.DatasetView) else samples.view()
            request |= {"dataset_name": samples._root_dataset.name, "view": view._serialize()}
        return ExecutionContext(request, executor=Executor(), operator_uri=uri)

    def form(self, name, samples, params=None, **request):
        from fiftyone.operators.executor import ValidationContext

        operator = self.operators[name]
        ctx = self.context(name, samples, params, **request)
        resolved = operator.resolve_input(ctx)
        resolved.to_json()
        inputs = resolved.type.properties
        errors = [error.reason for error in ValidationContext(ctx, resolved, operator).errors]
        shown = [p.view.label for p in inputs.values() if type(p.view).__name__ in ("Notice", "Warning", "Error")]
        return ResolvedForm(inputs, errors, shown)

    def run_to_the_end(self, name, samples, params=None, **request):
        """Runs in the App. Returns the text of the last dialog, and {operator: parameters} triggered in the App."""
        calls = {}
        for operator, call_params in self.run_in_app(name, samples, params, **request):
            calls[operator] = call_params
        return str(calls["show_output"]["results"]["text"]), calls

    def call(self, name, samples, /, **params):
        """Runs from Python. Returns the summary."""
        import fiftyone.operators as foo

        return foo.get_operator(f"{PLUGIN}/{name}")(samples, **params).result

    def run_in_app(self, name, samples, params=None, **request):
        """Runs in the App. Yields the (operator, parameters) that it triggers there."""
        ctx = self.context(name, samples, params, spaces={}, **request)
        for message in self.operators[name].execute(ctx):
            yield message.body.operator_uri.split("/")[-1], message.body.params


@pytest.fixture(scope="session")
def plugin(mongod):
    """The plugin, alone in the plugins folder."""
    import fiftyone as fo

    return Plugin(Path(fo.config.plugins_dir))


@pytest.fixture(scope="session")
def scene_files(tmp_path_factory):
    """Four scenes with known masks in COCO format: the image folder and the annotation file."""
    from fiftyone_mobilesamv2.training.scenes import write_coco

    return write_coco(tmp_path_factory.mktemp("scenes"), 4)


@pytest.fixture
def scenes(mongod, scene_files):
    """A dataset of these scenes with their objects in `ground_truth`."""
    from fiftyone_mobilesamv2 import load_coco

    dataset = load_coco(*scene_files)
    yield dataset
    dataset.delete()
