"""The report as one page: results of the studies and clips to look at.

    python evaluate.py report       writes report.html to --out

Tables and charts come from the JSON files in --out, or from the shipped ones in results/. Clips are
sampled from the policies that the studies left in --work; where one is missing, its row is taken
from the page before, at first the shipped one. The page needs nothing else."""

import re
from base64 import b64encode
from html import escape
from pathlib import Path

from data import DIMENSIONS
from runtime.cli import check_writable
from studies.catalogue import ROOT, STUDIES
from studies.jobs import load_result, settings_of
from studies.report import clips
from studies.report.charts import picture
from studies.tables import summary
from world import prompt_text

TEMPLATE = Path(__file__).parent / "template.html"
MEANING = dict(zip(DIMENSIONS, ("visual quality", "motion quality", "text alignment")))
OPEN_TABLES = 1  # of each study; the others unfold


def run(settings):
    check_writable(settings.out, "--out")
    shipped = ROOT / "results"
    parts, sources, lines = {}, [], []
    for name, study in STUDIES.items():
        path = settings.out / f"{name}.json"
        if not path.exists():
            path = shipped / f"{name}.json"
            lines.append(f"{name}: as shipped, since {settings.out / f'{name}.json'} is missing")
        saved = load_result(path)
        result = study.report(settings_of(saved["command"].split()[2:]), saved["rows"])
        parts[name] = section(result)
        sources.append([name, *(saved[key] for key in ("command", "commit", "torch", "device"))])
    head = ["study", "command", "commit", "torch", "device"]
    parts["sources"] = html_table("Origin of the results", head, sources)
    parts["summary"] = html_table("Win rates over the base model", *summary()[1:])
    parts["meaning"] = "".join(
        f'<span><i class="{n.lower()}"></i>{n}, {text}</span>' for n, text in MEANING.items()
    )
    heads = [f'<th scope="col">{prompt_text(prompt)}</th>' for prompt in clips.PROMPTS]
    parts["prompts"] = "".join(heads[: clips.COLUMNS])
    parts["slider_prompts"] = "".join(heads[: clips.SLIDER_COLUMNS])

    page = settings.out / "report.html"
    before = page if page.exists() else shipped / "report.html"
    text_before = before.read_text(encoding="utf-8") if before.exists() else ""
    rows, more_lines = clips.gallery(settings, text_before)
    steered, choices = clips.steered_rows(settings)
    parts["clips"] = "\n".join([*rows, steered])
    parts["choices"] = "\n".join(choices)
    parts["sliders"] = "".join(map(slider, DIMENSIONS))

    template = TEMPLATE.read_text(encoding="utf-8")
    text = re.sub(r"{{(\w+)}}", lambda match: parts[match[1]], template)
    page.write_text(text, encoding="utf-8")
    print("\n".join([*lines, *more_lines, f"wrote {page}, {len(text.encode()) / 1e6:.1f} MB"]))


def section(result):
    """Charts, introduction and tables of a study's report."""
    figures = []
    for chart in [chart for charts in result["pictures"].values() for chart in charts]:
        url = f"data:image/svg+xml;base64,{b64encode(picture([chart]).encode()).decode()}"
        names = ", ".join(series.name for series in chart.series)
        label = escape(f"{chart.title}: {chart.y} by {chart.x}, for {names}")
        figures.append(f'<img src="{url}" alt="{label}">')
    body = [f'<div class="charts">{"".join(figures)}</div>'] if figures else []
    body.append(f"<p>{escape(' '.join(result['introduction']))}</p>")
    for i, table in enumerate(result["tables"].values()):
        title = escape(table.title)
        text = html_table(*table)
        if i < OPEN_TABLES:
            body.append(f"<h3>{title}</h3>{text}" if title else text)
        else:
            body.append(f"<details><summary>{title}</summary>{text}</details>")
    return "\n".join(body)


def html_table(title, head, rows):
    """A table in a box that scrolls."""
    lines = ["".join(f'<th scope="col">{escape(name)}</th>' for name in head)]
    for cells in rows:
        texts = [escape("–" if cell == "nan" else cell) for cell in cells]
        lines.append(
            f'<th scope="row">{texts[0]}</th>' + "".join(f"<td>{t}</td>" for t in texts[1:])
        )
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    label = escape(title or "Results")
    box = f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
    return f"{box}<table>{body}</table></div>"


def slider(name):
    low, _, high = clips.STEPS
    value = f'<b aria-hidden="true">{high}</b>'
    label = f'<label for="w{name}"><span>{name}, {MEANING[name]}</span> {value}</label>'
    bounds = f'min="{low}" max="{high}" step="{high}" value="{high}"'
    return f'<div class="{name.lower()}">{label}<input id="w{name}" type="range" {bounds}></div>'
