"""What holds for every backbone of the registry, and what DiT and the U-Net promise."""

import pytest
import torch
import torch.nn.functional as F

from convert import KLDecoder, fill, infer_config, load_official, read_weights
from layers import PatchEmbed, unpatchify
from models import MODELS, DiT, DiTBlock, UNet, cost, create_model

NANO = [name for name in MODELS if name.endswith(("-nano", "-pico"))]


def inputs(batch=3, size=(32, 32), channels=3, classes=10):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(batch, channels, *size, generator=g), torch.tensor([0.0, 321.5, 999.0])[:batch],
            torch.tensor([0, classes - 1, classes])[:batch])


def randomised(model):
    """The model with every weight random: zero-initialised branches hide mistakes."""
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=g) * (0.02 if p.ndim == 1 else p[0].numel() ** -0.5)
    return model.eval()


@pytest.mark.parametrize("name", NANO)
def test_starts_at_zero_and_trains(name):
    model = create_model(name)
    x, t, y = inputs()
    assert (model(x, t, y) == 0).all(), "the output is zero at initialisation"
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    target, losses = x.flip(1), []
    for _ in range(20):
        loss = F.mse_loss(model(x, t, y), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0], "one fixed batch is learnt"
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if p.requires_grad
               and not n.startswith(("y_embedder", "pad_token"))), "every weight is trained"


@pytest.mark.parametrize("name", NANO)
def test_samples_do_not_mix_and_weights_survive_a_file(name, tmp_path):
    model = randomised(create_model(name))
    x, t, y = inputs()
    whole = model(x, t, y)
    torch.testing.assert_close(model(x[1:2], t[1:2], y[1:2]), whole[1:2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(x, t, y.flip(0)), whole, atol=1e-3), "the label matters"
    assert not torch.allclose(model(x, t.flip(0), y), whole, atol=1e-3), "the time matters"
    torch.save(model.state_dict(), tmp_path / "w.pt")
    other = create_model(name)
    other.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    assert torch.equal(other.eval()(x, t, y), whole)


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("options", [dict(image_size=(16, 32)), dict(in_channels=4, image_size=16), dict(num_classes=0),
                                     dict(learn_sigma=True)])
def test_shapes(name, options):
    model = randomised(create_model(name, **options))
    size = options.get("image_size", 32)
    size = (size, size) if isinstance(size, int) else size
    x, t, y = inputs(size=size, channels=options.get("in_channels", 3))
    out = model(x, t, None if options.get("num_classes") == 0 else y)
    assert out.shape == (3, x.shape[1] * (2 if options.get("learn_sigma") else 1), *size) and out.isfinite().all()


@pytest.mark.parametrize("name", NANO)
def test_half_precision_is_close(name):
    model = randomised(create_model(name))
    x, t, y = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x, t, y).float()
    assert (low - model(x, t, y)).norm() / model(x, t, y).norm() < 0.03


def test_unknown_names_and_sizes_are_refused_with_advice():
    with pytest.raises(ValueError, match="did you mean dit-s/2"):
        create_model("dit-s2")
    with pytest.raises(ValueError, match="30x30.*not divisible by the patch size 4.*28x28"):
        create_model("dit-nano", image_size=30)
    with pytest.raises(ValueError, match="no option 'layers': choose from .*depth"):
        create_model("dit-nano", layers=3)
    with pytest.raises(ValueError, match="not divisible"):
        create_model("unet-nano", image_size=30)


# ------------------------------------------------------------------------------------------------------------------ DiT


@pytest.mark.parametrize("size, patch, macs",
                         [("s", 2, 6.06), ("s", 8, 0.36), ("b", 4, 5.56), ("l", 2, 80.71), ("xl", 2, 118.64)])
def test_dit_costs_what_the_paper_says(size, patch, macs):
    """2212.09748, table 4: its "Gflops" are multiply-accumulates."""
    with torch.device("meta"):
        model = create_model(f"dit-{size}/{patch}", 32, 4, 1000, learn_sigma=True)
    assert cost(model, (4, 32, 32))[1] / 1e9 == pytest.approx(macs, abs=0.03)


def test_dit_gradients_open_in_three_steps():
    """Zero gates: first only the read-out learns, then gates and embeddings of the outside, then everything."""
    torch.manual_seed(0)
    model = DiT(16, 4, 3, hidden_size=32, depth=2, num_heads=2, num_classes=5)
    x, t, y = inputs(size=(16, 16), classes=5)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)

    def learning():
        optimiser.zero_grad()
        F.mse_loss(model(x, t, y), torch.ones_like(x) * x).backward()
        return {n for n, p in model.named_parameters() if p.requires_grad and p.grad.abs().sum() > 0}

    assert learning() == {"final_layer.linear.weight", "final_layer.linear.bias"}
    optimiser.step()
    second = learning()
    assert "x_embedder.proj.weight" in second
    assert not any(".attn." in n or ".mlp.fc" in n for n in second if n.startswith("blocks"))
    grad = model.blocks[0].adaLN_modulation[1].bias.grad.view(6, -1).abs().sum(1) > 0
    assert grad.tolist() == [False, False, True, False, False, True], "of each block, only the two gates"
    optimiser.step()
    assert learning() == {n for n, p in model.named_parameters() if p.requires_grad}


def test_dit_without_positions_does_not_see_order():
    model = randomised(DiT(16, 4, 3, hidden_size=32, depth=2, num_heads=2, num_classes=5))
    x, t, y = inputs(size=(16, 16), classes=5)
    swap = lambda x: torch.cat([x[..., 4:8, :], x[..., 0:4, :], x[..., 8:, :]], -2)       # two rows of patches
    assert not torch.allclose(model(swap(x), t, y), swap(model(x, t, y)), atol=1e-3)
    model.pos_embed.data.zero_()
    torch.testing.assert_close(model(swap(x), t, y), swap(model(x, t, y)), rtol=1e-4, atol=1e-5)


def test_patches_and_back():
    """With permutation weights, un-patchifying the patch embedding is the identity: the layouts differ as published."""
    C, p = 3, 2
    embed = PatchEmbed(C, C * p * p, p)
    torch.nn.init.zeros_(embed.proj.bias)
    order = torch.arange(C * p * p).view(C, p, p).permute(1, 2, 0).flatten()              # channel slowest -> fastest
    embed.proj.weight.data = torch.eye(C * p * p)[order].view(-1, C, p, p)
    x = torch.randn(2, C, 4, 6)
    assert torch.equal(unpatchify(embed(x), (2, 3), p), x)


def test_dit_identity_blocks():
    block, x = DiT(hidden_size=32, depth=1, num_heads=2, num_classes=0).blocks[0], torch.randn(2, 5, 32)
    assert torch.equal(block(x, torch.randn(2, 32)), x)


def test_published_files(tmp_path):
    """A published-style file, its config read off the shapes, loads; a wrong one is refused by name.
    Nothing in it is executed."""
    config = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=64, depth=2, num_heads=1, num_classes=7,
                  learn_sigma=True)
    fresh = DiT(8, 2, 4, 64, 2, 1, num_classes=7, learn_sigma=True)
    model = randomised(load_official("dit", config, fresh.state_dict()))
    torch.save({"ema": model.state_dict(), "note": "as published"}, tmp_path / "dit.pt")
    state = read_weights(tmp_path / "dit.pt")
    assert infer_config("dit", state) == config | {"mlp_ratio": 4.0}
    x, t, y = inputs(size=(8, 8), channels=4, classes=7)
    assert torch.equal(load_official("dit", infer_config("dit", state), state)(x, t, y), model(x, t, y))
    state["pos_embed"] = state["pos_embed"][:, :4]
    with pytest.raises(ValueError, match="pos_embed is .1, 4, 64. in the file"):
        load_official("dit", config, state)
    (tmp_path / "junk.pt").write_bytes(b"not a file of weights")
    with pytest.raises(ValueError, match="junk.pt is not a file of weights"):
        read_weights(tmp_path / "junk.pt")


def test_safetensors(tmp_path):
    import json
    import struct
    weight = torch.arange(6, dtype=torch.float32).view(2, 3)

    def file(offsets):
        entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": offsets}
        header = json.dumps({"w": entry, "__metadata__": {"a": "b"}}).encode()
        (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + weight.numpy().tobytes())
        return tmp_path / "w.safetensors"

    assert torch.equal(read_weights(file([0, 24]))["w"], weight)
    for offsets in ([0, 20], [8, 32], [24, 0]):
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            read_weights(file(offsets))


def test_decoder_is_stable_diffusions():
    with torch.device("meta"):
        decoder = KLDecoder()
    assert sum(p.numel() for p in decoder.decoder.parameters()) == 49_490_179
    small = KLDecoder(widths=(64, 32), blocks=2)
    assert small(torch.randn(2, 4, 8, 8)).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="not the weights of"):
        fill(small, {}, "the decoder")


@pytest.mark.slow
def test_dit_speed():
    """DiT-S/2 forward + backward against its matrix products alone: the same F.linear and attention calls, no more.
    Interleaved; the ratio of medians is printed.  python -m pytest -m slow -k dit_speed -s"""
    import statistics
    import time
    B, N, D, h, depth = 8, 256, 384, 6, 12
    model = randomised(create_model("dit-s/2", 32, 4, 1000, learn_sigma=True)).train()
    x, t, y = torch.randn(B, 4, 32, 32), torch.rand(B) * 999, torch.randint(1000, (B,))
    weight = lambda o, i: torch.randn(o, i).mul_(i**-0.5).requires_grad_()
    ws = [[weight(3 * D, D), weight(D, D), weight(4 * D, D), weight(D, 4 * D), weight(6 * D, D)] for _ in range(depth)]
    patch, t1, t2, final, read = weight(D, 16), weight(D, 256), weight(D, D), weight(2 * D, D), weight(32, D)

    def products():
        c = F.linear(F.linear(torch.randn(B, 256), t1), t2)
        z = F.linear(torch.randn(B, N, 16), patch)
        total = F.linear(c, final).sum()
        for qkv, proj, up, down, ada in ws:
            total = total + F.linear(c, ada).sum()
            q, k, v = F.linear(z, qkv).view(B, N, 3, h, D // h).permute(2, 0, 3, 1, 4)
            z = F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D), proj)
            z = F.linear(F.linear(z, up), down)
        (F.linear(z, read).sum() + total).backward()

    def ours():
        model(x, t, y).sum().backward()

    times = {ours: [], products: []}
    for k in range(12):
        for call, kept in times.items():
            clock = time.perf_counter()
            call()
            kept += [time.perf_counter() - clock] if k > 1 else []
    ratio = statistics.median(times[ours]) / statistics.median(times[products])
    print(f"\nDiT-S/2, batch {B}: {statistics.median(times[ours]):.3f} s, "
          f"products alone {statistics.median(times[products]):.3f} s, ratio {ratio:.3f}")
    assert ratio < 1.5


# ---------------------------------------------------------------------------------------------------------------- U-Net


def test_unet_is_ddpms():
    """2006.11239, appendix B: 35.7 M parameters for CIFAR-10; the skips are balanced."""
    with torch.device("meta"):
        model = create_model("unet-cifar", num_classes=0)
    parameters, macs = cost(model, (3, 32, 32))
    assert (round(parameters / 1e6, 2), round(macs / 1e9, 2)) == (35.75, 6.22)


@pytest.mark.parametrize("scale_shift, updown", [(True, True), (False, False), (True, False)])
def test_unet_options(scale_shift, updown):
    model = randomised(UNet(16, 3, 10, channels=16, multipliers=(1, 2, 2), blocks=2, attention=(1, 2), dropout=0.5,
                            scale_shift=scale_shift, resblock_updown=updown))
    x, t, y = inputs(size=(16, 16))
    out = model(x, t, y)
    assert out.shape == x.shape and torch.equal(out, model(x, t, y)), "eval() removes dropout"
    channels_last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t, y)
    torch.testing.assert_close(channels_last, out, rtol=1e-4, atol=1e-4)


def test_block_is_exact_in_double_precision():
    """A DiT block against its formula written out, float64, values and gradients."""
    torch.manual_seed(0)
    D, h = 16, 2
    block = randomised(DiTBlock(D, h)).double()
    x, c = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True), torch.randn(2, D, dtype=torch.float64)

    def formula(x):
        norm = lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        modulation = F.silu(c) @ block.adaLN_modulation[1].weight.T + block.adaLN_modulation[1].bias
        s1, c1, a1, s2, c2, a2 = (v[:, None] for v in modulation.split(D, 1))
        q, k, v = (block.attn.qkv(norm(x) * (1 + c1) + s1)).split(D, 2)
        heads = lambda z: z.view(2, 5, h, D // h).transpose(1, 2)
        a = torch.softmax(heads(q) @ heads(k).transpose(-1, -2) / (D // h) ** 0.5, -1) @ heads(v)
        x = x + a1 * block.attn.proj(a.transpose(1, 2).reshape(2, 5, D))
        g = lambda z: 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
        return x + a2 * block.mlp.fc2(g(block.mlp.fc1(norm(x) * (1 + c2) + s2)))

    ours, theirs = block(x, c), formula(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    w = torch.randn_like(ours)
    gradients = (torch.autograd.grad((o * w).sum(), x, retain_graph=True)[0] for o in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)
