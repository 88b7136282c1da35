"""Runs the cases in `interpreted/` under Triton's interpreter.

TRITON_INTERPRET must be set before triton is imported, so each file runs in its own process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ptq.scheme import FORMATS

pytestmark = pytest.mark.slow
CASES = sorted((Path(__file__).parent / "interpreted").glob("case_*.py"))


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_interpreted(case):
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", str(case)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_every_kernel_has_a_case():
    text = "".join(case.read_text() for case in CASES)
    kernels = Path(__file__).parents[3] / "ptq" / "runtime" / "kernels"
    modules = {path.stem for path in kernels.glob("*.py") if "@triton.jit\ndef" in path.read_text()}
    functions = {"blocks", "formats"} | {name for name, fmt in FORMATS.items() if fmt.kernel_id is not None}
    assert functions < modules
    assert modules - functions <= {name for name in modules if f"kernels.{name} import" in text}
