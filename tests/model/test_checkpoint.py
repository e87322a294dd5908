"""Checkpoints: bit-exact round trips, released key names, and refusals that say what is wrong."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vreflection.errors import CheckpointError
from vreflection.model.modeling import VReflectionForConditionalGeneration as Model

STAGES = ("base", "sft", "boundary", "filler", "stage1", "stage2")


def same_weights(a, b):
    left, right = a.state_dict(), b.state_dict()
    assert set(left) == set(right)
    return all(torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left)


@pytest.fixture
def saved(tiny, tmp_path):
    def save(stage, name="checkpoint", seed=0, **settings):
        built = tiny.model(stage, seed=seed, **settings)
        built.save_pretrained(tmp_path / name)
        return built, tmp_path / name

    return save


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_round_trip_is_bit_exact(saved, tiny, stage, tie):
    settings = {"region": "roi_align", "roi_output_size": 2, "query_init_std": 0.5} if stage == "stage1" else {}
    built, folder = saved(stage, tie=tie, **settings)
    loaded = Model.from_pretrained(folder)
    assert same_weights(built, loaded) and loaded.config.stage == stage
    for name, value in {**tiny.LATENT_SETTINGS, **settings}.items():
        assert getattr(loaded.config, name) == value, name
    assert loaded.objective == type(loaded.objective).for_stage(stage)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tie
    assert {p.name for p in folder.iterdir()} <= {"config.json", "generation_config.json", "model.safetensors"}
    if stage == "stage1":
        assert loaded.box_feature_resampler.region == "roi_align" and loaded.box_feature_resampler.num_heads == 2


def test_bfloat16_survives(saved):
    built, folder = saved("stage2")
    built.to(torch.bfloat16).save_pretrained(folder)
    loaded = Model.from_pretrained(folder, dtype=torch.bfloat16)
    assert same_weights(built, loaded) and loaded.student_resampler.output_norm.weight.dtype == torch.bfloat16


def released_name(name):
    """The name a tensor has in released checkpoints."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def write_released(folder, built, tensors=None, **changes):
    """A folder as the reference implementation saves it: old names, flat text settings, no `stage`."""
    folder.mkdir()
    state = built.state_dict() if tensors is None else tensors
    save_file(
        {released_name(k): v.contiguous().clone() for k, v in state.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads(built.config.to_json_string(use_diff=False))
    text = config.pop("text_config")
    for name in ("stage", "region", "roi_output_size", "roi_sampling_ratio", "query_init_std"):
        config.pop(name)
    keep = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    flat = {name: text[name] for name in (*keep, "rms_norm_eps", "hidden_act", "max_position_embeddings")}
    flat |= {
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps({**config, **flat, "latent_end_token": True, **changes}))


@pytest.mark.parametrize("stage", ["base", "stage1", "stage2"])
def test_released_key_names_and_config_load(tiny, tmp_path, stage):
    built = tiny.model(stage)
    names = [released_name(n) for n in built.state_dict()]
    assert any(n.startswith("visual.blocks.") for n in names) and "model.embed_tokens.weight" in names
    write_released(tmp_path / "old", built)
    loaded = Model.from_pretrained(tmp_path / "old")
    assert same_weights(built, loaded) and loaded.config.stage == stage
    rows = [tiny.row([(2, 3)], [((0.1, 0.1, 0.6, 0.9), 0)] if stage != "base" else [])]
    with torch.no_grad():
        losses = [m(**tiny.batch(rows)).loss for m in (loaded, built)]
    torch.testing.assert_close(*losses)
    loaded.save_pretrained(tmp_path / "new")
    assert any(n.startswith("model.visual.") for n in load_file(tmp_path / "new" / "model.safetensors"))
    assert same_weights(built, Model.from_pretrained(tmp_path / "new", expect_stage=stage))


def test_shards(saved, tmp_path):
    built, folder = saved("stage2")
    built.save_pretrained(folder, max_shard_size="200KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1 and not (folder / "model.safetensors").exists()
    assert same_weights(built, Model.from_pretrained(folder))
    gone = sorted(set(index.values()))[1]
    (folder / gone).rename(tmp_path / gone)
    with pytest.raises(
        CheckpointError, match=rf"shards \['{gone}'\] named in model.safetensors.index.json are missing"
    ):
        Model.from_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(CheckpointError, match="model.safetensors.index.json: not a usable index"):
        Model.from_pretrained(folder)


def test_a_smaller_save_leaves_no_stale_shards(saved):
    built, folder = saved("stage1")
    built.save_pretrained(folder, max_shard_size="200KB")
    built.save_pretrained(folder)
    assert [p.name for p in folder.glob("model*")] == ["model.safetensors"]
    assert same_weights(built, Model.from_pretrained(folder))


def test_only_the_main_process_writes(tiny, tmp_path):
    tiny.model("base").save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_expected_stage(saved):
    _, folder = saved("sft")
    assert Model.from_pretrained(folder, expect_stage="sft").config.stage == "sft"
    with pytest.raises(CheckpointError, match="expected a checkpoint of stage 'stage1', got 'sft'"):
        Model.from_pretrained(folder, expect_stage="stage1")


@pytest.mark.parametrize(
    ("stage", "claim"), [("stage1", "stage2"), ("stage2", "stage1"), ("base", "stage1"), ("stage1", "x")]
)
def test_config_and_tensors_disagree(saved, stage, claim):
    _, folder = saved(stage)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "stage": claim}))
    with pytest.raises(
        CheckpointError, match=f"config.json says stage '{claim}', but the tensors are those of '{stage}'"
    ):
        Model.from_pretrained(folder)


def edit(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_missing_tensors(saved):
    _, folder = saved("stage2")
    edit(folder, lambda s: [s.pop(n) for n in list(s) if "layers.1.mlp" in n])
    with pytest.raises(
        CheckpointError, match=r"3 tensors are missing, such as .*layers.1.mlp.down_proj.*stage 'stage2'"
    ):
        Model.from_pretrained(folder)


def test_a_single_missing_teacher_tensor(saved):
    _, folder = saved("stage1")
    edit(folder, lambda s: s.pop("box_feature_resampler.queries"))
    with pytest.raises(CheckpointError, match=r"1 tensors are missing, such as \['box_feature_resampler.queries'\]"):
        Model.from_pretrained(folder)


def test_mis_shaped_tensors(saved):
    _, folder = saved("stage1")
    edit(folder, lambda s: s.update({"box_feature_resampler.queries": torch.zeros(1, 8, 64)}))
    with pytest.raises(CheckpointError, match=r"queries: expected \(1, 3, 64\), got \(1, 8, 64\)"):
        Model.from_pretrained(folder)


def test_untied_checkpoints_need_their_head(saved):
    _, folder = saved("base")
    edit(folder, lambda s: s.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match="lm_head.weight"):
        Model.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 5, 300, 100_000])
def test_truncated_files(saved, keep):
    _, folder = saved("stage1")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not a whole safetensors file .*copy or save it again"):
        Model.from_pretrained(folder)


@pytest.mark.parametrize("header", [b"[1, 2]", b"{", b'{"a": 3}', b"\xff\xfe"])
def test_files_that_are_no_safetensors(saved, header):
    _, folder = saved("base")
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Model.from_pretrained(folder)


def test_pickle_files_are_refused(saved):
    built, folder = saved("base")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="expected model weights .* found none"):
        Model.from_pretrained(folder)
    torch.save(built.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"got pickle files \['pytorch_model.bin'\], which can run code"):
        Model.from_pretrained(folder)


def test_configs_that_do_not_fit(saved):
    _, folder = saved("base")
    file = folder / "config.json"
    good = json.loads(file.read_text())
    for text, message in (
        (json.dumps({**good, "model_type": "llama"}), "expected model_type vreflection or qwen2_5_vl, got 'llama'"),
        ("{", "config.json: not valid JSON"),
        ("[]", "config.json: expected an object"),
    ):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            Model.from_pretrained(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="expected config.json, found none"):
        Model.from_pretrained(folder)


def test_paths_that_are_no_folder(saved, tmp_path):
    _, folder = saved("base")
    for path in (tmp_path / "absent", folder / "config.json", "no-such-folder", "./a/b"):
        with pytest.raises(CheckpointError, match="expected a checkpoint folder or a hub id 'owner/name'"):
            Model.from_pretrained(path)


def test_unused_tensors_are_said(saved):
    _, folder = saved("stage2")
    edit(folder, lambda s: s.update({"student_resampler.queries": torch.zeros(1)}))
    with pytest.warns(UserWarning, match="stage 'stage2' does not use .*student_resampler.queries"):
        Model.from_pretrained(folder)


FULL_DISK = """
    import os, resource, signal, sys
    sys.path.insert(0, {tests!r})
    import conftest as tiny
    from vreflection.errors import CheckpointError

    model = tiny.model("stage2", seed=1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for limit in (100_000, 1_000):  # the weights, and then already the configuration, do not fit
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            model.save_pretrained({folder!r})
        except CheckpointError as error:
            print("REFUSED", error)
        print("LEFT", os.listdir(os.path.dirname({folder!r})))
"""


def test_a_full_disk_leaves_the_old_checkpoint_alone(saved):
    built, folder = saved("stage2")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert len(before["model.safetensors"]) > 100_000 and len(before["config.json"]) > 1_000
    code = textwrap.dedent(FULL_DISK.format(tests=str(Path(__file__).parents[1]), folder=str(folder)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"REFUSED could not save {folder}") == done.stdout.count("free some space") == 2
    assert done.stdout.count(f"LEFT ['{folder.name}']") == 2
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert same_weights(built, Model.from_pretrained(folder))


def test_targets_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("mine")
    built = tiny.model("base")
    with pytest.raises(CheckpointError, match="nothing was changed"):
        built.save_pretrained(tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot write to"):
        built.save_pretrained(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_an_error_of_ones_own_while_saving_is_not_hidden(tiny, tmp_path, monkeypatch):
    built = tiny.model("base")
    with pytest.raises(ZeroDivisionError):
        built.save_pretrained(tmp_path / "x", state_dict=type("Bad", (dict,), {"items": lambda self: 1 / 0})())
    assert not list(tmp_path.iterdir())


def test_a_save_reaches_the_disk_before_it_is_seen(tiny, tmp_path, monkeypatch):
    import vreflection.model.checkpoint as checkpoint

    seen, flush = [], checkpoint.flush
    target = tmp_path / "out"

    def record(path):
        flush(path)
        seen.append((path.name if path.parent != tmp_path else "folder", target.exists()))

    monkeypatch.setattr(checkpoint, "flush", record)
    tiny.model("base").save_pretrained(target)
    files = sorted(p.name for p in target.iterdir())
    assert sorted(seen[: len(files)]) == [(name, False) for name in files]
    assert seen[len(files)] == ("folder", False)  # its entries, then the rename, then the entry of the folder itself
    assert seen[len(files) + 1 :] == [(tmp_path.name, True)]
    assert not [p for p in tmp_path.iterdir() if p != target]


def test_single_files_win_over_an_index_as_in_the_host_library(saved):
    built, folder = saved("base")
    other = built.state_dict()["model.language_model.norm.weight"] + 1
    save_file({"model.language_model.norm.weight": other}, folder / "old.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "old.safetensors"}}')
    assert same_weights(built, Model.from_pretrained(folder))


def test_sizes_in_a_header_must_add_up(saved):
    _, folder = saved("base")
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"not a whole safetensors file \(a: 8 bytes for F32 of shape \(2, 2\)\)"):
        Model.from_pretrained(folder)


def test_hub_ids_download_no_pickles(saved, monkeypatch, tmp_path):
    built, folder = saved("stage1")
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **k: asked.update(name=name, **k) or folder)
    monkeypatch.chdir(tmp_path)
    assert same_weights(built, Model.from_pretrained("owner/name", revision="v1", expect_stage="stage1"))
    assert (asked["name"], asked["revision"]) == ("owner/name", "v1")
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in asked["allow_patterns"])
