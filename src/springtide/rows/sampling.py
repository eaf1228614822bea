"""From logits to a token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from springtide.errors import SpringtideError

Acceptance = Literal["exact", "typical"]

KINDS = dict.fromkeys(("max_tokens", "top_k", "seed", "logprobs"), Integral) | dict.fromkeys(
    ("temperature", "top_p", "min_p", "repetition_penalty"), Real
)
FEW = 1024  # most probable tokens, among which top-p looks first
GOLDEN = 0x9E3779B97F4A7C15 - 2**64


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to stop.

    Attributes:
        max_tokens: most tokens to generate.
        temperature: 0 takes the most probable token; else logits are divided by it.
        top_p: sample among the most probable tokens whose probabilities reach this sum (1 keeps all).
        top_k: sample among this many most probable tokens (0 keeps all).
        min_p: drop tokens less probable than this share of the most probable one (0 keeps all).
        repetition_penalty: divides positive and multiplies negative logits of tokens seen so far (1 changes nothing).
        seed: noise is keyed by seed (of 64 bits) and position, so the same request gives the same text in any batch.
        stop: text that ends the output, one or several; it is not part of it. None is none.
        ignore_eos: go on after the end-of-sequence token.
        accept: which tokens of a draft are kept. "exact" leaves the output as it is without a drafter; "typical" is
            lossy: it keeps what is probable enough, and needs a temperature (see :mod:`springtide.drafting.accept`).
        logprobs: give every token's log-probability, and those of this many most probable ones; None gives none. They
            are the model's own, before penalty, temperature and filters.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    accept: Acceptance = "exact"
    logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else () if self.stop is None else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) for text in stop):
            raise SpringtideError(f"Sampling: stop is {self.stop!r}, but it must be a text, or several.")
        object.__setattr__(self, "stop", tuple(stop))
        for name, kind in KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) and not (name == "logprobs" and value is None):
                number = "a whole number" if kind is Integral else "a number"
                raise SpringtideError(f"Sampling: {name} is {value!r}, but it must be {number}.")
        for holds, rule in (
            (self.max_tokens >= 1, "max_tokens must be at least 1"),
            (0 <= self.temperature < math.inf, "temperature must be 0 (greedy) or more, and finite"),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1"),
            (self.top_k >= 0, "top_k must be 0 (off) or more"),
            (0 <= self.min_p <= 1, "min_p must be between 0 and 1"),
            (0 < self.repetition_penalty < math.inf, "repetition_penalty must be above 0, and finite"),
            (-(2**63) <= self.seed < 2**63, "seed must be a whole number of 64 bits"),
            (self.logprobs is None or self.logprobs >= 0, "logprobs must be 0 or more"),
            (all(self.stop), "a stop string must not be empty"),
            (self.accept in get_args(Acceptance), f"accept must be one of {', '.join(get_args(Acceptance))}"),
            (
                self.accept != "typical" or self.temperature > 0,
                "typical acceptance needs a temperature above 0; set one, or accept exactly",
            ),
        ):
            if not holds:
                raise SpringtideError(f"Sampling: {rule}.")

    @classmethod
    def of(cls, **options: Any) -> Self:
        """From keyword arguments; raises SpringtideError for a name that does not exist."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise SpringtideError(f"Unknown generation option '{name}'; the options are: {', '.join(known)}.")
        return cls(**options)


class Seen:
    """The tokens of a sequence so far: how many there are, and which, for penalties; kept as they come.

    Negative ids hold the places of rows that are no tokens: they count in ``length`` alone.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.length = 0
        self._known: set[int] = set()
        self._new: list[int] = []
        self._ids = torch.empty(0, dtype=torch.int64)
        self.add(tokens)

    def add(self, tokens: Sequence[int]) -> None:
        """Take in the tokens that follow."""
        self.length += len(tokens)
        new = {token for token in tokens if token >= 0} - self._known
        self._known |= new
        self._new += new

    def fork(self) -> Seen:
        """An independent copy."""
        twin = Seen()
        twin.length, twin._known, twin._new, twin._ids = self.length, set(self._known), list(self._new), self._ids
        return twin

    def ids(self, device: torch.device) -> Tensor:
        """The tokens, each once, in any order."""
        if self._new or self._ids.device != device:
            self._ids = torch.cat([self._ids.to(device), torch.tensor(self._new, dtype=torch.int64, device=device)])
            self._new.clear()
        return self._ids

    def __contains__(self, token: int) -> bool:
        return token in self._known


@dataclass(frozen=True)
class Place:
    """A token that is asked for: the one after those that were ``seen`` and then those of ``path``."""

    sampling: Sampling
    seen: Seen
    path: Sequence[int] = ()

    @property
    def position(self) -> int:
        return self.seen.length + len(self.path)


def sample(logits: Tensor, places: Sequence[Place]) -> list[int]:
    """The token of each of R places, given ``logits [R, V]``.

    Sampling adds Gumbel noise to the logits that are left and takes the largest: a draw from the distribution that
    depends on nothing but seed and position, so that drafting and batching do not change it.
    """
    logits = _penalised(logits, places)
    drawn = [row for row, place in enumerate(places) if place.sampling.temperature > 0]
    if not drawn:
        tokens = logits.argmax(-1)
    elif len(drawn) == len(places):
        tokens = _draw(logits, places)
    else:
        tokens = logits.argmax(-1)
        tokens[drawn] = _draw(logits[drawn], [places[row] for row in drawn])
    return list(map(int, tokens.tolist()))


def distribution(logits: Tensor, places: Sequence[Place]) -> Tensor:
    """Log-probabilities ``[R, V]`` (fp64) that tokens are drawn from, -inf for the others; temperatures are above 0."""
    return processed(logits, places).log_softmax(-1)


def processed(logits: Tensor, places: Sequence[Place]) -> Tensor:
    """Logits ``[R, V]`` (fp64) after penalty, temperature (if it is above 0) and filters; -inf for what they drop."""
    logits = _penalised(logits, places)
    heated = logits.double() / _temperatures(places, logits.device)
    return heated.masked_fill(logits < _least(logits, places), -torch.inf)


@dataclass(frozen=True)
class Logprob:
    """How probable the model found a token: its log-probability (nats), and by id those of the most probable tokens.

    They are the model's own, before penalty, temperature and filters; ``top`` begins with the most probable one.
    """

    token_id: int
    logprob: float
    top: dict[int, float]


def logprobs(logits: Tensor, tokens: Sequence[int], most: int) -> list[Logprob]:
    """Of each of n ``tokens``, chosen by ``logits [n, V]``, with the ``most`` probable ones beside it."""
    log_probs = logits.log_softmax(-1)
    own = log_probs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    best = log_probs.topk(min(most, logits.shape[-1]))
    return [
        Logprob(token, logprob, dict(zip(ids, values, strict=True)))
        for token, logprob, ids, values in zip(tokens, own, best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _draw(logits: Tensor, places: Sequence[Place]) -> Tensor:
    rows, tokens = (logits >= _least(logits, places)).nonzero(as_tuple=True)
    temperature = _temperatures(places, logits.device)[rows, 0]
    noise = gumbel(noise_keys(places, logits.device)[rows], tokens)
    noisy = torch.full(logits.shape, -torch.inf, dtype=torch.float64, device=logits.device)
    noisy[rows, tokens] = logits[rows, tokens].double() / temperature + noise
    return noisy.argmax(-1)


def _column(places: Sequence[Place], name: str, device: torch.device) -> Tensor:
    """An option of every place: fp64 ``[R, 1]``."""
    values = [getattr(place.sampling, name) for place in places]
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]


def _temperatures(places: Sequence[Place], device: torch.device) -> Tensor:
    """What logits are divided by, ``[R, 1]``: 1 for greedy decoding."""
    temperature = _column(places, "temperature", device)
    return temperature.where(temperature > 0, 1)


def _least(logits: Tensor, places: Sequence[Place]) -> Tensor:
    """The least logit ``[R, 1]`` (fp64) that top-k, top-p and min-p leave, applied in this order as in transformers.

    Each of them keeps the most probable tokens, so that one number says which; equally probable ones stay together.
    """
    vocab, device = logits.shape[-1], logits.device
    least = torch.full((len(places), 1), -torch.inf, dtype=torch.float64, device=device)
    counts = [place.sampling.top_k if 0 < place.sampling.top_k < vocab else vocab for place in places]
    most = max((count for count in counts if count < vocab), default=0)
    if most:
        last = torch.tensor(counts, device=device)[:, None] - 1
        kept = logits.topk(most).values.gather(1, last.clamp(max=most - 1)).double()
        least = torch.where(last < most, kept, least)
    if any(place.sampling.top_p < 1 for place in places):
        least = torch.maximum(least, _nucleus(logits, places, least, most if max(counts) < vocab else FEW))
    if any(place.sampling.min_p > 0 for place in places):
        reach = _temperatures(places, device) * _column(places, "min_p", device).log()
        least = torch.maximum(least, logits.amax(-1, keepdim=True).double() + reach)
    return least


def _nucleus(logits: Tensor, places: Sequence[Place], least: Tensor, size: int) -> Tensor:
    """The least logit ``[R, 1]`` that top-p leaves of those from ``least`` on; ``size`` are looked at first."""
    temperature, top_p = _temperatures(places, logits.device), _column(places, "top_p", logits.device)
    heated = (logits.double() / temperature).masked_fill(logits < least, -torch.inf)
    total = heated.logsumexp(-1, keepdim=True)
    while True:  # almost always the most probable ones are enough, and to sort all is slow
        values = logits.topk(min(size, logits.shape[-1])).values.double()
        probs = (values / temperature - total).exp().masked_fill(values < least, 0)
        before = probs.cumsum(-1) - probs
        within = before < top_p
        if size >= logits.shape[-1] or not (within[:, -1:] & (values[:, -1:] > least) & (top_p < 1)).any():
            break
        size *= 16
    last = within.sum(-1, keepdim=True).clamp(min=1) - 1
    return torch.where(top_p < 1, values.gather(1, last), -torch.inf)


def noise_keys(places: Sequence[Place], device: torch.device) -> Tensor:
    """What the noise of each place is made of: int64 ``[R]``, from seed and position."""
    seeds, positions = (
        torch.tensor(values, dtype=torch.int64, device=device)
        for values in ([place.sampling.seed for place in places], [place.position for place in places])
    )
    return _mixed(_mixed(seeds + GOLDEN) + positions * GOLDEN)


def gumbel(keys: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise (fp64) of tokens: for each one a number that the key and the token alone determine.

    It is a hash (SplitMix64: Steele et al., 2014), so that the noise of a few tokens costs no more than that.
    """
    bits = _mixed(keys + (tokens + 1) * GOLDEN)
    uniform = (_shifted(bits, 12).double() + 0.5) * 2.0**-52  # above 0 and below 1
    return -(-uniform.log()).log()


def _mixed(x: Tensor) -> Tensor:
    """A bijection of int64 that leaves no trace of patterns."""
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """``x``, taken as unsigned, shifted to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _penalised(logits: Tensor, places: Sequence[Place]) -> Tensor:
    """``logits [R, V]``, fp64 where there is a penalty, with that of every place on the tokens before it."""
    rows, ids, penalties = [], [], []
    for row, place in enumerate(places):
        if place.sampling.repetition_penalty != 1:
            further = list({token for token in place.path if token not in place.seen})
            own = torch.cat([place.seen.ids(logits.device), torch.tensor(further, dtype=torch.int64).to(logits.device)])
            ids.append(own)
            rows.append(torch.full_like(own, row))
            penalties.append(torch.full_like(own, place.sampling.repetition_penalty, dtype=torch.float64))
    if not rows:
        return logits
    index, penalty, logits = (torch.cat(rows), torch.cat(ids)), torch.cat(penalties), logits.double()
    values = logits[index]
    return logits.index_put(index, torch.where(values > 0, values / penalty, values * penalty))
