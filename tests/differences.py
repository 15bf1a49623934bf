"""How far apart two sets of weights are."""


def relative_difference(ours, theirs):
    """The largest difference of any tensor's elements, relative to the tensor's largest element."""
    assert ours.keys() == theirs.keys()
    return max(((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max().clamp_min(1e-12)).item() for n in ours)
