"""The next token from logits that are spread over the ranks by vocabulary row."""

from __future__ import annotations

import torch
from communication import Communication
from torch import Tensor

from hxcomm.decoder.shards import Shard


class Sampler:
    """Greedy (temperature 0) or sampled choice; every rank gets the same token.

    Each rank sends only its best candidates, as pairs (logit, token) in float64, which holds both exactly: 1 for
    greedy, top_k (0: its whole part of the vocabulary) for sampling; what is below a rank's own top_k cannot be in the
    global one. Then every rank draws from the same numbers with a generator of the same seed, which saves a broadcast
    of rank 0's choice. (In float64: CPUs that round exp() differently would disagree once in 1e12 tokens or so.)
    """

    def __init__(
        self,
        communication: Communication,
        shard: Shard,
        most_rows: int,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
    ) -> None:
        self.communication = communication
        self.shard = shard
        self.temperature = temperature
        self.top_p = top_p
        self.keep = 1 if temperature == 0 else min(top_k or most_rows, most_rows)
        self.top_k = top_k
        self.generator = torch.Generator().manual_seed(seed)

    @torch.inference_mode()
    def next_token(self, logits: Tensor) -> int:
        """The chosen token, given this rank's logits [rows of this rank]. One all_gather of 16 * keep bytes."""
        gathered = self.communication.all_gather(self.candidates(logits)).cpu()
        values, tokens = gathered.view(-1, 2, self.keep).transpose(0, 1).reshape(2, -1)
        if self.temperature == 0:
            # The first of equals, as torch.argmax: ranks own ascending rows, so that is the lowest token.
            return int(tokens[values.argmax()])
        return self.draw(values, tokens)

    def candidates(self, logits: Tensor) -> Tensor:
        """[2 * keep] float64: the best logits of this rank, descending, then their tokens; padded with -inf."""
        count = min(self.keep, len(logits))
        best = logits.new_full((2, self.keep), float("-inf"), dtype=torch.float64)
        if self.keep == 1:
            values, rows = logits.max(dim=0, keepdim=True)  # the first of equals, which topk does not promise
        else:
            values, rows = logits.topk(count)
        best[0, :count] = values
        best[1, :count] = rows + self.shard.rows.start
        return best.view(-1)

    def draw(self, values: Tensor, tokens: Tensor) -> int:
        """One token by top_k, then temperature, then top_p: the smallest set of the likeliest that holds top_p."""
        padding = values == float("-inf")
        values, tokens = values[~padding], tokens[~padding]
        order = values.argsort(descending=True, stable=True)
        if self.top_k:
            order = order[: self.top_k]
        cumulative = torch.softmax(values[order] / self.temperature, dim=0).cumsum(dim=0)
        inside = int((cumulative < self.top_p).sum()) + 1
        cumulative = cumulative[:inside]
        point = torch.rand(1, dtype=torch.float64, generator=self.generator) * cumulative[-1]
        return int(tokens[order[min(int(torch.searchsorted(cumulative, point, right=True)), len(cumulative) - 1)]])
