"""Layout of the package: imports point downwards, form no cycles, and keep the two towers apart."""

import ast
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

import stepdpo_trl

PACKAGE = Path(stepdpo_trl.__file__).parent

# A folder may import from those on lower floors. See CONTRIBUTING.md.
FLOORS = [
    {"data", "shared_prefix", "quickstart"},
    {"generation", "sdpo"},
    {"runs", "step_dpo"},
    {"pipeline"},
    {"evaluation", "inspection"},
    {"cli"},
]
FLOOR = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}
LEFT = {"generation", "runs", "pipeline", "evaluation"}  # makes and judges text
RIGHT = {"shared_prefix", "sdpo", "step_dpo"}  # trains


def module_name(file, root):
    parts = file.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


class Imports(ast.NodeVisitor):
    """Collects the imports of a file as `(line, absolute name)`, except those under `if TYPE_CHECKING`."""

    def __init__(self, name, is_package):
        self.package = name if is_package else name.rpartition(".")[0]
        self.found = []

    def visit_If(self, node):
        if "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
        self.generic_visit(node)

    def visit_Import(self, node):
        self.found += [(node.lineno, alias.name) for alias in node.names]

    def visit_ImportFrom(self, node):
        above = self.package.split(".")[: len(self.package.split(".")) - node.level + 1] if node.level else []
        module = ".".join([*above, *([node.module] if node.module else [])])
        self.found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]


def read_imports(root):
    """Return the imports of each module of a package: `{module: [(where, imported module or name)]}`."""
    files = {module_name(file, root): file for file in sorted(root.rglob("*.py"))}
    imports = {}
    for name, file in files.items():
        visitor = Imports(name, file.name == "__init__.py")
        visitor.visit(ast.parse(file.read_text(encoding="utf-8")))
        imports[name] = []
        for line, target in visitor.found:
            target = target if target in files else target.rpartition(".")[0] if "." in target else target
            imports[name].append((f"{file.relative_to(root.parent)}:{line} imports {target}", target))
    return imports


def folder_of(module, root):
    parts = module.split(".")
    return parts[1] if parts[0] == root.name and len(parts) > 1 else None


def violations(root):
    """Return a message for every import that breaks the layout, with its location and the rule."""
    imports = read_imports(root)
    found = []
    for module, targets in imports.items():
        own = folder_of(module, root)
        if own is None:
            continue
        if own not in FLOOR:
            found.append(f"{module}: the folder {own!r} has no floor in {Path(__file__).name}")
            continue
        for where, target in targets:
            if own in LEFT and target.split(".")[0] == "trl":
                found.append(f"{where}: {own}/ makes and judges text and must not depend on TRL")
            other = folder_of(target, root)
            if other in (None, own):
                continue
            if other not in FLOOR:
                found.append(f"{where}: the folder {other!r} has no floor in {Path(__file__).name}")
            elif (own in LEFT and other in RIGHT) or (own in RIGHT and other in LEFT):
                found.append(f"{where}: {own}/ and {other}/ are in different towers")
            elif FLOOR[other] >= FLOOR[own]:
                found.append(f"{where}: {other}/ is not below {own}/")
    graph = {module: {target for _, target in targets if target in imports} for module, targets in imports.items()}
    for module, targets in graph.items():
        targets.discard(module)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle = error.args[1][::-1]
        steps = [
            where for module, target in pairwise(cycle) for where, imported in imports[module] if imported == target
        ]
        found.append(f"import cycle: {'; '.join(steps)}")
    return found


def test_imports_follow_the_layout():
    assert violations(PACKAGE) == []


def test_only_the_init_file_is_at_the_top():
    top = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert top == {"__init__.py", "py.typed"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"data/a.py": "from ..runs.b import x", "runs/b.py": "x = 1"},
            "stepdpo_trl/data/a.py:1 imports stepdpo_trl.runs.b: runs/ is not below data/",
        ),
        (
            {"pipeline/a.py": "def f():\n    from ..sdpo import b", "sdpo/b.py": ""},
            "stepdpo_trl/pipeline/a.py:2 imports stepdpo_trl.sdpo.b: pipeline/ and sdpo/ are in different towers",
        ),
        (
            {"runs/a.py": "import trl.trainer"},
            "stepdpo_trl/runs/a.py:1 imports trl: runs/ makes and judges text and must not depend on TRL",
        ),
        (
            {"data/a.py": "from .b import x", "data/b.py": "from . import a"},
            "import cycle: stepdpo_trl/data/a.py:1 imports stepdpo_trl.data.b; "
            "stepdpo_trl/data/b.py:1 imports stepdpo_trl.data.a",
        ),
        ({"other/a.py": ""}, "stepdpo_trl.other.a: the folder 'other' has no floor in test_layout.py"),
    ],
)
def test_violations_name_the_import(files, message, tmp_path):
    root = tmp_path / "stepdpo_trl"
    for name, text in {"__init__.py": "", **files}.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    found = violations(root)
    assert len(found) == 1
    assert sorted(found[0].removeprefix("import cycle: ").split("; ")) == sorted(
        message.removeprefix("import cycle: ").split("; ")
    )


def test_type_checking_imports_are_ignored(tmp_path):
    root = tmp_path / "stepdpo_trl"
    (root / "data").mkdir(parents=True)
    (root / "data" / "a.py").write_text("if TYPE_CHECKING:\n    from ..runs.b import x\n")
    assert violations(root) == []
