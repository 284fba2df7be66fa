"""The keys: what is published loads, what cannot work is refused by name before anything starts."""

import dataclasses
import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion import masks
from guided_diffusion.config import docs, keys, schema
from guided_diffusion.config.keys import InpaintConf, JumpParams
from guided_diffusion.config.network_keys import CHANNEL_MULT_BY_SIZE
from guided_diffusion.config.reading import load_conf
from guided_diffusion.config.schema import conf_from_dict, conf_to_dict
from guided_diffusion.config.train_keys import TrainConf
from guided_diffusion.errors import UserError

CONFS = Path(__file__).resolve().parents[2] / "confs"
INPAINT = sorted(p for p in CONFS.glob("*.yml") if not p.name.startswith("train"))
TRAIN = sorted(CONFS.glob("train*.yml"))
SETS = ("c256", "inet256", "p256")
MASKS = ("thin", "thick", "ev2li", "nn2", "ex64", "genhalf")
PUBLISHED = ["face_example", *(f"test_{s}_{m}" for s in SETS for m in MASKS)]

COMPLETE = Path(__file__).with_name("complete.yml")


def tree(**keys):
    """A minimal tree in the published form; ``data__x`` is key x of the data set."""
    data = {"gt_path": "gt", "mask_path": "mask"}
    data |= {k[6:]: keys.pop(k) for k in list(keys) if k.startswith("data__")}
    return {"name": "run", "model_path": "model.pt", "data": {"eval": {"set": data}}} | keys


def make(**keys):
    return conf_from_dict(tree(**keys), InpaintConf, "x.yml")


def refused(*words, **keys):
    with pytest.raises(UserError) as caught:
        make(**keys)
    message = str(caught.value)
    assert message.startswith("x.yml: ")
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


# ---- what is published ---------------------------------------------------------------------------


def test_the_complete_published_form_is_accepted_unchanged():
    # Everything in it is the default, but for what makes it this run.
    plain = {"name": "complete", "model_path": "./data/pretrained/celeba256_250000.pt"}
    one = {"gt_path": "./data/datasets/gts/face", "mask_path": "./data/datasets/gt_keep_masks/face"}
    plain["data"] = {"eval": {"paper_face_mask": {**one, "max_len": 8}}}
    assert load_conf(COMPLETE) == conf_from_dict(plain, InpaintConf)


def test_the_complete_form_states_every_ignored_key():
    stated = yaml.safe_load(COMPLETE.read_text())
    stated |= {f"data.eval.<set>.{key}": 1 for key in stated["data"]["eval"]["paper_face_mask"]}
    assert keys.IGNORED_KEYS.keys() - stated.keys() == {"record"}  # which runs of this program have


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_say_what_is_published(name):
    loaded = load_conf(CONFS / f"{name}.yml")
    which, mask = ("face", "face") if name == "face_example" else name.split("_")[1:]
    models = {"inet256": "256x256_diffusion.pt", "p256": "places256_300000.pt"}
    assert loaded.model_path == f"./data/pretrained/{models.get(which, 'celeba256_250000.pt')}"
    guided = which == "inet256"
    assert (loaded.class_cond, loaded.use_fp16, loaded.guided) == (guided, guided, guided)
    if guided:
        assert loaded.classifier_path == "./data/pretrained/256x256_classifier.pt"
        assert loaded.classifier_scale == 1.0
    data = loaded.data
    assert data.gt_path == f"./data/datasets/gts/{which}"
    assert data.mask_path == f"./data/datasets/gt_keep_masks/{mask}"
    if which == "face":
        assert (data.name, data.batch_size, data.max_len) == ("paper_face_mask", 1, 8)
    else:
        assert (data.batch_size, data.max_len) == (4, 100)
        assert data.name == f"lama_{which}_{mask}_n100_test"


OTHERS = {
    "inet256_uncond": {"model": "256x256_diffusion_uncond.pt", "classifier_scale": 10.0},
    "lsun_bedroom": {"dropout": 0.1, "timestep_respacing": "1000"},
    "lsun_cat": {"dropout": 0.1, "timestep_respacing": "1000"},
    "lsun_horse": {"dropout": 0.1, "timestep_respacing": "1000"},
    "lsun_horse_nodropout": {"dropout": 0.0, "timestep_respacing": "1000"},
    "inet512": {"model": "512x512_diffusion.pt", "class_cond": True, "image_size": 512,
                "use_fp16": False, "classifier_scale": 4.0},
    "inet64": {"model": "64x64_diffusion.pt", "image_size": 64, "num_channels": 192,
               "num_res_blocks": 3, "use_new_attention_order": True, "noise_schedule": "cosine",
               "dropout": 0.1, "class_cond": True, "classifier_depth": 4},
    "inet128": {"model": "128x128_diffusion.pt", "image_size": 128, "num_heads": 4,
                "num_head_channels": -1, "class_cond": True, "classifier_scale": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_published_checkpoints_have_their_flags(name):
    flags = {"use_fp16": True} | OTHERS[name]
    loaded = load_conf(CONFS / f"{name}.yml")
    assert loaded.model_path == "./data/pretrained/" + flags.pop("model", f"{name}.pt")
    assert {flag: getattr(loaded, flag) for flag in flags} == flags
    assert loaded.guided == name.startswith("inet")
    if name.startswith("lsun"):
        assert loaded.schedule_jump_params.t_T == 1000


@pytest.mark.parametrize("path", INPAINT + TRAIN, ids=lambda p: p.stem)
def test_every_conf_loads_and_states_only_what_differs(path):
    cls = TrainConf if path in TRAIN else InpaintConf
    loaded = load_conf(path, cls)
    assert loaded.name == path.stem or path in TRAIN
    written = yaml.safe_load(yaml.safe_dump(conf_to_dict(loaded)))
    assert conf_from_dict(written, cls) == loaded
    jsonschema.validate(written, docs.json_schema(cls))
    kinds = {"": cls, "schedule_jump_params": JumpParams, "data": keys.DataConf}
    name = "train.schema.json" if path in TRAIN else "schema.json"
    text = path.read_text(encoding="utf-8")
    assert text.splitlines()[0] == f"# yaml-language-server: $schema=./{name}"
    raw = yaml.safe_load(text)
    jsonschema.validate(raw, json.loads((CONFS / name).read_text()))
    sets = raw.pop("data", {"eval": {"": {}}})["eval"]
    parts = {"": raw, "schedule_jump_params": raw.pop("schedule_jump_params", {})}
    parts["data"] = next(iter(sets.values()))
    for where, stated in parts.items():
        defaults = {field.name: field.default for field in dataclasses.fields(kinds[where])}
        assert not [key for key, value in stated.items() if str(defaults[key]) == str(value)]
    assert "paths" not in parts["data"]


@pytest.mark.parametrize("name", docs.schema_files())
def test_schema_files_are_current(name):
    written = (CONFS / name).read_text(encoding="utf-8")
    assert written == docs.schema_files()[name], "run: python guided_diffusion/config/docs.py"
    jsonschema.Draft7Validator.check_schema(json.loads(written))


def test_schema_accepts_the_complete_form_and_refuses_what_is_wrong():
    schema = json.loads(docs.schema_files()["schema.json"])
    good = yaml.safe_load(COMPLETE.read_text())
    jsonschema.validate(good, schema)
    for wrong in ({"image_sze": 1}, {"use_fp16": 1}, {"dropout": 1.0}, {"num_channels": 100}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(good | wrong, schema)


# ---- required, unknown ---------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["name", "model_path", "data"])
def test_required_keys(missing):
    absent = tree()
    absent.pop(missing)
    for without in (absent, {**absent, missing: None}):
        with pytest.raises(UserError, match=f"^x.yml: {missing}: is missing"):
            conf_from_dict(without, InpaintConf, "x.yml")


@pytest.mark.parametrize(
    ("keys", "whole", "nearest"),
    [
        ({"inpa_inj_sched_prv": 1}, "inpa_inj_sched_prv", "inpa_inj_sched_prev"),
        ({"T_t": 1}, "T_t", "schedule_jump_params.t_T"),
        ({"gt_path": 1}, "gt_path", "data.eval.<set>.gt_path"),
        (
            {"schedule_jump_params": {"jump_lenght": 1}},
            "schedule_jump_params.jump_lenght",
            "schedule_jump_params.jump_length",
        ),
        ({"data__maxlen": 1}, "data.eval.set.maxlen", "data.eval.set.max_len"),
        ({"data__name": "x"}, "data.eval.set.name", "name"),
        ({"data": {"train": {}}}, "data.train", "data.eval"),
    ],
)
def test_unknown_keys_name_the_nearest_known_one(keys, whole, nearest):
    line = refused(**keys)
    assert line == f"x.yml: {whole}: unknown key; the nearest known key is {nearest}"


@pytest.mark.parametrize("name", [7, None])
def test_keys_that_are_no_text_are_unknown(name):
    with pytest.raises(UserError, match=f"^x.yml: {name}: unknown key"):
        conf_from_dict({**tree(), name: 1}, InpaintConf, "x.yml")


def test_ignored_keys_are_ignored_at_their_own_place_only():
    assert make(n_jobs="anything", data__ds_conf={"a": [1]}) == make()
    refused("data.eval.set.n_jobs: unknown key", data__n_jobs=1)
    refused("ds_conf: unknown key", ds_conf=1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"eval": {}}, "data.eval: expected one set"),
        ({"eval": {"a": {}, "b": {}}}, "found ['a', 'b']"),
        ({"eval": {"a": None}}, "data.eval.a.gt_path: is missing"),
        ({"eval": {None: {}}}, "data.eval: expected the name"),
        ({"eval": ["a"]}, "data.eval: expected keys and values"),
        ("x", "data: expected keys and values, found 'x'"),
    ],
)
def test_exactly_one_data_set(data, words):
    refused(words, data=data)


# ---- ranges and conflicts ------------------------------------------------------------------------


WRONG = {
    "image_size": (0, True, 256.5, 100_000),
    "num_channels": (100, 16),
    "num_heads_upsample": (-2, 0),
    "channel_mult": ("1;2", [1, None], [1, True]),
    "attention_resolutions": ("0", "32,,8"),
    "dropout": (1.0, -0.1, float("nan"), "a lot"),
    "noise_schedule": ("sqrt", 1),
    "timestep_respacing": ("ddim", "ddim50,20", "20,0", -5, 25.5, "9" * 5000),
    "classifier_scale": (float("inf"), -1),
    "compile": ("yes", 1),
    "name": ("", ["a"], "a\nb"),
    "device": (1.5,),
    "schedule_jump_params": (3, [1]),
    "use_fp16": ("true", 1, []),
    "data__batch_size": (0,),
    "data__offset": (-1,),
    "data__drop_last": (1,),
    "data__image_size": ("256",),
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG.items() for value in values]
)
def test_values_out_of_type_or_range(key, value):
    line = refused("found", **{key: value})
    assert line.startswith(f"x.yml: {key.replace('data__', 'data.eval.set.')}: ")


@pytest.mark.parametrize("field", dataclasses.fields(JumpParams), ids=lambda f: f.name)
def test_schedule_values_start_at_one(field):
    low = 0 if field.name == "start_resampling" else 1
    wrong, right = ({field.name: low - 1}, {field.name: low})
    refused(f"schedule_jump_params.{field.name}: expected", schedule_jump_params=wrong)
    assert getattr(make(schedule_jump_params=right).schedule_jump_params, field.name) == low


@pytest.mark.parametrize(("key", "must"), [("random_crop", "false"), ("mask_loader", "true")])
def test_data_keys_that_have_one_value_say_why(key, must):
    message = refused(f"Must be {must}: ", **{f"data__{key}": must == "false"})
    assert message.startswith(f"x.yml: data.eval.set.{key}: ")


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"data__image_size": 128}, ("data.eval.set.image_size", " image_size")),
        ({"image_size": 96}, ("image_size", "channel_mult", "64, 128, 256, 512")),
        ({"image_size": 100, "channel_mult": "1,2,4,8"}, ("image_size", "channel_mult", "by 8")),
        ({"channel_mult": "1,0.3"}, ("num_channels", "channel_mult", "76")),
        ({"channel_mult": "1,0"}, ("num_channels", "channel_mult", "0")),
        ({"num_head_channels": 48}, ("num_head_channels", "num_channels", "48")),
        ({"num_head_channels": -1, "num_heads": 5}, ("num_heads and", "num_channels", "5")),
        ({"num_head_channels": -1, "num_heads_upsample": 3}, ("num_heads_upsample and", "3")),
        ({"diffusion_steps": 20}, ("diffusion_steps", "noise_schedule")),
        ({"cond_y": 10, "num_classes": 10}, ("cond_y", "num_classes")),
        (
            {"inpa_inj_sched_prev": False, "inpa_inj_sched_prev_cumnoise": True},
            ("inpa_inj_sched_prev_cumnoise", "and inpa_inj_sched_prev:"),
        ),
        ({"use_fp16": True, "precision": "bfloat16"}, ("use_fp16", "precision", "bfloat16")),
        ({"predict_xstart": True, "predict_v": True}, ("predict_xstart", "predict_v")),
        ({"depth_min": 100.0, "depth_max": 100.0}, ("depth_min and depth_max",)),
        ({"full_size": True, "data__random_flip": True}, ("full_size", "set.random_flip")),
        ({"windows": True}, ("windows and full_size",)),
        ({"output_format": "same"}, ("output_format and full_size",)),
        ({"sampler": "ddnm", "use_ddim": True}, ("sampler and use_ddim",)),
        (
            {"windows": True, "full_size": True, "classifier_path": "c.pt"},
            ("windows and classifier_path",),
        ),
        (
            {"classifier_path": "c.pt", "image_size": 32, "channel_mult": "1,2"},
            ("image_size", "classifier_path"),
        ),
        (
            {"classifier_path": "c.pt", "num_classes": 1001, "class_cond": True},
            ("num_classes", "classifier_path"),
        ),
        (
            {"classifier_path": "c.pt", "classifier_width": 32, "image_size": 256}
            | {"classifier_attention_resolutions": "256"},
            ("classifier_width", "classifier_attention_resolutions"),
        ),
        ({"data__paths": {"srs": "o", "lrs": "./o/"}}, ("paths.srs", "paths.lrs")),
        ({"data__paths": {"srs": "gt"}}, ("data.eval.set.gt_path", "data.eval.set.paths.srs")),
    ],
)
def test_conflicts_name_both_keys(keys, named):
    refused(*named, **keys)


def test_what_only_looks_like_a_conflict_is_allowed():
    # The unconditional ImageNet model: labels go to the classifier alone.
    assert make(classifier_path="c.pt", class_cond=False).guided
    # A classifier that is switched off needs to fit nothing.
    assert not make(classifier_path="c.pt", classifier_scale=0, num_classes=2000).guided
    assert not make(classifier_path="").guided
    assert make(use_fp16=True, precision="float16").use_fp16
    assert make(use_kl=True, rescale_learned_sigmas=True).use_kl
    # Sides that the network does not have are passed over, as in published configurations.
    assert make(image_size=32, channel_mult="1,2").attention_sides == (32, 16, 8)
    assert make(diffusion_steps=20, noise_schedule="cosine").diffusion_steps == 20


# ---- derived values ------------------------------------------------------------------------------


def test_widths_come_from_the_size():
    for size, mult in CHANNEL_MULT_BY_SIZE.items():
        assert make(image_size=size).channel_mult_list == mult
        assert make(image_size=size, channel_mult="1,2").channel_mult_list == (1, 2)
    assert CHANNEL_MULT_BY_SIZE[256] == (1, 1, 2, 2, 4, 4)


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        ({"srs": "out/a", "gts": "out/b"}, "out"),
        ({"srs": "a", "gts": "./b"}, "."),
        ({"srs": "x/a", "gts": "y/b"}, "./log/run"),
    ],
)
def test_the_record_stands_beside_the_results(folders, expected):
    paths = {name: f"{expected}/{name}" for name in ("lrs", "gt_keep_masks")} | folders
    assert make(name="run", data__paths=paths).log_dir == expected


def test_numbers_of_texts():
    loaded = make(attention_resolutions="64, 8", classifier_attention_resolutions=[16])
    assert (loaded.attention_sides, loaded.classifier_attention_sides) == ((64, 8), (16,))
    assert make(attention_resolutions="").attention_sides == ()


@pytest.mark.parametrize("cls", [InpaintConf, TrainConf])
def test_empty_respacing_keeps_all_steps(cls):
    base = tree() if cls is InpaintConf else {"name": "a", "data_dir": "b"}
    loaded = conf_from_dict(base | {"timestep_respacing": "", "diffusion_steps": 500}, cls)
    assert loaded.timestep_respacing == "500"


def test_output_folders():
    run = {"srs": "./log/run/inpainted", "lrs": "./log/run/gt_masked"}
    run |= {"gts": "./log/run/gt", "gt_keep_masks": "./log/run/gt_keep_mask"}
    assert dataclasses.asdict(make().data.paths) == run
    # Stated without gts: the inputs are not written.
    stated = dataclasses.asdict(make(data__paths={"srs": "o"}).data.paths)
    assert stated == {**run, "srs": "o", "gts": ""}


def test_training_conf():
    loaded = conf_from_dict({"name": "shoes", "data_dir": "pictures"}, TrainConf)
    assert loaded.out_dir == "./runs/shoes"
    assert loaded.rescale_learned_sigmas
    assert loaded.timestep_respacing == "1000"
    assert loaded.ema_rates == (0.9999,)
    assert dataclasses.replace(loaded, ema_rate=[0.9, "0.99", 0.9]).ema_rates == (0.9, 0.99)
    assert conf_from_dict(conf_to_dict(loaded), TrainConf) == loaded


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 0),
        ("microbatch", 0),
        ("ema_rate", "1.0"),
        ("holdout", 1),
        ("sample_mask", "hole"),
        ("use_fp16", True),
        ("model_path", "a.pt"),
        ("data_dir", None),
    ],
)
def test_training_values(key, value):
    with pytest.raises(UserError, match=f"^t.yml: {key}"):
        conf_from_dict({"name": "a", "data_dir": "b", key: value}, TrainConf, "t.yml")


def test_mask_families_are_those_that_can_be_drawn():
    text = next(doc.text for doc in schema.describe(keys.DataConf) if doc.key == "mask_path")
    assert ", ".join(masks.FAMILIES) in text


# ---- any values ----------------------------------------------------------------------------------

names = st.sampled_from(
    [doc.key.rpartition(".")[2] for doc in schema.describe(InpaintConf)]
    + ["data", "eval", "schedule_jump_params", "paths", "ds_conf"]
)
trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(names | st.text(max_size=5) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


def check(anything, cls):
    """Either the tree loads and survives being written, or it is one line."""
    try:
        loaded = conf_from_dict(anything, cls, "x.yml")
    except UserError as error:
        assert str(error).startswith("x.yml: ")
        assert len(str(error).splitlines()) == 1
    else:
        assert conf_from_dict(conf_to_dict(loaded), cls) == loaded


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([field.name for field in dataclasses.fields(InpaintConf)]), trees)
def test_any_value_of_any_key_loads_or_is_a_user_error(name, value):
    check(tree() | {name: value}, InpaintConf)
    check(tree(data={"eval": {"s": value}}), InpaintConf)
    check(value, TrainConf)
