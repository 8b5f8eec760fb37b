"""Metrics: what must hold whatever the numbers, mutants of metrics.py that the recorded cases must catch, the judge,
and, where they are installed, the published tools."""

import dataclasses
import importlib.util
import math
import sys
import zipfile
from pathlib import Path

import golden
import golden_metrics
import numpy as np
import pytest
import torch
from pytest import approx

import data
import metrics

HERE = Path(__file__).parent


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------------- mutants

INCEPTION, BASIC, LATTICE, SINGULAR = "inception-fid-cifar", "metrics-basic", "metrics-lattice", "metrics-rank-deficient"

# (recorded case, words of metrics.py, what a slip of the pen makes of them): the case must notice each.
MUTANTS = [
    (INCEPTION, "count_include_pad=False", "count_include_pad=True"),
    (INCEPTION, "BlockE(2048, max_pool)", "BlockE(2048, average_pool)"),
    (INCEPTION, "channels, eps=1e-3", "channels, eps=1e-5"),
    (INCEPTION, 'if self.camp == "tf":', 'if self.camp != "tf":'),
    (INCEPTION, "x.permute(0, 2, 3, 1).flatten(1)", "x.flatten(1)"),
    (BASIC, "self.scatter / (self.n - 1)", "self.scatter / self.n"),
    (SINGULAR, "(x - x.mean(0)) / (len(x) - 1) ** 0.5", "(x - x.mean(0)) / len(x) ** 0.5"),
    (BASIC, "within / (m * (m - 1))", "within / (m * m)"),
    (BASIC, "(side[rng.choice(len(side), size, replace=False)] for side in (x, y))",
     "(side[rng.choice(len(side), size, replace=False)] for side in (y, x))"),
    (BASIC, "a.shape[1] + 1) ** 3", "a.shape[1] + 1) ** 2"),
    (SINGULAR, "[*range(0, n, chunk), n]", "[*range(0, n, chunk)]"),
    (BASIC, "i * n // splits", "i * (n // splits) + i"),
    (BASIC, "(cosines - 1) / sigma**2", "(cosines - 1) / (2 * sigma**2)"),
    (LATTICE, "squared - rounding if inclusive", "squared - rounding if not inclusive"),
    (LATTICE, "nearest[:, ks]", "nearest[:, [k - 1 for k in ks]]"),
    (BASIC, "precise[i, columns] |= in_real.any(0)", "precise[i, columns] |= in_fake.any(0)"),
    (BASIC, "covered[i, rows] |= in_real.any(1)", "covered[i, rows] |= in_fake.any(1)"),
    (BASIC, "contained[i].item() / (k * len(y))", "contained[i].item() / (k * len(x) + 1)"),
    (BASIC, "-10 * (a - b).square().mean((1, 2, 3)).log10()", "-10 * (a - b).square().mean().log10().expand(len(a))"),
    (BASIC, "sample = 1.0 if", "sample = 1.01 if"),
    (BASIC, "taps**2 / (taps**2 - 1)", "1.0"),
    (BASIC, "-at.square() / (2 * 1.5**2)", "-at.square() / 1.5**2"),
    ("lpips-alex", "-0.088", "0.088"),
    ("lpips-alex", "nn.MaxPool2d(3 if", "nn.MaxPool2d(2 if"),
    ("lpips-vgg", "vector_norm(x, dim=1, keepdim=True)", "vector_norm(x, dim=1, keepdim=True) ** 2"),
]
MORE_MUTANTS = [
    (INCEPTION, "(resize_tf1(images.float(), 299) - 128) / 128", "resize_tf1(images.float(), 299) / 127.5 - 1"),
    (INCEPTION, "at = torch.arange(size, dtype=torch.float32, device=x.device) * (side / size)",
     "at = ((torch.arange(size, device=x.device) + 0.5) * (side / size) - 0.5).clamp(min=0)"),
    (INCEPTION, "F.conv2d(x, self.Mixed_6d.branch1x1.conv.weight[:7])", "self.Mixed_6d.branch1x1(x)[:, :7]"),
    (INCEPTION, "self.fc.bias if bias else 0", "0 if bias else self.fc.bias"),
    (INCEPTION, "BlockE(1280, average_pool)", "BlockE(1280, max_pool)"),
]


@pytest.mark.parametrize("case, right, wrong", MUTANTS + [pytest.param(*row, marks=pytest.mark.slow)
                                                          for row in MORE_MUTANTS])
def test_a_wrong_line_breaks_a_recorded_case(case, right, wrong, tmp_path, monkeypatch):
    source = (HERE.parent / "metrics.py").read_text()
    assert source.count(right) == 1, "metrics.py has changed: this mutant needs other words"
    (tmp_path / "mutant.py").write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("mutant", tmp_path / "mutant.py")
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    monkeypatch.setattr(golden_metrics, "metrics", mutant)
    recorded = golden.load(HERE / "golden" / f"{case}.npz")
    with pytest.raises(AssertionError):
        golden_metrics.CHECKS[recorded.arch](recorded)
