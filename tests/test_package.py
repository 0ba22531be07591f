"""What importing the package costs, and what it promises."""

import subprocess
import sys
import tomllib
from pathlib import Path

import infobatch_fast

ROOT = Path(__file__).parent.parent


def test_infobatch_needs_torch_alone() -> None:
    code = (
        "import sys, infobatch_fast\n"
        "assert 'torch' not in sys.modules\n"
        "from infobatch_fast import InfoBatch\n"
        "from infobatch_fast.kernels import reference\n"
        "InfoBatch(10, 2, device='cpu').sample(0)\n"
        "loaded = {'nvidia.dali', 'torchvision', 'tyro'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_exports() -> None:
    for name in infobatch_fast.__all__:
        assert getattr(infobatch_fast, name) is not None
        assert name in dir(infobatch_fast)
    assert not hasattr(infobatch_fast, "nonsense")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert infobatch_fast.__version__ == project["version"]


def test_kernels_are_the_top_level_folder() -> None:
    link = ROOT / "infobatch_fast" / "kernels"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "kernels"
    assert (ROOT / "infobatch_fast" / "py.typed").is_file()


def test_nothing_reaches_for_the_global_generators() -> None:
    for path in [*ROOT.glob("infobatch_fast/**/*.py"), *ROOT.glob("kernels/*.py")]:
        if path.name == "workers.py":  # those of its own processes, for the user's transforms
            continue
        for line in path.read_text().splitlines():
            for call in ("np.random.seed", "random.seed", "torch.seed("):
                assert call not in line, f"{path.name}: {line}"
