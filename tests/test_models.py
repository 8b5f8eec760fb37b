"""What holds for every backbone of the registry, and what each promises. Weights and images are float64, so that no
processor's rounding decides a test."""

import copy
import inspect
import json
from pathlib import Path

import golden
import pytest
import torch
import torch.nn.functional as F

import moe
import objectives
from convert import KLDecoder, fill, infer_config, load_official, read_weights
from data import byte_tokens
from diffusion import create_process
from guidance import stitch_by_steps, stitch_by_time, stitch_steps, stitched
from layers import (
    TDLN,
    PackedLinear,
    PatchEmbed,
    TernaryLinear,
    Text,
    TextEncoder,
    dense,
    pack_codes,
    position_table,
    replace_ternary,
    rotate,
    ternarize,
    ternary,
    unpack_codes,
    unpatchify,
)
from models import (
    MODELS,
    DiCo,
    DiMR,
    DiT,
    DiTBlock,
    DRWKVBlock,
    LinearAttention,
    Mamba,
    Stitched,
    TerDiT,
    UNet,
    UViT,
    backbone,
    create_model,
    options_of,
    q_shift,
)
from objectives import MultiScale, StepNoise, area_target
from samplers import grid_times

NANO = [name for name in MODELS if name.endswith(("-nano", "-pico"))]


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def inputs(batch=3, size=(32, 32), channels=3, classes=10, model=None):
    """x, t, y; y is a Text with padding if the model is one of text."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(batch, channels, *size, generator=g), torch.tensor([0, classes - 1, classes])
    if model is not None and model.text_width:
        tokens = torch.randn(3, 5, model.text_width, generator=g)
        y = Text(tokens, torch.arange(5) < torch.tensor([[5], [2], [3]]))
    return x, torch.tensor([0.0, 321.5, 999.0])[:batch], y[:batch]


def randomised(model):
    """The model with every weight random: zero-initialised branches hide mistakes."""
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            noise = torch.randn(p.shape, generator=g).to(p)
            p.data = p.data + 0.05 * noise if p.ndim == 1 else noise * p[0].numel() ** -0.5
    return model.eval()


@pytest.mark.parametrize("name", NANO)
def test_starts_at_zero_and_trains(name):
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = create_model(name, 16)
    x, t, y = inputs(size=(16, 16), model=model)
    zero = (model(x, t, y) == 0).all()
    assert zero or name.startswith(("uvit", "dimr")), "the output is zero at initialisation, where the paper has it so"
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    target, losses = x.flip(1), []
    for _ in range(10):
        loss = F.mse_loss(model(x, t, y), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0], "one fixed batch is learnt"
    elsewhere = "y_embedder", "pad_token", "branches.0.norm", "branches.0.head"      # rows without samples; DiMR's own
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if p.requires_grad
               and not n.startswith(elsewhere)), "every weight is trained"


@pytest.mark.parametrize("name", NANO)
def test_samples_do_not_mix_and_weights_survive_a_file(name, tmp_path):
    model = randomised(create_model(name, 16))
    x, t, y = inputs(size=(16, 16), model=model)
    whole = model(x, t, y)
    torch.testing.assert_close(model(x[1:2], t[1:2], y[1:2]), whole[1:2], rtol=1e-6, atol=1e-8)
    assert not torch.allclose(model(x, t, y[torch.tensor([2, 1, 0])]), whole, atol=1e-3), "the label matters"
    assert not torch.allclose(model(x, t.flip(0), y), whole, atol=1e-3), "the time matters"
    torch.save(model.state_dict(), tmp_path / "w.pt")
    other = create_model(name, 16).double()
    other.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    assert torch.equal(other.eval()(x, t, y), whole)


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("options", [dict(image_size=(16, 24)), dict(in_channels=4), dict(num_classes=0),
                                     dict(learn_sigma=True)])
def test_shapes(name, options):
    options = dict(image_size=(16, 16)) | options
    model, size = randomised(create_model(name, **options)), options["image_size"]
    x, t, y = inputs(size=size, channels=options.get("in_channels", 3), model=model)
    labels = isinstance(y, torch.Tensor)
    out = model(x, t, None if labels and options.get("num_classes") == 0 else y)
    assert out.shape == (3, x.shape[1] * (2 if options.get("learn_sigma") else 1), *size) and out.isfinite().all()


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("size", [28, 36, 40])
def test_odd_sizes_work_or_are_refused(name, size):
    try:
        model = randomised(create_model(name, size))
    except ValueError as error:
        assert f"{size}x{size} is not divisible by" in str(error)
        return
    x, t, y = inputs(1, (size, size), model=model)
    assert model(x, t, y).shape == x.shape


@pytest.mark.parametrize("name", NANO)
def test_channels_last_is_the_same(name):
    model = randomised(create_model(name, 16))
    x, t, y = inputs(size=(16, 16), model=model)
    out = model(x, t, y)
    last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), t, y)
    torch.testing.assert_close(last, out, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", NANO)
def test_half_precision_is_close(name):
    torch.set_default_dtype(torch.float32)
    model = randomised(create_model(name, 16))
    x, t, y = inputs(size=(16, 16), model=model)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x, t, y).float()
    assert (low - model(x, t, y)).norm() / model(x, t, y).norm() < 0.05


def test_unknown_names_and_sizes_are_refused_with_advice():
    with pytest.raises(ValueError, match="did you mean dit-s/2"):
        create_model("dit-s2")
    with pytest.raises(ValueError, match="30x30.*not divisible by the patch size 4.*28x28"):
        create_model("dit-nano", image_size=30)
    with pytest.raises(ValueError, match="dit-nano has no option 'layers': choose from .*depth.*moe"):
        create_model("dit-nano", layers=3)
    with pytest.raises(ValueError, match="no option 'hiden_size': did you mean .*hidden_size"):
        create_model("dit-nano", hiden_size=96)
    with pytest.raises(ValueError, match="not divisible"):
        create_model("unet-nano", image_size=30)


def test_entries_have_one_form():
    """Each is a callable whose docstring begins with the line that --list prints, and every option has a default, of
    its own type or None with an annotation, which is how options are read from the command line."""
    for name, entry in MODELS.items():
        line = inspect.getdoc(backbone(name)).split("\n\n")[0].split(". ")[0]
        assert callable(entry) and 20 < len(line) < 110 and "\n" not in line, name
        for option, p in options_of(name).items():
            assert p.default is not inspect.Parameter.empty, (name, option)
            assert p.default is not None or p.annotation is not inspect.Parameter.empty, (name, option)
    assert options_of("dit-s/2")["depth"].default == 12 and "moe" in options_of("dit-s/2")


@pytest.mark.parametrize("name", NANO)
def test_a_model_draws_the_sizes_that_it_says(name):
    """Those of any size take another one after `resize`, and refuse what their stride does not divide; the others
    refuse in one sentence. Of mixed sizes are those that take a list."""
    model = randomised(create_model(name))
    x, t, y = inputs(size=(16, 24), model=model)
    if not model.any_size:
        with pytest.raises(ValueError, match="draws images of the size that it was built for, no other"):
            model.resize((16, 24))
        return
    model.resize((16, 24))
    assert model(x, t, y).shape == x.shape
    assert 16 % model.stride == 0 and model.stride % model.patch_size == 0
    with pytest.raises(ValueError, match=f"17x24 is not divisible by .* {model.stride}"):
        model.resize((17, 24))
    with pytest.raises(ValueError, match="of 4 sides"):
        model.resize((2, 2, 16, 24))
    if model.mixed_sizes:
        assert [z.shape for z in model([x[0], x[1, :, :8]], t[:2], y[:2])] == [(3, 16, 24), (3, 8, 24)]


def test_lit_stretches_its_grid_too():
    model = randomised(create_model("lit-nano", 16))
    x, t, y = inputs(size=(16, 16))
    before = model(x, t, y)
    model.resize((8, 24))
    assert model(inputs(size=(8, 24))[0], t, y).shape == (3, 3, 8, 24)
    model.resize(16)
    torch.testing.assert_close(model(x, t, y), before)


@pytest.mark.parametrize("name", [name for name in NANO if name.split("-")[0] not in ("unet", "dico", "drwkv")
                                  and name != "dit-moe-nano"])
def test_any_transformer_takes_experts(name):
    """create_model(name, moe=(E, K)) is add_experts, with the balance loss's weight on the model."""
    torch.manual_seed(0)
    model = create_model(name, 16, moe=(4, 2), balance=0.5)
    torch.manual_seed(0)
    other = moe.add_experts(create_model(name, 16), 4, 2)
    assert model.balance == 0.5 and create_model(name, 16, moe=(4, 2)).balance == 0.01
    states = model.state_dict(), other.state_dict()
    assert list(states[0]) == list(states[1]) and all(map(torch.equal, states[0].values(), states[1].values()))
    model = randomised(model).train()
    x, t, y = inputs(size=(16, 16), model=model)
    plain = model(x, t, y).square().mean()
    assert moe.balanced(model, plain)["loss"] > plain + 0.5 * 0.99


def test_options_of_any_model():
    for options in (dict(moe=(4,)), dict(moe=(4, 2.5))):
        with pytest.raises(ValueError, match="takes two numbers, the experts and how many"):
            create_model("dit-nano", **options)
    with pytest.raises(ValueError, match="UNet has 0 of them"):
        create_model("unet-pico", moe=(4, 2))
    with pytest.raises(ValueError, match="DiTMoE has experts already"):
        create_model("dit-moe-nano", moe=(4, 2))
    with pytest.raises(ValueError, match="leave out one of the two"):
        create_model("dit-nano", moe=(4, 2), ternary=True)
    with pytest.raises(ValueError, match="packed=True is for ternary weights, and this DiT has none"):
        create_model("dit-nano", packed=True)
    assert create_model("dit-moe-nano").balance == 0.01 and create_model("dit-moe-nano", balance=0.0).balance == 0
    linear = {type(m) for m in create_model("terdit-nano", ternary=False).modules()}
    assert TernaryLinear not in linear, "TerDiT's own option comes first"
    for options, kind in ((dict(ternary=True), TernaryLinear), (dict(ternary=True, packed=True), PackedLinear)):
        assert any(isinstance(m, kind) for m in create_model("dit-nano", **options).modules())


# ------------------------------------------------------------------------------------------------------------------ DiT


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


def test_modulations_start_closed():
    """What makes shifts, scales and gates is zero at first, of FiTv2's low-rank pairs the second map alone."""
    for name in ("dit-nano", "drwkv-nano", "fitv2-nano", "flag-dit-nano", "terdit-nano"):
        options = {"ternary": False} if name == "terdit-nano" else {}
        for part, m in create_model(name, 16, **options).named_modules():
            if part.endswith("adaLN_modulation"):
                zero = [not any(p.any() for p in linear.parameters()) for linear in m[1:]]
                assert zero == [False] * (len(zero) - 1) + [True], part


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


@pytest.mark.parametrize("name, arch, guessed", [("dit-moe-qknorm", "dit-moe", {"pretraining_tp"}), (
    "terdit-base", "terdit", {"input_size", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps"})])
def test_published_configs_are_read_off_the_shapes(name, arch, guessed):
    case = golden.load(f"{golden.__file__.removesuffix('golden.py')}{name}.npz")
    inferred = infer_config(arch, case.state_dict)
    known = set(case.config) - guessed - {"class_dropout_prob"}
    assert {k: inferred[k] for k in known} == {k: case.config[k] for k in known}
    load_official(arch, inferred, case.state_dict)
    with pytest.raises(ValueError, match=f"not the weights of a published {arch}"):
        infer_config(arch, {"a": torch.zeros(1)})


def test_safetensors(tmp_path):
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
    torch.set_default_dtype(torch.float32)
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


@pytest.mark.parametrize("scale_shift, updown", [(True, True), (False, False), (True, False)])
def test_unet_options(scale_shift, updown):
    model = randomised(UNet(16, 3, 10, channels=16, multipliers=(1, 2, 2), blocks=2, attention=(1, 2), dropout=0.5,
                            scale_shift=scale_shift, resblock_updown=updown))
    x, t, y = inputs(size=(16, 16))
    out = model(x, t, y)
    assert out.shape == x.shape and torch.equal(out, model(x, t, y)), "eval() removes dropout"


@pytest.mark.parametrize("norm", ["td-ln", "td-rms"])
def test_dit_takes_time_dependent_norms(norm):
    torch.manual_seed(0)
    options = dict(hidden_size=32, depth=2, num_heads=2, num_classes=5)
    model, plain = DiT(16, 4, 3, norm=norm, **options), DiT(16, 4, 3, **options)
    assert sum(p.numel() for p in model.parameters()) < 0.7 * sum(p.numel() for p in plain.parameters())
    x, t, y = inputs(size=(16, 16), classes=5)
    assert (model(x, t, y) == 0).all()
    told = []
    model.blocks[0].register_forward_pre_hook(lambda m, args: told.append(args[1]))
    out = randomised(model)(x, t, y)
    torch.testing.assert_close(told[0], t / 500 - 1)
    assert not torch.allclose(out, model(x, t.flip(0), y), atol=1e-3), "the time matters"
    assert not torch.allclose(out, model(x, t, y.flip(0)), atol=1e-3), "the label matters"
    with pytest.raises(ValueError, match="norm 'ln': choose adaln, td-ln or td-rms"):
        DiT(16, 4, 3, norm="ln", **options)


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


# -------------------------------------------------------------------------------------------------------------- DiT-MoE


# --------------------------------------------------------------------------------------------------------------- TerDiT


def test_ternary_codes():
    w = torch.randn(400, 600, generator=torch.Generator().manual_seed(0))
    q = ternary(w)
    assert set(q.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert (q == 0).float().mean().item() == pytest.approx(0.310, abs=0.004), "P(|z| < 0.5 sqrt(2/pi))"
    assert torch.equal(ternary(-w), -q) and (ternary(1000 * w) != q).float().mean() < 1e-4
    assert not ternary(torch.zeros(4, 4)).any()
    assert torch.equal(unpack_codes(pack_codes(q)), q.to(torch.int8)) and pack_codes(q).numel() * 4 == w.numel()
    with pytest.raises(ValueError, match="6 rows do not divide by 4"):
        pack_codes(torch.zeros(6, 2))


def test_ternary_gradients():
    """Straight through: dL/dW = alphas dL/dW_eff, dL/dalphas = sum(Q dL/dW_eff), float64."""
    layer = TernaryLinear(torch.nn.Linear(6, 8)).double()
    x, g = torch.randn(5, 6, dtype=torch.float64, requires_grad=True), torch.randn(5, 8, dtype=torch.float64)
    got = torch.autograd.grad((layer(x) * g).sum(), [layer.weight, layer.alphas, x])
    q, G = ternary(layer.weight).detach(), g.T @ x.detach()
    for ours, formula in zip(got, [layer.alphas * G, (G * q).sum()[None], g @ (layer.alphas * q)]):
        torch.testing.assert_close(ours, formula, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["dit-nano", "terdit-nano", "unet-pico"])
def test_any_backbone_becomes_ternary_and_packed(name):
    model = create_model(name)
    model = randomised(model if name.startswith("terdit") else ternarize(model))
    x, t, y = inputs()
    out = model(x, t, y)
    codes = sum(m.weight.numel() for m in model.modules() if isinstance(m, TernaryLinear))
    before = sum(p.numel() for p in model.parameters())
    dense_out = replace_ternary(copy.deepcopy(model), dense)(x, t, y)
    replace_ternary(model, PackedLinear)
    assert torch.equal(model(x, t, y), out) and torch.equal(dense_out, out), "to the last bit"
    bytes_ = sum(v.numel() for v in model.state_dict().values() if v.dtype == torch.uint8)
    assert bytes_ == codes / 4 and sum(p.numel() for p in model.parameters()) == before - codes
    with pytest.raises(ValueError, match="no linear layers in its blocks"):
        ternarize(model)


def test_ternary_modulation_is_bounded():
    """Behind the adaLN projection one RMSNorm over all 6 D numbers: their mean square is below 1 at any scale, which
    without the norm it follows."""
    model = randomised(create_model("terdit-nano"))
    adaLN, c = model.layers[0].adaLN_modulation, torch.randn(4, 128)
    adaLN[2].weight.data.fill_(1)
    for scale in (1.0, 1e4):
        adaLN[1].alphas.data.fill_(scale)
        before = adaLN[1](F.silu(c))
        assert (adaLN(c).square().mean(1) <= 1.0001).all() and before.square().mean() > 0.1 * scale**2


def test_grouped_heads_are_shared_heads():
    """Two key-value heads for four query heads: as four whose weights repeat. Positions count by difference only."""
    size = dict(image_size=16, patch_size=4, in_channels=3, hidden_size=32, depth=1, num_heads=4, multiple_of=8,
                ternary=False, num_classes=10)
    small, large = randomised(TerDiT(**size, kv_heads=2)), TerDiT(**size).eval()
    repeat = lambda w: w.view(2, 8, 32).repeat_interleave(2, 0).flatten(0, 1)
    large.load_state_dict({name: repeat(w) if "wk" in name or "wv" in name else w
                           for name, w in small.state_dict().items()})
    x, t, y = inputs(size=(16, 16))
    torch.testing.assert_close(small(x, t, y), large(x, t, y), rtol=1e-4, atol=1e-5)
    q, k = torch.randn(2, 1, 1, 1, 8)
    angle = lambda n: torch.tensor([[n]]) * 10000 ** (-torch.arange(0, 8, 2) / 8)
    turn = lambda z, n: rotate(z, angle(n).cos()[None], angle(n).sin()[None])
    product = lambda m, n: (turn(q, float(m)) * turn(k, float(n))).sum()
    torch.testing.assert_close(product(5, 2), product(13, 10), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="4 heads cannot share 3 key and value heads"):
        TerDiT(16, 4, 3, 32, 1, 4, kv_heads=3)
    with pytest.raises(ValueError, match="width 36 does not divide into 4 heads of a multiple of 2"):
        TerDiT(16, 4, 3, 36, 1, 4)


# ------------------------------------------------------------------------------------------------------------- T-Stitch


def stitching(fractions, rule="steps", sampler="dpmpp-2m", grid=None, parts=None, process="flow", steps=10):
    """(images, the model of each call) of stitched small backbones; the same noise in every call."""
    backbone = lambda k: randomised(create_model("dit-nano", 8, hidden_size=16 + 16 * k, depth=1 + k))
    parts = parts or [objectives.Diffusion(backbone(k), create_process(process, "x0"), (3, 8, 8), 10)
                      for k in range(len(fractions))]
    objective, calls = objectives.Stitch(parts, fractions, rule).eval(), []
    hooks = [part.model.register_forward_hook(lambda *a, k=k: calls.append(k)) for k, part in enumerate(parts)]
    frames = list(objective.trajectory(objectives.ImageNoise(0, range(2)), torch.tensor([1, 2]), sampler=sampler,
                                       steps=steps, grid=grid, guidance=1.5))
    for hook in hooks:
        hook.remove()
    return frames, calls, parts


@pytest.mark.parametrize("sampler", ["dpmpp-2m", "ddpm"])
def test_stitching(sampler):
    """r = 0 and r = 1 are the models alone; until the switch the trajectory is the small one's; both halves of guidance
    go to one model; the shares are as asked for; three models with an empty share are two."""
    frames, calls, parts = stitching([0.4, 0.6], sampler=sampler)
    assert calls == [0] * 8 + [1] * 12
    alone = [list(part.trajectory(objectives.ImageNoise(0, range(2)), torch.tensor([1, 2]), sampler=sampler, steps=10,
                                  guidance=1.5)) for part in parts]
    for fractions, k, rule in (([0.0, 1.0], 1, "steps"), ([0.0, 1.0], 1, "time"), ([1.0, 0.0], 0, "steps")):
        ours, calls, _ = stitching(fractions, rule, sampler, parts=parts)
        assert torch.equal(ours[-1], alone[k][-1]) and set(calls) == {k}
    same, _, _ = stitching([0.4, 0.0, 0.6], sampler=sampler, parts=[parts[0], parts[0], parts[1]])
    assert torch.equal(same[-1], frames[-1]) and not torch.equal(frames[-1], alone[1][-1])
    # dpmpp-2m's third and later steps look back: up to the switch, everything is the small model's
    assert all(torch.equal(a, b) for a, b in zip(frames[:4], alone[0][:4])) and not torch.equal(frames[4], alone[0][4])


@pytest.mark.parametrize("process, grid", [("edm", "karras"), ("linear", "karras"), ("flow", "beta"),
                                           ("cosine", "leading")])
def test_stitching_counts_steps_on_any_grid(process, grid):
    _, calls, _ = stitching([0.3, 0.2, 0.5], grid=grid, process=process, sampler="ddim", steps=20)
    assert calls == [0] * 12 + [1] * 8 + [2] * 20


def test_stitched_models_keep_their_own_null_label_and_patches():
    models = [randomised(create_model("dit-nano", 8, hidden_size=16, depth=1, num_classes=n, patch_size=p))
              for n, p in ((10, 4), (12, 2))]
    parts = [objectives.Diffusion(m, create_process("flow"), (3, 8, 8), n) for m, n in zip(models, (10, 12))]
    calls = []
    for m in models:
        m.register_forward_hook(lambda m, args, output: calls.append((models.index(m), args[2].tolist())))
    noise = objectives.ImageNoise(0, range(2))
    list(objectives.Stitch(parts, [0.5, 0.5]).trajectory(noise, torch.tensor([1, 2]), steps=2))
    assert calls == [(0, [1, 2]), (1, [1, 2])]
    calls.clear()
    list(objectives.Stitch(parts, [0.5, 0.5]).trajectory(noise, torch.tensor([1, 2]), steps=2, guidance=2.0))
    assert calls == [(0, [1, 2]), (0, [10, 10]), (1, [1, 2]), (1, [12, 12])]


@pytest.mark.parametrize("process, grid", [("edm", "karras"), ("linear", None), ("flow", "uniform"), ("vp", "karras")])
@pytest.mark.parametrize("fractions", [[0.05, 0.95], [0.3, 0.0, 0.7], [0.0, 1.0], [1.0, 0.0]])
def test_steps_begin_at_the_process_own_times(process, grid, fractions):
    """At every time of the grid and between two of them the step's own model; rounding of a time does not matter."""
    process = create_process(process)
    times = grid_times(process, 25, grid)
    rule, plan = stitch_by_steps(times, fractions), stitch_steps(25, fractions)
    assert [rule(t) for t in times[:-1].tolist()] == [rule(t) for t in times[:-1].float().tolist()] == plan
    between = [(a + b) / 2 for a, b in zip(times.tolist(), times[1:].tolist())]
    assert [rule(t) for t in between] == plan


def test_thresholds_are_the_published_ones():
    """Where fractions are no whole numbers of steps, the published threshold and the paper's rule part."""
    by_time = stitch_by_time([0.05, 0.95])
    times = grid_times(create_process("linear"), 25)
    assert [by_time(t) for t in times[:-1].tolist()].count(0) == 2 and stitch_steps(25, [0.05, 0.95]).count(0) == 1
    assert [stitch_by_time([0.5, 0.5])(t) for t in (999, 500, 499, 0)] == [0, 0, 1, 1]
    named = stitched([lambda x, t: "small", lambda x, t: "large"], stitch_by_time([0.5, 0.5]))
    assert [named(None, torch.full((3,), t)) for t in (999.0, 0.0)] == ["small", "large"]
    model = Stitched([torch.nn.Identity()] * 2, [0.5, 0.5])
    assert [model.choose_model(t) for t in (999.0, 0.0)] == [0, 1]


def test_what_cannot_be_stitched():
    with pytest.raises(ValueError, match="sum to 1, not 0.4, 0.4"):
        Stitched([torch.nn.Identity()] * 2, [0.4, 0.4])
    with pytest.raises(ValueError, match="as many fractions"):
        Stitched([torch.nn.Identity()] * 3, [0.5, 0.5])
    one, other = (objectives.Diffusion(create_model("dit-nano", 8, learn_sigma=learned),
                                       create_process("linear", learned_variance=learned), (3, 8, 8), 10)
                  for learned in (True, False))
    with pytest.raises(ValueError, match="with learned variances or without"):
        objectives.Stitch([one, other], [0.5, 0.5])
    assert [stitch_steps(5, [r / 10, 1 - r / 10]).count(0) for r in range(11)] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


# ----------------------------------------------------------------------------------------------------------------- DiCo


def small_dico(size=16):
    torch.manual_seed(0)
    return randomised(DiCo(size, 3, 5, hidden_size=8, depth=(1, 1, 1, 1, 1)))


def test_dico_gradients_open_from_the_head():
    torch.manual_seed(0)
    model = DiCo(16, 3, 5, hidden_size=8, depth=(1, 1, 1, 1, 1))
    x, t, y = inputs(size=(16, 16), classes=5)
    assert torch.equal(model.middle[0](x := torch.randn(2, 32, 4, 4), torch.randn(2, 32)), x), "blocks start closed"
    x = inputs(size=(16, 16))[0]
    F.mse_loss(model(x, t, y), x).backward()
    assert {n for n, p in model.named_parameters() if p.grad.abs().sum() > 0} == {"final_layer.out_proj.weight",
                                                                                  "final_layer.out_proj.bias"}


def test_dico_commutes_with_shifts_where_the_image_is_a_torus():
    model = small_dico()
    for m in model.modules():
        if isinstance(m, torch.nn.Conv2d):
            m.padding_mode = "circular"
    x, t, y = inputs(size=(16, 16), classes=5)
    shift = lambda x: x.roll((4, 8), (2, 3))
    torch.testing.assert_close(model(shift(x), t, y), shift(model(x, t, y)), rtol=1e-4, atol=1e-5)


def test_channel_attention_is_dicos_only_view_of_the_whole(monkeypatch):
    model = small_dico(96)
    x, t, y = inputs(1, size=(96, 96), classes=5)

    def far_gradient():
        x.requires_grad_().grad = None
        model(x, t, y)[0, :, 0, 0].sum().backward()
        return x.grad[0, :, 80:, 80:].abs().sum().item()

    assert far_gradient() > 0
    block = model.middle[0]
    h = torch.randn(2, 32, 6, 6)
    gate = block.cca(h) / h
    assert ((gate > 0) & (gate < 1)).all() and torch.allclose(gate, gate[..., :1, :1].expand_as(gate))
    monkeypatch.setattr(type(block.cca), "forward", lambda self, x: x * 0.5)
    assert far_gradient() == 0


# ---------------------------------------------------------------------------------------------------------------- U-ViT


def test_uvit_without_its_skips_is_a_vit():
    x, t, y = inputs(size=(16, 16), classes=5)
    options = dict(image_size=16, patch_size=4, hidden_size=32, depth=5, num_heads=2, num_classes=5, time_mlp=True)
    model, plain = randomised(UViT(**options)), UViT(**options, skip=False).eval()
    assert len(model.in_blocks) == len(model.out_blocks) == 2 and plain.out_blocks[0].skip_linear is None
    for block in model.out_blocks:
        block.skip_linear.weight.data = torch.eye(32, 64)
        block.skip_linear.bias.data.zero_()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "skip_linear" not in k})
    torch.testing.assert_close(model(x, t, y), plain(x, t, y))


def test_uvit_sees_order_through_positions_alone():
    model = randomised(UViT(16, 4, 3, hidden_size=32, depth=2, num_heads=2, num_classes=5, conv=False))
    x, t, y = inputs(size=(16, 16), classes=5)
    swap = lambda x: torch.cat([x[..., 4:8, :], x[..., 0:4, :], x[..., 8:, :]], -2)       # two rows of patches
    out, positions = model(x, t, y), model.pos_embed.data.clone()
    assert not torch.allclose(model(swap(x), t, y), swap(out), atol=1e-3)
    model.pos_embed.data = torch.cat([positions[:, :2], positions[:, 6:10], positions[:, 2:6], positions[:, 10:]], 1)
    torch.testing.assert_close(model(swap(x), t, y), swap(out), rtol=1e-4, atol=1e-5)


def test_uvit_takes_text():
    model = randomised(UViT(16, 4, 3, hidden_size=32, depth=2, num_heads=2, text_width=7, text_length=5))
    x, t, _ = inputs(size=(16, 16))
    text = torch.randn(3, 5, 7)
    out = model(x, t, text)
    assert model.pos_embed.shape[1] == 1 + 5 + 16 and out.shape == x.shape
    assert not torch.allclose(model(x, t, text.flip(0)), out, atol=1e-3)
    padded = torch.cat([text[:, :3], torch.zeros(3, 2, 7)], 1)
    assert torch.equal(model(x, t, text[:, :3]), model(x, t, padded))


# ----------------------------------------------------------------------------------------------------------------- DiMR


@pytest.mark.parametrize("rms", [False, True])
def test_time_dependent_norm(rms):
    torch.manual_seed(0)
    norm = TDLN(6, rms).double()
    x, tau = torch.randn(3, 2, 4, 6, dtype=torch.float64, requires_grad=True), torch.tensor([-0.9, 0.1, 1.0]).double()
    scale = ((x * x).mean(-1, keepdim=True).sqrt() + 1e-8) if rms else (x.var(-1, unbiased=False, keepdim=True) + 1e-5
                                                                       ).sqrt()
    plain = (x if rms else x - x.mean(-1, keepdim=True)) / scale
    torch.testing.assert_close(norm(x, tau), plain, rtol=1e-12, atol=1e-12, msg="fresh, it is the plain norm")
    for p in norm.parameters():
        p.data = torch.randn(6, dtype=torch.float64)

    def slide(v):
        g = torch.sigmoid(tau[:, None] * (v.a + 1) + v.b)
        return (g * v.p0 + (1 - g) * v.p1)[:, None, None]

    formula = slide(norm.gain) * plain + (0 if rms else slide(norm.bias))
    torch.testing.assert_close(norm(x, tau), formula, rtol=1e-11, atol=1e-11)
    weights = [x, *norm.parameters()]
    gradients = (torch.autograd.grad((o * x.detach().cos()).sum(), weights) for o in (norm(x, tau), formula))
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    for end, p in ((60, norm.gain.p0), (-60, norm.gain.p1)):
        norm.gain.b.data.fill_(end)
        torch.testing.assert_close(norm.gain(tau), p.expand(3, 6))
    assert {n.split(".")[-1] for n, p in norm.named_parameters() if hasattr(p, "no_decay")} == {"a", "b"}


def small_dimr(**options):
    torch.manual_seed(0)
    return DiMR(16, 3, 5, **dict(hidden_size=16, depth=3, num_heads=2, patch_sizes=(4, 2, 1)) | options)


def test_dimr_starts_without_time_and_learns_it():
    model, (x, t, y) = small_dimr(), inputs(size=(16, 16), classes=5)
    assert torch.equal(model(x, t, y), model(x, t.flip(0), y))
    model(x, t, y).square().mean().backward()
    gates = [p for p in model.parameters() if hasattr(p, "no_decay")]
    assert gates and all(p.grad is None or (p.grad == 0).all() for p in gates)
    torch.optim.SGD(model.parameters(), 1.0).step()
    assert not torch.equal(model(x, t, y), model(x, t.flip(0), y))


def test_dimr_knows_the_class_through_the_cascade_alone():
    x, t, y = inputs(size=(16, 16), classes=5)
    for detach in (False, True):
        model = small_dimr(detach=detach)
        model(x, t, y).square().mean().backward()
        lowest = [p.grad for n, p in model.named_parameters() if n.startswith("branches.0") and p.grad is not None]
        assert any(g.abs().sum() > 0 for g in lowest) != detach
    model = randomised(model)
    assert not torch.allclose(model(x, t, y), model(x, t, y.flip(0)))
    model.branches[1].up.weight.data.zero_()
    assert torch.equal(model(x, t, y), model(x, t, y.flip(0)))
    assert not torch.equal(model(x, t, y, every=True)[0], model(x, t, y.flip(0), every=True)[0])


def test_dimr_cascade_is_laid_out_by_position():
    branch = small_dimr().branches[1]
    grid = torch.arange(36.0).view(1, 6, 6, 1)
    blocks = grid.view(1, 3, 2, 3, 2).permute(0, 1, 3, 2, 4).reshape(1, 3, 3, 4)         # what a Linear would give
    assert torch.equal(branch.shuffled(blocks), grid)


def test_dimr_takes_smaller_images():
    model, (x, t, y) = randomised(small_dimr()), inputs(size=(8, 12), classes=5)
    assert [list(out.shape[2:]) for out in model(x, t, y, every=True)] == [[2, 3], [4, 6], [8, 12]]
    with pytest.raises(ValueError, match="20x16 pixels.*up to 16x16.*divisible by 4"):
        model(torch.zeros(1, 3, 20, 16), t[:1], y[:1])
    with pytest.raises(ValueError, match="18x16 pixels.*divisible by 4"):
        model(torch.zeros(1, 3, 18, 16), t[:1], y[:1])


def test_multi_scale_targets():
    noise = torch.randn(4, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    for width in (32, 64, 128):
        assert area_target(noise, width).var().item() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(area_target(noise, 32), area_target(area_target(noise, 64), 32))
    odd = torch.randn(1, 1, 9, 9)
    padded = F.pad(odd, (1, 1, 1, 1))
    windows = [[padded[0, 0, 2 * r:2 * r + 3, 2 * c:2 * c + 3].sum() / 3 for c in range(5)] for r in range(5)]
    torch.testing.assert_close(area_target(odd, 5)[0, 0], torch.tensor(windows))
    with pytest.raises(ValueError, match="5 pixels wide is no whole fraction of a target of 16"):
        area_target(torch.randn(1, 1, 16, 16), 5)


def test_multi_scale_loss_sums_the_branches():
    """A model that says 0 to a request for unit noise loses the sum of the weights, 1/4 + 1/2 + 1."""
    model = small_dimr()
    for branch in model.branches:
        torch.nn.init.zeros_(branch.head.weight)
    objective = MultiScale(model, create_process("linear"), (3, 16, 16), 5)
    batch = {"x": torch.zeros(64, 3, 16, 16), "y": torch.zeros(64, dtype=torch.long), "noise": StepNoise(0, 0, 64)}
    losses = objective.loss(batch)
    assert losses["loss"].item() == pytest.approx(1.75, abs=0.06) and set(losses) == {
        "loss", "mse", "mse_4", "mse_8", "by_noise"}
    losses["loss"].backward()
    assert all(b.head.bias.grad.abs().sum() > 0 for b in model.branches)


# ------------------------------------------------------------------------------------------------- DRWKV, Dimba, LiT


def test_drwkv_invariances():
    x = torch.randn(2, 12, 8)
    assert torch.equal(q_shift(x, (3, 4), gamma=0), x)
    assert torch.equal(q_shift(torch.ones(1, 12, 8), (3, 4)).view(3, 4, 8)[1, 1:3], torch.ones(2, 8))
    delta = torch.zeros(1, 9, 4)
    delta[0, 4] = 1
    plus = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]]).float()
    assert torch.equal(q_shift(delta, (3, 3)).sum(-1).view(3, 3), plus)
    block = DRWKVBlock(8, layer=1, depth=3)
    for p in block.adaLN_modulation.parameters():
        torch.nn.init.zeros_(p)
    assert torch.equal(block(x, torch.randn(2, 8), (3, 4)), x), "closed gates"
    model = randomised(create_model("drwkv-nano", 16, depth=5))
    x, t, y = inputs(size=(16, 16))
    skips = []
    for block in model.out_blocks:
        block.register_forward_pre_hook(lambda m, args: skips.append(args[3]))
    outputs = []
    for block in model.in_blocks:
        block.register_forward_hook(lambda m, args, out: outputs.append(out))
    model(x, t, y)
    assert all(a is b for a, b in zip(skips, outputs[::-1])), "last in, first out"
    model.label_emb.embedding_table.weight.data[3] = 0
    assert torch.equal(model(x, t), model(x, t, torch.full((3,), 3))), "without a label, time alone"
    with pytest.raises(ValueError, match="depth 4 is even"):
        create_model("drwkv-nano", depth=4)


def test_dimba_reads_text_and_residuals_as_published():
    model = randomised(create_model("dimba-nano", 16))
    assert list(model.places) == [1, 3] and len(model.mamba_blocks) == 2
    x, t, y = inputs(size=(16, 16), model=model)
    out = model(x, t, y)
    other = Text(torch.where(y.mask[..., None], y.tokens, 100.0), y.mask)
    torch.testing.assert_close(model(x, t, other), out)
    short = Text(y.tokens[1:2, :2], y.mask[1:2, :2])
    torch.testing.assert_close(model(x[1:2], t[1:2], short), out[1:2], rtol=1e-4, atol=1e-5)
    mamba, h = model.mamba_blocks[0], torch.randn(2, 16, 96)
    two = mamba.mixer(h)
    one = Mamba(96, d_state=8)
    total = 0
    for suffix, flip in (("", lambda z: z), ("_b", lambda z: z.flip(1))):
        state = {name: mamba.mixer.state_dict()[name] for name in one.state_dict()}
        state |= {name: mamba.mixer.state_dict()[name.replace(part, part[:-4] + suffix + "_log" if part == "A_log"
                                                              else part + suffix)]
                  for name in one.state_dict() for part in ("conv1d", "x_proj", "dt_proj", "A_log", "D")
                  if name.split(".")[0] == part}
        one.load_state_dict(state)
        total = total + flip(one(flip(h)))
    torch.testing.assert_close(two, total, rtol=1e-4, atol=1e-5)
    seen = {}
    model.blocks[2].register_forward_pre_hook(lambda m, args: seen.__setitem__("block", args[0]))
    model.mamba_blocks[1].register_forward_pre_hook(lambda m, args: seen.__setitem__("residual", args[1]))
    first = model(x, t, y) is not None and dict(seen)
    model.mamba_blocks[0].register_forward_hook(lambda m, args, out: (out[0], out[1] + 1))
    model(x, t, y)
    assert torch.equal(seen["block"], first["block"]) and torch.equal(seen["residual"], first["residual"] + 1)


def test_dimba_options():
    coarse, fine = position_table(16, 4, 4), position_table(16, 8, 8, (0.5, 0.5))
    assert torch.equal(fine.view(8, 8, 16)[::2, ::2].reshape(16, 16), coarse)
    for options in (dict(repaired=True), dict(order="mamba-first"), dict(mamba_ratio=1.0), dict(pe_interpolation=2.0),
                    dict(micro_condition=True)):
        model = randomised(create_model("dimba-nano", 16, **options))
        x, t, y = inputs(size=(8, 24), model=model)
        assert model(x, t, y).isfinite().all(), "any size stretches over the grid"
    for options in (dict(mamba_ratio=1.5), dict(order="attention-last")):
        with pytest.raises(ValueError, match="1.5 of depth 4|attention-last"):
            create_model("dimba-nano", **options)


def test_text_encoder_ignores_padding():
    encoder = randomised(TextEncoder(24))
    captions = ["a red ring", "a much longer caption, é", "abc", ""]
    together = encoder(byte_tokens(captions, 64).long())
    for k, caption in enumerate(captions):
        alone = encoder(byte_tokens([caption], 64).long())
        n = alone.mask.sum()
        assert n == together.mask[k].sum()
        torch.testing.assert_close(together.tokens[k, :n], alone.tokens[0, :n], rtol=1e-4, atol=1e-5)


def test_lit_module_in_special_cases():
    x, attn = torch.randn(2, 15, 24), LinearAttention(24, 2, (3, 5))
    attn.dwc.weight.data.zero_()
    attn.dwc.bias.data.zero_()
    order = torch.randperm(15)
    torch.testing.assert_close(attn(x)[:, order], attn(x[:, order]))
    attn.dwc.weight.data[:, 0, 2, 2] = 1                                        # the convolution is the identity
    attn.kv.weight.data[:24], attn.kv.bias.data[:24] = 0, 1                     # all keys are equal
    attn.q.bias.data[:] = 10                                                    # no dead query
    v = x @ attn.kv.weight[24:].T + attn.kv.bias[24:]
    torch.testing.assert_close(attn(x), attn.proj(v.mean(1, keepdim=True) + v), rtol=1e-4, atol=1e-5)


def test_lit_with_closed_gates_is_its_dit():
    dit, lit = randomised(create_model("dit-nano", 16)), randomised(create_model("lit-nano", 16))
    state = {name: v for name, v in dit.state_dict().items() if ".attn." not in name}
    for name in state:
        if ".adaLN_modulation.1" in name and name.startswith("blocks"):
            state[name][2 * 128:3 * 128] = 0                                    # the gate of attention
    dit.load_state_dict(state, strict=False)
    missing = lit.load_state_dict(state, strict=False).missing_keys
    assert {name.split(".attn.")[1].split(".")[0] for name in missing} == {"q", "kv", "proj", "dwc"}
    assert torch.equal(*(model(*inputs(size=(16, 16))) for model in (dit, lit)))


@pytest.mark.parametrize("arch, name", [("drwkv", "drwkv-cond"), ("drwkv", "drwkv-uncond"), ("dimba", "dimba-model"),
                                        ("dimba", "dimba-nomask"), ("lit", "lit-model")])
def test_sizes_of_linear_mixers_are_read_off_the_weights(arch, name):
    case = golden.load(Path(__file__).parent / "golden" / f"{name}.npz")
    read = infer_config(arch, case.state_dict)
    assert {k for k in read if k in case.config and read[k] != case.config[k]} <= {"num_heads"}


def test_dimrs_last_branch_draws_every_pixel():
    with pytest.raises(ValueError, match="must end in 1"):
        create_model("dimr-nano", 16, patch_sizes=(4, 2))
