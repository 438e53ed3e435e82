"""Write TensorBoard event files with the libraries that write them in practice.

    python tests/peer_logs/make_tensorboard.py FOLDER

Needs torch, transformers, tensorboard and tensorboardX. The files beside this script were made with torch 2.13.0,
transformers 5.23.0, tensorboard 2.21.0 and tensorboardX 2.6.5. Every number follows from its step: the loss is
2 / (1 + step), the gradient norm step / 8.
"""

import argparse
import math
import shutil
import time
from pathlib import Path

import numpy as np
import tensorboardX
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback


def loss(step: int) -> float:
    return 2 / (1 + step)


def plain(folder: Path) -> None:
    """50 steps of torch's writer; loss of step 7 is NaN, of 8 +inf, of 9 -inf; media in between."""
    with SummaryWriter(folder) as writer:
        for step in range(50):
            value = {7: math.nan, 8: math.inf, 9: -math.inf}.get(step, loss(step))
            writer.add_scalar("train/loss", value, step)
            writer.add_scalar("train/grad_norm", step / 8, step)
            if step % 10 == 0:
                writer.add_scalar("eval/loss", loss(step) + 0.5, step)
        writer.add_histogram("weights", np.arange(10.0), 3)
        writer.add_text("words", "some text", 3)
        writer.add_image("picture", np.zeros((3, 2, 2), dtype=np.uint8), 3)


def tensors(folder: Path) -> None:
    """20 steps as tensors: torch's new style (float and double), and every type by hand at step 20."""
    with SummaryWriter(folder) as writer:
        for step in range(20):
            writer.add_scalar("loss", loss(step), step, new_style=True)
            writer.add_scalar("precise", step / 7, step, new_style=True, double_precision=True)
        for name, made in by_hand().items():
            value = summary_pb2.Summary.Value(tag=name, tensor=made)
            event = event_pb2.Event(wall_time=time.time(), step=20, summary=summary_pb2.Summary(value=[value]))
            writer._get_file_writer().add_event(event, step=20)


def by_hand() -> dict[str, tensor_pb2.TensorProto]:
    """Tensors of one number in each type, then two that are no scalars."""
    make = tensor_pb2.TensorProto
    return {
        "content_float": make(dtype=types_pb2.DT_FLOAT, tensor_content=np.float32(0.25).tobytes()),
        "content_double": make(dtype=types_pb2.DT_DOUBLE, tensor_content=np.float64(0.1).tobytes()),
        "content_half": make(dtype=types_pb2.DT_HALF, tensor_content=np.float16(1.5).tobytes()),
        "content_bfloat16": make(dtype=types_pb2.DT_BFLOAT16, tensor_content=np.float32(-2.5).tobytes()[2:]),
        "content_int64": make(dtype=types_pb2.DT_INT64, tensor_content=np.int64(-3).tobytes()),
        "half": make(dtype=types_pb2.DT_HALF, half_val=[int(np.float16(0.75).view(np.uint16))]),
        "int": make(dtype=types_pb2.DT_INT32, int_val=[-5]),
        "int64": make(dtype=types_pb2.DT_INT64, int64_val=[2**40]),
        "bool": make(dtype=types_pb2.DT_BOOL, bool_val=[True]),
        "two": make(dtype=types_pb2.DT_FLOAT, float_val=[1.0, 2.0]),
        "word": make(dtype=types_pb2.DT_STRING, string_val=[b"word"]),
    }


def restart(folder: Path) -> None:
    """Steps 1 to 30, then another process from the checkpoint of step 20 on to 40 in the same folder."""
    for first, last in ((1, 30), (21, 40)):
        with SummaryWriter(folder) as writer:
            for step in range(first, last + 1):
                writer.add_scalar("train/loss", loss(step), step)
        time.sleep(1.1)  # the name of the file holds the second


def run_folders(folder: Path) -> None:
    """As transformers does it, a folder a start: 1 to 30 and on from 20 to 40; and an older run that is another."""
    for name, first, last in (("a_other", 1, 9), ("b_first", 1, 30), ("c_resumed", 21, 40)):
        with SummaryWriter(folder / name) as writer:
            for step in range(first, last + 1):
                writer.add_scalar("train/loss", loss(step), step)
        time.sleep(0.1)


def sub_folders(folder: Path) -> None:
    """`add_scalars` and `add_hparams`, which write into folders below."""
    with SummaryWriter(folder) as writer:
        for step in range(10):
            writer.add_scalar("train/loss", loss(step), step)
            writer.add_scalars("train/reward", {"mean": step / 4, "best": float(step)}, step)
        writer.add_hparams({"lr": 1e-05, "method": "grpo", "packed": True}, {"final": 0.5})


def axes(folder: Path) -> None:
    """A loss by steps, the same by samples (32 a step), an evaluation by epochs of 10 steps."""
    with SummaryWriter(folder) as writer:
        for step in range(1, 41):
            writer.add_scalar("lm-loss vs samples", loss(step), 32 * step)
            writer.add_scalar("lm-loss", loss(step), step)
            writer.add_scalar("grad-norm", step / 8, step)
            if step % 10 == 0:
                writer.add_scalar("val", loss(step) + 0.5, step // 10)


def stepless(folder: Path) -> None:
    """Nobody gave a step."""
    with tensorboardX.SummaryWriter(str(folder)) as writer:
        for step in range(10):
            writer.add_scalar("loss", loss(step))


def transformers_callback(folder: Path) -> None:
    """What the Trainer's callback writes: every 5 of 30 steps, an evaluation at 15 and 30, the closing row."""
    args = TrainingArguments(output_dir=str(folder), learning_rate=2e-05, per_device_train_batch_size=4, report_to=[])
    writer = SummaryWriter(folder)
    callback = TensorBoardCallback(writer)
    state, control = TrainerState(is_world_process_zero=True), TrainerControl()
    callback.on_train_begin(args, state, control)
    for step in range(5, 31, 5):
        state.global_step = step
        logs = {"loss": loss(step), "grad_norm": step / 8, "learning_rate": 2e-05, "epoch": step / 30}
        callback.on_log(args, state, control, logs=logs)
        if step % 15 == 0:
            callback.on_log(args, state, control, logs={"eval_loss": loss(step) + 0.5, "epoch": step / 30})
    callback.on_log(args, state, control, logs={"train_runtime": 12.5, "train_loss": 0.25, "epoch": 1.0})
    callback.on_train_end(args, state, control)


MADE = (plain, tensors, restart, run_folders, sub_folders, axes, stepless, transformers_callback)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    out = parser.parse_args().folder
    for make in MADE:
        shutil.rmtree(out / make.__name__, ignore_errors=True)
        make(out / make.__name__)
