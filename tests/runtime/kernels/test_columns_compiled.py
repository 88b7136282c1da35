"""GPTQ's columns compiled for sm_90, sm_100 and sm_120 without a GPU."""

import pytest

pytest.importorskip("triton", reason="triton exists on Linux only")
from aot import SHARED_LIMIT, compile_for

from ptq.solvers.triton_columns import OPTIONS, ROWS, round_columns_kernel


@pytest.mark.parametrize("family", [90, 100, 120])
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_errors_stay_in_registers_and_nothing_is_contracted(family, dtype):
    pointers = {"thresholds_ptr": "*fp32", "levels_ptr": "*fp32", "elements_ptr": "*u8", "steps_ptr": "*fp32"}
    pointers |= {name: f"*{dtype}" for name in ("target_ptr", "weight_ptr", "feedback_ptr")}
    constants = {"COLUMNS": 128, "ROWS": ROWS}
    signature = pointers | {"n": "i32", "columns": "i32"}
    binary = compile_for(family, round_columns_kernel, signature, constants, (*pointers, "n"), OPTIONS)
    assert binary.stack == 0 and binary.instructions(r"\bSTL") == 0, "registers spill"
    assert binary.shared <= SHARED_LIMIT[family] // 8, "eight programs a multiprocessor"
    assert "div.rn.f32" in binary.ptx and "div.full" not in binary.ptx
    assert not any(line.strip().startswith(f"fma.rn.f{dtype[2:]}") for line in binary.ptx.splitlines())
