"""Networks of denoising-diffusion-pytorch: the same output, reverse step and keys."""

import pytest
import torch
from lucidrains_cases import STEPS, lucidrains, tiny, trainer_file
from network_cases import chain_of, write_foreign
from run_cases import assert_same, results

from guided_diffusion.config.keys import InpaintConf
from guided_diffusion.config.reading import load_conf
from guided_diffusion.errors import UserError
from guided_diffusion.models import lucidrains as ours
from guided_diffusion.models.follow import is_lucidrains

CPU = torch.device("cpu")


def saved(path, content):
    torch.save(content, path)
    return str(path)


def loaded(path):
    checkpoint = ours.read_checkpoint(str(path))
    ours.check_lucidrains(checkpoint)
    return ours.load_lucidrains(checkpoint, 4, CPU)


def inputs(channels=3):
    return torch.randn(2, channels, 8, 8), torch.tensor([3, STEPS - 1])


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "pred_noise", "beta_schedule": "cosine"},
        {"objective": "pred_x0", "beta_schedule": "linear"},
        {"objective": "pred_v", "beta_schedule": "sigmoid", "timesteps": 1000},
        {"objective": "pred_v", "schedule_fn_kwargs": {"tau": 0.8}},
    ],
    ids=str,
)
def test_the_reverse_step_is_that_of_the_package(tmp_path, monkeypatch, options):
    theirs = tiny(**options)
    path = saved(tmp_path / "model.pt", theirs.state_dict())
    network, diffusion = loaded(path), chain_of(path)
    steps = range(0, diffusion.num_timesteps, max(1, diffusion.num_timesteps // 50))
    for t in (*steps, diffusion.num_timesteps - 1):
        x, z = torch.randn(2, 2, 3, 8, 8)
        monkeypatch.setattr(torch, "randn_like", lambda *_, z=z, **__: z)
        expected, x_start = theirs.p_sample(x, t)
        with torch.inference_mode():
            found, pred_xstart = diffusion.p_sample(network(x, torch.full((2,), t)), x, t, z)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        # At the noisy end x_0 is the difference of large numbers.
        torch.testing.assert_close(pred_xstart, x_start, rtol=3e-5, atol=3e-5)


def test_a_learned_variance_is_that_of_the_package(tmp_path):
    kind = lucidrains.LearnedGaussianDiffusion
    theirs = tiny(kind, {"learned_variance": True}, objective="pred_noise", beta_schedule="cosine")
    path = saved(tmp_path / "model.pt", theirs.state_dict())
    network, diffusion = loaded(path), chain_of(path)
    for t in range(1, STEPS):
        x, z = torch.randn(2, 2, 3, 8, 8)
        times = torch.full((2,), t)
        with torch.inference_mode():
            mean, _, log_variance, _ = theirs.p_mean_variance(x=x, t=times, clip_denoised=True)
            found, _ = diffusion.p_sample(network(x, times), x, t, z)
        expected = mean + (0.5 * log_variance).exp() * z
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["trainer", "diffusion", "unet", "safetensors"])
def test_every_file_of_the_package_is_read(tmp_path, form):
    diffusion = tiny()
    content, averaged = trainer_file(diffusion)
    network = averaged if form == "trainer" else diffusion.model
    path = str(tmp_path / "model.pt")
    if form == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(diffusion.model.state_dict(), path)
    else:
        states = {"trainer": content, "diffusion": diffusion.state_dict()}
        torch.save(states.get(form, diffusion.model.state_dict()), path)
    assert is_lucidrains(path)
    checkpoint = ours.read_checkpoint(path)
    assert (checkpoint.betas is None) == (form in ("unet", "safetensors"))
    x, t = inputs()
    with torch.inference_mode():
        torch.testing.assert_close(loaded(path)(x, t), network(x, t))


@pytest.mark.parametrize(
    "options",
    [
        {"channels": 1, "self_condition": True},
        {"dim_mults": (1, 2, 3), "init_dim": 24, "attn_heads": (2, 3, 4), "attn_dim_head": 8},
        {"full_attn": (True, False), "attn_dim_head": (8, 16), "learned_variance": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*takes its last prediction")
def test_shapes_tell_the_network(tmp_path, options):
    torch.manual_seed(0)
    unet = lucidrains.Unet(**{"dim": 16, "dim_mults": (1, 2), **options}).eval()
    path = saved(tmp_path / "model.pt", unet.state_dict())
    x, t = inputs(options.get("channels", 3))
    with torch.inference_mode():
        torch.testing.assert_close(loaded(path)(x, t), unet(x, t))


@pytest.mark.parametrize("version", ["1.9", "1.8"])
def test_earlier_networks_run_with_the_installed_package(tmp_path, version):
    """Before 2.0 blocks had GroupNorm, and before 1.9 attention had no memory tokens."""
    unet = tiny().model
    for module in list(unet.modules()):
        if hasattr(module, "proj"):
            module.norm = torch.nn.GroupNorm(8, module.proj.out_channels)
            torch.nn.init.normal_(module.norm.weight)
        if hasattr(module, "mem_kv") and version == "1.8":
            is_linear = isinstance(module.to_out, torch.nn.Sequential)
            tokens = module.mem_kv[..., :0] if is_linear else module.mem_kv[:, :, :0]
            del module.mem_kv
            module.mem_kv = tokens.detach()
    path = saved(tmp_path / "model.pt", unet.state_dict())
    x, t = inputs()
    with torch.inference_mode():
        torch.testing.assert_close(loaded(path)(x, t), unet(x, t))


@pytest.mark.parametrize(
    ("objective", "is_clipped"), [("pred_noise", True), ("pred_x0", False), ("pred_v", True)]
)
def test_loss_weights_tell_the_objective(tmp_path, objective, is_clipped):
    state = tiny(objective=objective, min_snr_loss_weight=is_clipped).state_dict()
    keys = ours.read_checkpoint(saved(tmp_path / "model.pt", state)).keys
    found = (keys["predict_xstart"], keys["predict_v"])
    assert found == (objective == "pred_x0", objective == "pred_v")
    assert keys["diffusion_steps"] == STEPS


def write_theirs(folder, state, **changes):
    options = write_foreign(folder, **{"image_size": 8, **changes})
    torch.save(state, folder / "model.pt")
    return options


def test_a_run_goes_through_and_its_record_repeats_it(here, tmp_path):
    content, _ = trainer_file(tiny())
    options = write_theirs(tmp_path, content)
    outcome = here(*options)
    assert outcome.status == 0, outcome.err
    assert "averaged weights" in outcome.err
    first = results("log/run")
    outcome = here("--conf_path", "log/run/run.yml", "--out", "again")
    assert outcome.status == 0, outcome.err
    assert_same(first, results("again"))
    conf = load_conf("log/run/run.yml")
    assert (conf.predict_v, conf.diffusion_steps, conf.learn_sigma) == (True, STEPS, False)


@pytest.mark.parametrize(
    ("taken", "changes", "line"),
    [
        ("", {"image_size": None}, "^c.yml: image_size: is missing, .*model.pt does not tell it"),
        ("", {"image_size": 9}, "^c.yml: image_size: expected a side divisible by 2"),
        ("", {"predict_v": False}, "predict_v: contradicts model.pt.*expected true, found false"),
        ("loss_weight", {}, "^c.yml: predict_v: is missing, .*pred_v"),
        ("betas", {"predict_v": True}, "^c.yml: diffusion_steps: is missing, .*timesteps"),
        ("betas", {"predict_v": True, "diffusion_steps": 30}, "^c.yml: noise_schedule: is missing"),
        ("mem_kv", {}, "^c.yml: num_heads: is missing, .*attention"),
    ],
    ids=str,
)
def test_what_the_file_does_not_tell_is_asked_by_key(here, tmp_path, taken, changes, line):
    state = tiny().state_dict()
    state = {name: value for name, value in state.items() if not taken or taken not in name}
    write_theirs(tmp_path, state, **changes)
    with pytest.raises(UserError, match=line):
        load_conf("c.yml")


def test_stated_keys_take_the_place_of_what_the_file_does_not_tell(here, tmp_path):
    stated = {"diffusion_steps": 300, "noise_schedule": "cosine", "predict_xstart": True}
    write_theirs(tmp_path, tiny().model.state_dict(), **stated)
    conf = load_conf("c.yml", InpaintConf)
    assert {key: getattr(conf, key) for key in stated} == stated


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"channels": 4}, "channels: expected 3 .* or 1 .*docs/python.md.*, found 4 into"),
        ({"learned_sinusoidal_cond": True}, "continuous-time"),
    ],
)
def test_networks_that_cannot_run_are_refused(tmp_path, changed, line):
    unet = lucidrains.Unet(**{"dim": 16, "dim_mults": (1, 2), **changed})
    path = saved(tmp_path / "model.pt", unet.state_dict())
    with pytest.raises(UserError, match=line):
        ours.read_checkpoint(path)


def test_a_network_of_another_version_names_the_version_to_install(tmp_path):
    content, _ = trainer_file(tiny())
    for branch in ("model", "ema"):
        content[branch] = {
            name.replace(".2.to_qkv", ".2.fn.fn.to_qkv"): value
            for name, value in content[branch].items()
        }
    content["version"] = "1.5.0"
    path = saved(tmp_path / "model.pt", content)
    with pytest.raises(UserError, match=r"pip install denoising-diffusion-pytorch==1\.5\.0"):
        ours.check_lucidrains(ours.read_checkpoint(path))


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    path = saved(tmp_path / "model.pt", tiny().state_dict())
    monkeypatch.setitem(__import__("sys").modules, "denoising_diffusion_pytorch", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-lucidrains\.txt"):
        ours.check_lucidrains(ours.read_checkpoint(path))
