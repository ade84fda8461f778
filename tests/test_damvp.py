"""DAM-VP: its equations, its clusters, training with them, mixed engines, and the start that several data sets give."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import prompttune as pt
from prompttune.checkpoints.meta_prompt import read_prompt
from prompttune.cli.main import cli
from prompttune.errors import CheckpointError, DataError, TrainingError, UsageError
from prompttune.export.banks import BankForm, stack_states
from prompttune.files import locked
from prompttune.methods.damvp.clustering import find_centres, gather_features
from prompttune.methods.damvp.method import add_border, nearest_clusters
from prompttune.training.initial import read_start
from prompttune.training.meta_learning import MetaSettings, learn_prompt
from prompttune.training.state import RunFolder, load
from tests.drawing import drawn_model
from tests.engines import SIZE, backbone, checkpoint, config_of, model_of, noise
from tests.training_helpers import config, no_pictures, one_thread, write_folder  # noqa: F401


@pytest.fixture(scope="module")
def bars(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("bars"), train=12, val=4)


@pytest.fixture(scope="module")
def plain():
    return pt.load_backbone("test_vit", 32, "random:0")


def blobs(per_cluster=(5, 4, 3)):
    """Features around three far points, and each one's point."""
    draw = torch.Generator().manual_seed(0)
    points = 10 * torch.eye(3, 8)
    which = torch.cat([torch.full((count,), number) for number, count in enumerate(per_cluster)])
    return points[which] + 0.1 * torch.randn(len(which), 8, generator=draw), which


def bordered(image, border, width):
    """The border's pixels added one by one: rows of the top, the bottom, the left, the right."""
    side, pixels = image.shape[-1], iter(range(border.shape[-1]))
    image = image.clone()
    inner = range(width, side - width)
    for rows, columns in (
        (range(width), range(side)),
        (range(side - width, side), range(side)),
        (inner, range(width)),
        (inner, range(side - width, side)),
    ):
        for row in rows:
            for column in columns:
                image[:, row, column] += border[:, next(pixels)]
    assert next(pixels, None) is None
    return image


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_eva2", "test_swin2"])
def test_it_equals_its_equations(name):
    frozen, images = backbone(name), torch.from_numpy(noise(6))
    model = drawn_model(frozen, pt.DAMVPConfig(clusters=4, prompt_size=5))
    plain_features = frozen(images)
    with torch.no_grad():  # centres in the middle of what they divide, so that several are chosen
        model.method.centres.copy_(plain_features[:4] + 0.3 * model.method.centres)
    centres, prompts = model.method.centres, model.method.prompts
    nearest = [int(((one - centres) ** 2).sum(dim=-1).argmin()) for one in plain_features]
    assert len(set(nearest)) > 1
    prompted = [bordered(image, prompts[at].detach(), 5) for image, at in zip(images, nearest, strict=True)]
    expected = frozen(torch.stack(prompted))
    assert torch.allclose(model(images).features, expected, atol=2e-5, rtol=1e-4)
    assert (expected - plain_features).abs().max() > 1e-2


def test_the_border_is_the_released_one():
    """30 pixels of 224, 69,840 values for each prompt."""
    at_224 = pt.DAMVPConfig().resolved(pt.load_backbone("test_vit", 224, "random"))
    assert at_224.prompt_size == 30
    assert at_224.build(pt.load_backbone("test_vit", 224, "random")).prompts.numel() == 69_840
    images = torch.zeros(1, 3, 6, 6)
    ring = add_border(images, torch.ones(1, 3, 32), 2)[0, 0]
    assert ring.sum() == 32
    assert ring[2:4, 2:4].sum() == 0


def test_the_first_of_equal_centres_is_chosen_and_padding_never():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    centres = torch.tensor([[[5.0, 0.0], [0.0, 2.0], [0.0, 2.0], [0.0, 0.0]]])
    offsets = -0.5 * centres.square().sum(dim=-1)
    assert nearest_clusters(features, centres, offsets).tolist() == [3, 1, 3]
    offsets[..., 3] = -torch.inf  # a zero centre would be the nearest
    assert nearest_clusters(features, centres, offsets).tolist() == [1, 1, 1]


def test_padded_centres_never_win_in_a_bank():
    frozen, images = backbone(), torch.from_numpy(noise(4))
    # Centres so far off that the zeros of a padded row would be nearer.
    models = [drawn_model(frozen, config_of("dam-vp", clusters=count), 3, seed=count) for count in (2, 4)]
    with torch.no_grad():
        for model in models:
            model.method.centres.add_(100.0)
        states = [{key: row.numpy() for key, row in model.task_state().items()} for model in models]
        layout = models[0].state_layout()
        bank = stack_states(BankForm(layout, by_class=False), states).rows
        assert bank["centres"].shape[:2] == (2, 4)
        assert np.isneginf(bank["offsets"][0, 2:]).all()
        assert np.isfinite(bank["offsets"][1]).all()
        rows = {key: torch.from_numpy(value)[torch.tensor([0, 0, 1, 1])] for key, value in bank.items()}
        mixed = models[0].forward_state(images, rows).logits
        for row, model in enumerate((models[0], models[0], models[1], models[1])):
            torch.testing.assert_close(mixed[row], model(images[row : row + 1]).logits[0], atol=2e-5, rtol=1e-4)
    empty = BankForm(layout).empty({"tasks": 1, "clusters": 2, "classes": 3})
    assert np.isneginf(empty["offsets"]).all()
    assert not empty["centres"].any()


@pytest.mark.parametrize(
    ("given", "count"),
    [({"clusters": 3}, 3), ({}, 3), ({"cluster_distance": 1.0}, 3), ({"cluster_distance": 100.0}, 1),
     ({"cluster_distance": 1e-3}, 12), ({"cluster_distance": 1e-3, "max_clusters": 2}, 2), ({"clusters": 1}, 1)],
)  # fmt: skip
def test_clusters(given, count):
    features, which = blobs()
    centres = find_centres(features, pt.DAMVPConfig(**given))
    assert centres.shape == (count, 8)
    assert torch.equal(centres, find_centres(features, pt.DAMVPConfig(**given)))
    if count == 3:
        expected = torch.stack([features[which == number].mean(dim=0) for number in range(3)])
        assert all((centres - one).norm(dim=-1).min() < 1e-5 for one in expected)


def test_more_clusters_than_images_are_refused():
    with pytest.raises(TrainingError, match="cannot make 13 clusters of 12 images"):
        find_centres(blobs()[0], pt.DAMVPConfig(clusters=13))
    assert find_centres(blobs()[0][:1], pt.DAMVPConfig()).shape == (1, 8)


def test_features_that_are_not_finite_are_refused(plain):
    images = torch.full((2, 3, 32, 32), float("nan"))
    with pytest.raises(TrainingError, match="features of some image are not finite"):
        gather_features(plain, [(images, torch.zeros(2))], 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clusters": 0}, "clusters must be at least 1"),
        ({"cluster_distance": 0.0}, "above 0"),
        ({"clusters": 2, "cluster_distance": 3.0}, "not both"),
        ({"clusters": 20}, "clusters 20 is above max_clusters 16"),
        ({"prompt_size": 16}, "leaves nothing of an image of 32"),
    ],
)
def test_bad_settings_are_refused(plain, given, message):
    with pytest.raises(UsageError, match=message) as caught:
        pt.DAMVPConfig(**given).resolved(plain)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("one_thread", "no_pictures")
def test_training_finds_clusters_once_and_goes_on_bit_identical(bars, plain, tmp_path):
    flat = {"method": "dam-vp", "cluster_distance": 0.01, "max_clusters": 3, "cluster_images": 30, "epochs": 3}
    whole = pt.train(config(bars, tmp_path / "whole", **flat), plain)
    broken = config(bars, tmp_path / "broken", **flat)

    def stop(news):
        if news.phase == "epoch" and news.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pt.train(broken, plain, on_progress=stop)
    pt.train(broken, plain, resume=True)
    one, other = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "broken"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert whole.metrics["history"][-1]["train_loss"] < whole.metrics["history"][0]["train_loss"]
    model = pt.PromptModel.load(tmp_path / "whole", plain)
    assert model.method.centres.shape == (3, plain.width)
    assert not any(key.startswith("optimizer/") and "centres" in key for key in one)
    assert (model.method.prompts != 0).any(dim=-1).any(dim=-1).sum() > 1, "several prompts must have trained"
    assert (model.method.prompts[0] - model.method.prompts[1]).abs().max() > 0


@pytest.mark.usefixtures("one_thread", "no_pictures")
def test_a_run_killed_before_its_first_epoch_keeps_its_clusters(bars, plain, tmp_path, monkeypatch):
    flat = {"method": "dam-vp", "clusters": 2, "epochs": 1}

    def stop(news):
        if news.phase == "train":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pt.train(config(bars, tmp_path / "run", **flat), plain, on_progress=stop)
    found = load(RunFolder(tmp_path / "run").last).task["method.centres"]
    monkeypatch.setattr("prompttune.methods.damvp.method.find_centres", None)  # a resumed run finds none
    pt.train(config(bars, tmp_path / "run", **flat), plain, resume=True)
    assert torch.equal(load(RunFolder(tmp_path / "run").last).task["method.centres"], found)
    assert found.abs().max() > 0


def test_engines_of_one_border_alone(tmp_path):
    narrow = drawn_model(backbone(), pt.DAMVPConfig(clusters=2, prompt_size=3), 2)
    narrow.save(tmp_path / "narrow")
    with pytest.raises(pt.PrompttuneError, match="its prompt_size is"):
        pt.export_engine([checkpoint("dam-vp", 0), tmp_path / "narrow"], tmp_path / "engine")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_lower_precisions_pass_their_gate(tmp_path, precision):
    settings = pt.ExportSettings("onnx", precision)
    tasks = [checkpoint("dam-vp", number) for number in (1, 2)]
    folder = pt.export_engine(tasks, tmp_path / "engine", format=settings, batch_sizes=(1, 3))
    assert folder.manifest.parity["passed"]
    images = noise(3)
    exact = model_of("dam-vp", 2)(torch.from_numpy(images)).logits.detach().numpy()
    found = pt.Engine(folder.path).logits(images, "task2")[:, :4]
    assert 0 < np.abs(found - exact).max() <= 0.1 * np.abs(exact).max()


@pytest.mark.usefixtures("one_thread")
def test_meta_learning_lowers_the_loss_and_training_starts_from_it(bars, plain, tmp_path):
    other = write_folder(tmp_path / "other", train=6, val=2)
    file = tmp_path / "made" / "meta.safetensors"
    chosen = MetaSettings(steps=6, inner_steps=2, batch_size=48, lr=0.5)
    losses = learn_prompt(plain, [str(bars), str(other)], file, settings=chosen)
    assert losses[-1] < losses[0]
    size = pt.DAMVPConfig().resolved(plain).prompt_size
    prompt = read_prompt(file, plain, size)
    assert prompt.abs().max() > 0
    again = tmp_path / "again.safetensors"
    assert learn_prompt(plain, [str(bars), str(other)], again, settings=chosen) == losses
    assert torch.equal(read_prompt(again, plain, size), prompt)
    model = pt.PromptModel(plain, pt.DAMVPConfig(meta_init=str(file), clusters=2), 4)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model.method.begin_training([(images, torch.zeros(4))], read_start(model))
    assert torch.equal(model.method.prompts, torch.stack((prompt, prompt)))
    model.save(tmp_path / "task")
    file.unlink()  # a task does not need what it began from
    assert torch.equal(pt.PromptModel.load(tmp_path / "task", plain).method.prompts, model.method.prompts)
    assert torch.allclose(read_prompt(tmp_path / "task", plain, size), prompt)


def test_meta_learning_tells_of_images_that_cannot_be_read(plain, tmp_path, caplog):
    data = write_folder(tmp_path / "data", train=4, val=1)
    files = sorted((data / "train").rglob("*.png"))
    files[0].write_bytes(b"no image")
    learn_prompt(plain, [str(data)], tmp_path / "start", settings=MetaSettings(steps=1, inner_steps=1))
    assert f"unreadable image: {files[0]}" in caplog.text
    for file in files:
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"16 images cannot be read \(limit 10\), first: .*not an image"):
        learn_prompt(plain, [str(data)], tmp_path / "start", settings=MetaSettings(steps=1, inner_steps=1))


def test_one_process_alone_learns_a_start(bars, plain, tmp_path):
    with locked(tmp_path / "start"), pytest.raises(UsageError, match="writes to"):
        learn_prompt(plain, [str(bars)], tmp_path / "start")


def test_one_reptile_step_is_its_equation(bars, plain, tmp_path):
    """One step with one inner step: minus the learning rate times the mean of the clusters' gradients."""
    chosen = MetaSettings(steps=1, inner_steps=1, lr=2.0, step_size=0.5, batch_size=48)
    file = tmp_path / "meta.safetensors"
    learn_prompt(plain, [str(bars)], file, config=pt.DAMVPConfig(clusters=2), settings=chosen)
    from prompttune.data.rng import derive_seed
    from prompttune.training.meta_learning import _MetaTask

    torch.manual_seed(derive_seed("meta", 0))
    task = _MetaTask(plain, pt.DAMVPConfig(clusters=2).resolved(plain), str(bars), chosen, torch.device("cpu"))
    images, targets = next(task.batches)
    torch.nn.functional.cross_entropy(task.model(images).logits, targets).backward()
    expected = -0.5 * 2.0 * task.method.prompts.grad.mean(dim=0)
    found = read_prompt(file, plain, task.method.prompt_size)
    assert torch.allclose(found, expected, atol=1e-7)
    assert found.abs().max() > 0


def test_a_foreign_start_is_refused_in_one_line(plain, tmp_path):
    from prompttune.checkpoints.meta_prompt import write_prompt

    write_prompt(tmp_path / "meta.safetensors", torch.zeros(3, 10), plain, 4, {})
    (tmp_path / "no.safetensors").write_bytes(b"no")
    for path, message in (
        ("meta.safetensors", "its prompt size is 4, this one is 5"),
        ("no.safetensors", "not a meta prompt, or is damaged"),
        ("missing", "no meta prompt at .*missing"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            read_prompt(tmp_path / path, plain, 5)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="its backbone is"):
        read_prompt(checkpoint("dam-vp", 0), plain, 4)
    with pytest.raises(CheckpointError, match="a checkpoint of linear"):
        read_prompt(checkpoint("linear", 0), plain, 4)
    with pytest.raises(CheckpointError, match="no meta prompt at"):
        read_start(pt.PromptModel(plain, pt.DAMVPConfig(meta_init="nowhere"), 2))


@pytest.mark.usefixtures("one_thread")
def test_the_command_learns_a_start(bars, tmp_path):
    given = [*("meta", "--data", str(bars), "--output", str(tmp_path / "m.safetensors"), "--backbone", "test_vit")]
    given += ["--weights", "random:0", "--image-size", "32", "--steps", "2", "--inner-steps", "1", "--device", "cpu"]
    found = CliRunner().invoke(cli, [*given, "--json"])
    assert found.exit_code == 0, found.output
    assert len(json.loads(found.stdout)["losses"]) == 2
    bad = CliRunner().invoke(cli, [*given, "--lr", "-1"])
    assert bad.exit_code == 2
    assert bad.stderr.splitlines()[-1] == "Error: Invalid value for '--lr': lr must be above 0, not -1.0"


def test_sizes_agree():
    assert SIZE == 64  # the border of the tests' engines follows it
    assert model_of("dam-vp", 0).config.prompt_size == 9
