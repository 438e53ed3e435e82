import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from outspoken.trainers import loading
from outspoken.trainers.data.formats import is_messages
from outspoken.trainers.rewards import call_reward_functions, callable_name, checked_rewards


class RewardSet:
    def __init__(self, reward_funcs, processing_classes, args, accelerator):
        functions = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        functions = [f for f in functions if f is not None]
        if not functions:
            raise ValueError("`reward_funcs` is empty; pass at least one reward function.")
        self.accelerator = accelerator
        self.functions = {}
        for f in functions:
            name, number = callable_name(f), 2
            while name in self.functions:
                name, number = f"{callable_name(f)}_{number}", number + 1
            self.functions[name] = f
        self.names = list(self.functions)

    def weights(self, args):
        w = args.reward_weights or [1.0] * len(self.names)
        return torch.tensor(w, dtype=torch.float32, device=self.accelerator.device)

    def score(self, prompts, completions, completion_ids, columns, *, trainer_state, log_extra, log_metric, environments=None):
        if not prompts:
            return torch.zeros(0, len(self.names))
        r = call_reward_functions(self.functions, len(prompts), prompts=prompts, completions=completions, completion_ids=completion_ids, **columns, trainer_state=trainer_state, log_extra=log_extra, log_metric=log_metric)
        return torch.stack([torch.tensor(r[n], dtype=torch.float32) for n in self.names], 1)
