"""Decoding restricted to given texts: a trie of token ids on the model's device.

The next token is then restricted without waiting for the CPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from offline_lmrl.errors import InputError
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.tokens.rendering import Renderer

FREE = 0  # a node without edges, at which any token is allowed: for rows without options and for finished rows


class OptionIds:
    """The texts that are allowed as replies, as token ids; each is encoded once.

    Args:
      renderer: encodes a reply.
    Attributes:
      text_of: token ids of a reply -> its text.
    """

    def __init__(self, renderer: Renderer):
        self.renderer = renderer
        self.ids_of: dict[str, tuple[int, ...]] = {}
        self.text_of: dict[tuple[int, ...], str] = {}

    def encode(self, texts: Sequence[str] | None, most_tokens: int) -> list[tuple[int, ...]] | None:
        """Return the ids of each allowed text, closing token included; None = any text is allowed.

        Raises: InputError if there are no texts, or if one is longer than `most_tokens`, closing token included.
        """
        if texts is None:
            return None
        if not texts:
            raise InputError("options: found an empty list, expected at least one text, or null for any")
        for text in texts:
            if text not in self.ids_of:
                ids = self.renderer.encode_turn(Turn("assistant", text)).actions
                self.ids_of[text], self.text_of[ids] = ids, text
            if len(self.ids_of[text]) > most_tokens:
                raise InputError(
                    f"max_new_tokens: found {most_tokens}, expected at least {len(self.ids_of[text])}, the tokens of "
                    f"the option {text!r}"
                )
        return [self.ids_of[text] for text in texts]


class TokenTrie:
    """A trie of the allowed replies (options) of the B rows of a batch; rows with the same options share their nodes.

    Edges are stored sorted by node: node n has the edges edge_offset[n] .. edge_offset[n + 1] − 1, each with a token
    (edge_token) and the node that the token leads to (edge_child).

    Args:
      options: per row, the token ids of each allowed reply, closing token included; None = any reply is allowed.
      device: the device of the trie's tensors.
    Attributes:
      start: (B,) long, each row's node before its first token.
    """

    def __init__(self, options: Sequence[Sequence[Sequence[int]] | None], device: torch.device):
        nodes: list[dict[int, int]] = [{}]  # token -> child, per node; node 0 is FREE
        roots: dict[tuple[tuple[int, ...], ...], int] = {}
        start = []
        for row in options:
            if row is None:
                start.append(FREE)
                continue
            key = tuple(map(tuple, row))
            if key not in roots:
                roots[key] = _insert(nodes, key)
            start.append(roots[key])
        counts = [len(edges) for edges in nodes]
        self.start = torch.tensor(start, device=device)
        self.edge_offset = torch.tensor([0, *counts], device=device).cumsum(0)
        self.edge_token = torch.tensor([token for edges in nodes for token in edges] or [0], device=device)
        self.edge_child = torch.tensor([child for edges in nodes for child in edges.values()] or [0], device=device)
        self.most_edges = max(counts)

    def _edges(self, node: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return, for nodes (B,), each edge's token, its child, and whether it exists, (B, most_edges) each."""
        edge = self.edge_offset[node].unsqueeze(-1) + torch.arange(self.most_edges, device=node.device)
        valid = edge < self.edge_offset[node + 1].unsqueeze(-1)
        edge = edge.clamp(max=len(self.edge_token) - 1)  # edges that do not exist may be out of range
        return self.edge_token[edge], self.edge_child[edge], valid

    def mask(self, logits: Tensor, node: Tensor) -> Tensor:
        """Return logits (B, V), −inf for tokens without an edge from the row's node (B,); FREE allows all tokens."""
        if self.most_edges == 0:
            return logits
        token, _, valid = self._edges(node)
        allowed = (node == FREE).unsqueeze(-1).repeat(1, logits.shape[-1])
        allowed.scatter_reduce_(-1, token, valid, "amax")
        return logits.masked_fill(~allowed, -torch.inf)

    def step(self, node: Tensor, token: Tensor) -> Tensor:
        """Return each row's node after its next token: nodes, tokens (B,) -> (B,); FREE once an option is complete."""
        if self.most_edges == 0:
            return node
        tokens, children, valid = self._edges(node)
        taken = valid & (tokens == token.unsqueeze(-1))
        return (children * taken).sum(-1)  # at most one edge is taken; none gives 0, which is FREE


def _insert(nodes: list[dict[int, int]], options: tuple[tuple[int, ...], ...]) -> int:
    """Add a trie of these options to `nodes` and return its root; an option's last token leads to FREE.

    Args:
      nodes: per node, token -> child; changed in place.
      options: the token ids of each option, at least one id each.
    """
    root = len(nodes)
    nodes.append({})
    for option in options:
        node = root
        for token in option[:-1]:
            if token not in nodes[node]:
                nodes[node][token] = len(nodes)
                nodes.append({})
            node = nodes[node][token]
        nodes[node][option[-1]] = FREE
    return root
