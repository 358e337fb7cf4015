"""--rank labels: alignment straight from people's labels."""

import csv

import pytest
import torch
import wired

import ranking
import tasks
from data import INVALID
from real_data import export_toy
from real_data.dataset import label_rewards
from runtime.cli import BadInput
from settings import settings_of

tiny = wired.tiny
A, B, SAME = 1, -1, 0


@pytest.mark.parametrize(
    ("label", "align", "reward_of_a"),
    [
        ((A, A, B), (1, 1, 1), 1 / 3),
        ((A, A, B), (0, 0, 1), -1),
        ((A, A, B), (1, 1, 2), 0),
        ((A, A, B), (0.1, 0.2, 0.3), 0),
        ((A, SAME, B), (1, 1, -1), 2 / 3),
        ((INVALID, A, SAME), (1, 1, 1), 1 / 3),  # an invalid dimension adds nothing
        ((A, INVALID, SAME), (0, 1, 0), None),
        ((INVALID, INVALID, INVALID), (1, 1, 1), None),
    ],
)
def test_the_winner_of_a_pair_by_hand(label, align, reward_of_a):
    r = label_rewards(torch.tensor([label]), torch.zeros(1, 2, 3), align)
    if reward_of_a is None:
        assert r.isnan().all()
    else:
        assert torch.allclose(r, torch.tensor([[1.0, -1.0]]) * reward_of_a)
    if not reward_of_a:  # a tie or nothing: no pair
        with pytest.raises(BadInput, match="no pair has a better clip"):
            ranking.winners(r)
    else:
        pair, side = ranking.winners(r)
        assert pair.tolist() == [0] and side.tolist() == [0 if reward_of_a > 0 else 1]


def test_ratings_stand_in_for_labels_where_there_are_any():
    """VQ ratings 2, 4, 2, 4 have mean 3 and spread 1; the third pair has none, the fourth nothing."""
    label = torch.tensor([[B, A, A], [A, A, A], [A, B, A], [INVALID, A, A]])
    mos = torch.zeros(4, 2, 3)
    mos[0, :, 0] = torch.tensor([2.0, 4.0])
    mos[1, :, 0] = torch.tensor([2.0, 4.0])
    r = label_rewards(label, mos, (2, 0, 0), ratings=True)
    assert torch.allclose(r[:3], torch.tensor([[-1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]]))
    assert r[3].isnan().all()


def test_labels_rank_the_clips_that_the_reward_would(tiny, monkeypatch):
    _, by_reward = tiny("--algo=sft", "--align=0,1,0")
    monkeypatch.setattr(ranking, "load_judge", None)  # no reward model is loaded
    args, _ = tiny("--algo=sft", "--rank=labels", "--align=0,1,0")
    pairs, r, _ = ranking.ranked_clips(args, wired.CONFIG, wired.Vocabulary().words, wired.CPU)
    y, clips, _ = wired.same_pairs(args)
    assert torch.equal(pairs.y, y)
    assert torch.equal(torch.stack(pairs.sides(torch.arange(len(y))), 1), clips)
    assert torch.equal(r[:, 0] - r[:, 1], 2.0 * pairs.label[:, 1])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with train.csv, eight toy pairs, and turned.csv, the same with its labels turned."""
    folder = tmp_path_factory.mktemp("labels") / "toy"
    export_toy.export(export_toy.arguments([str(folder), "--generated=0", "--pairs=8"]))
    with open(folder / "train.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {name: {"A": "B", "B": "A"}.get(row[name], row[name]) for name in ("VQ", "MQ", "TA")}
    with open(folder / "turned.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def task_on(path, tmp_path, *flags):
    flags = [*flags, f"--data={path}", f"--cache={tmp_path}", "--batch=8", "--device=cpu"]
    args = settings_of(flags)
    return tasks.TASKS[args.algo](args, wired.CPU)


def test_labels_turned_round_turn_the_run_round(exported, tmp_path, capsys):
    def first_batch(name, rank):
        task = task_on(exported / name, tmp_path, "--algo=dpo", f"--rank={rank}")
        return task.batch(0, slice(0, 8))

    honest, turned = first_batch("train.csv", "labels"), first_batch("turned.csv", "labels")
    assert torch.equal(honest["x0_w"], turned["x0_l"]) and torch.equal(
        honest["x0_l"], turned["x0_w"]
    )
    assert not torch.equal(honest["x0_w"], turned["x0_w"])
    assert "not used" not in capsys.readouterr().out
    honest, turned = first_batch("train.csv", "reward"), first_batch("turned.csv", "reward")
    assert torch.equal(honest["x0_w"], turned["x0_w"])
    assert "the labels of --data are not used" in capsys.readouterr().out


def test_regression_weights_every_clip_that_people_rated(exported, tmp_path):
    task = task_on(exported / "train.csv", tmp_path, "--algo=rwr", "--rank=labels")
    batch = task.batch(0, slice(0, 8))  # 16 clips are all there are
    assert len(batch["x0"].flatten(1).unique(dim=0)) == 16
    assert batch["weight"].mean().item() == pytest.approx(1)
    lines = task.evaluate(task.model, tmp_path)
    assert len(lines) == 1 and "no closing table" in lines[0] and "--reward" in lines[0]


@pytest.mark.parametrize(
    "flags", ["--algo=reward", "--algo=nft", "--algo=dpo --rounds=2 --steps=4"]
)
def test_labels_rank_nothing_where_there_are_none(flags):
    with pytest.raises(BadInput, match="--rank: "):
        settings_of([*flags.split(), "--rank=labels"])
