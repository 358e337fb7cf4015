"""Flow-NRG's guidance: against closed forms, and what it must leave alone."""

import copy
from dataclasses import replace

import pytest
import torch

from model import ModelConfig, VideoTransformer
from nrg import (
    NoisyReward,
    SteeredPolicy,
    guide,
    noisy_pair_step,
    noisy_reward_on,
    noisy_value_step,
)
from sample import sample
from studies import unified


def velocity(x_t, t, y):
    """Exact for data N(0, I): E[x1 - x0 | x_t] = (t - (1 - t)) x_t / (t^2 + (1 - t)^2)."""
    t = t[:, None]
    return (2 * t - 1) * x_t / (t**2 + (1 - t) ** 2)


def value_of(k):
    """The exact value function of r(x0) = k x0 up to terms free of x_t: k E[x0 | x_t]."""

    def value(x_t, t, y):
        mean = (1 - t) / (t**2 + (1 - t) ** 2)
        return ((x_t @ k) * mean)[:, None]

    return value


def test_the_exact_value_function_reaches_the_tilted_mean():
    k = torch.linspace(-2, 2, 16)
    x1 = torch.randn(2000, len(k), generator=torch.Generator().manual_seed(0))
    x1 = (x1 - x1.mean(0)) / x1.std(0)  # without sampling error
    y = torch.zeros(2000, 1, dtype=torch.int64)
    for scale in (0.5, 1.0):
        guidance = guide(value_of(k), [1.0], scale)
        x0 = sample(velocity, x1, y, steps=400, shift=1.0, guidance=guidance)
        # N(0, I) tilted by exp(scale k x) is N(scale k, I)
        assert (x0.mean(0) - scale * k).abs().max() <= 0.02 * (scale * k).abs().max()
        assert (x0.std(0) - 1).abs().max() < 0.02
    for steps in (1, 2, 3, 7):  # eps is 0, and at t = 1 the factor infinite
        assert sample(velocity, x1[:4], y[:4], steps=steps, guidance=guidance).isfinite().all()


def test_guidance_by_hand():
    def reward(x_t, t, y):
        return torch.stack((x_t[:, 0], 10 * x_t[:, 1], x_t.sum(1)), 1)

    x, t, v = torch.randn(3, 2), torch.full((3,), 0.5), torch.zeros(3, 2)
    guided = guide(reward, [1.0, -0.5, 2.0], scale=3.0)(v, x, t, None)
    # gradient (1 + 2, -5 + 2), t / (1 - t) = 1, scale 3, minus
    assert torch.allclose(guided, torch.tensor([[-9.0, 9.0]]).expand(3, 2))
    guided = guide(reward, [1.0, 0.0, 0.0], eps=0.5)(v, x, t, None)
    assert torch.allclose(guided[:, 0], torch.full((3,), -0.5))  # .5 / (1 - .5 + .5)
    inside = guide(reward, [1.0, 0.0, 0.0], interval=(0.25, 0.5))
    moved = inside(torch.zeros(4, 2), torch.ones(4, 2), torch.tensor([0.6, 0.5, 0.25, 0.2]), None)
    assert (moved[:, 0] != 0).tolist() == [False, True, True, False]
    v = torch.randn(3, 2)
    for weights, settings in (([0.0] * 3, {}), ([1.0] * 3, {"scale": 0.0})):
        assert torch.equal(guide(reward, weights, **settings)(v, x, t, None), v)


def test_the_unified_view_knows_its_truth(monkeypatch):
    # p* by brute force on a fine grid: p_ref exp(x / beta), normalised
    x = torch.linspace(-6, 8, 140_001, dtype=torch.float64)
    log_p = torch.logsumexp(-0.5 * ((x[:, None] - unified.MEANS.double()) / unified.STD) ** 2, 1)
    p = torch.softmax(log_p + x / unified.BETA, 0)
    share, mean = unified.truth()
    assert mean == pytest.approx((p * x).sum().item(), abs=1e-4)
    low, high = unified.EDGES[40].item(), unified.EDGES[41].item()
    assert share[40].item() == pytest.approx(p[(x >= low) & (x < high)].sum().item(), abs=1e-4)
    tenth = x[torch.searchsorted(p.cumsum(0), torch.tensor(0.1, dtype=torch.float64))].item()
    assert unified.quantiles(10_000)[1000].item() == pytest.approx(tenth, abs=2e-3)
    monkeypatch.setattr(unified, "SAMPLES", 4000)
    reference, exact = (unified.judged(name, 0)[0] for name in ("reference", "nrg-exact"))
    assert reference["mean"] == pytest.approx(0.0, abs=0.08)
    assert exact["mean"] == pytest.approx(mean, abs=0.05)
    # the mean moves by .92, all of it mass moved to the right: so far is p_ref from p*
    assert reference["distance"] == pytest.approx(mean, abs=0.08) and exact["distance"] < 0.05
    # samples that all lie at 8, far from any bin, are 8 - mean away
    to_8 = (lambda x, t, y: (x - 8) / t[:, None]), None
    monkeypatch.setattr(unified, "model_of", lambda *_: to_8)
    assert unified.judged("", 0)[0]["distance"] == pytest.approx(8 - mean, abs=0.01)


# ---------------------------------------------------------------------------------------------
# The noise-aware reward

SIZES = {"frames": 2, "size": 8, "patch": (1, 4, 4), "dim": 24, "depth": 3, "heads": 2}
CONFIG = ModelConfig(**SIZES, vocab=6, max_text=3)


def small_model(config=CONFIG):
    """A VideoTransformer whose blocks are not the identity, as they are before training."""
    torch.manual_seed(0)
    model = VideoTransformer(config)
    for value in model.parameters():
        value.data += 0.1 * torch.randn_like(value)
    return model.eval()


def inputs(count=4, seed=1):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *CONFIG.video_shape, generator=rng)
    return x, torch.rand(count, generator=rng), torch.randint(1, 6, (count, 3), generator=rng)


def test_under_autocast_scores_and_losses_are_float32():
    """Scores just above 1, where bfloat16 has steps of 1/128: the last layer adds a little of what
    it reads."""
    reward, read = noisy_reward_on(small_model(), read=2), []
    reward.scores.weight.data.mul_(0.01)
    reward.scores.bias.data.fill_(1.0)
    reward.video_proj.weight.data.zero_()
    reward.video_proj.bias.data.zero_()
    reward.scores.register_forward_pre_hook(lambda layer, inputs: read.append(inputs[0].detach()))
    a, t, y = inputs(1)
    label = torch.ones(1, 3)
    with torch.autocast("cpu", torch.bfloat16):
        scores = reward(torch.cat((a, -a)), t.repeat(2), y.repeat(2, 1))
        _, pair = noisy_pair_step(reward, a, -a, y, label, t, x1=torch.zeros_like(a))
    assert scores.dtype == torch.float32
    by_hand = [1 + clip.double() @ reward.scores.weight.double().T for clip in read]  # (2, 3) each
    assert torch.allclose(scores.double(), by_hand[0], rtol=0, atol=1e-6)
    delta = by_hand[1][0] - by_hand[1][1]
    assert 1e-5 < delta.abs().min() and delta.abs().max() < 1 / 128
    assert pair["loss"] == pytest.approx(torch.log1p(torch.exp(-delta)).mean().item(), abs=1e-6)


def test_both_clips_of_a_pair_share_noise_and_time():
    a, t, y = inputs()
    b, label = a + 1, torch.tensor([[1, -1, 0]] * 4)
    seen = []

    def reward(x_t, t, y):
        seen.append((x_t, t, y))
        return x_t.flatten(1).mean(1, keepdim=True).expand(-1, 3)

    loss, logs = noisy_pair_step(reward, a, b, y, label, t, torch.randn_like(a))
    x_t, times, prompts = seen[0]
    assert torch.equal(times, t.repeat(2)) and torch.equal(prompts, y.repeat(2, 1))
    # x_t of b minus x_t of a is (1 - t) (b - a) = 1 - t: the noise cancels
    difference = (x_t[4:] - x_t[:4]).flatten(1)
    assert torch.allclose(difference, (1 - t[:, None]).expand_as(difference), atol=1e-6)
    # so r_a - r_b = -(1 - t): wrong where A is better, right where B is; ties do not count
    delta = -(1 - t)
    expected = (torch.log1p(torch.exp(-delta)) + torch.log1p(torch.exp(delta))).mean() / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert logs["VQ"] == 0.0 and logs["MQ"] == 1.0 and "TA" not in logs


def test_value_loss_by_hand():
    # the score of a prompt is its first word in TA, and 1 and 2 in VQ and MQ
    x0, t, _ = inputs(2)
    y, other = torch.tensor([[3, 0, 0], [1, 0, 0]]), torch.tensor([[1, 0, 0], [2, 0, 0]])
    seen = []

    def reward(x_t, t, y):
        seen.append((x_t, t))
        return torch.cat((torch.tensor([[1.0, 2.0]]).expand(len(y), 2), y[:, :1].float()), 1)

    target = torch.tensor([[1.0, 0.0, 3.0], [3.0, 1.0, -1.0]])
    other_target = torch.tensor([[9.0, 9.0, 1.0], [9.0, 9.0, 5.0]])
    x1 = torch.ones_like(x0)
    loss, logs = noisy_value_step(reward, x0, y, target, t, x1, other, other_target)
    # VQ (0 + 4) / 2, MQ (4 + 1) / 2, TA (0 + 4) / 2; for the other prompts (0 + 9) / 2
    assert loss.item() == pytest.approx(2 + 2.5 + 2 + 4.5)
    assert logs == pytest.approx({"VQ": 2, "MQ": 2.5, "TA": 2, "other": 4.5, "loss": 11})
    (x_t, times), now = seen[0], t[:, None, None, None, None]
    assert torch.equal(times, torch.cat((t, t))) and torch.allclose(x_t[:2], (1 - now) * x0 + now)
    assert torch.equal(x_t[:2], x_t[2:])  # the same noised clip for both prompts


def test_a_head_tells_places_apart():
    reward, grid = noisy_reward_on(small_model(), 2), CONFIG.grid
    assert grid == (2, 2, 2)
    rng = torch.Generator().manual_seed(3)
    video, words = torch.randn(1, 8, 24, generator=rng), torch.randn(1, 3, 24, generator=rng)
    condition = torch.randn(1, 24, generator=rng)
    score = reward.head(video, grid, words, condition)
    time, rows, columns = (
        [4, 5, 6, 7, 0, 1, 2, 3],
        [2, 3, 0, 1, 6, 7, 4, 5],
        [1, 0, 3, 2, 5, 4, 7, 6],
    )
    for order in (time, rows, columns):
        assert (reward.head(video[:, order], grid, words, condition) - score).abs().min() > 1e-4
    # words count for TA alone, wherever they stand
    assert torch.allclose(reward.head(video, grid, words.flip(1), condition), score, atol=1e-6)
    other = reward.head(video, grid, -words, condition)
    assert torch.allclose(other[:, :2], score[:, :2]) and (other[:, 2] - score[:, 2]).abs() > 1e-4


def test_tokens_in_the_order_of_tiles_are_read_at_their_own_places():
    base = small_model(replace(CONFIG, size=12, patch=(1, 3, 2)))
    reward, x, (_, t, y) = noisy_reward_on(base, 1), torch.randn(4, 3, 2, 12, 12), inputs()
    # every token sees every other one, but of 4 x 6 a frame each 2 x 2 stand together
    tiled = NoisyReward(replace(reward.config, attention="tile:1,2,2/9,9,9"))
    tiled.load_state_dict(reward.state_dict())
    assert torch.allclose(tiled(x, t, y), reward(x, t, y), atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_trunk_gets_no_gradient(frozen):
    reward, (a, t, y) = noisy_reward_on(small_model(), 2, frozen), inputs()
    noisy_pair_step(reward, a, -a, y, torch.ones(4, 3), t, torch.randn_like(a))[0].backward()
    moved = {name for name, value in reward.named_parameters() if value.grad is not None}
    assert "numbers.weight" in moved and ("trunk.blocks.1.attn.qkv.weight" in moved) != frozen


WEIGHTS = [1.0, -0.5, 2.0]


def steered_apart(policy, reward, x, t, y, cfg):
    """What SteeredPolicy must return, from the policy, CFG and guide one after the other."""
    v = policy(x, t, y)
    v_null = policy(x, t, 0 * y)
    return guide(reward, WEIGHTS, 3.0, 0.1)(v_null + cfg * (v - v_null), x, t, y)


def test_a_shared_trunk_runs_once_and_gives_the_same_velocity():
    policy, (x, t, y) = small_model(), inputs()
    reward = noisy_reward_on(policy, 2)
    steered = SteeredPolicy(policy, reward, WEIGHTS, 3.0, 0.1, cfg=2.0)
    expected = steered_apart(policy, reward, x, t, y, 2.0)
    calls = []
    policy.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    reward.trunk.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    v = steered(x, t, y)
    assert len(calls) == 2  # with and without a prompt; the reward's copy does not run
    assert torch.allclose(v, expected, atol=1e-5)
    assert not v.requires_grad
    assert all(value.requires_grad and value.grad is None for value in policy.parameters())
    # outside the interval, and with weights or a scale of 0, CFG is all that is left
    for settings in ((WEIGHTS, 3.0, 0.1, (1.5, 2.0)), ([0.0] * 3, 3.0, 0.1), (WEIGHTS, 0.0, 0.1)):
        steered = SteeredPolicy(policy, reward, *settings)
        assert torch.equal(steered(x, t, y), policy(x, t, y))


def test_a_policy_with_another_trunk_does_not_share_it():
    base, (x, t, y) = small_model(), inputs()
    reward = noisy_reward_on(base, 2)
    policies = {}
    for name in base.state_dict():
        policies[name] = copy.deepcopy(base)
        policies[name].state_dict()[name] += 1e-3
    # with one-token windows a video token sees itself and the words
    tiled = replace(CONFIG, attention="tile:1,1,1/1,1,1")
    policies["attention"] = VideoTransformer(tiled)
    policies["attention"].load_state_dict(base.state_dict())
    for name, policy in policies.items():
        steered = SteeredPolicy(policy, reward, WEIGHTS, 3.0, 0.1)
        after_trunk = name.startswith(("blocks.2.", "modulation.", "patch_out."))
        assert steered.shared == (2 if after_trunk else 0), name
        expected = steered_apart(policy, reward, x, t, y, 1.0)
        assert torch.allclose(steered(x, t, y), expected, atol=1e-5), name


def test_it_cannot_read_more_blocks_than_there_are():
    with pytest.raises(ValueError, match="read 4: this base model has 3 blocks"):
        noisy_reward_on(small_model(), 4)
