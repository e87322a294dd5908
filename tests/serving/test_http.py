"""The HTTP around the answers: paths, headers, counts, the log, and the model's card."""

import base64
import io
import logging
import socket
import time

import pytest
from PIL import Image

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")


def body(**more):
    return {"model": "tiny", "messages": [{"role": "user", "content": "which?"}], "max_tokens": 4, **more}


def counts(server):
    """Requests by status, from the metrics."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    pairs = [line.split() for line in lines if line.startswith("vreflection_requests_total{")]
    return {int(name.partition('"')[2].partition('"')[0]): float(count) for name, count in pairs}


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/models/tiny", "/examples", "/", "/page.js"])
def test_head_and_a_slash_at_the_end(server, path):
    plain = httpx.get(server.url + path)
    slash, head = httpx.get(f"{server.url}{path}/"), httpx.head(server.url + path)
    assert plain.status_code == slash.status_code == head.status_code == 200
    assert head.content == b"" and head.headers["content-type"] == plain.headers["content-type"]
    if path != "/metrics":
        assert slash.content == plain.content


def test_head_reaches_no_answer(server):
    for path in ("chat/completions", "responses", "completions"):
        assert httpx.head(f"{server.base}/{path}").status_code == 405
    assert httpx.head(f"{server.base}/nothing").status_code == 404


def test_answers_behind_a_slash(server):
    for path, more in (("chat/completions/", body()), ("completions/", {"model": "tiny", "prompt": "a"})):
        assert httpx.post(f"{server.base}/{path}", json=more, timeout=30).status_code == 200


def test_a_slash_opens_nothing_that_needs_a_key(serve):
    with serve(api_key="secret") as server:
        assert httpx.get(f"{server.url}/health/").status_code == 200
        for path in ("/v1/models/", "/metrics/", "/metrics//"):
            assert httpx.get(server.url + path).status_code == 401


def test_request_ids_are_the_clients_or_new(serve):
    with serve(api_key="secret") as server:
        url, key = f"{server.base}/chat/completions", {"authorization": "Bearer secret"}
        assert httpx.post(url, json=body(), headers={**key, "x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
        refused = httpx.post(url, json=body())  # by the guards, before the application
        assert refused.status_code == 401 and len(refused.headers["x-request-id"]) == 32
        for wrong in ("a b", "x" * 201, "\u00e9"):
            made = httpx.get(f"{server.url}/health", headers={"x-request-id": wrong.encode()}).headers["x-request-id"]
            assert len(made) == 32
        client = openai.OpenAI(base_url=server.base, api_key="secret", max_retries=0)
        first, second = (client.chat.completions.create(**body())._request_id for _ in range(2))
        assert first and second and first != second
        stream = httpx.post(url, json=body(stream=True), headers={**key, "x-request-id": "abc-2"})
        assert stream.headers["x-request-id"] == "abc-2"


def test_refused_requests_are_counted(serve):
    with serve(api_key="secret", max_body=2000) as server:
        key = {"authorization": "Bearer secret"}
        url = f"{server.base}/chat/completions"
        httpx.post(url, json=body(), headers=key)
        httpx.post(f"{server.base}/responses", json={"model": "tiny", "input": "a", "stream": True}, headers=key)
        httpx.post(url, json=body())
        httpx.post(url, content=b"{}", headers={**key, "content-type": "text/plain"})
        httpx.post(url, json=body(user="x" * 3000), headers=key)
        httpx.post(url, json={}, headers=key)
        httpx.post(f"{server.base}/completions", json={"model": "other", "prompt": "a"}, headers=key)
        httpx.get(f"{server.base}/models")  # no answer was requested
        text = httpx.get(f"{server.url}/metrics", headers=key).text
        for status, count in ((200, 2), (401, 1), (415, 1), (413, 1), (400, 1), (404, 1)):
            assert f'vreflection_requests_total{{status="{status}"}} {count}.0' in text


def test_a_client_that_vanishes_while_sending_is_no_failure(serve, caplog):
    with serve() as server:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
            time.sleep(0.2)
        deadline = time.monotonic() + 10
        while "vreflection_disconnected_total 1.0" not in httpx.get(f"{server.url}/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert 500 not in counts(server)
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_names_with_a_slash(serve):
    with serve(name="Qwen/x") as server:
        for path in ("Qwen/x", "Qwen%2Fx", "Qwen/x/"):
            assert httpx.get(f"{server.base}/models/{path}").json()["id"] == "Qwen/x"
        client = openai.OpenAI(base_url=server.base, api_key="none", max_retries=0)
        assert client.models.retrieve("Qwen/x").id == client.models.list().data[0].id == "Qwen/x"
        assert httpx.get(f"{server.base}/models/Qwen").status_code == 404


def test_the_card_tells_the_limits(serve):
    with serve(max_tokens=77) as server:
        card = httpx.get(f"{server.base}/models/tiny").json()
        assert card["max_tokens"] == 77 and card["max_model_len"] == 256
        assert httpx.get(f"{server.url}/examples").json()["model"]["max_tokens"] == 77


def test_more_answers_than_there_is_ever_room_for_are_refused_for_good(serve):
    with serve(batch_size=1, max_queue=0) as server:
        refused = httpx.post(f"{server.base}/chat/completions", json=body(n=2))
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "n"
        assert "expected at most 1 answers to a request" in refused.json()["error"]["message"]
        refused = httpx.post(f"{server.base}/completions", json={"model": "tiny", "prompt": ["a", "b"]})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt"
        assert httpx.post(f"{server.base}/chat/completions", json=body(n=1)).status_code == 200


def test_the_log_holds_texts_and_no_images(serve, tools, caplog):
    caplog.set_level(logging.INFO, logger="vreflection")
    url = tools.picture(3)
    image = {"type": "input_image", "image_url": url}
    with serve(log_prompts=True) as server:
        httpx.post(f"{server.base}/chat/completions", json=body(messages=[tools.user("secret one", url)]))
        item = {"role": "user", "content": [{"type": "input_text", "text": "secret two"}, image]}
        httpx.post(f"{server.base}/responses", json={"model": "tiny", "input": [item]})
        httpx.post(f"{server.base}/completions", json={"model": "tiny", "prompt": "secret three"})
    assert all(f"secret {number}" in caplog.text for number in ("one", "two", "three"))
    length = len(url.partition(",")[2])
    assert caplog.text.count(f"<image image/png;base64, {length} characters>") == 2 and url[-40:] not in caplog.text


def test_bodies_of_too_many_values_are_refused_unread(server):
    content = b'{"model": "tiny", "prompt": [' + b"1," * 2**18 + b"1]}"
    refused = httpx.post(f"{server.base}/completions", content=content, headers={"content-type": "application/json"})
    assert refused.status_code == 413 and refused.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("path", "more"), [("chat/completions", {}), ("responses", {"input": "a", "max_output_tokens": 4})]
)
def test_a_stream_that_breaks_says_so(serve, monkeypatch, path, more):
    """Whatever breaks: it ends with an error that clients raise, not as if the answer were whole."""
    with serve() as server:

        async def broken(*_, **__):
            raise RuntimeError("lost")

        monkeypatch.setattr(server.service, "details", broken)
        fields = body(stream=True) if not more else {"model": "tiny", "stream": True, **more}
        text = httpx.post(f"{server.base}/{path}", json=fields, timeout=30).text
        assert '"code": "internal"' in text and "its log says how" in text
        assert '"response.completed"' not in text and '"finish_reason": "' not in text
        assert server.service.in_work == 0


def address(*size):
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def test_low_detail_means_fewer_pixels(parts):
    """A large image is made to fit into 512 pixels a side; a small one, and other details, stay as they are."""
    from vreflection.serving.conversation import ImageReference
    from vreflection.serving.prompts import Pictures
    from vreflection.serving.settings import ServeSettings

    sizes = []

    class Sizes:
        def process_images(self, images):
            sizes.append(images[0].size)
            return parts[1].process_images(images)

    pictures = Pictures(Sizes(), ServeSettings())
    large, small, thin = address(1024, 600), address(300, 200), address(3900, 20)
    requests = ((large, "low"), (large, "auto"), (large, "high"), (small, "low"), (thin, "low"))
    keys = [pictures.decode(pictures.read(ImageReference(url, detail, "x")))[0] for url, detail in requests]
    assert sizes == [(512, 300), (1024, 600), (300, 200), (512, 3)]
    assert keys[0] != keys[1] == keys[2]
