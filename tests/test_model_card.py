"""The model card: what it says of a run, that nothing in it acts, and that it never fails a run."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import outspoken
from outspoken import DiagnosticsCallback
from outspoken.trainers import model_card
from outspoken.trainers.model_card import ModelCardMixin, markdown

ROWS = [{"input_ids": [5, 9, 40 + i, 7], "labels": [5, 9, 40 + i, 7]} for i in range(24)]


class DPOTrainer(ModelCardMixin, Trainer):
    """Named after a method, so that its card tells one; it minimises the likelihood's negative like any other."""


def collate(batch):
    return {key: torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels")}


@pytest.fixture
def make(tmp_path, tiny_model_factory, tiny_tokenizer):
    def build(*callbacks, watched=True, kind=DPOTrainer, model=None, **settings):
        args = TrainingArguments(
            **{
                "output_dir": str(tmp_path / "my_model"),
                "max_steps": 6,
                "per_device_train_batch_size": 2,
                "report_to": [],
                "save_strategy": "no",
                "use_cpu": True,
                "disable_tqdm": True,
                "logging_steps": 2,
                "remove_unused_columns": False,
                **settings,
            }
        )
        observer = [DiagnosticsCallback(sinks=[])] if watched else []
        return kind(
            model=model or tiny_model_factory(num_hidden_layers=1),
            args=args,
            train_dataset=Dataset.from_list(ROWS),
            eval_dataset=Dataset.from_list(ROWS[:4]),
            data_collator=collate,
            processing_class=tiny_tokenizer,
            callbacks=[*callbacks, *observer],
        )

    return build


def card_in(folder):
    """(metadata, text) of the README.md in a folder."""
    card = Path(folder, "README.md").read_text(encoding="utf-8")
    _, metadata, text = card.split("---\n", 2)
    return yaml.safe_load(metadata), text


def break_the_run(trainer):
    """Make its loss NaN from step 3 on, so that an error fires."""
    original = trainer.compute_loss

    def compute_loss(*args, **kwargs):
        loss = original(*args, **kwargs)
        return loss * float("nan") if trainer.state.global_step >= 2 else loss

    trainer.compute_loss = compute_loss


class TestAfterARun:
    def test_says_how_it_was_trained(self, make):
        trainer = make(learning_rate=3e-4)
        trainer.train()
        trainer.evaluate()
        trainer.create_model_card(dataset_name="org/pairs", tags="toy")
        metadata, text = card_in(trainer.args.output_dir)
        assert metadata == {
            "datasets": ["org/pairs"],
            "library_name": "transformers",
            "model_name": "my_model",
            "pipeline_tag": "text-generation",
            "tags": ["generated_from_trainer", "outspoken", "dpo", "toy"],
        }
        assert "# my\\_model" in text
        assert "[Direct Preference Optimization: Your Language Model is Secretly a Reward Model]" in text
        assert "(https://arxiv.org/abs/2305.18290)" in text
        assert "[org/pairs](https://huggingface.co/datasets/org/pairs)" in text
        assert "| learning\\_rate | 0.0003 |" in text
        assert "6 update steps, 0.50 epochs" in text
        last = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
        assert f"| eval\\_loss | {last:.4g} |" in text
        assert f"- torch {torch.__version__}" in text and "- transformers " in text and "- outspoken " in text

    def test_carries_verdict_and_diagnostics_of_a_broken_run(self, make):
        trainer = make(max_steps=12)
        break_the_run(trainer)
        trainer.train()
        trainer.save_model()
        _, text = card_in(trainer.args.output_dir)
        folder = Path(trainer.args.output_dir, "outspoken")
        verdict = json.loads((folder / "verdict.json").read_text())
        assert verdict["state"] == "broken"
        assert "**Verdict: broken** (confidence high" in text
        assert markdown(verdict["reason"]) in text
        fired = [json.loads(line) for line in (folder / "diagnostics.jsonl").read_text().splitlines()]
        nan = next(d for d in fired if d["code"] == "NUM001" and d["state"] == "firing")
        row = next(line for line in text.splitlines() if line.startswith("| NUM001"))
        cells = re.split(r"(?<!\\)\|", row)[1:-1]
        assert [cell.strip() for cell in cells[1:3]] == ["error", "firing"]
        assert markdown(nan["advice"]) in row

    def test_says_whether_changes_helped(self, make):
        trainer = make()
        trainer.train()
        change = {
            "id": "c1",
            "step": 4,
            "fields": {"learning_rate": {"old": 1e-3, "new": 5e-4}},
            "actor": "an agent",
            "reason": "loss fell as expected",
        }
        with open(Path(trainer.args.output_dir, "outspoken", "changes.jsonl"), "a") as file:
            for state in ("requested", "applied", "verified"):
                file.write(json.dumps({**change, "state": state}) + "\n")
        trainer.create_model_card()
        _, text = card_in(trainer.args.output_dir)
        rows = [line for line in text.splitlines() if "learning\\_rate 0.001" in line]
        assert rows == ["| 4 | learning\\_rate 0.001 -&gt; 0.0005 | verified | an agent | loss fell as expected |"]

    def test_checkpoints_carry_the_verdict_so_far(self, make):
        trainer = make(save_strategy="steps", save_steps=3)
        trainer.train()
        for folder in ("checkpoint-3", "."):
            _, text = card_in(Path(trainer.args.output_dir, folder))
            assert "**Verdict so far: warming up**" in text
        trainer.save_model()
        _, text = card_in(trainer.args.output_dir)
        final = json.loads(Path(trainer.args.output_dir, "outspoken", "verdict.json").read_text())
        assert f"**Verdict: {final['state'].replace('_', ' ')}**" in text

    def test_a_run_that_was_not_watched(self, make):
        trainer = make(watched=False)
        trainer.train()
        trainer.save_model()
        _, text = card_in(trainer.args.output_dir)
        assert "How the run went" not in text and "6 update steps" in text

    def test_weights_that_were_not_trained_here_have_no_verdict(self, make):
        make().train()
        again = make()  # the folder holds the run of another trainer
        again.create_model_card()
        assert "How the run went" not in card_in(again.args.output_dir)[1]

    def test_an_adapter(self, make, tiny_model_factory):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(tiny_model_factory(num_hidden_layers=1), LoraConfig(r=3))
        trainer = make(model=model)
        trainer.train()
        trainer.save_model()
        metadata, text = card_in(trainer.args.output_dir)
        assert metadata["library_name"] == "peft"
        assert "LORA, rank 3" in text and "**Verdict" in text  # not the card that peft writes

    def test_only_the_main_process_writes(self, make, monkeypatch):
        trainer = make()
        monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
        trainer.create_model_card()
        assert not Path(trainer.args.output_dir, "README.md").exists()


class TestNames:
    def named(self, make, name, **settings):
        trainer = make(**settings)
        trainer.model.config._name_or_path = name
        trainer.create_model_card()
        return card_in(trainer.args.output_dir)

    def test_a_base_model_from_the_hub(self, make):
        metadata, text = self.named(make, "org/base-7b", hub_model_id="me/tuned")
        assert metadata["base_model"] == "org/base-7b" and metadata["model_name"] == "tuned"
        assert "[org/base-7b](https://huggingface.co/org/base-7b)" in text
        assert 'pipeline("text-generation", model="me/tuned")' in text

    def test_a_local_base_model_keeps_its_folder_private_and_gives_its_licence(self, make, tmp_path):
        base = tmp_path / "secret" / "base"
        base.mkdir(parents=True)
        (base / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
        metadata, text = self.named(make, str(base))
        assert metadata["license"] == "mit" and "base_model" not in metadata
        assert "local folder, base" in text and "secret" not in text

    def test_a_local_base_model_that_is_gone(self, make, tmp_path):
        metadata, text = self.named(make, str(tmp_path / "secret" / "gone"))
        assert "base_model" not in metadata and "secret" not in text

    def test_a_reward_model_is_used_as_one(self, make):
        kind = type("RewardTrainer", (ModelCardMixin, Trainer), {})
        trainer = make(kind=kind)
        trainer.create_model_card()
        metadata, text = card_in(trainer.args.output_dir)
        assert metadata["pipeline_tag"] == "text-classification" and 'function_to_apply="none"' in text

    @pytest.mark.parametrize("template, expected", [(None, '"The capital'), ("{{ messages }}", '[{"role": "user"')])
    def test_the_example_chats_if_the_model_does(self, make, tiny_tokenizer_factory, template, expected):
        trainer = make()
        trainer.processing_class = tiny_tokenizer_factory(chat_template=template)
        trainer.create_model_card()
        assert f"generator({expected}" in card_in(trainer.args.output_dir)[1]


HOSTILE = (
    "<script>alert(1)</script> **bold** [click](https://evil.example) ![x](http://evil.example/x.png) `code` | cell\n"
    "# heading\n---\n{{ template }} <!-- comment --> @everyone www.evil.example \x1b[31mred $math$ \u202eright"
)


class TestNothingActs:
    def test_text_of_the_run_directory_is_shown_as_it_is(self, make):
        trainer = make()
        trainer.train()
        folder = Path(trainer.args.output_dir, "outspoken")
        verdict = json.loads((folder / "verdict.json").read_text())
        evidence = {"signal": HOSTILE, "statistic": HOSTILE, "value": HOSTILE, "n": HOSTILE, "window": [HOSTILE, 2]}
        record = {"code": HOSTILE, "name": HOSTILE, "severity": HOSTILE, "state": HOSTILE, "message": HOSTILE}
        record |= {"fired_step": 3, "advice": HOSTILE * 100, "fingerprint": "f"}
        change = {"id": "c", "state": HOSTILE, "fields": {HOSTILE: {"old": HOSTILE, "new": HOSTILE}}, "actor": HOSTILE}
        (folder / "verdict.json").write_text(
            json.dumps({**verdict, "state": HOSTILE, "confidence": HOSTILE, "reason": HOSTILE, "evidence": [evidence]})
        )
        (folder / "diagnostics.jsonl").write_text(json.dumps(record) + "\n")
        (folder / "changes.jsonl").write_text(json.dumps(change) + "\n")
        trainer.create_model_card(model_name=HOSTILE, dataset_name=HOSTILE, tags=[HOSTILE])
        metadata, text = card_in(trainer.args.output_dir)
        assert HOSTILE in metadata["tags"]  # YAML quotes it
        self.check(text)
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert rows and len(text) < 30_000
        # Every table has as many cells in each row as in its head.
        tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.M)
        for table in tables:
            cells = {len(re.split(r"(?<!\\)\|", line)) for line in table.splitlines()}
            assert len(cells) == 1, table

    @staticmethod
    def check(text):
        prose = text.replace("```python", "").replace("```", "")
        assert "\x1b" not in prose and "\u202e" not in prose
        assert not re.search(r"<(?!/?$)[a-zA-Z!/]", prose), "HTML"
        assert not re.search(r"(?<!\\)\]\((?!https://(huggingface\.co|arxiv\.org)/)", prose), "a link of its own"
        assert "http://evil" not in prose and "https://evil" not in prose and "www.evil" not in prose
        assert not re.search(r"(?<!\\)@everyone", prose)
        allowed = r"## (How to use it|How it was trained|How the run went|Versions)|### (Diagnostics|Changes made.*)"
        headings = [line for line in prose.splitlines() if line.startswith("#")]
        assert all(re.fullmatch(allowed, line) for line in headings[1:]), headings

    @pytest.mark.parametrize(
        "text, expected",
        [
            ("plain: 31% of 512 (limit 20%).", "plain: 31% of 512 (limit 20%)."),
            ("rewards/chosen_mean", r"rewards/chosen\_mean"),
            ("a | b", r"a \| b"),
            ("- item", "&#45; item"),
            ("1. item", "&#49;. item"),
            ("# head", "&#35; head"),
            ("\\", "\\\\"),
            ("a\nb", "a b"),
        ],
    )
    def test_escaping(self, text, expected):
        assert markdown(text) == expected

    def test_long_text_is_cut(self):
        assert len(markdown("x" * 5000)) == model_card.MAX_CELL


class TestNeverFails:
    def test_a_broken_run_directory(self, make, caplog):
        trainer = make(max_steps=2)
        trainer.train()
        for name in ("run.json", "verdict.json", "diagnostics.jsonl", "changes.jsonl"):
            path = Path(trainer.args.output_dir, "outspoken", name)
            sound = path.read_bytes()
            for content in (b"\xff\xfe{", b'{"id": 1', b"[]", b'{"evidence": 5, "fields": 7, "state": []}', None):
                path.unlink()
                if content is not None:
                    path.write_bytes(content)
                caplog.clear()
                trainer.create_model_card()
                _, text = card_in(trainer.args.output_dir)
                told = "The model card says nothing about how the run went" in caplog.text
                assert "2 update steps" in text
                assert ("How the run went" in text) != told, (name, content)
                path.write_bytes(sound)

    def test_a_directory_that_cannot_be_written(self, make, caplog, tmp_path):
        trainer = make()
        Path(trainer.args.output_dir).parent.mkdir(exist_ok=True)
        Path(trainer.args.output_dir, "README.md").mkdir(parents=True)
        trainer.create_model_card()
        assert "could not be written: IsADirectoryError" in caplog.text

    def test_an_error_of_ours(self, make, caplog, monkeypatch):
        monkeypatch.setattr(model_card, "_introduction", lambda *args: 1 / 0)
        trainer = make(save_strategy="steps", save_steps=3)
        trainer.train()
        assert trainer.state.global_step == 6
        assert "could not be written: ZeroDivisionError" in caplog.text


class TestPushToHub:
    @pytest.fixture
    def hub(self, monkeypatch):
        """A hub that keeps the card of each upload."""
        uploads = []

        def upload_folder(*, repo_id, folder_path, commit_message, path_in_repo=".", run_as_future=False, **options):
            card = Path(folder_path, "README.md")
            files = sorted(p.name for p in Path(folder_path).iterdir() if p.is_file())
            uploads.append((repo_id, path_in_repo, commit_message, card.read_text() if card.exists() else None, files))
            return SimpleNamespace(done=lambda: True) if run_as_future else "commit"

        api = SimpleNamespace(
            create_repo=lambda name, **options: SimpleNamespace(repo_id=f"me/{name.split('/')[-1]}"),
            upload_folder=upload_folder,
        )
        monkeypatch.setattr("transformers.trainer.hf_api", lambda *args, **kwargs: api)
        return uploads

    def test_the_card_goes_with_the_weights(self, make, hub):
        trainer = make(max_steps=12)
        break_the_run(trainer)
        trainer.train()
        trainer.push_to_hub(dataset_name="org/pairs")
        ((repo, _, message, card, files),) = hub
        assert (repo, message) == ("me/my_model", "End of training")
        assert "model.safetensors" in files
        assert "**Verdict: broken**" in card and "| NUM001" in card and "org/pairs" in card
        assert 'model="me/my_model"' in card

    def test_checkpoints_are_pushed_with_it(self, make, hub):
        trainer = make(push_to_hub=True, hub_strategy="checkpoint", save_strategy="steps", save_steps=3)
        trainer.train()
        assert [(path, message) for _, path, message, *_ in hub] == [
            (".", "Training in progress, step 3"),
            ("last-checkpoint", "Training in progress, step 3, checkpoint"),
            (".", "Training in progress, step 6"),
            ("last-checkpoint", "Training in progress, step 6, checkpoint"),
        ]
        assert all("**Verdict so far: warming up**" in card for _, _, _, card, _ in hub)


SAMPLING = ["GRPOTrainer", "RLOOTrainer", "DistillationTrainer"]


@pytest.mark.parametrize("name", ["SFTTrainer", "RewardTrainer", "DPOTrainer", "KTOTrainer", *SAMPLING])
def test_every_trainer_writes_one(name):
    trainer = getattr(outspoken, name)
    methods = ["create_model_card", "_save"] + ([] if name in SAMPLING else ["_save_checkpoint"])
    for method in methods:
        assert getattr(trainer, method) is getattr(ModelCardMixin, method)
    # Those that sample write what they hold first, and go on with it.
    assert ModelCardMixin in trainer.__mro__
    assert name.removesuffix("Trainer").lower() in model_card.METHODS


def test_sft_from_a_path(tmp_path, tiny_model_dir):
    args = outspoken.SFTConfig(
        str(tmp_path / "tuned"), max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    rows = Dataset.from_list([{"prompt": "The sky is", "completion": f" blue {i}."} for i in range(8)])
    trainer = outspoken.SFTTrainer(tiny_model_dir, args, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    metadata, text = card_in(args.output_dir)
    assert metadata["tags"] == ["generated_from_trainer", "outspoken", "sft"] and "base_model" not in metadata
    assert "with supervised fine-tuning, by Outspoken" in text and '"role": "user"' in text
    assert "| max\\_length | 1024 |" in text and "**Verdict" in text


def test_the_card_tells_a_run_that_ended_early(make):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise RuntimeError("out of luck")

    trainer = make(Stop())
    with pytest.raises(RuntimeError):
        trainer.train()
    trainer.save_model()
    assert "The run ended as: failed." in card_in(trainer.args.output_dir)[1]
