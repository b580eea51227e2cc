"""The server, asked as programs ask OpenAI's: what it answers is what the network says alone."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import requests
import torch
import uvicorn
from conftest import ROOT, fail
from test_methods import build, save, shake

from generate import serve
from lit_model import generate, load
from lit_model.data.tokenizer import Tokenizer
from lit_model.weights import demo

TEXTS = ("Name three fruits.", "Say so", "x", "The capital of France is a town on a river")


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(1)
    for name, row in (("fr", "lora"), ("de", "prefix")):
        (folder / name).mkdir()
        save(folder / name / "lit_method.safetensors", shake(build(tiny / "base", row)), row, tiny / "base")
        (folder / name / "hparams.yaml").write_text("examples: {style: alpaca}")
    return {name: folder / name for name in ("fr", "de")}


class Running:
    """A server in a thread."""

    def __init__(self, base: Path, folders: dict[str, Path], key: str | None = None, **options):
        methods = ",".join(f"{name}={path}" for name, path in folders.items())
        self.served = serve.Served(serve.Options(checkpoint_dir=base, methods=methods, device="cpu", **options))
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        app = serve.app(self.served, key, serve.Options(names="known.example"))
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or "any", max_retries=0)

    def is_idle(self) -> bool:
        """Within 20 seconds nobody has a place or waits, and all slots are free."""
        engine, until = self.served.engine, time.monotonic() + 20
        while time.monotonic() < until:
            if not engine.active and not engine.waiting:
                return engine.n_free == self.served.slots
            time.sleep(0.02)
        return False


@pytest.fixture(scope="module")
def running(tiny, folders):
    server = Running(tiny / "base", folders, places=5, context=200, slots=900)
    yield server
    assert server.is_idle()
    server.server.should_exit = True
    server.thread.join(20)


def test_models_are_the_base_and_the_methods(running):
    assert [model.id for model in running.client.models.list()] == ["base", "fr", "de"]
    assert requests.get(f"{running.url}/health").json() == dict(status="ok")


def test_all_answers_at_once_are_what_each_says_alone(tiny, folders, running):
    tokenizer, jobs = Tokenizer(tiny / "base"), [(name, text) for text in TEXTS for name in ("base", "fr", "de")]

    def ask(job: tuple[str, str]) -> str:
        name, text = job
        made = running.client.completions.create(model=name, prompt=text, max_tokens=20, temperature=0)
        assert made.usage.prompt_tokens == len(tokenizer.bos + tokenizer.encode(text))
        return made.choices[0].text

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, jobs))
    for name in ("base", "fr", "de"):
        gpt = load(tiny / "base", folders.get(name))
        for (other, text), answer in zip(jobs, found):
            if other == name:
                ids = tokenizer.bos + tokenizer.encode(text)
                tokens = list(generate(gpt, ids, 20, temperature=0, stop_ids=tokenizer.stop_ids))
                assert answer == tokenizer.decode(tokens), (name, text)
    assert len({*found}) > 9


@pytest.mark.parametrize("name", ["base", "fr"])
def test_a_stream_is_the_answer_in_pieces(running, name):
    """Of several choices, each with a seed of its own; with usage at the end."""
    how = dict(model=name, messages=[dict(role="user", content="Say so")], max_tokens=30, seed=4)
    whole = running.client.chat.completions.create(**how, n=3)
    texts, usage, ends = ["", "", ""], None, {}
    for event in running.client.chat.completions.create(
        **how, n=3, stream=True, stream_options=dict(include_usage=True)
    ):
        usage = event.usage
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends.get(choice.index)
    assert texts == [choice.message.content for choice in whole.choices] and len({*texts}) == 3
    assert usage == whole.usage and [ends[i] for i in range(3)] == [c.finish_reason for c in whole.choices]
    second = running.client.chat.completions.create(**how | dict(seed=5))
    assert second.choices[0].message.content == texts[1]


def test_a_method_is_asked_in_the_style_that_it_was_trained_in(tiny, running):
    made = running.client.chat.completions.create(
        model="fr", messages=[dict(role="user", content="Say so")], max_tokens=1
    )
    from lit_model.data.examples import prompt_ids, render

    tokenizer = Tokenizer(tiny / "base")
    assert made.usage.prompt_tokens == len(prompt_ids(tokenizer, "alpaca", render("alpaca", "Say so")))


def test_log_probabilities_are_those_of_one_pass(tiny, running):
    made = running.client.completions.create(model="base", prompt="Say so", max_tokens=8, temperature=0, logprobs=3)
    found, tokenizer = made.choices[0].logprobs, Tokenizer(tiny / "base")
    ids = tokenizer.bos + tokenizer.encode("Say so")
    tokens = list(generate(load(tiny / "base"), ids, 8, temperature=0))
    logp = load(tiny / "base")(torch.tensor([ids + tokens]))[0, len(ids) - 1 : -1].log_softmax(-1)
    assert found.token_logprobs == pytest.approx(logp.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist(), abs=1e-4)
    assert found.tokens == [tokenizer.decode([i]) for i in tokens] and all(
        len(best) <= 3 for best in found.top_logprobs
    )
    chat = running.client.chat.completions.create(
        model="base", messages=[dict(role="user", content="a")], max_tokens=3, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == 3 and all(len(of.top_logprobs) == 2 and of.logprob <= 0 for of in content)


def test_an_answer_ends_before_a_stop_text(running):
    how = dict(model="base", prompt="Say so", max_tokens=30, temperature=0)
    whole = running.client.completions.create(**how).choices[0].text
    stop = whole[6:9]
    made = running.client.completions.create(**how, stop=[stop, "never said"]).choices[0]
    assert made.text == whole[: whole.index(stop)] and made.finish_reason == "stop"


@pytest.mark.parametrize(
    "status, says, body",
    [
        (404, "there is no model 'x'", dict(model="x")),
        (400, "temperature", dict(temperature=-1)),
        (400, "top_p", dict(top_p=2)),
        (400, "n is 99", dict(n=99)),
        (400, "max_tokens", dict(max_tokens=10**9)),
        (400, "max_tokens", dict(max_tokens=0)),
        (400, "context", dict(prompt="a b c " * 300)),
        (400, "prompt", dict(prompt=[])),
        (400, "", dict(prompt=[10**6])),
        (400, "model", dict(model=[])),
        (400, "negative", dict(prompt=[-1])),
        (400, "prompt", dict(prompt={})),
        (400, "prompt", dict(prompt=["5"])),
        (400, "temperature", dict(temperature="hot")),
        (400, "stop", dict(stop=3)),
        (400, "stop", dict(stop=["a", None])),
        (400, "top_k", dict(top_k=50.0)),
        (400, "stream", dict(stream="false")),
        (400, "seed", dict(seed=-5)),
        (400, "logprobs", dict(logprobs=99)),
    ],
)
def test_what_cannot_be_is_said_in_openais_form(running, status, says, body):
    body = dict(model="base", prompt="a") | body
    answer = requests.post(f"{running.url}/v1/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code == status and says in error["message"] and {"type", "param", "code"} <= error.keys()


def test_broken_bodies_and_strange_pages_are_refused(running):
    url = f"{running.url}/v1/completions"
    for body in (b"{", b"[1]", b"\xff\xfe", b"[" * 100_000):
        assert requests.post(url, data=body).status_code == 400
    for more in (b'"prompt": "\\ud800"', b'"prompt": "a", "top_p": 1e400', b'"prompt": "a", "temperature": NaN'):
        assert requests.post(url, data=b'{"model": "base", ' + more + b"}").status_code == 400
    assert requests.post(url, data=b" " * (serve.MOST_BYTES + 1)).status_code == 413
    assert (
        requests.post(f"{running.url}/v1/chat/completions", json=dict(model="base")).json()["error"]["param"]
        == "messages"
    )
    for headers in (dict(Host="evil.example"), dict(Origin="http://evil.example"), dict(Origin="null")):
        answer = requests.post(url, json=dict(model="base", prompt="a"), headers=headers)
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    for host, origin in (
        ("known.example", "https://known.example"),
        (f"127.0.0.1:{running.port}", "http://known.example"),
    ):
        assert requests.get(f"{running.url}/v1/models", headers=dict(Host=host, Origin=origin)).status_code == 200
    assert requests.get(f"{running.url}/v1/models", headers=dict(Origin="http://[")).status_code == 403
    assert requests.get(f"{running.url}/../../etc/passwd").json()["error"]["message"]
    assert requests.get(url).status_code == 405
    assert requests.get(f"{running.url}/", headers=dict(Origin=running.url)).status_code == 200


def test_a_full_queue_says_so(running, monkeypatch):
    """Whoever has left it does not count."""
    engine = running.served.engine
    monkeypatch.setattr(engine, "most_waiting", 1)
    monkeypatch.setattr(engine.decoder, "steps", slowly(engine.decoder.steps, 0.2))  # nobody ends meanwhile
    how = dict(model="base", prompt="a", stream=True)
    first = [running.client.completions.create(**how, max_tokens=150) for _ in range(5)]
    while len(engine.active) < 5:
        time.sleep(0.01)
    waits = running.client.completions.create(**how)
    with pytest.raises(openai.RateLimitError):
        running.client.completions.create(model="base", prompt="a")
    waits.close()
    until = time.monotonic() + 20
    while not engine.waiting[0].is_gone and time.monotonic() < until:
        time.sleep(0.01)
    waits = running.client.completions.create(**how)
    for stream in (*first, waits):
        stream.close()
    assert running.is_idle()


def slowly(steps, seconds: float = 0.02):
    return lambda n: (time.sleep(seconds), steps(n))[1]


def test_a_prompt_that_fails_takes_no_other_answer_with_it(running, monkeypatch):
    engine = running.served.engine
    admit = engine.decoder.admit

    def failing(requests):
        if any(len(request.ids) > 30 for request in requests):
            raise MemoryError("too large")
        admit(requests)

    monkeypatch.setattr(engine.decoder, "admit", failing)
    monkeypatch.setattr(engine.decoder, "steps", slowly(engine.decoder.steps))
    how = dict(model="base", prompt="a", max_tokens=60, temperature=0)
    alone = running.client.completions.create(**how).choices[0].text
    stream = running.client.completions.create(**how, stream=True)
    with pytest.raises(openai.InternalServerError, match="too large"):
        running.client.completions.create(model="base", prompt=[5] * 40)
    assert "".join(event.choices[0].text for event in stream) == alone


def test_log_probabilities_stay_with_their_sequence(running):
    """When another one ends, and the last one moves to its place."""
    hows = [
        dict(model="base", prompt=text, max_tokens=n, temperature=0, logprobs=2) for text, n in (("x", 4), ("Say", 12))
    ]
    create = running.client.completions.create
    alone = [create(**how).choices[0].logprobs for how in hows]
    for _ in range(4):
        with ThreadPoolExecutor(2) as pool:
            assert [c.choices[0].logprobs.tokens for c in pool.map(lambda how: create(**how), hows)] == [
                of.tokens for of in alone
            ]


def test_who_goes_away_frees_a_place(running, monkeypatch):
    engine = running.served.engine
    before = engine.n_tokens
    monkeypatch.setattr(engine.decoder, "steps", slowly(engine.decoder.steps))
    for _ in range(7):  # more than there are places
        stream = running.client.completions.create(model="base", prompt="a", max_tokens=190, stream=True)
        next(iter(stream))
        stream.close()
    assert running.is_idle() and engine.n_tokens - before < 7 * 190 / 2
    for stream, seconds in ((False, 0.1), (True, 0.1), (True, 0)):
        before = engine.n_tokens
        body = json.dumps(dict(model="base", prompt="a", max_tokens=190, stream=stream)).encode()
        with socket.create_connection(("127.0.0.1", running.port)) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{running.port}\r\nContent-Length: {len(body)}"
            connection.sendall(f"{head}\r\n\r\n".encode() + body)
            time.sleep(seconds)
        time.sleep(0.5)
        assert running.is_idle() and engine.n_tokens - before < 190 / 2


def test_a_failure_is_said_and_the_next_ones_are_answered(running, monkeypatch):
    def broken(*args):
        raise RuntimeError("out of something")

    with monkeypatch.context() as patch:
        patch.setattr(running.served.engine.decoder, "steps", broken)
        with pytest.raises(openai.InternalServerError, match="out of something"):
            running.client.completions.create(model="fr", prompt="a")
    assert running.client.completions.create(model="fr", prompt="a").choices[0].finish_reason
    assert running.is_idle()


def test_a_key_is_asked_for(tiny, folders):
    server = Running(tiny / "base", {}, key="secret", places=2, context=50, slots=100)
    assert server.client.completions.create(model="base", prompt="a").choices
    for key in ("wrong", "secre", "secrets"):
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0).models.list()
    assert requests.get(f"{server.url}/").status_code == 200  # the page, which asks for it
    server.server.should_exit = True


def test_a_signal_lets_what_runs_end(tiny):
    args = [sys.executable, "generate/serve.py", "--checkpoint_dir", tiny / "base", "--port", "0", "--places", "2"]
    with subprocess.Popen(
        args, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as process:
        url = process.stdout.readline().split()[0]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        stream = client.completions.create(model="base", prompt="a", max_tokens=200, stream=True, temperature=0)
        pieces = iter(stream)
        next(pieces)
        process.send_signal(signal.SIGTERM)
        assert [*pieces][-1].choices[0].finish_reason in ("length", "stop")
        assert process.wait(20) in (0, -signal.SIGTERM)


@pytest.mark.parametrize(
    "args, says",
    [
        ("--methods fr=x,fr=y", "must be name=folder"),
        ("--methods base=x", "is the name of the base"),
        ("--methods fr={tmp}/none", "none"),
        ("--host 1.2.3.4", "--host 1.2.3.4 --port 0: Cannot assign"),
        ("--slots 10", "slots are fewer"),
        ("--places 0", "--places is 0"),
        ("--queue -1", "--queue is -1"),
    ],
)
def test_options_that_cannot_be(tiny, tmp_path, capsys, monkeypatch, args, says):
    args = args.format(tmp=tmp_path)
    assert says in fail(serve, capsys, monkeypatch, f"--checkpoint_dir {tiny}/base --port 0 {args}")


@pytest.mark.slow
def test_a_hundred_clients_get_what_each_would_alone(tmp_path):
    """2,000 requests of base and methods, some of which are left in the middle, from 60 that were asked alone once."""
    demo.fetch_if_demo(demo.DEMO_CHECKPOINT)
    torch.manual_seed(0)
    rng, folders = random.Random(0), {}
    for name, row in (("lora", "lora"), ("prefix", "prefix"), ("adapter", "adapter")):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        gpt = build(demo.DEMO_CHECKPOINT, row)
        with torch.no_grad():
            for p in (p for p in gpt.parameters() if p.requires_grad):
                p.add_(0.02 * torch.randn_like(p))
        save(folders[name] / "lit_method.safetensors", gpt, row, demo.DEMO_CHECKPOINT)
        (folders[name] / "hparams.yaml").write_text("examples: {style: chat}")
    server = Running(demo.DEMO_CHECKPOINT, folders, places=32, context=128, slots=4096)
    asked = [
        dict(
            model=rng.choice([*folders, "smollm2-135m-instruct"]), max_tokens=rng.randint(1, 16),
            messages=[dict(role="user", content=f"Name {n} {rng.choice(('fruits', 'towns', 'rivers and hills'))}.")],
            temperature=rng.choice((0, 0.8)), seed=n,
        )
        for n in range(60)
    ]  # fmt: skip
    create = server.client.chat.completions.create
    alone = [create(**one).choices[0].message.content for one in asked]
    rss = []

    def ask(n: int) -> bool:
        i, leaves = random.Random(n).randrange(60), n % 9 == 0
        if n % 100 == 0:
            rss.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20)
        pieces = create(**asked[i], stream=True)
        text = ""
        for event in pieces:
            text += event.choices[0].delta.content or ""
            if leaves and text:
                pieces.close()
                return alone[i].startswith(text)
        return text == alone[i]

    began = time.monotonic()
    with ThreadPoolExecutor(100) as pool:
        equal = list(pool.map(ask, range(2000)))
    seconds, n = time.monotonic() - began, server.served.engine.n_tokens
    print(f"{sum(equal)} of 2,000 equal in {seconds:.0f} s, {n / seconds:.0f} tokens/s, MiB {[round(m) for m in rss]}")
    assert all(equal) and server.is_idle()
    assert max(rss[10:]) < 1.05 * max(rss[5:10])
    server.server.should_exit = True
