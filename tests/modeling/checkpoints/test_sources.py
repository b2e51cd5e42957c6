"""Sources are checked without downloading, against a server that imitates the hub and plain hosts."""

import hashlib

import pytest

from fiftyone_mobilesamv2 import cli
from fiftyone_mobilesamv2.modeling.checkpoints import lookup
from fiftyone_mobilesamv2.modeling.checkpoints.catalog import MODELS, HubFile, PretrainedModel, Weights
from fiftyone_mobilesamv2.modeling.checkpoints.sources import check_sources

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
BLOB = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()
ON_HUB = "/owner/repo/resolve/main/w.pt"

pytestmark = pytest.mark.usefixtures("folder")


def check(*sources, **known) -> list[tuple[str, str]]:
    """Returns (verdict, result) for each source of a file."""
    return [(checked.verdict, checked.result) for checked in check_sources([Weights("w.pt", sources, 1, **known)])]


def requests(server) -> list[tuple[str, str]]:
    """(method, path) of each request, except those that huggingface_hub makes for its own purposes."""
    return [(method, path) for method, path, _ in server.requests if not path.startswith("/api/")]


# Plain hosts ---------------------------------------------------------------------------------------------------------


def test_plain_host(server):
    server.files |= {"/w.pt": CONTENT, "/other.pt": CONTENT + b"!"}
    sources = f"{server.url}/w.pt", f"{server.url}/other.pt", f"{server.url}/gone.pt", "http://127.0.0.1:9/w.pt"
    assert check(*sources, size=7000, sha256=SHA256) == [
        ("right", "size matches, content not checked"),
        ("wrong", "differs: 7,001 bytes instead of 7,000"),
        ("wrong", "HTTP status 404 (Not Found)"),
        ("unknown", "Connection refused"),
    ]
    assert {method for method, _ in requests(server)} == {"HEAD"}


def test_plain_host_with_a_file_of_unknown_size(server):
    server.files["/w.pt"] = CONTENT
    assert check(f"{server.url}/w.pt", git_blob=BLOB) == [("right", "exists (7,000 bytes), content not checked")]


def test_redirect_of_a_plain_host_is_followed(server):
    server.files["/new/w.pt"], server.redirects["/w.pt"] = CONTENT, f"{server.cdn}/new/w.pt"
    assert check(f"{server.url}/w.pt", size=7000) == [("right", "size matches, content not checked")]


@pytest.mark.parametrize("status", [403, 405, 501])
@pytest.mark.parametrize("ranges", [True, False])
def test_plain_host_that_refuses_head(server, status, ranges):
    """The size comes from a one-byte range request, or from the headers of a response whose body is not read."""
    server.files["/w.pt"], server.no_head, server.ranges = CONTENT, status, ranges
    assert check(f"{server.url}/w.pt", size=7000) == [("right", "size matches, content not checked")]
    assert check(f"{server.url}/w.pt", size=7001) == [("wrong", "differs: 7,000 bytes instead of 7,001")]
    assert server.requests[1] == ("GET", "/w.pt", "bytes=0-0")


def test_untrusted_host_is_not_contacted(stranger):
    ((verdict, result),) = check(f"{stranger.url}/w.pt")
    assert verdict == "unknown" and "is not a trusted host" in result and stranger.requests == []


# The hub -------------------------------------------------------------------------------------------------------------


def test_hub(hub):
    hub.files["/cdn"], hub.linked[ON_HUB] = CONTENT, "/cdn"
    source = HubFile("owner/repo", "w.pt")
    assert check(source, size=7000, sha256=SHA256) == [("right", "sha256 matches, 7,000 bytes")]
    assert check(source, sha256=SHA256) == [("right", "sha256 matches, 7,000 bytes")]
    assert check(source, sha256="0" * 64) == [("wrong", f"differs: its sha256 is {SHA256}")]
    assert check(source, size=7001) == [("wrong", "differs: 7,000 bytes instead of 7,001")]
    assert check(source, git_blob=BLOB) == [("right", "exists (7,000 bytes), content not checked")]
    assert set(requests(hub)) == {("HEAD", ON_HUB)}  # no request to the CDN


def test_small_file_on_the_hub(hub):
    """Its ETag is its git blob ID."""
    hub.files[ON_HUB] = CONTENT
    source = HubFile("owner/repo", "w.pt")
    assert check(source, git_blob=BLOB) == [("right", "git blob matches, 7,000 bytes")]
    assert check(source, git_blob="0" * 40) == [("wrong", f"differs: its git blob is {BLOB}")]
    assert check(source, sha256=SHA256) == [("right", "exists (7,000 bytes), content not checked")]


@pytest.mark.parametrize("status, verdict", [(404, "wrong"), (401, "wrong"), (410, "wrong"), (418, "unknown")])
def test_error_status_of_the_hub_decides_the_verdict(hub, status, verdict):
    hub.statuses[ON_HUB] = [(status, {})]
    ((checked_verdict, result),) = check(HubFile("owner/repo", "w.pt"), sha256=SHA256)
    assert checked_verdict == verdict and result.startswith(f"HTTP status {status} (")


def test_hub_at_a_revision(hub):
    hub.files["/cdn"], hub.linked[f"/owner/repo/resolve/{'b' * 40}/w.pt"] = CONTENT, "/cdn"
    assert check(HubFile("owner/repo", "w.pt", "b" * 40), sha256=SHA256) == [("right", "sha256 matches, 7,000 bytes")]


def test_rate_limit_is_waited_out(hub, waits):
    hub.files["/cdn"], hub.linked[ON_HUB] = CONTENT, "/cdn"
    hub.statuses[ON_HUB] = [(429, {"Retry-After": 3})]
    assert check(HubFile("owner/repo", "w.pt"), sha256=SHA256) == [("right", "sha256 matches, 7,000 bytes")]
    assert waits == [3]


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def only_model(hub, monkeypatch):
    """A catalog with a single model, whose file is on the hub and on a plain host."""
    hub.files |= {"/cdn": CONTENT, "/w.pt": CONTENT}
    hub.linked[ON_HUB] = "/cdn"
    file = Weights("w.pt", (HubFile("owner/repo", "w.pt"), f"{hub.url}/w.pt"), 1, len(CONTENT), SHA256)
    monkeypatch.setattr(lookup, "MODELS", {"one": PretrainedModel("tiny_vit", file, file, file, "", "")})
    return hub


def test_command_lists_every_source(only_model, capsys):
    assert cli.main(["models", "--check-sources"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [["right", "w.pt"]] * 2
    assert "sha256 matches" in lines[2] and "content not checked" in lines[3] and f"{only_model.url}/w.pt" in lines[3]


@pytest.mark.parametrize("fault", ["renamed", "other", "size", "gone"])
def test_command_fails_if_one_source_is_wrong(only_model, capsys, fault):
    if fault == "renamed":
        del only_model.linked[ON_HUB]
    elif fault == "other":
        only_model.files["/cdn"] = CONTENT[::-1]
    elif fault == "size":
        only_model.files["/w.pt"] += b"!"
    else:
        del only_model.files["/w.pt"]
    assert cli.main(["models", "--check-sources"]) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]].count("wrong") == 1


def test_every_source_of_the_catalog_is_checked(server, monkeypatch, capsys):
    """This checks the real catalog through a proxy that refuses every connection."""
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", server.url)
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", server.url)
    assert cli.main(["models", "--check-sources"]) == 1
    lines = capsys.readouterr().out.splitlines()[2:]
    files = {weights for model in MODELS.values() for weights in model.weights.values()}
    assert len(lines) == sum(len(weights.sources) for weights in files)
    assert {line.split()[-1] for line in lines} == {str(source) for file in files for source in file.sources}
    assert {line.split()[0] for line in lines} == {"unknown"}
