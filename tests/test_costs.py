"""What models cost: multiplications as they are counted, the table that --list prints, and the papers' own figures."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import layers
from layers import TernaryLinear
from models import COSTS, MODELS, Mamba, cost, counted, create_model

NANO = [name for name in MODELS if name.endswith(("-nano", "-pico"))]


def test_importing_models_does_not_import_the_compiler():
    code = "import sys, models; sys.exit('torch._dynamo' in sys.modules or 'triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_multiplications_are_counted():
    """Against sums by hand; of a module, its method, a function over modules with weights, which stay as they are."""
    linear, conv = torch.nn.Linear(6, 8), torch.nn.Conv2d(4, 6, 3, padding=1, groups=2)
    x, image = torch.empty(1, 5, 6, device="meta"), torch.empty(1, 4, 7, 9, device="meta")
    assert layers.count(linear, x) == (56, 5 * 6 * 8)
    assert layers.count(conv, image) == (6 * 2 * 9 + 6, 7 * 9 * 6 * 2 * 9)
    assert layers.count(lambda x: linear(x) @ linear(x).mT, x) == (0, 2 * 5 * 6 * 8 + 5 * 8 * 5)
    up = torch.nn.ConvTranspose2d(4, 3, 2, 2)
    assert layers.count(up, image)[1] == 7 * 9 * 4 * 3 * 4
    attention = layers.Attention(6, 2)
    assert layers.count(attention.heads, x)[1] == 5 * 6 * 18
    assert layers.count(attention, x)[1] == 5 * 6 * 24 + 2 * 5 * 5 * 6
    attention.train()
    dropout = torch.nn.Sequential(torch.nn.Dropout(), linear).train()
    layers.count(dropout, x)
    assert dropout.training and dropout[0].training and attention.training
    mamba = Mamba(6, d_state=2)
    scan = 5 * 12 * 2 * 3                              # tokens x channels x states x (decay, input, read-out)
    assert layers.count(mamba, x)[1] == scan + 5 * (6 * 24 + 12 * 4 + 12 * 5 + 12 + 12 * 6)


def check_costs(names):
    """If this fails, a preset has changed: `python models.py` writes costs.json anew."""
    known = json.loads(COSTS.read_text())
    assert list(known) == list(MODELS)
    for name in names:
        assert known[name] == counted(name), name


def test_the_table_of_costs_is_true_where_it_is_cheap_to_count():
    check_costs([*NANO, "dit-s/8", "dit-moe-s/2-8e2a", "fitv2-b/2"])
    known = json.loads(COSTS.read_text())
    for name in MODELS:                                # a preset's numbers show in its parameters
        with torch.device("meta"):
            assert known[name][0] == sum(p.numel() for p in create_model(name).parameters()), name


@pytest.mark.slow
def test_the_table_of_costs_is_true():
    check_costs(MODELS)


@pytest.mark.parametrize("name, size, channels, classes, parameters, macs", [
    # 2505.11196, table 1, whose counter adds normalisation to the multiply-accumulates
    ("dico-s", 32, 4, 1000, 33.1, 4.25), ("dico-b", 32, 4, 1000, 130.0, 16.88), ("dico-l", 32, 4, 1000, 463.9, 60.24),
    ("dico-xl", 32, 4, 1000, 701.2, 87.30), ("dico-h", 32, 4, 1000, 1037.4, 194.15),
    ("dico-xl", 64, 4, 1000, 701.2, 349.8),
    # 2209.12152, table 4
    ("uvit-s/2", 32, 3, 0, 44.3, 12.2), ("uvit-s/4", 64, 3, 0, 44.3, 12.2), ("uvit-m/4", 64, 3, 1000, 130.9, 35.2),
    ("uvit-l/4", 64, 3, 1000, 286.8, 76.5), ("uvit-l/2", 32, 4, 1000, 286.8, 76.5),
    ("uvit-h/2", 32, 4, 1000, 500.8, 133.2), ("uvit-l/4", 64, 4, 1000, 286.9, 76.5),
    ("uvit-h/4", 64, 4, 1000, 500.9, 133.2),
    # 2406.09416
    ("dimr-xl/2r", 32, 4, 1000, 505.0, 160.2), ("dimr-g/2r", 32, 4, 1000, 1056.4, 331.1),
    ("dimr-xl/3r", 64, 4, 1000, 525.0, 206.1), ("dimr-l/3r", 64, 3, 1000, 284.1, 110.6),
    ("dimr-m/3r", 64, 3, 1000, 132.8, 53.5)])
def test_sizes_are_the_papers(name, size, channels, classes, parameters, macs):
    variance = {"learn_sigma": True} if name.startswith("dico") else {}
    with torch.device("meta"):
        model = create_model(name, size, channels, classes, **variance)
    ours = cost(model, (channels, size, size))
    assert round(ours[0] / 1e6, 1) == parameters
    assert ours[1] / 1e9 == pytest.approx(macs, rel=6e-3 if name.startswith("dico") else 0, abs=0.06)


@pytest.mark.parametrize("size, patch, macs",
                         [("s", 2, 6.06), ("s", 8, 0.36), ("b", 4, 5.56), ("l", 2, 80.71), ("xl", 2, 118.64)])
def test_dit_costs_what_the_paper_says(size, patch, macs):
    """2212.09748, table 4: its "Gflops" are multiply-accumulates."""
    with torch.device("meta"):
        model = create_model(f"dit-{size}/{patch}", 32, 4, 1000, learn_sigma=True)
    assert cost(model, (4, 32, 32))[1] / 1e9 == pytest.approx(macs, abs=0.03)


def test_unet_is_ddpms():
    """2006.11239, appendix B: 35.7 M parameters for CIFAR-10; the skips are balanced."""
    with torch.device("meta"):
        model = create_model("unet-cifar", num_classes=0)
    parameters, macs = cost(model, (3, 32, 32))
    assert (round(parameters / 1e6, 2), round(macs / 1e9, 2)) == (35.75, 6.22)


@pytest.mark.parametrize("name, macs", [("s/2-8e2a", 15.43), ("b/2-8e2a", 61.68)])
def test_dit_moe_costs_what_the_paper_says(name, macs):
    """2407.11633, table 1: multiply-accumulates without attention's two products."""
    with torch.device("meta"):
        model = create_model(f"dit-moe-{name}", 32, 4, 1000, learn_sigma=True)
    D, depth = model.x_embedder.proj.out_channels, len(model.blocks)
    assert (cost(model, (4, 32, 32))[1] - 2 * 256**2 * D * depth) / 1e9 == pytest.approx(macs, rel=0.005)


@pytest.mark.parametrize("size, millions", [("600m", 609.89), ("4.2b", 4238.02)])
def test_terdit_sizes(size, millions):
    with torch.device("meta"):
        model = create_model(f"terdit-{size}", 32, 4, 1000, learn_sigma=True)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    codes = sum(m.weight.numel() for m in model.modules() if isinstance(m, TernaryLinear)) / 1e6
    assert codes == pytest.approx({"600m": 603.98, "4.2b": 4227.86}[size], abs=0.006)


@pytest.mark.parametrize("name, millions", [("drwkv-s/2", 39.3), ("drwkv-b/2", 74.8), ("drwkv-m/2", 132.6),
                                            ("drwkv-l/2", 439), ("drwkv-h/2", 780), ("dimba-l/2", 859),
                                            ("dimba-g/2", 1820), ("lit-s/2", 33.0), ("lit-b/2", 130.6),
                                            ("lit-l/2", 458.3), ("lit-xl/2", 675.3)])
def test_linear_mixers_have_the_published_sizes(name, millions):
    with torch.device("meta"):
        model = create_model(name, 32, 4, 1000, learn_sigma=not name.startswith("drwkv"))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_lit_costs_grow_linearly():
    macs = [cost(create_model("lit-s/2", side), (3, side, side))[1] for side in (32, 64)]
    assert 3.9 < macs[1] / macs[0] < 4.0


@pytest.mark.parametrize("name, parameters, options", [
    ("fit-b/2", 158.7, dict(learn_sigma=True)), ("fit-xl/2", 823.6, dict(learn_sigma=True)),
    ("fitv2-b/2", 128.1, {}), ("fitv2-xl/2", 671.0, {}), ("fitv2-3b/2", 2971.9, {}),
    ("flag-dit-600m", 609.8, dict(spare_channels=True)), ("flag-dit-3b", 4237.8, dict(spare_channels=True)),
    ("flag-dit-7b", 7293.8, dict(spare_channels=True)), ("flag-dit-text-5b", 5046.6, dict(spare_channels=True))])
def test_published_sizes(name, parameters, options):
    with torch.device("meta"):
        model = create_model(name, 32, 4, 1000, **options)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.06)
    if name == "fitv2-xl/2":                                          # 2410.13925: post-training changes 14.15%
        trained = sum(p.numel() for n, p in model.named_parameters() if re.search(model.post_trains, n))
        assert trained / 1e6 == pytest.approx(94.96, abs=0.01)


@pytest.mark.parametrize("name, gflops", [("fit-b/2", 29.1), ("fit-xl/2", 153), ("fitv2-b/2", 27.3),
                                          ("fitv2-xl/2", 147), ("fitv2-3b/2", 653)])
def test_fit_costs_what_the_papers_say(name, gflops):
    """2402.12376 and 2410.13925 count multiply-accumulates, without those of attention's two products."""
    with torch.device("meta"):
        model = create_model(name, 32, 4, 1000, learn_sigma=name.startswith("fit-"))
    products = 2 * 256**2 * len(model.blocks) * model.x_embedder["proj"].out_features
    assert (cost(model, (4, 32, 32))[1] - products) / 1e9 == pytest.approx(gflops, rel=0.01)
