"""The page of a rotation in a real browser, under a strict Content-Security-Policy."""

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client

from rotator.models import Control, Rotation
from tests.acceptance.audit import audited_tickets, slow_down, speed_up
from tests.acceptance.harness import Commands, Running, wait_for_checkpoints, wait_until

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed.")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="There is no Chromium with its driver: install chromium-driver."
)

# A minute, if no test speeds it up: browsers start slowly on a busy machine.
ROWS = 40_000
TARGET = "tickets.Ticket.token"


class Browser:
    """A Chromium that is logged in, with one rotation's page."""

    def __init__(self, site: str, cookie: str, *, has_scripts: bool = True) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        if not has_scripts:
            options.add_experimental_option(
                "prefs", {"profile.managed_default_content_settings.javascript": 2}
            )
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver: Any = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self._site = site
        self.complaints: list[str] = []
        # A cookie needs a page of its site.
        self.driver.get(f"{site}/static/rotator/rotator.css")
        self.driver.add_cookie({"name": "sessionid", "value": cookie})

    def open(self, rotation: Rotation, query: str = "") -> None:
        self.driver.get(f"{self._site}/admin/rotator/rotation/{rotation.pk}/change/{query}")

    def find(self, selector: str) -> Any:  # noqa: ANN401 - selenium ships no types that are checked here
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str = "body") -> str:
        return str(self.find(selector).text)

    def wait_for(self, text: str, selector: str = "#rotator", *, seconds: float = 60) -> None:
        """Wait until the page shows a text, given as a regular expression."""

        def is_shown() -> bool:
            self.complaints += [each["message"] for each in self.driver.get_log("browser")]
            shown = self.driver.execute_script(
                "return document.querySelector(arguments[0])?.textContent || ''", selector
            )
            return re.search(text, shown) is not None

        wait_until(is_shown, f"the page shows {text!r}", seconds=seconds)

    def press(self, request: str) -> None:
        self.find(f"button[name=request][value={request}]").click()

    def close(self) -> None:
        self.complaints += [each["message"] for each in self.driver.get_log("browser")]
        self.driver.quit()


@pytest.fixture
def browsers(commands: Commands, live_server: Any, settings: Any) -> Iterator[Any]:  # noqa: ANN401, ARG001
    settings.MIDDLEWARE = ["tests.acceptance.strict_csp.strict_csp", *settings.MIDDLEWARE]
    client = Client()
    client.force_login(User.objects.create_superuser("alice"))
    opened = list[Browser]()

    def start(*, has_scripts: bool = True) -> Browser:
        opened.append(Browser(live_server.url, client.cookies["sessionid"].value, has_scripts=has_scripts))
        return opened[-1]

    yield start
    for browser in opened:
        browser.close()
        assert [text for text in browser.complaints if "Content Security Policy" in text] == []
        assert [text for text in browser.complaints if "rotator.js" in text] == []


@pytest.fixture
def running(commands: Commands) -> Running:
    """A rotation that takes long."""
    audited_tickets(ROWS)
    slow_down(0.05)
    started = commands.start("--batch=20", "--concurrency=2")
    wait_for_checkpoints(5)
    return started


@pytest.mark.slow
def test_it_is_watched_and_steered(browsers: Any, running: Running) -> None:  # noqa: ANN401
    browser: Browser = browsers()
    browser.open(Rotation.objects.get())
    browser.wait_for("Moving: ", "#rotator-headline")

    browser.press("pause")
    browser.wait_for("Not moving: paused by alice", "#rotator-headline")
    browser.wait_for("paused: revision 1 by alice at .*, applied")

    browser.find("details:has(#rotator-pace) summary").click()
    browser.find("#rotator-workers").send_keys("1")
    browser.press("set")
    browser.wait_for("paused, concurrency 1: revision 2 by alice at .*, applied")

    browser.press("resume")
    browser.wait_for("Moving: ", "#rotator-headline")

    browser.find("details:has(#rotator-target) summary").click()
    browser.find("#rotator-target").send_keys(TARGET)
    browser.press("cancel")
    browser.wait_for("Not moving: interrupted, cancelled by alice", "#rotator-headline")
    browser.wait_for(f"async_rotate {TARGET}", ".rotator-command")
    assert "No process works on this rotation" in browser.text()
    assert running.wait().status == 130


@pytest.mark.slow
def test_it_is_watched_to_its_end(browsers: Any, running: Running) -> None:  # noqa: ANN401
    browser: Browser = browsers()
    browser.open(Rotation.objects.get())
    browser.wait_for("Moving: ", "#rotator-headline")
    speed_up()
    browser.wait_for("Completed", "#rotator-headline")
    assert running.wait().status == 0
    assert browser.text("[data-text=percent]") == "100%"
    assert browser.text("[data-text=eta]") == "completed"
    assert "completed" in browser.text("[data-log]")


@pytest.mark.slow
@pytest.mark.usefixtures("running")
def test_the_older_of_two_tabs_is_refused(browsers: Any) -> None:  # noqa: ANN401
    one, other = browsers(), browsers()
    for browser in (one, other):
        browser.open(Rotation.objects.get())
    other.find("details:has(#rotator-pace) summary").click()
    other.find("#rotator-workers").send_keys("1")
    one.press("pause")
    one.wait_for("paused by alice")
    # The other tab shows the pause, but its form is based on what it showed before.
    other.wait_for("Not moving: paused by alice", "#rotator-headline")
    other.press("set")
    other.wait_for("alice has changed this rotation since you have seen it", ".messagelist")
    assert Control.objects.get().concurrency is None


@pytest.mark.slow
def test_the_death_of_the_owner_is_shown(browsers: Any, running: Running) -> None:  # noqa: ANN401
    browser: Browser = browsers()
    browser.open(Rotation.objects.get())
    browser.wait_for("Moving: ", "#rotator-headline")
    running.kill()
    browser.wait_for("Not moving: no heartbeat for ", "#rotator-headline", seconds=15)
    assert "has ended." in browser.text()
    assert not browser.find("button[value=pause]").is_displayed()


@pytest.mark.slow
@pytest.mark.usefixtures("running")
def test_it_works_without_scripts_and_on_a_small_screen(browsers: Any) -> None:  # noqa: ANN401
    browser: Browser = browsers(has_scripts=False)
    rotation = Rotation.objects.get()

    def is_moving() -> bool:
        # Without scripts, only another request shows that the rate is known now.
        browser.open(rotation, "?still")
        return "Moving: " in browser.text("#rotator-headline")

    wait_until(is_moving, "the page shows that it moves")
    assert "This page does not reload." in browser.text()
    browser.press("pause")
    wait_until(lambda: Control.objects.get().paused, "it is paused")

    small: Browser = browsers()
    small.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True},
    )
    small.open(rotation)
    small.wait_for("paused by alice", "#rotator-headline")
    assert small.driver.execute_script("return document.documentElement.scrollWidth") <= 360
