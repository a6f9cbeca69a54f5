"""From a registered version back to checkpoint, run and shards."""

import json

from fixtures.datasets import make_sample, write_dataset
from mlflow.tracking import MlflowClient

from loomvideo.jobs.training.records import dataset_profile, record_datasets, record_model
from loomvideo.model.fingerprints import weights_fingerprint
from loomvideo.pipelines.evaluation.mlflow_report import NOTE, prepend_note
from loomvideo.platform.registry import MODEL_ID, register_version, trained_model
from loomvideo.platform.runs import RunFolder
from loomvideo.platform.tracking import Tracker


def test_a_training_run_has_its_datasets_and_ends_in_a_model_that_leads_back(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    samples = [make_sample("a"), make_sample("b"), make_sample("c", "t2v", split="heldout")]
    dataset = write_dataset(tmp_path / "shards", samples)
    assert dataset_profile(dataset)["tasks"] == {"t2v": 1, "video_edit": 2}
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"weights")
    folder = RunFolder.open(tmp_path / "runs", "pretrain", "a.1")
    tracker = Tracker(folder)
    for _ in range(2):  # a continued run records nothing twice
        record_datasets(tracker, [str(tmp_path / "shards")], [dataset])
        result = {"weights": str(weights), "steps": 7}
        record_model(tracker, folder, "tiny", result, {"loomvideo.dataset.0": f"shards {dataset.digest}"})
    tracker.finish()

    client = MlflowClient(tracking_uri=tracker.uri)
    run = client.get_run(tracker.run_id)
    (found,) = run.inputs.dataset_inputs
    assert found.dataset.name == "shards"
    assert found.dataset.digest == dataset.digest[:36]
    assert json.loads(found.dataset.profile)["samples"] == 3
    (output,) = run.outputs.model_outputs
    model_id = run.data.tags[MODEL_ID]
    assert (output.model_id, output.step) == (model_id, 7)
    assert trained_model(client, tracker.run_id, weights_fingerprint(weights)) == model_id
    (weights / "model.safetensors").write_bytes(b"other weights")
    assert trained_model(client, tracker.run_id, weights_fingerprint(weights)) is None
    assert trained_model(client, "0" * 32, weights_fingerprint(weights)) is None

    register_version(client, "loom", "champion", model_id, tracker.run_id, {"gate": "x"})
    version = client.get_model_version_by_alias("loom", "champion")
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert model.source_run_id == tracker.run_id
    assert model.tags["loomvideo.run"] == "pretrain/a.1"
    assert model.tags["loomvideo.weights"] == str(weights)
    assert dataset.digest in model.tags["loomvideo.dataset.0"]


def test_the_newest_verdict_stands_on_top_of_a_runs_description_once(tmp_path):
    tracker = Tracker(RunFolder.open(tmp_path, "evaluate", "a"), f"sqlite:///{tmp_path}/m.db")
    client = MlflowClient(tracking_uri=tracker.uri)
    for text in ("### pretrain/a", "**Gate against b**: failed. x", "**Gate against b**: passed. y"):
        prepend_note(client, tracker.run_id, text)
    tracker.finish()
    note = client.get_run(tracker.run_id).data.tags[NOTE]
    assert note == "**Gate against b**: passed. y\n\n### pretrain/a"
