"""The report: what the studies found, what the trainings logged, and clips to look at, as one page (section 5).

    python evaluate.py report       writes report.html beside the tables, from what is there by then

Tables, findings and curves are the studies' own: a finished study is read from its JSON in --out, an unfinished one
from the jobs that lie in --work, and a study not begun is named as such. Clips are sampled here (clips.py), by
the policies that the align study kept and by the shipped weights. The page holds all it needs and loads nothing: text,
style and script come from template.html, curves are SVG (charts.py), clips are pictures in the style sheet.
"""

import argparse
import itertools
import json
import math
import re
import statistics
from html import escape
from pathlib import Path

from data import DIMENSIONS
from flow import TIME_BINS
from judge import mean_and_spread, over_seeds
from runtime.cli import BadInput
from studies import align, beta, guidance, online, rank, reward_model, unified
from studies.jobs import METHODS
from studies.report.charts import Chart, figure
from studies.report.clips import MAKERS, MEANING, gallery, sliders, two_digits

STUDIES = {
    "reward": reward_model,
    "align": align,
    "beta": beta,
    "nrg": guidance,
    "rank": rank,
    "online": online,
    "unified": unified,
}
TEMPLATE = Path(__file__).parent / "template.html"
OPEN = {"align": 2}  # tables shown at once, 1 of the other studies; the others unfold


def run(args, device):
    """Writes args.out/report.html; prints what is in it."""
    print("\n".join(write(args, device, STUDIES)))


def write(args, device, studies):
    """Writes args.out/report.html; returns lines that say what is in it."""
    found = {name: gather(name, module, args, device) for name, module in studies.items()}
    parts = {}
    for name, module in studies.items():  # first: it finds rows that lack something
        parts[f"status_{name}"], parts[f"body_{name}"] = section(name, module, found[name], args)
    parts["body_align"] = judges(found["align"]["rows"]) + parts["body_align"]
    parts |= {
        "cards": cards(found),
        "curves": training_curves(args),
        "provenance": provenance(found),
    }
    parts["key"] = "".join(
        f'<span><i class="{n.lower()}"></i>{n}, {MEANING[n]}</span>' for n in DIMENSIONS
    )
    parts |= sliders(device)
    for name in MAKERS:
        parts[f"clips_{name}"], shown = gallery(name, args, device)
        parts["sheets"] += shown
    titles = {"clips": "Clips", "steer": "Sliders", "align": "Alignment", "beta": "Beta and drift"}
    titles |= {
        "nrg": "Guidance",
        "online": "Rounds",
        "reward": "VideoReward",
        "unified": "On a line",
    }
    parts["nav"] = "".join(
        f'<li><a href="#{name}">{title}</a></li>' for name, title in titles.items()
    )
    page = re.sub(r"{{(\w+)}}", lambda match: parts[match[1]], TEMPLATE.read_text(encoding="utf-8"))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "report.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot write to {args.out}: {error.strerror}") from None
    lines = [f"{name:8} {re.sub('<[^>]*>', '', parts[f'status_{name}'])}" for name in studies]
    return [*lines, f"wrote {args.out / 'report.html'}, {len(page.encode()) / 1e6:.1f} MB"]


# ---------------------------------------------------------------------------------------------
# What is there


def gather(name, module, args, device):
    """Rows of a study and how far it is: {"rows", "done", "jobs", "place": their path, "facts": if finished}."""
    path, folder, jobs = (
        args.out / f"{name}.json",
        args.work / module.folder(args),
        module.jobs(args, device),
    )
    if path.exists():
        facts = read(path, dict)
        return {
            "rows": facts.pop("rows", []),
            "done": len(jobs),
            "jobs": len(jobs),
            "place": path,
            "facts": facts,
        }
    paths = [folder / f"{job}.json" for job in jobs]
    groups = [read(path, list) for path in paths if path.exists()]
    rows = [row for group in groups for row in group]
    return {"rows": rows, "done": len(groups), "jobs": len(jobs), "place": folder, "facts": {}}


def read(path, kind):
    """The content of a JSON file. BadInput if it is none, or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{path}: cannot be read as JSON ({error}); delete it, or run its study again"
        ) from None
    if not isinstance(content, kind):
        raise BadInput(f"{path}: not written by evaluate.py; delete it, or run its study again")
    return content


def section(name, study, found, args):
    """(status, body) of a study: its curves, what the paper finds and what is found here, its tables."""
    rows, done, jobs = found["rows"], found["done"], found["jobs"]
    if not rows:
        text = f"Not run yet. <code>python evaluate.py {name}</code> makes the tables and curves that belong here."
        return '<span class="status none">not run yet</span>', f'<p class="note">{text}</p>'
    told = re.search(
        r"--eval-pairs[= ](\d+)", found["facts"].get("command", "")
    )  # a table's title says it
    try:
        seeds = len({row["seed"] for row in rows})
        said = {"seeds": seeds, "eval_pairs": int(told[1]) if told else args.eval_pairs}
        result = study.report(argparse.Namespace(**{**vars(args), **said}), rows)
    except (KeyError, TypeError) as error:
        raise BadInput(
            f"{found['place']}: rows of another version ({error}); run the study again"
        ) from None
    charts = "".join(
        f'<div class="charts">{"".join(map(figure, here))}</div>'
        for here in result["pictures"].values()
    )
    findings = [each for each in result["tables"] if each.kind == "findings"]
    tables = [each for each in result["tables"] if each.kind != "findings"]
    shown, folded = tables[: OPEN.get(name, 1)], tables[OPEN.get(name, 1) :]
    introduction = escape(" ".join(result["introduction"]))
    body = f'{charts}<p class="soft">{introduction}</p>'
    body += "".join(f"<h3>{heading(each.title)}</h3>{table(*each)}" for each in findings + shown)
    body += "".join(
        f"<details><summary>{heading(each.title)}</summary>{table(*each)}</details>"
        for each in folded
    )
    if done == jobs:
        return f'<span class="status done">{seeds} seeds</span>', body
    return f'<span class="status part">unfinished: {done} of {jobs} jobs</span>', body


# ---------------------------------------------------------------------------------------------
# Figures and tables


def cards(found):
    """The headline figures: means and spreads over the seeds."""

    def card(title, name, note, columns):
        """columns: {label: (column, what its rows hold)}."""
        cells = {
            label: over_seeds(found[name]["rows"], column, **wanted)
            for label, (column, wanted) in columns.items()
        }
        missing = all(math.isnan(mean) for mean, _ in cells.values())
        items = "".join(
            f"<div><dt>{label}{f'<br>± {two_digits(sd)}' * (sd > 0)}</dt><dd>{two_digits(mean)}</dd></div>"
            for label, (mean, sd) in cells.items()
        )
        return f'<div class="card"><h3>{title}</h3><p>{"not run yet" if missing else note}</p><dl>{items}</dl></div>'

    def of_all(column="{}", **wanted):
        return {name: (column.format(name), wanted) for name in DIMENSIONS}

    dpo = {"method": "dpo-constant", "align": "1:1:1", "set": "standard", "cfg": 1.0}
    nrg = {"study": "weights", "method": "nrg-1:1:1", "variant": "noised", "judge": "oracle"}
    right = {"model": "btt-separate", "split": "validation", "fraction": 1.0}
    ways = {"RWR": "rwr", "DPO": "dpo-1", "NRG": "nrg-own"}
    return "".join(
        (
            card("Flow-DPO, in truth", "align", "win rate, oracle", of_all(judge="oracle", **dpo)),
            card(
                "Flow-DPO, as learned",
                "align",
                "win rate, VideoReward",
                of_all(judge="videoreward", **dpo),
            ),
            card("Flow-NRG, in truth", "nrg", "win rate, oracle, 1:1:1", of_all(**nrg)),
            card("VideoReward", "reward", "right on decided pairs", of_all("{}_without", **right)),
            card(
                "On a line",
                "unified",
                "distance to p*",
                {n: ("distance", {"method": m}) for n, m in ways.items()},
            ),
        )
    )


def heading(title):
    """A table's title; a figure that is not there yet shows as a dash."""
    return escape(title.replace("nan", "–"))


def table(title, head, rows, kind=""):
    """A table in a box that scrolls; columns named "oracle VQ", "oracle MQ" get a common head, and win rates a tint."""
    names = [tuple(name.replace("_", " ").split(" ", 1)) for name in head]
    groups = [
        (first, list(group)) for first, group in itertools.groupby(names, lambda name: name[0])
    ]
    upper, lower, wins = "", "", []
    for first, group in groups:
        if len(group) > 1 and all(len(name) == 2 for name in group):
            upper += f'<th scope="colgroup" colspan="{len(group)}">{escape(first)}</th>'
            lower += "".join(f'<th scope="col">{escape(name[1])}</th>' for name in group)
            wins += [name[1] in DIMENSIONS and first != "true" for name in group]
        else:
            upper += "".join(
                f'<th scope="col" rowspan="2">{escape(" ".join(name))}</th>' for name in group
            )
            wins += [False] * len(group)
    upper = upper if lower else upper.replace(' rowspan="2"', "")
    body = ""
    for row in rows:
        if kind == "findings" and any("nan" in text for text in row):  # it cannot be said yet
            row = [row[0], *["nan"] * (len(row) - 1)]
        cells = [
            f'<th scope="row">{escape(row[0])}</th>',
            *(cell(text, win) for text, win in zip(row[1:], wins[1:])),
        ]
        body += f"<tr>{''.join(cells)}</tr>"
    head = f"<tr>{upper}</tr>" + (f"<tr>{lower}</tr>" if lower else "")
    label = heading(title)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table: {label}"><table class="{kind}">'
        f"<thead>{head}</thead><tbody>{body}</tbody></table></div>"
    )


def cell(text, win):
    """A table cell: "0.97 ± 0.02", tinted by its distance from .50 if it is a win rate; "yes: 0.97 against 0.61"."""
    if "nan" in text:
        return '<td class="n">–</td>'
    said = re.fullmatch("(yes|no)(:.*|)", text)
    if said:
        return f'<td><span class="{said[1]}">{said[1]}</span>{escape(said[2])}</td>'
    number = re.fullmatch(r"(-?[\d.]+)(?: ± ([\d.]+))?", text)
    if not number:
        return f"<td>{escape(text)}</td>"
    spread = f" <small>± {number[2]}</small>" if number[2] else ""
    hue = ""
    if win:
        away = float(number[1]) - 0.5
        hue = f' win {"up" if away > 0 else "down"}" style="--much: {0.7 * abs(away):.3f}'
    return f'<td class="n{hue}">{number[1].replace("-", "−")}{spread}</td>'


def judges(rows):
    """The two judges side by side: for each dimension and method a line from the true win rate to the learned one."""
    figures, bottom = "", 18 + 27 * len(METHODS)
    for name in DIMENSIONS:
        marks, said = "", []
        for i, method in enumerate(METHODS):
            wanted = {"method": method, "align": "1:1:1", "set": "standard", "cfg": 1.0}
            true, learned = (
                over_seeds(rows, name, judge=by, **wanted)[0] for by in ("oracle", "videoreward")
            )
            y = 30 + 27 * i
            marks += f'<text class="name" x="0" y="{y + 4}">{method}</text>'
            if math.isnan(true):
                continue
            a, b = (96 + 150 * value for value in (true, learned))
            marks += f'<line class="gap" x1="{a:.1f}" x2="{b:.1f}" y1="{y}" y2="{y}"/>'
            marks += f'<circle class="hollow" cx="{b:.1f}" cy="{y}" r="4.5"/>'
            marks += f'<circle class="full" cx="{a:.1f}" cy="{y}" r="5"/>'
            marks += f'<text class="true" x="262" y="{y + 4}">{two_digits(true)}</text>'
            marks += f'<text class="learned" x="308" y="{y + 4}">{two_digits(learned)}</text>'
            said.append(f"{method}: oracle {two_digits(true)}, VideoReward {two_digits(learned)}")
        if not said:
            return ""
        scale = "".join(
            f'<line class="{kind}" x1="{x}" x2="{x}" y1="18" y2="{bottom}"/>'
            f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{value}</text>'
            for x, value, kind in ((96, "0", "grid"), (171, "0.5", "level"), (246, "1", "grid"))
        )
        heads = '<text class="true" x="262" y="12">oracle</text><text class="learned" x="308" y="12">learned</text>'
        label = escape(f"Win rates over the base model in {name}. " + "; ".join(said))
        figures += (
            f'<figure class="judges"><figcaption>{name}: win rate, in truth and as learned</figcaption>'
            f'<svg viewBox="0 0 346 {bottom + 22}" role="img" aria-label="{label}">{scale}{heads}{marks}</svg></figure>'
        )
    text = "Standard prompts, CFG 1, aligned 1:1:1. ● the oracle, ○ VideoReward: a long line is where the two judges part."
    return f'<p class="soft">{text}</p><div class="charts">{figures}</div>'


def provenance(found):
    rows = []
    for name, here in found.items():
        facts = here["facts"]
        if facts:
            rows.append(
                [
                    name,
                    *(str(facts.get(key, "")) for key in ("command", "commit", "torch", "device")),
                ]
            )
        elif here["rows"]:
            rows.append([name, f"unfinished: {here['done']} of {here['jobs']} jobs", "", "", ""])
    if not rows:
        return "<p>No study has been run yet.</p>"
    return table(
        "where the figures come from", ["study", "command", "commit", "torch", "device"], rows
    )


# ---------------------------------------------------------------------------------------------
# Curves of the trainings


def training_curves(args):
    """What the align study's trainings logged, 1:1:1, as charts."""
    runs = {method: logged(args.work / "align", f"{method}-111-", args.seeds) for method in METHODS}
    dpo = {method: here for method, here in runs.items() if method.startswith("dpo")}
    charts = []
    for method, here in dpo.items():
        quarters = {
            f"t {i / TIME_BINS:g} to {(i + 1) / TIME_BINS:g}": f"loss/t{i}"
            for i in range(TIME_BINS)
        }
        series = [curve(name, here, column) for name, column in quarters.items()]
        charts.append(Chart(f"{method}: loss by time", series, "step", "loss", level=math.log(2)))
    for title, column, level in (
        ("implicit accuracy", "accuracy", 0.5),
        ("margin", "margin", 0.0),
        ("drift from the reference", "drift", None),
    ):
        charts.append(
            Chart(
                title,
                [curve(m, here, column) for m, here in dpo.items()],
                "step",
                column,
                level=level,
            )
        )
    for method, here in dpo.items():
        series = [
            curve(side, here, f"error_{side[0]}", f"ref_error_{side[0]}")
            for side in ("winner", "loser")
        ]
        charts.append(
            Chart(f"{method}: error over the reference's", series, "step", "mean square", level=0.0)
        )
    series = [curve(method, runs[method], "error") for method in ("sft", "rwr")]
    charts.append(Chart("SFT and RWR", series, "step", "flow-matching error"))
    drawn = "".join(map(figure, charts))
    missing = '<p class="note">No training has been logged yet. <code>python evaluate.py align</code> does.</p>'
    return f'<div class="charts">{drawn}</div>' if drawn else missing


def logged(folder, name, seeds):
    """The logs of finished runs folder/name0, name1, ...: a list of rows for each. BadInput for a damaged one."""
    logs = []
    for path in (folder / f"{name}{seed}" / "metrics.jsonl" for seed in range(seeds)):
        if path.exists() and path.with_name("last.pt").exists():
            try:
                logs.append([json.loads(line) for line in path.read_text().splitlines()])
            except ValueError as error:
                raise BadInput(
                    f"{path}: not a training's log ({error}); run the study again"
                ) from None
    return logs


def curve(name, runs, column, less=None, windows=20):
    """A series of a Chart: medians over windows of steps, then mean and spread over the runs. less: a column that is
    taken away."""
    length = max(map(len, runs), default=0)
    size = max(1, length // windows)
    xs, points = [], []
    for start in range(0, length, size):
        values = [
            [r[column] - r.get(less, 0.0) for r in run[start : start + size] if column in r]
            for run in runs
        ]
        if any(values):
            xs.append(start + size // 2)
            points.append(mean_and_spread([statistics.median(here) for here in values if here]))
    return name, xs, [mean for mean, _ in points], [sd for _, sd in points]
