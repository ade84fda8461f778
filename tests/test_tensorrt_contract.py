"""The contract check's own tools: what they must find, and what they must not let pass."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = """
import torch

if TYPE_CHECKING:
    import tensorrt as trt

class Log(trt.ILogger):
    def log(self, severity, msg):
        print(f"{self.prefix} {torch.cuda.device_count()}")

    def logged(self):
        pass

def build(config: trt.IBuilderConfig):
    config.set_flag(trt.BuilderFlag.TF32)
    if hasattr(trt.BuilderFlag, "FP16"):
        config.set_flag(trt.BuilderFlag.FP16)
    config.create_timing_cache(buffer=b"").serialize()
"""
TYPES = {"config": "tensorrt_bindings.tensorrt.IBuilderConfig", "self": "builder.Log"}


@pytest.fixture
def scripts(monkeypatch):
    """Import a module of the folder scripts."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module


def collected(names, type_of):
    """The uses in SOURCE, its values typed by ``type_of`` in place of mypy."""
    source = ast.parse(SOURCE)
    tree = ast.parse(ast.unparse(ast.fix_missing_locations(names.Revealer(source).visit(source))))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    asked = [call.args[0] for call in calls if call.func.id == "reveal_type"]
    types_at = {(one.lineno, one.col_offset + 1): type_of(ast.unparse(one)) for one in asked}
    collector = names.Collector("trt", types_at, "builder.py", {"set_flag"})
    collector.visit(tree)
    return collector.uses


def test_contract_finds_every_name(scripts):
    def type_of(source):
        return "tensorrt_bindings.tensorrt.ITimingCache | None" if "buffer" in source else TYPES.get(source, "foreign")

    uses = {(use.name, use.keyword): use.optional for use in collected(scripts("tensorrt_names"), type_of)}
    assert uses == {
        ("ILogger", None): False,
        ("ILogger.log", None): False,
        ("ILogger.logged", None): False,
        ("IBuilderConfig", None): False,
        ("IBuilderConfig.set_flag", None): False,
        ("BuilderFlag", None): False,
        ("BuilderFlag.TF32", None): False,
        ("BuilderFlag.FP16", None): True,
        ("IBuilderConfig.create_timing_cache", None): False,
        ("IBuilderConfig.create_timing_cache", "buffer"): False,
        ("ITimingCache.serialize", None): False,
    }


def test_contract_refuses_what_has_no_type(scripts):
    names = scripts("tensorrt_names")
    with pytest.raises(names.UnknownTypeError, match=r"annotate .*serialize TensorRT's"):
        collected(names, lambda source: "Any" if "buffer" in source else TYPES.get(source, "foreign"))


def test_contract_notices_names_that_do_not_exist(scripts, tmp_path):
    names, contract = scripts("tensorrt_names"), scripts("tensorrt_contract")
    (tmp_path / "tensorrt_bindings.py").write_text(
        "__version__ = '12'\nclass Config:\n    def set(self, flag):\n        'set(self: Config, flag: Flag) -> None'\n"
    )
    uses = [
        names.Use("Config.set", "here"),
        names.Use("Config.set", "here", "flag"),
        names.Use("Config.set", "here", "level"),
        names.Use("Config.made_up", "here"),
        names.Use("MadeUp", "here", optional=True),
    ]
    version, missing = contract.missing_uses(uses, tmp_path, tmp_path)
    assert (version, missing) == ("12", uses[2:])
    assert contract.broken({"11": missing, "12": missing}).keys() == set(missing)
    assert contract.broken({"11": [], "12": missing}) == {uses[2]: ["12"], uses[3]: ["12"]}


def test_stubs_are_mended(scripts):
    text = (
        "import typing\ndef f(in: list[int]) -> bool: ...\ndef g(a: int = 0, channel_axis: int): ...\nbool: DataType\n"
    )
    mended = scripts("tensorrt_stubs").mended(text)
    ast.parse(mended)
    assert "-> builtins.bool" in mended
    assert "\nbool: DataType" in mended
