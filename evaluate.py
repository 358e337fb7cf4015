"""Two models on the same prompts and noise: true scores, learned scores, win rates (paper, section 5.2, "automatic").

python evaluate.py reward       VideoReward: Tables 2 and 6, Fig. 2 and 3
python evaluate.py align        SFT, Flow-RWR and Flow-DPO: Tables 3 and 4
python evaluate.py beta         Fig. 6, and the learned and the true score along a long run
python evaluate.py nrg          Flow-NRG: Table 5
python evaluate.py rank         Flow-DPO from labels, with and without a reward model
python evaluate.py online       rounds of fresh clips, with VideoReward frozen or refreshed; DiffusionNFT
python evaluate.py unified      all three on a line, where the answer is known
python evaluate.py bench        every performance ratio beside its floor
python evaluate.py report       all of it as one page with curves and clips, whatever is done by then
python evaluate.py tables       writes the tables of README.md and docs/ from results/*.json
python evaluate.py read         writes docs/annotated.html, the core files beside their equations
"""

from pages import annotated
from runtime.cli import check_writable, pick_device, run
from studies import align, bench, beta, guidance, jobs, online, rank, reward_model, tables, unified
from studies.report import page

STUDIES = {
    "reward": reward_model,
    "align": align,
    "beta": beta,
    "nrg": guidance,
    "rank": rank,
    "online": online,
    "unified": unified,
    "bench": bench,
    "report": page,
    "tables": tables,
    "read": annotated,
}


def main():
    args = jobs.arguments()
    device = pick_device(args.device)
    check_writable(args.out, "--out")
    module = STUDIES[args.study]
    if hasattr(module, "jobs"):
        jobs.run(module, args, device)
    else:
        module.run(args, device)


if __name__ == "__main__":
    run(main)
