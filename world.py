"""The toy world: coloured shapes that move, clips of known quality, and a truth that reads pixels.

It stands in for section 3.1 of the paper: prompts, twelve text-to-video generators, annotators.
Nobody knows the true quality of a real video. Here it is known twice: every rendered clip carries
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
from dataclasses import dataclass, fields

import torch

# ---------------------------------------------------------------------------------------------
# Prompts: "a red circle moving left"

COLOURS = {"red": (1.0, 0.0, 0.0), "yellow": (1.0, 1.0, 0.0), "green": (0.0, 1.0, 0.0)}
COLOURS |= {"cyan": (0.0, 1.0, 1.0), "blue": (0.0, 0.0, 1.0), "magenta": (1.0, 0.0, 1.0)}
# Shapes that differ in their low frequencies: a square or a ring, blurred, is taken for a circle.
SHAPES = ("circle", "triangle", "cross", "bar")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
CHOICES = (len(COLOURS), len(SHAPES), len(DIRECTIONS))

PALETTE = torch.tensor(list(COLOURS.values()))  # (6, 3)
HEADING = torch.tensor(list(DIRECTIONS.values()))  # (4, 2), y points down


def prompt_text(attributes):
    """Attributes of one clip (3 ints) to its prompt."""
    colour, shape, direction = (int(a) for a in attributes)
    return f"a {list(COLOURS)[colour]} {SHAPES[shape]} moving {list(DIRECTIONS)[direction]}"


def prompt_attributes(prompts):
    """Prompts to attributes (B, 3). ValueError for a prompt without exactly one of each."""
    tables = {"colour": list(COLOURS), "shape": list(SHAPES), "direction": list(DIRECTIONS)}
    rows = []
    for prompt in prompts:
        words = re.findall(r"\w+", prompt.lower())
        row = []
        for name, table in tables.items():
            found = [table.index(word) for word in words if word in table]
            if len(found) != 1:
                fault = f"must name exactly one {name} of: {', '.join(table)}"
                raise ValueError(f"prompt {prompt!r} {fault}")
            row += found
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


def _split_table():
    """(6, 4, 4) int: 0 train, 1 validation, 2 hard. For each colour and shape one direction is
    unseen in training: half of these 24 validate, half are hard. Every split has every word."""
    colour, shape, direction = torch.meshgrid(*(torch.arange(n) for n in CHOICES), indexing="ij")
    unseen = (colour + shape + direction) % 4 == 0
    hard = (colour + shape // 2) % 2 == 0
    return torch.where(unseen, 1 + hard.long(), 0)


SPLIT = _split_table()
SPLIT_NAMES = ("train", "validation", "hard")


def split_prompts(*names):
    """Attributes (N, 3) of all prompts in the named splits, in a fixed order.

    Base models see train (72 prompts) and validation (12). Preference pairs use train alone, so the
    reward is validated on new prompts. hard (12) is held out of all training: the TA-Hard set."""
    return torch.cat([torch.nonzero(SPLIT == SPLIT_NAMES.index(name)) for name in names])


# ---------------------------------------------------------------------------------------------
# Generators: twelve quality profiles (paper, Table 1: six "pre-Sora" and six "modern" models)


def _profiles():
    """(12, 3) mean hidden quality of each generator in VQ, MQ, TA.

    An era moves all three by +-e; in it the six models are the orders of (+d, 0, -d). Over the
    twelve, two dimensions covary by e^2 - d^2 / 3 = 0: good looks tell nothing about motion."""
    e, d = 0.12, 3**0.5 * 0.12
    orders = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
    offsets = torch.tensor([d, 0.0, -d])[orders]  # (6, 3)
    return torch.cat((0.5 - e + offsets, 0.5 + e + offsets))


PROFILES = _profiles()
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
# An object fills a sixth of the frame: a small model learns the shape of a large object much faster
# (docs/paper.md). Its path is as long as the frame then allows, its blur in proportion.
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
        return Clips(*(getattr(self, field.name)[index] for field in fields(self)))


def join(a, b):
    """The clips of a, then those of b."""
    names = [field.name for field in fields(Clips)]
    return Clips(*(torch.cat((getattr(a, name), getattr(b, name))) for name in names))


def draw_clips(prompt, generator, rng, frames=8, clean=False):
    """Clips for attributes `prompt` (B, 3) by `generator` (B,) in 0..11, with a torch.Generator.

    clean=True draws the same scenes without any defect. A generator makes no mistake that would
    show a hard combination, so no model ever sees one, not even under another prompt."""
    count, mean = len(prompt), PROFILES[generator]  # mean (B, 3)
    # u^((1 - m) / m) has mean m and stays in [0, 1]: every generator has good and bad clips
    quality = torch.rand(count, 3, generator=rng) ** ((1 - mean) / mean)
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
    if clean:
        severity = torch.zeros(count, 5)
        mistaken = torch.zeros_like(mistaken)
        quality = torch.ones(count, 3)
    shown = torch.where(mistaken, (prompt + shift) % torch.tensor(CHOICES), prompt)
    hard = SPLIT[shown[:, 0], shown[:, 1], shown[:, 2]] == SPLIT_NAMES.index("hard")
    shown = torch.where(hard[:, None], prompt, shown)
    hidden = torch.cat((quality[:, :2], (shown == prompt).float().mean(1, keepdim=True)), 1)
    return Clips(prompt, shown, hidden, generator, centre, radius, severity, wobble)


def _circle(x, y):
    return torch.sqrt(x * x + y * y) - 1.0


def _triangle(x, y):
    return torch.maximum(y, 0.866 * x.abs() - 0.5 * y) - 0.777


def _cross(x, y):
    x, y = x.abs(), y.abs()
    return torch.minimum(torch.maximum(x - 1.3, y - 0.349), torch.maximum(x - 0.349, y - 1.3))


def _bar(x, y):
    return torch.maximum(x.abs() - 1.4, y.abs() - 0.561)


DISTANCE = (_circle, _triangle, _cross, _bar)  # signed (inside < 0), from SHAPES of area pi


def _mask(shape, centre, radius, size):
    """Antialiased (..., size, size) in [0, 1] of a shape with centre (..., 2), radius (...)."""
    grid = (torch.arange(size, device=centre.device) + 0.5) / size
    scale = radius[..., None, None].clamp(min=1e-3)
    x = (grid[None, :] - centre[..., 0, None, None]) / scale
    y = (grid[:, None] - centre[..., 1, None, None]) / scale
    return (0.5 - DISTANCE[shape](x, y) * (scale * size)).clamp(0, 1)


def _paths(clips):
    """Centre (B, T, 2) and radius (B, T) of the object in every frame, jitter, flicker included."""
    frames = clips.wobble.shape[1]
    progress = torch.linspace(-0.5, 0.5, frames) if frames > 1 else torch.zeros(1)
    heading = HEADING[clips.shown[:, 2]]  # (B, 2)
    centre = clips.centre[:, None] + TRAVEL * progress[None, :, None] * heading[:, None]
    centre = centre + MAX_JITTER * clips.severity[:, 3, None, None] * clips.wobble[..., :2]
    change = MAX_FLICKER * clips.severity[:, 4, None] * clips.wobble[..., 2]
    return centre, clips.radius[:, None] * torch.exp(change)


def render(clips, size=32):
    """Clips -> videos (B, 3, T, size, size) float32 in [-1, 1]."""
    centre, radius = _paths(clips)
    mask = torch.empty(len(clips), size, radius.shape[1], size)  # (B, H, T, W)
    for shape in range(len(SHAPES)):
        which = clips.shown[:, 1] == shape
        mask[which] = _mask(shape, centre[which], radius[which], size).transpose(1, 2)
    # a Gaussian blur is one small matrix on each side of the picture
    distance = (torch.arange(size)[:, None] - torch.arange(size)[None]) / size  # (H, H)
    sigma = (MAX_BLUR * clips.severity[:, 0, None, None]).clamp(min=1e-4)
    kernel = torch.softmax(-0.5 * (distance / sigma) ** 2, -1)  # (B, H, H)
    mask = (kernel @ mask.flatten(2)).reshape(len(clips), -1, size)  # (B, H * T, W)
    mask = (mask @ kernel.transpose(1, 2)).unflatten(1, (size, -1)).transpose(1, 2)  # (B, T, H, W)
    # the object fades, then haze covers it and the grey ground, then [0, 1] -> [-1, 1]
    fade = MAX_FADE * clips.severity[:, 1, None]  # (B, 1)
    haze = MAX_HAZE * clips.severity[:, 2, None]  # (B, 1)
    colour = 2 * (1 - haze) * (1 - fade) * (PALETTE[clips.shown[:, 0]] - GROUND)  # (B, 3)
    ground = 2 * ((1 - haze) * GROUND + haze * HAZE) - 1  # (B, 1)
    one = (..., None, None, None)
    return torch.addcmul(ground[one], mask[:, None], colour[one])


# ---------------------------------------------------------------------------------------------
# The oracle: true scores from pixels


@torch.no_grad()
def measure(video):
    """Measurements of videos (B, 3, T, H, W), free of the prompt: a dict of per-clip numbers.

    contrast, haze, softness (in heights), stray (share of the object's mass far from its centre),
    jitter, flicker, travel (B, 2), start (B, 2), radius, present (share of frames that show an
    object), and the match in [-1, 1] with each colour (B, 6), shape (B, 4) and direction (B, 4)."""
    video = video.float().clamp(-1, 1) * 0.5 + 0.5
    count, _, frames, height, width = video.shape
    ground = video.flatten(2).median(-1).values  # (B, 3)
    difference = video - ground[:, :, None, None, None]  # (B, 3, T, H, W)
    strength = difference.abs().amax(1)  # (B, T, H, W)
    top = max(1, height * width // 50)
    peak = strength.flatten(2).topk(top).values.mean(-1)  # (B, T)
    clip_peak = peak.mean(1).clamp(min=1e-3)
    level = strength / peak.clamp(min=0.05)[..., None, None]
    mask = ((level - 0.5) * 4 + 0.5).clamp(0, 1)  # (B, T, H, W)
    # an object stands out, does not fade away, and does not fill the frame as noise would
    present = (peak > 0.12) & (peak > 0.4 * clip_peak[:, None]) & (mask.mean((-1, -2)) < 0.45)
    mask = mask * present[..., None, None]

    # where the object is and how large: pixels are counted, then divided by the frame's height
    grid_x = (torch.arange(width, device=video.device) + 0.5) / height
    grid_y = (torch.arange(height, device=video.device) + 0.5) / height
    mass = mask.sum((-1, -2)).clamp(min=1e-3)  # (B, T)
    moment = (mask.sum(-2) * grid_x).sum(-1), (mask.sum(-1) * grid_y).sum(-1)
    centre = torch.stack(moment, -1) / mass[..., None]  # (B, T, 2)
    area = mass / height**2
    radius = (area / torch.pi).sqrt()
    off_x, off_y = grid_x - centre[..., :1], grid_y - centre[..., 1:]  # (B, T, W), (B, T, H)
    far = off_x[..., None, :] ** 2 + off_y[..., :, None] ** 2 > (2 * radius[..., None, None]) ** 2
    stray = ((mask * far).sum((-1, -2)) / mass).mean(1)  # a second object, a ghost, a smear

    # VQ: how far the object stands out, how high the ground lies, how wide the edges are
    dx = level[..., :-1, 1:] - level[..., :-1, :-1]
    dy = level[..., 1:, :-1] - level[..., :-1, :-1]
    slope = (dx * dx + dy * dy).sqrt().flatten(2).topk(top).values.mean(-1) * height  # (B, T)
    softness = (1 / slope.clamp(min=1.0)).mean(1)

    # MQ: a steady path has no second difference, a steady size no first one
    jitter = flicker = torch.zeros(count, device=video.device)
    travel = torch.zeros(count, 2, device=video.device)
    if frames > 2:
        second = centre[:, 2:] - 2 * centre[:, 1:-1] + centre[:, :-2]
        seen = present[:, 2:] & present[:, 1:-1] & present[:, :-2]
        jitter = (second.norm(dim=-1) * seen).sum(1) / seen.sum(1).clamp(min=1)
    if frames > 1:
        change = (area[:, 1:] / area[:, :-1]).log().abs().clamp(max=1.5)
        seen = present[:, 1:] & present[:, :-1]
        flicker = (change * seen).sum(1) / seen.sum(1).clamp(min=1)
        # the slope of a line through the centres, by least squares over the frames with an object
        clock = torch.linspace(-0.5, 0.5, frames, device=video.device) * present
        mean = clock.sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1)
        clock = (clock - mean) * present
        variance = (clock * clock).sum(1, keepdim=True).clamp(min=1e-3)
        travel = (clock[..., None] * centre).sum(1) / variance

    # TA: hue is what is left of a colour without its grey part, so haze does not change it
    mean_mass = mask.sum((1, 2, 3)).clamp(min=1e-3)[:, None]
    colour = (difference * mask[:, None]).sum((2, 3, 4)) / mean_mass  # (B, 3)
    hue = colour - colour.mean(1, keepdim=True)
    palette = PALETTE.to(video.device)
    palette = palette - palette.mean(1, keepdim=True)
    palette = palette / palette.norm(dim=1, keepdim=True)
    match_colour = hue / hue.norm(dim=1, keepdim=True).clamp(min=0.05) @ palette.T
    match_shape = []
    for shape in range(len(SHAPES)):
        template = _mask(shape, centre, radius, height)  # (B, T, H, W)
        shared = torch.minimum(template, mask).sum((-1, -2))
        overlap = shared / torch.maximum(template, mask).sum((-1, -2)).clamp(min=1e-3)  # (B, T)
        match_shape.append((overlap * present).sum(1) / present.sum(1).clamp(min=1))
    heading = travel / travel.norm(dim=1, keepdim=True).clamp(min=0.1)
    match_direction = heading @ HEADING.to(video.device).T
    return {
        "contrast": clip_peak,
        "haze": ground.mean(1),
        "softness": softness,
        "stray": stray,
        "jitter": jitter,
        "flicker": flicker,
        "travel": travel,
        "start": centre[:, 0],
        "radius": radius.mean(1),
        "present": present.float().mean(1),
        "colour": match_colour,
        "shape": torch.stack(match_shape, 1),
        "direction": match_direction,
    }


# How much better the prompt's attribute must match than any other to count as right beyond doubt.
# TA is thus nearly discrete, three attributes right or wrong, as a person would judge it.
MARGIN = {"colour": 0.15, "shape": 0.06, "direction": 0.25}


def attributes_right(video, prompt):
    """(B, 3) in [0, 1]: how surely colour, shape and direction are the prompt's; 0.5 is a draw."""
    return _right(measure(video), prompt.to(video.device))


def _right(seen, prompt):
    right = []
    for i, (name, margin) in enumerate(MARGIN.items()):
        match = seen[name]  # (B, choices)
        own = match.gather(1, prompt[:, i : i + 1])[:, 0]
        other = match.scatter(1, prompt[:, i : i + 1], -2.0).amax(1)
        right.append((0.5 + 0.5 * (own - other) / margin).clamp(0, 1) * seen["present"])
    return torch.stack(right, 1)


def oracle(video, prompt):
    """The truth: scores (B, 3) for VQ, MQ, TA of videos (B, 3, T, H, W) in [-1, 1].

    prompt: attributes (B, 3) or a list of B prompts (ValueError unless each names one colour, shape
    and direction). A clean clip that follows its prompt scores about 1 in each dimension, the worst
    rendered one about 0; one without an object scores below 0 in VQ and MQ and 0 in TA."""
    prompt = prompt if torch.is_tensor(prompt) else prompt_attributes(prompt)
    seen = measure(video)
    missing, faded = 1 - seen["present"], (1 - seen["contrast"] / (1 - GROUND)).clamp(0, 1)
    hazy = ((seen["haze"] - GROUND).abs() / (MAX_HAZE * (HAZE - GROUND))).clamp(0, 2)
    soft = ((seen["softness"] - SHARP) / (SOFT - SHARP)).clamp(0, 2)
    vq = 1 - (faded / 0.75 + hazy + soft) / 3 - seen["stray"] - missing
    shaky, flickering = (seen["jitter"] / 0.16).clamp(0, 2), (seen["flicker"] / 0.46).clamp(0, 2)
    still = (1 - seen["travel"].norm(dim=1) / (0.6 * TRAVEL)).clamp(0, 1)
    mq = 1 - (shaky + flickering) / 2 - still - missing
    ta = _right(seen, prompt.to(video.device)).mean(1)
    return torch.stack((vq, mq, ta), 1)


# Mean and standard deviation of true scores over all generators and prompts (a test measures them).
# They put the dimensions on one scale, for the annotators' noise and for Overall, the mean z-score.
TRUE_MEAN = torch.tensor([0.538, 0.468, 0.869])
TRUE_STD = torch.tensor([0.307, 0.351, 0.204])


# ---------------------------------------------------------------------------------------------
# The annotators (section 3.1): three look at each pair, a reviewer decides if they disagree

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
