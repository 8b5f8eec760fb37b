"""Tokenizers: ViTok's parts, the quantisers, two players, and latents encoded once."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_train import call, here, losses, refused, weights  # noqa: F401 (a fixture among them)

import autoencoders
import build
import data
import evaluate
import layers
import objectives
import runs
import sample
import train
from autoencoders import FSQ, LFQ, EMACodebook, EntropyCodebook, Reconstruction, ViTok

TINY = dict(in_channels=3, patch_size=4, width=48, encoder_depth=1, decoder_depth=2, num_heads=2, code_width=4)


def vitok(sides=(16, 16), **options):
    torch.manual_seed(0)
    return ViTok(sides, **TINY | options).double()


def batch_of(x, step=0, seed=0):
    """A batch by the contract, its noise in x's own precision."""
    noise = objectives.StepNoise(seed, step, len(x))
    own = type("Noise", (), {"normal": lambda self, *s: noise.normal(*s).to(x), "uniform": lambda self, *s:
                             noise.uniform(*s).to(x)})()
    return {"x": x, "y": torch.zeros(len(x), dtype=torch.int64), "step": step, "noise": own}


# ---------------------------------------------------------------------------------------------------------------- vitok


@pytest.mark.parametrize("name, millions", [("vitok-s-b/16", 128.86), ("vitok-s-l/16", 426.84),
                                            ("vitok-b-b/16", 171.41)])
def test_published_sizes(name, millions):
    with torch.device("meta"):
        objective = autoencoders.TOKENIZERS[name](image_size=256, in_channels=3, perceptual=0.0)
    assert round(sum(p.numel() for p in objective.network.parameters()) / 1e6, 2) == millions


def test_an_image_is_a_clip_of_one_frame_and_a_patch_a_linear_map():
    network, x = vitok(), torch.randn(2, 3, 16, 16).double()
    clip = network.encode(x[:, :, None])
    torch.testing.assert_close(clip[:, :, 0], network.encode(x))
    torch.testing.assert_close(network.decode(clip)[:, :, 0], network.decode(network.encode(x)))
    one = vitok(patch_size=16)                                      # a single token
    weight = one.tubelet_embed.proj.weight.flatten(1)
    seen = []
    one.encoder.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    one.posterior(x)
    torch.testing.assert_close(seen[0][:, 0], x.flatten(1) @ weight.T + one.tubelet_embed.proj.bias)


@pytest.mark.parametrize("kind, shift", [("1d", 5), ("2d", 7 + 2)])
def test_rotated_queries_and_keys_know_differences_alone(kind, shift):
    """The same step on the grid (2d: one row and two columns) gives the same product wherever it is taken."""
    cos, sin = (v.double() for v in autoencoders.axial_rope((1, 7, 7), 16, kind, 100.0))
    q, k = torch.randn(2, 16).double()
    q, k = (layers.rotate(v.expand(1, 1, 49, 16), cos, sin)[0, 0] for v in (q, k))
    starts = [n for n in range(49 - shift) if n % 7 + shift % 7 < 7]
    products = torch.stack([q[n] @ k[n + shift] for n in starts])
    assert len(starts) > 10 and (products - products[0]).abs().max() < 1e-5
    torch.testing.assert_close(q.norm(dim=1), q[0].norm().expand(49))
    assert (cos[0, 0] == 1).all() and (sin[0, 0] == 0).all()


def test_kl_is_a_mean_and_nothing_at_the_prior():
    mean, logvar = torch.randn(3, 5, 2).double().requires_grad_(), torch.randn(3, 5, 2).double()
    kl = autoencoders.gaussian_kl(mean, logvar)
    assert (kl > 0).all() and not autoencoders.gaussian_kl(0 * mean, 0 * logvar).any()
    kl[0].backward()
    torch.testing.assert_close(mean.grad[0], mean[0] / 10)


def test_without_variance_the_code_is_the_encoders():
    network, x = vitok(variational=False), torch.randn(2, 3, 16, 16).double()
    rec, terms = network(x, None)
    assert terms == {} and network.encoder_to_code.out_features == 4
    torch.testing.assert_close(rec, network.decode(network.encode(x)))


@pytest.mark.parametrize("posemb", ["nope", "sincos3d", "learned"])
def test_positions(posemb):
    """Without rotary positions and a table, patches may be exchanged like members of a set; with a table they may not.
    """
    network, x = vitok(posemb=posemb, rope="none"), torch.randn(1, 3, 16, 16).double()
    swapped = torch.cat([x[..., 8:], x[..., :8]], 3)
    z, other = network.encode(x), network.encode(swapped)
    assert torch.allclose(torch.cat([z[..., 2:], z[..., :2]], 3), other) == (posemb == "nope")


def objective_of(stage=1, **options):
    torch.manual_seed(0)
    return Reconstruction(ViTok((16, 16), **TINY), (3, 16, 16), kl=1e-3, gan=0.5, stage=stage, **options).double()


def test_stage_two_freezes_the_encoder_and_keeps_the_players_apart():
    objective, x = objective_of(2, gan_until=1), torch.randn(4, 3, 16, 16).double()
    parts = objective.loss(batch_of(x, step=1))
    decoder = [p for p in objective.network.parameters() if p.requires_grad]
    critic = list(objective.discriminator.parameters())
    for name, player in (("adversarial", critic), ("critic", decoder)):
        grads = torch.autograd.grad(parts[name], player, retain_graph=True, allow_unused=True)
        assert all(g is None or not g.any() for g in grads)
    assert any(g.any() for g in torch.autograd.grad(parts["adversarial"], decoder, retain_graph=True))
    before = {name: p.clone() for name, p in objective.named_parameters()}
    optimiser = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], 0.1)
    parts["loss"].backward()
    optimiser.step()
    moved = {name.split(".")[1 if "network" in name else 0] for name, p in objective.named_parameters()
             if not torch.equal(p, before[name])}
    assert moved == {"code_to_decoder", "decoder", "tubelet_decode", "discriminator"}


def test_the_gan_ramps_up_and_r1_is_the_slope_at_real_images():
    x = torch.randn(4, 3, 16, 16).double()
    objective = objective_of(2, gan_from=10, gan_until=20, r1=2.0)
    plain = objective_of(2, gan_from=10, gan_until=20)
    for step, share in ((10, 0.0), (15, 0.5), (40, 1.0)):
        parts = plain.loss(batch_of(x, step))
        rest = parts["mse"] + 1e-3 * parts["kl"] + parts["critic"]
        torch.testing.assert_close(parts["loss"], rest + 0.5 * share * parts["adversarial"])
    real = x.clone().requires_grad_()
    slope, = torch.autograd.grad(plain.discriminator(real).sum(), real)
    difference = objective.loss(batch_of(x, 10))["critic"] - plain.loss(batch_of(x, 10))["critic"]
    torch.testing.assert_close(difference, slope.square().flatten(1).sum(1).mean())


@pytest.mark.slow
def test_eight_images_are_learned_by_heart():
    """Above 35 dB with one float of code for six values of an image."""
    torch.manual_seed(0)
    x = data.load("shapes", size=16).gather(torch.arange(8))[0]
    objective = Reconstruction(ViTok((16, 16), 3, 4, width=96, encoder_depth=2, decoder_depth=3, num_heads=4,
                                     code_width=8), (3, 16, 16), kl=1e-6)
    optimiser = torch.optim.AdamW(objective.parameters(), 2e-3)
    for step in range(800):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * (1 - step / 800)
        optimiser.zero_grad()
        objective.loss(batch_of(x, step))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimiser.step()
    mse = F.mse_loss(objective.decode(objective.encode(x)), x).item()
    assert 10 * math.log10(4 / mse) > 35


# ----------------------------------------------------------------------------------------------------------- quantisers


QUANTISERS = {"fsq": lambda: FSQ((8, 6, 5)), "lfq": lambda: LFQ(6, group=4), "vq": lambda: EMACodebook(32, 4),
              "vqgan": lambda: EntropyCodebook(32, 4)}


@pytest.mark.parametrize("name", QUANTISERS)
def test_a_quantiser_looks_up_what_it_gave_and_passes_gradients_through(name):
    torch.manual_seed(0)
    quantiser = QUANTISERS[name]()
    z = torch.randn(5, 7, quantiser.dim, requires_grad=True)
    q, indices, losses_ = quantiser(z)
    assert indices.shape == (5, 7) and 0 <= indices.min() and indices.max() < quantiser.codes
    quantiser.eval()
    with torch.no_grad():
        q, indices, none = quantiser(z)
    assert none == {}
    torch.testing.assert_close(quantiser.lookup(indices), q)
    quantiser.train()
    grad, = torch.autograd.grad(quantiser(z)[0].sum(), z)
    if name in ("lfq", "vqgan"):
        torch.testing.assert_close(grad, torch.ones_like(z))
    else:
        assert grad.any()


def test_every_code_of_fsq_and_lfq_can_be_reached():
    for quantiser in (FSQ((8, 6, 5)), FSQ((7, 5)), LFQ(6)):
        z = 6 * torch.rand(20_000, quantiser.dim) - 3
        q, indices, _ = quantiser.eval()(z)
        assert len(indices.unique()) == quantiser.codes and len(q.unique(dim=0)) == quantiser.codes
        assert q.abs().max() <= 1


def test_entropy_terms():
    """Rows that are sure and differ: no entropy in a row, all of it in the mean. LFQ's bits in groups, as together."""
    certain, used = autoencoders.entropies(100 * torch.eye(8).double())
    assert certain < 1e-6 and abs(used - math.log(8)) < 1e-3
    z = torch.randn(50, 6)
    whole, apart = (LFQ(6, group=g)(z)[2]["commit"] for g in (6, 2))
    torch.testing.assert_close(whole, apart)
    same_row = [LFQ(6, group=g, entropy=1.0, temperature=0.5)(z[:1])[2]["entropy"] for g in (6, 2)]
    assert all(abs(value) < 0.01 for value in same_row), "of one vector both entropies are the same"


def test_a_codebook_follows_its_vectors_and_moves_dead_codes():
    torch.manual_seed(0)
    quantiser = EMACodebook(16, 2, decay=0.9)
    angle = torch.linspace(0, 2, 12)                               # twelve directions in one half of the circle
    z = torch.stack([angle.cos(), angle.sin()], 1).repeat(20, 1)
    for _ in range(300):
        q, indices, _ = quantiser(z)
    torch.testing.assert_close(quantiser.codebook.norm(dim=1), torch.ones(16))
    assert (F.cosine_similarity(q, z) > 0.999).all() and len(indices.unique()) >= 12
    frozen = quantiser.eval().codebook.clone()
    quantiser(torch.randn(40, 2))
    assert torch.equal(quantiser.codebook, frozen)


def test_code_usage_is_of_the_last_hundred_steps():
    objective = Reconstruction(autoencoders.ConvTokenizer(FSQ((4, 4)), 3, 32, (1, 2), 1), (3, 8, 8))
    for step in range(101):
        figures_ = objective.watch_codes(torch.tensor([[0, 1, 1, 1]]) if step else torch.arange(16))
    assert figures_["usage"] == 2 / 16
    assert abs(figures_["perplexity"] - math.exp(0.25 * math.log(4) + 0.75 * math.log(4 / 3))) < 1e-4


# -------------------------------------------------------------------------------------------------------------- latents


class Halves(torch.nn.Module):
    """A tokenizer of means of 2 x 2 pixels."""
    codes = None

    def __init__(self, factor=3.0):
        super().__init__()
        self.register_buffer("factor", torch.tensor(factor))
        self.calls = 0

    def encode(self, x):
        self.calls += 1
        return self.factor * F.avg_pool2d(x, 2)

    def decode(self, z):
        return F.interpolate(z / self.factor, scale_factor=2.0)


def pictures(flip=True):
    images = (torch.rand(30, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 255).byte()
    return data.Dataset(images, torch.arange(30) % 3, ["a", "b", "c"], flip=flip)


def test_latents_are_encoded_once_scaled_and_mirrored(tmp_path):
    dataset, tokenizer = pictures(), Halves()
    latents = autoencoders.latents_of(dataset, tokenizer, tmp_path, "some", batch=8)
    calls = tokenizer.calls
    again = autoencoders.latents_of(dataset, tokenizer, tmp_path, "some", latents.scale)
    assert tokenizer.calls == calls == 8 and again.checksum() == latents.checksum()
    rows, flips = torch.tensor([3, 28, 3]), torch.tensor([True, False, False])
    z, y = latents.gather(rows, flips)
    expected = latents.scale * tokenizer.encode(dataset.gather(rows, flips)[0])
    torch.testing.assert_close(z, expected, rtol=2e-3, atol=2e-3)          # kept in half precision
    assert z.shape == (3, 3, 2, 2) and torch.equal(y, dataset.labels[rows]) and latents.shape == (3, 2, 2)
    assert abs(latents.gather(torch.arange(30))[0].std() - 1) < 0.1
    torch.testing.assert_close(autoencoders.Decoder(tokenizer, latents.scale)(expected),
                               tokenizer.decode(expected / latents.scale))
    for other in ((dataset, Halves(2.0)), (pictures(flip=False), tokenizer)):
        autoencoders.latents_of(*other, tmp_path, "some")
    assert len(list(tmp_path.iterdir())) == 3, "another tokenizer or other data are another file"


def test_a_cache_is_whole_or_not_there(tmp_path):
    dataset = pictures()

    class Breaks(Halves):
        def encode(self, x):
            if self.calls == 2:
                raise RuntimeError("no memory left")
            return super().encode(x)

    with pytest.raises(OSError, match="no memory left"):
        autoencoders.latents_of(dataset, Breaks(), tmp_path, "some", batch=8)
    assert list(tmp_path.iterdir()) == []
    autoencoders.latents_of(dataset, Halves(), tmp_path, "some")
    file, = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or cut short.*delete it"):
        autoencoders.latents_of(dataset, Halves(), tmp_path, "some")


# ----------------------------------------------------------------------------------------------- through the front door


BARE = ["--data", "shapes:size=8", "--batch", "8", "--steps", "4", "--log-every", "1", "--sample-every", "0",
        "--sample-n", "4", "--device", "cpu"]
OURS = {"vitok-nano": "vitok-nano:width=24,encoder_depth=1,decoder_depth=1,num_heads=2",
        "fsq-nano": "fsq-nano:levels=(4,4)", "vq-nano": "vq-nano:codebook=16", "lfq-nano": "lfq-nano:bits=4",
        "vqgan": "vqgan:width=32,multipliers=(1,2),blocks=1,codebook=16,dim=8,perceptual=0.0"}


@pytest.mark.parametrize("name", OURS)
def test_a_tokenizer_trains_and_resumes_exactly(here, capsys, name):  # noqa: F811
    argv = [*BARE, "--model", OURS[name]]
    call(train.train, *argv, "--out", "whole")
    call(train.train, *argv, "--out", "parts", "--save-every", "2")
    build.os.replace("parts/ckpt.prev.pt", "parts/ckpt.pt")
    call(train.train, *argv, "--out", "parts")
    assert weights("parts") == weights("whole") and losses("parts") == losses("whole")
    call(sample.sample, "whole", "--n", "2", "--out", "drawn.npz")
    drawn = np.load("drawn.npz")["arr_0"]
    assert drawn.shape == (2, 16, 8, 3), "originals over reconstructions"
    line = Path("whole/metrics.jsonl").read_text().splitlines()[-1]
    assert '"psnr"' in line and ('"usage"' in line) == (name != "vitok-nano")


def test_stage_two_begins_where_stage_one_ended(here):  # noqa: F811
    one = [*BARE, "--model", OURS["vitok-nano"]]
    call(train.train, *one, "--out", "one")
    two = [*BARE, "--model", OURS["vitok-nano"] + ",stage=2,gan_from=0,gan_until=2", "--start-from", "one"]
    call(train.train, *two, "--out", "two")
    first, second = (runs.load_checkpoint(f"{name}/ckpt.pt") for name in ("one", "two"))
    frozen = [name for name in first["ema"] if name.startswith(("network.encoder", "network.tubelet_embed"))]
    assert frozen and all(torch.equal(first["ema"][name], second["model"][name]) for name in frozen)
    assert not torch.equal(first["ema"]["network.code_to_decoder.weight"],
                           second["model"]["network.code_to_decoder.weight"])


def test_a_denoiser_on_latents_draws_images(here, capsys):  # noqa: F811
    call(train.train, *BARE, "--model", OURS["vitok-nano"], "--out", "tok")
    argv = [*BARE, "--model", "dit-nano:depth=1,hidden_size=32,num_heads=2,patch_size=1", "--tokenizer", "tok",
            "--draw", "steps=2"]
    call(train.train, *argv, "--out", "run")
    config = build.open_config("run")
    assert config["in_channels"] == 8 and config["image_size"] == 2 and config["draw"]["clip"] is False
    call(train.train, *argv, "--out", "parts", "--save-every", "2")
    build.os.replace("parts/ckpt.prev.pt", "parts/ckpt.pt")
    call(train.train, *argv, "--out", "parts")
    assert weights("parts") == weights("run")
    call(sample.sample, "run", "--n", "3", "--out", "drawn.npz", "--film", "f.gif")
    assert np.load("drawn.npz")["arr_0"].shape == (3, 8, 8, 3)
    file, = Path("data-latents").iterdir()
    file.write_bytes(file.read_bytes()[:-10])
    for more, message in ((["--overwrite"], "damaged or cut short"),
                          (["--data", "shapes:size=12"], "was trained on images of 3x8x8"),
                          (["--tokenizer", "run"], "is the run of no tokenizer")):
        assert message in refused(capsys, train.train, *argv, *more, "--out", "x")
        assert not Path("x").exists()


@pytest.mark.slow
def test_reconstruct(here, capsys):  # noqa: F811
    call(train.train, *BARE, "--data", "shapes:size=12", "--model", OURS["fsq-nano"], "--out", "tok")
    call(evaluate.evaluate, "reconstruct", "tok", "--n", "50", "--device", "cpu")
    said = capsys.readouterr().out
    assert all(word in said for word in ("psnr", "ssim", "rfid", "usage", "bits a pixel"))
    assert Path("tok/reconstruct.png").exists()


def test_a_published_vqgan_is_a_tokenizer(here, capsys):  # noqa: F811
    """The converted file: read off its shapes, works on [0, 1] inside, refuses sides that it cannot halve."""
    torch.manual_seed(0)
    network = autoencoders.VQGAN(3, 32, (1, 1, 2), 1, 8, 64)
    torch.save(network.state_dict(), "vqgan.bin")
    opened = build.open_tokenizer("vqgan.bin")
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    codes = opened.encode(x)
    assert torch.equal(codes, network.eval().encode((x + 1) / 2)) and codes.shape == (2, 2, 2)
    torch.testing.assert_close(opened.decode(codes), network.decode(codes) * 2 - 1)
    model = ["--model", "maskgit-nano:width=32,depth=1,hidden=64", "--tokenizer", "vqgan.bin"]
    call(train.train, *BARE, *model, "--out", "run")
    assert build.open_config("run")["codes"] == 64
    assert "images of another size" in refused(capsys, train.train, *BARE, *model, "--data", "shapes:size=10", "--out",
                                               "x")
    Path("junk.bin").write_bytes(b"no weights")
    assert "junk.bin" in refused(capsys, train.train, *BARE, *model[:3], "junk.bin", "--out", "x")
