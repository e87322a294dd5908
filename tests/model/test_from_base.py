"""Starting one stage from another: what is shared, what is fresh, what is refused."""

import pytest
import torch

from vreflection.errors import CheckpointError, ConfigError
from vreflection.model.modeling import VReflectionForConditionalGeneration as Model


def start(tiny, base, stage, **settings):
    return Model.from_base(base, stage, **{**tiny.LATENT_SETTINGS, **settings})


def test_base_to_stage_1_to_stage_2(tiny):
    host = tiny.host_model()
    one = start(tiny, host, "stage1")
    assert one.config.stage == "stage1" and one.objective.ce_on_latent_slots
    assert one.lm_head is host.lm_head and one.model is host.model
    assert not hasattr(one, "student_resampler")
    two = Model.from_base(one, "stage2")
    assert two.config.stage == "stage2" and two.objective.distillation_weight == 1.0
    assert two.box_feature_resampler is one.box_feature_resampler and two.model is one.model
    assert (two.config.num_latent_tokens, two.config.lvr_id, two.config.resampler_num_heads) == (3, tiny.LVR, 2)
    for model in (one, two):
        model.freeze_for_stage()
        model(**tiny.batch([tiny.row([(2, 2)], [((0, 0, 1, 1), 0)])])).loss.backward()


def test_training_the_result_trains_the_instance_it_came_from(tiny):
    host = tiny.host_model()
    one = start(tiny, host, "stage1")
    with torch.no_grad():
        one.lm_head.weight.zero_()
        one.model.language_model.norm.weight.fill_(2)
    assert host.lm_head.weight.abs().max() == 0 and (host.model.language_model.norm.weight == 2).all()


def test_training_and_eval_mode_are_kept(tiny):
    assert not start(tiny, tiny.host_model(), "sft").training
    assert start(tiny, tiny.host_model().train(), "stage1").box_feature_resampler.training


@pytest.mark.parametrize("stage", ["base", "sft", "boundary", "filler", "stage2"])
def test_stage_2_starts_from_stage_1_only(tiny, stage):
    with pytest.raises(CheckpointError, match=f"stage 2 starts from a stage-1 checkpoint, got one of stage '{stage}'"):
        Model.from_base(tiny.model(stage), "stage2")
    with pytest.raises(CheckpointError, match="--set model=<stage-1 folder>"):
        Model.from_base(tiny.host_model(), "stage2")


def test_paths_work_like_instances(tiny, tmp_path):
    one = tiny.model("stage1")
    one.save_pretrained(tmp_path / "one")
    two = Model.from_base(tmp_path / "one", "stage2")
    for name, value in one.box_feature_resampler.state_dict().items():
        assert torch.equal(two.box_feature_resampler.state_dict()[name], value)
    tiny.host_model().save_pretrained(tmp_path / "host")
    assert start(tiny, str(tmp_path / "host"), "stage1").config.stage == "stage1"
    with pytest.raises(CheckpointError, match="got one of stage 'base'"):
        Model.from_base(tmp_path / "host", "stage2")


def test_fresh_modules_are_initialised_from_the_seed(tiny):
    def fresh(seed):
        torch.manual_seed(seed)
        return start(tiny, tiny.host_model(), "stage1", query_init_std=0.5).box_feature_resampler

    first, again, other = fresh(0), fresh(0), fresh(1)
    for name, value in first.state_dict().items():
        assert value.isfinite().all() and torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(first.queries, other.queries)
    assert abs(first.queries.std().item() - 0.5) < 0.15
    assert (first.output_norm.weight == 1).all() and (first.output_norm.bias == 0).all()
    bound = (6 / (4 * tiny.WIDTH)) ** 0.5  # Xavier, as torch's attention does it
    assert 0.8 * bound < first.cross_attn.in_proj_weight.abs().max() <= bound


def test_fresh_modules_take_dtype_and_device_of_the_base(tiny):
    one = start(tiny, tiny.host_model().to(torch.bfloat16), "stage1")
    assert {p.dtype for p in one.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in one.parameters()} == {"cpu"}


@pytest.mark.parametrize("tie", [False, True])
def test_the_result_saves_and_loads(tiny, tmp_path, tie):
    one = start(tiny, tiny.host_model(tie), "stage1", region="roi_align")
    one.save_pretrained(tmp_path / "one")
    loaded = Model.from_pretrained(tmp_path / "one", expect_stage="stage1")
    for name, value in one.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.config.region == loaded.box_feature_resampler.region == "roi_align"
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tie


def test_token_ids_decide_what_a_slot_is(tiny):
    moved = {"lvr_start_id": 300, "lvr_id": 301, "lvr_latent_end_id": 302, "lvr_end_id": 303}
    default, other = tiny.model("stage1"), tiny.model("stage1", **moved)
    assert (other.config.lvr_start_id, other.config.lvr_id) == (300, 301)
    batch = tiny.batch([tiny.row([(2, 2)], [((0, 0, 1, 1), 0)])])
    shift = {tiny.LVR_START: 300, tiny.LVR: 301, tiny.LVR_END: 303}
    for name in ("input_ids", "labels"):
        for old, new in shift.items():
            batch[name][batch[name] == old] = new
    assert other(**batch).losses["latent_alignment"] > 0
    with pytest.raises(ValueError, match="sample 0: 0 spans, 1 boxes"):
        default(**batch)


def test_unknown_stages_and_settings(tiny):
    with pytest.raises(ConfigError, match="stage: expected one of .*stage2.*, got 'stage3'"):
        start(tiny, tiny.host_model(), "stage3")
    with pytest.raises(ConfigError, match=r"unknown latent settings \['num_latents'\]; known: .*num_latent_tokens"):
        start(tiny, tiny.host_model(), "stage1", num_latents=3)


@pytest.mark.parametrize(
    "change", [{"num_latent_tokens": 4}, {"region": "roi_align"}, {"roi_output_size": 5}, {"resampler_num_heads": 4}]
)
def test_a_trained_teacher_keeps_its_shape_and_region(tiny, change):
    """The modules are taken over as they are: a config that says otherwise would be a lie, or not even load."""
    ((name, value),) = change.items()
    with pytest.raises(ConfigError, match=f"{name}: the stage-1 teacher was trained with .*, got {value!r}"):
        Model.from_base(tiny.model("stage1"), "stage2", **change)
    same = Model.from_base(tiny.model("stage1"), "stage2", **{name: getattr(tiny.model("stage1").config, name)})
    assert same.config.stage == "stage2"


def test_the_attention_implementation_of_the_base_is_kept(tiny):
    host = tiny.host_model()
    host.set_attn_implementation("eager")
    one = start(tiny, host, "stage1")
    for part in (one.model.language_model, one.model.visual):
        assert part.config._attn_implementation == "eager"


@pytest.mark.parametrize("through_host", [False, True])
def test_a_model_built_from_its_config_initialises_the_modules_alike(tiny, through_host):
    """The host library's own initialisation must not reach into them."""
    from vreflection.model.config import VReflectionConfig

    torch.manual_seed(0)
    settings = {**tiny.LATENT_SETTINGS, "query_init_std": 0.5}
    built = Model(VReflectionConfig.from_base_config(tiny.host_config(), "stage2", **settings))
    modules = (built.box_feature_resampler, built.student_resampler)
    if through_host:
        for module in modules:
            for parameter in module.parameters():
                torch.nn.init.constant_(parameter, float("nan"))
        built.init_weights()
    xavier = (6 / (4 * tiny.WIDTH)) ** 0.5
    for module in modules:
        attention = module.cross_attn
        assert 0.8 * xavier < attention.in_proj_weight.abs().max() <= xavier
        assert 0.8 * tiny.WIDTH**-0.5 < attention.out_proj.weight.abs().max() <= tiny.WIDTH**-0.5
        assert attention.in_proj_bias.abs().max() == attention.out_proj.bias.abs().max() == 0
        assert (module.output_norm.weight == 1).all() and (module.output_norm.bias == 0).all()
    assert abs(built.box_feature_resampler.queries.std().item() - 0.5) < 0.15
