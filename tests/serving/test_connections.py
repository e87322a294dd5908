"""Connections that stall, drip, vanish or never read; what a server does when it stops; who waits for whom."""

import asyncio
import contextlib
import gzip
import json
import logging
import socket
import threading
import time
from unittest import mock

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from vreflection.errors import ConfigError
from vreflection.serving.connections import timed_protocol
from vreflection.serving.server import bind, exposure
from vreflection.serving.settings import ServeSettings

PATH = "/v1/chat/completions"
HEAD = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def connect(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def until_closed(connection):
    """What the server says before it closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            received += part
    return received


def whole_response(connection):
    """A response whose body is a JSON object, however it is cut into packets."""
    received = b""
    while not received.endswith(b"}"):
        part = connection.recv(65536)
        assert part, f"closed after {received!r}"
        received += part
    return received.decode()


def metric(server, name):
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)}


def answered(server, tools, **more):
    body = {"model": "tiny", "messages": [tools.user("q")], "max_tokens": 4, **more}
    return httpx.post(f"{server.base}/chat/completions", json=body, timeout=60)


@pytest.mark.parametrize("start", [b"", b"POST /v1", HEAD.encode()])
def test_a_head_that_never_ends_is_closed(serve, start):
    with serve(header_seconds=0.3) as server, connect(server) as connection:
        began = time.monotonic()
        connection.sendall(start)
        assert until_closed(connection) == b"" and time.monotonic() - began < 10


def test_a_head_that_drips_is_closed_too(serve):
    with serve(header_seconds=0.4) as server, connect(server) as connection, contextlib.suppress(OSError):
        for byte in HEAD.encode() * 5:
            connection.sendall(bytes([byte]))
            time.sleep(0.02)
        pytest.fail("the server takes in heads without end")


def test_an_idle_connection_is_closed_and_a_used_one_is_not(serve):
    with serve(idle_seconds=0.5, header_seconds=0.5) as server, connect(server) as connection:
        request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for _ in range(4):
            connection.sendall(request)
            assert whole_response(connection).startswith("HTTP/1.1 200")
            time.sleep(0.3)
        assert until_closed(connection) == b""


@pytest.mark.parametrize("drip", [False, True])
def test_a_body_that_stalls_or_drips_gets_408(serve, tools, drip):
    with serve(body_seconds=0.5) as server, connect(server) as connection:
        connection.sendall(f"{HEAD}Content-Length: 1000\r\n\r\n{{".encode())
        if drip:
            with contextlib.suppress(OSError):
                for _ in range(100):
                    connection.sendall(b" ")
                    time.sleep(0.02)
        text = until_closed(connection).decode()
        assert text.startswith("HTTP/1.1 408") and json.loads(text.partition("\r\n\r\n")[2])["error"]["code"]
        assert answered(server, tools).status_code == 200
        assert server.service.in_work == 0


def test_a_client_that_vanishes_while_it_sends_is_counted_and_quiet(serve, caplog):
    with serve() as server, caplog.at_level(logging.WARNING):
        with connect(server) as connection:
            connection.sendall(f"{HEAD}Content-Length: 1000\r\n\r\n{{".encode())
            time.sleep(0.2)
        deadline = time.monotonic() + 10
        while not metric(server, "vreflection_disconnected_total")["vreflection_disconnected_total"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        statuses = metric(server, "vreflection_requests_total")
        assert not any('status="500"' in name for name in statuses)
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("reads_again", [False, True])
def test_a_client_that_does_not_read_is_let_go(reads_again):
    """What asyncio calls when the buffers of a connection are full, and when they have room again."""

    async def stalled() -> int:
        async def app(*_): ...

        config = uvicorn.Config(app)
        config.load()
        protocol = timed_protocol(ServeSettings(write_seconds=0.2))(config, ServerState(), {})
        transport = mock.MagicMock()
        protocol.connection_made(transport)
        protocol.stop_waiting()
        protocol.pause_writing()
        if reads_again:
            protocol.resume_writing()
        await asyncio.sleep(0.5)
        return transport.abort.call_count

    assert asyncio.run(stalled()) == (0 if reads_again else 1)


def test_too_many_connections_are_told_so(serve):
    with serve(max_connections=3) as server:
        open_ones = [connect(server) for _ in range(3)]
        time.sleep(0.2)
        with connect(server) as one_more:
            text = until_closed(one_more).decode()
        assert (
            text.startswith("HTTP/1.1 503")
            and "3 connections" in json.loads(text.partition("\r\n\r\n")[2])["error"]["message"]
        )
        for connection in open_ones:
            connection.close()
        time.sleep(0.2)
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_what_is_no_http_gets_the_apis_shape(serve):
    with serve() as server, connect(server) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        text = until_closed(connection).decode()
    assert (
        text.startswith("HTTP/1.1 400") and json.loads(text.partition("\r\n\r\n")[2])["error"]["code"] == "invalid_http"
    )


def test_coded_bodies_are_refused_by_name(serve, tools):
    with serve() as server:
        content = gzip.compress(json.dumps({"model": "tiny", "messages": [tools.user("q")]}).encode())
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        response = httpx.post(f"{server.base}/chat/completions", content=content, headers=headers)
        assert response.status_code == 415 and "content-encoding, got 'gzip'" in response.json()["error"]["message"]


def test_a_full_server_says_so_before_it_takes_in_a_body(serve, tools):
    with serve(batch_size=1, max_queue=0) as server:
        server.service.in_work = 1
        with connect(server) as connection:
            connection.sendall(f"{HEAD}Content-Length: 60000000\r\n\r\n".encode())
            assert whole_response(connection).startswith("HTTP/1.1 429")
        server.service.in_work = 0
        assert answered(server, tools).status_code == 200


def test_all_bodies_together_are_bounded(serve, tools):
    with serve(max_buffered=1_000_000) as server:
        opened = [connect(server) for _ in range(3)]
        for connection in opened[:2]:
            connection.sendall(f"{HEAD}Content-Length: 450000\r\n\r\n{{".encode())
        time.sleep(0.3)
        opened[2].sendall(f"{HEAD}Content-Length: 450000\r\n\r\n".encode())
        text = whole_response(opened[2])
        assert text.startswith("HTTP/1.1 429") and "as many bytes as it may" in text
        for connection in opened:
            connection.close()
        deadline = time.monotonic() + 10
        while answered(server, tools, metadata={"x": "y" * 900_000}).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("drain", [0, 0.5])
def test_stopping_ends_long_answers_with_an_error_of_the_api(hopping, tools, caplog, stream, drain):
    with hopping(3, seconds=0.05, drain_seconds=drain, max_tokens=200) as server, caplog.at_level(logging.WARNING):
        texts = []

        def ask():
            body = {"model": "tiny", "messages": [tools.user("q")], "max_tokens": 150, "ignore_eos": True}
            with httpx.stream(
                "POST", f"{server.base}/chat/completions", json={**body, "stream": stream}, timeout=60
            ) as r:
                texts.append((r.status_code, r.read().decode()))

        client = threading.Thread(target=ask)
        client.start()
        deadline = time.monotonic() + 20
        while not server.service.decoder.rows:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.3)
        began = time.monotonic()
        server.server.should_exit = True
        client.join(30)
        assert time.monotonic() - began < drain + 5
        ((status, text),) = texts
        if stream:
            assert status == 200
            error = json.loads([line for line in text.splitlines() if line.startswith("data: {")][-1][6:])["error"]
        else:
            assert status == 503
            error = json.loads(text)["error"]
        assert error["code"] == "stopping"
    assert not [record for record in caplog.records if record.exc_info]


def test_stopping_lets_answers_finish_that_can(hopping, tools):
    with hopping(3, seconds=0.02, drain_seconds=30) as server:
        answers = []
        client = threading.Thread(target=lambda: answers.append(answered(server, tools, max_tokens=30)))
        client.start()
        deadline = time.monotonic() + 20
        while not server.service.decoder.rows:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        server.server.should_exit = True
        client.join(30)
        assert answers[0].status_code == 200 and "5" in answers[0].json()["choices"][0]["message"]["content"]


def test_nobody_waits_for_somebody_elses_picture(serve, tools, monkeypatch):
    """Two requests whose large images take for ever; others with small images, or none, are answered meanwhile."""
    from vreflection.serving import prompts

    release, decode = threading.Event(), prompts.decode_image

    def slow(content, settings, param):
        if prompts.announced_pixels(content, settings, param) > settings.large_pixels:
            assert release.wait(60)
        return decode(content, settings, param)

    monkeypatch.setattr(prompts, "decode_image", slow)
    with serve(large_pixels=100_000) as server:
        large = tools.picture(width=600, height=400)
        texts = []

        def ask():
            messages = [tools.user("q", *[large] * 4)]
            texts.append(answered(server, tools, messages=messages).status_code)

        clients = [threading.Thread(target=ask) for _ in range(2)]
        for client in clients:
            client.start()
        time.sleep(0.3)
        assert answered(server, tools).status_code == 200
        assert answered(server, tools, messages=[tools.user("q", tools.picture(3))]).status_code == 200
        assert not texts
        release.set()
        for client in clients:
            client.join(60)
        assert len(texts) == 2


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_hosts_check_names(host):
    settings = ServeSettings(host=host, allowed_hosts=("proxy.example",))
    assert settings.hosts is not None and exposure(settings) is None


def test_host_names(serve):
    with serve(allowed_hosts=("Proxy.example",)) as server:
        for name, status in {
            "127.0.0.1": 200, "127.3.2.1:80": 200, "localhost:8000": 200, "LOCALHOST.": 200, "[::1]:1": 200,
            "proxy.example": 200, "proxy.example:443": 200, "evil.example": 421, "127.0.0.1.evil.example": 421, "": 421,
        }.items():  # fmt: skip
            assert httpx.get(f"{server.url}/health", headers={"Host": name}).status_code == status, name


def test_other_addresses_and_their_warning():
    assert ServeSettings(host="0.0.0.0").hosts is None
    assert ServeSettings(host="0.0.0.0", allowed_hosts=("a.example",)).hosts == ("0.0.0.0", "a.example")
    assert "no key" in exposure(ServeSettings(host="0.0.0.0"))
    assert exposure(ServeSettings(host="0.0.0.0", api_key="k")) is None


def test_ports_are_taken_before_anything_is_loaded():
    with bind("127.0.0.1", 0) as listener:
        address = listener.getsockname()
        with pytest.raises(ConnectionRefusedError):  # and not kept waiting while a model is loaded
            socket.create_connection(address, timeout=5)
        listener.listen()
        with pytest.raises(ConfigError, match="is in use; choose another with --port"):
            bind(*address)
    with pytest.raises(ConfigError, match="host: expected an address of this machine, got '192.0.2.7'"):
        bind("192.0.2.7", 0)
    with pytest.raises(ConfigError, match="host: expected an address of this machine"):
        bind("no-such-host.invalid", 0)


@pytest.mark.parametrize("key", ["", "two\nlines", "with blank", "schlüssel", "tab\t"])
def test_keys_that_no_client_could_send(key):
    with pytest.raises(ConfigError, match="api_key"):
        ServeSettings(api_key=key)
