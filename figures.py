"""Pictures of results, drawn with Pillow: grids of samples, films of a trajectory, curves."""

import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

INK, GREY, PALE = (40, 40, 40), (130, 130, 130), (228, 228, 228)
COLOURS = [(31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 190, 207), (140, 86, 75)]


def to_uint8(x):
    """Images in [-1, 1], (n, C, H, W), to uint8 (n, H, W, 3), rounded as DiT and EDM do. One channel becomes grey; of
    more than three (latents) the first three are drawn, each stretched to its own range: false colour. The frames or
    views of (n, C, F, H, W) lie side by side; a spectrogram (n, bands, T) has its low bands below."""
    if x.ndim == 5:
        x = x.transpose(2, 3).flatten(3)
    elif x.ndim == 3:
        x = x[:, None].flip(2)
    if x.shape[1] > 3:
        low, high = (f(x[:, :3], dim=(0, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
        x = (x[:, :3] - low) / (high - low).clamp(min=1e-8) * 2 - 1
    x = (x.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return np.repeat(x, 3, axis=3) if x.shape[3] == 1 else x


def save(picture, path, **options):
    """Write a PIL picture so that the path never holds half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    picture.save(partial, format={".gif": "GIF", ".webp": "WEBP"}.get(path.suffix.lower(), "PNG"), **options)
    os.replace(partial, path)


def grid(images, columns=None, zoom=None, gap=2):
    """uint8 (n, H, W, 3) -> one PIL picture, row by row; small images are enlarged, unsmoothed, to a shorter side of
    about 64 pixels."""
    n, H, W, _ = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    zoom = zoom or max(1, round(64 / min(H, W)))
    images = images.repeat(zoom, 1).repeat(zoom, 2)
    h, w = H * zoom + gap, W * zoom + gap
    sheet = np.full((math.ceil(n / columns) * h + gap, columns * w + gap, 3), 255, np.uint8)
    for k, image in enumerate(images):
        row, column = divmod(k, columns)
        sheet[row * h + gap:(row + 1) * h, column * w + gap:(column + 1) * w] = image
    return Image.fromarray(sheet)


def columns(conditions):
    """The columns of a grid of images drawn under conditions that come in turn: the length of a turn if it is 2 to 16,
    else None."""
    if conditions is None:
        return None
    rows = getattr(conditions, "tokens", conditions)
    again = [i for i in range(1, len(rows)) if torch.equal(rows[i], rows[0])]
    length = again[0] if again else len(rows)
    return length if 1 < length <= 16 else None


def film(frames, path, milliseconds=80, hold=1500):
    """PIL pictures as an animated .gif or .webp; the last one stays for `hold` milliseconds, then it starts again."""
    durations = [milliseconds] * (len(frames) - 1) + [hold]
    save(frames[0], path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def nice_ticks(low, high, count=5):
    """About `count` round numbers that cover [low, high]."""
    raw = (high - low) / count or 1.0
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * 0.999)
    return [step * k for k in range(math.floor(low / step), math.ceil(high / step) + 1)]


def log_ticks(low, high):
    """1, 2 and 5 times the powers of ten that cover [low, high], low above 0."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**k for k in powers for m in (1, 2, 5)]
    below, above = [t for t in ticks if t <= low * 1.001], [t for t in ticks if t >= high * 0.999]
    return [t for t in ticks if below[-1] <= t <= above[0]]


def running_mean(values):
    """Each value's mean with those before it, a fiftieth of all."""
    width = max(1, len(values) // 50)
    windows = [values[max(0, k - width):k + 1] for k in range(len(values))]
    return [sum(w) / len(w) for w in windows]


def beside(pictures, columns=2):
    """PIL pictures of one size on one sheet, row by row."""
    width, height = pictures[0].size
    columns = min(columns, len(pictures))
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for k, picture in enumerate(pictures):
        sheet.paste(picture, (k % columns * width, k // columns * height))
    return sheet


def curves(series, title="", x_label="", y_label="", size=(800, 460), log=False):
    """Lines {name: (xs, ys)} on one pair of axes, as a PIL picture. A name that starts with "_" is drawn pale and kept
    out of the legend (raw values behind their running mean). log: the ys, all above 0, on a logarithmic axis."""
    font = ImageFont.load_default(14)
    W, H = size
    left, top, right, bottom = 70, 40, W - 20, H - 50
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    named = [v for k, v in series.items() if not k.startswith("_")] or list(series.values())
    xs = [x for v in named for x in v[0]]
    ys = [y for v in named for y in v[1] if math.isfinite(y)] or [0.0]
    x_ticks = nice_ticks(min(xs, default=0), max(xs, default=1))
    y_ticks = log_ticks(min(ys), max(ys)) if log else nice_ticks(min(ys), max(ys))
    scale = math.log10 if log else float
    first, height = scale(y_ticks[0]), scale(y_ticks[-1]) - scale(y_ticks[0]) or 1

    def place(x, y):
        return (left + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0] or 1) * (right - left),
                bottom - (scale(y) - first) / height * (bottom - top))

    for y in y_ticks:
        draw.line([place(x_ticks[0], y), place(x_ticks[-1], y)], PALE)
        draw.text((left - 8, place(x_ticks[0], y)[1]), f"{y:.4g}", GREY, font, anchor="rm")
    for x in x_ticks:
        draw.text((place(x, y_ticks[0])[0], bottom + 8), f"{x:,.6g}", GREY, font, anchor="mt")
    draw.text((W / 2, 12), title, INK, font, anchor="mt")
    draw.text(((left + right) / 2, H - 8), x_label, INK, font, anchor="mb")
    draw.text((8, 14), y_label, INK, font, anchor="lt")
    colours = iter(COLOURS * (len(series) // len(COLOURS) + 1))
    row = 0
    for name, (x_values, y_values) in series.items():
        pale = name.startswith("_")
        colour = (200, 214, 226) if pale else next(colours)
        points = [place(x, min(max(y, y_ticks[0]), y_ticks[-1]))
                  for x, y in zip(x_values, y_values) if math.isfinite(y)]
        draw.line(points, colour, 1 if pale else 2)
        if len(series) > 1 and not pale:
            draw.line([(right - 150, top + 12 + 20 * row), (right - 130, top + 12 + 20 * row)], colour, 3)
            draw.text((right - 122, top + 12 + 20 * row), name, INK, font, anchor="lm")
            row += 1
    return picture


def heat_maps(matrices, names, title="", columns=6, size=(150, 260)):
    """Matrices, each scaled to its own range, as panels of one picture: dark is the least, yellow the most. Rows of a
    matrix go down, its columns across."""
    font, stops = ImageFont.load_default(14), np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98),
                                                        (253, 231, 37)], np.float64)
    w, h, gap, top = *size, 16, 36
    columns = min(columns, len(matrices))
    rows = -(-len(matrices) // columns)
    picture = Image.new("RGB", (columns * (w + gap) + gap, top + rows * (h + gap + 20)), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((picture.width / 2, 10), title, INK, font, anchor="mt")
    for k, (matrix, name) in enumerate(zip(matrices, names)):
        m = np.asarray(matrix, np.float64)
        m = (m - m.min()) / (np.ptp(m) or 1.0) * (len(stops) - 1)
        low = np.minimum(m.astype(int), len(stops) - 2)
        colour = stops[low] + (m - low)[..., None] * (stops[low + 1] - stops[low])
        panel = Image.fromarray(colour.round().astype(np.uint8)).resize(size, Image.NEAREST)
        x, y = gap + k % columns * (w + gap), top + k // columns * (h + gap + 20)
        draw.text((x + w / 2, y), name, INK, font, anchor="mt")
        picture.paste(panel, (x, y + 20))
    return picture
