"""The commands of README and guide run as they stand, in their order, on small models under the names that they use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from shown import NOT_RUN, ROOT, first_view, is_run, run, shown, text_of

DOCUMENTS = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")))


def chains() -> dict[str, list[str]]:
    """Commands that go on with each other's results: those of the README, of the guide's first view, of the whole guide."""
    sections = text_of("docs/guide.md").partition("\n## ")[2]
    found = {"readme": shown(text_of("README.md")), "view": first_view(), "guide": shown(sections)}
    return {name: list(filter(is_run, lines)) for name, lines in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("chain", ["readme", "guide"])
def test_commands_run_as_they_are_shown(here: Path, chain: str) -> None:
    for line in chains()[chain]:
        assert run(line) == 0, line


def test_the_first_view_ran(viewed: Path) -> None:
    outs = [line.rpartition(" --out ")[2] for line in chains()["view"] if " --out " in line]
    assert len(outs) >= 4 and all((viewed / out).is_dir() for out in outs)


def test_every_command_is_run_or_said_not_to_be() -> None:
    run = {line for lines in chains().values() for line in lines}
    found = [line for name in DOCUMENTS for line in shown(text_of(name))]
    assert len(run) > 15 and [line for line in found if is_run(line) and line not in run] == []
    for beginning, reason in NOT_RUN.items():
        assert any(f"{line}\n".startswith(beginning) for line in found), f"no document shows {beginning}"
        for path in re.findall(r"(?:tests|docs|\.github)/[\w./]+\w", reason):
            assert (ROOT / path).is_file(), path
