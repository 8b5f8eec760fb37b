"""Plug and play generative networks: images by a walk in the code space of a generator, steered by any network that can
say what an image shows.

Plug & Play Generative Networks: Conditional Iterative Generation of Images in Latent Space, 1612.00005.

A frozen encoder E (a classifier, up to its layer fc6) turns an image x into a code h; a generator G, trained once,
turns the code back into an image; a condition network C gives p(y | x). Equation 11 of the paper is one step of the
walk:

    h  <-  h  +  epsilon1 d log p(h)/dh  +  epsilon2 d log p(y | G(h))/dh  +  N(0, epsilon3^2)

The prior's gradient is R(h) - h of a denoising autoencoder R; in Joint PPGN-h, R(h) = E(G(h)). Letters: x image
(B, C, H, W), h code (B, D), h1 the last feature map of E, z logits, y the wanted class, unit or caption.

Contents: networks (classifiers, generator, discriminator, autoencoders); conditions; priors; the chain; what is trained
(encoder, captioner, generator); how samples are judged; the registry.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import data
import guides
from layers import count, detached, pair
from runs import Run

# ---- networks ----------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> class logits (B, K). Up to fc6 it is the encoder E, as a whole the condition C.

    layers: modules by name, in their order. "fc6" gives the code h after its ReLU, and the layer before it h1.
    """

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.names = list(self.layers)

    def activations(self, x, last=None):
        """The output of every layer by name, up to the layer `last` (None: all)."""
        seen = {}
        for name, layer in self.layers.items():
            x = seen[name] = layer(x)
            if name == last:
                break
        return seen

    def map(self, x):
        """Images -> h1 (B, C1, H1, W1), the feature map that fc6 reads."""
        return list(self.activations(x, self.names[self.names.index("fc6") - 1]).values())[-1]

    def encode(self, x):
        """Images -> (h1, h), h >= 0 of shape (B, D)."""
        h1 = self.map(x)
        return h1, self.layers["fc6"](h1)

    def forward(self, x):
        return self.activations(x)[self.names[-1]]


def small_cnn(image_size, in_channels, num_classes, width=32, code=128, drop=0.3):
    """A classifier for squares of image_size = 8, 16, 32, ... pixels: convolutions conv1, conv2, ... of stride 2 down
    to 4x4, fc6 (the code), fc8 (the logits)."""
    layers, channels, side = {}, in_channels, image_size
    while side > 4:
        k = len(layers)
        layers[f"conv{k + 1}"] = nn.Sequential(nn.Conv2d(channels, width * min(2**k, 4), 3, 2, 1), nn.ReLU())
        channels, side = width * min(2**k, 4), side // 2
    layers["fc6"] = nn.Sequential(nn.Flatten(), nn.Linear(channels * 16, code), nn.ReLU())
    layers["drop6"] = nn.Dropout(drop)
    layers["fc8"] = nn.Linear(code, num_classes)
    return Classifier(layers)


def caffenet(num_classes, in_channels=3):
    """The paper's E and C for images of 227x227: CaffeNet, an AlexNet that pools before it normalises."""

    def conv(channels, out, kernel, stride=1, padding=0, groups=1):
        return nn.Sequential(nn.Conv2d(channels, out, kernel, stride, padding, groups=groups), nn.ReLU())

    return Classifier({
        "conv1": conv(in_channels, 96, 11, stride=4),                              # (B, 96, 55, 55)
        "norm1": nn.Sequential(nn.MaxPool2d(3, 2), nn.LocalResponseNorm(5)),       # (B, 96, 27, 27)
        "conv2": conv(96, 256, 5, padding=2, groups=2),
        "norm2": nn.Sequential(nn.MaxPool2d(3, 2), nn.LocalResponseNorm(5)),       # (B, 256, 13, 13)
        "conv3": conv(256, 384, 3, padding=1),
        "conv4": conv(384, 384, 3, padding=1, groups=2),
        "conv5": conv(384, 256, 3, padding=1, groups=2),
        "pool5": nn.MaxPool2d(3, 2),                                               # (B, 256, 6, 6), the paper's h1
        "fc6": nn.Sequential(nn.Flatten(), nn.Linear(9216, 4096), nn.ReLU()),
        "drop6": nn.Dropout(0.5),
        "fc7": nn.Sequential(nn.Linear(4096, 4096), nn.ReLU()),
        "drop7": nn.Dropout(0.5),
        "fc8": nn.Linear(4096, num_classes)})


UPWARDS = ["deconv5", "conv5_1", "deconv4", "conv4_1", "deconv3", "conv3_1", "deconv2", "deconv1", "deconv0"]


class Generator(nn.Module):
    """G: codes h (B, code) -> images (B, out_channels, S, S), unbounded; S is s0 doubled by every deconv layer.

    The layers of the released generator and their names: three linear ones, then transposed convolutions, 4x4 of stride
    2 (deconv) and 3x3 of stride 1 (conv), with leaky ReLU 0.3 after each but the last. A smaller image has fewer: the
    first len(chans) - 1 of UPWARDS, and deconv0.

    fc: width of the linear layers; chans: channels of the s0 x s0 map, then after each layer but deconv0.
    """

    def __init__(self, code=4096, fc=4096, chans=(256, 256, 512, 256, 256, 128, 128, 64, 32), s0=4, out_channels=3):
        super().__init__()
        self.start = (chans[0], s0, s0)
        self.defc7 = nn.Linear(code, fc)
        self.defc6 = nn.Linear(fc, fc)
        self.defc5 = nn.Linear(fc, chans[0] * s0 * s0)
        self.upwards = UPWARDS[:len(chans) - 1] + ["deconv0"]
        for name, channels, out in zip(self.upwards, chans, (*chans[1:], out_channels), strict=True):
            kernel, stride = (4, 2) if name.startswith("deconv") else (3, 1)
            self.add_module(name, nn.ConvTranspose2d(channels, out, kernel, stride, padding=1))
        self.initialise()

    def initialise(self):
        """Activations keep their variance through the leaky ReLUs. The prototxt gives the biases of transposed
        convolutions a learning rate of 0, so they stay 0."""
        for layer in self.children():
            inputs = layer.weight[0].numel()
            if isinstance(layer, nn.ConvTranspose2d):           # of k x k taps, one in stride^2 meets a given pixel
                inputs = layer.in_channels * layer.kernel_size[0]**2 / layer.stride[0]**2
                layer.bias.requires_grad_(False)
            nn.init.normal_(layer.weight, std=(2 / (1 + 0.3**2) / inputs)**0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, h):
        for layer in (self.defc7, self.defc6, self.defc5):
            h = F.leaky_relu(layer(h), 0.3)
        x = h.unflatten(1, self.start)                          # (B, chans[0], s0, s0)
        for name in self.upwards[:-1]:
            x = F.leaky_relu(self.get_submodule(name)(x), 0.3)
        return self.deconv0(x)


def small_generator(image_size, out_channels, code, width=32):
    """A Generator of the released pattern for image_size = 8, 16, 32, ... up to 256 pixels."""
    layers = {1: 1, 2: 3, 3: 5, 4: 7, 5: 8, 6: 9}[(image_size // 4).bit_length() - 1]      # by number of doublings
    widths = [4 * width, 4 * width, 4 * width, 2 * width, 2 * width, width, width, width, width]
    return Generator(code, 8 * width, widths[:layers], 4, out_channels)


class Discriminator(nn.Module):
    """D: images (B, C, H, W), and optionally the codes h (B, D) that they belong to -> logits (B, 2): generated, real.

    The form of DeePSiM (Generating Images with Perceptual Similarity Metrics based on Deep Networks, 1602.02644), on
    which the paper builds: convolutions and an average; the code passes a layer of its own and joins before the last
    two.
    """

    def __init__(self, in_channels, width=32, code=0):
        super().__init__()
        widths = [in_channels, width, 2 * width, 4 * width, 4 * width]
        layers = []
        for channels, out in zip(widths, widths[1:]):
            layers += [nn.Conv2d(channels, out, 3, 2, 1), nn.LeakyReLU(0.2)]
        self.image = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.code = nn.Sequential(nn.Linear(code, 4 * width), nn.ReLU()) if code else None
        self.head = nn.Sequential(nn.Linear(16 * width + (4 * width if code else 0), 4 * width), nn.ReLU(),
                                  nn.Linear(4 * width, 2))

    def forward(self, x, h):
        features = self.image(x)
        if self.code is not None:
            features = torch.cat([features, self.code(h)], 1)
        return self.head(features)


class CodeAutoencoder(nn.Module):
    """R of PPGN-h: codes (B, D) -> denoised codes (B, D), by seven fully-connected layers. The paper's sizes are
    4096-2048-1024-500-1024-2048-4096; of another code they are the same fractions."""

    def __init__(self, code=4096):
        super().__init__()
        middle = [code // 2, code // 4, max(1, code * 500 // 4096)]
        sizes = [code, code, *middle, *middle[-2::-1], code]
        layers = []
        for size, out in zip(sizes, sizes[1:]):
            layers += [nn.Linear(size, out), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, h):
        return self.layers(h)


class ImageAutoencoder(nn.Module):
    """R of PPGN-x: images -> denoised images. The published code has no PPGN-x; this R reads with layers like the
    encoder's and draws with layers like the generator's, all of them its own."""

    def __init__(self, encoder, generator):
        super().__init__()
        self.encoder, self.generator = encoder, generator

    def forward(self, x):
        return self.generator(self.encoder.encode(x)[1])


# ---- conditions: (image, targets) -> (gradient in the image, probability of the target) ----------------------------


def central(x, size):
    """The central square of `size` pixels (None: all of x), its corner rounded down as published."""
    if size is None:
        return x
    top, left = (x.shape[-2] - size) // 2, (x.shape[-1] - size) // 2
    return x[..., top:top + size, left:left + size]


class UnitCondition:
    """A class, or a hidden unit: p is the softmax of the layer's units, of a feature map's channels at one position.

    layer: a name in network.layers; place: (row, column) in a feature map; size: of the central crop the network sees.
    exact: the gradient of log p_k = z_k - log sum_j exp z_j. Otherwise that of the published code, which keeps the
    target's own logit only: (1 - p_k) dz_k/dx, its factor held constant.
    """

    def __init__(self, network, layer, place=(0, 0), exact=False, size=None):
        self.network, self.layer, self.place, self.exact, self.size = network, layer, place, exact, size

    def __call__(self, image, units):
        image = image.detach().requires_grad_()
        z = self.network.activations(image, self.layer)[self.layer]            # (B, K), or (B, K, H1, W1)
        if z.ndim == 4:
            z = z[:, :, self.place[0], self.place[1]]
        log_p = z.log_softmax(1).gather(1, units[:, None])[:, 0]               # (B,)
        if self.exact:
            objective = log_p
        else:                      # 1 - p as -expm1(log p), which a nearly certain classifier does not round to 0
            objective = -torch.expm1(log_p.detach()) * z.gather(1, units[:, None])[:, 0]
        gradient, = torch.autograd.grad(objective.sum(), image)
        return gradient, log_p.detach().exp()


class CaptionCondition:
    """A caption: p(y | x) = prod_l p(word_l | words before it, x) of a Captioner; the probability told is the mean of
    the words'. exact: the gradient passes through the captioner's memory. Otherwise, as published, each word's log p is
    differentiated with the memory of the words before it held constant.
    """

    def __init__(self, captioner, exact=False, size=None):
        self.captioner, self.exact, self.size = captioner, exact, size

    def __call__(self, image, words):
        image = image.detach().requires_grad_()
        log_p, valid = self.captioner.log_probabilities(image, words, constant_memory=not self.exact)     # (B, L)
        gradient, = torch.autograd.grad((log_p * valid).sum(), image)
        return gradient, ((log_p.exp() * valid).sum(1) / valid.sum(1)).detach()


# ---- priors: (state, see) -> the direction of d log p(h)/dh, without its factor 1/sigma^2 ---------------------------
# see(size) is the image that the state stands for as a network of that input size sees it.


def no_prior(h, see):
    """DGN-AM: every code is as likely as any other."""
    return torch.zeros_like(h)


def denoising_prior(autoencoder):
    """PPGN-x and PPGN-h: R(h) - h. What Regularized Auto-Encoders Learn from the Data-Generating Distribution,
    1211.4246."""

    def prior(h, see):
        return autoencoder(h) - h

    return prior


def joint_prior(encoder, size=None):
    """Joint PPGN-h, noiseless or not: E(G(h)) - h. The generator and the encoder together are the autoencoder of h."""

    def prior(h, see):
        return encoder.encode(see(size))[1] - h

    return prior


# ---- the chain -----------------------------------------------------------------------------------------------------


@dataclass
class Inpainting:
    """What is known of the images: image (B, C, H, W), mask 1 in the hole and 0 elsewhere, of a shape that broadcasts;
    H, W are those the condition network sees."""

    image: torch.Tensor
    mask: torch.Tensor

    def complete(self, x):
        """x in the hole, the known image around it."""
        return x * self.mask + self.image * (1 - self.mask)


@dataclass
class Step:
    """One iteration: `code` before and `next` after it; `drawn` G(code); `image` what the condition network saw of it
    (the crop; in inpainting the known pixels around the hole), `probability` (B,) what it said; the directions of
    equation 11 before their weights, and the condition's in the image."""

    code: torch.Tensor
    drawn: torch.Tensor
    image: torch.Tensor
    probability: torch.Tensor
    d_prior: torch.Tensor
    d_condition: torch.Tensor
    d_context: torch.Tensor | float
    d_image: torch.Tensor
    next: torch.Tensor


def chain(h, generator, prior, condition, targets, noise, steps=200, lr=1.0, lr_end=None, epsilon=(1e-5, 1.0, 1e-17),
          epsilon4=0.0, normalize=True, limits=(0.0, 30.0), inpainting=None, restart=False,
          reset_every=0) -> Iterator[Step]:
    """MALA-approx (section 2 of the paper, and its published code): yields a Step per iteration.

    h           the state at the start: codes (B, D); with generator = nn.Identity() images (PPGN-x)
    targets     conditions one after the other, each (B, ...): the first is held for steps + 1 iterations as published,
                each further one for steps
    noise       noise(shape) -> standard normal
    lr, lr_end  the mean absolute change of h in an iteration, on a line from lr to lr_end over `steps`. As published
                the line goes on for the second target, where lr_end < lr makes it negative; restart: it begins anew
    epsilon     weights of the prior, the condition and the noise; epsilon4 of the known pixels when inpainting
    normalize   rescale the sum of all terms, the noise included, to lr: then only the weights' ratios matter. False:
                the paper's plain sum, in which lr has no part
    limits      the state is clipped to them (codes follow a ReLU)
    reset_every as published, every so many iterations the code starts from N(0, 1) and epsilon1 from U(1e-6, 1e-2)
    """
    if steps < 1 or len(epsilon) != 3:
        raise ValueError(f"ppgn_steps is {steps} and epsilon {epsilon}: at least one step is wanted, and three weights,"
                         " of the prior, the condition and the noise")
    lr_end = lr if lr_end is None else lr_end
    epsilon1, epsilon2, epsilon3 = epsilon
    for i in range(steps * len(targets) + 1):
        turn = max(i - 1, 0) // steps
        with torch.enable_grad():                               # of G in h; nothing else is kept
            start = h.detach().requires_grad_()
            x = generator(start)
        step = directions(start, x, prior, condition, targets[turn], inpainting)
        d = epsilon1 * step.d_prior + epsilon2 * step.d_condition + epsilon4 * step.d_context
        if epsilon3 > 0:
            d = d + epsilon3 * noise(h.shape)
        if normalize:
            mean = d.abs().flatten(1).mean(1).view(-1, *[1] * (d.ndim - 1))
            place = i - turn * steps if restart else i
            # A saturated classifier without noise or prior leaves no direction to go: the published code divides by 0.
            d = torch.where(mean > 0, (lr + (lr_end - lr) * place / steps) * d / mean, 0)
        h = (step.code + d).clamp(*limits)
        if reset_every > 0 and i > 0 and i % reset_every == 0:
            h = noise(h.shape)
            uniform = 0.5 * (1 + torch.erf(noise((len(h), *[1] * (h.ndim - 1))) / 2**0.5))     # the normal's own law
            epsilon1 = 1e-6 + (1e-2 - 1e-6) * uniform
        step.next = h
        yield step


def directions(h, x, prior, condition, target, inpainting):
    """The three directions at h, with x = G(h) still attached to it, as a Step whose `next` is not yet known."""
    with torch.no_grad():
        def see(size):
            seen = central(x, size)
            return seen if inpainting is None else inpainting.complete(seen)

        d_prior = prior(h, see)
        image = see(condition.size)
    with torch.enable_grad():
        d_image, probability = condition(image, target)

    def to_code(gradient, keep):                                # G's Jacobian, transposed; zero outside the crop
        whole = torch.zeros_like(x)
        central(whole, condition.size).copy_(gradient)
        return torch.autograd.grad(x, h, whole, retain_graph=keep)[0]

    d_context = 0.0
    if inpainting is not None:
        # of -1/2 ||x - image||^2 outside the hole
        d_context = to_code((inpainting.image - central(x.detach(), condition.size)) * (1 - inpainting.mask), True)
    inside = d_image if inpainting is None else d_image * inpainting.mask
    d_condition = to_code(inside, False)
    h = h.detach()
    return Step(h, x.detach(), image, probability, d_prior, d_condition, d_context, d_image, h)


# ---- what is trained: the encoder ----------------------------------------------------------------------------------


class Encoding(nn.Module):
    """The first of the two runs: a classifier learns its classes (cross-entropy). It draws what it alone takes for a
    class: its gradient followed in the pixels (Deep Inside Convolutional Networks, 1312.6034), where the paper starts.
    """

    options = {"ppgn_steps": 200, "step_size": 0.02, "step_end": 0.02, "exact": True, "neuron": "", "then": ""}

    def __init__(self, network, shape, code, num_classes, classes=()):
        super().__init__()
        self.network, self.shape, self.code = network, shape, code
        self.num_classes, self.classes = num_classes, list(classes)

    def loss(self, batch):
        logits = self.network(batch["x"])
        return {"loss": F.cross_entropy(logits, batch["y"]),
                "accuracy": (logits.detach().argmax(1) == batch["y"]).float().mean()}

    forward = loss

    def conditions(self, n):
        return torch.arange(n) % self.num_classes

    def condition(self, conditions, exact=False, neuron="", then=""):
        """Labels (n,) and drawing options -> (condition, its targets one after the other): the class, then further ones
        (names, separated by commas), or instead a hidden unit."""
        size = self.shape[-1]
        if neuron:
            layer, unit, place = find_unit(self.network, neuron, self.shape)
            targets = [torch.full((len(conditions),), unit, device=conditions.device)]
            return UnitCondition(self.network, layer, place, exact, size), targets
        further = [class_number(name.strip(), self.classes, self.num_classes) for name in then.split(",") if name]
        targets = [conditions] + [torch.full_like(conditions, k) for k in further]
        return UnitCondition(self.network, self.network.names[-1], exact=exact, size=size), targets

    def trajectory(self, noise, conditions, **options):
        yield from pixel_walk(self, noise, conditions, **self.options | options)

    def cost(self):
        return count(self.network, torch.empty(1, *self.shape, device="meta"))


def pixel_walk(objective, noise, conditions, ppgn_steps, step_size, step_end, **options):
    """What a condition network alone takes for the condition: from grey noise, along its gradient in the pixels."""
    condition, targets = objective.condition(conditions, **options)
    start = 0.2 * noise((len(noise), *objective.shape))
    for step in chain(start, nn.Identity(), no_prior, condition, targets, noise, ppgn_steps, step_size, step_end,
                      epsilon=(0.0, 1.0, 0.0), limits=(-1.0, 1.0), restart=True):
        yield step.drawn


def class_number(name, classes, num_classes):
    """The number of a class given by its name or number."""
    if name in classes:
        return classes.index(name)
    if name.isdigit() and int(name) < num_classes:
        return int(name)
    raise ValueError(f"there is no class {name!r}: name one of {', '.join(classes[:20]) or f'0 to {num_classes - 1}'}")


def find_unit(network, text, shape):
    """A hidden unit as it is written, LAYER:UNIT or LAYER:UNIT:ROW:COLUMN -> (layer, unit, (row, column)); without a
    position the middle of the feature map. shape: (C, H, W) of an image."""
    layer, *numbers = text.split(":")
    if layer not in network.names:
        raise ValueError(f"neuron {text}: there is no layer {layer!r}, only {', '.join(network.names)}")
    with torch.no_grad():
        image = torch.zeros(1, *shape, device=next(network.parameters()).device)
        sides = network.activations(image, layer)[layer].shape[1:]              # (K,), or (K, H1, W1)
    if len(numbers) not in (1, len(sides)) or not all(number.isdigit() for number in numbers):
        raise ValueError(f"neuron {text}: write LAYER:UNIT, or for a feature map LAYER:UNIT:ROW:COLUMN")
    unit, *place = map(int, numbers)
    place = place or [side // 2 for side in sides[1:]]
    if any(k >= side for k, side in zip((unit, *place), sides)):
        raise ValueError(f"neuron {text}: {layer} has {'x'.join(map(str, sides))} of them, counted from 0")
    return layer, unit, tuple(place)


# ---- what is trained: the captioner ---------------------------------------------------------------------------------


class Captioner(nn.Module):
    """p(word_l | the words before it, image): an LSTM that reads the word before and the logits of a classifier (LRCN,
    1411.4389, on fc8 as in the paper). Here a word is a byte of the caption; 0 ends it."""

    options = {"ppgn_steps": 200, "step_size": 0.02, "step_end": 0.02, "exact": True, "caption": ""}

    def __init__(self, encoding, width=128, length=64):
        super().__init__()
        self.__dict__["encoding"] = encoding                    # frozen, and no part of the state
        self.shape, self.num_classes, self.text_length = encoding.shape, 0, length
        self.image = nn.Linear(encoding.num_classes, width)
        self.word = nn.Embedding(256, width)
        self.memory = nn.LSTMCell(2 * width, width)
        self.next = nn.Linear(width, 256)
        self.register_buffer("examples", torch.zeros(8, length, dtype=torch.uint8))      # captions seen, for previews

    def log_probabilities(self, x, words, constant_memory=False):
        """Images (B, C, H, W), captions int64 (B, L) as START, bytes, zeros -> (log p (B, L) of what follows each word,
        after the last one of 0, the end; and which of these count: bool (B, L))."""
        image = self.image(self.encoding.network(x))                                           # (B, width)
        following = torch.cat([words[:, 1:], torch.zeros_like(words[:, :1])], 1)               # (B, L)
        h, c, found = torch.zeros_like(image), torch.zeros_like(image), []
        for word, target in zip(words.unbind(1), following.unbind(1)):
            if constant_memory:
                h, c = h.detach(), c.detach()
            h, c = self.memory(torch.cat([self.word(word), image], 1), (h, c))
            found.append(self.next(h).log_softmax(1).gather(1, target[:, None]))
        return torch.cat(found, 1), words > 0                   # what follows a word counts, what follows the end not

    def loss(self, batch):
        """The mean of -log p(caption | image), in nats a caption."""
        if not isinstance(batch["y"], torch.Tensor):
            raise ValueError("a captioner spells captions byte by byte: train it with --text bytes")
        words = batch["y"][:, :self.text_length]
        if batch["step"] == 0:
            self.examples[:len(words), :words.shape[1]] = words[:8]
        log_p, valid = self.log_probabilities(batch["x"], words)
        return {"loss": -(log_p * valid).sum(1).mean()}

    forward = loss

    def conditions(self, n):
        return self.examples[torch.arange(n, device=self.examples.device) % 8].long()

    def condition(self, conditions, exact=False, caption=""):
        """Captions (n, L) and drawing options -> (condition, its one target). caption: in place of them all."""
        if caption:
            words = data.byte_tokens([caption], self.text_length).long().to(conditions.device)
            conditions = words.expand(len(conditions), -1)
        return CaptionCondition(self, exact, self.shape[-1]), [conditions.long()]

    def trajectory(self, noise, conditions, **options):
        yield from pixel_walk(self, noise, conditions, **self.options | options)

    def cost(self):
        """Of one image and a caption of full length."""
        width = self.memory.hidden_size
        image = count(self.encoding.network, torch.empty(1, *self.shape, device="meta"))[1]
        word = count(self.memory, torch.empty(1, 2 * width, device="meta"))[1] + self.next.weight.numel()
        return sum(p.numel() for p in self.parameters()), image + self.image.weight.numel() + self.text_length * word


# ---- what is trained: the generator ---------------------------------------------------------------------------------

# By variant: those that a run of it can draw, since they share what was trained.
DRAWS = {"x": ["x"], "dgn-am": ["dgn-am", "joint-noiseless"], "h": ["h", "dgn-am", "joint-noiseless"],
         "joint": ["joint", "dgn-am"], "joint-noiseless": ["joint-noiseless", "dgn-am"]}
# By variant: weights of the prior, the condition and the noise (equation 11). The released scripts for AlexNet's codes
# have (1e-5, 1, 1e-17) for joint-noiseless; those of a small encoder want more of the prior.
EPSILON = {"x": (1.0, 1.0, 0.0), "dgn-am": (0.0, 1.0, 0.0), "h": (1e-2, 1.0, 1e-2), "joint": (1e-2, 1.0, 1e-2),
           "joint-noiseless": (1e-2, 1.0, 1e-17)}
CLIP = 5.0                           # codes are clipped to this multiple of the mean code, which few exceed


def relative_error(guess, code):
    """||guess - code||^2 / ||code||^2, mean over the batch: codes of small encoders have no scale of their own."""
    return ((guess - code).square().sum(1) / code.square().sum(1).clamp(min=1e-8)).mean()


class PlugAndPlay(nn.Module):
    """The second of the two runs: a generator G learns to undo the frozen encoder E, against a discriminator D, or, for
    PPGN-x and PPGN-h, denoising autoencoders learn images or codes. It draws by the chain.

    variant: "x", "dgn-am", "h", "joint" or "joint-noiseless", section 3 of the paper.
    weights: of the losses of G: squared error of the image, of h1, of the code (joint only), and the adversarial one.
    noise: standard deviation of the noise in training, as a share of the mean activation: on x, h1 and h in the joint
    variant, on the code for R of PPGN-h, on the pixels (then a share of 1) for R of PPGN-x.
    """

    def __init__(self, encoding, condition, shape, generator, discriminator, autoencoder=None,
                 variant="joint-noiseless", weights=(1.0, 1.0, 1.0, 0.01), noise=0.1):
        super().__init__()
        self.__dict__["encoding"], self.__dict__["guide"] = encoding, condition     # frozen, and no part of the state
        self.shape, self.variant, self.weights, self.noise = shape, variant, weights, noise
        self.num_classes = condition.num_classes
        self.generator, self.discriminator, self.autoencoder = generator, discriminator, autoencoder
        if discriminator is not None:
            for p in discriminator.parameters():
                p.rate = 0.1                        # a tenth of G's, without which D wins at this size
        self.register_buffer("code_sum", torch.zeros((), dtype=torch.float64))     # of the codes seen, for their mean
        self.register_buffer("code_count", torch.zeros((), dtype=torch.float64))

    @property
    def options(self):
        own = {"variant": self.variant, "ppgn_steps": 200, "step_size": 0.1, "step_end": 0.01, "epsilon": (),
               "normalize": True, "threshold": 0.0, "context": 1.0}
        return own | {key: value for key, value in self.guide.options.items() if key not in own}

    options_help = {
        "variant": f"one that the run can draw: {', '.join(DRAWS)}",
        "ppgn_steps": "iterations for each class",
        "step_size": "mean absolute change of the code in the first step, as a share of the mean code",
        "step_end": "the same in the last step",
        "epsilon": "the weights of prior, condition and noise, such as 1e-2,1,0 (empty: the variant's own)",
        "normalize": "rescale each step to that size; False: the paper's plain sum",
        "threshold": "show only what the condition network gives at least this probability, else what was before",
        "context": "the weight of the known pixels when a hole is filled",
        "exact": "the exact gradient of log p; False: that of the published code",
        "neuron": "draw what excites a hidden unit, LAYER:UNIT or LAYER:UNIT:ROW:COLUMN",
        "then": "further classes of the same chain, separated by commas",
        "caption": "what to draw, for a run with a captioner"}

    @property
    def scale(self):
        """The mean of a code, over units and images."""
        return (self.code_sum / self.code_count.clamp(min=1)).item() or 1.0

    # -- training

    def loss(self, batch):
        x, noise = batch["x"], batch["noise"]
        if self.variant == "x":
            noisy = x + self.noise * noise.normal(*x.shape[1:])
            return {"loss": F.mse_loss(self.autoencoder(noisy), x)}
        with torch.no_grad():
            code = self.encoding.network.encode(self.seen(x))[1]
            self.code_sum += code.double().mean(1).sum()
            self.code_count += len(code)
            h = self.noisy_code(x, noise) if self.variant == "joint" else code
        losses = self.generator_losses(x, h, code)
        if self.variant == "h":
            level = self.noise * code.mean(1, keepdim=True)
            losses["autoencoder"] = relative_error(self.autoencoder(code + level * noise.normal(code.shape[1])), code)
            losses["loss"] = losses["loss"] + losses["autoencoder"]
        return losses

    forward = loss

    def seen(self, x):
        """The part of an image of G's that E reads."""
        return central(x, self.encoding.shape[-1])

    def noisy_code(self, x, noise):
        """The code of x with noise added to the image, to h1 and to the code (Joint PPGN-h)."""

        def noisy(a):
            level = self.noise * a.abs().flatten(1).mean(1)
            return a + level.view(-1, *[1] * (a.ndim - 1)) * noise.normal(*a.shape[1:])

        network = self.encoding.network
        return noisy(network.layers["fc6"](noisy(network.map(noisy(self.seen(x))))))

    def generator_losses(self, x, h, code):
        """G makes an image of the code h of x; D tells it from x. The balance rule pauses the player who is ahead."""
        made = self.generator(h)
        h1, again = self.encoding.network.encode(self.seen(made))
        with torch.no_grad():
            h1_of_x = self.encoding.network.map(self.seen(x))
        real, fake = self.discriminator(x, h), self.discriminator(made.detach(), h)
        fooled = detached(self.discriminator, made, h)
        is_real = torch.ones(len(x), dtype=torch.long, device=x.device)
        d = F.cross_entropy(real, is_real) + F.cross_entropy(fake, 0 * is_real)
        g = F.cross_entropy(fooled, is_real)                    # -log D(G(h))
        image, feature, joint, adversarial = self.weights
        parts = {"image": F.mse_loss(made, x), "feature": F.mse_loss(h1, h1_of_x)}
        total = image * parts["image"] + feature * parts["feature"] + adversarial * g
        if self.variant == "joint":
            parts["code"] = relative_error(again, code)
            total = total + joint * parts["code"]
        self.balance(d, g)
        return {"loss": total + d, **parts, "g": g, "d": d}

    def balance(self, d, g):
        """With r = loss of D / loss of G: D pauses where r < 0.1, G where r > 10."""
        r = torch.stack([d.detach(), g.detach()])
        if torch.distributed.is_initialized():                  # all processes must agree
            torch.distributed.all_reduce(r)
        r = (r[0] / r[1].clamp(min=1e-12)).item()
        for player, pause in ((self.discriminator, r < 0.1), (self.generator, r > 10)):
            for p in player.parameters():
                p.paused = pause

    # -- drawing

    def conditions(self, n):
        return self.guide.conditions(n)

    def trajectory(self, noise, conditions, **options):
        variant = (self.options | options)["variant"]
        if variant == "x":
            start = 0.2 * noise((len(noise), *self.shape))
        else:
            start = self.scale * noise((len(noise), self.encoding.code))
        threshold, shown = (self.options | options)["threshold"], 0.0
        for step in self.walk(start, noise, conditions, **options):
            passed = (step.probability >= threshold)[:, None, None, None]
            shown = torch.where(passed, step.drawn.clamp(-1, 1), shown)
            yield shown

    def fill(self, noise, x, mask, conditions, **options):
        """Inpainting, from the code of the masked image: x (n, C, H, W), mask (n, H, W) true in the hole. Yields what G
        draws, the hole and its surroundings."""
        hole = mask[:, None].to(x)
        if self.guide.shape != self.encoding.shape:
            raise ValueError("inpainting needs a condition network that reads images of the encoder's size")
        known = Inpainting(self.seen(x * (1 - hole)), self.seen(hole))
        start = known.image
        if (self.options | options)["variant"] != "x":
            start = self.encoding.network.encode(start)[1]
        for step in self.walk(start, noise, conditions, known, **options):
            yield step.drawn.clamp(-1, 1)

    def walk(self, start, noise, conditions, inpainting=None, **options):
        """The chain with the options of a drawing, in units of the mean code."""
        rest = self.options | options
        variant, steps, normalize = rest.pop("variant"), rest.pop("ppgn_steps"), rest.pop("normalize")
        epsilon = rest.pop("epsilon") or EPSILON.get(variant)
        if variant not in DRAWS[self.variant]:
            raise ValueError(f"variant {variant}: this run was trained as {self.variant}, it draws "
                             + " or ".join(DRAWS[self.variant]))
        unit = 1.0 if variant == "x" else self.scale
        lr, lr_end, context = unit * rest.pop("step_size"), unit * rest.pop("step_end"), rest.pop("context")
        del rest["threshold"]
        condition, targets = self.guide.condition(conditions, **rest)
        limits = (-1.0, 1.0) if variant == "x" else (0.0, CLIP * unit)
        generator = nn.Identity() if variant == "x" else self.generator
        yield from chain(start, generator, self.prior(variant), condition, targets, noise, steps, lr, lr_end, epsilon,
                         context, normalize, limits, inpainting, restart=True)

    def prior(self, variant):
        if variant == "dgn-am":
            return no_prior
        if variant in ("x", "h"):
            return denoising_prior(self.autoencoder)
        return joint_prior(self.encoding.network, self.encoding.shape[-1])

    def cost(self):
        if self.variant == "x":
            return count(self.autoencoder, torch.empty(1, *self.shape, device="meta"))
        return count(self.generator, torch.empty(1, self.encoding.code, device="meta"))


# ---- a command of evaluate.py: how samples are judged ----------------------------------------------------------------


def chains_flags(p):
    p.add_argument("run", type=Run, nargs="+", help="folders of runs of generators (ppgn-nano with encoder=)")
    p.add_argument("--judge", type=Run, required=True, metavar="RUN",
                   help="a classifier's run (resnet-nano, or ppgn-nano without encoder=) that took no part in training "
                        "and drawing")
    p.add_argument("--n", type=int, default=20, metavar="N", help="samples of each class (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    p.add_argument("--train", type=int, default=10000, metavar="N",
                   help="training images among which the nearest one is sought (default: %(default)s)")
    p.add_argument("--device", default="auto", metavar="NAME", help="cuda, mps, cpu or auto (default: %(default)s)")


@torch.no_grad()
def chains(args):
    """PPGN's variants in four columns: accuracy by a judge and by its own classifier, diversity, nearest neighbour; and
    how well holes are filled."""
    first = args.run[0]
    for opened in args.run:
        if not isinstance(opened.objective, PlugAndPlay):
            raise ValueError(f"{opened.path} is no run of a generator: name runs of ppgn-nano with encoder=")
    K = first.objective.num_classes
    train, test = first.data("train"), first.data("test")
    near = train.gather(torch.arange(min(args.train, len(train))))[0]
    picked = torch.cat([(test.labels == k).nonzero()[:args.n, 0] for k in range(K)]).cpu()
    x, y = test.gather(picked)
    judge = classifier_in(args.judge, first.config["classes"])
    print(f"{len(y)} samples each; RMS per pixel, images in [-1, 1]\n{'':28}judge   own   diversity   nearest")

    def show(name, images, own):
        print(f"{name:28}" + "   ".join(f"{v:.3f}" for v in judged(images, y, own, judge, near)), flush=True)

    show("held-out images", x, first.objective.encoding.network)
    for opened in args.run:
        objective, own = opened.objective, opened.objective.encoding.network
        if objective.variant != "x":
            again = objective.generator(own.encode(objective.seen(x))[1])
            show(f"G(E(x)) of {objective.variant}", again.clamp(-1, 1), own)
        for variant in [args.draw["variant"]] if "variant" in args.draw else DRAWS[objective.variant]:
            options = args.draw | {"variant": variant}
            drawn = torch.cat(list(opened.images(len(y), args.seed, 100, y, **options)))
            show(f"{variant} (run {objective.variant})", drawn, own)
        if objective.variant != "x":
            show_holes(opened, x[::args.n], y[::args.n], args.seed, args.draw)


def classifier_in(run, classes):
    """The network of a classifier's run: images -> logits of these classes. ValueError if it is none."""
    objective = run.objective
    if isinstance(objective, Encoding):
        network = objective.network
    elif isinstance(objective, guides.Guide) and not objective.dense and objective.process is None:
        network = objective.model
    else:
        raise ValueError(f"--judge {run.path} is no run of a classifier: `--model resnet-nano` makes one")
    if run.config["classes"] != classes:
        raise ValueError(f"--judge {run.path} knows other classes than the generators")
    return network


def show_holes(opened, x, y, seed, options):
    """Print the errors outside and inside a central hole of half the side, by the weight of the known pixels."""
    side, noise = x.shape[-1], lambda shape: torch.zeros(shape, device=x.device)
    hole = torch.zeros(len(x), side, side, dtype=torch.bool, device=x.device)
    hole[:, side // 4:3 * side // 4, side // 4:3 * side // 4] = True
    for context in (0.0, 1.0, 10.0):
        *_, filled = opened.objective.fill(noise, x, hole, y, **options | {"context": context})
        error = (filled - x).square().mean(1)
        print(f"  holes, context {context:g}: RMS outside {error[~hole].mean().sqrt():.3f}, inside "
              f"{error[hole].mean().sqrt():.3f}")


def judged(images, labels, own, judge, train, chunk=200):
    """(accuracy by the judge, by the chain's own classifier; diversity: standard deviation of a pixel within a class;
    RMS distance to the nearest of the training images) of samples (n, C, H, W)."""
    accuracy = [(network(images).argmax(1) == labels).float().mean().item() for network in (judge, own)]
    diversity = torch.stack([images[labels == k].std(0).mean() for k in labels.unique()]).mean().item()
    nearest = torch.cat([torch.cdist(part.flatten(1), train.flatten(1)).amin(1) for part in images.split(chunk)])
    return *accuracy, diversity, (nearest / images[0].numel()**0.5).mean().item()


# ---- the registry ----------------------------------------------------------------------------------------------------


def encoding_of(run, shape):
    """The Encoding of an encoder's run; ValueError if it is something else or made for other images."""
    if not isinstance(run, Encoding):
        raise ValueError("encoder=RUN must name the first of the two runs, a classifier: one of ppgn or ppgn-nano that "
                         "was trained without encoder=")
    if run.shape[0] != shape[0] or run.shape[-1] > shape[-1]:
        raise ValueError(f"encoder=RUN reads images of {'x'.join(map(str, run.shape))}, these are "
                         f"{'x'.join(map(str, shape))}")
    return run


def square(image_size, sides):
    """The side of square images, one of `sides`; ValueError for other images."""
    H, W = pair(image_size)
    if H != W or H not in sides:
        raise ValueError(f"image_size is {image_size}: this network is for squares of {', '.join(map(str, sides))} "
                         "pixels, see --data NAME:size=")
    return H


def check_classes(num_classes):
    if num_classes < 2:
        raise ValueError("PPGN needs images of at least two classes: its encoder is a classifier")


def ppgn_nano(image_size, in_channels, num_classes, classes, encoder: Run = None, condition: Run = None,
              variant: str = "joint-noiseless", width: int = 32, code: int = 256, noise: float = 0.1,
              weights: tuple = (1.0, 1.0, 1.0, 0.01), code_to_d: bool = False):
    """Plug and play generative network, small: a classifier, and in a second run, with encoder=RUN, its generator.

    condition: the run of another classifier, or of a captioner, that says what to draw (None: the encoder's
    classifier). variant, weights, noise: see PlugAndPlay; code_to_d: the discriminator is given the code too.
    1612.00005.
    """
    side = square(image_size, (8, 16, 32, 64, 128, 256))
    shape = (in_channels, side, side)
    if encoder is None:
        check_classes(num_classes)
        return Encoding(small_cnn(side, in_channels, num_classes, width, code), shape, code, num_classes, classes)
    encoding = encoding_of(encoder, shape)
    generator = small_generator(side, in_channels, encoding.code, width)
    reader = small_cnn(side, in_channels, 1, width, encoding.code)
    return plug_and_play(encoding, condition, shape, generator, reader, width, variant, noise, weights, code_to_d)


def ppgn(image_size, in_channels, num_classes, classes, encoder: Run = None, condition: Run = None,
         variant: str = "joint-noiseless", noise: float = 0.1, weights: tuple = (1.0, 0.0144, 1.0, 0.0156),
         code_to_d: bool = False):
    """Plug and play generative network of the paper's size: CaffeNet on 227x227 pixels, and in a second run, with
    encoder=RUN, its generator of 256x256. 1612.00005.

    The weights are DeePSiM's (2e-6, 0.01 and 100 on sums, of pixels in 0 .. 255) as means over images in [-1, 1].
    """
    if encoder is None:
        check_classes(num_classes)
        side = square(image_size, (227,))
        return Encoding(caffenet(num_classes, in_channels), (in_channels, side, side), 4096, num_classes, classes)
    side = square(image_size, (256,))
    shape = (in_channels, side, side)
    encoding = encoding_of(encoder, shape)
    reader = small_cnn(side, in_channels, 1, 64, encoding.code)
    return plug_and_play(encoding, condition, shape, Generator(encoding.code, out_channels=in_channels), reader, 64,
                         variant, noise, weights, code_to_d)


def plug_and_play(encoding, condition, shape, generator, reader, width, variant, noise, weights, code_to_d):
    """The second of the two runs."""
    if variant not in DRAWS:
        raise ValueError(f"variant {variant!r}: choose from {', '.join(DRAWS)}")
    if len(weights) != 4:
        raise ValueError(f"weights {weights}: four are wanted, of image, feature, code and adversarial loss")
    condition = condition or encoding
    if not hasattr(condition, "condition") or condition.shape[-1] > shape[-1]:
        raise ValueError("condition: it must be the run of a classifier or captioner for images of at most this size")
    if variant == "x":
        autoencoder = ImageAutoencoder(reader, generator)
        return PlugAndPlay(encoding, condition, shape, None, None, autoencoder, variant, weights, noise)
    discriminator = Discriminator(shape[0], width, encoding.code if code_to_d else 0)
    autoencoder = CodeAutoencoder(encoding.code) if variant == "h" else None
    return PlugAndPlay(encoding, condition, shape, generator, discriminator, autoencoder, variant, weights, noise)


def captioner_nano(image_size, in_channels, encoder: Run = None, width: int = 128, text_width: int = 256,
                   text_length: int = 64):
    """Captioner, small: an LSTM that spells an image's caption from the logits of a classifier (encoder=RUN),
    1411.4389. It can be the condition of a ppgn-nano."""
    side = square(image_size, (8, 16, 32, 64, 128, 256))
    return Captioner(encoding_of(encoder, (in_channels, side, side)), width, text_length)


GENERATORS = {"ppgn": ppgn, "ppgn-nano": ppgn_nano, "captioner-nano": captioner_nano}
