"""Cropping a photograph by moves: a recurrent agent starts from the whole image and shrinks, shifts or stretches a
window until it says stop. It is rewarded whenever an aesthetic ranker, which learned from photographs alone, likes the
new window better than the old.

A2-RL: Aesthetics Aware Reinforcement Learning for Image Cropping, 1709.04595. The ranker is the View Finding Network of
Learning to Compose with Professional Photographs on the Web, 1702.00503. Boundary displacement and lists of human crops
as in Quantitative Analysis of Automatic Image Cropping Algorithms, 1701.01480 (FCDB).

A box is (x0, y0, x1, y1) in whole twentieths of the image's width and height, the end excluded. Letters: B images, K
boxes of each, T steps, D features of a window.

Contents: boxes and moves; the ranker (networks, training); rewards; the agent (network, episodes, losses, training);
scenes with a known best crop; baselines and measures; files; the registry.
"""

import functools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import nn
from tqdm import tqdm

import data
import figures
import runs
from layers import count, pair
from runs import Run

# ---- boxes and moves (the environment) -------------------------------------------------------------------------------

GRID = 20                                            # one unit is 5% of a side
SMALLEST = 4                                         # a window with a side of so many units or fewer ends the episode
MOVES = {                                            # change of (x0, y0, x1, y1)
    "shrink": (1, 1, -1, -1), "cut right and bottom": (0, 0, -1, -1), "cut left and bottom": (1, 0, 0, -1),
    "cut top and right": (0, 1, -1, 0), "cut left and top": (1, 1, 0, 0), "move right": (1, 0, 1, 0),
    "move left": (-1, 0, -1, 0), "move up": (0, -1, 0, -1), "move down": (0, 1, 0, 1), "flatten": (0, 1, 0, -1),
    "narrow": (1, 0, -1, 0), "grow in height": (0, -1, 0, 1), "grow in width": (-1, 0, 1, 0), "stop": (0, 0, 0, 0)}
STOP = len(MOVES) - 1
CHANGES = torch.tensor(list(MOVES.values()))         # (14, 4)


def whole(n, device="cpu"):
    """The box of the whole image, (n, 4)."""
    return torch.tensor([0, 0, GRID, GRID], device=device).repeat(n, 1)


def act(boxes, done, actions):
    """One move: boxes int64 (B, 4), done bool (B,), actions int64 (B,) -> (boxes, done).

    The change, then clipping: at the border a move shrinks the window, for only one of its edges can go on. A window is
    done by "stop" or by a side of at most SMALLEST units, and then never changes again.
    """
    changed = torch.where(done[:, None], boxes, boxes + CHANGES.to(boxes.device)[actions])
    boxes = changed.clamp(0, GRID)
    small = (boxes[:, 2:] - boxes[:, :2] <= SMALLEST).any(1)
    return boxes, done | (actions == STOP) | small


def pixels(boxes, height, width):
    """Boxes in units (..., 4) -> in pixels, int64, as published: int(x / 20 * width), whose rounding is at times below
    that of x * width / 20 (7 / 20 * 180 is 62.99...)."""
    across, down = (torch.tensor([int(k / GRID * side) for k in range(GRID + 1)], device=boxes.device)
                    for side in (width, height))
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack([across[x0], down[y0], across[x1], down[y1]], -1)


def crop_resize(images, boxes, size, border="edge", dense=1):
    """Windows of images as squares: images (B, C, H, W), boxes in pixels (B, K, 4) -> (B, K, C, size, size).

    Bilinear with half-pixel centres; a window may reach beyond its image, whose edges are drawn out. border: what lies
    outside the outermost pixel centres of a window, its own edge or "zero", with which the published code (scikit-image
    of 2017, mode "constant") blends the borders of enlarged crops. dense: sample so many times finer and average,
    against aliasing in large windows.
    """
    B, K = boxes.shape[:2]
    H, W = images.shape[-2:]
    x0, y0, x1, y1 = boxes.to(images.dtype).unbind(-1)                                   # (B, K)
    centres = (torch.arange(size * dense, device=images.device, dtype=images.dtype) + 0.5) / (size * dense)

    def places(low, high):
        """Pixel coordinates along one side (B, K, S), kept inside the window, and how much of each lies inside."""
        at = low[..., None] + centres * (high - low)[..., None] - 0.5
        inside = torch.minimum(torch.maximum(at, low[..., None]), high[..., None] - 1)
        return inside, 1 - (at - inside).abs()

    (x, across), (y, down) = places(x0, x1), places(y0, y1)
    S = size * dense
    grid = torch.stack(torch.broadcast_tensors((2 * x[:, :, None] + 1) / W - 1, (2 * y[..., None] + 1) / H - 1), -1)
    crops = F.grid_sample(images, grid.reshape(B, K * S, S, 2), padding_mode="border", align_corners=False)
    crops = crops.unflatten(2, (K, S)).transpose(1, 2)
    if border == "zero":
        crops = crops * (down[..., None] * across[:, :, None])[:, :, None]
    return F.avg_pool2d(crops.flatten(0, 1), dense).unflatten(0, (B, K)) if dense > 1 else crops


# ---- the ranker: networks --------------------------------------------------------------------------------------------


def same_padded(x, kernel, stride):
    """Zeros around x so that a convolution gives ceil(side / stride), as TensorFlow's SAME does: an odd one at the
    end."""
    pads = [max((math.ceil(side / stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:]]
    return F.pad(x, (pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2))


class VFN(nn.Module):
    """The View Finding Network: images (B, 3, S, S) in [-0.5, 0.5] -> features (B, embedding); `score` ranks them.

    AlexNet's convolutions with SAME padding, normalised before they are pooled; fc6 reads the last map in the order
    height, width, channel. spp: three poolings of it side by side, 3x3/2, 7x7/6, 5x5/4. pooling: "max" or "avg".
    """

    input_scale, border, dense = 0.5, "zero", 1      # of images in [-1, 1]; see `crop_resize`
    full_resolution = True                           # windows are cut from photographs as they are

    def __init__(self, widths=(96, 256, 384, 384, 256), embedding=1000, size=227, spp=False, pooling="max", channels=3):
        super().__init__()
        c1, c2, c3, c4, c5 = widths
        self.size, self.embedding, self.pooling = size, embedding, pooling
        self.conv1 = nn.Conv2d(channels, c1, 11, 4)
        self.conv2 = nn.Conv2d(c1, c2, 5, groups=2)
        self.conv3 = nn.Conv2d(c2, c3, 3)
        self.conv4 = nn.Conv2d(c3, c4, 3, groups=2)
        self.conv5 = nn.Conv2d(c4, c5, 3, groups=2)
        self.pools = [(3, 2), (7, 6), (5, 4)] if spp else [(3, 2)]
        # torch divides alpha by the window, TensorFlow does not: its 2e-5 is 1e-4 here
        self.lrn = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
        with torch.no_grad():
            cells = self.pooled(torch.zeros(1, channels, *pair(size))).shape[1]
        self.fc6 = nn.Linear(cells, embedding)
        self.score = nn.Linear(embedding, 1, bias=False)

    def pooled(self, x):
        """The poolings of the last feature map, flattened in the order height, width, channel."""
        x = F.max_pool2d(self.lrn(convolved(self.conv1, x)), 3, 2)
        x = F.max_pool2d(self.lrn(convolved(self.conv2, x)), 3, 2)
        x = convolved(self.conv5, convolved(self.conv4, convolved(self.conv3, x)))
        pool = F.max_pool2d if self.pooling == "max" else F.avg_pool2d
        return torch.cat([pool(x, *window).permute(0, 2, 3, 1).flatten(1) for window in self.pools], 1)

    def forward(self, x):
        return F.relu(self.fc6(self.pooled(x)))


def convolved(conv, x):
    """ReLU of a convolution with SAME padding."""
    return F.relu(conv(same_padded(x, conv.kernel_size[0], conv.stride[0])))


class SmallVFN(nn.Module):
    """A ranker of the same plan for small windows, of 64x64 pixels: four convolutions of stride 2, fc6, score. It
    samples them at twice that, so that a large window is not known by its aliasing, nor a small one by a grey
    border."""

    input_scale, border, dense = 1.0, "edge", 2
    full_resolution = False                          # but from what training saw, squares of the data's size

    def __init__(self, width=24, embedding=128, size=64, channels=3):
        super().__init__()
        self.size, self.embedding = size, embedding
        widths = [channels, width, 2 * width, 2 * width, 2 * width]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(widths, widths[1:]))
        self.fc6 = nn.Linear(2 * width * (size // 16)**2, embedding)
        self.score = nn.Linear(embedding, 1, bias=False)

    def forward(self, x):
        for conv in self.convolutions:
            x = F.relu(conv(x))
        return F.relu(self.fc6(x.flatten(1)))


def read_tensorflow(state):
    """Weights by the names of the published TensorFlow code -> by those of `VFN` and `Agent`: a state dict of tensors.
    Kernels (height, width, in, out) and matrices (in, out) are turned round; the agent's are as in torch."""
    names = {"fc6w": "ranker.fc6.weight", "fc6b": "ranker.fc6.bias", "W": "ranker.score.weight"}
    names |= {f"c{k}{kind[0]}": f"ranker.conv{k}.{kind}" for k in range(1, 6) for kind in ("weight", "bias")}
    found = {}
    for name, value in state.items():
        value = torch.as_tensor(value).float()
        short = name.rpartition("/")[2].removesuffix(":0")
        if short in names:
            value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T if value.ndim == 2 else value
            found[names[short]] = value.contiguous()
        else:
            found[f"agent.{short}"] = value
    return found


# ---- the ranker: training --------------------------------------------------------------------------------------------


def hinge(crop, photo):
    """mean max(0, 1 + s(crop) - s(photo)): 0 once every photograph leads by 1."""
    return F.relu(1 + crop - photo).mean()


def ranknet(crop, photo):
    """mean log(1 + exp(s(crop) - s(photo)))"""
    return F.softplus(crop - photo).mean()


def random_boxes(u, smallest, largest, height, width):
    """Boxes in pixels (..., 4) of uniform numbers u (..., 4): areas from `smallest` to `largest` of the image, their
    logarithm uniform; sides' ratio (in shares of the image) from 1/2 to 2 as far as it fits; any place."""
    area = smallest * (largest / smallest) ** u[..., 0]
    ratio = torch.minimum(2 ** (2 * u[..., 1] - 1), 1 / area).clamp(min=area)
    w, h = (area * ratio).sqrt(), (area / ratio).sqrt()
    x, y = (1 - w) * u[..., 2], (1 - h) * u[..., 3]
    return torch.stack([x * width, y * height, (x + w) * width, (y + h) * height], -1)


def around(u, smallest, height, width):
    """Windows in pixels (..., 4), by uniform numbers u (..., 8), of surroundings in which the photograph fills 0.35 to
    0.7 of either side, anywhere: they may reach beyond it on any side, or miss it. Areas are from `smallest` of the
    surrounding to all of it."""
    sides = torch.tensor([width, height], device=u.device) / (0.35 + 0.35 * u[..., 4:6])
    boxes = random_boxes(u[..., :4], smallest, 1.0, 1, 1) * torch.cat([sides, sides], -1)
    corner = (sides - torch.tensor([width, height], device=u.device)) * u[..., 6:8]      # of the photograph
    return boxes - torch.cat([corner, corner], -1)


class Ranking(nn.Module):
    """Learns to rank: a photograph, taken to be composed well, above any random crop of itself.

    network: images -> features, and its `score`. pairs: crops of each photograph in a step. smallest: the least area of
    a crop; one that saw only large crops is fooled by windows without a subject. objective: "hinge" or "ranknet".
    beyond: half of the crops are windows of a larger surrounding (see `around`). The published ranker has none of them,
    and then says little of windows in which the subject is small: it has seen none.
    """

    num_classes, options = 0, {"steps": 20}

    def __init__(self, network, shape, pairs=4, smallest=0.05, objective="hinge", beyond=False):
        super().__init__()
        self.ranker, self.shape, self.pairs, self.smallest = network, shape, pairs, smallest
        self.beyond = beyond
        if objective not in ("hinge", "ranknet"):
            raise ValueError(f"objective {objective!r}: choose hinge or ranknet")
        self.objective = hinge if objective == "hinge" else ranknet

    def look(self, images, boxes):
        """Images (B, C, H, W) in [-1, 1], windows in pixels (B, K, 4) -> features (B, K, D), scores (B, K)."""
        crops = crop_resize(images, boxes, self.ranker.size, self.ranker.border, self.ranker.dense)
        features = self.ranker(crops.flatten(0, 1) * self.ranker.input_scale)
        return features.unflatten(0, crops.shape[:2]), self.ranker.score(features).view(crops.shape[:2])

    def look_at(self, images):
        """look(boxes in units (B, K, 4)) of these images -> (features (B, K, D), scores (B, K))."""
        return lambda boxes: self.look(images, pixels(boxes, *images.shape[-2:]))

    def loss(self, batch):
        """As published, flips and a little brightness and contrast, alike for both members of a pair."""
        x, noise = batch["x"], batch["noise"]
        H, W = x.shape[-2:]
        flip, light, contrast = noise.uniform(3).view(-1, 3, 1, 1, 1).unbind(1)
        x = torch.where(flip < 0.5, x, x.flip(-1))
        x = x * (0.95 + 0.1 * contrast) + 0.02 * (2 * light - 1)
        crops = random_boxes(noise.uniform(self.pairs, 4), self.smallest, 0.9, H, W)
        if self.beyond:
            wider = around(noise.uniform(self.pairs, 8), self.smallest, H, W)
            crops = torch.where(torch.arange(self.pairs, device=x.device)[:, None] % 2 == 0, wider, crops)
        photo = torch.tensor([0.0, 0.0, W, H], device=x.device).expand(len(x), 1, 4)
        scores = self.look(x, torch.cat([photo, crops], 1))[1]                          # (B, 1 + pairs)
        return {"loss": self.objective(scores[:, 1:], scores[:, :1]),
                "accuracy": (scores[:, 1:] < scores[:, :1]).float().mean()}

    forward = loss

    def conditions(self, n):
        return torch.arange(n)                       # of held-out scenes

    @torch.no_grad()
    def trajectory(self, noise, conditions, steps=20):
        """What it prefers in wide scenes: from the whole image, move by move, to a window that no move improves."""
        images = wide_scenes(conditions.tolist(), self.shape[-1])[0].to(conditions.device)
        for boxes in climb(self.look_at(images), len(images), steps, images.device):
            yield with_window(images, boxes)

    def cost(self):
        S = self.ranker.size
        return count(self.ranker, torch.empty(1, self.shape[0], S, S, device="meta"))


# ---- rewards ---------------------------------------------------------------------------------------------------------


def odd_shape(boxes):
    """Whether the ratio of windows (..., 4) in pixels is below 1/2 or above 2."""
    w, h = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    return (w > 2 * h) | (h > 2 * w)


def paper_reward(before, after, boxes, t, aspect=True):
    """sign(s_{t+1} - s_t) - 0.001 (t + 1) + nr, nr = -5 for an odd shape: of scores (B,), the windows after the move in
    pixels (B, 4), and t from 0. aspect False leaves nr out (the paper's ablation)."""
    return torch.sign(after - before) - 0.001 * (t + 1) - 5.0 * (odd_shape(boxes) & aspect)


def gain_reward(before, after, boxes, t, aspect=True):
    """`paper_reward` with the gain s_{t+1} - s_t in place of its sign, in the units of the hinge's margin: gains add up
    to that of the last window, so a walk is worth what it finds. Signs add up to the number of steps upwards, and the
    longest slow walk earns most, wherever it ends. nr is -2: a good move gains about as much."""
    return after - before - 0.001 * (t + 1) - 2.0 * (odd_shape(boxes) & aspect)


def code_reward(before, after, boxes, t, done, aspect=True):
    """That of the public training code: a tie counts as worse, and the move that ends the episode (done) earns 0."""
    reward = torch.where(after > before, 1.0, -1.0) - 0.001 * (t + 1) - 5.0 * (odd_shape(boxes) & aspect)
    return torch.where(done, 0.0, reward)


# ---- the agent: network ----------------------------------------------------------------------------------------------


class Agent(nn.Module):
    """Observations (B, 2D), features of the whole image and of the window -> (logits (B, 14), value (B,), state).

    Three linear layers, an LSTM cell that remembers the moves so far, an actor and a critic on its output. recurrent
    False leaves the LSTM out (the paper's ablation). standardise: observations are taken relative to the mean and the
    spread of those it was trained on (see `meet`). State: (h, c), each (B, hidden).
    """

    def __init__(self, observation=2000, hidden=1024, recurrent=True, standardise=False):
        super().__init__()
        self.hidden, self.standardise = hidden, standardise
        if standardise:
            self.register_buffer("mean", torch.zeros(observation))
            self.register_buffer("spread", torch.ones(observation))
            self.register_buffer("met", torch.zeros(()))
        self.fc1 = nn.Linear(observation, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, hidden)
        self.lstm = nn.LSTMCell(hidden, hidden) if recurrent else None
        self.action_fc = nn.Linear(hidden, len(MOVES))
        self.critic = nn.Linear(hidden, 1)
        for p in self.parameters():                  # as in the public training code
            if p.ndim == 2:
                nn.init.xavier_uniform_(p)
            else:
                nn.init.zeros_(p)

    def start(self, n):
        """The state before the first move."""
        return self.fc1.weight.new_zeros(n, self.hidden), self.fc1.weight.new_zeros(n, self.hidden)

    @torch.no_grad()
    def meet(self, observations):
        """Let the mean and the spread follow observations (N, 2D): an average over about the last 100 calls."""
        self.met += 1
        share = 1 / self.met.clamp(max=100)
        self.mean.lerp_(observations.mean(0), share)
        self.spread.lerp_(observations.std(0) + 0.05, share)    # features that are nearly constant stay small

    def forward(self, observation, state):
        if self.standardise:
            observation = (observation - self.mean) / self.spread
        x = F.relu(self.fc3(F.relu(self.fc2(F.relu(self.fc1(observation))))))
        if self.lstm is not None:
            state = self.lstm(x, state)
            x = state[0]
        return self.action_fc(x), self.critic(x)[:, 0], state


# ---- the agent: episodes ---------------------------------------------------------------------------------------------


@dataclass
class Episodes:
    """B episodes of at most T moves, time first. mask: 1 for moves that were made, 0 after an episode's end; last: what
    the critic expects after T moves (B,), 0 where the episode ended; hs, cs: the LSTM's state before each move."""

    observations: torch.Tensor                       # (T, B, 2D)
    actions: torch.Tensor                            # (T, B)
    rewards: torch.Tensor                            # (T, B)
    mask: torch.Tensor                               # (T, B)
    hs: torch.Tensor                                 # (T, B, hidden)
    cs: torch.Tensor                                 # (T, B, hidden)
    last: torch.Tensor                               # (B,)
    boxes: torch.Tensor                              # (T, B, 4), in units, after each move


@torch.no_grad()
def episodes(agent, look, n, sides, steps, uniform=None, form="paper", aspect=True) -> Episodes:
    """Let the agent crop n images.

    look: windows in units (n, K, 4) -> (features (n, K, D), scores (n, K)), one pass of the ranker a move. sides:
    (height, width) of the images. uniform: numbers in [0, 1), (n, steps), that choose the actions; None: the likeliest
    action. form: "paper", "gain" or "code", for the reward; as in the code, "code" puts the critic's value in place of
    the last reward of an episode that reached `steps` without an end.
    """
    device = next(agent.parameters()).device
    boxes, done = whole(n, device), torch.zeros(n, dtype=torch.bool, device=device)
    feature, score = (found[:, 0] for found in look(boxes[:, None]))
    whole_image, state, made = feature, agent.start(n), []
    for t in range(steps):
        if done.all():
            break
        mask, observation = ~done, torch.cat([whole_image, feature], 1)
        before, (logits, value, after) = state, agent(observation, state)
        action = chosen(logits, None if uniform is None else uniform[:, t])
        boxes, done = act(boxes, done, action)
        old, (feature, score) = score, (found[:, 0] for found in look(boxes[:, None]))
        shape = pixels(boxes, *sides)
        if form != "code":
            reward = (gain_reward if form == "gain" else paper_reward)(old, score, shape, t, aspect)
        else:
            reward = code_reward(old, score, shape, t, done, aspect)
            if t == steps - 1:
                reward = torch.where(done, 0.0, value)
        state = after
        made.append((observation, action, reward * mask, mask.float(), *before, boxes))
    observations, actions, rewards, mask, hs, cs, path = map(torch.stack, zip(*made))
    last = agent(torch.cat([whole_image, feature], 1), state)[1] * ~done
    return Episodes(observations, actions, rewards, mask, hs, cs, last, path)


def chosen(logits, uniform=None):
    """Actions (B,): the likeliest, or those that numbers in [0, 1) (B,) pick from the probabilities."""
    if uniform is None:
        return logits.argmax(1)
    below = logits.softmax(1).cumsum(1) <= uniform[:, None]
    return below.sum(1).clamp(max=logits.shape[1] - 1)


# ---- the agent: losses -----------------------------------------------------------------------------------------------


def replay(agent, e: Episodes, memory=1):
    """(values (T, B), logits (T, B, 14)) with gradients. The LSTM's state is taken from the episode, as a constant, at
    every memory-th move, and else from the move before, so that gradients go back through so many moves."""
    values, logits, state = [], [], None
    for t, observation in enumerate(e.observations):
        if t % memory == 0:
            state = e.hs[t], e.cs[t]
        actions, value, state = agent(observation, state)
        values.append(value)
        logits.append(actions)
    return torch.stack(values), torch.stack(logits)


def a2c_loss(values, logits, actions, rewards, mask, gamma=0.99, lam=1.0, value_coef=0.5, entropy_coef=1.0):
    """That of the public training code, everything (T, B): generalised advantages over zero-padded episodes, normalised
    over the moves made; squared error of the critic; averages over each episode's moves first, then over episodes.
    Its entropy has weight 1: the option of that name is not used there."""
    expected = F.pad(values.detach() * mask, (0, 0, 0, 1))
    deltas = rewards + gamma * expected[1:] - expected[:-1]
    gae, returns = torch.zeros_like(deltas), torch.zeros_like(rewards)
    following_gae = following = torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        following_gae = gae[t] = deltas[t] + gamma * lam * following_gae
        following = returns[t] = rewards[t] * mask[t] + gamma * following

    centred = gae * mask - (gae * mask).sum() / mask.sum()
    advantage = centred / (((centred**2 * mask).sum() / mask.sum()).sqrt() + 1e-8)

    def mean(x):
        return ((x * mask).sum(0) / mask.sum(0)).mean()

    log_p = logits.log_softmax(2)
    policy = -mean(log_p.gather(2, actions[..., None])[..., 0] * advantage)
    value, neg_entropy = mean((values - returns)**2), mean((log_p * log_p.exp()).sum(2))
    return {"loss": policy + value_coef * value + entropy_coef * neg_entropy, "policy": policy, "value": value,
            "neg_entropy": neg_entropy, "gae": gae, "advantage": advantage, "returns": returns}


def a3c_loss(values, logits, actions, rewards, mask, last, t_max=10, gamma=0.99, beta=0.05, normalise=False):
    """That of the paper: R_t = sum_i gamma^i r_{t+i} + gamma^k V(s_{t+k}), to the end of its t_max moves.

    -log pi (R - V), minus the entropy times beta, and 1/2 (R - V)^2: sums over the moves of an episode, mean over
    episodes.

    normalise: the advantages R - V are centred and scaled over the batch's moves, as `a2c_loss` does, and the critic's
    error is scaled alike, so that the three terms weigh the same whatever the scale of the rewards above a tenth.

    The paper's workers update after every t_max moves (A3C, 1602.01783); here all episodes run to their end first, and
    their gradients are added in one update."""
    expected = torch.cat([values.detach() * mask, last[None]])        # 0 after the end of an episode
    returns = torch.zeros_like(rewards)
    for t in reversed(range(len(rewards))):
        following = expected[t + 1] if (t + 1) % t_max == 0 or t + 1 == len(rewards) else returns[t + 1]
        returns[t] = (rewards[t] + gamma * following) * mask[t]
    log_p = logits.log_softmax(2)
    advantage, scale = returns - values.detach(), 1.0
    if normalise:
        advantage = advantage - (advantage * mask).sum() / mask.sum()
        scale = ((advantage**2 * mask).sum() / mask.sum()).sqrt().clamp(min=0.1)  # below that it is not worth learning
        advantage = advantage / scale
    policy = -(log_p.gather(2, actions[..., None])[..., 0] * advantage * mask).sum(0).mean()
    value = 0.5 * (((returns - values) / scale)**2 * mask).sum(0).mean()
    neg_entropy = ((log_p * log_p.exp()).sum(2) * mask).sum(0).mean()
    return {"loss": policy + value + beta * neg_entropy, "policy": policy, "value": value, "neg_entropy": neg_entropy,
            "returns": returns}


# ---- the agent: training ---------------------------------------------------------------------------------------------


class Cropping(nn.Module):
    """Trains an agent against a frozen ranker, an update per batch of episodes, and crops with it.

    form: "paper" (its reward, returns over t_max moves, entropy weight beta), "gain" (the same with `gain_reward` and
    normalised advantages) or "code" (those of the public training code). aspect: punish odd shapes. context: crop
    photographs that were pasted into a larger surrounding, since the ranker was taught that a photograph as it is
    cannot be improved.
    """

    num_classes, options = 0, {"steps": 50, "sampled": False}

    def __init__(self, ranking, agent, shape, steps=50, form="paper", t_max=10, gamma=0.99, aspect=True,
                 context=True, beta=0.05):
        super().__init__()
        self.__dict__["ranking"] = ranking           # frozen, and no part of the state
        self.agent, self.shape, self.steps = agent, shape, steps
        self.form, self.t_max, self.gamma, self.aspect, self.context = form, t_max, gamma, aspect, context
        self.beta = beta

    def loss(self, batch):
        x, noise = batch["x"], batch["noise"]
        if self.context:
            x, _ = in_context(x, noise.uniform(4))
        e = episodes(self.agent, self.ranking.look_at(x), len(x), x.shape[-2:], self.steps, noise.uniform(self.steps),
                     self.form, self.aspect)
        if self.form != "code":
            values, logits = replay(self.agent, e, memory=self.t_max)
            losses = a3c_loss(values, logits, e.actions, e.rewards, e.mask, e.last, self.t_max, self.gamma, self.beta,
                              normalise=self.form == "gain")
        else:
            losses = a2c_loss(*replay(self.agent, e), e.actions, e.rewards, e.mask, self.gamma)
        if self.agent.standardise and self.training:
            self.agent.meet(e.observations[e.mask.bool()])
        told = {name: losses[name] for name in ("loss", "policy", "value", "neg_entropy")}
        return told | {"reward": (e.rewards * e.mask).sum(0).mean(), "moves": e.mask.sum(0).mean()}

    forward = loss

    def path(self, images, steps=None, uniform=None):
        """The boxes of each image (B, C, H, W) after each move, in units (T, B, 4): by the likeliest actions, or by
        those that uniform (B, steps) picks, as the published code draws them."""
        look = self.ranking.look_at(images)
        return episodes(self.agent, look, len(images), images.shape[-2:], steps or self.steps, uniform).boxes

    def crop(self, picture):
        """A PIL picture, cropped by the likeliest actions; untouched if a side has less than 20 pixels."""
        return picture.crop(cropped(self, picture)[-1]) if min(picture.size) >= GRID else picture

    def conditions(self, n):
        return torch.arange(n)                       # of held-out scenes

    def trajectory(self, noise, conditions, steps=50, sampled=False):
        """Its moves in wide scenes."""
        images = wide_scenes(conditions.tolist(), self.shape[-1])[0].to(conditions.device)
        for boxes in self.path(images, steps, noise.uniform(steps) if sampled else None):
            yield with_window(images, boxes)

    def cost(self):
        """Of one move: the ranker's pass and the agent's."""
        S = self.ranking.ranker.size
        weights, macs = count(self.agent, torch.empty(1, self.agent.fc1.in_features, device="meta"),
                              self.agent.start(1))
        return weights, macs + count(self.ranking.ranker, torch.empty(1, self.shape[0], S, S, device="meta"))[1]


def in_context(photos, u):
    """Photographs (B, C, H, W) as part of larger images: each, squeezed into a frame of 7 to 14 twentieths of either
    side, lies on a strongly blurred copy of itself that fills the image. u: numbers in [0, 1), (B, 4). Returns (images
    of the same size, frames in units (B, 4))."""
    H, W = photos.shape[-2:]
    sides = 7 + (8 * u[:, :2]).long()
    corner = ((GRID + 1 - sides) * u[:, 2:]).long()
    boxes = torch.cat([corner, corner + sides], 1)

    def places(n, low, high):                        # where the pixels of one side lie in the photograph, (B, 2n)
        at = (torch.arange(2 * n, device=photos.device) + 0.5) / (2 * n) * GRID
        return 2 * (at - low[:, None]) / (high - low)[:, None] - 1

    x, y = places(W, boxes[:, 0], boxes[:, 2]), places(H, boxes[:, 1], boxes[:, 3])
    grid = torch.stack(torch.broadcast_tensors(x[:, None], y[..., None]), -1)                 # (B, 2H, 2W, 2)
    inside = (grid.abs() < 1).all(-1)[:, None].to(photos.dtype)
    photo = F.grid_sample(photos, grid, padding_mode="border", align_corners=False)
    small = F.adaptive_avg_pool2d(photos, 6)
    ground = F.interpolate(small, (2 * H, 2 * W), mode="bicubic", align_corners=False).clamp(-1, 1)
    return F.avg_pool2d(photo * inside + ground * (1 - inside), 2), boxes


def with_window(images, boxes):
    """Images (B, C, H, W), everything outside a window in units (B, 4) dimmed."""
    H, W = images.shape[-2:]
    x0, y0, x1, y1 = pixels(boxes, H, W)[..., None, None].unbind(1)                           # (B, 1, 1)
    X, Y = torch.arange(W, device=images.device), torch.arange(H, device=images.device)[:, None]
    inside = ((X >= x0) & (X < x1) & (Y >= y0) & (Y < y1))[:, None]
    return torch.where(inside, images, 0.3 * images - 0.7)


# ---- scenes with a known best crop -----------------------------------------------------------------------------------


def uniforms(index, n):
    """Numbers in [0, 1) of a scene, a function of its index alone, float32 (n,)."""
    return torch.from_numpy(np.random.default_rng([7, int(index)]).random(n)).float()


def scene(index, size, wide=False):
    """A rendered scene: index -> (image uint8 (3, size, size), the best crop in units (4,)).

    Its subject, one of data.SHAPES, is centred, or looks to a side (a bright dot) and then stands on the opposite
    third; it fills two fifths of the frame's height and width, whatever their ratio, on a textured ground. So in the
    frame, and in no other window, the composition is right. Not wide: the frame is the image. wide: the same ground
    goes on beyond the frame, which is 7 to 14 twentieths of each side, anywhere.
    """
    u = uniforms(index, 64)
    turn = int(3 * u[0]) - 1                                                              # looks left, ahead, right
    w, h = (7 + (8 * v).int().item() for v in u[1:3])
    x, y = int((GRID + 1 - w) * u[3]), int((GRID + 1 - h) * u[4])
    box = torch.tensor([x, y, x + w, y + h] if wide else [0, 0, GRID, GRID])
    at = (torch.arange(size) + 0.5) / size * GRID
    across, down = (2 * (at - low) / (high - low) - 1 for low, high in ((box[0], box[2]), (box[1], box[3])))
    X, Y = across.expand(size, -1), down[:, None].expand(-1, size)                        # the frame is [-1, 1]^2

    fine = 2 ** (5 * u[38].item() - 1)                # of any scale, which therefore says nothing of the frame's
    waves = (u[8:28].view(4, 5, 1, 1) - 0.5) * torch.tensor([fine, fine, 6.3, 0.3, 0.3]).view(5, 1, 1)
    texture = sum(k[3] * torch.sin(k[0] * X + k[1] * Y + k[2]) for k in waves)            # (size, size)
    paper = 0.15 + 0.5 * u[28:31].view(3, 1, 1) + texture + 0.1 * (u[31] - 0.5) * X + 0.1 * (u[32] - 0.5) * Y
    ink = paper.mean((1, 2), keepdim=True) + torch.where(u[33:36] < 0.3, -0.35, 0.5).view(3, 1, 1)
    r = 0.36 + 0.08 * u[36].item()
    unit = size * (min(w, h) / GRID if wide else 1) / 2                                  # pixels in a frame's unit
    centre = -turn / 3
    shape = data.SHAPES[int(len(data.SHAPES) * u[37])]
    cover = soft(data.distance(shape, ((X - centre) / r).numpy(), (-Y / r).numpy()) * r, unit)
    image = paper + cover * (ink - paper)
    eye = soft(torch.hypot(X - centre - 0.6 * r * turn, Y).numpy() - 0.2 * r, unit)
    image = image + eye * (1.0 - image)
    return (image.clamp(0, 1) * 255 + 0.5).to(torch.uint8), box


def soft(distance, unit):
    """How much of a pixel lies inside an outline, from the signed distance to it and the pixels of a unit."""
    return torch.from_numpy(np.clip(0.5 - distance * unit, 0, 1)).float()


def wide_scenes(numbers, size):
    """The held-out wide scenes of these numbers: images (n, 3, size, size) in [-1, 1], best crops in units (n, 4)."""
    images, boxes = zip(*(scene(HELD_OUT + k, size, wide=True) for k in numbers))
    return torch.stack(images).float() / 127.5 - 1, torch.stack(boxes)


HELD_OUT = 1_000_000                                 # the number of the first held-out scene
TRAINING_SCENES, HELD_OUT_SCENES = 4096, 512


def scenes(data_dir, split, *, size: int = 128, flip: bool = False, wide: bool = False):
    """Drawn here, no download: a subject composed on a textured ground, 4,096 train + 512 test. wide: within a larger
    surrounding, for the cropping agent."""
    numbers = range(TRAINING_SCENES) if split == "train" else range(HELD_OUT, HELD_OUT + HELD_OUT_SCENES)
    images = torch.stack([scene(k, size, wide)[0] for k in tqdm(numbers, desc="drawing scenes", delay=2, leave=False)])
    return data.Dataset(images, torch.zeros(len(images), dtype=torch.long), [], None, flip)


# ---- other ways to crop ----------------------------------------------------------------------------------------------


def climb(look, n, steps=50, device="cpu"):
    """Greedy climbing: from the whole image the move that the ranker likes best, until it likes none better than where
    it stands. Yields boxes (n, 4) after each round of moves."""
    boxes, done = whole(n, device), torch.zeros(n, dtype=torch.bool, device=device)
    for _ in range(steps):
        actions = torch.arange(len(MOVES), device=device).repeat(n)
        moved, ended = act(boxes.repeat_interleave(len(MOVES), 0), done.repeat_interleave(len(MOVES)), actions)
        best = look(moved.view(n, -1, 4))[1].argmax(1)                         # "stop" stays, and wins no tie it loses
        done = done | ended.view(n, -1).gather(1, best[:, None])[:, 0]
        boxes = moved.view(n, -1, 4)[torch.arange(n, device=device), best]
        yield boxes
        if done.all():
            return


def sliding_windows():
    """140 windows of the image's own ratio (FCDB's lists have 137 an image): sides of 0.4 to 1 in steps of 0.1, places
    in steps of 0.1."""
    sides = range(8, GRID + 1, 2)
    return torch.tensor([(x, y, x + s, y + s) for s in sides for y in range(0, GRID + 1 - s, 2)
                         for x in range(0, GRID + 1 - s, 2)])


def all_windows(height, width):
    """Every window larger than SMALLEST whose ratio is not odd."""
    spans = [(a, b) for a in range(GRID) for b in range(a + SMALLEST + 1, GRID + 1)]
    boxes = torch.tensor([(x0, y0, x1, y1) for x0, x1 in spans for y0, y1 in spans])
    return boxes[~odd_shape(pixels(boxes, height, width))]


def best_of(look, n, boxes, chunk=500):
    """The window among boxes (K, 4) that the ranker likes best, in each of n images: (n, 4)."""
    scores = [look(part.expand(n, -1, -1))[1] for part in boxes.split(chunk)]
    return boxes[torch.cat(scores, 1).argmax(1)]


# ---- measures --------------------------------------------------------------------------------------------------------


def iou(a, b):
    """Intersection over union of boxes (..., 4), float64."""
    a, b = a.double(), b.double()
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    both = sides.prod(-1)
    return both / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - both)


def displacement(a, b, height, width):
    """Boundary displacement of boxes (..., 4): the mean over the four edges of how far they lie apart, in shares of the
    image's width or height (numbers, or tensors (...))."""
    apart = (a.double() - b.double()).abs()
    return ((apart[..., 0] + apart[..., 2]) / width + (apart[..., 1] + apart[..., 3]) / height) / 4


def alpha_recall(overlaps, alpha=0.75):
    """Percentage of overlaps (N,) of at least alpha."""
    return 100 * (overlaps >= alpha).double().mean()


# ---- pictures from files ---------------------------------------------------------------------------------------------


def photographs(source):
    """The image files that a path names: itself, or those below a folder. ValueError, FileNotFoundError."""
    source = Path(source).expanduser()
    if not source.exists():
        raise FileNotFoundError(f"there is no photograph and no folder {source}")
    found = data.list_images(source) if source.is_dir() else [source]
    if not found:
        raise ValueError(f"{source} holds no photograph: it needs PNG, JPEG, WebP or BMP files")
    return found


def open_photograph(path):
    """A file as an upright RGB picture; ValueError, in one sentence, if it is none or has a side below 20 pixels."""
    try:
        picture = data.open_image(path)
    except Exception as error:                       # decoders raise nearly every type there is
        reason = "not a PNG, JPEG, WebP or BMP" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{path} cannot be cropped: {reason or type(error).__name__}") from error
    if min(picture.size) < GRID:
        raise ValueError(f"{path} cannot be cropped: it is {picture.width}x{picture.height} pixels, and a side needs "
                         f"at least {GRID}")
    return picture


def pixels_of(picture, side=None):
    """A picture as (3, H, W) in [-1, 1]; or as a square of that side, its ratio not kept."""
    if side is not None:
        picture = picture.resize((side, side), Image.BOX if min(picture.size) >= side else Image.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def cropped(objective, picture, steps=None, seed=None):
    """The agent's windows in a picture, one a move, as pixel boxes of it. seed: draw the actions, as the published code
    does; None: the likeliest ones, the same in every run."""
    uniform = None
    if seed is not None:
        uniform = torch.rand(1, steps or objective.steps, generator=torch.Generator().manual_seed(seed))
    device = next(objective.parameters()).device
    side = None if objective.ranking.ranker.full_resolution else objective.shape[-1]
    image = pixels_of(picture, side)[None].to(device)
    path = objective.path(image, steps, None if uniform is None else uniform.to(device))
    return [tuple(box) for box in pixels(path[:, 0], picture.height, picture.width).tolist()]


def crop_files(objective, source, out, film=None, seed=None, steps=None):
    """Crop a photograph, or all in a folder, at full resolution; returns the files written.

    source: file or folder; out: folder for the crops, which keep their names and formats. film: FILE.gif or FILE.webp
    of the agent's moves, side by side. seed, steps: see `cropped`. A file that cannot be used stops all before anything
    is written, and nothing that exists is written over, the photographs least of all.
    """
    source, out = Path(source).expanduser(), Path(out).expanduser()
    root = source if source.is_dir() else source.parent
    jobs = []
    for path in tqdm(photographs(source), desc="cropping", unit=" photographs", delay=2):
        target = out / path.relative_to(root)
        if target.exists():
            raise ValueError(f"{target} exists, and is not written over: name another folder")
        jobs.append((path, target, cropped(objective, open_photograph(path), steps, seed)))
    for path, target, boxes in tqdm(jobs, desc="writing", unit=" photographs", delay=2):
        target.parent.mkdir(parents=True, exist_ok=True)
        kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}.get(target.suffix.lower(), "PNG")
        part = open_photograph(path).crop(boxes[-1])
        runs.write(target, lambda partial: part.save(partial, format=kind, quality=95))
    if film:
        figures.film(moves_film([(path, boxes) for path, _, boxes in jobs[:16]]), film, 300)
    return [target for _, target, _ in jobs]


def moves_film(jobs, side=256):
    """Frames of the windows of (path, pixel boxes) of up to a few photographs, side by side, dimmed outside."""
    frames = []
    for step in range(max(len(boxes) for _, boxes in jobs) + 1):
        tiles = []
        for path, boxes in jobs:
            picture = open_photograph(path)
            window = ((0, 0, *picture.size), *boxes)[min(step, len(boxes))]
            shown = picture.point(lambda v: v * 3 // 10)
            shown.paste(picture.crop(window), window)
            shown.thumbnail((side, side))
            tile = Image.new("RGB", (side, side), "white")
            tile.paste(shown, ((side - shown.width) // 2, (side - shown.height) // 2))
            tiles.append(np.asarray(tile))
        frames.append(figures.grid(np.stack(tiles), zoom=1))
    return frames


def published(path, device="cpu", steps=50):
    """The published agent and ranker from their pickle of arrays (TF-A2RL's vfn_rl.pkl), as a Cropping. The file is
    read by a reader that knows numpy arrays only. ValueError if it holds something else."""
    with data._blame(path, "it must be the published pickle of named arrays"):
        state = read_tensorflow(data._unpickle(Path(path).expanduser().read_bytes()))
        widths = [len(state[f"ranker.conv{k}.bias"]) for k in range(1, 6)]
        ranking = Ranking(VFN(widths, len(state["ranker.fc6.bias"])), (3, 227, 227))
        agent = Agent(state["agent.fc1.weight"].shape[1], len(state["agent.fc1.bias"]))
        ranking.ranker.load_state_dict({k.removeprefix("ranker."): v for k, v in state.items() if k[:7] == "ranker."},
                                       strict=False)
        missing = agent.load_state_dict({k[6:]: v for k, v in state.items() if k[:6] == "agent."}, strict=False)
    if missing.unexpected_keys or not all(key.startswith("critic") for key in missing.missing_keys):
        raise ValueError(f"{path}: unknown arrays {missing.unexpected_keys} or missing ones {missing.missing_keys}")
    return Cropping(ranking.to(device).eval(), agent, (3, 227, 227), steps).to(device).eval()


def read_fcdb(path, folder):
    """FCDB's lists of crops (JSON): [(file in folder, human crop, windows)], boxes (x0, y0, x1, y1) in pixels, in the
    files (x, y, w, h). A row names its file by "filename" or "url", its crop by "crop"; a list of sliding windows has
    "crops", the first of which is the human one: it is left out of the windows (published code: is in)."""
    with data._blame(path, "it must be a JSON list as FCDB publishes them"):
        rows = json.loads(Path(path).read_text("utf-8"))
        found = []
        for row in rows:
            name = row.get("filename") or row["url"].rpartition("/")[2]
            boxes = [(x, y, x + w, y + h) for x, y, w, h in row.get("crops") or [row["crop"]]]
            found.append((Path(folder) / name, boxes[0], boxes[1:]))
    if not found:
        raise ValueError(f"{path} lists no crops")
    return found


# ---- commands of evaluate.py -----------------------------------------------------------------------------------------


def crop_flags(p):
    p.add_argument("run", type=Run, help="folder of a run of an agent")
    p.add_argument("--on", choices=["scenes", "photographs", "fcdb"], default="scenes",
                   help="held-out rendered scenes; the run's own held-out photographs, each on a blurred copy of "
                        "itself; photographs with a human crop (default: %(default)s)")
    p.add_argument("--fcdb", metavar="LIST.json", help="FCDB's list of crops or of sliding windows")
    p.add_argument("--photos", metavar="FOLDER", help="its photographs")
    p.add_argument("--n", type=int, default=100, metavar="N", help="images (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of surroundings and random crops")
    p.add_argument("--best", type=int, default=0, metavar="N",
                   help="also the best of all windows by the ranker, of so many images (slow)")
    p.add_argument("--device", default="auto", metavar="NAME", help="cuda, mps, cpu or auto (default: %(default)s)")


@torch.no_grad()
def crop(args):
    """How well crops agree with the known best ones: the agent's, sliding windows', and others', windows and time."""
    if not isinstance(args.run.objective, Cropping):
        raise ValueError(f"{args.run.folder} is no run of a cropping agent")
    images, truth = known_crops(args)
    print(f"{len(images)} images; IoU with its 95% interval, displacement, share of IoU >= 0.75, windows and "
          "milliseconds an image")
    for name, method in ways_to_crop(args.run.objective, args.seed).items():
        limit = args.best if name == "best of all windows" else len(images)
        if limit:
            print(row(name, method, images[:limit].to(args.device), truth[:limit]), flush=True)


def known_crops(args):
    """The images of `crop`, (n, C, S, S) in [-1, 1], and their best crops in units (n, 4), as floats."""
    side = args.run.objective.shape[-1]
    if args.on == "scenes":
        images, truth = wide_scenes(range(args.n), side)
    elif args.on == "photographs":
        dataset = args.run.data("test")
        x, _ = dataset.gather(torch.arange(min(args.n, len(dataset))))
        u = torch.rand(len(x), 4, generator=torch.Generator().manual_seed(args.seed))
        images, truth = in_context(x.cpu(), u)
    else:
        if not (args.fcdb and args.photos):
            raise ValueError("--on fcdb needs its list, --fcdb LIST.json, and its photographs, --photos FOLDER")
        images, truth = [], []
        for path, box, _ in read_fcdb(args.fcdb, args.photos)[:args.n]:
            picture = open_photograph(path)
            images.append(pixels_of(picture, side))
            truth.append([GRID * value / length for value, length in zip(box, 2 * picture.size)])
        images, truth = torch.stack(images), torch.tensor(truth)
    return images, truth.double()


def ways_to_crop(objective, seed):
    """{name: crop(image (1, C, H, W)) -> (box in units (4,), windows that were scored)}"""
    generator = torch.Generator().manual_seed(seed)
    ranking, windows = objective.ranking, sliding_windows()
    every = all_windows(*objective.shape[1:])

    def agent(image):
        path = objective.path(image)
        return path[-1, 0], len(path) + 1

    def greedy(image):
        path = list(climb(ranking.look_at(image), 1, device=image.device))
        return path[-1][0], (len(MOVES) - 1) * len(path) + 1

    def sliding(image):
        return best_of(ranking.look_at(image), 1, windows.to(image.device))[0], len(windows)

    def best(image):
        return best_of(ranking.look_at(image), 1, every.to(image.device))[0], len(every)

    def centre(image):
        return torch.tensor([3, 3, 17, 17]), 0

    def at_random(image):
        return every[torch.randint(len(every), (), generator=generator)], 0

    def untouched(image):
        return whole(1)[0], 0

    return {"agent": agent, "sliding windows": sliding, "greedy climbing": greedy, "centre crop (0.7)": centre,
            "random window": at_random, "whole image": untouched, "best of all windows": best}


def row(name, method, images, truth):
    """A line of `crop`'s table."""
    start = time.perf_counter()
    found = [method(image[None]) for image in images]
    milliseconds = (time.perf_counter() - start) / len(images) * 1000
    boxes = torch.stack([box.cpu() for box, _ in found])
    overlap = iou(boxes, truth)
    interval = 1.96 * overlap.std().item() / len(overlap)**0.5
    return (f"{name:20} {overlap.mean():.3f} +- {interval:.3f}   {displacement(boxes, truth, GRID, GRID).mean():.3f}   "
            f"{alpha_recall(overlap):3.0f}%   {sum(count for _, count in found) / len(found):7.1f}   "
            f"{milliseconds:8.1f} ms")


def ranker_flags(p):
    p.add_argument("run", type=Run, help="folder of a run of a ranker")
    p.add_argument("--n", type=int, default=200, metavar="N", help="images (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the crops")
    p.add_argument("--device", default="auto", metavar="NAME", help="cuda, mps, cpu or auto (default: %(default)s)")


@torch.no_grad()
def ranker(args):
    """What a ranker has learned: how often a held-out photograph beats its crops, by their area, and whether more than
    size decides: how often the frame of a wide scene beats windows of the same size, larger and smaller ones."""
    ranking = args.run.objective
    if not isinstance(ranking, Ranking):
        raise ValueError(f"{args.run.folder} is no run of a ranker")
    generator = torch.Generator().manual_seed(args.seed)
    dataset = args.run.data("test")
    x, _ = dataset.gather(torch.arange(min(args.n, len(dataset))))
    full = ranking.look_at(x)(whole(len(x), x.device)[:, None])[1]
    print(f"{len(x)} held-out photographs above 4 crops each, by the crop's area")
    for low, high in ((0.05, 0.1), (0.1, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 0.95)):
        boxes = random_boxes(torch.rand(len(x), 4, 4, generator=generator), low, high, *x.shape[-2:]).to(x.device)
        print(f"  {low:4.0%} to {high:4.0%}   {(ranking.look(x, boxes)[1] < full).float().mean():.3f}")
    images, frames = wide_scenes(range(args.n), ranking.shape[-1])
    look = ranking.look_at(images.to(x.device))
    best = look(frames[:, None].to(x.device))[1]
    print(f"the best crop of {args.n} wide scenes above other windows of them")
    for name, others in other_windows(frames, generator).items():
        print(f"  {name:36}   {(look(others.to(x.device))[1] < best).float().mean():.3f}")


def other_windows(frames, generator, k=8):
    """{what they are: windows in units (n, k, 4)} beside the frames (n, 4) of wide scenes."""
    n, sides = len(frames), frames[:, None, 2:] - frames[:, None, :2]
    u = torch.rand(n, k, 4, generator=generator)
    corner = ((GRID + 1 - sides) * u[..., :2]).long()
    room = torch.cat([frames[:, :2], frames[:, 2:] - GRID], 1)[:, None]          # to the image's border
    outward = frames[:, None] - (room * (0.3 + 0.7 * u)).round().long()
    inward = frames[:, None] + ((0.1 + 0.2 * u) * torch.cat([sides, -sides], -1)).round().long()
    return {"of the same size, anywhere": torch.cat([corner, corner + sides], -1), "larger, around it": outward,
            "smaller, inside it": inward}


# ---- the registry ----------------------------------------------------------------------------------------------------


def shape_of(image_size, in_channels):
    """(3, S, S) of square colour images of at least 32 pixels a side; ValueError for others."""
    H, W = pair(image_size)
    if H != W or H < 32 or in_channels != 3:
        raise ValueError(f"image_size is {image_size}, of {in_channels} channels: cropping learns from squares of at "
                         "least 32 pixels in colour, such as --data folder:size=128")
    return 3, H, W


def vfn_nano(image_size, in_channels, window: int = 64, width: int = 24, embedding: int = 128, pairs: int = 4,
             smallest: float = 0.05, objective: str = "hinge", beyond: bool = True):
    """View finding network, small: ranks windows of photographs by their composition, 1702.00503.

    window: the side at which a window is seen; images of twice that keep small crops as sharp as large ones. pairs,
    smallest, objective, beyond: see Ranking.
    """
    shape = shape_of(image_size, in_channels)
    if window % 16:
        raise ValueError(f"window is {window}, and must be a multiple of 16")
    return Ranking(SmallVFN(width, embedding, window, in_channels), shape, pairs, smallest, objective, beyond)


def vfn(image_size, in_channels, spp: bool = False, pooling: str = "max", pairs: int = 14, smallest: float = 0.05,
        objective: str = "hinge"):
    """View finding network: the published ranker of photographs by composition, AlexNet on 227x227 pixels, 1702.00503.

    spp, pooling: see VFN; pairs, smallest, objective: see Ranking.
    """
    shape = shape_of(image_size, in_channels)
    return Ranking(VFN(spp=spp, pooling=pooling, channels=in_channels), shape, pairs, smallest, objective)


def a2rl(image_size, in_channels, ranker: Run = None, hidden: int = 1024, steps: int = 50, form: str = "paper",
         t_max: int = 10, gamma: float = 0.99, aspect: bool = True, recurrent: bool = True, context: bool = True,
         beta: float = 0.05, standardise: bool = False):
    """A2-RL: a recurrent agent that crops by moves, rewarded by a ranker (ranker=RUN, of vfn or vfn-nano), 1709.04595.

    hidden: width of its layers and its LSTM; steps: moves at most; the others: see Cropping and Agent.
    """
    if not isinstance(ranker, Ranking):
        raise ValueError("the cropping agent is rewarded by a trained ranker: --model a2rl-nano:ranker=RUN, a run of "
                         "vfn-nano or vfn")
    if form not in ("paper", "gain", "code"):
        raise ValueError(f"form {form!r}: choose paper, gain or code")
    shape = shape_of(image_size, in_channels)
    return Cropping(ranker, Agent(2 * ranker.ranker.embedding, hidden, recurrent, standardise), shape, steps, form,
                    t_max, gamma, aspect, context, beta)


a2rl_nano = functools.partial(a2rl, hidden=128, steps=15, form="gain", t_max=5, gamma=0.9, beta=0.04,
                              standardise=True)

AGENTS = {"vfn": vfn, "vfn-nano": vfn_nano, "a2rl": a2rl, "a2rl-nano": a2rl_nano}
