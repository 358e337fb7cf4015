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
    reward_step,
)

# Rao-Kupper with theta = 5, computed independently from e^{r_A} / (e^{r_A} + 5 e^{r_B})
TABLE = {
    0: (0.1667, 0.1667, 0.6667),
    0.5: (0.2480, 0.1082, 0.6438),
    1: (0.3522, 0.0685, 0.5793),
    2: (0.5964, 0.0264, 0.3772),
    3: (0.8007, 0.0099, 0.1895),
    5: (0.9674, 0.0013, 0.0312),
}


@pytest.mark.parametrize("delta", TABLE)
def test_btt_probabilities(delta):
    values = [p.item() for p in btt_probabilities(torch.tensor(float(delta)))]
    assert values == pytest.approx(TABLE[delta], abs=6e-5)
    mirrored = [p.item() for p in btt_probabilities(torch.tensor(-float(delta)))]
    assert mirrored == pytest.approx([values[1], values[0], values[2]], abs=1e-6)


def test_btt_normalises_and_the_printed_equation_does_not():
    delta = torch.linspace(-8, 8, 101, dtype=torch.float64)
    assert torch.allclose(sum(btt_probabilities(delta)), torch.ones_like(delta), atol=1e-12)

    def printed(
        delta,
    ):  # Eq. 1 as printed: in the case "A preferred" theta stands at the winner's own term
        a, b = math.exp(delta), 1.0
        tie = 24 * a * b / ((a + 5 * b) * (5 * a + b))
        return a / (b + 5 * a) + b / (b + 5 * a) + tie

    assert printed(1.0) == pytest.approx(0.83, abs=0.005)
    assert printed(3.0) == pytest.approx(0.40, abs=0.005)


def test_btt_without_ties_is_bt():
    delta = torch.tensor([-2.0, 0.3, 4.0])
    a, b, tie = btt_probabilities(delta, theta=1.0)
    assert (
        torch.allclose(a, torch.sigmoid(delta))
        and torch.allclose(a + b, torch.ones(3))
        and tie.abs().max() == 0
    )


def test_losses_by_hand():
    a, b = torch.tensor([2.0, 1.0, 0.5, 9.0]), torch.tensor([1.0, 3.0, 0.5, -9.0])
    label = torch.tensor([1, 1, 0, INVALID])
    # BT: the two decided pairs, -log sigma(1) and -log sigma(-2)
    assert bt_loss(a, b, label).item() == pytest.approx(
        (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2
    )
    # BTT: -log .3522 (delta 1), -log .0264 (delta -2, A said to be better), -log 2/3 (a tie at
    # delta 0)
    first = math.log(1 + 5 * math.exp(-1))
    second = math.log(1 + 5 * math.exp(2))
    assert btt_loss(a, b, label).item() == pytest.approx(
        (first + second - math.log(2 / 3)) / 3, rel=1e-6
    )


@pytest.mark.parametrize("loss", [bt_loss, btt_loss])
def test_losses_are_symmetric_shift_free_and_mean_over_valid_entries(loss):
    torch.manual_seed(0)
    a, b = torch.randn(6, 3), torch.randn(6, 3)
    label = torch.tensor([[1, 0, -1], [0, 0, 1], [-1, 1, 1], [1, -1, 0], [0, 1, -1], [1, 1, 1]])
    value = loss(a, b, label)
    assert torch.allclose(value, loss(b, a, -label))
    assert torch.allclose(value, loss(a + 7, b + 7, label), atol=1e-6)
    padded = torch.cat((label, torch.full((4, 3), INVALID)))
    more_a, more_b = torch.cat((a, torch.randn(4, 3) * 50)), torch.cat((b, torch.randn(4, 3) * 50))
    more_a.requires_grad_(True)
    a.requires_grad_(True)
    again = loss(more_a, more_b, padded)
    assert torch.allclose(value, again)
    again.backward()
    loss(a, b, label).backward()
    assert torch.allclose(more_a.grad[:6], a.grad) and more_a.grad[6:].abs().max() == 0


def test_no_valid_label_gives_zero_not_nan():
    r = torch.zeros(2, requires_grad=True)
    btt_loss(r, torch.zeros(2), torch.full((2,), INVALID)).backward()
    assert r.grad.abs().max() == 0


def test_regression_by_hand():
    mos = torch.tensor([[1.0, 4.0], [0.0, 3.5]])  # targets -2, 1, missing, 0.5
    r = torch.tensor([[0.0, 1.0], [9.0, 1.5]], requires_grad=True)
    loss = regression_loss(r, mos)
    loss.backward()
    assert loss.item() == pytest.approx((4 + 0 + 1) / 3)
    assert torch.allclose(
        r.grad, torch.tensor([[4.0, 0.0], [0.0, 2.0]]) / 3
    )  # 2 (r - target) / 3, missing: none


def test_caption_loss_by_hand():
    # vocabulary of padding and three words; the prompt holds words 1 and 3, twice and padded
    logits = torch.tensor([[9.0, 0.0, math.log(3.0), math.log(3.0)]])
    value = caption_loss(logits, torch.tensor([[1, 3, 3, 0]])).item()
    # padding should be off: log(1 + e^9); word 1 on at 1/2, word 2 off at 1/4, word 3 on at 3/4
    assert value == pytest.approx(
        math.log(1 + math.exp(9)) + math.log(2) + math.log(4) + math.log(4 / 3), rel=1e-6
    )


def test_the_caption_cannot_see_the_prompt(network):
    video = torch.randn(2, 3, 8, 32, 32)
    words = [network.scores_and_words(video, torch.full((2, 8), i))[1] for i in (1, 5)]
    assert words[0].shape == (2, 20) and torch.equal(*words)


def test_accuracy_without_ties_by_hand():
    delta, label = torch.tensor([1.0, -2.0, 0.0, 3.0, 5.0]), torch.tensor([1, 1, 1, 0, INVALID])
    assert accuracy_without_ties(delta, label) == pytest.approx(
        1 / 3
    )  # right, wrong, a zero is wrong


def brute_force(delta, label):
    best = -1.0
    for threshold in {
        -1.0,
        *(abs(d) for d in delta),
    }:  # no tie at all, or up to one of the differences
        said = [0 if abs(d) <= threshold else (d > 0) - (d < 0) for d in delta]
        best = max(best, sum(s == wanted for s, wanted in zip(said, label)) / len(label))
    return best


def test_accuracy_with_ties_is_the_best_over_all_thresholds():
    rng = torch.Generator().manual_seed(0)
    for case in range(200):
        count = int(torch.randint(1, 12, (1,), generator=rng))
        delta = (
            torch.randint(-4, 5, (count,), generator=rng) / 2
        )  # many equal differences, zeros among them
        label = torch.randint(-1, 2, (count,), generator=rng)
        value, threshold = accuracy_with_ties(delta, label)
        assert value == pytest.approx(brute_force(delta.tolist(), label.tolist())), case
        said = torch.where(delta.abs() <= threshold, 0, torch.sign(delta))
        assert (said == label).float().mean().item() == pytest.approx(value)


@pytest.mark.parametrize("tie_share", [0.2, 0.6])
def test_a_random_scorer_gets_a_third_or_the_share_of_ties(tie_share):
    rng = torch.Generator().manual_seed(1)
    count = 20000
    label = torch.where(torch.rand(count, generator=rng) < 0.5, 1, -1)
    label = torch.where(torch.rand(count, generator=rng) < tie_share, 0, label)
    value, _ = accuracy_with_ties(torch.randn(count, generator=rng), label)
    # all ties: p; no ties: (1 - p) / 2. The better of the two, up to the standard error (and the
    # search's optimism)
    expected = max(tie_share, (1 - tie_share) / 2)
    assert value == pytest.approx(expected, abs=4 * math.sqrt(0.25 / count))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return VideoReward(RewardConfig(vocab=20, dim=64, depth=3, heads=4)).eval()


def test_the_shared_token_sees_all_in_every_score():
    torch.manual_seed(0)
    shared = VideoReward(RewardConfig(vocab=20, dim=64, depth=3, heads=4, separate=False)).eval()
    video = torch.randn(4, 3, 8, 32, 32)
    y = torch.randint(0, 20, (2, 4, 8), generator=torch.Generator().manual_seed(0))
    first, second = shared(video, y[0]), shared(video, y[1])
    assert first.shape == (4, 3) and (first - second).abs().min() > 1e-5
    assert shared.head.out_features == 3 and shared.tokens.shape == (1, 64)


def test_vq_and_mq_cannot_see_the_prompt_and_ta_can(network):
    video = torch.randn(4, 3, 8, 32, 32)
    y = torch.randint(0, 20, (2, 4, 8), generator=torch.Generator().manual_seed(0))
    first, second = network(video, y[0]), network(video, y[1])
    assert torch.equal(first[:, :2], second[:, :2])
    assert (first[:, 2] - second[:, 2]).abs().min() > 1e-4


def test_a_token_of_a_frame_reads_that_frame_by_place(network):
    video = torch.randn(1, 3, 8, 32, 32)
    moved = video.clone()
    moved[:, :, 3] = video[:, :, 3].roll(16, -1)  # half a frame on: its mean stays
    with torch.no_grad():
        change = (
            (network.stem(moved) - network.stem(video)).abs().amax(2)[0]
        )  # of 8 frames, then of 16 places
    assert len(change) == 8 + 16
    assert (
        change[3] > 0.01 and change[[0, 1, 2, 4, 5, 6, 7]].max() < 1e-5 and change[8:].max() > 0.01
    )


def test_the_mean_colour_enters_every_token_alike(network):
    video = 0.3 * torch.randn(1, 3, 8, 32, 32)
    with torch.no_grad():
        change = network.stem(
            video + torch.tensor([0.2, 0.0, -0.1]).reshape(3, 1, 1, 1)
        ) - network.stem(video)
    assert change.abs().max() > 0.01 and torch.allclose(
        change, change[:, :1].expand_as(change), atol=1e-4
    )


def test_places_are_told_by_rotary_positions_and_frames_are_not(network, monkeypatch):
    tokens, y, scores = torch.randn(1, 8 + 16, 64), torch.ones(1, 8, dtype=torch.int64), []
    for order in (range(24), [*range(7, -1, -1), *range(8, 24)], [*range(8), *range(23, 7, -1)]):
        monkeypatch.setattr(
            network.stem, "forward", lambda video, order=list(order): tokens[:, order]
        )
        scores.append(network(None, y))
    assert (
        torch.allclose(scores[1], scores[0], atol=1e-5)
        and (scores[2] - scores[0]).abs().min() > 1e-5
    )


def test_every_score_sees_the_video(network):
    y = torch.zeros(1, 8, dtype=torch.int64)
    a, b = network(torch.randn(1, 3, 8, 32, 32), y), network(torch.randn(1, 3, 8, 32, 32), y)
    assert (a - b).abs().min() > 1e-4


def test_under_autocast_scores_and_losses_are_float32():
    """Scores just above 1, where bfloat16 has steps of 1/128: the head adds a little of what it
    reads."""
    torch.manual_seed(0)
    model, read = VideoReward(RewardConfig(vocab=20, dim=64, depth=3, heads=4)), []
    model.head.weight.data.mul_(0.01)
    model.head.bias.data.fill_(1.0)
    model.head.register_forward_pre_hook(lambda head, inputs: read.append(inputs[0].detach()))
    video, y = torch.randn(2, 3, 8, 32, 32), torch.tensor([[1, 2, 3, 0, 0, 0, 0, 0]])
    label, mos, weight = torch.ones(1, 3), torch.zeros(1, 2, 3), torch.ones(1, 3)
    with torch.autocast("cpu", torch.bfloat16):
        scores, words = model.scores_and_words(video, y.repeat(2, 1))
        _, logs = reward_step(model, video[:1], video[1:], y, label, mos, weight, loss="bt")
    assert scores.dtype == words.dtype == torch.float32
    by_hand = 1 + read[0].double() @ model.head.weight[0].double()  # (2, 3)
    assert torch.allclose(scores.double(), by_hand, rtol=0, atol=1e-6)
    delta = by_hand[0] - by_hand[1]
    assert 1e-4 < delta.abs().min() and delta.abs().max() < 1 / 128
    bradley_terry = sum(math.log(1 + math.exp(-each)) for each in delta.tolist()) / 3
    assert logs["loss"] == pytest.approx(bradley_terry, abs=1e-6)


def test_normalised_is_a_z_score(network):
    network.mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    network.std.copy_(torch.tensor([2.0, 4.0, 0.5]))
    video, y = torch.randn(2, 3, 8, 32, 32), torch.zeros(2, 8, dtype=torch.int64)
    expected = (network(video, y) - torch.tensor([1.0, 2.0, 3.0])) / torch.tensor([2.0, 4.0, 0.5])
    assert torch.allclose(network.normalised(video, y), expected)
