"""Errors at the edge of the program: one paragraph and an exit code; only a mistake of ours is a traceback."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ptq import ui
from ptq.cli.app import app
from ptq.cli.boundary import bear_any_text, check_arguments, explain, report
from ptq.errors import PtqError, UsageError
from ptq.store.files import append_jsonl, atomic_path, write_bytes
from ptq.ui.console import NARROWEST, make_console

ROOT = os.getuid() == 0


def ptq(folder: Path, *arguments: str, **how) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ptq.cli.main", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, **how)


OutOfMemory = type("OutOfMemoryError", (RuntimeError,), {})


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "/x/y: No space left on device. Free some space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded. Free some space"),
        (PermissionError(errno.EACCES, "Permission denied", b"/x"), "/x: Permission denied. Choose a place"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "can only be read"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/x"), "Choose a shorter name"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x"), "a file where a folder is meant"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/x"), "a folder where a file is meant"),
        (OSError(errno.EMFILE, "Too many open files", "/x"), "ulimit -n"),
        (OSError("the hub said no"), "the hub said no"),
        (ValueError("I/O error: No space left on device (os error 28)"), "Free some space"),
        (
            RuntimeError("unable to open file </x/r.safetensors> in read-only mode: Too many open files (24)"),
            "/x/r.safetensors: Too many open files. This process may not open more files",
        ),
        (MemoryError(), "not enough memory"),
        (OutOfMemory("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "not enough memory"),
        (ImportError("libx.so: failed to map segment from shared object"), "not enough memory"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "UTF-8"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"), "UTF-8"),
        (ImportError("libcudart.so.12: cannot open shared object file", name="torch._C"), "cannot be loaded"),
        (PtqError("said already"), "said already"),
    ],
)
def test_errors_of_the_system_are_paragraphs(error: Exception, words: str, capsys):
    assert report(error) == 1
    said = capsys.readouterr().err
    assert words in " ".join(said.split()) and said.startswith("Error: ") and "Traceback" not in said
    assert said.count("\n") == 1


def test_a_mistake_of_ours_is_a_traceback_and_says_what_to_send(capsys):
    try:
        raise KeyError("a name that nobody wrote")
    except KeyError as error:
        assert explain(error) is None and report(error) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "test_boundary.py" in said and "ptq doctor --json" in said.splitlines()[-1]


def test_debug_shows_the_traceback_of_every_error(tmp_path: Path):
    result = ptq(tmp_path, "prompts", "absent.txt", "--debug")
    assert result.returncode == 1 and "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: The prompt file absent.txt does not exist")
    assert "Traceback" not in ptq(tmp_path, "prompts", "absent.txt").stderr


@pytest.mark.parametrize(
    "arguments", [("prompts", ""), ("generate", "tiny", "--out", ""), ("generate", "tiny", "--out="), ("",)]
)
def test_an_empty_argument_is_refused(arguments: tuple[str, ...], tmp_path: Path):
    result = ptq(tmp_path, *arguments)
    assert (result.returncode, list(tmp_path.iterdir())) == (2, []) and "is empty" in result.stderr


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a\xff"])
def test_an_argument_that_is_not_utf8_is_refused(name: bytes, tmp_path: Path):
    result = ptq(tmp_path, "calibrate", "tiny", "--prompts", "p.txt", "--out", os.fsdecode(name))
    assert (result.returncode, list(tmp_path.iterdir())) == (2, []) and "not UTF-8" in result.stderr
    assert "\\udcff" in result.stderr


def test_an_empty_negative_prompt_is_meant():
    check_arguments(["generate", "tiny", "--negative-prompt", "", "--negative-prompt=", "--prompt", "a=b"])
    with pytest.raises(UsageError, match="--out is empty"):
        check_arguments(["generate", "tiny", "--out", ""])


RANGED = {
    "--flow-shift": ("0", "-1", "nan", "inf", "1e9", "x"),
    "--guidance-scale": ("-1", "nan", "-inf", "1e9"),
    "--guidance-scale-2": ("-1", "nan", "inf"),
    "--stale-minutes": ("0", "nan", "inf"),
    "--steps": ("0", "1001", "1e3"),
    "--height": ("0", "99999"),
    "--num-frames": ("0", "999999"),
    "--seed": ("-1", str(2**63), str(10**40)),
    "--num-prompts": ("0",),
}


@pytest.mark.parametrize(("option", "value"), [(name, value) for name, values in RANGED.items() for value in values])
def test_numbers_out_of_range_are_refused_with_exit_code_2(option: str, value: str):
    result = CliRunner().invoke(app, ["generate", "tiny", "--out", "x", option, value])
    assert result.exit_code == 2 and option in result.output, result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "tiny", "--calibration", "c", "--format", "nosuch", "--out", "x"),
        ("quantize", "tiny", "--calibration", "c", "--format", "hif4", "--out", "x", "--budget-scope", "some"),
        ("quantize", "tiny", "--calibration", "c", "--format", "hif4", "--out", "x", "--max-memory", "nan"),
        ("generate", "tiny", "--prompt", "a", "--out", "x", "--offload", "some"),
        ("generate", "tiny", "--prompt", "a", "--out", "x", "--dtype", "int1"),
        ("evaluate", "--reference", "a", "--candidate", "b", "--out", "x", "--suite", "other"),
        ("evaluate", "--reference", "a", "--candidate", "b", "--out", "x", "--format", "nosuch"),
        ("demo", "--format", "nosuch"),
        ("verify", "x.tar.gz", "--max-gb", "nan"),
    ],
)
def test_an_unknown_choice_is_exit_code_2(arguments: tuple[str, ...], tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, list(arguments))
    code = result.exception.exit_code if isinstance(result.exception, PtqError) else result.exit_code
    assert code == 2, result.exception
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("full", [True, False])
def test_results_that_nobody_can_take(full: bool, tmp_path: Path):
    """A full disk behind stdout, and `ptq ... | head` whose reader has gone."""
    (tmp_path / "prompts.txt").write_text("a red disc\n")
    command = [sys.executable, "-m", "ptq.cli.main", "prompts", "prompts.txt", "--json"]
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "wb") if full else os.fdopen(writer, "wb", 0) as output:
        result = subprocess.run(command, cwd=tmp_path, stdout=output, stderr=subprocess.PIPE, text=True, timeout=120)
    assert result.returncode == 1
    assert ("No space left on device" in result.stderr) if full else result.stderr == ""
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr


def test_where_not_even_the_error_can_be_said_the_exit_code_still_is():
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "ptq.cli.main", "inspect", ""]
        assert subprocess.run(command, stdout=full, stderr=full, timeout=120).returncode == 2


def test_the_reason_of_a_failed_write_is_kept(tmp_path: Path):
    with pytest.raises(PtqError, match=r"File name too long.*shorter name"):
        write_bytes(tmp_path / ("n" * 300), b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PtqError, match=r"folder: Is a directory\. It is a folder"):
        write_bytes(tmp_path / "folder", b"")
    (tmp_path / "file").touch()
    with pytest.raises(PtqError, match=r"lines.jsonl: Not a directory.*a file where a folder"):
        append_jsonl(tmp_path / "file" / "lines.jsonl", {})
    with pytest.raises(PtqError, match=r"Not a directory.*a file where a folder"):
        write_bytes(tmp_path / "file" / "below" / "new", b"")
    with pytest.raises(FileNotFoundError, match="absent"), atomic_path(tmp_path / "copy") as temporary:
        temporary.write_bytes((tmp_path / "absent").read_bytes())  # not the fault of what is written
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}


@pytest.mark.skipif(not ROOT, reason="becomes another user")
def test_a_place_of_somebody_else_is_one_paragraph(tmp_path: Path):
    code = f"import os, sys\nfrom ptq.store.files import write_bytes\nfrom ptq.cli.boundary import report\nos.setuid(65534)\ntry: write_bytes({str(tmp_path / 'file')!r}, b'')\nexcept Exception as error: sys.exit(report(error))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1 and "Permission denied" in result.stderr
    assert ". Choose a place that you may use" in result.stderr


def test_files_and_folders_have_the_mode_that_the_umask_gives(tmp_path: Path):
    from ptq.store.files import temporary_directory, write_json, write_tensors

    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "new" / "weights.safetensors", {})
        write_json(tmp_path / "new" / "file.json", {})
        append_jsonl(tmp_path / "new" / "lines.jsonl", {})
        with temporary_directory(tmp_path / "new", "folder") as folder:
            folder.rename(tmp_path / "new" / "kept")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    files = {"weights.safetensors": 0o640, "file.json": 0o640, "lines.jsonl": 0o640}
    assert modes == {"new": 0o750, "kept": 0o750, **files}


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors of Unix")
def test_standard_output_that_was_closed_before(tmp_path: Path):
    (tmp_path / "p.txt").write_text("a red disc\n")
    command = [sys.executable, "-m", "ptq.cli.main", "prompts", "p.txt"]
    result = subprocess.run(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=120, preexec_fn=lambda: os.close(1)
    )
    assert (result.returncode, "Traceback" in result.stderr) == (0, False)


def test_letters_that_standard_output_lacks_are_written_as_in_source(monkeypatch):
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", plain)
    bear_any_text()
    ui.say("0.5\u00a0% \u2713")
    plain.flush()
    assert plain.buffer.getvalue() == b"0.5\\xa0% \\u2713\n"


@pytest.mark.parametrize("columns", ["0", "1"])
def test_a_terminal_without_a_width_still_shows_tables(monkeypatch, columns: str):
    monkeypatch.setenv("COLUMNS", columns)
    assert make_console().width == NARROWEST
    monkeypatch.setenv("COLUMNS", "33")
    assert make_console().width == 33
