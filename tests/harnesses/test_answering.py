"""Questions of other harnesses, and VLMEvalKit's launcher on a stand-in of the kit's interface."""

import json
import runpy
import sys

import numpy as np
import pytest
from PIL import Image

from vreflection.engine.decoder import LatentDecoder
from vreflection.errors import ConfigError, DataError
from vreflection.harnesses import vlmevalkit
from vreflection.harnesses.answering import ChatAnswerer, ChatQuestion, sampling_settings

BASE = """
class BaseModel:
    INTERLEAVE = False
    allowed_types = ["text", "image"]
    def generate(self, message, dataset=None):
        assert all(item["type"] in self.allowed_types for item in message)
        return self.generate_inner(message, dataset)
"""
RUN = """
import json, sys
from vlmeval.config import supported_VLM
name, data, image = sys.argv[2], sys.argv[4], sys.argv[5]
assert sys.argv[1:4:2] == ["--model", "--data"] and __name__ == "__main__"
model = supported_VLM[name]()
message = [{"type": "image", "value": image}, {"type": "text", "value": "which?"}]
print(json.dumps({"data": data, "interleave": model.INTERLEAVE, "answer": model.generate(message, data)}))
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "a.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (56, 84, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def answerer(checkpoint):
    return ChatAnswerer(str(checkpoint), batch_size=2, force_latent=True, device="cpu")


def test_segments_keep_their_order(answerer, image):
    before, after = (
        answerer.prompt(ChatQuestion(order)).input_ids.tolist() for order in ([image, "which?"], ["which?", image])
    )
    assert sorted(before) == sorted(after) and before != after
    with pytest.raises(DataError, match="expected a text without <image>"):
        answerer.prompt(ChatQuestion([image, "see <image>"]))


def test_answers_are_the_decoders_in_order_and_latents_do_not_count(answerer, image):
    questions = [ChatQuestion([image, "which? " * n], {"max_new_tokens": 2 + n}) for n in range(1, 4)]
    decoder = LatentDecoder(answerer.model, max_batch_size=1, processor=answerer.processor)
    for question, answer in zip(questions, answerer.answers(questions), strict=True):
        (alone,) = decoder.generate([answerer.request(question)])
        assert (answer.text, answer.prompt_tokens) == (alone.text.strip(), alone.prompt_length)
        assert answer.latent_steps == sum(alone.latent) > 0
        assert answer.tokens == len(alone.tokens) - answer.latent_steps <= question.settings["max_new_tokens"]


def test_stop_texts_end_the_answer(answerer, image):
    (whole,) = answerer.answers([ChatQuestion([image, "which?"], {"max_new_tokens": 8})])
    assert len(whole.text) > 1
    stop = whole.text[1]
    (cut,) = answerer.answers([ChatQuestion([image, "which?"], {"max_new_tokens": 8}, (stop,))])
    assert cut.text == whole.text.partition(stop)[0].strip()


@pytest.mark.parametrize(
    ("pieces", "until", "text"),
    [
        (("\n<answer>", " B", " </answer>"), (), "B"),
        (("\n<answer>", " B", " </answer>"), ("\n",), "B"),  # the stop text of many tasks, also before the tag
        (("\n<answer>", " B"), ("\n\n",), "B"),  # unclosed
        (("I see two.", "\n<answer>", " (B) blue", "\nno", "</answer>"), ("\n",), "(B) blue"),
        (("B",), ("\n",), "B"),  # a model that knows no tags
        (("\n\n", "The answer is B.", "\nBecause"), ("\n",), "The answer is B."),
        (("\n<answer>", "</answer>"), (), ""),
    ],
)
def test_harnesses_get_the_answer_without_its_tags(saying, image, pieces, until, text):
    speaker = ChatAnswerer(str(saying(*pieces)), device="cpu")
    (answer,) = speaker.answers([ChatQuestion([image, "which?"], {"max_new_tokens": 16}, until)])
    assert answer.text == text
    assert answer.tokens == len(pieces) + 3 and answer.latent_steps == 3  # the span's marks and the end of the turn


@pytest.mark.parametrize(
    ("harness", "settings", "stops"),
    [
        ({}, {"max_new_tokens": 9}, ()),
        ({"max_new_tokens": 4, "until": "\n", "temperature": 0, "top_p": None, "num_beams": 1},
         {"max_new_tokens": 4}, ("\n",)),
        ({"do_sample": True, "top_p": 0.5, "until": ["a", "b"]},
         {"max_new_tokens": 9, "do_sample": True, "temperature": 1.0, "top_p": 0.5}, ("a", "b")),
        ({"temperature": 0.7, "top_k": 3, "seed": 4},
         {"max_new_tokens": 9, "do_sample": True, "temperature": 0.7, "top_k": 3, "seed": 4}, ()),
        ({"do_sample": True, "temperature": 0}, {"max_new_tokens": 9}, ()),
    ],
)  # fmt: skip
def test_generation_settings(harness, settings, stops):
    assert sampling_settings(harness, 9) == (settings, stops)


def test_generation_settings_that_do_not_exist():
    with pytest.raises(ConfigError, match=r"\['num_beams'\] are not supported"):
        sampling_settings({"num_beams": 4}, 9)


def test_bad_values(checkpoint):
    with pytest.raises(ConfigError, match="dtype: expected one of .*, got 'int4'"):
        ChatAnswerer(str(checkpoint), dtype="int4")
    with pytest.raises(ConfigError, match="min_pixels <= max_pixels"):
        ChatAnswerer(str(checkpoint), min_pixels=10_000_000, max_pixels=1000)


def test_vlmevalkits_launcher(saying, image, tmp_path, monkeypatch, capsys):
    package = tmp_path / "vlmeval" / "vlm"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "base.py").write_text(BASE)
    (package.parent / "config.py").write_text("supported_VLM = {}\n")
    (tmp_path / "run.py").write_text(RUN)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    flags = ["--kit", str(tmp_path), "--pretrained", str(saying("\n<answer>", " B", " </answer>"))]
    flags += ["--force-latent", "--max-new-tokens", "6", "--device", "cpu"]
    try:
        vlmevalkit.main(
            [*flags, "--force-latent", "--max-new-tokens", "6", "--device", "cpu", "--", "--data", "MMVP", str(image)]
        )
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "vlmeval"]:
            del sys.modules[name]
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said == {"data": "MMVP", "interleave": True, "answer": "B"}


def test_a_folder_that_is_no_kit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--kit", str(tmp_path), "--pretrained", "m"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("vreflection.harnesses.vlmevalkit", run_name="__main__")
    assert ended.value.code == 2 and "expected a VLMEvalKit checkout with run.py" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="expected text and images, got video"):
        vlmevalkit.segments_of([{"type": "video", "value": "v"}])


def test_photos_are_taken_upright_from_files_and_objects(answerer, tmp_path):
    pixels, tags = np.random.default_rng(2).integers(0, 256, (84, 56, 3), dtype=np.uint8), Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "side.png", exif=tags)
    right = answerer.prompt(ChatQuestion([Image.fromarray(pixels), "which?"]))
    with Image.open(tmp_path / "side.png") as opened:
        for image in (tmp_path / "side.png", opened):
            prompt = answerer.prompt(ChatQuestion([image, "which?"]))
            assert prompt.image_grid_thw.tolist() == [[1, 6, 4]] and (prompt.pixel_values == right.pixel_values).all()
    decoder = LatentDecoder(answerer.model, max_batch_size=1, processor=answerer.processor)
    assert (decoder.prompt(("which?", [tmp_path / "side.png"])).pixel_values == right.pixel_values).all()
