"""A2-RL: the environment, the ranker, the agent's bookkeeping, scenes with a known answer, files; and the way from
train.py to cropped pictures."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import call, here, losses, refused, weights  # noqa: F401 (a fixture among them)
from torch import nn

import build
import cropping as c
import evaluate
import sample
import train
from objectives import StepNoise


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def fresh(n):
    return torch.zeros(n, dtype=torch.bool)


def walk(n, steps, generator):
    """Random moves, "stop" left out, as (box before, done before, action, box, done)."""
    box, done = c.whole(n), fresh(n)
    for _ in range(steps):
        action = torch.randint(0, c.STOP, (n,), generator=generator)
        after, ended = c.act(box, done, action)
        yield box, done, action, after, ended
        box, done = after, ended


# ---- boxes and moves -------------------------------------------------------------------------------------------------


def test_moves():
    """The change, then clipping; a box stays one inside the image; a done box never changes again."""
    for before, was, action, box, done in walk(500, 60, torch.Generator().manual_seed(0)):
        changed = (before + torch.tensor([c.MOVES[list(c.MOVES)[k]] for k in action.tolist()])).clamp(0, c.GRID)
        assert torch.equal(box[~was], changed[~was]) and torch.equal(box[was], before[was]) and done[was].all()
        assert (box >= 0).all() and (box <= c.GRID).all() and (box[:, 2:] > box[:, :2]).all()
        small = ((box[:, 2:] - box[:, :2]) <= 4).any(1)
        assert torch.equal(done, was | small)
    stopped = c.act(c.whole(1), fresh(1), torch.tensor([c.STOP]))
    assert torch.equal(stopped[0], c.whole(1)) and stopped[1].all()


@pytest.mark.parametrize("there, back", [("move right", "move left"), ("move up", "move down"),
                                         ("flatten", "grow in height"), ("narrow", "grow in width")])
def test_moves_that_undo_each_other(there, back):
    names = list(c.MOVES)
    box = torch.tensor([[5, 6, 15, 14]])
    both = box
    for name in (there, back):
        both, done = c.act(both, fresh(1), torch.tensor([names.index(name)]))
    assert torch.equal(both, box) and not done
    edge = torch.tensor([[10, 0, 20, 10]])
    narrower = c.act(edge, fresh(1), torch.tensor([names.index("move right")]))[0]
    assert narrower.tolist() == [[11, 0, 20, 10]], "at the border a move shrinks the window"
    assert torch.equal(c.CHANGES[0], c.CHANGES[9] + c.CHANGES[10]), "shrink is flatten and narrow"


@pytest.mark.parametrize("height, width", [(20, 20), (37, 501), (1000, 23)])
def test_pixel_boxes(height, width):
    assert c.pixels(c.whole(1), height, width).tolist() == [[0, 0, width, height]]
    assert c.pixels(torch.tensor([[7, 0, 20, 7]]), 180, 180).tolist() == [[62, 0, 180, 62]], "rounded as published"
    boxes = c.pixels(c.all_windows(100, 100), height, width)
    assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
    assert (boxes <= torch.tensor([width, height, width, height])).all()


def test_windows_of_several_images():
    """K windows of B images at once are each one alone; at its own size a window is a copy; dense averages."""
    x = torch.rand(2, 3, 30, 40, dtype=torch.float64)
    boxes = torch.tensor([[[0, 0, 40, 30], [5, 6, 17, 18]], [[2, 2, 9, 30], [10, 10, 22, 22]]])
    crops = c.crop_resize(x, boxes, 12)
    for i in range(2):
        for k in range(2):
            alone = c.crop_resize(x[i:i + 1], boxes[i:i + 1, k:k + 1], 12)[0, 0]
            torch.testing.assert_close(crops[i, k], alone)
    torch.testing.assert_close(crops[0, 1], x[0, :, 6:18, 5:17])
    torch.testing.assert_close(c.crop_resize(x[:1, :, :24, :24], torch.tensor([[[0, 0, 24, 24]]]), 12, dense=2)[0, 0],
                               nn.functional.avg_pool2d(x[0, :, :24, :24], 2))
    zero = c.crop_resize(torch.ones(1, 1, 8, 8), torch.tensor([[[0, 0, 4, 4]]]), 16, border="zero")[0, 0, 0]
    assert zero[8, 8] == 1 and zero[0, 8] == pytest.approx(0.625) and zero[0, 0] == pytest.approx(0.625**2)


# ---- ranker ----------------------------------------------------------------------------------------------------------


def test_published_sizes():
    with torch.device("meta"):
        net, agent, spp = c.VFN(), c.Agent(), c.VFN(spp=True)
    trunk = sum(p.numel() for name, p in net.named_parameters() if name.startswith("conv"))
    assert (trunk, net.fc6.in_features, spp.fc6.in_features) == (2_334_080, 9216, 12544)
    assert sum(p.numel() for name, p in agent.named_parameters() if not name.startswith("critic")) == 12_559_374


def test_response_normalisation():
    """x / (1 + 2e-5 * the sum of squares over 5 channels)^0.75, TensorFlow's alpha, by brute force."""
    x = 100 * torch.randn(2, 9, 3, 3, dtype=torch.float64)
    sums = torch.stack([(x[:, max(0, k - 2):k + 3]**2).sum(1) for k in range(9)], 1)
    torch.testing.assert_close(c.VFN((8, 16, 8, 8, 8), 4, 67).lrn(x), x / (1 + 2e-5 * sums)**0.75)


@pytest.mark.parametrize("side, kernel, stride", [(227, 11, 4), (224, 11, 4), (13, 3, 1), (8, 5, 1), (10, 3, 2)])
def test_same_padding(side, kernel, stride):
    padded = c.same_padded(torch.ones(1, 1, side, side), kernel, stride)[0, 0]
    assert (padded.shape[0] - kernel) // stride + 1 == -(-side // stride)
    before = padded[:, padded.shape[1] // 2].argmax().item()
    assert before == (padded.shape[0] - side) // 2, "the odd zero comes last"


def test_ranking_losses():
    crop, photo = torch.randn(6), torch.randn(6)
    order = torch.randperm(6)
    torch.testing.assert_close(c.hinge(crop[order], photo[order]), c.hinge(crop, photo))
    assert c.hinge(crop, crop + 1.001) == 0 and c.hinge(crop, crop + 0.9) > 0.09
    torch.testing.assert_close(c.ranknet(crop, photo), -torch.log(torch.sigmoid(photo - crop)).mean())


def test_ranker_learns_and_crops_fit():
    """A few steps on scenes rank most of the small crops below their photographs; random crops have their areas."""
    boxes = c.random_boxes(torch.rand(2000, 4), 0.05, 0.9, 100, 200)
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = w * h / 20000, (w / 200) / (h / 100)
    assert 0.0499 < area.min() < 0.06 and 0.8 < area.max() < 0.9001
    assert 0.49 < ratio.min() < 0.55 and 1.8 < ratio.max() < 2.01
    assert (boxes >= -1e-4).all() and (boxes[:, 2] < 200.01).all() and (boxes[:, 3] < 100.01).all()
    ranking = c.vfn_nano(64, 3, width=8, embedding=16, pairs=2)
    x = torch.stack([c.scene(k, 64)[0] for k in range(48)]).float() / 127.5 - 1
    optimiser = torch.optim.Adam(ranking.parameters(), 3e-3)
    for step in range(80):
        told = ranking.loss({"x": x[:16], "y": None, "step": step, "noise": StepNoise(0, step, 16)})
        optimiser.zero_grad()
        told["loss"].backward()
        optimiser.step()
    small = c.random_boxes(torch.rand(32, 4, 4), 0.05, 0.1, 64, 64)
    with torch.no_grad():
        whole = ranking.look_at(x[16:])(c.whole(32)[:, None])[1]
        assert (ranking.look(x[16:], small)[1] < whole).float().mean() > 0.8


def test_windows_beyond_a_photograph():
    """Within surroundings that are 1/0.7 to 1/0.35 times as wide and high, all of one of them at most; the pixels
    beyond the photograph are those of its edge."""
    u = torch.rand(4000, 8)
    x0, y0, x1, y1 = c.around(u, 0.05, 50, 100).unbind(-1)
    w, h = 100 / (0.35 + 0.35 * u[:, 4]), 50 / (0.35 + 0.35 * u[:, 5])
    area = (x1 - x0) * (y1 - y0) / (w * h)
    assert 0.049 < area.min() < 0.06 and 0.95 < area.max() < 1.001
    assert ((x0 >= 99.9 - w) & (x1 <= w + 0.1) & (y0 >= 49.9 - h) & (y1 <= h + 0.1)).all()
    assert ((x0 < 0) & (x1 > 100)).any() and ((x1 < 0) | (x0 > 100)).any()
    image = torch.rand(1, 3, 8, 8)
    outside = c.crop_resize(image, torch.tensor([[[-8.0, 0.0, 0.0, 8.0]]]), 8)[0, 0]
    torch.testing.assert_close(outside, image[0, :, :, :1].expand(-1, -1, 8))


# ---- rewards ---------------------------------------------------------------------------------------------------------


def test_reward_sees_order_alone():
    """Any increasing transform of the scorer gives the same reward; odd shapes cost 5, unless aspect is left out."""
    before, after = torch.randn(2, 50)
    boxes = torch.tensor([[0, 0, 10, 10]]).repeat(50, 1)
    for reward in (c.paper_reward, lambda *args: c.code_reward(*args, done=fresh(50))):
        torch.testing.assert_close(reward(before, after, boxes, 3), reward(before.exp(), after.exp(), boxes, 3))
    shapes = torch.tensor([[0, 0, 20, 10], [0, 0, 21, 10], [0, 0, 5, 10], [0, 0, 4, 10]])
    one = torch.ones(4)
    assert c.paper_reward(0 * one, one, shapes, 0).tolist() == pytest.approx([0.999, -4.001, 0.999, -4.001])
    assert c.paper_reward(0 * one, one, shapes, 0, aspect=False).tolist() == pytest.approx([0.999] * 4)


def test_gains_add_up_to_that_of_the_last_window():
    """But for 0.001 (t + 1) a move and 2 for an odd shape, whatever the way."""
    scores, square, strip = torch.randn(7).double(), torch.tensor([[0, 0, 9, 9]]), torch.tensor([[0, 0, 9, 2]])
    earned = sum(c.gain_reward(scores[t:t + 1], scores[t + 1:t + 2], strip if t == 2 else square, t) for t in range(6))
    assert earned.item() == pytest.approx((scores[6] - scores[0]).item() - 0.021 - 2)


# ---- agent -----------------------------------------------------------------------------------------------------------


def to_hidden_box(hidden):
    """The toy: a window's feature is how far its edges lie from the hidden box's (n, 4), its score their IoU."""
    def look(boxes):
        known = hidden[:, None].expand(-1, boxes.shape[1], -1)
        return (known - boxes).float() / 5, c.iou(boxes, known).float()
    return look


def hidden_boxes(u):
    """Boxes (n, 4) of uniform numbers (n, 4), sides of 8 to 16, so that the ratio is never odd."""
    sides = 8 + (9 * u[:, :2]).long()
    corner = ((c.GRID + 1 - sides) * u[:, 2:]).long()
    return torch.cat([corner, corner + sides], 1)


@pytest.mark.parametrize("form", ["paper", "code"])
def test_episodes(form):
    """The rewards of an episode by hand; nothing after its end; a batch is its images; the code's last reward."""
    agent, hidden, u = c.Agent(8, 8), hidden_boxes(torch.rand(6, 4)), torch.rand(6, 12)
    nn.init.normal_(agent.action_fc.weight, std=3)
    e = c.episodes(agent, to_hidden_box(hidden), 6, (100, 100), 12, u, form)
    for i in range(6):
        alone = c.episodes(agent, to_hidden_box(hidden[i:i + 1]), 1, (100, 100), 12, u[i:i + 1], form)
        n = int(e.mask[:, i].sum())
        assert len(alone.actions) == n and torch.equal(alone.actions[:, 0], e.actions[:n, i])
        torch.testing.assert_close(alone.rewards[:, 0], e.rewards[:n, i])
        torch.testing.assert_close(alone.last[0], e.last[i])
        box, done, score = c.whole(1), fresh(1), c.iou(c.whole(1), hidden[i:i + 1])
        for t in range(n):
            box, done = c.act(box, done, e.actions[t, i:i + 1])
            assert torch.equal(box[0], e.boxes[t, i])
            new, shape = c.iou(box, hidden[i:i + 1]), c.pixels(box, 100, 100)
            expected = (c.paper_reward(score, new, shape, t) if form == "paper" else
                        c.code_reward(score, new, shape, t, done))
            if form == "code" and t == 11 and not done:              # the critic's value in place of the last reward
                expected = agent(e.observations[t, i:i + 1], (e.hs[t, i:i + 1], e.cs[t, i:i + 1]))[1]
            assert e.rewards[t, i].item() == pytest.approx(expected.item(), abs=1e-5)
            score = new
        assert bool(done) == (n < 12 or bool(done)) and not e.rewards[n:, i].any()
        assert (e.last[i] == 0) == bool(done), "only an unfinished episode expects more"


def test_chosen_actions():
    """They have the policy's probabilities; without numbers, the likeliest."""
    logits = torch.tensor([[0.0, 1.0, -2.0]])
    u = (torch.arange(20_000) + 0.5) / 20_000
    actions = c.chosen(logits.expand(20_000, -1), u)
    torch.testing.assert_close(actions.bincount() / 20_000, logits.softmax(1)[0], rtol=0, atol=1e-3)
    assert c.chosen(logits).item() == 1 and c.chosen(logits, torch.tensor([1.0])).item() == 2


def test_paper_returns():
    """R_t = sum gamma^i r + gamma^k V to the end of t_max moves, by its definition; an ended episode expects
    nothing."""
    T, gamma = 7, 0.9
    values, rewards, last = torch.randn(T, 2).double(), torch.randn(T, 2).double(), torch.tensor([0.0, 0.7]).double()
    mask = (torch.arange(T)[:, None] < torch.tensor([5, 7])).double()
    logits, actions = torch.randn(T, 2, 14).double(), torch.randint(14, (T, 2))
    found = c.a3c_loss(values, logits, actions, rewards * mask, mask, last, t_max=3, gamma=gamma)["returns"]
    for b, length in enumerate((5, 7)):
        for t in range(length):
            end = min((t // 3 + 1) * 3, T)
            expected = sum(gamma**(i - t) * rewards[i, b] for i in range(t, min(end, length)))
            if end < length or (end == T and length == T):
                expected += gamma**(end - t) * (values[end, b] if end < T else last[b])
            torch.testing.assert_close(found[t, b], expected)
        assert not found[length:, b].any()


def test_losses_without_a_reason_to_move():
    """Zero advantage and no entropy weight: the policy stands still. A better action than expected becomes likelier."""
    agent = c.Agent(8, 8).double()
    e = c.episodes(agent, lambda boxes: (boxes.double() / 20, torch.zeros(boxes.shape[:2]).double()), 3, (60, 60), 6,
                   torch.rand(3, 6))
    e.mask, e.rewards = e.mask.double(), e.rewards.double()
    values, logits = c.replay(agent, e)
    still = c.a3c_loss(values, logits, e.actions, values.detach() * e.mask, e.mask, 0 * e.last, t_max=1, gamma=0.0,
                       beta=0.0)
    gradient, = torch.autograd.grad(still["loss"], logits)
    assert gradient.abs().max() < 1e-12
    up = c.a3c_loss(values, logits, e.actions, (values.detach() + 1) * e.mask, e.mask, 0 * e.last, t_max=1, gamma=0.0,
                    beta=0.0)
    gradient, = torch.autograd.grad(up["policy"], logits, retain_graph=True)
    taken = gradient.gather(2, e.actions[..., None])[..., 0]
    assert (taken[e.mask > 0] < 0).all() and not taken[e.mask == 0].any()


def test_replay_goes_back_through_memory():
    """What was rolled out is found again; gradients pass as many moves as the memory says. The cell is torch's."""
    agent = c.Agent(8, 8)
    look = lambda boxes: (boxes / 20, torch.zeros(boxes.shape[:2]))
    e = c.episodes(agent, look, 2, (60, 60), 6, torch.rand(2, 6) * 0.9)
    depth = {}
    for memory in (1, 3):
        first = e.observations.clone().requires_grad_()
        values, logits = c.replay(agent, c.Episodes(first, *list(vars(e).values())[1:]), memory)
        torch.testing.assert_close(c.chosen(logits[0], None), logits[0].argmax(1))
        grads = torch.autograd.grad(values[2].sum(), first)[0].flatten(1).norm(dim=1)
        depth[memory] = (grads > 0).tolist()[:3]
    assert depth == {1: [False, False, True], 3: [True, True, True]}
    gates = nn.functional.linear(torch.ones(1, 8), agent.lstm.weight_ih, agent.lstm.bias_ih + agent.lstm.bias_hh)
    i, _, g, o = gates.chunk(4, 1)
    h = o.sigmoid() * (i.sigmoid() * g.tanh()).tanh()
    torch.testing.assert_close(agent.lstm(torch.ones(1, 8), agent.start(1))[0], h)


def test_normalised_losses_know_no_scale():
    """Rewards and values ten times as large: the same losses, and the same gradient of the logits."""
    agent = c.Agent(8, 16).double()
    torch.manual_seed(0)
    e = c.episodes(agent, lambda b: (torch.rand(3, 1, 4).double(), torch.rand(b.shape[:2]).double()), 3, (60, 60), 6,
                   torch.rand(3, 6) * 0.9)
    values, logits = (x.detach() for x in c.replay(agent, e))
    found = []
    for k in (1, 10):
        leaf = logits.clone().requires_grad_()
        losses = c.a3c_loss(k * values, leaf, e.actions, k * e.rewards, e.mask, k * e.last, normalise=True)
        found.append((losses["value"], losses["policy"], torch.autograd.grad(losses["loss"], leaf)[0]))
    torch.testing.assert_close(*found)


def test_standardised_observations():
    """The agent sees what it met as numbers of mean 0 and spread 1, and nothing else changes."""
    plain, agent = c.Agent(4, 8), c.Agent(4, 8, standardise=True)
    agent.load_state_dict(plain.state_dict(), strict=False)
    seen = 100 * torch.randn(500, 4) + 7
    for _ in range(3):
        agent.meet(seen)
    expected = plain((seen - seen.mean(0)) / (seen.std(0) + 0.05), plain.start(500))[0]
    torch.testing.assert_close(agent(seen, agent.start(500))[0], expected)


@pytest.mark.parametrize("form", ["paper", "gain", "code"])
def test_training_reaches_the_agent_alone(form):
    ranking = c.vfn_nano(32, 3, width=4, embedding=8)
    objective = c.a2rl_nano(32, 3, ranker=ranking, hidden=8, steps=4, form=form)
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    told = objective.loss({"x": x, "y": None, "step": 0, "noise": StepNoise(0, 0, 4)})
    told["loss"].backward()
    assert all(p.grad is None for p in ranking.parameters()) and not any("rank" in k for k in objective.state_dict())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.agent.parameters())
    assert 1 <= told["moves"] <= 4


def solve(updates=600, n=64, steps=30):
    """An agent trained on the toy, and its mean IoU on boxes that it has not seen."""
    agent = c.Agent(8, 64)
    optimiser = torch.optim.Adam(agent.parameters(), 3e-3)
    for update in range(updates):
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - update / updates)
        noise = StepNoise(0, update, n)
        look = to_hidden_box(hidden_boxes(noise.uniform(4)))
        e = c.episodes(agent, look, n, (100, 100), steps, noise.uniform(steps))
        values, logits = c.replay(agent, e, memory=10)
        optimiser.zero_grad()
        c.a3c_loss(values, logits, e.actions, e.rewards, e.mask, e.last, gamma=0.9)["loss"].backward()
        nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
        optimiser.step()
    hidden = hidden_boxes(torch.rand(500, 4, generator=torch.Generator().manual_seed(9)))
    return c.iou(c.episodes(agent, to_hidden_box(hidden), 500, (100, 100), steps).boxes[-1], hidden).mean(), hidden


@pytest.mark.slow
def test_the_toy_is_solved():
    """About a minute: IoU with the hidden box above 0.7; stopping at once, random windows; exhaustive search is the
    ceiling."""
    found, hidden = solve()
    at_once = c.iou(c.whole(500), hidden).mean()
    every = c.all_windows(100, 100)
    at_random = c.iou(every[torch.randint(len(every), (500,))], hidden).mean()
    best = c.best_of(to_hidden_box(hidden[:5]), 5, every)
    assert torch.equal(best, hidden[:5])
    print(f"agent {found:.3f}, at once {at_once:.3f}, at random {at_random:.3f}")
    assert found > 0.7 > 0.5 > max(at_once, at_random) + 0.1


# ---- scenes, other ways, measures ------------------------------------------------------------------------------------


def test_scenes():
    """A scene is the frame of its wide view, and the same at every call; frames fit the moves."""
    for k in range(20):
        tight, wide = c.scene(k, 200)[0], c.scene(k, 400, wide=True)
        box = c.pixels(wide[1], 400, 400)
        cut = c.crop_resize(wide[0][None].float(), box[None, None], 50, dense=2)[0, 0]
        same = nn.functional.interpolate(tight[None].float(), (50, 50), mode="area")[0]
        assert (cut - same).abs().mean() < 8
        assert torch.equal(c.scene(k, 200)[0], tight)
        sides = wide[1][2:] - wide[1][:2]
        assert 7 <= sides.min() and sides.max() <= 14 and wide[1].min() >= 0 and wide[1].max() <= 20
    x, boxes = c.in_context(torch.ones(50, 3, 40, 40) * torch.linspace(-1, 1, 40), torch.rand(50, 4))
    at = c.pixels(boxes, 40, 40)
    for image, (x0, y0, x1, y1) in zip(x, at.tolist()):
        edge = image[:, (y0 + y1) // 2, [x0 + 1, x1 - 2]]
        assert edge[0, 0] < -0.5 and edge[0, 1] > 0.5, "the photograph lies in its frame, as a whole"


def test_other_ways_to_crop():
    hidden = torch.tensor([[4, 6, 14, 16], [2, 2, 12, 12]])
    look = to_hidden_box(hidden)
    paths = list(c.climb(look, 2))
    scores = torch.stack([c.iou(b, hidden) for b in [c.whole(2), *paths]])
    assert (scores.diff(dim=0) >= 0).all() and (scores[-1] > 0.9).all()
    windows = c.sliding_windows()
    assert len(windows) == 140 and len(windows.unique(dim=0)) == 140
    assert torch.equal(c.best_of(look, 2, windows, chunk=7), c.best_of(look, 2, windows))
    assert c.iou(windows, windows).min() == 1 and c.alpha_recall(torch.tensor([0.75, 0.5])) == 50
    assert c.iou(hidden[:1], torch.tensor([[14, 16, 20, 20]])) == 0
    assert c.displacement(hidden[:1], hidden[1:], 20, 20) == pytest.approx((2 + 2 + 4 + 4) / 20 / 4)


# ---- files -----------------------------------------------------------------------------------------------------------


def write_published(path):
    """A file of the published form, at reduced widths, in its own names and layouts."""
    rng = np.random.default_rng(0)
    shapes = {"c1w": (11, 11, 3, 4), "c2w": (5, 5, 2, 4), "c3w": (3, 3, 4, 4), "c4w": (3, 3, 2, 4), "c5w": (3, 3, 2, 4),
              "fc6w": (36 * 4, 6), "fc1.weight": (8, 12), "fc2.weight": (8, 8), "fc3.weight": (8, 8),
              "lstm.weight_ih": (32, 8), "lstm.weight_hh": (32, 8), "action_fc.weight": (14, 8), "fc6b": (6,),
              "lstm.bias_ih": (32,), "lstm.bias_hh": (32,), "action_fc.bias": (14,)}
    shapes |= {f"c{k}b": (4,) for k in range(1, 6)} | {f"fc{k}.bias": (8,) for k in (1, 2, 3)}
    state = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    Path(path).write_bytes(pickle.dumps(state, protocol=2))
    return state


def test_published_pickle(tmp_path):
    state = write_published(tmp_path / "vfn_rl.pkl")
    objective = c.published(tmp_path / "vfn_rl.pkl")
    assert np.array_equal(objective.ranking.ranker.conv2.weight.detach(), state["c2w"].transpose(3, 2, 0, 1))
    assert np.array_equal(objective.agent.fc1.weight.detach(), state["fc1.weight"])
    picture = Image.effect_noise((90, 60), 80).convert("RGB")
    assert c.cropped(objective, picture, steps=3) == c.cropped(objective, picture, steps=3)
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(print))
    for path in ("evil.pkl", "none.pkl"):
        with pytest.raises(ValueError, match="cannot be used"):
            c.published(tmp_path / path)


def test_lists_of_human_crops(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"url": "http://x/y/1.jpg", "crop": [2, 3, 10, 20]}]))
    (tmp_path / "b.json").write_text(json.dumps([{"filename": "1.jpg", "crops": [[2, 3, 10, 20], [0, 0, 5, 5]]}]))
    assert c.read_fcdb(tmp_path / "a.json", "p") == [(Path("p/1.jpg"), (2, 3, 12, 23), [])]
    assert c.read_fcdb(tmp_path / "b.json", "p") == [(Path("p/1.jpg"), (2, 3, 12, 23), [(0, 0, 5, 5)])]
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(ValueError, match="lists no crops"):
        c.read_fcdb(tmp_path / "c.json", "p")


def test_from_train_to_pictures(here, capsys, monkeypatch):  # noqa: F811
    """A ranker, its agent (exact resume), crops of files at full resolution, tables; mistakes in one line each."""
    house = ["--data", "scenes:size=32", "--batch", "4", "--steps", "4", "--log-every", "1", "--sample-n", "4",
             "--sample-every", "0", "--device", "cpu"]
    monkeypatch.setattr(c, "TRAINING_SCENES", 16)
    monkeypatch.setattr(c, "HELD_OUT_SCENES", 16)
    call(train.train, *house, "--model", "vfn-nano:width=4,embedding=8", "--out", "r")
    model = "a2rl-nano:ranker=r,hidden=8,steps=5"
    call(train.train, *house, "--model", model, "--out", "whole")
    call(train.train, *house, "--model", model, "--out", "parts", "--save-every", "2")
    Path("parts/ckpt.prev.pt").replace("parts/ckpt.pt")
    call(train.train, *house, "--model", model, "--out", "parts")
    assert weights("parts") == weights("whole") and losses("parts") == losses("whole")

    Path("in/sub").mkdir(parents=True)
    for name, size in (("in/a.jpg", (123, 77)), ("in/sub/a.png", (40, 60))):
        Image.effect_noise(size, 60).convert("RGB").save(name)
    before = Path("in/a.jpg").read_bytes()
    call(sample.sample, "whole", "--crop", "in", "out", "--film", "moves.gif")
    made = [Image.open(f"out/{name}") for name in ("a.jpg", "sub/a.png")]
    agent = build.open_run("whole").objective
    boxes = [c.cropped(agent, c.open_photograph(f"in/{name}"))[-1] for name in ("a.jpg", "sub/a.png")]
    assert [m.size for m in made] == [(b[2] - b[0], b[3] - b[1]) for b in boxes] and made[0].format == "JPEG"
    assert Path("moves.gif").exists() and Path("in/a.jpg").read_bytes() == before
    write_published("vfn_rl.pkl")
    call(sample.sample, "--official", "a2rl", "--checkpoint", "vfn_rl.pkl", "--crop", "in/a.jpg", "published")
    assert Path("published/a.jpg").exists()
    call(sample.sample, "whole", "--n", "2", "--steps", "3", "--sampled", "True", "--out", "s.png")
    capsys.readouterr()
    for on in ("scenes", "photographs"):
        call(evaluate.evaluate, "crop", "whole", "--n", "2", "--on", on, "--device", "cpu")
        assert "sliding windows" in capsys.readouterr().out
    call(evaluate.evaluate, "ranker", "r", "--n", "5", "--device", "cpu")
    assert "of the same size" in capsys.readouterr().out
    call(train.train, *house[2:], "--data", "folder:size=32,crop_with=whole", "--data-dir", "in/sub", "--model",
         "vfn-nano:width=4", "--steps", "1", "--out", "r2")

    Image.new("RGB", (19, 50)).save("small.png")
    Path("broken.jpg").write_bytes(before[:300])
    Path("empty").mkdir()
    for source, said in (("in", "is not written over"), ("small.png", "a side needs at least 20"),
                         ("empty", "no photograph"), ("broken.jpg", "broken.jpg cannot be cropped"),
                         ("missing.jpg", "there is no photograph")):
        assert said in refused(capsys, sample.sample, "whole", "--crop", source, "out")
    assert "is for runs of a cropping agent" in refused(capsys, sample.sample, "r", "--crop", "in")
    assert "rewarded by a trained ranker" in refused(capsys, train.train, *house, "--model", "a2rl-nano", "--out", "x")
