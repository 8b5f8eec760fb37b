"""Mixtures of experts: both dispatches, the balance loss, experts in any backbone, upcycling, the analysis."""

import statistics
import time

import pytest
import torch
import torch.nn.functional as F

import moe
import objectives
from diffusion import create_process
from models import DiTMoE, cost, create_model


def layer(E=5, K=2, D=8, H=12, shared=6, seed=0, **options):
    torch.manual_seed(seed)
    return moe.MoE(D, H, E, K, shared, **options).double()


def tokens(T, D=8, seed=1):
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("T, E, K, allowed", [(1, 5, 2, 5), (7, 5, 2, 5), (40, 6, 6, 6), (9, 1, 1, 1), (30, 8, 2, 3)])
def test_both_dispatches_agree(T, E, K, allowed):
    """Values and all gradients, with one token, one expert, K = E, and experts that no token chooses (all but
    `allowed`)."""
    m, x, results = layer(E, K), tokens(T), []
    index = torch.stack([torch.randperm(allowed)[:K] for _ in range(T)])
    weight = torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    g = torch.randn(T, 8, dtype=torch.float64)
    for dispatch in (moe.loop, moe.grouped):
        y = dispatch(x, index, weight, m.gate, m.up, m.down)
        results.append([y, *torch.autograd.grad((y * g).sum(), [x, weight, m.gate, m.up, m.down])])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert not results[0][3][allowed:].any(), "experts without tokens have no gradient"
    ends = index.flatten().bincount(minlength=E).cumsum(0)
    rows = [v.float() for v in (x[torch.arange(T * K) % T], m.gate, m.up, m.down)]
    rows.insert(1, ends)                                  # the GPU's products, which torch also knows on CPUs
    theirs, ours = moe.products(*rows), moe.slices(*rows)
    assert (theirs - ours).norm() < 1e-4 * ours.norm()


def test_a_layer_is_its_formula():
    """Each token's sum over its K most probable experts, p not renormalised, plus the shared experts; in both modes."""
    m, x = layer(), tokens(12)
    p = (x @ m.router.weight.T).softmax(-1)
    combine = torch.where(p >= p.sort(1, descending=True)[0][:, 1:2], p, 0.0)             # (T, E)
    each = torch.stack([(F.silu(x @ g.T) * (x @ u.T)) @ d.T for g, u, d in zip(m.gate, m.up, m.down)], 1)
    expected = (combine[..., None] * each).sum(1) + m.shared(x)
    for mode in (True, False):
        torch.testing.assert_close(m.train(mode)(x[None])[0], expected, rtol=1e-10, atol=1e-10)
    order = torch.randperm(5)                                         # relabelled experts are the same layer
    y = m(x)
    for stack in (m.router.weight, m.gate, m.up, m.down):
        stack.data = stack.data[order]
    torch.testing.assert_close(m(x), y, rtol=1e-10, atol=1e-10)
    m.router.renormalise = True
    torch.testing.assert_close(m.router(x)[0].sum(1), torch.ones(12, dtype=torch.float64))


def test_balance_loss():
    """1 for a router that knows nothing, E/K if all tokens choose alike, and the gradient formula of the logits."""
    T, E, K = 30, 6, 2
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    p = logits.softmax(-1)
    index = p.topk(K).indices
    loss, load = moe.balance_loss(p, index)
    f = F.one_hot(index, E).sum((0, 1)).double() * E / (K * T)
    torch.testing.assert_close(load, f)
    gradient, = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, p / T * (f - (f * p).sum(1, keepdim=True)), rtol=1e-10, atol=1e-14)
    assert moe.balance_loss(torch.full((T, E), 1 / E), index)[0].item() == pytest.approx(1)
    alike = torch.zeros(T, E).index_fill(1, torch.tensor([1, 4]), 0.5)
    assert moe.balance_loss(alike, torch.tensor([[1, 4]]).expand(T, K))[0].item() == pytest.approx(E / K)


def test_training_adds_the_balance_loss_and_evaluation_does_not():
    """The gradient is the task's plus the model's weight times the layers' losses'; half the task is not half of both.
    In evaluation mode routed experts have gradients all the same. float64: a sum of gradients is linear there."""
    torch.manual_seed(0)
    model = create_model("dit-moe-nano", 8, hidden_size=24, num_heads=2, depth=2).double()
    for p in model.parameters():
        p.data.normal_(std=0.3) if p.requires_grad else None
    objective = objectives.Diffusion(model, create_process("flow"), (3, 8, 8), 10)
    batch = {"x": torch.randn(4, 3, 8, 8).double(), "y": torch.arange(4)}
    weights = [p for p in model.parameters() if p.requires_grad]

    def gradients(balance):
        model.balance = balance
        losses = objective.loss(batch | {"noise": objectives.StepNoise(0, 0, 4)})
        return torch.cat([g.flatten() for g in torch.autograd.grad(losses["loss"], weights)]), losses

    task, _ = gradients(0.0)
    half, losses = gradients(0.5)
    whole, _ = gradients(1.0)
    assert (whole + task - 2 * half).norm() < 1e-9 * (whole - task).norm()
    assert losses["loss"].item() == pytest.approx(losses["mse"].item() + 0.5 * 2 * losses["balance"].item(), rel=1e-9)
    assert losses["balance"] >= 1 - 1e-3 and losses["load_cv"] > 0
    objective.eval()
    plain, losses = gradients(0.5)
    assert "balance" not in losses and plain.norm() > 0
    losses = objective.loss(batch | {"noise": objectives.StepNoise(0, 0, 4)})
    assert torch.autograd.grad(losses["loss"], model.blocks[0].mlp.gate)[0].abs().sum() > 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_layer_is_the_layer(backend):
    """In values and gradients, whatever the routing; the dispatch is left to Python, so no batch compiles anything
    again."""
    torch._dynamo.reset()
    m = layer().train()
    compiled, graphs = torch.compile(m, backend=backend), []
    for seed in range(4):
        x = tokens(20, seed=seed)
        torch.testing.assert_close(compiled(x), m(x), rtol=1e-10, atol=1e-10)
        compiled(x)
        losses, _ = moe.balance_losses(m)
        assert torch.autograd.grad(losses.sum(), m.router.weight)[0].abs().sum() > 0
        gradients = [torch.autograd.grad(f(x).square().sum(), [x, m.gate, m.router.weight]) for f in (compiled, m)]
        for ours, theirs in zip(*gradients):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_twenty_runs_have_the_same_bits(device):
    """Values and all gradients of the fast dispatch, whose rows are gathered, never added in an order left open."""
    torch.manual_seed(0)
    m, x = moe.MoE(32, 64, 8, 3).to(device), torch.randn(300, 32, device=device, requires_grad=True)
    first = None
    for _ in range(20):
        with torch.autocast(device, torch.bfloat16):
            y = m(x)
        bits = [y, *torch.autograd.grad(y.float().square().sum(), [x, *m.parameters()])]
        first = first or bits
        assert all(torch.equal(a, b) for a, b in zip(bits, first))
    nodes, found = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        found.add(node.name())
        nodes += [n for n, _ in node.next_functions if n is not None]
    assert not {name for name in found if name.startswith(("IndexSelect", "IndexAdd", "ScatterAdd"))}, "adds at random"


@pytest.mark.gpu
@pytest.mark.parametrize("E", [8, 64])
def test_on_a_gpu_nothing_waits(E):
    """The fast dispatch in bf16 agrees with the loop, and asks the host for nothing."""
    torch.manual_seed(0)
    m, x = moe.MoE(64, 128, E, 2).cuda(), torch.randn(512, 64, device="cuda", requires_grad=True)
    results = []
    for m.dispatch in (moe.loop, moe.grouped):
        with torch.autocast("cuda", torch.bfloat16):
            m(x).sum()                                                # the first call of a kernel may wait
            torch.cuda.set_sync_debug_mode("error" if m.dispatch is moe.grouped else "default")
            y = m(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, m.gate, m.down])])
            torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(*results):
        assert (a - b).norm() / b.norm() < 0.02


# ------------------------------------------------------------------------------------------------------------ backbones


def test_experts_in_other_backbones():
    model = moe.add_experts(create_model("dit-nano"), 4, 2, blocks=(3, 5))
    assert [isinstance(block.mlp, moe.MoE) for block in model.blocks] == [False, False, False, True, False, True]
    D = 128
    experts = model.blocks[3].mlp
    assert experts.gate.shape == (4, 4 * D, D) and experts.shared.gate.weight.shape == (2 * D, D)
    assert moe.activated_parameters(model) == sum(p.numel() for p in model.parameters()) - 2 * 2 * 12 * D * D
    half = DiTMoE(16, 4, 3, 32, 4, 2, num_experts=4, moe_blocks=(2, 3))
    assert sum(isinstance(m, moe.MoE) for m in half.modules()) == 2
    with pytest.raises(ValueError, match="has experts already"):
        moe.add_experts(half, 4, 2)
    with pytest.raises(ValueError, match="not all among 0 to 5"):
        moe.add_experts(create_model("dit-nano"), 4, 2, blocks=(6,))
    with pytest.raises(ValueError, match="UNet has 0 of them"):
        moe.add_experts(create_model("unet-pico"), 4, 2)
    with pytest.raises(ValueError, match="cannot take 3 of 2 experts"):
        moe.add_experts(create_model("dit-nano"), 2, 3)


def test_upcycling():
    """Renormalised weights keep the dense model's function; as published the routed branch shrinks to about K/E."""
    torch.manual_seed(0)
    size = dict(image_size=8, hidden_size=24, num_heads=2, depth=2)
    dense = create_model("dit-moe-nano", **size, num_experts=1, top_k=1).double().eval()
    for p in dense.parameters():
        p.data.normal_(std=0.3) if p.requires_grad else None
    x, t, y = torch.randn(2, 3, 8, 8).double(), torch.tensor([10.0, 600.0]).double(), torch.tensor([1, 10])
    same, published = (create_model("dit-moe-nano", **size, renormalise=r).double().eval() for r in (True, False))
    for model in (same, published):
        moe.upcycle(model, dense.state_dict())
    torch.testing.assert_close(same(x, t, y), dense(x, t, y), rtol=1e-9, atol=1e-9)
    assert (published(x, t, y) - dense(x, t, y)).norm() > 0.05 * dense(x, t, y).norm()
    with pytest.raises(ValueError, match="cannot be upcycled.*num_experts=1"):
        moe.upcycle(same, create_model("dit-nano", 8).state_dict())


def test_counts_agree():
    """Sums over classes, positions and steps are the same; calls with the null label do not count."""
    torch.manual_seed(0)
    model = create_model("dit-moe-nano", 8, hidden_size=24, num_heads=2, depth=2)
    objective = objectives.Diffusion(model, create_process("flow"), (3, 8, 8), 10).eval()
    with moe.Counter(model, 10, 4) as counter:
        y = torch.tensor([0, 3, 3])
        walk = objective.trajectory(objectives.ImageNoise(0, range(3)), y, sampler="ddpm", steps=4, guidance=2.0)
        for counter.step, _ in enumerate(walk, start=1):
            pass
    sums = counter.classes.sum(0), counter.positions.sum(1), counter.steps.sum(1)
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])
    assert sums[0].sum(1).tolist() == [3 * 4 * 4 * 2] * 2, "images x steps x tokens x K"
    assert counter.classes.sum((1, 2)).tolist() == [64, 0, 0, 128, *[0] * 6]
    assert (counter.steps.sum(2) == 3 * 4 * 2).all()
    with pytest.raises(ValueError, match="no experts"):
        moe.Counter(create_model("dit-nano"), 10, 4)


# ---------------------------------------------------------------------------------------------------------------- speed


def race(calls, rounds):
    """Seconds of each call, interleaved: the medians after one round of warming up."""
    times = {name: [] for name in calls}
    for k in range(rounds + 1):
        for name, call in calls.items():
            clock = time.perf_counter()
            call()
            times[name] += [time.perf_counter() - clock] if k else []
    return {name: statistics.median(t) for name, t in times.items()}


@pytest.mark.slow
def test_dispatch_speed():
    """python -m pytest -m slow -k dispatch_speed -s"""
    print()
    for T, E in ((2048, 8), (2048, 16), (2048, 64), (256, 64)):
        m, x = moe.MoE(384, 1536, E, 2), torch.randn(T, 384, requires_grad=True)

        def step(dispatch, m=m, x=x):
            m.dispatch = dispatch
            m(x).sum().backward()

        t = race({"loop": lambda: step(moe.loop), "grouped": lambda: step(moe.grouped)}, 5)
        print(f"{T} tokens, {E} experts: loop {t['loop']:.3f} s, grouped {t['grouped']:.3f} s, "
              f"{t['loop'] / t['grouped']:.2f} times as fast")
        assert t["grouped"] < 1.5 * t["loop"], "the grouped products cost far more than the loop that they replace"


@pytest.mark.slow
def test_training_step_speed():
    """DiT-MoE-S/2-8E2A's training step over that of a dense DiT whose MLP has the multiply-accumulates that a token
    meets: 2 experts of 12 D^2 and the shared one of 6 D^2 are a hidden width of 15 D.
    python -m pytest -m slow -k training_step_speed -s"""
    options = dict(image_size=32, in_channels=4, num_classes=1000)
    models = {"dit-moe-s/2-8e2a": create_model("dit-moe-s/2-8e2a", **options),
              "dense": create_model("dit-s/2", **options, mlp_ratio=15)}
    macs = {name: cost(model, (4, 32, 32))[1] for name, model in models.items()}
    assert macs["dit-moe-s/2-8e2a"] == pytest.approx(macs["dense"], rel=0.01)
    x, y = torch.randn(8, 4, 32, 32), torch.arange(8)
    calls = {}
    for name, model in models.items():
        objective = objectives.Diffusion(model, create_process("linear"), (4, 32, 32), 1000)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)

        def step(objective=objective, optimiser=optimiser):
            objective.loss({"x": x, "y": y, "noise": objectives.StepNoise(0, 0, 8)})["loss"].backward()
            optimiser.step()
            optimiser.zero_grad()

        calls[name] = step
    t = race(calls, 3)
    print(f"\nbatch 8: {', '.join(f'{name} {s:.2f} s' for name, s in t.items())}, "
          f"ratio {t['dit-moe-s/2-8e2a'] / t['dense']:.3f}")
