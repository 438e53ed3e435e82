"""Logs in the format that systems document or their code shows, where that code cannot be run here.

    python tests/peer_logs/make_documented.py tests/peer_logs

- `prime_rl/trainer/metrics.jsonl`, `prime_rl/orchestrator/metrics.jsonl`: prime-rl 0.8's FileMonitor. Each row has `step`
  and `time`; several rows make up a step; what is not finite is left out of its row; rows about the inference servers
  have no step. `prime_rl/trainer.log`, `prime_rl/orchestrator.log`: the lines of its console.
- `pipeline_rl/finetune.log`: PipelineRL's trainer, `Completed steps N: {…}` with numbers as strings of three decimals.
- `oat/console.log`: oat-llm's learner, a dict pretty-printed over many lines, as `pprint` does.
- `nemo_rl/console.log`: NeMo-RL's GRPO, a header per step and a block of results.
- `open_instruct/history.csv`: open-instruct's GRPO, as `wandb.Api().run(…).history()` is saved.

The numbers are arithmetic.
"""

import argparse
import csv
import json
import math
import pprint
from pathlib import Path

STEPS = range(1, 13)
NAN_AT = 5


def prime_trainer(step: int) -> list[dict]:
    """The rows of one step."""
    return [
        {
            "loss/mean": -1 / 512,
            "entropy/all/mean": 1 - step / 32,
            "entropy/all/std": 0.25,
            "mismatch_kl/all/mean": math.nan if step == NAN_AT else step / 4096,
            "mismatch_kl/all/max": 0.5,
            "is_masked/mean": 1 / 64,
        },
        {"perf/throughput": 2048.0, "perf/mfu": 12.5, "perf/peak_memory": 40.5},
        {"optim/lr": 1e-6, "optim/grad_norm": 1 / step},
        {"time/step": 12.0, "time/wait_for_batch": 3.0, "time/forward_backward": 6.0},
    ]


def prime_orchestrator(step: int) -> list[dict]:
    row = {
        "progress/samples": 128,
        "off_policy/mean": 1.0,
        "off_policy/max": 2.0,
        "time/step": 12.0,
        "time/wait_for_policy": 1.5,
    }
    for subset in ("all", "effective"):
        agent = f"train/agg/{subset}/solver"
        row |= {
            f"{agent}/reward/mean": step / 16 + (1 / 64 if subset == "effective" else 0),
            f"{agent}/reward/min": 0.0,
            f"{agent}/reward/max": 1.0,
            f"{agent}/num_output_tokens/mean": 100.0 + step,
            f"{agent}/num_output_tokens/max": 256.0,
            f"{agent}/num_turns/mean": 1.0,
            f"{agent}/is_truncated/mean": step / 64,
        }
    row["train/agg/all/solver/has_error/mean"] = 0.0
    row["train/agg/all/solver/solved_none"] = 0.5 - step / 32
    row["train/agg/all/solver/solved_all"] = step / 32
    row["train/agg/all/solver/solved_some"] = 0.5
    return [row, {"step": None, "inference/agg/kv_cache_usage_perc/mean": 0.5}]


def write_prime(folder: Path) -> None:
    for component, rows in (("trainer", prime_trainer), ("orchestrator", prime_orchestrator)):
        (folder / component).mkdir(parents=True, exist_ok=True)
        with open(folder / component / "metrics.jsonl", "w") as out:
            for step in STEPS:
                for i, row in enumerate(rows(step)):
                    finite = {k: v for k, v in row.items() if not (isinstance(v, float) and math.isnan(v))}
                    out.write(json.dumps({"step": step, "time": 1.78e9 + 12 * step + i / 8, **finite}) + "\n")
    with open(folder / "trainer.log", "w") as out:
        out.write("10:00:00    INFO Starting training loop (max_steps=12)\n")
        for step in STEPS:
            mismatch = math.nan if step == NAN_AT else step / 4096
            out.write(
                f"10:{step:02}:00 SUCCESS Step {step} | 12.00s | Loss {-1 / 512:.4f} | Entropy {1 - step / 32:.4f} | "
                f"Mismatch KL {mismatch:.4f} | Grad. Norm {1 / step:.4f} | LR {1e-6:.2e} | "
                f"Throughput 2048 tokens/s | MFU 12.5% | Peak Mem. 40.5 GiB\n"
            )
    with open(folder / "orchestrator.log", "w") as out:
        for step in STEPS:
            out.write(
                f"10:{step:02}:00 SUCCESS Step {step} | 1m 12s | Reward {step / 16:.4f} | Trainable 64/128 (50.0%) | "
                f"Turns 1.0 | Branches 1.0 | Max Off-Policy 2 | Error 0.0% | Cancelled 0.0% | "
                f"Truncation {100 * step / 64:.1f}%\n"
            )


def write_pipeline(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)

    def shown(value: float) -> str:
        return f"{value:.3e}" if value and abs(value) < 1e-3 else f"{value:.3f}"

    with open(folder / "finetune.log", "w") as out:
        out.write("[finetune]: 06/01/2026 10:00:00.000 - INFO - pipelinerl.finetune_loop - Start training\n")
        for step in STEPS:
            row = {
                "stats/lr": 1e-6,
                "stats/grad_norm": -1.0 if step == NAN_AT else 1 / step,
                "stats/samples": 64.0 * step,
                "stats/completed_steps": step,
                "stats/lag": 128.0,
                "rl/loss": -0.125,
                "rl/reward": step / 8,
                "rl/entropy": 1 - step / 32,
                "rl/kl": step / 8,
                "rl/kl_new_old": step / 4096,
                "rl/ess": 0.75,
                "rl/num_output_tokens_sum": 6400.0,
                "rl/ratio_new_old": 1.0,
                "rl/ratio_ref_old": 1.25,
                "rl/ratio_ref_new": 1.25,
            }
            shown_row = {name: shown(value) for name, value in row.items()}
            out.write(
                f"[finetune]: 06/01/2026 10:{step:02}:00.000 - INFO - pipelinerl.finetune_loop - "
                f"Completed steps {step}: {shown_row}\n"
            )


def oat_row(step: int) -> dict:
    return {
        "train/pg_loss": -1 / 512,
        "train/entropy": 1 - step / 32,
        "train/kl3": 64 * step / 1024,  # summed over a response of 64 tokens
        "train/policy_grad_norm": math.nan if step == NAN_AT else 1 / step,
        "train/pg_clipfrac": 1 / 64,
        "train/all_zero_rewards_count": 2.0,
        "train/all_one_rewards_count": 1.0,
        "train/adv_mean": 0.0,
        "train/adv_max": 1.5,
        "train/adv_min": -1.5,
        "train/learning_round": step,
        "actor/rewards": step / 16,
        "actor/no_eos_count": 8.0,
        "actor/num_data": 32.0,
        "actor/response_tok_len": 64.0,
        "actor/generate_time": 4.0,
        "misc/lr": 1e-6,
        "misc/global_step": 4 * step,
        "misc/policy_sgd_step": step,
        "misc/pi_beta_version": step,
        "misc/elapse": 12.0 * step,
        "misc/query_step": 32 * step,
        "misc/prompt_consumed": 8 * step,
    }


def write_oat(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "console.log", "w") as out:
        out.write("Broadcast to vLLM finished\n")
        for step in STEPS:
            out.write(pprint.pformat(oat_row(step)) + "\n")


def write_nemo(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "console.log", "w") as out:
        for step in STEPS:
            out.write(f"\n{'=' * 25} Step {step}/12 {'=' * 25}\n")
            out.write("▶ Preparing batch...\n▶ Generating responses for batch of size 64...\n▶ Training policy...\n")
            out.write("\n📊 Training Results:\n")
            out.write(f"  • Loss: {math.nan if step == NAN_AT else 2 / (1 + step):.4f}\n")
            out.write(f"  • Generation KL Error: {step / 64:.4f}\n")
            out.write(f"  • Avg Reward: {step / 16:.4f}\n")
            out.write(f"  • Mean Generation Length: {100 + step:.4f}\n")
            out.write("\n⏱️  Timing:\n  • Total step time: 12.00s\n  • generation: 5.00s (41.7%)\n")
            if step == 10:
                out.write(
                    "\n📊 Validation Results:\n    • Accuracy: 0.5000\n    • Average response length: 110.0 tokens\n"
                )
                out.write("    • Samples processed: 64\n")


def write_open_instruct(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "_step": step - 1,
            "_timestamp": 1.78e9 + 12 * step,
            "_runtime": 12.0 * step,
            "training_step": step,
            "episode": 64 * step,
            "lr": 1e-6,
            "loss/policy_avg": -1 / 512,
            "loss/total_avg": -1 / 256,
            "policy/clipfrac_avg": 1 / 64,
            "policy/entropy_avg": 1 - step / 32,
            "optim/grad_norm": "NaN" if step == NAN_AT else 1 / step,
            "objective/kl0_avg": step / 512,
            "objective/kl2_avg": step / 1024,
            "objective/verifiable_reward": 10 * step / 16,
            "objective/verifiable_correct_rate": step / 16,
            "val/ratio": 1.0,
            "val/sequence_lengths": 100.0 + step,
            "val/stop_rate": 1 - step / 64,
            "debug/vllm_vs_local_logprob_diff_mean": step / 2048,
            "time/training": 6.0,
        }
        for step in STEPS
    ]
    with open(folder / "history.csv", "w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write_prime(folder / "prime_rl")
    write_pipeline(folder / "pipeline_rl")
    write_oat(folder / "oat")
    write_nemo(folder / "nemo_rl")
    write_open_instruct(folder / "open_instruct")


if __name__ == "__main__":
    main()
