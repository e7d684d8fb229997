"""Replies restricted to given texts: a trie of token ids that lives on the device, so no token costs a host sync."""

from collections.abc import Sequence

import torch
from torch import Tensor

FREE = 0  # the node without edges: nothing is forbidden; rows without options and finished rows stay there


class TokenTrie:
    """The allowed continuations of every row of a batch; rows with the same options share their nodes.

    Edges are stored sorted by node: those of node n are edge_offset[n] .. edge_offset[n + 1] − 1.

    Args:
      options: per row the token ids of each allowed reply, closing token included, or None for a free row.
    Attributes:
      start: (B,) node before the first token.
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
        """Tokens, children and validity of each node's edges, (B, most_edges)."""
        edge = self.edge_offset[node].unsqueeze(-1) + torch.arange(self.most_edges, device=node.device)
        valid = edge < self.edge_offset[node + 1].unsqueeze(-1)
        edge = edge.clamp(max=len(self.edge_token) - 1)
        return self.edge_token[edge], self.edge_child[edge], valid

    def mask(self, logits: Tensor, node: Tensor) -> Tensor:
        """Logits (B, V) with −inf wherever the row's node (B,) has no edge; a FREE row is left as it is."""
        if self.most_edges == 0:
            return logits
        token, _, valid = self._edges(node)
        allowed = (node == FREE).unsqueeze(-1).repeat(1, logits.shape[-1])
        allowed.scatter_reduce_(-1, token, valid, "amax")
        return logits.masked_fill(~allowed, -torch.inf)

    def step(self, node: Tensor, token: Tensor) -> Tensor:
        """The node (B,) after this token (B,); FREE once an option is complete."""
        if self.most_edges == 0:
            return node
        tokens, children, valid = self._edges(node)
        taken = valid & (tokens == token.unsqueeze(-1))
        return (children * taken).sum(-1)


def _insert(nodes: list[dict[int, int]], options: tuple[tuple[int, ...], ...]) -> int:
    """Adds a trie of these options and returns its root; an option's last token, the closing one, leads to FREE."""
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
