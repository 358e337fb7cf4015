"""Flow-NRG's guidance: against closed forms, and what it must leave alone."""

import copy
from dataclasses import replace

import torch

from model import ModelConfig, VideoTransformer
from nrg import NoisyReward, SteeredPolicy, guide, noisy_reward_on
from sample import sample


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


def test_under_autocast_scores_are_float32():
    """Scores just above 1, where bfloat16 has steps of 1/128: the last layer adds a little of what
    it reads."""
    reward, read = noisy_reward_on(small_model(), read=2), []
    reward.scores.weight.data.mul_(0.01)
    reward.scores.bias.data.fill_(1.0)
    reward.video_proj.weight.data.zero_()
    reward.video_proj.bias.data.zero_()
    reward.scores.register_forward_pre_hook(lambda layer, inputs: read.append(inputs[0].detach()))
    with torch.autocast("cpu", torch.bfloat16):
        scores = reward(*inputs(2))
    by_hand = 1 + read[0].double() @ reward.scores.weight.double().T  # (2, 3)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores.double(), by_hand, rtol=0, atol=1e-6)


def test_a_head_tells_places_apart():
    reward = noisy_reward_on(small_model(), 2)
    assert CONFIG.grid == (2, 2, 2)
    rng = torch.Generator().manual_seed(3)
    video, words = torch.randn(1, 8, 24, generator=rng), torch.randn(1, 3, 24, generator=rng)
    condition = torch.randn(1, 24, generator=rng)

    def read(video, words):
        return reward.read(torch.cat((words, video), 1), condition)

    score = read(video, words)
    time, rows, columns = "45670123", "23016745", "10325476"
    for order in (list(map(int, axis)) for axis in (time, rows, columns)):
        assert (read(video[:, order], words) - score).abs().min() > 1e-4
    # words count for TA alone, wherever they stand
    assert torch.allclose(read(video, words.flip(1)), score, atol=1e-6)
    other = read(video, -words)
    assert torch.allclose(other[:, :2], score[:, :2]) and (other[:, 2] - score[:, 2]).abs() > 1e-4


def test_tokens_in_the_order_of_tiles_are_read_at_their_own_places():
    base = small_model(replace(CONFIG, size=12, patch=(1, 3, 2)))
    reward, x, (_, t, y) = noisy_reward_on(base, 1), torch.randn(4, 3, 2, 12, 12), inputs()
    # every token sees every other one, but of 4 x 6 a frame each 2 x 2 stand together
    tiled = NoisyReward(replace(reward.config, attention="tile:1,2,2/9,9,9"))
    tiled.load_state_dict(reward.state_dict())
    assert torch.allclose(tiled(x, t, y), reward(x, t, y), atol=1e-5)


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
