"""Images of any size in one batch, and every modality as a sequence: RoPE, FiT, Flag-DiT, and what feeds them."""

import math
import re
import wave

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_models import inputs, randomised
from test_train import call, here, refused  # noqa: F401 (a fixture)

import convert
import data
import diffusion
import evaluate
import figures
import objectives
import runs
import sample
import train
from layers import (
    ROPE,
    Layout,
    PaddedLayout,
    Text,
    canvas,
    cropped,
    pack,
    rope_2d,
    rope_frequencies,
    rotate,
    sequence,
)
from models import DiT, FiT, FiTBlock, FlagBlock, FlagDiT, create_model

SIZES = [(32, 32), (16, 48), (40, 24), (8, 8)]
SMALL = dict(hidden_size=32, depth=2, num_heads=2, in_channels=3, num_classes=5)
TEXT = dict(hidden_size=32, depth=2, num_heads=2, in_channels=3, multiple_of=8, text_width=12, patch_size=2)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def lively(model):
    """Random weights under which attention, text and special tokens matter."""
    for name, p in randomised(model).named_parameters():
        if p.ndim == 1:
            p.data = p * (50 if name.endswith(("gate", "_token")) else 5) + name.endswith("weight")
    return model


def doubles(**options):
    x, t, y = inputs(**options)
    return x.double(), t.double(), y


def text(B=4, L=5, width=12):
    return Text(normal(B, L, width).double(), torch.arange(L) < torch.tensor([5, 2, 3, 1])[:B, None])


def mixed(name):
    """A model with random weights, images of several sizes, times, conditions; in float64, where rounding is small."""
    model = lively(create_model(name, 32)).double()
    y = text(4, 5, 128) if "text" in name else torch.tensor([0, 3, 10, 1])
    x = [normal(3, *size).double() for size in SIZES]
    return model, x, torch.tensor([10.0, 300, 500, 900]).double(), y


# ---------------------------------------------------------------------------------------------------------- mixed sizes


@pytest.mark.parametrize("name", ["fit-nano", "fitv2-nano", "flag-dit-nano", "flag-dit-text-nano"])
def test_an_image_alone_is_the_image_in_a_batch(name):
    model, x, t, y = mixed(name)
    together = model(x, t, y)
    for k, image in enumerate(x):
        alone = model(image[None], t[k:k + 1], y[k:k + 1])[0]
        torch.testing.assert_close(together[k], alone, rtol=1e-9, atol=1e-9)
    equal = [x[0], x[0].flip(0)]
    torch.testing.assert_close(torch.stack(model(equal, t[:2], y[:2])), model(torch.stack(equal), t[:2], y[:2]))


@pytest.mark.parametrize("name", ["fitv2-nano", "flag-dit-text-nano"])
def test_padding_changes_nothing(name):
    """Neither outputs nor gradients see what lies beside an image on the canvas, nor how large the canvas is."""
    model, x, t, y = mixed(name)
    results = []
    for fill, more in ((0.0, 0), (7.0, 8)):
        z, sizes = canvas(x)
        z = F.pad(z, (0, more, 0, more))
        for row, size in zip(z, sizes.tolist()):
            row[:, size[0]:], row[:, :, size[1]:] = fill, fill
        model.zero_grad()
        out = model(z, t, y, sizes)
        (torch.cat([v.flatten() for v in cropped(out, sizes)]) ** 2).sum().backward()
        assert out[1, :, 16:].abs().max() == 0 and out[1, :, :, 48:].abs().sum() == 0
        results.append((cropped(out, sizes), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("process", [diffusion.RectifiedFlow("x0", weighting="flow"), diffusion.RectifiedFlow("v"),
                                     diffusion.Discrete(diffusion.linear_betas())])
def test_the_loss_of_a_mixed_batch_is_the_mean_of_its_images(process):
    model, x, t, y = mixed("fitv2-nano")
    if isinstance(process, diffusion.RectifiedFlow):
        t = t / 1000
    objective = objectives.Diffusion(model, process, (3, 32, 32), 10)
    eps = [normal(*image.shape).double() for image in x]
    parts = objective.parts(canvas(x)[0], y, t, canvas(eps)[0], canvas(x)[1])
    parts["loss"].mean().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for k, (image, noise) in enumerate(zip(x, eps)):
        one = objective.parts(image[None], y[k:k + 1], t[k:k + 1], noise[None])
        torch.testing.assert_close(one["loss"][0], parts["loss"][k], rtol=1e-8, atol=1e-9)
        (one["loss"].mean() / len(x)).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], grads, rtol=1e-7, atol=1e-8)


def test_micro_batches_of_mixed_sizes_see_the_noise_of_the_whole_batch():
    model, x, t, y = mixed("fitv2-nano")
    objective = objectives.Diffusion(model, diffusion.RectifiedFlow("x0"), (3, 32, 32), 10)
    loss = lambda rows: objective.loss({"x": x[rows], "y": y[rows],
                                        "noise": objectives.StepNoise(0, 5, 4, rows)})["loss"].item()
    assert (loss(slice(0, 2)) + loss(slice(2, 4))) / 2 == pytest.approx(loss(slice(0, 4)), rel=1e-5)


def test_sequences():
    place, mask, row, column = sequence((2, 2, 3), torch.tensor([[2, 2, 3], [1, 1, 2]]), nextline=True, nextframe=True)
    n = 12
    assert place[0].tolist() == [0, 1, 2, n, 3, 4, 5, n, n + 1, 6, 7, 8, n, 9, 10, 11, n, n + 1]
    assert place[1].tolist() == [0, 1, n, n + 1] + 14 * [n + 2] and mask.sum(1).tolist() == [18, 4]
    assert sequence((1, 2, 3))[0].tolist() == [[0, 1, 2, 3, 4, 5]] and sequence((1, 2, 3))[1] is None
    place, _, _, _ = sequence((1, 2, 3), torch.tensor([[1, 2, 3], [1, 2, 2]]), nextline=True)      # its docstring's
    assert place.tolist() == [[0, 1, 2, 6, 3, 4, 5, 6], [0, 1, 6, 3, 4, 6, 8, 8]]


@pytest.mark.parametrize("shape, sizes", [
    ((2, 3, 8, 12), None), ((2, 3, 8, 12), [[8, 12], [4, 6]]), ((2, 3, 8, 12), [[8, 4], [4, 8]]),
    ((2, 3, 2, 4, 6), None), ((2, 3, 2, 4, 6), [[2, 4, 6], [1, 4, 2]]), ((2, 3, 5), None), ((2, 3, 5), [[5], [3]])])
@pytest.mark.parametrize("special", [(False, False), (True, False), (True, True)])
def test_what_is_packed_is_unpacked(shape, sizes, special):
    """unpack inverts pack, zero beyond each image; a token holds its patch, channels slowest; every method of a padded
    layout leaves the real tokens as they are."""
    x, p = normal(*shape), 1 if len(shape) == 3 else 2
    tokens, layout = pack(x, p, sizes and torch.tensor(sizes), *special)
    back = layout.unpack(tokens)
    own = x if sizes is None else torch.zeros_like(x)
    for image, given, size in zip(own, x, sizes or ()):
        place = (slice(None), *map(slice, size))
        image[place] = given[place]
    assert torch.equal(back, own)
    assert torch.equal(tokens[0, 0].view(3, p, p)[:, 0, 0], x.flatten(2)[0, :, 0])
    last = tokens.unflatten(2, (3, p * p)).transpose(2, 3).flatten(2)
    assert torch.equal(layout.unpack(last, channels_last=True), back)
    padded = len(set(layout.lengths.tolist())) > 1
    assert isinstance(layout, PaddedLayout) == padded and type(layout) in (Layout, PaddedLayout)
    assert torch.equal(layout.unpadded(layout.padded(tokens)), tokens)
    heads, = layout.heads(tokens[:, None])
    assert torch.equal(layout.unpadded(heads[:, 0]), tokens)
    c = normal(2, 10)
    first, second = layout.modulation(c, 2)
    assert torch.equal(first[:1], c[:1, :5]) and torch.equal(second[-1:], c[-1:, 5:])


def test_bad_sizes_are_refused():
    model, x, t, y = mixed("fitv2-nano")
    with pytest.raises(ValueError, match="30x32.*not divisible by the patch size 4"):
        model([normal(3, 30, 32), normal(3, 40, 40)], t[:2], y[:2])
    with pytest.raises(ValueError, match="unknown rope 'spiral': choose from direct"):
        rope_2d(torch.zeros(1, 4), torch.zeros(1, 4), (2, 2), 8, "spiral", 2)
    with pytest.raises(ValueError, match="multiple of 4"):
        FiT(16, 4, hidden_size=36, num_heads=6, depth=1)


# ----------------------------------------------------------------------------------------------------------------- RoPE


def grid(h, w):
    return [v.flatten()[None] for v in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")]


def test_rope_scores_depend_on_relative_positions_only():
    (row, column), size, q, k = grid(3, 5), (3, 5), normal(1, 2, 15, 16), normal(1, 2, 15, 16) + 1
    def scores(down, right):
        cos, sin = rope_2d(row + down, column + right, size, 16)
        return rotate(q, cos, sin) @ rotate(k, cos, sin).mT
    torch.testing.assert_close(scores(7, 3), scores(0, 0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores(0, 0), q @ k.mT, atol=0.1)
    cos, sin = rope_2d(row, column, size, 16)
    torch.testing.assert_close(rotate(q, cos, sin).norm(dim=-1), q.norm(dim=-1))
    swapped, _ = rope_2d(column, row, size, 16)
    assert not torch.allclose(swapped, cos, atol=0.1)


def test_ropes_extrapolate_as_they_say():
    d, at = 16, lambda rope, length: rope_frequencies(d, length, rope, 8)[0]
    base = at("direct", None)
    for rope in ROPE:
        torch.testing.assert_close(at(rope, 6), base)                 # nothing changes within the trained length
    assert at("ntk", 24)[0] == base[0] and at("ntk", 24)[-1] == pytest.approx(base[-1].item() / 3)
    torch.testing.assert_close(at("pi", 24), base / 3)
    assert (at("yarn", 24) <= base).all() and (at("yarn", 24) >= base / 3).all()
    tables = lambda rope, h, w: rope_2d(*grid(h, w), (h, w), 16, rope, 8)[0]
    for rope in list(ROPE)[1:]:
        torch.testing.assert_close(tables(rope, 12, 12), tables(f"vision-{rope}", 12, 12))
        assert not torch.allclose(tables(rope, 4, 20), tables(f"vision-{rope}", 4, 20))
    rows = tables("vision-ntk", 4, 20)[..., :4], tables("direct", 4, 20)[..., :4]
    torch.testing.assert_close(*rows)                                 # the short axis is left alone
    assert tables("ntk-pro2", 8, 8)[0, 0, 0] == pytest.approx((math.log(128) / math.log(64)) ** 0.5)


def test_each_image_of_a_batch_has_the_frequencies_of_its_own_size():
    for rope in FiT.ropes:
        model, x, t, y = mixed("fitv2-nano")
        model.rope, model.trained = rope, 4
        together = model(x[:2], t[:2], y[:2])
        torch.testing.assert_close(together[1], model(x[1][None], t[1:2], y[1:2])[0], rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------------ FiT


def test_fit_block_is_exact_in_double_precision():
    """Values and gradients of a FiTv2 block on a padded batch against its formula for each image, float64."""
    D, h, N = 16, 2, (6, 4)
    block = randomised(FiTBlock(D, h, 24, True, True, False, 4)).double()
    row, column = grid(2, 3)
    cos, sin = (v.double() for v in rope_2d(row, column, (2, 3), D // h))
    x, c = normal(sum(N), 1, D).double().requires_grad_(), normal(2, D).double()
    _, layout = pack(normal(2, 1, 6), 1, torch.tensor(N)[:, None])

    def formula(x, c, n):
        norm = lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        ada = block.adaLN_modulation
        s1, c1, a1, s2, c2, a2 = ((F.silu(c) @ ada[1].weight.T + ada[1].bias) @ ada[2].weight.T
                                  + ada[2].bias + 0.1).split(D)
        q, k, v = block.attn.qkv(norm(x) * (1 + c1) + s1).view(n, 3, h, D // h).permute(1, 2, 0, 3)
        turn = lambda z: torch.view_as_real(torch.view_as_complex(norm(z).reshape(h, n, -1, 2))
                                            * torch.complex(cos, sin)[:, :n]).flatten(2)
        o = torch.softmax(turn(q) @ turn(k).mT / (D // h) ** 0.5, -1) @ v
        x = x + a1 * block.attn.proj(o.transpose(0, 1).reshape(n, D))
        z = norm(x) * (1 + c2) + s2
        return x + a2 * block.mlp.fc2(F.silu(block.mlp.fc1_g(z)) * block.mlp.fc1_x(z))

    ours = block(x, c, 0.1, [layout.unpadded(v) for v in (cos, sin)], layout)[:, 0]
    theirs = torch.cat([formula(z, ck, n) for z, ck, n in zip(x[:, 0].split(N), c, N)])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weights = normal(*ours.shape).double()
    gradients = (torch.autograd.grad((o * weights).sum(), x, retain_graph=True)[0] for o in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)


def test_fit_options():
    x, t, y = doubles(size=(16, 16), classes=5)
    for options in (dict(qk_norm=False), dict(qk_norm="gain"), dict(lora_dim=8), dict(swiglu=False, mlp_ratio=4.0)):
        model = FiT(16, 4, **SMALL, **options).double()
        assert (model(x, t, y) == 0).all()
        model = randomised(model)
        before = model(x, t, y)
        attn = model.blocks[0].attn.qkv
        attn.weight.data[:32] *= 3                                    # the queries
        attn.bias.data[:32] *= 3
        assert torch.allclose(model(x, t, y), before, atol=2e-3) == bool(options.get("qk_norm", True)), options
    model.time_shift = 4.0
    shifted = model(x, torch.tensor([0.5, 0.5, 1.0]), y)
    model.time_shift = 1.0
    torch.testing.assert_close(shifted, model(x, torch.tensor([0.8, 0.8, 1.0]), y), rtol=1e-5, atol=1e-6)


def test_dit_draws_other_sizes_by_an_interpolated_table():
    model = randomised(DiT(16, 4, 3, 32, 2, 2, num_classes=5)).double()
    x, t, y = doubles(size=(16, 16), classes=5)
    before = model(x, t, y)
    objectives.extrapolate(objective := objectives.Diffusion(model, None, (3, 16, 16), 5), (8, 24))
    assert objective.shape == (3, 8, 24) and model(doubles(size=(8, 24))[0], t, y).shape == (3, 3, 8, 24)
    objectives.extrapolate(objective, (16,))
    torch.testing.assert_close(model(x, t, y), before)
    with pytest.raises(ValueError, match="10x24 is not divisible"):
        objectives.extrapolate(objective, (10, 24))
    with pytest.raises(ValueError, match="no rotary positions"):
        objectives.extrapolate(objective, None, "ntk")
    with pytest.raises(ValueError, match="rope 'yan': choose from direct, .*yarn"):
        objectives.extrapolate(objectives.Diffusion(FiT(16, 4, **SMALL), None, (3, 16, 16), 5), None, "yan")


# ------------------------------------------------------------------------------------------------------------- Flag-DiT


def test_flag_dit_text_comes_in_through_gates():
    model, x, t = FlagDiT(8, **TEXT).double(), normal(4, 3, 8, 12).double(), torch.rand(4).double()
    assert all((layer.attention.gate == 0).all() for layer in model.layers) and (model(x, t, text()) == 0).all()
    model = lively(model).double()
    whole, y = model(x, t, text()), text()
    torch.testing.assert_close(model(x, t, Text(torch.where(y.mask[..., None], y.tokens, 9.0), y.mask)), whole)
    longer = Text(F.pad(y.tokens, (0, 0, 0, 3)), F.pad(y.mask, (0, 3)))
    torch.testing.assert_close(model(x, t, longer), whole)
    assert not torch.allclose(model(x, t, y[torch.tensor([3, 2, 1, 0])]), whole, atol=1e-3)
    for layer in model.layers:
        layer.attention.gate.data.zero_()
    for p in model.cap_embedder[1].parameters():
        p.data.zero_()
    torch.testing.assert_close(model(x, t, y[torch.tensor([3, 2, 1, 0])]), model(x, t, y))


def test_flag_dit_reads_the_layout():
    """The same patches in two layouts differ by their [nextline] tokens alone: without them they are one sequence."""
    t, y = torch.tensor([300.0]).double(), torch.tensor([1])
    for nextline in (True, False):
        model = lively(FlagDiT(16, 2, multiple_of=8, nextline=nextline, **SMALL)).double()
        z = normal(1, 3, 4, 12).double()                                       # 2 x 6 patches, of which 3 x 4 are made
        patches = F.pixel_unshuffle(z, 2).flatten(2)
        other = F.pixel_shuffle(patches.unflatten(2, (3, 4)), 2)
        a, b = (F.pixel_unshuffle(model(v, t, y), 2).flatten(2) for v in (z, other))
        assert torch.allclose(a, b, atol=1e-8) != nextline


def test_flag_dit_clips():
    model, t, y = lively(FlagDiT((3, 8, 8), **TEXT)).double(), torch.tensor([300.0]).double(), text(1)
    x = normal(1, 3, 3, 8, 8).double()
    out = model(x, t, y)
    assert out.shape == x.shape
    assert not torch.allclose(model(x.flip(2), t, y).flip(2), out, atol=1e-3), "the order of the frames matters"
    frames = model([x[0, :, :1], x[0]], t.expand(2), text(1)[torch.tensor([0, 0])])
    torch.testing.assert_close(frames[0], model(x[:, :, :1], t, y)[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(frames[1], out[0], rtol=1e-9, atol=1e-9)


def test_flag_dit_sounds():
    model = lively(FlagDiT((20,), **{**TEXT, "in_channels": 7})).double()
    t, y = torch.tensor([10.0, 500]).double(), text(2)
    x = [normal(7, 20).double(), normal(7, 12).double()]
    together = model(x, t, y)
    for k in range(2):
        torch.testing.assert_close(together[k], model(x[k][None], t[k:k + 1], y[k:k + 1])[0], rtol=1e-9, atol=1e-9)


def test_flag_dit_norms_and_groups():
    x, t, y = doubles(size=(8, 8), classes=5)
    options = dict(SMALL, multiple_of=8, num_heads=4)
    model = lively(FlagDiT(8, 2, num_kv_heads=2, **options)).double()
    before = model(x, t, y)
    repeated = FlagDiT(8, 2, **options).double().eval()
    repeat = lambda w: w.view(2, 8, -1).repeat_interleave(2, 0).reshape(32, *w.shape[1:])
    repeated.load_state_dict({n: repeat(w) if any(k in n for k in (".wk.", ".wv.", "k_norm")) else w
                              for n, w in model.state_dict().items()})
    torch.testing.assert_close(repeated(x, t, y), before, rtol=1e-6, atol=1e-8)
    wq = model.layers[0].attention.wq.weight
    wq.data *= 5                                                      # but for the norm's epsilon
    torch.testing.assert_close(model(x, t, y), before, rtol=1e-2, atol=1e-3)
    wq.data[:8] *= 5                                                  # one head alone: the norm is over all of them
    assert not torch.allclose(model(x, t, y), before, atol=1e-3)


def test_flag_dit_spare_channels_and_extrapolation():
    x, t, y = doubles(size=(16, 16), classes=5)
    model = lively(FlagDiT(16, 2, multiple_of=8, spare_channels=True, nextline=True, **SMALL)).double()
    out = model(x, t, y)
    out.sum().backward()
    grad = model.final_layer.linear.bias.grad.view(4, 6)
    assert out.shape == x.shape and (grad[:, 3:] == 0).all() and (grad[:, :3] != 0).all()
    large = doubles(size=(16, 32))[0]
    assert model.counts((16, 32)) == (128, 8 * 17) and model.trained == (64, 8 * 9)
    direct, seen = model(large, t, y), set()
    for rope in FlagDiT.ropes:
        model.rope = rope
        torch.testing.assert_close(model(x, t, y), out)               # nothing changes at the trained size
        seen.add(round(model(large, t, y).sum().item(), 3))
    assert len(seen) == len(FlagDiT.ropes)
    model.rope, model.ntk_factor, model.base_length = "direct", 2.0, 8 * 9
    model.rope, by_name = "direct", model(large, t, y)
    model.rope, model.ntk_factor, model.base_length = "ntk-proportional", 1.0, None
    torch.testing.assert_close(model(large, t, y), by_name)
    assert not torch.allclose(direct, by_name, atol=1e-3)


def test_flag_block_is_exact_in_double_precision():
    """Values and gradients against the formula written out, float64: grouped attention, text, gates, scores' factor."""
    D, h, kv, N = 16, 4, 2, 6
    block = lively(FlagBlock(D, h, kv, True, 10, 8, None, 1e-5)).double()
    x, c = normal(2, N, D).double().requires_grad_(), normal(2, D).double()
    y, stretch = Text(normal(2, 3, 10).double(), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()), 1.3
    angle = (torch.arange(N)[:, None] * 1e4 ** -(torch.arange(0, 4, 2) / 4)).double()

    def formula(x):
        rms = lambda z, m: z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.weight
        ln = lambda z, m: ((z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
                           * m.weight + m.bias)
        a, ada = block.attention, block.adaLN_modulation[1]
        s1, c1, a1, s2, c2, a2 = (v[:, None] for v in (F.silu(c) @ ada.weight.T + ada.bias).split(D, 1))
        z = rms(x, block.attention_norm) * (1 + c1) + s1
        heads = lambda z, n: z.view(2, -1, n, D // h).transpose(1, 2).repeat_interleave(h // n, 1)
        turn = lambda z: torch.view_as_real(torch.view_as_complex(z.reshape(*z.shape[:-1], 2, 2))
                                            * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
        q, k = turn(heads(ln(a.wq(z), a.q_norm), h)), turn(heads(ln(a.wk(z), a.k_norm), kv))
        o = torch.softmax(stretch * q @ k.mT / 2, -1) @ heads(a.wv(z), kv)
        w = rms(y.tokens, block.attention_y_norm)
        scores = q @ heads(ln(a.wk_y(w), a.ky_norm), kv).mT / 2
        scores = scores.masked_fill(~y.mask[:, None, None], -torch.inf)
        o = o + a.gate.tanh()[:, None, None] * (torch.softmax(scores, -1) @ heads(a.wv_y(w), kv))
        x = x + a1 * a.wo(o.transpose(1, 2).reshape(2, N, D))
        z, f = rms(x, block.ffn_norm) * (1 + c2) + s2, block.feed_forward
        return x + a2 * f.w2(F.silu(f.w1(z)) * f.w3(z))

    _, layout = pack(normal(2, 1, N), 1)
    ours, theirs = block(x, c, (angle.cos()[None], angle.sin()[None]), stretch, layout, y), formula(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weights = normal(*ours.shape).double()
    gradients = (torch.autograd.grad((o * weights).sum(), x, retain_graph=True)[0] for o in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------------- data


def test_shapes_of_many_ratios():
    d = data.load("shapes", size=16, split="test", aspect="mixed", stride=2)
    assert d.shape == (3, 16, 16) and len(d) == 5000 and len(d.images) == 10000
    sides = {tuple(image.shape[1:]) for image in d.images[:5000]}
    assert len(sides) > 20 and all(h % 2 == w % 2 == 0 and h * w <= 256 for h, w in sides)
    assert {image.shape for image in d.images[5000:]} == {(3, 16, 16)}
    plain = data.load("shapes", size=16, split="test")
    indices, flips = d.plan(3, 64, 0)
    x, y = d.gather(indices, flips)
    assert torch.equal(y, plain.labels[indices % 5000]) and 10 < (indices >= 5000).sum() < 54
    assert all(torch.equal(image, plain.gather([i - 5000])[0][0]) for i, image in zip(indices, x) if i >= 5000)
    assert len(d.subset("red").images) == 2 * len(d.subset("red"))
    wide, _, _ = data.render([7, 8], (16, 48))
    assert wide.shape == (2, 3, 16, 48)
    with pytest.raises(ValueError, match="cifar10 has no option 'aspect'"):
        data.load("cifar10", aspect="keep")
    with pytest.raises(ValueError, match="'crop' is "):
        data.load("shapes", aspect="crop")


def test_folders_keep_their_ratios(tmp_path):
    from PIL import Image
    rng = np.random.default_rng(0)
    for k, (w, h) in enumerate([(300, 100), (100, 100), (40, 90), (20, 20)] * 5):
        Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)).save(tmp_path / f"{k:02}.png")
    d = data.load("folder", tmp_path, size=64, aspect="mixed", stride=8)
    sides = {tuple(image.shape[1:]) for image in d.images[:len(d)]}
    assert sides == {(32, 104), (64, 64), (88, 40)}, "20x20 has fewer than 16 patches"
    squares = {tuple(whole.shape[1:]): tuple(again.shape[1:]) for whole, again in zip(d.images, d.images[len(d):])}
    assert squares == {(32, 104): (64, 64), (64, 64): (64, 64), (88, 40): (88, 40)}
    d = data.load("folder", tmp_path, size=64, aspect="crop", stride=8)
    crops = [tuple(image.shape[1:]) for image in d.images]
    assert len(set(crops)) > 4 and all(h % 8 == w % 8 == 0 and 48 * 64 <= h * w <= 64 * 64 for h, w in crops)
    assert all(w >= 3 * h for (h, w), file in zip(crops, d.files) if int(file.stem) % 4 == 0), "300x100"


def test_a_crop_covers_its_size():
    from PIL import Image
    rows, columns = np.meshgrid(np.arange(100), np.arange(200), indexing="ij")
    picture = Image.fromarray(np.stack([rows, columns, 0 * rows], -1).astype(np.uint8))
    for seed in range(20):
        r, c, _ = data.fitting_crop(picture, 64, 16, np.random.default_rng(seed)).astype(float)
        steps = np.diff(r[1:-1, 5]).mean(), np.diff(c[5, 1:-1]).mean()
        assert abs(steps[0] - steps[1]) < 0.2 and abs(steps[0] - min(100 / r.shape[0], 200 / r.shape[1])) < 0.1


@pytest.mark.parametrize("name, shape, make", [("moving-shapes", (3, 6, 16, 16), data.render_clips),
                                               ("turntable", (3, 6, 16, 16), data.render_views),
                                               ("tones", (48, 64), data.play)])
def test_modalities(name, shape, make):
    d = data.load(name, split="test")
    assert d.shape == shape and len(d) == 512 == len(set(range(512))) and len(d.classes) == 6
    images, labels, captions = make(np.array(data.FEW["test"])[[5, 300]], shape[-1])
    assert torch.equal(torch.from_numpy(images), d.images[[5, 300]]), "each is a function of its number alone"
    assert labels.tolist() == d.labels[[5, 300]].tolist() and captions == [d.captions[5], d.captions[300]]
    assert all(d.classes[k].split()[0] in caption for k, caption in zip(d.labels, d.captions))
    assert d.labels.bincount().min() > 80 and len(set(d.captions)) > 5
    assert figures.to_uint8(d.gather(range(2))[0]).shape == ((2, 48, 64, 3) if name == "tones" else (2, 16, 96, 3))


def test_sounds_keep_their_notes(tmp_path):
    d = data.load("tones", split="test")
    rows = [i for i, words in enumerate(d.captions) if "flute" in words and "rising" in words][:4]
    x, _ = d.gather(rows)
    waves = data.sound(x)
    assert waves.shape == (4, 64 * data.HOP) and waves.abs().max() <= 1
    u = data._uniform(np.array(data.FEW["test"], np.uint64)[rows], np.uint64(41))
    for wave_, v in zip(waves, u):                                    # the pitch of each of six notes
        root = 220 * 2 ** (math.floor(v * 7) / 12)
        for k, semitones in enumerate([0, 2, 4, 7, 9, 12]):
            note = wave_[(k * 8192) // 6 + 200:((k + 1) * 8192) // 6 - 200]
            spectrum = torch.fft.rfft(note * torch.hann_window(len(note)), 16384).abs()
            heard = spectrum.argmax().item() * data.RATE / 16384
            assert heard == pytest.approx(root * 2 ** (semitones / 12), abs=data.RATE / data.WINDOW)
    sample.save_wav(tmp_path / "x.wav", waves)
    with wave.open(str(tmp_path / "x.wav")) as file:
        assert (file.getframerate(), file.getnframes()) == (8000, 4 * (64 * data.HOP + 2000))


def test_samples_are_written_in_every_form(tmp_path):
    from PIL import Image
    clips, labels = normal(4, 3, 6, 16, 16).clamp(-1, 1), torch.arange(4)
    sample.write(clips, labels, tmp_path / "x.gif", 2)
    with Image.open(tmp_path / "x.gif") as film:
        assert film.n_frames == 6 and film.size == (2 * 66 + 2, 2 * 66 + 2)
    sample.write(clips, labels, tmp_path / "x.png", 2)
    with Image.open(tmp_path / "x.png") as strips:
        assert strips.size == (2 * (6 * 64 + 2) + 2, 2 * 66 + 2)
    for suffix, sides in ((".gif", 2), (".wav", 3), (".webp", 1), (".txt", 2)):
        with pytest.raises(ValueError, match=f"x{suffix}: give a name that ends in .png"):
            sample.check_out(tmp_path / f"x{suffix}", sides)


# -------------------------------------------------------------------------------------------------------------- scripts

FLAGS = ["--batch", "8", "--log-every", "1", "--sample-n", "8", "--draw", "steps=2", "--device", "cpu"]


def test_a_run_of_mixed_sizes(here, capsys):  # noqa: F811
    """Trained in one go or resumed it has the same weights; it draws any size, and goes on at a larger one."""
    tiny = [*FLAGS, "--model", "fitv2-nano:depth=1,hidden_size=32,num_heads=2,lora_dim=4", "--data",
            "shapes:aspect=mixed", "--decay", "constant", "--accum", "2"]
    call(train.train, *tiny, "--steps", "4", "--out", "a")
    call(train.train, *tiny, "--steps", "2", "--out", "b")
    call(train.train, *tiny, "--steps", "4", "--out", "b")
    a, b = (runs.load_checkpoint(here / name / "ckpt.pt")["model"] for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    call(sample.sample, "a", "--size", "12x20", "--rope", "vision-ntk-pro2", "--shift", "2", "--guidance-power", "1",
         "--n", "4", "--out", "x.npz")
    with np.load("x.npz") as file:
        assert file["arr_0"].shape == (4, 12, 20, 3)
    call(train.train, *FLAGS, "--post-train", "a", "--data", "shapes:size=24,aspect=keep", "--steps", "2", "--out", "d")
    old, new = (runs.load_checkpoint(here / name / "ckpt.pt") for name in "ad")
    changed = {name for name, w in new["model"].items() if not torch.equal(w, old["ema"][name])}
    assert changed and all(re.search(FiT.post_trains, name.removeprefix("model.")) for name in changed)
    assert "trained=4" in new["config"]["network"] and new["config"]["image_size"] == 24
    capsys.readouterr()
    call(evaluate.evaluate, "sizes", "a", "--sizes", "16x16,8x24", "--ropes", "yarn,pi", "--classifier-steps", "2",
         "--n", "2")
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert rows[2:4] == [["a", "pi"], ["a", "yarn"]] and (here / "a/size-8x24.png").exists()
    assert "18x20 is not divisible" in refused(capsys, sample.sample, "a", "--size", "18x20")
    assert "unet-pico" in refused(capsys, train.train, "--model", "unet-pico", "--data", "shapes:aspect=keep")


@pytest.mark.parametrize("name, suffix, size", [("moving-shapes", ".webp", "4x8x12"), ("tones", ".wav", "24")])
def test_a_run_of_clips_or_sounds(here, capsys, monkeypatch, name, suffix, size):  # noqa: F811
    monkeypatch.setitem(data.FEW, "train", range(64))
    text = ["--model", "flag-dit-text-nano:depth=1,hidden_size=32,num_heads=2,text_width=32", "--data", name]
    call(train.train, *FLAGS, *text, "--steps", "2", "--out", "a")
    call(train.train, *FLAGS, *text, "--steps", "3", "--out", "a")
    call(sample.sample, "a", "--n", "2", "--prompt", "a rising star", "--out", f"x{suffix}")
    call(sample.sample, "a", "--n", "2", "--size", size, "--rope", "ntk-proportional", "--out", "y.png")
    assert (here / f"x{suffix}").stat().st_size > 100 and (here / "y.png").exists()
    assert f"{name} holds" in refused(capsys, train.train, "--data", name, "--model", "unet-pico")


@pytest.mark.parametrize("arch, build", [
    ("fit", lambda: FiT(32, 2, 4, 64, 2, 1, mlp_ratio=4.0, qk_norm=False, num_classes=7, learn_sigma=True)),
    ("fitv2", lambda: FiT(32, 2, 4, 64, 2, 1, lora_dim=16, num_classes=7)),
    ("flag-dit", lambda: FlagDiT(32, 2, 4, 64, 2, 32, multiple_of=8, num_classes=7, spare_channels=True))])
def test_published_files_of_any_size(here, arch, build):  # noqa: F811
    """A published-style file is read off its shapes, computes the same, and draws at a size in pixels."""
    model = randomised(build())
    torch.save({"ema": model.state_dict()}, "published.pt")
    state = convert.read_weights("published.pt")
    loaded = convert.load_official(arch, convert.infer_config(arch, state), state).eval()
    x, t, y = inputs(size=(12, 20), channels=4, classes=7)
    assert torch.equal(loaded(x, t, y), model(x, t, y))
    flags = [] if arch == "fit" else ["--sampler", "euler"]
    call(sample.sample, "--official", arch, "--checkpoint", "published.pt", "--n", "2", "--size", "32x64",
         "--steps", "2", "--rope", "ntk", "--out", "x.png", *flags)
    with np.load("x.latents.npz") as file:
        assert file["arr_0"].shape == (2, 4, 4, 8)
    with pytest.raises(ValueError, match="FiT with norm_type = 'rmsnorm' is not built here"):
        convert.load_official("fit", {"norm_type": "rmsnorm"}, state)


@pytest.mark.slow
def test_padding_costs_little():
    """A training step on shapes of mixed sizes against one on as many tokens without padding, and against rows that are
    all as long as the longest, the least that masking everywhere would cost; medians, interleaved.
    python -m pytest -m slow -k padding_costs -s"""
    import statistics
    import time
    x, sizes = canvas([torch.randn(3, *reversed(data.fit_size(*data.native_size(i, 32), 32, 4))) for i in range(32)])
    plain, rows = torch.randn(32, 3, 20, 40), torch.randn(32, 3, 32, 32)
    t, y = torch.rand(32) * 1000, torch.arange(32) % 8
    for name in ("fitv2-nano", "flag-dit-nano"):
        model = create_model(name, 32, 3, 8)
        optimiser, times = torch.optim.AdamW(model.parameters(), fused=True), {"mixed": [], "plain": [], "rows": []}
        for k in range(22):
            for kind, batch in (("mixed", (x, t, y, sizes)), ("plain", (plain, t, y)), ("rows", (rows, t, y))):
                clock = time.process_time()
                model(*batch).square().mean().backward()
                optimiser.step()
                optimiser.zero_grad()
                times[kind] += [time.process_time() - clock] if k > 1 else []
        mixed, alike, masked = (statistics.median(times[kind]) for kind in ("mixed", "plain", "rows"))
        count = lambda side: (side[0] // 4) * (side[1] // 4 + ("flag" in name))           # with [nextline]
        tokens = [count(side) for side in sizes.tolist()]
        ratio = mixed / alike * 32 * count((20, 40)) / sum(tokens)
        print(f"\n{name}: {sum(tokens)} tokens of 32 images, {32 * max(tokens)} with padding: {mixed * 1e3:.0f} ms; "
              f"{32 * count((20, 40))} without: {alike * 1e3:.0f} ms; per token {ratio:.3f} times; "
              f"whole rows {masked * 1e3:.0f} ms, {masked / mixed:.3f} times the mixed ones")
        assert ratio < 1.2
