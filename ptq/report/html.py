"""The page: one self-contained HTML file. Style, script, figures and videos are inside; nothing is fetched.

The content-security policy in its head forbids every request, so a mistake would show up as a missing picture, not as
traffic. All words come from the facts and are escaped by the template engine.
"""

from __future__ import annotations

import base64
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from ptq import ui
from ptq.evaluation.suites import get_suite, suite_names
from ptq.report.cells import Table, plain
from ptq.report.facts import Facts
from ptq.report.figures import Figure, draw_figures
from ptq.report.method import describe_method
from ptq.report.model_tables import checkpoint_tables, provenance_tables
from ptq.report.reproduce import reproduction
from ptq.report.tables import evaluation_tables, worst_units
from ptq.report.videos import AMPLIFY, Clip
from ptq.report.wording import headline, limitations, meaning, verdict_word
from ptq.version import __version__
from ptq.wan.variants import variant_title

_NO_RUNS = "The two generation directories are not both here, so there are no videos in this report."


def all_tables(facts: Facts) -> dict[str, Table]:
    """Every table of a report, by key, in reading order."""
    found = [*evaluation_tables(facts.evaluation), *checkpoint_tables(facts), *provenance_tables(facts)]
    if facts.evaluation.dimensions and facts.units:
        found.append(worst_units(facts))
    return {table.key: table for table in found}


def title_of(facts: Facts) -> str:
    """What the report is about."""
    if facts.evaluation.suite == "tiny":
        model = "the tiny model"
    elif facts.manifest is not None:
        model = variant_title(facts.manifest.variant)
    else:
        model = facts.evaluation.reference.model or "the original model"
    return f"{facts.format_name} W4A4 quantization of {model}"


def content(facts: Facts) -> dict[str, Any]:
    """What the page and the PDF say in the same words."""
    return {
        "version": __version__,
        "title": title_of(facts),
        "verdict": verdict_word(facts.evaluation),
        "headline": headline(facts),
        "meaning": meaning(facts),
        "key_facts": key_facts(facts),
        "warnings": facts.evaluation.warnings,
        "amplify": AMPLIFY,
        "limits": limitations(facts),
    }


def _harmless(value: Any) -> Any:
    """What a template shows: texts without control characters; finished markup as it is."""
    return ui.clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def build_html(facts: Facts, clips: list[Clip]) -> bytes:
    """The page as UTF-8. `clips` are embedded in the order given."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=_harmless
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.filters["exact"] = repr
    template = environment.from_string(read_template("report.html"))
    steps = reproduction(facts)
    recipe = ["cat > recipe.yaml <<'END'", steps.recipe.rstrip("\n"), "END"] if steps.recipe else []
    return template.render(
        style=Markup(read_template("style.css")),
        script=Markup(read_template("player.js")),
        **content(facts),
        tables=all_tables(facts),
        numeric=is_numeric,
        figures=group_figures(draw_figures(facts)),
        clips=clips,
        pairs=len(facts.pairs),
        no_clips="No videos were asked for." if facts.pairs else _NO_RUNS,
        method=describe_method(facts.manifest) if facts.manifest else [],
        commands=[*recipe, *steps.commands],
        missing=steps.missing,
    ).encode()


def read_template(name: str) -> str:
    """Text of a file in templates/."""
    return (resources.files("ptq.report") / "templates" / name).read_text(encoding="utf-8")


def is_numeric(table: Table, column: int) -> bool:
    """Whether a column holds numbers: all its cells, or all but stated gaps and words in a minority."""
    cells = [row[column] for row in table.rows]
    return column > 0 and bool(cells) and 2 * sum(bool(cell.values) for cell in cells) > len(cells)


def group_figures(figures: list[Figure]) -> dict[str, list[Figure]]:
    """Figures by the place where they go: loss, heat, sensitivity."""
    groups: dict[str, list[Figure]] = {"loss": [], "heat": [], "sensitivity": []}
    for figure in figures:
        groups["heat" if figure.key.startswith(("heat", "gain")) else figure.key].append(figure)
    return groups


def key_facts(facts: Facts) -> list[tuple[str, str]]:
    """The few facts of the first screen."""
    found = [("videos of each model", str(facts.evaluation.units)), ("prompts", str(facts.evaluation.prompts))]
    suite = get_suite(facts.evaluation.suite) if facts.evaluation.suite in suite_names() else None
    for name in suite.beside if suite else ():
        if name in facts.evaluation.informative:
            both = facts.evaluation.informative[name]
            change = f"{plain(both.reference, 3)} \u2192 {plain(both.candidate, 3)}"
            found.append((f"{name.replace('_', ' ')}, beside the verdict", change))
    if facts.manifest is not None:
        coverage, codes = facts.manifest.coverage, facts.manifest.coverage.bits_per_quantized_value
        found += [
            ("bits a weight + its basis", f"{codes:g} + {coverage.bits_with_basis - codes:.2f}"),
            ("Linear FLOPs in W4A4", f"{100 * coverage.flop_share:.1f} %"),
            ("blocks in high precision", str(len(facts.manifest.high_precision))),
        ]
        if coverage.residual_share:
            found.append(("products of residual blocks", f"+ {100 * coverage.residual_share:.1f} %"))
    return found
