import copy
import functools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from offline_lmrl.errors import InputError
from offline_lmrl.logs.trajectory import ROLES, Turn
from offline_lmrl.tokens.rendering import SCHEME, Renderer
from tests.tiny import LABELS, TOKENIZERS, byte_level, metaspace

LOSSLESS = [name for name in TOKENIZERS if name not in ("plain unigram", "plain words")]
CHATS = [name for name in TOKENIZERS if not name.startswith("plain")]
CONTROLS = [
    "<|im_start|>",
    "<|im_end|>",
    "<bos>",
    "<eos>",
    "<user>",
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "[SEP]",
    "[CLS]",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
]
WORDS = ["hello", " there", "\n", "  ", "5, 12", "é", "日", "[INST]", "User:", "<think>", "</think>", "a<", "/s>"]

texts = st.lists(st.sampled_from(CONTROLS + WORDS), max_size=8).map("".join)
turns = st.builds(Turn, st.sampled_from(ROLES), texts)
families = st.sampled_from(list(TOKENIZERS))
each_family = pytest.mark.parametrize("name", list(TOKENIZERS))
small = settings(max_examples=60, deadline=None)

HELLO, HI, DEAL, NO = (
    Turn("user", "Hello there"),
    Turn("assistant", "I am 5, 12"),
    Turn("user", "deal?\n2"),
    Turn("assistant", "no thanks"),
)


@functools.cache
def renderer(name):
    return Renderer(TOKENIZERS[name]())


def assemble(view, dialogue, live=True):
    pieces = view.window_ids(dialogue, view.encode(dialogue), 0, len(dialogue), live)
    return [*view.preamble_of(dialogue), *(token for ids in pieces for token in ids)]


def opening(view, role):
    """The ids before a turn of this role; for the agent, those of the generation prompt."""
    if role == "assistant":
        return view.agent_opening
    return view.encoder.template(view.text.past[1] or "x", view.text.opening[role])


@functools.cache
def appending(name):
    return Renderer(renderer(name).tokenizer, "assembled")


@small
@given(
    families,
    st.lists(st.builds(Turn, st.sampled_from(["user", "assistant"]), texts), min_size=1, max_size=4),
    turns.filter(lambda turn: turn.role != "tool"),
)
def test_appending_a_turn_never_changes_earlier_tokens(name, dialogue, turn):
    before = assemble(appending(name), dialogue, live=False)
    # A renderer of its own, asked in another order: an encoding does not depend on what was encoded before.
    fresh = Renderer(renderer(name).tokenizer, "assembled")
    fresh.encode_turn(turn)
    assert assemble(fresh, [*dialogue, turn], live=False)[: len(before)] == before


def test_text_of_another_speaker_comes_back_without_the_space_that_only_its_label_has():
    template = (
        "{%- for m in messages -%}{{ '<user> ' if m['role'] == 'user' else '<' + m['role'] + '>' }}"
        "{{- m['content'] + '<end>' }}{%- endfor -%}{%- if add_generation_prompt -%}<assistant>{%- endif -%}"
    )
    view = Renderer(byte_level(template, ["<user>", "<assistant>", "<end>"]))
    for role, closing in (("user", view.closing("user")), ("system", view.closing("system"))):
        turn = view.encode_turn(Turn(role, "5, 12"))
        assert view.decode(turn.ids[turn.action_start : len(turn.ids) - len(closing)], role) == "5, 12"


@small
@given(st.sampled_from(LOSSLESS), texts)
def test_text_comes_back(name, text):
    view = renderer(name)
    assert view.decode(view.encode_content(text)) == text
    assert view.decode([*view.encode_content(text), *view.closing("assistant")]) == text


@small
@given(families, texts)
def test_action_is_the_agents_text_and_its_closing_token(name, text):
    view = renderer(name)
    text = f"a{text}b"  # templates strip white space at the edges
    turn = view.encode_turn(Turn("assistant", text))
    assert turn.closed
    assert turn.ids[: turn.action_start] == view.agent_opening == opening(view, "assistant")
    assert turn.ids[turn.action_start : turn.action_stop] == turn.actions
    assert turn.actions[-1] == view.close_id and turn.actions.count(view.close_id) == 1
    if name == "thinking":  # cuts what looks like a thought out of the text
        text = text.split("</think>")[-1].lstrip("\n")
    assert view.decode(turn.actions).endswith(view.decode(view.encode_content(text)))


@small
@given(families, texts)
def test_special_tokens_typed_in_a_text_stay_text(name, text):
    view = renderer(name)
    special = {token for token, added in view.tokenizer.added_tokens_decoder.items() if added.special}
    special -= {view.tokenizer.unk_token_id}
    assert not special & set(view.encode_content(text))
    user = view.encode_turn(Turn("user", text))
    around = len(opening(view, "user")), len(user.ids) - len(view.closing("user"))
    assert not special & set(user.ids[slice(*around)])


@each_family
def test_the_agents_opening_is_never_empty_and_every_turn_can_close(name):
    view = renderer(name)
    assert view.agent_opening
    assert view.close_id in view.closing("assistant")


# Text at the edges apart, which templates strip, and typed special tokens, which the stock template takes for real.
inner = st.lists(st.sampled_from([" there", "\nwell", " 5, 12", ", é", " 日", " [x]"]), max_size=4).map(
    lambda parts: "hi" + "".join(parts)
)


@small
@given(st.sampled_from([name for name in CHATS if name != "bars"]), st.lists(inner, min_size=1, max_size=5))
def test_assembly_is_what_the_template_prints_for_a_plain_dialogue(name, contents):
    dialogue = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)]
    if name == "thinking" and dialogue[-1].role == "assistant":
        dialogue.append(HELLO)
    assert renderer(name).check.difference(dialogue) is None


def test_difference_of_tokens_under_the_same_text_is_shown():
    # The stock tokenizer puts its mark at the very start of a text, where the assembly has the turn's own tokens.
    assert renderer("bars").check.difference([HELLO, HI]).startswith("token 0: same text")


@pytest.mark.parametrize("name", ["chatml", "default system"])
@pytest.mark.parametrize("dialogue", [[HELLO, HI], [HELLO, HI, DEAL, NO], [HELLO, HI, NO]])
def test_masks_equal_the_templates_own(name, dialogue):
    view = renderer(name)
    oracle = view.tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in dialogue],
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    mask = [0] * len(view.preamble_of(dialogue))
    encoded = view.encode(dialogue)
    pieces = view.window_ids(dialogue, encoded, 0, len(dialogue), live=True)
    for turn, own, ids in zip(dialogue, encoded, pieces, strict=True):
        agent = turn.role == "assistant"
        mask += [int(agent and own.action_start <= i < own.action_stop) for i in range(len(ids))]
    assert oracle["input_ids"] == assemble(view, dialogue)
    assert oracle["assistant_masks"] == mask


@pytest.mark.parametrize(
    "name, text",
    [
        ("chatml", "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\nI am 5, 12<|im_end|>\n"),
        (
            "default system",
            "<|im_start|>system\nYou are a helpful player.<|im_end|>\n<|im_start|>user\nHello there"
            "<|im_end|>\n<|im_start|>assistant\nI am 5, 12<|im_end|>\n",
        ),
        (
            "thinking",
            "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
            "I am 5, 12<|im_end|>\n",
        ),
        (
            "headers",
            "<bos><|start_header_id|>user<|end_header_id|>\n\nHello there<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nI am 5, 12<|eot_id|>",
        ),
        ("brackets", "<s>[INST] Hello there [/INST] I am 5, 12 </s>"),
        ("bars", "<|user|>\nHello there</s> \n<|assistant|>\nI am 5, 12</s> \n"),
        ("labels", "<s> User: Hello there\n\nAssistant: I am 5, 12</s>"),
        (
            "stripping",
            "<bos><start_of_turn>user\nHello there<end_of_turn>\n<start_of_turn>model\nI am 5, 12<end_of_turn>\n",
        ),
        ("role tokens", "<bos><user>Hello there<eos><assistant>I am 5, 12<eos>"),
        ("plain bytes", "<bos>User: Hello there\nAssistant: I am 5, 12<eos>"),
    ],
)
def test_assembly_by_hand(name, text):
    view = renderer(name)
    assert view.tokenizer.decode(assemble(view, [HELLO, HI]), clean_up_tokenization_spaces=False) == text


def test_lossy_tokenizers_give_their_own_normal_form_back():
    words, unigram = renderer("plain words"), renderer("plain unigram")
    assert words.decode(words.encode_content("The Book, and 2")) == "the book , and 2"
    assert unigram.decode(unigram.encode_content("The </s> <s>\nbook ")) == "The </s> <s>\nbook "


def test_metaspace_pieces_get_no_space_of_their_own():
    # One mark before the first word, the template's own space; none after the line break.
    view = renderer("brackets")
    tokens = view.tokenizer.convert_ids_to_tokens(view.encode_content("hat\nhat"))
    assert "".join(tokens) == "▁hat\nhat"


def test_added_tokens_outside_the_template_stay_tokens():
    # The agent thinks in tokens of its own; only what structures the dialogue is taken apart.
    view = renderer("thinking")
    think = view.tokenizer.convert_tokens_to_ids("<think>")
    assert view.encode_content("<think>a")[0] == think
    marked = Renderer(byte_level(renderer("bars").tokenizer.chat_template, plain_added=["<|user|>"]))
    user = marked.tokenizer.convert_tokens_to_ids("<|user|>")
    assert opening(marked, "user")[0] == user and user not in marked.encode_content("<|user|>")


def test_white_space_is_stripped_where_the_template_strips_it():
    view = renderer("stripping")
    dialogue = [Turn("user", " \tHello\n"), Turn("assistant", " I am\n"), Turn("user", "\u3000well "), NO]
    assert view.check.difference(dialogue) is None
    assert "user\nHello<end_of_turn>\n<start_of_turn>model\nI am<end_of_turn>" in view.printer.printed(dialogue)
    assert renderer("chatml").printer.printed([Turn("user", " Hello\n")]) == "<|im_start|>user\n Hello\n<|im_end|>\n"
    # What was sampled stays in the agent's own turn, and is stripped in history.
    sampled = (*view.encode_content(" I am "), view.close_id)
    turn = view.encode([HELLO, Turn("assistant", " I am ", token_ids=sampled), DEAL])[1]
    assert turn.actions == sampled and not turn.stays
    assert view.tokenizer.decode(turn.past) == "<start_of_turn>model\nI am<end_of_turn>\n"


THOUGHT = Turn("assistant", "<think>\nhm\n</think>\n\nno thanks")


def test_rewritten_history_is_followed_and_ends_the_row():
    view = renderer("thinking")
    for dialogue in ([HELLO, THOUGHT], [HELLO, THOUGHT, DEAL], [HELLO, THOUGHT, DEAL, NO]):
        assert view.check.difference(dialogue) is None
    encoded = view.encode([HELLO, THOUGHT, DEAL, NO])
    assert "<think>\nhm\n</think>" in view.tokenizer.decode(encoded[1].ids)
    assert view.tokenizer.decode(encoded[1].past) == "<|im_start|>assistant\nno thanks<|im_end|>\n"
    assert not encoded[1].stays and not encoded[3].stays  # the last turn shows an empty thought
    assert view.tokenizer.decode(encoded[3].actions) == "<think>\n\n</think>\n\nno thanks<|im_end|>"


def test_assembled_template_keeps_what_was_read():
    view = appending("thinking")
    turn = view.encode([HELLO, THOUGHT, DEAL, NO])[1]
    assert turn.stays
    difference = view.check.difference([HELLO, THOUGHT, DEAL, NO])
    assert "the template prints 'assistant\\nno thanks" in difference
    assert "the text for training has 'assistant\\n<think>\\nhm" in difference


def test_injected_system_text_is_printed_only_where_the_dialogue_brings_none():
    view = renderer("default system")
    default = "<|im_start|>system\nYou are a helpful player.<|im_end|>\n"
    assert view.tokenizer.decode(view.preamble_of([HELLO])) == view.tokenizer.decode(view.preamble_of([])) == default
    system = [Turn("system", "Be nice"), HELLO, HI]
    assert view.preamble_of(system) == () and view.check.difference(system) is None
    assert opening(view, "system") == opening(renderer("chatml"), "system")


def test_system_turn_keeps_its_opening_where_bos_opens_turns():
    tokenizer = byte_level(
        TOKENIZERS["default system"]().chat_template,
        ["<|im_start|>", "<|im_end|>"],
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
    )
    view = Renderer(tokenizer)
    system = [Turn("system", "Be nice"), HELLO]
    assert view.printer.printed(system, prompt=True) == (
        "<|im_start|>system\nBe nice<|im_end|>\n<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"
    )
    assert view.check.difference(system) is None


@pytest.mark.parametrize("name", ["stripping", "brackets"])
def test_refused_dialogues_are_assembled_all_the_same(name):
    view = renderer(name)
    for dialogue in ([HI, HELLO], [HELLO, HI, NO], [Turn("environment", "you lost"), HELLO, HI]):
        assert view.check.difference(dialogue) == "the template refuses this dialogue: roles must alternate"
        ids = [*assemble(view, dialogue, live=False), *view.agent_opening]
        assert view.tokenizer.decode(ids).strip() == view.printer.printed(dialogue, prompt=True).strip()


@pytest.mark.parametrize(
    "name, lacking",
    [
        ("chatml", []),
        ("headers", []),
        ("role tokens", []),
        ("thinking", ["environment"]),
        ("bars", ["tool", "environment"]),
        ("stripping", ["system", "tool", "environment"]),
        ("brackets", ["tool", "environment"]),
    ],
)
def test_roles_that_the_template_lacks_are_rendered_as_the_users(name, lacking):
    view = renderer(name)
    same = [
        role
        for role in ("system", "tool", "environment")
        if (opening(view, role), view.closing(role)) == (opening(view, "user"), view.closing("user"))
    ]
    assert same == lacking


def test_role_that_the_template_takes_for_the_agent_is_rendered_as_the_users():
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q: ' + m['content'] + '\n' }}{% else %}"
        "{{ 'A: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
    )
    view = Renderer(byte_level(template))
    assert opening(view, "tool") == opening(view, "user") != view.agent_opening


def test_tool_turn_has_the_templates_own_wrapping():
    view = renderer("thinking")
    ids = view.encode_turn(Turn("tool", "42")).ids
    text = "<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n"
    assert view.tokenizer.decode(ids) == text


def test_system_text_inside_the_first_user_turn():
    view = renderer("brackets")
    dialogue = [Turn("system", "Be nice"), HELLO, HI, DEAL]
    assert view.check.difference(dialogue) is None
    text = "<s>[INST] <<SYS>>\nBe nice\n<</SYS>>\n\nHello there [/INST] I am 5, 12 </s><s>[INST] deal?\n2 [/INST]"
    assert view.printer.printed(dialogue, prompt=True) == text


def test_bare_system_text_is_printed_bare():
    view = Renderer(byte_level(LABELS))
    assert opening(view, "system") == ()
    assert view.check.difference([Turn("system", "Be nice"), HELLO, HI]) is None


def test_template_that_never_closes_a_turn_gets_eos_as_an_action_that_no_history_holds():
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    view = Renderer(byte_level(template))
    eos = view.tokenizer.eos_token_id
    turn = view.encode([HELLO, HI, DEAL])[1]
    assert view.close_id == eos == turn.actions[-1] and eos not in (*turn.ids, *turn.past)
    assert turn.ids[turn.action_start : turn.action_stop - 1] == turn.actions[:-1] and turn.stays
    assert view.check.difference([HELLO, HI]) is None and view.check.difference([HELLO, HI, DEAL]) is None


LAST = """{%- for m in messages -%}{%- if m['role'] == 'user' -%}{{ '<u>' + m['content'] + '<end>' }}
{%- else -%}{{ '<a>final:' + m['content'] + ('<return>' if loop.last else '<end>') }}{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<a>' }}{%- endif -%}"""


def test_last_turn_that_closes_otherwise_is_an_action_that_history_does_not_hold():
    view = Renderer(byte_level(LAST, ["<u>", "<a>", "<end>", "<return>"]))
    end, closing = view.tokenizer.convert_tokens_to_ids(["<end>", "<return>"])
    turn = view.encode([HELLO, HI, DEAL])[1]
    assert view.close_id == turn.actions[-1] == closing and turn.stays
    assert turn.past[turn.action_stop - 1] == end and closing not in turn.past
    assert view.tokenizer.decode(turn.actions) == "final:I am 5, 12<return>"
    assert view.decode(turn.actions) == "I am 5, 12"
    assert view.check.difference([HELLO, HI]) is None and view.check.difference([HELLO, HI, DEAL]) is None
    # A sampled turn likewise.
    sampled = view.encode([HELLO, replace(HI, token_ids=turn.actions), DEAL])[1]
    assert sampled == turn


def test_every_token_that_ends_a_reply_ends_a_sampled_turn():
    tokenizer = TOKENIZERS["headers"]()
    other = tokenizer.convert_tokens_to_ids("<eos>")
    view = Renderer(tokenizer, ends=[other])
    sampled = (*view.encode_content("well"), other)
    turn = view.encode([Turn("assistant", "well", token_ids=sampled), HELLO])[0]
    assert view.close_ids == {view.close_id, other} and view.decode(sampled) == "well"
    assert turn.closed and turn.actions == sampled and turn.stays
    assert turn.past == (*view.agent_opening, *sampled[:-1], view.close_id)  # history has the template's closing


OPENED = """{%- for m in messages -%}{%- if m['role'] == 'user' -%}{{ '<u>' + m['content'] + '\\n' }}
{%- else -%}{{ '<a>' + ('<think>\\n\\n</think>\\n' if loop.last else '') + m['content'] + eos_token }}{%- endif -%}
{%- endfor -%}{%- if add_generation_prompt -%}{{ '<a><think>\\n' }}{%- endif -%}"""


def test_prompt_that_opens_a_thought_is_no_opening_of_past_turns():
    view = Renderer(byte_level(OPENED, ["<u>", "<a>"], ["<think>", "</think>"]))
    dialogue = [HELLO, HI, DEAL]
    assert view.printer.printed(dialogue, prompt=True).endswith("<a>I am 5, 12<eos><u>deal?\n2\n<a><think>\n")
    turn = view.encode([HELLO, HI])[1]
    assert view.tokenizer.decode(turn.actions) == "\n</think>\nI am 5, 12<eos>" and not turn.stays
    assert view.decode(turn.actions) == "I am 5, 12" and view.check.prompt_mismatch is None


def test_prompt_that_no_finished_turn_begins_with_is_said():
    template = OPENED.replace("('<think>\\n\\n</think>\\n' if loop.last else '') + ", "")
    view = Renderer(byte_level(template, ["<u>", "<a>"], ["<think>", "</think>"]))
    assert "the generation prompt ends with '<a><think>\\n'" in view.check.prompt_mismatch
    assert view.check.mismatches == {} and view.encode([HELLO, HI])[1].stays
    appended = Renderer(view.tokenizer, "assembled")
    assert appended.check.prompt_mismatch is None and appended.tokenizer.decode(appended.agent_opening) == "<a>"


@each_family
def test_sampled_ids_are_used_as_they_are(name):
    view = renderer(name)
    sampled = (*reversed(view.encode_content("hello there")), view.close_id)
    text = view.decode(sampled)
    turn = view.encode_turn(Turn("assistant", text, token_ids=sampled))
    assert turn.closed and turn.actions == sampled
    assert turn.ids[turn.action_start : turn.action_stop] == sampled
    after = view.closing("assistant")[view.closing("assistant").index(view.close_id) + 1 :]
    assert turn.ids == (*view.agent_opening, *sampled, *after)


@each_family
def test_unfinished_turn_gets_nothing_appended(name):
    view = renderer(name)
    sampled = tuple(view.encode_content("hello"))
    turn = view.encode_turn(Turn("assistant", "hello", token_ids=sampled))
    assert turn.ids == turn.past == turn.loop == (*view.agent_opening, *sampled)
    assert turn.actions == sampled and not turn.closed and turn.action_start == len(view.agent_opening)
    empty = view.encode_turn(Turn("assistant", "", token_ids=()))
    assert empty.ids == view.agent_opening and not empty.closed


def test_decode_ends_at_the_closing_token():
    view = renderer("brackets")
    ids = [*view.encode_content("no thanks"), *view.closing("assistant"), *opening(view, "user")]
    assert view.decode(ids) == "no thanks"
    assert view.decode([]) == ""


def test_fingerprint_names_tokenizer_and_template(tmp_path):
    names = {name: renderer(name).fingerprint for name in TOKENIZERS}
    assert len(set(names.values())) == len(names)
    chatml = renderer("chatml")
    changed = copy.deepcopy(chatml.tokenizer)
    changed.chat_template += "{# the same text #}"
    assert Renderer(changed).fingerprint == chatml.fingerprint and chatml.fingerprint.startswith(f"{SCHEME}-")
    changed.chat_template += "."
    assert len({chatml.fingerprint, Renderer(changed).fingerprint, Renderer(changed, "plain").fingerprint}) == 3


@each_family
def test_data_hash_survives_saving_and_use(name, tmp_path):
    view = renderer(name)
    tokenizer = copy.deepcopy(view.tokenizer)
    tokenizer("hello", truncation=True, max_length=3)
    tokenizer.save_pretrained(tmp_path)
    assert Renderer(AutoTokenizer.from_pretrained(tmp_path)).fingerprint == view.fingerprint


def test_copy_renders_the_same():
    view = renderer("labels")
    again = copy.deepcopy(view)
    assert assemble(again, [HELLO, HI]) == assemble(view, [HELLO, HI])
    assert again.fingerprint == view.fingerprint


def test_plain_template_is_a_choice():
    view = Renderer(renderer("chatml").tokenizer, "plain")
    text = "<bos>System: Be nice\nUser: Hello there\nAssistant: I am 5, 12<|im_end|>Tool: 1\nEnvironment: \n"
    dialogue = [Turn("system", "Be nice"), HELLO, HI, Turn("tool", "1"), Turn("environment", "")]
    assert view.tokenizer.decode(assemble(view, dialogue)) == text
    assert view.check.difference(dialogue) is None


def test_plain_template_without_eos_ends_the_agents_turn_with_its_line():
    tokenizer = byte_level(None)
    tokenizer.eos_token = None
    view = Renderer(tokenizer)
    assert view.decode([view.close_id]) == "" and view.closing("assistant") == view.closing("user")
    with pytest.raises(InputError, match="content: found text that the tokenizer encodes as 'Ċ', which marks turns"):
        view.encode_turn(Turn("assistant", "one\ntwo"))


def test_what_cannot_be_used_is_one_error():
    tokenizer = byte_level("{{ messages[0]['content'] }}")
    with pytest.raises(InputError, match="chat template: found no way to print user, assistant"):
        Renderer(tokenizer)
    assert Renderer(tokenizer, "plain").agent_opening
    with pytest.raises(InputError, match="template: found 'chatml', expected one of auto, assembled, plain"):
        Renderer(tokenizer, "chatml")
    with pytest.raises(InputError, match="tokenizer: found object, expected a fast tokenizer"):
        Renderer(object())
    bare = byte_level("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(InputError, match="chat template: found nothing printed before the agent's text"):
        Renderer(bare)
    silent = TOKENIZERS["plain words"]()
    silent.eos_token = None
    with pytest.raises(InputError, match="tokenizer: found no token that ends an agent turn"):
        Renderer(silent)


def test_prefix_on_the_normalizer_or_everywhere_makes_no_difference_to_content():
    views = [Renderer(metaspace(None, prefix)) for prefix in ("first", "always", "normalizer")]
    first, always, normalizer = (view.encode_content("a </s> b\n c") for view in views)
    assert first == always == normalizer


def test_token_ids_of_another_role_are_not_a_policys():
    view = renderer("chatml")
    assert view.encode_turn(replace(HELLO, token_ids=(7,))) == view.encode_turn(HELLO)
