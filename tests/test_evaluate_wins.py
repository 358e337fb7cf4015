"""Win rates, prompt sets, and pairs ranked by a reward."""

import pytest
import torch

import train
import world
from data import TOY_WORDS, Vocabulary
from evaluate import prompt_set, sample_prompts, score_table, win_rate
from model import ModelConfig, VideoTransformer
from real_data.toy_pairs import toy_pairs
from runtime.cli import BadInput

CONFIG = ModelConfig(vocab=len(TOY_WORDS))


def test_win_rate_counts_a_draw_as_one_half():
    model = torch.tensor([[1.0, 0.0, 5.0], [2.0, 0.0, 5.0], [0.0, 0.0, 5.0], [3.0, 1.0, 5.0]])
    base = torch.tensor([[0.0, 0.0, 9.0], [2.0, 0.0, 9.0], [1.0, 0.0, 9.0], [2.0, 0.0, 9.0]])
    assert win_rate(model, base).tolist() == [0.625, 0.625, 0.0]  # (1 + 1/2 + 0 + 1) / 4, (1/2 * 3 + 1) / 4, 0


def test_prompt_set_goes_round():
    prompts = prompt_set(30, "hard")
    assert torch.equal(prompts[:12], world.split_prompts("hard")) and torch.equal(prompts[12:24], prompts[:12])


def test_same_seed_same_noise_for_every_model():
    config = ModelConfig(frames=4, size=16, dim=32, depth=1, heads=2, vocab=len(TOY_WORDS))
    torch.manual_seed(0)
    one, two = VideoTransformer(config), VideoTransformer(config)
    two.load_state_dict(one.state_dict())
    prompts = prompt_set(3, "train")
    clips = [sample_prompts(model, TOY_WORDS, prompts, seed, steps=2) for model, seed in ((one, 1), (two, 1), (two, 2))]
    assert torch.equal(clips[0], clips[1]) and not torch.equal(clips[1], clips[2])


def test_table_shows_scores_of_all_and_wins_over_the_first():
    base, model = torch.zeros(4, 3), torch.tensor([[1.0, -1.0, 0.0]]).expand(4, 3)
    lines = score_table(("base", "aligned"), (base, model), (model, base))
    assert lines[2].split()[-3:] == ["1.00", "-1.00", "0.00"]
    assert lines[3].split()[-3:] == ["1.00", "0.00", "0.50"]  # by the oracle
    assert lines[4].split()[-3:] == ["0.00", "1.00", "0.50"]  # by VideoReward


class Judge(torch.nn.Module):
    """A reward that likes bright clips, all three scores alike; clips of the same brightness get the same reward."""

    def normalised(self, video, y):
        return (video.flatten(1).mean(1, keepdim=True) * 20).round().expand(-1, 3)


class Oracle(Judge):
    def normalised(self, video, y):
        prompts = [" ".join(TOY_WORDS[i] for i in row if i) for row in y.tolist()]
        return (world.oracle(video, prompts) - world.TRUE_MEAN) / world.TRUE_STD


@pytest.fixture
def ranked_clips(monkeypatch):
    """(judge, count) -> winners and losers by `judge` of toy pairs: (videos, prompts, generators) each."""

    def ranked(judge, count):
        monkeypatch.setattr(train, "load_judge", lambda path, config, words: judge)
        label = train.scored_toy_pairs.__wrapped__
        pairs, scores, _ = label(count, 0, CONFIG, tuple(TOY_WORDS), None, torch.device("cpu"))
        _, prompt = toy_pairs(count, ["train"], 0, CONFIG, Vocabulary())
        sides = train.ranked(scores.mean(2))
        return [(pairs.clips(*side.T), prompt[side[:, 0]], pairs.models[side[:, 0], side[:, 1]]) for side in sides]

    return ranked


def test_pairs_are_ranked_by_the_reward_and_equal_rewards_make_none(ranked_clips):
    (winner, prompt, first), (loser, again, second) = ranked_clips(Judge(), 200)
    assert 100 < len(winner) == len(loser) < 200
    assert torch.equal(prompt, again) and not (first == second).any()
    scores = [Judge().normalised(side, None)[:, 0] for side in (winner, loser)]
    assert (scores[0] > scores[1]).all()


def test_the_oracle_as_reward_gives_better_winners_in_every_dimension(ranked_clips):
    (winner, prompt, _), (loser, _, _) = ranked_clips(Oracle(), 300)
    gain = (world.oracle(winner, prompt) - world.oracle(loser, prompt)).mean(0)
    assert (gain > 0.1).all(), gain


def test_ranking_by_hand():
    total = torch.tensor([[0.0, 1.0], [5.0, 1.0], [2.0, 2.0], [3.0, 0.0]])
    better, worse = train.ranked(total)
    assert better.tolist() == [[0, 1], [1, 0], [3, 0]]  # the draw is no pair
    assert worse.tolist() == [[0, 0], [1, 1], [3, 1]]
    with pytest.raises(BadInput, match="no pair has a better clip"):
        train.ranked(torch.ones(4, 2))
