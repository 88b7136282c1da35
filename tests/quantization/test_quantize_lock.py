"""Two runs cannot make one checkpoint at the same time."""

import pytest
from quantization_helpers import file_digests, make_settings, run

from ptq.errors import PtqError
from ptq.store.locks import exclusive


def test_the_second_run_is_refused_and_disturbs_nothing(model, records, uninterrupted, tmp_path):
    out, settings = tmp_path / "out", make_settings("mxfp4")
    with (
        exclusive(tmp_path / ".out.lock", "out"),
        pytest.raises(PtqError, match=r"out is in use by process \d+ .*choose another --out"),
    ):
        run(model, records, out, settings, fresh=True)
    assert list(tmp_path.iterdir()) == []
    run(model, records, out, settings)
    assert file_digests(out) == file_digests(uninterrupted["rtn"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
