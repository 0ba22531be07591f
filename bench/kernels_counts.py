"""Operations and launches, counted where there is no GPU to time them on.

How: a TorchDispatchMode sees every operation of torch, backward passes included, as autograd hands
it to a device's kernels. Those that only make views or allocate are host-only; each other one is at
least one launch on a GPU (a _foreach operation is one for some hundred tensors). Our kernels are
counted by their launches: a second process imports them for Triton's interpreter, and replaces its
launcher by one that counts and does not run the kernel, but for the rehearsal of an optimizer that
is made. Counts do not depend on results, of which nothing is read back.

Started as a program, it is that second process, and prints its counts as JSON.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from kernels_cases import make_cases
from kernels_step import loop_call, make_layerwise, resnet50_params
from kernels_work import Call
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from infobatch_fast.infobatch import InfoBatch
from infobatch_fast.kernels import select
from infobatch_fast.telemetry.phases import Phases
from infobatch_fast.train.models import make_model
from infobatch_fast.train.step import TrainStep

CPU = torch.device("cpu")
KINDS = ("operations", "foreach", "host_only", "launches")
SIZES = {"samples": 4096, "batches": ((200, 10), (1024, 100))}  # counts do not depend on N
MODELS = ("small", "r50")
BATCH = 2  # nor on B, but for the cross-entropy's second launch
_ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")

Counts = dict[str, int]  # by kind: operations that compute, those of them that are _foreach, ...


class Counter(TorchDispatchMode):
    """Counts operations, and launches that it is told of, by the part that is at work.

    Attributes:
        parts: what was counted, by part.
        part: at work now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Counts] = {}
        self.part = "rest"

    def add(self, kind: str) -> None:
        """Count one."""
        counts = self.parts.setdefault(self.part, dict.fromkeys(KINDS, 0))
        counts[kind] += 1

    def wrap(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, counted under a part's name."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            before, self.part = self.part, part
            try:
                return call(*args, **kwargs)
            finally:
                self.part = before

        return counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if func.namespace == "profiler":
            pass  # marks around an optimizer's step
        elif func.is_view or name in _ALLOCATIONS or name in ("_unsafe_view", "detach"):
            self.add("host_only")
        else:
            self.add("operations")
            if name.startswith("_foreach") or name.startswith("_amp_foreach"):
                self.add("foreach")
        return func(*args, **(kwargs or {}))


def total(parts: dict[str, Counts]) -> Counts:
    """The counts of all parts together."""
    return {kind: sum(counts[kind] for counts in parts.values()) for kind in KINDS}


@contextmanager
def counting() -> Iterator[Counter]:
    """A Counter at work; under Triton's interpreter launches are counted and do not run."""
    counter = Counter()
    if os.environ.get("TRITON_INTERPRET") != "1":
        with counter:
            yield counter
        return
    from triton.runtime.interpreter import InterpretedFunction

    run: Any = InterpretedFunction.run

    def launch(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        counter.add("launches")

    InterpretedFunction.run = launch  # type: ignore[method-assign]
    try:
        with counter:
            yield counter
    finally:
        InterpretedFunction.run = run  # type: ignore[method-assign]


def count_call(call: Call) -> Counts:
    """What the second call does, when nothing is set up any more."""
    with counting() as counter:
        call(0)
        counter.parts.clear()
        call(0)
    return total(counter.parts)


def count_kernels(side: str) -> dict[str, Counts]:
    """One call of each kernel's side: "torch" or "loop" here, "ours" in the second process.

    Without "choosing" and "sample": for these torch's side takes numpy on a CPU.
    """
    counts: dict[str, Counts] = {}
    params = cache(lambda: resnet50_params(CPU, 0))
    kernels = cache(select.load)
    for case in make_cases((SIZES["samples"],), SIZES["batches"], params, kernels, CPU, 0):
        if case.kernel in ("choosing", "sample", "lars", "lamb") or side not in case.sides:
            continue
        name = case.kernel
        if name == "cross_entropy":
            name += f", B = {case.size['batch_size']}, C = {case.size['classes']}"
        if name not in counts:  # that of "update" and "record" does not depend on B
            counts[name] = count_call(case.build().sides[side]())
    for name in ("lars", "lamb"):
        counts[f"{name}, ResNet-50"] = count_optimizer(name, side, params())
    return counts


def count_optimizer(name: str, side: str, params: list[Tensor]) -> Counts:
    """One step of LARS or LAMB whose gradients lie where they lay in the step before.

    It is not the case's: there our kernels would go through ResNet-50 in the interpreter.
    """
    weights = [torch.nn.Parameter(p.clone()) for p in params]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    if side == "loop":
        return count_call(loop_call(name, params, [torch.zeros_like(p) for p in params]))
    optimizer: Any = make_layerwise(name, weights, fused=side == "ours")
    optimizer.finds_inf, optimizer.found_inf = True, torch.zeros(())
    with counting() as counter:
        optimizer.step()
        counter.parts.clear()
        optimizer.step()
    return total(counter.parts)


def count_step(model: str, side: str, with_infobatch: bool) -> dict[str, Counts]:
    """The parts of the third training step, in bfloat16 by LARS, as on a GPU.

    Its gradients are new ones, which may lie elsewhere than those of the step before: our optimizer
    then writes their addresses anew, by three operations that are in its count or not.

    Args:
        model: one of `MODELS`.
        side: "ours" or "torch".
        with_infobatch: False trains on the plain mean, without scores.
    """
    network = make_model(model, seed=0).train().to(memory_format=torch.channels_last)  # pyright: ignore
    optimizer: Any = make_layerwise("lars", list(network.parameters()), fused=side == "ours")
    infobatch = InfoBatch(BATCH, 1, device=CPU)
    batch = infobatch.sample(0).batch(0, BATCH)
    step = TrainStep(
        network,
        optimizer,
        infobatch if with_infobatch else None,
        amp="bf16",
        label_smoothing=0.1,
        compile=False,
        phases=Phases(CPU, enabled=False),
    )
    images = torch.zeros(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.zeros(BATCH, dtype=torch.int64)
    with counting() as counter:
        parts: Any = (
            (step, "forward", "forward"),
            (step, "_backward", "loss and backward"),
            (optimizer, "step", "optimizer"),
            (step.buffers, "keep_or_restore", "guard of the buffers"),
            (infobatch, "record", "record"),
            (step, "_count", "counters"),
        )
        for owner, name, part in parts:
            setattr(owner, name, counter.wrap(part, getattr(owner, name)))
        for _ in range(3):
            counter.parts.clear()
            step(images, labels, batch, 0.1, 0.9)
    return counter.parts


def count_all(side: str) -> dict[str, Any]:
    """Everything for a side, as JSON types: "kernels" by name, "steps" by model and then part."""
    counts: dict[str, Any] = {"kernels": count_kernels(side), "steps": {}, "without": {}}
    if side != "loop":
        for model in MODELS:
            counts["steps"][model] = count_step(model, side, True)
            counts["without"][model] = total(count_step(model, side, False))
    return counts


@contextmanager
def counting_ours() -> Iterator[Callable[[], dict[str, Any]]]:
    """`count_all` of our kernels, in a process of their own, meanwhile.

    Yields:
        What waits for the counts; it raises RuntimeError, with the reason, if there are none.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(
        [sys.executable, __file__], env=environment, stdin=subprocess.DEVNULL, text=True, **pipes
    )

    def finish() -> dict[str, Any]:
        counts, complaint = process.communicate()
        if process.returncode:
            last = complaint.strip().splitlines()[-1:]
            raise RuntimeError(" ".join(last) or f"exit code {process.returncode}")
        return json.loads(counts)

    try:
        yield finish
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """The second process: InfoBatch and the step take the kernels, as on a GPU."""
    from infobatch_fast import infobatch
    from infobatch_fast.train import step

    torch.set_num_threads(1)  # beside the process that counts torch's
    kernels = select.load()
    for module in (infobatch, step):
        module.triton_kernels = lambda device: kernels  # type: ignore[attr-defined]
    print(json.dumps(count_all("ours")))


if __name__ == "__main__":
    main()
