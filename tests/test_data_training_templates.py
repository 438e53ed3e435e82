"""Chat templates made ones for training, beside the ones that TRL keeps written by hand, family by family."""

from pathlib import Path

import pytest
import trl
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import outspoken
from outspoken.trainers.data.chat_templates import tokenize_chat_with_assistant_mask, trains_to_stop
from outspoken.trainers.data.supervised import SupervisedFormat, prepare_supervised
from outspoken.trainers.data.training_templates import boolean_leaves, marks_generation, training_template

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SPECIAL = {"bos_token": "<bos>", "eos_token": "<|endoftext|>"}

# The token that ends the assistant's turn, by family.
END = {
    **dict.fromkeys(["cohere", "cohere2"], "<|END_OF_TURN_TOKEN|>"),
    **dict.fromkeys(["deepseek_r1_distill", "deepseekv3"], "<｜end▁of▁sentence｜>"),
    **dict.fromkeys(["gemma", "gemma3"], "<end_of_turn>"),
    **dict.fromkeys(["diffusion_gemma", "gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5"], "<turn|>"),
    **dict.fromkeys(["idefics3", "smolvlm"], "<end_of_utterance>"),
    **dict.fromkeys(["llama3", "llama3_1", "llama3_2"], "<|eot_id|>"),
    **dict.fromkeys(["lfm2", "lfm2_v2"], "<|im_end|>"),
    **dict.fromkeys(
        ["nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"], "<|im_end|>"
    ),
    **dict.fromkeys(["qwen2_5", "qwen2_5_vl", "qwen3", "qwen3_instruct_2507", "qwen3_vl"], "<|im_end|>"),
    **dict.fromkeys(["qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"], "<|im_end|>"),
    "glm4moe": "<|user|>",
    "gptoss": "<|return|>",
    "llava_next": "</s>",
    "muse_glimmer": "<|eot|>",
    **dict.fromkeys(["phi3", "phi3_5"], "<|end|>"),
}
# Large templates take a second or two; the others are checked in the default run.
SLOW = {"glm4moe", "gptoss", "muse_glimmer", "qwen3_vl", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"}
SLOW |= {name for name in END if name.startswith(("nemotron", "gemma4", "diffusion"))}
FAMILIES = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in sorted(END)]
WITH_TRLS = [param for param in FAMILIES if (TEMPLATES / f"{param.values[0]}_training.jinja").exists()]
# These take contents as lists of blocks only.
BLOCKS = {"idefics3", "llava_next", "smolvlm"}

# What TRL marks and we do not: the beginning of a reply that the generation prompt supplies, so that the model does not
# write it.
SUPPLIED = {
    "deepseek_r1_distill": {"<｜Assistant｜>", "<｜Assistant｜><think>"},
    "deepseekv3": {"<｜Assistant｜>", "<｜tool▁outputs▁end｜>"},
    "gptoss": {"<|start|>assistant"},
    "muse_glimmer": {"<|start|>assistant"},
    **{name: {"<think>"} for name in END if name.startswith(("nemotron", "qwen3_5_think", "qwen3_6", "qwen3_8"))},
    "qwen3_5_nothink": {"<think>", "<think>\n\n</think>"},
}
# What we mark and TRL does not: the token with which the model hands over to a tool.
HANDED_OVER = {"diffusion_gemma": {"<|tool_response>"}}
# Which conversations TRL renders otherwise: earlier turns as the original shortens them (their reasoning dropped, and
# gpt-oss' `<|return|>` replaced), and contents whose reasoning DeepSeek-V3 cuts off.
_SHORTENED = {"reasoning twice", "reasoning once"}
RENDERED_OTHERWISE = {
    "diffusion_gemma": _SHORTENED,
    "glm4moe": {*_SHORTENED, "reasoning in the content, twice"},
    "gptoss": {*_SHORTENED, "two turns", "reasoning in the content, twice", "a tool, and more"},
    **{name: {*_SHORTENED, "reasoning in the content, twice"} for name in END if name.startswith("nemotron")},
    "deepseekv3": {"reasoning in the content", "reasoning in the content, twice"},
}


def _template(name):
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def _user(text):
    return {"role": "user", "content": text}


def _assistant(text, reasoning=None, *calls):
    message = {"role": "assistant", "content": text}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls
        ]
    return message


_TOOL = {"role": "tool", "name": "weather", "content": "18 degrees"}
_CALL = ("weather", {"city": "Paris", "days": 2})
CONVERSATIONS = {
    "one turn": [_user("What color is the sky?"), _assistant("It is blue.\n\nMostly.")],
    "two turns": [_user("Hi"), _assistant("Hello."), _user("And?"), _assistant("Bye.")],
    "a system message": [{"role": "system", "content": "Be kind."}, _user("Hi"), _assistant("Hello.")],
    "reasoning": [_user("Hi"), _assistant("Hello.", "They greet.")],
    "reasoning twice": [_user("Hi"), _assistant("Hello.", "They greet."), _user("And?"), _assistant("Bye.", "Go.")],
    "reasoning once": [_user("Hi"), _assistant("Hello.", "They greet."), _user("And?"), _assistant("Bye.")],
    "reasoning in the content": [_user("Hi"), _assistant("<think>\nGreet.\n</think>\n\nHello.")],
    "reasoning in the content, twice": [
        *(_user("Hi"), _assistant("<think>\nGreet.\n</think>\n\nHello.")),
        *(_user("And?"), _assistant("<think>\nGo.\n</think>\n\nBye.")),
    ],
    "a call": [_user("How warm?"), _assistant("", None, _CALL)],
    "a tool": [_user("How warm?"), _assistant("", None, _CALL), _TOOL, _assistant("Eighteen.")],
    "a tool, and more": [
        *(_user("How warm?"), _assistant("", None, _CALL), _TOOL, _assistant("Eighteen.")),
        *(_user("And?"), _assistant("Bye.")),
    ],
}


def _conversations(name):
    for kind, messages in CONVERSATIONS.items():
        if name in BLOCKS:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        yield kind, messages


def _rendered(tokenizer, template, messages):
    """The text, and for each of its characters whether it is marked; None if the template refuses."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            [messages], chat_template=template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
        )
    except Exception:
        return None
    marked = [False] * len(texts[0])
    for start, stop in spans[0]:
        marked[start:stop] = [True] * (stop - start)
    return texts[0], marked


def _pieces(text, chosen):
    """The stretches of chosen characters, without whitespace around."""
    pieces, piece = set(), ""
    for character, wanted in zip([*text, ""], [*chosen, False]):
        if wanted:
            piece += character
        elif piece:
            pieces.add(piece.strip())
            piece = ""
    return pieces - {""}


@pytest.fixture
def tokenizer_of(tiny_tokenizer_factory):
    def build(template):
        return tiny_tokenizer_factory(chat_template=template, bos_token="<bos>")

    return build


@pytest.mark.parametrize("name", WITH_TRLS)
def test_rendering_and_marks_are_trls(name, tokenizer_of):
    tokenizer = tokenizer_of(_template(name))
    mine, theirs = outspoken.get_training_chat_template(tokenizer), trl.get_training_chat_template(tokenizer)
    left_out, added, compared = set(), set(), 0
    for kind, messages in _conversations(name):
        expected, found = _rendered(tokenizer, theirs, messages), _rendered(tokenizer, mine, messages)
        assert (expected is None) == (found is None), kind
        if expected is None:
            continue
        if kind in RENDERED_OTHERWISE.get(name, ()):
            assert found[0] != expected[0], kind
            continue
        assert found[0] == expected[0], kind
        compared += 1
        pairs = list(zip(expected[1], found[1]))
        left_out |= _pieces(found[0], [trls and not ours for trls, ours in pairs])
        added |= _pieces(found[0], [ours and not trls for trls, ours in pairs])
    assert compared >= 4
    assert left_out == SUPPLIED.get(name, set())
    assert added == HANDED_OVER.get(name, set())


@pytest.mark.parametrize("name", FAMILIES)
def test_turns_stay_as_the_model_wrote_them(name, tokenizer_of):
    tokenizer = tokenizer_of(_template(name))
    template = outspoken.get_training_chat_template(tokenizer)
    assert marks_generation(template)
    rendered = 0
    for kind, messages in _conversations(name):
        original = _rendered(tokenizer, tokenizer.chat_template, messages[:2])
        found = _rendered(tokenizer, template, messages)
        if original is None or found is None:
            continue
        rendered += 1
        # The first turn is rendered as the original does it without what follows.
        first = _rendered(tokenizer, template, messages[:2])[0]
        if messages[1]["role"] == "assistant":
            assert found[0].startswith(first.removesuffix(SPECIAL["eos_token"])), kind
            if name == "glm4moe":  # the end of the turn is the beginning of the next message
                first = first.removesuffix("<|observation|>" if "tool_calls" in messages[1] else "<|user|>")
            if "content" not in kind or not name.startswith("deepseek"):
                assert first == original[0], kind
        # What is marked ends with the end of the turn, and says all that the assistant says.
        written = "".join(c for c, own in zip(found[0], found[1]) if own)
        if messages[-1]["content"]:
            assert written.removesuffix(SPECIAL["eos_token"]).endswith(END[name]), kind
        for message in messages:
            text = message["content"] if isinstance(message["content"], str) else message["content"][0]["text"]
            if message["role"] == "assistant":
                assert text.rpartition("</think>")[2].strip() in written
            elif message["role"] == "user":
                assert text not in written
        assert "18 degrees" not in written
    assert rendered >= 4


def test_marks_by_hand(tokenizer_of):
    """What the variant of a template with all the usual tricks renders and marks, written out."""
    template = (
        "{%- for m in messages %}\n"
        "  {%- if m['role'] == 'assistant' %}\n"
        "    {{- '<a>' }}\n"
        "    {%- if m.reasoning_content and (loop.last or loop.nextitem.role == 'tool') %}\n"
        "      {{- '<think>' + m.reasoning_content + '</think>' }}\n"
        "    {%- endif %}\n"
        "    {{- m['content'] + '<e>\\n' }}\n"
        "  {%- else %}\n"
        "    {{- '<' + m['role'] + '>' + m['content'] + '<e>\\n' }}\n"
        "  {%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<a>' }}{%- endif %}\n"
    )
    tokenizer = tokenizer_of(template)
    messages = [_user("Hi"), _assistant("Hello.", "Greet."), _user("And?"), _assistant("Bye.")]
    assert _rendered(tokenizer, template, messages)[0] == "<user>Hi<e>\n<a>Hello.<e>\n<user>And?<e>\n<a>Bye.<e>\n"
    text, marked = _rendered(tokenizer, outspoken.get_training_chat_template(tokenizer), messages)
    assert text == "<user>Hi<e>\n<a><think>Greet.</think>Hello.<e>\n<user>And?<e>\n<a>Bye.<e>\n"
    assert _pieces(text, marked) == {"<think>Greet.</think>Hello.<e>", "Bye.<e>"}
    assert sum(marked) == len("<think>Greet.</think>Hello.<e>Bye.<e>")


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (  # the generation prompt is in the loop
            "{% for m in messages %}\n{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n"
            "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
            ["Hello.<|endoftext|>", "Bye.<|endoftext|>"],
        ),
        (  # no generation prompt
            "{% for m in messages %}{% if m.role == 'user' %}[Q] {{ m.content }} [/Q]{% else %}{{ ' ' + m.content }}"
            "{{ eos_token }}{% endif %}{% endfor %}",
            [" Hello.<|endoftext|>", " Bye.<|endoftext|>"],
        ),
        (  # Windows line ends; messages under another name, without the first
            "{% set rest = messages[1:] %}\r\n<s>{{ messages[0].content }}<e>{% for m in [messages[1]] + messages[2:] -%}\r\n"
            "<{{ m.role }}>{{ m.content }}<e>\r\n{% endfor %}\r\n{% if add_generation_prompt %}<assistant>{% endif %}",
            ["Hello.<e>", "Bye.<e>"],
        ),
        (  # rounds that are skipped, and values that outlive them
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% if not m.content %}{% continue %}{% endif %}"
            "{% set ns.n = ns.n + 1 %}{{ ns.n }}:{{ m.role }}>{{ m.content }}<e>{% endfor %}"
            "{% if add_generation_prompt %}{{ ns.n + 1 }}:assistant>{% endif %}",
            ["Hello.<e>", "Bye.<e>"],
        ),
    ],
)
def test_templates_of_other_makes(template, written, tokenizer_of):
    tokenizer = tokenizer_of(template)
    messages = CONVERSATIONS["two turns"]
    variant = outspoken.get_training_chat_template(tokenizer)
    text, marked = _rendered(tokenizer, variant, messages)
    assert text == _rendered(tokenizer, template, messages)[0]
    assert _pieces(text, marked) == {piece.strip() for piece in written}
    assert sum(marked) == sum(map(len, written))


_ANYTHING = st.text(alphabet="ab {}%#'\"\\\n<>|/é", min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(_ANYTHING, _ANYTHING, st.sampled_from(["qwen2_5", "llama3", "phi3", "deepseekv3", "idefics3"]))
def test_any_text_is_rendered_as_before(question, answer, name):
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = dict(_conversations(name))["two turns"]
    for turn, text in ((0, question), (1, answer)):
        content = [{"type": "text", "text": text}] if name in BLOCKS else text
        messages[turn] = {**messages[turn], "content": content}
    source = _template(name)
    try:
        expected = render_jinja_template([messages], chat_template=source, **SPECIAL)[0][0]
    except TemplateError:
        return
    variant = training_template(source, SPECIAL)
    texts, spans = render_jinja_template(
        [messages], chat_template=variant, return_assistant_tokens_mask=True, **SPECIAL
    )
    assert texts[0] == expected
    written = [texts[0][start:stop] for start, stop in spans[0]]
    assert answer.strip() in written[0]
    assert written[1].startswith("Bye.") or written[1].startswith(" Bye.")


def test_templates_that_need_no_change(tokenizer_of, tiny_tokenizer):
    assert outspoken.get_training_chat_template(tiny_tokenizer) is None
    assert outspoken.get_training_chat_template(tokenizer=tiny_tokenizer) is None
    for name in ("lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"):  # marked by their makers
        assert outspoken.get_training_chat_template(tokenizer_of(_template(name))) is None
        assert trl.get_training_chat_template(tokenizer_of(_template(name))) is None


def test_marks_that_are_there_stay(tokenizer_of):
    """A marked template under which a tool's answer changes the turn before it: only the condition is fixed."""
    marked = trl.get_training_chat_template(tokenizer_of(_template("qwen3")))
    # Undo one half of TRL's work: reasoning only in the last turn, and none that is empty.
    rewriting = marked.replace(
        "{{- '<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}",
        "{%- if loop.last %}{{- '<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}"
        "{{- content.lstrip('\\n') }}",
    )
    assert rewriting != marked
    tokenizer = tokenizer_of(rewriting)
    variant = outspoken.get_training_chat_template(tokenizer)
    assert variant == rewriting.replace("{%- if loop.last %}{{- '<think>", "{%- if true %}{{- '<think>")
    for _, messages in _conversations("qwen3"):
        assert _rendered(tokenizer, variant, messages) == _rendered(tokenizer, marked, messages)


def test_arguments_of_calls_as_objects_and_as_text(tokenizer_of):
    """DeepSeek-V3's template takes text only. TRL's variant takes objects, and quotes text once more."""
    tokenizer = tokenizer_of(_template("deepseekv3"))
    variant = outspoken.get_training_chat_template(tokenizer)
    as_object = [_user("How warm?"), _assistant("", None, ("weather", {"days": 2}))]
    as_text = [_user("How warm?"), _assistant("", None, ("weather", '{"days": 2}'))]
    assert _rendered(tokenizer, tokenizer.chat_template, as_object) is None
    original = _rendered(tokenizer, tokenizer.chat_template, as_text)[0]
    assert _rendered(tokenizer, variant, as_text)[0] == _rendered(tokenizer, variant, as_object)[0] == original
    theirs = trl.get_training_chat_template(tokenizer)
    assert r'"{\"days\": 2}"' in _rendered(tokenizer, theirs, as_text)[0]


def test_named_templates(tokenizer_of):
    tokenizer = tokenizer_of({"default": _template("qwen2_5"), "other": "{{ messages }}"})
    assert outspoken.get_training_chat_template(tokenizer) == training_template(_template("qwen2_5"), SPECIAL)


_LOOP = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\\n' }}{% endfor %}"
_PROMPT = "{% if add_generation_prompt %}assistant:{% endif %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages | length }}", "it does not render a question and its answer"),
        ("{{ raise_exception('no') }}", "it does not render a question and its answer"),
        (
            "{% for i in range(messages | length) %}{{ messages[i]['content'] }}{% endfor %}",
            "the marks would be around the wrong words",
        ),
        ("{{ messages | map(attribute='content') | join }}", "no loop over the messages was found in it"),
        (
            _LOOP.replace("m['content']", "(m['content'] if loop.last or m['role'] == 'user' else 'cut')") + _PROMPT,
            "it renders a turn of the assistant differently once more follows",
        ),
        ("{% for m in messages %}{{ m['content'] }}", r"question and its answer \(Unexpected end of template"),
    ],
)
def test_templates_that_cannot_be_patched(template, reason, tokenizer_of):
    message = f"^The chat template cannot be made one for training by itself, because .*{reason}.*; write one with "
    with pytest.raises(ValueError, match=message):
        training_template(template, SPECIAL)
    if "Unexpected" not in reason:
        with pytest.raises(ValueError, match=message):
            outspoken.get_training_chat_template(tokenizer_of(template))


def test_what_is_missing(tiny_tokenizer_factory):
    with pytest.raises(ValueError, match=r"^The tokenizer has no chat template; set one, or use a model"):
        outspoken.get_training_chat_template(tiny_tokenizer_factory(chat_template=None))
    with pytest.raises(TypeError, match="`processing_class` is missing"):
        outspoken.get_training_chat_template()


@pytest.mark.parametrize(
    ("condition", "leaves"),
    [
        (" a ", ["a"]),
        (" a and b or not c", ["a", "b", "c"]),
        ("(a or (not b and c)) and d", ["a", "b", "c", "d"]),
        ("x is not none and y not in (1, 2)", ["x is not none", "y not in (1, 2)"]),
        ("not (loop.last)", ["loop.last"]),
        ("f(a and b) == (c or d)", ["f(a and b) == (c or d)"]),
        ("(a) == (b)", ["(a) == (b)"]),
        ("m['and or'] and \"(\"", ["m['and or']", '"("']),
        ("a if b and c else d", ["a if b and c else d"]),
        ("x and (a if b else c)", ["x", "a if b else c"]),
    ],
)
def test_conditions_are_taken_apart(condition, leaves):
    assert [condition[start:stop] for start, stop in boolean_leaves(condition)] == leaves


# --- in supervised training -------------------------------------------------------------------------------------------


def test_assistant_only_loss_with_a_template_that_rewrites_turns(tokenizer_of):
    """Qwen3 drops earlier reasoning, so no comparison of renderings could find the turns."""
    tokenizer = tokenizer_of(_template("qwen3"))
    messages = CONVERSATIONS["reasoning twice"]
    rows, _ = prepare_supervised(
        Dataset.from_list([{"messages": messages}, {"prompt": messages[:3], "completion": messages[3:]}]).select([0]),
        tokenizer,
        SupervisedFormat(assistant_only_loss=True),
    )
    labels = [label for label in rows[0]["labels"] if label != -100]
    assert tokenizer.decode(labels) == (
        "<think>\nThey greet.\n</think>\n\nHello.<|im_end|><think>\nGo.\n</think>\n\nBye.<|im_end|>"
    )
    assert trains_to_stop(tokenizer)


def test_prompt_and_completion_meet_where_the_variant_says(tokenizer_of):
    tokenizer = tokenizer_of(_template("qwen3"))
    messages = CONVERSATIONS["reasoning twice"]
    how = SupervisedFormat(assistant_only_loss=True, completion_only_loss=True)
    rows, facts = prepare_supervised(
        Dataset.from_list([{"prompt": messages[:3], "completion": messages[3:]}]), tokenizer, how
    )
    labels = [label for label in rows[0]["labels"] if label != -100]
    assert tokenizer.decode(labels) == "<think>\nGo.\n</think>\n\nBye.<|im_end|>"
    assert facts["data/boundary_mismatch_share"] == 0.0


@pytest.mark.slow
def test_an_end_of_turn_that_begins_the_next_message_is_learnt(tokenizer_of):
    tokenizer = tokenizer_of(_template("glm4moe"))
    tokenizer.add_tokens(["<|user|>", "<|observation|>", "<|assistant|>"], special_tokens=True)
    ids, mask = tokenize_chat_with_assistant_mask(tokenizer, CONVERSATIONS["a tool"])
    written = tokenizer.decode([token for token, own in zip(ids, mask) if own])
    assert written.count("<|observation|>") == 1
    assert written.endswith("Eighteen.<|user|>")
    assert trains_to_stop(tokenizer)
