"""Reads back what trackers hold: MLflow by its client, W&B from the files of offline runs."""

import json
import pathlib
import time

BLOCK, HEADER = 2**15, 7  # bytes, of the log format of LevelDB


def mlflow_run(uri: str, experiment: str = "keras_cifar") -> tuple:
    """(the only run of an experiment, {metric: [(step, value), ...]}, paths of its files)."""
    import mlflow

    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name(experiment)
    (run,) = client.search_runs([experiment.experiment_id])
    number = run.info.run_id
    history = {
        name: [(m.step, m.value) for m in client.get_metric_history(number, name)]
        for name in run.data.metrics
    }
    files, folders = [], [None]
    while folders:
        for item in client.list_artifacts(number, folders.pop()):
            (folders if item.is_dir else files).append(item.path)
    return run, history, files


def wandb_records(directory: pathlib.Path) -> list:
    """The records of an offline run's directory."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = directory.glob("*.wandb")
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    place, piece, records = HEADER, b"", []
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        piece += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(Record.FromString(piece))
            piece = b""
    return records


def wandb_run(directory: pathlib.Path, seconds: float = 20) -> dict:
    """What an ended offline run has: config, summary, history [(step, metrics)], files, exit code.

    Waits for so many seconds for its end: W&B's own process may write it after `finish` returns.
    """
    deadline = time.monotonic() + seconds
    while (found := _wandb_run(directory))["exit"] is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _wandb_run(directory: pathlib.Path) -> dict:
    found = {"config": {}, "summary": {}, "history": [], "files": [], "exit": None}
    for record in wandb_records(directory):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["id"], found["name"] = record.run.run_id, record.run.display_name
            found["project"] = record.run.project
            found["config"] |= _values(record.run.config.update)
        elif kind == "summary":
            found["summary"] |= _values(record.summary.update)
        elif kind == "history":
            row = _values(record.history.item)
            found["history"].append((record.history.step.num, row))
        elif kind == "artifact":
            found["files"] += [entry.path for entry in record.artifact.manifest.contents]
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


def _values(items) -> dict:
    return {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
