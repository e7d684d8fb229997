"""The text of a growing reply, piece by piece, against the text of all its tokens."""

import random

import pytest

from offline_lmrl.decoding.texts import TextStream
from offline_lmrl.tokens.rendering import Renderer
from tests.tiny import CHATML, TOKENIZERS, byte_level


@pytest.fixture(scope="module")
def renderer():
    return Renderer(byte_level(CHATML, ["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>"))


def pieces_of(renderer, ids, stop=()):
    """The pieces of a reply, up to a stop text, and the stream."""
    stream, pieces = TextStream(renderer, stop), []
    for place, token in enumerate(ids):
        pieces.append(stream.add(token, last=place + 1 == len(ids)))
        if stream.stopped:
            break
    return pieces, stream


def bytes_of(renderer, text):
    """Token ids of a text, one per byte."""
    names = renderer.tokenizer.get_vocab()
    split = renderer.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    return [names[char] for piece, _ in split(text) for char in piece]


def test_a_character_of_several_tokens_is_held_back_until_it_is_whole(renderer):
    pieces, _ = pieces_of(renderer, bytes_of(renderer, "aé🎉b"))
    assert pieces == ["a", "", "é", "", "", "", "🎉", "b"]


def test_an_incomplete_character_at_the_end_is_what_the_whole_decodes_to(renderer):
    ids = bytes_of(renderer, "a🎉")[:-1]
    pieces, _ = pieces_of(renderer, ids)
    assert pieces == ["a", "", "", "\N{REPLACEMENT CHARACTER}"] and "".join(pieces) == renderer.decode(ids)


def test_a_stop_text_over_several_tokens_is_never_shown(renderer):
    pieces, stream = pieces_of(renderer, bytes_of(renderer, "one END two"), ("END",))
    assert stream.stopped and pieces == ["o", "n", "e", " ", "", "", ""]
    assert (stream.text, len(stream.tokens)) == ("one ", 7)


def test_a_stop_text_that_begins_and_does_not_finish_is_shown_once_that_is_clear(renderer):
    pieces, stream = pieces_of(renderer, bytes_of(renderer, "xENEND"), ("ENDE", "?"))
    assert not stream.stopped and pieces == ["x", "", "", "EN", "", "END"]


def test_the_first_of_several_stop_texts_cuts(renderer):
    ids = renderer.encode_content("left or right")  # several letters per token
    stream = pieces_of(renderer, ids, ("right", "or", "o"))[1]
    assert stream.text == "left "


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_join_to_the_reply_with_every_tokenizer(name):
    renderer, rng = Renderer(TOKENIZERS[name]()), random.Random(0)
    texts = ["I would like the book", " \n a  b\n", "naïve café 🎉 日本", "<think>x</think>\n\nok", "\n"]
    replies = [[*renderer.encode_content(text), renderer.close_id] for text in texts]
    others = [token for token in range(renderer.tokenizer.vocab_size) if token not in renderer.close_ids]
    replies += [rng.choices(others, k=rng.randrange(1, 20)) + rng.choice([[], [renderer.close_id]]) for _ in range(60)]
    for ids in replies:
        pieces, _ = pieces_of(renderer, ids)
        assert "".join(pieces) == renderer.decode(ids), ids


@pytest.mark.parametrize("name", ["chatml", "brackets", "thinking", "plain unigram"])
def test_stop_texts_cut_where_the_whole_reply_has_them(name):
    renderer, rng = Renderer(TOKENIZERS[name]()), random.Random(1)
    others = [token for token in range(renderer.tokenizer.vocab_size) if token not in renderer.close_ids]
    stopped = 0
    for _ in range(100):
        ids, stop = rng.choices(others, k=20), tuple(rng.choices(("a", "th", "e ", "\n", "ll", "you"), k=2))
        starts = [renderer.decode(ids[: n + 1]) for n in range(20)]
        whole = next((text for text in starts if any(mark in text for mark in stop)), starts[-1])
        end = min((whole.index(mark) for mark in stop if mark in whole), default=None)
        stream = pieces_of(renderer, ids, stop)[1]
        assert stream.text == whole[:end] and stream.stopped == (end is not None)
        stopped += stream.stopped
    assert 10 < stopped < 100
