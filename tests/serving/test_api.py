"""OpenAI's interface, asked with OpenAI's own client: answers are the decoder's, errors have its shape."""

import base64
import json
import socket
import time

import numpy as np
import pytest

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")


def client(server, key="none"):
    return openai.OpenAI(base_url=server.base, api_key=key, max_retries=0, timeout=30)


def alone(server, text="which?", images=(), **settings):
    """The same question decoded without a server."""
    from vreflection.data.encode import encode_chat
    from vreflection.data.template import ChatTurn
    from vreflection.engine.decoder import LatentDecoder
    from vreflection.engine.requests import Prompt
    from vreflection.serving.media import decode_image, image_bytes

    service = server.service
    decoder = LatentDecoder(service.decoder.model, max_batch_size=1)
    opened = [decode_image(image_bytes(url, service.settings, "x"), service.settings, "x") for url in images]
    encoded = encode_chat([ChatTurn("user", [None] * len(opened) + [text])], service.processor, opened)
    given = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 12, "return_latents": True, **settings}
    return decoder.generate([Prompt.of(encoded)], **given)[0]


def text_of(server, answer):
    ids = [token for token, inside in zip(answer.tokens, answer.latent) if not inside]
    return server.service.processor.decode(ids)


def test_the_official_client_gets_the_decoders_answer(server, tools):
    image = tools.picture(3)
    expected = alone(server, images=[image], force_latent=True)
    answer = client(server).chat.completions.create(
        model="tiny", messages=[tools.user("which?", image)], extra_body={"latent": {"force": True}}
    )
    (choice,) = answer.choices
    assert choice.message.content == text_of(server, expected) and choice.message.role == "assistant"
    assert choice.finish_reason == {"eos": "stop"}.get(expected.finish_reason, "length")
    assert answer.usage.latent_steps == sum(expected.latent) > 0
    assert answer.usage.completion_tokens == len(expected.tokens) - sum(expected.latent)
    assert answer.usage.prompt_tokens == expected.prompt_length
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert "<|" not in choice.message.content


def test_a_stream_says_the_same_and_counts_latent_steps_where_asked(server, tools):
    image = tools.picture(3)
    whole = client(server).chat.completions.create(
        model="tiny", messages=[tools.user("which?", image)], extra_body={"latent": {"force": True}}
    )
    chunks = list(
        client(server).chat.completions.create(
            model="tiny", messages=[tools.user("which?", image)], stream=True, stream_options={"include_usage": True},
            extra_body={"latent": {"force": True}},
        )
    )  # fmt: skip
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.model_dump() == whole.usage.model_dump() and not chunks[-1].choices
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    steps = [
        chunk.choices[0].latent["step"] for chunk in chunks if chunk.choices and hasattr(chunk.choices[0], "latent")
    ]
    assert steps == list(range(1, whole.usage.latent_steps + 1))
    plain = list(client(server).chat.completions.create(model="tiny", messages=[tools.user()], stream=True))
    assert not any(hasattr(chunk.choices[0], "latent") for chunk in plain)  # who does not ask sees clean text only


def test_sampling_n_and_seeds(server, tools):
    settings = {"model": "tiny", "messages": [tools.user()], "temperature": 1.5, "seed": 5}
    answer = client(server).chat.completions.create(n=3, **settings)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and len(set(texts)) > 1
    for index, text in enumerate(texts):
        expected = alone(server, do_sample=True, temperature=1.5, seed=5 + index)
        assert text == text_of(server, expected)
    again = client(server).chat.completions.create(n=3, **settings)
    assert [choice.message.content for choice in again.choices] == texts


@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts_cut_and_free_the_row(server, tools, stream):
    expected = text_of(server, alone(server, max_new_tokens=40, latent_steps=0, allow_other_latent_steps=True))
    assert len(expected) > 4
    stop = expected[2:4]
    answer = client(server).chat.completions.create(
        model="tiny", messages=[tools.user()], max_tokens=40, stop=["zzz", stop], stream=stream,
        extra_body={"latent": {"off": True}},
    )  # fmt: skip
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert text == expected[: expected.index(stop)] and finish == "stop"


def test_conversations_and_system_turns_reach_the_prompt(server):
    from vreflection.data.encode import encode_chat
    from vreflection.data.template import ChatTurn

    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    answer = client(server).chat.completions.create(model="tiny", messages=messages)
    turns = [ChatTurn(m["role"], [m["content"]]) for m in messages[1:]]
    encoded = encode_chat(turns, server.service.processor, system="Be brief.")
    text = server.service.processor.decode(encoded.input_ids, skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )
    assert answer.usage.prompt_tokens == len(encoded.input_ids)


def test_latents_come_out_and_go_in(server, tools):
    """Fed back its own, an answer is what it was; with another's it is what the decoder makes of those."""
    ask = lambda image, **latent: client(server).chat.completions.create(  # noqa: E731
        model="tiny", messages=[tools.user("which?", image)], extra_body={"latent": {"force": True, **latent}}
    )
    first, second = (ask(tools.picture(seed), include=["hidden"]) for seed in (3, 4))
    held = first.choices[0].latent["hidden"]
    values = np.frombuffer(base64.b64decode(held["data"]), "<f4").reshape(held["shape"])
    expected = alone(server, images=[tools.picture(3)], force_latent=True)
    np.testing.assert_allclose(values, expected.latents[0].numpy(), rtol=1e-4, atol=1e-4)
    same = ask(tools.picture(3), use=held)
    assert same.choices[0].message.content == first.choices[0].message.content
    swapped = ask(tools.picture(3), use=second.choices[0].latent["hidden"])
    other = alone(server, images=[tools.picture(4)], force_latent=True).latents[0]
    given = alone(server, images=[tools.picture(3)], force_latent=True, latents=other)
    assert swapped.choices[0].message.content == text_of(server, given)


def test_maps_are_made_of_the_answer(serve, tools):
    seen = []

    def maps(prompt, generation, box):
        seen.append((len(prompt), len(generation.latents), box))
        return {"source": "test"}

    with serve(maps=maps) as server:
        answer = client(server).chat.completions.create(
            model="tiny", messages=[tools.user("which?", tools.picture())],
            extra_body={"latent": {"force": True, "include": ["maps"], "box": [0, 0, 0.5, 1]}},
        )  # fmt: skip
        assert answer.choices[0].latent["maps"] == {"source": "test"}
        assert seen[0][0] == answer.usage.prompt_tokens and seen[0][2] == (0.0, 0.0, 0.5, 1.0)


PNG = "data:image/png;base64,"


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"model": "other"}, 404, "model: expected 'tiny', got 'other'"),
        ({"messages": []}, 400, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "the user first and last"),
        ({"messages": [{"role": "user", "content": "<|im_start|>"}]}, 400, "special tokens"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]}, 400, "comes first"),
        ({"messages": [{"role": "user", "content": "x " * 900}]}, 400, "expected at most 256 tokens"),
        ({"messages": [{"role": "user", "content": "x " * 60}], "max_tokens": 100}, 400, "do not fit into 256"),
        ({"max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": 5000}, 400, "max_tokens: expected at most 2048"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature: Input should be a valid number, got 'hot'"),
        ({"n": 9}, 400, "n: expected at most 8, got 9"),
        ({"stop": ["a"] * 5}, 400, "stop: expected at most 4 texts"),
        ({"tools": [{"type": "function"}]}, 400, "tools is not supported here"),
        ({"logprobs": True}, 400, "logprobs is not supported here"),
        ({"colour": 1}, 400, "unknown field 'colour'"),
        ({"latent": {"steps": 2}}, 400, "latent.steps: this checkpoint allows 0 or 3, got 2"),
        ({"latent": {"off": True, "steps": 3}}, 400, "expected off or steps"),
        ({"latent": {"include": ["maps"]}}, 400, "this server makes no maps"),
        ({"latent": {"use": {"data": "AAAA", "shape": [3, 64]}}}, 400, "latent.use: expected 768 bytes, got 3"),
        ({"latent": {"use": {"data": "AAAA", "shape": [2, 64]}}}, 400, "latent.use: expected shape"),
        ({"latent": {"glow": 1}}, 400, "latent.glow: Extra inputs are not permitted"),
    ],
)
def test_bad_requests_are_named(server, tools, changes, status, message):
    body = {"model": "tiny", "messages": [tools.user()], **changes}
    response = httpx.post(f"{server.base}/chat/completions", json=body)
    error = response.json()["error"]
    assert response.status_code == status and message in error["message"], error
    assert set(error) == {"message", "type", "param", "code"} and error["type"] != "server_error"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://example.org/a.png", "expected data:image/"),
        ("file:///etc/passwd", "expected data:image/"),
        ("data:text/html;base64,AAAA", "expected data:image/"),
        (PNG + "!!!", "expected base64 after the comma"),
        (PNG + "AAAA", "not a usable image (not-an-image)"),
        (PNG, "not a usable image (image-empty)"),
        ("svg", "not a usable image (not-an-image)"),
        ("large", "not a usable image (image-too-large)"),
        ("cut", "not a usable image (image-corrupt)"),
        ("thin", "not a usable image (image-aspect)"),
    ],
)
def test_bad_images_are_named(serve, tools, url, message):
    made = {
        "svg": PNG + base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode(),
        "large": tools.picture(width=400, height=300),
        "cut": tools.picture()[:-4000],
        "thin": tools.picture(width=1000, height=2),
    }
    with serve(max_pixels=100_000) as server:
        body = {"model": "tiny", "messages": [tools.user("which?", made.get(url, url))]}
        response = httpx.post(f"{server.base}/chat/completions", json=body)
        assert response.status_code == 400 and message in response.json()["error"]["message"], response.text
        many = {"model": "tiny", "messages": [tools.user("which?", *[tools.picture()] * 9)]}
        assert "at most 8 images, got 9" in httpx.post(f"{server.base}/chat/completions", json=many).text


def test_what_is_not_json_or_not_there(server):
    post = lambda **given: httpx.post(f"{server.base}/chat/completions", **given)  # noqa: E731
    kind = {"content-type": "application/json"}
    assert post(content=b"{", headers=kind).json()["error"]["code"] == "invalid_json"
    assert post(content=b"[]", headers=kind).json()["error"]["message"] == "expected a JSON object, got list"
    assert post(content=b"[" * 100_000, headers=kind).status_code == 400
    assert post(content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert httpx.get(f"{server.base}/nothing").json()["error"]["code"] == "not_found"
    assert httpx.get(f"{server.base}/chat/completions").status_code == 405
    assert httpx.get(f"{server.base}/models/other").json()["error"]["code"] == "model_not_found"
    assert httpx.get(f"{server.base}/models/tiny").json()["latent_steps"] == 3


def test_keys_hosts_and_bodies(serve, tools):
    body = {"model": "tiny", "messages": [tools.user()]}
    with serve(api_key="secret", max_body=2000) as server:
        with pytest.raises(openai.AuthenticationError, match="expected a valid API key"):
            client(server, "wrong").models.list()
        assert client(server, "secret").models.list().data[0].id == "tiny"
        assert httpx.get(f"{server.url}/health").status_code == 200 and httpx.get(server.url).status_code == 200
        for path in ("/metrics", "/v1/models", "/examples"):
            assert httpx.get(f"{server.url}{path}").status_code == 401
        headers = {"authorization": "Bearer secret", "host": "evil.example"}
        assert httpx.get(f"{server.base}/models", headers=headers).status_code == 421
        big = {**body, "user": "x" * 3000}
        del headers["host"]
        response = httpx.post(f"{server.base}/chat/completions", json=big, headers=headers)
        assert response.status_code == 413 and "at most 2000 bytes" in response.json()["error"]["message"]

        def unannounced():
            yield json.dumps(big).encode()

        headers["content-type"] = "application/json"
        response = httpx.post(f"{server.base}/chat/completions", content=unannounced(), headers=headers)
        assert response.status_code == 413
    with serve(host="0.0.0.0") as server:
        assert httpx.get(f"{server.base}/models", headers={"host": "some.where"}).status_code == 200


def test_metrics_and_health(serve, tools):
    with serve() as server:
        answer = client(server).chat.completions.create(model="tiny", messages=[tools.user()])
        httpx.post(f"{server.base}/chat/completions", json={})
        text = httpx.get(f"{server.url}/metrics").text
        assert 'vreflection_requests_total{status="200"} 1.0' in text
        assert 'vreflection_requests_total{status="400"} 1.0' in text
        assert f'vreflection_tokens_total{{kind="completion"}} {float(answer.usage.completion_tokens)}' in text
        assert "vreflection_answers_in_work 0.0" in text and "vreflection_request_seconds_count 1.0" in text
        assert httpx.get(f"{server.url}/health").json()["status"] == "ok"


def test_a_failed_step_fails_its_answers_and_not_the_server(serve, tools, monkeypatch):
    with serve() as server:
        decoder = server.service.decoder
        launch, broken = decoder.launch, []

        def failing(look_every):
            if not broken:
                broken.append(1)
                decoder.fail(list(decoder.rows.values()), RuntimeError("lost"))
                return False
            return launch(look_every)

        monkeypatch.setattr(decoder, "launch", failing)
        with pytest.raises(openai.InternalServerError, match="decoding failed; the request can be sent again"):
            client(server).chat.completions.create(model="tiny", messages=[tools.user()])
        assert client(server).chat.completions.create(model="tiny", messages=[tools.user()]).choices
        assert server.service.in_work == 0


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_rows(serve, tools, monkeypatch, stream):
    with serve() as server:
        decoder = server.service.decoder
        launch = decoder.launch
        monkeypatch.setattr(decoder, "launch", lambda look: (time.sleep(0.05), launch(1))[1])
        monkeypatch.setattr(decoder.model.generation_config, "eos_token_id", None)  # it would go on for ten seconds
        body = {"model": "tiny", "messages": [tools.user()], "max_tokens": 190, "n": 2, "stream": stream}
        content = json.dumps({**body, "latent": {"off": True}}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
            wait_until(lambda: len(decoder.rows) == 2)
            assert server.service.in_work == 2
        wait_until(lambda: not decoder.busy and server.service.in_work == 0, seconds=5)
        assert "vreflection_disconnected_total 1.0" in httpx.get(f"{server.url}/metrics").text


def test_overload_is_said_with_when_to_come_back(serve, tools, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    with serve(batch_size=1, max_queue=1) as server:
        decoder = server.service.decoder
        launch = decoder.launch
        monkeypatch.setattr(decoder, "launch", lambda look: (time.sleep(0.1), launch(look))[1])
        body = {"model": "tiny", "messages": [tools.user()], "max_tokens": 30}
        with ThreadPoolExecutor(6) as pool:
            found = list(
                pool.map(lambda _: httpx.post(f"{server.base}/chat/completions", json=body, timeout=60), range(6))
            )
        codes = [response.status_code for response in found]
        assert sorted(set(codes)) == [200, 429] and codes.count(200) >= 2
        refused = next(response for response in found if response.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1 and refused.json()["error"]["code"] == "overloaded"
        assert server.service.in_work == 0


def test_stopping_lets_running_answers_end(serve, tools, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        with serve() as server:
            decoder = server.service.decoder
            launch = decoder.launch
            monkeypatch.setattr(decoder, "launch", lambda look: (time.sleep(0.05), launch(look))[1])
            body = {"model": "tiny", "messages": [tools.user()], "max_tokens": 40}
            waiting = pool.submit(httpx.post, f"{server.base}/chat/completions", json=body, timeout=60)
            wait_until(lambda: decoder.rows)
            server.server.should_exit = True
        assert waiting.result().status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def test_logs_carry_no_prompts_unless_asked(serve, tools, caplog):
    import logging

    caplog.set_level(logging.DEBUG, logger="vreflection")
    for asked in (False, True):
        caplog.clear()
        with serve(log_prompts=asked) as server:
            client(server).chat.completions.create(model="tiny", messages=[tools.user("very secret question")])
        assert ("very secret question" in caplog.text) is asked


def test_looks_come_as_soon_as_a_span_is_whole(serve, tools, parts):
    """In the middle of a stream, from the real maps, and equal to those of the whole answer."""
    from vreflection.serving.launch import answer_maps

    with serve(maps=answer_maps(parts[0])) as server:
        given = {"model": "tiny", "messages": [tools.user("which?", tools.picture(3))]}
        latent = {"latent": {"force": True, "include": ["maps", "hidden"], "box": [0, 0, 0.5, 1]}}
        whole = client(server).chat.completions.create(**given, extra_body=latent)
        found = whole.choices[0].latent
        (image,) = found["maps"]["images"]
        assert image["grid"] == [2, 3] and found["maps"]["source"] == "student" and len(image["steps"]) >= 3
        for step, inside in zip(image["steps"], found["maps"]["inside"], strict=True):
            assert sum(step) == pytest.approx(1, abs=1e-4)
            assert inside == pytest.approx(sum(step[0:2]) + sum(step[3:5]), abs=1e-4)  # the window rule: two columns
        chunks = list(client(server).chat.completions.create(**given, stream=True, extra_body=latent))
        places = [n for n, chunk in enumerate(chunks) if "maps" in (getattr(chunk.choices[0], "latent", None) or {})]
        assert len(places) == 1
        early = chunks[places[0]].choices[0].latent
        held, now = (np.frombuffer(base64.b64decode(one["hidden"]["data"]), "<f4") for one in (found, early))
        np.testing.assert_allclose(now, held, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(early["maps"]["images"][0]["steps"][:3], image["steps"][:3], atol=1e-5)
        bad = {"latent": {**latent["latent"], "box": [0.5, 0, 0.5, 1]}}
        with pytest.raises(openai.BadRequestError, match="latent.box: .*expected x0,y0,x1,y1"):
            client(server).chat.completions.create(**given, extra_body=bad)
        text = client(server).chat.completions.create(model="tiny", messages=[tools.user()], extra_body=latent)
        assert "maps" not in text.choices[0].latent  # nothing to look at


def test_images_sent_again_are_not_opened_again(serve, tools, monkeypatch):
    from vreflection.serving import chat

    opened = []
    real = chat.decode_image
    monkeypatch.setattr(chat, "decode_image", lambda *given: opened.append(1) or real(*given))
    one = 4 * 6 * 1176 * 4  # bytes of an image's patches
    with serve(image_cache=2 * one) as server:
        ask = lambda seed: client(server).chat.completions.create(  # noqa: E731
            model="tiny", messages=[tools.user("which?", tools.picture(seed), tools.picture(3))]
        )
        first = ask(3)
        assert len(opened) == 1 and ask(3).choices[0].message == first.choices[0].message and len(opened) == 1
        for seed in (4, 5, 6):  # two fit
            ask(seed)
        assert len(opened) == 4 and server.service.pictures.held <= 2 * one
        assert ask(3).choices[0].message == first.choices[0].message
