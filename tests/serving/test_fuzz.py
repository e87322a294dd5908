"""Whatever is sent, the answer is an answer or a refusal in the API's own shape; the server itself never fails."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

httpx = pytest.importorskip("httpx")

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
text = st.text(max_size=60) | st.sampled_from(["<|im_start|>", "<image>", "<lvr>", "\x00", "\ud800", "a" * 5000, "é🙂"])
url = st.text(max_size=40) | st.sampled_from(
    ["data:image/png;base64,", "data:image/png;base64,AAAA", "data:;base64,AAAA", "http://127.0.0.1/", "file:///x"]
)
part = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": text}),
    st.fixed_dictionaries({"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": url})}),
    anything,
)
message = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": text}),
    st.fixed_dictionaries({"role": st.just("user"), "content": st.lists(part, max_size=3)}),
    anything,
)
number = st.integers(-3, 300) | st.floats() | st.integers(-(2**70), 2**70) | anything
latent = st.fixed_dictionaries(
    {},
    optional={
        "steps": number, "off": st.booleans() | anything, "force": st.booleans(), "box": st.lists(number, max_size=5),
        "include": st.lists(st.sampled_from(["maps", "hidden", "x"]), max_size=3),
        "use": st.fixed_dictionaries({"data": st.text(max_size=9), "shape": st.lists(number, max_size=3)}),
    },
)  # fmt: skip
formats = st.one_of(
    st.just({"type": "json_object"}),
    st.fixed_dictionaries({"type": st.just("json_schema"), "json_schema": st.fixed_dictionaries({"schema": anything})}),
)
body = st.fixed_dictionaries(
    {"model": st.just("tiny"), "messages": st.lists(message, max_size=3)},
    optional={
        "max_tokens": number, "max_completion_tokens": number, "temperature": number, "top_p": number, "top_k": number,
        "n": number, "seed": number, "stop": text | st.lists(text, max_size=5) | anything, "stream": st.booleans(),
        "stream_options": anything, "latent": latent | anything, "repetition_penalty": number, "tools": anything,
        "logprobs": st.booleans() | anything, "user": anything, "response_format": formats | anything,
        "top_logprobs": number, "min_p": number, "frequency_penalty": number, "presence_penalty": number,
        "logit_bias": st.dictionaries(st.integers(-2, 400).map(str) | text, number, max_size=3) | anything,
        "min_tokens": number, "stop_token_ids": st.lists(number, max_size=4) | anything, "ignore_eos": st.booleans(),
    },
)  # fmt: skip


@pytest.fixture(scope="module")
def fuzzed(serve):
    with serve(batch_size=4, max_tokens=16) as made, httpx.Client(base_url=made.base, timeout=60) as client:
        yield made, client
        assert client.get("/models").status_code == 200  # alive and well
        assert made.service.in_work == 0


SEEN = set()


def check(response):
    SEEN.add(response.status_code)
    assert response.status_code < 500, response.text[:500]
    if response.status_code == 200:
        return
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str)


fuzzing = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def encoded(value):
    """JSON as the standard library writes it: NaN and lone surrogates included, which other writers would refuse."""
    import json

    return json.dumps(value).encode("utf-8", "surrogatepass")


@fuzzing
@given(body=body | anything)
def test_bodies(fuzzed, body):
    check(fuzzed[1].post("/chat/completions", content=encoded(body), headers={"content-type": "application/json"}))


@fuzzing
@given(body=body, given=anything | st.lists(message, max_size=3))
def test_bodies_of_the_other_interfaces(fuzzed, body, given):
    """The chat's fields with what these interfaces answer, in the field that each has for it."""
    fields = {name: value for name, value in body.items() if name not in ("messages", "max_completion_tokens")}
    for path, name in (("/completions", "prompt"), ("/responses", "input")):
        content = encoded({**fields, name: given})
        check(fuzzed[1].post(path, content=content, headers={"content-type": "application/json"}))


@fuzzing
@given(
    words=st.text(max_size=30),
    given=st.fixed_dictionaries(
        {},
        optional={
            "max_tokens": st.integers(1, 20),
            "temperature": st.floats(0, 2),
            "top_p": st.floats(0, 1),
            "n": st.integers(1, 9),
            "stream": st.booleans(),
            "seed": st.integers(),
            "stop": st.text(max_size=3) | st.lists(st.text(max_size=3)),
            "latent": st.fixed_dictionaries({}, optional={"force": st.booleans(), "off": st.booleans()}),
        },
    ),
)
def test_bodies_that_are_nearly_right(fuzzed, words, given):
    body = {"model": "tiny", "messages": [{"role": "user", "content": words}], **given}
    check(fuzzed[1].post("/chat/completions", content=encoded(body), headers={"content-type": "application/json"}))


def test_both_kinds_of_answer_were_seen():
    assert {200, 400} <= SEEN


@fuzzing
@given(content=st.binary(max_size=200))
def test_bytes(fuzzed, content):
    check(fuzzed[1].post("/chat/completions", content=content, headers={"content-type": "application/json"}))


@fuzzing
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]),
    path=st.text("abz019/.%?_-éA ", max_size=30),
    kind=st.sampled_from(["application/json", "text/plain", "", "application/json; charset=utf-8"]),
)
def test_paths(fuzzed, method, path, kind):
    made, client = fuzzed
    response = client.request(method, f"{made.url}/{path}", headers={"content-type": kind}, content=b"{}")
    assert response.status_code < 500, (method, path, response.text[:300])
