"""The check of fast networks, and how its verdict is kept for later runs."""

import contextlib
import dataclasses

import network_cases
import pytest
import torch

from guided_diffusion.accel import checks
from guided_diffusion.accel.accelerate import accelerate
from guided_diffusion.accel.checks import Checked, Verdicts
from guided_diffusion.accel.fused_unet import samples
from guided_diffusion.unet import EncoderUNetModel

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
T = torch.tensor([500]).expand(3)
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Keep verdicts in a folder of each test's own."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept"


class Calls:
    """A function that notes the batch sizes that it is called with."""

    def __init__(self, function):
        self.function, self.sizes = function, []

    def __call__(self, x, *others):
        self.sizes.append(len(x))
        return self.function(x, *others)


def checked(fast, plain, dtype=torch.float32, verdicts=None):
    network = network_cases.unet()
    network.dtype = dtype
    return Checked(fast, plain, network, verdicts)


def test_each_batch_size_is_checked_once():
    fast, plain = Calls(lambda x, t: 2 * x), Calls(lambda x, t: 2 * x)
    run = checked(fast, plain)
    for count in (3, 3, 2, 3, 2, 1):
        run(X[:count], T[:count])
    assert fast.sizes == [3, 3, 2, 3, 2, 1]
    assert sum(plain.sizes) == 3 + 2 + 1


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)]
)
def test_what_is_rounding_and_what_is_not(dtype, most):
    x = torch.zeros(1, 3, 8, 8)
    x[0, 0, 0, 0] = -4.0
    for share, wrong in ((0.9, False), (1.1, True)):
        run = checked(lambda x, t: x + 4 * share * most, lambda x, t: x, dtype)  # noqa: B023
        with pytest.warns(UserWarning) if wrong else contextlib.nullcontext():
            run(x, T[:1])


def test_tf32_is_rounding_on_a_gpu_alone(monkeypatch):
    network = network_cases.unet()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert checks._tolerance(network, GPU) == 1e-2
    assert checks._tolerance(network, CPU) == 1e-4
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert checks._tolerance(network, GPU) == 1e-4


def test_what_the_plain_network_cannot_compute_is_no_fault():
    """Damaged weights make NaN in both, and the run tells of them in its own way."""
    plain = Calls(lambda x, t: x * torch.nan)
    run = checked(lambda x, t: x * torch.nan, plain)
    for _ in range(3):
        assert run(X, T).isnan().all()
    checked(lambda x, t: 0 * x, lambda x, t: 0 * x)(X, T)
    assert plain.sizes == [1, 1, 1]  # of the first call alone


def test_an_output_that_is_not_finite_is_compared_whenever_it_comes():
    factor = 1.0
    run = checked(lambda x, t: factor * x, lambda x, t: x)
    run(X, T)
    factor = torch.inf
    with pytest.warns(UserWarning, match="is wrong by"):
        assert torch.equal(run(X, T), X)


def test_an_error_of_both_networks_is_raised():
    def wrong(*_):
        raise ValueError("the network's own")

    with pytest.raises(ValueError, match="the network's own"):
        checked(wrong, wrong)(X, T)


@pytest.mark.parametrize("fails", ["fast", "plain"])
def test_full_memory_is_raised_and_the_fast_network_tried_again(fails):
    has_room = False

    def network(name):
        def function(x, t):
            if name == fails and not has_room:
                raise torch.cuda.OutOfMemoryError
            return x

        return Calls(function)

    fast = network("fast")
    run = checked(fast, network("plain"))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run(X, T)
    has_room = True
    run(X, T)
    assert fast.sizes == [3, 3]


def test_a_failure_later_on_goes_on_with_the_plain_network():
    works = True

    def fast(x, t):
        if not works:
            raise RuntimeError("no more")
        return x

    run = checked(fast, lambda x, t: x)
    run(X, T)
    works = False
    with pytest.warns(UserWarning, match="does not work: no more; going on"):
        assert torch.equal(run(X, T), X)


def verdicts(kernels="kernels", network=None, samples=lambda: [(X, X)]):
    return Verdicts(kernels, network or network_cases.unet(), samples)


def plain_calls(verdicts, *inputs):
    """Return how many images a new run compares."""
    plain = Calls(lambda *inputs: inputs[0])
    checked(lambda *inputs: inputs[0], plain, verdicts=verdicts)(*(inputs or (X, T)))
    return sum(plain.sizes)


def test_a_later_run_does_not_compare_what_has_passed():
    assert [plain_calls(verdicts()) for _ in range(2)] == [3, 0]
    assert plain_calls(None) == 3  # without verdicts


def in_bfloat16():
    network = network_cases.unet()
    network.convert_trunk(torch.bfloat16)
    return network


@pytest.mark.parametrize(
    ("change", "inputs"),
    [
        (lambda: {"kernels": "others"}, (X, T)),
        (lambda: {"network": network_cases.unet(use_new_attention_order=True)}, (X, T)),
        (lambda: {"network": in_bfloat16()}, (X, T)),
        (dict, (X[:2], T[:2])),
        (dict, (X[:, :, :8], T)),
        (dict, (X, T.contiguous())),  # not known to be one: each image is embedded
        (dict, (X, T, torch.tensor([1, 2, 3]))),
    ],
    ids=["kernels", "architecture", "type", "batch", "size", "times", "classes"],
)
def test_what_the_verdict_depends_on(change, inputs):
    assert plain_calls(verdicts()) == 3
    assert plain_calls(verdicts(**change()), *inputs) == len(inputs[0])


def test_a_verdict_is_that_of_this_code(monkeypatch, tmp_path):
    assert plain_calls(verdicts()) == 3
    (tmp_path / "code.py").write_text("changed")
    monkeypatch.setattr(checks, "_SOURCES", (tmp_path / "code.py",))
    assert plain_calls(verdicts()) == 3


def test_a_fault_is_not_kept_as_passed():
    with pytest.warns(UserWarning, match="is wrong by"):
        checked(lambda x, t: 2 * x, lambda x, t: x, verdicts=verdicts())(X, T)
    assert plain_calls(verdicts()) == 3
    nothing = verdicts("damaged weights")
    checked(lambda x, t: x * torch.nan, lambda x, t: x * torch.nan, verdicts=nothing)(X, T)
    assert plain_calls(nothing) == 3


def test_a_wrong_sample_has_the_whole_network_compared_again():
    assert plain_calls(verdicts()) == 3
    wrong = verdicts(samples=lambda: [(X, X), (1.001 * X, X)])
    assert plain_calls(wrong) == 3
    with pytest.warns(UserWarning, match="is wrong by"):
        checked(lambda x, t: 1.001 * x, lambda x, t: x, verdicts=wrong)(X, T)


def test_where_nothing_can_be_kept_every_run_compares(folder):
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)  # others could write there
    assert [plain_calls(verdicts()) for _ in range(2)] == [3, 3]
    assert list(folder.iterdir()) == []


def networks():
    small = dataclasses.replace(network_cases.SMALL, num_head_channels=32)
    return {
        "network": network_cases.unet(),
        "without blocks": network_cases.unet(num_res_blocks=0, channel_mult=(1, 2)),
        "plain norm": network_cases.unet(use_scale_shift_norm=False, resblock_updown=False),
        "classifier": network_cases.randomised(EncoderUNetModel(small, 7, "attention")),
    }


@pytest.mark.parametrize("name", networks())
def test_samples_are_right_and_see_faults(name, kernels, monkeypatch):
    network, convolve = networks()[name], kernels.convolve

    def rounded(maps, weight, *others, **options):
        output = convolve(maps, weight, *others, **options)
        return output.bfloat16().float() if (weight.values == 1) == is_1x1 else output

    with torch.inference_mode():
        for output, expected in samples(kernels, network):
            assert network_cases.relative(output, expected) < 1e-5
        monkeypatch.setattr(kernels, "convolve", rounded)
        for is_1x1 in (False, True):  # noqa: B007 - rounded reads it
            errors = [network_cases.relative(*pair) for pair in samples(kernels, network)]
            assert max(errors) > 1e-4


@pytest.mark.parametrize(
    ("kind", "gradient"), [("network", None), ("classifier", lambda c, x, t: c(x, t))]
)
@pytest.mark.usefixtures("kernels")
def test_a_run_compares_once_a_machine_unless_it_is_to_do_so_always(kind, gradient):
    network = networks()[kind]

    def run(check):
        fast = accelerate(network, CPU, "auto", check, gradient)
        plain = fast._plain = Calls(fast._plain)
        with torch.inference_mode():
            fast(X, T)
        return sum(plain.sizes)

    assert [run(check) for check in ("once", "once", "always", "once")] == [3, 0, 3, 0]
