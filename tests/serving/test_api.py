"""OpenAI's interface, asked with OpenAI's own client: answers are the decoder's, errors have its shape."""

import asyncio
import base64
import json
import socket
import time

import numpy as np
import pytest
import torch

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
    if "pick" in vars(service.decoder.step):  # it follows a script
        decoder.step.pick = service.decoder.step.pick
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
    events = [chunk.choices[0].latent for chunk in chunks if chunk.choices and hasattr(chunk.choices[0], "latent")]
    total = whole.usage.latent_steps
    assert events == [{"step": n + 1, "span": n // 3, "span_step": n % 3 + 1} for n in range(total)]
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


def unpacked(hidden):
    return np.frombuffer(base64.b64decode(hidden["data"]), "<f4").reshape(hidden["shape"]).copy()


def packed(values):
    return {"data": base64.b64encode(values.numpy().astype("<f4").tobytes()).decode(), "shape": list(values.shape)}


def test_latents_come_out_and_go_in(server, tools):
    """Fed back its own, an answer is what it was; with another's it is what the decoder makes of those."""
    ask = lambda image, **latent: client(server).chat.completions.create(  # noqa: E731
        model="tiny", messages=[tools.user("which?", image)], extra_body={"latent": {"force": True, **latent}}
    )
    first, second = (ask(tools.picture(seed), include=["hidden"]) for seed in (3, 4))
    hidden = first.choices[0].latent["hidden"]
    expected = alone(server, images=[tools.picture(3)], force_latent=True)
    assert hidden["shape"] == list(expected.latents.shape)
    np.testing.assert_allclose(unpacked(hidden), expected.latents.numpy(), rtol=1e-4, atol=1e-4)
    same = ask(tools.picture(3), use=hidden)
    assert same.choices[0].message.content == first.choices[0].message.content
    swapped = ask(tools.picture(3), use=second.choices[0].latent["hidden"])
    other = alone(server, images=[tools.picture(4)], force_latent=True).latents
    direct = alone(server, images=[tools.picture(3)], force_latent=True, latents=other)
    assert swapped.choices[0].message.content == text_of(server, direct)


def test_latents_of_several_spans_come_out_and_go_in(hopping, tools):
    with hopping(3) as server:
        ask = lambda image, **latent: client(server).chat.completions.create(  # noqa: E731
            model="tiny",
            messages=[tools.user("which?", image)],
            extra_body={"latent": {"include": ["hidden"], **latent}},
        )
        answer = ask(tools.picture(4))
        assert answer.usage.latent_steps == 9 and answer.choices[0].message.content == "\n<answer> 5 </answer>"
        values = torch.tensor(unpacked(answer.choices[0].latent["hidden"]))
        assert values.shape == (3, 3, 64) and answer.choices[0].latent["spans"] == 3
        np.testing.assert_allclose(values, alone(server, images=[tools.picture(4)]).latents, rtol=1e-4, atol=1e-4)
        # All spans of another answer; its first for every span; its second for the second alone; the first two, packed
        # together and apart.
        first = values[0]
        for use, latents in (
            (packed(values), values),
            (packed(first), first),
            ([None, packed(values[1]), None], [None, values[1], None]),
            (packed(values[:2]), values[:2]),
            ([packed(values[:1]), packed(values[1])], values[:2]),
        ):
            swapped = unpacked(ask(tools.picture(3), use=use).choices[0].latent["hidden"])
            direct = alone(server, images=[tools.picture(3)], latents=latents)
            np.testing.assert_allclose(swapped, direct.latents, rtol=1e-4, atol=1e-4)
            np.testing.assert_array_equal(swapped[1], first if latents is first else values[1])


def test_maps_are_made_of_the_answer(serve, tools):
    seen = []

    def maps(prompt, generation, boxes, first_span):
        seen.append((len(prompt), len(generation.latents), boxes, first_span))
        return {"source": "test"}

    with serve(maps=maps) as server:
        answer = client(server).chat.completions.create(
            model="tiny", messages=[tools.user("which?", tools.picture())],
            extra_body={"latent": {"force": True, "include": ["maps"], "box": [0, 0, 0.5, 1]}},
        )  # fmt: skip
        assert answer.choices[0].latent["maps"] == {"source": "test"}
        ((length, spans, boxes, first_span),) = seen
        assert length == answer.usage.prompt_tokens and boxes == [(0.0, 0.0, 0.5, 1.0)] and spans and first_span == 0


PNG = "data:image/png;base64,"


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"model": "other"}, 404, "model: expected 'tiny', got 'other'"),
        ({"messages": []}, 400, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role: expected one of system, developer"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content: expected text or a list of parts, got none"),
        ({"messages": [{"role": "user", "content": "<|im_start|>"}]}, 400, "special tokens"),
        ({"messages": [{"role": "user", "content": "x " * 900}]}, 400, "expected at most 256 tokens"),
        ({"messages": [{"role": "user", "content": "x " * 60}], "max_tokens": 100}, 400, "do not fit into 256"),
        ({"max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature: Input should be a valid number, got 'hot'"),
        ({"n": 9}, 400, "n: expected at most 8 answers to a request, got 9"),
        ({"stop": ["a"] * 5}, 400, "stop: expected at most 4 texts"),
        ({"tools": [{"type": "function"}]}, 400, "tools is not supported here"),
        ({"top_logprobs": 2}, 400, "top_logprobs: expected logprobs: true beside it"),
        ({"colour": 1}, 400, "unknown field 'colour'"),
        ({"latent": {"steps": 2}}, 400, "latent.steps: this checkpoint allows 0 or 3, got 2"),
        ({"latent": {"off": True, "steps": 3}}, 400, "expected off or steps"),
        ({"latent": {"include": ["maps"]}}, 400, "this server makes no maps"),
        ({"latent": {"use": {"data": "AAAA", "shape": [3, 64]}}}, 400, "latent.use: expected 768 bytes, got 3"),
        (
            {"latent": {"use": {"data": "AAAA", "shape": [2, 64]}}},
            400,
            "latent.use: expected shape (3, 64) or (spans, 3, 64) with 1 to 8 spans, got (2, 64)",
        ),
        (
            {"latent": {"use": {"data": "AAAA", "shape": [0, 3, 64]}}},
            400,
            "or (spans, 3, 64) with 1 to 8 spans, got (0, 3, 64)",
        ),
        ({"latent": {"use": {"data": "AAAA", "shape": [2, 3, 64]}}}, 400, "latent.use: expected 1536 bytes, got 3"),
        ({"latent": {"use": {"data": "AAAA", "shape": [3]}}}, 400, "latent.use"),
        ({"latent": {"use": []}}, 400, "latent.use: expected 1 to 8 spans, got 0"),
        ({"latent": {"use": [None] * 9}}, 400, "latent.use: expected 1 to 8 spans, got 9"),
        ({"latent": {"boxes": []}}, 400, "latent.boxes: expected 1 to 8 boxes, one per span, got 0"),
        ({"latent": {"boxes": [[0, 0, 1, 1]] * 9}}, 400, "latent.boxes: expected 1 to 8 boxes, one per span, got 9"),
        ({"latent": {"boxes": [[0, 0, 1, 1]], "box": [0, 0, 1, 1]}}, 400, "expected box or boxes, got both"),
        ({"latent": {"boxes": [[0, 0, 1]]}}, 400, "latent.boxes.0"),
        (
            {"messages": [{"role": "user", "content": "x"}], "max_tokens": 175},
            400,
            "175 new ones and 8 spans of 3 latent",
        ),
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


def test_looks_come_as_soon_as_a_span_is_whole(hopping, tools):
    """In the middle of a stream, span by span, from the real maps, and together those of the whole answer."""
    with hopping(3, seconds=0.03) as server:
        given = {"model": "tiny", "messages": [tools.user("which?", tools.picture(3))]}
        boxes = [[0, 0, 0.5, 1], [0.4, 0, 1, 1]]  # by the window rule the first two and the last two columns of three
        latent = {"latent": {"include": ["maps", "hidden"], "boxes": boxes}}
        whole = client(server).chat.completions.create(**given, extra_body=latent)
        found = whole.choices[0].latent
        (image,) = found["maps"]["images"]
        assert image["grid"] == [2, 3] and found["maps"]["source"] == "student" and len(image["steps"]) >= 3
        count = len(image["steps"])
        assert count == 9 and found["maps"]["span"] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert found["steps"] == whole.usage.latent_steps == 9 and found["spans"] == 3
        for step, span, inside in zip(image["steps"], found["maps"]["span"], found["maps"]["inside"], strict=True):
            assert sum(step) == pytest.approx(1, abs=1e-4)
            if span < 2:
                assert inside == pytest.approx(sum(np.reshape(step, (2, 3))[:, span : span + 2].flat), abs=1e-4)
            else:
                assert inside is None
        one = client(server).chat.completions.create(
            **given, extra_body={"latent": {"include": ["maps"], "box": boxes[0]}}
        )
        for step, inside in zip(image["steps"], one.choices[0].latent["maps"]["inside"], strict=True):
            assert inside == pytest.approx(sum(step[0:2]) + sum(step[3:5]), abs=1e-4)
        chunks = list(client(server).chat.completions.create(**given, stream=True, extra_body=latent))
        places = [n for n, chunk in enumerate(chunks) if "maps" in (getattr(chunk.choices[0], "latent", None) or {})]
        assert len(places) == 3
        parts_sent = [chunks[place].choices[0].latent for place in places]
        together = np.concatenate([unpacked(part["hidden"]) for part in parts_sent])
        np.testing.assert_allclose(together, unpacked(found["hidden"]), rtol=1e-4, atol=1e-5)
        for name in ("span", "inside"):
            values = [value for part in parts_sent for value in part["maps"][name]]
            assert values == pytest.approx(found["maps"][name], abs=1e-5)
        steps = [step for part in parts_sent for step in part["maps"]["images"][0]["steps"]]
        np.testing.assert_allclose(steps, image["steps"], atol=1e-5)
        assert [part["spans"] for part in parts_sent] == [1, 2, 3]
        events = [getattr(chunk.choices[0], "latent", None) for chunk in chunks]
        steps = [event for event in events if event and "step" in event]
        assert steps == [{"step": n + 1, "span": n // 3, "span_step": n % 3 + 1} for n in range(9)]
        # A span's looks come before the next one's last step.
        for span, place in enumerate(places[:2]):
            assert place < events.index(steps[3 * span + 5])
        for bad, param in (({"box": [0.5, 0, 0.5, 1]}, "box"), ({"boxes": [boxes[0], [0.5, 0, 0.5, 1]]}, "boxes.1")):
            asked = {"latent": {"force": True, "include": ["maps"], **bad}}
            with pytest.raises(openai.BadRequestError, match=f"latent.{param}: .*expected x0,y0,x1,y1"):
                client(server).chat.completions.create(**given, extra_body=asked)
        text = client(server).chat.completions.create(model="tiny", messages=[tools.user()], extra_body=latent)
        assert "maps" not in text.choices[0].latent  # nothing to look at


def test_what_is_sent_counts_the_steps_of_its_spans_however_late_it_is_made(hopping, tools, monkeypatch):
    from vreflection.serving.service import AnswerService

    details = AnswerService.details

    async def late(self, job, choice, so_far=False):
        await asyncio.sleep(0.2 * so_far)
        return await details(self, job, choice, so_far)

    monkeypatch.setattr(AnswerService, "details", late)
    with hopping(3, seconds=0.03) as server:
        chunks = client(server).chat.completions.create(
            model="tiny", messages=[tools.user("which?", tools.picture(3))], stream=True,
            extra_body={"latent": {"include": ["hidden"]}},
        )  # fmt: skip
        latents = [getattr(chunk.choices[0], "latent", None) or {} for chunk in chunks]
    parts = [part for part in latents if "hidden" in part]
    assert parts[0]["spans"] > 1
    assert all(part["steps"] >= 3 * part["spans"] for part in parts)


def test_images_sent_again_are_not_opened_again(serve, tools, monkeypatch):
    from vreflection.serving import prompts

    opened = []
    real = prompts.decode_image
    monkeypatch.setattr(prompts, "decode_image", lambda *given: opened.append(1) or real(*given))
    one = 4 * 6 * 1176 * 4  # bytes of an image's patches
    with serve(image_cache=2 * one) as server:
        ask = lambda seed: client(server).chat.completions.create(  # noqa: E731
            model="tiny", messages=[tools.user("which?", tools.picture(seed), tools.picture(3))]
        )
        first = ask(3)
        assert len(opened) == 1 and ask(3).choices[0].message == first.choices[0].message and len(opened) == 1
        for seed in (4, 5, 6):  # two fit
            ask(seed)
        assert len(opened) == 4 and server.service.prompts.pictures.kept_bytes <= 2 * one
        assert ask(3).choices[0].message == first.choices[0].message
