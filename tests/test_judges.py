"""The frozen reference, the closing tables and the scores of clips: which row is whose, who wins.

Closing rows are sampled and scored again, step by step; stub models paint right or wrong clips."""

import pytest
import torch
import wired
from wired import CONFIG, CPU, Brightness, noticeable

import judge
import ranking
import trainer
import world
from data import Pairs, Vocabulary
from judge import alignment_table, learned_scores
from model import VideoTransformer, load_velocity
from reward import RewardConfig, VideoReward
from settings import settings_of

tiny = wired.tiny
WORDS = Vocabulary().words


def tables_of(lines):
    """{CFG: {name of the row: [VQ, MQ, TA]}} of a closing table's lines."""
    tables = {}
    for line in lines:
        if "the same noise for both" in line:
            rows = tables.setdefault(float(line.split()[-1]), {})
        elif line and line[0] not in " (" and not line.startswith("wrote"):
            rows[line[:24].strip()] = [float(number) for number in line[24:].split()]
    return tables


@torch.no_grad()
def sampled(model, x1, y, cfg):
    """Appendix C's sampler: 20 Euler steps, times shifted by 4, guidance away from no prompt."""
    x = x1
    for i in range(20):
        now, after = (4 * u / (1 + 3 * u) for u in ((20 - i) / 20, (19 - i) / 20))
        t = torch.full((len(x),), now)
        v, v_null = model(x, t, y), model(x, t, torch.zeros_like(y))
        x = x - (now - after) * (v_null + cfg * (v - v_null))
    return x


# ---------------------------------------------------------------------------------------------
# Closing tables


def test_closing_rows_are_the_base_and_the_policy_by_hand(tiny):
    settings, task = tiny("dpo", "--eval-prompts=3", "--eval-seed=77", "--freeze=0")
    noticeable(task.model, 0.1)
    tables = tables_of(trainer.fit(task, settings, CPU))
    prompts = world.split_prompts("train")[:3]
    y = Vocabulary().encode_attributes(prompts, CONFIG.max_text)
    x1 = torch.randn(3, *CONFIG.video_shape, generator=torch.Generator().manual_seed(77))
    paths = {"base": settings.init, "dpo": settings.out / "last.pt"}
    for cfg in (1.0, 2.0):
        clips = {name: sampled(load_velocity(p)[0], x1, y, cfg) for name, p in paths.items()}
        true = {name: world.oracle(clip, prompts) for name, clip in clips.items()}
        learned = {name: Brightness().normalised(clip, y) for name, clip in clips.items()}
        table = tables[cfg]
        for name, score in true.items():
            assert table[f"{name}, true score"] == pytest.approx(score.mean(0).tolist(), abs=0.011)
        for by, score in (("oracle", true), ("VideoReward", learned)):
            wins = (score["dpo"] > score["base"]) + (score["dpo"] == score["base"]) / 2
            assert table[f"dpo wins, {by}"] == pytest.approx(wins.mean(0).tolist(), abs=0.01)
    assert tables[1.0]["base, true score"] != tables[1.0]["dpo, true score"]


class Painter(torch.nn.Module):
    """A velocity that leads to a clean clip of the prompt, or to a shaky one of another prompt."""

    config = CONFIG

    def __init__(self, right=True):
        super().__init__()
        self.right = right

    def forward(self, x_t, t, y):
        texts = [Vocabulary().decode(row) or "a red circle moving left" for row in y]
        prompts = world.prompt_attributes(texts)
        if not self.right:
            prompts = (prompts + 1) % torch.tensor(world.CHOICES)
        rng, zeros = torch.Generator().manual_seed(0), torch.zeros(len(y), dtype=torch.int64)
        clips = world.draw_clips(prompts, zeros, rng, CONFIG.frames, clean=self.right)
        if not self.right:
            clips.shown, clips.severity[:] = prompts, 1.0
        return (x_t - world.render(clips, CONFIG.size)) / t.reshape(-1, 1, 1, 1, 1)


class Contrary(Brightness):
    """A VideoReward that prefers clips of little contrast, as the oracle does not."""

    def normalised(self, video, y):
        return -video.std((1, 2, 3, 4))[:, None].expand(-1, 3)


def test_who_paints_the_right_answer_wins_by_the_oracle(tiny, tmp_path, monkeypatch):
    settings, _ = tiny("dpo", "--eval-prompts=8")
    written = {}
    monkeypatch.setattr(judge, "write_gif", lambda path, rows: written.update(gif=rows))
    monkeypatch.setattr(judge, "write_sheet", lambda path, clips: written.update(sheet=clips))
    models = Painter(), tmp_path, Painter(right=False), Contrary()
    table = tables_of(alignment_table(*models, WORDS, None, settings, CPU))[1.0]
    assert table["dpo wins, oracle"] == [1] * 3 and table["dpo wins, VideoReward"] == [0] * 3
    assert table["dpo, true score"][2] > 0.95 and table["base, true score"][2] < 0.3
    prompts = world.split_prompts("train")[torch.arange(8) * 2 % 8]
    shown = [*written["gif"], written["sheet"][::2], written["sheet"][1::2]]
    right = [world.oracle(clips, prompts)[:, 2].mean() > 0.95 for clips in shown]
    assert right == [False, True] * 2  # the base above the policy


def test_pretraining_ends_with_the_share_of_right_attributes(tiny, tmp_path):
    settings, _ = tiny("pretrain", "--eval-prompts=6")
    for right in (True, False):
        lines = judge.pretrain_table(Painter(right), tmp_path, WORDS, settings, CPU)
        assert lines[0].partition(":")[2] != lines[1].partition(":")[2]  # CFG leads away
        words = lines[0].partition("right ")[2].split()
        assert words[::2] == ["colour", "shape", "direction"]
        shares = [float(share) for share in words[1::2]]
        assert shares == [1.0] * 3 if right else max(shares) < 0.5


def test_real_data_is_judged_by_videoreward_alone(tiny, tmp_path):
    settings, _ = tiny("dpo", "--eval-prompts=8", "--eval-seed=9")
    settings.data = tmp_path / "x.csv"
    y = Vocabulary().encode_attributes(world.split_prompts("train")[:4], CONFIG.max_text)
    policy, base = Painter(), Painter(right=False)
    lines = alignment_table(
        policy, tmp_path, base, Brightness(), None, Pairs(y.repeat(2, 1), None), settings, CPU
    )
    x1 = torch.randn(4, *CONFIG.video_shape, generator=torch.Generator().manual_seed(9))
    right, wrong = (
        Brightness().normalised(sampled(model, x1, y, cfg=1.0), y) for model in (policy, base)
    )
    rows = tables_of(lines)[1.0]
    assert "4 prompts" in lines[0] and "dpo wins, oracle" not in rows
    assert rows["dpo, z-score"] == pytest.approx(right.mean(0).tolist(), abs=0.006)
    assert rows["base, z-score"] == pytest.approx(wrong.mean(0).tolist(), abs=0.006)
    wins = (right > wrong).float().mean(0).tolist()
    assert rows["dpo wins, VideoReward"] == pytest.approx(wins, abs=0.006)


# ---------------------------------------------------------------------------------------------
# Scores


def test_pairs_and_samples_are_scored_by_the_checkpoints_z_scores(tiny, tmp_path, monkeypatch):
    monkeypatch.undo()  # the real load_judge
    torch.manual_seed(2)
    config = RewardConfig(frames=4, size=16, dim=24, depth=2, heads=2, vocab=CONFIG.vocab)
    reward = noticeable(VideoReward(config))
    reward.mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
    reward.std.copy_(torch.tensor([0.1, 0.5, 2.0]))
    path = wired.save(reward, "reward", tmp_path / "reward.pt")
    init = wired.save(VideoTransformer(CONFIG), "velocity", tmp_path / "base.pt")
    settings = settings_of([f"--init={init}", f"--reward={path}", "--pairs=70", "--align=1,-1,2"])
    pairs, r, loaded = ranking.ranked_clips(settings, CONFIG, WORDS, CPU)
    y, clips, _ = wired.same_pairs(settings)
    with torch.no_grad():
        z = torch.stack([(reward(clips[:, s], y) - reward.mean) / reward.std for s in (0, 1)], 1)
    assert torch.equal(pairs.y, y) and not any(p.requires_grad for p in loaded.parameters())
    assert torch.allclose(r, (z[..., 0] - z[..., 1] + 2 * z[..., 2]) / 4, atol=1e-4)


def test_learned_scores_stand_in_the_order_of_clips_and_prompts():
    videos, prompts = torch.randn(140, *CONFIG.video_shape), judge.prompt_set(140, "train")
    own = Brightness().normalised(videos, Vocabulary().encode_attributes(prompts, CONFIG.max_text))
    assert torch.allclose(learned_scores(Brightness(), WORDS, videos, prompts), own)
