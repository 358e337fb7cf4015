"""VideoReward: losses and metrics by hand, and what each score may know."""

import math

import pytest
import torch

from data import INVALID
from reward import (
    RewardConfig,
    VideoReward,
    accuracy_with_ties,
    accuracy_without_ties,
    bt_loss,
    btt_loss,
    btt_probabilities,
    caption_loss,
    regression_loss,
)

# Rao-Kupper with theta = 5, computed independently from e^{r_A} / (e^{r_A} + 5 e^{r_B})
TABLE = {
    0: (0.1667, 0.1667, 0.6667),
    0.5: (0.2480, 0.1082, 0.6438),
    1: (0.3522, 0.0685, 0.5793),
    3: (0.8007, 0.0099, 0.1895),
}


def test_btt_probabilities():
    for delta, expected in TABLE.items():
        values = [p.item() for p in btt_probabilities(torch.tensor(float(delta)))]
        assert values == pytest.approx(expected, abs=6e-5)
    delta = torch.linspace(-8, 8, 101, dtype=torch.float64)
    assert torch.allclose(sum(btt_probabilities(delta)), torch.ones_like(delta), atol=1e-12)
    a, _, tie = btt_probabilities(delta, theta=1.0)  # Bradley-Terry
    assert torch.allclose(a, torch.sigmoid(delta)) and tie.abs().max() == 0


def test_losses_by_hand():
    a, b = torch.tensor([2.0, 1.0, 0.5, 9.0]), torch.tensor([1.0, 3.0, 0.5, -9.0])
    label = torch.tensor([1, 1, 0, INVALID])
    # BT: the two decided pairs, -log sigma(1) and -log sigma(-2)
    bt = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2
    assert bt_loss(a, b, label).item() == pytest.approx(bt)
    # BTT: -log .3522 (delta 1), -log .0264 (delta -2, but A is labelled better), -log 2/3 (a tie)
    btt = math.log(1 + 5 * math.exp(-1)) + math.log(1 + 5 * math.exp(2)) - math.log(2 / 3)
    assert btt_loss(a, b, label).item() == pytest.approx(btt / 3, rel=1e-6)


@pytest.mark.parametrize("loss", [bt_loss, btt_loss])
def test_invalid_labels_alone_give_no_gradient(loss):
    none = torch.zeros(2, requires_grad=True)
    loss(none, torch.zeros(2), torch.full((2,), INVALID)).backward()
    assert none.grad.abs().max() == 0


def test_regression_by_hand():
    mos = torch.tensor([[1.0, 4.0], [0.0, 3.5]])  # targets -2, 1, missing, 0.5
    r = torch.tensor([[0.0, 1.0], [9.0, 1.5]])
    assert regression_loss(r, mos).item() == pytest.approx((4 + 0 + 1) / 3)


def test_caption_loss_by_hand():
    # vocabulary of padding and three words; the prompt holds words 1 and 3, twice and padded
    logits = torch.tensor([[9.0, 0.0, math.log(3.0), math.log(3.0)]])
    value = caption_loss(logits, torch.tensor([[1, 3, 3, 0]])).item()
    # padding should be off: log(1 + e^9); word 1 on at 1/2, word 2 off at 1/4, word 3 on at 3/4
    expected = math.log(1 + math.exp(9)) + math.log(2) + math.log(4) + math.log(4 / 3)
    assert value == pytest.approx(expected, rel=1e-6)


def test_accuracy_without_ties_by_hand():
    delta, label = torch.tensor([1.0, -2.0, 0.0, 3.0, 5.0]), torch.tensor([1, 1, 1, 0, INVALID])
    assert accuracy_without_ties(delta, label) == pytest.approx(1 / 3)  # a zero is wrong
    assert math.isnan(accuracy_without_ties(delta[3:], label[3:]))


def brute_force(delta, label):
    best = -1.0
    for threshold in {-1.0, *(abs(d) for d in delta)}:  # no tie at all, or up to a difference
        guesses = [0 if abs(d) <= threshold else (d > 0) - (d < 0) for d in delta]
        right = sum(guess == each for guess, each in zip(guesses, label))
        best = max(best, right / len(label))
    return best


def test_accuracy_with_ties_is_the_best_over_all_thresholds():
    rng = torch.Generator().manual_seed(0)
    for case in range(200):
        count = int(torch.randint(1, 12, (1,), generator=rng))
        delta = torch.randint(-4, 5, (count,), generator=rng) / 2  # many equal ones, zeros too
        label = torch.randint(-1, 2, (count,), generator=rng)
        invalid = torch.cat((label, torch.tensor([INVALID])))
        value, threshold = accuracy_with_ties(torch.cat((delta, torch.tensor([9.0]))), invalid)
        assert value == pytest.approx(brute_force(delta.tolist(), label.tolist())), case
        guess = torch.where(delta.abs() <= threshold, 0, torch.sign(delta))
        assert (guess == label).float().mean().item() == pytest.approx(value)


# ---------------------------------------------------------------------------------------------
# The network

Y = torch.randint(0, 20, (2, 4, 8), generator=torch.Generator().manual_seed(0))


def network_with(separate):
    torch.manual_seed(0)
    config = RewardConfig(vocab=20, dim=64, depth=3, heads=4, separate=separate)
    return VideoReward(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def network():
    return network_with(separate=True)


def test_vq_and_mq_and_the_caption_cannot_see_the_prompt_and_ta_can(network):
    video = torch.randn(4, 3, 8, 32, 32)
    (first, words), (second, other_words) = (network.scores_and_words(video, y) for y in Y)
    assert torch.equal(first[:, :2], second[:, :2]) and torch.equal(words, other_words)
    assert (first[:, 2] - second[:, 2]).abs().min() > 1e-4 and words.shape == (4, 20)
    assert (network(video.flip(0), Y[0]) - first).abs().min() > 1e-4  # all see the video


def test_the_shared_token_sees_all_in_every_score():
    shared, video = network_with(separate=False), torch.randn(4, 3, 8, 32, 32)
    first, second = shared(video, Y[0]), shared(video, Y[1])
    assert first.shape == (4, 3) and (first - second).abs().min() > 1e-5


def test_a_token_of_a_frame_reads_that_frame_by_place(network):
    video = torch.randn(1, 3, 8, 32, 32)
    moved = video.clone()
    moved[:, :, 3] = video[:, :, 3].roll(16, -1)  # half a frame on: its mean stays
    change = (network.stem(moved) - network.stem(video)).abs().amax(2)[0]
    assert len(change) == 8 + 16  # frames, then places
    assert change[3] > 0.01 and change[[0, 1, 2, 4, 5, 6, 7]].max() < 1e-5
    assert change[8:].max() > 0.01


def test_the_mean_colour_enters_every_token_alike(network):
    video = 0.3 * torch.randn(1, 3, 8, 32, 32)
    tinted = video + torch.tensor([0.2, 0.0, -0.1]).reshape(3, 1, 1, 1)
    change = network.stem(tinted) - network.stem(video)
    assert change.abs().max() > 0.01
    assert torch.allclose(change, change[:, :1].expand_as(change), atol=1e-4)


def test_rotary_positions_are_of_places_and_not_of_frames(network, monkeypatch):
    tokens, scores = torch.randn(1, 8 + 16, 64), []
    for order in (range(24), [*range(7, -1, -1), *range(8, 24)], [*range(8), *range(23, 7, -1)]):
        shuffled = tokens[:, list(order)]
        monkeypatch.setattr(network.stem, "forward", lambda video, shuffled=shuffled: shuffled)
        scores.append(network(None, Y[0, :1]))
    assert torch.allclose(scores[1], scores[0], atol=1e-5)
    assert (scores[2] - scores[0]).abs().min() > 1e-5


def test_under_autocast_scores_are_float32():
    """Scores just above 1, where bfloat16 has steps of 1/128: the head adds a little of what it
    reads."""
    model, read = network_with(separate=True), []
    model.head.weight.data.mul_(0.01)
    model.head.bias.data.fill_(1.0)
    model.head.register_forward_pre_hook(lambda head, inputs: read.append(inputs[0]))
    video, y = torch.randn(2, 3, 8, 32, 32), torch.tensor([[1, 2, 3, 0, 0, 0, 0, 0]] * 2)
    with torch.autocast("cpu", torch.bfloat16):
        scores, words = model.scores_and_words(video, y)
    assert scores.dtype == words.dtype == torch.float32
    by_hand = 1 + read[0].double() @ model.head.weight[0].double()  # (2, 3)
    assert torch.allclose(scores.double(), by_hand, rtol=0, atol=1e-6)
