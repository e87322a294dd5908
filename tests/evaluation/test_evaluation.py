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
    hop_grounding,
    partners_latents,
    partners_of,
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
    return chain(number, answer, (path,), [box], text=text)


def chain(number, answer, paths, boxes, images=None, text="<image>\nq?"):
    """A question with any number of boxes, in the order of its spans."""
    turns = (Turn("user", text), Turn("assistant", f"{'<lvr>' * len(boxes)}\n<answer> {answer} </answer>"))
    images = np.zeros(len(boxes), dtype=np.int64) if images is None else np.array(images)
    boxes = np.array(boxes, dtype=float).reshape(-1, 4)
    return Sample(str(number), "notes", tuple(paths), turns, boxes, images, f"f.json:{number + 1}")


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
        ("<answer> a <answer> b </answer></answer>", "b"),
        ("İ <Answer> B </ANSWER>", "B"),
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


def test_swap_partners_have_another_answer_on_another_image_and_as_many_boxes():
    made = [question(n, a, f"{n}.png") for n, a in enumerate(("red", "red", "blue", "red", "green"))]
    assert swap_partners(made) == [2, 2, 3, 4, 0]
    with pytest.raises(ValueError, match=r"as many boxes; f.json:1 \(1 boxes\) has none"):
        swap_partners(made[:2])
    made = [
        chain(n, answer, [image], BOXES[:count])
        for n, (answer, image, count) in enumerate(
            [("red", "a", 2), ("blue", "a", 2), ("blue", "b", 1), ("green", "b", 2), ("red", "c", 1), ("red", "b", 2)]
        )
    ]
    assert swap_partners(made) == [3, 3, 4, 0, 2, 1]
    with pytest.raises(ValueError, match=r"f.json:3 \(1 boxes\) has none"):
        swap_partners(made[:4])
    assert partners_of("ABB", "112", [1, 1, 1], [True, True, False]) == [None, None, None]


def test_the_partners_latents():
    z, y = torch.full((2, 3, 4), 1.0), torch.full((1, 3, 4), 2.0)
    decoded = SimpleNamespace(latents=[z, None, y])
    taken = partners_latents(decoded, [2, 0, 1])
    assert torch.equal(taken[0], y) and torch.equal(taken[1], z) and torch.equal(taken[2], torch.zeros(1, 3, 4))
    assert partners_latents(decoded, [None, 2, None])[::2] == [None, None]
    assert partners_latents(SimpleNamespace(latents=[None, None]), [1, 0]) == [None, None]


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


def test_grounding_of_several_spans_by_hand():
    """Span j counts in box j alone, and a question as much as any other, whatever its spans."""
    left, right = (0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)
    at_left, at_right, split = torch.zeros(3, 1, 2, 4).unbind(0)
    at_left[0, 0, :2] = at_right[0, 1, 2:] = 0.5
    split[0, 0, 0], split[0, 1, 3] = 0.75, 0.25
    assert grounding([[at_left, at_right]], [[left, right]])["mass"] == 1
    assert grounding([[at_right, at_left]], [[left, right]])["mass"] == 0
    assert grounding([[at_left, at_right]], [[left]])["mass"] == 1  # a span more than boxes
    mixed = grounding([[at_left, at_left], [split]], [[left, right], [left]])
    assert mixed == {"mass": 0.625, "iou": pytest.approx((0.5 + 1 / 3) / 2), "uniform": 0.25, "n": 2}
    # Maps of one span take all boxes together, as before.
    assert grounding([split], [[left, right]])["mass"] == 1
    assert np.isnan(grounding([[]], [np.zeros((0, 4))])["mass"])


def test_hop_grounding_by_hand():
    left, right, top = (0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0), (0.5, 0.0, 1.0, 0.5)
    at_left, at_right, split = torch.zeros(3, 1, 2, 4).unbind(0)
    at_left[0, 0, :2] = at_right[0, 1, 2:] = 0.5
    split[0, 0, 0], split[0, 1, 3] = 0.75, 0.25
    maps = [[at_left, at_right], [split, split], None, [at_right]]
    first, second = hop_grounding(maps, [[left, right], [left, right], [left, right], [left]])
    assert first["n"] == 3 and second["n"] == 2 and first["uniform"] == second["uniform"] == 0.25
    assert first["mass"] == pytest.approx((1 + 0.75 + 0) / 3) and second["mass"] == pytest.approx((1 + 0.25) / 2)
    # The question with one box has nothing to compare with.
    assert (first["right_box"], first["chance"], first["compared"]) == (1.0, 0.5, 2)
    assert (second["right_box"], second["chance"], second["compared"]) == (0.5, 0.5, 2)
    candidates = [[left, right, top]] * 4
    first, second = hop_grounding(maps, [[left, right], [left, right], [left, right], [left]], candidates)
    assert first["right_box"] == pytest.approx(2 / 3) and first["compared"] == 3
    assert second["right_box"] == 0.5 and second["chance"] == pytest.approx(1 / 3)
    # A chain that comes back to a box is not compared with itself.
    (alone, again) = hop_grounding([[at_left, at_left]], [[left, left]])
    assert alone["right_box"] is again["right_box"] is None and again["compared"] == 0 and again["mass"] == 1
    assert hop_grounding([None], [[left]]) == []
    # Boxes on different images do not compete.
    (alone, again) = hop_grounding([[at_left, at_right]], [[left, right]], images=[[0, 1]])
    assert alone["compared"] == again["compared"] == 0


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
    for latents, (teacher,), box, (h, w) in zip(forced.latents, forced.teacher_maps, BOXES, GRIDS):
        assert latents.shape == (1, tiny.SLOTS, tiny.WIDTH) and teacher.shape == (tiny.SLOTS, h, w)
        torch.testing.assert_close(teacher.sum((1, 2)), torch.ones(tiny.SLOTS))
        assert (teacher[:, ~torch.from_numpy(box_mask(box, h, w))] == 0).all()
    if stage == "stage1":
        assert forced.student_maps == []
        return
    assert [[m.shape for m in maps] for maps in forced.student_maps] == [[(tiny.SLOTS, h, w)] for h, w in GRIDS]
    for (student,) in forced.student_maps:
        torch.testing.assert_close(student.sum((1, 2)), torch.ones(tiny.SLOTS))


@pytest.fixture(scope="module")
def chains(samples):
    """Questions with two, none, three and one boxes; the third over two images, the last on its second image."""
    paths = [sample.image_paths[0] for sample in samples]
    return [
        chain(0, "red", paths[:1], BOXES[:2]),
        chain(1, "blue", paths[1:2], []),
        chain(2, "green", paths[2:4], BOXES[:3], [1, 0, 1], "<image>\n<image>\nq?"),
        chain(3, "red", paths[3:5], BOXES[2:3], [1], "<image>\n<image>\nwhich?"),
    ]


def test_teacher_forced_over_several_boxes(tiny, model, processor, chains, cache):
    forced = teacher_forced(model, processor, chains, cache, batch_size=3)
    assert [len(z) for z in forced.latents] == [2, 0, 3, 1] and len(forced.correct) == 4
    shapes = [[tuple(m.shape[1:]) for m in maps] for maps in forced.teacher_maps]
    assert shapes == [[GRIDS[0]] * 2, [], [GRIDS[3], GRIDS[2], GRIDS[3]], [GRIDS[4]]]
    assert [[tuple(m.shape[1:]) for m in maps] for maps in forced.student_maps] == shapes
    for sample, maps in zip(chains, forced.teacher_maps):
        for box, teacher in zip(sample.boxes, maps):
            assert (teacher[:, ~torch.from_numpy(box_mask(box, *teacher.shape[1:]))] == 0).all()
    alone = teacher_forced(model, processor, chains[2:3], cache)
    torch.testing.assert_close(alone.latents[0], forced.latents[2], rtol=1e-4, atol=1e-5)


def test_decoding_keeps_every_span(tiny, chains, cache, processor):
    """A model that says nothing but the two marks of a span, until its limit."""
    talkative = tiny.model("stage2")
    talkative.generation_config = GenerationConfig(eos_token_id=tiny.EOS, pad_token_id=tiny.PAD)
    with torch.no_grad():
        direction = talkative.lm_head.weight[tiny.LVR_START].clone()
        talkative.lm_head.weight.zero_()
        talkative.lm_head.weight[[tiny.LVR_START, tiny.LVR_END]] = torch.stack([direction, -direction])
    decoded = decode_answers(talkative, processor, chains, cache, max_new_tokens=12, force_latent=True)
    assert sum(count > 1 for count in decoded.spans) >= 3
    for z, probes, count in zip(decoded.latents, decoded.probes, decoded.spans):
        assert z.shape == probes.shape and len(z) in (count, count - 1)  # the last may have been cut off
    given = [z + 1 for z in decoded.latents]
    given[1] = None
    again = decode_answers(talkative, processor, chains, cache, latents=given, max_new_tokens=12, force_latent=True)
    for number, (z, mine) in enumerate(zip(again.latents, given)):
        expected = decoded.latents[1] if mine is None else mine
        for span, states in enumerate(z):
            torch.testing.assert_close(states, expected[span % len(expected)], rtol=1e-4, atol=1e-4, msg=f"{number}")
    maps = free_running_maps(talkative, decoded, chains, cache)
    for sample, own, probes in zip(chains, maps, decoded.probes):
        assert len(own) == len(probes)
        for span, attention in enumerate(own):
            image = 0 if not len(sample.boxes) else int(sample.box_images[min(span, len(sample.boxes) - 1)])
            tokens, grid = cache[sample.image_paths[image]]
            assert attention.shape == (tiny.SLOTS, int(grid[1]) // 2, int(grid[2]) // 2)
            _, expected = talkative.student_resampler.cross_attn(probes[span][None], tokens[None], tokens[None])
            torch.testing.assert_close(attention.flatten(1), expected[0].detach(), rtol=1e-4, atol=1e-5)


def test_teacher_forced_does_not_depend_on_batching_or_the_cache(model, processor, samples, cache):
    one, all_at_once = (teacher_forced(model, processor, samples, batch_size=size) for size in (1, 9))
    cached = teacher_forced(model, processor, samples, cache)
    for other in (all_at_once, cached):
        for name in ("latents", "student_maps", "teacher_maps"):
            for a, b in zip(getattr(one, name), getattr(other, name), strict=True):
                for left, right in zip(a, b, strict=True):
                    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5, msg=name)


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
                assert a.shape[1:] == (tiny.SLOTS, tiny.WIDTH)
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
    torch.testing.assert_close(torch.stack([z[0] for z in decoded.latents]), own)


def test_questions_without_a_span(tiny, processor, samples):
    model = tiny.model("sft")
    model.generation_config = GenerationConfig(eos_token_id=tiny.EOS, pad_token_id=tiny.PAD)
    decoded = decode_answers(model, processor, samples[:2], max_new_tokens=3)
    assert decoded.latents == decoded.probes == [None, None] and decoded.spans == [0, 0]
    assert decoded.triggered == [False, False]
    assert cosine_to_teacher(decoded, [torch.ones(3, 4)] * 2) is None
    assert free_running_maps(model, decoded, samples[:2], {}) == [None, None]


def test_what_is_noted_of_a_row(tiny, processor):
    span, text = tiny.span(), processor.encode_text
    z = torch.randn(2, tiny.SLOTS, tiny.WIDTH)
    for ids, latents, answer, spans, closed in (
        ([*span, *text("\n<answer> red </answer>"), tiny.EOS, tiny.PAD], z[:1], "red", 1, True),
        ([*span[:-1], *text("<answer> x")], z[:1], "x", 1, False),
        ([*span, *text("and "), *span, *text("<answer> x")], z, "x", 2, True),
        ([*span[:-1], *text("and "), *span, *text("<answer> x")], z, "x", 2, False),
        ([*span, *span[:-1]], z, None, 2, False),
        ([*text("<answer> red </answer>"), tiny.EOS], z[:0], "red", 0, False),
        ([*text("red"), tiny.LVR_START], z[:0], None, 1, False),
    ):
        result = Decoded()
        inside = [token == tiny.LVR for token in ids]
        note_row(result, processor, ids, inside, latents, latents + 1)
        # Ghosts, as in parity mode, are told by their positions.
        ghosts = [tiny.LVR_START if latent else token for token, latent in zip(ids, inside)]
        other = Decoded()
        note_row(other, processor, ghosts, inside, latents, latents + 1)
        assert (other.texts, other.closed, other.spans) == (result.texts, result.closed, result.spans)
        assert (result.answers, result.spans, result.closed) == ([answer], [spans], [closed])
        assert result.triggered == [spans > 0]
        if len(latents):
            assert torch.equal(result.latents[0], latents) and torch.equal(result.probes[0], latents + 1)
        else:
            assert result.latents == result.probes == [None]
    assert result.texts == ["red"]
    assert Decoded(answers=["red", None, "blue"]).correct([question(answer=a) for a in ("red", "red", "red")]) == 1


def test_free_running_maps_are_the_students(tiny, model, processor, samples, cache):
    decoded = decode_answers(model, processor, samples, cache, force_latent=True, max_new_tokens=2)
    maps = free_running_maps(model, decoded, samples, cache)
    for (found, *_), probes, sample, (h, w) in zip(maps, decoded.probes, samples, GRIDS):
        assert found.shape == (tiny.SLOTS, h, w)
        tokens = cache[sample.image_paths[0]][0]
        attention = model.student_resampler.cross_attn
        _, expected = attention(probes[:1], tokens[None], tokens[None])
        torch.testing.assert_close(found.flatten(1), expected[0].detach(), rtol=1e-4, atol=1e-5)


def test_cosine_to_teacher():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    decoded = SimpleNamespace(latents=[a, None, -a])
    assert cosine_to_teacher(decoded, [3 * a, a, a]) == pytest.approx(0.0)
    assert cosine_to_teacher(SimpleNamespace(latents=[a, None]), [3 * a, a]) == pytest.approx(1.0)
    assert cosine_to_teacher(SimpleNamespace(latents=[1e-20 * a]), [1e-15 * a]) == pytest.approx(1.0)
    # Over all spans that have a box, slot by slot.
    three = SimpleNamespace(latents=[torch.stack([a, -a, a]), a[None]])
    assert cosine_to_teacher(three, [torch.stack([a, a]), torch.stack([a, a])]) == pytest.approx(1 / 3)
