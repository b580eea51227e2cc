"""How the next tokens are chosen: for each sequence in its own way, on the device where the logits lie."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lit_model.decode import Request

LOOK = 8  # steps on a GPU between two looks of the host at the tokens
MOST_LOGPROBS = 20


class Sampling(NamedTuple):
    """How the next token is chosen. The likeliest token always stays."""

    temperature: float = 1.0  # divides the logits; 0 takes the likeliest token each time
    top_k: int | None = None  # sample from the k likeliest tokens only
    top_p: float | None = None  # from the smallest set of tokens that has this probability
    min_p: float | None = None  # from tokens with at least this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # divides positive logits of tokens that are in the text, multiplies negative ones
    seed: int | None = None  # the same seed gives the same tokens
    logprobs: int | None = None  # report the log-probability of each token, and so many likeliest ones beside it

    def check(self, max_new_tokens: int = 1) -> None:
        """Raises ValueError for a value out of its range."""
        for name, value, fits in (
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
            ("temperature", self.temperature, 0 <= self.temperature < math.inf),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1),
            ("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1),
            ("min_p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf),
            ("seed", self.seed, self.seed is None or 0 <= self.seed < 2**63),
            ("logprobs", self.logprobs, self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS),
        ):
            if not fits:
                raise ValueError(f"{name} is {value}, out of its range")


class Kind(NamedTuple):
    """What a sampler computes for the sequences that it has."""

    is_greedy: bool
    is_filtered: bool
    most: int | None  # likeliest tokens that it looks at; None: all
    has_penalty: bool
    logprobs: int | None


class Sampler:
    """Chooses the next tokens on the device, each sequence in its own way, whatever stands beside it."""

    def __init__(self, places: int, n: int, device: torch.device):
        self.ways: list[Sampling] = []
        self.seed = torch.zeros(places, 1, dtype=torch.long, device=device)
        self.numbers = torch.ones(places, 5, device=device)  # temperature, top_k, top_p, min_p, repetition_penalty
        self.seen = torch.zeros(places, n, dtype=torch.bool, device=device)
        self.is_finite = torch.ones((), dtype=torch.bool, device=device)
        # ids and log-probabilities of the newest token and of the likeliest ones; the same of the last steps
        self.found = torch.zeros(places, 1 + MOST_LOGPROBS, 2, dtype=torch.float64, device=device)
        self.made = torch.zeros(LOOK, *self.found.shape, dtype=torch.float64, device=device)

    def put(self, requests: "Sequence[Request]") -> None:
        """Adds sequences behind those that it has."""
        first, n, ways = len(self.ways), self.seen.shape[1], [r.way for r in requests]
        self.ways += ways
        mine = slice(first, len(self.ways))
        draws = [way.seed is None and way.temperature >= 1e-5 for way in ways]  # the likeliest token takes no numbers
        seeds = [torch.randint(2**62, ()).item() if draw else way.seed or 0 for draw, way in zip(draws, ways)]
        self.seed[mine, 0] = torch.tensor(seeds).to(self.seed)
        rows = [
            (w.temperature, min(w.top_k or n, n), w.top_p or 1.0, w.min_p or 0.0, w.repetition_penalty) for w in ways
        ]
        self.numbers[mine] = torch.tensor(rows).to(self.numbers)
        for i, r in enumerate(requests, first):
            if r.way.repetition_penalty != 1:
                self.seen[i] = False
                self.seen[i, list(r.ids)] = True
        self.look()

    def look(self) -> None:
        """What there is to compute for the sequences that are here."""
        ways = [way for way in self.ways if way.temperature >= 1e-5]  # logits divided by less are no numbers
        n = self.seen.shape[1]
        top_k = {min(way.top_k or n, n) for way in ways}
        self.kind = Kind(
            is_greedy=not ways,
            is_filtered=any(way.top_p or way.min_p for way in ways) or len(top_k) > 1,
            most=max(top_k) if ways and max(top_k) < n else None,
            has_penalty=any(way.repetition_penalty != 1 for way in self.ways),
            logprobs=max((way.logprobs for way in self.ways if way.logprobs is not None), default=None),
        )

    def __call__(self, logits: Tensor, n: Tensor, places: slice) -> Tensor:
        """Tokens (B,) from logits (B, V), for sequences of n (B,) tokens in these places."""
        kind, logits, seen = self.kind, logits.float(), self.seen[places]
        temperature, top_k, top_p, min_p, penalty = self.numbers[places].split(1, dim=-1)  # (B, 1) each
        self.is_finite &= logits.isfinite().all()
        x = logits
        if kind.has_penalty:
            x = torch.where(seen, torch.where(x > 0, x / penalty, x * penalty), x)
        token = x.argmax(-1)
        if not kind.is_greedy:
            x, ids = x / temperature.clamp(min=1e-5), torch.arange(x.shape[-1], device=x.device)
            if kind.most is not None:
                x, ids = x.topk(kind.most, sorted=kind.is_filtered)
            elif kind.is_filtered:
                x, ids = x.sort(-1, descending=True)
            if kind.is_filtered:  # by top_k, then by top_p and min_p, in descending order
                rank = torch.arange(x.shape[-1], device=x.device)
                p = x.masked_fill(rank >= top_k, -torch.inf).softmax(-1)
                x = x.masked_fill((p.cumsum(-1) - p >= top_p) | (p < min_p * p[:, :1]) | (p == 0), -torch.inf)
            at = (x + gumbel(self.seed[places], n[:, None], ids)).argmax(-1, keepdim=True)
            sampled = ids.expand_as(x).gather(1, at)[:, 0]
            token = torch.where(temperature[:, 0] < 1e-5, token, sampled)
        if kind.has_penalty:
            seen.scatter_(1, token[:, None], True)
        if kind.logprobs is not None:
            logp = logits.log_softmax(-1)
            likeliest = logp.topk(kind.logprobs).indices
            ids = torch.cat((token[:, None], likeliest), dim=1)
            self.found[places, : ids.shape[1]] = torch.stack((ids, logp.gather(1, ids)), dim=-1).double()
        return token


def gumbel(seed: Tensor, n: Tensor, ids: Tensor) -> Tensor:
    """Noise (B, size) whose argmax with logits of the tokens `ids` added is a sample. It depends on seed and n, (B, 1),
    the token, and on nothing else: numbers of splitmix64 (https://doi.org/10.1145/2714064.2660195)."""
    x = (seed * -7046029254386353131 + n * -4658895280553007687 + ids) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return -(-(((x >> 40) & 0xFFFFFF) + 0.5).mul(2.0**-24).log()).log()
