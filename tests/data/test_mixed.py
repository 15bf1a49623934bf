"""MixUp and CutMix: the same on any number of processes, with the shares that the papers draw, and never of others."""

import pytest
import torch

from nndist.data import Mixed, Resident
from nndist.data.parts import hold_out
from nndist.data.sets import Data
from nndist.errors import UserError

N = 500


def numbered(**alphas):
    """Images that are their own numbers everywhere, so that a mixed one says of which two it is."""
    images = torch.arange(float(N)).view(-1, 1, 1, 1).expand(-1, 12, 16, 3)
    return Mixed(Resident(images, torch.arange(N)), **alphas)


def read(examples, numbers, parts=1):
    """The batch of these examples, read in so many parts."""
    found = list(examples.batches(numbers.tensor_split(parts)))
    return [torch.cat(part) for part in zip(*found, strict=True)]


@pytest.mark.parametrize("alphas", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_an_example_is_mixed_alike_however_the_batch_is_split(alphas):
    examples, numbers = numbered(**alphas).in_epoch(3, 5), torch.randperm(N)[:60]
    whole, split = read(examples, numbers), read(examples, numbers, parts=7)
    assert all(torch.equal(a, b) for a, b in zip(whole, split, strict=True))
    other_epoch = read(numbered(**alphas).in_epoch(3, 6), numbers)
    assert not torch.equal(whole[2], other_epoch[2]) and not torch.equal(whole[3], other_epoch[3])


def test_an_image_has_the_share_of_each_label_that_its_loss_has():
    images, labels, others, share = read(numbered(mixup=0.4, cutmix=1.0).in_epoch(0, 0), torch.arange(N))
    mean = images.mean((1, 2, 3), dtype=torch.float64)
    torch.testing.assert_close(mean, share.double() * labels + (1 - share.double()) * others, atol=1e-3, rtol=1e-4)
    flat = images.flatten(1)
    blended = (flat == flat[:, :1]).all(1) & (share < 1)
    assert 0.3 < blended.float().mean() < 0.7, "half of them are blended, half are cut"
    cut = ~blended & (share < 1) & (share > 0)
    pixels = images[cut]
    assert ((pixels == labels[cut].view(-1, 1, 1, 1)) | (pixels == others[cut].view(-1, 1, 1, 1))).all()


def test_shares_are_drawn_from_the_beta_distribution():
    for alpha in (0.2, 1.0):
        share = torch.cat([read(numbered(mixup=alpha).in_epoch(0, epoch), torch.arange(N))[3] for epoch in range(40)])
        assert share.mean() == pytest.approx(0.5, abs=0.01)
        assert share.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)  # of Beta(alpha, alpha)


def test_partners_are_any_examples_equally_often():
    partners = torch.cat([read(numbered(mixup=0.2).in_epoch(0, e), torch.arange(N))[2] for e in range(40)])
    counts = partners.bincount(minlength=N).double()
    assert counts.min() > 12 and ((counts - 40) ** 2 / 40).mean() == pytest.approx(1.0, abs=0.3)  # chi-squared


def test_held_out_examples_are_neither_changed_nor_mixed_into_others():
    data = hold_out(Data(numbered(mixup=0.2, cutmix=1.0), Resident(torch.zeros(1, 12, 16, 3), torch.zeros(1))), 0.2)
    held_out = set(data.val.named(torch.arange(100)).tolist())
    seen = set()
    for epoch in range(5):
        _, labels, others, _ = read(data.train.in_epoch(0, epoch), torch.arange(400))
        seen |= {*labels.tolist(), *others.tolist()}
    assert len(held_out) == 100 and len(seen) == 400 and not held_out & seen
    images, labels, _, share = read(data.val, torch.arange(100))
    assert (share == 1).all() and torch.equal(images[:, 0, 0, 0], labels.float()) and set(labels.tolist()) == held_out


def test_an_alpha_that_has_no_meaning_is_refused():
    for alpha in (-0.1, 1.5):
        with pytest.raises(UserError, match=f"--cutmix {alpha}: must be at least 0 and at most 1"):
            numbered(cutmix=alpha)
