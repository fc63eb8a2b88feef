"""The dashboard in headless Chromium: what people see, with mouse, keyboard, screen reader and phone, by day and by night.

    WORKER_BINARY=target/debug/scorer python3 tests/dashboard_live.py
    SCREENSHOTS=ops/dashboard WORKER_BINARY=... python3 tests/dashboard_live.py      writes the pictures of the documentation

Starts its own RabbitMQ and Redis (ops/services). ORT_DYLIB_PATH, PYTHONPATH, chromium and a python3 with what ops/python.txt
names come from ops/setup. What is missing is a failure.
"""

import json
import os
import re
import shutil
import socket
import unittest
import urllib.request
import uuid
from urllib.parse import urlsplit

import pika
import redis
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from scorer_client import Broker, Candidate, Client, Fleet, FleetUnknown, Job

from live_stack import CASES, MODEL, ROOT, SOON_S, VERSION, Binary, Dashboard, Services, eventually

PATIENCE_MS = SOON_S * 1000
HOSTILE = "<img src=x onerror=document.title='broken'>"
SICK = "1 of 2 workers takes no jobs"
DEMO_WORKERS = 100
DESK = {"width": 1280, "height": 1000}
PHONE = {"width": 360, "height": 740}
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


class WithPages(unittest.TestCase):
    """Opens pages of `dashboard`; a message on the console or an exception in a page fails the test."""

    dashboard: Dashboard

    def open(self, view: str = "", **how: object) -> Page:
        page = browser.new_page(**({"viewport": DESK} | how))
        self.addCleanup(page.close)
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        self.addCleanup(lambda: self.assertEqual(problems, []))
        page.goto(self.dashboard.url + view)
        expect(page.locator("#now dd").first).not_to_be_empty(timeout=PATIENCE_MS)
        return page

    def has_no_barrier(self, page: Page) -> None:
        found = Axe().run(page)
        self.assertEqual(found.violations_count, 0, found.generate_report())

    def fits(self, page: Page) -> None:
        self.assertLessEqual(page.evaluate("document.documentElement.scrollWidth"), PHONE["width"], page.url)


class TheLiveFleet(WithPages):
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
                    cls.submission = case["name"]
            client.collect(lambda outcome: None)
        connection = pika.BlockingConnection(pika.URLParameters(services.amqp))
        properties = pika.BasicProperties(message_id=HOSTILE)
        connection.channel().basic_publish(f"{cls.namespace}.jobs", MODEL, b"no job", properties)
        connection.close()

    def open(self, view: str = "", **how: object) -> Page:
        page = super().open(view, **how)
        expect(page.get_by_role("status")).to_contain_text(SICK, timeout=PATIENCE_MS)
        expect(page.locator("#parked li")).to_have_count(1, timeout=PATIENCE_MS)
        return page

    def test_it_shows_the_fleet_what_it_judged_and_what_is_parked(self) -> None:
        page = self.open()
        expect(page.locator("#demo")).to_be_hidden()
        rows = page.locator("#workers tr")
        expect(rows).to_have_count(2)
        expect(rows.nth(0)).to_contain_text("ep_unavailable")
        expect(rows.nth(1)).to_contain_text("serving")
        expect(page.locator("#findings li.bad")).to_contain_text("ep_unavailable")
        expect(page.locator("#verdicts")).to_contain_text("better")
        expect(page.locator("#charts figure", has_text="Deltas")).to_contain_text("scored candidate", timeout=PATIENCE_MS)
        expect(page.locator("#charts figure", has_text="Versions")).to_contain_text(f"version {VERSION}: 1 worker", timeout=PATIENCE_MS)
        expect(page.locator("#events")).to_contain_text("warming → ready (serving)")

    def test_what_strangers_write_is_text(self) -> None:
        page = self.open()
        expect(page.locator("#parked li")).to_contain_text(HOSTILE)
        page.locator("#parked li a", has_text=HOSTILE).click()
        expect(page.get_by_role("heading", level=1, name=HOSTILE)).to_be_visible()
        self.assertEqual(page.locator("img").count(), 0)
        self.assertEqual(page.title(), f"{HOSTILE} · scorer")

    def test_one_worker_has_its_view_by_keyboard(self) -> None:
        page = self.open()
        page.locator("#map a[tabindex='0']").focus()
        page.keyboard.press("End")
        expect(page.locator("#map a:focus")).to_have_attribute("aria-label", re.compile("^node1-cpu: ready, serving"))
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=1, name="node1-cpu")).to_be_focused()
        expect(page.locator("#worker-says")).to_contain_text("ready: serving", timeout=PATIENCE_MS)
        expect(page.locator("#worker-events li").first).to_contain_text("ready")
        expect(page.locator("#worker-stages")).to_contain_text("forward")
        expect(page.locator("#worker-results")).to_contain_text(self.submission)
        page.keyboard.press("Escape")
        expect(page.locator("#map a:focus")).to_have_attribute("data-worker", "node1-cpu")

    def test_a_sick_worker_says_why(self) -> None:
        page = self.open("#worker/node2-cuda0")
        expect(page.locator("#worker-says")).to_contain_text("degraded: ep_unavailable", timeout=PATIENCE_MS)
        expect(page.locator("#worker-errors li").first).to_contain_text("ep_unavailable")
        expect(page.locator("#worker-links")).to_contain_text("connected")

    def test_one_job_is_found_by_its_submission_id(self) -> None:
        page = self.open()
        page.get_by_label("Submission id").fill(self.submission)
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=1, name=self.submission)).to_be_focused()
        expect(page.locator("#job-verdicts")).to_contain_text("node1-cpu", timeout=PATIENCE_MS)
        expect(page.locator("#job-stored")).to_contain_text("weights_id")
        expect(page.locator("#job-running-none")).to_have_text("No worker computes it now.")
        page.keyboard.press("Escape")
        expect(page.get_by_label("Submission id")).to_be_focused()

    def test_of_a_job_that_nobody_knows_nothing_is_claimed(self) -> None:
        page = self.open("#job/never-sent")
        expect(page.locator("#job-says")).to_have_text("Nothing says what became of it.", timeout=PATIENCE_MS)
        expect(page.locator("#job-verdicts-none")).to_contain_text("None seen since", timeout=PATIENCE_MS)

    def test_nothing_bars_a_screen_reader_by_day_or_by_night(self) -> None:
        for scheme in ("light", "dark"):
            for view in ("", "#worker/node2-cuda0", f"#job/{self.submission}"):
                with self.subTest(scheme=scheme, view=view):
                    self.has_no_barrier(self.open(view, color_scheme=scheme, bypass_csp=True))

    def test_a_phone_shows_it_without_scrolling_sideways(self) -> None:
        for view in ("", "#worker/node2-cuda0", f"#job/{self.submission}"):
            self.fits(self.open(view, viewport=PHONE))

    def test_where_no_merge_was_seen_the_page_says_how_to_get_one(self) -> None:
        page = self.open()
        page.get_by_role("link", name="Merges").click()
        expect(page.get_by_role("heading", level=1, name="Merges")).to_be_focused()
        expect(page.locator("#merges-says")).to_contain_text("No merge was seen since", timeout=PATIENCE_MS)
        expect(page.locator("#merges-none")).to_contain_text("scorer submit --merge")

    def test_a_merge_that_nobody_knows_is_unknown(self) -> None:
        page = browser.new_page()
        self.addCleanup(page.close)
        page.goto(f"{self.dashboard.url}#merge/never-sent")
        expect(page.locator("#merge-says")).to_contain_text("not among the last merges", timeout=PATIENCE_MS)

    def test_contributors_are_shown_only_on_request(self) -> None:
        page = self.open()
        expect(page.locator("#nav-contributors")).to_be_hidden()

    def test_what_is_old_is_called_old(self) -> None:
        dashboard = binary.dashboard(self.namespace)
        page = browser.new_page()
        self.addCleanup(page.close)
        page.goto(dashboard.url)
        expect(page.get_by_role("status")).to_contain_text(SICK, timeout=PATIENCE_MS)
        self.assertNotEqual(green(page), [])
        dashboard.kill()
        expect(page.get_by_role("status")).to_contain_text("does not answer", timeout=PATIENCE_MS)
        self.assertEqual(green(page), [])

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
        expect(page.get_by_role("status")).to_contain_text(SICK, timeout=PATIENCE_MS)


class WhatStrangersWrite(WithPages):
    """Records, events, results and dead-lettered jobs that no worker of ours would write."""

    TURNED = "\u202ereversed"
    VERSIONS = range(1, 12)

    @classmethod
    def setUpClass(cls) -> None:
        cls.namespace = f"strangers-{uuid.uuid4().hex[:8]}"
        example = ROOT / "schemas/examples/valid"
        cls.record = json.loads((example / "heartbeat.v1-ready.json").read_text())
        cls.result = json.loads((example / "score_result.v1-scored.json").read_text()) | {"model": MODEL}
        cls.merged = json.loads((example / "score_result.v1-merge.json").read_text())
        cls.refused = cls.merged["members"][1] | {"id": "<i>empty</i>"}
        cls.beat()
        connection = pika.BlockingConnection(pika.URLParameters(services.amqp))
        cls.channel = connection.channel()
        for name, kind in (("results", "topic"), ("dead", "direct")):
            arguments = {"alternate-exchange": f"{cls.namespace}.results.unrouted"} if name == "results" else None
            cls.channel.exchange_declare(f"{cls.namespace}.{name}", kind, durable=True, arguments=arguments)
        cls.dashboard = binary.dashboard(cls.namespace, "--contributors", "miner_id")
        cls.addClassCleanup(cls.dashboard.kill)
        page = browser.new_page()
        page.goto(cls.dashboard.url)
        expect(page.locator("#parked-count")).to_contain_text("listed since", timeout=PATIENCE_MS)
        page.close()
        for at, miner in enumerate((None, cls.TURNED, "others")):
            cls.score(f"s{at}", {} if miner is None else {"miner_id": miner})
        cls.score("huge", {"miner_id": "others"}, delta=-1e300, ci95=[-1e308, -1e300])
        cls.merge("many", [member(f"5HGjWAeFDfFCWPsjFQdVV2Msvz2XtMktvgocEZcCj68kUM{at:02}", 1e-5 * at, 9e-6 * at) for at in range(64)], large=True)
        cls.merge("any-size", [member("a", 1e308, 1e308), member("b", -1e308, -1e-308), member("c" * 128, 0, 0)])
        cls.merge("fallen", [member("<b>copy</b>", 8e-4, 1e-4), member("copied", 8e-4, 2e-4), member("own", 6e-4, 5.9e-4), cls.refused])
        for _ in range(3):
            cls.channel.basic_publish(f"{cls.namespace}.dead", MODEL, b"", pika.BasicProperties(message_id="thrice"))
        connection.close()

    @classmethod
    def beat(cls) -> None:
        with redis.Redis.from_url(services.redis) as store:
            prefix = f"{cls.namespace}:{{{MODEL}}}"
            for version in cls.VERSIONS:
                id = f"w{version}"
                record = cls.record | {"worker_id": id, "incarnation": id, "state_detail": f"{'long' * 5000}{id}"}
                record["model"] = record["model"] | {"name": MODEL, "version": version}
                if version == cls.VERSIONS[-1]:
                    record["update"] = record["update"] | {"live_version": 12, "failure": "version 12 was tried: <b>canary</b> not met"}
                store.set(f"{prefix}:worker:{id}", json.dumps(record))
                # A score of the future: it stays alive.
                store.zadd(f"{prefix}:workers", {id: 1e15})
            store.xadd(f"{prefix}:events", {"worker_id": "w1", "to": "hidden", "from": HOSTILE, "at": "never"})
            # Said before the page's first look, by whoever missed it.
            seconds, micros = store.time()
            store.xadd(f"{prefix}:events", {"worker_id": "gone", "from": "", "to": "lost", "detail": "record_expired", "at": seconds * 1000 + micros // 1000})
            store.hset(f"{prefix}:crash:many:{cls.VERSIONS[-1]}", "w1/i1", f"{seconds * 1000} m<3>")

    @classmethod
    def score(cls, id: str, context: dict[str, str], **fields: object) -> None:
        body = json.dumps(cls.result | {"submission_id": id, "context": context} | fields).encode()
        properties = pika.BasicProperties(content_type="application/json", message_id=f"{id}:{VERSION}:scored:{id}")
        cls.channel.basic_publish(f"{cls.namespace}.results", f"{MODEL}.scored", body, properties)

    @classmethod
    def merge(cls, id: str, members: list[dict[str, object]], large: bool = False) -> None:
        gap = cls.merged["gap"] | {"large": large}
        body = cls.merged | {"model": MODEL, "submission_id": id, "members": members, "gap": gap}
        properties = pika.BasicProperties(content_type="application/json", message_id=f"{id}:{VERSION}:scored:{id}")
        for _ in range(2):  # Delivery is at least once.
            cls.channel.basic_publish(f"{cls.namespace}.results", f"{MODEL}.scored", json.dumps(body).encode(), properties)

    def test_members_are_shown_by_contribution_and_copies_fall(self) -> None:
        page = self.open("#merges")
        rows = page.locator("#merges tr")
        expect(rows).to_have_count(3, timeout=PATIENCE_MS)
        expect(rows.nth(0)).to_contain_text("small")
        expect(rows.nth(2)).to_contain_text("large")
        rows.nth(0).get_by_role("link", name="fallen").focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=1, name="fallen")).to_be_focused()
        members = page.locator("#merge-members tr")
        expect(members.locator("th")).to_have_text(["own", "copied", "<b>copy</b>"], timeout=PATIENCE_MS)
        widths = members.evaluate_all("rows => rows.map((row) => ['.own', '.alone'].map((part) => row.querySelector(part).getBoundingClientRect().width))")
        fallen = [own < alone / 3 for own, alone in widths]
        self.assertEqual(fallen, [False, True, True], widths)
        expect(members.nth(1)).to_contain_text("25 %")
        expect(page.locator("#merge-left-out li")).to_have_text("<i>empty</i> candidate_empty")
        expect(page.locator("#merge-gap")).to_be_hidden()
        self.assertEqual(page.locator("#main b:text-is('copy'), #main i").count(), 0)
        page.get_by_role("button", name="Alone", exact=True).click()
        expect(page.locator("#merge-head [aria-sort]")).to_have_text("Alone")
        page.keyboard.press("Escape")
        expect(rows.nth(0).get_by_role("link", name="fallen")).to_be_focused()

    def test_a_merge_of_any_size_is_drawn_and_a_large_gap_is_said(self) -> None:
        page = self.open("#merge/many")
        expect(page.locator("#merge-members tr")).to_have_count(64, timeout=PATIENCE_MS)
        expect(page.locator("#merge-gap")).to_contain_text("a guide here, not a measure")
        page = self.open("#merge/any-size", viewport=PHONE)
        expect(page.locator("#merge-members th")).to_have_text(["a", "c" * 128, "b"], timeout=PATIENCE_MS)
        places = page.locator(".lane span").evaluate_all("bars => bars.map(({ style }) => style.left).filter(Boolean)")
        self.assertEqual([place for place in places if not 0 <= float(place.removesuffix("%")) <= 100], [])
        self.fits(page)

    def test_nothing_bars_a_screen_reader_from_a_merge(self) -> None:
        for scheme in ("light", "dark"):
            for view in ("#merges", "#merge/many", "#merge/fallen"):
                with self.subTest(scheme=scheme, view=view):
                    page = self.open(view, color_scheme=scheme, bypass_csp=True)
                    expect(page.locator("#main tbody tr:visible").first).to_be_visible(timeout=PATIENCE_MS)
                    self.has_no_barrier(page)

    def test_a_phone_shows_merges_without_scrolling_sideways(self) -> None:
        for view in ("#merges", "#merge/many", "#merge/fallen"):
            page = self.open(view, viewport=PHONE)
            expect(page.locator("#main tbody tr:visible").first).to_be_visible(timeout=PATIENCE_MS)
            self.fits(page)

    def test_a_job_that_is_a_merge_leads_to_its_members(self) -> None:
        page = self.open("#job/fallen")
        page.get_by_role("link", name="what each is worth").click()
        expect(page.get_by_role("heading", level=1, name="fallen")).to_be_focused()

    def test_contributors_without_a_name_are_told_from_one_who_has_a_strange_one(self) -> None:
        page = self.open("#contributors")
        names = page.locator("#contributors th")
        expect(names).to_have_text(["others", "\ufffdreversed", "without miner_id"], timeout=PATIENCE_MS)

    def test_equal_dead_letters_without_a_reason_are_all_shown(self) -> None:
        page = self.open("#job/thrice")
        expect(page.locator("#job-parked .card")).to_have_count(3, timeout=PATIENCE_MS)
        expect(page.locator("#job-says")).to_have_text("Dead-lettered: without a reason.")

    def test_an_update_that_failed_is_said_of_the_fleet_and_of_its_worker(self) -> None:
        page = self.open()
        says = "1 worker does not serve the live version 12: version 12 was tried: <b>canary</b> not met"
        expect(page.locator("#findings")).to_contain_text(says, timeout=PATIENCE_MS)
        page = self.open("#worker/w11")
        expect(page.locator("#worker-warning")).to_contain_text("The live version is not served: version 12 was tried: <b>canary</b> not met.")
        expect(page.locator("#worker-model")).to_contain_text("Live version")

    def test_a_worker_that_only_others_missed_is_lost(self) -> None:
        page = self.open()
        expect(page.locator("#findings")).to_contain_text("1 worker vanished: killed, frozen, or cut off from Redis", timeout=PATIENCE_MS)
        expect(page.locator("#map a[data-worker='gone']")).to_have_attribute("aria-label", re.compile("^gone: lost"))
        expect(page.locator("#events")).to_contain_text("gone lost (record_expired)")

    def test_a_job_that_is_computed_says_which_member_is_measured(self) -> None:
        page = self.open("#job/many")
        expect(page.locator("#job-running")).to_contain_text("w1 has been computing it", timeout=PATIENCE_MS)
        expect(page.locator("#job-running")).to_contain_text("measures m<3>")

    def test_many_versions_have_a_name_each(self) -> None:
        page = self.open()
        chart = page.locator("#charts figure", has_text="Versions")
        expect(chart).to_contain_text("older versions: 3 workers", timeout=PATIENCE_MS)
        expect(chart.locator(".values")).to_contain_text("v11")
        expect(chart.locator(".values")).not_to_contain_text("volder")

    def test_a_value_alone_and_one_of_any_size_are_drawn(self) -> None:
        page = self.open()
        latency = page.locator("#charts figure", has_text="Latency by stage")
        expect(latency.locator(".values")).to_contain_text("total", timeout=PATIENCE_MS)
        eventually("a dot", lambda: has_colour(latency, "series-4"))
        deltas = page.locator("#charts figure", has_text="Deltas")
        expect(deltas).to_contain_text("1 worse", timeout=PATIENCE_MS)
        eventually("a mark below zero", lambda: has_colour(deltas, "series-2"))
        eventually("marks above zero", lambda: has_colour(deltas, "good"))

    def test_a_long_reason_and_a_strange_event_leave_the_page_in_shape(self) -> None:
        page = self.open(viewport=PHONE)
        expect(page.locator("#events li").last).to_contain_text(HOSTILE, timeout=PATIENCE_MS)
        self.assertEqual(page.locator("#events .hidden").count(), 0)
        self.fits(page)
        self.assertLess(page.locator("#map").bounding_box()["height"], PHONE["height"])


class TheDemo(WithPages):
    """A simulated fleet of a hundred workers."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.dashboard = binary.demo(DEMO_WORKERS)
        cls.addClassCleanup(cls.dashboard.kill)

    def open(self, view: str = "", **how: object) -> Page:
        page = super().open(view, **how)
        expect(page.locator("#demo")).to_contain_text("Nothing here is real", timeout=PATIENCE_MS)
        return page

    @staticmethod
    def shown(page: Page) -> int:
        return page.locator("#map a").count()

    @staticmethod
    def figure(page: Page, title: str) -> Locator:
        return page.locator("#charts figure").filter(has=page.get_by_role("heading", name=title))

    def test_it_says_in_large_letters_that_nothing_is_real(self) -> None:
        page = self.open()
        expect(page.locator("#demo")).to_have_text(f"DEMO: a simulated fleet of {DEMO_WORKERS} workers. Nothing here is real.")
        size = page.evaluate("(of) => parseFloat(getComputedStyle(document.querySelector(of)).fontSize)", "#demo")
        self.assertGreaterEqual(size, 20)

    def test_each_worker_has_one_cell_and_the_sick_come_first(self) -> None:
        page = self.open()
        expect(page.locator("#map a")).not_to_have_count(0)
        # At once: the map is made anew every second.
        labels = page.locator("#map a").evaluate_all("cells => cells.map((cell) => cell.getAttribute('aria-label'))")
        self.assertEqual(len({label.split(":")[0] for label in labels}), len(labels))
        ready = [": ready, serving" in label for label in labels]
        self.assertEqual(ready, sorted(ready))
        self.assertIn(False, ready)
        self.assertIn(True, ready)

    def test_the_filter_is_about_the_map_and_the_table_and_every_word_counts(self) -> None:
        page = self.open()
        everyone = self.shown(page)
        page.get_by_label("Filter").first.fill("ready serving")
        eventually("fewer are shown", lambda: 0 < self.shown(page) < everyone)
        expect(page.locator("#shown")).to_have_text(re.compile(r"^\d+ of \d+$"))
        expect(page.locator("#workers tr").first).to_contain_text("serving")
        expect(page.get_by_label("Filter").first).to_be_focused()
        page.keyboard.type(" no-such-word")
        expect(page.locator("#map-none")).to_have_text("No worker matches the filter.")
        expect(page.locator("#workers tr")).to_have_count(0)
        page.keyboard.press("Escape")
        eventually("everyone is shown", lambda: self.shown(page) >= everyone)

    def test_a_finding_leads_to_its_workers(self) -> None:
        page = self.open()
        finding = page.locator("#findings button").first
        words = finding.get_attribute("data-filter")
        assert words is not None
        finding.click()
        expect(page.get_by_label("Filter").first).to_have_value(words)
        expect(page.locator("#shown")).to_have_text(re.compile(r"^[1-9]\d* of \d+$"))

    def test_the_map_is_one_tab_stop_with_arrow_keys(self) -> None:
        page = self.open()
        expect(page.locator("#map a[tabindex='0']")).to_have_count(1)
        page.locator("#map a[tabindex='0']").focus()
        first = page.locator("#map a").first.get_attribute("data-worker")
        focused = page.locator("#map a:focus")
        page.keyboard.press("End")
        last = page.locator("#map a").last.get_attribute("data-worker")
        assert first is not None and last is not None
        expect(focused).to_have_attribute("data-worker", last)
        page.keyboard.press("ArrowUp")
        expect(focused).not_to_have_attribute("data-worker", last)
        page.keyboard.press("Home")
        expect(focused).to_have_attribute("data-worker", first)
        expect(page.get_by_role("tooltip")).to_contain_text(first)
        page.keyboard.press("ArrowRight")
        expect(focused).not_to_have_attribute("data-worker", first)
        expect(page.locator("#map a[tabindex='0']")).to_have_count(1)
        page.keyboard.press("Escape")
        expect(page.get_by_role("tooltip")).to_be_hidden()

    def test_the_table_is_sorted_by_its_headers_and_shows_more(self) -> None:
        page = self.open()
        expect(page.locator("#workers tr")).to_have_count(20)
        page.get_by_role("button", name=re.compile("^Show .* more$")).first.click()
        expect(page.locator("#workers tr")).not_to_have_count(20)
        page.locator("#workers-head button", has_text="Worker").click()
        expect(page.locator("#workers-head th").first).to_have_attribute("aria-sort", "ascending")
        names = page.locator("#workers tr th").all_inner_texts()
        self.assertEqual(names, sorted(names))
        page.locator("#workers-head button", has_text="Worker").click()
        expect(page.locator("#workers-head th").first).to_have_attribute("aria-sort", "descending")
        expect(page.locator("#workers tr th").first).not_to_have_text(names[0])

    def test_a_click_on_a_sick_worker_tells_why(self) -> None:
        page = self.open()
        cell = page.locator("#map .degraded a").first
        id = cell.get_attribute("data-worker")
        cell.click()
        expect(page.get_by_role("heading", level=1)).to_have_text(str(id))
        expect(page.locator("#worker-says")).to_contain_text("degraded", timeout=PATIENCE_MS)
        expect(page.locator("#worker-errors li").first).not_to_be_empty()
        expect(page.locator("#worker-warm")).to_contain_text("Attempts")
        expect(page.locator("#worker-engine")).to_contain_text("Nodes on the device")

    def test_a_chart_has_axes_hover_values_and_the_same_in_words(self) -> None:
        page = self.open()
        chart = self.figure(page, "Throughput")
        expect(chart.locator(".when")).to_have_text("latest", timeout=PATIENCE_MS)
        drawing = chart.locator(".canvas")
        drawing.hover(position={"x": 300, "y": 80})
        expect(chart.locator(".when")).to_have_text(re.compile(r"^\d\d:\d\d:\d\d$"))
        # The cursors of all charts go together.
        expect(self.figure(page, "Devices").locator(".when")).to_have_text(re.compile(r"^\d\d:\d\d:\d\d$"))
        expect(drawing).to_have_attribute("aria-label", re.compile(r"^Throughput: .* jobs/s now"))

    def test_what_is_so_now_is_the_same_in_tile_table_and_chart_for_every_range(self) -> None:
        page = self.open()
        page.locator("#workers-head").get_by_role("button", name="p95").click()
        for title, latest in (("10 min", "latest"), ("1 day", "latest 5 min")):
            page.locator("#ranges").get_by_role("button", name=title, exact=True).click()
            chart = self.figure(page, "Throughput")
            expect(chart.locator(".when")).to_have_text(latest, timeout=PATIENCE_MS)
            expect(chart.locator("figcaption")).to_contain_text(f"in {title}", timeout=PATIENCE_MS)
            # At once: all of it is shown anew every second.
            said = page.evaluate("""() => {
                const figure = (title) => document.querySelector(`#chart-${title}`).closest("figure");
                const tile = (name) => [...document.querySelectorAll("#now > div")].find((tile) => tile.children[0].textContent === name);
                const words = (title) => figure(title).querySelector("figcaption").textContent;
                return {
                    rate: tile("Throughput").querySelector("span").textContent, throughput: words("throughput"),
                    p95: document.querySelector("#workers tr").cells[6].textContent, latency: words("latency-by-stage"),
                    alive: tile("Ready").querySelector("small").textContent, versions: words("versions"),
                };
            }""")
            self.assertTrue(said["throughput"].startswith(f"{said['rate']} jobs/s now"), said)
            self.assertIn(f"p95 of the slowest {said['p95']};", said["latency"])
            workers = sum(int(workers) for workers in re.findall(r"(\d+) worker", said["versions"]))
            self.assertEqual(f"of {workers}", said["alive"], said)

    def test_a_chart_is_read_with_the_arrow_keys(self) -> None:
        page = self.open()
        chart = self.figure(page, "Queue")
        expect(chart.locator(".when")).to_have_text("latest", timeout=PATIENCE_MS)
        chart.locator(".canvas").focus()
        page.keyboard.press("Home")
        expect(chart.locator(".when")).to_have_text(re.compile(r"^\d\d:\d\d:\d\d$"))

    def test_one_control_sets_the_range_of_all_charts(self) -> None:
        page = self.open()
        for title in ("1 h", "8 h", "1 day", "10 min"):
            button = page.locator("#ranges").get_by_role("button", name=title, exact=True)
            button.click()
            expect(button).to_have_attribute("aria-pressed", "true")
            expect(page.locator("#ranges [aria-pressed='true']")).to_have_count(1)
            expect(self.figure(page, "Throughput").locator("figcaption")).to_contain_text(f"in {title}", timeout=PATIENCE_MS)

    def test_latency_is_shown_by_stage_as_p50_or_p95(self) -> None:
        page = self.open()
        chart = self.figure(page, "Latency by stage")
        expect(chart.locator(".values")).to_contain_text("forward", timeout=PATIENCE_MS)
        chart.get_by_role("button", name="p50").click()
        expect(chart.get_by_role("button", name="p50")).to_have_attribute("aria-pressed", "true")
        expect(chart.locator(".values")).to_contain_text("total")

    def test_a_delta_leads_to_its_job(self) -> None:
        page = self.open()
        chart = self.figure(page, "Deltas")
        expect(chart.locator("canvas")).to_be_visible(timeout=PATIENCE_MS)
        chart.locator(".canvas").focus()
        page.keyboard.press("ArrowLeft")
        expect(chart.locator(".tip")).to_contain_text(re.compile("better|worse|unclear"))
        id = chart.locator(".tip b").inner_text()
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=1, name=id)).to_be_focused()
        expect(page.locator("#job-verdicts .card").first).to_contain_text("Trace id", timeout=PATIENCE_MS)
        expect(page.locator("#job-stored-none")).to_contain_text("simulated")
        page.keyboard.press("Escape")
        expect(chart.locator(".canvas")).to_be_focused()

    def test_who_sends_copies_is_named(self) -> None:
        page = self.open()
        page.get_by_role("link", name="Contributors").click()
        expect(page.get_by_role("heading", level=1, name="Contributors")).to_be_focused()
        expect(page.locator("#contributors-says")).to_contain_text("Likely copies from", timeout=PATIENCE_MS)
        copier = page.locator("#contributors tr").first
        name = copier.locator("th").inner_text()
        expect(page.locator("#contributors-says")).to_contain_text(name)
        page.locator("#contributors-filter").fill(name)
        expect(page.locator("#contributors-shown")).to_have_text(re.compile(r"^\d+ of \d+$"))
        page.locator("#contributors-head button", has_text="Submissions").click()
        expect(page.locator("#contributors-head [aria-sort]")).to_have_attribute("aria-sort", "descending")

    def test_merges_are_listed_and_their_copies_fall(self) -> None:
        page = self.open()
        page.get_by_role("link", name="Merges").click()
        expect(page.get_by_role("heading", level=1, name="Merges")).to_be_focused()
        expect(page.locator("#merges")).to_contain_text("large", timeout=PATIENCE_MS)
        page.goto(f"{self.dashboard.url}#merge/{self.copies()}")
        copier = page.locator("#merge-members tr", has_text="miner-17")
        expect(copier).to_be_visible(timeout=PATIENCE_MS)
        own, alone = (copier.locator(part).bounding_box()["width"] for part in (".own", ".alone"))
        self.assertLess(own, alone / 2)

    def test_nothing_bars_a_screen_reader_by_day_or_by_night(self) -> None:
        id = self.some_worker()
        for scheme in ("light", "dark"):
            for view in ("", f"#worker/{id}", "#job/unheard-of", "#contributors", "#merges"):
                with self.subTest(scheme=scheme, view=view):
                    page = self.open(view, color_scheme=scheme, bypass_csp=True)
                    self.drawn(page, view)
                    self.has_no_barrier(page)

    def test_a_phone_shows_it_without_scrolling_sideways(self) -> None:
        id = self.some_worker()
        for view in ("", f"#worker/{id}", "#job/unheard-of", "#contributors", "#merges"):
            page = self.open(view, viewport=PHONE)
            self.drawn(page, view)
            self.fits(page)

    def test_pictures(self) -> None:
        id = self.some_worker()
        views = [("fleet-light", "", "light", DESK), ("fleet-dark", "", "dark", DESK), ("worker", f"#worker/{id}", "light", DESK),
                 ("merge", f"#merge/{self.copies()}", "light", DESK), ("contributors", "#contributors", "dark", DESK), ("phone", "", "light", {"width": 390, "height": 844})]
        for name, view, scheme, viewport in views:
            page = self.open(view, color_scheme=scheme, viewport=viewport)
            self.drawn(page, view)
            expect(page.get_by_role("heading", level=1)).to_have_count(1)
            if folder := os.environ.get("SCREENSHOTS"):
                page.screenshot(path=ROOT / folder / f"{name}.png")

    def some_worker(self) -> str:
        """A sick one: it has more to show."""
        page = self.open()
        id = page.locator("#map .degraded a").first.get_attribute("data-worker")
        assert id is not None
        return id

    def copies(self) -> str:
        """A merge of which two members are copies of a third."""
        answer = urllib.request.urlopen(f"{self.dashboard.url}merges")
        merges = [merge["submission_id"] for merge in json.load(answer)["merges"]]

        def has_copies(id: str) -> bool:
            members = json.load(urllib.request.urlopen(f"{self.dashboard.url}merge?id={id}"))["members"]
            return {"miner-03", "miner-11", "miner-17"} <= {member["id"] for member in members}

        return next(filter(has_copies, merges))

    @staticmethod
    def drawn(page: Page, view: str) -> None:
        match view.split("/")[0]:
            case "#worker":
                expect(page.locator("#worker-charts canvas")).to_have_count(2, timeout=PATIENCE_MS)
            case "#merges":
                expect(page.locator("#merges tr").first).to_be_visible(timeout=PATIENCE_MS)
            case "#merge":
                expect(page.locator("#merge-members tr").first).to_be_visible(timeout=PATIENCE_MS)
            case "#contributors":
                expect(page.locator("#contributors tr").first).to_be_visible(timeout=PATIENCE_MS)
            case "#job":
                expect(page.locator("#job-says")).to_have_text("Nothing says what became of it.", timeout=PATIENCE_MS)
            case _:
                expect(page.locator("#charts canvas")).to_have_count(7, timeout=PATIENCE_MS)


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
        expect(page.locator("#now dd:not(.sub)")).to_have_text([re.compile("unknown")] * 8)
        self.assertEqual(green(page), [])


def member(id: str, alone: float, contribution: float) -> dict[str, object]:
    """Of a merge, on the same windows as the others."""
    change = {"delta": alone, "stderr": abs(alone) / 10}
    own = {"value": contribution, "stderr": abs(contribution) / 10, "ci95": [contribution - abs(contribution) / 5, contribution + abs(contribution) / 5]}
    return {"id": id, "status": "scored", "weight": 0.25, "alone": change, "last": change, "contribution": own}


def has_colour(figure: Locator, name: str) -> bool:
    """Whether the drawing of a chart has a pixel of a colour of the style sheet."""
    return figure.locator("canvas").evaluate("""(canvas, name) => {
        const of = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
        const wanted = [1, 3, 5].map((at) => parseInt(of.slice(at, at + 2), 16));
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        for (let at = 0; at < data.length; at += 4) if (wanted.every((part, i) => data[at + i] === part) && data[at + 3] === 255) return true;
        return false;
    }""", name)


def green(page: Page) -> list[str]:
    """The elements that have the colour of what is well."""
    return page.evaluate("""() => {
        // Outside of the body, whose class may change the colours.
        const probe = document.documentElement.appendChild(document.createElement("i"));
        probe.style.color = "var(--good)";
        const good = getComputedStyle(probe).color;
        probe.remove();
        const colours = (node, part) => { const style = getComputedStyle(node, part); return [style.color, style.backgroundColor, style.borderTopColor]; };
        const all = [...document.body.querySelectorAll("*")].filter((node) => node.checkVisibility());
        return all.filter((node) => [null, "::before"].some((part) => colours(node, part).includes(good))).map((node) => node.outerHTML);
    }""")


if __name__ == "__main__":
    unittest.main()
