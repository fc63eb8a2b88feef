"""The dashboard in headless Chromium: what people see, with mouse, keyboard, screen reader and phone, by day and by night.

    WORKER_BINARY=target/debug/scorer python3 tests/dashboard_live.py
    SCREENSHOTS=ops/dashboard WORKER_BINARY=... python3 tests/dashboard_live.py      writes the pictures of the README

Starts its own RabbitMQ and Redis (ops/services). ORT_DYLIB_PATH, PYTHONPATH, chromium and a python3 with what ops/python.txt
names come from ops/setup. What is missing is a failure.
"""

import json
import os
import shutil
import socket
import unittest
import uuid
from urllib.parse import urlsplit

import pika
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright
from scorer_client import Broker, Candidate, Client, Fleet, FleetUnknown, Job

from live_stack import CASES, MODEL, ROOT, SOON_S, VERSION, Binary, Services, eventually

PATIENCE_MS = SOON_S * 1000
HOSTILE = "<img src=x onerror=document.title='broken'>"
browser: Browser
services: Services
binary: Binary


def setUpModule() -> None:
    global browser, services, binary
    playwright = sync_playwright().start()
    unittest.addModuleCleanup(playwright.stop)
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("chromium is missing: ops/setup gets it.")
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    unittest.addModuleCleanup(browser.close)
    services = Services()
    unittest.addModuleCleanup(services.stop)
    binary = Binary(services)


class InTheBrowser(unittest.TestCase):
    """Two workers, one of which has no GPU to run on; candidates that were scored, one that was refused, one parked."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.namespace = f"dashboard-{uuid.uuid4().hex[:8]}"
        for id, provider in (("node1-cpu", "cpu"), ("node2-cuda0", "cuda")):
            worker = binary.worker(cls.namespace, id, engine__execution_provider=provider)
            worker.start()
            cls.addClassCleanup(worker.kill)
        cls.dashboard = binary.dashboard(cls.namespace)
        cls.addClassCleanup(cls.dashboard.kill)
        fleet = Fleet(services.redis, MODEL, cls.namespace)
        eventually("two workers beat, one is ready", lambda: cls.states(fleet) == [False, True])
        cls.watched()
        cls.score(fleet)

    @staticmethod
    def states(fleet: Fleet) -> list[bool]:
        try:
            return sorted(worker.ready for worker in fleet.workers())
        except FleetUnknown:
            return []

    @classmethod
    def watched(cls) -> None:
        """Results that nobody watches are not seen."""
        page = browser.new_page()
        page.goto(cls.dashboard.url)
        expect(page.locator("#parked-count")).to_contain_text("listed since", timeout=PATIENCE_MS)
        page.close()

    @classmethod
    def score(cls, fleet: Fleet) -> None:
        with Client(Broker(services.amqp, MODEL, cls.namespace), fleet) as client:
            for case in json.loads(CASES.read_text())["cases"]:
                if case.get("file") and case["format"] == "binary_v2" and case["model_version"] == VERSION:
                    data = (CASES.parent / case["file"]).read_bytes()
                    candidate = Candidate("binary_v2", case["semantics"], case["learning_rate"], data=data)
                    client.submit(Job(case["name"], VERSION, candidate, nonce="n"))
            client.collect(lambda outcome: None)
        connection = pika.BlockingConnection(pika.URLParameters(services.amqp))
        properties = pika.BasicProperties(message_id=HOSTILE)
        connection.channel().basic_publish(f"{cls.namespace}.jobs", MODEL, b"no job", properties)
        connection.close()

    def open(self, **how: object) -> Page:
        page = browser.new_page(**how)
        self.addCleanup(page.close)
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        self.addCleanup(lambda: self.assertEqual(problems, []))
        page.goto(self.dashboard.url)
        expect(page.get_by_role("status")).to_have_text("1 of 2 workers take jobs.", timeout=PATIENCE_MS)
        expect(page.locator("#parked li")).to_have_count(1, timeout=PATIENCE_MS)
        return page

    def picture(self, page: Page, name: str) -> None:
        if folder := os.environ.get("SCREENSHOTS"):
            page.screenshot(path=ROOT / folder / f"{name}.png")

    def test_it_shows_the_fleet_what_it_judged_and_what_is_parked(self) -> None:
        page = self.open(viewport={"width": 1280, "height": 900})
        rows = page.locator("#workers tr")
        expect(rows).to_have_count(2)
        expect(rows.nth(0)).to_contain_text("serving")
        expect(rows.nth(1)).to_contain_text("ep_unavailable")
        expect(page.locator("#verdicts li").first).to_contain_text("scored")
        expect(page.locator("#deltas")).to_contain_text("candidates")
        expect(page.locator("#versions")).to_contain_text(f"version {VERSION}: 1 workers now", timeout=PATIENCE_MS)
        expect(page.locator("#events")).to_contain_text("warming → ready (serving)")
        self.picture(page, "light")

    def test_what_strangers_write_is_text(self) -> None:
        page = self.open()
        expect(page.locator("#parked li")).to_contain_text(HOSTILE)
        self.assertEqual(page.title(), "scorer")

    def test_one_worker_has_its_history_by_keyboard(self) -> None:
        page = self.open()
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")  # to the workers
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "wide":
            page.keyboard.press("Tab")
        expect(page.get_by_role("button", name="History of node1-cpu")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="History of node1-cpu")).to_be_focused()
        expect(page.locator("#history-events li").first).to_contain_text("ready")
        page.keyboard.press("Escape")
        expect(page.locator("#history")).to_be_hidden()
        expect(page.get_by_role("button", name="History of node1-cpu")).to_be_focused()

    def test_nothing_bars_a_screen_reader_by_day_or_by_night(self) -> None:
        for scheme in ("light", "dark"):
            page = self.open(color_scheme=scheme, bypass_csp=True, viewport={"width": 1280, "height": 900})
            if scheme == "dark":
                self.picture(page, "dark")
            found = Axe().run(page)
            self.assertEqual(found.violations_count, 0, found.generate_report())

    def test_a_phone_shows_it_without_scrolling_sideways(self) -> None:
        page = self.open(viewport={"width": 360, "height": 740})
        width = page.evaluate("document.documentElement.scrollWidth")
        self.assertLessEqual(width, 360)
        self.picture(page, "phone")

    def test_what_is_old_is_called_old(self) -> None:
        dashboard = binary.dashboard(self.namespace)
        page = browser.new_page()
        self.addCleanup(page.close)
        page.goto(dashboard.url)
        expect(page.get_by_role("status")).to_have_text("1 of 2 workers take jobs.", timeout=PATIENCE_MS)
        dashboard.kill()
        expect(page.get_by_role("status")).to_contain_text("does not answer", timeout=PATIENCE_MS)

    def test_a_page_that_finds_no_place_says_so_and_gets_one_later(self) -> None:
        dashboard = binary.dashboard(self.namespace)
        self.addCleanup(dashboard.kill)
        address = urlsplit(dashboard.url)
        others = [socket.create_connection((address.hostname, address.port)) for _ in range(48)]
        for other in others:
            other.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            other.recv(1024)
        page = browser.new_page()
        self.addCleanup(page.close)
        page.goto(dashboard.url)
        expect(page.get_by_role("status")).to_contain_text("48 pages are open", timeout=PATIENCE_MS)
        for other in others:
            other.close()
        expect(page.get_by_role("status")).to_have_text("1 of 2 workers take jobs.", timeout=PATIENCE_MS)


class WithoutServices(unittest.TestCase):
    def test_without_redis_the_fleet_is_unknown_and_nothing_is_green(self) -> None:
        dashboard = binary.dashboard("nobody")
        self.addCleanup(dashboard.kill)
        services.stop_redis()
        self.addCleanup(services.start_redis)
        page = browser.new_page()
        self.addCleanup(page.close)
        page.goto(dashboard.url)
        expect(page.get_by_role("status")).to_contain_text("The fleet is unknown: Redis", timeout=PATIENCE_MS)
        expect(page.locator("#now")).to_contain_text("unknown")
        expect(page.locator(".good")).to_have_count(0)


if __name__ == "__main__":
    unittest.main()
