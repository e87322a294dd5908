"""Asking questions and measuring latents on a tiny model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from vreflection.data.boxes import box_mask
from vreflection.data.images import open_image
from vreflection.data.template import Turn
from vreflection.data.visual_cot import Sample
from vreflection.evaluation.latents import (
    cosine_to_teacher,
    free_running_maps,
    grounding,
    stack_latents,
    swap_partners,
)
from vreflection.evaluation.questions import (
    Decoded,
    answers_right,
    decode_answers,
    expected_answer,
    extract_answer,
    note_row,
    teacher_forced,
)
from vreflection.model.layout import BatchLayout

GRIDS = ((2, 3), (3, 2), (2, 2), (2, 4), (4, 2))
BOXES = ((0.1, 0.1, 0.6, 0.7), (0.0, 0.5, 1.0, 1.0), (0.2, 0.2, 0.4, 0.4), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0))
ANSWERS = ("red", "red", "blue", "green", "red")


def question(number=0, answer="red", path="none.png", box=BOXES[0], text="<image>\nq?"):
    turns = (Turn("user", text), Turn("assistant", f"<lvr>\n<answer> {answer} </answer>"))
    return Sample(str(number), "notes", (path,), turns, np.array([box]), np.array([0]), f"f.json:{number + 1}")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder, rng, made = tmp_path_factory.mktemp("questions"), np.random.default_rng(0), []
    for number, (h, w) in enumerate(GRIDS):
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (28 * h, 28 * w, 3), dtype=np.uint8)).save(path)
        text = "<image>\n" + "which? " * number
        made.append(question(number, ANSWERS[number], str(path), BOXES[number], text))
    return made


@pytest.fixture(scope="module")
def processor(tiny):
    return tiny.processor()


@pytest.fixture(scope="module")
def model(tiny):
    built = tiny.model("stage2")
    built.generation_config = GenerationConfig(eos_token_id=tiny.EOS, pad_token_id=tiny.PAD)
    return built


@pytest.fixture(scope="module")
def cache(model, processor, samples):
    features = {}
    for sample in samples:
        made = processor.process_images([open_image(sample.image_paths[0])])
        with torch.no_grad():
            features[sample.image_paths[0]] = (model.visual_tokens(**made), made["image_grid_thw"][0])
    return features


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> red </answer>", "red"),
        ("thinking <answer>\n two words\n</answer> done", "two words"),
        ("<answer> cut off", "cut off"),
        ("<answer> a </answer> no, <answer> b </answer>", "b"),
        ("<answer></answer>", ""),
        ("red", None),
        ("</answer>", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_expected_answer():
    assert expected_answer(question(answer="7")) == "7"
    bad = question()
    bad = Sample("0", "n", (), (bad.conversations[0], Turn("assistant", "red")), bad.boxes, bad.box_images, "f.json:3")
    with pytest.raises(ValueError, match="f.json:3: the answer turn has no <answer>"):
        expected_answer(bad)


def test_swap_partners_have_another_answer():
    made = [question(answer=a) for a in ("red", "red", "blue", "red", "green")]
    assert swap_partners(made) == [2, 2, 3, 4, 0]
    with pytest.raises(ValueError, match="at least two different answers"):
        swap_partners(made[:2])


def test_box_mask_is_the_window_rule():
    assert box_mask((0.0, 0.0, 0.5, 0.5), 2, 4).tolist() == [[True, True, False, False], [False] * 4]
    assert box_mask((0.0, 0.0, 0.51, 0.5), 2, 4).tolist() == [[True, True, True, False], [False] * 4]
    assert box_mask((0.9, 0.9, 1.0, 1.0), 2, 4).nonzero()[1].tolist() == [3]


def test_grounding_by_hand():
    box = (0.0, 0.0, 0.5, 0.5)  # two of the eight tokens: (0, 0) and (0, 1)
    inside, outside, split = torch.zeros(3, 1, 2, 4).unbind(0)
    inside[0, 0, :2] = 0.5
    outside[0, 1, 2:] = 0.5
    split[0, 0, 0], split[0, 1, 3] = 0.75, 0.25
    for attention, mass, iou in ((inside, 1, 1), (outside, 0, 0), (split, 0.75, 1 / 3)):
        found = grounding([attention], [box])
        assert found == {"mass": pytest.approx(mass), "iou": pytest.approx(iou), "uniform": 0.25, "n": 1}
    both = grounding([inside, outside], [box, box])
    assert (both["mass"], both["iou"], both["n"]) == (0.5, 0.5, 2)
    # Queries are averaged before the top tokens are taken.
    assert grounding([torch.cat([inside, outside])], [box])["mass"] == pytest.approx(0.5)
    even = torch.full((3, 2, 4), 1 / 8)
    assert grounding([even], [box])["mass"] == pytest.approx(grounding([even], [box])["uniform"])
    assert grounding([even], [(0, 0, 1, 1)]) == {"mass": pytest.approx(1), "iou": 1, "uniform": 1, "n": 1}
    with pytest.raises(ValueError):
        grounding([even], [])


def test_answers_right_looks_after_the_span_only(tiny):
    rows = [tiny.row([(2, 2)], [((0, 0, 1, 1), 0)], answer=(11, 12)), tiny.row(answer=(13,))]
    config, batch = tiny.model("stage2").config, tiny.batch(rows)
    layout = BatchLayout.from_batch(
        config, *(batch[k] for k in ("input_ids", "labels", "image_grid_thw", "boxes", "box_sample", "box_image"))
    )
    right = torch.nn.functional.one_hot(layout.targets_S, tiny.VOCABULARY).float()
    judge = lambda logits: answers_right(logits, layout, batch["input_ids"], tiny.LVR_END)  # noqa: E731
    assert layout.targets_S.tolist() == [tiny.LVR_START, tiny.LVR_END, 11, 12, tiny.EOS, 13, tiny.EOS]
    assert judge(right) == [True, True]
    for position, expected in enumerate([[1, 1], [1, 1], [0, 1], [0, 1], [0, 1], [1, 0], [1, 0]]):
        wrong = right.clone()
        wrong[position] = wrong[position].roll(1)
        assert judge(wrong) == [bool(e) for e in expected], position


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_teacher_forced(tiny, processor, samples, stage):
    model = tiny.model(stage)
    forced = teacher_forced(model, processor, samples, batch_size=2)
    assert len(forced.correct) == len(forced.latents) == len(forced.teacher_maps) == len(samples)
    assert not any(forced.correct)  # random weights
    for latents, teacher, box, (h, w) in zip(forced.latents, forced.teacher_maps, BOXES, GRIDS):
        assert latents.shape == (tiny.SLOTS, tiny.WIDTH) and teacher.shape == (tiny.SLOTS, h, w)
        torch.testing.assert_close(teacher.sum((1, 2)), torch.ones(tiny.SLOTS))
        assert (teacher[:, ~torch.from_numpy(box_mask(box, h, w))] == 0).all()
    if stage == "stage1":
        assert forced.student_maps == []
        return
    assert [m.shape for m in forced.student_maps] == [(tiny.SLOTS, h, w) for h, w in GRIDS]
    for student in forced.student_maps:
        torch.testing.assert_close(student.sum((1, 2)), torch.ones(tiny.SLOTS))


def test_teacher_forced_does_not_depend_on_batching_or_the_cache(model, processor, samples, cache):
    one, all_at_once = (teacher_forced(model, processor, samples, batch_size=size) for size in (1, 9))
    cached = teacher_forced(model, processor, samples, cache)
    for other in (all_at_once, cached):
        for name in ("latents", "student_maps", "teacher_maps"):
            for a, b in zip(getattr(one, name), getattr(other, name), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_teacher_forced_answers_that_are_right(tiny, processor, samples):
    """A model that has learned one question by heart."""
    model, sample = tiny.model("stage1"), samples[:1]
    from vreflection.data.collate import Collator
    from vreflection.data.encode import encode_sample

    batch = Collator(tiny.PAD)([encode_sample(sample[0], processor, "latent", num_latents=tiny.SLOTS)])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(**batch).losses["cross_entropy"]
        loss.backward()
        optimizer.step()
    assert teacher_forced(model, processor, sample).correct == [True]


def test_decoding_does_not_depend_on_batching_or_the_cache(tiny, model, processor, samples, cache):
    heard = []
    settings = {"force_latent": True, "max_new_tokens": 6}
    one = decode_answers(model, processor, samples, batch_size=1, **settings)
    batched = decode_answers(
        model, processor, samples, batch_size=2, on_progress=lambda done, n: heard.append((done, n)), **settings
    )
    cached = decode_answers(model, processor, samples, cache, **settings)
    assert heard == [(done, 5) for done in range(1, 6)]
    for other in (batched, cached):
        assert one.texts == other.texts and one.answers == other.answers and one.closed == other.closed
        for name in ("latents", "probes"):
            for a, b in zip(getattr(one, name), getattr(other, name), strict=True):
                assert a.shape == (tiny.SLOTS, tiny.WIDTH)
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert all(one.triggered) and one.correct(samples) == 0


def test_decoding_is_greedy_whatever_the_checkpoint_says(tiny, model, processor, samples):
    expected = decode_answers(model, processor, samples, max_new_tokens=8).texts
    config = model.generation_config
    try:
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=50.0, eos_token_id=tiny.EOS, pad_token_id=tiny.PAD
        )
        assert decode_answers(model, processor, samples, max_new_tokens=8).texts == expected
        sampled = decode_answers(model, processor, samples, max_new_tokens=8, do_sample=True, seed=0).texts
        assert sampled != expected
    finally:
        model.generation_config = config


def test_given_latents_go_to_their_questions(tiny, model, processor, samples):
    own = torch.randn(len(samples), tiny.SLOTS, tiny.WIDTH)
    settings = {"force_latent": True, "max_new_tokens": 2, "batch_size": 2}
    decoded = decode_answers(model, processor, samples, latents=own, **settings)
    torch.testing.assert_close(torch.stack(decoded.latents), own)


def test_questions_without_a_span(tiny, processor, samples):
    model = tiny.model("sft")
    model.generation_config = GenerationConfig(eos_token_id=tiny.EOS, pad_token_id=tiny.PAD)
    decoded = decode_answers(model, processor, samples[:2], max_new_tokens=3)
    assert decoded.latents == decoded.probes == [None, None] and decoded.triggered == [False, False]
    assert stack_latents(decoded, torch.ones(3, 4)).tolist() == torch.zeros(2, 3, 4).tolist()
    assert cosine_to_teacher(decoded, [torch.ones(3, 4)] * 2) is None
    assert free_running_maps(model, decoded, samples[:2], {}) == [None, None]


def test_what_is_noted_of_a_row(tiny, processor):
    span, text = tiny.span(), processor.encode_text
    z = torch.randn(2, tiny.SLOTS, tiny.WIDTH)
    for ids, latents, answer, triggered, closed in (
        ([*span, *text("\n<answer> red </answer>"), tiny.EOS, tiny.PAD], z, "red", True, True),
        ([*span[:-1], *text("<answer> x")], z, "x", True, False),
        ([*text("<answer> red </answer>"), tiny.EOS], z[:0], "red", False, False),
        ([*text("red"), tiny.LVR_START], z[:0], None, True, False),
    ):
        result = Decoded()
        inside = [token == tiny.LVR for token in ids]
        note_row(result, processor, ids, inside, latents, latents + 1)
        # Ghosts, as in parity mode, are told by their positions.
        ghosts = [tiny.EOS if latent else token for token, latent in zip(ids, inside)]
        other = Decoded()
        note_row(other, processor, ghosts, inside, latents, latents + 1)
        assert (other.texts, other.closed) == (result.texts, result.closed)
        assert (result.answers, result.triggered, result.closed) == ([answer], [triggered], [closed])
        if len(latents):
            assert torch.equal(result.latents[0], z[0]) and torch.equal(result.probes[0], z[0] + 1)
        else:
            assert result.latents == result.probes == [None]
    assert result.texts == ["red"]
    assert Decoded(answers=["red", None, "blue"]).correct([question(answer=a) for a in ("red", "red", "red")]) == 1


def test_free_running_maps_are_the_students(tiny, model, processor, samples, cache):
    decoded = decode_answers(model, processor, samples, cache, force_latent=True, max_new_tokens=2)
    maps = free_running_maps(model, decoded, samples, cache)
    for found, probes, sample, (h, w) in zip(maps, decoded.probes, samples, GRIDS):
        assert found.shape == (tiny.SLOTS, h, w)
        tokens = cache[sample.image_paths[0]][0]
        attention = model.student_resampler.cross_attn
        _, expected = attention(probes[None], tokens[None], tokens[None])
        torch.testing.assert_close(found.flatten(1), expected[0].detach(), rtol=1e-4, atol=1e-5)


def test_cosine_to_teacher():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    decoded = SimpleNamespace(latents=[a, None, -a])
    assert cosine_to_teacher(decoded, [3 * a, a, a]) == pytest.approx(0.0)
    assert cosine_to_teacher(SimpleNamespace(latents=[a, None]), [3 * a, a]) == pytest.approx(1.0)
