"""`vreflection eval` on the benchmarks in miniature: what is asked, what is written, how a run goes on."""

import json
import shutil

import pytest
import torch

from vreflection.engine import prefill
from vreflection.engine.decoder import LatentDecoder
from vreflection.evaluation import run as running
from vreflection.evaluation.asking import Prompts
from vreflection.evaluation.benchmarks import BENCHMARKS, load_benchmark
from vreflection.evaluation.protocol import load_protocol
from vreflection.evaluation.raw_files import LOCKS, Shard, claimed, cut_torn_line, done_ids, raw_files
from vreflection.evaluation.run import EvalSettings, answer_items
from vreflection.model.modeling import VReflectionForConditionalGeneration
from vreflection.model.processor import VReflectionProcessor

ALL = ",".join(BENCHMARKS)
COUNTS = {"mmvp": 6, "blink": 14, "vstar": 5, "hrbench4k": 12, "hrbench8k": 8, "mme-realworld-lite": 5}


def lines(out, benchmark="*"):
    return sorted(line for path in out.glob(f"raw/{benchmark}.jsonl") for line in path.read_bytes().splitlines(True))


def rows(out, benchmark="*"):
    return [json.loads(line) for line in lines(out, benchmark)]


def items_of(demo_root, *names):
    return [item for name in names for item in load_benchmark(name, demo_root, allow_other_counts=True).items]


@pytest.fixture(scope="module")
def whole(request, tmp_path_factory, checkpoint, demo_root, short):
    """A run of all six without any trouble, for comparison."""
    out = tmp_path_factory.mktemp("whole") / "run"
    settings = EvalSettings(
        model=str(checkpoint), benchmarks=tuple(BENCHMARKS), out=out, data_root=demo_root, protocol=str(short),
        allow_other_counts=True,
    )  # fmt: skip
    report = running.run_evaluation(settings)
    assert report.done == report.asked == COUNTS and report.answered == sum(COUNTS.values())
    return out


def test_every_item_is_answered_once_and_scored(evaluate, tmp_path, whole):
    done = evaluate(tmp_path / "run", benchmarks=ALL)
    assert done.returncode == 0, done.stderr
    assert "# Score of" in done.stdout and "hrbench8k: 8 items; their counts are not the published ones" in done.stderr
    assert {name: len(lines(tmp_path / "run", name)) for name in COUNTS} == COUNTS
    assert lines(tmp_path / "run") == lines(whole)
    again = json.loads(evaluate(tmp_path / "run", "--json", benchmarks=ALL).stdout)
    assert again["answered"] == 0 and again["done"] == COUNTS and again["score"]["missing"] == 0
    assert (tmp_path / "run" / "score.json").exists()


def test_answers_are_the_models_own(whole, checkpoint, demo_root, short, tiny):
    """One question at a time by the public `generate`, with the public processor."""
    model = VReflectionForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = VReflectionProcessor.from_pretrained(checkpoint)
    protocol = load_protocol(short)
    found = {(row["benchmark"], row["id"]): row for row in rows(whole)}
    items = items_of(demo_root, *BENCHMARKS)
    assert found.keys() == {(item.benchmark, item.id) for item in items}
    assert len({row["text"] for row in found.values()}) > 8  # answers that tell images and questions apart
    for item in items:
        row = found[item.benchmark, item.id]
        prompt = processor([[opener() for opener in item.images]], protocol.prompt(item))
        limit = protocol.answer_tokens(item.benchmark)
        output = model.generate(
            **prompt, max_new_tokens=limit, do_sample=False, repetition_penalty=1.0, return_dict_in_generate=True
        )
        start = prompt["input_ids"].shape[1]
        ids, latent = output.sequences[0, start:].tolist(), output.latent_mask[0].tolist()
        shown = [token for token, inside in zip(ids, latent) if not inside]
        assert row["text"] == processor.decode(shown, skip_special_tokens=False)
        assert (row["tokens"], row["latent_steps"], row["prompt_tokens"]) == (len(shown), sum(latent), start)
        assert row["spans"] == shown.count(tiny.LVR_START)
        after = [shown[n + 1 : n + 2] == [tiny.LVR_END] for n, token in enumerate(shown) if token == tiny.LVR_START]
        assert row["closed"] == (bool(after) and all(after))
        assert row["visual_tokens"] == [int(t * h * w) // 4 for t, h, w in prompt["image_grid_thw"].tolist()]
        assert row["finish_reason"] == ("eos" if shown[-1] == tiny.EOS else "max_new_tokens")
        assert (row["options"], row["gold"], row["group"]) == (list(item.options), dict(item.gold), item.group)
        assert row["labels"] == dict(item.labels)


def test_latent_positions_do_not_use_up_the_limit(whole, evaluate, tmp_path):
    full = [row for row in rows(whole) if row["finish_reason"] == "max_new_tokens"]
    assert any(row["latent_steps"] for row in full)
    assert all(row["tokens"] == (9 if row["benchmark"] == "vstar" else 12) for row in full)
    assert evaluate(tmp_path / "run", latent_mode="parity").returncode == 0
    full = [row for row in rows(tmp_path / "run") if row["finish_reason"] == "max_new_tokens"]
    assert any(row["latent_steps"] for row in full)
    assert all(row["tokens"] + row["latent_steps"] == 12 for row in full)  # as the reference implementation counts


def test_latent_settings(evaluate, tmp_path, whole):
    assert evaluate(tmp_path / "run", "--force-latent", latent_steps=5).returncode == 0
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["latents"] == {"steps": 5, "trained_steps": 3, "mode": "clean", "forced": True}
    for row in rows(tmp_path / "run"):
        assert row["text"].startswith("<|lvr_start|>") and row["latent_steps"] >= 5


def test_one_image_is_prepared_encoded_and_prefilled_once(checkpoint, demo_root, short, tmp_path, monkeypatch):
    """Four rotations of a question: their common beginning is computed for the first one only."""
    computed = []
    consume = prefill.Prefill.consume

    def counted(self, group):
        computed.extend(len(filling.prompt) - filling.start for filling in group)
        return consume(self, group)

    monkeypatch.setattr(prefill.Prefill, "consume", counted)
    items = items_of(demo_root, "hrbench4k")
    settings = EvalSettings(str(checkpoint), ("hrbench4k",), tmp_path, batch_size=4)
    model = running.load_model(checkpoint, settings)
    processor = VReflectionProcessor.from_pretrained(checkpoint)
    prompts, decoder = Prompts(processor, load_protocol(short)), LatentDecoder(model, max_batch_size=4)
    report = running.EvalReport({})
    answer_items(decoder, prompts, items, settings, Shard(), running.Counted(items, set(), None), report)
    assert report.answered == 12 and prompts.opened == decoder.prefill.features.encoded == 3
    lengths = {row["id"]: row["prompt_tokens"] for row in rows(tmp_path)}
    whole = sum(lengths.values())
    # The system turn, the image and the question: at least so many of each further rotation are not computed again.
    shared = 9 * (min(rows(tmp_path)[0]["visual_tokens"]) + len(items[0].question))
    assert len(computed) == 12 and sum(computed) <= whole - shared


def test_only_the_images_in_work_are_held(checkpoint, demo_root, short):
    prompts = Prompts(VReflectionProcessor.from_pretrained(checkpoint), load_protocol(short))
    for item in items_of(demo_root, "blink", "hrbench4k", "mme-realworld-lite"):
        asked = prompts.of(item)
        assert asked.error is None and prompts.kept.keys() == set(item.image_keys)
    images = 14 // 4 * 10 + 2 + 3  # tasks have 2, 3, 4, 1, 2, 3, … images
    assert prompts.opened == images + 3 + 4


def test_images_after_the_text_and_the_protocols_pixels(evaluate, short, tmp_path, demo_root):
    own = tmp_path / "own.yaml"
    own.write_text(
        short.read_text()
        .replace("images_first: true", "images_first: false")
        .replace("min_pixels: null", "min_pixels: 6272")
        .replace("max_pixels: null", "max_pixels: 7056")
    )
    assert evaluate(tmp_path / "run", protocol=own, benchmarks="vstar").returncode == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["pixels"] == {"min": 6272, "max": 7056}
    assert {row["visual_tokens"][0] for row in rows(tmp_path / "run")} == {6}  # 3 x 2 of 28 x 28 px
    open_ended = tmp_path / "half.yaml"
    open_ended.write_text(short.read_text().replace("min_pixels: null", "min_pixels: 999999"))
    refused = evaluate(tmp_path / "half", protocol=open_ended, benchmarks="vstar")
    assert refused.returncode == 2 and "expected min_pixels <= max_pixels, got 999999 and 18816" in refused.stderr


# How a run goes on


def test_a_run_that_is_complete_loads_no_model(evaluate, tmp_path, monkeypatch):
    assert evaluate(tmp_path / "run").returncode == 0
    monkeypatch.setattr(running, "load_model", None)
    assert evaluate(tmp_path / "run").returncode == 0


@pytest.mark.parametrize("torn", [b"", b'{"benchmark": "mmvp", "id": "1"', b'{"benchmark": "mm' + b"x" * 200_000])
def test_what_is_missing_is_answered_and_torn_lines_go(evaluate, tmp_path, whole, torn):
    out = tmp_path / "run"
    assert evaluate(out, benchmarks=ALL).returncode == 0
    for path in (out / "raw").glob("*.jsonl"):
        kept = path.read_bytes().splitlines(True)[::2]
        path.write_bytes(b"".join(kept) + torn)
    done = evaluate(out, benchmarks=ALL, batch_size=3)
    assert done.returncode == 0 and lines(out) == lines(whole)
    assert ("cut off a last line of" in done.stderr) == bool(torn)


def test_a_limit_takes_whole_groups(evaluate, tmp_path, whole):
    assert evaluate(tmp_path / "run", limit=5).returncode == 0
    assert {name: len(lines(tmp_path / "run", name)) for name in ("mmvp", "hrbench4k")} == {"mmvp": 6, "hrbench4k": 8}
    assert set(lines(tmp_path / "run")) < set(lines(whole))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"benchmarks": "mmvp"}, "benchmarks.hrbench4k: given then, absent now"),
        ({"protocol": "strict"}, "protocol: 'short@1' then, 'strict@1' now"),
        ({"latent_steps": 2}, "latents.steps: 3 then, 2 now"),
        ({"latent_mode": "parity"}, "latents.mode: 'clean' then, 'parity' now"),
        ({"limit": 2}, "benchmarks.mmvp.asked: 6 then, 2 now"),
        ({"repetition_penalty": 1.1}, "generation.repetition_penalty: 1.0 then, 1.1 now"),
        ({"dtype": "bfloat16"}, "generation.dtype: 'F32' then, 'bfloat16' now"),
    ],
)
def test_other_settings_are_refused(evaluate, tmp_path, options, said):
    shutil.copytree(self_made_run(evaluate, tmp_path), tmp_path / "copy")
    before = lines(tmp_path / "copy")
    done = evaluate(tmp_path / "copy", **options)
    assert done.returncode == 2 and said in done.stderr and "choose another --out" in done.stderr
    assert lines(tmp_path / "copy") == before


def self_made_run(evaluate, tmp_path):
    assert evaluate(tmp_path / "first").returncode == 0
    return tmp_path / "first"


def test_other_files_are_refused(evaluate, tmp_path, checkpoint, demo_root):
    out = self_made_run(evaluate, tmp_path)
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(checkpoint, model)
    shutil.copytree(demo_root, data)
    done = evaluate(out, model=model, data_root=data)  # the same content elsewhere is the same
    assert done.returncode == 0 and f"{str(model)!r} now" in done.stderr
    table = data / "MMVP" / "Questions.csv"
    table.write_text(table.read_text().replace("awake?", "asleep?"))
    done = evaluate(out, data_root=data)
    assert done.returncode == 2 and "benchmarks.mmvp.files.Questions.csv: 'sha256:" in done.stderr
    settings = model / "generation_config.json"
    settings.write_text(settings.read_text().replace("1.05", "1.06"))
    done = evaluate(out, model=model)
    assert done.returncode == 2 and "notes.checkpoint.generation_config.json" in done.stderr
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert "digest: 'sha256:" in evaluate(out, model=model).stderr


def test_damaged_runs_are_refused(evaluate, tmp_path):
    out = self_made_run(evaluate, tmp_path)
    raw = out / "raw" / "mmvp.jsonl"
    good = raw.read_bytes()
    raw.write_bytes(b"no answer\n" + good)
    done = evaluate(out)
    assert done.returncode == 2 and "mmvp.jsonl:1: expected an answer" in done.stderr
    raw.write_bytes(good)
    manifest = (out / "run.json").read_text()
    (out / "run.json").write_text(manifest[:100])
    assert "run.json: expected JSON" in evaluate(out).stderr
    (out / "run.json").unlink()
    done = evaluate(out)
    assert done.returncode == 2 and "expected run.json beside the raw answers, got none" in done.stderr
    (out / "run.json").write_text(manifest)
    assert evaluate(out).returncode == 0


def test_the_manifest_says_how_images_are_read(evaluate, tmp_path):
    out = self_made_run(evaluate, tmp_path)
    manifest = json.loads((out / "run.json").read_text())
    assert manifest["notes"]["image_view"] == "stored"
    del manifest["notes"]["image_view"]  # as before it was written down
    (out / "run.json").write_text(json.dumps(manifest))
    assert evaluate(out).returncode == 0
    manifest["notes"]["image_view"] = "shown"
    (out / "run.json").write_text(json.dumps(manifest))
    assert "notes.image_view: 'shown' then, 'stored' now" in evaluate(out).stderr


def test_an_unusable_image_costs_only_its_items(evaluate, demo, tmp_path, whole):
    data, out = demo.write_all(tmp_path / "data"), tmp_path / "run"
    image = data / "MMVP" / "MMVP Images" / "3.jpg"
    good = image.read_bytes()
    image.write_bytes(b"\0" * len(good))  # the same name and size: found only when it is opened
    done = evaluate(out, data_root=data)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "1 items could not be asked" in done.stderr and "mmvp:3: " in done.stderr and "3.jpg" in done.stderr
    assert done_ids(out, "mmvp") == {"1", "2", "4", "99", "100"} and len(done_ids(out, "hrbench4k")) == 12
    image.write_bytes(good)
    assert evaluate(out, data_root=data).returncode == 0
    assert lines(out) == sorted(lines(whole, "mmvp") + lines(whole, "hrbench4k"))


def test_a_failing_step_keeps_what_was_finished(evaluate, tmp_path, monkeypatch, whole):
    made = running.raw_answer
    count = iter(range(100))

    def failing(*given):
        if next(count) == 7:
            raise KeyboardInterrupt
        return made(*given)

    monkeypatch.setattr(running, "raw_answer", failing)
    done = evaluate(tmp_path / "run")
    assert done.returncode == 1 and "run the same command again to go on" in done.stderr
    assert len(lines(tmp_path / "run")) == 7
    assert evaluate(tmp_path / "run").returncode == 0
    assert lines(tmp_path / "run") == sorted(lines(whole, "mmvp") + lines(whole, "hrbench4k"))


# Several processes, one after the other here


def test_shards_share_the_work_in_whole_groups(evaluate, tmp_path, whole):
    out = tmp_path / "run"
    for index in (1, 0, 2):
        done = evaluate(out, benchmarks=ALL, shard=f"{index}/3")
        assert done.returncode == 0 and ("# Score" in done.stdout) == (index == 2)
        assert index == 2 or "still missing" in done.stdout and f"vreflection eval score {out}" in done.stdout
    assert lines(out) == lines(whole)
    owners = {}
    for path in raw_files(out, "hrbench4k"):
        for line in path.read_bytes().splitlines():
            owners.setdefault(json.loads(line)["group"], set()).add(path.name)
    assert owners == {str(4 * n): {f"hrbench4k.{n}-of-3.jsonl"} for n in range(3)}
    assert raw_files(out, "hrbench4") == []


def test_any_number_of_processes_may_go_on(evaluate, tmp_path, whole):
    out = tmp_path / "run"
    assert evaluate(out, benchmarks=ALL, shard="1/2").returncode == 0
    torn = out / "raw" / "blink.1-of-2.jsonl"
    torn.write_bytes(torn.read_bytes()[:-9])
    assert evaluate(out, benchmarks=ALL, shard="2/5").returncode == 0
    done = evaluate(out, benchmarks=ALL)
    assert done.returncode == 0 and lines(out) == lines(whole)


def test_one_process_per_shard(evaluate, tmp_path):
    with claimed(tmp_path / "run", Shard(0, 2)) as setup:
        setup.close()
        done = evaluate(tmp_path / "run", shard="0/2")
        assert done.returncode == 2 and "shard 0/2" in done.stderr and "is being worked on by process" in done.stderr
        done = evaluate(tmp_path / "run", shard="0/3")
        assert done.returncode == 2 and "expected all processes" in done.stderr and "0-of-2 at work" in done.stderr
        assert not (tmp_path / "run" / "run.json").exists()
    assert evaluate(tmp_path / "run", shard="0/2").returncode == 0
    with claimed(tmp_path / "run", Shard(1, 2)) as setup:
        setup.close()
        torn = tmp_path / "run" / "raw" / "mmvp.1-of-2.jsonl"
        torn.write_bytes(b'{"being wri')
        assert evaluate(tmp_path / "run", shard="0/2").returncode == 0
        assert torn.read_bytes() == b'{"being wri'  # its owner is alive
    assert evaluate(tmp_path / "run", shard="1/2").returncode == 0 and len(lines(tmp_path / "run")) == 18
    assert sorted(path.name for path in (tmp_path / "run" / LOCKS).iterdir()) == ["0-of-2", "0-of-3", "1-of-2", "run"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": False}, "expected --model"),
        ({"benchmarks": "mmvp,mmvp"}, "expected each name once"),
        ({"benchmarks": ","}, "expected at least one name"),
        ({"benchmarks": "mmvq"}, "expected some of mmvp"),
        ({"shard": "2/2"}, "expected i/n with 0 <= i < n"),
        ({"shard": "one"}, "expected i/n with 0 <= i < n"),
        ({"latent_mode": "loud"}, "expected clean or parity"),
        ({"dtype": "int8"}, "expected one of float32"),
        ({"device": "gpu"}, "device: expected such as cpu"),
        ({"labels": "new"}, "labels: expected one of original, corrected"),
        ({"model": "nowhere"}, "expected a checkpoint folder"),
        ({"data_root": "nowhere"}, "data-root: expected a folder"),
        ({"data_root": False}, "or pass --hub"),
        ({"protocol": "loose"}, "protocol: expected one of"),
    ],
)
def test_bad_input_exits_2_and_writes_nothing(evaluate, tmp_path, options, said):
    done = evaluate(tmp_path / "run", **options)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_without_latents_is_not_forced(evaluate, tiny, tmp_path, checkpoint):
    shutil.copytree(checkpoint, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    tiny.model("base").save_pretrained(tmp_path / "base")
    done = evaluate(tmp_path / "run", "--force-latent", model=tmp_path / "base")
    assert done.returncode == 2 and "has no latent steps" in done.stderr
    assert evaluate(tmp_path / "run", model=tmp_path / "base", benchmarks="vstar").returncode == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["latents"]["steps"] == 0


def test_torchrun_and_shard_exclude_each_other(evaluate, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = evaluate(tmp_path / "run", shard="0/2")
    assert done.returncode == 2 and "leave --shard out" in done.stderr


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 200_000])
def test_torn_lines_of_any_length_are_cut(tmp_path, size):
    path = tmp_path / "raw.jsonl"
    for whole in (b"", b"{}\n", b"{}\n" * 50_000):
        path.write_bytes(whole + b"x" * size)
        assert cut_torn_line(path) == size and path.read_bytes() == whole


def test_the_device_and_dtype_are_those_asked_for(checkpoint):
    settings = EvalSettings(str(checkpoint), (), checkpoint, dtype="bfloat16", device="cpu")
    assert running.load_model(checkpoint, settings).dtype == torch.bfloat16
    assert running.load_model(checkpoint, EvalSettings(str(checkpoint), (), checkpoint)).dtype == torch.float32
