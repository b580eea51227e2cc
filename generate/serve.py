"""A server that speaks OpenAI's protocol: the base and what finetuning runs have trained on it, all in one batch.

    python generate/serve.py --checkpoint_dir checkpoints/my-model --methods fr=out/fr,de=out/de

Then http://127.0.0.1:8000 shows two answers side by side, and programs talk to http://127.0.0.1:8000/v1, where `model`
is the name of a method, or that of the checkpoint's folder for the base: /v1/models, /v1/chat/completions,
/v1/completions. Beside them /health, and /metrics for Prometheus.
"""

import asyncio
import hmac
import ipaddress
import json
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Full
from typing import Any
from urllib.parse import urlsplit

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Http
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from generate.base import style_of
from lit_model.cli import cli
from lit_model.data.examples import chat_ids
from lit_model.data.tokenizer import Tokenizer
from lit_model.engine import Engine, LiveRequest
from lit_model.generate import TextStream, room_after
from lit_model.load import NetworkOptions, named_dirs
from lit_model.methods.side_by_side import n_front
from lit_model.sampling import Sampling

MOST_BYTES = 4 * 2**20  # of a request
MOST_CHOICES = 16
KINDS = {  # of the fields of a request
    **dict.fromkeys(("n", "seed", "max_tokens", "max_completion_tokens", "top_k", "top_logprobs"), (int,)),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), (int, float)),
    **dict(prompt=(str, list), messages=(list,), tools=(list,), stop=(str, list), model=(str,), logprobs=(bool, int)),
    **dict(stream=(bool,), stream_options=(dict,)),
}
PARTS = dict(prompt=int, messages=dict, tools=dict, stop=str)  # of those that are lists
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
}


@dataclass
class Options(NetworkOptions):
    methods: str = ""
    """out_dirs of methods beside the base, with commas between them, perhaps with names: fr=out/fr; folders of PEFT's
    are some, too"""
    host: str = "127.0.0.1"
    """address to listen at; 0.0.0.0: for other machines, too"""
    port: int = 8000
    """port to listen at; 0: a free one"""
    names: str = ""
    """other host names that it is reached by, such as a proxy's, with commas between them"""
    api_key: str | None = None
    """key that clients must name, else that of the environment variable LIT_API_KEY; without one any will do"""
    places: int = 64
    """most answers that are written at a time"""
    queue: int = 256
    """most that wait for a place; more are refused"""
    context: int | None = None
    """most tokens of a prompt and its answer; default: the network's context"""
    slots: int | None = None
    """tokens of all answers that are written; default: what fits into half of the free memory"""


class Refused(Exception):
    """What a client asked for cannot be had."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}
        error = dict(message=message, type=kinds.get(status, "invalid_request_error"), param=param, code=code)
        self.response = JSONResponse(dict(error=error), status, HEADERS)


def main(options: Options) -> None:
    for name, least in (("places", 1), ("queue", 0), ("context", 2), ("slots", 2)):
        if (value := getattr(options, name)) is not None and value < least:
            raise ValueError(f"--{name} is {value}; it must be {least} or more")
    sys.setswitchinterval(5e-4)  # seconds: the thread that decodes waits less for the one that writes answers
    key = os.environ.get("LIT_API_KEY") if options.api_key is None else options.api_key
    is_six = ":" in options.host
    try:  # before the weights are loaded
        family = socket.AF_INET6 if is_six else socket.AF_INET
        listening = socket.create_server((options.host, options.port), family=family)
    except (OSError, OverflowError) as e:
        reason = getattr(e, "strerror", None) or e
        raise ValueError(f"--host {options.host} --port {options.port}: {reason}") from None
    port, served = listening.getsockname()[1], Served(options)
    shown = f"[{options.host}]" if is_six else options.host
    print(f"http://{shown}:{port} answers as {', '.join(served.models)}", flush=True)
    config = uvicorn.Config(app(served, key, options), log_level="warning", server_header=False)
    uvicorn.Server(config).run([listening])


def is_own(host: str, origin: str | None, options: Options) -> bool:
    """Whether the Host and Origin headers of a request name this server; others are those of a page that had its name
    point here, or of a page from elsewhere."""
    names = {name.lower() for name in ("localhost", options.host, socket.gethostname())}
    others = {name.lower() for name in options.names.split(",") if name}
    try:
        name, of_page = (urlsplit(text).hostname for text in (f"//{host}", origin or ""))
        is_mine = name in names | others or bool(ipaddress.ip_address(name or ""))
    except ValueError:
        return False
    return is_mine and (origin is None or origin.partition("://")[2] == host or of_page in others)


class Served:
    """The network, and what it is asked as: `models` has the method and the style behind each name."""

    def __init__(self, options: Options):
        folders = named_dirs(options.methods)
        base = options.checkpoint_dir.resolve().name
        if base in folders:
            raise ValueError(f"{base} is the name of the base: name the method otherwise")
        self.gpt, self.tokenizer = options.load(folders), Tokenizer(options.checkpoint_dir)
        self.models = {base: (None, "chat")} | {name: (name, style_of(path)) for name, path in folders.items()}
        config = self.gpt.config
        self.length = min(n for n in (config.block_size, config.short_context, options.context) if n)
        self.slots = options.slots or min(options.places * self.length, fitting_slots(self.gpt))
        if self.slots < self.length:
            raise ValueError(f"{self.slots} slots are fewer than a context of {self.length}: lower --context")
        self.engine = Engine(self.gpt, options.places, self.slots, self.length, [None, *folders], options.queue)
        self.began = int(time.time())


def fitting_slots(gpt: Any) -> int:
    """Keys and values that fit into half of the free memory."""
    c = gpt.config
    if gpt.device.type == "cuda":
        free = torch.cuda.mem_get_info(gpt.device)[0]
    else:
        stated = Path("/proc/meminfo")  # where there is none, 8 GiB
        found = re.search(r"MemAvailable: *(\d+)", stated.read_text() if stated.exists() else "")
        free = int(found[1]) * 2**10 if found else 2**33
    return int(free / 2 / (2 * c.n_layer * c.n_kv_head * c.head_size * gpt.dtype.itemsize))


def app(served: Served, key: str | None, options: Options) -> Starlette:
    async def guarded(handler: Callable, http: Http) -> Response:
        try:
            if not is_own(http.headers.get("host", ""), http.headers.get("origin"), options):
                raise Refused(403, "this server answers under its own address only, see --names")
            scheme, _, given = http.headers.get("authorization", "").partition(" ")
            is_right = scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), (key or "").encode())
            if key is not None and http.scope["path"].startswith("/v1/") and not is_right:
                raise Refused(401, "the API key is wrong, or there is none", "invalid_api_key")
            return await handler(http)
        except Refused as e:
            return e.response
        except ClientDisconnect:
            return Response()

    async def page(http: Http) -> Response:
        return FileResponse(Path(__file__).with_name("page.html"), headers=HEADERS)

    async def models(http: Http) -> Response:
        more = dict(object="model", created=served.began, owned_by="lit-model")
        found = [dict(id=name, **more) for name in served.models]
        if "name" not in http.path_params:
            return JSONResponse(dict(object="list", data=found))
        known(http.path_params["name"], served)
        return JSONResponse(dict(id=http.path_params["name"], **more))

    async def health(http: Http) -> Response:
        lives = served.engine.thread.is_alive()
        return JSONResponse(dict(status="ok" if lives else "failed"), 200 if lives else 503)

    async def metrics(http: Http) -> Response:
        return PlainTextResponse("".join(f"lit_{name} {value}\n" for name, value in served.engine.metrics().items()))

    async def complete(is_chat: bool, http: Http) -> Response:
        body, loop = await read_body(http), asyncio.get_running_loop()
        answer = await asyncio.to_thread(Answer, served, body, is_chat, loop)  # a long text takes seconds
        if answer.streams:
            return StreamingResponse(answer.events(), media_type="text/event-stream", headers=HEADERS)
        return JSONResponse(await answer.whole(http), headers=HEADERS)

    async def refused(http: Http, e: HTTPException) -> Response:
        return Refused(e.status_code, f"{http.method} {http.url.path:.80}: {e.detail}").response

    routes = {"/": page, "/health": health, "/metrics": metrics, "/v1/models": models, "/v1/models/{name}": models}
    asked = {"/v1/chat/completions": partial(complete, True), "/v1/completions": partial(complete, False)}
    return Starlette(
        routes=[
            Route(path, partial(guarded, handler), methods=["POST" if path in asked else "GET"])
            for path, handler in (routes | asked).items()
        ],
        exception_handlers={HTTPException: refused},
    )


def known(name: Any, served: Served) -> None:
    if name not in served.models:
        there = ", ".join(served.models)
        raise Refused(404, f"there is no model {name!r:.80}; there are {there}", "model_not_found", "model")


async def read_body(http: Http) -> dict[str, Any]:
    data = b""
    async for part in http.stream():
        data += part
        if len(data) > MOST_BYTES:
            raise Refused(413, f"a request has at most {MOST_BYTES} bytes")
    try:
        body = json.loads(data)
        json.dumps(body, ensure_ascii=False).encode()  # half a character is no text
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    body = {name: value for name, value in body.items() if value is not None}
    for name, kinds in KINDS.items():
        value = body.get(name)
        parts = value if isinstance(value, list) and name in PARTS else []
        if name in body and (type(value) not in kinds or any(type(part) is not PARTS[name] for part in parts)):
            raise Refused(400, f"{name} is of another kind: {value!r:.80}", param=name)
    return body


class Answer:
    """The choices of a completion: a chat's next message, or what continues a text."""

    def __init__(self, served: Served, body: dict[str, Any], is_chat: bool, loop: asyncio.AbstractEventLoop):
        """Has the engine begin. Raises Refused."""
        name, self.is_chat, self.tokenizer = body.get("model"), is_chat, served.tokenizer
        known(name, served)
        method, style = served.models[name]
        self.queue = asyncio.Queue()
        put = lambda i, made: loop.call_soon_threadsafe(self.queue.put_nowait, (i, made))  # noqa: E731
        try:
            ids, front = self.prompt(style, body), n_front(served.gpt.slots[method])
            n_new, ways = self.ways(body, room_after(served.gpt, ids, front, served.length))
            stop_ids = {*self.tokenizer.stop_ids, *self.tokenizer.special_ids(self.stops)}
            self.requests = [
                LiveRequest(ids, n_new, way, method, stop_ids=stop_ids, put=partial(put, i))
                for i, way in enumerate(ways)
            ]
            served.engine.submit(self.requests)
        except Full:
            raise Refused(429, "too many requests wait: try again later") from None
        except KeyError as e:
            raise Refused(400, f"{e.args[0]} is missing", param=str(e.args[0])) from None
        except Exception as e:  # whatever a body may hold
            raise Refused(400, " ".join(str(e).split())[:400]) from None
        kind = "chat.completion" if is_chat else "text_completion"
        self.head = dict(id=f"cmpl-{uuid.uuid4().hex}", object=kind, created=int(time.time()), model=name)

    def prompt(self, style: str, body: dict[str, Any]) -> list[int]:
        if self.is_chat:
            parts = [m["content"] if isinstance(m.get("content"), list) else None for m in body["messages"]]
            texts = [{} if of is None else dict(content="".join(part["text"] for part in of)) for of in parts]
            messages = [message | text for message, text in zip(body["messages"], texts)]
            return chat_ids(self.tokenizer, style, messages, body.get("tools"))
        if isinstance(body["prompt"], str):
            return self.tokenizer.bos + self.tokenizer.encode(body["prompt"])
        return body["prompt"]

    def ways(self, body: dict[str, Any], room: int) -> tuple[int, list[Sampling]]:
        """Most new tokens, and how those of each choice are chosen. Raises ValueError or TypeError."""
        n, seed, default = body.get("n", 1), body.get("seed"), room if self.is_chat else min(16, room)
        n_new = body.get("max_completion_tokens", body.get("max_tokens", default))
        for key, value, most in (("n", n, MOST_CHOICES), ("max_tokens", n_new, room)):
            if not 1 <= value <= most:
                raise ValueError(f"{key} is {value}; it must be 1 to {most}")
        stops = body.get("stop", [])
        self.stops = [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop]
        self.logprobs = body.get("logprobs")
        if isinstance(self.logprobs, bool) or self.is_chat:
            self.logprobs = body.get("top_logprobs", 0) if self.logprobs else None
        self.streams = body.get("stream", False)
        self.tells_usage = bool(body.get("stream_options", {}).get("include_usage"))
        names = "temperature", "top_k", "top_p", "min_p", "repetition_penalty"
        way = Sampling(**{key: body[key] for key in names if key in body}, logprobs=self.logprobs)
        ways = [way._replace(seed=None if seed is None else seed + i) for i in range(n)]
        for way in ways:
            way.check()
        return n_new, ways

    async def pieces(self, http: Http | None = None) -> AsyncIterator[tuple[int, str, list, str | None]]:
        """(number of the choice, text, log-probabilities, reason why it ends) as they come. http: of a client that may
        go away meanwhile."""
        open_ones, self.n_made = {*range(len(self.requests))}, 0
        try:
            streams = [TextStream(self.tokenizer, self.stops) for _ in self.requests]
            while open_ones:
                try:
                    i, made = await asyncio.wait_for(self.queue.get(), None if http is None else 1)
                except TimeoutError:
                    made = None
                if http is not None and await http.is_disconnected():
                    return
                if made is None:
                    continue
                if made.error:
                    raise Refused(500, made.error)
                if i not in open_ones:
                    continue
                piece, n = "", 0
                one_by_one = made.logprobs or self.stops
                for tokens in [[token] for token in made.tokens] if one_by_one else [made.tokens]:
                    if not streams[i].is_stopped:
                        piece, n = piece + streams[i].push(*tokens), n + len(tokens)
                self.n_made += n
                finish = "stop" if streams[i].is_stopped else made.finish
                if finish:
                    piece += streams[i].end()
                    open_ones.discard(i)
                    self.requests[i].is_gone = True
                yield i, piece, made.logprobs[:n], finish
        finally:
            for request in self.requests:
                request.is_gone = True

    async def whole(self, http: Http) -> dict[str, Any]:
        texts, logprobs, ends = ([[] for _ in self.requests] for _ in range(3))
        async for i, piece, found, finish in self.pieces(http):
            texts[i].append(piece)
            logprobs[i] += found
            ends[i] = finish
        choices = []
        for i, parts in enumerate(texts):
            text = "".join(parts)
            said = dict(message=dict(role="assistant", content=text)) if self.is_chat else dict(text=text)
            choices.append(dict(index=i, **said, logprobs=self.described(logprobs[i]), finish_reason=ends[i] or "stop"))
        return self.head | dict(choices=choices, usage=self.usage())

    async def events(self) -> AsyncIterator[str]:
        head = self.head | (dict(object="chat.completion.chunk") if self.is_chat else {})
        event = lambda value: f"data: {json.dumps(head | value)}\n\n"  # noqa: E731
        try:
            if self.is_chat:
                for i in range(len(self.requests)):
                    yield event(dict(choices=[dict(index=i, delta=dict(role="assistant", content=""))]))
            async for i, piece, found, finish in self.pieces():
                said = dict(delta=dict(content=piece) if piece else {}) if self.is_chat else dict(text=piece)
                if piece or finish or found:
                    choice = dict(index=i, **said, logprobs=self.described(found), finish_reason=finish)
                    yield event(dict(choices=[choice]))
            if self.tells_usage:
                yield event(dict(choices=[], usage=self.usage()))
            yield "data: [DONE]\n\n"
        except Refused as e:
            yield f"data: {e.response.body.decode()}\n\n"

    def usage(self) -> dict[str, int]:
        n = len(self.requests[0].ids)
        return dict(prompt_tokens=n, completion_tokens=self.n_made, total_tokens=n + self.n_made)

    def described(self, found: list[list[list[float]]]) -> dict[str, Any] | None:
        """Log-probabilities of tokens in OpenAI's form."""
        if self.logprobs is None:
            return None
        text = lambda i: self.tokenizer.decode([int(i)])  # noqa: E731
        one = lambda i, p: dict(token=text(i), logprob=p, bytes=[*text(i).encode()])  # noqa: E731
        tokens, best = [of[0] for of in found], [of[1 : 1 + self.logprobs] for of in found]
        if self.is_chat:
            content = [
                one(*token) | dict(top_logprobs=[one(*of) for of in others]) for token, others in zip(tokens, best)
            ]
            return dict(content=content, refusal=None)
        top = [{text(i): p for i, p in others} for others in best]
        return dict(tokens=[text(i) for i, _ in tokens], token_logprobs=[p for _, p in tokens], top_logprobs=top)


if __name__ == "__main__":
    cli(main, Options, __doc__)
