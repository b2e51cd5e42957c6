"""Downloads of weights, against servers on the loopback: from pinned hosts, resumed, verified, recorded, once only."""

import contextlib
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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import huggingface_hub.constants
import pytest

from fiftyone_mobilesamv2.modeling import checkpoints
from fiftyone_mobilesamv2.modeling.checkpoints import CheckpointError, DownloadError, HubFile, Weights, fetch
from fiftyone_mobilesamv2.modeling.mobilesamv2 import MobileSAMv2

CONTENT = bytes(range(256)) * 8192  # 2 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
BLOB = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()
REVISION = "0" * 40


class Server(ThreadingHTTPServer):
    """Serves `files`, path -> bytes.

    Attributes:
        redirects: path -> where it leads.
        lengths: path -> what is said to be the length; None says nothing, and goes on for ever.
        break_after: the next connection is cut after so many bytes.
        ranges: whether it honours Range.
        slow: seconds it waits before each answer.
        requests: (method, path, Range or None) of each.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.redirects, self.lengths, self.requests = {}, {}, {}, []
        self.break_after, self.ranges, self.slow = None, True, 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.answer()

    def do_CONNECT(self) -> None:
        """As a proxy that lets nobody through."""
        self.server.requests.append((self.command, self.path, None))
        self.send_error(403)

    def do_GET(self) -> None:
        content = self.answer()
        while content is not None and self.server.lengths.get(self.path, ()) is None:
            try:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
            except OSError:
                return
        if content is not None and self.server.break_after is not None:
            self.server.break_after, content = None, content[: self.server.break_after]
            self.close_connection = True
        self.wfile.write(content or b"")

    def answer(self) -> bytes | None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.command, self.path, wanted))
        time.sleep(self.server.slow)
        content = self.server.files.get(self.path)
        if self.path in self.server.redirects:
            self.send_response(302)
            self.send_header("Location", self.server.redirects[self.path])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        if content is None:
            self.send_error(404)
            return None
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted and self.server.ranges else 0
        if start >= len(content) > 0:
            self.send_error(416)
            return None
        self.send_response(206 if wanted and self.server.ranges else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        length = self.server.lengths.get(self.path, len(content) - start)
        self.send_header(*(("Transfer-Encoding", "chunked") if length is None else ("Content-Length", str(length))))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        return content[start:]

    def log_message(self, *args: object) -> None: ...


@contextlib.contextmanager
def serving():
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(monkeypatch):
    """A server that weights may come from, as may from one that nobody runs."""
    with serving() as server:
        monkeypatch.setenv(checkpoints.DOWNLOAD_HOSTS_VARIABLE, f"{server.url} http://127.0.0.1:9")
        yield server


@pytest.fixture
def stranger():
    """A server that nobody has named."""
    with serving() as server:
        server.files["/w.pt"] = CONTENT
        yield server


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The weights folder; connections to the loopback go there directly."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv(checkpoints.WEIGHTS_DIR_VARIABLE, str(tmp_path / "weights"))
    return tmp_path / "weights"


@pytest.fixture
def hub(server, monkeypatch):
    """The server as Hugging Face hub; the library reads HF_ENDPOINT when it is first imported, which was before."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        server.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    return server


def weights(*sources, **known) -> Weights:
    return Weights("w.pt", sources, megabytes=2, **known)


def files_in(folder) -> set[str]:
    return {path.name for path in folder.rglob("*")} if folder.exists() else set()


LEFT = {"w.pt", "w.pt.lock", "w.pt.verified.json"}


@pytest.mark.parametrize(
    "known",
    [{}, {"sha256": SHA256}, {"sha256": SHA256[:6]}, {"git_blob": BLOB}, {"size": len(CONTENT), "sha256": SHA256}],
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
        {"sha256": "000000"},
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
    server.files["/w.pt"], server.break_after, server.ranges = CONTENT, 1_500_000, ranges
    wanted = weights(f"{server.url}/w.pt", sha256=SHA256)
    with pytest.raises(DownloadError, match=r"1,500,000 of 2,097,152 bytes; try again to resume"):
        fetch(wanted)
    assert files_in(folder) == {"w.pt.lock", "w.pt.partial"}
    assert fetch(wanted).read_bytes() == CONTENT
    assert server.requests == [("GET", "/w.pt", None), ("GET", "/w.pt", "bytes=1500000-")]
    assert files_in(folder) == LEFT


def test_what_has_come_serves_the_next_source(server, folder):
    server.files |= {"/a": CONTENT, "/b": CONTENT}
    server.break_after = 1_500_000
    assert fetch(weights(f"{server.url}/a", f"{server.url}/b", sha256=SHA256)).read_bytes() == CONTENT
    assert server.requests[-1] == ("GET", "/b", "bytes=1500000-")


def test_all_of_it_was_here(server, folder):
    """A program that ended between the last byte and the rename: the server answers 416."""
    server.files["/w.pt"] = CONTENT
    folder.mkdir()
    (folder / "w.pt.partial").write_bytes(CONTENT)
    assert fetch(weights(f"{server.url}/w.pt", sha256=SHA256)).read_bytes() == CONTENT


def test_stale_remainder_is_not_kept(server, folder):
    server.files["/w.pt"] = CONTENT
    folder.mkdir()
    (folder / "w.pt.partial").write_bytes(b"of another file")
    wanted = weights(f"{server.url}/w.pt", sha256=SHA256)
    assert fetch(wanted).read_bytes() == CONTENT
    assert files_in(folder) == LEFT


def test_second_source(server, folder):
    server.files |= {"/wrong": b"other", "/right": CONTENT}
    sources = f"{server.url}/missing", f"{server.url}/wrong", "http://127.0.0.1:9/refused", f"{server.url}/right"
    assert fetch(weights(*sources, sha256=SHA256)).read_bytes() == CONTENT
    assert files_in(folder) == LEFT


def test_every_source_and_its_reason(server, folder, hub):
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
        ("404", "is not w.pt", "refused", "none of the hosts", "404", "HFValidationError"),
    ):
        assert words in reason and reason in str(refusal.value)


def test_server_that_speaks_no_http(folder, monkeypatch):
    def serve() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"garbage\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setenv(checkpoints.DOWNLOAD_HOSTS_VARIABLE, url)
        with pytest.raises(DownloadError, match="BadStatusLine"):  # which is no OSError
            fetch(weights(f"{url}/", sha256=SHA256))


# The hub ------------------------------------------------------------------------------------------------------------


def test_hub(hub, folder):
    hub.files["/owner/repo/resolve/main/sub/c.pt"] = CONTENT
    hub.break_after = 1_500_000
    wanted = weights(HubFile("owner/repo", "sub/c.pt"), sha256=SHA256)
    with pytest.raises(DownloadError, match="try again to resume"):
        fetch(wanted)
    assert fetch(wanted).read_bytes() == CONTENT
    assert hub.requests[-1][2] == "bytes=1500000-"
    assert files_in(folder) == LEFT  # no second copy


HUB_PROGRAM = """
import sys, time
from fiftyone_mobilesamv2.modeling.checkpoints import DownloadError, HubFile, Weights, fetch
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
            {"HF_ENDPOINT": "http://127.0.0.1:9", checkpoints.DOWNLOAD_HOSTS_VARIABLE: "http://127.0.0.1:9"},
            "ConnectError",
        ),
        ({"HF_HUB_OFFLINE": "1"}, "OfflineModeIsEnabled"),
    ],
    ids=["no network", "offline mode"],
)
def test_hub_out_of_reach_fails_soon(folder, environment, words):
    ran = subprocess.run(
        [sys.executable, "-c", HUB_PROGRAM], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    seconds, _, message = ran.stdout.partition(" ")
    assert words in message, ran.stderr
    assert float(seconds) < 15


# Where from ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(server, monkeypatch):
    """The server as the proxy of all connections: it sees who is called, and lets nobody through."""
    for scheme in ("http", "https", "ftp"):
        monkeypatch.setenv(f"{scheme}_proxy", server.url)
    return server


SOURCES = {str(source) for name in checkpoints.MODELS for w in checkpoints.model_files(name) for source in w.sources}


@pytest.mark.parametrize(
    "url",
    [
        *sorted(SOURCES),
        "https://cdn-lfs.huggingface.co/x",  # where the hub leads to
        "https://cdn-lfs-us-1.hf.co/x",
        "https://cas-bridge.xethub.hf.co/x",
        "https://HuggingFace.co/x",
    ],
)
def test_hosts_of_weights(folder, proxy, url):
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
def test_other_hosts_are_not_even_asked(folder, proxy, url):
    with pytest.raises(DownloadError, match="is none of the hosts that weights are downloaded from") as refusal:
        fetch(weights(url))
    assert checkpoints.DOWNLOAD_HOSTS_VARIABLE in str(refusal.value)
    assert proxy.requests == [] and files_in(folder) == {"w.pt.lock"}


@pytest.mark.parametrize(
    "named, may",
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
def test_hosts_that_the_user_names(folder, stranger, monkeypatch, named, may):
    named = named.replace("{url[4:]}", stranger.url[4:]).format(url=stranger.url, port=stranger.server_port)
    monkeypatch.setenv(checkpoints.DOWNLOAD_HOSTS_VARIABLE, named)
    if may:
        assert fetch(weights(f"{stranger.url}/w.pt")).read_bytes() == CONTENT
    else:
        with pytest.raises(DownloadError, match="none of the hosts"):
            fetch(weights(f"{stranger.url}/w.pt"))
        assert stranger.requests == []


@pytest.mark.parametrize(
    "to", ["{stranger}/w.pt", "http://huggingface.co/w.pt", "file:///etc/passwd", "ftp://huggingface.co/"]
)
def test_redirects_to_others_are_not_followed(server, stranger, folder, to):
    server.redirects |= {"/a": "/b", "/b": to.format(stranger=stranger.url)}
    with pytest.raises(DownloadError, match=r"is none of the hosts|Redirection to url \S+ is not allowed"):
        fetch(weights(f"{server.url}/a"))
    assert [path for _, path, _ in server.requests] == ["/a", "/b"] and stranger.requests == []
    assert files_in(folder) == {"w.pt.lock"}


def test_redirects_among_the_hosts_are_followed(server, stranger, folder, monkeypatch):
    monkeypatch.setenv(checkpoints.DOWNLOAD_HOSTS_VARIABLE, f"{server.url} {stranger.url}")
    server.redirects |= {"/a": "/b", "/b": f"{stranger.url}/w.pt"}
    assert fetch(weights(f"{server.url}/a", sha256=SHA256)).read_bytes() == CONTENT


def test_hub_that_leads_elsewhere(hub, stranger, folder):
    hub.redirects["/owner/repo/resolve/main/c.pt"] = f"{stranger.url}/w.pt"
    with pytest.raises(DownloadError, match=f"{stranger.url} is none of the hosts"):
        fetch(weights(HubFile("owner/repo", "c.pt")))
    assert stranger.requests == []


def test_hub_that_is_not_one(stranger, folder, monkeypatch):
    """HF_ENDPOINT alone doesn't make it one: it would be sent the user's token."""
    template = stranger.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", stranger.url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(DownloadError, match=f"{stranger.url} is none of the hosts"):
        fetch(weights(HubFile("owner/repo", "c.pt")))
    assert stranger.requests == []


# How much -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [{"size": 3_000_000}, {}], ids=["of a known size", "of 4 MB at most"])
def test_body_without_end(server, folder, known):
    server.files |= {"/endless": CONTENT, "/right": CONTENT + CONTENT[:902848]}
    server.lengths["/endless"] = None
    wanted = weights(f"{server.url}/endless", f"{server.url}/right", **known)
    assert fetch(wanted).stat().st_size == 3_000_000  # nothing is left of the first
    with pytest.raises(DownloadError, match=r"not v\.pt: it has more than [34],000,000 bytes"):
        fetch(dataclasses.replace(wanted, filename="v.pt", sources=wanted.sources[:1]))
    assert (folder / "v.pt.partial").stat().st_size == 0


@pytest.mark.parametrize("start", [0, 1000])
def test_length_beyond_what_is_expected(server, folder, start):
    """Nothing of it is read."""
    server.files["/w.pt"], server.lengths["/w.pt"] = CONTENT, 10**12
    folder.mkdir()
    if start:
        (folder / "w.pt.partial").write_bytes(CONTENT[:start])
    with pytest.raises(DownloadError, match=r"it has more than 2,097,152 bytes"):
        fetch(weights(f"{server.url}/w.pt", size=len(CONTENT)))
    assert sum(path.stat().st_size for path in folder.iterdir()) == start


def test_body_beyond_its_length(server, folder):
    server.files["/w.pt"], server.lengths["/w.pt"] = CONTENT + b"more", len(CONTENT)
    assert fetch(weights(f"{server.url}/w.pt", sha256=SHA256)).read_bytes() == CONTENT


# What is not told ---------------------------------------------------------------------------------------------------


def test_no_secret_is_told(server, stranger, hub, folder, caplog, capfd, monkeypatch):
    """Neither user nor password nor the query of a URL, which may hold a token: in messages, logs, and files."""
    caplog.set_level(logging.DEBUG)
    host = server.url.removeprefix("http://")
    signed = "?token=S3CRET&X-Amz-Signature=S3CRET"
    server.redirects |= {
        f"/elsewhere{signed}": f"{stranger.url}/w.pt{signed}",
        f"/file{signed}": f"file:///etc{signed}",
        "/owner/repo/resolve/main/c.pt": f"{server.url}/missing{signed}",
        "/owner/repo/resolve/main/d.pt": f"http://S3CRET:S3CRET@{host}/w.pt",
    }
    server.files |= {f"/w.pt{signed}": CONTENT, f"/wrong{signed}": b"wrong", f"/broken{signed}": CONTENT}
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
    told = [str(refusal.value), "".join(traceback.format_exception(refusal.value)), repr(refusal.value.reasons)]
    assert len(refusal.value.reasons) > 9 and f"{server.url}/missing: " in told[0]
    fetch(weights(f"{server.url}/w.pt{signed}"))  # one that works
    told += [path.read_text(errors="replace") for path in folder.iterdir()] + [path.name for path in folder.iterdir()]
    told += [record.getMessage() for record in caplog.records if record.name.startswith("fiftyone_mobilesamv2")]
    told += capfd.readouterr()
    assert not any("S3CRET" in text or "CR@ET" in text for text in told)


def test_password_of_a_proxy_is_not_told(folder, monkeypatch):
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://user:S3CRET@127.0.0.1:9")
    with pytest.raises(DownloadError, match="refused") as refusal:
        fetch(weights("https://huggingface.co/w.pt"))
    assert "S3CRET" not in "".join(traceback.format_exception(refusal.value))


# What is recorded ---------------------------------------------------------------------------------------------------


def test_hash_is_recorded_on_first_use(server, folder):
    server.files["/w.pt"] = CONTENT
    wanted = weights(f"{server.url}/w.pt")
    path = fetch(wanted)
    path.write_bytes(b"changed")
    with pytest.raises(CheckpointError, match=r"has changed since w\.pt was first used") as refusal:
        fetch(wanted)
    record = folder / "w.pt.verified.json"
    assert SHA256 in str(refusal.value) and str(record) in str(refusal.value)
    assert path.read_bytes() == b"changed"  # the user's to remove

    path.unlink()
    server.files["/w.pt"] = b"changed at the source"
    with pytest.raises(DownloadError, match="has changed since"):
        fetch(wanted)
    assert files_in(folder) == {"w.pt.lock", record.name}
    record.unlink()
    assert fetch(wanted).read_bytes() == b"changed at the source"


def test_file_is_read_again_only_when_it_changed(folder):
    """Same size and time: taken to be the one that was verified. Any other time: read."""
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


def test_record_of_another_expectation_does_not_count(folder):
    folder.mkdir()
    (folder / "w.pt").write_bytes(CONTENT)
    fetch(weights("http://127.0.0.1:9/"))
    with pytest.raises(CheckpointError, match="expected about 2 MB, sha256 0000000000"):
        fetch(weights("http://127.0.0.1:9/", sha256="0" * 64))


@pytest.mark.parametrize("record", [b"", b"{", b"\xff"])
def test_record_that_cannot_be_read(folder, record):
    folder.mkdir()
    (folder / "w.pt").write_bytes(CONTENT)
    (folder / "w.pt.verified.json").write_bytes(record)
    with pytest.raises(CheckpointError, match=r"w\.pt\.verified\.json can't be read .*; delete it"):
        fetch(weights("http://127.0.0.1:9/"))


@pytest.mark.parametrize("record", [b"[1]", b"null", b'{"sha256": null}'])
def test_record_that_says_nothing(folder, record):
    folder.mkdir()
    (folder / "w.pt").write_bytes(CONTENT)
    (folder / "w.pt.verified.json").write_bytes(record)
    assert fetch(weights("http://127.0.0.1:9/", sha256=SHA256)) == folder / "w.pt"
    with pytest.raises(CheckpointError, match="is not"):
        fetch(weights("http://127.0.0.1:9/", sha256="0" * 64))


def test_file_put_there_by_hand_needs_no_network(server, folder):
    folder.mkdir()
    (folder / "w.pt").write_bytes(CONTENT)
    assert fetch(weights(f"{server.url}/w.pt", sha256=SHA256)) == folder / "w.pt"
    (folder / "w.pt").write_bytes(b"another file")
    with pytest.raises(CheckpointError, match="delete the file to have it downloaded again"):
        fetch(weights(f"{server.url}/w.pt", sha256=SHA256))
    assert server.requests == []
    assert (folder / "w.pt").read_bytes() == b"another file"


def test_folder_that_cannot_be_written(folder, server):
    folder.write_text("a file is in the way")
    with pytest.raises(DownloadError, match="can't be written to"):
        fetch(weights(f"{server.url}/w.pt"))


# Many at once, and models -------------------------------------------------------------------------------------------


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
from fiftyone_mobilesamv2.modeling.checkpoints import Weights, fetch
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
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # every connection is refused
    with pytest.raises(CheckpointError) as refusal:
        MobileSAMv2.from_pretrained("mobilesamv2-tinyvit-torch", device="cpu")
    message = str(refusal.value)
    assert f"Put these files into {folder} " in message and checkpoints.WEIGHTS_DIR_VARIABLE in message
    for wanted in checkpoints.MODELS["mobilesamv2-tinyvit-torch"].weights.values():
        assert f"- {wanted.filename} ({wanted.describe()})" in message
        assert all(f"from {source}: " in message for source in wanted.sources)


def test_model_with_one_wrong_file(folder):
    """A file that is there and wrong is named at once; nothing is downloaded over it."""
    folder.mkdir()
    (folder / "mobile_sam.pt").write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match=r"mobile_sam\.pt is not mobile_sam\.pt: it has 6 bytes") as refusal:
        checkpoints.fetch_model("mobilesamv2-tinyvit-torch", skip=("decoder_checkpoint", "detector_checkpoint"))
    assert "40,728,226 bytes" in str(refusal.value)


def test_unknown_model():
    with pytest.raises(ValueError, match=r"Unknown model 'mobilesam'; choose one of mobilesamv2-tinyvit-torch, "):
        MobileSAMv2.from_pretrained("mobilesam")
