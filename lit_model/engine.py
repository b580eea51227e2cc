"""Requests of many, answered together: each gets a place in a decoder as soon as one is free (continuous batching,
Orca, https://www.usenix.org/conference/osdi22/presentation/yu)."""

import threading
import time
from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from queue import Full
from typing import NamedTuple

from lit_model.decode import ROW_TOKENS, Decoder, Request
from lit_model.model import GPT
from lit_model.sampling import LOOK, Sampling


class Made(NamedTuple):
    """The next tokens of an answer."""

    tokens: list[int]
    logprobs: list[list[list[float]]]  # for each the ids and log-probabilities: its own, then those of the likeliest
    finish: str | None = None  # stop: a token that ends it; length: it is as long as was asked for
    error: str | None = None


@dataclass(eq=False, kw_only=True)
class LiveRequest(Request):
    """One that somebody waits for."""

    stop_ids: Container[int]
    put: Callable[[Made], None]  # is called with the next tokens, from the engine's thread
    is_gone: bool = False  # nobody wants the rest
    n_made: int = 0


class Engine:
    """A thread that answers requests."""

    def __init__(self, gpt: GPT, places: int, slots: int, length: int, names: Sequence[str | None], most_waiting: int):
        """places: most sequences at a time; slots: tokens and keys of all of them; length: those of the longest; names:
        of methods side by side, None for the base among them."""
        self.decoder, self.places, self.most_waiting = Decoder(gpt, places, slots, length, names), places, most_waiting
        self.waiting: deque[LiveRequest] = deque()
        self.active: list[LiveRequest] = []  # by place
        self.changed, self.n_tokens, self.speed = threading.Condition(), 0, 0.0  # tokens a second
        # kernels are compiled now
        self.decoder.admit([Request([0], 1, Sampling(0))])
        self.decoder.steps(1)
        self.decoder.release(0)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    @property
    def n_free(self) -> int:
        """Slots that are free."""
        return int((self.decoder.users == 0).sum())

    def metrics(self) -> dict[str, float]:
        slots, speed = len(self.decoder.users), self.speed if self.active else 0.0
        counts = dict(tokens_total=self.n_tokens, waiting=len(self.waiting), active=len(self.active))
        return counts | dict(tokens_per_second=speed, slots=slots, slots_used=slots - self.n_free)

    def submit(self, requests: Sequence[LiveRequest]) -> None:
        """Raises Full if not all of them can wait."""
        with self.changed:
            self.waiting = deque(request for request in self.waiting if not request.is_gone)
            places = max(0, self.places - len(self.active))
            if len(self.waiting) + len(requests) > self.most_waiting + places:
                raise Full
            self.waiting += requests
            self.changed.notify()

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.active)
                fresh = self._fitting()
            try:
                if fresh:
                    self._admit(fresh)
                if self.active:
                    self._step()
            except Exception as e:
                self._fail(self.active, e)
                for place in reversed(range(self.decoder.size)):
                    self.decoder.release(place)
                self.active.clear()
                self.decoder.sampler.is_finite.fill_(True)

    def _admit(self, fresh: list[LiveRequest]) -> None:
        try:
            self.decoder.admit(fresh)
            self.active += fresh
        except Exception as e:  # such as too little memory for these prompts: what is being written goes on
            self._fail(fresh, e)
            if self.decoder.size > len(self.active):
                raise

    @staticmethod
    def _fail(requests: Sequence[LiveRequest], e: Exception) -> None:
        for request in requests:
            request.put(Made([], [], error=" ".join(str(e).split())[:300] or type(e).__name__))

    def _fitting(self) -> list[LiveRequest]:
        """Takes from the queue, in order, what there is room for."""
        fresh, free, tokens = [], self.n_free, ROW_TOKENS
        while self.waiting and len(self.active) + len(fresh) < self.places:
            request = self.waiting[0]
            if not request.is_gone:
                free -= len(request.ids) + request.n_new
                tokens -= len(request.ids)
                if free < 0 or (tokens < 0 and fresh):
                    break
                fresh.append(request)
            self.waiting.popleft()
        return fresh

    def _step(self) -> None:
        began, before = time.perf_counter(), self.n_tokens
        made = self.decoder.steps(min(LOOK, max(r.n_new - r.n_made for r in self.active)))
        sampler, logprobs = self.decoder.sampler, []
        if sampler.kind.logprobs is not None:
            logprobs = sampler.made[: len(made), : len(self.active)].tolist()  # (steps, places, 1 + most, 2)
        for place in reversed(range(len(self.active))):
            request, tokens, finish = self.active[place], [], None
            for line in made:
                if line[place] in request.stop_ids:
                    finish = "stop"
                    break
                tokens.append(line[place])
                if request.n_made + len(tokens) == request.n_new:
                    finish = "length"
                    break
            request.n_made += len(tokens)
            self.n_tokens += len(tokens)
            request.put(Made(tokens, [line[place] for line in logprobs[: len(tokens)]], finish))
            if finish or request.is_gone:
                self.decoder.release(place)
                self.active[place] = self.active[-1]
                self.active.pop()
        self.speed = (self.n_tokens - before) / (time.perf_counter() - began)
