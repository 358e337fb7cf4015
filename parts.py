"""A batch in parts: a slice for each process, and in it a micro-batch for each pass whose gradients accumulate.

A run must not depend on how its batches were cut. Two rules make it so:

    what is random    is drawn for the whole batch by every process, which then keeps its own slice: the noise of clip
                      17 is the same on one GPU and on eight. It costs the CPU time of the whole batch's noise once a
                      step: .24 s for 30 M numbers on one core.
    losses            of the parts average to the loss of the whole batch. Parts are of equal size, so a mean over
                      clips does; a mean over the valid labels alone divides by the number a part has on average.
"""

import torch


class Part:
    """Slice `index` of `count` equal ones of a batch, and of all that is drawn for it from `source`, a torch.Generator
    or the Part that this one lies in. With a list `kept`, draws are made once for all Parts that share it."""

    def __init__(self, source, index=0, count=1, kept=None):
        self.source, self.index, self.count = source, index, count
        self.kept, self.drawn = kept, 0

    def cut(self, whole):
        """(B, ...) of the batch -> (B / count, ...) of this part."""
        return whole.chunk(self.count)[self.index]

    def draw(self, function, shape):
        """function (torch.rand or torch.randn) of the batch's shape, cut to this part's `shape`."""
        whole = self.count * shape[0], *shape[1:]
        if self.kept is None:
            return self.cut(draw(function, whole, self.source))
        if self.drawn == len(self.kept):
            self.kept.append(draw(function, whole, self.source))
        self.drawn += 1
        return self.cut(self.kept[self.drawn - 1])

    def split(self, count):
        """This part in `count` parts of its own, to be worked through one after the other."""
        kept = []
        return [Part(self, index, count, kept) for index in range(count)]


def draw(function, shape, source):
    """function(shape) from `source`, a torch.Generator or a Part of a batch: of that part, then."""
    if isinstance(source, Part):
        return source.draw(function, shape)
    return function(shape, generator=source)


def valid_rows(mask, part):
    """(b,) for this part's rows of `mask` (B, ...): how many entries of a row of the whole batch are true on average,
    one at least in all. Summed over the rows of any part, it is what a mean over the valid entries has to divide by."""
    return part.cut(torch.full((len(mask),), max(1, mask.sum().item()) / len(mask)))
