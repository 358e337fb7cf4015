"""The toy world: coloured shapes that move, clips of known quality, and a truth that reads pixels.

It stands in for the prompts, generators and annotators of section 3.1. Every rendered clip carries
the quality it was drawn with, and `oracle` reads (VQ, MQ, TA) from the pixels of any clip.

    VQ  visual quality   what one frame shows: blur, faded contrast, haze
    MQ  motion quality   what only several frames show: jitter, flicker of the size, standing still
    TA  text alignment   whether colour, shape and direction are the ones the prompt asks for

Simplified: one object on a dark ground, three attributes, low-frequency defects. (A small model
cannot generate pixel noise; with noise as a defect it would be cleaner than its data.)
Videos are `(B, 3, T, H, W)` float in [-1, 1], H = W. Attributes are `(B, 3)` int64: colour, shape,
direction. Positions and lengths are fractions of the frame's height.
"""

import re
from dataclasses import dataclass
from itertools import permutations

import torch

# ---------------------------------------------------------------------------------------------
# Prompts: "a red circle moving left"

COLOURS = {"red": (1.0, 0.0, 0.0), "yellow": (1.0, 1.0, 0.0), "green": (0.0, 1.0, 0.0)}
COLOURS |= {"cyan": (0.0, 1.0, 1.0), "blue": (0.0, 0.0, 1.0), "magenta": (1.0, 0.0, 1.0)}
# Signed distances (inside < 0) from shapes of area pi. They differ in their low frequencies: a
# square or a ring, blurred, is taken for a circle.
SHAPES = {
    "circle": lambda x, y: torch.sqrt(x * x + y * y) - 1.0,
    "triangle": lambda x, y: torch.maximum(y, 0.866 * x.abs() - 0.5 * y) - 0.777,
    "cross": lambda x, y: torch.minimum(
        torch.maximum(x.abs() - 1.3, y.abs() - 0.349), torch.maximum(x.abs() - 0.349, y.abs() - 1.3)
    ),
    "bar": lambda x, y: torch.maximum(x.abs() - 1.4, y.abs() - 0.561),
}
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
CHOICES = (len(COLOURS), len(SHAPES), len(DIRECTIONS))
SPLIT_NAMES = ("train", "validation", "hard")

PALETTE = torch.tensor(list(COLOURS.values()))  # (6, 3)
HUE = torch.nn.functional.normalize(PALETTE - PALETTE.mean(1, keepdim=True))  # (6, 3)
HEADING = torch.tensor(list(DIRECTIONS.values()))  # (4, 2), y points down


def prompt_text(attributes):
    """Attributes of one clip (3 ints) to its prompt."""
    colour, shape, direction = (int(a) for a in attributes)
    return f"a {list(COLOURS)[colour]} {list(SHAPES)[shape]} moving {list(DIRECTIONS)[direction]}"


def prompt_attributes(prompts):
    """Prompts to attributes (B, 3). ValueError for a prompt without exactly one of each."""
    tables = {"colour": list(COLOURS), "shape": list(SHAPES), "direction": list(DIRECTIONS)}
    attributes = []
    for prompt in prompts:
        words = re.findall(r"\w+", prompt.lower())
        for name, table in tables.items():
            found = [table.index(word) for word in words if word in table]
            if len(found) != 1:
                raise ValueError(f"prompt {prompt!r} must name one {name} of: {', '.join(table)}")
            attributes += found
    return torch.tensor(attributes, dtype=torch.int64).reshape(-1, 3)


def split_of(colour, shape, direction):
    """The number of a prompt's split, for ints or tensors. For each colour and shape one direction
    is unseen in training: half of these 24 validate, half are hard. Every split has every word."""
    unseen = (colour + shape + direction) % 4 == 0
    hard = (colour + shape // 2) % 2 == 0
    return unseen * (1 + hard)


def split_prompts(*names):
    """Attributes (N, 3) of all prompts in the named splits, in a fixed order. Base models see train
    (72 prompts) and validation (12), preference pairs train alone. hard (12) is held out of all
    training: the TA-Hard set."""
    every = torch.cartesian_prod(*(torch.arange(n) for n in CHOICES))
    split = split_of(*every.T)
    return torch.cat([every[split == SPLIT_NAMES.index(name)] for name in names])


# ---------------------------------------------------------------------------------------------
# Generators: twelve quality profiles (paper, Table 1: six "pre-Sora" and six "modern" models)

# Mean hidden quality of each generator in VQ, MQ, TA. An era moves all three by +-e; in it the six
# models are the orders of (+d, 0, -d). Over the twelve, two dimensions covary by e^2 - d^2 / 3 = 0:
# good looks tell nothing about motion.
ERA, SPREAD = 0.12, 3**0.5 * 0.12  # e, d
OFFSETS = torch.tensor(list(permutations((SPREAD, 0.0, -SPREAD))))  # (6, 3)
PROFILES = torch.cat((0.5 - ERA + OFFSETS, 0.5 + ERA + OFFSETS))  # (12, 3)
GENERATORS = tuple(f"{era}-{i}" for era in ("early", "modern") for i in range(1, 7))

# The strongest form of each defect, as a fraction of the frame's height where it is a length.
MAX_BLUR = 0.06  # standard deviation of the Gaussian
MAX_FADE = 0.6  # share of the object's contrast that is lost
MAX_HAZE = 0.4  # how far everything moves to light grey
MAX_JITTER = 0.05  # standard deviation of each frame's displacement
MAX_FLICKER = 0.20  # standard deviation of the log of each frame's size
MAX_MISTAKE = 0.30  # probability that an attribute is not the one asked for

GROUND = 0.08  # brightness of the ground, in [0, 1]
HAZE = 0.7  # brightness that haze tends to
# An object fills a sixth of the frame: small models learn large shapes much faster (docs/paper.md)
TRAVEL = 0.32  # distance the object covers in the clip
RADIUS = 0.23  # of the circle with the object's area
SHARP, SOFT = 0.03, 0.184  # widths of edges that cost VQ nothing, and a third


@dataclass
class Clips:
    """B clips before rendering. `hidden` is the quality they were drawn with; no judge reads it."""

    prompt: torch.Tensor  # (B, 3) attributes asked for
    shown: torch.Tensor  # (B, 3) attributes rendered
    hidden: torch.Tensor  # (B, 3) in [0, 1]: VQ, MQ, and the share of attributes that are right
    generator: torch.Tensor  # (B,)
    centre: torch.Tensor  # (B, 2) of the path
    radius: torch.Tensor  # (B,)
    severity: torch.Tensor  # (B, 5) in [0, 1]: blur, fade, haze, jitter, flicker
    wobble: torch.Tensor  # (B, T, 3) of mean 0 and variance 1 over the frames: x, y and log size

    def __len__(self):
        return len(self.prompt)

    def __getitem__(self, index):
        return Clips(*(value[index] for value in vars(self).values()))


def join(a, b):
    """The clips of a, then those of b."""
    return Clips(*map(torch.cat, zip(vars(a).values(), vars(b).values())))


def draw_clips(prompt, generator, rng, frames=8, clean=False):
    """Clips for attributes `prompt` (B, 3) by `generator` (B,) in 0..11, with a torch.Generator.
    clean=True draws the same scenes without any defect. No clip shows a hard combination, not even
    by mistake under another prompt."""
    count, mean = len(prompt), PROFILES[generator]  # mean (B, 3)
    # u^((1 - m) / m) has mean m and stays in [0, 1]: every generator has good and bad clips
    quality = torch.rand(count, 3, generator=rng) ** ((1 - mean) / mean)
    if clean:
        quality, mean = torch.ones(count, 3), torch.ones(count, 3)
    split = 1 + 0.5 * (torch.rand(count, 5, generator=rng) - 0.5)  # of the loss over the defects
    severity = ((1 - quality)[:, [0, 0, 0, 1, 1]] * split).clamp(0, 1)
    mistaken = torch.rand(count, 3, generator=rng) < MAX_MISTAKE * (1 - mean[:, 2:])
    shift = torch.stack([torch.randint(1, n, (count,), generator=rng) for n in CHOICES], 1)
    centre = 0.5 + 0.12 * (torch.rand(count, 2, generator=rng) - 0.5)
    radius = RADIUS * (1 + 0.2 * (torch.rand(count, generator=rng) - 0.5))
    # each clip's draws are standardised, so that a severity shows in full even in a few frames
    wobble = torch.randn(count, frames, 3, generator=rng)
    spread = wobble.std(1, correction=0, keepdim=True).clamp(min=1e-3)
    wobble = (wobble - wobble.mean(1, keepdim=True)) / spread
    shown = torch.where(mistaken, (prompt + shift) % torch.tensor(CHOICES), prompt)
    hard = split_of(*shown.T) == SPLIT_NAMES.index("hard")
    shown = torch.where(hard[:, None], prompt, shown)
    hidden = torch.cat((quality[:, :2], (shown == prompt).float().mean(1, keepdim=True)), 1)
    return Clips(prompt, shown, hidden, generator, centre, radius, severity, wobble)


def _mask(distance, centre, radius, size):
    """Antialiased (..., size, size) in [0, 1] of a shape with centre (..., 2), radius (...)."""
    grid = (torch.arange(size, device=centre.device) + 0.5) / size
    scale = radius[..., None, None].clamp(min=1e-3)
    x = (grid[None, :] - centre[..., 0, None, None]) / scale
    y = (grid[:, None] - centre[..., 1, None, None]) / scale
    return (0.5 - distance(x, y) * (scale * size)).clamp(0, 1)


def render(clips, size=32):
    """Clips -> videos (B, 3, T, size, size) float32 in [-1, 1]."""
    frames = clips.wobble.shape[1]
    progress = torch.linspace(-0.5, 0.5, frames) if frames > 1 else torch.zeros(1)
    heading = HEADING[clips.shown[:, 2]]  # (B, 2)
    centre = clips.centre[:, None] + TRAVEL * progress[None, :, None] * heading[:, None]
    centre = centre + MAX_JITTER * clips.severity[:, 3, None, None] * clips.wobble[..., :2]
    change = MAX_FLICKER * clips.severity[:, 4, None] * clips.wobble[..., 2]
    radius = clips.radius[:, None] * torch.exp(change)  # (B, T)
    mask = torch.empty(len(clips), size, frames, size)  # (B, H, T, W)
    for number, shape in enumerate(SHAPES.values()):
        which = clips.shown[:, 1] == number
        mask[which] = _mask(shape, centre[which], radius[which], size).transpose(1, 2)
    # a Gaussian blur is one small matrix on each side of the picture
    distance = (torch.arange(size)[:, None] - torch.arange(size)[None]) / size  # (H, H)
    sigma = (MAX_BLUR * clips.severity[:, 0, None, None]).clamp(min=1e-4)
    kernel = torch.softmax(-0.5 * (distance / sigma) ** 2, -1)  # (B, H, H)
    mask = (kernel @ mask.flatten(2)).reshape(len(clips), size * frames, size)
    mask = (mask @ kernel.transpose(1, 2)).unflatten(1, (size, frames)).transpose(1, 2)
    # the object fades, then haze covers it and the grey ground, then [0, 1] -> [-1, 1]
    fade = MAX_FADE * clips.severity[:, 1, None]  # (B, 1)
    haze = MAX_HAZE * clips.severity[:, 2, None]  # (B, 1)
    colour = 2 * (1 - haze) * (1 - fade) * (PALETTE[clips.shown[:, 0]] - GROUND)  # (B, 3)
    ground = 2 * ((1 - haze) * GROUND + haze * HAZE) - 1  # (B, 1)
    one = (..., None, None, None)
    return torch.addcmul(ground[one], mask[:, None], colour[one])


# ---------------------------------------------------------------------------------------------
# The oracle: true scores from pixels

# How much better the prompt's attribute must match than any other to count as right beyond doubt.
# TA is thus nearly discrete, three attributes right or wrong, as a person would judge it.
MARGIN = {"colour": 0.15, "shape": 0.06, "direction": 0.25}


@torch.no_grad()
def measure(video):
    """Measurements of videos (B, 3, T, H, W), free of the prompt: a dict of per-clip numbers.

    contrast, haze, softness (in heights), stray (share of the object's mass far from its centre),
    jitter, flicker, travel (B, 2), start (B, 2), radius, present (share of frames that show an
    object), and the match in [-1, 1] with each colour (B, 6), shape (B, 4) and direction (B, 4)."""
    video = video.float().clamp(-1, 1) * 0.5 + 0.5
    frames, size = video.shape[2:4]
    ground = video.flatten(2).median(-1).values  # (B, 3)
    difference = video - ground[:, :, None, None, None]  # (B, 3, T, H, W)
    strength = difference.abs().amax(1)  # (B, T, H, W)
    top = max(1, size * size // 50)
    peak = strength.flatten(2).topk(top).values.mean(-1)  # (B, T)
    clip_peak = peak.mean(1).clamp(min=1e-3)
    level = strength / peak.clamp(min=0.05)[..., None, None]
    mask = ((level - 0.5) * 4 + 0.5).clamp(0, 1)  # (B, T, H, W)
    # an object stands out, does not fade away, and does not fill the frame as noise would
    present = (peak > 0.12) & (peak > 0.4 * clip_peak[:, None]) & (mask.mean((-1, -2)) < 0.45)
    mask = mask * present[..., None, None]

    # where the object is and how large: pixels are counted, then divided by the frame's size
    grid = (torch.arange(size, device=video.device) + 0.5) / size
    mass = mask.sum((-1, -2)).clamp(min=1e-3)  # (B, T)
    moment = (mask.sum(-2) * grid).sum(-1), (mask.sum(-1) * grid).sum(-1)
    centre = torch.stack(moment, -1) / mass[..., None]  # (B, T, 2)
    area = mass / size**2
    radius = (area / torch.pi).sqrt()
    off_x, off_y = grid - centre[..., :1], grid - centre[..., 1:]  # (B, T, W), (B, T, H)
    far = off_x[..., None, :] ** 2 + off_y[..., :, None] ** 2 > (2 * radius[..., None, None]) ** 2
    seen = {"contrast": clip_peak, "haze": ground.mean(1), "present": present.float().mean(1)}
    seen |= {"start": centre[:, 0], "radius": radius.mean(1)}
    seen["stray"] = ((mask * far).sum((-1, -2)) / mass).mean(1)  # a second object, a ghost, a smear

    # VQ: how wide the edges are
    dx = level[..., :-1, 1:] - level[..., :-1, :-1]
    dy = level[..., 1:, :-1] - level[..., :-1, :-1]
    slope = (dx * dx + dy * dy).sqrt().flatten(2).topk(top).values.mean(-1) * size  # (B, T)
    seen["softness"] = (1 / slope.clamp(min=1.0)).mean(1)

    # MQ: a steady path has no second difference, a steady size no first one
    second = centre[:, 2:] - 2 * centre[:, 1:-1] + centre[:, :-2]
    in_three = present[:, 2:] & present[:, 1:-1] & present[:, :-2]
    seen["jitter"] = (second.norm(dim=-1) * in_three).sum(1) / in_three.sum(1).clamp(min=1)
    change = (area[:, 1:] / area[:, :-1]).log().abs().clamp(max=1.5)
    in_two = present[:, 1:] & present[:, :-1]
    seen["flicker"] = (change * in_two).sum(1) / in_two.sum(1).clamp(min=1)
    # the slope of a line through the centres, by least squares over the frames with an object
    num_present = present.sum(1, keepdim=True).clamp(min=1)
    clock = torch.linspace(-0.5, 0.5, frames, device=video.device) * present
    clock = (clock - clock.sum(1, keepdim=True) / num_present) * present
    variance = (clock * clock).sum(1, keepdim=True).clamp(min=1e-3)
    seen["travel"] = travel = (clock[..., None] * centre).sum(1) / variance

    # TA: hue is what is left of a colour without its grey part, so haze does not change it
    total = mask.sum((1, 2, 3)).clamp(min=1e-3)[:, None]
    colour = (difference * mask[:, None]).sum((2, 3, 4)) / total  # (B, 3)
    hue = colour - colour.mean(1, keepdim=True)
    hue = hue / hue.norm(dim=1, keepdim=True).clamp(min=0.05)
    seen["colour"] = hue @ HUE.to(video.device).T
    template = torch.stack([_mask(shape, centre, radius, size) for shape in SHAPES.values()], 1)
    shared = torch.minimum(template, mask[:, None]).sum((-1, -2))  # (B, 4, T)
    covered = torch.maximum(template, mask[:, None]).sum((-1, -2)).clamp(min=1e-3)
    seen["shape"] = (shared / covered * present[:, None]).sum(-1) / num_present
    heading = travel / travel.norm(dim=1, keepdim=True).clamp(min=0.1)
    seen["direction"] = heading @ HEADING.to(video.device).T
    return seen


def attributes_right(video, prompt, seen=None):  # seen: measure(video), if it is known
    """(B, 3) in [0, 1]: how surely colour, shape and direction are the prompt's; 0.5 is a draw."""
    seen = seen or measure(video)
    right = []
    for (name, margin), asked in zip(MARGIN.items(), prompt.to(video.device).split(1, 1)):
        own = seen[name].gather(1, asked)
        other = seen[name].scatter(1, asked, -2.0).amax(1, keepdim=True)
        right.append(0.5 + 0.5 * (own - other) / margin)
    return torch.cat(right, 1).clamp(0, 1) * seen["present"][:, None]


def oracle(video, prompt):
    """The truth: scores (B, 3) for VQ, MQ, TA of videos (B, 3, T, H, W) in [-1, 1].

    prompt: attributes (B, 3) or a list of B prompts. A clean clip that follows its prompt scores
    about 1 in each dimension, the worst rendered one about 0; one without an object scores below 0
    in VQ and MQ and 0 in TA."""
    prompt = prompt if torch.is_tensor(prompt) else prompt_attributes(prompt)
    seen = measure(video)
    missing, faded = 1 - seen["present"], (1 - seen["contrast"] / (1 - GROUND)).clamp(0, 1)
    hazy = ((seen["haze"] - GROUND).abs() / (MAX_HAZE * (HAZE - GROUND))).clamp(0, 2)
    soft = ((seen["softness"] - SHARP) / (SOFT - SHARP)).clamp(0, 2)
    vq = 1 - (faded / 0.75 + hazy + soft) / 3 - seen["stray"] - missing
    shaky, flickering = (seen["jitter"] / 0.16).clamp(0, 2), (seen["flicker"] / 0.46).clamp(0, 2)
    still = (1 - seen["travel"].norm(dim=1) / (0.6 * TRAVEL)).clamp(0, 1)
    mq = 1 - (shaky + flickering) / 2 - still - missing
    ta = attributes_right(video, prompt, seen).mean(1)
    return torch.stack((vq, mq, ta), 1)


# ---------------------------------------------------------------------------------------------
# The annotators (section 3.1): three look at each pair, a reviewer decides if they disagree

# Of true scores over all generators and prompts: they put the dimensions on one scale
TRUE_MEAN = torch.tensor([0.538, 0.468, 0.869])
TRUE_STD = torch.tensor([0.307, 0.351, 0.204])
ANNOTATOR_NOISE = 0.3  # standard deviation of one person's view of one clip, in TRUE_STD
REVIEWER_NOISE = 0.15
TIE_BELOW = torch.tensor([0.5, 0.5, 0.7])  # a tie for a person, in TRUE_STD
OVERALL_TIE = torch.tensor(0.35)  # the same for the mean of the three z-scores
LENIENCY = 0.5  # standard deviation of one person's offset on the 1-5 scale, shared by both clips


def _standard(score_a, score_b):
    return (torch.stack((score_a, score_b)).cpu() - TRUE_MEAN) / TRUE_STD  # (2, B, 3)


def _vote(scores, tie_below, rng):
    def opinion(people, noise):
        seen = scores + noise * torch.randn(people, *scores.shape, generator=rng)
        difference = seen[:, 0] - seen[:, 1]  # (people, B, ...)
        return torch.sign(difference).long() * (difference.abs() > tie_below)

    three = opinion(3, ANNOTATOR_NOISE)
    unanimous = (three == three[0]).all(0)
    return torch.where(unanimous, three[0], opinion(1, REVIEWER_NOISE)[0]), unanimous


def annotate(score_a, score_b, rng):
    """True scores (B, 3) of clips A and B -> labels (B, 3) int64 (1: A better, -1: B better, 0:
    tie), and whether the three annotators agree (B, 3) bool. rng: a CPU torch.Generator."""
    return _vote(_standard(score_a, score_b), TIE_BELOW, rng)


def annotate_overall(score_a, score_b, rng):
    """The benchmark's fourth label, Overall (B,), by the mean of the three z-scores."""
    return _vote(_standard(score_a, score_b).mean(-1), OVERALL_TIE, rng)[0]


def rate(score_a, score_b, rng):
    """Mean opinion scores (B, 2, 3): the mean of three people's 1-5 ratings, a standard deviation a
    step. A person's offset moves ratings, but not comparisons of two clips."""
    scores = _standard(score_a, score_b)
    noise = ANNOTATOR_NOISE * torch.randn(3, *scores.shape, generator=rng)
    noise = noise + LENIENCY * torch.randn(3, 1, *scores.shape[1:], generator=rng)
    return (3 + scores + noise).round().clamp(1, 5).mean(0).transpose(0, 1)
