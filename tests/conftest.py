"""Fixtures that several test files share: a tiny tokenizer and tiny models, built in memory without any download."""

import copy
import os

import pytest

# Nothing in the suite may reach the network, and several suites run side by side on few cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# ChatML with tools. `%s` stands where the variant marks what the assistant wrote.
_CHAT_TEMPLATE = (
    "{%% if tools %%}{{ '<|im_start|>system\\nTools:' }}"
    "{%% for tool in tools %%}{{ '\\n' + (tool | tojson) }}{%% endfor %%}{{ '<|im_end|>\\n' }}{%% endif %%}"
    "{%% for message in messages %%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%% if message['role'] == 'assistant' %%}%s"
    "{{ message['content'] or '' }}"
    "{%% for call in message.get('tool_calls') or [] %%}"
    "{{ '<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}{%% endfor %%}"
    "{{ '<|im_end|>' }}%s{{ '\\n' }}"
    "{%% else %%}{{ message['content'] + '<|im_end|>\\n' }}{%% endif %%}"
    "{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\\n' }}{%% endif %%}"
)
CHAT_TEMPLATES = {
    "plain": _CHAT_TEMPLATE % ("", ""),
    "generation": _CHAT_TEMPLATE % ("{% generation %}", "{% endgeneration %}"),
}

_CORPUS = [
    "The sky is blue and the grass is green.",
    "What color is the sky? It is blue.",
    "What is 2 + 2? It is 4. What is 3 + 4? It is 7.",
    "system user assistant tool the quick brown fox jumps over the lazy dog",
]


@pytest.fixture(scope="session")
def tiny_chat_templates():
    """ChatML templates that render the same text: "plain", and "generation" with `{% generation %}` markers."""
    return dict(CHAT_TEMPLATES)


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_chat_templates):
    """A byte-level BPE tokenizer of 300 tokens: any text, `<|endoftext|>` as EOS, `<|pad|>`, ChatML with markers.

    Shared by the session: a test that changes it (or hands it to a trainer that may) takes `tiny_tokenizer_factory`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    special = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=tiny_chat_templates["generation"],
        model_max_length=4096,
    )


@pytest.fixture(scope="session")
def tiny_tokenizer_factory(tiny_tokenizer):
    """`factory(**attributes)`: a fresh copy of `tiny_tokenizer`, with attributes such as `chat_template` set."""

    def build(**attributes):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        for name, value in attributes.items():
            setattr(tokenizer, name, value)
        return tokenizer

    return build


@pytest.fixture(scope="session")
def tiny_model_factory(tiny_tokenizer):
    """`factory(seed=0, architecture="llama", **config)`: a float32 causal language model, the same for the same seed.

    Two layers, hidden size 32, the vocabulary of `tiny_tokenizer`; `architecture` is "llama" or "qwen2", further
    keyword arguments are fields of its config.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.set_num_threads(1)
    classes = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}

    def build(seed=0, architecture="llama", **config):
        config_class, model_class = classes[architecture]
        fields = {
            "vocab_size": len(tiny_tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "bos_token_id": None,
            "eos_token_id": tiny_tokenizer.eos_token_id,
            "pad_token_id": tiny_tokenizer.pad_token_id,
            # The default of 0.02 leaves all logits near zero, where mistakes in the loss hide.
            "initializer_range": 0.2,
            **config,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = model_class(config_class(**fields))
        model.generation_config.eos_token_id = tiny_tokenizer.eos_token_id
        model.generation_config.pad_token_id = tiny_tokenizer.pad_token_id
        return model

    return build


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tiny_model_factory, tiny_tokenizer):
    """A directory with a saved tiny model and its tokenizer, to be loaded by path. Read-only by agreement."""
    path = tmp_path_factory.mktemp("tiny-model")
    tiny_model_factory().save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return str(path)
