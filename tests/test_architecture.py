"""Who may import whom, and who may know torch's insides: the rules of the house that a machine can check."""

import ast
from collections.abc import Iterator
from pathlib import Path

ENGM = Path(__file__).parents[1] / "engm"
FLOORS = (  # from the ground up; rooms of one floor do not know each other
    {
        "_C",
        "ops",
        "reference",
        "build",
        "checks",
        "loss_checks",
        "names",
        "distributed",
        "repeatable",
        "torch_internals",
    },
    {"terms", "cost"},
    {"rules", "exact"},
    {"capture", "batch_norm"},
    {"graph"},
    {"module"},
    {"backward"},
    {"measurement", "optim", "verify", "explain"},
    {"recording"},
    {"__init__", "adversarial"},
    {"recipes"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
WITHIN = {
    ("ops", "_C"),
    ("build", "_C"),
    ("torch_internals", "_C"),
    ("loss_checks", "_C"),
    ("loss_checks", "checks"),
    ("loss_checks", "torch_internals"),
}


def room(path: Path) -> str:
    return path.relative_to(ENGM).parts[0].removesuffix(".py").removesuffix(".pyi")


def imports(path: Path) -> Iterator[list[str]]:
    """Every name that a file imports, as dotted parts, also within functions and under TYPE_CHECKING."""
    package = ("engm", *path.relative_to(ENGM).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ([*base, alias.name] for alias in node.names)


def imported(path: Path) -> set[str]:
    """Rooms that a file names in an import."""
    ours = [parts for parts in imports(path) if parts[0] == "engm"]
    return {parts[1] if len(parts) > 1 and parts[1] in FLOOR else "__init__" for parts in ours}


def test_every_room_has_a_floor():
    rooms = {room(p) for p in ENGM.iterdir() if p.suffix in (".py", ".pyi") or (p / "__init__.py").is_file()}
    assert rooms == set(FLOOR)


def test_imports_go_down():
    up = [
        f"{path.relative_to(ENGM)} -> {other}"
        for path in sorted(ENGM.rglob("*.py"))
        for other in sorted(imported(path) - {room(path)})
        if FLOOR[other] >= FLOOR[room(path)] and (room(path), other) not in WITHIN
    ]
    assert not up, "imports that do not go down: " + ", ".join(up)


def modules_of(path: Path) -> set[str]:
    """The modules of its own room that a file imports."""
    found = set()
    for parts in imports(path):
        for length in (len(parts), len(parts) - 1):
            file = ENGM.parent.joinpath(*parts[:length]).with_suffix(".py")
            if parts[0] == "engm" and length > 1 and file.is_file() and room(file) == room(path):
                found.add(str(file.relative_to(ENGM)))
    return found - {str(path.relative_to(ENGM))}


def test_no_circle_within_a_room():
    """The files of a room can be read in an order in which none needs a later one."""
    waiting = {str(p.relative_to(ENGM)): modules_of(p) for p in ENGM.rglob("*.py") if p.name != "__init__.py"}
    while ready := {file for file, needed in waiting.items() if not needed & waiting.keys()}:
        waiting = {file: needed for file, needed in waiting.items() if file not in ready}
    assert not waiting, "files that import each other in circles: " + ", ".join(sorted(waiting))


PUBLIC = {"_replace", "_asdict", "_fields", "_exit"}  # of named tuples and of os: documented, underscore and all


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and len(name) > 1 and name not in PUBLIC


def own_names(tree: ast.AST) -> set[str]:
    """Names that a file defines itself: functions, classes, variables, attributes of ``self``, and strings it names."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            found |= {node.attr} if node.value.id == "self" else set()
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "object.__setattr__":
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return found


OURS = set().union(*(own_names(ast.parse(path.read_text())) for path in ENGM.rglob("*.py")))


def names_of_torch(path: Path) -> Iterator[str]:
    """Private names that a file uses and does not define: torch's, since nothing of ours is reached into.

    What an object finds in itself may also come from a class of ours in another file.
    """
    tree = ast.parse(path.read_text())
    own = own_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            if ast.unparse(node.value) == "self" and node.attr in OURS:
                continue
            yield f"{path.relative_to(ENGM)}:{node.lineno} {ast.unparse(node)}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = node.args[1]
            literal = is_private(str(name.value)) and name.value not in own if isinstance(name, ast.Constant) else False
            if literal or "_saved" in ast.unparse(name):
                yield f"{path.relative_to(ENGM)}:{node.lineno} {ast.unparse(node)}"
    for parts in imports(path):
        if parts[0] == "torch" and any(map(is_private, parts)):
            yield f"{path.relative_to(ENGM)} imports {'.'.join(parts)}"


def test_only_one_file_knows_the_insides_of_torch():
    files = (path for path in sorted(ENGM.rglob("*.py")) if path.name != "torch_internals.py")
    found = [use for path in files for use in names_of_torch(path)]
    assert not found, "names of torch that are not public belong into engm/torch_internals.py: " + ", ".join(found)


def test_that_file_would_be_found():
    assert len(list(names_of_torch(ENGM / "torch_internals.py"))) > 20
