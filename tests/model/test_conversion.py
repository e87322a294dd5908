"""Conversion between layouts: bit-exact both ways, loadable by the stock library, whole or not at all."""

import json
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from vreflection.cli import main
from vreflection.errors import CheckpointError, ConfigError
from vreflection.model.conversion import convert_checkpoint, parse_size
from vreflection.model.modeling import VReflectionForConditionalGeneration as Model
from vreflection.model.processor import VReflectionProcessor

MODULES = ("box_feature_resampler.", "student_resampler.")
TEXT_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps", "hidden_act", "max_position_embeddings", "bos_token_id", "eos_token_id",
)  # fmt: skip


def old_name(name):
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def write_release(folder, built, tiny, shards=2, drop=(), dtype=torch.bfloat16, **changes):
    """A folder as the published weights are laid out: old names, flat settings, no stage, several shards."""
    folder.mkdir(parents=True)
    tensors = {old_name(k): v.to(dtype).contiguous() for k, v in built.state_dict().items()}
    if built.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name].clone() for name in names[number::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    source = json.loads(built.config.to_json_string())
    text, vision = source["text_config"], source["vision_config"]
    vision.pop("rope_parameters"), vision.pop("model_type")
    config = {
        **{name: text[name] for name in TEXT_KEYS},
        "architectures": ["QwenWithLVR"],
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": built.config.tie_word_embeddings,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vision_config": vision,
        "torch_dtype": "bfloat16",
        "latent_end_token": False,
        "loss_lvr_lambda": 0.5,
        "resampler_num_heads": 2,
        **{name: source[name] for name in source if name.endswith("_id") and name[:3] in ("lvr", "ima", "vid", "vis")},
        **changes,
    }
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))
    tiny.processor().save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 258}')
    (folder / "chat_template.json").write_text('{"chat_template": "x"}')
    return tensors


def stored(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def read(file):
    """Tensors that outlive the file: the library maps it."""
    return {name: value.clone() for name, value in load_file(file).items()}


def identical(left, right):
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k].view(torch.uint8), right[k].view(torch.uint8))
        for k in left
    )


@pytest.fixture
def release(tiny, tmp_path):
    def write(stage="stage2", name="release", tie=False, **settings):
        built = tiny.model(stage, tie=tie)
        return tmp_path / name, write_release(tmp_path / name, built, tiny, **settings)

    return write


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_released_to_ours_and_back_is_bit_exact(release, tmp_path, stage, tie):
    folder, tensors = release(stage, tie=tie)
    report = convert_checkpoint(folder, tmp_path / "ours")
    assert (report.stage, report.written_stage, report.tensors) == (stage, stage, len(tensors))
    ours = stored(tmp_path / "ours")
    assert identical({old_name(name): value for name, value in ours.items()}, tensors)
    assert any(name.startswith("model.visual.") for name in ours) and ("lm_head.weight" in ours) != tie
    loaded = Model.from_pretrained(tmp_path / "ours", expect_stage=stage, dtype=torch.bfloat16)
    direct = Model.from_pretrained(folder, expect_stage=stage, dtype=torch.bfloat16)
    assert identical(loaded.state_dict(), direct.state_dict())
    assert loaded.config.num_latent_tokens == 3  # from the queries: the released configuration does not say
    assert loaded.config.latent_end_token is False and loaded.config.loss_lvr_lambda == 0.5
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", "released")
    assert identical(stored(tmp_path / "back"), tensors)
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "back"))
    assert {k: v for k, v in before.items() if after.get(k) != v} == {}
    assert "stage" not in after and after["use_stage2_distillation"] == (stage == "stage2")
    again = Model.from_pretrained(tmp_path / "back", expect_stage=stage, dtype=torch.bfloat16)
    assert identical(again.state_dict(), direct.state_dict())


@pytest.mark.parametrize("tie", [False, True])
def test_plain_folder_loads_in_the_stock_library(release, tmp_path, tie):
    from transformers import AutoTokenizer

    folder, tensors = release("stage2", tie=tie)
    report = convert_checkpoint(folder, tmp_path / "plain", "qwen2_5_vl")
    assert sorted(report.left_out) == sorted(name for name in tensors if name.startswith(MODULES))
    assert not any(name.startswith(MODULES) for name in stored(tmp_path / "plain"))
    model, notes = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "plain", output_loading_info=True, dtype=torch.bfloat16
    )
    assert not any(notes.values())
    state = {old_name(name): value for name, value in model.state_dict().items()}
    if tie:
        assert model.lm_head.weight is model.get_input_embeddings().weight
        state.pop("lm_head.weight")
    assert identical(state, {name: value for name, value in tensors.items() if not name.startswith(MODULES)})
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert not [k for k in config if "lvr" in k or "latent" in k or "resampler" in k or k in ("stage", "region")]
    assert config["text_config"]["rope_parameters"]["mrope_section"] == [2, 3, 3]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert tokenizer.convert_tokens_to_ids("<|lvr|>") == 264
    for name in ("chat_template.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (folder / name).read_bytes()
    before, after = (json.loads((f / "preprocessor_config.json").read_text()) for f in (folder, tmp_path / "plain"))
    before.pop("auto_map")
    assert after == {**before, "processor_class": "Qwen2_5_VLProcessor"}


@pytest.mark.parametrize("layout", ["vreflection", "released"])
def test_without_modules_decodes_as_before_and_trains_no_stage_2(release, tiny, tmp_path, layout):
    folder, _ = release("stage2", dtype=torch.float32)
    report = convert_checkpoint(folder, tmp_path / "small", layout, without_modules=True)
    assert report.written_stage == "decode" and "no stage 2 starts from it" in report.summary().replace("\n", " ")
    small, whole = Model.from_pretrained(tmp_path / "small"), Model.from_pretrained(folder)
    assert not any(name.startswith(MODULES) for name in small.state_dict())
    assert small.config.trained_stage == "stage2" and small.config.num_latent_tokens == 3
    prompt = tiny.batch([tiny.row([(2, 3)])])
    prompt = {
        k: v[:, :14] if v.dim() == 2 and k != "pixel_values" and k != "image_grid_thw" else v for k, v in prompt.items()
    }
    prompt.pop("labels")
    settings = {"max_new_tokens": 8, "force_latent": True, "return_dict_in_generate": True}
    left, right = (m.generate(**prompt, **settings) for m in (small, whole))
    assert torch.equal(left.sequences, right.sequences) and left.latent_mask.sum() == 3
    _, notes = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(notes.values())
    with pytest.raises(CheckpointError, match="stage 2 starts from a stage-1 checkpoint, got one of stage 'decode'"):
        Model.from_base(small, "stage2")


def test_aligned_fillers_without_their_teacher_are_fillers(tiny, tmp_path):
    built = tiny.model("filler_aligned")
    built.save_pretrained(tmp_path / "whole")
    tiny.processor().save_pretrained(tmp_path / "whole")
    report = convert_checkpoint(tmp_path / "whole", tmp_path / "small", without_modules=True)
    small = Model.from_pretrained(tmp_path / "small")
    assert (report.stage, report.written_stage, small.config.stage) == ("filler_aligned", "filler", "filler")
    assert small.config.traits.slot_input == built.config.traits.slot_input == "embedding"


def test_ours_to_plain_and_shards(tiny, tmp_path):
    built = tiny.model("stage1")
    built.save_pretrained(tmp_path / "ours")
    tiny.processor().save_pretrained(tmp_path / "ours")
    seen = []
    report = convert_checkpoint(
        tmp_path / "ours", tmp_path / "out", "qwen2_5_vl", max_shard_size="100KB",
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert len(report.files) > 2 and seen[-1] == (report.bytes, report.bytes)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.bytes and set(index["weight_map"].values()) == set(report.files)
    for file in report.files:
        held = load_file(tmp_path / "out" / file)
        assert set(held) == {name for name, where in index["weight_map"].items() if where == file}
        assert sum(v.nbytes for v in held.values()) <= 100_000 or len(held) == 1
    expected = {k: v for k, v in built.state_dict().items() if not k.startswith(MODULES)}
    assert identical(stored(tmp_path / "out"), expected)


def test_precision(release, tmp_path, tiny):
    folder, tensors = release(dtype=torch.float32)
    convert_checkpoint(folder, tmp_path / "half", dtype="bfloat16")
    half = {old_name(name): value for name, value in stored(tmp_path / "half").items()}
    assert identical(half, {name: value.bfloat16() for name, value in tensors.items()})
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    large = next(iter((folder).glob("*.safetensors")))
    held = read(large)
    held[next(iter(held))].view(-1)[0] = 1e6
    save_file(held, large)
    with pytest.raises(CheckpointError, match=r"1e\+06 is too large for torch.float16; choose --dtype bfloat16"):
        convert_checkpoint(folder, tmp_path / "fp16", dtype="float16")
    assert not (tmp_path / "fp16").exists() and not list(tmp_path.glob(".*"))


def test_pieces_split_nothing(release, tmp_path, monkeypatch):
    folder, tensors = release()
    monkeypatch.setattr("vreflection.model.weight_files.CHUNK", 999)  # an odd number of bytes, smaller than a tensor
    convert_checkpoint(folder, tmp_path / "copy", "released", dtype="float32")
    assert identical(stored(tmp_path / "copy"), {name: value.float() for name, value in tensors.items()})


def test_head_of_a_tied_checkpoint(release, tmp_path):
    folder, tensors = release("stage1", tie=True)
    file = folder / "model-00001-of-00002.safetensors"
    held = read(file)
    save_file({**held, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    assert convert_checkpoint(folder, tmp_path / "same").left_out == ["lm_head.weight"]
    save_file({**held, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(CheckpointError, match="ties lm_head.weight .* holds two different tensors"):
        convert_checkpoint(folder, tmp_path / "other")


def test_latent_ids_come_from_the_tokenizer_when_the_config_has_none(release, tmp_path):
    ids = ("lvr_start_id", "lvr_id", "lvr_latent_end_id", "lvr_end_id")
    folder, _ = release(drop=ids)
    assert Model.from_pretrained(folder).config.lvr_id == 264
    convert_checkpoint(folder, tmp_path / "out")
    assert [json.loads((tmp_path / "out/config.json").read_text())[name] for name in ids] == [263, 264, 265, 266]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"expected \['lvr_start_id', .* in config.json or the tokens .* neither"):
        Model.from_pretrained(folder)


def test_tokenizer_from_elsewhere(release, tiny, tmp_path):
    folder, _ = release()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(
        CheckpointError, match="tokenizer.json, or vocab.json and merges.txt, .*--tokenizer-from <folder>"
    ):
        convert_checkpoint(folder, tmp_path / "out")
    tiny.processor().save_pretrained(tmp_path / "words")
    convert_checkpoint(folder, tmp_path / "out", tokenizer_from=tmp_path / "words")
    processor = VReflectionProcessor.from_pretrained(tmp_path / "out")
    assert processor.token_ids.lvr == Model.from_pretrained(tmp_path / "out").config.lvr_id == 264
    assert (tmp_path / "out" / "chat_template.json").read_text() == '{"chat_template": "x"}'
    (folder / "preprocessor_config.json").unlink()
    (tmp_path / "words" / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="expected preprocessor_config.json, found none; .*--tokenizer-from"):
        convert_checkpoint(folder, tmp_path / "out2", tokenizer_from=tmp_path / "words")


def test_tokenizers_of_two_word_files(release, tmp_path):
    folder, _ = release()
    words = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(words["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in words["added_tokens"]}
    settings = {"added_tokens_decoder": special, "pad_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").unlink()
    convert_checkpoint(folder, tmp_path / "out")
    assert {"vocab.json", "merges.txt"} <= {p.name for p in (tmp_path / "out").iterdir()}
    loaded = VReflectionProcessor.from_pretrained(tmp_path / "out")
    assert loaded.encode_text("a<|lvr|>") == [words["model"]["vocab"]["a"], 264]


def without_latent_tokens(folder):
    """The folder's tokenizer as the base model has it."""
    file = folder / "tokenizer.json"
    words = json.loads(file.read_text())
    words["added_tokens"] = [token for token in words["added_tokens"] if "lvr" not in token["content"]]
    file.write_text(json.dumps(words))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}')


def test_tokenizers_without_or_with_other_latent_tokens(release, tmp_path):
    folder, _ = release()
    without_latent_tokens(folder)
    convert_checkpoint(folder, tmp_path / "out")
    assert VReflectionProcessor.from_pretrained(tmp_path / "out").token_ids.lvr_end == 266
    assert '"<|lvr_end|>"' in (tmp_path / "out" / "tokenizer.json").read_text()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "lvr_id": 267}))
    with pytest.raises(CheckpointError, match=r"to agree with config.json .*'lvr_id': 267.* got .*'lvr_id': 264"):
        convert_checkpoint(folder, tmp_path / "out2")


def test_base_models_take_the_ids_of_their_tokenizer(release, tmp_path):
    folder, tensors = release("base", drop=("lvr_start_id", "lvr_id", "lvr_latent_end_id", "lvr_end_id"))
    without_latent_tokens(folder)
    report = convert_checkpoint(folder, tmp_path / "ours")
    assert report.stage == "base" and Model.from_pretrained(tmp_path / "ours").config.lvr_start_id == 263
    convert_checkpoint(folder, tmp_path / "plain", "qwen2_5_vl")
    assert (tmp_path / "plain" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_tensors_nothing_uses(release, tmp_path):
    folder, tensors = release()
    save_file({"lvr_head.weight": torch.ones(2)}, folder / "extra.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lvr_head.weight"] = "extra.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    report = convert_checkpoint(folder, tmp_path / "ours")
    assert report.unknown == ["lvr_head.weight"] and "used by nothing here" in report.summary()
    assert "lvr_head.weight" in stored(tmp_path / "ours")
    assert "lvr_head.weight" in convert_checkpoint(folder, tmp_path / "plain", "qwen2_5_vl").left_out


def test_damaged_sources_are_refused_and_nothing_is_left(release, tmp_path):
    folder, tensors = release()
    file = folder / "model-00002-of-00002.safetensors"
    good = file.read_bytes()
    held = read(file)
    twice = folder / "model-00001-of-00002.safetensors"
    name = next(name for name in held if name.startswith("visual."))
    for content, message in (
        (good[:-5], "the file was cut short"),
        (b"PK\x03\x04pickle", "not a whole safetensors file"),
    ):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint(folder, tmp_path / "out")
    save_file({k: v for k, v in held.items() if k != name}, file)
    with pytest.raises(CheckpointError, match="1 tensors are missing"):
        convert_checkpoint(folder, tmp_path / "out")
    file.write_bytes(good)
    save_file({**read(twice), f"model.{name}": held[name]}, twice)
    with pytest.raises(CheckpointError, match=f"model.{name} is stored twice"):
        convert_checkpoint(folder, tmp_path / "out")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="expected file names without folders"):
        convert_checkpoint(folder, tmp_path / "out")
    for path in (*folder.glob("*.safetensors"), index):
        path.unlink()
    torch.save(held, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="got pickle files"):
        convert_checkpoint(folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["release"]


def test_targets(release, tmp_path):
    folder, _ = release()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    link = tmp_path / "link"
    link.symlink_to(folder)
    for place in (folder, link, folder / "inside", tmp_path):
        with pytest.raises(CheckpointError, match="expected a folder apart from the source"):
            convert_checkpoint(folder, place, overwrite=True)
    full = tmp_path / "full"
    full.mkdir()
    for name in ("mine.txt", "vocab.json", "pytorch_model.bin"):
        (full / name).write_text("{}")
    with pytest.raises(CheckpointError, match="is not empty; .*--overwrite"):
        convert_checkpoint(folder, full)
    convert_checkpoint(folder, full, overwrite=True)
    assert {p.name for p in full.iterdir()} == {
        "mine.txt", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "preprocessor_config.json", "processing_vreflection.py", "generation_config.json", "chat_template.json",
    }  # fmt: skip
    (tmp_path / "empty").mkdir()
    convert_checkpoint(folder, tmp_path / "empty")
    with pytest.raises(CheckpointError, match="got the file"):
        convert_checkpoint(folder, full / "mine.txt")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_not_enough_space_is_said_before_anything_is_written(release, tmp_path, monkeypatch):
    folder, _ = release()
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="GiB of weights do not fit .* nothing was changed"):
        convert_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_files():
    """No file of this process may grow beyond 100,000 bytes: a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_fills_up_leaves_the_target_alone(release, tmp_path, request):
    folder, _ = release()
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("old")
    request.getfixturevalue("small_files")
    with pytest.raises(CheckpointError, match=f"could not save {target}: .*File too large.*nothing was changed"):
        convert_checkpoint(folder, target, overwrite=True)
    assert (target / "config.json").read_text() == "old" and len(list(target.iterdir())) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"release", "out"}


def test_an_interrupted_conversion_leaves_nothing(release, tmp_path):
    folder, _ = release()

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(folder, tmp_path / "out", on_progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["release"]


def test_arguments(release, tmp_path):
    for text, size in (("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), (100, 100), ("7k", 7000)):
        assert parse_size(text) == size
    for bad in ("", "0", "GB", "5XB", "-1GB"):
        with pytest.raises(ConfigError, match="max_shard_size: expected bytes such as 5GB"):
            parse_size(bad)
    with pytest.raises(
        ConfigError, match=r"to: expected one of \['vreflection', 'qwen2_5_vl', 'released'\], got 'gguf'"
    ):
        convert_checkpoint(tmp_path, tmp_path / "out", "gguf")
    with pytest.raises(ConfigError, match="dtype: expected one of .* got 'int8'"):
        convert_checkpoint(tmp_path, tmp_path / "out", dtype="int8")


def test_command(release, tmp_path, monkeypatch, capsys):
    folder, tensors = release()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vreflection", "convert", "--model", str(folder), *arguments])
        try:
            main()
        except SystemExit as stop:
            return stop.code or 0
        return 0

    assert run("--out", str(tmp_path / "a"), "--to", "qwen2_5_vl", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["layout"] == "qwen2_5_vl" and Path(result["target"], "config.json").exists()
    assert run("--out", str(tmp_path / "b"), "--without-modules") == 0
    assert "stage stage2 became decode" in capsys.readouterr().out
    assert run("--out", str(tmp_path / "b")) == 2
    assert "is not empty" in capsys.readouterr().err
