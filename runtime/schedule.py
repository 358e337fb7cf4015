"""The learning rate over a run, and which runs can be made longer."""

from runtime.cli import BadInput

WARMUP = 100  # steps, or a tenth of a shorter run


def lr_factor(step, steps, decay):
    """Factor of the learning rate: linear warm-up, constant, then linear to 0 over the last `decay` of the run."""
    warmup = min(WARMUP, max(1, steps // 10))
    rise = min(1.0, (step + 1) / warmup)
    return rise * min(1.0, (steps - step) / (decay * steps)) if decay else rise


def check_longer(settings, done, steps):
    """BadInput unless a run of `steps` steps, of which some are done, can go on to settings.steps: what is left must be
    at the constant rate in both."""
    why = None
    if settings.steps < steps:
        why = "a run can only get longer"
    elif getattr(settings, "rounds", None):
        why = "a round is --steps / --rounds long"
    elif settings.decay:
        why = f"with --decay {settings.decay:g} the learning rate depends on the end of the run"
    elif lr_factor(done, settings.steps, 0.0) < 1:
        why = f"the warm-up is not over after {done} steps"
    if why:
        raise BadInput(
            f"--resume: --steps was {steps}, now {settings.steps}, but {why}; use the same"
        )
