"""Interventions do what they say, to the questions they reach, and a stopped ablation goes on."""

import json
import math
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from vreflection.cli import main
from vreflection.engine.decoder import LatentDecoder
from vreflection.errors import CheckpointError, ConfigError
from vreflection.evaluation import ablation
from vreflection.evaluation.ablation import Ablation, answer_places
from vreflection.evaluation.ablation_run import (
    AblationSettings,
    benchmark_questions,
    row_question,
    run_ablation,
    settle,
)
from vreflection.evaluation.ablation_summary import markdown, mean_interval, sentences, summarize
from vreflection.evaluation.asking import load_processor
from vreflection.evaluation.interventions import (
    REPLACED,
    SLOTS,
    Intervention,
    chosen_interventions,
    in_span,
    of_one_span,
    replaced_latents,
    with_span_length,
)
from vreflection.evaluation.latents import effective_rank, latent_shape, partners_of
from vreflection.evaluation.protocol import load_protocol
from vreflection.evaluation.raw_files import Shard, claimed
from vreflection.evaluation.run import EvalSettings, load_model
from vreflection.visualization.ablation_page import render_ablation


@pytest.fixture(scope="module")
def asked(checkpoint, demo_root, short, tmp_path_factory):
    def make(out, benchmark="vstar", **changes):
        return EvalSettings(
            model=str(checkpoint), benchmarks=(benchmark,), out=out, data_root=demo_root, protocol=str(short),
            allow_other_counts=True, batch_size=3, **changes,
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def lab(asked, short, checkpoint, tmp_path_factory):
    """The tiny checkpoint, its processor, and the questions of the demo V*."""
    settings = asked(tmp_path_factory.mktemp("ablation"))
    protocol = load_protocol(settings.protocol)
    processor = load_processor(checkpoint, protocol)
    return load_model(checkpoint, settings), processor, benchmark_questions(settings, protocol, processor)


def ablate(lab, folder, interventions, **settings):
    model, processor, questions = lab
    return Ablation(model, processor, questions, interventions, folder, batch=3, **settings)


SAME = Intervention("steps_3", "as trained", SLOTS, steps=3)  # the tiny model's own number


def test_an_intervention_that_changes_nothing_has_no_divergence(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "replaced_latents", lambda name, own, *rest: own)
    own, changed, latents = ablate(lab, tmp_path, [REPLACED["zero"], of_one_span("zero_span_1"), SAME]).run()
    assert sum(z is not None for z in latents) == sum(bool(row["spans"]) for row in own) > 0
    for row, after in zip(own, changed, strict=True):
        for name in ("zero", "zero_span_1", "steps_3"):
            assert after[name]["text"] == row["text"] and after[name]["kl"] < 1e-5 and after[name]["kept"]


def test_interventions_reach_the_answer_or_say_that_they_cannot(lab, tmp_path):
    model, processor, questions = lab
    names = [*REPLACED.values(), Intervention("steps_1", "one", SLOTS, steps=1)]
    own, changed, latents = ablate(lab, tmp_path, names).run()
    reached = [bool(row["spans"]) for row in own]
    assert any(reached)
    decoder = LatentDecoder(model, max_batch_size=1)
    for index, (row, after) in enumerate(zip(own, changed)):
        assert set(after) == {"id", *(one.name for one in names)} and after["id"] == row["id"] == questions[index].id
        hidden = decoder.generate(
            [questions[index].prompt()], hide_images=True, do_sample=False, max_new_tokens=9, repetition_penalty=1.0
        )[0]
        ids = [t for t, inside in zip(hidden.tokens, hidden.latent) if not inside]
        assert after["image"]["text"] == processor.decode(ids, skip_special_tokens=False)
        for name in ("zero", "noise", "swap", "repeat", "skip", "steps_1"):
            if not row["spans"]:
                kept = {key: row[key] for key in ("text", "answer", "correct", "spans", "closed")}
                assert after[name] == {**kept, "kl": 0.0, "kept": True, "reached": False}
            else:
                assert after[name]["reached"]
    changed_at_all = {
        name: max(after[name]["kl"] for after, hit in zip(changed, reached) if hit)
        for name in ("zero", "noise", "swap", "repeat", "skip", "steps_1", "image")
    }
    assert all(value > 1e-6 for value in changed_at_all.values()), changed_at_all


def test_latents_are_those_that_were_consumed(lab, tmp_path):
    """The zeroed run, decoded by hand."""
    model, processor, questions = lab
    own, changed, _ = ablate(lab, tmp_path, [REPLACED["zero"]]).run()
    decoder = LatentDecoder(model, max_batch_size=1)
    for index, row in enumerate(own):
        if not row["spans"]:
            continue
        zeros = torch.zeros(model.config.num_latent_tokens, model.config.hidden_width)
        answer = decoder.generate(
            [questions[index].prompt()], latents=zeros, do_sample=False, max_new_tokens=9, repetition_penalty=1.0
        )[0]
        ids = [t for t, inside in zip(answer.tokens, answer.latent) if not inside]
        assert changed[index]["zero"]["text"] == processor.decode(ids, skip_special_tokens=False)


def test_a_stopped_ablation_goes_on_and_a_damaged_part_is_refused(lab, tmp_path, monkeypatch):
    names = [REPLACED["zero"], REPLACED["swap"], REPLACED["image"]]
    whole = ablate(lab, tmp_path / "whole", names).run()
    stopped = ablate(lab, tmp_path / "stopped", names)
    made, original = [], Ablation._changed

    def second_time(self, *args):
        if made:
            raise KeyboardInterrupt
        made.append(1)
        return original(self, *args)

    monkeypatch.setattr(Ablation, "_changed", second_time)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    monkeypatch.undo()
    parts = sorted((tmp_path / "stopped" / "parts").iterdir())
    assert not [part for part in parts if part.name.startswith(".")]
    times = {part.name: part.stat().st_mtime_ns for part in parts}
    again = ablate(lab, tmp_path / "stopped", names).run()
    assert again[0] == whole[0] and again[1] == whole[1]
    for z, same in zip(again[2], whole[2], strict=True):
        assert (z is same is None) or torch.equal(z, same)
    assert {part.name: part.stat().st_mtime_ns for part in parts} == times
    parts[0].write_text("[{")
    with pytest.raises(CheckpointError, match="not a whole part .*; remove it"):
        ablate(lab, tmp_path / "stopped", names).run()


def test_the_command_on_a_benchmark(asked, tmp_path, monkeypatch, capsys, checkpoint, demo_root, short):
    words = ["vreflection", "ablate", "--model", checkpoint, "--benchmark", "vstar", "--data-root", demo_root]
    words += ["--protocol", short, "--allow-other-counts", "--out", tmp_path / "out", "--batch-size", "3"]

    def call(*more):
        monkeypatch.setattr(sys, "argv", [str(word) for word in [*words, *more]])
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        return code, capsys.readouterr()

    code, said = call()
    assert code == 0 and "| the model's own latents |" in said.out
    result = json.loads((tmp_path / "out" / "ablation.json").read_text())
    names = [row["name"] for row in result["summary"]["interventions"]]
    assert names == ["own", "zero", "noise", "swap", "repeat", "skip", "image", "steps_1", "steps_6"]
    grounding = result["summary"]["grounding"]
    assert 0 < grounding["mass"]["value"] < 1 and grounding["mass"]["n"] == result["summary"]["opened"]
    page = (tmp_path / "out" / "ablation.html").read_text()
    assert (
        "image hidden after the prompt" in page
        and "Logit lens" in page
        and "http" not in page.replace("http-equiv", "")
    )
    code, said = call("--seed", "1")
    assert code == 2 and "holds an ablation with other settings: seed: 0 then, 1 now" in said.err
    code, said = call("--json")
    assert code == 0 and json.loads(said.out) == result
    for flags, message in (
        (("--interventions", "zero,blur"), "expected some of zero, noise, .*got blur"),
        (("--steps", "1,x"), "expected whole numbers"),
        (("--rows", "x.json"), "got both"),
    ):
        code, said = call("--out", tmp_path / "bad", *flags)
        assert code == 2 and not (tmp_path / "bad").exists()
        assert re.search(message, said.err)


def test_rows_of_ones_own(tiny, checkpoint, tmp_path):
    from PIL import Image

    rows = []
    for n, word in enumerate(("red", "blue", "red")):
        image = np.random.default_rng(n).integers(0, 256, (56, 84, 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / f"{n}.png")
        rows.append(
            {
                "question_id": str(n), "image": [f"{n}.png"], "bboxes": [[0.1, 0.1, 0.6, 0.6]],
                "conversations": [
                    {"from": "human", "value": "<image>\nwhich?"},
                    {"from": "gpt", "value": f"<lvr>\n<answer> {word} </answer>"},
                ],
            }
        )  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = AblationSettings(
        EvalSettings(model=str(checkpoint), benchmarks=(), out=tmp_path / "out", force_latent=True, limit=2),
        rows=tmp_path / "rows.json",
        image_folder=tmp_path,
        interventions=["swap"],
    )
    result = run_ablation(settings)
    assert result["summary"]["n"] == result["summary"]["opened"] == 2
    assert result["summary"]["grounding"]["mass"]["n"] == 2
    assert [row["name"] for row in result["summary"]["interventions"]] == ["own", "swap"]


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ConfigError, match=r"out: expected a folder that can be made, got .*taken"):
        settle(tmp_path / "taken", {})
    with (
        pytest.raises(ConfigError, match=r"out: expected a folder that can be made, got .*taken"),
        claimed(tmp_path / "taken", Shard(0, 1)),
    ):
        pass


def test_what_applies_to_a_stage(tiny):
    latent, filler, plain = (tiny.model(stage).config for stage in ("stage2", "filler", "sft"))
    assert [one.name for one in chosen_interventions(None, None, latent)][-2:] == ["steps_1", "steps_6"]
    names = [one.name for one in chosen_interventions(None, [3, 5], filler)]
    assert names == ["zero", "noise", "skip", "image", "steps_5"]
    assert [one.name for one in chosen_interventions(None, None, plain)] == ["image"]
    with pytest.raises(ConfigError, match="swap would change nothing: .* 'filler' feeds every latent position the"):
        chosen_interventions(["swap", "zero"], None, filler)
    with pytest.raises(ConfigError, match="zero, steps would change nothing: .*'sft' has no latent positions"):
        chosen_interventions(["zero", "steps"], None, plain)
    with pytest.raises(ConfigError, match="steps: expected at least 1"):
        chosen_interventions(["steps"], [0, 4], latent)


def test_replaced_latents():
    own = torch.arange(1.0, 25.0).view(2, 3, 4)
    noise = replaced_latents("noise", own, None, 0, "q")
    torch.testing.assert_close(noise.norm(dim=-1), own.norm(dim=-1))
    assert torch.equal(noise, replaced_latents("noise", own, None, 0, "q"))
    assert not torch.equal(noise, replaced_latents("noise", own, None, 0, "r"))
    assert not torch.equal(noise, replaced_latents("noise", own, None, 1, "q"))
    assert not torch.allclose(noise[0] / noise[0].norm(), noise[1] / noise[1].norm())
    # An answer's first span gets what it would get alone.
    torch.testing.assert_close(noise[:1], replaced_latents("noise", own[:1], None, 0, "q"))
    assert torch.equal(replaced_latents("repeat", own, None, 0, "q"), own[:, [0, 0, 0]])
    assert not replaced_latents("zero", own, None, 0, "q").any()
    assert torch.equal(replaced_latents("swap", own, own + 1, 0, "q"), own + 1)


def test_one_span_alone(tiny):
    own = torch.arange(1.0, 25.0).view(2, 3, 4)
    assert in_span(own, None) is own
    first, second, *beyond = in_span(own, 2)
    assert first is None and torch.equal(second, own[1]) and beyond == [None, None]
    config = tiny.model("stage2").config
    chosen = chosen_interventions(["swap_span_10", "zero", "swap_span_2", "swap_span_2"], None, config)
    assert [(one.name, one.kind, one.span) for one in chosen] == [
        ("zero", "zero", None), ("swap_span_2", "swap", 2), ("swap_span_10", "swap", 10)
    ]  # fmt: skip
    assert chosen[1].label == "another question's latents, span 2 only"
    for name in ("swap_span_0", "skip_span_1", "swap_span_", "swap_span_1x", "span_1"):
        with pytest.raises(
            ConfigError, match=f"expected some of zero, .* of one span such as swap_span_2, got {name}$"
        ):
            chosen_interventions([name], None, config)
    with pytest.raises(ConfigError, match="swap_span_1 would change nothing"):
        chosen_interventions(["swap_span_1"], None, tiny.model("filler").config)


def test_spans_of_another_length():
    tokens, latent = [7, 1, 2, 2, 3, 9, 1, 2], [False, False, True, True, False, False, False, True]
    assert with_span_length(tokens, latent, 3, 2, 1) == (
        [7, 1, 2, 2, 2, 3, 9, 1, 2, 2, 2],
        [False, False, True, True, True, False, False, False, True, True, True],
    )
    assert with_span_length(tokens, latent, 0, 2, 1) == ([7, 1, 3, 9, 1], [False] * 5)


def test_answer_places(tiny):
    processor = tiny.processor()

    def places(text):
        ids = processor.encode_text(text)
        return [processor.decode([ids[place]], skip_special_tokens=False) for place in answer_places(ids, processor)]

    assert "".join(places("<|lvr_start|><|lvr_end|>so <answer> B </answer>")).strip() == "B"
    assert "".join(places("<|lvr_start|><|lvr_end|>B<|im_end|>")) == "B"
    assert "".join(places("because <|lvr_start|><|lvr_end|>it is C")) == "it is C"
    assert places("<|lvr_start|>") == ["<|lvr_start|>"]


def test_effective_rank_and_shape():
    assert effective_rank(torch.eye(4)) == pytest.approx(4)
    assert effective_rank(torch.ones(4, 3)) == pytest.approx(1)
    assert effective_rank(torch.zeros(3, 3)) == 0
    assert effective_rank(torch.diag(torch.tensor([2.0, 1.0]))) == pytest.approx(
        math.exp(-(0.8 * math.log(0.8) + 0.2 * math.log(0.2)))
    )
    latents = torch.zeros(2, 3, 4)
    latents[:, 0, 0], latents[:, 1, 0], latents[:, 2, 1] = 3.0, 4.0, 5.0
    latents[1, 2] = torch.tensor([0.0, -5.0, 0.0, 0.0])
    shape = latent_shape(latents)
    assert shape["norm"] == [3, 4, 5] and shape["next_cosine"] == [1, 0] and shape["first_cosine"] == [1, 0]
    assert shape["mean_cosine"] == [1, 1, 0] and shape["rank_over_questions"] == [0, 0, 1]
    tiny = latent_shape(latents * 1e-25)
    for name in ("next_cosine", "first_cosine", "mean_cosine", "rank_over_questions"):
        assert tiny[name] == pytest.approx(shape[name])
    assert tiny["norm"] == pytest.approx([3e-25, 4e-25, 5e-25])


def fake(correct, spans=1, kl=0.0, lens=True):
    row = {"id": "1", "group": "1", "gold": "A", "text": "A", "answer": "A" if correct else None, "correct": correct}
    row |= {"spans": spans, "closed": bool(spans), "text_norm": 2.0, "kl": kl, "kept": kl < 2, "reached": True}
    if lens:
        row["lens"] = [[{"ids": [4 + n, 5], "chances": [0.5, 0.25], "entropy": 1.0}] for n in range(spans)]
    return row


def test_summary_by_hand():
    own = [{**fake(n < 6), "id": str(n), "group": str(n)} for n in range(8)]
    own[7] |= {"spans": 0, "closed": False}
    own[7].pop("lens")
    zero = [{"id": str(n), "zero": fake(n < 1, kl=float(n))} for n in range(8)]
    latents = [*torch.randn(7, 1, 1, 4), None]
    found = summarize(own, zero, [REPLACED["zero"]], latents, lambda token: f"t{token}")
    first, second = found["interventions"]
    assert first["accuracy"]["correct"] == 6 and second["accuracy"]["correct"] == 1
    assert second["against_own"]["first_only"] == 5 and second["against_own"]["p"] == pytest.approx(2 / 2**5)
    assert second["changed_answers"] == 5 / 8 and second["unparsed"] == 7 / 8
    assert (
        second["kl"]["value"] == 3.5
        and found["opened"] == 7
        and found["spans"][0]["latents"]["lens"][0]["top"] == [{"token": "t4", "share": 1.0}]
    )
    assert mean_interval([1.0])["low"] is None
    told = " ".join(sentences(found))
    assert "does not measurably change accuracy, -62.5 points" in told and "the answers do not need them" in told
    result = {
        "schema": 2, "model": "<m>", "stage": "stage2", "source": "x", "protocol": None, "forced": False,
        "versions": {"vreflection": "0", "torch": "2"}, "summary": found, "sentences": sentences(found),
    }  # fmt: skip
    page = render_ablation(result)
    assert "&lt;m&gt;" in page and "<m>" not in page
    assert "Span by span" not in page and len(found["spans"]) == 1
    with pytest.raises(ValueError, match="schema 2, got 1"):
        render_ablation({**result, "schema": 1})


def test_a_summary_span_by_span():
    """Eight answers, four with a second span; changing that alone turns three of these wrong."""
    own = [{**fake(n < 6, spans=1 + n % 2), "id": str(n), "group": str(n)} for n in range(8)]
    look = {"mass": 0.5, "iou": 0.25, "uniform": 0.1, "right_box": 1.0, "chance": 0.5}
    for row in own:
        row["grounding"] = [look, look | {"mass": 0.8, "right_box": 0.0}][: row["spans"]]
    second = of_one_span("swap_span_2")
    changed = [{"id": str(n), "swap_span_2": fake(n < 6 and n % 2 == 0, spans=1 + n % 2)} for n in range(8)]
    for n in (0, 2, 4, 6):
        changed[n]["swap_span_2"]["reached"] = False
    latents = [torch.randn(1 + n % 2, 1, 4) for n in range(8)]
    found = summarize(own, changed, [second], latents, lambda token: f"t{token}")
    assert found["interventions"][1]["reached"] == 4
    assert found["interventions"][1]["against_own"]["difference"] == pytest.approx(-3 / 8)
    one, two = found["spans"]
    assert (one["n"], two["n"], one["changes"]) == (8, 4, [])
    (change,) = two["changes"]
    assert change["reached"] == 4 and change["against_own"]["difference"] == pytest.approx(-3 / 4)
    assert change["own"]["value"] == 3 / 4 and change["accuracy"]["value"] == 0
    assert [span["latents"]["lens"][0]["top"][0]["token"] for span in (one, two)] == ["t4", "t5"]
    assert one["latents"]["norm"] != two["latents"]["norm"]
    assert (one["grounding"]["mass"]["value"], two["grounding"]["mass"]["value"]) == (0.5, pytest.approx(0.8))
    assert (one["grounding"]["right_box"]["value"], two["grounding"]["right_box"]["value"]) == (1, 0)
    assert found["grounding"]["mass"]["value"] == pytest.approx((4 * 0.5 + 4 * 0.65) / 8)
    assert found["grounding"]["right_box"]["value"] == pytest.approx(8 / 12)
    told = " ".join(sentences(found))
    assert "4 reached" in told and "Of 12 spans, 66.7 % look more at their own box" in told
    table = markdown(found, "title")
    assert "| 2 | 4 | -75.0 (" in table and "| 80.0 % | 10.0 % | 0.0 % (50.0 %) |" in table
    assert "## Span 1 (8 answers)" in table and "## Span 2 (4 answers)" in table
    result = {
        "schema": 2, "model": "m", "stage": "stage2", "source": "x", "protocol": None, "forced": False,
        "versions": {"vreflection": "0", "torch": "2"}, "summary": found, "sentences": sentences(found),
    }  # fmt: skip
    page = render_ablation(result)
    assert "Span by span" in page and "Change, swap here only" in page and page.count("Logit lens") >= 2
    identifiers = re.findall(r' id="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))


@pytest.fixture(scope="module")
def chains(lab, tmp_path_factory):
    """The tiny checkpoint made to say nothing but the two marks of a span, and questions with two boxes."""
    import copy

    from PIL import Image

    from vreflection.data.row_schema import Sample
    from vreflection.data.template import Turn

    model, processor, _ = lab
    model, folder, questions = copy.deepcopy(model), tmp_path_factory.mktemp("chains"), []
    special = processor.token_ids
    with torch.no_grad():
        head = model.lm_head.weight
        direction = head[special.lvr_start].clone()
        head.zero_()
        head[[special.lvr_start, special.lvr_end]] = torch.stack([direction, -direction])
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (56, 84, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        turns = (Turn("user", "<image>\nwhich?"), Turn("assistant", f"<lvr><lvr>\n<answer> {number % 2} </answer>"))
        boxes = np.array([[0.0, 0.0, 0.3, 1.0], [0.6, 0.0, 1.0, 1.0]])
        sample = Sample(
            str(number), "n", (str(folder / f"{number}.png"),), turns, boxes, np.zeros(2, int), f"f:{number}"
        )
        questions.append(replace(row_question(sample, processor), max_new_tokens=14))
    return model, processor, questions


def test_every_span_is_changed_or_one_alone(chains, tmp_path):
    """What the changed answers consumed, decoded by hand."""
    model, processor, questions = chains
    names = ["zero", "repeat", "zero_span_2", "swap_span_1", "steps"]
    interventions = chosen_interventions(names, [1], model.config)
    own, changed, latents = ablate(chains, tmp_path, interventions, force=True).run()
    assert max(len(z) for z in latents) > 1
    partners = partners_of(
        [q.gold for q in questions], [q.image for q in questions], [len(z) for z in latents]
    )  # fmt: skip
    decoder = LatentDecoder(model, max_batch_size=1)
    settings = {"do_sample": False, "max_new_tokens": 14, "force_latent": True, "return_latents": True}
    reached = dict.fromkeys(names, 0)
    for index, (z, after) in enumerate(zip(latents, changed)):
        rest = [None] * (2 * len(z))
        wanted = {
            "zero": torch.zeros_like(z),
            "repeat": z[:, :1].expand_as(z),
            "zero_span_2": None if len(z) < 2 else [None, torch.zeros_like(z[1]), *rest],
            "swap_span_1": None if partners[index] is None else [latents[partners[index]][0], *rest],
        }
        for name, given in wanted.items():
            assert after[name]["reached"] == (given is not None), name
            if given is None:
                assert after[name]["text"] == own[index]["text"]
                continue
            reached[name] += 1
            (answer,) = decoder.generate([questions[index].prompt()], latents=given, **settings)
            ids = [t for t, inside in zip(answer.tokens, answer.latent) if not inside]
            assert after[name]["text"] == processor.decode(ids, skip_special_tokens=False), name
        assert len(own[index]["lens"]) == len(z)
        looks = own[index]["grounding"]
        assert len(looks) == min(len(z), 2) and all(0 < look["mass"] < 1 for look in looks)
        assert {look["uniform"] for look in looks} == {1 / 3, 2 / 3} or len(looks) == 1
    assert all(reached[name] for name in wanted)


def test_forced_answers_replay_each_span_with_its_own_latents(chains):
    """A second span with the first one's latents would be another text."""
    tokens = [1, 9, 9, 2, 1, 9, 9, 2, 5, 1, 9]
    latent = [token == 9 for token in tokens]
    states = torch.arange(8.0).view(2, 2, 2)
    given = ablation._given(tokens, latent, states)
    assert given.latents.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [0, 1]]


def test_a_span_that_no_answer_reaches_is_refused(chains, tmp_path):
    model, _, _ = chains
    interventions = chosen_interventions(["zero_span_99"], None, model.config)
    with pytest.raises(ConfigError, match="zero_span_99 would change nothing: no answer has more than"):
        ablate(chains, tmp_path, interventions, force=True).run()


def test_swap_without_any_partner_is_refused_and_lonely_questions_stay_as_they_are(chains, tmp_path):
    model, processor, questions = chains
    same = [replace(question, gold="0") for question in questions]
    with pytest.raises(ConfigError, match="opened as many spans; none of 6 has one"):
        Ablation(model, processor, same, [REPLACED["swap"]], tmp_path / "none", batch=3, force=True).run()
    _, _, latents = ablate(chains, tmp_path / "counts", [], force=True).run()
    counts = [len(z) for z in latents]
    odd = next(number for number, count in enumerate(counts) if counts.count(count) > 1)
    mixed = [replace(question, gold=str(int(number == odd))) for number, question in enumerate(questions)]
    _, changed, _ = Ablation(model, processor, mixed, [REPLACED["swap"]], tmp_path / "one", batch=3, force=True).run()
    assert [row["swap"]["reached"] for row in changed] == [count == counts[odd] for count in counts]
    assert len(set(counts)) > 1  # or none was left alone
