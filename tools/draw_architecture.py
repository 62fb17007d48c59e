"""Draws docs/pictures/architecture.svg: the floors of the package, and one step ``opt.backward(losses)`` through them.

python tools/draw_architecture.py

Floors and rooms are those that ``tests/test_architecture.py`` holds the package to. The picture adds what every room is
for and what a step hands from room to room; it cannot be drawn if it names a room that the test does not know, leaves
one out, or goes down where the test goes up.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
FLOORS_OF = ROOT / "tests" / "test_architecture.py"
PICTURE = ROOT / "docs" / "pictures" / "architecture.svg"

NOTES = (
    "Shaded: the rooms of this step. Blue: down to the norms and back; orange: weights, and the update that they make.",
    "n examples, L parameter tensors, gᵢ the gradient of example i. Every import goes down.",
)
LOOP = "your loop"  # above the highest floor
PURPOSE = {
    "recipes": "training, evaluation, the paper's figures, models, data: the command line",
    "__init__": "the public names",
    "adversarial": "attacks, objectives, weight perturbation",
    "recording": "a step as a straight-line program",
    "measurement": "norms for anybody",
    "optim": "norms to weights",
    "verify": "engine against oracle",
    "explain": "what a layer costs",
    "backward": "one backward pass, and what is collected from it",
    "module": "the wrapper: modes, plans, calibration factors",
    "graph": "whose row is it, and where do parameters enter?",
    "capture": "calls of layers, as they happen",
    "batch_norm": "statistics: frozen, corrected, calibrated",
    "rules": "the mathematics of a layer",
    "exact": "one backpropagation an example",
    "terms": "factors of gradients: norms and sums",
    "cost": "which form is the cheapest?",
    "_C": "compiled kernels",
    "ops": "compiled operators",
    "reference": "their plain twins",
    "build": "what was compiled",
    "checks": "arguments",
    "loss_checks": "losses",
    "names": "what to choose among",
    "distributed": "sums over processes",
    "repeatable": "kernels that give the same bits",
    "torch_internals": "torch's private names",
}


@dataclass(frozen=True)
class Leg:
    """What a step hands from one room to another.

    Attributes:
        lane: "losses" (down) and "norms" (up) are the first round, "weights" (down) and "update" (up) the second.
        start: the room that hands it on, or the loop.
        end: the room that takes it, or the loop.
        what: the label.
    """

    lane: str
    start: str
    end: str
    what: str


STEP = (
    Leg("losses", LOOP, "optim", "losses [n], one an example"),
    Leg("losses", "optim", "backward", "losses, norms wanted"),
    Leg("losses", "backward", "module", "are the losses this wrapper's?"),
    Leg("losses", "module", "graph", "the graph behind the losses"),
    Leg("losses", "graph", "capture", "the calls that it reaches"),
    Leg("losses", "capture", "rules", "activations and backprops of a call"),
    Leg("losses", "rules", "terms", "one term a parameter tensor"),
    Leg("losses", "terms", "ops", "direct or Gram form"),
    Leg("norms", "ops", "terms", "squared norms [n]"),
    Leg("norms", "backward", "optim", "squared norms [L, n]"),
    Leg("weights", "optim", "backward", "weights w [n]"),
    Leg("weights", "terms", "ops", "weights w [n]"),
    Leg("update", "ops", "terms", "sum Σ wᵢ gᵢ"),
    Leg("update", "backward", "optim", "L sums Σ wᵢ gᵢ"),
    Leg("update", "optim", LOOP, "p.grad += 1/n Σ wᵢ gᵢ, and stats"),
)
INSIDE = {"cost", "_C"}  # rooms that a room of their own floor uses
DOWN, FIRST_ROUND = ("losses", "weights"), ("losses", "norms")

# -- sizes, in pixels of a picture that is 900 wide ---------------------------------------------------------------

WIDTH = 900
LEFT, RIGHT = 88, 812  # of the house
NUMBERED = 36  # room for the floor's number
MARGIN, BETWEEN = 8, 8  # around rooms, and between two of them
ROOM = 46  # a room's height
A_ROW = 4  # rooms that stand side by side
ROOF = 104
GAP, LABELLED_GAP = 12, 34
BESIDE = 200  # between the labels of two legs on one side
LETTER = 6.9  # width of a letter of a purpose, generously
LANES = {"losses": 36, "weights": 62, "norms": 864, "update": 838}
ASIDE = {"losses": -8, "norms": -8, "weights": 8, "update": 8}  # of a floor's middle: two lanes meet it

LIGHT = {
    "page": "#ffffff", "floor": "#f3f4f6", "edge": "#c9ced6", "room": "#ffffff", "used": "#dbe9fb",
    "used_edge": "#3b78c4", "text": "#1c2430", "faint": "#5b6675", "first": "#1f62b4", "second": "#a2480c",
}  # fmt: skip
DARK = {
    "page": "#14181f", "floor": "#1d232c", "edge": "#3a4350", "room": "#161b22", "used": "#1c3554",
    "used_edge": "#5b9be8", "text": "#e8ecf1", "faint": "#a3afbd", "first": "#79b4ff", "second": "#ffa566",
}  # fmt: skip


def floors(source: Path = FLOORS_OF) -> list[list[str]]:
    """The rooms of every floor from the ground up, in the order in which the test writes them."""
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS":
            sets = [floor for floor in ast.iter_child_nodes(node.value) if isinstance(floor, ast.Set)]
            return [[ast.literal_eval(room) for room in floor.elts] for floor in sets]
    raise ValueError(f"{source} assigns nothing to FLOORS")


class House:
    """Where everything stands.

    Args:
        rooms: of every floor, from the ground up.

    Raises:
        ValueError: a room has no purpose here, a purpose no room, or a leg goes the wrong way.
    """

    def __init__(self, rooms: Sequence[Sequence[str]]) -> None:
        self.rooms = rooms
        self.floor_of = {room: number for number, floor in enumerate(rooms) for room in floor}
        odd = set(self.floor_of) ^ set(PURPOSE)
        if odd:
            raise ValueError(f"rooms must be those of {FLOORS_OF.name}, and have a purpose each; look at {sorted(odd)}")
        self.floor_of[LOOP] = len(rooms)
        for leg in STEP:
            down = self.floor_of[leg.start] > self.floor_of[leg.end]
            if down != (leg.lane in DOWN):
                raise ValueError(f"{leg.start} -> {leg.end} goes the wrong way for the lane {leg.lane}")
        self.above: dict[int, list[Leg]] = {}  # floor -> the legs that are written above it
        for leg in STEP:
            self.above.setdefault(min(self.floor_of[leg.start], self.floor_of[leg.end]), []).append(leg)
        self.top: dict[int, float] = {}
        y = float(ROOF)
        for number in reversed(range(len(rooms))):
            self.top[number] = y = y + (LABELLED_GAP if number in self.above else GAP)
            y += self.height(number)
        self.bottom = y

    def rows(self, number: int) -> list[Sequence[str]]:
        """The rooms of a floor, row by row."""
        rooms = self.rooms[number]
        count = -(-len(rooms) // A_ROW)
        each = -(-len(rooms) // count)
        return [rooms[start : start + each] for start in range(0, len(rooms), each)]

    def height(self, number: int) -> float:
        """A floor's height."""
        count = len(self.rows(number))
        return count * ROOM + (count - 1) * BETWEEN + 2 * MARGIN

    def middle(self, room: str, lane: str) -> float:
        """The height at which a lane meets the floor of a room."""
        number = self.floor_of[room]
        return ROOF - 6 if number == len(self.rooms) else self.top[number] + self.height(number) / 2 + ASIDE[lane]


def text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    """One line of text."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A rectangle with round corners."""
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>'


def floor_shapes(house: House, number: int) -> Iterator[str]:
    """A floor with its number and its rooms."""
    top = house.top[number]
    used = {room for leg in STEP for room in (leg.start, leg.end)} | INSIDE
    yield box(LEFT, top, RIGHT - LEFT, house.height(number), "floor")
    yield text(LEFT + NUMBERED / 2 + 2, top + house.height(number) / 2 + 5, str(number + 1), "number", "middle")
    for index, row in enumerate(house.rows(number)):
        y = top + MARGIN + index * (ROOM + BETWEEN)
        width = (RIGHT - LEFT - NUMBERED - MARGIN - (len(row) - 1) * BETWEEN) / len(row)
        for column, room in enumerate(row):
            if len(PURPOSE[room]) * LETTER > width:
                raise ValueError(f"the purpose of {room} is too long for its box of {width:.0f} pixels")
            x = LEFT + NUMBERED + column * (width + BETWEEN)
            yield box(x, y, width, ROOM, "used" if room in used else "room")
            yield text(x + width / 2, y + 20, room, "name", "middle")
            yield text(x + width / 2, y + 37, PURPOSE[room], "purpose", "middle")


def lane_shapes(house: House, lane: str) -> Iterator[str]:
    """The line of one lane, with a stub to every floor that it leaves or enters."""
    x = LANES[lane]
    legs = [leg for leg in STEP if leg.lane == lane]
    round_ = "first" if lane in FIRST_ROUND else "second"
    heights = [house.middle(room, lane) for leg in legs for room in (leg.start, leg.end)]
    yield f'<path class="lane {round_}" d="M{x} {min(heights):g}V{max(heights):g}"/>'
    wall, inwards = (LEFT, 1) if x < LEFT else (RIGHT, -1)
    ends = {leg.end for leg in legs}
    for room in dict.fromkeys(room for leg in legs for room in (leg.start, leg.end)):
        y = house.middle(room, lane)
        tip = wall - inwards * 1
        yield f'<path class="lane {round_}" d="M{x} {y:g}H{tip - inwards * (6 if room in ends else 0):g}"/>'
        if room in ends:
            back = tip - inwards * 9
            yield f'<path class="head {round_}" d="M{tip:g} {y:g}L{back:g} {y - 5:g}V{y + 5:g}Z"/>'


def label_shapes(house: House, number: int) -> Iterator[str]:
    """What is handed across the ceiling of a floor, each with its place in the step."""
    y = house.top[number] - LABELLED_GAP / 2
    for leg in house.above.get(number, ()):
        order = STEP.index(leg) + 1
        round_ = "first" if leg.lane in FIRST_ROUND else "second"
        left = leg.lane in DOWN
        first = next(other for other in house.above[number] if (other.lane in DOWN) == left)
        inwards = 12 + (0 if leg is first else BESIDE)
        x = LEFT + inwards if left else RIGHT - inwards
        yield f'<circle class="badge {round_}" cx="{x:g}" cy="{y:g}" r="10"/>'
        yield text(x, y + 4.5, str(order), "order", "middle")
        yield text(x + (16 if left else -16), y + 4.5, leg.what, f"what {round_}", "start" if left else "end")


def style(colours: dict[str, str]) -> str:
    """The rules that differ between a light and a dark page."""
    return (
        f".page{{fill:{colours['page']}}}"
        f".floor,.roof{{fill:{colours['floor']};stroke:{colours['edge']}}}"
        f".room{{fill:{colours['room']};stroke:{colours['edge']}}}"
        f".used{{fill:{colours['used']};stroke:{colours['used_edge']}}}"
        f".name,.number,.code{{fill:{colours['text']}}}"
        f".purpose,.note{{fill:{colours['faint']}}}"
        f".lane.first{{stroke:{colours['first']}}}.lane.second{{stroke:{colours['second']}}}"
        f".head.first,.badge.first,.what.first{{fill:{colours['first']}}}"
        f".head.second,.badge.second,.what.second{{fill:{colours['second']}}}"
        f".order{{fill:{colours['page']}}}"
    )


FONTS = (
    "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;font-size:13px}"
    ".name,.code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;font-size:14px;"
    "font-weight:600}"
    ".purpose{font-size:12.5px}.order{font-size:12px;font-weight:700}.number{font-size:15px;font-weight:600}"
    ".lane{fill:none;stroke-width:2}.floor,.room,.used,.roof{stroke-width:1}"
)


def picture() -> str:
    """The whole SVG."""
    house = House(floors())
    height = house.bottom + 62
    title = "One step of opt.backward(losses) through the floors of engm"
    centre = (LEFT + RIGHT) / 2
    shapes = [
        f'<rect class="page" width="{WIDTH}" height="{height:g}"/>',
        f'<path class="roof" d="M{LEFT - 22} {ROOF}L{centre:g} 10L{RIGHT + 22} {ROOF}Z"/>',
        text(centre, ROOF - 40, LOOP, "note", "middle"),
        text(centre, ROOF - 16, "stats = opt.backward(losses)", "code", "middle"),
    ]
    for number in reversed(range(len(house.rooms))):
        shapes += [*label_shapes(house, number), *floor_shapes(house, number)]
    for lane in LANES:
        shapes += lane_shapes(house, lane)
    for line, words in enumerate(NOTES):
        shapes.append(text(centre, house.bottom + 26 + 20 * line, words, "note", "middle"))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img">',
            f"<title>{title}</title>",
            f"<style>{FONTS}{style(LIGHT)}@media (prefers-color-scheme:dark){{{style(DARK)}}}</style>",
            *shapes,
            "</svg>\n",
        ]
    )


def main() -> None:
    """Write the picture."""
    PICTURE.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
