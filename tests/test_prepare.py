"""Data by URL or from a file: resumed, checked, and ready to finetune on. The server is on the loopback."""

import hashlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import fail, say

from lit_model.weights import demo as hub
from lit_model.data.rows import read_rows
from scripts import prepare_alpaca, prepare_dolly, prepare_text

CONTENT = bytes(range(256)) * 5000


class Server(BaseHTTPRequestHandler):
    cut = None  # bytes after which it hangs up
    asked: list = []

    def do_GET(self):
        begin = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.asked.append(begin)
        if self.path == "/gone":
            return self.send_error(404)
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(CONTENT) - begin))
        self.end_headers()
        self.wfile.write(CONTENT[begin : Server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Server.cut, Server.asked = None, []
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_download_goes_on_where_it_was_cut_off(url, tmp_path):
    Server.cut = 700_000
    with pytest.raises(ValueError, match="cannot be fetched|ended after 700000 of 1280000 bytes"):
        hub.fetch_url(f"{url}/a", tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists() and (tmp_path / "a.bin.partial").stat().st_size == 700_000
    Server.cut = None
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    assert hub.fetch_url(f"{url}/a", tmp_path / "a.bin", sha256).read_bytes() == CONTENT
    assert Server.asked == [0, 700_000] and not (tmp_path / "a.bin.partial").exists()
    hub.fetch_url(f"{url}/a", tmp_path / "a.bin")
    assert len(Server.asked) == 2


def test_what_is_not_what_it_should_be_is_thrown_away(url, tmp_path):
    with pytest.raises(ValueError, match="has the sha256 .* instead of 00: it was thrown away"):
        hub.fetch_url(f"{url}/a", tmp_path / "a.bin", "00")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="gone cannot be fetched .*404"):
        hub.fetch_url(f"{url}/gone", tmp_path / "a.bin")
    with pytest.raises(ValueError, match="cannot be fetched"):
        hub.fetch_url("http://127.0.0.1:1/x", tmp_path / "a.bin")


def test_each_script_makes_rows_of_a_file_that_one_has(tmp_path, capsys, monkeypatch):
    (tmp_path / "alpaca.json").write_text(json.dumps([dict(instruction="a", input="", output="ß")]))
    (tmp_path / "dolly.jsonl").write_text('{"instruction": "a", "context": "b", "response": "c", "category": "d"}\n')
    (tmp_path / "book.txt").write_text("one\n\ntwo\n")
    for module, source, out, rows in (
        (prepare_alpaca, "alpaca.json", "x/a.json", [dict(instruction="a", input="", output="ß")]),
        (prepare_dolly, "dolly.jsonl", "x/d.json", [dict(instruction="a", input="b", output="c")]),
        (prepare_text, "book.txt", "x/t.txt", [dict(text="one\n\ntwo")]),
    ):
        args = f"--source {tmp_path / source} --out {tmp_path / out}"
        assert f"saved {tmp_path / out}: 1 " in say(module, capsys, monkeypatch, args)
        assert read_rows(tmp_path / out) == rows
        wrong = f"--source {tmp_path / source} --out {tmp_path}/w --sha256 00"
        assert "has the sha256" in fail(module, capsys, monkeypatch, wrong) and not (tmp_path / "w").exists()
        assert "is there already; remove it" in fail(module, capsys, monkeypatch, args)
        missing = f"--source {tmp_path}/none{out[-5:]} --out {tmp_path}/y.json"
        assert "is not there" in fail(module, capsys, monkeypatch, missing)
    (tmp_path / "dolly.jsonl").write_text('{"instruction": "a"}\n')
    args = f"--source {tmp_path}/dolly.jsonl --out {tmp_path}/z.json"
    assert "dolly.jsonl, line 1: no row of instruction" in fail(prepare_dolly, capsys, monkeypatch, args)


def test_the_demo_is_fetched_once_however_many_want_it(tmp_path, monkeypatch):
    """As torchrun starts them: threads with a file of their own each are to flock what processes are."""
    fetched = []

    def fetch(asset, folder):
        fetched.append(asset)
        time.sleep(0.5)
        (folder / "rows.json").write_text("[1]")
        return folder / "rows.json"

    monkeypatch.setattr(hub, "DEMO_DATA", tmp_path / "data/demo.json")
    monkeypatch.setattr(hub, "fetch", fetch)
    with ThreadPoolExecutor(4) as threads:
        wanted = [threads.submit(hub.fetch_demo_data) for _ in range(4)]
        assert [w.result().read_text() for w in wanted] == ["[1]"] * 4
    assert fetched == [hub.DATA]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [".lock", "demo.json"]
