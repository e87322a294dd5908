"""Images by address: what is fetched, from where, and what never is."""

import base64
import contextlib
import http.server
import threading
import time
from dataclasses import replace

import pytest

from vreflection.serving import media, remote_images
from vreflection.serving.errors import ApiError
from vreflection.serving.settings import ServeSettings

REMOTE = ServeSettings(remote_images=True, max_body=100_000, fetch_seconds=2)


@pytest.fixture(scope="module")
def site(tools):
    """A web server on the loopback: an image, a redirect to it, something large, something slow."""
    content = base64.b64decode(tools.picture().partition(",")[2])

    class Handler(http.server.BaseHTTPRequestHandler):
        seen = []

        def do_GET(self):
            self.seen.append((self.path, self.headers["Host"]))
            status = {"/moved": 302, "/gone": 404}.get(self.path, 200)
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/image")
            body = b"x" * 200_000 if self.path == "/large" else content
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.path == "/drip":
                with contextlib.suppress(OSError):  # the client gives up
                    for byte in body:
                        self.wfile.write(bytes([byte]))
                        time.sleep(0.1)
                return
            self.wfile.write(body[: len(body) // 2] if self.path == "/half" else body)

        def log_message(self, *_): ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1], content, Handler.seen
    server.shutdown()


def allow_loopback(monkeypatch):
    """The check for public addresses is tested by itself; here the site stands for a public one."""
    monkeypatch.setattr(remote_images, "public_address", lambda *_: "127.0.0.1")


def test_a_public_image_is_fetched_once_by_the_checked_address(site, monkeypatch):
    port, content, seen = site
    allow_loopback(monkeypatch)
    assert remote_images.fetch(f"http://pictures.example:{port}/image?a=1", REMOTE, "p") == content
    assert seen[-1] == ("/image?a=1", f"pictures.example:{port}")
    found = media.image_bytes(f"http://pictures.example:{port}/image", REMOTE, "p")
    assert media.decode_image(found, REMOTE, "p").size == (84, 56)


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/moved", 400, "got 302; redirects are not followed"),
        ("/gone", 400, "got 404"),
        ("/large", 413, "at most 100000 bytes"),
    ],
)
def test_what_is_no_image_there(site, monkeypatch, path, status, message):
    allow_loopback(monkeypatch)
    before = len(site[2])
    with pytest.raises(ApiError, match=message) as raised:
        remote_images.fetch(f"http://pictures.example:{site[0]}{path}", REMOTE, "p")
    assert raised.value.status == status and len(site[2]) == before + 1


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"], ["10.0.0.1"], ["192.168.1.1"], ["172.16.0.1"], ["169.254.169.254"], ["0.0.0.0"], ["100.64.0.1"],
        ["::1"], ["fe80::1%eth0"], ["fd00::1"], ["::ffff:127.0.0.1"], ["::ffff:10.0.0.1"], ["224.0.0.1"], ["ff02::1"],
        ["93.184.216.34", "127.0.0.1"], [],
    ],
)  # fmt: skip
def test_targets_that_are_not_public_are_refused(addresses):
    with pytest.raises(ApiError, match="not on the public net|has no address"):
        remote_images.public_address("name.example", 80, "p", lambda host, port: addresses)


def test_public_targets_are_taken_as_they_were_resolved():
    asked = []
    found = remote_images.public_address(
        "name.example", 443, "p", lambda *given: asked.append(given) or ["93.184.216.34"]
    )
    assert found == "93.184.216.34" and asked == [("name.example", 443)]
    assert remote_images.public_address("x", 80, "p", lambda *_: ["2606:2800:220:1::1"]) == "2606:2800:220:1::1"


@pytest.mark.parametrize(
    "url", ["http://", "http://[::1", "http://a:99999/", "http:///x", "http://127.0.0.1/", "http://localhost/", "http://[::1]/"]
)  # fmt: skip
def test_malformed_and_local_addresses(url):
    with pytest.raises(ApiError) as raised:
        media.image_bytes(url, REMOTE, "p")
    assert raised.value.status == 400 and raised.value.param == "p"


def test_a_site_that_does_not_answer(monkeypatch):
    allow_loopback(monkeypatch)
    with pytest.raises(ApiError, match="could not be read"):
        remote_images.fetch("http://pictures.example:1/image", REMOTE, "p")


def test_the_time_limit_is_for_the_whole_fetch(site, monkeypatch):
    allow_loopback(monkeypatch)
    began = time.monotonic()
    with pytest.raises(ApiError, match="could not be read .not whole within 0.5 s"):
        remote_images.fetch(f"http://pictures.example:{site[0]}/drip", replace(REMOTE, fetch_seconds=0.5), "p")
    assert time.monotonic() - began < 5  # the site needs half a minute
    with pytest.raises(ApiError, match="could not be read .IncompleteRead"):
        remote_images.fetch(f"http://pictures.example:{site[0]}/half", REMOTE, "p")


def test_a_name_server_that_is_silent():
    silent = threading.Event()
    with pytest.raises(ApiError, match="has no address"):
        remote_images.public_address("name.example", 80, "p", lambda *_: [] if silent.wait(5) else [], 0.2)
    silent.set()


def test_remote_images_are_off_by_default():
    with pytest.raises(ApiError, match="expected data:image/…;base64,…, got 'https://example.org/a.png'"):
        media.image_bytes("https://example.org/a.png", ServeSettings(), "p")
