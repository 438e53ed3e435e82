"""BEMA, TR-DPO's moving reference, completions and progress: against the papers' formulas, TRL, and what a run does."""

import copy
import math
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM, GenerationConfig, Trainer, TrainerCallback, TrainingArguments
from trl import BEMACallback as TRLBEMACallback
from trl import SyncRefModelCallback as TRLSyncRefModelCallback
from trl.experimental.bema_for_ref_model import BEMACallback as TRLBEMAForRefCallback
from trl.experimental.bema_for_ref_model.callback import CallbackHandlerWithRefModel

from outspoken import (
    BEMACallback,
    LogCompletionsCallback,
    RichProgressCallback,
    SyncRefModelCallback,
    WeaveCallback,
)
from outspoken.trainers.callbacks import _metric_tables

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class RefTrainer(Trainer):
    ref_model = None


class Keep(TrainerCallback):
    """Keeps the weights after each step, and before the first as step 0; `ref` too."""

    def __init__(self, ref=None):
        self.weights, self.ref, self.refs = {}, ref, {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_step_end(args, state, control, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = weights(model)
        if self.ref is not None:
            self.refs[state.global_step] = weights(self.ref)


def weights(model):
    return {name: p.detach().double().clone() for name, p in model.named_parameters()}


def assert_equal(actual, expected, tolerance=1e-6):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def differ(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture
def make(tmp_path, tiny_model_factory, tiny_tokenizer):
    """`make(*callbacks, **settings)`: a trainer whose loss moves all weights a lot."""
    rows = [{"input_ids": ids, "labels": ids} for ids in ([5 + i, 9, 40 + i, 7] for i in range(24))]

    def collate(batch):
        return {key: torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels")}

    def build(*callbacks, model=None, folder="run", trainer=Trainer, eval_rows=None, **settings):
        args = TrainingArguments(
            **{
                "output_dir": str(tmp_path / folder),
                "max_steps": 11,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-2,
                "report_to": [],
                "save_strategy": "no",
                "use_cpu": True,
                "disable_tqdm": True,
                "logging_steps": 5,
                "remove_unused_columns": False,
                **settings,
            }
        )
        return trainer(
            model=model or tiny_model_factory(num_hidden_layers=1),
            args=args,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
            data_collator=collate,
            processing_class=tiny_tokenizer,
            callbacks=list(callbacks),
        )

    return build


def bema_by_hand(theta, steps, *, tau, phi, kappa, eta, rho, gamma, floor=0.0):
    """The paper's recursion in float64, from the weights after every step."""
    theta0 = ema = bema = theta[tau]
    for t in range(tau + phi, steps + 1, phi):
        alpha, beta = (rho + gamma * t) ** -eta, max((rho + gamma * t) ** -kappa, floor)
        ema = {n: (1 - beta) * ema[n] + beta * theta[t][n] for n in ema}
        bema = {n: alpha * (theta[t][n] - theta0[n]) + ema[n] for n in ema}
    return bema


class TestBEMA:
    @pytest.mark.parametrize(
        "settings",
        [
            {"tau": 0, "phi": 1, "kappa": 0.5, "eta": 0.2, "rho": 10, "gamma": 1.0},
            {"tau": 2, "phi": 3, "kappa": 0.3, "eta": 0.7, "rho": 4, "gamma": 2.0},
            {"tau": 1, "phi": 4, "kappa": 2.0, "eta": 0.0, "rho": 1, "gamma": 1.0, "floor": 0.6},
        ],
    )
    def test_the_papers_formula(self, make, settings):
        keep = Keep()
        bema = BEMACallback(
            update_freq=settings["phi"],
            ema_power=settings["kappa"],
            bias_power=settings["eta"],
            lag=settings["rho"],
            update_after=settings["tau"],
            multiplier=settings["gamma"],
            min_ema_multiplier=settings.get("floor", 0.0),
        )
        trainer = make(keep, bema)
        trainer.train()
        expected = bema_by_hand(keep.weights, 11, **settings)
        assert differ(expected, keep.weights[11]) > 1e-3  # an average that is not the last weights
        saved = AutoModelForCausalLM.from_pretrained(f"{trainer.args.output_dir}/bema")
        assert_equal(weights(saved), expected)
        assert_equal(weights(bema.running_model), expected)
        assert_equal(weights(trainer.model), keep.weights[11], tolerance=0)  # training itself goes on undisturbed

    @pytest.mark.parametrize("settings", [{"update_freq": 2}, {"update_freq": 3, "update_after": 2, "ema_power": 0.2}])
    def test_equal_to_trl(self, make, settings):
        own, trls = BEMACallback(**settings), TRLBEMACallback(**settings)
        make(own, trls).train()
        assert_equal(weights(own.running_model), weights(trls.running_model))

    def test_a_resumed_run_has_the_average_of_an_uninterrupted_one(self, make):
        settings = {"update_freq": 2, "update_after": 1}
        through = BEMACallback(**settings)
        make(through, save_strategy="steps", save_steps=4).train()
        resumed = BEMACallback(**settings)
        trainer = make(resumed)  # the same folder
        trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-4")
        assert_equal(weights(resumed.running_model), weights(through.running_model), tolerance=0)

    def test_a_checkpoint_may_lie_elsewhere(self, make, tmp_path):
        through = BEMACallback(update_freq=2)
        make(through, save_strategy="steps", save_steps=4).train()
        resumed = BEMACallback(update_freq=2)
        make(resumed, folder="other").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
        assert_equal(weights(resumed.running_model), weights(through.running_model), tolerance=0)

    def test_a_checkpoint_without_averages_is_told(self, make, tmp_path, caplog):
        make(save_strategy="steps", save_steps=4).train()
        resumed = BEMACallback(update_freq=2)
        make(resumed).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
        assert "begins a new average" in caplog.text

    def test_training_that_ends_in_the_burn_in_saves_its_weights(self, make, caplog):
        trainer = make(BEMACallback(update_after=50, update_freq=2))
        trainer.train()
        saved = AutoModelForCausalLM.from_pretrained(f"{trainer.args.output_dir}/bema")
        assert_equal(weights(saved), weights(trainer.model), tolerance=0)
        assert "its first update comes at step 52" in caplog.text

    def test_only_the_adapter_is_averaged(self, make, tiny_model_factory):
        from peft import LoraConfig, PeftModel, get_peft_model

        base = tiny_model_factory(num_hidden_layers=1)
        model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, init_lora_weights=False))
        keep, bema = Keep(), BEMACallback(update_freq=2)
        trainer = make(keep, bema, model=model)
        trainer.train()
        trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
        assert trained and bema.param_names == trained
        expected = bema_by_hand(
            {t: {n: w[n] for n in trained} for t, w in keep.weights.items()},
            10, tau=0, phi=2, kappa=0.5, eta=0.2, rho=10, gamma=1.0,
        )  # fmt: skip
        saved = PeftModel.from_pretrained(base, f"{trainer.args.output_dir}/bema")
        assert_equal({n: w for n, w in weights(saved).items() if n in trained}, expected)

    def test_bfloat16_weights_are_averaged_in_float32(self, make, tiny_model_factory):
        keep, bema = Keep(), BEMACallback(update_freq=1, ema_power=0.9)
        trainer = make(keep, bema, model=tiny_model_factory(num_hidden_layers=1).to(torch.bfloat16))
        trainer.train()
        expected = bema_by_hand(keep.weights, 11, tau=0, phi=1, kappa=0.9, eta=0.2, rho=10, gamma=1.0)
        for name, average in zip(bema.param_names, bema.bema_params):
            torch.testing.assert_close(average.double(), expected[name], rtol=0, atol=1e-6)

    def test_trains_twice(self, make):
        bema = BEMACallback(update_freq=2)
        trainer = make(bema)
        trainer.train()
        count = len(bema.param_names)
        trainer.train()
        assert len(bema.param_names) == count == len(bema.bema_params)

    def test_the_reference_model_follows_as_in_trl(self, make, tiny_model_factory):
        settings = {
            "update_freq": 2,
            "update_ref_model": True,
            "ref_model_update_freq": 3,
            "ref_model_update_after": 2,
        }
        finals = []
        for kind in (BEMACallback, TRLBEMAForRefCallback):
            callback, ref = kind(**settings), tiny_model_factory(seed=1, num_hidden_layers=1)
            keep = Keep(ref)
            trainer = make(callback, keep, trainer=RefTrainer)
            trainer.ref_model = ref
            if kind is TRLBEMAForRefCallback:
                handler = trainer.callback_handler
                trainer.callback_handler = CallbackHandlerWithRefModel(
                    handler.callbacks, trainer.model, ref, handler.processing_class, None, None
                )
            trainer.train()
            finals.append(keep.refs)
        own, trls = finals
        assert differ(own[1], own[2]) > 0.1  # the copy at step 2 brought the policy's weights
        assert differ(own[4], own[5]) > 1e-4 and differ(own[5], own[7]) == 0
        for step in own:
            assert_equal(own[step], trls[step])

    def test_a_reference_adapter_follows(self, make, tiny_model_factory):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(tiny_model_factory(num_hidden_layers=1), LoraConfig(r=2, init_lora_weights=False))
        model.add_adapter("ref", model.peft_config["default"])
        for name, p in model.named_parameters():
            if ".ref." in name:
                p.requires_grad_(False)
        bema = BEMACallback(update_freq=2, update_ref_model=True, ref_model_update_freq=10)
        trainer = make(bema, model=model)
        trainer.train()
        found = weights(trainer.model)
        for name, average in zip(bema.param_names, bema.bema_params):
            # The last copy was at step 10, as was the last update.
            torch.testing.assert_close(found[name.replace(".default.", ".ref.")].float(), average)
            assert differ({"": found[name]}, {"": average.double()}) > 0

    def test_no_reference_model(self, make):
        trainer = make(BEMACallback(update_ref_model=True))
        with pytest.raises(ValueError, match="needs a reference model of its own"):
            trainer.train()

    def test_a_resumed_run_has_the_reference_of_an_uninterrupted_one(self, make, tiny_model_factory):
        refs = []
        for checkpoint in (None, "checkpoint-6"):
            bema = BEMACallback(update_freq=2, update_ref_model=True, ref_model_update_freq=5)
            trainer = make(bema, trainer=RefTrainer, save_strategy="steps", save_steps=6, max_steps=9)
            trainer.ref_model = tiny_model_factory(seed=1, num_hidden_layers=1)
            trainer.train(resume_from_checkpoint=checkpoint and f"{trainer.args.output_dir}/{checkpoint}")
            refs.append(weights(trainer.ref_model))
        assert_equal(refs[1], refs[0], tolerance=0)

    @pytest.mark.parametrize("name, value", [("update_freq", 0), ("update_after", -1), ("ref_model_update_freq", 0)])
    def test_senseless_numbers(self, name, value):
        with pytest.raises(ValueError, match=f"`{name}` is {value}; choose"):
            BEMACallback(**{name: value})

    def test_goes_back_with_the_weights(self, make, tmp_path):
        """As when a change is taken back: weights and averages of a checkpoint, in the middle of training."""
        bema, seen = BEMACallback(update_freq=1), {}

        class Back(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 7:
                    bema.restore(args, str(tmp_path / "run" / "checkpoint-4"))
                seen[state.global_step] = [p.clone() for p in bema.bema_params]

        make(bema, Back(), save_strategy="steps", save_steps=4).train()
        assert all(torch.equal(a, b) for a, b in zip(seen[7], seen[4], strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(seen[6], seen[4], strict=True))


class TestSyncRefModel:
    def sync(self, args, alpha=0.6, steps=3):
        args.ref_model_mixup_alpha, args.ref_model_sync_steps = alpha, steps
        return args

    def test_the_papers_formula_with_settings_changed_in_flight(self, make, tiny_model_factory):
        ref = tiny_model_factory(seed=1, num_hidden_layers=1)
        keep = Keep(ref)

        class Change(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 7:
                    args.ref_model_mixup_alpha, args.ref_model_sync_steps = 0.25, 2

        trainer = make(SyncRefModelCallback(ref, None), keep, Change())
        self.sync(trainer.args)
        trainer.train()
        expected = keep.refs[0]
        for step in range(1, 12):
            alpha = {3: 0.6, 6: 0.6, 8: 0.25, 10: 0.25}.get(step, 0.0)
            expected = {n: alpha * keep.weights[step][n] + (1 - alpha) * expected[n] for n in expected}
            assert_equal(keep.refs[step], expected)
        assert differ(expected, keep.refs[0]) > 0.1

    def test_equal_to_trl(self, make, tiny_model_factory):
        policy = tiny_model_factory(seed=3, num_hidden_layers=1)
        make()  # TRL asks accelerate's state, which a trainer sets up
        refs = [tiny_model_factory(seed=1, num_hidden_layers=1) for _ in range(2)]
        SyncRefModelCallback.sync_target_model(policy, refs[0], 0.3)
        TRLSyncRefModelCallback.sync_target_model(policy, refs[1], 0.3)
        assert_equal(weights(refs[0]), weights(refs[1]), tolerance=0)

    def test_a_resumed_run_has_the_reference_of_an_uninterrupted_one(self, make, tiny_model_factory, caplog):
        refs = []
        for checkpoint in (None, "checkpoint-6"):
            ref = tiny_model_factory(seed=1, num_hidden_layers=1)
            trainer = make(SyncRefModelCallback(ref, None), save_strategy="steps", save_steps=6)
            self.sync(trainer.args, steps=4)
            trainer.train(resume_from_checkpoint=checkpoint and f"{trainer.args.output_dir}/{checkpoint}")
            refs.append(weights(ref))
        assert_equal(refs[1], refs[0], tolerance=0)
        assert "keeps the weights" not in caplog.text

    def test_a_checkpoint_without_the_reference_is_told(self, make, tiny_model_factory, caplog):
        make(save_strategy="steps", save_steps=6).train()
        trainer = make(SyncRefModelCallback(tiny_model_factory(num_hidden_layers=1), None))
        self.sync(trainer.args)
        trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-6")
        assert "The reference model keeps the weights it has now" in caplog.text

    def test_another_architecture(self, tiny_model_factory):
        policy, ref = tiny_model_factory(num_hidden_layers=2), tiny_model_factory(num_hidden_layers=1)
        with pytest.raises(ValueError, match="only a reference of the same architecture"):
            SyncRefModelCallback.sync_target_model(policy, ref, 0.5)


PROMPTS = [
    {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "prompt": "The sky"},
    {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "prompt": "What is 2 + 2?"},
    {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "prompt": "It is"},
]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


class TestLogCompletions:
    def test_completes_each_prompt_as_the_model_does_alone(self, make, tiny_tokenizer):
        trainer = make(eval_rows=PROMPTS, eval_strategy="steps", eval_steps=4, max_steps=9)
        callback = LogCompletionsCallback(trainer, GenerationConfig(**GREEDY))
        trainer.add_callback(callback)
        models = {}

        class Copy(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **kwargs):
                models[state.global_step] = copy.deepcopy(model)

        trainer.add_callback(Copy())
        side = tiny_tokenizer.padding_side
        trainer.train()
        assert [row[:2] for row in callback.table] == [(step, row["prompt"]) for step in (4, 8) for row in PROMPTS]
        for step, prompt, completion in callback.table:
            ids = tiny_tokenizer(prompt, return_tensors="pt").input_ids
            # Alone, so without padding.
            out = models[step].eval().generate(ids, **GREEDY, pad_token_id=tiny_tokenizer.pad_token_id)
            assert completion == tiny_tokenizer.decode(out[0, ids.size(1) :], skip_special_tokens=True)
        assert tiny_tokenizer.padding_side == side
        written = pd.read_parquet(f"{trainer.args.output_dir}/completions/eval_completions_00008.parquet")
        assert list(written["completion"]) == [row[2] for row in callback.table if row[0] == 8]
        assert list(written.columns) == ["step", "prompt", "completion"]

    def test_sampling_does_not_change_training(self, make, tiny_model_factory):
        finals = []
        for logs in (False, True):
            trainer = make(model=tiny_model_factory(num_hidden_layers=1, attention_dropout=0.5), eval_rows=PROMPTS)
            if logs:
                config = GenerationConfig(max_new_tokens=4, do_sample=True)
                trainer.add_callback(LogCompletionsCallback(trainer, config, num_prompts=2, freq=2))
            trainer.train()
            assert trainer.model.training
            finals.append(weights(trainer.model))
        assert_equal(finals[1], finals[0], tolerance=0)

    def test_conversations_and_labelled_rows(self, make, tiny_tokenizer):
        question = [{"role": "user", "content": "What color is the sky?"}]
        half = [*question, {"role": "assistant", "content": "It is"}]
        cases = {
            "answered": ({"prompt": question}, "<|im_start|>user\nWhat color is the sky?<|im_end|>\n<|im_start|>assistant\n"),
            "continued": ({"prompt": half}, "<|im_start|>user\nWhat color is the sky?<|im_end|>\n<|im_start|>assistant\nIt is"),
            "labelled": ({"input_ids": [45, 46, 47], "labels": [-100, -100, 47]}, tiny_tokenizer.decode([45, 46])),
        }  # fmt: skip
        for row, text in cases.values():
            callback = LogCompletionsCallback(make(eval_rows=[row]))
            assert tiny_tokenizer.decode(callback._prompts[0]) == text

    def test_goes_to_wandb(self, make, monkeypatch):
        logged = []
        wandb = SimpleNamespace(run=object(), log=logged.append, Table=lambda dataframe: dataframe)
        trainer = make(eval_rows=PROMPTS, max_steps=2)
        trainer.args.report_to = ["wandb"]
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        callback = LogCompletionsCallback(trainer, GenerationConfig(**GREEDY), num_prompts=1, freq=1)
        trainer.add_callback(callback)
        trainer.train()
        assert [len(entry["completions"]) for entry in logged] == [
            1,
            2,
        ]  # the whole table each time, as wandb wants it

    def test_wrong_datasets(self, make):
        with pytest.raises(ValueError, match="pass the trainer an `eval_dataset`"):
            LogCompletionsCallback(make())
        with pytest.raises(ValueError, match="the evaluation dataset has 'text'; add a column 'prompt'"):
            LogCompletionsCallback(make(eval_rows=[{"text": "no prompt"}]))
        trainer = make(eval_rows=PROMPTS)
        trainer.eval_dataset = trainer.eval_dataset.to_iterable_dataset()
        with pytest.raises(ValueError, match="pass `num_prompts`"):
            LogCompletionsCallback(trainer)
        assert len(LogCompletionsCallback(trainer, num_prompts=2)._prompts) == 2


class FakeEvaluation:
    made = []

    def __init__(self, **about):
        self.about, self.predictions, self.summary = about, [], None
        FakeEvaluation.made.append(self)

    def log_prediction(self, inputs, output):
        prediction = {"inputs": inputs, "output": output, "scores": {}}
        self.predictions.append(prediction)
        return SimpleNamespace(
            log_score=lambda scorer, score: prediction["scores"].update({scorer: score}),
            finish=lambda: prediction.update(done=True),
        )

    def log_summary(self, summary):
        self.summary = summary

    def finish(self):
        self.summary = "finished"


class TestWeave:
    @pytest.fixture
    def weave(self, monkeypatch):
        FakeEvaluation.made = []
        started = []
        client = SimpleNamespace(get_weave_client=lambda: started[-1] if started else None)
        module = SimpleNamespace(EvaluationLogger=FakeEvaluation, init=started.append, started=started)
        monkeypatch.setitem(sys.modules, "weave", module)
        monkeypatch.setitem(sys.modules, "weave.trace", SimpleNamespace())
        monkeypatch.setitem(sys.modules, "weave.trace.context", SimpleNamespace(weave_client_context=client))
        return module

    def test_logs_and_scores_each_evaluation(self, make, weave, caplog):
        trainer = make(eval_rows=PROMPTS, eval_strategy="steps", eval_steps=4, max_steps=8)

        def broken(prompt, completion):
            raise RuntimeError("no score")

        scorers = {"length": lambda prompt, completion: len(prompt), "broken": broken}
        callback = WeaveCallback(trainer, "team/project", scorers, GenerationConfig(**GREEDY), num_prompts=2)
        trainer.add_callback(callback)
        trainer.train()
        assert callback.is_evaluation_mode and weave.started == ["team/project"]
        assert [e.about["eval_attributes"]["training_step"] for e in FakeEvaluation.made] == [4, 8]
        last = FakeEvaluation.made[-1]
        assert [p["scores"] for p in last.predictions] == [{"length": 7}, {"length": 14}]
        assert all(p["done"] for p in last.predictions)
        assert last.summary == {"total_predictions": 2, "successful_predictions": 2, "avg_length": 10.5}
        assert "The scorer 'broken' failed at step 8: RuntimeError: no score" in caplog.text

    def test_a_dashboard_that_is_down_does_not_end_the_run(self, make, weave, caplog):
        def down(**about):
            raise ConnectionError("weave is away")

        weave.EvaluationLogger = down
        trainer = make(eval_rows=PROMPTS, eval_strategy="steps", eval_steps=4, max_steps=4)
        trainer.add_callback(WeaveCallback(trainer, "p", generation_config=GenerationConfig(**GREEDY)))
        trainer.train()
        assert "Weave did not take the completions of step 4: weave is away" in caplog.text

    def test_no_project(self, make, weave):
        trainer = make(eval_rows=PROMPTS)
        trainer.add_callback(WeaveCallback(trainer))
        with pytest.raises(ValueError, match="pass `project_name`"):
            trainer.train()

    def test_not_installed(self, make, monkeypatch):
        monkeypatch.setitem(sys.modules, "weave", None)
        with pytest.raises(ImportError, match="install it with `pip install weave`"):
            WeaveCallback(make(eval_rows=PROMPTS))


class TestRichProgress:
    def test_shows_steps_and_metrics(self, make, capsys):
        rows = [{"input_ids": [5, 6], "labels": [5, 6]}]
        trainer = make(RichProgressCallback(), eval_rows=rows, eval_strategy="steps", eval_steps=5)
        trainer.evaluate()  # before training there is no panel
        trainer.train()
        trainer.evaluate()  # … nor after it
        shown = capsys.readouterr().out
        for part in ("Training", "100%", "Step 11", "train_loss"):
            assert part in shown, part

    def test_metrics_are_grouped_and_small_ones_readable(self):
        logs = {"loss": 1.25, "rewards/chosen": -0.5, "rewards/f/mean": 3, "lr": 2e-6, "none": None, "bad": math.nan}
        console = Console(width=120)
        with console.capture() as captured:
            console.print(_metric_tables(logs))
        lines = [" ".join(line.split()) for line in captured.get().splitlines()]
        text = " ".join(lines)
        for part in ("loss 1.250", "chosen -0.500", "f/mean 3.000", "lr 2.00e-06", "none None", "bad nan", "rewards"):
            assert part in text, part

    def test_resumed(self, make, capsys):
        make(save_strategy="steps", save_steps=4).train()
        callback = RichProgressCallback()
        trainer = make(callback, max_steps=8)
        seen = []

        class Look(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                seen.append(callback._training.tasks[0].completed)

        trainer.add_callback(Look())
        trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-4")
        assert seen == [4]
