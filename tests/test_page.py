"""The page of the server, in a real Chromium. `pytest -m slow tests/test_page.py` takes the pictures in docs/."""

import re
import shutil
import time

import pytest
from conftest import ROOT
from test_serve import Running, folders  # noqa: F401  a fixture

from generate import serve
from lit_model.engine import Engine
from lit_model.weights import demo

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def running(tiny, folders):  # noqa: F811
    server = Running(tiny / "base", folders, places=4, context=300)
    yield server
    server.server.should_exit = True


@pytest.fixture
def page(browser, running):
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(running.url)
    page.wait_for_selector("option", state="attached")
    yield page
    page.close()
    assert not errors


def ask(page, question: str) -> None:
    page.fill("textarea", question)
    page.press("textarea", "Enter")


def ended(page) -> None:
    """Both sides have ended: until then the page takes no other question."""
    page.wait_for_selector("button.main:text-is('Send')")


def test_both_answer_as_they_do_alone(page, running):
    assert not page.is_visible("[name=key]")
    assert page.eval_on_selector_all("select", "all => all.map(one => one.value)") == ["base", "fr"]
    page.select_option("select >> nth=1", "de")
    page.fill("[name=tokens]", "40")
    ask(page, "Say so")
    ended(page)
    how = dict(messages=[dict(role="user", content="Say so")], temperature=0, max_tokens=40)
    for name, answer in zip(("base", "de"), page.query_selector_all(".answer"), strict=True):
        alone = running.client.chat.completions.create(model=name, **how).choices[0].message.content
        assert answer.text_content() == alone
    assert all("tokens/s" in speed for speed in page.locator(".speed").all_inner_texts())
    ask(page, "And now?")  # a second turn, with what was said before
    ended(page)
    assert page.locator(".answer").count() == 4
    page.click("[name=reset]")
    assert page.locator(".answer").count() == 0


def test_what_a_network_says_is_text(page, running, monkeypatch):
    evil = "<script>document.title = 'evil'</script><img src=x onerror=\"document.title='evil'\">"
    monkeypatch.setattr(serve.TextStream, "push", lambda self, token: evil)
    page.fill("[name=tokens]", "2")
    ask(page, "Say so")
    ended(page)
    assert page.locator(".answer").first.text_content() == evil * 2
    assert page.locator(".log script, .log img").count() == 0 and page.title() != "evil"


def test_errors_are_shown_and_escape_stops(page, running, monkeypatch):
    page.fill("[name=tokens]", "100000")
    ask(page, "Say so")
    ended(page)
    assert "max_tokens is 100000" in page.locator(".error").first.inner_text()
    page.fill("[name=tokens]", "150")
    slow = Engine._step
    monkeypatch.setattr(Engine, "_step", lambda self: (time.sleep(0.05), slow(self)))
    ask(page, "Say so")
    page.locator(".answer", has_text=re.compile(".")).first.wait_for()
    page.keyboard.press("Escape")
    ended(page)
    assert running.is_idle()


def test_a_key_is_asked_for_and_used(browser, tiny):
    server = Running(tiny / "base", {}, key="secret", places=2, context=100)
    page = browser.new_page()
    page.goto(server.url)
    page.wait_for_selector(".error")
    page.fill("[name=key]", "secret")
    page.press("[name=key]", "Tab")
    page.wait_for_selector("option", state="attached")
    page.fill("[name=tokens]", "5")
    ask(page, "Say so")
    ended(page)
    assert page.locator(".answer").first.text_content()
    server.server.should_exit = True


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(page, width):
    page.set_viewport_size(dict(width=width, height=700))
    page.fill("[name=tokens]", "20")
    ask(page, "word" * 30)
    ended(page)
    assert page.locator(".answer").count() == 2
    assert page.evaluate(
        "document.documentElement.scrollWidth <= innerWidth && document.body.scrollHeight <= innerHeight"
    )


@pytest.mark.slow
def test_pictures(browser):
    """SmolLM2 beside what `python finetune/lora.py` has trained: light, dark, and as wide as a phone."""
    if not (ROOT / "out/lora/lit_method.safetensors").exists():
        pytest.skip("run python finetune/lora.py first")
    server = Running(demo.DEMO_CHECKPOINT, dict(lora=ROOT / "out/lora"), places=4, context=512)
    for name, scheme, width, height in (
        ("light", "light", 1100, 640), ("dark", "dark", 1100, 640), ("phone", "light", 390, 780)
    ):  # fmt: skip
        page = browser.new_page(color_scheme=scheme, viewport=dict(width=width, height=height))
        page.goto(server.url)
        page.wait_for_selector("option", state="attached")
        page.fill("[name=tokens]", "80")
        ask(page, "Give three tips for staying healthy.")
        ended(page)
        page.screenshot(path=ROOT / f"docs/chat-{name}.png")
        page.close()
    server.server.should_exit = True
