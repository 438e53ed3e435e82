"""Other systems' runs write our run directory.

Where a system is installed its own classes are used; everywhere else stand-ins that were built after its source: veRL
0.9.1 (`verl/utils/tracking.py`), OpenRLHF 0.11.2 (`openrlhf/trainer/ppo_trainer.py`, `sft_trainer.py`), Lightning 2.6.6
and LLaMA-Factory 0.9.5.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
import types
import warnings
from types import SimpleNamespace as Namespace

import pytest
import torch
from transformers import Trainer, TrainingArguments

from outspoken import DiagnosticsCallback, schemas
from outspoken.agent_api.gate import gate
from outspoken.diagnostics import integrations
from outspoken.diagnostics.callback import method_of
from outspoken.diagnostics.integrations import openrlhf, verl


def lines(folder, name="metrics.jsonl"):
    with open(folder / "outspoken" / name, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def card(folder):
    record = json.loads((folder / "outspoken" / "run.json").read_text(encoding="utf-8"))
    schemas.validate(record)
    return record


def fired(folder):
    return {line["code"] for line in lines(folder, "diagnostics.jsonl") if line["state"] == "firing"}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("OUTSPOKEN_LOG", "off")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """`module(name, source)`: a module that can be imported by that name during the test, and is not yet."""
    root = tmp_path / "modules"
    before = set(sys.modules)
    finders = list(sys.meta_path)
    monkeypatch.syspath_prepend(str(root))

    def write(name, source):
        folder = root
        for part in name.split(".")[:-1]:
            folder = folder / part
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "__init__.py").touch()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name.split('.')[-1]}.py").write_text(source)
        importlib.invalidate_caches()
        return name

    yield write
    sys.meta_path[:] = finders
    for name in set(sys.modules) - before:
        if str(root) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


# ------------------------------------------------------------------------------------------ how they attach


def test_they_import_nothing_foreign():
    code = (
        "import sys\n"
        "from outspoken.diagnostics.integrations import lightning, llama_factory, openrlhf, verl, verl_plugin\n"
        "names = ('torch', 'transformers', 'lightning', 'pytorch_lightning', 'verl', 'openrlhf', 'llamafactory', 'ray')\n"
        "sys.exit(any(name in sys.modules for name in names))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_when_imported(module):
    name = module("laterpack.inner", "value = 1\n")
    seen = []
    finders = len(sys.meta_path)
    integrations.when_imported(name, lambda m: seen.append(m.value))
    assert seen == []
    found = importlib.import_module(name)
    assert seen == [1] and len(sys.meta_path) == finders and found.__name__ == name
    integrations.when_imported(name, lambda m: seen.append(m))
    assert seen == [1, found]
    integrations.when_imported("laterpack.missing", seen.append)
    with pytest.raises(ModuleNotFoundError, match=r"laterpack\.missing"):
        importlib.import_module("laterpack.missing")


def test_a_recorder_that_cannot_be_made_does_not_stop_a_trainer(capsys):
    class Foreign:
        def __init__(self, n):
            self.n = n

    integrations.after_init(Foreign, lambda made: made.missing)
    integrations.after_init(Foreign, lambda made: made.also_missing)
    assert Foreign(3).n == 3
    said = capsys.readouterr().err
    assert "this run is not recorded" in said and "'missing'" in said and "also_missing" not in said


# ------------------------------------------------------------------------------------------ veRL


def stand_in_tracking(with_finish=True):
    """What `verl.utils.tracking.Tracking` does, for the backend "console"."""

    class Tracking:
        supported_backend = ["console", "file"]

        def __init__(self, project_name, experiment_name, default_backend="console", config=None):
            if isinstance(default_backend, str):
                default_backend = [default_backend]
            for backend in default_backend:
                assert backend in self.supported_backend, f"{backend} is not supported"
            self.logger, self._finished, self.ended = {}, False, []
            if "console" in default_backend:
                self.logger["console"] = Namespace(log=lambda data, step: None)

        def log(self, data, step, backend=None):
            for default_backend, logger_instance in self.logger.items():
                if backend is None or default_backend in backend:
                    logger_instance.log(data=data, step=step)

    def finish(self, exit_code=0):
        if getattr(self, "_finished", False):
            return
        self._finished = True
        if "console" in self.logger:
            self.ended.append(exit_code)

    if with_finish:
        Tracking.finish = finish
    return Tracking


@pytest.fixture
def tracking():
    try:
        real = importlib.import_module("verl.utils.tracking").Tracking
    except ImportError:
        return stand_in_tracking()
    return type("Tracking", (real,), {})  # a class of its own, so that nothing stays behind


def verl_config(folder, steps=40):
    return {
        "trainer": {"default_local_dir": str(folder), "total_training_steps": None, "n_gpus_per_node": 2, "nnodes": 1},
        "algorithm": {"adv_estimator": "grpo"},
        "data": {"max_response_length": 512, "train_batch_size": 32},
        "actor_rollout_ref": {
            "rollout": {"n": 8, "temperature": 1.0},
            "actor": {"optim": {"lr": 1e-6, "total_training_steps": steps}},
        },
    }


def verl_row(step, clip=0.1):
    return {
        "training/global_step": step,
        "actor/pg_loss": 0.01 * math.sin(step),
        "actor/grad_norm": 0.2,
        "actor/lr": 1e-6,
        "actor/entropy": 0.6,
        "critic/score/mean": 0.5 + 0.05 * math.sin(3 * step),
        "critic/score/max": 1.0,
        "critic/score/min": 0.0,
        "response_length/mean": 200.0,
        "response_length/clip_ratio": clip,
    }


def test_verl_writes_a_run(tmp_path, tracking):
    verl.register(tracking)
    verl.register(tracking)  # a second time changes nothing
    assert tracking.supported_backend.count("outspoken") == 1
    logs = tracking("project", "experiment", ["console", "outspoken"], verl_config(tmp_path))
    logs.log(data={"val-core/math/reward/mean@1": 0.2}, step=0)
    for step in range(1, 41):
        logs.log(data=verl_row(step, clip=0.95), step=step)
    logs.log(data=verl_row(99), step=99, backend=["console"])  # not for us
    logs.finish()
    record = card(tmp_path)
    assert (record["method"], record["status"], record["step"], record["total_steps"]) == ("grpo", "finished", 40, 40)
    assert record["config"]["num_generations"] == 8 and record["config"]["learning_rate"] == 1e-6
    assert record["trainer"] == "verl" and record["config"]["max_completion_length"] == 512
    observed = lines(tmp_path)
    assert [line["step"] for line in observed] == list(range(41))
    assert observed[1]["signals"]["completions/clipped_ratio"] == 0.95
    assert observed[1]["signals"]["grad_norm"] == 0.2
    assert fired(tmp_path) == {"RL016"}  # answers are cut off


@pytest.mark.parametrize(
    ("last", "exit_code", "status"), [(40, 0, "finished"), (30, 0, "interrupted"), (40, 1, "failed")]
)
def test_how_a_verl_run_ends(tmp_path, tracking, last, exit_code, status):
    """veRL ends its loggers in the same way after the last step and when a run was given up."""
    verl.register(tracking)
    logs = tracking("project", "experiment", ["outspoken"], verl_config(tmp_path))
    logs.log(data=verl_row(last), step=last)
    logs.finish(exit_code)
    logs.finish(exit_code)
    assert card(tmp_path)["status"] == status


def test_an_older_tracking_without_finish(tmp_path):
    tracking = stand_in_tracking(with_finish=False)
    verl.register(tracking)
    logs = tracking("project", "experiment", "outspoken", verl_config(tmp_path, steps=3))
    for step in (1, 2, 3):
        logs.log(data=verl_row(step), step=step)
    logs.logger["outspoken"].finish()
    assert card(tmp_path)["status"] == "finished"


def test_a_verl_run_that_goes_on(tmp_path, tracking):
    verl.register(tracking)

    def run(steps):
        logs = tracking("project", "experiment", ["outspoken"], verl_config(tmp_path))
        for step in steps:
            logs.log(data=verl_row(step), step=step)
        logs.finish()
        return card(tmp_path)["id"]

    first = run(range(1, 31))
    assert run(range(21, 41)) == first  # from the checkpoint of step 20
    assert [line["segment"] for line in lines(tmp_path)] == [0] * 30 + [1] * 20
    assert run(range(1, 5)) != first
    assert len(lines(tmp_path)) == 4


def test_verl_without_the_backend_is_as_before(tmp_path, tracking, monkeypatch):
    monkeypatch.chdir(tmp_path)
    verl.register(tracking)
    logs = tracking("project", "experiment", "console", verl_config(tmp_path / "none"))
    assert list(logs.logger) == ["console"]
    logs.finish()
    assert not (tmp_path / "none").exists()


def test_a_verl_configuration_that_cannot_be_read_stops_nothing(tmp_path, tracking, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    verl.register(tracking)
    monkeypatch.setattr(verl, "OutspokenLogger", lambda *a: 1 / 0)
    logs = tracking("project", "experiment", ["outspoken"], {})
    logs.log(data=verl_row(1), step=1)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_verl_without_settings_and_its_sft(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bare = verl.OutspokenLogger("project", "experiment")
    bare.log({"actor/grad_norm": 1.0}, 1)
    bare.finish()
    assert card(tmp_path / "project" / "experiment")["method"] == "unknown"
    sft = verl.OutspokenLogger("project", "sft", {"trainer": {"default_local_dir": "sft"}, "optim": {"lr": 1e-5}})
    sft.log({"train/loss": 1.0, "train/grad_norm": 0.5, "train/lr": 1e-5}, 1)
    sft.finish()
    assert card(tmp_path / "sft")["method"] == "sft"
    assert lines(tmp_path / "sft")[0]["signals"] == {"loss": 1.0, "grad_norm": 0.5, "learning_rate": 1e-5}


def test_verl_finds_the_plugin_when_it_imports_its_tracking(module):
    found = [e for e in importlib.metadata.entry_points(group="verl.plugins") if e.name == "outspoken"]
    name = "outspoken.diagnostics.integrations.verl_plugin"
    assert all(entry.value == name for entry in found)
    if "verl" in sys.modules or importlib.util.find_spec("verl"):
        pytest.skip("the real veRL is here; the other tests use it")
    module("verl.utils.tracking", "class Tracking:\n    supported_backend = ['console']\n")
    sys.modules.pop(name, None)
    importlib.import_module(name)
    assert "verl.utils.tracking" not in sys.modules
    assert importlib.import_module("verl.utils.tracking").Tracking.supported_backend == ["console", "outspoken"]


# ------------------------------------------------------------------------------------------ OpenRLHF

PPO = """
class BasePPOTrainer:
    def __init__(self, strategy):
        self.args = strategy.args
        self.wandb_logger = None
        self.tensorboard_logger = self.args.logger.tensorboard

    def save_logs_and_checkpoints(self, global_step, logs_dict=None):
        if global_step % self.args.logger.logging_steps == 0:
            if self.wandb_logger:
                self.wandb_logger.log_train(global_step, logs_dict)
            if self.tensorboard_logger:
                self.tensorboard_logger.log_train(global_step, logs_dict)


class PPOTrainer(BasePPOTrainer):
    def fit(self, rows):
        for step, row in enumerate(rows, start=1):
            self.save_logs_and_checkpoints(step, row)
            if step % 10 == 0 and self.tensorboard_logger:
                self.tensorboard_logger.log_eval(step, {"eval_math_pass1": 0.5, "eval_num_samples": 8})
        if self.tensorboard_logger:
            self.tensorboard_logger.close()
"""

SFT = """
class SFTTrainer:
    def __init__(self, strategy, wandb=None, tensorboard=None):
        self.strategy = strategy
        self._wandb, self._tensorboard = wandb, tensorboard

    def fit(self, steps):
        for step in range(1, steps + 1):
            logs_dict = {"gpt_loss": 2 / step ** 0.5, "lr": 1e-5, "grad_norm": 1.0, "loss_mean": 2 / step ** 0.5}
            if self._wandb is not None and self.strategy.is_rank_0():
                self._wandb.log({"train/%s" % k: v for k, v in {**logs_dict, "global_step": step}.items()})
            elif self._tensorboard is not None and self.strategy.is_rank_0():
                for k, v in logs_dict.items():
                    self._tensorboard.add_scalar(f"train/{k}", v, step)
            if step % 10 == 0 and self._wandb is not None:
                self._wandb.log({"eval/eval gpt_loss": 1.5, "eval/global_step": step})
        if self._wandb is not None:
            self._wandb.finish()
"""


def openrlhf_args(folder, **logger):
    return Namespace(
        ckpt=Namespace(output_dir=str(folder)),
        algo=Namespace(advantage=Namespace(estimator="group_norm"), kl=Namespace(init_coef=0.01)),
        actor=Namespace(adam=Namespace(lr=5e-7)),
        adam=Namespace(lr=1e-5),
        rollout=Namespace(n_samples_per_prompt=8),
        logger=Namespace(logging_steps=1, wandb=Namespace(key="secret-key"), **logger),
    )


class Keeps:
    """A logger of OpenRLHF's, or W&B, or a TensorBoard writer."""

    def __init__(self):
        self.got = []

    def __getattr__(self, name):
        return lambda *args: self.got.append((name, *args))


@pytest.mark.parametrize("beside", [None, Keeps()], ids=["alone", "tensorboard"])
def test_openrlhf_ppo(tmp_path, module, beside):
    openrlhf.attach()  # before its module is imported, as in a Ray worker
    trainers = importlib.import_module(module("openrlhf.trainer.ppo_trainer", PPO))
    openrlhf.attach()
    args = openrlhf_args(tmp_path / "out", tensorboard=beside)
    rows = [
        {
            "policy_loss": 0.01 * math.sin(step),
            "actor_lr": 5e-7,
            "actor_grad_norm": 0.3,
            "rollout/reward_mean": 0.5,
            "rollout/truncated_rate": 0.02,
            "kl": None,
            "generated_samples": ["text", 1.0],
        }
        for step in range(1, 31)
    ]
    trainers.PPOTrainer(Namespace(args=args)).fit(rows)
    record = card(tmp_path / "out")
    assert (record["method"], record["status"], record["step"]) == ("grpo", "finished", 30)
    assert record["config"]["learning_rate"] == 5e-7 and "secret-key" not in json.dumps(record)
    observed = lines(tmp_path / "out")
    assert [line["step"] for line in observed] == sorted([*range(1, 31), 10, 20, 30])
    assert observed[0]["signals"]["reward"] == 0.5 and observed[0]["signals"]["learning_rate"] == 5e-7
    assert all(name.startswith("eval") for name in observed[10]["signals"])
    if beside is not None:
        assert beside.got[0] == ("log_train", 1, rows[0]) and beside.got[-1] == ("close",)
        assert len([got for got in beside.got if got[0] == "log_eval"]) == 3


@pytest.mark.parametrize("beside", ["nothing", "wandb", "tensorboard"])
def test_openrlhf_sft(tmp_path, module, beside):
    openrlhf.attach()
    trainers = importlib.import_module(module("openrlhf.trainer.sft_trainer", SFT))
    other = Keeps()
    strategy = Namespace(args=openrlhf_args(tmp_path / "out"), is_rank_0=lambda: True)
    trainers.SFTTrainer(strategy, **({} if beside == "nothing" else {beside: other})).fit(20)
    record = card(tmp_path / "out")
    assert (record["method"], record["status"], record["step"]) == ("sft", "finished", 20)
    observed = lines(tmp_path / "out")
    assert [line["step"] for line in observed] == sorted([*range(1, 21), 10, 20])
    assert observed[3]["signals"]["loss"] == 1.0 and observed[3]["signals"]["grad_norm"] == 1.0
    assert observed[10]["signals"] == {"eval_loss": 1.5}
    if beside == "wandb":
        assert other.got[0][1]["train/global_step"] == 1 and other.got[-1] == ("finish",)
    if beside == "tensorboard":
        assert ("add_scalar", "train/gpt_loss", 2.0, 1) in other.got


def test_openrlhf_on_other_ranks_is_left_alone(tmp_path, module):
    openrlhf.attach()
    trainers = importlib.import_module(module("openrlhf.trainer.sft_trainer", SFT))
    trainer = trainers.SFTTrainer(Namespace(args=openrlhf_args(tmp_path / "out"), is_rank_0=lambda: False))
    assert trainer._wandb is None and not (tmp_path / "out").exists()


def test_openrlhf_command(tmp_path):
    """Its module runs as `__main__` with its own arguments, and Ray is told what its workers are to call."""
    (tmp_path / "train_stub.py").write_text(
        "import os, sys\n"
        "print(__name__, sys.argv[1:], os.environ['RAY_RUNTIME_ENV_HOOK'])\n"
        "print([type(f).__name__ for f in sys.meta_path][:1])\n"
    )
    command = [sys.executable, "-m", "outspoken.diagnostics.integrations.openrlhf"]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_RUNTIME_ENV_HOOK"}
    environment["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run(
        [*command, "train_stub", "--a", "b"], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "__main__ ['--a', 'b'] outspoken.diagnostics.integrations.openrlhf.runtime_env",
        "['_Waiting']",
    ]
    made = openrlhf.runtime_env({"env_vars": {"A": "1"}})
    assert made["env_vars"] == {"A": "1"}
    package, _, function = made["worker_process_setup_hook"].rpartition(".")
    assert getattr(importlib.import_module(package), function) is openrlhf.attach
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 1


# ------------------------------------------------------------------------------------------ Lightning


class StandInTrainer:
    """As much of Lightning's trainer as a callback sees, in the order in which it calls its hooks."""

    def __init__(self, callback, folder, accumulate=1, clip=None):
        self.callback, self.default_root_dir = callback, str(folder)
        self.accumulate_grad_batches, self.gradient_clip_val, self.gradient_clip_algorithm = accumulate, clip, None
        self.global_step = self.current_epoch = self.global_rank = 0
        self.world_size, self.strategy = 1, Namespace()
        self.training = self.validating = self.sanity_checking = False
        self.callback_metrics, self.optimizers = {}, []

    def fit(self, module, batches, epochs=1, validate=True):
        self.optimizers = [module.configure_optimizers()]
        self.estimated_stepping_batches = epochs * math.ceil(len(batches) / self.accumulate_grad_batches)
        try:
            self.sanity_checking = True
            self._validate(module, batches[:1])
            self.sanity_checking, self.training = False, True
            self.callback.on_train_start(self, module)
            for self.current_epoch in range(epochs):
                self._epoch(module, batches)
                if validate:
                    self._validate(module, batches)
                    self.training = True
            self.callback.on_fit_end(self, module)
        except BaseException as error:
            self.callback.on_exception(self, module, error)
            raise

    def _epoch(self, module, batches):
        for i, batch in enumerate(batches):
            loss = module.training_step(batch, i) / self.accumulate_grad_batches
            loss.backward()
            if (i + 1) % self.accumulate_grad_batches == 0:
                self.callback.on_before_optimizer_step(self, module, self.optimizers[0])
                if self.gradient_clip_val:
                    torch.nn.utils.clip_grad_norm_(module.parameters(), self.gradient_clip_val)
                self.optimizers[0].step()
                self.optimizers[0].zero_grad()
                self.global_step += 1
            self.callback.on_train_batch_end(self, module, {"loss": loss.detach()}, batch, i)

    def _validate(self, module, batches):
        self.training, self.validating, module.values = False, True, {}
        for i, batch in enumerate(batches):
            module.validation_step(batch, i)
        self.callback_metrics.update({k: torch.stack(v).mean() for k, v in module.values.items()})
        self.callback.on_validation_end(self, module)
        self.validating = False


INSTALLED = [
    name for name in ("lightning.pytorch", "pytorch_lightning") if importlib.util.find_spec(name.split(".")[0])
]


@pytest.fixture(params=INSTALLED or ["stand-in"])
def lightning(request, module, tmp_path):
    """The class of modules, the callback's class, and a function that fits."""
    if request.param == "stand-in":
        module("lightning.pytorch", "class Callback:\n    def __init__(self):\n        pass\n")
        importlib.import_module("lightning.pytorch")

        class Module(torch.nn.Module):
            def log(self, name, value, **_):
                if hasattr(self, "values"):
                    self.values.setdefault(name, []).append(torch.as_tensor(value))

        def fit(callback, model, batches, epochs=1, **settings):
            StandInTrainer(callback, tmp_path / "root", **settings).fit(model, batches, epochs)
    else:
        package = importlib.import_module(request.param)
        Module = package.LightningModule

        def fit(callback, model, batches, epochs=1, accumulate=1, clip=None):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trainer = package.Trainer(
                    max_epochs=epochs,
                    accumulate_grad_batches=accumulate,
                    gradient_clip_val=clip,
                    callbacks=[callback],
                    default_root_dir=tmp_path / "root",
                    accelerator="cpu",
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                )
                loader = torch.utils.data.DataLoader(batches, batch_size=None)
                trainer.fit(model, loader, loader)

    from outspoken.diagnostics.integrations import lightning as ours

    package = sys.modules[request.param] if INSTALLED else None
    yield Namespace(Module=Module, callback=ours.OutspokenCallback, fit=fit, package=package)
    ours._made.clear()


def line_model(lightning, fail_at=None, poison_at=None):
    """Fits y = w*x by the mean square error; every step can be computed by hand."""

    class Line(lightning.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(()))
            self.calls = 0

        def training_step(self, batch, index):
            self.calls += 1
            if self.calls == fail_at:
                raise RuntimeError("planted")
            x, y = batch
            loss = ((self.w * x - y) ** 2).mean()
            self.log("half", loss / 2)
            return loss * (math.nan if poison_at and self.calls >= poison_at else 1)

        def validation_step(self, batch, index):
            x, y = batch
            self.log("val_loss", ((self.w * x - y) ** 2).mean())
            self.log("size", float(len(x)))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Line()


def batches(n):
    return [(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])) for _ in range(n)]


def test_lightning_measures_each_optimizer_step(tmp_path, lightning):
    """d/dw of mean((wx - x)^2) with x in {1, 2} is 5(w - 1); two equal batches make a step; w += 0.1 * min(|g|, 1)."""
    callback = lightning.callback(method="sft", config={"learning_rate": 0.1})
    lightning.fit(callback, line_model(lightning), batches(12), epochs=2, accumulate=2, clip=1.0)
    record = card(tmp_path / "root")
    assert (record["status"], record["step"], record["total_steps"]) == ("finished", 12, 12)
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 1.0, "world_size": 1, "learning_rate": 0.1}
    assert record["config"] == settings
    assert record["method"] == "sft" and record["trainer"] == "lightning"
    observed = lines(tmp_path / "root")
    assert [line["step"] for line in observed] == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 12, 12]
    w, expected = 0.0, {}
    for step in range(1, 13):
        gradient = 5 * (w - 1)
        expected[step] = {
            "loss": 2.5 * (w - 1) ** 2,
            "half": 1.25 * (w - 1) ** 2,
            "grad_norm": abs(gradient),
            "learning_rate": 0.1,
        }
        w -= 0.1 * max(-1.0, min(1.0, gradient))
        if step % 6 == 0:
            expected[-step] = {"eval_loss": 2.5 * (w - 1) ** 2, "eval_size": 2.0}
    for line in observed:
        evaluation = "eval_size" in line["signals"]
        assert line["signals"] == pytest.approx(expected[line["step"] * (-1 if evaluation else 1)], abs=1e-5)
        assert line["epoch"] == (0 if line["step"] <= 6 else 1)


def test_lightning_tells_when_a_run_breaks_and_how_it_ends(tmp_path, lightning):
    model = line_model(lightning, poison_at=5, fail_at=9)
    with pytest.raises(RuntimeError, match="planted"):
        lightning.fit(lightning.callback(tmp_path / "own", method="sft"), model, batches(12))
    record = card(tmp_path / "own")
    assert (record["status"], record["step"]) == ("failed", 8) and "log" not in vars(model)
    assert "NUM001" in fired(tmp_path / "own") and gate(tmp_path / "own").exit_code == 1


@pytest.mark.skipif(not INSTALLED, reason="a stand-in has no checkpoints")
def test_lightning_goes_on_from_a_checkpoint(tmp_path, lightning):
    package = lightning.package
    off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    common = {"default_root_dir": tmp_path, "accelerator": "cpu", **dict.fromkeys(off, False)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = package.Trainer(max_steps=6, callbacks=[lightning.callback(method="sft")], **common)
        loader = torch.utils.data.DataLoader(batches(12), batch_size=None)
        first.fit(line_model(lightning), loader)
        first.save_checkpoint(tmp_path / "six.ckpt")
        second = package.Trainer(max_steps=10, callbacks=[lightning.callback(method="sft")], **common)
        second.fit(line_model(lightning), loader, ckpt_path=tmp_path / "six.ckpt")
    assert [(line["step"], line["segment"]) for line in lines(tmp_path)] == [
        *((step, 0) for step in range(1, 7)),
        *((step, 1) for step in range(7, 11)),
    ]


# ------------------------------------------------------------------------------------------ LLaMA-Factory


@pytest.mark.parametrize(
    ("names", "method"),
    [
        (["CustomTrainer"], "sft"),
        (["CustomSeq2SeqTrainer", "Seq2SeqTrainer"], "sft"),
        (["CustomDPOTrainer", "DPOTrainer"], "dpo"),
        (["CustomKTOTrainer", "KTOTrainer"], "kto"),
        (["PairwiseTrainer"], "reward"),
        (["CustomPPOTrainer", "PPOTrainer"], "ppo"),
    ],
)
def test_llama_factorys_trainers_are_known(names, method):
    made = Trainer
    for name in reversed(names):
        made = type(name, (made,), {})
    assert method_of(made.__new__(made)) == method


class CustomPPOTrainer(Trainer):
    """Its own loop, as LLaMA-Factory's: it calls callbacks by hand, and says loss and reward when it logs."""

    def ppo_train(self, steps):
        handler = self.callback_handler
        self.state.max_steps = steps
        handler.on_train_begin(self.args, self.state, self.control)
        for step in range(1, steps + 1):
            self.state.global_step += 1
            handler.on_step_end(self.args, self.state, self.control)
            if step % self.args.logging_steps == 0:
                logs = {"loss": 1.0 / step, "reward": 0.1 * step, "learning_rate": 1e-5, "epoch": 0.5, "step": step}
                handler.on_log(self.args, self.state, self.control, logs)
        handler.on_train_end(self.args, self.state, self.control)


def test_a_loop_that_only_logs_is_observed_by_what_it_logs(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), logging_steps=5, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = CustomPPOTrainer(torch.nn.Linear(2, 2), args, callbacks=[DiagnosticsCallback()])
    trainer.ppo_train(20)
    record = card(tmp_path)
    assert (record["method"], record["status"], record["step"]) == ("ppo", "finished", 20)
    logged = [line for line in lines(tmp_path) if "reward" in line["signals"]]
    assert [(line["step"], line["signals"]) for line in logged] == [
        (step, {"loss": 1.0 / step, "reward": 0.1 * step, "learning_rate": 1e-5}) for step in (5, 10, 15, 20)
    ]


def test_the_llama_factory_command(module, monkeypatch):
    if importlib.util.find_spec("llamafactory"):
        pytest.skip("the real LLaMA-Factory is here")
    module(
        "llamafactory.train.tuner",
        "got = []\ndef run_exp(args=None, callbacks=None):\n    got.append((args, callbacks))\n",
    )
    from outspoken.diagnostics.integrations import llama_factory

    llama_factory.run({"stage": "sft"}, ignore=["NUM001"])
    ((args, callbacks),) = sys.modules["llamafactory.train.tuner"].got
    assert args == {"stage": "sft"} and [type(callback) for callback in callbacks] == [DiagnosticsCallback]
    assert isinstance(llama_factory, types.ModuleType)
