"""Cropping a photograph by moves: a recurrent agent starts from the whole image and shrinks, shifts or stretches a window
until it says stop. It is rewarded whenever an aesthetic ranker, which learned from photographs alone, likes the new
window better than the old.

A2-RL: Aesthetics Aware Reinforcement Learning for Image Cropping, 1709.04595. The ranker is the View Finding Network of
Learning to Compose with Professional Photographs on the Web, 1702.00503. Boundary displacement and lists of human crops
as in Quantitative Analysis of Automatic Image Cropping Algorithms, 1701.01480 (FCDB).

A box is (x0, y0, x1, y1) in whole twentieths of the image's width and height, the end excluded. Letters: B images, K boxes
of each, T steps, D features of a window.

Contents: boxes and moves; the ranker (networks, training); rewards; the agent (network, episodes, losses, training);
scenes with a known best crop; baselines and measures; files; the registry.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

import data
import figures
from house_tmp import Run, count
from layers import pair

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
    """Boxes in units (..., 4) -> in pixels, int64, rounded down as published: int(x / 20 * width)."""
    sides = torch.tensor([width, height, width, height], device=boxes.device)
    return (boxes.double() / GRID * sides).long()


def crop_resize(images, boxes, size, border="edge", dense=1):
    """Windows of images as squares: images (B, C, H, W), boxes in pixels (B, K, 4) -> (B, K, C, size, size).

    Bilinear with half-pixel centres. border: what lies outside the outermost pixel centres of a window, its own edge or
    "zero", with which the published code (scikit-image of 2017, mode "constant") blends the borders of enlarged crops.
    dense: sample so many times finer and average, against aliasing in large windows.
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
    crops = F.grid_sample(images, grid.reshape(B, K * S, S, 2), align_corners=False)     # (B, C, K S, S)
    crops = crops.unflatten(2, (K, S)).transpose(1, 2)
    if border == "zero":
        crops = crops * (down[..., None] * across[:, :, None])[:, :, None]
    return F.avg_pool2d(crops.flatten(0, 1), dense).unflatten(0, (B, K)) if dense > 1 else crops


# ---- the ranker: networks --------------------------------------------------------------------------------------------


def same_padded(x, kernel, stride):
    """Zeros around x so that a convolution gives ceil(side / stride), as TensorFlow's SAME does: an odd one at the end."""
    pads = [max((math.ceil(side / stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:]]
    return F.pad(x, (pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2))


class VFN(nn.Module):
    """The View Finding Network: images (B, 3, S, S) in [-0.5, 0.5] -> features (B, embedding); `score` ranks them.

    AlexNet's convolutions with SAME padding, normalised before they are pooled; fc6 reads the last map in the order
    height, width, channel. spp: three poolings of it side by side, 3x3/2, 7x7/6, 5x5/4. pooling: "max" or "avg".
    """

    input_scale, border, dense = 0.5, "zero", 1      # of images in [-1, 1]; see `crop_resize`

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
    """A ranker of the same plan for windows of 64x64: four convolutions of stride 2, fc6, score. It samples windows four
    times finer than it reads them, so that a large window is not known by its aliasing, nor a small one by a border."""

    input_scale, border, dense = 1.0, "edge", 2

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


class Ranking(nn.Module):
    """Learns to rank: a photograph, taken to be composed well, above any random crop of itself.

    network: images -> features, and its `score`. pairs: crops of each photograph in a step. smallest: the least area of
    a crop; one that saw only large crops is fooled by windows without a subject. objective: "hinge" or "ranknet".
    """

    num_classes, options = 0, {"steps": 50}

    def __init__(self, network, shape, pairs=4, smallest=0.05, objective="hinge"):
        super().__init__()
        self.ranker, self.shape, self.pairs, self.smallest = network, shape, pairs, smallest
        self.objective = {"hinge": hinge, "ranknet": ranknet}[objective]

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
        photo = torch.tensor([0.0, 0.0, W, H], device=x.device).expand(len(x), 1, 4)
        scores = self.look(x, torch.cat([photo, crops], 1))[1]                          # (B, 1 + pairs)
        return {"loss": self.objective(scores[:, 1:], scores[:, :1]),
                "accuracy": (scores[:, 1:] < scores[:, :1]).float().mean()}

    forward = loss
    def conditions(self, n):
        return torch.arange(n)                       # of held-out scenes

    @torch.no_grad()
    def trajectory(self, noise, conditions, steps=50):
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


def code_reward(before, after, boxes, t, done, aspect=True):
    """That of the public training code: a tie counts as worse, and the move that ends the episode (done) earns 0."""
    reward = torch.where(after > before, 1.0, -1.0) - 0.001 * (t + 1) - 5.0 * (odd_shape(boxes) & aspect)
    return torch.where(done, 0.0, reward)


# ---- the agent: network ----------------------------------------------------------------------------------------------


class Agent(nn.Module):
    """Observations (B, 2D), features of the whole image and of the window -> (logits (B, 14), value (B,), state).

    Three linear layers, an LSTM cell that remembers the moves so far, an actor and a critic on its output. recurrent
    False leaves the LSTM out (the paper's ablation). State: (h, c), each (B, hidden).
    """

    def __init__(self, observation=2000, hidden=1024, recurrent=True):
        super().__init__()
        self.hidden = hidden
        self.fc1 = nn.Linear(observation, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, hidden)
        self.lstm = nn.LSTMCell(hidden, hidden) if recurrent else None
        self.action_fc = nn.Linear(hidden, len(MOVES))
        self.critic = nn.Linear(hidden, 1)
        for name, p in self.named_parameters():      # as in the public training code
            nn.init.xavier_uniform_(p) if p.ndim == 2 else nn.init.zeros_(p)

    def start(self, n, device):
        return torch.zeros(n, self.hidden, device=device), torch.zeros(n, self.hidden, device=device)

    def forward(self, observation, state):
        x = F.relu(self.fc3(F.relu(self.fc2(F.relu(self.fc1(observation))))))
        if self.lstm is not None:
            state = self.lstm(x, state)
            x = state[0]
        return self.action_fc(x), self.critic(x)[:, 0], state


# ---- the agent: episodes ---------------------------------------------------------------------------------------------


@dataclass
class Episodes:
    """B episodes of at most T moves, time first. mask: 1 for moves that were made, before them zero-padding has no part;
    last: what the critic expects after T moves (B,), 0 where the episode ended; hs, cs: the LSTM's state before each."""

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
    (height, width) of the images. uniform: numbers in [0, 1), (n, steps), that choose the actions; None: the likeliest action.
    form: "paper" or "code", for the reward; as in the code, "code" puts the critic's value in place of the last reward of
    an episode that reached `steps` without an end.
    """
    device = next(agent.parameters()).device
    boxes, done = whole(n, device), torch.zeros(n, dtype=torch.bool, device=device)
    feature, score = (found[:, 0] for found in look(boxes[:, None]))
    whole_image, state, made = feature, agent.start(n, device), []
    for t in range(steps):
        if done.all():
            break
        mask, observation = ~done, torch.cat([whole_image, feature], 1)
        before, (logits, value, after) = state, agent(observation, state)
        action = chosen(logits, None if uniform is None else uniform[:, t])
        boxes, done = act(boxes, done, action)
        old, (feature, score) = score, (found[:, 0] for found in look(boxes[:, None]))
        shape = pixels(boxes, *sides)
        if form == "paper":
            reward = paper_reward(old, score, shape, t, aspect)
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
    below = logits.double().softmax(1).cumsum(1) <= uniform.double()[:, None]
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


def a3c_loss(values, logits, actions, rewards, mask, last, t_max=10, gamma=0.99, beta=0.05):
    """That of the paper: R_t = sum_i gamma^i r_{t+i} + gamma^k V(s_{t+k}) to the end of its t_max moves; log pi (R - V),
    the entropy times beta, 1/2 (R - V)^2. Sums over the moves of an episode, mean over episodes.

    The paper's workers update after every t_max moves (A3C, 1602.01783); here all episodes run to their end first, and
    their gradients are added in one update."""
    expected = torch.cat([values.detach() * mask, last[None]])        # 0 after the end of an episode
    returns = torch.zeros_like(rewards)
    for t in reversed(range(len(rewards))):
        following = expected[t + 1] if (t + 1) % t_max == 0 or t + 1 == len(rewards) else returns[t + 1]
        returns[t] = (rewards[t] + gamma * following) * mask[t]
    log_p = logits.log_softmax(2)
    advantage = returns - values.detach()
    policy = -(log_p.gather(2, actions[..., None])[..., 0] * advantage * mask).sum(0).mean()
    value = 0.5 * ((returns - values)**2 * mask).sum(0).mean()
    neg_entropy = ((log_p * log_p.exp()).sum(2) * mask).sum(0).mean()
    return {"loss": policy + value + beta * neg_entropy, "policy": policy, "value": value, "neg_entropy": neg_entropy,
            "returns": returns}


# ---- the agent: training ---------------------------------------------------------------------------------------------


class Cropping(nn.Module):
    """Trains an agent against a frozen ranker, an update per batch of episodes, and crops with it.

    form: "paper" (its reward, returns over t_max moves, entropy weight 0.05) or "code" (those of the public training
    code). aspect: punish odd shapes. context: crop photographs that were pasted into a larger surrounding, since the
    ranker was taught that a photograph as it is cannot be improved.
    """

    num_classes, options = 0, {"steps": 50, "sampled": False}

    def __init__(self, ranking, agent, shape, steps=50, form="paper", t_max=10, aspect=True, context=True):
        super().__init__()
        self.__dict__["ranking"] = ranking           # frozen, and no part of the state
        self.agent, self.shape, self.steps = agent, shape, steps
        self.form, self.t_max, self.aspect, self.context = form, t_max, aspect, context

    def loss(self, batch):
        x, noise = batch["x"], batch["noise"]
        if self.context:
            x, _ = in_context(x, noise.uniform(4))
        e = episodes(self.agent, self.ranking.look_at(x), len(x), x.shape[-2:], self.steps, noise.uniform(self.steps),
                     self.form, self.aspect)
        if self.form == "paper":
            values, logits = replay(self.agent, e, memory=self.t_max)
            losses = a3c_loss(values, logits, e.actions, e.rewards, e.mask, e.last, self.t_max)
        else:
            losses = a2c_loss(*replay(self.agent, e), e.actions, e.rewards, e.mask)
        told = {name: losses[name] for name in ("loss", "policy", "value", "neg_entropy")}
        return told | {"reward": (e.rewards * e.mask).sum(0).mean(), "moves": e.mask.sum(0).mean()}

    forward = loss

    def path(self, images, steps=None, uniform=None):
        """The boxes of each image (B, C, H, W) after each move, in units (T, B, 4): by the likeliest actions, or by those
        that uniform (B, steps) picks, as the published code draws them."""
        look = self.ranking.look_at(images)
        return episodes(self.agent, look, len(images), images.shape[-2:], steps or self.steps, uniform).boxes

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
                              self.agent.start(1, "meta"))
        return weights, macs + count(self.ranking.ranker, torch.empty(1, self.shape[0], S, S, device="meta"))[1]


def in_context(photos, u):
    """Photographs (B, C, H, W) as part of larger images: each, squeezed into a frame of 7 to 14 twentieths of either side,
    lies on a strongly blurred copy of itself that fills the image. u: numbers in [0, 1), (B, 4). Returns (images of the
    same size, frames in units (B, 4))."""
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

    Its subject, one of data.SHAPES, is centred, or looks to a side (a bright dot) and then stands on the opposite third;
    it fills two fifths of the frame's height and width, whatever their ratio, on a textured ground. So in the frame, and
    in no other window, the composition is right. Not wide: the frame is the image. wide: the same ground goes on beyond
    the frame, which is 7 to 14 twentieths of each side, anywhere.
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


HELD_OUT = 1_000_000


def scenes(data_dir, split, *, size: int = 128, flip: bool = False, wide: bool = False):
    """Drawn here, no download: a subject composed on a textured ground, 4,096 train + 512 test. wide: within a larger
    surrounding, for the cropping agent."""
    numbers = range(4096) if split == "train" else range(HELD_OUT, HELD_OUT + 512)
    images = torch.stack([scene(k, size, wide)[0] for k in tqdm(numbers, desc="drawing scenes", delay=2, leave=False)])
    return data.Dataset(images, torch.zeros(len(images), dtype=torch.long), [], None, flip)


# ---- other ways to crop ------------------------------------------------------------------------------------------------


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
    """140 windows of the image's own ratio (FCDB's lists have 137 an image): sides of 0.4 to 1 in steps of 0.1, places in
    steps of 0.1."""
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
