"""test.py with folders of diffusers: keys follow the folder, and everything else works alike."""

import re

import pytest
from diffusers_cases import edit, save, scheduler, tiny_unet
from network_cases import write_foreign
from run_cases import assert_same, load_yaml, results

from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.config.reading import load_conf
from guided_diffusion.config.schema import conf_to_dict
from guided_diffusion.errors import UserError


def write_folder(folder, unet=None, noise=None, **changes):
    options = write_foreign(folder, **{"model_path": "unet8", **changes})
    (folder / "model.pt").unlink()
    save(folder / "unet8", unet, noise)
    return options


def test_keys_follow_the_folder(here, tmp_path):
    unet = tiny_unet(in_channels=1, out_channels=2, num_class_embeds=7)
    noise = scheduler(prediction_type="v_prediction", variance_type="learned_range")
    write_folder(tmp_path, unet, noise)
    conf = load_conf("c.yml")
    assert (conf.image_size, conf.diffusion_steps, conf.num_classes) == (8, 20, 7)
    assert (conf.in_channels, conf.class_cond, conf.learn_sigma) == (1, True, True)
    assert (conf.predict_v, conf.predict_xstart) == (True, False)
    with pytest.raises(UserError, match=r"in_channels: contradicts unet8.*expected 1, found 3"):
        load_conf("c.yml", InpaintConf, ["in_channels=3"])


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"image_size": 16}, "expected 8, found 16"),
        ({"learn_sigma": True}, "expected false, found true"),
        ({"diffusion_steps": 1000}, "expected 20, found 1000"),
        ({"clip_denoised": False}, "expected true, found false"),
        ({"rescale_timesteps": True}, "expected false, found true"),
    ],
    ids=str,
)
def test_keys_that_contradict_the_folder_are_refused_with_both_values(
    here, tmp_path, stated, expected
):
    write_folder(tmp_path, **stated)
    with pytest.raises(UserError) as caught:
        load_conf("c.yml")
    line = str(caught.value)
    assert line.endswith(expected)
    assert f"{next(iter(stated))}: contradicts unet8" in line


def test_keys_that_agree_with_the_folder_may_be_stated(here, tmp_path):
    write_folder(tmp_path, image_size=8, learn_sigma=False, diffusion_steps=20, clip_denoised=True)
    assert load_conf("c.yml").image_size == 8


def test_keys_of_guided_diffusions_network_have_no_effect_and_a_warning_says_so(here, tmp_path):
    write_folder(tmp_path, num_channels=256, channel_mult=[1, 1], noise_schedule="cosine")
    with pytest.warns(UserWarning, match="^num_channels, channel_mult, noise_schedule: no effect"):
        conf = load_conf("c.yml")
    assert not {"num_channels", "channel_mult", "noise_schedule"} & conf_to_dict(conf).keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"use_ddim": True, "inpa_inj_sched_prev_cumnoise": True, "samples_per_image": 2},
        {"sampler": "ddnm", "full_size": True, "windows": True, "precision": "bfloat16"},
    ],
    ids=str,
)
def test_a_run_goes_through_and_its_record_repeats_it(here, tmp_path, changes):
    options = write_folder(tmp_path, **changes)
    outcome = here(*options)
    assert (outcome.status, outcome.err.count("warning")) == (0, 0), outcome
    first = results("log/run")
    outcome = here("--conf_path", "log/run/run.yml", "--resume")
    assert outcome.status == 0, outcome.err
    outcome = here("--conf_path", "log/run/run.yml", "--out", "again")
    assert outcome.status == 0, outcome.err
    assert_same(first, results("again"))
    assert "num_channels" not in load_yaml("log/run/run.yml")


def test_resuming_with_another_folder_is_refused(here, tmp_path):
    options = write_folder(tmp_path)
    here(*options)
    edit(tmp_path / "unet8" / "scheduler" / "scheduler_config.json", prediction_type="sample")
    outcome = here(*options, "--resume")
    assert outcome.status == 2
    assert "model_path" in outcome.err


def test_a_bare_network_takes_its_chain_from_the_yaml(here, tmp_path):
    options = write_folder(tmp_path, diffusion_steps=40, noise_schedule="cosine")
    tiny_unet().save_pretrained(tmp_path / "unet8")
    for part in ("unet", "scheduler", "model_index.json"):
        path = tmp_path / "unet8" / part
        path.rename(tmp_path / part)
    outcome = here(*options)
    assert outcome.status == 0, outcome.err
    [line] = [line for line in outcome.lines if "warning" in line]
    assert "has no scheduler_config.json" in line
    assert load_yaml("log/run/run.yml")["noise_schedule"] == "cosine"


def test_a_side_that_the_folder_leaves_open_is_checked(here, tmp_path):
    write_folder(tmp_path, tiny_unet(sample_size=None), image_size=9)
    with pytest.raises(UserError, match="divisible by 2"):
        load_conf("c.yml")


@pytest.mark.parametrize("steps", [20, 300])
def test_a_short_chain_is_walked_whole_where_nothing_is_stated(here, tmp_path, steps):
    options = {"timestep_respacing": None, "schedule_jump_params": {"jump_length": 3}}
    write_folder(tmp_path, noise=scheduler(num_train_timesteps=steps, beta_end=0.02), **options)
    conf = load_conf("c.yml")
    expected = min(steps, 250)
    assert (conf.timestep_respacing, conf.schedule_jump_params.t_T) == (str(expected), expected)
    assert conf.schedule_jump_params.jump_length == 3
    conf = load_conf("c.yml", InpaintConf, ["timestep_respacing=7"])
    assert (conf.timestep_respacing, conf.schedule_jump_params.t_T) == ("7", 250)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one folder, whose files come as they are asked for."""
    import fnmatch
    import shutil

    import huggingface_hub

    source, cache, calls = tmp_path / "source", tmp_path / "cache", []
    save(source)

    def snapshot_download(name, *, revision=None, allow_patterns=("*",), local_files_only=False):
        calls.append((name, revision, local_files_only))
        if name != "owner/name":
            raise OSError("We couldn't connect to 'https://huggingface.co'\nto load the files")
        if local_files_only:
            if not cache.exists():
                raise FileNotFoundError("not in the cache")
            return str(cache)
        for path in source.rglob("*"):
            place = path.relative_to(source)
            if path.is_file() and any(fnmatch.fnmatch(str(place), p) for p in allow_patterns):
                (cache / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / place)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_name_of_the_hub_is_fetched_once(here, tmp_path, hub):
    options = write_folder(tmp_path, model_path="hf://owner/name")
    assert here(*options).status == 0
    online = [call for call in hub if not call[2]]
    assert len(online) == 2  # configuration, then weights
    assert here(*options).status == 0
    assert [call for call in hub if not call[2]] == online


def test_averaged_weights_of_the_hub_are_fetched_from_their_folder(here, tmp_path, hub):
    (tmp_path / "source" / "unet").rename(tmp_path / "source" / "unet_ema")
    options = write_folder(tmp_path, model_path="hf://owner/name")
    assert here(*options).status == 0


def test_reading_a_configuration_fetches_nothing(here, tmp_path, hub):
    write_folder(tmp_path, model_path="hf://owner/name")
    assert load_conf("c.yml").model_path == "hf://owner/name"
    with pytest.raises(UserError, match="seed"):
        load_conf("c.yml", InpaintConf, ["seed=-1"])
    assert hub == [("owner/name", None, True)] * 2


def test_without_network_one_line_says_how_to_fetch(here, tmp_path, hub):
    options = write_folder(tmp_path, model_path="hf://google/ddpm-cat-256")
    outcome = here(*options)
    assert outcome.status == 2
    assert "hf download google/ddpm-cat-256 --local-dir ddpm-cat-256" in outcome.err
    assert outcome.err.count("\n") == 1
    assert hub == [("google/ddpm-cat-256", None, local) for local in (True, True, False)]


@pytest.mark.parametrize("name", ["hf://owner", "hf://a/b/c", "hf://../..", "hf://a/b@x/../y"])
def test_names_that_are_none_are_refused(here, tmp_path, hub, name):
    write_folder(tmp_path, model_path=name)
    with pytest.raises(UserError, match=f"^{re.escape(name)}: expected hf://owner/name$"):
        load_conf("c.yml")


def test_without_the_hubs_library_one_line_says_what_to_install(here, tmp_path, monkeypatch):
    write_folder(tmp_path, model_path="hf://owner/name")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"requirements-diffusers.txt"):
        load_conf("c.yml")
