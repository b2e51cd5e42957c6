"""The plugin as the App has it: registered by its fiftyone.yml; forms and runs as the App asks for them."""

from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "@mobilesamv2/fiftyone_mobilesamv2"


@dataclass
class ResolvedForm:
    """What the App gets of a form.

    Attributes:
        inputs: FiftyOne's properties by name.
        errors: what keeps it from being executed, in words.
        messages: notes, warnings and errors that are shown.
    """

    inputs: dict
    errors: list[str]
    messages: list[str]

    def default(self, name):
        return self.inputs[name].default

    def choices(self, name):
        return [choice.value for choice in self.inputs[name].view.choices]


class Plugin:
    """The operators, asked as the App asks."""

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
        """In the App. Returns the text of its last dialog, and all that the App is told to do by operator."""
        told = {}
        for operator, params_told in self.run_in_app(name, samples, params, **request):
            told[operator] = params_told
        return str(told["show_output"]["results"]["text"]), told

    def call(self, name, samples, **params):
        """From Python. Returns the summary."""
        import fiftyone.operators as foo

        return foo.get_operator(f"{PLUGIN}/{name}")(samples, **params).result

    def run_in_app(self, name, samples, params=None, **request):
        """Yields (operator, parameters) of what the App is told to do, while it runs."""
        ctx = self.context(name, samples, params, spaces={}, **request)
        for message in self.operators[name].execute(ctx):
            yield message.body.operator_uri.split("/")[-1], message.body.params


@pytest.fixture(scope="session")
def plugin(mongod):
    """The plugin in an otherwise empty folder of plugins."""
    import fiftyone as fo

    return Plugin(Path(fo.config.plugins_dir))


@pytest.fixture(scope="session")
def scene_files(tmp_path_factory):
    """Four scenes with known masks, as COCO data: the folder of images and the annotations."""
    from fiftyone_mobilesamv2.training.scenes import write_coco

    return write_coco(tmp_path_factory.mktemp("scenes"), 4)


@pytest.fixture
def scenes(mongod, scene_files):
    """A dataset of these, in `ground_truth`."""
    from fiftyone_mobilesamv2 import load_coco

    dataset = load_coco(*scene_files)
    yield dataset
    dataset.delete()
