"""The part "resume" of `agreement.py`: a run continued from a checkpoint, against the one it is of.

Both are runs of the trainer, in float32, in this process. The checkpoint is one that the
undisturbed run wrote on its way, so that both have the steps before it in common, and what differs
comes of the continuing.
"""

import tempfile
from pathlib import Path
from typing import Any

from agreement_figures import Bench, like_for_like, relative
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from infobatch_fast.data.cifar import Dataset
from infobatch_fast.train import checkpoint, config
from infobatch_fast.train import folder as record
from infobatch_fast.train.cli import Interrupts
from infobatch_fast.train.config import Config
from infobatch_fast.train.loop import train

PART = "resume"
STEPS = 10  # of the first epoch, which is full; the second is pruned
STOP = 3  # step of the second epoch whose checkpoint the other run continues from
ATOMICS = 1e-3  # that results may differ by on a GPU, where some additions come in any order


def measure_resume(bench: Bench, data: Dataset, model: str, batch_size: int, lr: float) -> None:
    """Rows of the parameters and buffers, and of the scores.

    Args:
        bench: whose rows they are.
        data: on the CPU.
        model: name of the network.
        batch_size: B.
        lr: peak of the learning rate.
    """
    part = data.part(min(1.0, STEPS * batch_size / len(data.labels))).to(bench.device)
    settings = config.settle(
        Config(
            model=model,
            epochs=2,
            batch_size=min(batch_size, len(part.labels)),
            max_lr=lr,
            amp="off",
            dataset=data.name,
            eval_every=2,
            checkpoint_every=STOP,
            telemetry=False,
            seed=bench.seed,
        ),
        data.name,
        bench.device.type,
    )
    with like_for_like(), tempfile.TemporaryDirectory() as folder:
        undisturbed, resumed = Path(folder) / "undisturbed", Path(folder) / "resumed"
        for run in (undisturbed, resumed):
            run.mkdir()
        saved = train_through(settings, part, undisturbed)
        train(settings, part, resumed, saved, Interrupts(), _unheard)
        (want, want_scores), (got, scores) = (_results(run) for run in (undisturbed, resumed))
    if got.keys() != want.keys():
        raise RuntimeError("the runs hold other parameters")
    off = max(relative(got[name], want[name]) for name in want)
    limit = ATOMICS if bench.cuda else 0
    more = {"tensors": len(want), "steps_in_common": STEPS + STOP}
    bench.add(PART, {"what": "parameters and buffers"}, off, "relative", limit, more=more)
    of_scores = relative(scores, want_scores)
    bench.add(PART, {"what": "scores"}, of_scores, "relative", limit, more=more)


def train_through(settings: Config, data: Dataset, folder: Path) -> dict[str, Any]:
    """Train to the end; returns the checkpoint that was written in the second epoch.

    Args:
        settings: of the run.
        data: on its device.
        folder: the run's.

    Raises:
        RuntimeError: there was none after `STOP` of that epoch's steps.
    """
    saved: dict[str, Any] = {}
    done, first = 0, -(-len(data.labels) // settings.batch_size)

    def keep(*_: Any) -> None:
        nonlocal done
        done += 1
        if done == first + STOP + 1:  # the next checkpoint takes the place of this one
            saved.update(checkpoint.load(folder / record.CHECKPOINT))

    hook = register_optimizer_step_post_hook(keep)
    try:
        train(settings, data, folder, None, Interrupts(), _unheard)
    finally:
        hook.remove()
    if (saved.get("epoch"), saved.get("number")) != (1, STOP):
        raise RuntimeError(f"there was no checkpoint after {STOP} steps of the second epoch")
    return saved


def _results(folder: Path) -> tuple[dict[str, Tensor], Tensor]:
    state = checkpoint.load(folder / record.CHECKPOINT)
    return checkpoint.load_tensors(folder / record.WEIGHTS), state["step"]["infobatch"]["scores"]


def _unheard(line: str) -> None:
    pass
