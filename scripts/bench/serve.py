"""Measures generate/serve.py under load: time to start, to the first token, and tokens a second, of clients that ask at
the same time.

    python scripts/bench/serve.py --server "--checkpoint_dir checkpoints/random-7b"
"""

import http.client
import json
import random
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

from lit_model.cli import cli
from scripts.bench.bench_table import commit


@dataclass
class Options:
    """What to measure."""

    clients: str = "1,8,64"
    """how many ask at the same time, with commas between them"""
    prompt: int = 512
    """tokens of a prompt, none of which two prompts share"""
    new: int = 100
    """tokens of an answer"""
    rounds: int = 2
    """how often they ask; the last time counts, since the first one compiles kernels"""
    server: str = ""
    """options of generate/serve.py"""


def main(options: Options) -> None:
    began = time.monotonic()
    args = [sys.executable, "generate/serve.py", "--port", "0", "--queue", "1000", *shlex.split(options.server)]
    with subprocess.Popen(args, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[2]) as server:
        try:
            said = server.stdout.readline().replace(",", "").split()  # http://... answers as BASE, METHOD, ...
            if not said:
                raise ValueError("the server did not start")
            url, name = said[0], said[3]
            print(f"start: {time.monotonic() - began:.1f} s (commit {commit()})", flush=True)
            print("clients | seconds to the first token: median, worst | tokens/s while all write | tokens/s of all")
            for n in map(int, options.clients.split(",")):
                for _ in range(options.rounds):
                    with ThreadPoolExecutor(n) as pool:
                        began = time.monotonic()
                        found = list(pool.map(lambda i: ask(url, name, options, i), range(n)))
                firsts, times = [times[0][0] - began for times in found], [t for of in found for t in of]
                start, end = max(of[0][0] for of in found), min(of[-1][0] for of in found)
                together = sum(k for t, k in times if start < t <= end) / max(end - start, 1e-9)
                whole = sum(k for _, k in times) / (max(t for t, _ in times) - began)
                print(f"{n} | {median(firsts):.2f}, {max(firsts):.2f} | {together:,.0f} | {whole:,.0f}", flush=True)
        finally:
            server.terminate()


def ask(url: str, name: str, options: Options, seed: int) -> list[tuple[float, int]]:
    """(time, tokens that came) of a streamed answer."""
    ids = random.Random(f"{seed} {time.monotonic()}").choices(range(5, 256), k=options.prompt)
    body = dict(model=name, prompt=ids, max_tokens=options.new, stream=True, temperature=0.8, top_k=200)
    body["stream_options"] = dict(include_usage=True)
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    times, response = [], connection.getresponse()
    if response.status != 200:
        raise ValueError(response.read().decode())
    for line in response:
        if line.startswith(b"data: {"):
            times.append(time.monotonic())
            usage = json.loads(line[6:]).get("usage")
    connection.close()
    return [(t, usage["completion_tokens"] / (len(times) - 1)) for t in times[:-1]]  # the last one brings usage


if __name__ == "__main__":
    cli(main, Options, __doc__)
