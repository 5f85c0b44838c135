"""A rendered world whose fine details are known: one critter, and nine kinds of detail to be right or wrong about.

Every scene shows one critter in one place. What kind of critter and which place are the *coarse* facts: every caption
names them. The other ten attributes are the *details*; captions name each of them rarely, so that a CLIP trained on
these captions has blind spots where MMVP (arXiv 2401.06209) found them in the large ones: orientation, presence,
state, count, relation, colour, structure, text and viewpoint. All attributes are drawn independently and uniformly.

Scenes are divided into "train", "dev" and "test" by a hash of their attributes, so the three can never overlap.

Coordinates below are fractions of the image's side, x to the right and y downwards.
"""

import hashlib
import math
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from random import Random

from PIL import Image, ImageDraw

from llava_genhancer.errors import InputError

IMAGE_SIZE = 48
SPLITS = ("train", "dev", "test")

Colour = tuple[int, int, int]
Point = tuple[float, float]

# Sky and ground of each place.
PLACES: dict[str, tuple[Colour, Colour]] = {
    "meadow": ((158, 208, 240), (88, 160, 84)),
    "desert": ((250, 232, 190), (214, 170, 104)),
    "night": ((92, 88, 160), (66, 54, 96)),
    "snow": ((200, 210, 222), (246, 248, 250)),
    "seaside": ((190, 238, 236), (60, 120, 186)),
}
COLOURS: dict[str, Colour] = {
    "red": (214, 48, 49),
    "orange": (240, 140, 40),
    "green": (46, 170, 90),
    "blue": (52, 104, 214),
    "purple": (142, 68, 190),
    "grey": (140, 144, 150),
}
# 5 x 7 glyphs, one string per row; none is also an English word, so a caption's "a" never names a letter.
GLYPHS: dict[str, tuple[str, ...]] = {
    "h": ("#...#", "#...#", "#...#", "#####", "#...#", "#...#", "#...#"),
    "k": ("#...#", "#..#.", "#.#..", "##...", "#.#..", "#..#.", "#...#"),
    "l": ("#....", "#....", "#....", "#....", "#....", "#....", "#####"),
    "t": ("#####", "..#..", "..#..", "..#..", "..#..", "..#..", "..#.."),
    "x": ("#...#", "#...#", ".#.#.", "..#..", ".#.#.", "#...#", "#...#"),
    "z": ("#####", "....#", "...#.", "..#..", ".#...", "#....", "#####"),
}
DIRECTIONS: dict[str, Point] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
VIEWS: dict[str, Point] = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
STARS: dict[str, Point] = {"left": (0.085, 0.5), "right": (0.915, 0.5), "above": (0.5, 0.085), "below": (0.6, 0.91)}

# Every attribute of a scene that has a name, with its values.
COARSE: dict[str, tuple[str, ...]] = {
    "shape": ("round", "square", "triangular", "diamond", "hexagonal"),
    "place": tuple(PLACES),
}
DETAILS: dict[str, tuple[str, ...]] = {
    "facing": tuple(DIRECTIONS),
    "feature": ("plain", "horns", "feet"),
    "eyes": ("open", "closed"),
    "count": ("one", "two", "three", "four"),
    "star": tuple(STARS),
    "colour": tuple(COLOURS),
    "texture": ("plain", "striped", "dotted", "checked"),
    "size": ("big", "small"),
    "letter": tuple(GLYPHS),
    "view": tuple(VIEWS),
}


@dataclass(frozen=True)
class Pattern:
    """One of MMVP's nine patterns: ``name`` as the paper's tables say it, ``type`` as MMVP-VLM's files do."""

    name: str
    type: str
    details: tuple[str, ...]


PATTERNS: tuple[Pattern, ...] = (
    Pattern("Orientation and Direction", "Orientation", ("facing",)),
    Pattern("Presence of Specific Features", "Presence", ("feature",)),
    Pattern("State and Condition", "State", ("eyes",)),
    Pattern("Quantity and Count", "Quantity", ("count",)),
    Pattern("Positional and Relational Context", "Spatial", ("star",)),
    Pattern("Color and Appearance", "Color", ("colour",)),
    Pattern("Structural and Physical Characteristics", "Structural Character", ("texture", "size")),
    Pattern("Texts", "Text", ("letter",)),
    Pattern("Viewpoint and Perspective", "Camera Perspective", ("view",)),
)


@dataclass(frozen=True)
class Scene:
    """All that is needed to draw one image. ``jitter`` moves the critter by a fraction of a pixel's worth."""

    shape: str
    place: str
    facing: str
    feature: str
    eyes: str
    count: str
    star: str
    colour: str
    texture: str
    size: str
    letter: str
    view: str
    jitter: Point = (0.0, 0.0)

    def key(self) -> str:
        """Sixteen hex digits that depend on the named attributes alone (not on the jitter)."""
        named = "|".join(str(getattr(self, field.name)) for field in fields(self) if field.name != "jitter")
        return hashlib.sha256(named.encode()).hexdigest()[:16]

    def split(self) -> str:
        """The one split this scene belongs to: 1/8 of all scenes are "dev", 1/8 "test", the others "train"."""
        return {0: "dev", 1: "test"}.get(int(self.key(), 16) % 8, "train")

    def labels(self) -> dict[str, int]:
        """The index of each detail's value in ``DETAILS``: what a probe has to find."""
        return {name: values.index(getattr(self, name)) for name, values in DETAILS.items()}


def sample_scene(rng: Random, split: str = "train") -> Scene:
    """A scene of ``split``, uniform over all attributes. Deterministic in the state of ``rng``."""
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r} of the toy world; choose one of {', '.join(SPLITS)}")
    while True:
        named = {name: rng.choice(values) for name, values in (COARSE | DETAILS).items()}
        scene = Scene(**named, jitter=(rng.uniform(-0.012, 0.012), rng.uniform(-0.012, 0.012)))
        if scene.split() == split:
            return scene


# ---------------------------------------------------------------------------------------------------------- language

# How often a detail is named, as a multiple of `detail_probability`: colour and size are what people mention.
MENTION: dict[str, float] = {"colour": 1.5}
_WHERE = {
    "meadow": "in the meadow",
    "desert": "in the desert",
    "night": "at night",
    "snow": "in the snow",
    "seaside": "at the seaside",
}


def phrase(scene: Scene, detail: str) -> str:
    """The words for one detail of ``scene``; an adjective for colour, texture and size."""
    value = getattr(scene, detail)
    match detail:
        case "facing":
            return f"facing {value}"
        case "feature":
            return "without horns or feet" if value == "plain" else f"with {value}"
        case "eyes":
            return f"with {value} eyes"
        case "count":
            return f"with {value} {'ball' if value == 'one' else 'balls'}"
        case "star":
            return f"with a star {value if value in ('above', 'below') else f'on the {value}'}"
        case "letter":
            return f"with the letter {value}"
        case "view":
            return f"seen from {value if value in ('above', 'below') else f'the {value}'}"
        case _:
            return str(value)


def _sentence(scene: Scene, details: list[str], with_place: bool) -> str:
    adjectives = [phrase(scene, name) for name in ("size", "colour", "texture") if name in details]
    clauses = [phrase(scene, name) for name in details if name not in ("size", "colour", "texture")]
    noun = " ".join([*adjectives, scene.shape, "critter"])
    where = [_WHERE[scene.place]] if with_place else []
    return " ".join(["an" if noun.startswith("orange") else "a", noun, *where, *clauses])


def caption(scene: Scene, rng: Random, detail_probability: float) -> str:
    """A true caption: critter and place always, each detail with ``detail_probability`` (times its ``MENTION``)."""
    details = [name for name in DETAILS if rng.random() < detail_probability * MENTION.get(name, 1.0)]
    rng.shuffle(details)
    return _sentence(scene, details, with_place=True)


def statement(scene: Scene, detail: str) -> str:
    """An MMVP-style statement: the kind of critter and this one detail."""
    return _sentence(scene, [detail], with_place=False)


def pair(pattern: Pattern, rng: Random, split: str = "train") -> tuple[Scene, str, Scene, str]:
    """Two scenes of ``split`` that differ in exactly one detail of ``pattern``, each with the statement true of it."""
    while True:
        first = sample_scene(rng, split)
        detail = rng.choice(pattern.details)
        value = rng.choice([value for value in DETAILS[detail] if value != getattr(first, detail)])
        second = replace(first, **{detail: value})  # type: ignore[arg-type]
        if second.split() == split:
            return first, statement(first, detail), second, statement(second, detail)


# ----------------------------------------------------------------------------------------------------------- drawing

_SUPERSAMPLING = 4
_RADIUS = {"big": 0.25, "small": 0.185}
_INK: Colour = (24, 24, 32)
_BEAK: Colour = (250, 206, 60)


def _outline(shape: str, radius: float) -> list[Point]:
    """The body's corners around (0, 0)."""
    if shape == "square":
        angles, radius = [45.0, 135.0, 225.0, 315.0], radius * 1.22
    elif shape == "diamond":
        angles, radius = [0.0, 90.0, 180.0, 270.0], radius * 1.16
    elif shape == "triangular":
        angles, radius = [-90.0, 30.0, 150.0], radius * 1.28
    elif shape == "hexagonal":
        angles, radius = [0.0, 60.0, 120.0, 180.0, 240.0, 300.0], radius * 1.06
    else:
        angles = [float(angle) for angle in range(0, 360, 12)]
    return [(radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))) for angle in angles]


@lru_cache(maxsize=256)
def _texture_mask(shape: str, size: str, texture: str, side: int) -> Image.Image:
    """Where the critter's marking lies on a (side, side) canvas with the critter in the middle; mode "L"."""
    mask, middle, step = Image.new("L", (side, side)), side / 2, 0.105 * side
    draw = ImageDraw.Draw(mask)
    cells = range(-6, 7)
    if texture == "striped":
        for k in cells:
            x = middle + k * step
            draw.rectangle((x - step / 4, 0, x + step / 4, side), fill=255)
    elif texture == "dotted":
        for i in cells:
            for k in cells:
                x, y = middle + (i + 0.5 * (k % 2)) * step, middle + k * step * 0.9
                draw.ellipse((x - step * 0.27, y - step * 0.27, x + step * 0.27, y + step * 0.27), fill=255)
    elif texture == "checked":
        for i in cells:
            for k in cells:
                if (i + k) % 2:
                    x, y = middle + i * step, middle + k * step
                    draw.rectangle((x - step / 2, y - step / 2, x + step / 2, y + step / 2), fill=255)
    body = Image.new("L", (side, side))
    corners = [(middle + x * side, middle + y * side) for x, y in _outline(shape, _RADIUS[size])]
    ImageDraw.Draw(body).polygon(corners, fill=255)
    return Image.composite(mask, Image.new("L", (side, side)), body)


def _mix(colour: Colour, other: Colour, share: float) -> Colour:
    """``share`` of ``other`` in ``colour``."""
    red, green, blue = (round((1 - share) * a + share * b) for a, b in zip(colour, other, strict=True))
    return red, green, blue


class _Canvas:
    """An image drawn in fractions of its side."""

    def __init__(self, side: int, colour: Colour) -> None:
        self.side = side
        self.image = Image.new("RGB", (side, side), colour)
        self.draw = ImageDraw.Draw(self.image)

    def polygon(self, points: list[Point], fill: Colour, line: float = 0.0) -> None:
        self.draw.polygon([(x * self.side, y * self.side) for x, y in points], fill=fill)
        if line:
            self.line(points, line)

    def line(self, points: list[Point], width: float) -> None:
        """Around ``points`` and back to the first, in ink."""
        closed = [(x * self.side, y * self.side) for x, y in [*points, points[0], points[1]]]
        self.draw.line(closed, fill=_INK, width=round(width * self.side), joint="curve")

    def disc(self, x: float, y: float, radius: float, fill: Colour, line: float = 0.0) -> None:
        box = ((x - radius) * self.side, (y - radius) * self.side, (x + radius) * self.side, (y + radius) * self.side)
        self.draw.ellipse(box, fill=fill, outline=_INK if line else None, width=round(line * self.side))

    def box(self, left: float, top: float, right: float, bottom: float, fill: Colour) -> None:
        self.draw.rectangle([value * self.side for value in (left, top, right, bottom)], fill=fill)


def _reach(outline: list[Point], direction: Point) -> float:
    """How far the outline is from (0, 0) along the unit vector ``direction``."""
    dx, dy = direction
    best = 0.0
    for (ax, ay), (bx, by) in zip(outline, outline[1:] + outline[:1], strict=True):
        cross = dx * (by - ay) - dy * (bx - ax)
        if abs(cross) < 1e-9:
            continue
        along = (ax * (by - ay) - ay * (bx - ax)) / cross
        share = (ax * dy - ay * dx) / cross  # where on the edge from a to b the ray meets it
        if -1e-6 <= share <= 1 + 1e-6:
            best = max(best, along)
    return best


def _spike(centre: Point, direction: Point, near: float, far: float, width: float) -> list[Point]:
    """A triangle that points from ``centre`` along the unit vector ``direction``."""
    (x, y), (dx, dy) = centre, direction
    foot_x, foot_y = x + dx * near, y + dy * near
    return [
        (foot_x - dy * width, foot_y + dx * width),
        (x + dx * far, y + dy * far),
        (foot_x + dy * width, foot_y - dx * width),
    ]


def _draw_critter(canvas: _Canvas, scene: Scene) -> None:
    # A triangle's middle is not its centroid: lowered, its tip leaves room for the beak and the star above.
    centre = (0.5 + scene.jitter[0], 0.5 + scene.jitter[1] + (0.06 if scene.shape == "triangular" else 0.0))
    x, y = centre
    radius, colour = _RADIUS[scene.size], COLOURS[scene.colour]
    outline = _outline(scene.shape, radius)
    facing, view = DIRECTIONS[scene.facing], VIEWS[scene.view]

    # The side that this viewpoint lets us see: the outline swept away from the front.
    for k in range(12, 0, -1):
        shift = 0.075 * k / 12
        swept = [(x + a + view[0] * shift, y + b + view[1] * shift) for a, b in outline]
        canvas.polygon(swept, _mix(colour, (0, 0, 0), 0.62))
    for sign in (-1, 1):
        if scene.feature == "horns":
            direction = (0.643 * sign, -0.766)
            reach = _reach(outline, direction)
            canvas.polygon(_spike(centre, direction, reach - 0.05, reach + 0.11, 0.055), (250, 250, 250), 0.01)
        elif scene.feature == "feet":
            reach = _reach(outline, (0.0, 1.0))
            canvas.disc(x + sign * 0.09, y + min(reach + 0.01, 0.27), 0.068, (0, 205, 190), 0.01)
    canvas.polygon([(x + a, y + b) for a, b in outline], colour)
    if scene.texture != "plain":
        corner = (round((x - 0.5) * canvas.side), round((y - 0.5) * canvas.side))
        mask = _texture_mask(scene.shape, scene.size, scene.texture, canvas.side)
        canvas.image.paste(_mix(colour, (255, 255, 255), 0.72), corner, mask)
    canvas.line([(x + a, y + b) for a, b in outline], 0.018)
    reach = _reach(outline, facing)
    canvas.polygon(_spike(centre, facing, reach - 0.05, reach + 0.11, 0.07), _BEAK, 0.012)
    for sign in (-1, 1):
        eye_x, eye_y = x + 0.035 * facing[0] + sign * 0.36 * radius, y + 0.02 * facing[1]
        if scene.eyes == "open":
            canvas.disc(eye_x, eye_y, 0.3 * radius, (255, 255, 255), 0.01)
            canvas.disc(eye_x + 0.11 * radius * facing[0], eye_y + 0.11 * radius * facing[1], 0.14 * radius, _INK)
        else:
            canvas.disc(eye_x, eye_y, 0.3 * radius, _mix(colour, (0, 0, 0), 0.35))
            canvas.box(eye_x - 0.3 * radius, eye_y, eye_x + 0.3 * radius, eye_y + 0.12 * radius, _INK)


def render(scene: Scene, size: int = IMAGE_SIZE) -> Image.Image:
    """Draw ``scene`` as a square RGB image of ``size`` pixels, antialiased. Deterministic."""
    side = size * _SUPERSAMPLING
    sky, ground = PLACES[scene.place]
    canvas = _Canvas(side, sky)
    canvas.box(0, 0.66, 1, 1, ground)
    _draw_critter(canvas, scene)

    for k in range(DETAILS["count"].index(scene.count) + 1):
        canvas.disc(0.065 + 0.112 * k, 0.925, 0.05, (255, 105, 180), 0.012)
    star_x, star_y = STARS[scene.star]
    spikes = [(0.085 if k % 2 == 0 else 0.036, math.radians(36 * k - 90)) for k in range(10)]
    star = [(star_x + r * math.cos(angle), star_y + r * math.sin(angle)) for r, angle in spikes]
    canvas.polygon(star, (255, 236, 80), 0.01)

    canvas.box(0.72, 0.01, 0.99, 0.31, _INK)
    canvas.box(0.735, 0.025, 0.975, 0.295, (255, 255, 255))
    for row, line in enumerate(GLYPHS[scene.letter]):
        for column, ink in enumerate(line):
            if ink == "#":
                left, top = 0.765 + 0.036 * column, 0.045 + 0.033 * row
                canvas.box(left, top, left + 0.036, top + 0.033, _INK)
    return canvas.image.reduce(_SUPERSAMPLING)
