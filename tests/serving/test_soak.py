"""Many clients at once, some of which leave or send nonsense: every answer is the one it would be alone."""

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest

httpx = pytest.importorskip("httpx")

REQUESTS = 400
NONSENSE = [
    {}, {"model": "tiny"}, {"model": "tiny", "messages": "x"},
    {"model": "no", "messages": [{"role": "user", "content": "a"}]},
    {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "n": 10**9},
]  # fmt: skip


def question(tools, number):
    """Distinct ones, some with images, sampling and forced spans."""
    images = [tools.picture(number % 3)] if number % 2 else []
    body = {"model": "tiny", "messages": [tools.user(f"q{number % 23}", *images)], "max_tokens": 4 + number % 9}
    if number % 3 == 0:
        body |= {"temperature": 1.3, "seed": number % 7}
    if number % 4 == 0:
        body["latent"] = {"force": True}
    return body


def test_no_answer_is_lost_or_mixed_up(serve, tools):
    """Against the answers of one request at a time; clients leave at random moments, and memory stays where it is."""
    kinds = sorted({key(question(tools, n)) for n in range(REQUESTS)})
    with serve(batch_size=8, max_queue=400) as server:

        async def alone():
            async with httpx.AsyncClient(base_url=server.base, timeout=60) as client:
                found = {}
                for n in range(REQUESTS):
                    body = question(tools, n)
                    if key(body) not in found:
                        response = await client.post("/chat/completions", json=body)
                        found[key(body)] = response.json()["choices"][0]["message"]["content"]
                return found

        expected = asyncio.run(alone())
        assert sorted(expected) == kinds and len(set(expected.values())) > 5
        draw = random.Random(0)
        plans = [(n, draw.random(), draw.random() * 0.05) for n in range(REQUESTS)]

        async def crowd():
            limits = httpx.Limits(max_connections=40)
            async with httpx.AsyncClient(base_url=server.base, timeout=60, limits=limits) as client:
                room = asyncio.Semaphore(40)
                return await asyncio.gather(*(one(client, room, tools, expected, *plan) for plan in plans))

        outcomes = asyncio.run(crowd())
        assert outcomes.count("left") > 20 and outcomes.count("refused") > 20 and outcomes.count("right") > 250
        assert set(outcomes) == {"left", "refused", "right"}
        deadline = time.monotonic() + 10
        while server.service.in_work or server.service.decoder.busy:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not server.service.worker.sinks


def key(body):
    return repr({name: value for name, value in body.items() if name != "model"})


async def one(client, room, tools, expected, number, kind, moment):
    async with room:
        if kind < 0.12:
            response = await client.post("/chat/completions", json=NONSENSE[number % len(NONSENSE)])
            assert 400 <= response.status_code < 500 and response.json()["error"]["message"]
            return "refused"
        body = question(tools, number)
        if kind < 0.3:  # leaves somewhere on the way
            task = asyncio.ensure_future(client.post("/chat/completions", json={**body, "max_tokens": 60}))
            await asyncio.sleep(moment)
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                return "left"
            return "right"  # it was faster
        response = await client.post("/chat/completions", json=body)
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["message"]["content"] == expected[key(body)]
        return "right"


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def start(checkpoint, port):
    command = [sys.executable, "-m", "vreflection", "serve", "--model", str(checkpoint), "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--name", "tiny", "--max-length", "256", "--no-examples"], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for line in process.stderr:
        if f"http://127.0.0.1:{port}" in line:
            return process
    raise AssertionError(f"ended with {process.wait()}")


def test_killed_and_started_again(checkpoint, tools):
    """Clients see a closed connection, the next start needs nothing repaired, and SIGTERM ends it with 0."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    body = {"model": "tiny", "messages": [tools.user("q", tools.picture())], "max_tokens": 6}
    process = start(checkpoint, port)
    try:
        before = httpx.post(url, json=body, timeout=60).json()["choices"][0]["message"]
        with httpx.stream("POST", url, json={**body, "stream": True}) as response:
            process.send_signal(signal.SIGKILL)
            process.wait()
            with pytest.raises(httpx.HTTPError):
                for _ in response.iter_bytes():
                    pass
                httpx.get(url)  # had it all arrived already
        with pytest.raises(httpx.ConnectError):
            httpx.post(url, json=body)
        process = start(checkpoint, port)
        assert httpx.post(url, json=body, timeout=60).json()["choices"][0]["message"] == before
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere"], "expected a checkpoint folder"),
        (["--port", "70000"], "port: expected 0 to 65535"),
        (["--api-key-file", "nowhere"], "api_key_file: expected a readable text file"),
        (["--device", "cuda:7"], "device: this machine and this PyTorch offer cpu"),
        (["--max-length", "10000000"], "positions, got 10000000; choose at most as many"),
        (["--host", "192.0.2.7"], "host: expected an address of this machine"),
        (["--model", "no-such-owner/no-such-model"], "model: expected a checkpoint folder or a hub id"),
        (["--dtype", "int4"], "dtype: expected one of"),
        (["--device", "tpu9"], "device: expected such as cpu"),
    ],
)
def test_bad_flags(checkpoint, monkeypatch, capsys, flags, message):
    from vreflection.cli import main

    words = ["vreflection", "serve", *([] if "--model" in flags else ["--model", str(checkpoint)]), *flags]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_start_up_errors_come_before_the_model(checkpoint, tmp_path, monkeypatch, command_line):
    """One sentence and exit code 2; nothing is loaded for a port in use or a key that is none."""
    from vreflection.serving import launch

    monkeypatch.setattr(launch, "load_served", lambda *_: pytest.fail("the model was loaded first"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = command_line("serve", "--model", checkpoint, "--port", taken.getsockname()[1])
    assert ended.returncode == 2 and "is in use; choose another with --port" in ended.stderr
    for content, message in {
        b"\xff\xfe\x00k": "expected a readable text file",
        b"a\nb": "one line of printable",
    }.items():
        (tmp_path / "key").write_bytes(content)
        ended = command_line("serve", "--model", checkpoint, "--api-key-file", tmp_path / "key")
        assert ended.returncode == 2 and message in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize("content", [b"secret\n", b"\xef\xbb\xbfsecret", b"  secret \r\n"])
def test_blanks_and_a_byte_order_mark_around_a_key(tmp_path, monkeypatch, content):
    from vreflection.cli.serve import api_key

    (tmp_path / "key").write_bytes(content)
    assert api_key(tmp_path / "key") == "secret"
    monkeypatch.setenv("VREFLECTION_API_KEY", " secret\n")
    assert api_key(None) == "secret"
