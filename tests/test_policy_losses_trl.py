"""Policy losses, their gradients and metrics against TRL's own code, run here on random log-probabilities.

TRL's `_compute_loss` is called on a stand-in for the trainer whose model pass returns the test's log-probabilities, so
that any ratio, advantage and mask can be compared, not only those that a short training run meets.
"""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from outspoken.trainers import advantages
from outspoken.trainers.losses import policy

N, T, CAP = 6, 7, 9
ACTIVE = 23.0  # tokens of the whole generation batch, as far as the losses know
ACCUMULATION, PER_GENERATION = 2, 4


@pytest.fixture(scope="module")
def trl_grpo():
    from trl.trainer import grpo_trainer

    return grpo_trainer.GRPOTrainer


def sample(seed, spread=0.4, masked_rows=(), per_token_advantages=False):
    """Log-probabilities of trainer, old policy, reference and sampler; entropies, advantages, mask."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    logps = -draw(N, T).abs() - 0.05
    lengths = torch.randint(1, T + 1, (N, 1), generator=g)
    mask = (torch.arange(T) < lengths).long()
    mask[list(masked_rows)] = 0
    old = logps + spread * draw(N, T)
    return SimpleNamespace(
        logps=logps,
        old=old,
        ref=logps + 0.5 * draw(N, T),
        sampler=old + 0.3 * draw(N, T),
        entropies=draw(N, T).abs(),
        advantages=draw(N, T) if per_token_advantages else draw(N),
        mask=mask,
    )


def by_trl(trainer_class, data, mode="train", sampler_weights=None, sampler_logps=None, **settings):
    """(loss to back-propagate, its gradient in the log-probabilities and entropies, metrics) of TRL's `_compute_loss`."""
    args = {
        "delta": None,
        "use_bias_correction_kl": True,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
        "steps_per_generation": PER_GENERATION,
    }
    on_trainer = {
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "loss_type": "grpo",
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
    }
    args |= {name: settings.pop(name) for name in list(settings) if name in args}
    on_trainer |= settings
    accelerator = SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, dim, pad_index: x,
    )
    logps = data.logps.clone().requires_grad_()
    entropies = data.entropies.clone().requires_grad_()
    trainer = SimpleNamespace(
        args=SimpleNamespace(**args),
        accelerator=accelerator,
        model=SimpleNamespace(training=mode == "train"),
        aux_loss_enabled=False,
        use_vllm=sampler_weights is not None,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=ACCUMULATION,
        max_completion_length=CAP,
        _entropy_bonus_enabled=on_trainer["entropy_coef"] != 0.0,
        _metrics={"train": _Lists(), "eval": _Lists()},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropies, None),
        get_off_policy_mask=trainer_class.get_off_policy_mask,
        get_gamma_weights=trainer_class.get_gamma_weights,
        **on_trainer,
    )
    # Without `profiling_decorator`, which wants a real trainer.
    unwrapped = getattr(trainer_class.get_high_entropy_mask, "__wrapped__", trainer_class.get_high_entropy_mask)
    trainer.get_high_entropy_mask = functools.partial(unwrapped, trainer)
    inputs = {
        "prompt_ids": torch.ones(N, 2, dtype=torch.long),
        "prompt_mask": torch.ones(N, 2, dtype=torch.long),
        "completion_ids": torch.ones(N, T, dtype=torch.long),
        "completion_mask": data.mask,
        "advantages": data.advantages,
        "old_per_token_logps": data.old,
        "ref_per_token_logps": data.ref,
        "num_items_in_batch": torch.tensor(ACTIVE, dtype=torch.float64),
    }
    if sampler_weights is not None:
        inputs["importance_sampling_ratio"] = sampler_weights
    if sampler_logps is not None:
        inputs["sampling_per_token_logps"] = sampler_logps
    loss = trainer_class._compute_loss(trainer, None, inputs)
    loss.backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in (logps, entropies)]
    return loss.detach(), gradients, {name: values[0] for name, values in trainer._metrics[mode].items()}


class _Lists(dict):
    def __missing__(self, name):
        self[name] = []
        return self[name]


def ours(
    data,
    loss_type="grpo",
    level="token",
    epsilon=0.2,
    epsilon_high=0.28,
    delta=None,
    beta=0.0,
    unbiased=True,
    top_entropy_quantile=1.0,
    off_policy_mask_threshold=None,
    entropy_coef=0.0,
    sampler_weights=None,
    sampler_logps=None,
    mode="train",
    **parameters,
):
    """The same from the functions, put together as a trainer does."""
    mask = data.mask
    logps = data.logps.clone().requires_grad_()
    entropies = data.entropies.clone().requires_grad_()
    A = data.advantages if data.advantages.ndim == 2 else data.advantages.unsqueeze(1)
    log_ratio = logps - data.old
    ratio = policy.importance_log_weights(log_ratio, mask, level).exp()
    metrics = {"entropy": _mean(entropies, mask)}

    used = mask
    if top_entropy_quantile < 1.0:
        used = mask * policy.high_entropy_tokens(entropies, mask, top_entropy_quantile)
    if loss_type == "cispo":
        loss = policy.cispo(ratio, logps, A, epsilon_high)
        metrics["cispo_clip_ratio"] = _mean(policy.cispo_clip_fraction(ratio, A, epsilon_high), mask)
    elif loss_type == "sapo":
        loss = policy.sapo(ratio, A, **parameters)
    elif loss_type == "vespo":
        loss, phi = policy.vespo(log_ratio, logps, A, mask, sampler_weights, **parameters)
        metrics["vespo/phi_seq_mean"] = _mean(phi, mask)
    elif loss_type == "gmpo":
        loss = policy.gmpo(log_ratio, A, used, epsilon, epsilon_high)
        clipped = policy.clip_fractions(log_ratio, A, epsilon, epsilon_high, centre=0.0)
    else:
        loss = policy.clipped_surrogate(ratio, A, epsilon, epsilon_high, delta)
        bounded = ratio if delta is None else ratio.clamp(max=delta)
        clipped = policy.clip_fractions(bounded, A, epsilon, epsilon_high)
    if "clip_ratio/low_mean" in policy.loss_metrics(loss_type):
        low, high, either = clipped
        metrics |= {"clip_ratio/low_mean": _mean(low, mask), "clip_ratio/high_mean": _mean(high, mask)}
        metrics["clip_ratio/region_mean"] = _mean(either, mask)
        lows, highs = (policy.masked_mean_by_sequence(x, mask) for x in (low, high))
        metrics["clip_ratio/low_min"] = lows[~lows.isnan()].min()
        metrics["clip_ratio/high_max"] = highs[~highs.isnan()].max()

    if off_policy_mask_threshold is not None:
        drift = logps - (data.old if sampler_logps is None else sampler_logps)
        loss = loss * policy.on_policy_sequences(A, drift, mask, off_policy_mask_threshold)
    if used is not mask and loss_type != "gmpo":
        loss = loss * used
    if sampler_weights is not None and loss_type != "vespo":
        loss = loss * sampler_weights
    if beta:
        kl = policy.k3(data.ref, logps)
        kl = policy.unbiased_kl(kl, ratio) if unbiased else kl
        metrics["kl"] = _mean(kl, mask)
        loss = loss + beta * kl
    share = ACCUMULATION if mode == "train" else 1.0
    active = torch.tensor(ACTIVE * (ACCUMULATION / PER_GENERATION if mode == "train" else 1.0), dtype=torch.float64)
    reported, scaled = policy.POLICY_LOSSES[loss_type](loss, mask, policy.Normaliser(share, active, CAP))
    if entropy_coef:
        total, count = policy.masked_mean(entropies, used)
        scaled = scaled - entropy_coef * total / count.clamp(min=1.0) / share
        metrics |= {"policy_loss": reported, "entropy_coef": entropy_coef}
    scaled.backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in (logps, entropies)]
    return scaled.detach(), gradients, {name: float(value) for name, value in metrics.items()}


def _mean(values, mask):
    total, count = policy.masked_mean(values.detach(), mask)
    return total / count


def assert_same(found, expected):
    # TRL keeps temperatures such as 1.05 in single precision.
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-8)
    for mine, theirs in zip(found[1], expected[1]):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)
    assert found[2].keys() == expected[2].keys()
    for name, value in expected[2].items():
        assert found[2][name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    assert expected[1][0].abs().max() > 1e-3


LOSS_TYPES = ["grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss(trl_grpo, loss_type, level, mode):
    for seed in range(4):
        data = sample(seed, masked_rows=[2] if seed % 2 else [])
        expected = by_trl(trl_grpo, data, mode, loss_type=loss_type, importance_sampling_level=level)
        found = ours(data, loss_type, level, mode=mode)
        assert_same(found, expected)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_advantages_of_each_token(trl_grpo, loss_type):
    data = sample(5, per_token_advantages=True)
    assert_same(ours(data, loss_type), by_trl(trl_grpo, data, loss_type=loss_type))


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_with_the_divergence(trl_grpo, loss_type, level, unbiased):
    data = sample(7)
    expected = by_trl(
        trl_grpo,
        data,
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=0.3,
        use_bias_correction_kl=unbiased,
    )
    assert_same(ours(data, loss_type, level, beta=0.3, unbiased=unbiased), expected)


@pytest.mark.parametrize(
    "theirs, mine",
    [
        ({"delta": 1.5, "epsilon_low": 0.1, "epsilon_high": 0.3}, {"delta": 1.5, "epsilon": 0.1, "epsilon_high": 0.3}),
        ({"top_entropy_quantile": 0.3}, {"top_entropy_quantile": 0.3}),
        ({"top_entropy_quantile": 0.8}, {"top_entropy_quantile": 0.8}),
        ({"off_policy_mask_threshold": 0.05}, {"off_policy_mask_threshold": 0.05}),
        ({"entropy_coef": 0.1}, {"entropy_coef": 0.1}),
        ({"entropy_coef": 0.1, "top_entropy_quantile": 0.5}, {"entropy_coef": 0.1, "top_entropy_quantile": 0.5}),
    ],
)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "luspo"])
def test_options(trl_grpo, loss_type, theirs, mine):
    for seed in range(3):
        data = sample(seed)
        assert_same(ours(data, loss_type, **mine), by_trl(trl_grpo, data, loss_type=loss_type, **theirs))


def test_off_policy_mask_with_unknown_sampler_logps(trl_grpo):
    data = sample(3)
    sampler = data.sampler.clone()
    sampler[:, 0] = math.nan
    settings = {"off_policy_mask_threshold": 0.02, "sampler_logps": sampler}
    assert_same(ours(data, **settings), by_trl(trl_grpo, data, **settings))


@pytest.mark.parametrize(
    "loss_type, parameters",
    [
        ("sapo", {"temperature_pos": 2.0, "temperature_neg": 0.7}),
        ("vespo", {"k_pos": 1.0, "lambda_pos": 1.5, "k_neg": 4.0, "lambda_neg": 0.0}),
    ],
)
def test_parameters(trl_grpo, loss_type, parameters):
    data = sample(11)
    theirs = {f"{loss_type}_{name}": value for name, value in parameters.items()}
    assert_same(ours(data, loss_type, **parameters), by_trl(trl_grpo, data, loss_type=loss_type, **theirs))


@pytest.mark.parametrize("sampler_mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_weights_of_the_sampler(trl_grpo, loss_type, sampler_mode):
    data = sample(13)
    weights = policy.sampler_importance_weights(data.old, data.sampler, data.mask, sampler_mode, clip_max=1.2)
    assert_same(
        ours(data, loss_type, beta=0.1, sampler_weights=weights),
        by_trl(trl_grpo, data, loss_type=loss_type, beta=0.1, sampler_weights=weights),
    )


def test_vespo_far_off_the_policy(trl_grpo):
    """Where the product of ratios under- or overflows, the weight is 0 and nothing is NaN."""
    data = sample(17, spread=12.0)
    expected = by_trl(trl_grpo, data, loss_type="vespo")
    found = ours(data, "vespo")
    torch.testing.assert_close(found[1][0], expected[1][0])
    assert found[2]["vespo/phi_seq_mean"] == pytest.approx(expected[2]["vespo/phi_seq_mean"], abs=1e-12)
    # With exponents near 0, where W is cut off shows.
    exponents = {"k_pos": 0.02, "k_neg": 0.01, "lambda_pos": 1e-3, "lambda_neg": 1e-3}
    theirs = by_trl(trl_grpo, data, loss_type="vespo", **{f"vespo_{name}": value for name, value in exponents.items()})
    assert_same(ours(data, "vespo", **exponents), theirs)


@pytest.mark.parametrize("settings", [{}, {"beta": 0.2}, {"top_entropy_quantile": 0.5}])
def test_gmpo(settings):
    from trl.experimental.gmpo import GMPOTrainer

    for seed in range(3):
        data = sample(seed)
        trl_settings = {"epsilon_low": 0.3, "epsilon_high": 0.4, **settings}
        expected = by_trl(GMPOTrainer, data, **trl_settings)
        assert_same(ours(data, "gmpo", epsilon=0.3, epsilon_high=0.4, unbiased=False, **settings), expected)


def test_gmpo_reports_nothing_for_completions_that_are_masked_out():
    """TRL adds `-A` for each to the loss it logs; the gradient is the same."""
    from trl.experimental.gmpo import GMPOTrainer

    data = sample(4, masked_rows=[1, 3])
    expected = by_trl(GMPOTrainer, data, epsilon_low=0.4, epsilon_high=0.4)
    found = ours(data, "gmpo", epsilon=0.4, epsilon_high=0.4)
    torch.testing.assert_close(found[1][0], expected[1][0])
    surplus = -data.advantages[[1, 3]].sum() / N / ACCUMULATION
    assert (expected[0] - found[0]).item() == pytest.approx(surplus.item())


def test_adaptive_entropy_coefficient(trl_grpo):
    """Over steps with entropies around the target, the coefficient and its use are TRL's."""
    coef, last, coefs, in_use = 0.0, math.inf, [], []
    state = SimpleNamespace(coef=0.0, last=math.inf)
    bounds = {"entropy_coef_min": 0.0, "entropy_coef_max": 0.025, "entropy_coef_delta": 0.01}
    for seed, scale in enumerate([0.2, 0.3, 0.1, 2.0, 0.4, 3.0, 3.0, 0.2]):
        data = sample(seed)
        data.entropies *= scale
        theirs = _adaptive_step(trl_grpo, data, state, entropy_target=0.5, **bounds)
        entropy = _mean(data.entropies, data.mask).item()
        applied = policy.applied_entropy_coef(coef, last, 0.5)
        assert theirs == pytest.approx(applied)
        coef, last = policy.adaptive_entropy_coef(coef, entropy, 0.5, 0.01, 0.0, 0.025), entropy
        assert (state.coef, state.last) == pytest.approx((coef, last))
        coefs.append(coef)
        in_use.append(applied)
    assert max(coefs) == 0.025 and coefs != sorted(coefs) and 0.0 in in_use[1:] and max(in_use) > 0.0


def _adaptive_step(trainer_class, data, state, **settings):
    """One optimizer step of TRL's controller; the coefficient that it applied, read off the entropies' gradient."""
    entropies = data.entropies.clone().requires_grad_()
    trainer = SimpleNamespace(
        args=SimpleNamespace(delta=None, **settings),
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.0,
        loss_type="grpo",
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_adaptive_entropy=True,
        entropy_coef=state.coef,
        _last_world_entropy=state.last,
        _entropy_window_stats=None,
        _entropy_bonus_enabled=True,
        _metrics={"train": _Lists()},
        _get_per_token_logps_and_entropies=lambda *_, **__: (data.logps.clone().requires_grad_(), entropies, None),
    )
    ones = torch.ones(N, 1, dtype=torch.long)
    inputs = {"prompt_ids": ones, "prompt_mask": ones, "completion_ids": data.mask, "completion_mask": data.mask}
    inputs |= {"advantages": data.advantages, "old_per_token_logps": data.old}
    trainer_class._compute_loss(trainer, None, inputs).backward()
    state.coef, state.last = trainer.entropy_coef, trainer._last_world_entropy
    return -entropies.grad.sum().item()


# What TRL computes when it samples: run on a tiny model with completions, rewards and sampler of the test.

PROMPTS = ["The sky", "What is 2 + 2?", "green grass"]
GROUP = 4
COMPLETIONS = [[5 + (7 * i + 3 * j) % 200 for j in range(1 + i % 5)] for i in range(len(PROMPTS) * GROUP)]


def script(trainer_class, generated):
    """A trainer that got `generated` from its sampler and scores completions by its attribute `rewards`."""

    class Scripted(trainer_class):
        rewards = None

        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            return generated

        def _calculate_rewards(self, *args, **kwargs):
            return self.rewards.unsqueeze(1)

    return Scripted


def build(trainer_class, config_class, tmp_path, model, tiny_tokenizer_factory, **settings):
    args = config_class(
        str(tmp_path / "trl"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=len(COMPLETIONS),
        num_generations=GROUP,
        max_completion_length=5,
        gradient_checkpointing=False,
        **settings,
    )
    return trainer_class(
        model=model,
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tiny_tokenizer_factory(),
    )


def rows():
    return [{"prompt": prompt} for prompt in PROMPTS for _ in range(GROUP)]


def test_sampler_weights(tmp_path, tiny_model_factory, tiny_tokenizer_factory):
    import trl

    g = torch.Generator().manual_seed(0)
    # Scores around those of a model that knows nothing, with gaps where the sampler gave none.
    logps = [[float(torch.randn((), generator=g)) - 6.0 for _ in ids] for ids in COMPLETIONS]
    logps[1][0] = logps[3][2] = math.nan
    trainer = build(
        script(trl.GRPOTrainer, (COMPLETIONS, logps)),
        trl.GRPOConfig,
        tmp_path,
        tiny_model_factory(),
        tiny_tokenizer_factory,
        generation_batch_size=len(COMPLETIONS),
    )
    trainer.rewards = torch.rand(len(COMPLETIONS), generator=g)
    trainer.use_vllm = True
    modes = policy.SAMPLER_CORRECTIONS
    for mode, high, low in [(m, h, low) for m in modes for h, low in ((3.0, None), (1.5, 0.2), (None, 0.5))]:
        trainer.vllm_importance_sampling_mode = mode
        trainer.vllm_importance_sampling_clip_max = high
        trainer.vllm_importance_sampling_clip_min = low
        trainer._metrics["train"].clear()
        theirs = trainer._generate_and_score_completions(rows())
        trained, sampled = theirs["old_per_token_logps"], theirs["sampling_per_token_logps"]
        mask = theirs["completion_mask"]
        found = policy.sampler_importance_weights(trained, sampled, mask, mode, high, low)
        expected = theirs["importance_sampling_ratio"]
        assert found.shape == expected.shape == ((12, 1) if mode.startswith("sequence") else (12, 5))
        torch.testing.assert_close(found, expected)
        assert expected.min() < 0.6 and expected.unique().numel() > 3
        gap = policy.sampler_gap(trained, sampled, mask)
        metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
        assert gap["abs_mean"] == pytest.approx(metrics["sampling/sampling_logp_difference/mean"], rel=1e-5)
        assert gap["abs_max"] == pytest.approx(metrics["sampling/sampling_logp_difference/max"], rel=1e-5)
        assert gap["n"] == mask.sum() - 2


@pytest.mark.parametrize("normalize", [False, True])
def test_rloo(tmp_path, tiny_model_dir, tiny_model_factory, tiny_tokenizer_factory, normalize):
    import trl

    trainer = build(
        script(trl.RLOOTrainer, COMPLETIONS),
        trl.RLOOConfig,
        tmp_path,
        tiny_model_dir,
        tiny_tokenizer_factory,
        beta=0.3,
        normalize_advantages=normalize,
    )
    trainer.ref_model.load_state_dict(tiny_model_factory(seed=1).state_dict())
    logps, original = [], trainer._get_per_token_logps_and_entropies

    def recorded(*args, **kwargs):
        output = original(*args, **kwargs)
        logps.append(output[0])
        return output

    trainer._get_per_token_logps_and_entropies = recorded
    nan = math.nan
    for rewards in (
        [1.0, 0.0, 0.5, 2.0, 1.0, 1.0, 1.0, 1.0, -1.0, 3.0, 0.25, 0.0],
        [1.0, nan, 0.5, 2.0, nan, nan, 1.0, nan, nan, nan, nan, nan],
    ):
        trainer.rewards = torch.tensor(rewards)
        logps.clear()
        theirs = trainer._generate_and_score_completions(rows())
        old, ref = logps
        mask = theirs["completion_mask"]
        penalty = (policy.k1(ref, old) * mask).sum(-1)
        assert penalty.abs().min() > 0.01
        found = advantages.rloo(trainer.rewards - 0.3 * penalty, GROUP, normalize)
        torch.testing.assert_close(found, theirs["advantages"])


def test_rloo_as_trl_clips_it():
    """TRL's RLOO: one ratio a completion, the product over its tokens, under PPO's clip."""
    from trl.trainer.rloo_trainer import RLOOTrainer

    data = sample(3, spread=0.2)
    logps = data.logps.clone().requires_grad_()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, data.entropies, None),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        epsilon_low=0.2,
        epsilon_high=0.3,
        _metrics={"train": _Lists()},
    )
    ones = torch.ones(N, 1, dtype=torch.long)
    inputs = {"prompt_ids": ones, "prompt_mask": ones, "completion_ids": data.mask, "completion_mask": data.mask}
    inputs |= {"advantages": data.advantages, "old_logps": (data.old * data.mask).sum(1)}
    expected = RLOOTrainer._compute_loss(trainer, None, inputs)
    expected.backward()

    mine = data.logps.clone().requires_grad_()
    ratio = ((mine - data.old) * data.mask).sum(1, keepdim=True).exp()
    found = policy.clipped_surrogate(ratio, data.advantages.unsqueeze(1), 0.2, 0.3).mean()
    found.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(mine.grad, logps.grad)
    clipped = policy.clip_fractions(ratio, data.advantages.unsqueeze(1), 0.2, 0.3)
    for values, name in zip(clipped, ("low_mean", "high_mean", "region_mean")):
        assert values.mean().item() == pytest.approx(trainer._metrics["train"][f"clip_ratio/{name}"][0])
    assert 0 < clipped[2].sum() < N
