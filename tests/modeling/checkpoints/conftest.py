"""A loopback server that imitates the hosts of weights: plain HTTP hosts and the Hugging Face hub."""

import contextlib
import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest

from fiftyone_mobilesamv2.modeling.checkpoints import downloads
from fiftyone_mobilesamv2.modeling.checkpoints.downloads import DOWNLOAD_HOSTS_VARIABLE
from fiftyone_mobilesamv2.modeling.checkpoints.files import WEIGHTS_DIR_VARIABLE

REVISION = "0" * 40


class Server(ThreadingHTTPServer):
    """Serves `files` (path -> bytes).

    Attributes:
        redirects: path -> target URL.
        linked: path -> path of the content; redirects with the sha256 in a header, as the hub does for large files.
        lengths: path -> the length it claims; None claims none and sends without end.
        statuses: path -> (status, headers) of the next responses, before the correct one.
        no_head: the status of every response to HEAD.
        breaks: after how many bytes each of the next connections is cut.
        ranges: whether it honours the Range header.
        slow: seconds it waits before each response.
        requests: (method, path, Range or None) of each request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.redirects, self.linked, self.lengths, self.statuses = {}, {}, {}, {}, {}
        self.breaks, self.requests = [], []
        self.no_head, self.ranges, self.slow = None, True, 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def cdn(self) -> str:
        """The same server under another name: the hub keeps large files on other hosts."""
        return f"http://localhost:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.answer()

    def do_CONNECT(self) -> None:
        """Acts as a proxy that refuses every connection."""
        self.server.requests.append((self.command, self.path, None))
        self.send_error(403)

    def do_GET(self) -> None:
        content = self.answer()
        while content is not None and self.server.lengths.get(self.path, ()) is None:
            try:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
            except OSError:
                return
        if content is not None and self.server.breaks:
            content = content[: self.server.breaks.pop(0)]
            self.close_connection = True
        self.wfile.write(content or b"")

    def answer(self) -> bytes | None:
        server, wanted = self.server, self.headers.get("Range")
        server.requests.append((self.command, self.path, wanted))
        time.sleep(server.slow)
        if server.statuses.get(self.path):
            return self.refuse(*server.statuses[self.path].pop(0))
        if self.command == "HEAD" and server.no_head:
            return self.refuse(server.no_head, {})
        if self.path in server.linked:
            content = server.files[server.linked[self.path]]
            return self.lead(
                server.cdn + server.linked[self.path],
                {"X-Linked-Size": len(content), "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"'},
            )
        if self.path in server.redirects:
            return self.lead(server.redirects[self.path], {})
        content = server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return None
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted and server.ranges else 0
        if start >= len(content) > 0:
            self.send_error(416)
            return None
        self.send_response(206 if wanted and server.ranges else 200)
        if wanted and server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        length = server.lengths.get(self.path, len(content) - start)
        self.send_header(*(("Transfer-Encoding", "chunked") if length is None else ("Content-Length", str(length))))
        # For small files, the hub's ETag is the git blob ID.
        self.send_header("ETag", f'"{hashlib.sha1(b"blob %d" % len(content) + bytes(1) + content).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        return content[start:]

    def refuse(self, status: int, headers: dict) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": 0} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()

    def lead(self, location: str, headers: dict) -> None:
        self.refuse(302, {"Location": location, "X-Repo-Commit": REVISION} | headers)

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
    """A trusted server. Port 9, where nothing listens, is trusted too."""
    with serving() as server:
        monkeypatch.setenv(DOWNLOAD_HOSTS_VARIABLE, f"{server.url} {server.cdn} http://127.0.0.1:9")
        yield server


@pytest.fixture
def stranger():
    """A server that is not a trusted host."""
    with serving() as server:
        yield server


@pytest.fixture
def hub(server, monkeypatch):
    """The server as the Hugging Face hub. Setting HF_ENDPOINT would come too late: the library is already imported."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        server.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    return server


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    """Connections to the loopback bypass any proxy."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Records the seconds that downloads would wait before each retry, without waiting."""
    seconds, computed = [], downloads._wait

    def wait(state) -> float:
        seconds.append(computed(state))
        return 0

    monkeypatch.setattr(downloads, "_wait", wait)
    return seconds


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The weights folder, which does not exist yet."""
    monkeypatch.setenv(WEIGHTS_DIR_VARIABLE, str(tmp_path / "weights"))
    return tmp_path / "weights"
