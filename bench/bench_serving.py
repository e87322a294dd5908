"""Load on the server: requests per second and latency over concurrent clients, against one request at a time.

Two servers of the same model in processes of their own, asked in turn. Closed loop: a client sends its next request
when it has its answer. `SERVING_SOAK=10000` adds the long mixed run.
"""

import asyncio
import base64
import io
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CASE = Path(__file__).with_name("serving_case.py")
SECONDS = float(os.environ.get("SERVING_SECONDS", "2"))
TOKENS = 24


def start(batch: int):
    process = subprocess.Popen(
        [sys.executable, str(CASE), str(batch)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return process, int(process.stdout.readline())


@pytest.fixture(scope="module")
def servers():
    made = {"batched": start(32), "one at a time": start(1)}
    yield {name: port for name, (_, port) in made.items()}
    for process, _ in made.values():
        process.terminate()
        process.wait()


def picture(seed: int) -> str:
    held = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(held, "PNG")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def message(body: dict) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + content


def question(number: int, images: list[str]) -> dict:
    image = {"type": "image_url", "image_url": {"url": images[number % len(images)]}}
    text = {"type": "text", "text": f"what digit is on note {number % 5} ?"}
    messages = [{"role": "user", "content": [image, text]}]
    return {"model": "m", "messages": messages, "max_tokens": TOKENS, "latent": {"force": True}}


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return int(head.split(b" ", 2)[1]), await reader.readexactly(length)


async def client(port: int, sent: list[bytes], first: int, until: float, taken: list[float]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    number = first
    while time.monotonic() < until:
        began = time.monotonic()
        writer.write(sent[number % len(sent)])
        status, _ = await answer(reader)
        assert status == 200
        taken.append(time.monotonic() - began)
        number += 7
    writer.close()


def load(port: int, clients: int, sent: list[bytes]) -> dict[str, float]:
    taken: list[float] = []

    async def all_of_them():
        until = time.monotonic() + SECONDS
        await asyncio.gather(*(client(port, sent, n, until, taken) for n in range(clients)))

    began = time.monotonic()
    asyncio.run(all_of_them())
    seconds = time.monotonic() - began
    ordered = sorted(taken)
    at = lambda share: ordered[min(int(share * len(ordered)), len(ordered) - 1)]  # noqa: E731
    return {
        "requests_per_s": len(taken) / seconds,
        "p50_s": at(0.5),
        "p95_s": at(0.95),
        "p99_s": at(0.99),
        "n": len(taken),
    }


@pytest.mark.parametrize("clients", [32, 1, 8, 200, 4, 16, 64, 128])
def test_clients(benchmark, servers, lab, clients):
    images = [picture(seed) for seed in range(8)]
    sent = [message(question(number, images)) for number in range(40)]
    for port in servers.values():
        load(port, min(clients, 4), sent[:8])  # images encoded, buffers made
    rounds = {name: [load(port, clients, sent) for _ in range(2)] for name, port in servers.items()}
    middle = {
        name: {key: statistics.median(one[key] for one in found) for key in found[0]} for name, found in rounds.items()
    }
    seconds = {name: [1 / one["requests_per_s"] for one in found] for name, found in rounds.items()}
    sweep = {"figure": "serving", "axis": "clients", "value": clients, "count": 1}
    row = lab.timed_row(seconds, "one at a time", sweep=sweep)
    benchmark.extra_info.update({**row, "clients": clients, "load": middle, "rounds": rounds})
    benchmark.pedantic(lambda: None, rounds=1)
    shown = [
        f"{name} {row['requests_per_s']:.1f}/s (p50 {1e3 * row['p50_s']:.0f}, p95 {1e3 * row['p95_s']:.0f}, p99 "
        f"{1e3 * row['p99_s']:.0f} ms)"
        for name, row in middle.items()
    ]
    print(f"\n{clients} clients: {', '.join(shown)}: {row['speedup']['batched']:.1f}x")


@pytest.mark.skipif("SERVING_SOAK" not in os.environ, reason="minutes; SERVING_SOAK=10000 runs it")
def test_soak(benchmark):
    """Random disconnects, bad inputs and cancellations among many requests; answers equal those of one at a time."""
    total = int(os.environ["SERVING_SOAK"])
    process, port = start(32)
    images = [picture(seed) for seed in range(8)]
    bodies = [{**question(number, images), "max_tokens": 4 + number % 13} for number in range(40)]
    sent = [message(body) for body in bodies]
    memory = lambda: int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096  # noqa: E731

    async def alone():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        found = []
        for one in sent:
            writer.write(one)
            found.append(json.loads((await answer(reader))[1])["choices"])
        return found

    expected = asyncio.run(alone())
    draw, counts, held = random.Random(0), {"right": 0, "left": 0, "refused": 0}, []

    async def one(number: int, room: asyncio.Semaphore) -> None:
        async with room:
            kind, choice = draw.random(), number % len(sent)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                if kind < 0.1:
                    writer.write(message({"model": "m", "messages": [], "n": -1}))
                    assert (await answer(reader))[0] == 400
                    counts["refused"] += 1
                elif kind < 0.3:
                    stream = {**bodies[choice], "max_tokens": 100, "stream": kind < 0.2}
                    writer.write(message(stream))
                    await writer.drain()
                    await asyncio.sleep(draw.random() * 0.1)
                    counts["left"] += 1
                else:
                    writer.write(sent[choice])
                    status, body = await answer(reader)
                    assert status == 200 and json.loads(body)["choices"] == expected[choice]
                    counts["right"] += 1
            finally:
                writer.close()
            if number % 500 == 0:
                held.append(memory())

    async def crowd():
        room = asyncio.Semaphore(64)
        await asyncio.gather(*(one(number, room) for number in range(total)))

    began = time.monotonic()
    asyncio.run(crowd())
    seconds = time.monotonic() - began
    process.terminate()
    assert process.wait() == 0 and sum(counts.values()) == total
    benchmark.extra_info.update({"soak": counts, "seconds": seconds, "resident_bytes": held})
    benchmark.pedantic(lambda: None, rounds=1)
    print(f"\nsoak of {total}: {counts} in {seconds:.0f} s; resident MiB {[round(m / 2**20) for m in held]}")
