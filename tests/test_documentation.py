"""Every public name says what it is: in a docstring, or for a constant in the words below or above its assignment."""

import ast
import importlib
import inspect
from pathlib import Path

import madtp
import madtp_kernels

MODULES = [
    (package.__name__, path)
    for package in (madtp_kernels, madtp)
    for path in sorted(Path(package.__file__).parent.rglob("*.py"))
    if path.name not in ("triton.py", "__main__.py")  # kernels are documented where they are dispatched
]


OF_TORCH = {"device", "dtype", "state_dict", "load_state_dict"}  # which mean what they mean there


def name_of(package, path):
    root = Path(importlib.import_module(package).__file__).parent
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join((package, *(part for part in parts if part != "__init__")))


def public_names(module, tree):
    """Those in ``__all__``, or else those that the module defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    definitions = [s.name for s in tree.body if isinstance(s, (ast.FunctionDef, ast.ClassDef))]
    return [name for name in (*definitions, *assigned(tree)) if not name.startswith("_")]


def assigned(tree):
    """Names that are assigned at the top of a module, and the statements."""
    found = {}
    for place, statement in enumerate(tree.body):
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            found |= {name.id: place for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return found


def is_described(tree, lines, place):
    """Whether words follow an assignment, or a comment stands above it or beside it."""
    statement, after = tree.body[place], tree.body[place + 1 : place + 2]
    words = after and isinstance(after[0], ast.Expr) and isinstance(after[0].value, ast.Constant)
    return bool(words) or lines[statement.lineno - 2].startswith("#") or "  # " in lines[statement.lineno - 1]


def undocumented(module, path):
    """Public names of a module, those of its classes included, of which nobody says what they are."""
    source = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    constants = assigned(tree)
    for name in public_names(module, tree):
        value = getattr(module, name)
        if name in constants:
            if not is_described(tree, lines, constants[name]):
                yield name
            continue
        if not (inspect.isclass(value) or inspect.isroutine(value)) or value.__module__ != module.__name__:
            continue  # said where it is defined
        if not value.__doc__:
            yield name
        for attribute, member in vars(value).items() if inspect.isclass(value) else ():
            written = inspect.isroutine(member) or isinstance(member, (property, classmethod, staticmethod))
            known = attribute in OF_TORCH or any(attribute in vars(base) for base in value.__mro__[1:])
            if written and not known and not attribute.startswith("_") and not inspect.getdoc(member):
                yield f"{name}.{attribute}"


def test_every_module_and_every_public_name_is_documented():
    missing = []
    for package, path in MODULES:
        module = importlib.import_module(name_of(package, path))
        missing += [] if module.__doc__ else [module.__name__]
        missing += [f"{module.__name__}.{name}" for name in undocumented(module, path)]
    assert not missing, "\n".join(missing)


def test_modules_that_pages_name_need_no_import_of_their_own(fresh):
    code = "import madtp; madtp.predict.nlvr, madtp.patch.attention_mask, madtp.varlen.apply, madtp.fingerprint.fingerprint"
    process = fresh.start(f"{code}\nassert not hasattr(madtp, 'nothing') and not hasattr(madtp, '_nothing')")
    assert process.wait() == 0, process.stderr
