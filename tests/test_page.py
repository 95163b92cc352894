"""The live page in a real browser, against the whole program."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from starlette.testclient import TestClient

from .fake_hub import FakeHub, Fault, fake_hub
from .models import smollm2_gguf, tiny_gguf
from .serving import Serving, serving

CHROMIUM = shutil.which("chromium")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
--disable-background-networking --disable-component-update --disable-sync""".split()
MODEL = "smollm2-135m-instruct"
MARKUP = "<img src=x onerror=document.title='owned'>"
REPO = "org/tiny"
FILE = f"{REPO}/tiny.gguf"
MB = 2**20
PATIENT_MS = 30_000

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on PATH")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    weights = tiny_gguf(tmp_path_factory.mktemp("tiny")).read_bytes()
    with fake_hub({REPO: {"tiny.gguf": weights}}) as hub:
        yield hub


@pytest.fixture(scope="module")
def program(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """SmolLM2, and a model whose name is markup."""
    home = tmp_path_factory.mktemp("home")
    models = home / ".opta-lmx" / "models" / "test"
    named = tiny_gguf(models / "tiny")
    named.rename(named.with_name(f"{MARKUP}.gguf"))
    (models / "SmolLM2-135M-Instruct-GGUF").mkdir()
    shutil.copy(smollm2_gguf(), models / "SmolLM2-135M-Instruct-GGUF")
    with serving(home, environment={"HF_ENDPOINT": hub.endpoint}) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, program: Serving) -> Iterator[Page]:
    """The page, live. It asks nobody but its own server, and the console stays empty."""
    with browser.new_page() as page:
        asked: list[str] = []
        told: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(error.message))
        page.set_default_timeout(PATIENT_MS)
        page.goto(program.url)
        is_live(page)
        yield page
        assert [url for url in asked if not url.startswith((f"{program.url}/", "data:"))] == []
        assert told == []


def is_live(page: Page) -> None:
    expect(page.locator("#connection")).to_have_text("Live", timeout=PATIENT_MS)


def row(page: Page, name: str) -> Locator:
    """A model's."""
    return page.locator("#models > li").filter(has=page.get_by_text(name, exact=True))


@in_browser
def test_load_chat_unload(page: Page) -> None:
    """A button loads a model, its answer streams until Stop, the charts move, a button unloads."""
    model = row(page, MODEL)
    page.get_by_role("button", name=f"Load {MODEL}").click()
    expect(model.locator(".badge")).to_have_text("ready", timeout=PATIENT_MS)
    page.get_by_label("Model", exact=True).select_option(MODEL)
    message = page.get_by_label("Message")
    message.fill("Write a long story of <b>the sea</b>.")
    message.press("Enter")
    expect(page.locator("#talk .user")).to_have_text("Write a long story of <b>the sea</b>.")
    answer = page.locator("#talk .assistant")
    expect(answer).to_have_text(re.compile(r"\w+ \w+ \w+"), timeout=PATIENT_MS)
    expect(model.locator("dd").first).not_to_have_text("0.0 tok/s", timeout=PATIENT_MS)
    page.get_by_role("button", name="Stop").click()
    status = page.locator("#chat-status")
    expect(status).to_have_text(re.compile(r"^\d+ tokens · [\d.]+ tok/s · first .* s · stopped$"))
    for chart in ("#speed", "#ttft"):
        expect(page.locator(chart)).to_have_text(re.compile(r"max \d*\.?\d*[1-9]"))
        expect(page.locator(f"{chart} svg path").last).to_have_attribute("d", re.compile(r"^M.+"))
    expect(page.locator("#legend")).to_contain_text(MODEL)
    page.get_by_role("button", name=f"Unload {MODEL}").click()
    expect(model.locator(".badge")).to_have_text("available", timeout=PATIENT_MS)


@in_browser
def test_pin(page: Page) -> None:
    """The button keeps a model in memory and lets it go again."""
    pin = page.get_by_role("button", name=f"Pin {MODEL}")
    for pressed in ("true", "false"):
        pin.click()
        expect(pin).to_have_attribute("aria-pressed", pressed)


@in_browser
def test_download(page: Page, hub: FakeHub) -> None:
    """A download shows how far it is, then that it is complete, and the model appears."""
    hub.misbehave(FILE, [Fault(stall=2 * MB)])
    page.get_by_label("Hugging Face repository").fill(REPO)
    page.get_by_role("button", name="Download").click()
    download = page.locator("#downloads > li").filter(has_text=REPO)
    bar = download.get_by_role("progressbar")
    expect(download).to_have_text(re.compile(r"[12] MB of \d+ MB · \d+ \w+/s"), timeout=PATIENT_MS)
    assert 0 < bar.evaluate("bar => bar.value") < bar.evaluate("bar => bar.max")
    expect(download.get_by_role("button", name="Cancel")).to_be_visible()
    hub.released.set()
    expect(download.locator(".badge")).to_have_text("completed", timeout=PATIENT_MS)
    assert bar.evaluate("bar => bar.value === bar.max")
    expect(row(page, "tiny")).to_contain_text("available")


@in_browser
def test_what_is_refused_is_told(browser: Browser, program: Serving) -> None:
    """In the server's own words: what the page itself has asked for, and anybody's last errors."""
    with browser.new_page() as page:
        page.goto(program.url)
        page.get_by_label("Hugging Face repository").fill("org/none")
        page.get_by_role("button", name="Download").click()
        expect(page.get_by_role("alert")).to_contain_text("org/none", timeout=PATIENT_MS)
        page.get_by_role("button", name="Dismiss").click()
        expect(page.get_by_role("alert")).to_be_hidden()
        program.get("/v1/models/none")
        expect(page.locator("#errors")).to_contain_text("model_not_found", timeout=PATIENT_MS)


@in_browser
def test_updates_in_place(page: Page) -> None:
    """What the user has opened stays open, and the focus stays, while numbers change."""
    row(page, MODEL).locator("summary").click()
    before = page.locator("#about").inner_text()
    expect(page.locator("#about")).not_to_have_text(before)
    expect(row(page, MODEL).locator("details")).to_contain_text("Architecture: llama")
    expect(row(page, MODEL).locator("summary")).to_be_focused()


@in_browser
def test_names_are_text(page: Page) -> None:
    """A model's name that is markup is shown as it is."""
    expect(row(page, MARKUP)).to_be_visible()
    assert page.locator("img").count() == 0
    assert page.title() == "Opta-LMX"


@in_browser
def test_phone(page: Page) -> None:
    """On a narrow screen nothing scrolls sideways."""
    page.set_viewport_size({"width": 375, "height": 812})
    assert page.evaluate("document.documentElement.scrollWidth") == 375


@in_browser
def test_dark(page: Page) -> None:
    """The page's colours follow the system's."""
    background = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="light")
    light = page.evaluate(background)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(background) != light


@in_browser
def test_the_key_and_the_end(browser: Browser, tmp_path: Path) -> None:
    """With a key nothing is shown without it; when the server ends, the page says so."""
    config = tmp_path / "config.yaml"
    config.write_text("admin_key: sesame")
    with serving(tmp_path, "--config", str(config)) as server, browser.new_page() as page:
        page.goto(server.url)
        for key, answer in (("open", "does not accept"), ("sesame", None)):
            field = page.get_by_role("textbox", name="Admin key")
            expect(field).to_be_visible(timeout=PATIENT_MS)
            assert page.locator("#models > li").count() == 0
            field.fill(key)
            field.press("Enter")
            if answer:
                expect(page.get_by_role("dialog")).to_contain_text(answer)
        is_live(page)
        page.reload()
        is_live(page)
        server.stop()
        expect(page.locator("#connection")).to_have_text("Disconnected", timeout=PATIENT_MS)


def test_headers(client: TestClient) -> None:
    """The page may run its own script and ask its own server: no more; a second visit costs 304."""
    first = client.get("/")
    assert first.headers["content-type"] == "text/html; charset=utf-8"
    assert first.headers["x-frame-options"] == "DENY"
    rules = first.headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"} < set(rules)
    assert any(rule.startswith("script-src 'sha256-") for rule in rules)
    again = client.get("/", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
