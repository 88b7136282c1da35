"""Round trips: whatever text is written in a format is read back, whichever container holds it."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from ptq.prompts import caption_digest, read_prompts

# Anything UTF-8 can hold; prompts are compared without surrounding white space, which readers remove.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60).filter(lambda text: text.strip() != "")
LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\ufeff"), max_size=60).filter(
    lambda text: text.strip() != ""
)


def read_text(name: str, content: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content.encode("utf-8"))
        result = read_prompts(path)
        assert result.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        return [sample.prompt for sample in result.samples]


@given(st.lists(TEXT, min_size=1, max_size=8, unique_by=str.strip), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_json_and_jsonl_round_trip(texts: list[str], ascii_only: bool, last_newline: bool) -> None:
    expected = [text.strip() for text in texts]
    records = [{"prompt": text} for text in texts]
    assert read_text("a.json", json.dumps(records, ensure_ascii=ascii_only)) == expected
    lines = "\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records)
    assert read_text("a.jsonl", lines + "\n" * last_newline) == expected


@given(
    st.lists(LINE, min_size=1, max_size=8, unique_by=str.strip), st.sampled_from(["\n", "\r\n", "\n\n"]), st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_txt_round_trip(texts: list[str], newline: str, last_newline: bool) -> None:
    content = newline.join(texts) + newline * last_newline
    assert read_text("a.txt", content) == [text.strip() for text in texts]


@given(st.lists(st.text("aB\u00e9\u00df", min_size=1), min_size=1, max_size=5), st.data())
@settings(max_examples=60, deadline=None)
def test_caption_digest_ignores_white_space_and_case_only(words: list[str], data: st.DataObject) -> None:
    spaces = data.draw(
        st.lists(st.sampled_from([" ", "\n", "\t ", "\u00a0"]), min_size=len(words), max_size=len(words))
    )
    spread = "".join(space + word for space, word in zip(spaces, words, strict=True)) + " "
    assert caption_digest(spread) == caption_digest(" ".join(words))
    assert caption_digest(spread.upper()) == caption_digest(" ".join(words))
    assert caption_digest(" ".join(words)) != caption_digest(" ".join([*words, "x"]))
