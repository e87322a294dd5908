"""`/v1/completions`: the text as it stands, asked with OpenAI's own client."""

import pytest

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")


def client(server):
    return openai.OpenAI(base_url=server.base, api_key="none", max_retries=0, timeout=30)


def alone(server, ids, **settings):
    """These token ids gone on with by the decoder itself, as text."""
    import torch

    from vreflection.engine.decoder import LatentDecoder
    from vreflection.engine.requests import Prompt

    ids = torch.tensor(ids)
    prompt = Prompt(ids, mm_token_type_ids=torch.zeros_like(ids))
    decoder = LatentDecoder(server.service.decoder.model, max_batch_size=1)
    given = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 16, **settings}
    answer = decoder.generate([prompt], **given)[0]
    return server.service.processor.decode([t for t, latent in zip(answer.tokens, answer.latent) if not latent])


def test_text_and_token_ids_are_gone_on_with(server):
    ids = server.service.processor.encode_text("The digit")
    expected = alone(server, ids)
    for prompt in ("The digit", ids, ["The digit"], [ids]):
        answer = client(server).completions.create(model="tiny", prompt=prompt)
        assert answer.choices[0].text == expected and answer.usage.prompt_tokens == len(ids)
        assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    chunks = list(
        client(server).completions.create(
            model="tiny", prompt="The digit", stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected
    assert chunks[-1].usage == answer.usage and chunks[-2].choices[0].finish_reason == answer.choices[0].finish_reason


def test_special_tokens_come_as_ids_alone(server):
    ids = [server.service.processor.token_ids.eos, 65]
    assert client(server).completions.create(model="tiny", prompt=ids).choices[0].text == alone(server, ids)
    with pytest.raises(openai.BadRequestError, match="prompt: expected plain text, got special tokens"):
        client(server).completions.create(model="tiny", prompt="<|im_end|>A")


def test_several_prompts_are_answered_apart(server):
    encode = server.service.processor.encode_text
    answer = client(server).completions.create(model="tiny", prompt=["one", "three"], n=2, temperature=1, seed=3)
    texts = [
        alone(server, encode(prompt), do_sample=True, temperature=1.0, seed=3 + number)
        for prompt in ("one", "three")
        for number in range(2)
    ]
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3] and answer.usage.prompt_tokens == 8


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"prompt": ""}, "prompt", "expected text or token ids, got none"),
        ({"prompt": []}, "prompt", "got an empty list"),
        ({"prompt": None}, "prompt", "expected text, token ids, or a list of either, got none"),
        ({"prompt": ["a", {}]}, "prompt.1", "expected text or token ids, got an object"),
        ({"prompt": [2**70]}, "prompt", "expected token ids in [0, "),
        ({"prompt": [-1]}, "prompt", "expected token ids in [0, "),
        ({"prompt": [65] * 300}, "prompt", "expected at most 256 tokens, got 300"),
        ({"prompt": ["a"] * 9}, "prompt", "at most 8 answers to a request, got 9"),
        ({"prompt": "a", "echo": True}, "echo", "is not supported here"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "is not supported here"),
        ({"prompt": "a", "logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"prompt": "a\ud800"}, "prompt", "half of a surrogate pair"),
    ],
)
def test_what_is_refused(server, changes, param, message):
    import json

    content = json.dumps({"model": "tiny", **changes})
    response = httpx.post(f"{server.base}/completions", content=content, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and message in error["message"], error


def test_ids_of_images_and_latents_are_refused(server):
    ids = server.service.processor.token_ids
    for token in (ids.image, ids.lvr_start, ids.lvr, ids.lvr_end, ids.vision_start):
        with pytest.raises(openai.BadRequestError, match="without those of images and latent steps"):
            client(server).completions.create(model="tiny", prompt=[65, token])
