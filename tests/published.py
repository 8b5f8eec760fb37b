"""What every comparison with recorded numbers of a published implementation shares."""

import torch


def same(ours, theirs, what, tolerance=1e-5):
    """||ours - theirs|| / ||theirs|| <= tolerance; integers must be equal."""
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    assert ours.shape == theirs.shape, f"{what}: shape {tuple(ours.shape)}, published {tuple(theirs.shape)}"
    if not theirs.is_floating_point():
        assert torch.equal(ours.to(theirs.dtype), theirs), f"{what} differs"
        return
    error = (ours.detach().double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-12)
    assert error <= tolerance, f"{what}: relative error {error:.2e}"
