"""Imports point down: a part of the package knows what lies below it, and nothing else."""

import ast
import functools
from pathlib import Path

import madtp
import madtp_kernels

# From the bottom up; a module may import those of its own row and of the rows above this one in the list.
LAYERS = {
    "machinery": "files hub image_transform index inputs jsonl options pictures processes resume search",
    "nn": "config fingerprint flops generation graphs guidance layers linear model processing pruning rows text towers "
    "vision",
    "tasks": "tasks",
    "weights": "weights checkpoints",
    "use": "bulk compress data evaluate patch predict varlen",
    "commands": "__main__ cli report",
}


@functools.cache
def imported(path, package):
    """Names of the modules that a file imports, wherever in it."""
    parts, found = package.split("."), []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (start, node.module)))
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def edges(package):
    """(file, module it is part of, module of the same package that it imports), both as the package's listing names
    them.
    """
    name, root = package.__name__, Path(package.__file__).parent
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        part = relative.parts[0].removesuffix(".py")
        inside = ".".join((name, *relative.parts[:-1]))
        for module in imported(path, inside):
            if module.startswith(f"{name}."):
                yield relative, part, module.split(".")[1]


def test_arrows_point_down():
    rank = {module: number for number, names in enumerate(LAYERS.values()) for module in names.split()}
    wrong = [
        f"{path} imports madtp.{target}"
        for path, part, target in edges(madtp)
        if part != "__init__" and target in rank and rank[target] > rank[part]
    ]
    assert not wrong, wrong


def test_imports_within_functions_find_their_module():
    """Those at the top of a module are tried by whoever imports it."""
    for package in (madtp, madtp_kernels):
        root = Path(package.__file__).parent
        for path, _, _ in edges(package):
            inside = ".".join((package.__name__, *path.parts[:-1]))
            for name in imported(root / path, inside):
                parts = name.split(".")[1:]
                if name.startswith(f"{package.__name__}.") and len(parts) > 1:
                    place = root.joinpath(*parts[:-1])
                    assert place.is_dir() or place.with_suffix(".py").exists(), f"{path} imports {name}"


def test_every_module_has_a_place():
    modules = {path.stem for path in Path(madtp.__file__).parent.iterdir() if path.suffix == ".py" or path.is_dir()}
    placed = [module for names in LAYERS.values() for module in names.split()]
    assert len(placed) == len(set(placed))
    assert modules - {"__init__", "__pycache__"} <= set(placed), modules - set(placed)


def test_the_kernels_know_nothing_of_the_models():
    root = Path(madtp_kernels.__file__).parent
    for path in root.rglob("*.py"):
        inside = ".".join(("madtp_kernels", *path.relative_to(root).parts[:-1]))
        assert not [module for module in imported(path, inside) if module.split(".")[0] == "madtp"], path
