import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from vreflection.quickstart import base, captioning, pretrain
from vreflection.quickstart.notes import Note, Scene, random_scene


def scene_of(*notes: Note) -> Scene:
    return Scene(np.zeros((224, 224, 3), np.uint8), notes, "none")


def test_token_labels_follow_the_majority_of_cells():
    # 42 px at (14, 0): half of token 0, all of token 1; its last row of cells covers half of what it touches below.
    labels = pretrain.token_labels(scene_of(Note("red", 7, 0, 14, 0, 42), Note("blue", 3, 0, 112, 112, 56, "white")))
    digits, colours, frames = (labels[name].reshape(8, 8) for name in ("digit", "colour", "frame"))
    assert digits[:2, :2].tolist() == [[7, 7], [7, 7]]
    assert digits[4:6, 4:6].tolist() == [[3, 3], [3, 3]]
    assert (digits == 10).sum() == 64 - 8
    assert colours[0, 0] == 0 and colours[7, 7] == 8
    # A note without a frame has the background's; white is the last colour.
    assert frames[0, 0] == 8 and frames[4, 4] == 7 and frames[7, 7] == 8


def test_tied_tokens_are_ignored():
    # Side by side on an odd cell: each takes half of the shared tokens' cells.
    labels = pretrain.token_labels(scene_of(Note("red", 7, 0, 0, 0, 42), Note("blue", 3, 0, 42, 0, 42)))
    assert labels["digit"].reshape(8, 8)[0].tolist()[:4] == [7, pretrain.IGNORED, 3, 10]


def test_crowded_scenes_label_every_note():
    scene = random_scene("train", np.random.default_rng(0), 14, framed=True)
    digits = pretrain.token_labels(scene)["digit"]
    assert len(scene.notes) > 8
    assert set(digits) - {pretrain.IGNORED, 10} <= {note.digit for note in scene.notes}


def test_captions_and_their_score():
    notes = (Note("red", 7, 0, 0, 0, 42), Note("blue", 3, 0, 42, 0, 42))
    assert captioning.caption_text(notes) == " red 7 blue 3"
    assert captioning.caption_score(" blue 3 red 7", notes) == 1.0
    assert captioning.caption_score(" blue 7 red 3", notes) == 0.0
    assert captioning.caption_score(" red 7 red 5 blue", notes) == 0.5
    assert captioning.caption_score("", notes) == 0.0
    framed = (Note("red", 7, 0, 0, 0, 56, "blue"), Note("blue", 3, 0, 56, 0, 56, "red"))
    assert captioning.caption_text(framed) == " red blue 7 blue red 3"
    assert captioning.caption_text(framed, digit_first=True) == " red 7 blue blue 3 red"
    assert captioning.caption_score(" red 7 blue blue red 3", framed) == 1.0
    assert captioning.caption_score(" red blue 7 blue white 3", framed) == 0.5


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Two updates a phase: checks the plumbing, not the accuracy."""
    ticks = []
    settings = pretrain.PretrainSettings(
        vision_steps=4, caption_steps=6, batch_size=2, caption_images=8, validation_images=2
    )
    state = torch.random.get_rng_state()
    folder = pretrain.pretrain_base(
        tmp_path_factory.mktemp("pretrain") / "base", seed=3, on_progress=lambda *t: ticks.append(t), settings=settings
    )
    assert torch.equal(state, torch.random.get_rng_state())
    return folder, ticks, settings


def test_pretraining_writes_a_loadable_folder_with_an_honest_log(tiny_run):
    folder, ticks, _ = tiny_run
    assert ticks == [(done, 14) for done in range(1, 15)]  # updates and four batches of features
    model, tokenizer = base.load_base(folder)
    log = json.loads((folder / "training_log.json").read_text())
    assert log["seed"] == 3 and log["settings"]["vision_steps"] == 4
    assert log["validation"]["caption_accuracy"] == pytest.approx(
        captioning.caption_accuracy(model, tokenizer, pretrain.validation_scenes("follow_the_notes", 2)), abs=1e-4
    )
    assert {row["phase"] for row in log["curve"]} == {"vision", "caption"}
    assert [path.name for path in folder.parent.iterdir()] == ["base"]


def test_a_base_on_the_tower_of_another_is_the_one_made_in_one_go(tiny_run, tmp_path):
    folder, _, settings = tiny_run
    pretrain.pretrain_base(tmp_path / "again", 3, settings=replace(settings, vision_from=str(folder)))
    first, again = (base.load_base(path)[0].state_dict() for path in (folder, tmp_path / "again"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    logs = [json.loads((path / "training_log.json").read_text()) for path in (folder, tmp_path / "again")]
    assert logs[0]["curve"] == logs[1]["curve"] and logs[0]["settings"] == logs[1]["settings"]


def test_another_depth_keeps_the_tower(tiny_run, tmp_path):
    folder, _, settings = tiny_run
    pretrain.pretrain_base(tmp_path / "two", 3, settings=replace(settings, layers=2, vision_from=str(folder)))
    deep, shallow = base.load_base(folder)[0], base.load_base(tmp_path / "two")[0]
    assert len(shallow.model.language_model.layers) == 2 and len(deep.model.language_model.layers) == 4
    other = shallow.model.visual.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in deep.model.visual.state_dict().items())


def test_pretraining_sees_training_material_only(monkeypatch):
    seen = set()
    monkeypatch.setattr(pretrain, "random_scene", lambda split, *rest: seen.add(split) or random_scene(split, *rest))
    settings = pretrain.PretrainSettings(vision_steps=1, caption_steps=1, batch_size=2, caption_images=8)
    run = pretrain._Pretraining(settings, 0, None)
    run.train_vision()
    run.take_words_from_heads()
    run.train_language()
    assert seen == {"train"}


def test_language_pass_equals_the_stock_forward(tiny_run):
    """Cached features with explicit positions give the stock model's logits from pixels and token types."""
    run = pretrain._Pretraining(tiny_run[2], 0, None)
    run.bf16 = False
    scenes = run.scenes(6, framed=True)
    prompt = captioning.prompt_ids(run.tokenizer)
    input_ids = torch.tensor([prompt + run.caption_target(scene) for scene in scenes])
    pixels = pretrain.pack_pixels(np.stack([scene.pixels_HWC for scene in scenes]))
    with torch.no_grad():
        ours = run.model.lm_head(run.language_hidden(input_ids, run.features(scenes)))
        stock = run.model(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            mm_token_type_ids=(input_ids == run.model.config.image_token_id).int(),
            pixel_values=pixels,
            image_grid_thw=torch.tensor([[1, 16, 16]] * len(scenes)),
        ).logits
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
