"""LangChain and LiteLLM for real, where they are installed (`make test-harnesses`)."""

import asyncio
import json
import os

import pytest

SCHEMA = {
    "title": "Digit",
    "type": "object",
    "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["digit"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def image_turn(tools):
    return tools.user("which?", tools.picture())["content"]


class TestLangChain:
    @pytest.fixture
    def chat(self, server):
        openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
        return lambda **settings: openai.ChatOpenAI(
            base_url=server.base, api_key="none", model="tiny", max_tokens=24, temperature=0, max_retries=0, **settings
        )

    def test_answers_streams_and_batches_are_the_same(self, chat, image_turn):
        from langchain_core.messages import HumanMessage, SystemMessage

        messages = [SystemMessage("Answer."), HumanMessage(image_turn)]
        model = chat()
        answer = model.invoke(messages)
        assert answer.content and answer.usage_metadata["output_tokens"] > 0
        assert answer.response_metadata["finish_reason"] in ("stop", "length")
        assert "".join(chunk.content for chunk in model.stream(messages)) == answer.content
        assert [each.content for each in model.batch([messages] * 3)] == [answer.content] * 3
        assert asyncio.run(model.ainvoke(messages)).content == answer.content
        # A second turn carries the first answer as the library echoes it.
        assert model.invoke([*messages, answer, HumanMessage("and now?")]).content

    def test_structured_output_and_log_probabilities(self, chat, image_turn):
        from langchain_core.messages import HumanMessage

        structured = chat(max_completion_tokens=60).with_structured_output(SCHEMA, method="json_schema")
        assert 0 <= structured.invoke([HumanMessage(image_turn)])["digit"] <= 9
        answer = chat(logprobs=True, top_logprobs=2).invoke([HumanMessage(image_turn)])
        entries = answer.response_metadata["logprobs"]["content"]
        assert entries and all(len(entry["top_logprobs"]) == 2 for entry in entries)

    def test_the_responses_interface(self, chat, image_turn):
        from langchain_core.messages import HumanMessage

        plain = chat().invoke([HumanMessage(image_turn)])
        answer = chat(use_responses_api=True).invoke([HumanMessage(image_turn)])
        assert answer.text == plain.content


class TestLiteLLM:
    @pytest.fixture
    def call(self, server):
        os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # asks no other host
        litellm = pytest.importorskip("litellm", reason="litellm is not installed")
        settings = {"model": "openai/tiny", "api_base": server.base, "api_key": "none", "max_tokens": 24}
        return litellm, settings

    def test_answers_and_streams_are_the_same(self, call, image_turn):
        litellm, settings = call
        messages = [{"role": "user", "content": image_turn}]
        answer = litellm.completion(messages=messages, **settings)
        text = answer.choices[0].message.content
        assert text and answer.usage.completion_tokens > 0
        stream = litellm.completion(messages=messages, stream=True, stream_options={"include_usage": True}, **settings)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == text
        assert asyncio.run(litellm.acompletion(messages=messages, **settings)).choices[0].message.content == text
        history = [*messages, answer.choices[0].message.model_dump(), {"role": "user", "content": "and now?"}]
        assert litellm.completion(messages=history, **settings).choices[0].message.content

    def test_schemas_and_errors(self, call, image_turn):
        litellm, settings = call
        messages = [{"role": "user", "content": image_turn}]
        schema = {"type": "json_schema", "json_schema": {"name": "digit", "schema": SCHEMA, "strict": True}}
        text = litellm.completion(messages=messages, response_format=schema, **settings | {"max_tokens": 60})
        assert 0 <= json.loads(text.choices[0].message.content)["digit"] <= 9
        with pytest.raises(litellm.NotFoundError, match="expected 'tiny'"):
            litellm.completion(messages=messages, **settings | {"model": "openai/other"}, num_retries=0)
