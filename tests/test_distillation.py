"""DistillationTrainer end to end on tiny models: on- and off-policy, teachers, vocabularies, resuming, live changes."""

import inspect
import json
import random
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel

from outspoken.trainers.config import live_fields
from outspoken.trainers.distillation import DistillationConfig, DistillationTrainer
from outspoken.trainers.losses.distillation import label_divergence
from outspoken.trainers.rollouts.batch import Sampled, sampled_from_ids

pytestmark = pytest.mark.usefixtures("fast_collection")

PROMPTS = ["The sky", "What is 2 + 2?", "green grass", "the quick brown fox", "It is", "dog", "What", "lazy dog"]
ANSWERS = [" is blue.", " It is 4.", " and the sky", "", " 7", " jumps over the lazy dog", " color?", "."]


@pytest.fixture
def config(tmp_path, short_run):
    def build(**settings):
        defaults = {
            **short_run,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_completion_length": 5,
            "max_steps": 2,
            "diagnose": False,
        }
        return DistillationConfig(str(tmp_path / "run"), **{**defaults, **settings})

    return build


def dataset(prompts=PROMPTS, answers=ANSWERS):
    rows = {"prompt": prompts, "number": list(range(len(prompts)))}
    return Dataset.from_dict(rows if answers is None else {**rows, "completion": answers})


@pytest.fixture
def trainer(config, tiny_tokenizer_factory, tiny_model_factory):
    """`trainer(<trainer arguments>, **settings)`."""
    arguments = inspect.signature(DistillationTrainer.__init__).parameters

    def build(**options):
        given = {name: options.pop(name) for name in list(options) if name in arguments}
        return DistillationTrainer(
            **{
                "model": tiny_model_factory(seed=1) if "model" not in given else None,
                "teacher_model": tiny_model_factory(seed=2, hidden_size=48) if "teacher_model" not in given else None,
                "args": config(**options),
                "train_dataset": dataset(),
                "processing_class": tiny_tokenizer_factory(),
                **given,
            }
        )

    return build


def scripted(run):
    """Let completions depend on the prompt's tokens alone; about half are ended by the EOS token."""

    def generate(prompt_ids, params, **_):
        completions = []
        for ids in prompt_ids:
            rng = random.Random(sum(ids))
            sampled = [rng.randrange(4, 290) for _ in range(rng.randint(1, params.max_new_tokens))]
            completions.append([*sampled[:-1], run.rollouts.tokenizer.eos_token_id] if rng.random() < 0.5 else sampled)
        return sampled_from_ids(completions, run.rollouts.end_ids)

    run.rollouts.generate = generate
    return run


def watched(run):
    """The generation batches of a run, whole."""
    batches = []
    completions = run._sample_and_score

    def keep(rows):
        batches.append(completions(rows))
        return batches[-1]

    run._sample_and_score = keep
    return batches


def logged(run, name):
    return [row[name] for row in run.state.log_history if name in row]


def pairs(batch):
    """[(prompt, completion, tokens with loss)] without padding."""
    rows = zip(batch.prompt_ids, batch.prompt_mask, batch.completion_ids, batch.completion_mask, batch.loss_mask)
    return [(p[m == 1].tolist(), c[k == 1].tolist(), c[loss == 1].tolist()) for p, m, c, k, loss in rows]


# ---------------------------------------------------------------------- the public surface


def test_constructor_arguments_are_trls():
    import trl

    theirs = list(inspect.signature(trl.DistillationTrainer.__init__).parameters)
    assert list(inspect.signature(DistillationTrainer.__init__).parameters) == theirs


def test_trls_config_is_converted(trainer, tmp_path):
    import trl

    args = trl.DistillationConfig(
        str(tmp_path / "trl"), beta=0.25, teacher_model_init_kwargs=None, max_completion_length=7, use_cpu=True,
        bf16=False, report_to="none", generation_kwargs={"seed": 3},
    )  # fmt: skip
    found = trainer(args=args).args
    assert isinstance(found, DistillationConfig)
    assert (found.beta, found.max_completion_length, found.generation_kwargs) == (0.25, 7, {"seed": 3})
    assert (found.lmbda, found.teacher_top_k) == (1.0, None)


def test_live_fields():
    bounds = live_fields(DistillationConfig)
    assert {"learning_rate", "beta", "temperature", "max_completion_length", "lmbda", "teacher_top_k"} <= bounds.keys()
    assert (bounds["beta"]["minimum"], bounds["beta"]["maximum"]) == (0.0, 1.0)
    assert (bounds["lmbda"]["minimum"], bounds["lmbda"]["maximum"]) == (0.0, 1.0)


def test_it_learns_what_the_teacher_predicts(trainer, tiny_model_factory):
    """A student of the teacher's size comes close to it on its own samples, and no one else is changed."""
    teacher = tiny_model_factory(seed=2)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    run = trainer(
        teacher_model=teacher, max_steps=20, learning_rate=1e-2, per_device_train_batch_size=8, beta=0.0,
        max_completion_length=8, lr_scheduler_type="constant",
    )  # fmt: skip
    run.train()
    divergence = logged(run, "distillation/divergence")
    assert divergence[-1] < 0.6 * divergence[0]
    assert logged(run, "distillation/top1_agreement")[-1] >= 0.0
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])
    assert not teacher.training and all(not p.requires_grad and p.grad is None for p in teacher.parameters())


def test_metrics_of_a_step(trainer):
    run = trainer(max_steps=1)
    run.train()
    row = run.state.log_history[0]
    lengths = {f"completions/{kind}_{which}length" for kind in ("mean", "min", "max") for which in ("", "terminated_")}
    assert lengths | {
        "loss", "entropy", "num_tokens", "step_time", "completions/clipped_ratio", "distillation/divergence",
        "distillation/forward_kl", "distillation/reverse_kl", "distillation/teacher_entropy",
        "distillation/top1_agreement",
    } <= row.keys()  # fmt: skip
    assert row["loss"] == pytest.approx(row["distillation/divergence"], rel=1e-5)
    assert row["loss"] == pytest.approx(row["distillation/reverse_kl"], rel=1e-5)  # beta is 1


# ---------------------------------------------------------------------- the loss


@pytest.mark.parametrize(("size", "accumulation"), [(4, 2), (2, 4), (1, 8)])
def test_accumulation_is_one_big_batch(trainer, size, accumulation, gradient_tape):
    tapes = []
    for batch_size, steps in ((8, 1), (size, accumulation)):
        tape = gradient_tape()
        run = scripted(
            trainer(
                per_device_train_batch_size=batch_size, gradient_accumulation_steps=steps, beta=0.5, callbacks=[tape],
                max_completion_length=12, optim="sgd", max_grad_norm=0.0,
            )
        )  # fmt: skip
        run.train()
        tapes.append((tape.steps, logged(run, "loss")))
    (whole, loss), (parts, loss_of_parts) = tapes
    assert loss == pytest.approx(loss_of_parts, rel=1e-5)
    for one, other in zip(whole, parts, strict=True):
        for name, grad in one.items():
            torch.testing.assert_close(other[name], grad, rtol=1e-4, atol=1e-6)


def test_loss_of_a_batch_is_the_mean_over_its_tokens_alone(trainer):
    """Row by row, without padding, from both models' whole logits."""
    run = scripted(trainer(beta=1.0, temperature=1.5, per_device_train_batch_size=8, max_steps=1, learning_rate=0.0))
    batches = watched(run)
    run.train()
    total, tokens = 0.0, 0
    for prompt, completion, with_loss in pairs(batches[0]):
        assert with_loss == completion
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            s, t = (
                (model(ids).logits[0, len(prompt) - 1 : -1] / 1.5).softmax(-1).double()
                for model in (run.model, run.teacher_model)
            )
        total += float((s * (s / t).log()).sum())
        tokens += len(completion)
    assert logged(run, "loss")[0] == pytest.approx(total / tokens, rel=1e-4)
    assert tokens == batches[0].active_tokens
    assert len({len(prompt) for prompt, *_ in pairs(batches[0])}) > 1  # so some prompts were padded


@pytest.mark.parametrize("add_tail", [True, False])
def test_top_k_teacher(trainer, add_tail):
    run = scripted(trainer(beta=0.3, teacher_top_k=4, loss_add_tail=add_tail, max_steps=1, learning_rate=0.0))
    batches = watched(run)
    run.train()
    batch = batches[0]
    ids = torch.cat([batch.prompt_ids, batch.completion_ids], 1)
    mask = torch.cat([batch.prompt_mask, batch.completion_mask], 1)
    labels = ids.masked_fill(torch.cat([batch.prompt_mask * 0, batch.loss_mask], 1) == 0, -100)
    found, _ = label_divergence(
        run.model, run.teacher_model, {"input_ids": ids, "attention_mask": mask}, labels, beta=0.3, top_k=4,
        add_tail=add_tail,
    )  # fmt: skip
    assert logged(run, "loss")[0] == pytest.approx(float(found.divergence.detach().sum() / found.mask.sum()), rel=1e-4)
    whole = scripted(trainer(beta=0.3, max_steps=1, learning_rate=0.0))
    whole.train()
    assert logged(run, "loss") != pytest.approx(logged(whole, "loss"), rel=1e-3)
    assert logged(run, "distillation/forward_kl") == pytest.approx(logged(whole, "distillation/forward_kl"), rel=1e-4)


def test_what_tools_wrote_carries_no_loss(trainer):
    run = trainer(beta=1.0, max_steps=1, learning_rate=0.0)
    run.rollouts.generate = lambda prompt_ids, params, **_: Sampled(
        [[10, 11, 12, 13, 0]] * len(prompt_ids),
        [True] * len(prompt_ids),
        tool_mask=[[1, 0, 0, 1, 1]] * len(prompt_ids),
    )
    batches = watched(run)
    run.train()
    total = 0.0
    for prompt, completion, with_loss in pairs(batches[0]):
        assert with_loss == [10, 13, 0]
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            s, t = (model(ids).logits[0, len(prompt) - 1 : -1].softmax(-1) for model in (run.model, run.teacher_model))
        total += float((s * (s / t).log()).sum(-1)[[0, 3, 4]].sum())
    assert logged(run, "loss")[0] == pytest.approx(total / (3 * len(batches[0])), rel=1e-4)
    assert logged(run, "completions/mean_length") == [3.0]


def clock(zone: str) -> str:
    """Tell the time.

    Args:
        zone: the time zone.
    """
    return "green grass"


def test_tools(trainer, tiny_tokenizer_factory):
    """A call is answered, and the student is trained on what it wrote before and after."""
    run = trainer(
        tools=[clock], processing_class=tiny_tokenizer_factory(), max_steps=1, max_completion_length=120,
        train_dataset=Dataset.from_list([{"prompt": CHAT[:1]}] * 4), per_device_train_batch_size=2,
    )  # fmt: skip
    call = '<tool_call>{"name": "clock", "arguments": {"zone": "here"}}</tool_call><|im_end|>'
    encode = run.processing_class.encode

    def generate(prompt_ids, params, **_):
        asked = "green grass" in run.processing_class.decode(prompt_ids[0])
        return sampled_from_ids([encode("It is 7.<|im_end|>" if asked else call)] * len(prompt_ids), [3])

    run.rollouts.generate = generate
    batches = watched(run)
    run.train()
    for prompt, completion, with_loss in pairs(batches[0]):
        decode = run.processing_class.decode
        assert "clock" in decode(prompt) and "green grass" in decode(completion)
        assert decode(with_loss) == call + "It is 7.<|im_end|>"
    assert logged(run, "tools/call_frequency") == [1.0] and logged(run, "tools/failure_frequency") == [0.0]


def test_a_batch_without_a_token_teaches_nothing(trainer, tiny_model_factory):
    model = tiny_model_factory(seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = trainer(model=model, lmbda=0.0, train_dataset=dataset(answers=[" blue"] * 8), max_steps=1, weight_decay=0.0)
    batch = run._sample_and_score

    def empty(rows):
        found = batch(rows)
        found.loss_mask = found.loss_mask * 0
        found.active_tokens = found.active_tokens * 0
        return found

    run._sample_and_score = empty
    run.train()
    assert logged(run, "loss") == [0.0]
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name])


# ---------------------------------------------------------------------- the dataset's completions


def test_off_policy_trains_on_the_datasets_completions(trainer, tiny_tokenizer):
    run = trainer(lmbda=0.0, max_steps=1, per_device_train_batch_size=8, learning_rate=0.0, max_completion_length=40)
    run.rollouts.generate = lambda *args, **kwargs: pytest.fail("a completion was sampled")
    batches = watched(run)
    run.train()
    expected = []
    for prompt, answer in zip(PROMPTS, ANSWERS):
        ids, whole = tiny_tokenizer(prompt)["input_ids"], tiny_tokenizer(f"{prompt}{answer}<|endoftext|>")["input_ids"]
        assert whole[: len(ids)] == ids
        expected.append((ids, whole[len(ids) :], whole[len(ids) :]))
    assert sorted(pairs(batches[0])) == sorted(expected)

    row = run.state.log_history[0]
    assert row["num_tokens"] == sum(len(p) + len(c) for p, c, _ in expected)
    assert row["distillation/on_policy"] == 0.0
    assert not any(name.startswith("completions/") for name in row)
    total = tokens = 0
    for prompt, completion, _ in expected:
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            s, t = (model(ids).logits[0, len(prompt) - 1 : -1].softmax(-1) for model in (run.model, run.teacher_model))
        total, tokens = total + float((s * (s / t).log()).sum()), tokens + len(completion)
    assert row["loss"] == pytest.approx(total / tokens, rel=1e-4)


def test_off_policy_completions_are_cut_like_samples(trainer):
    run = trainer(lmbda=0.0, max_steps=1, max_completion_length=2, per_device_train_batch_size=8)
    batches = watched(run)
    run.train()
    lengths = [len(completion) for _, completion, _ in pairs(batches[0])]
    assert max(lengths) == 2 and min(lengths) == 1  # an empty answer is its end token


def test_a_mix_draws_the_same_batches_each_time(trainer):
    settings = {"lmbda": 0.5, "max_steps": 8, "per_device_train_batch_size": 2}
    runs, draws = [], []
    for _ in range(2):
        runs.append(trainer(**settings))
        runs[-1].train()
        draws.append(logged(runs[-1], "distillation/on_policy"))
    assert draws[0] == draws[1] and {*draws[0]} == {0.0, 1.0}
    run, again = runs
    assert logged(run, "loss") == logged(again, "loss")
    for row in run.state.log_history[:-1]:
        assert ("completions/mean_length" in row) == (row["distillation/on_policy"] == 1.0)
    # Another seed, other draws; and over many batches the share is what was asked for.
    other = trainer(seed=7, lmbda=0.3)
    other._step = 0
    found = []
    for other._step in range(2000):
        found.append(other._draws_on_policy("train"))
    assert sum(found) / len(found) == pytest.approx(0.3, abs=0.04)
    assert [float(draw) for draw in found[:8]] != draws[0]


@pytest.mark.parametrize(("lmbda", "expected"), [(1.0, True), (0.0, False)])
def test_all_or_none(trainer, lmbda, expected):
    run = trainer(lmbda=lmbda)
    for run._step in range(200):
        assert run._draws_on_policy("train") is expected


CHAT = [
    {"role": "user", "content": "What color is the sky?"},
    {"role": "assistant", "content": "It is blue."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
]


@pytest.mark.parametrize("column", ["messages", "completion"])
def test_conversations(trainer, column):
    row = {"messages": CHAT} if column == "messages" else {"prompt": CHAT[:3], "completion": CHAT[3:]}
    run = trainer(train_dataset=Dataset.from_list([row] * 4), lmbda=0.0, max_steps=1, max_completion_length=50)
    batches = watched(run)
    run.train()
    decode = run.processing_class.decode
    for prompt, completion, with_loss in pairs(batches[0]):
        assert decode(prompt).endswith("What is 2 + 2?<|im_end|>\n<|im_start|>assistant\n")
        assert decode(completion) == "It is 4.<|im_end|>"  # the template's newline is no token of the assistant
        assert with_loss == completion


def test_conversations_on_policy_with_messages(trainer):
    run = trainer(train_dataset=Dataset.from_list([{"messages": CHAT}] * 4), max_steps=1)
    batches = watched(run)
    run.train()
    assert all(
        run.processing_class.decode(prompt).endswith("<|im_start|>assistant\n") for prompt, *_ in pairs(batches[0])
    )


def test_turns_of_others_in_a_completion_carry_no_loss(trainer):
    rows = [{"prompt": CHAT[:1], "completion": CHAT[1:]}] * 4
    run = trainer(train_dataset=Dataset.from_list(rows), lmbda=0.0, max_steps=1, max_completion_length=200)
    batches = watched(run)
    run.train()
    decode = run.processing_class.decode
    for _, completion, with_loss in pairs(batches[0]):
        assert "What is 2 + 2?" in decode(completion)
        assert decode(with_loss) == "It is blue.<|im_end|>It is 4.<|im_end|>"


def test_chat_template_kwargs_reach_prompt_and_completion(trainer, tiny_tokenizer_factory, tiny_chat_templates):
    template = "{% if polite is defined %}please {% endif %}" + tiny_chat_templates["plain"]
    run = trainer(
        train_dataset=Dataset.from_list([{"messages": CHAT}] * 4), lmbda=0.5, max_completion_length=50,
        processing_class=tiny_tokenizer_factory(chat_template=template), chat_template_kwargs={"polite": True},
    )  # fmt: skip
    rows = [{"prompt": CHAT[:3], "completion": CHAT[3:]}]
    found = run._read(rows, 50)
    assert run.processing_class.decode(found.prompt_ids[0]).startswith("please <|im_start|>user")
    assert run.processing_class.decode(found.completion_ids[0]) == "It is 4.<|im_end|>"


# ---------------------------------------------------------------------- teachers and vocabularies


def test_teacher_from_a_path(trainer, tiny_model_dir, tmp_path, tiny_model_factory):
    run = trainer(teacher_model=tiny_model_dir, teacher_model_init_kwargs={"dtype": "bfloat16"})
    assert run.teacher_model.dtype == torch.bfloat16
    run.train()

    tiny_model_factory(seed=5).to(torch.float16).save_pretrained(tmp_path / "half")
    stored = trainer(teacher_model=None, teacher_model_name_or_path=str(tmp_path / "half"))
    assert stored.teacher_model.dtype == torch.float16  # as it is stored
    assert stored.model.dtype == torch.float32


def test_a_bfloat16_teacher_teaches_almost_the_same(trainer, tiny_model_factory):
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        run = scripted(trainer(teacher_model=tiny_model_factory(seed=2).to(dtype), max_steps=1, beta=0.5))
        run.train()
        losses += logged(run, "loss")
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]


@pytest.mark.parametrize("sizes", [(304, 320), (320, 304)])
def test_embeddings_padded_to_different_sizes(trainer, tiny_model_factory, sizes):
    run = trainer(
        model=tiny_model_factory(seed=1, vocab_size=sizes[0]),
        teacher_model=tiny_model_factory(seed=2, vocab_size=sizes[1]),
        per_device_train_batch_size=8, max_steps=1, learning_rate=0.0, max_completion_length=4,
    )  # fmt: skip
    tokens = [[10, 11, 12, 13], [20, 310, 22, 23]] if sizes[0] == 320 else [[10, 11, 12, 13]] * 2
    run.rollouts.generate = lambda prompt_ids, params, **_: sampled_from_ids(tokens * (len(prompt_ids) // 2), [0])
    batches = watched(run)
    run.train()
    total = count = 0
    for prompt, completion, with_loss in pairs(batches[0]):
        # Behind a token that the teacher has not, and for that token itself, there is nothing to compare.
        assert with_loss == (completion[:1] if 310 in completion else completion)
        ids = torch.tensor([prompt + with_loss])
        with torch.no_grad():
            s, t = (
                model(ids).logits[0, len(prompt) - 1 : -1, :304].softmax(-1)
                for model in (run.model, run.teacher_model)
            )
        total, count = total + float((s * (s / t).log()).sum()), count + len(with_loss)
    assert batches[0].active_tokens == count
    assert logged(run, "loss")[0] == pytest.approx(total / count, rel=1e-4)


def test_another_tokenizer_is_refused(trainer, tiny_model_factory, tiny_tokenizer_factory, tmp_path):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    def teacher(change):
        tokenizer = tiny_tokenizer_factory()
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        change(content)
        other = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|endoftext|>", pad_token="<|pad|>"
        )
        folder = tmp_path / change.__name__
        tiny_model_factory(seed=2).save_pretrained(folder)
        other.save_pretrained(folder)
        return str(folder)

    def shifted(content):
        vocabulary = content["model"]["vocab"]
        ids = sorted(vocabulary.values())[4:]
        turned = dict(zip(ids, ids[1:] + ids[:1]))
        content["model"]["vocab"] = {token: turned.get(i, i) for token, i in vocabulary.items()}

    def renamed(content):
        for entry in content["added_tokens"]:
            if entry["content"] == "<|im_start|>":
                entry["content"] = "<|start|>"
        vocabulary = content["model"]["vocab"]
        vocabulary["<|start|>"] = vocabulary.pop("<|im_start|>")

    with pytest.raises(ValueError, match=r"different vocabularies \(token 4 is .* pass a teacher with the student's"):
        trainer(teacher_model=teacher(shifted))
    trainer(teacher_model=teacher(renamed))  # a special token by another name


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(trainer, tiny_model_factory):
    with pytest.raises(ValueError, match="student and teacher have 300 and 200 tokens, the tokenizer 300"):
        trainer(teacher_model=tiny_model_factory(vocab_size=200))


# ---------------------------------------------------------------------- what goes wrong, in one sentence


def one_sentence(message):
    return message.count(". ") == 0 and message.rstrip().endswith(".")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_model": None}, "`teacher_model` is missing"),
        ({"teacher_model": "/nowhere/at-all"}, "'/nowhere/at-all'"),
        ({"train_dataset": None}, "`train_dataset` is missing"),
        ({"train_dataset": Dataset.from_dict({"text": ["a"]})}, "has the columns text, but no 'prompt'"),
        ({"lmbda": 0.5, "train_dataset": dataset(answers=None)}, "lmbda is 0.5, so completions of `train_dataset`"),
        (
            {"lmbda": 0.0, "eval_dataset": {"held": dataset(answers=None)}},
            r"lmbda is 0, so completions of `eval_dataset\['held'\]`",
        ),
        ({"beta": 1.5}, "beta is 1.5; choose a value between 0.0 and 1.0"),
        ({"lmbda": -0.1}, "lmbda is -0.1; choose a value between 0.0 and 1.0"),
        ({"teacher_top_k": 0}, "teacher_top_k is 0; choose a value at least 1"),
        ({"teacher_model_init_kwargs": {"dtype": "float32"}}, "`teacher_model_init_kwargs` is set"),
    ],
)
def test_errors(trainer, options, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        trainer(**options)
    assert one_sentence(str(error.value))


def test_the_teacher_may_not_be_the_student(trainer, tiny_model_factory):
    model = tiny_model_factory()
    with pytest.raises(ValueError, match="same object as `model`"):
        trainer(model=model, teacher_model=model)


@pytest.mark.parametrize("row", [[CHAT[0]], [CHAT[1]], CHAT[:1] * 2])
def test_messages_without_an_answer(trainer, row):
    run = trainer(train_dataset=Dataset.from_list([{"messages": row}] * 4))
    with pytest.raises(ValueError, match="no message of the assistant behind another one"):
        run.train()


def test_outputs_are_refused(trainer):
    run = trainer()
    with pytest.raises(ValueError, match="return_outputs is True"):
        run.compute_loss(run.model, None, return_outputs=True)


# ---------------------------------------------------------------------- adapters, evaluation, logs, checkpoints


def test_an_adapter_trains_alone_and_is_saved_alone(trainer, tmp_path, tiny_model_factory):
    model = tiny_model_factory(seed=1)
    before = model.lm_head.weight.clone()
    run = trainer(
        model=model, peft_config=LoraConfig(r=2, target_modules=["q_proj", "lm_head"]), learning_rate=1e-2,
        gradient_checkpointing=True, beta=0.5,
    )  # fmt: skip
    run.train()
    assert isinstance(run.model, PeftModel)
    weights = dict(run.model.named_parameters())
    trained = {name for name, p in weights.items() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert any(p.abs().max() > 0 for name, p in weights.items() if "lora_B" in name and "lm_head" in name)
    assert torch.equal(model.get_output_embeddings().weight, before)
    run.save_model(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("model*")) and (tmp_path / "saved" / "adapter_config.json").exists()


def test_evaluation(trainer):
    held = dataset(PROMPTS[:4], ANSWERS[:4])
    run = scripted(trainer(eval_dataset={"one": held, "two": held.select(range(2))}, beta=0.5))
    found = run.evaluate()
    assert found["eval_one_loss"] > 0 and found["eval_two_loss"] > 0
    assert {"eval_entropy", "eval_distillation/divergence", "eval_completions/mean_length"} <= found.keys() | {
        name for row in run.state.log_history for name in row
    }
    before = run.state.num_input_tokens_seen
    run.evaluate()
    assert run.state.num_input_tokens_seen == before

    off = trainer(eval_dataset=held, lmbda=0.0, beta=0.5)
    off.rollouts.generate = lambda *args, **kwargs: pytest.fail("a completion was sampled")
    found = off.evaluate()
    assert found["eval_loss"] == pytest.approx(found["eval_distillation/divergence"], rel=1e-5)


def test_streams(trainer):
    stream = dataset().to_iterable_dataset()
    run = trainer(train_dataset=stream, eval_dataset=stream, lmbda=0.5, gradient_accumulation_steps=2)
    run.train()
    assert run.state.global_step == 2
    assert run.evaluate()["eval_loss"] > 0


def test_completions_table(trainer, capsys):
    run = scripted(trainer(log_completions=True, max_steps=1))
    run.train()
    table = pd.read_parquet(f"{run.args.output_dir}/completions/completions_00001.parquet")
    assert list(table.columns) == ["step", "prompt", "completion"] and len(table) == 4
    assert {*table["prompt"]} <= {*PROMPTS}


def test_a_resumed_run_is_the_run(trainer):
    """Weights after 6 steps in two epochs, with a stop at step 4 and without; half of the batches are sampled."""
    settings = {
        "lmbda": 0.5, "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
    }  # fmt: skip
    whole = trainer(**settings)
    whole.train()
    resumed = trainer(**settings)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-4")
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters()):
        torch.testing.assert_close(ours, theirs, msg=lambda m, n=name: f"{n}: {m}")
    for name in ("distillation/on_policy", "num_tokens", "loss"):
        assert logged(resumed, name) == pytest.approx(logged(whole, name))
    assert {*logged(whole, "distillation/on_policy")} == {0.0, 1.0}


def test_live_changes(trainer, at_step):
    def change(args, model):
        args.beta, args.temperature, args.max_completion_length = 0.0, 2.0, 3

    run = trainer(max_steps=2, max_completion_length=8, learning_rate=0.0, callbacks=[at_step(1, change)])
    caps = []
    generate = run.rollouts.generate

    def watch(prompt_ids, params, **kwargs):
        caps.append((params.max_new_tokens, params.temperature))
        return generate(prompt_ids, params, **kwargs)

    run.rollouts.generate = watch
    run.train()
    assert caps == [(8, 1.0), (3, 2.0)]
    first, second = run.state.log_history[:2]
    assert first["loss"] == pytest.approx(first["distillation/reverse_kl"], rel=1e-5)
    assert second["loss"] == pytest.approx(second["distillation/forward_kl"], rel=1e-5)
    assert second["loss"] != pytest.approx(second["distillation/reverse_kl"], rel=1e-3)


def test_live_change_of_the_mix(trainer, at_step):
    run = trainer(max_steps=3, callbacks=[at_step(1, lambda args, _: setattr(args, "lmbda", 0.0))])
    run.train()
    assert logged(run, "distillation/on_policy") == [1.0, 0.0, 0.0]

    without = trainer(
        max_steps=2,
        train_dataset=dataset(answers=None),
        callbacks=[at_step(1, lambda args, _: setattr(args, "lmbda", 0.0))],
    )
    without.train()
    assert len(logged(without, "completions/mean_length")) == 2  # there is nothing else to train on


def test_the_run_directory_knows_it(trainer):
    run = trainer(diagnose=True, max_steps=2, lmbda=0.5, eval_dataset=dataset(), eval_strategy="steps", eval_steps=2)
    run.train()
    folder = Path(run.args.output_dir) / "outspoken"
    record = json.loads((folder / "run.json").read_text())
    assert record["method"] == "distillation" and record["status"] == "finished"
    assert {"beta", "lmbda", "temperature", "max_completion_length", "learning_rate"} <= record["live"].keys()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    signals = set().union(*(row["signals"] for row in rows))
    assert {"distillation/divergence", "entropy", "loss", "time/generate"} <= signals


def test_the_command(tiny_model_dir, tmp_path, tiny_model_factory, tiny_tokenizer):
    from outspoken.cli import training

    (tmp_path / "teacher").mkdir()
    tiny_model_factory(seed=2, hidden_size=48).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer.save_pretrained(tmp_path / "teacher")
    rows = "".join(json.dumps({"prompt": p, "completion": a}) + "\n" for p, a in zip(PROMPTS, ANSWERS))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {tiny_model_dir}\nteacher_model_name_or_path: {tmp_path}/teacher\n"
        f"dataset_path: {tmp_path}/rows.jsonl\noutput_dir: {tmp_path}/out\nmax_steps: 2\nuse_cpu: true\n"
        "max_completion_length: 4\nreport_to: none\n"
    )
    found = training.train("distillation", str(tmp_path / "run.yaml"), ["--beta", "0.5", "--lmbda", "0.5"])
    assert (found["method"], found["steps"]) == ("distillation", 2)
    assert found["metrics"]["train_loss"] > 0
    run = json.loads((tmp_path / "out" / "outspoken" / "run.json").read_text())
    assert run["config"]["beta"] == run["config"]["lmbda"] == 0.5


# ---------------------------------------------------------------------- images


def pictures():
    import numpy as np
    from PIL import Image

    def picture(seed, width):
        pixels = np.random.default_rng(seed).integers(0, 255, (16, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return [
        {
            "image": picture(i, 16 + 16 * (i % 2)),
            "prompt": [{"role": "user", "content": text}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for i, (text, answer) in enumerate(zip(PROMPTS[:4], ["It is blue.", "7", "What?", "grass and sky"]))
    ]


@pytest.mark.parametrize("lmbda", [1.0, 0.0])
def test_prompts_with_images(trainer, tiny_vision_model, tiny_vision_processor, lmbda):
    """The loss is that of each row alone, image included; another image is another loss."""
    processor = tiny_vision_processor()
    run = trainer(
        model=tiny_vision_model(seed=1), teacher_model=tiny_vision_model(seed=2, width=48), processing_class=processor,
        train_dataset=Dataset.from_list(pictures()), lmbda=lmbda, max_steps=1, learning_rate=0.0,
        max_completion_length=20,
    )  # fmt: skip
    batches = watched(run)
    run.train()
    total = swapped = count = 0
    batch = batches[0]
    for row, (prompt, completion, with_loss) in enumerate(pairs(batch)):
        assert processor.decode(prompt).count("<|image_pad|>") in (4, 8) and with_loss == completion
        inputs = {
            "input_ids": torch.tensor([prompt + completion]),
            "pixel_values": batch.images[row]["pixel_values"],
            "image_grid_thw": batch.images[row]["image_grid_thw"],
            "mm_token_type_ids": torch.tensor([[int(token == 6) for token in prompt] + [0] * len(completion)]),
        }
        for change in (False, True):
            if change:
                inputs["pixel_values"] = -inputs["pixel_values"]
            with torch.no_grad():
                s, t = (
                    model(**inputs).logits[0, len(prompt) - 1 : -1].softmax(-1)
                    for model in (run.model, run.teacher_model)
                )
            divergence = float((s * (s / t).log()).sum())
            total, swapped = (total, swapped + divergence) if change else (total + divergence, swapped)
        count += len(completion)
    assert logged(run, "loss")[0] == pytest.approx(total / count, rel=1e-4)
    assert swapped != pytest.approx(total, rel=1e-4)
    if lmbda == 0.0:
        answers = sorted(processor.decode(completion) for _, completion, _ in pairs(batch))
        assert answers == sorted(
            ["It is blue.<|im_end|>", "7<|im_end|>", "What?<|im_end|>", "grass and sky<|im_end|>"]
        )


def test_a_teacher_without_eyes(trainer, tiny_vision_model, tiny_vision_processor, tiny_model_factory):
    run = trainer(
        model=tiny_vision_model(), teacher_model=tiny_model_factory(), processing_class=tiny_vision_processor(),
        train_dataset=Dataset.from_list(pictures()),
    )  # fmt: skip
    with pytest.raises(ValueError, match="the teacher takes text only"):
        run.train()
