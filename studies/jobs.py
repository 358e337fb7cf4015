"""What the studies share: settings, jobs that are each done once, and results.

A study is a module with two functions:

    jobs(settings)    {name: function without arguments -> rows}; a row is a dict of facts and
                      figures, for example {"method": "sft", "seed": 0, "VQ": 0.87}
    report(rows)      a Report, its tables and charts; rows are with_means

The rows of each job are cached in --work, so a stopped study resumes, and a second terminal with
the same command takes its share of the jobs."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import world
from data import DIMENSIONS
from flags import Parser, flag, parse, positive_int
from runtime import resume
from runtime.cli import BadInput, check_writable
from runtime.device import has_bf16
from studies.report.charts import picture
from studies.report.tables import markdown

try:
    import fcntl
except ImportError:  # Windows: a study then runs in one terminal
    fcntl = None


@dataclass
class Settings:
    """evaluate.py"""

    study: str = ""
    seeds: int = flag(3, "runs of each row, with seeds 0, 1, ...", positive_int)
    out: Path = flag(Path("results"), "folder of the tables and pictures", Path)
    work: Path = flag(Path("out/evaluate"), "folder of checkpoints and finished jobs", Path)
    device: str = flag("auto", "auto (cuda, mps, cpu) or a torch device")
    steps: int = flag(None, "steps of each training (default: its own)", positive_int)
    eval_prompts: int = flag(None, "at most this many prompts of each set", positive_int)
    eval_pairs: int = flag(2000, "pairs that judge a reward", positive_int)
    check: bool = flag(False, "tables: write nothing, fail if one is outdated")

    def folder(self, study):
        """Where the jobs and checkpoints of a study with these settings are cached."""
        sizes = self.steps or "default", self.eval_prompts or "all", self.eval_pairs
        return self.work / "-".join(map(str, (study, *sizes)))


def settings_of(studies):
    """Settings from the command line, which names one of `studies`."""
    chooser = Parser("Reproduces the paper's tables on the toy world.", add_help=False)
    chooser.add_argument("study", choices=studies, nargs="?")
    chosen, rest = chooser.parse_known_args()
    settings, unknown = parse(Settings, rest)
    if not chosen.study:
        raise BadInput(f"what to do is missing: {', '.join(studies)}")
    if unknown:
        raise BadInput(f"{unknown[0]}: no such flag; --help lists them")
    settings.study = chosen.study
    return settings


# ---------------------------------------------------------------------------------------------
# Jobs


def work_through(jobs, folder):
    """Runs `jobs`, {name: function -> rows}, and saves the rows of each as folder/name.json -> all
    rows, or None if another process still works on one of the jobs."""
    check_writable(folder, "--work")
    bar = tqdm(jobs.items(), desc=folder.name, unit="job", dynamic_ncols=True)
    for name, job in bar:
        path = folder / f"{name}.json"
        with open(folder / f"{name}.lock", "w") as lock:
            # the lock first: its last holder may have just written the rows
            if not locked(lock) or path.exists():
                continue
            bar.set_postfix_str(name)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(job()))
            os.replace(temporary, path)
    paths = [folder / f"{name}.json" for name in jobs]
    if not all(path.exists() for path in paths):
        return None
    return [row for path in paths for row in json.loads(path.read_text())]


def locked(file):
    """Takes a file's lock, which ends with the process -> whether it was free."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def run(study, settings):
    """Does the jobs of a study, and writes its tables and pictures once all are done."""
    check_writable(settings.out, "--out")
    rows = work_through(study.jobs(settings), settings.folder(settings.study))
    if rows is None:
        print("another process works on the other jobs; run this command again when it has ended")
        return
    saved = {**facts(settings.device), "rows": rows}
    path = settings.out / f"{settings.study}.json"
    path.write_text(json.dumps(saved, indent=1) + "\n")
    files = rendered(study, settings.study, saved)
    for name, text in files.items():
        (settings.out / name).write_text(text)
    print(files[f"{settings.study}.md"], f"\nwrote {path} and .md")


# ---------------------------------------------------------------------------------------------
# Results


def facts(device):
    """What the file of a result says about its origin."""
    command = " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    precision = "with bfloat16" if has_bf16(device) else "without bfloat16"
    machine = {"torch": torch.__version__, "device": f"{device}{name} {precision}"}
    return {"command": command, "commit": resume.commit(), **machine}


def source_line(saved):
    return "{command}, commit {commit}, torch {torch}, {device}".format(**saved)


def report_of(study, saved):
    return study.report(with_means(saved["rows"]))


def rendered(study, name, saved):
    """{file name: text}: the Markdown page of a study's result, and an SVG for each picture."""
    report = report_of(study, saved)
    files = {f"{name}.md": "\n".join([*markdown(report), source_line(saved), ""])}
    for picture_name, charts in report.pictures.items():
        files[f"{picture_name}.svg"] = picture(charts)
    return files


def with_means(rows):
    """Rows of policies with means over VQ, MQ and TA: of win rates, of scores, and of z-scores. The
    z-scores of VideoReward are its scores; those of the oracle use the spread of rendered clips."""
    extended = []
    for row in rows:
        if "VQ_score" in row:
            scores = torch.tensor([row[f"{name}_score"] for name in DIMENSIONS]).double()
            z = scores
            if row["judge"] == "oracle":
                z = (scores - world.TRUE_MEAN) / world.TRUE_STD
            wins = sum(row[name] for name in DIMENSIONS) / 3
            row = row | {"wins": wins, "score": scores.mean().item(), "z": z.mean().item()}
        extended.append(row)
    return extended
