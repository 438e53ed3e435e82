"""`metrics.csv` and `hparams.yaml` of Lightning's CSVLogger, from a fit of a module with one weight.

Made with lightning 2.6.6:

    pip install --target LIB --no-deps lightning==2.6.6 lightning-utilities torchmetrics
    PYTHONPATH=LIB python tests/peer_logs/make_lightning.py tests/peer_logs/lightning

The loss of step s (0 to 11) is 2 / (1 + s) and not a number at step 5, by construction; the gradient of the one weight
is 1 / (1 + s). Lightning logs every second step, and the validation after steps 5 and 11.
"""

import argparse
import logging
import shutil
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import grad_norm


class Module(pl.LightningModule):
    def __init__(self, learning_rate: float, weight_decay: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, index):
        step = self.global_step
        slope = (self.weight - self.weight.detach()) / (1 + step)  # zero, with gradient 1 / (1 + step)
        self.log("train_loss", 2 / (1 + step) if step != 5 else float("nan"), prog_bar=False)
        self.log("lr", self.optimizers().param_groups[0]["lr"])
        return slope

    def on_before_optimizer_step(self, optimizer):
        self.log("grad_norm", grad_norm(self, norm_type=2)["grad_2.0_norm_total"])

    def validation_step(self, batch, index):
        self.log("val_loss", 3 / (1 + self.global_step))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    shutil.rmtree(folder / "lightning_logs", ignore_errors=True)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    loader = torch.utils.data.DataLoader(torch.zeros(6, 1))
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=CSVLogger(folder),
        log_every_n_steps=2,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(learning_rate=0.01, weight_decay=0.0), loader, loader)


if __name__ == "__main__":
    main()
