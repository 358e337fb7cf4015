"""The studies by name, and where their results lie."""

from pathlib import Path

from studies import align, beta, hacking, nrg, online, rank, reward_model, unified

ROOT = Path(__file__).resolve().parents[1]
STUDIES = {
    "reward": reward_model,
    "align": align,
    "beta": beta,
    "nrg": nrg,
    "rank": rank,
    "online": online,
    "hacking": hacking,
    "unified": unified,
}
