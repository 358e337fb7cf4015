"""Steer while you look: clips of one prompt and noise, sampled in a browser under reward guidance.

    python -m pages.play                                the base model, and Flow-NRG on it
    python -m pages.play --ckpt out/dpo/last.pt         an aligned model beside them

Tab "steer" compares base, steered and aligned models. Tab "drift" moves along the line from the
base model to an aligned one, theta_base + s (theta - theta_base), for adapters LoRA strength s.
"""

import base64
import copy
import shlex
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch

import sample
import world
from data import Vocabulary
from flags import Parser
from model import load_velocity
from nrg import SteeredPolicy, load_noisy_reward
from pages.server import Server
from real_data.video import to_pixels
from reward import load_reward
from runtime.checkpoint import WEIGHTS, check_same_data
from runtime.cli import BadInput, pick_device, run

OUT = "out/play"
FLAGS = ("--prompt={prompt}", "--seed={seed}", "--cfg={cfg}", "--nrg={VQ},{MQ},{TA}")
FLAGS += ("--nrg-scale={scale}", "--nrg-interval={from},{to}")  # of sample.py


class Play:
    """The page's calls. Their settings are the fields of its form."""

    def __init__(self, args):
        self.args, self.device = args, pick_device()
        self.base, self.words = load_velocity(args.base)
        if self.base.config.channels != 3:
            raise BadInput(f"--base {args.base}: makes latents, which cannot be looked at")
        self.base.to(self.device)
        self.vocabulary = Vocabulary(self.words)
        self.reward = self.load(load_noisy_reward, args.nrg_ckpt)
        self.judge = self.load(load_reward, args.reward)
        self.aligned = {str(path): self.load(load_velocity, path) for path in args.ckpt}

    def load(self, load_network, path):
        model, words = load_network(path)
        check_same_data(str(path), model.config, words, "--base", self.base.config, self.words)
        return model.to(self.device)

    def about(self, settings):
        """What the page is built from."""
        toy = [] if self.vocabulary.open else world.split_prompts(*world.SPLIT_NAMES)
        prompts = [world.prompt_text(prompt) for prompt in toy]
        _, frames, height, width = self.base.config.video_shape
        return {"prompts": prompts, "frames": frames, "ratio": width / height}

    def sample(self, settings):
        """Answers with a line for each step of each clip, the steered one first."""
        args = sample.arguments(flags(settings))
        y = self.vocabulary.encode([args.prompt], self.base.config.max_text).to(self.device)
        rng = torch.Generator().manual_seed(args.seed)
        x1 = torch.randn(1, *self.base.config.video_shape, generator=rng).to(self.device)
        if settings["tab"] == "drift":
            models = {"drifted": self.drifted(settings["strength"]), "base": self.base}
        else:
            models = {"steered": self.base, "base": self.base, **self.aligned}

        def send_steps(send):
            for name, policy in models.items():
                weights = args.nrg if name == "steered" else (0.0, 0.0, 0.0)
                guidance = weights, args.nrg_scale, args.nrg_eps, args.nrg_interval
                model = SteeredPolicy(policy, self.reward, *guidance, args.cfg)

                def watched(x_t, t, y):
                    v = model(x_t, t, y)
                    send({"name": name, "t": t.item(), **self.look(x_t - t * v, y)})
                    return v

                video = sample.sample(watched, x1, y, args.steps)
                send({"name": name, "t": 0, **self.look(video, y)})

        return send_steps

    def drifted(self, strength):
        """theta_base + s (theta - theta_base), theta of the first model of --ckpt."""
        if not self.aligned:
            raise ValueError("drift goes from the base to an aligned model: start with --ckpt FILE")
        model, s = copy.deepcopy(self.base), float(strength)
        aligned = next(iter(self.aligned.values())).state_dict()
        for name, value in model.state_dict().items():
            value.copy_(value + s * (aligned[name] - value))
        return model

    @torch.no_grad()
    def look(self, video, y):
        """The frames of a clip as one picture, and its learned and, on the toy, true scores."""
        if not video.isfinite().all():
            return {"error": "the clip is not finite; lower the weights, scale or CFG"}
        film = np.concatenate(list(to_pixels(video)[0]), 1)
        picture = base64.b64encode(iio.imwrite("<bytes>", film, extension=".png")).decode()
        look = {"film": f"data:image/png;base64,{picture}"}
        look["learned"] = self.judge.normalised(video, y)[0].tolist()
        if not self.vocabulary.open:
            prompt = world.prompt_attributes([self.vocabulary.decode(y[0].tolist())])
            look["true"] = world.oracle(video.cpu(), prompt)[0].tolist()
        return look

    def save(self, settings):
        """Runs sample.py, which writes GIF and PNG of base, steered and aligned clips."""
        lines, common = [], [*flags(settings), f"--nrg-ckpt={self.args.nrg_ckpt}", "--n=1"]
        for number, path in enumerate([self.args.base, *self.aligned]):
            command = ["sample.py", *common, f"--ckpt={path}", f"--out={OUT}/{number}"]
            done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
            lines += [f"python {shlex.join(command)}", done.stdout + done.stderr]
        return {"lines": lines}


def flags(settings):
    return [flag.format_map(settings) for flag in FLAGS]


def main():
    parser = Parser("Steer while you look: reward guidance by sliders, in a browser.")
    add = parser.add_argument
    add("--ckpt", type=Path, nargs="*", default=[], help="aligned models, to compare")
    add("--base", type=Path, default=WEIGHTS / "base.pt", help="the video model that is steered")
    add("--nrg-ckpt", type=Path, default=WEIGHTS / "nrg.pt", help="its noise-aware reward")
    add("--reward", type=Path, default=WEIGHTS / "reward.pt", help="VideoReward, which judges")
    play = Play(parser.parse_args())
    Server("play.html", [play.about, play.sample, play.save]).serve_forever()


if __name__ == "__main__":
    run(main)
