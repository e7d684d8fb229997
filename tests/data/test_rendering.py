import copy
import functools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from offline_lmrl.data.errors import InputError
from offline_lmrl.data.rendering import Renderer
from offline_lmrl.data.trajectory import ROLES, Turn
from tests.tiny import LABELS, TOKENIZERS, byte_level, metaspace

LOSSLESS = [name for name in TOKENIZERS if name not in ("plain unigram", "plain words")]
CHATS = [name for name in TOKENIZERS if not name.startswith("plain")]
CONTROLS = ["<|im_start|>", "<|im_end|>", "<bos>", "<eos>", "<user>", "<s>", "</s>", "<unk>", "<pad>", "[SEP]",
            "[CLS]", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>"]
WORDS = ["hello", " there", "\n", "  ", "5, 12", "é", "日", "[INST]", "User:", "<think>", "</think>", "a<", "/s>"]

texts = st.lists(st.sampled_from(CONTROLS + WORDS), max_size=8).map("".join)
turns = st.builds(Turn, st.sampled_from(ROLES), texts)
families = st.sampled_from(list(TOKENIZERS))
each_family = pytest.mark.parametrize("name", list(TOKENIZERS))
small = settings(max_examples=60, deadline=None)

HELLO, HI, DEAL, NO = (Turn("user", "Hello there"), Turn("assistant", "I am 5, 12"), Turn("user", "deal?\n2"),
                       Turn("assistant", "no thanks"))


@functools.cache
def renderer(name):
    return Renderer(TOKENIZERS[name]())


def assemble(view, dialogue):
    return [*view.preamble, *(token for turn in dialogue for token in view.encode_turn(turn).ids)]


@small
@given(families, st.lists(turns, min_size=1, max_size=4), turns)
def test_appending_a_turn_never_changes_earlier_tokens(name, dialogue, turn):
    before = assemble(renderer(name), dialogue)
    # A renderer of its own, asked in another order: an encoding depends on its turn alone.
    fresh = Renderer(renderer(name).tokenizer)
    fresh.encode_turn(turn)
    assert assemble(fresh, [*dialogue, turn])[:len(before)] == before


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
    turn = view.encode_turn(Turn("assistant", text))
    chosen = turn.ids[turn.action_start:turn.action_stop]
    content = view.encode_content(text)
    assert turn.closed
    assert turn.ids[:turn.action_start] == view.agent_opening == view.opening("assistant")
    assert turn.ids[turn.action_start:] == (*content, *view.closing("assistant"))
    assert chosen[-1] == view.close_id and chosen.count(view.close_id) == 1
    assert view.decode(chosen) == view.decode(content)


@small
@given(families, texts)
def test_special_tokens_typed_in_a_text_stay_text(name, text):
    view = renderer(name)
    special = {token for token, added in view.tokenizer.added_tokens_decoder.items() if added.special}
    special -= {view.tokenizer.unk_token_id}
    assert not special & set(view.encode_content(text))
    user = view.encode_turn(Turn("user", text))
    around = len(view.opening("user")), len(user.ids) - len(view.closing("user"))
    assert not special & set(user.ids[slice(*around)])


@each_family
def test_the_agents_opening_is_never_empty_and_every_turn_can_close(name):
    view = renderer(name)
    assert view.agent_opening
    assert view.close_id in view.closing("assistant")


# Text at the edges apart, which templates strip, and typed special tokens, which the stock template takes for real.
inner = st.lists(st.sampled_from([" there", "\nwell", " 5, 12", ", é", " 日", " [x]"]), max_size=4).map(
    lambda parts: "hi" + "".join(parts))


@small
@given(st.sampled_from([name for name in CHATS if name != "bars"]), st.lists(inner, min_size=1, max_size=5))
def test_assembly_is_what_the_template_prints_for_a_plain_dialogue(name, contents):
    dialogue = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)]
    if name == "thinking" and dialogue[-1].role == "assistant":
        dialogue.append(HELLO)
    assert renderer(name).differences(dialogue) is None


def test_difference_of_tokens_under_the_same_text_is_shown():
    # The stock tokenizer puts its mark at the very start of a text, where the assembly has the turn's own tokens.
    assert renderer("bars").differences([HELLO, HI]).startswith("token 0: same text")


@pytest.mark.parametrize("name", ["chatml", "default system"])
@pytest.mark.parametrize("dialogue", [[HELLO, HI], [HELLO, HI, DEAL, NO], [HELLO, HI, NO]])
def test_masks_equal_the_templates_own(name, dialogue):
    view = renderer(name)
    oracle = view.tokenizer.apply_chat_template([{"role": turn.role, "content": turn.content} for turn in dialogue],
                                                return_assistant_tokens_mask=True, return_dict=True)
    mask = [0] * len(view.preamble)
    for turn in dialogue:
        ids, start, stop, _ = view.encode_turn(turn)
        mask += [int(turn.role == "assistant" and start <= i < stop) for i in range(len(ids))]
    assert oracle["input_ids"] == assemble(view, dialogue)
    assert oracle["assistant_masks"] == mask


@pytest.mark.parametrize("name, text", [
    ("chatml", "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\nI am 5, 12<|im_end|>\n"),
    ("default system", "<|im_start|>system\nYou are a helpful player.<|im_end|>\n<|im_start|>user\nHello there"
                       "<|im_end|>\n<|im_start|>assistant\nI am 5, 12<|im_end|>\n"),
    ("thinking", "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\nI am 5, 12<|im_end|>\n"),
    ("headers", "<bos><|start_header_id|>user<|end_header_id|>\n\nHello there<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\nI am 5, 12<|eot_id|>"),
    ("brackets", "<s>[INST] Hello there [/INST] I am 5, 12 </s>"),
    ("bars", "<|user|>\nHello there</s> \n<|assistant|>\nI am 5, 12</s> \n"),
    ("labels", "<s> User: Hello there\n\nAssistant: I am 5, 12</s>"),
    ("stripping", "<bos><start_of_turn>user\nHello there<end_of_turn>\n"
                  "<start_of_turn>model\nI am 5, 12<end_of_turn>\n"),
    ("role tokens", "<bos><user>Hello there<eos><assistant>I am 5, 12<eos>"),
    ("plain bytes", "<bos>User: Hello there\nAssistant: I am 5, 12<eos>"),
])
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
    assert marked.opening("user")[0] == user and user not in marked.encode_content("<|user|>")


def test_declared_stripping():
    both = ("left", "right")
    assert renderer("stripping").strips == renderer("headers").strips == {"user": both, "assistant": both}
    assert renderer("thinking").strips == {"user": (), "assistant": ("left",)}
    assert renderer("chatml").strips == {"user": (), "assistant": ()}


def test_stripping_is_a_difference_and_assembly_keeps_the_text():
    view = renderer("stripping")
    dialogue = [Turn("user", " Hello"), HI]
    assert view.differences(dialogue).startswith("character 25: the template prints 'turn>user\\nHello")
    assert view.decode(view.encode_content(" I am ")) == " I am "


def test_rewritten_history_is_a_difference():
    thought = Turn("assistant", "<think>\nhm\n</think>\n\nno thanks")
    view = renderer("thinking")
    difference = view.differences([HELLO, thought, DEAL, NO])
    assert "the template prints 'assistant\\nno thanks" in difference
    assert "the assembly has 'assistant\\n<think>\\nhm" in difference


def test_injected_system_text_is_in_the_preamble_only():
    view = renderer("default system")
    assert view.tokenizer.decode(view.preamble) == "<|im_start|>system\nYou are a helpful player.<|im_end|>\n"
    assert view.opening("system") == renderer("chatml").opening("system")
    difference = view.differences([Turn("system", "Be nice"), HELLO, HI])
    assert "the template prints 't|>system\\nBe nice" in difference and "You are a helpful" in difference


@pytest.mark.parametrize("name", ["stripping", "brackets"])
def test_refused_dialogues_are_assembled_all_the_same(name):
    view = renderer(name)
    for dialogue in ([HI, HELLO], [HELLO, HI, NO], [Turn("environment", "you lost"), HELLO, HI]):
        assert view.differences(dialogue) == "the template refuses this dialogue: roles must alternate"
        assert len(assemble(view, dialogue)) == len(view.preamble) + sum(
            len(view.encode_turn(turn).ids) for turn in dialogue)


@pytest.mark.parametrize("name, lacking", [
    ("chatml", []), ("headers", []), ("role tokens", []), ("thinking", ["environment"]),
    ("bars", ["tool", "environment"]),
    ("stripping", ["system", "tool", "environment"]), ("brackets", ["system", "tool", "environment"])])
def test_roles_that_the_template_lacks_are_rendered_as_the_users(name, lacking):
    view = renderer(name)
    same = [role for role in ("system", "tool", "environment")
            if (view.opening(role), view.closing(role)) == (view.opening("user"), view.closing("user"))]
    assert same == lacking


def test_role_that_the_template_takes_for_the_agent_is_rendered_as_the_users():
    template = ("{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q: ' + m['content'] + '\n' }}{% else %}"
                "{{ 'A: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}")
    view = Renderer(byte_level(template))
    assert view.opening("tool") == view.opening("user") != view.agent_opening


def test_tool_turn_has_the_templates_own_wrapping():
    view = renderer("thinking")
    ids = view.encode_turn(Turn("tool", "42")).ids
    text = "<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n"
    assert view.tokenizer.decode(ids) == text


def test_bare_system_text_is_printed_bare():
    view = Renderer(byte_level(LABELS))
    assert view.opening("system") == ()
    assert view.differences([Turn("system", "Be nice"), HELLO, HI]) is None


def test_template_that_never_closes_a_turn_gets_the_eos_token():
    template = ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    view = Renderer(byte_level(template))
    eos = view.tokenizer.eos_token_id
    assert view.close_id == eos
    assert view.closing("assistant") == (eos, *view.closing("user"))
    assert "the assembly has" in view.differences([HELLO, HI])


@each_family
def test_sampled_ids_are_used_as_they_are(name):
    view = renderer(name)
    sampled = (*reversed(view.encode_content("hello there")), view.close_id)
    turn = view.encode_turn(Turn("assistant", "not this", token_ids=sampled))
    assert turn.closed
    assert turn.ids[turn.action_start:turn.action_stop] == sampled
    after = view.closing("assistant")[view.closing("assistant").index(view.close_id) + 1:]
    assert turn.ids == (*view.agent_opening, *sampled, *after)


@each_family
def test_unfinished_turn_gets_nothing_appended(name):
    view = renderer(name)
    sampled = tuple(view.encode_content("hello"))
    turn = view.encode_turn(Turn("assistant", "hello", token_ids=sampled))
    assert turn == ((*view.agent_opening, *sampled), len(view.agent_opening), len(view.agent_opening) + len(sampled),
                    False)
    empty = view.encode_turn(Turn("assistant", "", token_ids=()))
    assert empty.ids == view.agent_opening and not empty.closed


def test_decode_ends_at_the_closing_token():
    view = renderer("brackets")
    ids = [*view.encode_content("no thanks"), *view.closing("assistant"), *view.opening("user")]
    assert view.decode(ids) == "no thanks"
    assert view.decode([]) == ""


def test_fingerprint_names_tokenizer_and_template(tmp_path):
    names = {name: renderer(name).fingerprint for name in TOKENIZERS}
    assert len(set(names.values())) == len(names)
    chatml = renderer("chatml")
    changed = copy.deepcopy(chatml.tokenizer)
    changed.chat_template += " "
    assert len({chatml.fingerprint, Renderer(changed).fingerprint, Renderer(changed, "plain").fingerprint}) == 3


@each_family
def test_fingerprint_survives_saving_and_use(name, tmp_path):
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
    assert view.differences(dialogue) is None


def test_plain_template_without_eos_ends_the_agents_turn_with_its_line():
    tokenizer = byte_level(None)
    tokenizer.eos_token = None
    view = Renderer(tokenizer)
    assert view.decode([view.close_id]) == "" and view.closing("assistant") == view.closing("user")
    with pytest.raises(InputError, match="content: the tokenizer reads text as 'Ċ', which marks turns"):
        view.encode_turn(Turn("assistant", "one\ntwo"))


def test_what_cannot_be_used_is_one_error():
    tokenizer = byte_level("{{ messages[0]['content'] }}")
    with pytest.raises(InputError, match="chat template: found no way to print user, assistant"):
        Renderer(tokenizer)
    assert Renderer(tokenizer, "plain").agent_opening
    with pytest.raises(InputError, match="template: found 'chatml', expected 'auto' or 'plain'"):
        Renderer(tokenizer, "chatml")
    with pytest.raises(InputError, match="tokenizer: found object, expected a fast one"):
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
