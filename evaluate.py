"""The paper's tables on the toy world: one command a study, saved as JSON, Markdown and PNG.

    python evaluate.py reward       VideoReward: Tables 2 and 6, Fig. 2 and 3
    python evaluate.py align        SFT, Flow-RWR and Flow-DPO: Tables 3 and 4
    python evaluate.py beta         Fig. 6, and the learned and the true score along a long run
    python evaluate.py nrg          Flow-NRG: Table 5
    python evaluate.py unified      all three on a line, where the answer is known
    python evaluate.py report       all of it as one page with curves and clips, whatever is done by then

A study is many trainings, each a job of its own whose result is kept in --work: a stopped study goes on where it was,
and a second terminal with the same command takes its share of the jobs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import evaluate_align
import evaluate_beta
import evaluate_nrg
import evaluate_reward
import evaluate_unified
import plot
import report
from common import BadInput, Parser, check_writable, pick_device, run

STUDIES = {
    "reward": evaluate_reward,
    "align": evaluate_align,
    "beta": evaluate_beta,
    "nrg": evaluate_nrg,
    "unified": evaluate_unified,
}

try:
    import fcntl
except ImportError:  # Windows: a study then runs in one terminal
    fcntl = None


# ---------------------------------------------------------------------------------------------------------------------
# Jobs: what takes time, each done once


def work_through(jobs, folder):
    """Runs `jobs`, {name: function that returns rows}; keeps the rows of each in `folder`/name.json. -> {name: rows}.

    A job that another process holds is left to it; None is returned if such jobs are not done at the end."""
    check_writable(folder, "--work")
    bar = tqdm(jobs.items(), desc=folder.name, unit="job", dynamic_ncols=True)
    for name, job in bar:
        done = folder / f"{name}.json"
        with open(folder / f"{name}.lock", "w") as lock:
            if not _took(lock) or done.exists():  # in this order: whoever held the lock may just have finished
                continue
            bar.set_postfix_str(name)
            rows = job()
            temporary = done.with_suffix(".tmp")
            temporary.write_text(json.dumps(rows))
            os.replace(temporary, done)
    if not all((folder / f"{name}.json").exists() for name in jobs):
        return None
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in jobs}


def _took(lock):
    """Whether this process could take the lock; the system gives it back when the process ends, however it ends."""
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Results


def commit():
    """The commit of the code, with "+" behind it if files differ from it; "" outside a repository."""
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
        return name.stdout.strip() + "+" * bool(changed.stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        return ""


def facts(device):
    """What a result's file says of where it came from."""
    command = " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command, "commit": commit(), "torch": torch.__version__, "device": str(device)}


def save(study, result, out, device):
    """Writes `result` {"rows", "markdown", "pictures": {name: list of Chart}} as out/study.json, .md and PNGs."""
    source = facts(device)
    note = "`{command}`, commit {commit}, torch {torch}, {device}".format(**source)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{study}.json").write_text(json.dumps({**source, "rows": result["rows"]}, indent=1) + "\n")
        (out / f"{study}.md").write_text("\n".join([*result["markdown"], "", note, ""]))
        for name, charts in result["pictures"].items():
            plot.save(out / f"{name}.png", charts)
    except OSError as error:
        raise BadInput(f"cannot write to {out}: {error.strerror}") from None


def main():
    parser = Parser("Reproduces the paper's tables on the toy world.")
    parser.add_argument("study", choices=[*STUDIES, "report"], help="what to reproduce")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row, seeds 0, 1, ...")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the tables and pictures")
    parser.add_argument("--work", type=Path, default=Path("out/evaluate"), help="folder for what is kept between runs")
    parser.add_argument("--device", default="auto", help="auto (cuda, mps, cpu) or a torch device")
    parser.add_argument("--steps", type=int, help="of each training (default: the algorithm's own)")
    parser.add_argument("--eval-prompts", type=int, help="align, beta, nrg: at most so many of each set")
    parser.add_argument("--eval-pairs", type=int, default=2000, help="reward: pairs of each split; nrg: at most 1000")
    args = parser.parse_args()
    for name in ("seeds", "eval_pairs", "eval_prompts", "steps"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be at least 1")
    device = pick_device(args.device)
    check_writable(args.out, "--out")
    if args.study == "report":
        print("\n".join(report.write(args, device, STUDIES)))
        return
    study = STUDIES[args.study]
    rows = work_through(study.jobs(args, device), args.work / study.folder(args))
    if rows is None:
        print("the other jobs are being done by another process; run the same command once more when it has ended")
        return
    result = study.report(args, [row for group in rows.values() for row in group])
    save(args.study, result, args.out, device)
    print("\n".join([*result["markdown"], "", f"wrote {args.out / args.study}.json and .md"]))


if __name__ == "__main__":
    run(main)
