"""Data by URL or from a file: resumed, checked, and ready to finetune on. The server is on the loopback."""

import hashlib
import json
import re
import runpy
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, fail, say

from lit_model.data.rows import read_rows
from lit_model.weights import demo
from scripts import prepare

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
        prepare.fetch_url(f"{url}/a", tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists() and (tmp_path / "a.bin.partial").stat().st_size == 700_000
    Server.cut = None
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    assert prepare.fetch_url(f"{url}/a", tmp_path / "a.bin", sha256).read_bytes() == CONTENT
    assert Server.asked == [0, 700_000] and not (tmp_path / "a.bin.partial").exists()
    prepare.fetch_url(f"{url}/a", tmp_path / "a.bin")
    assert len(Server.asked) == 2


def test_what_is_not_what_it_should_be_is_thrown_away(url, tmp_path):
    with pytest.raises(ValueError, match="has the sha256 .* instead of 00: it was thrown away"):
        prepare.fetch_url(f"{url}/a", tmp_path / "a.bin", "00")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="gone cannot be fetched .*404"):
        prepare.fetch_url(f"{url}/gone", tmp_path / "a.bin")
    with pytest.raises(ValueError, match="cannot be fetched"):
        prepare.fetch_url("http://127.0.0.1:1/x", tmp_path / "a.bin")


def test_each_set_is_made_of_a_file_that_one_has(tmp_path, capsys, monkeypatch):
    (tmp_path / "alpaca.json").write_text(json.dumps([dict(instruction="a", input="", output="ß")]))
    (tmp_path / "dolly.jsonl").write_text('{"instruction": "a", "context": "b", "response": "c", "category": "d"}\n')
    (tmp_path / "book.txt").write_text("one\n\ntwo\n")
    for name, source, out, rows in (
        ("alpaca", "alpaca.json", "x/a.json", [dict(instruction="a", input="", output="ß")]),
        ("dolly", "dolly.jsonl", "x/d.json", [dict(instruction="a", input="b", output="c")]),
        ("text", "book.txt", "x/t.txt", [dict(text="one\n\ntwo")]),
    ):
        args = f"--name {name} --source {tmp_path / source} --out {tmp_path / out}"
        assert f"saved {tmp_path / out}: 1 rows" in say(prepare, capsys, monkeypatch, args)
        assert read_rows(tmp_path / out) == rows
        wrong = f"--name {name} --source {tmp_path / source} --out {tmp_path}/w --sha256 00"
        assert "has the sha256" in fail(prepare, capsys, monkeypatch, wrong) and not (tmp_path / "w").exists()
        assert "is there already; remove it" in fail(prepare, capsys, monkeypatch, args)
        missing = f"--name {name} --source {tmp_path}/none{out[-5:]} --out {tmp_path}/y.json"
        assert "is not there" in fail(prepare, capsys, monkeypatch, missing)
    (tmp_path / "dolly.jsonl").write_text('{"instruction": "a"}\n')
    for name, source, says in (
        ("dolly", "dolly.jsonl", "dolly.jsonl, line 1: .*KeyError: 'context'"),
        ("text", "alpaca.json", "alpaca.json: .*KeyError: 'text'"),
    ):
        args = f"--name {name} --source {tmp_path / source} --out {tmp_path}/z.json"
        assert re.search(says, fail(prepare, capsys, monkeypatch, args)) and not (tmp_path / "z.json").exists()
    assert "--name is 'alpac'; it must be one of alpaca, dolly, text" in fail(
        prepare, capsys, monkeypatch, "--name alpac"
    )


def test_a_set_without_a_source_comes_from_its_url(url, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "SETS", {"text": ("text.txt", f"{url}/input.txt")})
    monkeypatch.setattr("test_prepare.CONTENT", b"one\n\ntwo\n")
    assert "saved data/text.txt: 1 rows" in say(prepare, capsys, monkeypatch, "--name text")


def test_the_name_is_given_by_its_place(tmp_path, capsys, monkeypatch):
    (tmp_path / "book.txt").write_text("one\n")
    args = ["text", "--source", f"{tmp_path}/book.txt", "--out", f"{tmp_path}/out.txt"]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *args])
    runpy.run_path(str(ROOT / "scripts/prepare.py"), run_name="__main__")
    assert capsys.readouterr().out == f"saved {tmp_path}/out.txt: 1 rows\n"


def test_the_demo_is_fetched_once_however_many_want_it(tmp_path, monkeypatch):
    """As torchrun starts them: threads with a file of their own each are to flock what processes are."""
    fetched = []

    def fetch(asset, folder):
        fetched.append(asset)
        time.sleep(0.5)
        (folder / "rows.json").write_text("[1]")
        return folder / "rows.json"

    monkeypatch.setattr(demo, "DEMO_DATA", tmp_path / "data/demo.json")
    monkeypatch.setattr(demo, "fetch", fetch)
    with ThreadPoolExecutor(4) as threads:
        wanted = [threads.submit(demo.fetch_demo_data) for _ in range(4)]
        assert [w.result().read_text() for w in wanted] == ["[1]"] * 4
    assert fetched == [demo.DATA]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [".lock", "demo.json"]
