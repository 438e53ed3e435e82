"""Faults planted in supervised runs that really train: each is found, named as the root, and told what to change.

Without a fault the same run is silent: `test_healthy_run`.
"""

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from outspoken import SFTTrainer
from outspoken.diagnostics import callback, probes, torch_probes
from outspoken.diagnostics.diagnose import diagnose
from outspoken.diagnostics.patches import check_patch


def damage(args, model):
    """One weight becomes NaN, as a fault of the memory or an overflow leaves it."""
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")


def patch_of(record, field):
    """The operations of the first suggestion that sets a field."""
    return next(s for s in record["suggestions"] if any(op["path"] == f"/{field}" for op in s["patch"]))


def test_healthy_run(healthy_sft):
    assert healthy_sft.fired() == {}
    assert healthy_sft.verdict["state"] == "improving"
    assert len(healthy_sft.metrics) == 800


# ---------------------------------------------------------------------------------------------------- not finite


def test_a_damaged_weight(sums, at_step):
    run = sums.sft(16, options={"callbacks": [at_step(10, damage)]}, max_grad_norm=5.0)
    record = run.root("NUM001", planted=10, within=1, severity="error", effects=["NUM002"])
    assert "loss is nan at step 11" in record["message"] and "weights are corrupted" in record["message"]
    assert record["onset_step"] == 11
    assert "learning_rate from 0.003 to 0.0015" in record["advice"] and "before step 11" in record["advice"]
    assert run.changes(record) == {"learning_rate": (3e-3, 1.5e-3), "max_grad_norm": (5.0, 1.0)}
    assert patch_of(record, "learning_rate")["when"] == "earlier_checkpoint"
    assert run.verdict["state"] == "broken"


def test_a_damaged_weight_behind_the_filter_of_the_log(sums, tmp_path, at_step):
    """A `transformers.Trainer` without our callback logs a loss of 0 from the damage on; its state file is read
    afterwards, when the run is over."""

    def tokens(row):
        prompt, answer = (sums.tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    def batch(rows):
        longest = max(len(row["input_ids"]) for row in rows)
        padded = {key: [row[key] + [fill] * (longest - len(row[key])) for row in rows]
                  for key, fill in (("input_ids", 0), ("labels", -100))}  # fmt: skip
        return {key: torch.tensor(values) for key, values in padded.items()}

    dataset = sums.task.solved_examples(640, seed=1)
    args = TrainingArguments(
        str(tmp_path / "plain"), max_steps=20, per_device_train_batch_size=32, learning_rate=3e-3, logging_steps=1,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        sums.model(),
        args,
        train_dataset=dataset.map(tokens, remove_columns=dataset.column_names),
        data_collator=batch,
        callbacks=[at_step(12, damage)],
    )
    trainer.train()
    trainer.save_state()
    assert [row["loss"] for row in trainer.state.log_history if row["step"] > 12 and "loss" in row] == [0.0] * 8

    report = diagnose(tmp_path / "plain" / "trainer_state.json", config=args.to_dict(), method="sft")
    (record,) = report["diagnostics"]
    assert (record["code"], record["state"], record["severity"]) == ("NUM002", "firing", "error")
    # The first NaN is at step 13; with a loss of 0 beside it one is enough.
    assert (record["first_step"], record["fired_step"], record["onset_step"]) == (13, 13, 13)
    assert "grad_norm is not finite" in record["message"] and "loss is 0" in record["message"]
    config = args.to_dict()
    shows, resume = (s["patch"] for s in record["suggestions"])
    assert check_patch(shows, config, {"logging_nan_inf_filter": {}}) == {"logging_nan_inf_filter": (True, False)}
    assert check_patch(resume, config, {"learning_rate": {}}) == {"learning_rate": (3e-3, 1.5e-3)}
    assert report["verdict"]["state"] == "broken"


# ---------------------------------------------------------------------------------------------------- the data


def prompts_with_examples(sums, rows):
    """Every third prompt shows solved sums before it asks: 50 tokens more."""
    solved = sums.task.solved_examples(rows, seed=1).to_list()
    shown = "".join(row["prompt"] + row["completion"].replace("<end>", ";") for row in solved[:3])[:50]
    return Dataset.from_list([{**row, "prompt": (shown if i % 3 == 0 else "") + row["prompt"]}
                              for i, row in enumerate(solved)])  # fmt: skip


def test_rows_cut_before_their_answer(sums):
    run = sums.sft(20, dataset=prompts_with_examples(sums, 600), max_length=32)
    record = run.root("DAT003", planted=0, within=1, severity="error")
    assert "33.3% of the 600 rows" in record["message"]
    assert "max_length from 32 to 64" in record["advice"]
    assert run.changes(record) == {"max_length": (32, 64)}

    cured = sums.sft(20, dataset=prompts_with_examples(sums, 600), max_length=96)
    assert cured.fired() == {}


def test_all_rows_cut_before_their_answer_is_refused_before_training(sums):
    with pytest.raises(ValueError, match=r"`max_length=6`.*the longest row has 2\d tokens"):
        sums.sft(20, max_length=6)


def test_labels_that_are_all_masked(sums):
    """A data set that comes prepared, with a response template that was never found."""

    def masked(row):
        ids = sums.tokenizer(row["prompt"] + row["completion"])["input_ids"]
        return {"input_ids": ids, "labels": [-100] * len(ids)}

    dataset = sums.task.solved_examples(320, seed=1)
    dataset = dataset.map(masked, remove_columns=dataset.column_names)
    run = sums.sft(6, dataset=dataset, dataset_kwargs={"skip_prepare_dataset": True})
    record = run.root("DAT003", planted=0, within=3, severity="error", effects=["NUM008"])
    assert "100.0% of the last 64 rows have no token that carries loss (limit 20%)" in record["message"]
    assert "response template" in record["advice"]


@pytest.mark.slow
def test_few_rows_learned_by_heart(sums):
    """32 rows for up to 160 epochs, with 64 others held out: their loss turns after about 50."""
    run = sums.sft(
        -1, dataset=sums.task.solved_examples(32, seed=1), options={"eval_dataset": sums.task.solved_examples(64, seed=5)},
        num_train_epochs=110, eval_strategy="steps", eval_steps=10, save_strategy="steps", save_steps=10,
        save_total_limit=1, lr_scheduler_type="constant",
    )  # fmt: skip
    held_out = dict(run.series("eval_loss"))
    best = min(held_out, key=held_out.get)
    # Two evaluations above the best one, which was not known to be the best before.
    record = run.root("SFT001", planted=best, within=30, severity="warning")
    assert f"(step {best})" in record["message"] and f"{held_out[best]:.4g}" in record["message"]
    assert record["onset_step"] == best
    changes = run.changes(record)
    assert changes["num_train_epochs"] == (110, best)  # one step is one epoch
    assert changes["load_best_model_at_end"] == (False, True)
    assert changes["learning_rate"] == (3e-3, 1.5e-3)
    assert run.verdict["state"] == "over_optimising"


# ------------------------------------------------------------------------------------------ spikes and divergence


def shuffled_labels(*stretches):
    """An `SFTTrainer` whose labels are shuffled within the batch at the steps of these stretches (first, last)."""

    class Shuffled(SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            step = self.state.global_step + 1
            if any(first <= step <= last for first, last in stretches):
                labels = inputs["labels"].clone()
                counted = labels != -100
                order = torch.randperm(int(counted.sum()), generator=torch.Generator().manual_seed(step))
                labels[counted] = labels[counted][order]
                inputs = {**inputs, "labels": labels}
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Shuffled


@pytest.mark.slow
def test_two_stretches_of_shuffled_labels(sums):
    run = sums.sft(115, trainer=shuffled_labels((70, 74), (105, 109)))
    record = run.root("NUM004", planted=70, within=2, severity="warning")
    assert "for 3 points" in record["message"] and "limit" in record["message"]
    assert record["onset_step"] == 70
    assert not any(s["patch"] for s in record["suggestions"]), "the first spike asks for no change"
    assert "batch of step 70" in record["advice"]
    second = [d for d in run.diagnostics if d["code"] == "NUM004" and d["severity"] == "warning" and d["step"] > 105]
    assert second[0]["step"] == 107 and "not the first within 200 steps" in second[0]["advice"]
    assert run.changes(second[0]) == {"learning_rate": (3e-3, 1.5e-3)}


@pytest.mark.slow
def test_labels_shuffled_from_some_step_on(sums):
    run = sums.sft(180, trainer=shuffled_labels((100, 180)))
    record = run.root("NUM004", planted=100, within=20, severity="error", beside=["NUM005", "NUM009"])
    assert "has not recovered" in record["advice"] and record["onset_step"] <= 100
    assert run.changes(record) == {"learning_rate": (3e-3, 1.5e-3)}


@pytest.mark.slow
def test_a_learning_rate_that_jumps(sums):
    """From step 100 on the schedule multiplies it by 20: the loss overshoots, and stays at three times its level."""
    model = sums.model()
    schedule = sums.schedule(model, 3e-3, lambda step: min(1, (step + 1) / 20) * (20 if step >= 100 else 1))
    run = sums.sft(155, model=model, options=schedule)
    # 30 points, evaluated twice, 10 apart. The spike at the jump is said before.
    record = run.root("NUM009", planted=100, within=50, severity="error", beside=["NUM004"])
    assert "above its lowest level" in record["message"] and "limit" in record["message"]
    assert 90 <= record["onset_step"] <= 100
    changes = run.changes(record)
    assert changes == {"learning_rate": (3e-3, 9e-4)}
    assert patch_of(record, "learning_rate")["when"] == "earlier_checkpoint"
    assert run.verdict["state"] == "collapsing"


def test_one_exploding_batch(sums):
    """One batch whose loss is a sum instead of a mean, and no clipping. Adam hardly notices, so it is no warning."""

    class SumOnce(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if self.state.global_step + 1 == 45:
                num_items_in_batch = torch.tensor(1)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    run = sums.sft(50, trainer=SumOnce, max_grad_norm=0.0)
    record = run.root("NUM005", planted=45, within=0, severity="info")
    assert "grad_norm reached" in record["message"] and "at step 45" in record["message"]
    assert "the loss rose by" not in record["message"]
    assert "max_grad_norm from 0 to 1" in record["advice"]
    assert run.changes(record) == {"max_grad_norm": (0.0, 1.0)}


# -------------------------------------------------------------------------------------------------- dead gradients


def test_a_loss_without_a_graph(sums):
    """The user's own loss is taken from detached log-probabilities: it looks right, and teaches nothing."""

    def detached(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].detach().flatten(0, 1)
        loss = cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch
        return loss + 0 * outputs.logits.sum()

    run = sums.sft(6, options={"compute_loss_func": detached})
    record = run.root("NUM008", planted=0, within=3, severity="error")
    assert "grad_norm is 0 on the last 3 points" in record["message"] and "2.7" in record["message"]
    assert "100% of the trainable tensors have no gradient" in record["message"]
    assert run.changes(record) == {}  # no setting cures it
    assert run.verdict["state"] == "broken"


def test_an_adapter_loaded_for_inference(sums, tmp_path):
    """`PeftModel.from_pretrained` freezes the adapter unless `is_trainable=True`. With gradient checkpointing the
    loss has a graph all the same, and the run trains nothing, without an error."""
    from peft import LoraConfig, PeftModel, get_peft_model

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    get_peft_model(sums.model(), lora).save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(sums.model(), tmp_path / "adapter")
    run = sums.sft(8, model=frozen, gradient_checkpointing=True)
    record = run.root("NUM015", planted=0, within=5, severity="error", effects=["NUM008"])
    assert "0 of 85,312 parameters are trainable" in record["message"]
    assert "is_trainable=True" in record["advice"]

    trainable = PeftModel.from_pretrained(sums.model(), tmp_path / "adapter", is_trainable=True)
    assert sums.sft(8, model=trainable, gradient_checkpointing=True).fired() == {}


def test_nearly_all_layers_frozen(sums):
    model = sums.model()
    model.requires_grad_(False)
    model.model.norm.requires_grad_(True)
    run = sums.sft(6, model=model)
    record = run.root("NUM015", planted=0, within=5, severity="warning")
    assert "Only 0.1% of 83,264 parameters are trainable" in record["message"]  # 64 of them


# -------------------------------------------------------------------------------------------------- device memory


@pytest.fixture
def device(monkeypatch):
    """`device(static, per_row, total)`: a simulated device of `total` GiB.

    There is no device here, so the training is real and on the CPU, and only what the probes read is simulated: an
    allocator that holds S between the steps and needs S + a*b for a micro-batch of b rows.
    """

    def simulate(static, per_row, total):
        batch = {}
        original = callback.DiagnosticsCallback.on_train_begin

        def on_train_begin(self, args, *rest, **kwargs):
            batch["size"] = args.per_device_train_batch_size
            return original(self, args, *rest, **kwargs)

        def memory():
            peak = static + per_row * batch["size"]
            return {
                "memory/static": static,
                "memory/peak_allocated": peak,
                "memory/peak_reserved": peak,
                "memory/alloc_retries": 0.0,
                "memory/utilization": peak / total,
            }

        monkeypatch.setattr(callback.DiagnosticsCallback, "on_train_begin", on_train_begin)
        monkeypatch.setattr(callback, "MEMORY_EVERY", 1)
        monkeypatch.setattr(probes, "host_memory", memory)
        monkeypatch.setattr(torch_probes, "device_facts", lambda device: {"memory/device_total": total})

    return simulate


@pytest.mark.slow
def test_a_micro_batch_that_leaves_the_device_idle(sums, device):
    """80 GiB, 18 of them static and 2.3 a row: b=4 takes 27.2, a third. Simulated allocator, see `device`."""
    device(18, 2.3, 80)
    start = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    run = sums.sft(115, **start)
    # 50 steps, then three evaluations 20 apart.
    record = run.root("PERF001", planted=0, within=110, severity="info")
    assert "VRAM utilization at 34% (peak 27.2 of 80.0 GiB, limit 60%)" in record["message"]
    # (0.9 * 80 - 18)/2.3 = 23 rows fit; 16 is the largest divisor of 4 * 4 up to there and up to 4 * 4.
    changes = run.changes(record)
    assert changes == {"per_device_train_batch_size": (4, 16), "gradient_accumulation_steps": (4, 1)}
    assert "per_device_train_batch_size from 4 to 16" in record["advice"]

    cured = sums.sft(115, **{field: new for field, (_, new) in changes.items()})
    assert max(value for _, value in cured.series("memory/utilization")) == pytest.approx((18 + 16 * 2.3) / 80)  # 68 %
    assert cured.first("PERF001") is None and cured.fired() == {}


def test_a_micro_batch_that_nearly_fills_the_device(sums, device):
    """80 GiB, 18 of them static and 1.9 a row: b=32 takes 78.8. Simulated allocator, see `device`."""
    device(18, 1.9, 80)
    run = sums.sft(24)
    # Two windows of 10 steps, evaluated every 10.
    record = run.root("PERF002", planted=0, within=24, severity="warning")
    assert "98% (peak 78.8 of 80.0 GiB)" in record["message"] and "(limit 90%)" in record["message"]
    # 32 * 0.9 * 62/60.8 = 29.4 rows; 16 is the largest divisor of 32 up to there.
    changes = run.changes(record)
    assert changes.items() >= {"per_device_train_batch_size": (32, 16), "gradient_accumulation_steps": (1, 2)}.items()
    assert changes["gradient_checkpointing"] == (False, True)
    assert "per_device_train_batch_size from 32 to 16" in record["advice"]

    cured = sums.sft(24, per_device_train_batch_size=16, gradient_accumulation_steps=2)
    assert max(value for _, value in cured.series("memory/peak_allocated")) == pytest.approx(18 + 16 * 1.9)  # 48.4
    assert cured.fired() == {}


# -------------------------------------------------------------------------------------------------- the measuring


@pytest.mark.slow
def test_a_metric_that_stops(sums):
    """From step 30 on the entropy goes by another name, as after a changed version: RL005 and RL006 are blind."""
    from outspoken import GRPOTrainer

    class Renamed(GRPOTrainer):
        def _log(self, mode, name, value):
            super()._log(mode, "policy_entropy" if name == "entropy" and self.state.global_step >= 30 else name, value)

    run = sums.grpo(steps=75, trainer=Renamed)
    # Absent for more than 3 steps at two evaluations that are 20 apart.
    record = run.root("SYS012", planted=30, within=43, severity="info")
    assert "entropy has not been logged for" in record["message"] and "usually every 1" in record["message"]
    assert "RL005, RL006 cannot be judged" in record["advice"]
