"""The world that the embedded `tiny` Chroma knows: one coloured shape on a plain background of another colour.

Three things live here: drawing (anti-aliased, from exact geometry), captions, and the plain image test, which reads
shape, colour and background back from pixels without any learned judge. Coordinates are in pixels, x to the right,
y down; images are uint8 arrays of shape [height, width, 3].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SIZE = 64

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 150, 50),
    "blue": (30, 60, 220),
    "yellow": (245, 225, 30),
    "orange": (250, 130, 20),
    "purple": (120, 40, 160),
    "pink": (250, 140, 200),
    "cyan": (40, 215, 230),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
COLOURS = tuple(PALETTE)

PLACES: dict[tuple[int, int], str] = {
    (0, 0): "in the middle",
    (0, -1): "at the top",
    (0, 1): "at the bottom",
    (-1, 0): "on the left",
    (1, 0): "on the right",
    (-1, -1): "at the top left",
    (1, -1): "at the top right",
    (-1, 1): "at the bottom left",
    (1, 1): "at the bottom right",
}
SMALL_BELOW, LARGE_FROM = 17.5, 22.0  # radius in pixels at which the size words begin
RADIUS_RANGE = (14.0, 26.0)
STANDARD_RADII = (15.0, 20.0, 25.0)  # small, unsaid, large
MARGIN = 4.0  # plain pixels between a shape and the frame: the image test reads the background there


# --- geometry: each shape is a predicate on the square [-1, 1]², drawn at a radius and a centre -----------------------


def _polygon(vertices: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Even-odd test for a polygon with vertices [n, 2]."""

    def inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        hit = np.zeros(np.broadcast_shapes(x.shape, y.shape), bool)
        for (x0, y0), (x1, y1) in zip(vertices, np.roll(vertices, -1, axis=0), strict=True):
            if y0 != y1:
                hit ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
        return hit

    return inside


def _star_vertices(points: int = 5, inner: float = 0.48) -> np.ndarray:
    angles = np.pi * np.arange(2 * points) / points - np.pi / 2
    radii = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: x * x + y * y <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 0.86,
    "triangle": _polygon(np.array([[0.0, -0.95], [1.0, 0.8], [-1.0, 0.8]])),
    "star": _polygon(_star_vertices()),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.32) & (np.maximum(abs(x), abs(y)) <= 1),
    "ring": lambda x, y: (x * x + y * y <= 1) & (x * x + y * y >= 0.36),
}


def rgb(colour: str) -> np.ndarray:
    """A palette colour as float32 [3] in 0..255."""
    return np.array(PALETTE[colour], np.float32)


def coverage(
    inside: Callable[[np.ndarray, np.ndarray], np.ndarray],
    cx: float,
    cy: float,
    radius: float,
    size: int = SIZE,
    supersample: int = 4,
) -> np.ndarray:
    """How much of each pixel a shape covers, 0..1, float32 [size, size]: the mean over supersample² points."""
    points = (np.arange(size * supersample, dtype=np.float32) + 0.5) / supersample
    mask = inside(((points - cx) / radius)[None, :], ((points - cy) / radius)[:, None])
    return mask.reshape(size, supersample, size, supersample).mean(axis=(1, 3), dtype=np.float32)


def blend(image: np.ndarray, cover: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Draws `colour` ([3] or [H, W, 3]) over a float image [H, W, 3] where `cover` [H, W] says so."""
    return image + cover[..., None] * (np.asarray(colour, np.float32) - image)


# --- scenes and captions ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """One shape on a plain background; centre and radius in pixels, `place` as signs (x, y)."""

    shape: str
    colour: str
    background: str
    cx: float
    cy: float
    radius: float
    place: tuple[int, int]


def sample_place(rng: np.random.Generator, radius: float, place: tuple[int, int]) -> tuple[float, float]:
    """A centre that lies towards `place` as far as the radius leaves room."""
    room = SIZE / 2 - MARGIN - radius
    offset = [sign * room * rng.uniform(0.6, 1.0) if sign else room * rng.uniform(-0.2, 0.2) for sign in place]
    return SIZE / 2 + offset[0], SIZE / 2 + offset[1]


def sample_scene(rng: np.random.Generator, standard: bool = False) -> Scene:
    """A random scene: shape, colour and background uniform, half of all shapes in the middle.

    Sizes and places are free, or `standard`: three sizes, and nine places that lie as far out as the size allows.
    """
    colour, background = rng.choice(len(COLOURS), size=2, replace=False)
    radius = float(rng.choice(STANDARD_RADII) if standard else rng.uniform(*RADIUS_RANGE))
    places = list(PLACES)
    place = places[0] if rng.random() < 0.4 else places[rng.integers(len(places))]
    if standard:
        room = SIZE / 2 - MARGIN - radius
        cx, cy = SIZE / 2 + place[0] * room, SIZE / 2 + place[1] * room
    else:
        cx, cy = sample_place(rng, radius, place)
    shape = tuple(SHAPES)[rng.integers(len(SHAPES))]
    return Scene(shape, COLOURS[colour], COLOURS[background], cx, cy, radius, place)


def draw(scene: Scene) -> np.ndarray:
    """The image of a scene, uint8 [64, 64, 3]."""
    plain = np.broadcast_to(rgb(scene.background), (SIZE, SIZE, 3))
    cover = coverage(SHAPES[scene.shape], scene.cx, scene.cy, scene.radius)
    return blend(plain, cover, rgb(scene.colour)).round().astype(np.uint8)


def caption(scene: Scene, rng: np.random.Generator, complete: bool = False) -> str:
    """A caption in one of several wordings.

    Size and place are said now and then, or, if `complete`, whenever they are not the usual ones (medium, in the
    middle), so that a caption leaves nothing open. Colour or shape are sometimes left unsaid; and a few captions hold a
    word of random letters, so that the model stays on its feet when a prompt holds a word that it has never learnt.
    """
    size = ""
    if scene.radius < SMALL_BELOW and (complete or rng.random() < 0.5):
        size = "small "
    elif scene.radius >= LARGE_FROM and (complete or rng.random() < 0.5):
        size = ("large ", "big ")[rng.integers(2)]
    colour = "" if rng.random() < 0.05 else f"{scene.colour} "
    shape = scene.shape
    if rng.random() < 0.07:
        shape = "shape" if rng.random() < 0.4 else _nonsense(rng)
    article = "an" if (size + colour + shape)[0] in "aeiou" else "a"
    background = f"{'an' if scene.background[0] in 'aeiou' else 'a'} {scene.background} background"
    place_said = (complete and scene.place != (0, 0)) or rng.random() < 0.25
    place = f" {PLACES[scene.place]}" if place_said else ""
    prefix = ("", "", "", "", "", "", "a picture of ", "a photo of ")[rng.integers(8)]
    return f"{prefix}{article} {size}{colour}{shape}{place} on {background}"


def _nonsense(rng: np.random.Generator) -> str:
    return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), size=rng.integers(2, 6)))


def plain_caption(shape: str, colour: str, background: str) -> str:
    """The shortest caption that names all three: the prompt of the image test."""
    articles = ["an" if word[0] in "aeiou" else "a" for word in (colour, background)]
    return f"{articles[0]} {colour} {shape} on {articles[1]} {background} background"


# --- the plain image test -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What the image test sees. `shape` and `colour` are None where nothing stands out or nothing fits."""

    shape: str | None
    colour: str | None
    background: str
    iou: float
    cx: float
    cy: float
    radius: float


def nearest_colour(seen: np.ndarray) -> str:
    """The palette colour nearest to `seen` [3] in Euclidean distance."""
    return min(PALETTE, key=lambda name: float(np.linalg.norm(seen - rgb(name))))


def read_image(image: np.ndarray, least_iou: float = 0.7) -> Reading:
    """Reads shape, colour and background from an image uint8 [64, 64, 3] by plain image processing.

    The background is the median colour of the outermost two pixels. The foreground is what lies nearer to the
    foreground's median colour than to the background's. Each known shape is drawn into the foreground's bounding box
    (uniform scale, same centre, up to 16 % larger, because pixels lose thin tips); the one with the best intersection
    over union wins if it reaches `least_iou`.
    """
    pixels = image.astype(np.float32)
    frame = np.ones(pixels.shape[:2], bool)
    frame[2:-2, 2:-2] = False
    back = np.median(pixels[frame], axis=0)
    distance = np.linalg.norm(pixels - back, axis=2)
    nothing = Reading(None, None, nearest_colour(back), 0.0, 0.0, 0.0, 0.0)
    if (distance > 60).sum() < 40:
        return nothing
    front = np.median(pixels[distance > 0.6 * np.quantile(distance[distance > 60], 0.8)], axis=0)
    axis = front - back
    mask = (pixels - back) @ axis > 0.5 * float(axis @ axis)
    # A row or column counts from two pixels on, so that a stray pixel does not stretch the box.
    columns, rows = np.flatnonzero(mask.sum(0) >= 2), np.flatnonzero(mask.sum(1) >= 2)
    if not len(columns) or not len(rows):
        return nothing
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    fits = (_fit(shape, mask, box, grow) for shape in SHAPES for grow in (1.0, 1.05, 1.1, 1.16))
    name, iou, cx, cy, radius = max(fits, key=lambda fit: fit[1])
    shape = name if iou >= least_iou else None
    return Reading(shape, nearest_colour(front), nearest_colour(back), iou, cx, cy, radius)


def _unit_box(shape: str) -> tuple[float, float, float, float]:
    """Bounding box (left, top, right, bottom) of a shape at radius 1."""
    line = np.linspace(-1, 1, 401, dtype=np.float32)
    mask = SHAPES[shape](line[None, :], line[:, None])
    columns, rows = line[mask.any(0)], line[mask.any(1)]
    return float(columns[0]), float(rows[0]), float(columns[-1]), float(rows[-1])


_UNIT_BOXES = {shape: _unit_box(shape) for shape in SHAPES}


def _fit(
    shape: str, mask: np.ndarray, box: tuple[int, int, int, int], grow: float
) -> tuple[str, float, float, float, float]:
    """Draws `shape` into `box`, `grow` times as large.

    Returns (shape, intersection over union with `mask`, centre x, centre y, radius).
    """
    left, top, right, bottom = _UNIT_BOXES[shape]
    radius = grow * ((box[2] - box[0]) / (right - left) + (box[3] - box[1]) / (bottom - top)) / 2
    cx = (box[0] + box[2]) / 2 - radius * (left + right) / 2
    cy = (box[1] + box[3]) / 2 - radius * (top + bottom) / 2
    drawn = coverage(SHAPES[shape], cx, cy, radius, mask.shape[0], supersample=2) > 0.5
    return shape, float((drawn & mask).sum() / max(1, (drawn | mask).sum())), cx, cy, radius


# --- a wider world, for the VAE only ----------------------------------------------------------------------------------


def _any_colour(rng: np.random.Generator) -> np.ndarray:
    if rng.random() < 0.5:
        return rgb(COLOURS[rng.integers(len(COLOURS))])
    return rng.uniform(0, 255, 3).astype(np.float32)


def _ground(rng: np.random.Generator) -> np.ndarray:
    """A plain, graded, striped, checked or dotted field, float32 [64, 64, 3]."""
    a, b = _any_colour(rng), _any_colour(rng)
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 24)
    u = x * np.cos(angle) + y * np.sin(angle) + rng.uniform(0, period)
    v = y * np.cos(angle) - x * np.sin(angle)
    kind = rng.choice(["plain", "gradient", "stripes", "checks", "dots"], p=[0.4, 0.15, 0.2, 0.15, 0.1])
    wave = np.sin(2 * np.pi * u / period)
    if kind == "plain":
        weight = np.zeros_like(x)
    elif kind == "gradient":
        weight = (u - u.min()) / np.ptp(u)
    else:
        if kind == "checks":
            wave = wave * np.sin(2 * np.pi * v / period)
        elif kind == "dots":
            wave = wave + np.sin(2 * np.pi * v / period) - 1
        weight = np.clip(wave * period / 4 + 0.5, 0, 1)  # one pixel of soft edge
    return a + weight[..., None] * (b - a)


def wide_image(rng: np.random.Generator) -> np.ndarray:
    """A random image far beyond the captions, uint8 [64, 64, 3]: so that the VAE can carry concepts yet unseen."""
    image = _ground(rng)
    for _ in range(rng.integers(0, 5)):
        radius = rng.uniform(4, 26)
        kind = rng.random()
        if kind < 0.4:
            inside = tuple(SHAPES.values())[rng.integers(len(SHAPES))]
        elif kind < 0.8:
            corners = rng.integers(3, 9)
            angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
            reach = rng.uniform(0.4, 1.0, corners)
            inside = _polygon(np.stack([reach * np.cos(angles), reach * np.sin(angles)], axis=1))
        else:  # a bar across
            slope, width = rng.uniform(0, np.pi), rng.uniform(0.08, 0.3)
            c, s = np.cos(slope), np.sin(slope)
            inside = lambda x, y, c=c, s=s, width=width: abs(x * c + y * s) <= width  # noqa: E731
        cx, cy = rng.uniform(0, SIZE, 2)
        cover = coverage(inside, cx, cy, radius, supersample=3)
        image = blend(image, cover, _ground(rng) if rng.random() < 0.3 else _any_colour(rng))
    return image.clip(0, 255).round().astype(np.uint8)
