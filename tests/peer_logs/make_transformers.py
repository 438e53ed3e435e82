"""Logs of transformers' Trainer, of LLaMA-Factory's callback on it, and of its table in a notebook.

Made with transformers 5.23.0 and llamafactory 0.9.5 (its LogCallback), ipykernel and nbclient:

    pip install --target LIB --no-deps llamafactory==0.9.5 omegaconf antlr4-python3-runtime==4.9.3
    pip install --target LIB_NB ipykernel nbclient nbformat
    PYTHONPATH=LIB:LIB_NB DISABLE_VERSION_CHECK=1 python tests/peer_logs/make_transformers.py tests/peer_logs

writes `transformers/` (trainer_state.json, console.log, console_resumed.log, table.ipynb) and `llama_factory/`
(trainer_log.jsonl, trainer_state.json beside it). Training is real, of a model with one weight whose loss at step s
(1 to 12) is 2 / (1 + s), not a number at step 5, and whose gradient is 1 / s, by construction. In `transformers/` the
NaN is logged (`logging_nan_inf_filter=False`), and at every later step again, because the Trainer carries its sum over;
in `llama_factory/` the filter is on, as by default, and a loss of 0 stands in its place. The second run of
`llama_factory/` and the second half of console_resumed.log resume the checkpoint of step 8, with losses 1/64 higher.
"""

import argparse
import contextlib
import io
import json
import shutil
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

STEPS = 12


class Model(torch.nn.Module):
    """Takes the step from the data, row s of which is s."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, step, **unused):
        step = step.float().mean()
        loss = torch.where(step == 5, torch.nan, 2 / (1 + step)) if self.training else 3 / (1 + step)
        return {"loss": loss + self.shift + (self.weight - self.weight.detach()) / step}


class InOrder(Trainer):
    def _get_train_sampler(self, *unused):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train(folder: Path, resume: bool = False, extra: tuple = (), **settings) -> InOrder:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        logging_steps=1,
        max_grad_norm=0.0,
        report_to="none",
        use_cpu=True,
        label_names=["step"],
        prediction_loss_only=True,
        **{"disable_tqdm": True, "eval_strategy": "steps", "eval_steps": 6, "save_steps": 4, **settings},
    )
    trainer = InOrder(
        model=Model(shift=1 / 64 if resume else 0.0),
        args=arguments,
        train_dataset=[{"step": s} for s in range(1, STEPS + 1)],
        eval_dataset=[{"step": 3}],
        callbacks=list(extra),
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-8") if resume else None)
    return trainer


def keep(folder: Path, *names: str) -> None:
    """The state of the last checkpoint goes to the folder itself, everything else but `names` goes."""
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name not in names:
            entry.unlink()
    (folder / "trainer_state.json").write_text(json.dumps(state, indent=2) + "\n")


NOTEBOOK = """
import sys
sys.path[:0] = {path!r}
from make_transformers import train
train({folder!r}, disable_tqdm=False, logging_nan_inf_filter=False, save_strategy="no", eval_steps=3);
"""


def write_notebook(folder: Path) -> None:
    """Runs a cell in a kernel, as Jupyter does, and saves the notebook with the table that the Trainer shows."""
    import sys

    import nbformat
    from nbclient import NotebookClient

    scratch = folder / "scratch"
    code = NOTEBOOK.format(path=[str(Path(__file__).parent), *filter(None, sys.path)], folder=scratch)
    code = code.replace(repr(scratch), f"__import__('pathlib').Path({str(scratch)!r})")
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_markdown_cell("# Training"), nbformat.v4.new_code_cell(code)]
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    notebook.cells[1].source = "from script import trainer\n\ntrainer.train()"
    for cell in notebook.cells[1:]:
        cell.outputs = [output for output in cell.outputs if output.output_type != "stream"]
    (folder / "table.ipynb").write_text(nbformat.writes(notebook) + "\n")
    shutil.rmtree(scratch, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder

    plain = folder / "transformers"
    shutil.rmtree(plain, ignore_errors=True)
    plain.mkdir(parents=True)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train(plain, logging_nan_inf_filter=False)
    (plain / "console.log").write_text(printed.getvalue())
    with contextlib.redirect_stdout(io.StringIO()) as again:
        train(plain, resume=True, logging_nan_inf_filter=False)
    (plain / "console_resumed.log").write_text(printed.getvalue() + again.getvalue())
    keep(plain, "console.log", "console_resumed.log")
    write_notebook(plain)

    from llamafactory.train.callbacks import LogCallback

    factory = folder / "llama_factory"
    shutil.rmtree(factory, ignore_errors=True)
    for resume in (False, True):
        with contextlib.redirect_stdout(io.StringIO()):
            train(factory, resume=resume, extra=(LogCallback(),), include_num_input_tokens_seen="no")
    keep(factory, "trainer_log.jsonl")


if __name__ == "__main__":
    main()
