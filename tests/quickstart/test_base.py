import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vreflection.quickstart import base, captioning, pretrain
from vreflection.quickstart.batched_vision import pack_pixels, vision_features
from vreflection.quickstart.tasks import TASKS, question_text, scene_at
from vreflection.quickstart.tokenizer import special_ids


@pytest.fixture(scope="module")
def shipped():
    return base.load_base()


FOLLOW = TASKS["follow_the_notes"]


@pytest.fixture(scope="module")
def scenes():
    return pretrain.validation_scenes("follow_the_notes", 32, seed=100)  # other scenes than those of the training log


def test_shipped_base_lists_notes_it_never_saw(shipped, scenes):
    assert captioning.caption_accuracy(*shipped, scenes) >= 0.2


def test_random_weights_do_not(scenes):
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    tokenizer = base.build_tokenizer()
    model = Qwen2_5_VLForConditionalGeneration(base.base_config(tokenizer)).eval()
    assert captioning.caption_accuracy(model, tokenizer, scenes) < 0.05


def test_shipped_base_has_not_learned_to_answer_questions(shipped, scenes):
    model, tokenizer = shipped
    processor = base.build_image_processor()
    for scene in scenes[:8]:
        ids = captioning.prompt_ids(tokenizer, question_text(FOLLOW, scene, 0))
        input_ids = torch.tensor([ids])
        inputs = processor(Image.fromarray(scene.pixels_HWC), return_tensors="pt")
        answer = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            mm_token_type_ids=(input_ids == model.config.image_token_id).int(),
            max_new_tokens=8,
            do_sample=False,
            **inputs,
        )
        assert "<answer>" not in tokenizer.decode(answer[0, len(ids) :])


def test_shipped_config_matches_the_code(shipped):
    model, tokenizer = shipped
    config, built = model.config, base.base_config(tokenizer)
    for name, value in special_ids(tokenizer).items():
        holder = config.text_config if name in ("bos_token_id", "eos_token_id") else config
        if name != "pad_token_id":
            assert getattr(holder, name) == value, name
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert len(tokenizer) <= config.text_config.vocab_size == built.text_config.vocab_size
    assert list(config.vision_config.fullatt_block_indexes) == list(range(config.vision_config.depth))
    head_width = config.text_config.hidden_size // config.text_config.num_attention_heads
    assert sum(config.text_config.rope_parameters["mrope_section"]) == head_width // 2
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_shipped_folder_is_complete_and_small():
    files = {path.name: path.stat().st_size for path in base.base_dir().iterdir()}
    needed = {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert needed | {
        "preprocessor_config.json",
        "training_log.json",
        "chat_template.jinja",
        "vision_heads.safetensors",
    } <= set(files)
    assert sum(files.values()) <= 8e6
    from safetensors import safe_open

    with safe_open(base.base_dir() / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118
    log = json.loads((base.base_dir() / "training_log.json").read_text())
    assert {"seed", "settings", "seconds", "versions", "validation", "curve"} <= set(log)
    assert log["validation"]["token_digit_accuracy"] >= 0.95
    assert {point["phase"] for point in log["curve"]} == {"vision", "caption"}


def test_processors_read_the_shipped_folder():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    image = Image.fromarray(scene_at(FOLLOW, "validation", 0, 0).pixels_HWC)
    loaded = Qwen2VLImageProcessorPil.from_pretrained(base.base_dir())(image, return_tensors="pt")
    assert loaded["image_grid_thw"].tolist() == [[1, 16, 16]]
    assert torch.equal(loaded["pixel_values"], base.build_image_processor()(image, return_tensors="pt")["pixel_values"])


def test_batched_vision_equals_the_stock_forward(shipped):
    visual = shipped[0].model.visual
    images = np.stack([scene_at(FOLLOW, "validation", index, 0).pixels_HWC for index in range(3)])
    stock_inputs = base.build_image_processor()([Image.fromarray(image) for image in images], return_tensors="pt")
    pixel_values = pack_pixels(images)
    torch.testing.assert_close(pixel_values, stock_inputs["pixel_values"], rtol=0, atol=1e-6)
    with torch.no_grad():
        stock = visual(stock_inputs["pixel_values"], grid_thw=stock_inputs["image_grid_thw"]).pooler_output
        batched = vision_features(visual, pixel_values, 3)
    assert batched.shape == (3, 64, 192)
    torch.testing.assert_close(batched.flatten(0, 1), stock, rtol=1e-4, atol=1e-4)


def test_windowed_tower_is_refused(shipped, monkeypatch):
    visual = shipped[0].model.visual
    monkeypatch.setattr(visual, "fullatt_block_indexes", [0])
    with pytest.raises(ValueError, match="full attention"):
        vision_features(visual, torch.zeros(256, 1176), 1)


def test_save_replaces_models_only(shipped, tmp_path):
    model, tokenizer = shipped
    folder = base.save_base(model, tokenizer, tmp_path / "base", {"note.txt": b"a"})
    assert model.dtype == torch.float32  # the caller's model is left alone
    base.save_base(model, tokenizer, folder)
    assert not (folder / "note.txt").exists() and [path.name for path in tmp_path.iterdir()] == ["base"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="config.json"):
        base.save_base(model, tokenizer, tmp_path / "mine")
    reloaded, _ = base.load_base(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.bfloat16().float(), reloaded.state_dict()[name]), name


def test_missing_base_says_how_to_build_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="pretrain_base"):
        base.load_base(tmp_path)


def test_imports_are_light():
    modules = ["base", "batched_vision", "captioning", "notes", "photos", "pretrain", "tasks", "tokenizer"]
    code = "import sys\n" + "".join(f"import vreflection.quickstart.{name}\n" for name in modules)
    code += "heavy = {'torch', 'transformers', 'sklearn', 'skimage', 'PIL', 'torchvision'} & set(sys.modules)\n"
    code += "sys.exit(str(heavy) if heavy else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
