"""The benchmarks on a card: nothing is absent, and the device's clock is the device's."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import harness
import pytest
import torch
from sides import kernels, loaders, peers

from infobatch_fast.data.synthetic import make_synthetic
from infobatch_fast.infobatch import InfoBatch
from infobatch_fast.report.lines import Line, read_lines

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
BENCH = Path(harness.__file__).parent


def test_the_devices_clock_leaves_the_launches_out():
    tiny = torch.zeros(1, device=CUDA)

    def call() -> None:
        for _ in range(20):
            tiny.add_(1)

    took = min(harness.on_device(call, CUDA) for _ in range(10))
    sleep = partial(torch.cuda._sleep, 100_000_000)
    assert 0 < took < 1e-3
    assert harness.wall(sleep, CUDA) == pytest.approx(harness.on_device(sleep, CUDA), rel=0.2)


@pytest.mark.parametrize("name", peers.loader_sides(2))
def test_every_loader_gives_what_ours_gives(name):
    plan = InfoBatch(300, 1, delta=0.0, seed=2, device=CUDA).sample(0)
    of = loaders.Pass(make_synthetic(300, 10, seed=1), plan, 64, 2, 3)
    loaders.loader_side(peers.loader_sides(2)[name], of).call()


@pytest.mark.parametrize("kernel", kernels.EPOCH)
def test_kernels_of_an_epoch_do_what_they_must(kernel):
    build = partial(kernels.epoch_case, kernel, 50_000, CUDA, 0)
    for make in kernels.kernel_sides(build, CUDA, compiled=False).values():
        make().call()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["overhead", "throughput", "kernels_bench"])
def test_nothing_is_absent(script, tmp_path):
    words = ["--quick", "--device", "cuda", "--out", str(tmp_path)]
    words += ["--model", "small"] * (script == "overhead")
    words += ["--models", "small", "--foreach-lars"] * (script == "throughput")
    subprocess.run([sys.executable, str(BENCH / f"{script}.py"), *words], check=True)
    lines, _ = read_lines(tmp_path / f"{script}.jsonl", Line)
    assert lines
    assert not [line for line in lines if line.absent]
