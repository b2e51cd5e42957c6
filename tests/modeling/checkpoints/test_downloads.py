"""Downloads of weights from loopback servers: trusted hosts, resuming, verification, records, and concurrency."""

import dataclasses
import hashlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import huggingface_hub.constants
import pytest

from fiftyone_mobilesamv2.errors import CheckpointError, DownloadError
from fiftyone_mobilesamv2.modeling.checkpoints import downloads
from fiftyone_mobilesamv2.modeling.checkpoints.catalog import MODELS, HubFile, Weights
from fiftyone_mobilesamv2.modeling.checkpoints.downloads import DOWNLOAD_HOSTS_VARIABLE
from fiftyone_mobilesamv2.modeling.checkpoints.files import WEIGHTS_DIR_VARIABLE, fetch, fetch_model
from fiftyone_mobilesamv2.modeling.checkpoints.lookup import all_files
from fiftyone_mobilesamv2.modeling.mobilesamv2 import MobileSAMv2

CONTENT = bytes(range(256)) * 8192  # 2 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
BLOB = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def stranger(stranger):
    stranger.files["/w.pt"] = CONTENT
    return stranger


def weights(*sources, **known) -> Weights:
    return Weights("w.pt", sources, megabytes=2, **known)


def files_in(folder) -> set[str]:
    return {path.name for path in folder.rglob("*")} if folder.exists() else set()


LEFT = {"w.pt", "w.pt.lock", "w.pt.verified.json"}


@pytest.mark.parametrize(
    "known",
    [{}, {"sha256": SHA256}, {"git_blob": BLOB}, {"size": len(CONTENT), "sha256": SHA256}],
    ids=lambda known: "+".join(known) or "nothing",
)
def test_download(server, folder, known):
    server.files["/w.pt"] = CONTENT
    path = fetch(weights(f"{server.url}/w.pt", **known))
    assert path == folder / "w.pt" and path.read_bytes() == CONTENT
    assert files_in(folder) == LEFT
    fetch(weights(f"{server.url}/w.pt", **known))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "known",
    [
        {"sha256": "0" * 64},
        {"git_blob": "0" * 40},
        {"size": 3},
        {"sha256": SHA256, "git_blob": "0" * 40},
    ],
    ids=str,
)
def test_wrong_file_is_refused_and_not_kept(server, folder, known):
    server.files["/w.pt"] = CONTENT
    with pytest.raises(DownloadError, match=r"the file there is not w\.pt") as refusal:
        fetch(weights(f"{server.url}/w.pt", **known))
    expected = str(next(iter(known.values())))
    assert f"{server.url}/w.pt" in str(refusal.value) and expected in str(refusal.value)
    assert files_in(folder) == {"w.pt.lock"}


@pytest.mark.parametrize("ranges", [True, False])
def test_broken_connection_is_resumed(server, folder, ranges):
    server.files["/w.pt"], server.breaks, server.ranges = CONTENT, [1_500_000], ranges
    assert fetch(weights(f"{server.url}/w.pt", sha256=SHA256)).read_bytes() == CONTENT
    assert server.requests == [("GET", "/w.pt", None), ("GET", "/w.pt", "bytes=1500000-")]
    assert files_in(folder) == LEFT


def test_download_continues_while_each_attempt_makes_progress(server, folder, waits):
    server.files["/w.pt"], server.breaks = CONTENT, [200_000] * 10
    assert fetch(weights(f"{server.url}/w.pt", sha256=SHA256)).read_bytes() == CONTENT
    assert len(server.requests) == 11 and max(waits) <= downloads.FIRST_WAIT * 2 ** (downloads.MAX_ATTEMPTS - 1)


def test_attempts_without_progress_end_the_download(server, folder, waits):
    server.files["/w.pt"], server.breaks = CONTENT, [1_500_000] + [0] * 100
    wanted = weights(f"{server.url}/w.pt", sha256=SHA256)
    with pytest.raises(DownloadError, match=r"1,500,000 of 2,097,152 bytes; try again to resume"):
        fetch(wanted)
    assert len(server.requests) == 1 + downloads.MAX_ATTEMPTS - 1
    assert waits[:-1] == [1, 2, 4]  # the last wait is computed but not used
    assert files_in(folder) == {"w.pt.lock", "w.pt.partial"}
    server.breaks.clear()
    assert fetch(wanted).read_bytes() == CONTENT  # resumed by the next call
    assert server.requests[-1] == ("GET", "/w.pt", "bytes=1500000-")


def test_next_source_resumes_the_partial_download(server, folder):
    server.files |= {"/a": CONTENT, "/b": CONTENT}
    server.breaks = [1_500_000, 0, 0, 0]
    assert fetch(weights(f"{server.url}/a", f"{server.url}/b", sha256=SHA256)).read_bytes() == CONTENT
    assert server.requests[-1] == ("GET", "/b", "bytes=1500000-")


def test_partial_download_of_a_wrong_file_is_discarded(server, folder):
    server.files |= {"/a": b"another file" * 100_000, "/b": CONTENT}
    server.breaks = [900_000, 0, 0, 0]
    assert fetch(weights(f"{server.url}/a", f"{server.url}/b", sha256=SHA256)).read_bytes() == CONTENT
    assert [path for _, path, wanted in server.requests if wanted is None] == ["/a", "/b"]


# Temporary failures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_temporary_status_is_retried(server, folder, waits, status):
    server.files["/w.pt"] = CONTENT
    server.statuses["/w.pt"] = [(status, {}), (status, {"Retry-After": 7})]
    assert fetch(weights(f"{server.url}/w.pt", sha256=SHA256)).read_bytes() == CONTENT
    assert waits == [1, 7]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 416, 418])
def test_permanent_status_is_not_retried(server, folder, waits, status):
    server.statuses["/w.pt"] = [(status, {})]
    with pytest.raises(DownloadError, match=f"HTTP status {status} "):
        fetch(weights(f"{server.url}/w.pt", sha256=SHA256))
    assert waits == [] and len(server.requests) == 1


def test_lasting_rate_limit_leads_to_the_next_source(server, folder, waits):
    """Four attempts, or only one if the host asks for a wait that is too long; then comes the next source."""
    server.files["/b"] = CONTENT
    server.statuses["/a"] = [(429, {"Retry-After": 3600})] + [(429, {})] * 10
    wanted = weights(f"{server.url}/a", f"{server.url}/b", sha256=SHA256)
    assert fetch(wanted).read_bytes() == CONTENT
    assert waits == [] and [path for _, path, _ in server.requests] == ["/a", "/b"]
    with pytest.raises(DownloadError, match=r"HTTP status 429 \(Too Many Requests\)"):
        fetch(dataclasses.replace(wanted, filename="v.pt", sources=wanted.sources[:1]))
    assert waits[:-1] == [1, 2, 4]  # the last wait is computed but not used


def test_rate_limit_of_the_hub_is_waited_out(hub, folder, waits):
    path = "/owner/repo/resolve/main/c.pt"
    hub.files["/cdn"], hub.linked[path] = CONTENT, "/cdn"
    hub.statuses[path] = [(429, {"Retry-After": 5}), (503, {})]
    assert fetch(weights(HubFile("owner/repo", "c.pt"), sha256=SHA256)).read_bytes() == CONTENT
    assert waits == [5, 2]


def test_waiting_can_be_cancelled(server, folder, monkeypatch):
    """An exception from `progress` ends the wait within a second, even if the host asks for a minute."""
    monkeypatch.setattr(downloads, "_wait", lambda state: 60)
    server.statuses["/w.pt"] = [(429, {"Retry-After": 60})]
    start = time.monotonic()

    def progress(name, done, total):
        if time.monotonic() - start > 0.2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(weights(f"{server.url}/w.pt", sha256=SHA256), progress)
    assert time.monotonic() - start < 10


def test_captive_portal_is_recognized(server, folder):
    """A captive portal answers every request with its own login page."""
    server.files["/w.pt"] = b"\n<!DOCTYPE html><html><body>Welcome to our hotel! Please log in.</body></html>"
    for known in ({"sha256": SHA256}, {"size": 1000}):
        with pytest.raises(DownloadError, match=r"of a web page \(this network may require you to log in first\)"):
            fetch(weights(f"{server.url}/w.pt", **known))
    assert files_in(folder) == {"w.pt.lock"}


def test_wrong_hash_is_logged_and_the_next_source_tried(server, folder, caplog):
    server.files |= {"/renamed": b"other weights", "/right": CONTENT}
    fetch(weights(f"{server.url}/renamed", f"{server.url}/right", sha256=SHA256))
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    message = record.getMessage()
    assert f"Could not download w.pt from {server.url}/renamed: the file there is not w.pt: its sha256 is " in message


def test_wrong_file_on_the_hub_is_not_downloaded(hub, folder, caplog):
    """The response to HEAD holds the sha256, so gigabytes of the wrong file need not be transferred."""
    hub.files |= {"/cdn": b"other weights", "/right": CONTENT}
    hub.linked["/owner/repo/resolve/main/c.pt"] = "/cdn"
    fetch(weights(HubFile("owner/repo", "c.pt"), f"{hub.url}/right", sha256=SHA256))
    assert [(method, path) for method, path, _ in hub.requests] == [
        ("HEAD", "/owner/repo/resolve/main/c.pt"),
        ("GET", "/right"),
    ]
    assert hashlib.sha256(b"other weights").hexdigest() in caplog.text


def test_hub_file_at_a_revision_is_downloaded(hub, folder):
    hub.files["/cdn"], hub.linked[f"/owner/repo/resolve/{'a' * 40}/sub/c.pt"] = CONTENT, "/cdn"
    source = HubFile("owner/repo", "sub/c.pt", "a" * 40)
    assert fetch(weights(source, sha256=SHA256)).read_bytes() == CONTENT
    assert str(source) == f"https://huggingface.co/owner/repo/resolve/{'a' * 40}/sub/c.pt"


def test_full_disk_ends_the_download(server, folder, monkeypatch):
    """No other source is tried because that would not help."""
    server.files |= {"/a": CONTENT, "/b": CONTENT}

    def transfer(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads, "_transfer", transfer)
    with pytest.raises(DownloadError, match="No space left on device") as refusal:
        fetch(weights(f"{server.url}/a", f"{server.url}/b", sha256=SHA256))
    assert list(refusal.value.reasons) == [f"{server.url}/a"]


def test_offline_mode_makes_no_requests(server, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    server.files["/w.pt"] = CONTENT
    with pytest.raises(DownloadError, match=r"offline mode \(HF_HUB_OFFLINE is set\)"):
        fetch(weights(f"{server.url}/w.pt", HubFile("owner/repo", "c.pt"), sha256=SHA256))
    assert server.requests == []


def test_complete_partial_file_is_used(server, folder):
    """If a process ends between the last byte and the rename, the server answers the next request with 416."""
    server.files["/w.pt"] = CONTENT
    folder.mkdir()
    (folder / "w.pt.partial").write_bytes(CONTENT)
    assert fetch(weights(f"{server.url}/w.pt", sha256=SHA256)).read_bytes() == CONTENT


def test_partial_file_with_wrong_content_is_replaced(server, folder):
    server.files["/w.pt"] = CONTENT
    folder.mkdir()
    (folder / "w.pt.partial").write_bytes(b"of another file")
    wanted = weights(f"{server.url}/w.pt", sha256=SHA256)
    assert fetch(wanted).read_bytes() == CONTENT
    assert files_in(folder) == LEFT


def test_failing_sources_are_skipped(server, folder):
    server.files |= {"/wrong": b"other", "/right": CONTENT}
    sources = f"{server.url}/missing", f"{server.url}/wrong", "http://127.0.0.1:9/refused", f"{server.url}/right"
    assert fetch(weights(*sources, sha256=SHA256)).read_bytes() == CONTENT
    assert files_in(folder) == LEFT


def test_error_names_every_source_and_its_reason(server, folder, hub):
    server.files["/wrong"] = b"other"
    sources = (
        f"{server.url}/missing",
        f"{server.url}/wrong",
        "http://127.0.0.1:9/refused",
        "http://no such host/",
        HubFile("a/b", "c.pt"),
        HubFile("not a repository", "c.pt"),
    )
    with pytest.raises(DownloadError) as refusal:
        fetch(weights(*sources, sha256=SHA256))
    assert list(refusal.value.reasons) == [str(source) for source in sources]
    for reason, words in zip(
        refusal.value.reasons.values(),
        ("404", "is not w.pt", "refused", "not a trusted host", "404", "Repo id must use"),
    ):
        assert words in reason and reason in refusal.value.details


def test_non_http_response_is_reported(folder, monkeypatch):
    def serve() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"garbage\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setenv(DOWNLOAD_HOSTS_VARIABLE, url)
        with pytest.raises(DownloadError, match="garbage"):  # not an OSError
            fetch(weights(f"{url}/", sha256=SHA256))


# The hub ------------------------------------------------------------------------------------------------------------


def test_hub_download_is_resumed(hub, folder):
    hub.files["/owner/repo/resolve/main/sub/c.pt"] = CONTENT
    hub.breaks = [1_500_000]
    wanted = weights(HubFile("owner/repo", "sub/c.pt"), sha256=SHA256)
    assert fetch(wanted).read_bytes() == CONTENT
    assert hub.requests[-1][2] == "bytes=1500000-"
    assert files_in(folder) == LEFT  # no second copy


HUB_PROGRAM = """
import sys, time
from fiftyone_mobilesamv2.modeling.checkpoints import DownloadError, HubFile, Weights
from fiftyone_mobilesamv2.modeling.checkpoints.files import fetch
start = time.monotonic()
try:
    fetch(Weights("w.pt", (HubFile("owner/repo", "c.pt"),), megabytes=2))
except DownloadError as error:
    print(f"{time.monotonic() - start:.1f}", error)
"""


@pytest.mark.parametrize(
    "environment, words",
    [
        (
            {"HF_ENDPOINT": "http://127.0.0.1:9", DOWNLOAD_HOSTS_VARIABLE: "http://127.0.0.1:9"},
            "Connection refused",
        ),
        ({"HF_HUB_OFFLINE": "1"}, "offline mode"),
    ],
    ids=["no network", "offline mode"],
)
def test_unreachable_hub_fails_quickly(folder, environment, words):
    ran = subprocess.run(
        [sys.executable, "-c", HUB_PROGRAM], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    seconds, _, message = ran.stdout.partition(" ")
    assert words in message, ran.stderr
    assert float(seconds) < 15


# Trusted hosts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(server, monkeypatch):
    """Makes the server the proxy for all connections; it records the requested hosts and refuses to connect."""
    for scheme in ("http", "https", "ftp"):
        monkeypatch.setenv(f"{scheme}_proxy", server.url)
    return server


SOURCES = {str(source) for file in all_files() for source in file.sources}


@pytest.mark.parametrize(
    "url",
    [
        *sorted(SOURCES),
        "https://cdn-lfs.huggingface.co/x",  # redirect targets of the hub
        "https://cdn-lfs-us-1.hf.co/x",
        "https://cas-bridge.xethub.hf.co/x",
        "https://HuggingFace.co/x",
    ],
)
def test_hosts_of_all_sources_are_trusted(folder, proxy, url):
    with pytest.raises(DownloadError, match="403"):
        fetch(weights(url))
    assert [request[:2] for request in proxy.requests] == [("CONNECT", f"{urlsplit(url).netloc}:443")]


@pytest.mark.parametrize(
    "url",
    [
        "http://raw.githubusercontent.com/w.pt",
        "http://huggingface.co/w.pt",
        "https://evil.example/w.pt",
        "https://github.com/w.pt",
        "https://raw.githubusercontent.com.evil.example/w.pt",
        "https://evil.raw.githubusercontent.com/w.pt",
        "https://evilhuggingface.co/w.pt",
        "https://huggingface.co.evil.example/w.pt",
        "https://huggingface.co:8443/w.pt",
        "https://huggingface.co./w.pt",
        "https://huggingface.co@evil.example/w.pt",
        "https://evil.example\\.huggingface.co/w.pt",
        "https://evil.example#.huggingface.co/w.pt",
        "https://evil.example?.huggingface.co/w.pt",
        "https://evil.example/.huggingface.co/w.pt",
        "https:/huggingface.co/w.pt",
        "https:huggingface.co",
        "//huggingface.co/w.pt",
        "https://127.0.0.1/w.pt",
        "https://[::1]/w.pt",
        "http://169.254.169.254/latest/meta-data",
        "file:///etc/passwd",
        "file://huggingface.co/etc/passwd",
        "ftp://huggingface.co/w.pt",
        "data:application/octet-stream,weights",
        "/etc/passwd",
        "",
    ],
)
def test_other_hosts_are_never_contacted(folder, proxy, url):
    with pytest.raises(DownloadError, match="is not a trusted host for weights") as refusal:
        fetch(weights(url))
    assert DOWNLOAD_HOSTS_VARIABLE in str(refusal.value)
    assert proxy.requests == [] and files_in(folder) == {"w.pt.lock"}


@pytest.mark.parametrize(
    "named, trusted",
    [
        ("{url}", True),
        ("https://mirror.example   {url} ", True),
        ("", False),
        ("127.0.0.1", False),
        ("{url}0", False),
        ("https{url[4:]}", False),
        ("{url}/w.pt", False),
        ("http://user@127.0.0.1:{port}", False),
    ],
)
def test_hosts_named_by_the_user_are_trusted(folder, stranger, monkeypatch, named, trusted):
    named = named.replace("{url[4:]}", stranger.url[4:]).format(url=stranger.url, port=stranger.server_port)
    monkeypatch.setenv(DOWNLOAD_HOSTS_VARIABLE, named)
    if trusted:
        assert fetch(weights(f"{stranger.url}/w.pt")).read_bytes() == CONTENT
    else:
        with pytest.raises(DownloadError, match="not a trusted host"):
            fetch(weights(f"{stranger.url}/w.pt"))
        assert stranger.requests == []


@pytest.mark.parametrize(
    "to", ["{stranger}/w.pt", "http://huggingface.co/w.pt", "file:///etc/passwd", "ftp://huggingface.co/"]
)
def test_redirects_to_other_hosts_are_not_followed(server, stranger, folder, to):
    server.redirects |= {"/a": "/b", "/b": to.format(stranger=stranger.url)}
    with pytest.raises(DownloadError, match=r"is not a trusted host|Redirection to url \S+ is not allowed"):
        fetch(weights(f"{server.url}/a"))
    assert [path for _, path, _ in server.requests] == ["/a", "/b"] and stranger.requests == []
    assert files_in(folder) == {"w.pt.lock"}


def test_redirects_between_trusted_hosts_are_followed(server, stranger, folder, monkeypatch):
    monkeypatch.setenv(DOWNLOAD_HOSTS_VARIABLE, f"{server.url} {stranger.url}")
    server.redirects |= {"/a": "/b", "/b": f"{stranger.url}/w.pt"}
    assert fetch(weights(f"{server.url}/a", sha256=SHA256)).read_bytes() == CONTENT


def test_redirect_from_the_hub_to_another_host_is_not_followed(hub, stranger, folder):
    hub.redirects["/owner/repo/resolve/main/c.pt"] = f"{stranger.url}/w.pt"
    with pytest.raises(DownloadError, match=f"{stranger.url} is not a trusted host"):
        fetch(weights(HubFile("owner/repo", "c.pt")))
    assert stranger.requests == []


def test_hf_endpoint_alone_is_not_trusted(stranger, folder, monkeypatch):
    """It would be sent the user's token."""
    template = stranger.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", stranger.url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(DownloadError, match=f"{stranger.url} is not a trusted host"):
        fetch(weights(HubFile("owner/repo", "c.pt")))
    assert stranger.requests == []


# Size limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [{"size": 3_000_000}, {}], ids=["of a known size", "of 4 MB at most"])
def test_endless_body_is_cut_off(server, folder, known):
    server.files |= {"/endless": CONTENT, "/right": CONTENT + CONTENT[:902848]}
    server.lengths["/endless"] = None
    wanted = weights(f"{server.url}/endless", f"{server.url}/right", **known)
    assert fetch(wanted).stat().st_size == 3_000_000  # nothing of the endless body remains
    with pytest.raises(DownloadError, match=r"not v\.pt: it has more than [34],000,000 bytes"):
        fetch(dataclasses.replace(wanted, filename="v.pt", sources=wanted.sources[:1]))
    assert (folder / "v.pt.partial").stat().st_size == 0


@pytest.mark.parametrize("start", [0, 1000])
def test_body_of_excessive_length_is_not_read(server, folder, start):
    """The Content-Length header alone leads to the refusal."""
    server.files["/w.pt"], server.lengths["/w.pt"] = CONTENT, 10**12
    folder.mkdir()
    if start:
        (folder / "w.pt.partial").write_bytes(CONTENT[:start])
    with pytest.raises(DownloadError, match=r"it has more than 2,097,152 bytes"):
        fetch(weights(f"{server.url}/w.pt", size=len(CONTENT)))
    assert sum(path.stat().st_size for path in folder.iterdir()) == start


def test_bytes_beyond_content_length_are_ignored(server, folder):
    server.files["/w.pt"], server.lengths["/w.pt"] = CONTENT + b"more", len(CONTENT)
    assert fetch(weights(f"{server.url}/w.pt", sha256=SHA256)).read_bytes() == CONTENT


# Secrets ------------------------------------------------------------------------------------------------------------


def test_no_secret_is_revealed(server, stranger, hub, folder, caplog, capfd, monkeypatch):
    """Messages, logs and files contain no user name, password or query of a URL; a query may hold a token."""
    caplog.set_level(logging.DEBUG)
    host = server.url.removeprefix("http://")
    signed = "?token=S3CRET&X-Amz-Signature=S3CRET"
    server.redirects |= {
        f"/elsewhere{signed}": f"{stranger.url}/w.pt{signed}",
        f"/file{signed}": f"file:///etc{signed}",
        "/owner/repo/resolve/main/c.pt": f"{server.url}/missing{signed}",
        "/owner/repo/resolve/main/d.pt": f"http://S3CRET:S3CRET@{host}/w.pt",
    }
    server.files |= {f"/w.pt{signed}": CONTENT, f"/wrong{signed}": b"wrong", f"/broken{signed}": CONTENT[:-1]}
    server.lengths |= {f"/broken{signed}": 3_000_000}
    sources = [
        f"http://S3CRET:S3CRET@{host}/w.pt",
        f"http://S3CRET:S3/CR@ET@{host}/w.pt",
        f"https://S3CRET:S3CRET@huggingface.co/w.pt{signed}",
        f"https://hf.example/w.pt{signed}",
        f"{server.url}/missing{signed}",
        f"{server.url}/with space{signed}",
        f"{server.url}/elsewhere{signed}",
        f"{server.url}/file{signed}",
        f"http://127.0.0.1:9/{signed}",
        f"{server.url}/wrong{signed}",
        HubFile("owner/repo", "c.pt"),
        HubFile("owner/repo", "d.pt"),
        f"{server.url}/broken{signed}",
    ]
    with pytest.raises(DownloadError) as refusal:
        fetch(weights(*sources, sha256=SHA256))
    texts = [
        refusal.value.details,
        str(refusal.value),
        "".join(traceback.format_exception(refusal.value)),
        repr(refusal.value.reasons),
    ]
    assert len(refusal.value.reasons) > 9 and f"{server.url}/missing: " in texts[0]
    fetch(weights(f"{server.url}/w.pt{signed}"))  # a source that works
    texts += [path.read_text(errors="replace") for path in folder.iterdir()] + [path.name for path in folder.iterdir()]
    texts += [record.getMessage() for record in caplog.records if record.name.startswith("fiftyone_mobilesamv2")]
    texts += capfd.readouterr()
    assert not any(secret in text.lower() for text in texts for secret in ("s3cret", "cr@et"))


def test_password_of_a_proxy_is_not_revealed(folder, monkeypatch):
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://user:S3CRET@127.0.0.1:9")
    with pytest.raises(DownloadError, match="refused") as refusal:
        fetch(weights("https://huggingface.co/w.pt"))
    assert "S3CRET" not in "".join(traceback.format_exception(refusal.value))


# Records ------------------------------------------------------------------------------------------------------------


def test_hash_is_recorded_on_first_use(server, folder):
    server.files["/w.pt"] = CONTENT
    wanted = weights(f"{server.url}/w.pt")
    path = fetch(wanted)
    path.write_bytes(b"changed")
    with pytest.raises(CheckpointError, match=r"has changed since w\.pt was first used") as refusal:
        fetch(wanted)
    record = folder / "w.pt.verified.json"
    assert SHA256 in str(refusal.value) and str(record) in str(refusal.value)
    assert path.read_bytes() == b"changed"  # only the user may remove it

    path.unlink()
    server.files["/w.pt"] = b"changed at the source"
    with pytest.raises(DownloadError, match="has changed since"):
        fetch(wanted)
    assert files_in(folder) == {"w.pt.lock", record.name}
    record.unlink()
    assert fetch(wanted).read_bytes() == b"changed at the source"


def test_file_is_hashed_again_only_if_its_size_or_time_changed(folder):
    """A file of the same size and time counts as the verified one; any other modification time leads to a new hash."""
    folder.mkdir()
    path, wanted = folder / "w.pt", weights("http://127.0.0.1:9/", sha256=SHA256)
    path.write_bytes(CONTENT)
    fetch(wanted)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=times)
    fetch(wanted)
    os.utime(path, ns=(times[0], times[1] + 1))
    with pytest.raises(CheckpointError, match=r"is not w\.pt"):
        fetch(wanted)
    with pytest.raises(CheckpointError, match=r"is not w\.pt"):  # a refusal is not recorded as verified
        fetch(wanted)


def test_record_does_not_satisfy_another_expected_hash(folder):
    folder.mkdir()
    (folder / "w.pt").write_bytes(CONTENT)
    fetch(weights("http://127.0.0.1:9/"))
    with pytest.raises(CheckpointError, match="expected about 2 MB, sha256 0000000000"):
        fetch(weights("http://127.0.0.1:9/", sha256="0" * 64))


@pytest.mark.parametrize("record", [b"", b"{", b"\xff"])
def test_unreadable_record_is_reported(folder, record):
    folder.mkdir()
    (folder / "w.pt").write_bytes(CONTENT)
    (folder / "w.pt.verified.json").write_bytes(record)
    with pytest.raises(CheckpointError, match=r"w\.pt\.verified\.json can't be read .*; delete it"):
        fetch(weights("http://127.0.0.1:9/"))


@pytest.mark.parametrize("record", [b"[1]", b"null", b'{"sha256": null}'])
def test_record_without_a_hash_is_ignored(folder, record):
    folder.mkdir()
    (folder / "w.pt").write_bytes(CONTENT)
    (folder / "w.pt.verified.json").write_bytes(record)
    assert fetch(weights("http://127.0.0.1:9/", sha256=SHA256)) == folder / "w.pt"
    with pytest.raises(CheckpointError, match="is not"):
        fetch(weights("http://127.0.0.1:9/", sha256="0" * 64))


def test_file_provided_by_the_user_needs_no_network(server, folder):
    folder.mkdir()
    (folder / "w.pt").write_bytes(CONTENT)
    assert fetch(weights(f"{server.url}/w.pt", sha256=SHA256)) == folder / "w.pt"
    (folder / "w.pt").write_bytes(b"another file")
    with pytest.raises(CheckpointError, match="move it away to download it again"):
        fetch(weights(f"{server.url}/w.pt", sha256=SHA256))
    assert server.requests == []
    assert (folder / "w.pt").read_bytes() == b"another file"


def test_unwritable_folder_is_reported(folder, server):
    folder.write_text("a file is in the way")
    with pytest.raises(DownloadError, match="can't be written to"):
        fetch(weights(f"{server.url}/w.pt"))


# Concurrency, and models --------------------------------------------------------------------------------------------


def test_threads_download_once(server, folder):
    server.files["/w.pt"], server.slow = CONTENT, 0.2
    wanted = weights(f"{server.url}/w.pt", sha256=SHA256)
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: fetch(wanted), range(8)))
    assert set(paths) == {folder / "w.pt"} and paths[0].read_bytes() == CONTENT
    assert len(server.requests) == 1
    assert files_in(folder) == LEFT


FETCH_PROGRAM = """
import sys
from fiftyone_mobilesamv2.modeling.checkpoints.catalog import Weights
from fiftyone_mobilesamv2.modeling.checkpoints.files import fetch
print("ready", flush=True)
sys.stdin.readline()
print(fetch(Weights("w.pt", (sys.argv[1],), megabytes=2)))
"""


def test_processes_download_once(server, folder):
    server.files["/w.pt"], server.slow = CONTENT, 0.5
    command = [sys.executable, "-c", FETCH_PROGRAM, f"{server.url}/w.pt"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == [str(folder / "w.pt")] * 2
    assert len(server.requests) == 1


def test_model_without_network_says_which_files_to_put_where(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as refusal:
        MobileSAMv2.from_pretrained("mobilesamv2-tinyvit-torch", device="cpu")
    message, details = str(refusal.value), refusal.value.details
    assert len(message.splitlines()) == 7 and "mobilesamv2-nano-torch" in message
    assert f"Put the missing files into {folder} " in message and WEIGHTS_DIR_VARIABLE in message
    for wanted in MODELS["mobilesamv2-tinyvit-torch"].weights.values():
        assert f"- {wanted.filename} ({wanted.megabytes} MB) from {wanted.sources[0]}: offline mode" in message
        assert f"{wanted.filename}: {wanted.describe()}" in details
        assert all(f"  {source}: offline mode" in details for source in wanted.sources)


def test_wrong_file_of_a_model_is_reported_at_once(folder):
    """An existing wrong file is named at once, and no download overwrites it."""
    folder.mkdir()
    (folder / "mobile_sam.pt").write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match=r"mobile_sam\.pt is not mobile_sam\.pt: it has 6 bytes") as refusal:
        fetch_model("mobilesamv2-tinyvit-torch", skip=("decoder_checkpoint", "detector_checkpoint"))
    assert "40,728,226 bytes" in str(refusal.value)


def test_unknown_model():
    with pytest.raises(ValueError, match=r"Unknown model 'mobilesam'; choose one of mobilesamv2-tinyvit-torch, "):
        MobileSAMv2.from_pretrained("mobilesam")
