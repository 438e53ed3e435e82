"""Trains small models with the trainers that sample and writes down what came of it: run by test_distributed_online.py.

`python tests/distributed_online.py FOLDER MODEL CASE …` alone, or started twice by accelerate: then each process takes half
of every batch. For each case FOLDER/<case>/ gets result.json (on rank 0), the weights in model/, checkpoints and the run
directory; FOLDER/<case>-resumed/ the same from the checkpoint of step 3 on; a case that fails unexpectedly, error-<rank>.txt.
"""

import json
import os
import random
import re
import signal
import sys
import time
from dataclasses import replace

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from distributed_common import Watch, finish, run_each, settings, words
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback

import outspoken
from outspoken.agent_api import Run
from outspoken.trainers.rollouts.batch import RolloutBatch, sampled_from_ids

STEPS, SAVED = 6, 3
END = 0  # the tokenizer's end token
SHUFFLED = RolloutBatch.shuffled  # which `keep_order` changes


ROWS = [{"prompt": f"What {words(i)}?", "number": i} for i in range(24)]
# Without shuffling the first process gets the even ones, whose conversations are the long ones.
CONVERSATIONS = [
    {"prompt": [{"role": "user", "content": f"press {1 + i % 3 if i % 2 == 0 else 0} or {i}"}]} for i in range(24)
]


def graded(completion_ids, **_):
    return [(sum(ids) % 11 - 5) / 4 for ids in completion_ids]


def short(completion_ids, **_):
    return [-len(ids) / 10 if len(ids) > 3 else None for ids in completion_ids]


def two_worded(completion_ids, **_):
    """Two values only, so that many small groups are all alike."""
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


# Case -> trainer, settings. `batch` is that of all processes together.
GROUPS = {"batch": 4, "num_generations": 4, "steps_per_generation": 2, "gradient_accumulation_steps": 2}
# Three groups of 4 over micro-batches of 6: one process holds one group and a half.
SPANNING = {"batch": 6, "num_generations": 4, "steps_per_generation": 2, "gradient_accumulation_steps": 1}
WHOLE = {"batch": 8, "num_generations": 4, "steps_per_generation": 1, "gradient_accumulation_steps": 1}
MOVES = {"num_iterations": 2, "epsilon": 0.05, "learning_rate": 0.003}
# What is sampled does not depend on the process, so that two do what one does.
SCRIPTED = {
    "grpo": ("GRPO", {**GROUPS, "beta": 0.1, "eval": True}),
    "grpo-lora": ("GRPO", {**GROUPS, "beta": 0.1, "lora": True, "learning_rate": 0.2}),
    "off-policy": ("GRPO", {**SPANNING, **MOVES, "beta": 0.05}),
    "per-completion": (
        "GRPO",
        {**SPANNING, "loss_type": "grpo", "scale_rewards": "batch", "mask_truncated_completions": True},
    ),
    "entropy": (
        "GRPO",
        {
            **GROUPS,
            "loss_type": "dr_grpo",
            "use_adaptive_entropy": True,
            "entropy_coef": 0.05,
            "entropy_target": 5.6,
            "top_entropy_quantile": 0.5,
        },
    ),
    "gspo": ("GRPO", {**SPANNING, **MOVES, "importance_sampling_level": "sequence", "epsilon": 0.02}),
    "returns": ("GRPO", {**SPANNING, "advantage_estimator": "reinforce++", "beta": 0.1}),
    "dynamic": ("GRPO", {**SPANNING, "num_generations": 2, "dynamic_sampling": True, "rewards": [two_worded]}),
    "plain-prompts": (
        "GRPO",
        {**GROUPS, "share_prompts": False, "sync_ref_model": True, "ref_model_sync_steps": 2, "beta": 0.2},
    ),
    "conversations": ("GRPO", {**WHOLE, "conversations": True, "max_completion_length": 200}),
    "stream": ("GRPO", {**SPANNING, "stream": True}),
    "rloo": ("RLOO", {**GROUPS, "beta": 0.1}),
    "rloo-clipped": ("RLOO", {**SPANNING, **MOVES, "beta": 0.1, "loss_type": "clipped"}),
}
# What they sample themselves, and each process other completions than the next.
SAMPLED = {
    "sampled": ("GRPO", {**SPANNING, "num_iterations": 2, "beta": 0.05, "max_completion_length": 24}),
    "sampled-rloo": ("RLOO", {**GROUPS, "max_completion_length": 12}),
}
# ZeRO-3 gathers each layer at every token; for others the same as "sampled".
SAMPLED["layerwise"] = ("GRPO", {**SAMPLED["sampled"][1], "ds3_gather_for_generation": False})
# An agent's change after step 2, of all these at once.
CHANGE = {
    "learning_rate": 0.01,
    "beta": 0.4,
    "epsilon": 0.01,
    "temperature": 0.5,
    "entropy_coef": 0.2,
    "max_completion_length": 5,
}
LIVE = {"live": ("GRPO", {**WHOLE, **MOVES, "beta": 0.1})}
# The second generation batch starts in the middle of the second update step, which still needs the first one's rest.
MID_STEP = {**GROUPS, "steps_per_generation": 3, "save_steps": 100}
TROUBLE = {
    "uneven": ("GRPO", {**WHOLE, "max_completion_length": 16, "beta": 0.1}),
    "one-resamples": ("GRPO", {**WHOLE, "dynamic_sampling": True}),
    "one-replays": ("GRPO", {**WHOLE, "replay_buffer_size": 4}),
    "seeded": ("GRPO", {**WHOLE, "batch": 4, "generation_kwargs": {"seed": 7}, "max_completion_length": 24}),
    "raises": ("GRPO", MID_STEP),
    "hangs": ("RLOO", {**MID_STEP, "reward_timeout": 1.0}),
    "turn-fails": ("GRPO", {**WHOLE, "conversations": True, "max_completion_length": 200}),
}
ENDS = ("raises", "hangs", "turn-fails")
KILLED = {
    name: (
        "GRPO",
        {**SPANNING, "num_iterations": 2, "dynamic_sampling": True, "rewards": [two_worded, short], "save_steps": 1},
    )
    for name in ("went-through", "killed")
}
CASES = SCRIPTED | SAMPLED | LIVE | TROUBLE | KILLED


# -------------------------------------------------------------------------------------------------- what is sampled


def script(trainer):
    """Let the completions depend on the step, the prompt and the place in its group, and on nothing else."""
    calls = [0, None]

    def generate(prompt_ids, params, *, caps=None, images=None):
        step = trainer.state.global_step, trainer.model.training
        calls[:] = [calls[0] + 1 if calls[1] == step else 0, step]
        rank, parts = trainer.accelerator.process_index, gather_object([prompt_ids])
        everywhere = [tuple(ids) for part in parts for ids in part]
        start = sum(map(len, parts[:rank]))
        completions = []
        for place in range(start, start + len(prompt_ids)):
            copy = 0
            while copy < place and everywhere[place - copy - 1] == everywhere[place]:
                copy += 1
            drawn = random.Random(repr((step, calls[0], everywhere[place], copy)))
            ids = [drawn.randrange(4, 300) for _ in range(drawn.randrange(1, params.max_new_tokens + 1))]
            completions.append(ids if len(ids) == params.max_new_tokens else [*ids, END])
        return sampled_from_ids(completions, params.end_ids)

    trainer.rollouts.generate = generate


class Button:
    """An environment whose button wants to be pressed."""

    def reset(self, **row):
        self.pressed = 0

    def press(self, times: int) -> str:
        """
        Presses the button.

        Args:
            times: How often.
        """
        self.pressed += times
        return f"pressed {self.pressed} times"

    def get_reward(self):
        return self.pressed / 4


def converse(trainer, fails=False):
    """Let the model press as often as it is asked to, a turn each, the copies of a prompt not all alike.

    `fails`: what comes after sampling does, once the first process is in the middle of its conversations.
    """
    tokenizer, backend, calls = trainer.rollouts.tokenizer, trainer.rollouts.backend, [0]

    def generate(prompt_ids, params, *, caps=None, images=None):
        # Where weights are spread over processes, they have to sample together, also those without conversations.
        backend.generate(prompt_ids, replace(params, max_new_tokens=2))
        calls[0] += 1
        if fails and calls[0] == 2:
            raise RuntimeError("The line went dead")
        completions = []
        for place, ids in enumerate(prompt_ids):
            text = tokenizer.decode(ids)
            turn, wanted = text.count("<|im_start|>assistant"), int(re.search(r"press (\d)", text)[1])
            call = json.dumps({"name": "press", "arguments": {"times": 1 + (place + len(ids)) % 2}})
            says = f"<tool_call>{call}</tool_call>" if turn <= wanted else "Enough."
            completions.append(tokenizer.encode(f"{says}<|im_end|>", add_special_tokens=False))
        return sampled_from_ids(completions, params.end_ids)

    trainer.rollouts.generate = generate


def keep_order(trainer):
    """No shuffling; and one process forms the micro-batches that two would."""

    def shuffled(self, block=1):
        if trainer.accelerator.num_processes == 2:
            return self
        places = torch.arange(len(self)).view(2, trainer.args.steps_per_generation, -1).transpose(0, 1)
        return self.select(places.flatten())

    RolloutBatch.shuffled = shuffled


def watch_completions(trainer):
    """[update step, prompt, completion] of all that this process's reward functions get to see from now on."""
    seen, score = [], trainer.rewards.score

    def scored(prompts, completions, completion_ids, *args, **kwargs):
        seen.extend([trainer.state.global_step, *pair] for pair in zip(prompts, completion_ids))
        return score(prompts, completions, completion_ids, *args, **kwargs)

    trainer.rewards.score = scored
    return seen


# -------------------------------------------------------------------------------------------------------- the runs


class Agent(TrainerCallback):
    """Asks for `CHANGE` after step 2, as a program of somebody else's would."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and state.is_world_process_zero:
            Run(args.output_dir).apply(CHANGE, actor="test", rollback_on_failure=False)


def build(case, folder, model_dir, **more):
    kind, own = CASES[case]
    own = {**own, **more}
    lora, evaluates, converses = (own.pop(name, False) for name in ("lora", "eval", "conversations"))
    rewards, callbacks = own.pop("rewards", [graded, short]), own.pop("callbacks", [])
    rows = CONVERSATIONS if converses else ROWS
    dataset = Dataset.from_list(rows)
    if own.pop("stream", False):
        dataset = IterableDataset.from_generator(lambda: iter(rows))
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    if converses:
        tokenizer.eos_token = "<|im_end|>"
        own["shuffle_dataset"] = False
    given = {
        **settings(folder, own.pop("batch")),
        "max_steps": STEPS,
        "max_completion_length": 8,
        "learning_rate": 0.02,
        "save_strategy": "steps",
        "save_steps": SAVED,
        **({"eval_strategy": "steps", "eval_steps": STEPS} if evaluates else {}),
        **own,
    }
    trainer = getattr(outspoken, f"{kind}Trainer")(
        model=model_dir,
        reward_funcs=rewards,
        args=getattr(outspoken, f"{kind}Config")(**given),
        train_dataset=dataset,
        eval_dataset=Dataset.from_list(rows[:4]) if evaluates else None,
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None,
        **({"environment_factory": Button} if converses else {}),
    )
    trainer.add_callback(Watch(trainer))
    return trainer


def train(case, folder, model_dir, checkpoint=None):
    trainer, seen = build(case, folder, model_dir), []
    if case in SCRIPTED:
        (converse if case == "conversations" else script)(trainer)
        keep_order(trainer)
    else:
        seen = watch_completions(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    sharded_adapter = trainer.is_fsdp_enabled and "lora" in case and os.environ.get("FSDP_VERSION") != "2"
    if not sharded_adapter:
        trainer.save_model(str(folder / "model"))
    finish(trainer, folder, seen=gather_object([seen]))


def train_with_an_agent(case, folder, model_dir):
    """What each process used, step by step."""
    trainer = build(case, folder, model_dir, callbacks=[Agent()])
    script(trainer)
    keep_order(trainer)
    used = {}
    compute_loss, generate = trainer.compute_loss, trainer.rollouts.generate

    def loss_of(model, batch, **kwargs):
        args = trainer.args
        used.setdefault(trainer.state.global_step + 1, {}).update(
            learning_rate=trainer.optimizer.param_groups[0]["lr"],
            beta=args.beta,
            epsilon=args.epsilon,
            entropy_coef=args.entropy_coef,
            temperature=batch.temperature,
            max_completion_length=batch.max_completion_length,
        )
        return compute_loss(model, batch, **kwargs)

    def generated(prompt_ids, params, **kwargs):
        used.setdefault(trainer.state.global_step + 1, {})["sampled"] = [params.temperature, params.max_new_tokens]
        return generate(prompt_ids, params, **kwargs)

    trainer.compute_loss, trainer.rollouts.generate = loss_of, generated
    trainer.train()
    trainer.save_model(str(folder / "model"))
    finish(trainer, folder, used=gather_object([used]))


def meet_trouble(case, folder, model_dir):
    """What only the last process meets, the other has to hear of; where that ends the run, it is resumed without it."""
    last = int(os.environ.get("WORLD_SIZE", 1)) - 1
    here = int(os.environ.get("RANK", 0)) == last
    began, calls = [0.0], [0]

    def judge(completion_ids, trainer_state, **_):
        calls[0] += 1
        if not here or calls[0] % 2:
            return graded(completion_ids)
        if case in ENDS:
            began[0] = time.time()
            if case == "hangs":
                time.sleep(600)
            raise KeyError("no such answer")
        return [1.0] * len(completion_ids) if case.startswith("one-") else graded(completion_ids)

    trainer = build(case, folder, model_dir, rewards=None if case == "turn-fails" else [judge])
    if case == "turn-fails":
        converse(trainer, fails=here)
        began[0] = time.time()
    if case == "uneven":
        backend = trainer.rollouts.backend
        trainer.rollouts.generate = lambda prompt_ids, params, **kwargs: backend.generate(
            prompt_ids, replace(params, max_new_tokens=2 if here else 16)
        )
    seen = watch_completions(trainer)
    told = None
    try:
        trainer.train()
    except Exception as error:
        told = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
    stopped = time.time()
    assert (told is not None) == (case in ENDS), told
    more = {"told": gather_object([told]), "seconds": stopped - max(gather_object([began[0]])), "sampled_at": []}
    if case in ENDS:
        more["left"] = sorted(path.name for path in folder.glob("checkpoint-*"))
        trainer.accelerator.free_memory()
    if more.get("left"):
        trainer = build(case, folder, model_dir, rewards=[graded])
        sample = trainer._sample_and_score
        trainer._sample_and_score = lambda rows: more["sampled_at"].append(trainer._step) or sample(rows)
        trainer.train(resume_from_checkpoint=True)
    folder.mkdir(exist_ok=True)
    finish(trainer, folder, **more, seen=gather_object([seen]))


def be_killed(case, folder, model_dir):
    """The last process is killed while it samples for step 5, the first time; then the run is resumed."""
    resumes = folder.exists()
    trainer = build(case, folder, model_dir)
    trainer.accelerator.wait_for_everyone()
    seen = watch_completions(trainer)
    score, last = trainer.rewards.score, trainer.accelerator.num_processes - 1

    def scored(*args, **kwargs):
        if trainer.state.global_step == 4 and trainer.accelerator.process_index == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return score(*args, **kwargs)

    if case == "killed" and not resumes:
        trainer.rewards.score = scored
    trainer.train(resume_from_checkpoint=resumes or None)
    trainer.save_model(str(folder / "model"))
    finish(trainer, folder, seen=gather_object([seen]))


def run_case(case, folder, model_dir):
    RolloutBatch.shuffled = SHUFFLED
    for cases, run in ((LIVE, train_with_an_agent), (TROUBLE, meet_trouble), (KILLED, be_killed)):
        if case in cases:
            run(case, folder / case, model_dir)
            return
    train(case, folder / case, model_dir)
    train(case, folder / f"{case}-resumed", model_dir, str(folder / case / f"checkpoint-{SAVED}"))


if __name__ == "__main__":
    folder, model_dir, *cases = sys.argv[1:]
    run_each(cases, folder, lambda case, folder: run_case(case, folder, model_dir))
