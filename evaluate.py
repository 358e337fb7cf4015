"""The paper's experiments on the toy world: true scores, learned scores, win rates (section 5.2).

python evaluate.py reward       VideoReward: Tables 2 and 6, Fig. 2 and 3
python evaluate.py align        SFT, Flow-RWR and Flow-DPO: Tables 3 and 4
python evaluate.py beta         Fig. 6, and the learned and the true score along a long run
python evaluate.py nrg          Flow-NRG: Table 5
python evaluate.py rank         Flow-DPO from labels, with and without a reward model
python evaluate.py online       rounds of fresh clips: Flow-DPO and DiffusionNFT
python evaluate.py unified      all three on a line, where the answer is known
python evaluate.py bench        what training steps cost in units of one of SFT
python evaluate.py report       report.html: all results and clips of every method
python evaluate.py tables       every generated table, excerpt and link in README.md and docs/
python evaluate.py read         docs/annotated.html, the core files beside their equations
python evaluate.py picture      the picture of README.md, after python train.py --algo dpo
"""

from pages import annotated
from runtime.cli import pick_device, run
from studies import bench, jobs, tables
from studies.catalogue import STUDIES
from studies.report import clips, page

PAGES = {"bench": bench, "report": page, "tables": tables, "read": annotated, "picture": clips}


def main():
    settings = jobs.settings_of((*STUDIES, *PAGES))
    settings.device = pick_device(settings.device)
    if settings.study in STUDIES:
        jobs.run(STUDIES[settings.study], settings)
    else:
        PAGES[settings.study].run(settings)


if __name__ == "__main__":
    run(main)
