"""Masked generation: what is hidden, that no hidden token leaks, the loops that draw, and what ReCAP may reuse."""

import math
from functools import partial

import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_train import call, here, losses, refused, weights  # noqa: F401 (a fixture among them)

import build
import diffusion
import evaluate
import layers
import masked
import objectives
import runs
import sample
import train

GOLDEN = runs.Path(__file__).parent / "golden"
SMALL = dict(codes=20, length=16, width=32, num_heads=4, dropout=0.0)
CODES = {"maskgit": partial(masked.MaskGIT, num_classes=5, depth=3, hidden=64, null=True, **SMALL),
         "maskgit-r": partial(masked.MaskGITr, num_classes=5, depth=2, **SMALL),
         "mage": partial(masked.MAGE, depth=2, decoder_depth=2, decoder_heads=4, **SMALL)}


def network_of(name, **options):
    """A small network in float64, its embeddings larger than at the start so that tokens matter."""
    torch.manual_seed(0)
    network = CODES[name](**options).double().eval()
    for p in network.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.5 / math.sqrt(p.shape[-1]) * 2)
    return network


def mar_of(**options):
    torch.manual_seed(0)
    network = masked.MAR(**dict(channels=4, num_classes=5, length=16, width=32, depth=2, num_heads=4, buffer=3,
                                head_depth=2, head_width=32, dropout=0.0) | options).double().eval()
    for p in network.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=1 / math.sqrt(p.shape[-1]))
    return network


# ------------------------------------------------------------------------------------------------------- what is hidden


@pytest.mark.parametrize("schedule", ["cosine", "uniform", "log", "exp", "pow2.5", "pow0.5"])
@pytest.mark.parametrize("total, steps", [(16, 7), (64, 8), (64, 64), (5, 1), (3, 9)])
def test_the_number_still_hidden_falls_by_at_least_one(schedule, total, steps):
    left = [total, *masked.hidden_counts(total, steps, schedule)]
    assert left[-1] == 0 and len(left) == 1 + min(steps, total)
    assert all(before > after for before, after in zip(left, left[1:]))
    counts = masked.token_counts(total, steps, schedule)
    assert sum(counts) == total and min(counts) >= 1 and len(counts) == min(steps, total)


def test_a_third_of_cosine_is_counted_in_float64():
    assert masked.still_hidden(1, 3, 256, 200).item() == 128


@pytest.mark.parametrize("ratio", [masked.MAGE_RATIO, masked.MAR_RATIO])
def test_ratios_of_steps_follow_their_distribution(ratio):
    drawn = torch.tensor([ratio.of_step(step) for step in range(4000)]).sort().values.double()
    expected = ratio.quantile((torch.arange(4000) + 0.5) / 4000)
    assert (drawn - expected).abs().max() < 0.02 and drawn[0] >= ratio.low and drawn[-1] <= ratio.high
    assert ratio.of_step(3) == ratio.of_step(3) != ratio.of_step(4)


def test_plan():
    counts = list(range(1, 33))
    for P, u in ((12, 1), (0, 1), (32, 1), (5, 3), (3, 0)):
        groups = masked.plan(32, P, u, counts)
        assert sum(groups, []) == counts and all(len(group) == 1 for group in groups[:P])
        assert len(groups) == P + math.ceil((32 - P) / (1 + u))
    with pytest.raises(ValueError, match="no plan of 4 steps"):
        masked.plan(4, 5, 1, [1] * 4)


# --------------------------------------------------------------------------------------------------------- who predicts


@pytest.mark.parametrize("name", CODES)
def test_permuted_positions_permute_the_logits(name):
    """No order of tokens is built in: with its position's embedding, a token may stand anywhere."""
    network = network_of(name)
    tokens, y = torch.randint(0, 21, (2, 16)), torch.tensor([1, 3])
    before, _ = network(tokens, y)
    order, front = torch.randperm(16), 0 if name == "maskgit-r" else 1
    tables = [network.token_emb.position_embeddings.weight]
    tables += [network.decoder_pos_embed_learned[0]] if name == "mage" else []
    with torch.no_grad():
        for table in tables:
            table[front:front + 16] = table[front:front + 16][order].clone()
    after, _ = network(tokens[:, order], y)
    torch.testing.assert_close(after, before[:, order])
    assert not torch.allclose(before, before[:, order])


@pytest.mark.parametrize("name", CODES)
def test_a_hidden_token_does_not_leak(name):
    """The loss is a function of the hidden tokens as targets alone: equal logits whatever stands under the mask."""
    network, noise = network_of(name), objectives.StepNoise(0, 0, 3)
    masks = network.hide(noise, 0)
    hidden = masks[0] if isinstance(masks, tuple) else masks
    assert hidden.any(1).all() and not hidden.all()
    tokens, y = torch.randint(0, 20, (3, 16)), torch.tensor([0, 1, 2])
    seen = []
    network.mlm_layer.register_forward_hook(lambda m, args, out: seen.append(out))
    network.loss(tokens, y, masks)
    network.loss(torch.where(hidden, (tokens + 7) % 20, tokens), y, masks)
    network.loss(torch.where(hidden, tokens, (tokens + 7) % 20), y, masks)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_mage_encodes_half_and_ties_without_gradient():
    network = network_of("mage")
    hidden, drop = network.hidden_and_dropped(torch.rand(2, 16), 0.8, 0.5)
    assert (drop.sum(1) == 8).all() and (hidden.sum(1) == 13).all() and (drop <= hidden).all()
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    assert network.encode(tokens, drop=drop)[0].shape[1] == 16 + 1 - 8
    network.loss(tokens, None, (hidden, drop)).backward()
    grad = network.token_emb.word_embeddings.weight.grad          # code 0, the fake class and the mask went in
    assert grad[[0, 20, 21]].any(1).all() and not grad[1:20].any()


def test_mar_sees_no_hidden_values_and_learns_from_hidden_ones_alone():
    network, process = mar_of(), diffusion.create_process("flow")
    tokens, hidden, c = torch.randn(2, 16, 4).double(), torch.arange(16).expand(2, -1) % 3 == 0, torch.zeros(2, 32)
    t, eps = torch.rand(2, 2, 16).double(), torch.randn(2, 2, 16, 4).double()
    other = tokens + hidden[..., None] * torch.randn(2, 16, 4)
    z, _ = network(tokens, hidden, c.double())
    torch.testing.assert_close(network(other, hidden, c.double())[0], z)
    target = tokens.clone().requires_grad_()
    network(target, hidden, c.double())
    loss = network.loss(process, target, hidden, c.double(), t, eps)["loss"]
    through_z = torch.autograd.grad(loss, target)[0]              # visible tokens matter through z alone
    with torch.no_grad():
        network.z_proj.weight.zero_()
    target_alone = torch.autograd.grad(network.loss(process, target, hidden, c.double(), t, eps)["loss"], target)[0]
    assert through_z.any(-1).all() and torch.equal(target_alone.any(-1), hidden)


def test_mage_with_half_hidden_encodes_no_mask():
    """What is hidden is then all that is dropped, so the encoder reads visible tokens alone."""
    network = network_of("mage")
    hidden, drop = network.hidden_and_dropped(torch.rand(2, 16), 0.5, 0.5)
    assert torch.equal(hidden, drop)
    tokens = torch.randint(0, 20, (2, 16))
    seen = network.encode(tokens, drop=drop)[0]
    with torch.no_grad():
        network.token_emb.word_embeddings.weight[21] += 1.0          # the mask's
    assert torch.equal(network.encode(tokens, drop=drop)[0], seen)


@pytest.mark.parametrize("buffer", [1, 3])
def test_mar_guided_by_one_is_the_plain_path(buffer):
    """Guidance of 1 with the classless rows below gives what the class alone gives, with any number of buffer tokens;
    at temperature 0 only the start is drawn."""
    objective = masked.Continuous(mar_of(buffer=buffer).float(), diffusion.create_process("flow"), (4, 4, 4),
                                  head_steps=3)
    draw = lambda y, **o: list(objective.trajectory(objectives.ImageNoise(0, [0, 1]), y, steps=4, **o))[-1]
    y = torch.tensor([1, 2])
    plain = draw(y)
    torch.testing.assert_close(draw(y, guidance=1 + 1e-12, guidance_schedule="constant"), plain)
    assert not torch.allclose(draw(y, guidance=3.0, guidance_schedule="constant"), plain)
    assert torch.equal(draw(y, temperature=0.0), draw(y, temperature=0.0))


def test_mar_head_starts_as_zero():
    """So that its first loss is the variance of the noise."""
    head = masked.DiffusionHead(4, 16, 32, 2, 4)
    x, t, z = torch.randn(500, 4), torch.rand(500) * 1000, torch.randn(500, 16)
    assert not head(x, t, z).any()
    parts = diffusion.create_process("linear").loss(head, x, z, t.floor(), torch.randn(500, 4))
    assert abs(parts["mse"].mean() - 1) < 0.15


@pytest.mark.parametrize("name, millions", [("maskgit", 172.46), ("maskgit-r", 193.66), ("mar-b", 207.92),
                                            ("mar-l", 478.33), ("mar-h", 942.40)])
def test_published_sizes(name, millions):
    facts = {"image_size": 16, "in_channels": 16, "num_classes": 1000, "codes": None if "mar" in name else 1024,
             "process": diffusion.create_process("cosine", learned_variance=True)}
    entry = masked.GENERATORS[name]
    wanted = build.inspect.signature(entry).parameters
    options = {} if name != "maskgit" else {"label_drop": 0.0}    # the published one has no null class
    with torch.device("meta"):
        objective = entry(**{key: value for key, value in facts.items() if key in wanted}, **options)
    assert round(objective.cost()[0] / 1e6, 2) == millions


@pytest.mark.parametrize("detach", [True, False])
def test_mage_words_and_the_gradient_of_the_logits(detach):
    """Where no code is seen, only the logits tell the codes' vectors anything: as published, nothing."""
    network = masked.MAGE(12, 4, 16, 1, 2, 16, 1, 2, dropout=0.0, detach=detach, position_std=0.5)
    tokens, hidden = torch.randint(12, (3, 4)), torch.ones(3, 4, dtype=torch.bool)
    network.loss(tokens, None, (hidden, torch.zeros_like(hidden))).backward()
    assert (network.token_emb.word_embeddings.weight.grad[:12] == 0).all() == detach
    assert 0.3 < network.decoder_pos_embed_learned.std() < 0.7


@pytest.mark.parametrize("width, depth, heads, millions", [(768, 12, 12, 144.9), (1024, 24, 16, 407.8)])
def test_published_sizes_of_mage(width, depth, heads, millions):
    with torch.device("meta"):
        network = masked.MAGE(1024, 256, width, depth, heads, width, legacy=True)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


# --------------------------------------------------------------------------------------------------------- what is kept


def gumbels(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *sizes: masked.gumbel(torch.rand(BATCH, *sizes, generator=generator, dtype=torch.float64))


BATCH = 400


def test_known_tokens_stay_and_the_guess_follows_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0], dtype=torch.float64).expand(BATCH, 16, -1)
    tokens = torch.full((BATCH, 16), 4)
    tokens[:, :6] = torch.arange(6) % 4
    steps = list(masked.decode(lambda x, t: logits, tokens, 4, 5, gumbels()))
    assert len(steps) == 5 and all(torch.equal(step.tokens[:, :6], tokens[:, :6]) for step in steps)
    counts = [int(step.hidden[0].sum()) for step in steps]
    assert counts == [10, *masked.hidden_counts(10, 5)[:-1]] and not steps[-1].hidden[:, :6].any()
    share = torch.bincount(steps[0].tokens[:, 6:].flatten(), minlength=4) / (10 * BATCH)
    assert (share - logits[0, 0].softmax(0)).abs().max() < 0.03


def test_choice_from_surest_to_uniform():
    """Without noise the surest of the guesses stay; with very much, any place is as good as another."""
    sure = torch.linspace(0, 6, 16, dtype=torch.float64)
    logits = F.pad(sure[:, None], (0, 3)).expand(BATCH, -1, -1)
    tokens = torch.full((BATCH, 16), 4)
    kept = {}
    for choice in (0.0, 1e6):
        steps = list(masked.decode(lambda x, t: logits, tokens, 4, 2, gumbels(), choice=choice))
        kept[choice] = (~steps[1].hidden).double().mean(0)
    assert kept[0.0][12:].mean() > 0.9 > 0.1 > kept[0.0][:4].mean()
    expected = kept[1e6].mean()
    chi = (BATCH * (kept[1e6] - expected) ** 2 / (expected * (1 - expected))).sum()
    assert chi < 45                                                # 15 degrees of freedom, p = 1e-4


# ------------------------------------------------------------------------------------------------------- what is reused


@pytest.mark.parametrize("n", [1, 5, 16])
@pytest.mark.parametrize("name", CODES)
def test_a_local_pass_over_unchanged_tokens_is_the_full_pass(name, n):
    network, tokens, y = network_of(name), torch.randint(0, 21, (3, 16)), torch.tensor([0, 2, 4])
    logits, memory = network(tokens, y)
    S = torch.rand(3, 16).argsort(1)[:, :n]
    past = masked.outside(memory, S, front=1)
    assert past[0][0].shape[1] == 16 - n
    local, _ = network(masked.take(tokens, S), y, S, past)
    torch.testing.assert_close(local, masked.take(logits, S))
    if n < 16:                                                     # its own stale keys would be seen twice
        twice, _ = network(masked.take(tokens, S), y, S, [(k[:, 1:], v[:, 1:]) for k, v in memory])
        assert not torch.allclose(twice, local)


@pytest.mark.parametrize("n", [1, 5, 16])
@pytest.mark.parametrize("name", CODES)
def test_a_local_pass_costs_its_share_of_the_tokens(name, n):
    """Every product but that with the few class or context tokens is in proportion to the targets."""
    network, tokens, y = network_of(name), torch.randint(0, 21, (1, 16)), torch.tensor([0])
    with layers.Multiplications(real=True) as full:
        _, memory = network(tokens, y)
    S = torch.arange(n)[None]
    with layers.Multiplications(real=True) as local:
        network(masked.take(tokens, S), y, S, masked.outside(memory, S, front=1))
    assert n / 16 <= local.total / full.total <= (n + 1) / 17


@pytest.mark.parametrize("depth", [1, 3])
def test_keys_grow_stale_from_the_second_layer_on(depth):
    network, tokens, y = network_of("maskgit", depth=depth), torch.randint(0, 20, (2, 16)), torch.tensor([0, 2])
    _, memory = network(tokens, y)
    S = torch.rand(2, 16).argsort(1)[:, :5]
    changed = tokens.scatter(1, S, torch.randint(0, 20, (2, 5)))
    local, _ = network(masked.take(changed, S), y, S, masked.outside(memory, S, front=1))
    full = masked.take(network(changed, y)[0], S)
    assert torch.allclose(local, full) == (depth == 1)


@pytest.mark.parametrize("cache_buffer", [False, True])
def test_mar_local_pass_is_the_full_pass(cache_buffer):
    """Also with tokens of S written, where the encoder's stack is one layer deep and the decoder's is empty."""
    network, c = mar_of(), torch.randn(2, 32).double()
    tokens, hidden = torch.randn(2, 16, 4).double(), torch.ones(2, 16, dtype=torch.bool)
    hidden[:, 5:11] = False
    z, (encoder, decoder) = network(tokens, hidden, c)
    S = torch.tensor([[0, 3, 12, 15], [1, 2, 4, 13]])
    front = 0 if cache_buffer else network.buffer
    past = [(k[:, front:], v[:, front:]) for k, v in encoder], masked.outside(decoder, S, network.buffer, cache_buffer)
    if cache_buffer:                                               # no token at all would enter the encoder
        hidden_S = torch.tensor([[False, True, True, True]] * 2)
        whole = hidden.scatter(1, S[:, :1], False)
        one = mar_of(depth=1, decoder_depth=1)
        _, (encoder, decoder) = one(tokens, hidden, c)
        past = encoder, masked.outside(decoder, S, one.buffer, True)
        local, _ = one(masked.take(tokens, S), hidden_S, c, S, past, buffer=False)
        x_full, _ = one.encode(tokens, whole, c)
        x_local, _ = one.encode(masked.take(tokens, S), hidden_S, c, S, encoder, buffer=False)
        torch.testing.assert_close(x_local[0, 0], x_full[0, one.buffer])
        assert local.shape == (2, 4, 32)
    else:
        local, _ = network(masked.take(tokens, S), masked.take(hidden, S), c, S, past)
        torch.testing.assert_close(local, masked.take(z, S))


class Tally:
    """Counts the full and local passes of a network."""

    def __init__(self, network, positions):
        self.full = self.local = 0

        def see(module, args, kwargs):
            local = len(args) > positions and args[positions] is not None
            self.local, self.full = self.local + local, self.full + (not local)

        network.register_forward_pre_hook(see, with_kwargs=True)


@pytest.mark.parametrize("name", [*CODES, "mar"])
def test_reuse_makes_the_calls_that_the_plan_says_and_writes_each_place_once(name):
    process = diffusion.create_process("flow")
    torch.manual_seed(0)
    if name == "mar":
        network = mar_of().float()
        objective = masked.Continuous(network, process, (4, 4, 4), head_steps=2)
    else:
        network = network_of(name).float()
        objective = masked.Codes(network, (4, 4), schedule="pow2.5")
    y = None if name == "mage" else torch.tensor([1, 2])
    tally = Tally(network, 3 if name == "mar" else 2)

    def draw(**options):
        tally.full = tally.local = 0
        *_, x = objective.trajectory(objectives.ImageNoise(0, [0, 1]), y, steps=8, **options)
        return x, (tally.full, tally.local)

    guidance = {} if name == "mage" else {"guidance": 2.0, "guidance_schedule": "constant"}
    whole, calls = draw(recap="u=0,full=0", **guidance)
    assert calls == (8, 0) and torch.equal(draw(recap="u=1,full=8", **guidance)[0], whole)
    reused, calls = draw(recap="u=1,full=2", **guidance)
    assert calls == (2 + 3, 3) and not torch.equal(reused, whole) and reused.shape == whole.shape
    assert draw(recap="u=3,full=0", **guidance)[1] == (2, 6)
    if name == "mar":                                              # with constant guidance nothing but reuse differs
        torch.testing.assert_close(draw(**guidance)[0], whole)
        assert torch.equal(draw(temperature=0.0)[0], draw(temperature=0.0)[0])
    else:
        assert (reused < 20).all() and (reused >= 0).all()


# ----------------------------------------------------------------------------------------------- through the front door

TOKENIZER = ["--model", "fsq-nano:levels=(4,4,4),width=32", "--data", "shapes:size=8", "--batch", "8", "--steps", "3",
             "--log-every", "1", "--sample-every", "0", "--sample-n", "4", "--device", "cpu"]
OURS = {"maskgit-nano": ["--model", "maskgit-nano:width=32,depth=2", "--tokenizer", "tok"],
        "maskgit-r-nano": ["--model", "maskgit-r-nano:width=32,depth=2", "--tokenizer", "tok"],
        "mage-nano": ["--model", "mage-nano:width=32,depth=1,decoder_depth=1", "--tokenizer", "tok"],
        "mar-nano": ["--model", "mar-nano:width=32,depth=1,head_width=32,patch_size=2,head_steps=2"]}


@pytest.mark.parametrize("name", OURS)
def test_training_resumes_exactly_draws_and_fills(here, capsys, name):  # noqa: F811
    argv = [*TOKENIZER[2:], *OURS[name], "--draw", "steps=3"]
    if "--tokenizer" in argv:
        call(train.train, *TOKENIZER, "--out", "tok")
    call(train.train, *argv, "--out", "whole")
    call(train.train, *argv, "--out", "halves", "--accum", "2")
    for a, b in zip(losses("whole"), losses("halves")):
        assert abs(a - b) < 1e-4, "two micro-batches are one batch"
    call(train.train, *argv, "--out", "parts", "--save-every", "1")
    build.os.replace("parts/ckpt.prev.pt", "parts/ckpt.pt")
    call(train.train, *argv, "--out", "parts")
    assert weights("parts") == weights("whole")
    call(sample.sample, "whole", "--n", "3", "--batch", "2", "--out", "two.npz", "--film", "f.gif")
    call(sample.sample, "whole", "--n", "3", "--recap", "u=1,full=1", "--out", "reuse.npz")
    image = np.full((8, 8, 3), 200, np.uint8)
    hole = np.zeros((8, 8), np.uint8)
    hole[2:6, 2:6] = 255
    Image.fromarray(image).save("image.png")
    Image.fromarray(hole).save("hole.png")
    Image.fromarray(0 * hole).save("none.png")
    Image.fromarray(image[:4]).save("small.png")
    call(sample.sample, "whole", "--n", "2", "--inpaint", "image.png", "--mask", "hole.png", "--out", "filled.npz")
    filled = np.load("filled.npz")["arr_0"]
    assert (filled[:, hole == 0] == 200).all() and (filled[:, hole > 0] != 200).any()
    for picture, mask, message in (("image.png", "none.png", "the mask has no hole"),
                                   ("small.png", "hole.png", "small.png is 4 pixels high"),
                                   ("hole.txt", "hole.png", "cannot be read as a picture")):
        assert message in refused(capsys, sample.sample, "whole", "--inpaint", picture, "--mask", mask)
    assert "recap 'u=x'" in refused(capsys, sample.sample, "whole", "--recap", "u=x")


def test_what_does_not_go_together_is_refused(here, capsys):  # noqa: F811
    call(train.train, *TOKENIZER, "--out", "tok")
    tail = TOKENIZER[2:]
    for argv, message in (
            (["--model", "maskgit-nano"], "maskgit draws codes: train a tokenizer first"),
            (["--model", "dit-nano", "--tokenizer", "tok"], "makes codes: choose one of"),
            (["--model", "mar-nano", "--tokenizer", "tok"], "MAR draws continuous tokens"),
            (["--model", "maskgit-nano", "--tokenizer", "tok", "--data", "shapes:size=16"], "was trained on images of"),
            (["--model", "maskgit-nano", "--tokenizer", "nowhere"], "nowhere holds no run")):
        assert message.lower() in refused(capsys, train.train, *tail, *argv, "--out", "x").lower()
        assert not runs.Path("x").exists()


@pytest.mark.slow
def test_measuring(here, capsys, monkeypatch):  # noqa: F811
    """probe and reuse run and print what they should."""
    call(train.train, *TOKENIZER, "--out", "tok")
    call(train.train, *TOKENIZER[2:], *OURS["mage-nano"], "--out", "mage")
    call(evaluate.evaluate, "probe", "mage", "--steps", "20", "--device", "cpu")
    assert "linear probe on 32 features" in capsys.readouterr().out
    call(evaluate.evaluate, "reuse", "mage", "--T", "6", "--reuse", "u=1,full=2", "--n", "8", "--seeds", "1",
         "--device", "cpu")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "full" in line][-1]
    assert rows[2:4] == ["4", "2"] and 0 < float(rows[4])


@pytest.mark.parametrize("arch", ["maskgit", "maskgit-r", "mage", "mar"])
def test_published_files_open_and_draw(here, arch):  # noqa: F811
    """A file in the published layout, tiny: its sizes are read off it, and sample.py draws."""
    case = {"maskgit": "maskgit-decode", "maskgit-r": "recap-maskgit-full", "mage": "mage-decode",
            "mar": "mar-sample"}[arch]
    state = golden.load(GOLDEN / f"{case}.npz").state_dict
    if arch == "maskgit":                                          # of a thousand classes, as all published ones are
        shapes = {"Embed_0.word_embeddings.weight": (24 + 1001, 32), "MlmLayer_0.mlm_bias.bias": (24 + 1001,)}
        state |= {name: torch.from_numpy(golden.fill(name, shape)) for name, shape in shapes.items()}
    torch.save({"model": state}, "file.pt")
    more = ["--head-steps", "3"] if arch == "mar" else []
    call(sample.sample, "--official", arch, "--checkpoint", "file.pt", "--n", "2", "--steps", "4", *more, "--out",
         "drawn.png")
    latents = np.load("drawn.latents.npz")["arr_0"]
    assert latents.shape == ((2, 4, 4, 4) if arch == "mar" else (2, 4, 4)) and runs.Path("drawn.png").exists()
