"""Bodies as real clients send them: accepted, and read as what they mean."""

import json

import pytest

httpx = pytest.importorskip("httpx")

CALL = {"id": "call_1", "type": "function", "function": {"name": "zoom", "arguments": '{"x": 1}'}}


def image(url, **more):
    return {"type": "image_url", "image_url": {"url": url, **more}}


def text(words="which?", **more):
    return {"type": "text", "text": words, **more}


# Each client's default body for a question about an image, `URL` standing for the image's address.
URL = "URL"
PNG = "data:image/png;base64,"
CHAT_BODIES = {
    "openai sdk": {
        "messages": [{"role": "user", "content": [text(), image(URL)]}],
        "model": "tiny",
    },
    "openai sdk, streaming": {
        "messages": [{"role": "user", "content": [text(), image(URL, detail="high")]}],
        "model": "tiny",
        "stream": True,
        "stream_options": {"include_usage": True, "include_obfuscation": False},
    },
    "langchain ChatOpenAI": {
        "messages": [
            {"content": "Be brief.", "role": "system"},
            {"content": [text(), image(URL)], "role": "user"},
        ],
        "model": "tiny",
        "stream": False,
        "temperature": 0.7,
        "max_completion_tokens": 16.0,
        "n": 1,
    },
    "langchain ChatOpenAI, streaming": {
        "messages": [{"content": [text(), image(URL)], "role": "user"}],
        "model": "tiny",
        "stream": True,
        "stream_options": {"include_usage": None},
        "parallel_tool_calls": None,
        "logit_bias": None,
        "response_format": None,
        "tools": None,
    },
    "litellm": {
        "model": "tiny",
        "messages": [
            {"role": "user", "content": [text(cache_control={"type": "ephemeral"}), image(URL, format="image/png")]}
        ],
        "max_tokens": 16,
        "user": "someone",
        "metadata": {"requester": "proxy"},
        "seed": 1,
        "tools": [],
        "tool_choice": "auto",
        "reasoning_effort": "low",
    },
    "ai sdk": {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [text(), image(URL)]},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "open webui": {
        "stream": True,
        "model": "tiny",
        "messages": [{"role": "user", "content": [text(), image(URL)]}],
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "stop": ["\n\n\n"],
        "logit_bias": {},
        "max_tokens": 128.0,
    },
    "lmms-eval": {
        "model": "tiny",
        "messages": [{"role": "user", "content": [image(URL), text()]}],
        "max_tokens": 4096,
        "temperature": 0,
    },
    "vlmevalkit": {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [image(URL, detail="low"), text()]},
        ],
        "max_tokens": 2048,
        "n": 1,
        "temperature": 0,
        "top_k": None,
        "stop": None,
    },
    "vllm clients": {
        "model": "tiny",
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": URL, "uuid": None}, text()]}],
        "max_tokens": 8,
        "min_tokens": 0,
        "temperature": 0.0,
        "top_p": 0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "ignore_eos": False,
        "stop_token_ids": [],
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "use_beam_search": False,
        "best_of": 1,
        "length_penalty": 1.0,
        "early_stopping": False,
        "include_stop_str_in_output": False,
        "add_generation_prompt": True,
        "continue_final_message": False,
        "chat_template_kwargs": {"enable_thinking": False},
        "mm_processor_kwargs": {},
        "request_id": "a",
        "priority": 0,
        "cache_salt": "b",
        "logprobs": False,
        "top_logprobs": 0,
        "echo": False,
    },
    "agents with tools in the history": {
        "model": "tiny",
        "messages": [
            {"role": "developer", "content": [text("Be brief.")]},
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [image(URL, detail="original"), text(index=0)], "name": "someone"},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
            {"role": "tool", "tool_call_id": "call_1", "content": "42"},
            {"role": "assistant", "content": "", "tool_calls": None, "function_call": None},
            {"role": "function", "name": "zoom", "content": "43"},
            {"role": "user", "content": "and now?"},
        ],
    },
}


def filled(value, url):
    """A body with the image's address in its places."""
    return json.loads(json.dumps(value).replace(f'"{URL}"', json.dumps(url)))


def events(response):
    """The JSON of a stream's events, and whether it ended as it should."""
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"], lines[-1] == "[DONE]"


@pytest.fixture(scope="module")
def small(serve):
    """A server whose limit of tokens is below what clients ask for."""
    with serve(max_tokens=32) as made:
        yield made


@pytest.mark.parametrize("name", CHAT_BODIES)
def test_default_bodies_are_answered(small, tools, name):
    body = filled(CHAT_BODIES[name], tools.picture(3))
    response = httpx.post(f"{small.base}/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        answer = response.json()
        assert answer["choices"][0]["finish_reason"] in ("stop", "length") and answer["usage"]["prompt_tokens"] > 6
        return
    chunks, done = events(response)
    assert done and chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    with_usage = bool(body.get("stream_options", {}).get("include_usage"))
    # With usage every chunk has the key, null until the last; without it none has.
    assert [chunk.get("usage", "absent") is None for chunk in chunks[:-1]] == [with_usage] * (len(chunks) - 1)
    assert bool(chunks[-1].get("usage")) is with_usage


def prompt_of(server, messages):
    from vreflection.serving.conversation import read_messages

    prompts, conversation = server.service.prompts, read_messages(messages)
    pictures = [prompts.pictures.decode(prompts.pictures.read(image)) for image in prompts.check(conversation)]
    return prompts.prompt(conversation, pictures)


def prompt_text(server, messages):
    """The text of a conversation's prompt, image tokens left out."""
    prompt = prompt_of(server, messages)
    ids = [token for token in prompt.input_ids.tolist() if token != server.service.processor.token_ids.image]
    return server.service.processor.decode(ids, skip_special_tokens=False)


def part(content, number=0):
    """Messages of which the last holds this content, and `number` come before it."""
    return [{"role": "user", "content": "a"}] * number + [{"role": "user", "content": content}]


def turn(role, words):
    return f"<|im_start|>{role}\n{words}<|im_end|>\n"


SYSTEM = turn("system", "You are a helpful assistant.")
HEADER = "<|im_start|>assistant\n"
CALLED = '<tool_call>\n{"name": "zoom", "arguments": {"x": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "user", "content": "a"}], SYSTEM + turn("user", "a") + HEADER),
        ([{"role": "user", "content": [text("a"), text("b")]}], SYSTEM + turn("user", "ab") + HEADER),
        (
            [{"role": "system", "content": "s"}, {"role": "developer", "content": "t"}, *part("a")],
            turn("system", "s\nt") + turn("user", "a") + HEADER,
        ),
        (
            [{"role": "user", "content": "a"}, {"role": "system", "content": "s"}, {"role": "user", "content": "b"}],
            SYSTEM + turn("user", "a") + turn("system", "s") + turn("user", "b") + HEADER,
        ),
        (
            [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
            SYSTEM + turn("user", "a\nb") + HEADER,
        ),
        (
            [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "a"}],
            SYSTEM + turn("assistant", "hi") + turn("user", "a") + HEADER,
        ),
        (  # a last turn of the assistant is gone on with
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The digit is"}],
            SYSTEM + turn("user", "a") + HEADER + "The digit is",
        ),
        (
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "call_1", "content": [text("42")]},
            ],
            SYSTEM + turn("user", "a") + turn("assistant", CALLED)
            + turn("user", "<tool_response>\n42\n</tool_response>") + HEADER,
        ),
        (
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "function_call": CALL["function"]},
                {"role": "function", "name": "zoom", "content": "42"},
            ],
            SYSTEM + turn("user", "a") + turn("assistant", f"b\n{CALLED}")
            + turn("user", "<tool_response>\n42\n</tool_response>") + HEADER,
        ),
        (
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "refusal": "no"},
                {"role": "user", "content": "b"},
            ],
            SYSTEM + turn("user", "a") + turn("assistant", "no") + turn("user", "b") + HEADER,
        ),
        ([{"role": "system", "content": "s"}], turn("system", "s") + HEADER),
    ],
)  # fmt: skip
def test_messages_become_turns(server, messages, expected):
    assert prompt_text(server, messages) == expected


def test_our_own_answers_can_be_sent_back(server, tools):
    """As SDKs echo them: with every key that the answer had, and the nulls that their own types add."""
    openai = pytest.importorskip("openai")
    question = tools.user("which?", tools.picture(3))
    client = openai.OpenAI(base_url=server.base, api_key="none", max_retries=0, timeout=30)
    answer = client.chat.completions.create(model="tiny", messages=[question]).choices[0].message
    nulls = dict.fromkeys(["audio", "function_call", "tool_calls", "refusal", "reasoning_content", "name"])
    content = answer.content
    for echoed in (
        answer.model_dump(),
        answer,
        {**nulls, "role": "assistant", "content": content, "annotations": [], "provider_specific_fields": None},
        {"role": "assistant", "content": [{"type": "text", "text": content, "annotations": []}]},
    ):
        messages = [question, echoed, {"role": "user", "content": "sure?"}]
        second = client.chat.completions.create(model="tiny", messages=messages)
        plain = [question, {"role": "assistant", "content": content}, messages[2]]
        assert second.usage.prompt_tokens == len(prompt_of(server, plain))


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        (part([{"type": "input_image", "image_url": URL}]), "0.content.0", 'write {"type": "image_url"'),
        (part([text(), {"type": "video_url", "video_url": {"url": URL}}]), "0.content.1", "'video_url'; leave it"),
        (part([{"type": "file", "file": {}}], 2), "2.content.0", "'file'; leave it out"),
        (part([{"type": "input_text", "text": "a"}]), "0.content.0", 'write {"type": "text"'),
        (part(["a"]), "0.content.0", "expected a part of type text or image_url, got text"),
        (part([{"text": "a"}]), "0.content.0", "got an object without type: ['text']"),
        (part([{"type": "text"}]), "0.content.0.text", "expected text, got none"),
        (part([{"type": "text", "text": 3}]), "0.content.0.text", "expected text, got a number"),
        (part(3), "0.content", "expected text or a list of parts, got a number"),
        (part([image(3)]), "0.content.0.image_url.url", "got a number"),
        (part([{"type": "image_url"}]), "0.content.0.image_url", "got none"),
        (part([image(URL, detail="vast")]), "0.content.0", "low, high, original, got 'vast'"),
        (part([text(), image(PNG + "AAAA")], 1), "1.content.1", "not a usable image (not-an-image)"),
        (part([image(PNG + "!")], 1), "1.content.0", "expected base64"),
        ([{"role": "system", "content": [image(URL)]}], "0.content.0", "in a system turn, got an image"),
        ([{"role": "assistant", "content": [image(URL)]}], "0.content.0", "in an assistant turn"),
        ([{"role": "assistant", "content": "a", "audio": {"id": "b"}}], "0.audio", "got audio"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], "0.tool_calls.0", "a function with a name"),
        (["a"], "0", "got text"),
        (part("ok \ud83d"), "0.content", "got half of a surrogate pair ('\\ud83d') at character 3"),
        (part([text("\udc00")], 1), "1.content.0.text", "got half of a surrogate pair"),
        (part("a <|endoftext|> b", 1), "1", "got special tokens ['<|endoftext|>']"),
        (part([text("<|endof"), text("text|>")], 2), "2", "got special tokens ['<|endoftext|>']"),
        ([{"role": "system", "content": "<|lvr|>"}], "0", "got special tokens ['<|lvr|>']"),
    ],
)  # fmt: skip
def test_mistakes_in_messages_are_named(server, tools, messages, param, message):
    body = {"model": "tiny", "messages": filled(messages, tools.picture(3))}
    content = json.dumps(body)
    response = httpx.post(
        f"{server.base}/chat/completions", content=content, headers={"content-type": "application/json"}
    )
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == f"messages.{param}", error
    assert message in error["message"] and f"messages.{param}" in error["message"], error
