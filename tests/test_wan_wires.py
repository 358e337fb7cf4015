"""The example on Wan by its command: clips, prompts, labels, weights, noise and flags that reach losses and sampler."""

import csv
import importlib
import inspect
import sys

import numpy as np
import pytest
import torch

import flow_dpo
import flow_rwr
import nrg
import sample
from data import DIMENSIONS
from flow import interpolate

pytest.importorskip("diffusers")
latents, wan, wan_model = (
    importlib.import_module(f"examples.{name}") for name in ("latents", "wan", "wan_model")
)
STEPS = {"flow_dpo_step": flow_dpo, "flow_rwr_step": flow_rwr, "noisy_pair_step": nrg}


@pytest.fixture
def wired(tmp_path, monkeypatch):
    """(a function: flags -> what reached losses, `sample` and `guide`, by name, a list of arguments for each call; the
    clips (16, 2, C, T, H, W), texts (16, S, D) and scores (16, 2, 3) on disk)."""
    wan_model.write_tiny(tmp_path / "model")
    folder = tmp_path / "pairs"
    latents.write_tiny(folder)
    scores = np.random.default_rng(3).standard_normal((16, 2, 3)).round(3)
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        columns = [f"{name}_{side}" for name in DIMENSIONS for side in "BA"]  # in any order
        writer.writerow(["latent_A", "latent_B", "text", *columns])
        for i, pair in enumerate(scores):
            files = [f"{i}-{name}.npy" for name in ("latent_A", "latent_B", "text")]
            writer.writerow([*files, *(pair[side][k] for k in range(3) for side in (1, 0))])

    rng = np.random.default_rng(4)
    np.save(folder / "null.npy", rng.standard_normal((6, 8)).astype(np.float16))

    def load(name):
        return torch.stack(
            [torch.from_numpy(np.load(folder / f"{i}-{name}.npy")).float() for i in range(16)]
        )

    calls = {}

    def watch(name, honest):
        def watched(*args, **settings):
            bound = inspect.signature(honest).bind(*args, **settings)
            bound.apply_defaults()
            calls.setdefault(name, []).append(bound.arguments)
            return honest(*args, **settings)

        monkeypatch.setattr(wan, name, watched)

    for name, module in {**STEPS, "sample": sample, "guide": nrg}.items():
        watch(name, getattr(module, name))

    def run(*flags):
        calls.clear()
        where = [
            "--model",
            tmp_path / "model",
            "--data",
            folder,
            "--out",
            tmp_path / "out" / flags[0],
        ]
        monkeypatch.setattr(sys, "argv", ["wan.py", *map(str, [*where, "--device=cpu", *flags])])
        wan.main()
        return {name: list(each) for name, each in calls.items()}

    return (
        run,
        torch.stack((load("latent_A"), load("latent_B")), 1),
        load("text"),
        torch.tensor(scores).float(),
    )


def find(clip, clips):
    (place,) = torch.nonzero((clips == clip).flatten(2).all(2)).tolist()
    return place


TRAIN = ["--steps=2", "--batch=4", "--rank=2"]


@pytest.mark.parametrize("algo", ["dpo", "sft", "rwr", "nrg"])
def test_losses_get_each_clip_with_its_text_and_what_its_scores_say(wired, algo):
    run, clips, texts, scores = wired
    total = scores.mean(2)  # r = (VQ + MQ + TA) / 3
    flags = [algo, *TRAIN, "--batch=16", *(["--beta=7"] if algo == "dpo" else [])]
    (batches,) = run(*flags).values()
    sides = {"dpo": ("x0_w", "x0_l"), "nrg": ("x0_a", "x0_b")}.get(algo, ("x0",))
    places = set()
    for batch in batches:
        for i, text in enumerate(batch["y"]):
            (pair, side), *other = (find(batch[name][i], clips) for name in sides)
            places.add((pair, side))
            assert torch.equal(texts[pair], text) and other in ([], [[pair, 1 - side]])
            if algo in ("dpo", "sft"):
                assert total[pair, side] > total[pair, 1 - side]
            if algo == "dpo":
                assert batch["beta"] == 7
            if algo in ("sft", "rwr"):
                weight = (
                    1.0 if algo == "sft" else (total[pair, side].exp() / total.exp().mean()).item()
                )
                assert batch["weight"][i].item() == pytest.approx(weight, rel=1e-4)
            if algo == "nrg":
                assert side == 0
                assert (
                    batch["label"][i].tolist()
                    == (scores[pair, 0] - scores[pair, 1]).sign().tolist()
                )
    assert len(places) == (32 if algo == "rwr" else 16)


def test_flags_and_seeds_reach_noise_order_and_start(wired, tmp_path):
    run, clips, _, _ = wired
    ways, found = (["--shift=1"], ["--shift=3"], ["--shift=1", "--seed=1"]), []
    for flags in ways:
        batch = run("dpo", *TRAIN, *flags)["flow_dpo_step"][0]
        down = start_of(tmp_path / "out" / "dpo" / "dpo.safetensors", "lora_A")
        order = [find(clip, clips)[0] for clip in batch["x0_w"]]
        found.append((batch["t"], batch["x1"], order, down))
    (t, x1, order, down), (shifted, *same), other = found
    assert torch.allclose(shifted, 3 * t / (1 + 2 * t)) and torch.equal(x1, same[0])
    assert order == same[1] and torch.allclose(down, same[2], atol=1e-4)
    assert not torch.equal(t, other[0]) and not torch.equal(x1, other[1]) and order != other[2]
    assert not torch.allclose(down, other[3], atol=1e-2)
    heads = []
    for flags in ways:
        times = run("nrg", *TRAIN, *flags)["noisy_pair_step"][0]["t"]
        assert torch.equal(
            times, other[0] if "--seed=1" in flags else t
        )  # a reward's are not shifted
        heads.append(start_of(tmp_path / "out" / "nrg" / "nrg.safetensors", "cells.weight"))
    assert torch.allclose(heads[0], heads[1], atol=1e-2) and not torch.allclose(
        heads[0], heads[2], atol=1e-2
    )


def start_of(path, name):
    """Tensors of a file, which so few steps have hardly moved."""
    tensors, _ = wan_model.read_safetensors(path)
    return torch.cat([value.flatten() for key, value in sorted(tensors.items()) if name in key])


def test_samples_are_drawn_as_the_flags_say_and_guided_in_the_units_of_the_pairs(wired, tmp_path):
    run, clips, texts, _ = wired
    run("nrg", *TRAIN, "--lr=1e-3")
    path = tmp_path / "out" / "nrg" / "nrg.safetensors"
    tensors, _ = wan_model.read_safetensors(path)
    reward, t = wan.WanReward(wan_model.load_transformer(tmp_path / "model")), torch.rand(32)
    reward.load_state_dict(tensors)
    x0 = clips.flatten(0, 1)
    with torch.no_grad():
        scores = reward(interpolate(x0, torch.randn_like(x0), t), t, texts.repeat_interleave(2, 0))
    assert ((scores.std(0) > 0.6) & (scores.std(0) < 1.6)).all()
    flags = ["--n=5", "--steps=2", "--cfg=3", "--shift=2", f"--reward={path}", "--nrg-scale=30"]
    calls = run("sample", *flags, "--nrg=1,0,-2")
    (guided,) = calls["guide"]
    assert [*guided["weights"]] == [1, 0, -2] and guided["scale"] == 30
    assert guided["eps"] == sample.NRG_EPS and guided["interval"] == sample.NRG_INTERVAL
    null = torch.from_numpy(np.load(tmp_path / "pairs" / "null.npy")).float()
    assert null.any() and [call["guidance"] is None for call in calls["sample"]] == [True, False]
    for call in calls["sample"]:
        assert (call["steps"], call["cfg"], call["shift"]) == (2, 3.0, 2.0)
        assert torch.equal(call["y"], texts[:5]) and torch.equal(
            call["null"], null.expand_as(texts[:5])
        )
        assert torch.equal(call["x1"], calls["sample"][0]["x1"])
    other = run("sample", *flags, "--seed=1")["sample"][0]
    assert not torch.equal(other["x1"], calls["sample"][0]["x1"])
