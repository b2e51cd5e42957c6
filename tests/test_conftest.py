import fiftyone as fo
import pytest
from fiftyone.core.odm import get_db_client


def test_fiftyone_uses_the_database_of_the_fixture(mongod, dataset):
    host, port = get_db_client().address
    assert f"{host}:{port}" in mongod
    assert dataset.name in fo.list_datasets()
    assert not dataset.persistent


@pytest.fixture
def skipping(pytester, request):
    """Runs a skipped test in another folder, under this folder's rules for skips."""
    pytester.makeconftest(
        f"""
        import importlib.util
        spec = importlib.util.spec_from_file_location("rules", {str(request.path.with_name("conftest.py"))!r})
        rules = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(rules)
        pytest_sessionfinish = rules.pytest_sessionfinish
        """
    )

    def run(reason):
        pytester.makepyfile(f"import pytest\n@pytest.mark.skip(reason={reason!r})\ndef test(): pass")
        return pytester.runpytest_subprocess()

    return run


def test_skip_that_the_readme_names_passes(skipping):
    result = skipping("needs the folder ../shared/photos beside the repository")
    assert result.ret == 0
    result.stdout.fnmatch_lines("1 skipped: needs the folder ../shared/photos beside the repository")


def test_skip_that_the_readme_does_not_name_fails(skipping):
    result = skipping("needs more time")
    assert result.ret == 1
    result.stdout.fnmatch_lines("The README does not say that this is skipped: needs more time")
