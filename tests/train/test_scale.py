"""How a step is computed does not change what is learned: parts, recomputed activations, compiled code, batches prepared ahead."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cdiff.runtime.errors import CdiffError
from cdiff.train.checkpoint import checkpoint_folder, read_config, save_checkpoint
from cdiff.train.compiled import compiling
from cdiff.train.config import Config
from cdiff.train.data import Data, read_data
from cdiff.train.fabric import fabric_on
from cdiff.train.feed import Feed
from cdiff.train.learner import Learner
from cdiff.train.log import read_log
from cdiff.train.mfu import Utilisation, image_flop, sheet_flops
from cdiff.train.network import ConsensusNet
from cdiff.train.presets import preset
from cdiff.train.rows import Rows, check_parts, draw_rows, parts_of
from cdiff.train.run import Run
from cdiff.train.trainer import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tiny_data: Path) -> Data:
    return read_data(tiny_data, preset("tiny"))


def one_step(config: Config, data: Data) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, gradient norm and gradients of the first step, every layer taking part (some start at zero)."""
    learner = Learner(config, fabric_on(CPU, config.training.amp))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in learner.network.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
    loss, norm = learner.step(0, draw_rows(data.train, config, 0, 32), 1e-3)
    return (
        loss,
        norm,
        {name: value.grad for name, value in learner.network.named_parameters() if value.grad is not None},
    )


def test_accumulated_parts_give_the_whole_steps_gradient(data: Data) -> None:
    config = preset("tiny").with_values({"batch": 7, "clip": 1e9})
    loss, norm, whole = one_step(config, data)
    split = one_step(config.with_values({"accumulate": 3}), data)
    assert len(whole) == len(list(ConsensusNet(config.network).parameters()))
    assert split[0] == pytest.approx(loss, rel=1e-5)
    assert split[1] == pytest.approx(norm, rel=1e-4)
    for name, value in whole.items():
        torch.testing.assert_close(split[2][name], value, rtol=1e-3, atol=1e-4 * norm)


def test_recomputed_activations_give_the_same_gradients_and_keep_less(data: Data) -> None:
    """Bit for bit, dropout included; and less is kept for the gradient than without."""
    config = preset("tiny").with_values({"dropout": 0.3})
    kept: dict[bool, int] = {}
    steps = {}
    for again in (False, True):
        seen: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, seen=seen: seen.append(x.nbytes) or x, lambda x: x):  # type: ignore[misc]
            steps[again] = one_step(config.with_values({"checkpointing": again}), data)
        kept[again] = sum(seen)
    assert steps[False][:2] == steps[True][:2]
    assert all(torch.equal(value, steps[True][2][name]) for name, value in steps[False][2].items())
    assert kept[True] < kept[False] / 2


def test_a_compiled_network_learns_the_same(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced whole by TorchDynamo (a break in the graph is an error) and run without Inductor, whose C++ takes a minute to build."""
    compiled: list[nn.Module] = []
    compile_in_place = nn.Module.compile

    def traced(self: nn.Module) -> None:
        compiled.append(self)
        compile_in_place(self, backend="eager", fullgraph=True)

    config = preset("tiny")
    plain = one_step(config, data)
    monkeypatch.setattr(nn.Module, "compile", traced)
    loss, norm, gradients = one_step(config.with_values({"compile": True}), data)
    assert [type(module) for module in compiled] == [ConsensusNet]
    assert (loss, norm) == (pytest.approx(plain[0], rel=1e-5), pytest.approx(plain[1], rel=1e-4))
    assert gradients.keys() == plain[2].keys()


def test_without_a_compiler_compile_is_refused_in_a_line(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the run goes on where it is left out."""
    compile_in_place = nn.Module.compile

    def refuses(*graph: object) -> None:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_in_place(self, backend=refuses))
    config = preset("tiny").with_values({"compile": True, "steps": 1, "val_every": 1})
    with pytest.raises(
        CdiffError, match=r"cannot compile the network \([^\n]*No working C\+\+ compiler[^\n]*compile=false"
    ) as error:
        train(config, tiny_data, tmp_path / "run", device="cpu", quiet=True)
    assert "\n" not in str(error.value)
    without = config.with_values({"compile": False})
    assert train(without, tiny_data, tmp_path / "run", device="cpu", quiet=True, resume=True).finished


def test_of_a_compilers_pages_the_line_that_says_what_is_wrong_is_told() -> None:
    said = "CppCompileError: C++ compile error\n\nCommand:\ng++ a.cpp\n\nOutput:\na.h:9:2: fatal error: No space left on device\n 9 | };"
    with (
        pytest.raises(CdiffError, match=r"\(a\.h:9:2: fatal error: No space left on device\); what then$"),
        compiling("what then"),
    ):
        raise torch._dynamo.exc.TorchDynamoException(said)
    with pytest.raises(RuntimeError, match="another"), compiling("what then"):
        raise RuntimeError("another error: is not the compiler's")


def test_a_lack_of_memory_while_compiling_is_no_lack_of_a_compiler() -> None:
    lack = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"), compiling("what then"):
        raise torch._dynamo.exc.BackendCompilerFailed(compiling, lack, None)


@pytest.mark.slow
def test_half_precision_with_scaled_losses_learns(data: Data) -> None:
    config = preset("tiny").with_values({"amp": "fp16", "accumulate": 2})
    loss, norm, gradients = one_step(config, data)
    exact = one_step(config.with_values({"amp": "off"}), data)
    assert loss == pytest.approx(exact[0], rel=0.02)
    assert norm == pytest.approx(exact[1], rel=0.1)
    assert len(gradients) == len(exact[2])


def test_a_large_gradient_is_scaled_down_to_its_norm(data: Data) -> None:
    config = preset("tiny")
    norms = {}
    for clip in (1e9, 1e-3):
        _, norms[clip], gradients = one_step(config.with_values({"clip": clip}), data)
        left = torch.stack([value.norm() for value in gradients.values()]).norm().item()
        assert left == pytest.approx(min(clip, norms[clip]), rel=1e-3)
    assert norms[1e-3] == norms[1e9] > 1e-3, "what is said is the norm before"


def test_the_average_starts_short_and_then_keeps_its_share(data: Data) -> None:
    config = preset("tiny").with_values({"ema": 0.75, "weight_decay": 0.1, "dice_weight": 0.5})
    learner = Learner(config, fabric_on(CPU))
    (group,) = learner.optimiser.param_groups
    assert (group["weight_decay"], group["betas"]) == (0.1, (0.9, 0.99))
    assert learner.diffusion.dice_weight == 0.5
    for k, keep in ((0, 0.1), (8, 0.5), (10**6, 0.75)):
        before = {name: value.clone() for name, value in learner.ema.items()}
        learner.step(k, draw_rows(data.train, learner.config, k, 32), 1e-2)
        for name, value in learner.network.state_dict().items():
            torch.testing.assert_close(learner.ema[name], keep * before[name] + (1 - keep) * value)
        averaged = learner.averaged().state_dict()
        assert all(torch.equal(averaged[name], value) for name, value in learner.ema.items())
    assert not learner.averaged().training  # it is validated without dropout


def test_a_resumed_fp16_run_goes_on_with_its_loss_scale(tmp_path: Path) -> None:
    config = preset("tiny").with_values({"amp": "fp16"})
    learner, resumed = (Learner(config, fabric_on(CPU, "fp16")) for _ in range(2))
    precision = learner.fabric.strategy.precision
    precision.load_state_dict(precision.state_dict() | {"scale": 32.0})
    network, ema = learner.weights()
    begun = resumed.weights()[0]
    assert all(torch.equal(begun[name], value) for name, value in network.items()), "one seed, one beginning"
    save_checkpoint(tmp_path, network=network, ema=ema, optimiser=learner.state(), info={"step": 1, "is_best": True})
    folder = checkpoint_folder(tmp_path, "last")
    assert folder is not None
    resumed.restore(folder)
    assert resumed.loss_scale == learner.loss_scale == 32
    for foreign in ({}, [], None):
        torch.save({"optimiser": foreign, "scaler": {}}, folder / "optimiser.pt")
        with pytest.raises(CdiffError, match=r"optimiser\.pt is from another network"):
            resumed.restore(folder)


def test_convolutions_see_channels_last(data: Data) -> None:
    """Every convolution's input with more than one channel lies channels last, so none of them converts it first."""
    learner = Learner(preset("tiny"), fabric_on(CPU))
    wrong: list[str] = []
    checked: list[str] = []

    def check(name: str, x: torch.Tensor) -> None:
        checked.append(name)
        if not x.is_contiguous(memory_format=torch.channels_last):
            wrong.append(name)

    for name, module in learner.network.named_modules():
        if isinstance(module, nn.Conv2d) and module.in_channels > 1:
            module.register_forward_pre_hook(lambda _, inputs, name=name: check(name, inputs[0]))  # type: ignore[misc]
    learner.loss(draw_rows(data.train, learner.config, 0, 32)[0].to(CPU))
    assert len(checked) > 10
    assert wrong == []


def test_shares_of_a_step_are_the_step(data: Data) -> None:
    """Three processes' parts, put together, are what one process draws."""
    config = preset("tiny").with_values({"batch": 7})
    (whole,) = draw_rows(data.train, config, 5, 32)
    parts = [part for rank in range(3) for part in draw_rows(data.train, config, 5, 32, rank, 3)]
    assert [len(part.image) for part in parts] == [2, 2, 3]
    for name in ("image", "masks", "raters", "u", "t", "level", "noise"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert parts[0].seed == whole.seed
    assert len({part.seed for part in parts}) == 3
    assert [list(part) for part in parts_of(5, 2)] == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_timesteps_are_drawn_with_the_density_that_is_asked_for(data: Data, power: float) -> None:
    """P(t <= s) = (s / T)^p, so that every t can come and, above p = 1, late ones come more often."""
    config = preset("tiny").with_values({"t_power": power, "batch": 2, "rows_per_image": 4000})
    (rows,) = draw_rows(data.train, config, 0, 2)
    T = config.network.T
    assert 1 <= int(rows.t.min()) < int(rows.t.max()) == T
    for s in (5, 10, 15, 20):
        # Four standard deviations of a share of 8,000 draws.
        assert float((rows.t <= s).float().mean()) == pytest.approx((s / T) ** power, abs=4 * 0.5 / 8000**0.5)


def test_a_step_needs_an_image_for_every_part() -> None:
    config = preset("tiny").with_values({"accumulate": 2, "framing": "tile", "crop": 16, "late_batch": 3})
    check_parts(config, 1)
    says = "a step of 3 images cannot be shared by 2 processes with accumulate=2; raise late_batch to 4 or more, or lower accumulate, or start fewer processes"
    with pytest.raises(CdiffError, match=says):
        check_parts(config, 2)
    with pytest.raises(CdiffError, match="accumulate=2; raise batch to 4"):
        check_parts(config.with_values({"batch": 3}), 2)
    alone = preset("tiny").with_values({"accumulate": 8})
    with pytest.raises(
        CdiffError, match=r"by 1 process with accumulate=8; raise batch to 8 or more, or lower accumulate$"
    ):
        check_parts(alone, 1)


def test_batches_prepared_ahead_are_the_same(tiny_data: Path, tmp_path: Path) -> None:
    """Also where the windows grow on the way, so that some were prepared in vain."""
    config = preset("tiny").with_values({"steps": 6, "framing": "tile", "crop": 16, "late": 0.5, "val_every": 6})
    runs = []
    for ahead in (0, 3):
        out = tmp_path / str(ahead)
        train(config.with_values({"prefetch": ahead}), tiny_data, out, quiet=True)
        folder = checkpoint_folder(out, "last")
        assert folder is not None
        runs.append(load_file(folder / "model.safetensors"))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_the_feed_works_ahead_and_tells_what_went_wrong() -> None:
    asked: list[tuple[int, int]] = []

    def prepare(k: int, window: int) -> list[Rows]:
        asked.append((k, window))
        if k == 4:
            raise CdiffError("the fourth")
        return []

    with Feed(prepare, 2) as feed:
        feed.take(0, 16)
        feed.take(1, 16)
        feed.take(2, 32)
        with pytest.raises(CdiffError, match="the fourth"):
            feed.take(4, 32)
    assert {(1, 16), (2, 32)} <= set(asked)
    assert len(asked) == len(set(asked)), "a step was prepared twice"


def test_a_resumed_run_may_be_computed_in_another_way(tiny_data: Path, tmp_path: Path) -> None:
    config = preset("tiny").with_values({"steps": 3, "val_every": 3})
    train(config, tiny_data, tmp_path / "run", max_steps=1, quiet=True)
    other = config.with_values({"accumulate": 4, "checkpointing": True, "deterministic": True})
    assert train(other, tiny_data, tmp_path / "run", resume=True, quiet=True).step == 3
    assert read_config(tmp_path / "run") == other


def test_model_flops_by_hand() -> None:
    """Encoder of one 3x3 convolution 1 -> 8 on 32x32. Forward and the weights' gradient count for it, the image's gradient does not:
    doubling the rows adds the denoiser alone, so 2 F(1) - F(2) is the encoder, which is 2 x (2 x 9 x 8 x 32 x 32)."""
    network = dataclasses.replace(preset("tiny").network, rrdbs=0)
    one, two = (image_flop(network, 32, rows) for rows in (1, 2))
    assert 2 * one - two == 2 * (2 * 9 * 8 * 32 * 32)


def test_utilisation_is_flops_over_time_and_peak() -> None:
    config = preset("tiny").with_values({"batch": 3})
    flop = 3 * image_flop(config.network, 32, config.training.rows_per_image)
    meter = Utilisation(config, peak=1e9, devices=2)
    assert meter.take() == {}
    meter.add(32, 0.5)
    meter.add(32, 1.5)
    assert meter.take() == {"mfu": pytest.approx(2 * flop / 2.0 / 2e9)}
    assert meter.take() == {}
    unknown = Utilisation(config, None, 1)
    unknown.add(32, 1.0)
    assert unknown.take() == {}


@pytest.mark.parametrize(
    ("name", "half", "tflops"),
    [
        ("NVIDIA H200", True, 989),
        ("NVIDIA H100 80GB HBM3", True, 989),
        ("NVIDIA H100 PCIe", True, 756),
        ("NVIDIA A100-SXM4-80GB", False, 156),
        ("NVIDIA GeForce RTX 4090", True, 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", True, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", True, None),
        ("NVIDIA A10G", True, None),
        ("NVIDIA H200 NVL", True, None),
        ("NVIDIA GeForce RTX 4090 D", True, None),
        ("Tesla V100-SXM2-16GB", False, 15.7),
        ("Tesla V100-PCIE-16GB", True, 112),
        ("Some GPU of 2031", True, None),
    ],
)
def test_peaks_are_found_by_whole_words(name: str, half: bool, tflops: float | None) -> None:
    assert sheet_flops(name, half) == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_the_log_states_the_utilisation_where_the_peak_is_known(tiny_data: Path, tmp_path: Path) -> None:
    config = preset("tiny").with_values({"steps": 2, "val_every": 2, "log_every": 1, "peak_tflops": 0.1})
    train(config, tiny_data, tmp_path / "known", quiet=True)
    shares = [float(row["mfu"]) for row in read_log(tmp_path / "known" / "log.csv")]
    assert len(shares) == 2
    assert all(0 < share < 2 for share in shares)
    train(config.with_values({"peak_tflops": 0.0}), tiny_data, tmp_path / "unknown", quiet=True)
    assert [row["mfu"] for row in read_log(tmp_path / "unknown" / "log.csv")] == ["", ""]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nand more lines"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`, 20 GiB taken\nmore"),
    ],
)
def test_a_full_gpu_is_one_line_that_says_what_to_set(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(Learner, "step", full)
    run = Run(preset("tiny"), data, fabric_on(CPU), tmp_path)
    with pytest.raises(
        CdiffError, match=r"ran out of memory at step 1 .*20 GiB.*accumulate above 1 .*checkpointing=true"
    ) as caught:
        run.step(0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("accumulate=0", "accumulate=0 must be at least 1"),
        ("prefetch=-2", "prefetch=-2 must lie in 0..64"),
        ("peak_tflops=-1", "must not be negative"),
        ("checkpointing=1", "expected true or false"),
    ],
)
def test_bad_settings_are_one_clear_line(setting: str, says: str) -> None:
    with pytest.raises(CdiffError, match=says):
        preset("tiny").with_settings([setting])
