"""The token trie against options spelt out by hand."""

import torch

from offline_lmrl.decoding.constraints import FREE, TokenTrie

CLOSE = 9
CPU = torch.device("cpu")


def allowed(trie, node):
    masked = trie.mask(torch.zeros(len(node), 10), node)
    return [row.isfinite().nonzero().flatten().tolist() for row in masked]


def walk(trie, row, tokens):
    node = trie.start[row : row + 1]
    for token in tokens:
        node = trie.step(node, torch.tensor([token]))
    return node


def test_only_prefixes_of_options_are_allowed():
    trie = TokenTrie([[[1, 2, CLOSE], [1, 3, CLOSE], [1, CLOSE], [4, 4, CLOSE]]], CPU)
    assert allowed(trie, walk(trie, 0, [])) == [[1, 4]]
    assert allowed(trie, walk(trie, 0, [1])) == [[2, 3, CLOSE]]
    assert allowed(trie, walk(trie, 0, [1, 3])) == [[CLOSE]]
    assert allowed(trie, walk(trie, 0, [4])) == [[4]]


def test_a_complete_option_leaves_the_row_free():
    trie = TokenTrie([[[1, CLOSE]]], CPU)
    assert walk(trie, 0, [1, CLOSE]).item() == FREE
    assert allowed(trie, torch.tensor([FREE])) == [list(range(10))]


def test_rows_have_their_own_options_or_none():
    trie = TokenTrie([[[1, CLOSE]], None, [[2, CLOSE], [3, CLOSE]], [[1, CLOSE]]], CPU)
    assert allowed(trie, trie.start) == [[1], list(range(10)), [2, 3], [1]]
    assert trie.start[0] == trie.start[3]


def test_a_batch_without_options_is_left_alone():
    trie = TokenTrie([None, None], CPU)
    assert allowed(trie, trie.start) == [list(range(10))] * 2
    assert trie.step(trie.start, torch.tensor([5, 6])).tolist() == [FREE, FREE]
