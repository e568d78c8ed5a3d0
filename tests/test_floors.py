"""The house's floors: a room imports only from lower floors; rooms of one floor do not import each other."""

import ast
from pathlib import Path

import pytest

import pagoda
from pagoda.toml_data import tomllib

ROOT = Path(pagoda.__file__).parent
FLOORS = {
    "cli": 8,
    "serve": 7,
    "offline": 6,
    "quantize": 6,
    "engine": 5,
    "models": 4,
    "layers": 3,
    "text": 3,
    "kernels": 2,
    "config": 1,
    "errors": 1,
    "log": 1,
    "toml_data": 1,
}
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms named by any import in the file: at the top, inside functions, or for types only."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "pagoda":
                rooms |= {alias.name for alias in node.names if alias.name in FLOORS}
            elif node.module and node.module.startswith("pagoda."):
                rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("pagoda.")}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_from_lower_floors(path: Path) -> None:
    room = room_of(path)
    assert room in FLOORS, f"{room} is not a room of the house"
    for other in imported_rooms(path) - {room}:
        assert (
            FLOORS[other] < FLOORS[room] or (room, other) in {("errors", "log")} or FLOORS[room] == 1 == FLOORS[other]
        )


def test_files_are_named_for_their_purpose() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "base"}
    assert not [p for p in FILES if p.stem in vague]


def test_the_package_stays_small() -> None:
    lines = sum(len(p.read_text(encoding="utf-8").splitlines()) for p in FILES)
    assert lines <= 24500, f"{lines} lines: the house was to stay within 24,500"


FORBIDDEN = {
    "pickle", "cloudpickle", "dill", "marshal", "shelve", "eval", "exec", "yaml.load", "os.system",
    "jinja2.Environment", "BaseHTTPMiddleware", "recv_pyobj", "send_pyobj", "ForkingPickler",
}  # fmt: skip


def dangers_of(source: str) -> list[str]:
    """What a source names of the ways by which data becomes code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            found += [name for a in node.names for name in (a.name, f"{module}.{a.name}", module) if name in FORBIDDEN]
        elif isinstance(node, ast.Call):
            words = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            called = ast.unparse(node.func)
            found += [name for name in (called, called.rpartition(".")[2]) if name in FORBIDDEN and name != "eval"]
            found += ["eval"] * (called == "eval") + ["shell=True"] * bool(words.get("shell"))
            found += ["torch.load"] * (called.endswith("torch.load") and words.get("weights_only") is not True)
            found += ["trust_remote_code"] * bool(words.get("trust_remote_code"))
    return found


def test_data_never_becomes_code() -> None:
    assert {p.name: found for p in FILES if (found := dangers_of(p.read_text(encoding="utf-8")))} == {}
    bad = "import pickle\neval('1')\ntorch.load(f)\nrun(x, shell=True)\njinja2.Environment()\nfrom yaml import load\n"
    wanted = ["eval", "jinja2.Environment", "pickle", "shell=True", "torch.load", "yaml.load"]
    assert sorted(dangers_of(bad)) == wanted


def test_a_wheel_brings_every_file() -> None:
    """What stands beside the code is package data, too."""
    project = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    brought = {p for glob in project["tool"]["setuptools"]["package-data"]["pagoda"] for p in ROOT.glob(glob)}
    files = {p for p in ROOT.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert files - brought == set() and ROOT / "text" / "named_templates.toml" in files
