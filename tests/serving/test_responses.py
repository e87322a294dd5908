"""`/v1/responses`, asked with OpenAI's own clients, sync and async, and as its other clients write it."""

import asyncio
import json
import time

import pytest

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

EVENTS = [
    "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    "response.output_text.done", "response.content_part.done", "response.output_item.done",
]  # fmt: skip


def client(server, kind=openai.OpenAI):
    return kind(base_url=server.base, api_key="none", max_retries=0, timeout=30)


def question(url, words="which?", **more):
    image = {"type": "input_image", "image_url": url, "detail": "auto", **more}
    return [{"role": "user", "content": [image, {"type": "input_text", "text": words}]}]


def chat_answer(server, tools, *images, system=None, **fields):
    """The same question in the chat interface."""
    messages = [{"role": "system", "content": system}] if system else []
    body = {"model": "tiny", "messages": [*messages, tools.user("which?", *images)], **fields}
    return httpx.post(f"{server.base}/chat/completions", json=body, timeout=30).json()


def test_a_response_is_the_chats_answer(server, tools):
    url = tools.picture(3)
    chat = chat_answer(server, tools, url, system="Be brief.", max_tokens=9)
    response = client(server).responses.create(
        model="tiny",
        input=question(url),
        instructions="Be brief.",
        max_output_tokens=9,
        metadata={"a": "b"},
        store=True,
    )
    assert response.output_text == chat["choices"][0]["message"]["content"]
    assert response.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert response.usage.output_tokens == chat["usage"]["completion_tokens"]
    assert response.usage.latent_steps == chat["usage"]["latent_steps"]
    ended = chat["choices"][0]["finish_reason"]
    assert response.status == {"stop": "completed", "length": "incomplete"}[ended]
    assert response.metadata == {"a": "b"} and response.instructions == "Be brief." and response.store is False
    assert response.output[0].type == "message" and response.output[0].role == "assistant"
    assert response.id.startswith("resp_") and response.output[0].id.startswith("msg_")


def test_length_makes_a_response_incomplete(serve, parts, tools):
    with serve() as server:
        tools.follow_script(server.service.decoder, parts[1], "a long tale")
        response = client(server).responses.create(model="tiny", input="which?", max_output_tokens=6)
        assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
        assert response.output_text == "a long" and response.output[0].status == "incomplete"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_streams_have_the_events_that_the_sdk_parses(server, tools, asynchronous):
    body = {"model": "tiny", "input": question(tools.picture(3)), "max_output_tokens": 9}
    whole = client(server).responses.create(**body)

    async def collected():
        stream = await client(server, openai.AsyncOpenAI).responses.create(**body, stream=True)
        return [event async for event in stream]

    events = asyncio.run(collected()) if asynchronous else list(client(server).responses.create(**body, stream=True))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [event.type for event in events if event not in deltas] == [*EVENTS, f"response.{whole.status}"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in deltas)
    by_type = {event.type: event for event in events}
    assert text == whole.output_text == by_type["response.output_text.done"].text == events[-1].response.output_text
    assert {event.item_id for event in deltas} == {events[-1].response.output[0].id}
    assert events[-1].response.usage == whole.usage and events[0].response.status == "in_progress"
    assert events[0].response.id == events[-1].response.id


def test_the_sdks_stream_helper_accumulates_a_response(serve, parts, tools):
    with serve() as server:
        tools.follow_script(server.service.decoder, parts[1], "five<|im_end|>")
        with client(server).responses.stream(model="tiny", input="which?") as stream:
            types = [event.type for event in stream]
            final = stream.get_final_response()
        assert "response.output_text.delta" in types and final.output_text == "five"


def test_raw_events_are_named(server):
    body = {"model": "tiny", "input": "which?", "stream": True, "max_output_tokens": 4}
    lines = httpx.post(f"{server.base}/responses", json=body, timeout=30).text.split("\n\n")
    for block in filter(None, lines):
        name, data = block.split("\n")
        assert name == f"event: {json.loads(data[6:])['type']}"


def test_failures_within_a_stream_reach_the_client(serve, monkeypatch):
    with serve() as server:
        decoder = server.service.decoder
        monkeypatch.setattr(
            decoder, "launch", lambda _: decoder.fail(list(decoder.rows.values()), RuntimeError("lost")) or False
        )
        with pytest.raises(openai.APIError, match="decoding failed; the request can be sent again"):
            list(client(server).responses.create(model="tiny", input="which?", stream=True))
        deadline = time.monotonic() + 10
        while server.service.in_work:  # freed behind the last event
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_conversations_as_they_are_sent_back(server, tools):
    """Our own output items, a tool's call and answer, another model's reasoning: read as the chat's turns."""
    from vreflection.serving.conversation import read_messages
    from vreflection.serving.responses import Responses

    first = client(server).responses.create(model="tiny", input=question(tools.picture(3)))
    items = [
        {"type": "message", "role": "developer", "content": "Be brief."},
        *({"type": None, **turn} for turn in question(tools.picture(3))),
        *[item.model_dump() for item in first.output],
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "call_id": "call_1", "name": "zoom", "arguments": "{}", "id": "fc_1"},
        {"type": "function_call_output", "call_id": "call_1", "output": "42"},
    ]
    second = client(server).responses.create(model="tiny", input=[*items, {"role": "user", "content": "sure?"}])
    assert second.output_text is not None
    read = Responses({"model": "tiny", "input": items}).request.prompts[0]
    call = {"function": {"name": "zoom", "arguments": "{}"}}
    chat = read_messages(
        [
            {"role": "system", "content": "Be brief."},
            tools.user("which?", tools.picture(3)),
            {"role": "assistant", "content": first.output_text},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "42"},
        ]
    )
    assert [(turn.role, list(read.texts())) for turn in read.turns] == [
        (turn.role, list(chat.texts())) for turn in chat.turns
    ]
    assert [image.url for image in read.images()] == [image.url for image in chat.images()]


@pytest.mark.parametrize(
    "body",
    [
        # The AI SDK's default since its fifth version.
        {
            "input": [{"role": "system", "content": "Be brief."}, *question("URL")],
            "stream": True, "store": False, "include": ["reasoning.encrypted_content"], "max_output_tokens": 8.0,
        },
        # OpenAI's agents.
        {
            "instructions": "Be brief.", "input": [{"content": "which?", "role": "user"}], "include": [], "tools": [],
            "tool_choice": "auto", "parallel_tool_calls": None, "previous_response_id": None, "truncation": None,
            "reasoning": {"effort": "low"}, "text": {"verbosity": "low"}, "prompt_cache_key": "a", "store": None,
        },
        # LangChain with use_responses_api.
        {
            "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "which?"}]}],
            "temperature": 0.5, "top_p": 1, "user": "someone", "service_tier": "auto",
            "text": {"format": {"type": "text"}},
        },
    ],
)  # fmt: skip
def test_default_bodies_are_answered(server, tools, body):
    filled = json.loads(json.dumps({"model": "tiny", **body}).replace('"URL"', json.dumps(tools.picture(3))))
    response = httpx.post(f"{server.base}/responses", json=filled, timeout=30)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is stored here"),
        ({"conversation": "conv_1"}, "conversation", "nothing is stored here"),
        ({"prompt": {"id": "p"}}, "prompt", "nothing is stored here"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0", "nothing is stored here"),
        ({"input": []}, "input", "got an empty list"),
        ({"input": 3}, "input", "expected text or a list of items, got a number"),
        ({"input": ["a"]}, "input.0", "got text"),
        ({"input": [{"type": "web_search_call"}]}, "input.0", "got 'web_search_call'"),
        (
            {"input": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "input.0.content.0",
            'write {"type": "input_image"',
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input.0.content.0.image_url",
            "got a file's id",
        ),
        ({"input": question("data:image/png;base64,AAAA")}, "input.0.content.0", "not a usable image"),
        ({"instructions": "<|im_end|>"}, "instructions", "special tokens"),
        ({"background": True}, "background", "is not supported here"),
        ({"truncation": "auto"}, "truncation", "is not supported here"),
        ({"tools": [{"type": "web_search"}]}, "tools", "is not supported here"),
        ({"text": {"format": {"type": "xml"}}}, "text.format", "json_schema, got 'xml'"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format", "expected a JSON schema, got none"),
        ({"max_output_tokens": 230, "input": "x " * 60}, "input", "lower max_output_tokens"),
        ({"max_tokens": 3}, "max_tokens", "unknown field"),
    ],
)
def test_what_is_refused(server, changes, param, message):
    response = httpx.post(f"{server.base}/responses", json={"model": "tiny", "input": "a", **changes})
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and message in error["message"], error


def test_stored_responses_are_not_there(server):
    with pytest.raises(openai.NotFoundError, match="responses are not stored here"):
        client(server).responses.retrieve("resp_1")


def test_latents_come_with_the_output_item(hopping, tools):
    with hopping(2) as server:
        body = {
            "model": "tiny",
            "input": question(tools.picture(3)),
            "extra_body": {"latent": {"include": ["maps", "hidden"]}},
        }
        item = client(server).responses.create(**body).output[0]
        assert item.latent["spans"] == 2 and len(item.latent["maps"]["span"]) == 6
        events = list(client(server).responses.create(**body, stream=True))
        assert events[-1].response.output[0].latent["hidden"]["shape"] == [2, 3, 64]
