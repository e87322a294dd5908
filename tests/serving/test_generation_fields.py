"""Fields that say how to answer: what they mean to the decoder, their limits, and what they have no effect on."""

import asyncio
import json
import math

import pytest

from vreflection.serving.errors import ApiError

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")


def client(server):
    return openai.OpenAI(base_url=server.base, api_key="none", max_retries=0, timeout=30)


def ask(server, words="which?", **fields):
    body = {"model": "tiny", "messages": [{"role": "user", "content": words}], "latent": {"off": True}, **fields}
    response = httpx.post(
        f"{server.base}/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"},
        timeout=30,
    )  # fmt: skip
    return response.json()


def prepared(server, **fields):
    """What the decoder is asked."""
    from vreflection.serving.chat import Chat

    body = {"model": "tiny", "messages": [{"role": "user", "content": "which?"}], **fields}
    return asyncio.run(server.service.prepare(Chat(body).request)).choices[0].request


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"do_sample": False, "repetition_penalty": 1.0}),
        ({"temperature": 0}, {"do_sample": False}),
        ({"temperature": 0.5, "top_p": 0.9}, {"do_sample": True, "temperature": 0.5, "top_p": 0.9}),
        ({"temperature": 1, "top_k": 40, "min_p": 0.1}, {"top_k": 40, "min_p": 0.1}),
        ({"temperature": 1, "top_k": -1}, {"top_k": 0}),
        ({"temperature": 1, "top_k": 2**63}, {"top_k": 0}),
        ({"temperature": 1, "top_k": 5.0}, {"top_k": 5}),
        ({"temperature": 1, "top_p": 0}, {"top_p": 1e-6}),
        ({"temperature": 1}, {"top_p": 1.0, "top_k": 0, "min_p": 0.0}),
        ({"frequency_penalty": 0.5, "presence_penalty": -1}, {"frequency_penalty": 0.5, "presence_penalty": -1.0}),
        ({"logit_bias": {"65": 3, "66": -100}}, {"logit_bias": ((65, 3.0), (66, -100.0))}),
        ({"min_tokens": 3}, {"min_new_tokens": 3}),
    ],
)  # fmt: skip
def test_sampling_fields_reach_the_decoder(server, fields, expected):
    sampling = prepared(server, **fields).sampling
    assert {name: getattr(sampling, name) for name in expected} == expected


def test_ends_and_lengths_reach_the_decoder(serve):
    with serve(max_tokens=32, default_tokens=12) as server:
        eos = server.service.eos_token_ids
        assert prepared(server).max_new_tokens == 12 and list(prepared(server).eos_token_ids) == eos
        assert prepared(server, max_tokens=16.0).max_new_tokens == 16
        for wanted in (4096, 2**63, 1e30):  # cut to what the server gives
            assert prepared(server, max_tokens=wanted).max_new_tokens == 32
        # What is cut is cut further to what fits beside eight spans of three steps.
        request = prepared(server, max_tokens=4096, messages=[{"role": "user", "content": "x" * 150}])
        assert 0 < request.max_new_tokens == 256 - len(request.prompt) - 8 * 3 < 32
        assert list(prepared(server, ignore_eos=True).eos_token_ids) == []
        assert list(prepared(server, stop_token_ids=[65]).eos_token_ids) == [*eos, 65]
        assert list(prepared(server, stop_token_ids=[65.0], ignore_eos=True).eos_token_ids) == [65]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"top_k": 1.5}, "top_k", "got 1.5"),
        ({"seed": 2**63}, "seed", "less than 9223372036854"),
        ({"n": 2**70}, "n", "expected at most 8 answers"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"frequency_penalty": 3}, "frequency_penalty", "less than or equal to 2"),
        ({"presence_penalty": math.nan}, "presence_penalty", "expected a finite number, got nan"),
        ({"temperature": math.inf}, "temperature", "expected a finite number, got inf"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "expected token ids as keys, got 'a'"),
        ({"logit_bias": {"9" * 30: 1}}, "logit_bias", "expected token ids as keys"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "expected token ids in [0, "),
        ({"logit_bias": {"65": 101}}, "logit_bias.65", "less than or equal to 100"),
        ({"stop": [5]}, "stop.0", "stop.0: Input should be a valid string, got 5"),
        ({"stop": 5}, "stop.0", "valid string, got 5"),
        ({"stop": "\udead"}, "stop", "half of a surrogate pair"),
        ({"stop": ["a", "\udead"]}, "stop.1", "half of a surrogate pair"),
        ({"user": "\udead"}, "user", "half of a surrogate pair"),
        ({"metadata": {"\udead": 1}}, "metadata", "half of a surrogate pair"),
        ({"\udead": 1}, "body", "half of a surrogate pair"),
        ({"latent": {"use": {"data": "\udead", "shape": [3, 64]}}}, "latent.use.data", "half of a surrogate pair"),
        ({"latent": {"steps": 2**70}}, "latent.steps", "this checkpoint allows 0 or 3"),
        ({"latent": {"use": {"data": "", "shape": [2**70, 3, 64]}}}, "latent.use", "expected shape"),
        ({"latent": {"box": [10, 20, 50, 60]}}, "latent.box", "divide pixels by the image's width and height"),
        ({"latent": {"box": [0.9, 0, 0.5, 1]}}, "latent.box", "0 <= x0 < x1 <= 1"),
        ({"latent": {"box": [math.nan, 0, 0.5, 1]}}, "latent.box.0", "expected a finite number, got nan"),
        ({"latent": {"boxes": [[0, 0, 1, 1], [0, 0, 1e999, 1]]}}, "latent.boxes.1.2", "finite number, got inf"),
        ({"latent": {"box": [0, 0, 10**400, 1]}}, "latent.box.2", "latent.box.2"),
        ({"latent": {"boxes": [[0, 0, 1, 1], [0, 0, 2, 1]]}}, "latent.boxes.1", "0 <= x0 < x1 <= 1"),
        ({"min_tokens": 99}, "min_tokens", "min_tokens: expected at most 12 here, got 99"),
        ({"stop_token_ids": [2**70]}, "stop_token_ids", "expected at most 8 ids in [0, "),
        ({"stop_token_ids": list(range(9))}, "stop_token_ids", "expected at most 8 ids"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "less than or equal to 20"),
        ({"use_beam_search": True}, "use_beam_search", "is not supported here"),
        ({"skip_special_tokens": False}, "skip_special_tokens", "is not supported here"),
        ({"response_format": {"type": "xml"}}, "response_format", "got 'xml'"),
        ({"response_format": "json"}, "response_format", "expected an object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": "<|im_end|>"}}}},
            "response_format", "special tokens ['<|im_end|>']",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
            "response_format", "that an answer can follow",
        ),
        ({"continue_final_message": True}, "continue_final_message", "expected false"),
        ({"add_generation_prompt": False}, "add_generation_prompt", "expected true"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "a JSON schema, got none"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 2**16]}}}},
            "response_format.json_schema",
            "expected at most 65536 characters",
        ),
        (
            {"continue_final_message": False, "messages": [{"role": "assistant", "content": "a"}]},
            "continue_final_message",
            "a last turn of the assistant is continued here",
        ),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids", "at most 1024 items"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "expected false"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "valid boolean"),
        ({"model": None}, "model", "valid string"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_limits_are_named_before_anything_is_decoded(server, fields, param, message, stream):
    error = ask(server, stream=stream, **fields)["error"]
    assert error["param"] == param and message in error["message"] and error["type"] == "invalid_request_error", error


def test_nulls_in_latent_are_the_same_as_nothing(server):
    names = ("steps", "off", "force", "use", "include", "box", "boxes")
    plain, nulls = ask(server), ask(server, latent=dict.fromkeys(names))
    assert nulls["choices"] == plain["choices"] and nulls["usage"] == plain["usage"]


def test_vllm_s_pair_of_fields_for_a_begun_answer(server):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pair = {"add_generation_prompt": False, "continue_final_message": True}
    plain, paired = ask(server, messages=messages), ask(server, messages=messages, **pair)
    assert paired["choices"] == plain["choices"] and paired["usage"] == plain["usage"]


def test_a_missing_field_is_said_to_be_missing(server):
    response = httpx.post(f"{server.base}/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
    assert response.json()["error"]["message"] == "model: expected a value, got none; add it"


def test_long_texts_are_refused_before_they_are_tokenised(server, monkeypatch):
    def refuse(text):
        raise AssertionError("tokenised")

    monkeypatch.setattr(server.service.processor, "encode_text", refuse)
    size = 8 * 2**20
    for body, path in (
        ({"messages": [{"role": "user", "content": "x" * size}]}, "chat/completions"),
        ({"messages": [{"role": "system", "content": "é" * size}]}, "chat/completions"),
        ({"prompt": "x" * size}, "completions"),
        ({"input": "a", "instructions": "x" * size}, "responses"),
    ):  # fmt: skip
        error = httpx.post(f"{server.base}/{path}", json={"model": "tiny", **body}, timeout=30).json()["error"]
        assert error["code"] == "context_length_exceeded" and "expected at most 256 tokens" in error["message"]


def test_the_bound_on_bytes_refuses_nothing_that_fits(server):
    """However much text a token can stand for, and however much shorter text becomes when it is composed."""
    maker = server.service.prompts
    assert maker.longest_token == 1  # the byte tokenizer's
    maker.check_length(["x" * 200, "\u1112\u1161\u11ab" * 18, "x" * 2], "messages")  # 18 syllables of three bytes
    with pytest.raises(ApiError, match="messages: expected at most 256 tokens, got 259 bytes of text, which .* 257;"):
        maker.check_length(["x" * 256, "\u20ac"], "messages")


def test_stop_token_ids_and_ignored_ends(serve, parts, tools):
    with serve() as server:
        tools.follow_script(server.service.decoder, parts[1], "abcdef<|im_end|>ghijklmn")
        assert ask(server)["choices"][0]["message"]["content"] == "abcdef"
        stopped = ask(server, stop_token_ids=[parts[1].encode_text("d")[0]])["choices"][0]
        assert stopped["message"]["content"] == "abcd" and stopped["finish_reason"] == "stop"
        ignored = ask(server, ignore_eos=True)["choices"][0]
        assert ignored["message"]["content"] == "abcdefghijk" and ignored["finish_reason"] == "length"
        early = ask(server, stop=["b", "f"], min_tokens=3)["choices"][0]
        assert early["message"]["content"] == "abcde"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_belong_to_the_text(server, stream):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "which?"}], "logprobs": True, "top_logprobs": 2}
    answer = client(server).chat.completions.create(**body, stream=stream, extra_body={"latent": {"force": True}})
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        text = "".join(choice.delta.content or "" for choice in choices)
        entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
        for choice in choices:
            spelled = b"".join(bytes(entry.bytes) for entry in (choice.logprobs.content if choice.logprobs else []))
            assert spelled.decode() == (choice.delta.content or "")
    else:
        text, entries = answer.choices[0].message.content, answer.choices[0].logprobs.content
    assert text and b"".join(bytes(entry.bytes) for entry in entries).decode() == text
    for entry in entries:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-4)  # greedy
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob


def test_logprobs_end_where_a_stop_text_begins(serve, parts, tools):
    with serve() as server:
        tools.follow_script(server.service.decoder, parts[1], "ab\n\ncd<|im_end|>")
        for stream in (False, True):
            body = {"logprobs": True, "stop": "\n\n"}
            if not stream:
                choice = ask(server, **body)["choices"][0]
                content, entries = choice["message"]["content"], choice["logprobs"]["content"]
            else:
                chunks = list(
                    client(server).chat.completions.create(
                        model="tiny", messages=[{"role": "user", "content": "a"}], stream=True, **body
                    )
                )
                content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                logprobs = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
                entries = [entry.model_dump() for each in logprobs for entry in each.content]
            assert content == "ab" and [entry["token"] for entry in entries] == ["a", "b"]


def test_logprobs_of_the_other_interfaces(server):
    answer = client(server).completions.create(model="tiny", prompt="one", logprobs=2, max_tokens=5)
    columns = answer.choices[0].logprobs
    assert "".join(columns.tokens) == answer.choices[0].text
    assert columns.text_offset == list(range(len(columns.tokens))) and all(
        len(top) == 2 for top in columns.top_logprobs
    )
    response = client(server).responses.create(model="tiny", input="one", top_logprobs=2, max_output_tokens=5)
    entries = response.output[0].content[0].logprobs
    assert "".join(entry.token for entry in entries) == response.output_text and len(entries[0].top_logprobs) == 2


SCHEMA = {
    "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False,
}  # fmt: skip


def test_answers_follow_a_json_schema(serve, parts):
    """The random model's text is JSON all the same, through every way to ask for it."""
    pytest.importorskip("llguidance")
    import pydantic

    class Number(pydantic.BaseModel):
        model_config = {"extra": "forbid"}
        a: int

    named = {"name": "number", "schema": SCHEMA, "strict": True}
    chat = {"type": "json_schema", "json_schema": named}
    ends = {str(parts[1].encode_text("}")[0]): 5}  # so that the number ends
    with serve(max_tokens=64, default_tokens=64) as server:
        responses, completions = client(server).responses, client(server).chat.completions
        body, bias = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}, {"logit_bias": ends}
        texts = [
            ask(server, response_format=chat, **bias)["choices"][0]["message"]["content"],
            responses.create(
                model="tiny", input="a", text={"format": {"type": "json_schema", **named}}, extra_body=bias
            ).output_text,
            completions.parse(**body, **bias, response_format=Number).choices[0].message.content,
        ]
        for text in texts:
            assert list(json.loads(text)) == ["a"] and isinstance(json.loads(text)["a"], int)
        assert responses.parse(model="tiny", input="a", text_format=Number, extra_body=bias).output_parsed.a is not None
        with completions.stream(**body, **bias, response_format=Number) as stream:
            assert stream.get_final_completion().choices[0].message.parsed.a is not None
        text = ask(server, response_format={"type": "json_object"})["choices"][0]["message"]["content"]
        assert text.lstrip().startswith("{")
        wrong = {"type": "json_schema", "json_schema": {"schema": {"type": "digit"}}}
        error = ask(server, response_format=wrong)["error"]
        assert error["param"] == "response_format" and "expected a JSON schema" in error["message"]
