"""Optimisers against plain definitions, and what they leave to each other."""

import copy
import math

import pytest
import stubs
import torch
from torch import nn

import diffusion
import objectives
import optim
from models import create_model


@pytest.mark.parametrize("form", [optim.orthogonalised, optim.orthogonalised_by_gram])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 5), (2, 5, 12)])
def test_orthogonalised_against_the_decomposition(shape, form):
    """Five steps of the iteration keep the singular vectors and bring every singular value near 1: as the quintic does
    to each singular value by itself."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U, S, V = torch.linalg.svd(x, full_matrices=False)
    s = S / x.norm(dim=(-2, -1), keepdim=True)[..., 0]
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(form(x), U @ torch.diag_embed(s) @ V, rtol=1e-5, atol=1e-6)
    assert ((s > 0.3) & (s < 1.3)).all()


def test_gram_form_in_single_precision():
    """Singular values from 1 to 1e-4 of the largest: the small ones, which squaring blurs, do no harm."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 48, 96, generator=generator) * torch.logspace(0, -4, 96)
    exact = optim.orthogonalised(x.double())
    assert (optim.orthogonalised_by_gram(x) - exact).norm() < 1e-2 * exact.norm()


def test_muon_against_a_loop():
    """Nesterov momentum, the factor sqrt(max(1, out/in)), decay: matrix by matrix, over three steps."""
    torch.manual_seed(0)
    shapes = [(6, 4), (4, 6), (6, 4), (8, 3, 3, 3), (2, 5, 4)]
    weights = [nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in shapes]
    plain, buffers = [w.detach().clone() for w in weights], [torch.zeros(s, dtype=torch.float64) for s in shapes]
    muon = optim.Muon([{"params": weights, "rate": 1.0, "weight_decay": 0.1}], lr=0.02)
    for _ in range(3):
        gradients = [torch.randn(s, dtype=torch.float64) for s in shapes]
        for w, g in zip(weights, gradients):
            w.grad = g.clone()
        muon.step()
        for k, g in enumerate(gradients):
            buffers[k] = 0.95 * buffers[k] + 0.05 * g
            step = 0.05 * g + 0.95 * buffers[k]
            parts = step if step.ndim == 3 else step.reshape(1, len(step), -1)
            whole = torch.stack([optim.orthogonalised(m[None])[0] for m in parts])
            rows, columns = parts.shape[1:]
            plain[k] = plain[k] * (1 - 0.02 * 0.1) - 0.02 * math.sqrt(max(1, rows / columns)) * whole.view_as(plain[k])
    for w, p in zip(weights, plain):
        torch.testing.assert_close(w.detach(), p)


@pytest.mark.parametrize("name", ["dit-nano", "unet-pico", "dit-moe-nano", "dico-nano"])
def test_what_muon_leaves_to_adamw(name):
    """Every parameter has one optimiser; vectors, tables, depthwise kernels and read-outs are AdamW's; experts are
    Muon's, matrix by matrix."""
    model = create_model(name, 16)
    pair = optim.muon(model, 0.02, 0.0)
    muon, adamw = ({id(p) for g in part.param_groups for p in g["params"]} for part in pair.parts.values())
    assert not muon & adamw and muon | adamw == {id(p) for p in optim.trained(model)}
    for part, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim < 2 or "embedding_table" in part or "pos_embed" in part:
            assert id(p) in adamw, part
        if ".attn.qkv.weight" in part or part.endswith((".gate", ".down")) and p.ndim == 3:
            assert id(p) in muon, part
    shares = {g["rate"] for g in pair.parts["adamw"].param_groups}
    assert shares == {0.15}


def test_state_goes_through_a_checkpoint():
    torch.manual_seed(0)
    model = stubs.TwoPlayers(4, 3, 0)
    pair = optim.muon(model, 0.02, 0.0)

    def step(model, pair, seed):
        for k, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + k))
        pair.step()

    step(model, pair, 0)
    twin = stubs.TwoPlayers(4, 3, 0)
    twin.load_state_dict(model.state_dict())
    other = optim.muon(twin, 0.02, 0.0)
    other.load_state_dict(copy.deepcopy(pair.state_dict()))
    step(model, pair, 1)
    step(twin, other, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


@pytest.mark.parametrize("name", ["flow", "linear", "cosine", "edm"])
@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_errors_by_noise(name, prediction):
    """A network that is off by e in x0 is off by e in every bin, whatever it predicts; the bins hold every sample once,
    in order of its noise, and those of two halves of a batch average to those of the whole."""
    process = diffusion.create_process(name, prediction)
    generator = torch.Generator().manual_seed(0)
    x0, eps, off = (torch.randn(64, 1, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    t = process.training_times(torch.rand(64, generator=generator))
    alpha, sigma, p, q = process.coefficients(t.double())
    wrong = 0.1 * off / off.square().mean((1, 2, 3), keepdim=True).sqrt()
    shift = ((p * sigma - q * alpha) / sigma)[:, None, None, None] * wrong     # of m, as x_t is known: eps moves along
    network = lambda x, time, y: process.target(x0, eps, t.double()) + shift
    parts = process.loss(network, x0, None, t.double(), eps)
    loss, error, n = objectives.by_noise(process, t.double(), parts)
    assert n.sum() == pytest.approx(1) and loss.sum() == pytest.approx(parts["loss"].mean().item(), rel=1e-5)
    torch.testing.assert_close(error, 0.01 * n, rtol=1e-4, atol=1e-9)
    level = sigma / (alpha + sigma)
    assert [round(64 * v) for v in n.tolist()] == [((level * 10).long() == k).sum().item() for k in range(10)]
    halves = [objectives.by_noise(process, t[rows].double(), {k: v[rows] for k, v in parts.items()})
              for rows in (slice(32), slice(32, 64))]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, torch.stack([loss, error, n]))
