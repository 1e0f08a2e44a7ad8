"""nanopath/chat.html in Chromium without a window, against tests/fake_engine.py. Skips where there is no browser.
NANOPATH_SHOTS=FOLDER keeps the screenshots."""
import os
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import uvicorn

from conftest import ROOT
from fake_engine import FakeEngine
from nanopath.api import build_app
from nanopath.limits import Settings

browser = pytest.importorskip("browser", reason="pipes to a browser need a POSIX system")
pytestmark = pytest.mark.skipif(not browser.find_browser(), reason="no Chromium or Chrome")
HTML = (ROOT / "nanopath/chat.html").read_text(encoding="utf-8")
SAYS = 'The <b onclick="alert(1)">cat</b> & <script>alert(2)</script> sät 😀 on the mat.'


def start_server(engine, **settings):
    """(server, its address)"""
    app = build_app(engine, engine.tokenizer, Settings(log=lambda line: None, **settings))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    return server, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


@pytest.fixture(scope="module")
def page():
    engine = FakeEngine()
    engine.says = SAYS
    server, address = start_server(engine)
    view = browser.Browser()
    yield SimpleNamespace(engine=engine, view=view, address=address)
    view.close()
    server.should_exit = True


def shot(page, name, tmp_path):
    page.view.screenshot(Path(os.environ.get("NANOPATH_SHOTS", tmp_path), f"{name}.png"))


def open_page(page, path="/", **how):
    page.view.open(page.address + path, **how)
    page.view.wait("document.getElementById('model').options.length === 2")


def ask(page, text):
    page.view.run("document.getElementById('input').focus()")
    page.view.type(text)
    page.view.run("document.getElementById('send').click()")


def test_the_page_needs_nothing_from_outside_and_reads_no_html():
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|https?://(?!www\.w3\.org)|@import|<link rel=.stylesheet|src=", HTML)
    script = re.search(r"// ---- the engine, live\n(.*?)// ---- start", HTML, re.DOTALL)[1]
    assert script.count("\n") <= 150
    assert max(map(len, HTML.splitlines())) <= 120


def test_a_chat(page, tmp_path):
    view, engine = page.view, page.engine
    open_page(page)
    shot(page, "empty", tmp_path)
    ask(page, "<img src=x onerror=alert(1)>")
    view.wait("!running && current().messages.length === 2")
    assert view.run("document.querySelector('.assistant').textContent").startswith(SAYS)
    assert view.run("document.querySelector('.user').textContent") == "<img src=x onerror=alert(1)>"
    assert view.run("document.querySelectorAll('#log b, #log img, #log script').length") == 0
    assert view.run("current().messages[1].tokens.map(t => t[0]).join('')") == SAYS
    x, y = view.run("(() => { const box = document.querySelectorAll('.token')[3].getBoundingClientRect(); return [box.x + box.width / 2, box.y + 8]; })()")
    view.point(x, y)
    assert view.run("!document.getElementById('tip').hidden") and "▸ 60.7%" in view.run("document.getElementById('tip').textContent")
    shot(page, "hover", tmp_path)
    view.point(5, 700)

    engine.delay = 0.05                                            # stop in the middle
    ask(page, "again")
    view.wait("running && current().messages[3].content.length > 5")
    assert view.run("document.getElementById('send').textContent") == "Stop"
    engine.delay = 0.5                                             # the server may hear of it late
    view.run("document.getElementById('send').click()")
    view.wait("!running")
    assert 5 < len(view.run("current().messages[3].content")) < len(SAYS) and view.run("current().messages[3].note") == "stopped"
    end = time.monotonic() + 20
    while engine.rows:
        assert time.monotonic() < end
        time.sleep(0.02)
    engine.delay = 0.0
    assert engine.ended[-1].finish_reason == "cancelled"

    view.run("document.getElementById('parameters').open = true")
    for name, value in (("system", "Be brief."), ("temperature", "0.5"), ("max_tokens", "7"), ("seed", "3")):
        view.run(f"document.getElementById('{name}').value = '{value}'; document.getElementById('{name}').dispatchEvent(new Event('change', {{bubbles: true}}))")
    view.run("document.getElementById('new').click()")
    ask(page, "third")
    view.wait("!running && current().messages.length === 2")
    prompt, limit, options, *_ = engine.submitted[-1]
    assert (limit, options["temperature"], options["seed"]) == (7, 0.5, 3)
    assert "system\nBe brief." in engine.tokenizer.decode(prompt) and "again" not in engine.tokenizer.decode(prompt)
    assert "limit of tokens" in view.run("current().messages[1].note")

    open_page(page, scheme="dark")                                 # kept in the browser
    assert view.run("state.chats.map(chat => chat.title)") == ["third", "<img src=x onerror=alert(1)>"]
    assert view.run("document.getElementById('system').value") == "Be brief."
    view.run("document.querySelectorAll('#chats li')[1].firstChild.click(); document.getElementById('shade').click(); document.getElementById('parameters').open = true")
    assert view.run("document.querySelectorAll('.message').length") == 4
    assert view.run("getComputedStyle(document.body).backgroundColor") == "rgb(25, 23, 20)"
    shot(page, "dark", tmp_path)
    view.run("document.querySelectorAll('#chats li')[0].lastChild.click()")
    assert view.run("JSON.parse(localStorage.getItem('nanopath')).chats.length") == 1
    assert view.errors == []


def test_errors_are_shown(page):
    view = page.view
    open_page(page)
    view.run("document.getElementById('max_tokens').value = '-1'")
    ask(page, "x")
    view.wait("!running && document.querySelector('.error') !== null")
    assert "max_tokens" in view.run("document.querySelector('.error').textContent")
    view.run("document.getElementById('max_tokens').value = ''")
    view.errors.clear()                                            # Chromium notes the status 400


def test_a_phone(page, tmp_path):
    view = page.view
    for path, name in (("/", "phone"), ("/engine", "phone-engine")):
        open_page(page, path, width=390, height=780, mobile=True)
        assert view.run("document.documentElement.scrollWidth") <= 390
        assert view.run("[...document.querySelectorAll('header *, form *, #engine *')].every(node => node.getBoundingClientRect().right <= 390)")
        shot(page, name, tmp_path)
    view.run("document.getElementById('menu').click()")
    assert view.run("getComputedStyle(document.querySelector('aside')).display") == "flex"
    view.run("document.getElementById('parameters').open = true")
    shot(page, "phone-menu", tmp_path)
    view.point(380, 400, press=True)
    assert view.run("getComputedStyle(document.querySelector('aside')).display") == "none"


def test_every_control_has_a_name(page):
    open_page(page)
    nodes = page.view.call("Accessibility.getFullAXTree")["nodes"]
    controls = [node for node in nodes if node.get("role", {}).get("value") in ("button", "textbox", "combobox", "spinbutton", "checkbox")]
    assert len(controls) >= 8 and all(node["name"]["value"] for node in controls)


def test_the_engine_live(page, tmp_path):
    view, engine = page.view, page.engine
    open_page(page, "/engine")
    assert view.run("document.querySelector('#batch').textContent") == "idle"
    engine.delay, engine.says = 0.03, "word " * 60
    threads = [threading.Thread(target=httpx.post, args=(f"{page.address}/v1/completions",), kwargs=dict(
        json=dict(prompt="the cat " * (3 + 7 * i), max_tokens=100), timeout=60)) for i in range(11)]
    for thread in threads:
        thread.start()
    view.wait("document.querySelectorAll('#batch .row').length === 8 && document.querySelectorAll('#queue .row').length === 3")
    time.sleep(0.5)
    assert "8 of 8" in view.run("document.getElementById('numbers').textContent")
    painted = view.run("""(() => { const c = document.getElementById('pool'), data = c.getContext('2d').getImageData(0, 0, c.width, c.height).data, seen = new Set();
        for (let i = 0; i < data.length; i += 4) if (data[i + 3] === 255) seen.add(data.slice(i, i + 3).join()); return [...seen]; })()""")
    assert {"207,138,99", "140,51,18", "185,196,168"} <= set(painted)     # used, shared, kept
    shot(page, "engine", tmp_path)
    open_page(page, "/engine", scheme="dark", width=390, height=780, mobile=True)
    view.wait("document.querySelectorAll('#batch .row').length > 0")
    shot(page, "engine-phone-dark", tmp_path)
    engine.delay, engine.says = 0.0, SAYS
    for thread in threads:
        thread.join()
    view.run("document.getElementById('show-chat').click()")
    assert view.run("location.pathname") == "/" and view.run("timer") is None
    assert view.errors == []


def test_a_model_that_continues_and_needs_a_key(page, tmp_path):
    view, engine = page.view, FakeEngine()
    engine.says = " sät on the 😀 mat"
    server, address = start_server(engine, chat=False, keys={"a": "key-of-a-1"})
    view.open(address + "/")
    view.wait("document.querySelector('#log .error') !== null")
    assert "no API key was given" in view.run("document.getElementById('log').textContent")
    view.run("document.getElementById('key').value = 'key-of-a-1'; document.getElementById('key').dispatchEvent(new Event('change', {bubbles: true}))")
    view.wait("document.getElementById('input').placeholder === 'Text to continue'")
    for text in ("The cat", ". And then"):
        ask(page, text)
        view.wait("!running && current().messages.at(-1).note")
    assert view.run("current().messages.at(-1).tokens.map(token => token[0]).join('')") == engine.says
    assert engine.tokenizer.decode(engine.submitted[-1][0]) == f"The cat{engine.says}. And then"
    shot(page, "continues", tmp_path)
    server.should_exit = True
