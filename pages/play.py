"""Steer while you look: clips of one prompt and noise, sampled in a browser under reward guidance.

    python -m pages.play                                the base model, and Flow-NRG on it
    python -m pages.play --ckpt out/dpo/last.pt         an aligned model beside them

Tab "steer" compares base, steered and aligned models. Tab "drift" moves along the line from the
base model to an aligned one, theta_base + s (theta - theta_base), for adapters LoRA strength s.
"""

import base64
import copy
import itertools
import shlex
import subprocess
import sys
from pathlib import Path
from threading import Lock

import imageio.v3 as iio
import numpy as np
import torch

import world
from data import DIMENSIONS, Vocabulary
from model import load_velocity
from nrg import SteeredPolicy, load_noisy_reward
from pages.server import Server
from real_data.video import to_pixels
from reward import load_reward
from runtime.checkpoint import WEIGHTS, check_same_data
from runtime.cli import BadInput, Parser, finite, interval, pick_device, run, seed, triple
from sample import NRG_EPS, STEPS, sample

OUT = "out/play"
EVERY = 2  # steps between two looks at the clip
KINDS = {"prompt": str, "seed": seed, "cfg": finite, "nrg": triple, "nrg-scale": finite}
KINDS |= {"nrg-interval": interval}  # flags of sample.py
NO_GUIDANCE = (0.0, 0.0, 0.0)


class Play:
    """The page's calls."""

    def __init__(self, args):
        self.device, self.queue = pick_device(args.device), Lock()
        self.args = args
        self.base, self.words = load_velocity(args.base)
        if self.base.config.channels != 3:
            raise BadInput(f"--base {args.base}: makes latents, which cannot be looked at")
        self.vocabulary = Vocabulary(self.words)
        self.reward = self.load(load_noisy_reward, args.nrg_ckpt)
        self.judge = self.load(load_reward, args.reward)
        self.aligned = {str(path): self.load(load_velocity, path) for path in args.ckpt}
        self.base.to(self.device)

    def load(self, load_network, path):
        model, words = load_network(path)
        check_same_data(str(path), model.config, words, "--base", self.base.config, self.words)
        return model.to(self.device)

    def calls(self):
        return {"about": self.about, "sample": self.sample, "save": self.save}

    def about(self, data):
        """What the page is built from."""
        toy = [] if self.vocabulary.open else world.split_prompts(*world.SPLIT_NAMES)
        prompts = [world.prompt_text(prompt) for prompt in toy]
        return {"prompts": prompts, "frames": self.base.config.frames}

    def flags(self, data):
        """A request's settings as flags of sample.py: those of every clip, and guidance."""
        weights = ",".join(str(data.get(dimension)) for dimension in DIMENSIONS)
        flags = [f"--{name}={data.get(name)}" for name in ("prompt", "seed", "cfg")]
        guidance = [f"--nrg={weights}", f"--nrg-scale={data.get('scale')}"]
        return flags, [*guidance, f"--nrg-interval={data.get('from')},{data.get('to')}"]

    def sample(self, data):
        """Answers with a line for each step of each clip, the steered one first."""
        parser = Parser("")
        for name, kind in KINDS.items():
            parser.add_argument(f"--{name}", type=kind)
        args = parser.parse_args(sum(self.flags(data), []))
        y = self.vocabulary.encode([args.prompt], self.base.config.max_text).to(self.device)
        rng = torch.Generator().manual_seed(args.seed)
        x1 = torch.randn(1, *self.base.config.video_shape, generator=rng).to(self.device)
        if data.get("tab") == "drift":
            models = {"drifted": self.drifted(data.get("strength")), "base": self.base}
        else:
            models = {"steered": self.base, "base": self.base, **self.aligned}

        def answer(send):
            with self.queue:
                for name, policy in models.items():
                    weights = args.nrg if name == "steered" else NO_GUIDANCE
                    settings = weights, args.nrg_scale, NRG_EPS, args.nrg_interval, args.cfg
                    model = SteeredPolicy(policy, self.reward, *settings)
                    self.sample_clip(name, model, x1, y, send)

        return answer

    def drifted(self, strength):
        """theta_base + s (theta - theta_base), theta of the first model of --ckpt."""
        if not self.aligned:
            raise ValueError("drift goes from the base to an aligned model: start with --ckpt FILE")
        model, s = copy.deepcopy(self.base), finite(strength)
        aligned = next(iter(self.aligned.values())).state_dict()
        for name, value in model.state_dict().items():
            value.copy_(value + s * (aligned[name] - value))
        return model

    def sample_clip(self, name, model, x1, y, send):
        step = itertools.count()

        def watched(x_t, t, y):
            """The model; sends each step, and some with the clip as it is expected to become."""
            v, number = model(x_t, t, y), next(step)
            look = self.look(x_t - t * v, y) if number % EVERY == 0 else {}
            send({"name": name, "done": number / STEPS, "t": t.item(), **look})
            return v

        video = sample(watched, x1, y, STEPS)
        if not video.isfinite().all():
            return send({"error": "the clip is not finite; lower the weights, scale or CFG"})
        send({"name": name, "done": 1, "t": 0, **self.look(video, y)})

    @torch.no_grad()
    def look(self, video, y):
        """The frames of a clip as one picture, and its learned and, on the toy, true scores."""
        film = np.concatenate(list(to_pixels(video)[0]), 1)
        picture = base64.b64encode(iio.imwrite("<bytes>", film, extension=".png")).decode()
        look = {"film": f"data:image/png;base64,{picture}"}
        look["learned"] = self.judge.normalised(video, y)[0].tolist()
        if not self.vocabulary.open:
            prompt = world.prompt_attributes([self.vocabulary.decode(y[0].tolist())])
            look["true"] = world.oracle(video.cpu(), prompt)[0].tolist()
        return look

    def save(self, data):
        """Runs sample.py, which writes GIF and PNG of base and steered clip, and of aligned ones."""
        flags, guidance = self.flags(data)
        base = [f"--ckpt={self.args.base}", f"--nrg-ckpt={self.args.nrg_ckpt}"]
        runs = [[*base, *guidance, f"--out={OUT}"]]
        for number, path in enumerate(self.aligned, 1):
            runs.append([f"--ckpt={path}", f"--out={OUT}/aligned-{number}"])
        lines = []
        for own in runs:
            command = ["sample.py", "--n=1", *flags, *own]
            done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
            lines += [f"python {shlex.join(command)}", done.stdout + done.stderr]
        return {"lines": lines}


def main():
    parser = Parser("Steer while you look: reward guidance by sliders, in a browser.")
    add = parser.add_argument
    add("--ckpt", type=Path, nargs="*", default=[], help="aligned models, to compare")
    add("--base", type=Path, default=WEIGHTS / "base.pt", help="the video model that is steered")
    add("--nrg-ckpt", type=Path, default=WEIGHTS / "nrg.pt", help="its noise-aware reward")
    add("--reward", type=Path, default=WEIGHTS / "reward.pt", help="VideoReward, which judges")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    Server("play.html", Play(parser.parse_args()).calls()).serve_forever()


if __name__ == "__main__":
    run(main)
