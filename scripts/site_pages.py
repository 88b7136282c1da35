"""Pages of the documentation site that stand elsewhere: files of the root, and the help of every command.

mkdocs calls the functions (`hooks` in mkdocs.yml). A page of docs/ that holds `<!-- file NAME -->` becomes that file, with its
links into docs/ made right; `<!-- commands -->` becomes what `ptq COMMAND --help` prints.
"""

from __future__ import annotations

import re
from pathlib import Path

import typer
import typer.core
import typer.main

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
"""File of the root -> the page that shows it."""
COMMANDS = "<!-- commands -->"
WIDTH = 100


def on_page_markdown(markdown: str, **_: object) -> str:
    """Fill in what a page takes from elsewhere."""
    named = re.search(r"<!-- file (\S+) -->", markdown)
    if named:
        markdown = (ROOT / named[1]).read_text(encoding="utf-8").replace("](docs/", "](")
        for name, page in PAGES.items():
            markdown = markdown.replace(f"]({name})", f"]({page})")
    return markdown.replace(COMMANDS, commands()) if COMMANDS in markdown else markdown


def commands() -> str:
    """One section a command: the text of its help."""
    from ptq.cli.main import app

    return "\n\n".join(_sections(typer.main.get_group(app), "ptq"))


def _sections(group: typer.core.TyperGroup, prefix: str) -> list[str]:
    sections: list[str] = []
    from ptq.cli.help import HelpContext

    for name, command in group.commands.items():
        path = f"{prefix} {name}"
        if isinstance(command, typer.core.TyperGroup):
            sections += _sections(command, path)
            continue
        context = HelpContext(command, info_name=path, terminal_width=WIDTH, max_content_width=WIDTH)
        sections.append(f"## {path}\n\n```text\n{command.get_help(context)}\n```")
    return sections
