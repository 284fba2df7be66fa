"""Networks that diffusers saved: the same output, the same reverse step, the same walk."""

import numpy as np
import pytest
import torch
from diffusers_cases import STEPS, edit, flattened, save, scheduler, tiny_unet
from network_cases import chain_of

from guided_diffusion.errors import UserError
from guided_diffusion.models.diffusers import check_folder, load_network, read_folder

CPU = torch.device("cpu")


def loaded(folder):
    return load_network(read_folder(str(folder)), CPU)


def inputs(channels=3):
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(3))


def assert_same_output(folder, unet, y=None):
    x, t = inputs(unet.config.in_channels), torch.tensor([3, 17])
    with torch.no_grad():
        torch.testing.assert_close(loaded(folder)(x, t, y), unet(x, t, y).sample)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A pipeline that no test changes."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, *save(folder)


@pytest.mark.parametrize("form", ["pipeline", "flat", "bare", "unet"])
def test_the_output_is_that_of_diffusers(tmp_path, form):
    unet, place = tiny_unet(), tmp_path
    if form == "bare":
        unet.save_pretrained(tmp_path)
    else:
        save(tmp_path, unet, safe_serialization=form != "flat")
    if form == "flat":
        flattened(tmp_path)
    if form == "unet":
        place = tmp_path / "unet"
    assert_same_output(place, unet)
    folder = read_folder(str(place))
    assert folder.keys.get("diffusion_steps") == (None if form == "bare" else STEPS)
    assert folder.fixed_small


@pytest.mark.parametrize(
    "changes",
    [
        {"num_class_embeds": 5, "in_channels": 1, "out_channels": 1},
        {"attention_head_dim": None, "flip_sin_to_cos": False, "freq_shift": 1,
         "downsample_padding": 0, "center_input_sample": True},
        {"down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"), "add_attention": False,
         "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"), "sample_size": [8, 8],
         "resnet_time_scale_shift": "scale_shift"},
    ],
    ids=str,
)  # fmt: skip
def test_odd_networks_compute_what_diffusers_does(tmp_path, changes):
    unet = tiny_unet(**changes)
    save(tmp_path, unet)
    assert_same_output(
        tmp_path, unet, torch.tensor([1, 4]) if "num_class_embeds" in changes else None
    )


def test_names_of_the_first_versions_are_read(tmp_path):
    from safetensors.torch import load_file, save_file

    unet, _ = save(tmp_path)
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in load_file(path).items():
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.")
        state[name] = tensor
    assert any(".proj_attn." in name for name in state)
    save_file(state, path)
    assert_same_output(tmp_path, unet)


def test_less_precision_gives_nearly_the_same(plain):
    folder, unet, _ = plain
    network = loaded(folder)
    network.convert_trunk(torch.bfloat16)
    x, t = inputs(), torch.tensor([3, 17])
    with torch.no_grad():
        output, expected = network(x, t), unet(x, t).sample
    assert output.dtype == torch.float32
    assert 0 < (output - expected).abs().max() < 0.1


def test_averages_beside_the_network_are_preferred(tmp_path, recwarn):
    save(tmp_path)
    other = tiny_unet()
    with torch.no_grad():
        other.conv_out.bias.add_(1)
    other.save_pretrained(tmp_path / "unet_ema")
    edit(tmp_path / "unet_ema" / "config.json", decay=0.999, optimization_step=7)
    assert torch.equal(loaded(tmp_path).unet.conv_out.bias, other.conv_out.bias)
    assert not recwarn


STEP_CASES = [
    {"prediction_type": "epsilon", "variance_type": "fixed_small", "beta_schedule": "sigmoid"},
    {"prediction_type": "epsilon", "variance_type": "learned_range", "clip_sample_range": 0.5},
    {"prediction_type": "sample", "variance_type": "fixed_large", "clip_sample": False},
    {"prediction_type": "sample", "variance_type": "learned_range", "rescale_betas_zero_snr": True},
    {"prediction_type": "v_prediction", "variance_type": "fixed_small_log"},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    {"beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_large"},
    {"trained_betas": np.linspace(0.001, 0.2, STEPS).tolist()},
    {"num_train_timesteps": 1000, "beta_end": 0.02},
]


@pytest.mark.parametrize("case", STEP_CASES, ids=str)
def test_the_reverse_step_is_that_of_diffusers(tmp_path, monkeypatch, case):
    learned = case.get("variance_type") == "learned_range"
    noise = scheduler(**case)
    save(tmp_path, tiny_unet(out_channels=6 if learned else 3), noise)
    diffusion = chain_of(tmp_path)
    generator = torch.Generator().manual_seed(1)
    near = 1e-5
    steps = range(0, diffusion.num_timesteps, max(1, diffusion.num_timesteps // 50))
    for t in (*steps, diffusion.num_timesteps - 1):
        x, z = torch.randn(2, 2, 3, 4, 4, generator=generator)
        output = 0.5 * torch.randn(2, 6 if learned else 3, 4, 4, generator=generator)
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, z=z, **__: z
        )
        expected = noise.step(output, t, x)
        found, x_start = diffusion.p_sample(output.clone(), x.clone(), t, z)
        torch.testing.assert_close(found, expected.prev_sample, rtol=near, atol=near)
        scale = expected.pred_original_sample.abs().max().item()
        assert (x_start - expected.pred_original_sample).abs().max() < near * max(1, scale)


def check(folder):
    return check_folder(read_folder(str(folder)))


def assert_refused(words, read, folder):
    with pytest.raises(UserError) as caught:
        read(folder)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 600
    assert [word for word in words if word not in line] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "UNet2DConditionModel"}, ["_class_name", "UNet2DModel", "Condition"]),
        ({"_class_name": ...}, ["_class_name", "null"]),
        ({"in_channels": 4}, ["in_channels: expected 3", "1 (gray)", "docs/python.md", "found 4"]),
        ({"out_channels": 1}, ["out_channels: expected 3 or 6, found 1"]),
        ({"sample_size": [8, 16]}, ["sample_size", "[8, 16]"]),
        ({"sample_size": "8"}, ["sample_size", '"8"']),
        ({"block_out_channels": None}, ["block_out_channels", "null"]),
        ({"time_embedding_type": "fourier"}, ["time_embedding_type", "fourier"]),
        ({"class_embed_type": "identity"}, ["class_embed_type", "identity"]),
        # diffusers finds these.
        ({"block_out_channels": [8]}, ["diffusers", "block_out_channels"]),
        ({"down_block_types": ["DownBlock2D", "Wild"]}, ["diffusers", "Wild"]),
        ({"norm_num_groups": 3}, ["diffusers", "num_groups"]),
        # The weights are of another network.
        ({"block_out_channels": [8, 24]}, ["expected (24", "found (16"]),
        ({"layers_per_block": 2}, ["no such tensor"]),
    ],
    ids=str,
)
def test_a_network_that_cannot_be_is_refused(tmp_path, changes, words):
    save(tmp_path)
    edit(tmp_path / "unet" / "config.json", **changes)
    assert_refused([str(tmp_path), *words], loaded, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "ScoreSdeVeScheduler"}, ["_class_name", "ScoreSdeVe"]),
        ({"_class_name": "no class"}, ["_class_name", "no class"]),
        ({"prediction_type": "flow"}, ["prediction_type", "flow"]),
        ({"variance_type": "learned"}, ["variance_type", "learned"]),
        ({"variance_type": "learned_range"}, ["variance_type", "out_channels", "fixed_small"]),
        ({"beta_schedule": "wild"}, ["diffusers", "wild"]),
        ({"beta_end": 2}, ["beta_end", "at most 1", "2"]),
        ({"beta_start": 0}, ["beta_start", "above 0", "0"]),
        ({"beta_start": float("nan")}, ["beta_start", "NaN"]),
        ({"trained_betas": [0.1, 0.2]}, ["trained_betas", "20 betas", "[0.1, 0.2]"]),
        ({"num_train_timesteps": 0}, ["0 betas"]),
        ({"thresholding": True}, ["thresholding", "true"]),
        ({"rescale_betas_zero_snr": True}, ["prediction_type", "epsilon"]),
    ],
    ids=str,
)
def test_a_chain_that_cannot_be_is_refused(tmp_path, changes, words):
    save(tmp_path)
    edit(tmp_path / "scheduler" / "scheduler_config.json", **changes)
    assert_refused(["scheduler_config.json", *words], check, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"predict_epsilon": False, "prediction_type": ..., "clip_sample_range": ...},
        {"_class_name": "DDIMScheduler", "variance_type": ..., "set_alpha_to_one": False},
        {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "clip_sample": ...},
        {"tensor_format": "pt", "timestep_values": None, "_diffusers_version": "0.1.1"},
    ],
    ids=str,
)
def test_chains_of_other_versions_and_schedulers_are_read(tmp_path, changes):
    _, noise = save(tmp_path)
    edit(tmp_path / "scheduler" / "scheduler_config.json", **changes)
    folder = read_folder(str(tmp_path))
    np.testing.assert_allclose(folder.betas, noise.betas, rtol=1e-6)
    assert folder.keys["predict_xstart"] == ("predict_epsilon" in changes)
    assert folder.fixed_small
    assert folder.keys["clip_denoised"]


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (remove("unet/config.json"), ["without a network"]),
        (remove(WEIGHTS), ["without its weights"]),
        (write("unet/config.json", "{"), ["config.json", "JSON"]),
        (write("unet/config.json", "[1]"), ["config.json", "keys and values"]),
        (write("scheduler/scheduler_config.json", ""), ["scheduler_config.json", "JSON"]),
        (write("model_index.json", '{"vae": ["diffusers", "AutoencoderKL"]}'), ["vae"]),
        (write("model_index.json", '{"unet": ["diffusers", "UNet1DModel"]}'), ["UNet1DModel"]),
        (write(WEIGHTS, "nothing"), ["safetensors", "damaged"]),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(tmp_path, spoil, words):
    save(tmp_path)
    spoil(tmp_path)
    assert_refused(words, check, tmp_path)


def test_fingerprints_follow_weights_and_configuration(tmp_path):
    save(tmp_path)
    first = check(tmp_path)
    assert check(tmp_path) == first
    edit(tmp_path / "scheduler" / "scheduler_config.json", prediction_type="sample")
    second = check(tmp_path)
    other = tiny_unet()
    with torch.no_grad():
        other.conv_out.bias.add_(1)
    other.save_pretrained(tmp_path / "unet")
    assert len({first, second, check(tmp_path)}) == 3


def test_without_diffusers_one_line_says_what_to_install(plain, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    words = ["needs diffusers: pip install -r requirements-diffusers.txt"]
    assert_refused(words, loaded, plain[0])
