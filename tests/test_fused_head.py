"""The kernel of the head for GPUs, without one: interpreted on a CPU, and compiled for two
generations of devices."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is for Linux on x86-64")
ROOT = Path(__file__).resolve().parent.parent


def test_the_interpreted_kernel_computes_what_eager_operations_do():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "tests/interpreted_head.py",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-3000:]


@pytest.mark.parametrize("generation", [80, 90])
@pytest.mark.parametrize("knows_lse, reads", [(False, 2), (True, 1)])
def test_it_compiles_for_devices_and_moves_sixteen_bytes_at_once(generation, knows_lse, reads):
    """A thread of 8 x 32 has 16 of 4096 columns: two loads of 16 bytes a pass in bf16, and two
    stores, so that a logit is read `reads` times and written once."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from model import fused_head

    divisible = [["tt.divisibility", 16]]
    signature = {
        "z_ptr": "*bf16",
        "targets_ptr": "*i64",
        **dict.fromkeys(("factor_ptr", "losses_ptr", "lse_ptr"), "*fp32"),
        **dict.fromkeys(("row_stride", "vocab_size", "padded_size"), "i32"),
        **dict.fromkeys(("softcap", "z_loss"), "fp32"),
    }
    constants = {
        "HAS_SOFTCAP": False,
        "KNOWS_LSE": knows_lse,
        "WRITES_COTANGENT": True,
        "COLUMNS": fused_head.COLUMNS,
    }
    source = ASTSource(
        fused_head.row_kernel,
        signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(0,): divisible, (5,): divisible, (7,): divisible},
    )
    options = {"num_warps": fused_head.WARPS}
    code = triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options).asm
    assert len(code["cubin"]) > 1000
    numbers = fused_head.COLUMNS // (32 * fused_head.WARPS)
    a_pass = numbers * 2 // 16
    assert len(re.findall(r"ld\.global\.v4\.b32", code["ptx"])) == reads * a_pass
    assert len(re.findall(r"st\.global\.v4\.b32", code["ptx"])) == a_pass
