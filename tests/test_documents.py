"""No document names a command, option, file, module or link that does not exist; the examples run."""

from __future__ import annotations

import re
import runpy
import sys
import tomllib
from pathlib import Path

import loras
import pytest
import typer

import ptq
from ptq.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*")])
HISTORY = {"CHANGELOG.md", "log.md"}
"""Documents that speak of what was, and is no more."""


def code_blocks(text: str) -> str:
    return "\n".join(re.findall(r"```(?:\w*)\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", " ")


def shown_commands(path: Path) -> list[str]:
    """The `ptq ...` commands of a document: in its code blocks, in backticks, and in the heads of examples."""
    text = path.read_text(encoding="utf-8")
    lines = [re.sub(r"\s+#.*", "", line) for line in code_blocks(text).splitlines()]
    lines += re.findall(r"`(ptq [a-z][^`\n]*)`", text)
    if path.parent.name == "examples":
        lines += [
            line.lstrip("# ").partition("#")[0] for line in text.splitlines() if re.match(r"(#\s+| {4})ptq ", line)
        ]
    found = [re.search(r"(?:^|python -m ptq\.cli\.main |/)\s*(?:ptq )?(ptq [a-z]+.*)", line.strip()) for line in lines]
    return sorted({match[1] for match in found if match and re.match(r"ptq [a-z-]+( |$)", match[1])})


COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def parameters(name: str, words: list[str]) -> set[str] | None:
    """Options of a command; None where there is no such command."""
    command = COMMANDS.get(name)
    if command is not None and hasattr(command, "commands"):
        command = command.commands.get(words[0] if words else "")
    if command is None:
        return None
    return {"--help", "--debug"} | {o for one in command.params for o in (*one.opts, *one.secondary_opts)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_options_exist(path: Path) -> None:
    if path.name in HISTORY:
        return
    for line in shown_commands(path):
        name, *words = line.split()[1:]
        known = parameters(name, words)
        assert known is not None, f"{path.name} shows `{line}`: there is no such command"
        used = {word.partition("=")[0].rstrip(",.;)") for word in words if re.match(r"--[a-z]", word)}
        assert used <= known, f"{path.name} shows `{line}`: no option {', '.join(sorted(used - known))}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_modules_exist(path: Path) -> None:
    """Paths and dotted names in backticks, programs in code blocks, and targets of make."""
    if path.name in HISTORY:
        return
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:ptq|tests|scripts|docs|examples)/[\w./*<>-]+)`", text):
        if "<" not in name:
            assert list(ROOT.glob(name.rstrip("/"))), f"{path.name} names {name}, which does not exist"
    for name in re.findall(r"\bpython3? ((?:scripts|examples)/\S+\.py)", text):
        assert (ROOT / name).is_file(), f"{path.name} runs {name}, which does not exist"
    for dotted in re.findall(r"`(ptq(?:\.\w+)+)`", text):
        assert module_has(dotted), f"{path.name} names {dotted}, which does not exist"
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for target in re.findall(r"^\s*make (\w+)", code_blocks(text), flags=re.MULTILINE) + re.findall(
        r"`make (\w+)", text
    ):
        assert target in targets, f"{path.name} names `make {target}`, which does not exist"


def module_has(dotted: str) -> bool:
    """Whether a module, or a name in one, exists; looked up in the source where importing would be slow."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:length])
        source = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
        if source.is_file():
            rest = parts[length:]
            return not rest or re.search(rf"\b{re.escape(rest[0])}\b", source.read_text()) is not None
    return False


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.suffix == ".md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), f"{path.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs | {slug.replace("-", "") for slug in slugs}, f"{path.name} links to {target}"


def test_the_guide_shows_the_whole_way() -> None:
    shown = {line.split()[1] for line in shown_commands(ROOT / "docs" / "guide.md")}
    assert shown >= {"prompts", "calibrate", "quantize", "generate", "evaluate", "report", "package", "verify"}


def test_the_lowest_versions_that_are_promised_are_those_that_are_run() -> None:
    """What CI installs from constraints-lowest.txt is what pyproject.toml promises, version for version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["lora"]]
    promised = [one.partition(";")[0].strip().lower().split(">=") for one in wanted]
    text = (ROOT / "constraints-lowest.txt").read_text().lower()
    run = re.findall(r"^([\w-]+)==(\S+)$", text, flags=re.MULTILINE)
    versions = [{name: re.sub(r"(\.0)+$", "", version) for name, version in found} for found in (promised, run)]
    assert versions[0] == versions[1]
    assert "constraints-lowest.txt" in (ROOT / ".github/workflows/ci.yml").read_text()


def run_example(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    monkeypatch.chdir(folder)
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_example_any_module(monkeypatch, tmp_path, capsys) -> None:
    run_example("any_module.py", monkeypatch=monkeypatch, folder=tmp_path)
    output = capsys.readouterr().out
    assert re.search(r"^[1-9]\d* Linears are W4A4", output)
    assert 0 < float(output.rsplit(" ", 1)[1]) < 0.05


def test_example_quantize_language_model(monkeypatch, tmp_path, capsys) -> None:
    run_example("quantize_language_model.py", monkeypatch=monkeypatch, folder=tmp_path)
    count, losses, divergence, original, quantized = capsys.readouterr().out.splitlines()
    before, after = map(float, re.findall(r"\d\.\d+", losses))
    assert count == "14 Linears are W4A4" and before < 1.5 and abs(after - before) < 0.02
    assert 0 < float(divergence.split()[-4]) < 2e-3
    assert all(int(re.search(r"(\d+) of 64", line)[1]) >= 48 for line in (original, quantized))


def test_example_wan_video(packed, monkeypatch, tmp_path) -> None:
    run_example("wan_video.py", packed["hif4"], "a red ball rolls", monkeypatch=monkeypatch, folder=tmp_path)
    assert (tmp_path / "video.mp4").stat().st_size > 500


def test_example_lora(packed, monkeypatch, tmp_path, capsys) -> None:
    model = ptq.load_pipeline(packed["hif4"])
    for name, expert in (("high", model.transformer), ("low", model.transformer_2)):
        pairs = loras.factors(loras.block_linears(expert), std=0.05)
        loras.write(tmp_path / f"{name}.safetensors", loras.original_names(pairs, alpha=2.0))
    files = tmp_path / "high.safetensors", tmp_path / "low.safetensors"
    run_example("lora.py", packed["hif4"], *files, "a red ball rolls", monkeypatch=monkeypatch, folder=tmp_path)
    first, second, last = capsys.readouterr().out.splitlines()
    assert 0 < float(first.rsplit(" ", 1)[1]) != float(second.rsplit(" ", 1)[1]) > 0
    assert last.endswith("True")


def test_example_worst_layers(packed, monkeypatch, tmp_path, capsys) -> None:
    run_example("worst_layers.py", packed["hif4"], monkeypatch=monkeypatch, folder=tmp_path)
    lines = capsys.readouterr().out.splitlines()
    errors = [float(line.split(": ")[1].split(",")[0]) for line in lines[1:]]
    assert len(errors) == 5 and errors == sorted(errors, reverse=True)


def test_example_own_recipe() -> None:
    from ptq.config import load_recipe

    recipe = load_recipe(str(ROOT / "examples" / "own_recipe.yaml"), "hif4")
    assert recipe.scheme.transform == "hadamard" and recipe.records.hessian_tokens == 128


def test_every_example_is_run() -> None:
    """A new example needs a test here."""
    source = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{path.name}"' in source for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".yaml"))
