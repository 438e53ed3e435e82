"""The reference policy: what it is a copy of, what a reference pass leaves behind, and its cache on disk."""

import copy
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model

from outspoken.trainers.reference import (
    as_reference,
    given_reference,
    make_reference,
    precompute,
    reference_policy,
    weights_hash,
)

IDS = torch.tensor([[5, 6, 7, 8, 9]])
ARGS = SimpleNamespace(model_init_kwargs=None, trust_remote_code=False, disable_dropout=True)


def lora(**options):
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **options})


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def disturb(model):
    """Train, in a way: change every weight that trains."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1


@pytest.fixture
def trainer():
    """What `reference_policy` needs of a trainer."""

    def build(model, ref_model=None):
        return SimpleNamespace(model=model, ref_model=ref_model, accelerator=Accelerator(cpu=True))

    return build


# ---------------------------------------------------------------------- what it is a copy of


def test_a_model_edited_in_memory_is_its_own_reference(tiny_model_dir, tiny_model_factory):
    model = type(tiny_model_factory()).from_pretrained(tiny_model_dir)
    disturb(model)
    before = logits(model)
    model.train()
    reference = make_reference(model, model, ARGS)
    assert model.training and not reference.training
    disturb(model)
    assert torch.equal(logits(reference), before) and not torch.equal(logits(model), before)
    assert not any(p.requires_grad for p in reference.parameters()) and all(
        p.requires_grad for p in model.parameters()
    )


def test_what_cannot_be_copied_is_loaded_again(tiny_model_dir, tiny_model_factory):
    model = type(tiny_model_factory()).from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    model.is_loaded_in_8bit = True  # as bitsandbytes leaves it
    reference = make_reference(model, tiny_model_dir, ARGS)
    assert reference.dtype == torch.bfloat16 and not any(p.requires_grad for p in reference.parameters())
    for ours, theirs in zip(reference.parameters(), model.parameters()):
        assert torch.equal(ours, theirs)

    built = tiny_model_factory()
    built.is_loaded_in_4bit = True
    with pytest.raises(ValueError, match=r"cannot be copied from the policy, because it is quantized, .* `ref_model`"):
        make_reference(built, built, ARGS)


def test_a_given_reference_is_frozen_and_must_be_another_model(tiny_model_factory, tiny_model_dir):
    model, other = tiny_model_factory(), tiny_model_factory(seed=1, attention_dropout=0.5)
    found = given_reference(other, model, ARGS)
    assert found is other and not other.training and not any(p.requires_grad for p in other.parameters())
    with pytest.raises(ValueError, match="`ref_model` is the same object as `model`"):
        given_reference(model, model, ARGS)
    loaded = given_reference(tiny_model_dir, tiny_model_dir, ARGS)
    assert torch.equal(logits(loaded), logits(tiny_model_factory()))


def test_a_router_does_no_work_in_a_reference(tiny_tokenizer):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, output_router_logits=True,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    reference = make_reference(model, model, ARGS)
    assert model(input_ids=IDS).aux_loss is not None and reference(input_ids=IDS).aux_loss is None


# ---------------------------------------------------------------------- adapters


def test_a_fresh_adapter_is_switched_off(tiny_model_factory, trainer):
    base = logits(tiny_model_factory())
    model = get_peft_model(tiny_model_factory(), lora())
    assert make_reference(model, "a path", ARGS) is None and "ref" not in model.peft_config
    disturb(model)
    with reference_policy(trainer(model)) as reference:
        assert torch.equal(logits(reference), base)
    assert not torch.equal(logits(model), base)


@pytest.mark.parametrize(
    "config",
    [
        lora(init_lora_weights=False),
        lora(init_lora_weights=False, target_modules=["embed_tokens", "q_proj"], use_dora=False),
        lora(init_lora_weights=False, modules_to_save=["lm_head"]),
        lora(init_lora_weights=False, trainable_token_indices=[5, 6]),
        VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
    ],
    ids=["lora", "embedding", "saved-head", "tokens", "vera"],
)
def test_a_trained_adapter_is_kept_as_it_was(tiny_model_factory, trainer, config):
    """Whatever it consists of: modules, and parameters that stand in lists by adapter's name."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model_factory(), config)
    disturb(model)
    before = logits(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert make_reference(model, model, ARGS) is None
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    disturb(model)
    with reference_policy(trainer(model)) as reference:
        torch.testing.assert_close(logits(reference), before, rtol=0, atol=1e-6)
    assert model.active_adapter == "default" and not torch.allclose(logits(model), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_made_of_base_weights_is_kept_too(tiny_model_factory, trainer, init):
    """PiSSA moves the principal part of the weights into the adapter: without it, the base is another model."""
    base = logits(tiny_model_factory())
    model = get_peft_model(tiny_model_factory(), lora(init_lora_weights=init))
    assert make_reference(model, "a path", ARGS) is None
    disturb(model)
    with model.disable_adapter():
        assert not torch.allclose(logits(model), base, atol=1e-2)
    with reference_policy(trainer(model)) as reference:
        torch.testing.assert_close(logits(reference), base, rtol=1e-4, atol=1e-4)


def test_an_adapter_called_ref_is_the_reference(tiny_model_factory, trainer, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model_factory(), lora(init_lora_weights=False))
    model.add_adapter("ref", lora(init_lora_weights=False))
    model.set_adapter("ref")
    expected = logits(model)
    model.set_adapter("default")
    make_reference(model, model, ARGS)
    with reference_policy(trainer(model)) as reference:
        assert torch.equal(logits(reference), expected)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".ref." in name)


# ---------------------------------------------------------------------- what a reference pass leaves behind


@pytest.mark.parametrize("given", [True, False], ids=["trained-adapter", "fresh-adapter"])
def test_the_policy_is_afterwards_as_it_was(tiny_model_factory, trainer, given):
    """Also an adapter that trains in part, modules in evaluation mode, and after an error."""
    model = get_peft_model(tiny_model_factory(), lora(lora_dropout=0.5))
    model.gradient_checkpointing_enable()
    model.train()
    make_reference(model, model if given else "a path", ARGS)
    frozen = [p for name, p in model.named_parameters() if "layers.0" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    still = model.base_model.model.model.layers[1]
    still.eval()

    def state():
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        return flags, {name: m.training for name, m in model.named_modules()}, model.active_adapter

    before = state()
    with pytest.raises(RuntimeError, match="midway"), reference_policy(trainer(model)) as reference:
        assert reference is model and not torch.is_grad_enabled()
        assert not any(module.training for module in model.modules())  # no dropout, and nothing is checkpointed
        raise RuntimeError("midway")
    assert state() == before and torch.is_grad_enabled()
    model(input_ids=IDS).logits.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, needed in before[0].items() if needed
    }


def test_no_reference_is_told(tiny_model_factory, trainer):
    with (
        pytest.raises(ValueError, match="No reference model is held"),
        reference_policy(trainer(tiny_model_factory())),
    ):
        pass


def test_a_reference_model_is_asked_instead_of_the_policy(tiny_model_factory, trainer):
    model, reference = tiny_model_factory(), tiny_model_factory(seed=1)
    with reference_policy(trainer(model, reference)) as found:
        assert found is reference


def test_autocast_is_that_of_training(tiny_model_factory):
    accelerator = Accelerator(cpu=True)
    accelerator.autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)  # as with mixed precision
    model = tiny_model_factory()
    with as_reference(model, accelerator):
        assert logits(model).dtype == torch.bfloat16
    assert logits(model).dtype == torch.float32


# ---------------------------------------------------------------------- the cache


def collate(rows):
    return {"x": torch.tensor([row["x"] for row in rows])}


class Scorer:
    """Scores rows by the model's first weight, and counts the batches it was asked for."""

    def __init__(self):
        self.batches = []

    def __call__(self, model, batch):
        self.batches.append(batch["x"].tolist())
        weight = next(model.parameters()).detach().reshape(-1)[0]
        return {"score": batch["x"] * weight, "twice": 2 * batch["x"] * weight}


@pytest.fixture
def asking(tiny_model_factory, tmp_path):
    """A trainer to precompute with, and a dataset that lies on disk, so that its cache does too."""
    Dataset.from_dict({"x": [float(i) for i in range(7)]}).save_to_disk(tmp_path / "data")
    model = tiny_model_factory()

    def build(**changes):
        trainer = SimpleNamespace(
            model=model, model_wrapped=model, ref_model=None, accelerator=Accelerator(cpu=True), data_collator=collate,
            is_deepspeed_enabled=False, is_fsdp_enabled=False, state=SimpleNamespace(global_step=0),
            args=SimpleNamespace(dataloader_num_workers=0, dataloader_pin_memory=False, disable_tqdm=True),
        )  # fmt: skip
        vars(trainer).update(changes)
        return trainer, Dataset.load_from_disk(tmp_path / "data")

    return build


def test_columns_are_computed_once(asking):
    score = Scorer()
    trainer, dataset = asking()
    weight = next(trainer.model.parameters()).reshape(-1)[0].item()
    random_state = torch.get_rng_state()
    found = precompute(trainer, dataset, "train", 3, score)
    assert score.batches == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0], [6.0]]
    assert found["score"][:] == pytest.approx([i * weight for i in range(7)])
    assert found["twice"][:] == pytest.approx([2 * i * weight for i in range(7)])
    assert found["x"][:] == [float(i) for i in range(7)]
    # A later run reads them from the cache, and either way the random numbers of the training are the same.
    again = precompute(*asking(), "train", 2, score)
    assert len(score.batches) == 3 and again["score"][:] == found["score"][:]
    assert again.features["score"].dtype == "float32"
    assert torch.equal(torch.get_rng_state(), random_state)


def test_columns_are_computed_anew_when_something_changed(asking, tiny_model_factory):
    score = Scorer()

    def batches_after(trainer, dataset, settings=None):
        del score.batches[:]
        precompute(trainer, dataset, "train", 7, score, settings)
        return len(score.batches)

    trainer, dataset = asking()
    assert batches_after(trainer, dataset) == 1
    assert batches_after(trainer, dataset) == 0
    assert batches_after(trainer, dataset, {"ld_alpha": 0.5}) == 1
    assert batches_after(trainer, dataset.select(range(3))) == 1
    assert batches_after(*asking(ref_model=tiny_model_factory(seed=1))) == 1
    assert batches_after(*asking(data_collator=lambda rows: collate(rows))) == 1
    assert batches_after(trainer, dataset) == 0
    disturb(trainer.model)
    assert batches_after(trainer, dataset) == 1


def test_a_torn_cache_is_computed_anew(asking, tmp_path):
    score = Scorer()
    trainer, dataset = asking()
    precompute(trainer, dataset, "train", 7, score)
    (path,) = (tmp_path / "data").glob("cache-*.arrow")
    path.write_bytes(path.read_bytes()[:100])
    found = precompute(*asking(), "train", 7, score)
    assert len(score.batches) == 2 and len(found["score"]) == 7


def test_what_cannot_be_precomputed_is_told(asking):
    trainer, dataset = asking()
    with pytest.raises(ValueError, match="the train dataset is a stream"):
        precompute(trainer, dataset.to_iterable_dataset(), "train", 7, Scorer())
    trainer.state.global_step = 1
    with pytest.raises(ValueError, match="The reference is the model before training, which is not held"):
        precompute(trainer, dataset, "eval", 7, Scorer())


def test_hash_of_weights(tiny_model_factory):
    model = tiny_model_factory()
    known = weights_hash(model)
    assert known == weights_hash(copy.deepcopy(model)) == weights_hash(tiny_model_factory())
    assert known != weights_hash(tiny_model_factory(seed=1))
    assert known != weights_hash(tiny_model_factory().to(torch.bfloat16))
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 4] += 1e-6
    assert known != weights_hash(model)


TWO = """
import sys
import torch
from types import SimpleNamespace
from accelerate import Accelerator
from datasets import Dataset
from outspoken.trainers.reference import precompute

accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(2, 1)
torch.nn.init.constant_(model.weight, 3.0)
trainer = SimpleNamespace(
    model=model, model_wrapped=model, ref_model=model, accelerator=accelerator,
    data_collator=lambda rows: {"x": torch.tensor([row["x"] for row in rows])},
    is_deepspeed_enabled=False, is_fsdp_enabled=False, state=SimpleNamespace(global_step=0),
    args=SimpleNamespace(dataloader_num_workers=0, dataloader_pin_memory=False, disable_tqdm=True),
)
asked = []
def score(model, batch):
    asked.extend(batch["x"].tolist())
    return {"score": batch["x"] * model.weight[0, 0].detach()}
rows = {"x": [float(i) for i in range(7)]}
with accelerator.main_process_first():
    if accelerator.is_main_process:
        Dataset.from_dict(rows).save_to_disk("on_disk")
on_disk, in_memory = Dataset.load_from_disk("on_disk"), Dataset.from_dict(rows)
for dataset, times in ((on_disk, 1), (in_memory, 2)):  # what lies in memory only has no cache
    asked.clear()
    for _ in range(2):
        found = precompute(trainer, dataset, "train", 2, score)
        assert found["score"][:] == [3.0 * i for i in range(7)], found["score"][:]
    assert len(asked) == 4 * times, asked  # half of 7 rows, and one to fill up
print("OK", accelerator.process_index)
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_share_the_work_and_the_cache(tmp_path):
    (tmp_path / "two.py").write_text(textwrap.dedent(TWO))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29613"]
    done = subprocess.run(
        [*launch, str(tmp_path / "two.py")], capture_output=True, text=True, timeout=240, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("OK") == 2


def test_a_saved_adapter_can_be_trained_on(tiny_model_factory, trainer, tmp_path):
    """As after `PeftModel.from_pretrained(..., is_trainable=True)`."""
    torch.manual_seed(0)
    get_peft_model(tiny_model_factory(), lora(init_lora_weights=False)).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model_factory(), tmp_path, is_trainable=True)
    before = logits(model)
    make_reference(model, model, ARGS)
    disturb(model)
    with reference_policy(trainer(model)) as reference:
        torch.testing.assert_close(logits(reference), before, rtol=0, atol=1e-6)
