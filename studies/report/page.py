"""The report as one page: results of the studies and clips to look at.

    python evaluate.py report       writes report.html to --out

Tables and charts come from the JSON files in --out. Clips are sampled from the policies that the
studies left in --work; where one is missing, its row is taken from the page before. The page needs
nothing else."""

import json
import re
from base64 import b64encode
from html import escape
from pathlib import Path

from data import DIMENSIONS
from runtime.cli import check_writable
from studies.catalogue import STUDIES
from studies.jobs import report_of, source_line
from studies.report import clips
from studies.report.charts import picture
from world import prompt_text

TEMPLATE = Path(__file__).parent / "template.html"
MEANING = dict(zip(DIMENSIONS, ("visual quality", "motion quality", "text alignment")))


def run(settings):
    check_writable(settings.out, "--out")
    parts = dict.fromkeys(("summary", *STUDIES), "")
    for name, study in STUDIES.items():
        path = settings.out / f"{name}.json"
        if not path.exists():
            continue
        saved = json.loads(path.read_text(encoding="utf-8"))
        report = report_of(study, saved)
        parts[name] = section(report, source_line(saved))
        if name == "align":
            parts["summary"] = html_table(report.tables["align"])
    parts["meaning"] = "".join(
        f'<span><i class="{n.lower()}"></i>{n}, {text}</span>' for n, text in MEANING.items()
    )
    prompts = clips.PROMPTS[: clips.COLUMNS]
    parts["prompts"] = "".join(f'<th scope="col">{prompt_text(prompt)}</th>' for prompt in prompts)

    page = settings.out / "report.html"
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    parts["clips"] = "\n".join(clips.rows(settings, before))

    template = TEMPLATE.read_text(encoding="utf-8")
    text = re.sub(r"{{(\w+)}}", lambda match: parts[match[1]], template)
    page.write_text(text, encoding="utf-8")
    print(f"wrote {page}, {len(text.encode()) / 1e6:.1f} MB")


def section(report, source):
    """Charts, introduction and tables of a study's report; the tables but the first unfold."""
    figures = []
    for chart in [chart for charts in report.pictures.values() for chart in charts]:
        url = f"data:image/svg+xml;base64,{b64encode(picture([chart]).encode()).decode()}"
        names = ", ".join(series.name for series in chart.series)
        label = escape(f"{chart.title}: {chart.y} by {chart.x}, for {names}")
        figures.append(f'<img src="{url}" alt="{label}">')
    body = [
        f'<div class="charts">{"".join(figures)}</div>',
        f"<p>{escape(report.introduction)}</p>",
    ]
    first, *others = report.tables.values()
    body += [f"<h3>{escape(first.title)}</h3>", html_table(first)]
    for table in others:
        body.append(
            f"<details><summary>{escape(table.title)}</summary>{html_table(table)}</details>"
        )
    return "\n".join([*body, f"<p><small>{escape(source)}</small></p>"])


def html_table(table):
    """A table in a box that scrolls."""
    lines = ["".join(f'<th scope="col">{escape(name)}</th>' for name in table.head)]
    for first, *others in table.rows:
        cells = "".join(f"<td>{escape(text)}</td>" for text in others)
        lines.append(f'<th scope="row">{escape(first)}</th>{cells}')
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    box = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}">'
    return f"{box}<table>{body}</table></div>"
