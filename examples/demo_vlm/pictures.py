"""Draws pictures with questions about them: the data that the demo model is trained, calibrated and judged on.

A picture is 168 x 168 RGB, which the Qwen2-VL processor cuts into 12 x 12 patches of 14 pixels and merges into
6 x 6 = 36 vision tokens; a question with its answer has 8 to 20 text tokens. Four kinds of picture carry seven kinds
of task:

    scene   objects on a 3 x 3 grid     attribute, position, counting, presence
    text    one or two lines of signs   text
    chart   a bar chart with numbers    chart
    form    labelled fields             form

`draw(split, index)` is a pure function: the pair seeds a generator of its own, so that the splits "train",
"calibration" and "evaluation" never share a picture's random numbers, and any picture can be drawn again anywhere.
Fonts come with Pillow, so pictures are the same on every machine with the same Pillow.
"""

import random
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 168
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 150, 44),
    "blue": (31, 90, 214),
    "yellow": (240, 210, 30),
    "purple": (148, 60, 190),
    "orange": (250, 130, 20),
    "pink": (245, 130, 190),
    "black": (25, 25, 25),
}
CELLS = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right"))
SIGNS = "ACDEFHJKLMNPRTUVXY34679"  # no two that look alike in a small font
FIELDS = ("name", "code", "date", "room", "total", "city")
TASKS = ("attribute", "position", "counting", "presence", "text", "chart", "form")


@dataclass(frozen=True)
class Question:
    """One question with its only right answer; `task` is one of TASKS."""

    task: str
    text: str
    answer: str


@dataclass(frozen=True)
class Picture:
    """A drawn picture. `marks`: what lies where, as ((left, top, right, bottom) in pixels, tag), for training."""

    image: Image.Image
    questions: list[Question]
    marks: list[tuple[tuple[float, float, float, float], str]] = field(default_factory=list)


def draw(split: str, index: int) -> Picture:
    """Picture `index` of `split`, with every question that can be asked about it in random order."""
    rng = random.Random(f"vlmq demo {split} {index}")
    kind = rng.choices((_scene, _text, _chart, _form), weights=(4, 3, 3, 3))[0]
    picture = kind(rng)
    rng.shuffle(picture.questions)
    return picture


def ask(split: str, index: int) -> tuple[Image.Image, Question]:
    """One picture with one question, all tasks equally often over the indices."""
    task = TASKS[index % len(TASKS)]
    for attempt in range(1000):
        picture = draw(split, 1000 * index + attempt)
        for question in picture.questions:
            if question.task == task:
                return picture.image, question
    raise AssertionError(f"no picture with a question of task {task!r}")


def _canvas(rng: random.Random) -> Image.Image:
    """A light gradient with noise, so that no background is flat."""
    corners = np.array([[rng.randint(185, 255) for _ in range(3)] for _ in range(2)], dtype=np.float32)
    ramp = np.linspace(0, 1, SIDE, dtype=np.float32)[:, None]
    ramp = ramp[:, :, None] if rng.random() < 0.5 else ramp[None, :, :]
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(0, 6), (SIDE, SIDE, 1))
    pixels = corners[0] * (1 - ramp) + corners[1] * ramp + noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, colour) -> None:
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=max(3, round(0.38 * r)))
    elif shape == "cross":
        pen.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill=colour)
        pen.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill=colour)
    else:
        turns = np.pi * np.arange(10) / 5 - np.pi / 2
        reach = np.where(np.arange(10) % 2 == 0, 1.1 * r, 0.45 * r)
        pen.polygon([(x + d * np.cos(t), y + d * np.sin(t)) for t, d in zip(turns, reach, strict=True)], fill=colour)


def _scene(rng: random.Random) -> Picture:
    image, marks, seen = _canvas(rng), [], {}
    pen = ImageDraw.Draw(image)
    for cell in rng.sample(range(9), rng.randint(2, 6)):
        if seen and rng.random() < 0.35:  # repeat a shape or a colour, so that counting is worth asking
            shape, colour = rng.choice(list(seen.values()))
            shape, colour = (shape, rng.choice(list(COLOURS))) if rng.random() < 0.5 else (rng.choice(SHAPES), colour)
        else:
            shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
        seen[cell] = (shape, colour)
        r = rng.uniform(14, 22)
        x, y = (56 * i + 28 + rng.uniform(r - 26, 26 - r) for i in (cell % 3, cell // 3))
        _shape(pen, shape, x, y, r, COLOURS[colour])
        marks += [((x - r, y - r, x + r, y + r), shape), ((x - r, y - r, x + r, y + r), colour)]
    return Picture(image, _scene_questions(rng, seen), marks)


def _scene_questions(rng: random.Random, seen: dict[int, tuple[str, str]]) -> list[Question]:
    shapes, colours = [s for s, _ in seen.values()], [c for _, c in seen.values()]
    pairs = list(seen.values())
    questions = []
    for cell, (shape, colour) in seen.items():
        if shapes.count(shape) == 1:
            questions.append(Question("attribute", f"What colour is the {shape}?", colour))
        if colours.count(colour) == 1:
            questions.append(Question("attribute", f"What shape is the {colour} object?", shape))
        if pairs.count((shape, colour)) == 1:
            questions.append(Question("position", f"Where is the {colour} {shape}?", CELLS[cell]))
        questions.append(Question("position", f"What is at the {CELLS[cell]}?", f"{colour} {shape}"))
        questions.append(Question("presence", f"Is there a {colour} {shape}?", "yes"))
    for _ in seen:  # a shape and a colour that are both there, but not together, where possible
        absent = (rng.choice(shapes), rng.choice(colours))
        absent = (rng.choice(SHAPES), rng.choice(colours)) if absent in pairs else absent
        if absent not in pairs:
            questions.append(Question("presence", f"Is there a {absent[1]} {absent[0]}?", "no"))
    shape, colour = rng.choice(shapes), rng.choice(colours)
    questions.append(Question("counting", "How many objects are there?", str(len(seen))))
    questions.append(Question("counting", f"How many {colour} objects are there?", str(colours.count(colour))))
    plural = {"cross": "crosses"}.get(shape, shape + "s")
    questions.append(Question("counting", f"How many {plural} are there?", str(shapes.count(shape))))
    return questions


def _write(pen: ImageDraw.ImageDraw, x: float, y: float, text: str, size: float, ink, bold: int, marks: list) -> None:
    """Write sign by sign and mark each; (x, y) is the left end of the middle line."""
    font = ImageFont.load_default(size)
    for sign in text:
        pen.text((x, y), sign, font=font, fill=ink, anchor="lm", stroke_width=bold)
        width = font.getlength(sign)
        marks.append(((x, y - 0.4 * size, x + width, y + 0.4 * size), sign))
        x += width + 2 + bold


def _signs(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choices(SIGNS, k=rng.randint(low, high)))


def _ink(rng: random.Random):
    return tuple(rng.randint(0, 90) for _ in range(3))


def _text(rng: random.Random) -> Picture:
    image, marks, questions = _canvas(rng), [], []
    pen, ink, bold = ImageDraw.Draw(image), _ink(rng), rng.randint(0, 1)
    lines = [_signs(rng, 2, 4) for _ in range(rng.randint(1, 2))]
    for i, line in enumerate(lines):
        size = rng.uniform(30, 42)
        y = SIDE / 2 + rng.uniform(-40, 40) if len(lines) == 1 else 42 + 84 * i + rng.uniform(-14, 14)
        _write(pen, rng.uniform(4, max(5, 160 - 0.85 * size * len(line))), y, line, size, ink, bold, marks)
        which = "text" if len(lines) == 1 else ("top line", "bottom line")[i]
        questions.append(Question("text", f"What does the {which} say?", line))
        questions.append(Question("text", f"What is the first sign of the {which}?", line[0]))
        questions.append(Question("text", f"What is the last sign of the {which}?", line[-1]))
    return Picture(image, questions, marks)


def _chart(rng: random.Random) -> Picture:
    image, marks, questions = _canvas(rng), [], []
    pen, unit, floor = ImageDraw.Draw(image), 14, 154
    for value in range(0, 10, 3):
        y = floor - unit * value
        pen.line((20, y, 164, y), fill=(120, 120, 120))
        pen.text((16, y), str(value), font=ImageFont.load_default(14), fill=(60, 60, 60), anchor="rm")
    bars = rng.sample(list(COLOURS), rng.randint(3, 4))
    values = rng.sample(range(1, 10), len(bars))
    pitch = 140 / len(bars)
    for i, (colour, value) in enumerate(zip(bars, values, strict=True)):
        left = 24 + pitch * i + rng.uniform(0, 6)
        box = (left, floor - unit * value, left + pitch - 12, floor)
        pen.rectangle(box, fill=COLOURS[colour])
        marks += [(box, colour), (box, f"value {value}")]
        questions.append(Question("chart", f"What is the value of the {colour} bar?", str(value)))
        questions.append(Question("chart", f"Which bar has the value {value}?", colour))
    questions.append(Question("chart", "Which bar is the highest?", bars[values.index(max(values))]))
    questions.append(Question("chart", "Which bar is the lowest?", bars[values.index(min(values))]))
    return Picture(image, questions, marks)


def _form(rng: random.Random) -> Picture:
    image, marks, questions = _canvas(rng), [], []
    pen, ink, rows = ImageDraw.Draw(image), _ink(rng), rng.randint(2, 3)
    for i, name in enumerate(rng.sample(FIELDS, rows)):
        y, value = 28 + 56 * i + rng.uniform(-8, 8), _signs(rng, 2, 3)
        pen.text((4 + rng.uniform(0, 6), y), name, font=ImageFont.load_default(20), fill=ink, anchor="lm")
        pen.rectangle((64, y - 20, 164, y + 20), outline=ink)
        _write(pen, rng.uniform(68, 80), y, value, rng.uniform(26, 32), ink, 0, marks)
        marks.append(((0, y - 20, 164, y + 20), name))
        questions.append(Question("form", f"What is the {name}?", value))
        questions.append(Question("form", f"Which field says {value}?", name))
    return Picture(image, questions, marks)
