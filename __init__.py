"""Outspoken: post-training whose trainers say what is wrong with a run, why, and which setting to change.

The public names are loaded on first use, so ``import outspoken`` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that defines it.
_PUBLIC = {
    "BEMACallback": "outspoken.trainers.callbacks",
    "DPOConfig": "outspoken.trainers.dpo",
    "DPOTrainer": "outspoken.trainers.dpo",
    "DatasetMixtureConfig": "outspoken.trainers.data.mixtures",
    "DiagnosticsCallback": "outspoken.diagnostics.callback",
    "DistillationConfig": "outspoken.trainers.distillation",
    "DistillationTrainer": "outspoken.trainers.distillation",
    "GRPOConfig": "outspoken.trainers.grpo",
    "GRPOTrainer": "outspoken.trainers.grpo",
    "HTTPJudge": "outspoken.trainers.rewards",
    "KTOConfig": "outspoken.trainers.kto",
    "KTOTrainer": "outspoken.trainers.kto",
    "LogCompletionsCallback": "outspoken.trainers.callbacks",
    "ModelConfig": "outspoken.trainers.scripts",
    "RLOOConfig": "outspoken.trainers.rloo",
    "RLOOTrainer": "outspoken.trainers.rloo",
    "RewardConfig": "outspoken.trainers.reward",
    "RewardTrainer": "outspoken.trainers.reward",
    "RichProgressCallback": "outspoken.trainers.callbacks",
    "Recorder": "outspoken.diagnostics.loop",
    "Run": "outspoken.agent_api",
    "SFTConfig": "outspoken.trainers.sft",
    "SFTTrainer": "outspoken.trainers.sft",
    "ScriptArguments": "outspoken.trainers.scripts",
    "ScriptParser": "outspoken.trainers.scripts",
    "SyncRefModelCallback": "outspoken.trainers.callbacks",
    "TrlParser": "outspoken.trainers.scripts",
    "WeaveCallback": "outspoken.trainers.callbacks",
    "accuracy_reward": "outspoken.trainers.rewards",
    "add_response_schema": "outspoken.trainers.data.response_templates",
    "apply_chat_template": "outspoken.trainers.data.chat_templates",
    "clone_chat_template": "outspoken.trainers.data.chat_templates",
    "create_reference_model": "outspoken.trainers.models",
    "exact_match_reward": "outspoken.trainers.rewards",
    "extract_prompt": "outspoken.trainers.data.formats",
    "get_cosine_scaled_reward": "outspoken.trainers.rewards",
    "get_dataset": "outspoken.trainers.data.mixtures",
    "get_exact_match_reward": "outspoken.trainers.rewards",
    "get_format_reward": "outspoken.trainers.rewards",
    "get_length_reward": "outspoken.trainers.rewards",
    "get_peft_config": "outspoken.trainers.scripts",
    "get_quantization_config": "outspoken.trainers.scripts",
    "get_repetition_penalty_reward": "outspoken.trainers.rewards",
    "get_soft_overlong_punishment": "outspoken.trainers.rewards",
    "get_training_chat_template": "outspoken.trainers.data.chat_templates",
    "init_zero_verbose": "outspoken.trainers.scripts",
    "is_conversational": "outspoken.trainers.data.formats",
    "is_conversational_from_value": "outspoken.trainers.data.formats",
    "maybe_apply_chat_template": "outspoken.trainers.data.chat_templates",
    "maybe_convert_to_chatml": "outspoken.trainers.data.formats",
    "maybe_extract_prompt": "outspoken.trainers.data.formats",
    "maybe_unpair_preference_dataset": "outspoken.trainers.data.formats",
    "pack_dataset": "outspoken.trainers.data.packing",
    "prepare_multimodal_messages": "outspoken.trainers.data.formats",
    "reasoning_accuracy_reward": "outspoken.trainers.rewards",
    "supports_tool_calling": "outspoken.trainers.data.chat_templates",
    "think_format_reward": "outspoken.trainers.rewards",
    "unpair_preference_dataset": "outspoken.trainers.data.formats",
}

__all__ = [*sorted(_PUBLIC), "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'outspoken' has no attribute {name!r}; its public names are {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
