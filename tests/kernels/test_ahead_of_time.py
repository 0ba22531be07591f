"""Every kernel, compiled for a GPU that is not there, in the forms in which it is launched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = """
import re
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from infobatch_fast.kernels import launch as module

KINDS = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.int64: "i64"}
KINDS |= {torch.int32: "i32", torch.uint8: "u8", torch.float16: "fp16"}

def compile(kernel, programs, *arguments, num_warps=4, **constants):
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
    assert list(values) == kernel.arg_names
    signature, fixed, attributes = {}, {}, {}
    for place, (parameter, value) in enumerate(zip(kernel.params, values.values())):
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + KINDS[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                attributes[(place,)] = [["tt.divisibility", 16]]
        elif value is None or parameter.is_constexpr:
            signature[parameter.name], fixed[(place,)] = "constexpr", value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i64" if value >= 1 << 31 else "i32"
    source = ASTSource(kernel, signature, fixed, attributes)
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    assert len(compiled.asm["cubin"]) > 1000
    assert ".local" not in ptx, kernel  # the stack, which registers spill to
    assert "atom" not in ptx, kernel
    print(kernel.__name__, len(re.findall(r"ld\\.global\\.v4", ptx)))

module.launch, module.INTERPRETED = compile, True  # before the others take them
from infobatch_fast.kernels import choose, cross_entropy, lars, prune, record

scores = torch.empty(5000, device="meta")
mask = torch.empty(1 << 31, dtype=torch.bool, device="meta")  # which has 64-bit positions
for source in ((scores, prune.threshold(scores)), (mask,)):
    positions, _ = prune.partition(*source)
    choose.choose(positions, len(positions) // 2, 7, 1.0, 0)
    choose.shuffle(len(positions), 0, "meta")
index = torch.zeros(200, dtype=torch.int64)
flag = torch.zeros(())
record.record(torch.zeros(5), index, torch.zeros(200), flag)
for classes, scale in ((10, None), (1000, flag)):
    logits = torch.zeros(200, classes, dtype=torch.bfloat16)
    cross_entropy.cross_entropy_gradient(logits, index, torch.ones(200), 0.1, scale)
for start in (0, 1):
    weight, momentum, gradient = torch.zeros(3, 8192)[:, start : start + 5000].split(1)
    step = lars.Lars([weight], [momentum])
    step.measure([gradient])
    numbers = dict(weight_decay=0.1, eta=0.1, max_trust=1.0, clip=1.0)
    step.update(flag, flag, **numbers)
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    vectors: dict[str, list[int]] = {}
    for line in done.stdout.splitlines():
        name, count = line.split()
        vectors.setdefault(name, []).append(int(count))
    assert len(vectors) == 11
    # Whole blocks are read 16 bytes at a time; of LARS four times a thread and tensor, if aligned.
    assert all(vectors["_sums_kernel"])
    assert vectors["_norms_kernel"] == [8, 0]
    assert vectors["_update_kernel"] == [12, 0]
