"""Numbers that say how good images are: feature networks and distances between sets of features.

    Classifier         a small convolutional network for the dataset at hand: class accuracy, and 128 features an image
    frechet_distance   between two sets of features (with Inception features it is called FID; with others it is not)
"""

import torch
from torch import nn


class Classifier(nn.Module):
    """Images (B, C, H, W) in [-1, 1], any size from 8 pixels -> class logits (B, K).
    `features` gives the (B, 128) before them."""

    def __init__(self, num_classes, in_channels=3, width=32):
        super().__init__()

        def stage(c_in, c_out, stride):
            return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())

        self.body = nn.Sequential(
            stage(in_channels, width, 1), stage(width, 2 * width, 2), stage(2 * width, 4 * width, 2),
            stage(4 * width, 4 * width, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4 * width, num_classes)

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.head(self.features(x))


def frechet_distance(x, y):
    """|mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of features x (N, D), y (M, D); covariances with N - 1.

    GANs Trained by a Two Time-Scale Update Rule, 1706.08500, eq. 6. In float64; the trace of the root is the sum of the
    singular values of C_x^(1/2) C_y^(1/2), both roots symmetric, so nothing complex and nothing singular can come up.
    """
    x, y = x.double().cpu(), y.double().cpu()
    if len(x) < 2 or len(y) < 2:
        raise ValueError(f"a Frechet distance needs at least 2 images on each side, not {len(x)} and {len(y)}")
    mean = ((x.mean(0) - y.mean(0)) ** 2).sum()
    x, y = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (x, y))                    # x^T x is the covariance
    # tr (C_x C_y)^(1/2) = nuclear norm of x y^T, (N, M); where N or M exceed D, their (D, D) triangles say the same.
    x, y = (torch.linalg.qr(f, mode="r").R if len(f) > f.shape[1] else f for f in (x, y))
    return (mean + (x * x).sum() + (y * y).sum() - 2 * torch.linalg.svdvals(x @ y.T).sum()).item()
