"""DAM-VP on two processes: the clusters of the first are those of both."""

import json
from pathlib import Path

import pytest

import prompttune as pt
from tests.test_training_resume import PATIENCE_S, start
from tests.training_helpers import settings, write_folder


@pytest.mark.slow
def test_two_processes_share_the_clusters_of_the_first(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", train=6, val=2)
    method = {"method": "dam-vp", "cluster_distance": 1e-3, "max_clusters": 3}
    values = settings(data, tmp_path / "run", devices=2, epochs=2, batch_size=6, **method)
    process = start(tmp_path, values, "--json")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert json.loads(out)["final"]["n"] == 8
    alone = settings(data, tmp_path / "alone", epochs=1, batch_size=6, **method)
    pt.train(pt.TrainConfig.from_flat(alone))
    found, expected = (pt.PromptModel.load(tmp_path / name).method.centres for name in ("run", "alone"))
    assert found.shape == (3, 64)
    assert found.equal(expected)
