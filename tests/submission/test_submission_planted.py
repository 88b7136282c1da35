"""An archive of the demo: its original, `tiny-outliers`, is made again where it is verified."""

from types import SimpleNamespace

import pytest

from ptq.submission.origin import embedded_original
from ptq.wan.identity import identify_model
from ptq.wan.loading import find_model


@pytest.mark.parametrize(("claimed", "known"), [("tiny-outliers", True), ("wan-outliers", False), (None, False)])
def test_the_planted_model_is_known_by_its_weights(claimed, known, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    digest = identify_model("tiny-outliers", find_model("tiny-outliers").path).digest
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))  # another machine: planted again, with the same bytes
    info = SimpleNamespace(model=claimed, checkpoint=SimpleNamespace(digest=digest))
    found = embedded_original(SimpleNamespace(infos={"reference": info}))
    assert (found is not None) == known
    assert (tmp_path / "there").exists() == known
    assert not known or (found[0].is_relative_to(tmp_path / "there") and found[1].digest == digest)
