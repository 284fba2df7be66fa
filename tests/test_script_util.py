"""From a configuration to networks: what fits loads, what does not says which keys to change."""

import dataclasses
import random
import re
import warnings

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guided_diffusion.config.checkpoint_flags import classifier_flags, model_flags
from guided_diffusion.config.keys import DataConf, InpaintConf, JumpParams
from guided_diffusion.config.network_keys import CHANNEL_MULT_BY_SIZE
from guided_diffusion.errors import UserError
from guided_diffusion.script_util import (
    create_classifier,
    create_gaussian_diffusion,
    create_model,
    create_schedule,
    load_classifier,
    load_model,
)

CPU = torch.device("cpu")
SMALL = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "8",
    "num_head_channels": 32,
}
CLASSIFIER = {
    "image_size": 64,
    "classifier_path": "classifier.pt",
    "classifier_width": 64,
    "classifier_depth": 1,
    "classifier_attention_resolutions": "16",
}


def conf(**changes):
    data = DataConf(name="set", gt_path="gt", mask_path="mask")
    return InpaintConf(**{"name": "run", "model_path": "model.pt", "data": data, **changes})


def empty(create, configuration):
    with torch.device("meta"):
        return create(configuration)


def shapes(create, configuration):
    state = empty(create, configuration).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def saved(path, wanted_shapes, dtype=torch.float32):
    """Save a checkpoint of these shapes, filled with ones, that takes hardly any place."""
    torch.save({n: torch.ones((), dtype=dtype).expand(s) for n, s in wanted_shapes.items()}, path)
    return str(path)


def refusal(load, configuration):
    with pytest.raises(UserError) as caught:
        load(configuration, CPU)
    line = str(caught.value)
    assert "\n" not in line
    return line


def demanded(line):
    """Return the keys that a message says to set."""
    text = line.split("; set ")[1]
    return yaml.safe_load("\n".join(re.split(r", (?=[a-z_]+: )", text)))


def test_weights_arrive_where_they_belong(tmp_path):
    torch.manual_seed(0)
    source = create_model(conf(**SMALL)).state_dict()
    torch.save(source, tmp_path / "model.pt")
    model = load_model(conf(**SMALL, model_path=str(tmp_path / "model.pt")), CPU)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], source[name]) for name in source)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_on_disk_become_float32(tmp_path, dtype):
    path = saved(tmp_path / "model.pt", shapes(create_model, conf(**SMALL)), dtype)
    model = load_model(conf(**SMALL, model_path=path), CPU)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all((p == 1).all() for p in model.parameters())


def test_a_checkpoint_that_is_not_of_numbers_is_refused(tmp_path):
    path = saved(tmp_path / "model.pt", shapes(create_model, conf(**SMALL)), torch.int64)
    line = refusal(load_model, conf(**SMALL, model_path=path))
    assert "expected time_embed.0.weight as plain floating-point numbers" in line


WRONG = [
    {"learn_sigma": False},
    {"resblock_updown": False},
    {"use_scale_shift_norm": False},
    {"class_cond": True, "num_classes": 7},
    {"channel_mult": "1,2,2"},
    {"num_res_blocks": 2},
    {"attention_resolutions": "16"},
    {"attention_resolutions": ""},
    {"num_channels": 96, "channel_mult": "0.34,1"},
    {"learn_sigma": False, "num_res_blocks": 3, "channel_mult": "1,1,2", "class_cond": True},
]


@pytest.mark.parametrize("truth", WRONG, ids=str)
def test_the_message_names_every_key_to_change_and_no_other(tmp_path, truth):
    """The configuration is right but for the keys of ``truth``, and then the other way round."""
    right = conf(**{**SMALL, **truth})
    path = saved(tmp_path / "model.pt", shapes(create_model, right))
    line = refusal(load_model, conf(**SMALL, model_path=path))
    keys = demanded(line)
    if truth.get("class_cond"):
        truth = {"num_classes": 1000, **truth}
        keys.setdefault("num_classes", 1000)  # is that already
    assert keys.keys() == truth.keys()
    load_model(conf(**{**SMALL, **keys, "model_path": path}), CPU)
    path = saved(tmp_path / "other.pt", shapes(create_model, conf(**SMALL)))
    wrong = dataclasses.replace(right, model_path=path)
    back = {key: getattr(conf(**SMALL), key) for key in truth if key != "num_classes"}
    assert demanded(refusal(load_model, wrong)) == back


@pytest.mark.parametrize(("truth", "said"), [(64, 256), (128, 64), (256, 512), (512, 128)])
def test_another_size_of_the_published_table_is_named(tmp_path, truth, said):
    path = saved(tmp_path / "model.pt", shapes(create_model, conf(image_size=truth)))
    wrong = conf(image_size=said, model_path=path)
    assert refusal(load_model, wrong) == (
        f"{path}: does not fit the configuration; set image_size: {truth}"
    )


def test_a_stated_width_that_fits_leaves_the_size_alone(tmp_path):
    """The widths are those of the published 64 network, but the size is rightly another one."""
    own = {**SMALL, "image_size": 128, "channel_mult": "1,2,3,4"}
    path = saved(tmp_path / "model.pt", shapes(create_model, conf(**own, learn_sigma=False)))
    keys = demanded(refusal(load_model, conf(**own, model_path=path)))
    assert keys == {"learn_sigma": False}


def test_widths_that_agree_in_whole_channels_are_not_complained_of(tmp_path):
    own = {**SMALL, "num_channels": 96, "channel_mult": "0.3399,1"}
    path = saved(tmp_path / "model.pt", shapes(create_model, conf(**own, learn_sigma=False)))
    assert demanded(refusal(load_model, conf(**own, model_path=path))) == {"learn_sigma": False}


@pytest.mark.parametrize(
    "truth",
    [
        {"classifier_width": 128},
        {"classifier_attention_resolutions": ""},
        {"classifier_use_scale_shift_norm": False},
        {"classifier_resblock_updown": False},
        {"classifier_pool": "adaptive"},
        {"classifier_pool": "spatial_v2"},
        {"image_size": 256},
        {"classifier_depth": 2, "classifier_pool": "spatial", "classifier_resblock_updown": False},
    ],
    ids=str,
)
def test_the_message_names_a_classifiers_keys(tmp_path, truth):
    path = saved(tmp_path / "c.pt", shapes(create_classifier, conf(**{**CLASSIFIER, **truth})))
    said = {**CLASSIFIER, "classifier_path": path}
    line = refusal(load_classifier, conf(**said))
    keys = demanded(line)
    if "image_size" not in truth:
        assert keys == truth
    load_classifier(conf(**{**said, **keys}), CPU)


def test_networks_in_each_others_place_are_recognised(tmp_path):
    both = {**CLASSIFIER, "num_channels": 64}
    model = saved(tmp_path / "m.pt", shapes(create_model, conf(**both)))
    classifier = saved(tmp_path / "c.pt", shapes(create_classifier, conf(**both)))
    swapped = conf(**{**both, "model_path": classifier, "classifier_path": model})
    assert "which belongs in classifier_path" in refusal(load_model, swapped)
    assert "which belongs in model_path" in refusal(load_classifier, swapped)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"time_embed.0.weight": None}, ["expected (128, 32)", "found no such tensor"]),
        ({"zeta": (1,)}, ["zeta", "expected no such tensor, found (1,)"]),
        ({f"output_blocks.{'9' * 5000}.0.out_layers.3.weight": (1,)}, ["no such tensor"]),
    ],
    ids=["lost", "extra", "absurd number"],
)
def test_the_first_tensor_that_differs_is_named(tmp_path, changes, words):
    changed = {**shapes(create_model, conf(**SMALL)), **changes}
    path = saved(tmp_path / "model.pt", {name: shape for name, shape in changed.items() if shape})
    line = refusal(load_model, conf(**SMALL, model_path=path))
    assert [word for word in words if word not in line] == []


architectures = st.fixed_dictionaries(
    {
        "image_size": st.sampled_from([16, 32, 48, 64, 128, 256]),
        "num_channels": st.sampled_from([32, 64]),
        "num_res_blocks": st.integers(1, 2),
        "channel_mult": st.lists(st.sampled_from("1234"), min_size=1, max_size=3).map(",".join),
        "attention_resolutions": st.sets(st.sampled_from([8, 16, 24, 32, 64])).map(
            lambda sides: ",".join(map(str, sorted(sides, reverse=True)))
        ),
        "in_channels": st.sampled_from([1, 3]),
        "learn_sigma": st.booleans(),
        "class_cond": st.booleans(),
        "num_classes": st.integers(1, 1000),
        "use_scale_shift_norm": st.booleans(),
        "resblock_updown": st.booleans(),
        "num_head_channels": st.just(32),
    }
)
relaxed = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@relaxed
@given(truth=architectures, said=architectures)
def test_what_the_message_says_makes_any_checkpoint_load(tmp_path, truth, said):
    # What no shape tells is right on both sides: the size, unless widths of the table tell it.
    said = {**said, "image_size": truth["image_size"]}
    path = saved(tmp_path / "model.pt", shapes(create_model, conf(**truth)))
    try:
        load_model(conf(**said, model_path=path), CPU)
    except UserError as error:
        load_model(conf(**{**said, **demanded(str(error)), "model_path": path}), CPU)


@relaxed
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from([(create_model, load_model), (create_classifier, load_classifier)]),
    keep=st.floats(0, 1),
)
def test_a_mutilated_state_dict_gets_one_line(tmp_path, seed, kind, keep):
    (create, load), rng = kind, random.Random(seed)
    right = conf(**CLASSIFIER, num_channels=32, num_res_blocks=1, num_head_channels=32)
    whole = shapes(create, right)
    lost = rng.sample(list(whole), max(1, int(len(whole) * (1 - keep))))
    rest = {name: shape for name, shape in whole.items() if name not in lost}
    for name in rng.sample(list(rest), min(len(rest), rng.randrange(4))):
        rest[name] = rng.choice([(), (0,), (1, 0), rest[name][:-1], (2**20, 3), (3, 6, 2, 2, 2)])
    rest["odd.0.1"] = (1,)
    path = saved(tmp_path / "model.pt", rest)
    changed = dataclasses.replace(right, model_path=path, classifier_path=path)
    line = refusal(load, changed)
    assert line.startswith(path)
    assert "; set " not in line  # nothing would help
    model_flags(rest, 64), classifier_flags(rest)  # whatever is asked


PUBLISHED_64 = {
    "image_size": 64, "num_channels": 192, "num_res_blocks": 3, "class_cond": True,
    "use_new_attention_order": True, "noise_schedule": "cosine",
}  # fmt: skip
PUBLISHED_128 = {
    "image_size": 128, "class_cond": True, "num_heads": 4, "num_head_channels": -1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("right", "changes", "named"),
    [
        (
            PUBLISHED_64,
            {"noise_schedule": "linear", "use_new_attention_order": False},
            "use_new_attention_order: true, noise_schedule: cosine;",
        ),
        (PUBLISHED_128, {"num_head_channels": 64}, "num_head_channels: -1;"),
    ],
)
def test_published_checkpoints_warn_of_what_shapes_do_not_tell(tmp_path, right, changes, named):
    path = saved(tmp_path / "model.pt", shapes(create_model, conf(**right)))
    with pytest.warns(UserWarning, match=re.escape(named)):
        load_model(conf(**{**right, **changes}, model_path=path), CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(conf(**right, model_path=path), CPU)


def test_other_networks_of_that_size_do_not_warn(tmp_path):
    own = {"image_size": 64, "num_channels": 64, "num_res_blocks": 3, "class_cond": True}
    path = saved(tmp_path / "model.pt", shapes(create_model, conf(**own)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(conf(**own, model_path=path), CPU)


def test_a_walk_above_the_chain_is_refused_and_one_below_warned_of():
    high = conf(timestep_respacing="20", schedule_jump_params=JumpParams(t_T=21))
    with pytest.raises(UserError) as caught:
        create_schedule(high, create_gaussian_diffusion(high))
    assert "t_T" in str(caught.value)
    assert "at most 20" in str(caught.value)
    low = conf(timestep_respacing="20", schedule_jump_params=JumpParams(t_T=19))
    with pytest.warns(UserWarning, match="timestep_respacing: '19'"):
        create_schedule(low, create_gaussian_diffusion(low))
    even = conf(timestep_respacing="20", schedule_jump_params=JumpParams(t_T=20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert max(create_schedule(even, create_gaussian_diffusion(even))) == 19


@pytest.mark.parametrize("respacing", ["1001", "500,501,1", "ddim999", "1"])
def test_impossible_respacings_are_refused_by_name(respacing):
    with pytest.raises(UserError) as caught:
        create_gaussian_diffusion(conf(timestep_respacing=respacing))
    assert str(caught.value).startswith("timestep_respacing: ")
    assert str(caught.value).endswith(f"found {respacing!r}")


def test_an_undo_outside_the_chain_is_refused_by_name():
    far = conf(
        timestep_respacing="20", schedule_jump_params=JumpParams(t_T=20), inpa_inj_time_shift=15
    )
    with pytest.raises(UserError) as caught:
        create_schedule(far, create_gaussian_diffusion(far))
    assert str(caught.value).startswith("inpa_inj_time_shift: ")


def test_times_are_rescaled_to_a_thousand_steps_only_if_asked():
    plain = create_gaussian_diffusion(conf(diffusion_steps=500))
    scaled = create_gaussian_diffusion(conf(diffusion_steps=500, rescale_timesteps=True))
    times = plain.network_times(CPU)
    assert torch.equal(scaled.network_times(CPU), times * 2.0)
    assert times[-1] == 499


def test_the_published_table_is_what_the_classifier_uses():
    for size in CHANNEL_MULT_BY_SIZE:
        configuration = conf(
            image_size=size, channel_mult="1,2", classifier_path="c.pt", num_channels=64
        )
        levels = empty(create_classifier, configuration).cfg.channel_mult
        assert levels == CHANNEL_MULT_BY_SIZE[size]
