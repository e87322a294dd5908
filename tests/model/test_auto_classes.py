"""Folders of ours through the host library's Auto classes: our classes, or a refusal."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import vreflection as vr
from vreflection.model.conversion import convert_checkpoint


def run(code, folder):
    settings = {**os.environ, "HF_MODULES_CACHE": str(folder.parent / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        env=settings,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


LOAD = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
folder = sys.argv[1]
for auto in (AutoConfig, AutoModelForImageTextToText, AutoModel, AutoModelForMultimodalLM, AutoProcessor):
    print(type(auto.from_pretrained(folder)).__name__)
"""
OURS = ["VReflectionConfig", *["VReflectionForConditionalGeneration"] * 3, "VReflectionProcessor"]


@pytest.mark.parametrize(
    "code",
    [
        "import vreflection; from transformers import Qwen2_5_VLConfig" + LOAD,
        LOAD.replace("folder =", "import vreflection; folder ="),
    ],
    ids=["first", "last"],
)
def test_auto_classes_give_ours_whichever_library_came_first(checkpoint, code):
    assert run(code, checkpoint) == OURS


def test_without_this_package_the_folder_is_refused(checkpoint):
    code = """
import sys
from transformers import AutoModelForImageTextToText
try:
    AutoModelForImageTextToText.from_pretrained(sys.argv[1])
except ValueError as error:
    print("refused", "`vreflection`" in str(error), "vreflection" in sys.modules)
"""
    assert run(code, checkpoint) == ["refused", "True", "False"]


@pytest.mark.parametrize("source", ["saved", "converted"])
def test_without_this_package_no_processor_drops_images(checkpoint, tmp_path, source):
    code = """
import sys
from transformers import AutoProcessor, AutoTokenizer
results = ["<|lvr|>" in AutoTokenizer.from_pretrained(sys.argv[1]).get_vocab()]
for settings in ({}, {"trust_remote_code": False}):
    try:
        results.append(type(AutoProcessor.from_pretrained(sys.argv[1], **settings)).__name__)
    except ValueError as error:
        results += ["trust_remote_code=True" in str(error), "vreflection" in sys.modules]
print("", *results, type(AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)
"""
    folder = tmp_path / "saved"
    shutil.copytree(checkpoint, folder)
    if source == "converted":
        convert_checkpoint(folder, tmp_path / "converted")
        folder = tmp_path / "converted"
    # The library prints its question about the code first.
    assert run(code, folder)[-6:] == ["True", *["True", "False"] * 2, "VReflectionProcessor"]


def test_folders_of_earlier_versions_load_as_ours(checkpoint, tmp_path, recwarn):
    old = tmp_path / "old"
    shutil.copytree(checkpoint, old)
    config = json.loads((old / "config.json").read_text())
    assert config["model_type"] == "vreflection"
    (old / "config.json").write_text(json.dumps({**config, "model_type": "qwen2_5_vl"}))
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        settings = json.loads((old / name).read_text())
        assert settings.pop("processor_class") == "VReflectionProcessor"
        (old / name).write_text(json.dumps(settings))
    model = vr.VReflectionForConditionalGeneration.from_pretrained(old)
    new = vr.VReflectionForConditionalGeneration.from_pretrained(checkpoint)
    assert model.config.model_type == "vreflection"
    assert model.config.to_dict() == {**new.config.to_dict(), "_name_or_path": model.config._name_or_path}
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), new.state_dict().values(), strict=True))
    assert vr.VReflectionProcessor.from_pretrained(old).visual_token_limits == (4, 24)


@pytest.mark.parametrize("layout", ["qwen2_5_vl", "released"])
def test_other_layouts_name_the_host_librarys_classes(checkpoint, tmp_path, layout):
    from transformers import AutoConfig, AutoModelForImageTextToText

    convert_checkpoint(checkpoint, tmp_path / "out", layout)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen2_5_vl"
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        settings = json.loads((tmp_path / "out" / name).read_text())
        assert settings["processor_class"] == "Qwen2_5_VLProcessor" and "auto_map" not in settings
    assert not list((tmp_path / "out").glob("*.py"))
    assert type(AutoConfig.from_pretrained(tmp_path / "out")).__name__ == "Qwen2_5_VLConfig"
    if layout == "qwen2_5_vl":
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
        assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    convert_checkpoint(tmp_path / "out", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "vreflection"
    settings = json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())
    assert settings["processor_class"] == "VReflectionProcessor"


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8))


def chat(image, question="what is this ?"):
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def test_the_pipeline_answers_as_the_model_does(checkpoint, image):
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=str(checkpoint))
    assert isinstance(pipe.model, vr.VReflectionForConditionalGeneration)
    assert isinstance(pipe.processor, vr.VReflectionProcessor)
    batch = pipe.processor(image, "what is this ?")
    output = pipe.model.generate(**batch, max_new_tokens=12)[0, batch["input_ids"].shape[1] :]
    expected = pipe.processor.decode(output)
    assert len(expected) > 2
    template_text = pipe.processor.apply_chat_template(chat(image), add_generation_prompt=True)
    for inputs in (
        {"text": chat(image)},
        {"text": "what is this ?", "images": image},
        {"text": template_text, "images": image},
    ):
        assert pipe(**inputs, max_new_tokens=12, return_full_text=False)[0]["generated_text"] == expected


def test_the_pipeline_of_any_modality(checkpoint, image, monkeypatch):
    from transformers import pipeline
    from transformers.pipelines import any_to_any

    # It requires torchvision of every image model; ours reads images without.
    monkeypatch.setattr(any_to_any, "requires_backends", lambda model, backends: None)
    pipe = pipeline("any-to-any", model=str(checkpoint))
    assert isinstance(pipe.model, vr.VReflectionForConditionalGeneration)
    batch = pipe.processor(image, "what is this ?")
    output = pipe.model.generate(**batch, max_new_tokens=12)[0, batch["input_ids"].shape[1] :]
    for inputs in ({"text": chat(image)}, {"text": "what is this ?", "images": image}):
        answer = pipe(**inputs, max_new_tokens=12, return_full_text=False, clean_up_tokenization_spaces=False)
        assert answer[0]["generated_text"] == pipe.processor.decode(output)


def test_chat_messages_are_the_prompts_of_training(checkpoint, image, tmp_path):
    processor = vr.VReflectionProcessor.from_pretrained(checkpoint)
    expected = processor(image, "what is this ?")
    image.save(tmp_path / "image.png")
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    for source in (image, str(tmp_path / "image.png"), (tmp_path / "image.png").read_bytes()):
        batch = processor.apply_chat_template(chat(source), **settings)
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)
    both = processor.apply_chat_template([chat(image), [{"role": "user", "content": "Hi"}]], **settings)
    assert both["attention_mask"].sum(1).tolist()[0] == expected["input_ids"].shape[1]
    text = processor.apply_chat_template(chat(image), add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"
        "<|vision_end|>what is this ?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert all(torch.equal(processor(image, text)[name], expected[name]) for name in expected)
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert processor.apply_chat_template(system, add_generation_prompt=True).startswith("<|im_start|>system\nBe brief.")


USER = {"role": "user", "content": "Hi"}
TO_ANSWER = {"add_generation_prompt": True, "tokenize": True}


@pytest.mark.parametrize(
    ("conversation", "settings", "message"),
    [
        ([USER], {"tokenize": True}, "expected one of add_generation_prompt=True and continue_final_message=True: "),
        (
            [USER],
            {"add_generation_prompt": True, "continue_final_message": True},
            "expected only one of add_generation_prompt=True and continue_final_message=True",
        ),
        ("Hi", {"add_generation_prompt": True}, "expected a list of messages"),
        ([{"role": "tool", "content": "x"}], {"add_generation_prompt": True}, "got 'tool'"),
        ([USER, {"role": "assistant", "content": "x"}], {"add_generation_prompt": True}, "a user message last"),
        ([{"role": "user", "content": [{"type": "video"}]}], {"add_generation_prompt": True}, "got 'video'"),
        ([{"role": "user", "content": [{"type": "image"}]}], TO_ANSWER, "an image under one of"),
        ([{"role": "user", "content": [{"type": "image", "image": 3}]}], TO_ANSWER, "message 0, image: .* got int"),
        ([USER], {"add_generation_prompt": True, "tokenize": True, "return_tensors": "np"}, 'expected "pt", got'),
    ],
)  # fmt: skip
def test_what_is_no_conversation(checkpoint, conversation, settings, message):
    with pytest.raises(ValueError, match=message):
        vr.VReflectionProcessor.from_pretrained(checkpoint).apply_chat_template(conversation, **settings)


def test_offsets_of_the_objective_travel_with_the_weights(tiny, tmp_path):
    from dataclasses import replace

    model = tiny.model("stage2")
    model.objective = replace(model.objective, probe_offset=-1, alignment_weight=0.5, alignment_offset=0)
    model.objective = replace(model.objective, alignment_weight=None, alignment_offset=-1)  # not trained any more
    model.save_pretrained(tmp_path / "a")
    tiny.processor().save_pretrained(tmp_path / "a")
    convert_checkpoint(tmp_path / "a", tmp_path / "released", "released")
    convert_checkpoint(tmp_path / "released", tmp_path / "back")
    for name in ("a", "released", "back"):
        loaded = vr.VReflectionForConditionalGeneration.from_pretrained(tmp_path / name)
        assert (loaded.objective.probe_offset, loaded.objective.alignment_offset) == (-1, 0)
    later = vr.VReflectionForConditionalGeneration.from_base(loaded, "decode")
    assert later.objective.probe_offset == -1
