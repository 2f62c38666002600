"""The playground, and pages of other origins, in a real browser."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.served import (
    AUTHORIZED,
    CHAT,
    HIGH,
    KEY,
    OTHER_ORIGIN,
    PAGE_ORIGIN,
    USER,
    WAIT_SECONDS,
)

ASK_FROM_PAGE = """async ([url, key, body]) => {
  const headers = {"Authorization": `Bearer ${key}`, "Content-Type": "application/json"};
  const answer = await fetch(url, {method: "POST", headers, body: JSON.stringify(body)});
  const text = await answer.text();
  return [answer.status, answer.headers.get("x-cpt-configuration"), text];
}"""


class EmptyPage(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("origin", [PAGE_ORIGIN, OTHER_ORIGIN], ids=["let-in", "not-let-in"])
def test_a_page_of_another_origin_asks_and_reads_if_it_is_let_in(url: str, browser: Any, origin: str) -> None:
    with ThreadingHTTPServer(("127.0.0.1", int(origin.rpartition(":")[2])), EmptyPage) as pages:
        threading.Thread(target=pages.serve_forever, daemon=True).start()
        page = browser.new_page()
        page.goto(f"{origin}/")
        body = {"model": "cpt:poet", "messages": USER, "max_tokens": 2}
        if origin == PAGE_ORIGIN:
            status, applied, text = page.evaluate(ASK_FROM_PAGE, [url + CHAT, KEY, body])
            assert (status, applied) == (200, '{"ornament": "high"}')
            assert json.loads(text)["choices"]
            status, _, text = page.evaluate(ASK_FROM_PAGE, [url + CHAT, "wrong", body])
            assert (status, json.loads(text)["error"]["code"]) == (401, "invalid_api_key")
        else:
            with pytest.raises(Exception, match="Failed to fetch"):
                page.evaluate(ASK_FROM_PAGE, [url + CHAT, KEY, body])
        page.close()
        pages.shutdown()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_dials_streams_and_says_what_is_wrong(
    url: str, browser: Any, width: int, scheme: str, tmp_path: Path
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(120_000)
    broken: list[str] = []
    page.on("pageerror", lambda error: broken.append(str(error)))
    elsewhere: list[str] = []
    page.on("request", lambda request: request.url.startswith((url, "data:")) or elsewhere.append(request.url))
    page.goto(f"{url}/playground")

    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    page.get_by_text("Incorrect or missing API key").wait_for()
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")

    slider = page.get_by_role("slider", name="Ornament")
    slider.focus()
    page.keyboard.press("End")
    assert page.locator("#directive").inner_text() == HIGH
    page.keyboard.press("Home")
    assert page.locator("#directive").inner_text() == HIGH.replace("high", "low")
    page.get_by_label("Saved configuration").select_option("poet")
    assert page.locator("#directive").inner_text() == HIGH

    page.keyboard.press("Control+Enter")
    done = page.locator(".pane small", has_text="tokens")
    done.nth(1).wait_for()
    assert [done.nth(at).inner_text().partition(" ·")[0] for at in (0, 1)] == ["no directive", "ornament high"]
    assert all(len(text) > 40 for text in page.locator(".pane p").all_inner_texts())
    page.screenshot(path=tmp_path / "compared.png", full_page=True)

    page.get_by_role("button", name="Ladder of").click()
    done.nth(2).wait_for()
    assert page.locator(".pane h3").all_inner_texts() == ["low", "mid", "high"]
    page.get_by_role("button", name="Copy as curl").click()
    code = page.locator("#code").inner_text().replace("$CPT_API_KEY", KEY)
    said = subprocess.run(code, shell=True, capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert json.loads(said.stdout)["configuration"]["applied"] == {"ornament": "high"}
    page.get_by_role("button", name="Copy as Python").click()
    code = page.locator("#code").inner_text()
    env = os.environ | {"CPT_API_KEY": KEY}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_SECONDS, env=env)
    assert ran.stdout.split() == json.loads(said.stdout)["choices"][0]["message"]["content"].split()

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=tmp_path / "ladder.png", full_page=True)
    assert (broken, elsewhere) == ([], [])
    page.close()


def test_picks_on_the_page_move_the_dial_and_change_the_answer(url: str, browser: Any, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 1250})
    page.set_default_timeout(120_000)
    broken: list[str] = []
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.goto(f"{url}/playground")
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Connect").click()
    page.get_by_text("System message, sampling").click()
    page.get_by_label("Tokens").fill("12")
    page.get_by_role("button", name="Offer me two answers").click()
    belief, answers = page.locator("#belief"), []
    for number in (1, 2, 3):
        page.get_by_text(f"High {number - 1}.").wait_for()
        page.locator("#pair article", has_text="High").get_by_role("button").click()
        page.get_by_text(f"After {number} choice").wait_for()
        page.locator("#panes small", has_text="tokens").wait_for()
        answers.append([page.locator(f"#panes {part}").inner_text() for part in ("small", "p")])
    assert "Ornament high" in belief.inner_text()
    assert "do not know" not in belief.inner_text()
    assert page.get_by_label("Ornament", exact=True).last.input_value() == "2"
    assert page.locator("#directive").inner_text() == HIGH
    assert "no directive" in answers[0][0]
    assert "ornament high" in answers[-1][0]
    assert answers[0][1] != answers[-1][1]
    page.screenshot(path=tmp_path / "picked.png", full_page=True)
    kept = f"{url}/v1/preferences/{page.evaluate('preferences')}"
    assert httpx.get(kept, headers=AUTHORIZED).status_code == 200
    page.get_by_role("button", name="Forget my choices").click()
    page.get_by_text("Your choices are deleted.").wait_for()
    assert httpx.get(kept, headers=AUTHORIZED).status_code == 404
    page.get_by_role("button", name="Offer me two answers").click()
    page.locator("#pair article").first.get_by_role("button").click()
    page.get_by_text("After 1 choice").wait_for()
    page.evaluate("preferences += '0'")
    page.locator("#pair article").first.get_by_role("button").click()
    page.get_by_text("There are no such preferences").wait_for()
    assert page.get_by_role("button", name="Offer me two answers").is_enabled()
    page.get_by_role("button", name="Forget my choices").click()
    page.get_by_text("Your choices are deleted.").wait_for()
    page.get_by_label("API key").fill("cpt\u2013key")
    page.get_by_role("button", name="Connect").click()
    page.get_by_text("This key has a character that no key has").wait_for()
    assert not broken
    page.close()
