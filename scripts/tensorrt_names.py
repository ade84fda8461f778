"""Which names of TensorRT our sources use, found by mypy.

``config.set_flag`` counts as TensorRT's because mypy says that ``config`` is an ``IBuilderConfig``. So a new use is
found without a table that someone has to keep, and a value whose type is not known is an error, not a gap.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = {"prompttune": "prompttune", "export": "prompttune/export", "serve": "prompttune/serve"}
CACHE = ROOT / "build" / "tensorrt-names"
_TYPE = re.compile(r"(?:type\[)?tensorrt(?:_bindings)?(?:\.tensorrt)?\.([\w.]+)\]?")
_NOTE = re.compile(r'(?P<file>.+?):(?P<line>\d+):(?P<column>\d+): note: Revealed type is "(?P<type>.*)"')


@dataclass(frozen=True)
class Use:
    """One name of TensorRT in our sources."""

    name: str
    """Below the module: ``BuilderFlag.TF32``, ``IBuilderConfig.set_flag``."""
    where: str
    keyword: str | None = None
    """An argument that a call gives by name."""
    optional: bool = False
    """Whether the source asks ``hasattr`` first, so that a version may lack it."""


class UnknownTypeError(Exception):
    """A value of which mypy cannot tell whether it is TensorRT's."""


def imports(tree: ast.Module) -> Iterator[ast.alias]:
    """What a module imports whole at its top, for the type checker alone too."""
    for node in tree.body:
        typed = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for one in node.body if typed else [node]:
            yield from one.names if isinstance(one, ast.Import) else ()


def alias_of(tree: ast.Module) -> str | None:
    """The name under which a module imports tensorrt at its top, or None.

    A function's parameter of that name is a library that answers as tensorrt does.
    """
    return next((name.asname or name.name for name in imports(tree) if name.name == "tensorrt"), None)


def chain(node: ast.expr, alias: str) -> str | None:
    """``BuilderFlag.TF32`` of the expression ``trt.BuilderFlag.TF32``, None of what does not begin with the module."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return ".".join(parts) if isinstance(node, ast.Name) and node.id == alias and parts else None


class Revealer(ast.NodeTransformer):
    """Puts ``reveal_type`` around what an attribute is taken of, where mypy has to say what that is."""

    def __init__(self, tree: ast.Module) -> None:
        self._modules = [name.asname or name.name for name in imports(tree)]

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        """An attribute of a module needs no type, and an assignment to self defines what self has."""
        own = isinstance(node.value, ast.Name) and node.value.id == "self" and isinstance(node.ctx, ast.Store)
        if own or any(chain(node, module) for module in self._modules):
            return node
        value = self.visit(node.value)
        asked = ast.Call(ast.Name("reveal_type", ast.Load()), [value], [])
        return ast.Attribute(asked, node.attr, node.ctx)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        """Annotations hold types, of which mypy reveals nothing."""
        node.value = self.visit(node.value) if node.value is not None else None
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.expr:
        """Its values alone, because a formatted string cannot hold the line ends that come in later."""
        values = [self.visit(one.value) for one in node.values if isinstance(one, ast.FormattedValue)]
        return ast.Call(ast.Name("str", ast.Load()), [ast.Tuple(values, ast.Load())], [])

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        """The body alone: signatures hold types."""
        node.body = [self.visit(one) for one in node.body]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        """The body alone: a base must stay what it is."""
        node.body = [self.visit(one) for one in node.body]
        return node


def reveal(sources: Iterable[Path]) -> dict[str, dict[tuple[int, int], str]]:
    """Rewritten source of each file → position of each ``reveal_type`` in it → the type that mypy says."""
    rewritten: dict[Path, str] = {}
    for path in sources:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        text = ast.unparse(ast.fix_missing_locations(Revealer(tree).visit(tree)))
        rewritten[path] = text.replace("reveal_type(", "reveal_type(\n")  # mypy says one thing only once a line
    with tempfile.TemporaryDirectory() as place:
        for folder, package in PACKAGE.items():
            shutil.copytree(ROOT / folder, Path(place) / package, dirs_exist_ok=True)
        for path, text in rewritten.items():
            _installed(path, Path(place)).write_text(text, encoding="utf-8")
        modules = [argument for path in rewritten for argument in ("--module", _module(path))]
        options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(CACHE)]
        shown = ["--show-column-numbers", "--no-error-summary", "--no-pretty", "--hide-error-context"]
        command = [sys.executable, "-m", "mypy", *options, *shown, *modules]
        said = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False).stdout
        types: dict[str, dict[tuple[int, int], str]] = {text: {} for text in rewritten.values()}
        by_file = {str(_installed(path, Path())): text for path, text in rewritten.items()}
        for note in filter(None, map(_NOTE.fullmatch, said.splitlines())):
            if note["file"] in by_file:
                types[by_file[note["file"]]][int(note["line"]), int(note["column"])] = note["type"]
    return types


def _installed(path: Path, place: Path) -> Path:
    folder, *rest = path.relative_to(ROOT).parts
    return place.joinpath(PACKAGE[folder], *rest)


def _module(path: Path) -> str:
    return ".".join(_installed(path, Path()).with_suffix("").parts)


class Collector(ast.NodeVisitor):
    """Finds the uses in a rewritten source.

    Args:
        alias: what it calls the module.
        types: position of each ``reveal_type`` → type.
        where: the file.
        called: attributes that our sources use, methods that they call among them.
    """

    def __init__(self, alias: str, types: dict[tuple[int, int], str], where: str, called: set[str]) -> None:
        self.uses: list[Use] = []
        self._called = called
        self._alias = alias
        self._types = types
        self._where = where
        self._asked: list[str] = []

    def _add(self, node: ast.AST, name: str, keyword: str | None = None) -> None:
        optional = any(name.endswith(f".{asked}") for asked in self._asked)
        self.uses.append(Use(name, f"{self._where}, {ast.unparse(node)}", keyword, optional))

    def _name(self, node: ast.expr) -> str | None:
        """What an attribute is called below TensorRT's module, or None if it is not TensorRT's."""
        whole = chain(node, self._alias)
        if whole is not None or not isinstance(node, ast.Attribute) or not _is_revealed(node.value):
            return whole
        # mypy gives the position of the argument, and counts columns from 1.
        asked = node.value.args[0]
        said = self._types.get((asked.lineno, asked.col_offset + 1))
        if said is None or said == "Any":
            raise UnknownTypeError(f"{self._where}: annotate {ast.unparse(asked)}: is its .{node.attr} TensorRT's?")
        owners = [match[1] for part in said.split(" | ") if (match := _TYPE.fullmatch(part.removesuffix("?")))]
        return f"{owners[0]}.{node.attr}" if owners else None

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """A name of the module or of an object of its classes."""
        name = self._name(node)
        if name is not None:
            self._add(node, name)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """The keywords of a call."""
        name = self._name(node.func) if node.keywords else None
        for keyword in node.keywords if name is not None else ():
            self._add(node, str(name), keyword.arg)
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """A method that only TensorRT can be meant to call must be one of its base."""
        for base in filter(None, (chain(one, self._alias) for one in node.bases)):
            for method in node.body:
                ours = isinstance(method, ast.FunctionDef) and (method.name in self._called or method.name[0] == "_")
                if isinstance(method, ast.FunctionDef) and not ours:
                    self._add(method.args, f"{base}.{method.name}")
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        """What ``hasattr`` asked about is optional within."""
        asked = [
            str(one.args[1].value)
            for one in ast.walk(node.test)
            if isinstance(one, ast.Call)
            and isinstance(one.func, ast.Name)
            and one.func.id == "hasattr"
            and isinstance(one.args[1], ast.Constant)
        ]
        self.visit(node.test)
        self._asked += asked
        for inner in node.body:
            self.visit(inner)
        del self._asked[len(self._asked) - len(asked) :]
        for inner in node.orelse:
            self.visit(inner)


def _is_revealed(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "reveal_type"


def used_names(sources: Iterable[Path]) -> list[Use]:
    """Every use of TensorRT in some source files.

    Raises:
        UnknownTypeError: a value's type is not known, so it might be TensorRT's.
    """
    paths = list(sources)
    uses: list[Use] = []
    revealed = {ast.parse(text): types for text, types in reveal(paths).items()}
    called = {node.attr for tree in revealed for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for path, (tree, types) in zip(paths, revealed.items(), strict=True):
        collector = Collector(str(alias_of(tree)), types, path.name, called)
        collector.visit(tree)
        uses += collector.uses
    return list(dict.fromkeys(uses))


def sources() -> list[Path]:
    """Our source files that import tensorrt."""
    files = (path for folder in PACKAGE for path in sorted((ROOT / folder).rglob("*.py")))
    return [path for path in files if alias_of(ast.parse(path.read_text(encoding="utf-8"))) is not None]
