"""The real application under uvicorn, in a thread, on a tiny model."""

import base64
import contextlib
import io
import shutil
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="vreflection[serve] is not installed")

from vreflection.model.modeling import VReflectionForConditionalGeneration
from vreflection.model.processor import VReflectionProcessor
from vreflection.serving.app import create_app, make_service
from vreflection.serving.server import Server, bind
from vreflection.serving.settings import ServeSettings


def picture(seed=0, width=84, height=56, kind="PNG"):
    """A data address of a random image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(held.getvalue()).decode()}"


def user(text="which?", *images):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


@contextlib.contextmanager
def running(app, service):
    """Serve an application until the block ends."""
    server = Server(app, service, service.settings, lambda port: None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bind("127.0.0.1", 0)]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    try:
        yield SimpleNamespace(url=url, base=f"{url}/v1", port=port, service=service, app=app, server=server)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def parts(checkpoint):
    """The tiny model and its processor, loaded once."""
    model = VReflectionForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return model, VReflectionProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def serve(parts):
    """`with serve(**settings) as server`: a server of its own."""

    @contextlib.contextmanager
    def start(maps=None, examples=None, **settings):
        given = {"name": "tiny", "batch_size": 4, "max_queue": 8, "max_length": 256, "default_tokens": 12, **settings}
        made = ServeSettings(**given)
        service = make_service(*parts, made, maps)
        with running(create_app(service, made, examples), service) as server:
            yield server

    return start


@pytest.fixture(scope="module")
def server(serve):
    """One server for a file of tests that leave it as it was."""
    with serve() as made:
        yield made
        assert made.service.in_work == 0 and not made.service.decoder.busy


def follow_script(decoder, processor, text):
    """From now on a decoder's answers are this text, special tokens and all; what the latents hold stays its own."""
    script = torch.tensor(processor.tokenizer.encode(text))

    def pick(hidden_BD, needed, rows, plan, state):
        return script[state.counted.clamp(max=len(script) - 1)]

    decoder.step.pick = pick


def hops(count, answer="<answer> 5 </answer>"):
    """The text of an answer that opens so many spans."""
    return "<|lvr_start|><|lvr_end|>" * count + f"\n{answer}<|im_end|>"


@pytest.fixture(scope="session")
def tools():
    """Builders of this file."""
    return SimpleNamespace(picture=picture, user=user, follow_script=follow_script, hops=hops)


@pytest.fixture
def hopping(serve, parts):
    """`with hopping(3) as server`: answers open three spans, then say 5; with real maps."""
    from vreflection.serving.launch import answer_maps

    @contextlib.contextmanager
    def start(count, text=None, seconds=0.0, **settings):
        """`seconds`: that each step takes longer."""
        with serve(maps=answer_maps(parts[0]), **{"default_tokens": 64, **settings}) as server:
            decoder = server.service.decoder
            follow_script(decoder, parts[1], hops(count) if text is None else text)
            launch = decoder.launch
            decoder.launch = lambda look_every: (time.sleep(seconds), launch(look_every))[1]
            yield server

    return start


@pytest.fixture(scope="module")
def browser():
    """Chromium. Open for one file only: while it is, this thread runs no other event loop."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("needs chromium (Debian: apt install chromium)")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()
