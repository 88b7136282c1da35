"""The rules of a directory that can be resumed, on the smallest stage there is: one file a shard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptq.errors import DamagedFileError, PtqError, UsageError
from ptq.store.files import read_json, write_json
from ptq.store.locks import live_shards, shard_lock
from ptq.store.run_directory import RunDirectory, hold_whole, name_all
from ptq.store.sharding import Shard

WANTED = {"seed": 1, "size": [3, 4]}


class Letters(RunDirectory):
    """Each shard writes one letter file."""

    kind, settings_file = "directory of letters", "letters.json"

    def __init__(self, path, wanted=WANTED, shard=None):
        super().__init__(path, shard)
        self.wanted, self.letter = wanted, self.path / f"{self.shard.index}.txt"

    def found(self):
        return read_json(self.settings_path) if self.settings_path.exists() else None

    def refusal(self, different):
        return UsageError(f"other letters: {name_all(different)}")

    def delete(self, *, own):
        for path in [self.letter] if own else self.path.glob("*.txt"):
            path.unlink(missing_ok=True)

    def targets(self):
        return {self.letter}

    def write_settings(self, *, anew):
        if anew:
            write_json(self.settings_path, self.wanted)


def write(path: Path, *, wanted=WANTED, shard=None, fresh=False, text="a") -> list[str]:
    """Make this shard's letter unless it is there; returns the letters that are then there."""
    directory = Letters(path, wanted, shard)
    with directory.hold(wanted, fresh=fresh):
        if not directory.letter.exists():
            directory.letter.write_text(text)
    return sorted(p.read_text() for p in path.glob("*.txt"))


def test_the_same_settings_continue_and_others_are_refused_by_name(tmp_path) -> None:
    out = tmp_path / "out"
    assert write(out) == ["a"] and write(out, text="b") == ["a"]
    with pytest.raises(UsageError, match=r"other letters: size, more$"):
        write(out, wanted={"seed": 1, "size": [3, 5], "more": 1})
    assert read_json(out / "letters.json") == WANTED and live_shards(out / "state") == []


def test_fresh_starts_over_with_any_settings(tmp_path) -> None:
    write(tmp_path / "out")
    assert write(tmp_path / "out", fresh=True, text="b") == ["b"]
    assert write(tmp_path / "out", wanted={"seed": 2}, fresh=True, text="c") == ["c"]
    assert read_json(tmp_path / "out" / "letters.json") == {"seed": 2}


def test_fresh_of_one_shard_keeps_the_others(tmp_path) -> None:
    for index in range(2):
        write(tmp_path / "out", shard=Shard(index, 2), text="a")
    assert write(tmp_path / "out", shard=Shard(0, 2), fresh=True, text="b") == ["a", "b"]
    other = write(tmp_path / "out", wanted={"seed": 2}, shard=Shard(0, 2), fresh=True, text="c")
    assert other == ["c"]  # made with other settings, all of it goes


def test_another_process_is_never_disturbed(tmp_path) -> None:
    out = tmp_path / "out"
    write(out, shard=Shard(0, 2))
    other = {"shard": Shard(0, 2), "wanted": {"seed": 2}, "fresh": True}
    with shard_lock(out / "state", Shard(1, 2)):
        for options, text in (
            ({"shard": Shard(1, 2)}, "is making this shard"),
            ({"shard": Shard(0, 3)}, "another number of shards than 3"),
            (other, r"Shard 1of2 is at work .*different: seed, size"),
        ):
            with pytest.raises(PtqError, match=text):
                write(out, **options)
        assert (out / "0.txt").read_text() == "a" and read_json(out / "letters.json") == WANTED


def test_leftovers_of_own_files_are_swept_and_those_of_others_are_not(tmp_path) -> None:
    out = tmp_path / "out"
    write(out, shard=Shard(0, 2))
    for name in (".0.txt.42.part", ".1.txt.43.part", "0.txt.42.part"):
        (out / name).write_text("half")
    write(out, shard=Shard(0, 2))
    assert sorted(path.name for path in out.glob("*.part")) == [".1.txt.43.part", "0.txt.42.part"]


def test_a_directory_of_something_else_is_refused_and_left_as_it_is(tmp_path) -> None:
    (tmp_path / "mine").write_text("mine")
    for path in (tmp_path, tmp_path / "mine"):
        with pytest.raises(UsageError, match="not a directory of letters; choose another --out"):
            write(path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "empty" / "state").mkdir(parents=True)
    assert write(tmp_path / "empty") == ["a"]


def test_damaged_settings_stop_unless_fresh(tmp_path) -> None:
    out = tmp_path / "out"
    write(out)
    (out / "letters.json").write_text('{"seed": ')
    with pytest.raises(DamagedFileError, match=r"letters\.json"):
        write(out)
    assert write(out, fresh=True, text="b") == ["b"]
    assert json.loads((out / "letters.json").read_text()) == WANTED


def test_a_whole_directory_is_held_by_a_file_beside_it(tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    with hold_whole(out):
        with pytest.raises(PtqError, match=r"out is in use by process \d+"), hold_whole(out):
            pass
        assert not out.exists()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.chdir(tmp_path)
    with hold_whole(Path(".")):
        assert (tmp_path.parent / f".{tmp_path.name}.lock").exists()


def test_another_process_that_begins_between_two_looks_is_not_taken_for_other_files(tmp_path) -> None:
    """Ranks of one job open the directory together: the settings may come while this one lists what is there."""

    class Late(Letters):
        def foreign(self):
            write_json(self.settings_path, self.wanted)
            return super().foreign()

    out = tmp_path / "out"
    out.mkdir()
    Late(out).refuse_foreign()
    assert read_json(out / "letters.json") == WANTED
    (out / "letters.json").rename(out / "other.json")
    with pytest.raises(UsageError, match="holds other files and is not a directory of letters"):
        Letters(out).refuse_foreign()
