"""The frozen reference, the closing tables and the studies' judgements: which row is whose, and who wins over whom.

Closing rows are sampled and scored again here, step by step; stub models paint the right answer or the wrong one, stub
rewards know one thing alone, and the studies' findings are given rows whose answer is known, both ways.
"""

import math
from argparse import Namespace
from functools import partial

import pytest
import torch
import wired
from wired import CONFIG, CPU, Brightness, noticeable

import judge
import tasks
import trainer
import world
from data import DIMENSIONS, INVALID, Pairs, Vocabulary
from judge import alignment_table, learned_scores, over_seeds, pair_scores, score_table, win_rate
from model import VideoTransformer, load_velocity
from reward import RewardConfig, VideoReward
from runtime.cli import BadInput
from settings import settings_of
from studies import align, guidance, jobs, observer, online, reward_model

tiny = wired.tiny


def rows_of_table(lines):
    """{CFG: {name of the row: [VQ, MQ, TA]}} of a closing table's lines."""
    tables = {}
    for line in lines:
        if "the same noise for both" in line:
            here = tables.setdefault(float(line.split()[-1]), {})
        elif line and line[0] != " " and not line.startswith("wrote"):
            here[line[:24].strip()] = [float(number) for number in line[24:].split()]
    return tables


def sampled(model, x1, y, cfg):
    """Appendix C's sampler written out: 20 Euler steps, times shifted by 4, guidance away from no prompt."""
    x = x1
    for i in range(20):
        now, after = (4 * u / (1 + 3 * u) for u in ((20 - i) / 20, (19 - i) / 20))
        t = torch.full((len(x),), now)
        v, v_null = model(x, t, y), model(x, t, torch.zeros_like(y))
        x = x - (now - after) * (v_null + cfg * (v - v_null))
    return x


# ---------------------------------------------------------------------------------------------
# The reference


@pytest.mark.parametrize(
    "flags", [["--freeze=0"], ["--freeze=2"], ["--lora-rank=2", "--freeze=0"], ["--lora-rank=2"]]
)
@pytest.mark.parametrize("algo", ["dpo", "sft"])
def test_the_reference_is_the_start_before_and_after_and_has_no_gradient(tiny, algo, flags):
    args, task = tiny(f"--algo={algo}", *flags)
    base, start = task.base, load_velocity(args.init)[0]

    def same():
        return all(torch.equal(v, start.state_dict()[n]) for n, v in base.state_dict().items())

    assert same() and not {id(p) for p in base.parameters()} & {
        id(p) for p in task.model.parameters()
    }
    batch = task.batch(50, slice(0, 8))
    with torch.no_grad():  # the policy starts as the reference
        x_t, t, y = batch["x1"], torch.ones(len(batch["y"])), batch["y"]
        assert torch.allclose(task.model(x_t, t, y), start(x_t, t, y), atol=1e-5)
    first = task.loss(batch)[1]
    wired.trained(args, task)
    noticeable(task.model)
    loss, last = task.loss(batch)
    loss.backward()
    assert same() and base.state_dict().keys() == start.state_dict().keys()
    assert all(p.grad is None and not p.requires_grad for p in base.parameters())
    trained = [p for p in task.model.parameters() if p.requires_grad]
    assert trained and any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    if algo == "dpo":  # its errors are as they were, the policy's are not
        assert first["drift"] == pytest.approx(0, abs=1e-9) and last["drift"] > 1e-6
        assert last["ref_error_w"] == pytest.approx(first["ref_error_w"], rel=1e-5)


# ---------------------------------------------------------------------------------------------
# The closing table


@pytest.mark.parametrize("algo", ["dpo", "rwr"])
def test_closing_rows_are_the_base_and_the_policy_by_hand(tiny, algo):
    args, task = tiny(f"--algo={algo}", "--eval-prompts=3", "--eval-seed=77", "--freeze=0")
    noticeable(task.model, 0.1)
    lines = trainer.fit(task, args, CPU)
    tables = rows_of_table(lines)
    prompts = world.split_prompts("train")[:3]
    y = Vocabulary().encode_attributes(prompts, CONFIG.max_text)
    x1 = torch.randn(3, *CONFIG.video_shape, generator=torch.Generator().manual_seed(77))
    base, policy = load_velocity(args.init)[0], load_velocity(args.out / "last.pt")[0]
    judge = Brightness()
    for cfg in (1.0, 2.0):
        with torch.no_grad():
            clips = [sampled(model, x1, y, cfg) for model in (base, policy)]
        true, learned = (
            [world.oracle(c, prompts) for c in clips],
            [judge.normalised(c, y) for c in clips],
        )
        table = tables[cfg]
        assert table["base, true score"] == pytest.approx(true[0].mean(0).tolist(), abs=0.011)
        assert table[f"{algo}, true score"] == pytest.approx(true[1].mean(0).tolist(), abs=0.011)
        for by, score in (("oracle", true), ("VideoReward", learned)):
            wins = [
                sum(
                    (p > b) + (p == b) / 2
                    for p, b in zip(*(s[:, k].tolist() for s in reversed(score)))
                )
                / 3
                for k in range(3)
            ]
            assert table[f"{algo} wins, {by}"] == pytest.approx(wins, abs=0.01)
    assert any(
        table["base, true score"] != table[f"{algo}, true score"] for table in tables.values()
    )


class Painter(torch.nn.Module):
    """A policy that knows the answer: its velocity leads straight to a clean clip of the prompt, or to a wrong one."""

    config = CONFIG

    def __init__(self, right=True):
        super().__init__()
        self.right = right

    def forward(self, x_t, t, y):
        texts = [Vocabulary().decode(row) or "a red circle moving left" for row in y]
        prompts = world.prompt_attributes(texts)
        if not self.right:
            prompts = (prompts + 1) % torch.tensor(world.CHOICES)
        rng = torch.Generator().manual_seed(0)
        clips = world.draw_clips(
            prompts, torch.zeros(len(y), dtype=torch.int64), rng, CONFIG.frames, clean=self.right
        )
        if not self.right:  # shaky and hazy, of other attributes
            clips.shown, clips.severity[:] = prompts, 1.0
        return (x_t - world.render(clips, CONFIG.size)) / t.reshape(-1, 1, 1, 1, 1)


class Contrary(Brightness):
    """A VideoReward that prefers what the oracle does not: a clip of little contrast."""

    def normalised(self, video, y):
        return -video.std((1, 2, 3, 4))[:, None].expand(-1, 3)


@pytest.mark.parametrize(
    ("policy", "base", "oracle", "learned"), [(1, 0, 1, 0), (0, 1, 0, 1), (1, 1, 0.5, 0.5)]
)
def test_who_paints_the_right_answer_wins_by_the_oracle(
    tiny, tmp_path, monkeypatch, policy, base, oracle, learned
):
    args, _ = tiny("--algo=dpo", "--eval-prompts=8")
    shown = []
    monkeypatch.setattr(judge, "write_gif", lambda path, rows: shown.extend(rows))
    monkeypatch.setattr(
        judge, "write_sheet", lambda path, rows: shown.extend((rows[::2], rows[1::2]))
    )
    lines = alignment_table(
        Painter(policy), tmp_path, Painter(base), Contrary(), Vocabulary().words, None, args, CPU
    )
    tables = rows_of_table(lines)
    assert tables[1.0]["dpo wins, oracle"] == [oracle] * 3
    assert tables[1.0]["dpo wins, VideoReward"] == [learned] * 3
    for name, right in (("dpo", policy), ("base", base)):
        scores = tables[1.0][f"{name}, true score"]
        assert (
            (scores[2] > 0.95 and scores[1] > 0.8)
            if right
            else (scores[2] < 0.3 and scores[1] < 0.4)
        )
    prompts = world.split_prompts("train")[torch.arange(8) * 2 % 8]
    above, below, *sheet = (world.oracle(clips, prompts)[:, 2].mean() > 0.95 for clips in shown)
    assert [above, below] == sheet == [base, policy]  # the base above the policy


def test_pretraining_ends_with_the_oracles_word_on_its_samples(tiny, tmp_path):
    args, _ = tiny("--algo=pretrain", "--eval-prompts=6")
    for right in (True, False):
        painted = judge.pretrain_table(Painter(right), tmp_path, Vocabulary().words, args, CPU)
        name, rest = painted[0].split("; right ")
        numbers = [float(word) for word in rest.split()[1::2]]
        assert name.startswith("CFG 1:") and rest.split()[::2] == ["colour", "shape", "direction"]
        assert numbers == [1.0] * 3 if right else max(numbers) < 0.5
        *_, probed, _ = painted
        name, _, rest = probed.partition("right ")
        assert name == "x0_hat of clean clips at t 0.8: " and rest.split()[::2] == [
            "colour",
            "shape",
            "direction",
        ]
        assert [float(word) for word in rest.split()[1::2]] == [float(right)] * 3


def test_the_probe_noises_clean_clips_to_its_t_and_asks_with_their_own_prompt():
    seen = []

    class Spy(Painter):
        def forward(self, x_t, t, y):
            seen.append((x_t, t, y))
            v = super().forward(x_t, t, y)
            return torch.where(
                (torch.arange(len(y)) < 3)[:, None, None, None, None], v, torch.zeros_like(v)
            )

    prompts = world.split_prompts("validation")
    right = judge.denoised_right(Spy(), Vocabulary().words, prompts, 0.6, 3, CPU)
    ((x_t, t, y),) = seen
    assert torch.equal(t, torch.full((12,), 0.6))
    assert torch.equal(y, Vocabulary().encode_attributes(prompts, CONFIG.max_text))
    assert (right >= 3 / 12).all() and (
        right < 1
    ).all()  # three know the answer, from the others noise is left
    # noise of variance .36 and what is left of a clip, .4 x0, of which at most the object and no defect is bright
    ground = x_t.flatten(2).median(2).values.mean().item()
    assert ground == pytest.approx(0.4 * (2 * world.GROUND - 1), abs=0.05)
    assert x_t[:, :, :, :4, :4].std().item() == pytest.approx(0.6, abs=0.1)


def test_real_data_is_judged_by_videoreward_on_base_and_policy(tiny, tmp_path):
    args, task = tiny("--algo=dpo", "--eval-prompts=8", "--freeze=0")
    y = Vocabulary().encode_attributes(world.split_prompts("train")[:4], CONFIG.max_text)
    args.data = tmp_path / "x.csv"

    class Bright(torch.nn.Module):
        config = CONFIG

        def forward(self, x_t, t, y):
            return (x_t - 0.5) / t.reshape(-1, 1, 1, 1, 1)

    class Dark(Bright):
        def forward(self, x_t, t, y):
            return (x_t + 0.5) / t.reshape(-1, 1, 1, 1, 1)

    class Still(Bright):
        def forward(self, x_t, t, y):
            return torch.zeros_like(x_t)

    lines = alignment_table(
        Still(), tmp_path, Bright(), Brightness(), None, Pairs(y, None), args, CPU
    )
    x1 = torch.randn(
        4, *CONFIG.video_shape, generator=torch.Generator().manual_seed(args.eval_seed)
    )
    noise = Brightness().normalised(x1, y).mean(0).tolist()
    assert rows_of_table(lines)[1.0]["dpo, z-score"] == pytest.approx(noise, abs=0.006)
    for policy, base, wins in (
        (Bright(), Dark(), 1.0),
        (Dark(), Bright(), 0.0),
        (Dark(), Dark(), 0.5),
    ):
        lines = alignment_table(
            policy, tmp_path, base, Brightness(), None, Pairs(y, None), args, CPU
        )
        table = rows_of_table(lines)[1.0]
        assert table["dpo wins, VideoReward"] == [wins] * 3 and "dpo wins, oracle" not in table
        assert table["dpo, z-score"][0] == pytest.approx(
            10 * (0.5 if isinstance(policy, Dark) is False else -0.5)
        )


def test_win_rates_by_hand():
    one, other = (
        torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 2.0]]),
        torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 1.0]]),
    )
    assert win_rate(one, other).tolist() == [1.0, 0.0, 0.75] and win_rate(other, one).tolist() == [
        0.0,
        1.0,
        0.25,
    ]
    lines = score_table({"base": other, "new": one}, {"base": one, "new": other})
    assert [float(n) for n in lines[-3].split()[-3:]] == [1.0, 0.0, 0.75] and "oracle" in lines[-3]
    assert [float(n) for n in lines[-2].split()[-3:]] == [
        0.0,
        1.0,
        0.25,
    ] and "VideoReward" in lines[-2]


# ---------------------------------------------------------------------------------------------
# Scores


def test_ranking_by_hand():
    total = torch.tensor([[0.0, 1.0], [5.0, 1.0], [2.0, 2.0], [3.0, 0.0]])
    pair, side = tasks.winners(total)
    assert pair.tolist() == [0, 1, 3] and side.tolist() == [1, 0, 0]  # the draw is no pair
    with pytest.raises(BadInput, match="no pair has a better clip"):
        tasks.winners(torch.ones(4, 2))


def test_pairs_and_samples_are_scored_by_the_checkpoints_own_z_scores(tiny, tmp_path, monkeypatch):
    monkeypatch.undo()  # the real load_judge
    torch.manual_seed(2)
    reward = noticeable(
        VideoReward(RewardConfig(frames=4, size=16, dim=24, depth=2, heads=2, vocab=CONFIG.vocab))
    )
    reward.mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
    reward.std.copy_(torch.tensor([0.1, 0.5, 2.0]))
    wired.save(reward, "reward", tmp_path / "reward.pt")
    wired.save(VideoTransformer(CONFIG), "velocity", tmp_path / "base.pt")
    flags = [
        f"--init={tmp_path / 'base.pt'}",
        f"--reward={tmp_path / 'reward.pt'}",
        "--pairs=70",
        "--align=1,-1,2",
    ]
    args = settings_of(flags)
    tasks.scored_toy_pairs.cache_clear()
    words = Vocabulary().words
    pairs, r, judge = tasks.ranked_clips(args, CONFIG, words, CPU)
    y, clips, _ = wired.same_pairs(args)
    with torch.no_grad():
        z = torch.stack([(reward(clips[:, s], y) - reward.mean) / reward.std for s in (0, 1)], 1)
    assert torch.allclose(r, (z[..., 0] - z[..., 1] + 2 * z[..., 2]) / 4, atol=1e-4)
    assert not any(p.requires_grad for p in judge.parameters()) and torch.equal(pairs.y, y)
    prompts = world.split_prompts("hard")
    videos = clips[:12, 0]
    with torch.no_grad():
        own = reward(videos, Vocabulary().encode_attributes(prompts, CONFIG.max_text))
    assert torch.allclose(
        learned_scores(judge, words, videos, prompts), (own - reward.mean) / reward.std, atol=1e-4
    )


def test_scores_of_a_pair_stand_in_the_order_of_its_sides():
    y = torch.zeros(70, 8, dtype=torch.int64)
    y[:, 0] = torch.arange(70)

    def clips(index, side):
        return (index + 100 * side).float().reshape(-1, 1, 1, 1, 1)

    scores = pair_scores(
        lambda v, y: torch.stack((v.flatten(), y[:, 0], -v.flatten()), 1), Pairs(y, clips), CPU
    )
    assert scores[:, 0, 0].tolist() == list(range(70)) and scores[:, 1, 0].tolist() == list(
        range(100, 170)
    )
    assert torch.equal(scores[:, 0, 1], scores[:, 1, 1]) and scores[:, 1, 1].tolist() == list(
        range(70)
    )
    videos, prompts = torch.randn(140, *CONFIG.video_shape), judge.prompt_set(140, "train")
    own = Brightness().normalised(videos, Vocabulary().encode_attributes(prompts, CONFIG.max_text))
    assert torch.allclose(learned_scores(Brightness(), Vocabulary().words, videos, prompts), own)


# ---------------------------------------------------------------------------------------------
# Studies


def judged(oracle, learned, right=(1.0, 0.0, 1.0), quality=0.25):
    scores = {"oracle": torch.tensor(oracle), "videoreward": torch.tensor(learned)}
    return {
        **scores,
        "right": torch.tensor([right] * len(oracle)),
        "quality": torch.full((len(oracle),), quality),
    }


def test_rows_count_wins_of_the_policy_over_the_base():
    policy = {"hard 1": judged([[1.0, 0.2, 0.0]] * 2, [[0.0, 3.0, 1.0], [0.0, 3.0, 0.0]])}
    base = {
        "hard 1": judged(
            [[0.0, 0.2, 1.0]] * 2, [[1.0, 1.0, 0.0], [-1.0, 1.0, 0.0]], (0, 1, 0), 0.75
        )
    }
    by_oracle, learned = jobs.rows_of(policy, base, method="x", seed=4)
    assert [by_oracle[n] for n in DIMENSIONS] == [1.0, 0.5, 0.0] and by_oracle["judge"] == "oracle"
    assert [learned[n] for n in DIMENSIONS] == [0.5, 1.0, 0.75] and learned[
        "judge"
    ] == "videoreward"
    assert [by_oracle[f"{n}_score"] for n in DIMENSIONS] == pytest.approx([1.0, 0.2, 0.0])
    assert by_oracle["set"] == "hard" and by_oracle["cfg"] == 1.0 and by_oracle["seed"] == 4
    # both base clips have all of their prompt right: at best equalled
    assert by_oracle["TA_ceiling"] == learned["TA_ceiling"] == 0.5
    assert [by_oracle[n] for n in ("colour", "shape", "direction", "quality")] == [
        1.0,
        0.0,
        1.0,
        0.25,
    ]


def test_possible_wins_in_ta_leave_out_what_the_base_has_right():
    base = {"hard 1": judged([[0.0, 0.0, ta] for ta in (1.0, 0.6, 0.3, 0.3)], [[0.0] * 3] * 4)}
    policy = {"hard 1": judged([[0.0, 0.0, ta] for ta in (1.0, 1.0, 1.0, 0.0)], [[0.0] * 3] * 4)}
    row, _ = jobs.rows_of(policy, base)
    # a draw, two wins, a defeat: 2.5 of 4; with every prompt right a draw and three wins, 3.5 of 4
    assert (
        row["TA"] == 0.625
        and row["TA_ceiling"] == 0.875
        and row["TA_share"] == pytest.approx(0.125 / 0.375)
    )


def test_best_of_n_is_what_videoreward_likes_best_of_the_first_n(monkeypatch):
    # one prompt; clips 0 to 15 have VideoReward's VQ 0, 1, ... and MQ 0, -3, -6, ...; the oracle says their number
    def clip(number):
        return {"standard 1": judged([[float(number)] * 3], [[float(number), -3.0 * number, 0.0]])}

    seeds = []

    def judge(path, args, device, sets, cfgs, seed):
        seeds.append(seed)
        assert path == jobs.WEIGHTS / "base.pt" and cfgs == (1.0,)
        return clip(len(seeds))

    monkeypatch.setattr(jobs, "judge", judge)
    monkeypatch.setattr(jobs, "base_scores", lambda *args: clip(0))
    picked = jobs.best_of(2, None, CPU, {"standard": 1}, [1.0, 0.0, 0.0])
    assert {n: scores["standard 1"]["oracle"][0, 0].item() for n, scores in picked.items()} == {
        1: 0,
        2: 1,
        4: 3,
        8: 7,
        16: 15,
    }
    assert len(set(seeds)) == 15 and min(seeds) > 10_000
    picked = jobs.best_of(3, None, CPU, {"standard": 1}, [1.0, 1.0, 0.0])
    assert len(set(seeds)) == 30  # another seed's clips are others
    assert all(scores["standard 1"]["oracle"][0, 0] == 0 for scores in picked.values())


def test_drift_is_the_mean_square_between_two_models(monkeypatch, tmp_path):
    base, words = load_velocity(jobs.WEIGHTS / "base.pt")
    monkeypatch.setattr(jobs, "DRIFT_CLIPS", 100)
    assert jobs.drift(jobs.WEIGHTS / "base.pt", CPU) == 0
    shown = {"base.pt": 0.0, "other.pt": 0.5}
    monkeypatch.setattr(
        jobs, "load_velocity", lambda path: (Constant(base.config, shown[path.name]), words)
    )
    assert jobs.drift(tmp_path / "other.pt", CPU) == 0.25
    # times as in training, of which half lie above .8, and clips that are noised by them
    assert 0.35 < (Constant.t > 0.8).float().mean() < 0.65
    assert (Constant.x_t[Constant.t > 0.9].std() > 0.85) and (
        Constant.x_t[Constant.t < 0.4].std() < 0.75
    )


class Constant(torch.nn.Module):
    """A velocity model that says the same everywhere; the class keeps what was asked last."""

    def __init__(self, config, value):
        super().__init__()
        self.config, self.value = config, value

    def forward(self, x_t, t, y):
        Constant.x_t, Constant.t = x_t, t
        return torch.full_like(x_t, self.value)


def test_a_checkpoint_is_judged_by_both_on_its_own_samples(monkeypatch):
    shown, prompts = torch.rand(4, 3, 8, 32, 32) * 2 - 1, jobs.prompts_of("hard", 4)
    marks, asked = torch.rand(4, 3), []

    def sample_prompts(model, words, prompts, seed, device):
        asked.append(model)
        return shown

    monkeypatch.setattr(jobs, "sample_prompts", sample_prompts)
    monkeypatch.setattr(jobs, "learned_scores", lambda reward, words, videos, p, device: marks)
    facts = jobs.WEIGHTS / "base.pt", Namespace(eval_prompts=4), CPU, {"hard": 4}, (1.0,)
    (scores,) = jobs.judge(*facts, lambda model, cfg: ("steered", cfg)).values()
    assert asked == [("steered", 1.0)]
    assert torch.equal(scores["videoreward"], marks)
    assert torch.equal(scores["oracle"], world.oracle(shown, prompts))
    assert torch.equal(scores["right"], (world.attributes_right(shown, prompts) > 0.5).float())


def test_cfg_is_held_against_the_base_without_it(monkeypatch):
    base = {
        "large 1": judged([[0.0] * 3], [[0.0] * 3]),
        "large 2": judged([[1.0] * 3], [[1.0] * 3]),
    }
    monkeypatch.setattr(guidance, "base_scores", lambda *args: base)
    rows = guidance.classifier_free(None, CPU)
    assert [(row["method"], row["cfg"]) for row in rows] == [("base", 1.0)] * 2 + [
        ("CFG 2, no NRG", 2.0)
    ] * 2
    assert all(
        [row[n] for n in DIMENSIONS] == [0.5] * 3 and row["VQ_score"] == 0 for row in rows[:2]
    )
    assert all([row[n] for n in DIMENSIONS] == [1.0] * 3 for row in rows[2:])


STANDARD = {"set": "standard", "cfg": 1.0, "seed": 0}


def alignment_rows(wins, quality):
    """Rows of both judges for each method, wins: {method: (VQ, MQ, TA)}; TA alone and 1:1:1 alike."""
    rows = [
        {"method": "base", "align": "", "judge": "oracle", "quality": quality["base"], **STANDARD}
    ]
    for method, values in wins.items():
        facts = {
            "method": method,
            "quality": quality[method],
            **dict(zip(DIMENSIONS, values)),
            **STANDARD,
        }
        rows += [{**facts, "align": a, "judge": by} for a in align.ALIGNED for by in align.JUDGES]
    return rows


def answers(table):
    """What the cells of each finding begin with: a list of sets of yes and no."""
    return [{cell.split(":")[0] for cell in row[1:]} & {"yes", "no"} for row in table.rows]


def test_what_is_found_of_alignment_is_what_the_rows_say():
    papers = {
        "sft": (0.5, 0.5, 0.5),
        "rwr": (0.52, 0.5, 0.5),
        "dpo-constant": (0.9, 0.8, 0.7),
        "dpo-schedule": (0.8, 0.7, 0.4),
        "dpo-own-clips": (0.9, 0.9, 0.9),
        **{f"best-of-{n}": (0.4, 0.4, 0.4) for n in jobs.BEST_OF},
    }
    quality = {"base": 0.8, **dict.fromkeys(papers, 0.7)}
    said = answers(align.findings(partial(over_seeds, alignment_rows(papers, quality)), 1))
    assert said == [{"yes"}] * 13
    against = {
        "sft": (0.9, 0.9, 0.9),
        "rwr": (0.7, 0.6, 0.7),
        "dpo-constant": (0.5, 0.4, 0.3),
        "dpo-schedule": (0.4, 0.3, 0.6),
        "dpo-own-clips": (0.4, 0.3, 0.6),
        **{f"best-of-{n}": (0.5, 0.5, 0.9) for n in jobs.BEST_OF[:-1]},
        "best-of-16": (0.95, 0.95, 0.95),
    }
    quality = {"base": 0.6, **dict.fromkeys(papers, 0.5), "rwr": 0.7}
    said = answers(align.findings(partial(over_seeds, alignment_rows(against, quality)), 1))
    assert said == [{"no"}] * 13


def reward_rows(high, low):
    """Rows of reward_model: `high` where the paper's finding wants the larger number, `low` where the smaller."""
    rows, better = (
        [],
        {
            "btt-shared": high,
            "bt-shared": low,
            "btt-separate": high,
            "oracle": 0.9,
            "regression": low,
        },
    )
    for model, value in better.items():
        for split in reward_model.SPLITS:
            row = {"model": model, "split": split, "fraction": 1.0}
            for n in DIMENSIONS:
                row |= {f"{n}_with": value, f"{n}_without": value, f"{n}_tied": 1 - value}
            rows.append(row)
    return rows


def rewards_found(high, low, bt, regression, without):
    """The answers of reward_model.findings; without: {model: (VQ, MQ, TA)} accuracies without ties."""
    rows = reward_rows(high, low)
    for row in rows:
        changed = without.get(row["model"])
        row |= {
            "seed": 0,
            **({f"{n}_without": v for n, v in zip(DIMENSIONS, changed)} if changed else {}),
        }
    curves = {
        (kind, m): [(v, 0.0)] * 3 for kind in ("with", "without") for m, v in (bt, regression)
    }
    return answers(reward_model.findings(partial(over_seeds, rows), curves, (0.01, 0.1, 1.0), 3))


def test_what_is_found_of_rewards_is_what_the_rows_say():
    # BTT above BT with ties, equal without; separate tokens above in MQ and TA, below in VQ; tied pairs closer
    fits = {"bt-shared": (0.88,) * 3, "btt-shared": (0.88,) * 3, "btt-separate": (0.87, 0.89, 0.89)}
    assert rewards_found(0.88, 0.7, ("bt-shared", 0.8), ("regression", 0.6), fits) == [{"yes"}] * 9
    worse = {"bt-shared": (0.8,) * 3, "btt-shared": (0.7,) * 3, "btt-separate": (0.75, 0.6, 0.6)}
    assert rewards_found(0.6, 0.7, ("bt-shared", 0.6), ("regression", 0.8), worse) == [{"no"}] * 9


def rounds_found(**scores):
    """The answers of studies/online.py; scores: {arm: true VQ, MQ and TA of a round}."""
    scores = {
        "base": lambda n: (0.5,) * 3,
        **{arm.replace("_", "-"): score for arm, score in scores.items()},
    }
    rows = []
    for arm, score in scores.items():
        for n in (0,) if arm == "base" else online.JUDGED:
            facts = {
                "study": "judged",
                "method": arm,
                "round": n,
                "seed": 0,
                "drift": 0.1,
                **dict.fromkeys(DIMENSIONS, 0),
            }
            facts |= {f"{name}_score": value for name, value in zip(DIMENSIONS, score(n))}
            rows += [{**facts, "judge": by} for by in online.JUDGES]
    return answers(online.report(Namespace(seeds=1), rows)["tables"][0])


def test_what_is_found_of_rounds_is_what_the_rows_say():
    def flat(value):
        return lambda n: (value,) * 3

    def falling(worse):
        return lambda n: (0.6,) * 3 if n < 20 else (0.55 - worse, 0.47 - worse, 0.55 - worse)

    good = {
        "dpo_rounds": flat(0.55),
        "dpo_refreshed": flat(0.6),
        "nft": flat(0.61),
        "nft_refreshed": flat(0.62),
    }
    assert rounds_found(dpo=flat(0.5), **good) == [{"yes"}] * 12
    bad = {
        "dpo_rounds": flat(0.7),
        "dpo_refreshed": falling(0.0),
        "nft": flat(0.6),
        "nft_refreshed": falling(0.01),
    }
    assert rounds_found(dpo=flat(0.5), **bad) == [{"no"}] * 12
    late = rounds_found(
        dpo=lambda n: (0.5 if n <= 4 else 0.59,) * 3, **good
    )  # four rounds are the default's steps
    assert [late[0], late[1], late[4], late[5]] == [{"yes"}, {"no"}, {"yes"}, {"no"}]


def test_oracle_and_random_judges_of_pairs_are_what_they_are_called(monkeypatch):
    truth = torch.tensor([[[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]]]).expand(40, 2, 3)
    label = torch.tensor([[1, -1, 0]]).expand(40, 3)
    pairs = Pairs(
        torch.zeros(40, 8), None, label=label, truth=truth, overall=torch.full((40,), INVALID)
    )
    monkeypatch.setattr(
        reward_model, "every_split", lambda args, device: {"validation": pairs, "policy": pairs}
    )
    rows = reward_model.untrained("oracle", 0, None, CPU)
    assert all(row["VQ_without"] == row["MQ_without"] == row["TA_with"] == 1.0 for row in rows)
    assert [row["split"] for row in rows] == ["validation", "policy"]
    assert all(row["VQ_ties"] == 0 and row["TA_ties"] == 1 for row in rows)
    random = [reward_model.untrained("random", seed, None, CPU)[0] for seed in range(4)]
    assert (
        all(0.1 < row["VQ_without"] < 0.9 for row in random)
        and len({row["VQ_without"] for row in random}) > 1
    )


class Colours(torch.nn.Module):
    """A noise-aware reward that knows colours alone: TA is how well the clip's colour is the prompt's."""

    config, sign, times = Namespace(max_text=8), 1, set()

    def forward(self, x_t, t, y):
        self.times.update(t.tolist())
        hue = world.measure(x_t)["colour"]  # how well each of the colours matches
        names = [text.split()[1] for text in map(Vocabulary().decode, y)]
        asked = torch.tensor([list(world.COLOURS).index(name) for name in names])
        return torch.stack(
            (torch.zeros(len(y)), -hue.sum(1), self.sign * hue[torch.arange(len(y)), asked]), 1
        )


@pytest.mark.parametrize(("sign", "colour"), [(1, 1.0), (-1, 0.0)])
def test_told_apart_is_the_share_whose_own_prompt_is_preferred(monkeypatch, tmp_path, sign, colour):
    reward = Colours()
    reward.sign, reward.times = sign, set()
    monkeypatch.setattr(guidance, "load_noisy_reward", lambda path: (reward, Vocabulary().words))
    rows = guidance.told_rows("noised", 3, Namespace(work=tmp_path, eval_pairs=36), CPU)
    assert [row["t"] for row in rows] == list(observer.TIMES) and rows[0]["variant"] == "noised"
    assert sorted(reward.times) == pytest.approx(observer.TIMES)
    assert (
        rows[0]["colour"] == colour and rows[0]["shape"] == rows[0]["direction"] == 0.0
    )  # equal is not preferred


def test_the_ideal_observer_weighs_what_it_knows_by_bayes(monkeypatch):
    # three clips of 2 numbers: red circle left, red cross left, green circle right
    known = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]).reshape(3, 2, 1, 1, 1)
    shown = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 0, 1]])
    monkeypatch.setattr(observer, "clean_clips", lambda count, splits, rng: (known, shown))
    seen, t = torch.tensor([[0.3, 0.1]]).reshape(1, 2, 1, 1, 1), torch.tensor([0.6])
    score = observer.ideal(seen, t, None)
    # p(x_t | clip) by the normal density of mean .4 clip and deviation .6
    means = ((0.4, 0.0), (0.0, 0.8), (-0.4, 0.0))
    likelihood = [math.exp(-((0.3 - a) ** 2 + (0.1 - b) ** 2) / (2 * 0.36)) for a, b in means]
    red = (likelihood[0] + likelihood[1]) / likelihood[2]
    circle = (likelihood[0] + likelihood[2]) / likelihood[1]

    def gap(a, b):
        return (score(torch.tensor([a])) - score(torch.tensor([b]))).item()

    assert gap([0, 0, 0], [1, 0, 0]) == pytest.approx(math.log(red))
    assert gap([1, 0, 0], [1, 1, 0]) == pytest.approx(math.log(circle))
    assert gap([1, 1, 0], [1, 1, 1]) == pytest.approx(math.log(red))  # left are the red ones
    assert gap([0, 0, 0], [2, 0, 0]) == math.inf  # no clip is blue


class Blocks(torch.nn.Module):
    """A base model whose hidden states are the clip itself after three blocks, and nothing before."""

    config, spread = Namespace(max_text=2), {}

    def embed(self, x_t, t, y):
        self.spread.setdefault(t[0].item(), []).append(x_t.std().item())
        video = x_t.flatten(2).transpose(1, 2)
        return torch.cat((torch.zeros(len(y), 2, video.shape[2]), video), 1), None

    def run(self, hidden, condition, first, last):
        return hidden * (last == 3)


def test_a_probe_reads_the_tokens_of_the_blocks_it_is_named_after(monkeypatch):
    monkeypatch.setattr(observer, "LEARNED", 400)
    told = {}
    for blocks in (2, 3):
        reader = partial(observer.probe, Blocks(), blocks)
        told[blocks] = observer.told_apart(reader, 0, 60)[0]
    assert told[3]["colour"] > 0.8 and told[3]["direction"] > 0.8
    assert (
        told[2]["colour"] == told[2]["shape"] == told[2]["direction"] == 0
    )  # equal is not preferred
    assert all(
        max(stds) < 1.2 * min(stds) for stds in Blocks.spread.values()
    )  # it learns at the t that it reads
