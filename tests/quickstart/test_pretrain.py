import json

import numpy as np
import pytest
import torch

from vreflection.quickstart import base, captioning, pretrain
from vreflection.quickstart.notes import Note, Scene, make_scene


def scene_of(*notes: Note) -> Scene:
    return Scene(np.zeros((224, 224, 3), np.uint8), notes, "none")


def test_token_labels_follow_the_majority_of_cells():
    # 42 px at (14, 0): half of token 0, all of token 1; its last row of cells covers half of what it touches below.
    digits, colours = pretrain.token_labels(scene_of(Note("red", 7, 0, 14, 0, 42), Note("blue", 3, 0, 112, 112, 56)))
    assert digits.reshape(8, 8)[:2, :2].tolist() == [[7, 7], [7, 7]]
    assert digits.reshape(8, 8)[4:6, 4:6].tolist() == [[3, 3], [3, 3]]
    assert (digits == pretrain.BACKGROUND_DIGIT).sum() == 64 - 8
    assert colours.reshape(8, 8)[0, 0] == 0 and colours.reshape(8, 8)[7, 7] == pretrain.BACKGROUND_COLOUR


def test_tied_tokens_are_ignored():
    # Side by side on an odd cell: each takes half of the shared tokens' cells.
    digits, _ = pretrain.token_labels(scene_of(Note("red", 7, 0, 0, 0, 42), Note("blue", 3, 0, 42, 0, 42)))
    assert digits.reshape(8, 8)[0].tolist()[:4] == [7, pretrain.IGNORED, 3, pretrain.BACKGROUND_DIGIT]


def test_crowded_scenes_label_every_note():
    scene = make_scene("train", np.random.default_rng(0), 16)
    digits, _ = pretrain.token_labels(scene)
    assert len(scene.notes) > 8
    assert set(digits) - {pretrain.IGNORED, pretrain.BACKGROUND_DIGIT} <= {note.digit for note in scene.notes}


def test_caption_score():
    notes = (Note("red", 7, 0, 0, 0, 42), Note("blue", 3, 0, 42, 0, 42))
    assert captioning.caption_text(notes) == " red 7 blue 3"
    assert captioning.caption_score(" blue 3 red 7", notes) == 1.0
    assert captioning.caption_score(" blue 7 red 3", notes) == 0.0
    assert captioning.caption_score(" red 7 red 5 blue", notes) == 0.5
    assert captioning.caption_score("", notes) == 0.0


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Two updates a phase: checks the plumbing, not the accuracy."""
    ticks = []
    settings = pretrain.PretrainSettings(
        vision_steps=2, caption_steps=2, batch_size=2, caption_images=3, validation_images=2
    )
    state = torch.random.get_rng_state()
    folder = pretrain.pretrain_base(
        tmp_path_factory.mktemp("pretrain") / "base", seed=3, on_progress=lambda *t: ticks.append(t), settings=settings
    )
    assert torch.equal(state, torch.random.get_rng_state())
    return folder, ticks, settings


def test_pretraining_writes_a_loadable_folder_with_an_honest_log(tiny_run):
    folder, ticks, _ = tiny_run
    assert ticks == [(done, 6) for done in range(1, 7)]  # two updates, two feature batches, two updates
    model, tokenizer = base.load_base(folder)
    log = json.loads((folder / "training_log.json").read_text())
    assert log["seed"] == 3 and log["settings"]["vision_steps"] == 2
    assert log["validation"]["caption_accuracy"] == pytest.approx(
        captioning.caption_accuracy(model, tokenizer, captioning.validation_scenes(2)), abs=1e-4
    )
    assert {row["phase"] for row in log["curve"]} == {"vision", "caption"}
    assert [path.name for path in folder.parent.iterdir()] == ["base"]


def test_pretraining_sees_training_material_only(monkeypatch, tmp_path):
    from vreflection.quickstart import notes

    seen, make = set(), notes.make_scene
    monkeypatch.setattr(pretrain, "make_scene", lambda split, *rest: seen.add(split) or make(split, *rest))
    settings = pretrain.PretrainSettings(vision_steps=1, caption_steps=1, batch_size=2, caption_images=2)
    run = pretrain._Pretraining(settings, 0, None)
    run.train_vision()
    run.take_words_from_heads()
    run.train_captions()
    assert seen == {"train"}


def test_caption_pass_equals_the_stock_forward(tiny_run):
    """Cached features with explicit positions give the stock model's logits from pixels and token types."""
    run = pretrain._Pretraining(tiny_run[2], 0, None)
    run.bf16 = False
    scenes = run.scenes()
    prompt = captioning.prompt_ids(run.tokenizer)
    input_ids = torch.tensor([run.caption_ids(prompt, scene.notes) for scene in scenes])
    pixels = pretrain.pack_pixels(np.stack([scene.pixels_HWC for scene in scenes]))
    with torch.no_grad():
        ours = run.model.lm_head(run.caption_hidden(input_ids, run.features(scenes)))
        stock = run.model(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            mm_token_type_ids=(input_ids == run.model.config.image_token_id).int(),
            pixel_values=pixels,
            image_grid_thw=torch.tensor([[1, 16, 16]] * len(scenes)),
        ).logits
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
