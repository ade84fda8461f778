"""The commands on engines: export, tasks, validate, doctor."""

import json
import shutil

import pytest
from click.testing import CliRunner

from prompttune.cli.main import cli
from prompttune.export import EngineFolder
from prompttune.export.parity.accuracy import OTHER_CLASSES
from tests.data_helpers import write_classes
from tests.drawing import drawn_model
from tests.engines import backbone, checkpoint, config_of, copied, exported


def run(*arguments):
    return CliRunner().invoke(cli, [str(one) for one in arguments])


def refused(result, code, message):
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1 or result.stderr.startswith("Usage:")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """An engine made by the command."""
    folder = tmp_path_factory.mktemp("cli") / "engine"
    runs = [checkpoint("linear", 0), f"second={checkpoint('linear', 1)}"]
    result = run("export", *runs, "-o", folder, "--data", "second=demo/digits", "--images", "4", "--json")
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert made["parity"]["images"]["second"] == "4 images of demo/digits"
    assert "synthetic" in made["parity"]["images"]["task0"]
    assert made["tasks"] == ["second", "task0"]
    assert made["parity"]["passed"]
    return folder


def test_export_prints_a_table_and_refuses_an_existing_output(engine, tmp_path):
    refused(run("export", checkpoint("linear", 0), "-o", engine), 2, "give --overwrite")
    refused(
        run("export", checkpoint("linear", 0), "-o", tmp_path / "x", "--format", "tflite"), 2, "'tflite' is not one of"
    )
    refused(run("export", checkpoint("linear", 0), "-o", tmp_path / "x", "--batch-sizes", "0,a"), 2, "batch sizes")
    refused(run("export", tmp_path / "none", "-o", tmp_path / "x"), 1, "no checkpoint folder")
    refused(run("export", f"../x={checkpoint('linear', 0)}", "-o", tmp_path / "x"), 2, "bad task name")
    other = tmp_path / "other"
    drawn_model(backbone(), config_of("lspt"), 3).save(other)
    refused(run("export", checkpoint("linear", 0), other, "-o", tmp_path / "x"), 1, "its method is lspt")
    assert not (tmp_path / "x").exists()


def test_tasks_come_and_go(engine, tmp_path):
    folder = tmp_path / "engine"
    shutil.copytree(engine, folder)
    added = run("tasks", "add", folder, f"late={checkpoint('linear', 3)}", checkpoint("linear", 4))
    assert added.exit_code == 0, added.output
    assert "added late: 5 classes" in added.stdout
    assert "of PyTorch" in added.stdout
    listed = json.loads(run("tasks", "list", folder, "--json").stdout)
    assert list(listed) == ["late", "second", "task0", "task4"]
    assert listed["late"]["source"]["checkpoint"] == "task3"
    assert listed["late"]["parity"]["passed"]
    assert "late" in run("tasks", "list", folder).stdout
    refused(run("tasks", "add", folder, f"late={checkpoint('linear', 3)}"), 2, "--replace")
    replaced = run("tasks", "add", folder, f"late={checkpoint('linear', 5)}", "--replace", "--no-parity", "--json")
    assert len(json.loads(replaced.stdout)["late"]["labels"]) == 7
    removed = run("tasks", "remove", folder, "late", "task0")
    assert removed.stdout == "removed late, task0; left: second, task4\n"
    refused(run("tasks", "remove", folder, "second", "late"), 2, "unknown task 'late'")
    assert EngineFolder(folder).tasks() == ["second", "task4"]
    refused(run("tasks", "add", folder, checkpoint("vpt-shallow", 0)), 1, "its method is vpt-shallow")


def test_validate_sets_the_exit_code(engine, tmp_path):
    output = tmp_path / "report.json"
    passed = run("validate", engine, "--output", output, "--batch-sizes", "1,4", "--images", "4")
    assert passed.exit_code == 0, passed.output
    assert "passed" in passed.stdout
    report = json.loads(output.read_text())
    assert {one["batch_size"] for one in report["comparisons"]} == {1, 4}
    failed = run("validate", engine, "--atol", "0", "--json")
    assert failed.exit_code == 1
    assert not json.loads(failed.stdout)["passed"]
    assert "does not answer as PyTorch does" in failed.stderr
    refused(run("validate", engine, "--task", "nobody"), 2, "unknown task 'nobody'")
    refused(run("validate", tmp_path), 1, "no engine manifest")
    refused(run("validate", engine, "--data", "demo/digits", "--data", "demo/count"), 2, "TASK=DATA")


def test_validate_on_data_shows_the_accuracy(tmp_path):
    drawn_model(backbone(), config_of("linear"), 10).save(tmp_path / "digits")
    folder = copied("linear", tmp_path)
    assert run("tasks", "add", folder, tmp_path / "digits", "--data", "demo/digits").exit_code == 0
    result = run("validate", folder, "--data", "digits=demo/digits", "--limit", "20", "--images", "2", "--json")
    assert result.exit_code == 0, result.output
    (accuracy,) = json.loads(result.stdout)["accuracy"]
    assert (accuracy["task"], accuracy["images"]) == ("digits", 20)
    assert accuracy["engine"] == accuracy["reference"]
    shown = run("validate", folder, "--data", "digits=demo/digits", "--limit", "20", "--images", "2")
    assert "PyTorch top-1" in shown.stdout
    assert f"{accuracy['engine']:.2%}" in shown.stdout


def labelled(folder, counts):
    """The report of ``validate`` on the task ``task0``, whose classes are 0 and 1."""
    write_classes(folder, counts, start=700)
    return validated("--data", f"task0={folder}")


def validated(*words):
    engine = exported("linear")
    result = run("validate", engine, *words, "--json", "--images", "2", "--batch-sizes", "1,2")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_an_engine_is_scored_on_the_images_that_it_was_given(tmp_path):
    (one,) = labelled(tmp_path / "whole", {"0": 5, "1": 5})["accuracy"]
    assert (one["images"], one["skipped"]) == (10, "")
    assert one["notes"] == [f"10 images are scored: all images of {tmp_path / 'whole'}"]
    for split, count in (("train", 2), ("test", 3)):
        write_classes(tmp_path / "splits" / split, {"0": count, "1": count}, start=900 + count)
    (one,) = validated("--data", f"task0={tmp_path / 'splits'}")["accuracy"]
    assert (one["images"], "the split test of" in one["notes"][0]) == (6, True)
    (one,) = validated("--data", f"task0={tmp_path / 'splits'}", "--split", "all")["accuracy"]
    assert one["images"] == 10
    failed = run("validate", exported("linear"), "--data", f"task0={tmp_path / 'splits'}", "--split", "val")
    refused(failed, 1, "has no split val, it has only train and test")


def test_an_engine_is_scored_on_classes_that_differ(tmp_path):
    (one,) = labelled(tmp_path / "lacks", {"1": 4})["accuracy"]
    assert one["notes"][1] == "no images of 1 of the 2 classes: 0; they have no figures"
    assert one["evaluation"]["engine"]["confusion"]["1"].keys() <= {"0", "1"}
    assert sum(one["evaluation"]["engine"]["confusion"]["1"].values()) == 4
    (one,) = labelled(tmp_path / "more", {"1": 4, "emu": 2})["accuracy"]
    assert one["evaluation"]["engine"]["n"] == 6
    assert one["engine"] <= 4 / 6
    assert "2 images of class emu, which the model does not have, are counted as wrong" in one["notes"][2]
    write_classes(tmp_path / "other", {"emu": 2, "ant": 2}, start=800)
    failed = run("validate", exported("linear"), "--data", f"task0={tmp_path / 'other'}")
    refused(failed, 1, "no class of the data is one of the model's")
    report = validated("--data", tmp_path / "other")  # for all tasks: none has these classes
    assert {one["skipped"] for one in report["accuracy"]} == {OTHER_CLASSES}
    (one,) = validated("--data", tmp_path / "more", "--task", "task0")["accuracy"]  # meant for that task
    assert one["evaluation"]["engine"]["n"] == 6


def test_validate_against_another_engine(engine, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(engine, folder)
    arguments = ("validate", engine, "--against", folder, "--images", "4", "--batch-sizes", "1,4")
    passed = run(*arguments)
    assert passed.exit_code == 0, passed.output
    assert f"against {folder} (onnx fp32, ONNX Runtime" in passed.stdout
    assert "thresholds of fp32, the precision of both" in passed.stdout
    assert "swaps A, B, A: 8 of 8 gave A's first answer bit for bit" in passed.stdout
    refused(run(*arguments, "--debug"), 2, "leave out the other engine")
    assert run("tasks", "add", folder, f"task0={checkpoint('linear', 0)}", "--replace", "--no-parity").exit_code == 0
    assert run("tasks", "remove", folder, "second").exit_code == 0
    alone = json.loads(run(*arguments, "--json").stdout)
    assert list(alone["images"]) == ["task0"]
    drawn_model(backbone(), config_of("linear"), 2, seed=7).save(tmp_path / "task0")
    assert run("tasks", "add", folder, tmp_path / "task0", "--replace", "--no-parity").exit_code == 0
    refused_by_parity = run(*arguments, "--json")
    assert refused_by_parity.exit_code == 1
    assert f"does not answer as {folder} does: task 'task0'" in refused_by_parity.stderr
    assert len(refused_by_parity.stderr.strip().splitlines()) == 1
    assert run("tasks", "remove", folder, "task0").exit_code == 0
    refused(run(*arguments), 1, "no task is in both engines")


@pytest.mark.parametrize("command", ["validate", "export", "tasks add"])
def test_help_names_the_thresholds_of_each_precision(command):
    text = " ".join(run(*command.split(), "--help").stdout.split())
    assert "[default: 0.0001 for fp32, none for fp16, bf16 and int8]" in text
    assert "[default: 1 for fp32, 0.99 for fp16, bf16 and int8]" in text
    assert "[default: none for fp32, 0.01 for fp16, bf16 and int8]" in text


def test_the_error_names_the_worst_figure(engine):
    failed = run("validate", engine, "--atol", "0", "--json")
    worst = json.loads(failed.stdout)["failures"][0]
    assert failed.stderr.strip().endswith(worst)


def test_validate_without_the_weights_says_how_to_give_them(tmp_path):
    folder = copied("linear", tmp_path)
    from tests.test_export_folder import reseal

    def lose(values):
        values["backbone"]["weights"] = "random:5"

    reseal(folder / "engine.json", lose)
    refused(run("validate", folder), 1, "give the right file with --weights")
    assert run("validate", folder, "--weights", backbone().weights).exit_code == 0


def test_doctor_reports_and_never_fails(monkeypatch):
    findings = json.loads(run("doctor", "--json").stdout)
    assert findings["versions"]["torch"]
    assert "CPUExecutionProvider" in findings["ONNX Runtime"]["providers"]
    assert findings["TensorRT"]["state"]
    assert "gpu" in findings["extras"]
    assert "vit_small_patch14_dinov2" in findings["weights"]
    from prompttune.cli import doctor

    monkeypatch.setitem(doctor.SECTIONS, "weights", lambda: 1 / 0)
    result = run("doctor")
    assert result.exit_code == 0
    assert "error  ZeroDivisionError" in result.stdout


def test_doctor_tells_stubs_from_tensorrt(monkeypatch):
    import sys
    import types

    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    assert "type stubs only" in json.loads(run("doctor", "--json").stdout)["TensorRT"]["state"]
    real = types.ModuleType("tensorrt")
    real.Builder, real.__version__ = object, "10.13"
    monkeypatch.setitem(sys.modules, "tensorrt", real)
    assert json.loads(run("doctor", "--json").stdout)["TensorRT"] == {"state": "usable", "version": "10.13"}


@pytest.mark.parametrize(
    "command", ["export", "tasks", "tasks add", "tasks remove", "tasks list", "validate", "infer", "doctor"]
)
def test_help_shows_an_example(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"prompttune {command} " in result.stdout.replace("prompttune doctor\n", "prompttune doctor \n").replace(
        "prompttune tasks list", "prompttune tasks  prompttune tasks list"
    )


def test_exported_engine_reads_as_exported():
    assert EngineFolder(exported("linear")).manifest == EngineFolder(exported("linear"), verify=False).manifest
