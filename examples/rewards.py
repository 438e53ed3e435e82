"""A reward function for grpo.yaml: it is called with the completions and every column of the dataset."""


def right_result(completions, answer, **_):
    """1 where what follows the last equals sign is the answer, else 0."""
    return [float(completion.rpartition("=")[2].strip() == right) for completion, right in zip(completions, answer)]
