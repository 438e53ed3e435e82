"""Write runs with MLflow, to its file store and to its database.

    MLFLOW_ALLOW_FILE_STORE=true python tests/peer_logs/make_mlflow.py FOLDER

The files beside this script were made with mlflow-skinny 3.17.2 and SQLAlchemy 2.1.9. The database is packed by gzip,
because MLflow's empty one has 1 MB. Every number follows from its step: the loss is 2 / (1 + step), the gradient norm
step / 8.
"""

import argparse
import gzip
import math
import os
import shutil
import tempfile
import time
from pathlib import Path

import mlflow


def loss(step: int) -> float:
    return 2 / (1 + step)


def write() -> None:
    """An older run, then one of 40 steps and a restart from 31 on to 50, in the same run."""
    mlflow.set_experiment("peer")
    with mlflow.start_run(run_name="older"):
        mlflow.log_metrics({"loss": 9.0}, step=1)
    time.sleep(0.01)
    with mlflow.start_run(run_name="newest") as run:
        mlflow.log_params({"learning_rate": 2e-05, "packed": True, "note": None, "name": "a text", "layers": [1, 2]})
        for step in range(1, 41):
            value = {7: math.nan, 8: math.inf, 9: -math.inf}.get(step, loss(step))
            mlflow.log_metrics({"train/loss": value, "train/grad_norm": step / 8}, step=step)
            if step % 10 == 0:
                mlflow.log_metric("eval/loss", loss(step) + 0.5, step=step)
                mlflow.log_metric("system/gpu", step / 40, step=step // 10)  # samples, as MLflow's own monitor counts
            time.sleep(0.002)
    with mlflow.start_run(run_id=run.info.run_id):
        for step in range(31, 51):
            mlflow.log_metrics({"train/loss": loss(step) + 1, "train/grad_norm": step / 8}, step=step)
            time.sleep(0.002)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    out = parser.parse_args().folder.absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        mlflow.set_tracking_uri("file:mlruns")
        write()
        for place in Path("mlruns").rglob("*"):
            if place.is_file() and "tags" not in place.parts and ".trash" not in place.parts:
                kept = out / place
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(place.read_text().replace(scratch, "/scratch"))
        mlflow.set_tracking_uri("sqlite:///mlflow.db")
        write()
        (out / "mlflow.db.gz").write_bytes(gzip.compress(Path("mlflow.db").read_bytes(), mtime=0))
