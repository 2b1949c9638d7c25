"""The status page in a real browser, while a real training runs."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import grpc
import pytest
import torch
from selenium import webdriver
from selenium.webdriver.common.by import By

from skfac.service.stages import STAGES
from skfac.v1 import preconditioning_pb2 as pb
from skfac.v1 import preconditioning_pb2_grpc as rpc
from tests.support.raw_client import RawClient, snapshot_of
from tests.support.servers import LONG_S, ServerProcess, start, wait_for_line
from tests.support.values import layer_spec, session_spec

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

MARKUP = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
JOB, LAYER = f"job {MARKUP}", f"layer \"'</td>{MARKUP}‮"
PHONE, DESK = (375, 812), (1280, 900)

# The contrast of WCAG 2 of each element with text of its own, least first.
CONTRASTS = """
const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) =>
  0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const ground = (e) => {
  for (; e; e = e.parentElement) {
    const c = numbers(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c;
  }
  return [255, 255, 255];
};
const own = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
const shown = (e) => own(e) && e.checkVisibility() && !e.closest("noscript");
return [...document.querySelectorAll("body *")].filter(shown).map((e) => {
  const style = getComputedStyle(e);
  const text = e instanceof SVGElement ? style.fill : style.color;
  const [one, other] = [light(numbers(text)), light(ground(e))];
  const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  return [ratio, e.tagName, e.textContent.slice(0, 40)];
}).sort((a, b) => a[0] - b[0]);
"""

# What reaches over the right edge; heads are cut away where cells have labels.
WIDE = """
const over = (e) => e.getBoundingClientRect().right > innerWidth + 0.5;
const shown = (e) => e.checkVisibility() && !e.closest("thead");
return [...document.querySelectorAll("body *")].filter((e) => shown(e) && over(e))
  .map((e) => e.outerHTML);
"""

ROWS = """
return [...document.querySelectorAll(`#${arguments[0]} tbody tr`)].map(
  (tr) => [...tr.cells].map((td) => td.textContent));
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(metrics_address="127.0.0.1:0", lease_s=3600) as process:
        yield process


@pytest.fixture(scope="module")
def trainer(server):
    process = start("-m", "tests.support.trainer", server.address)
    try:
        wait_for_line(process.stdout, "Trained 20 steps")
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def hostile(server):
    """A session with names that are markup, and a snapshot that is refused."""
    spec = session_spec(layer_spec(LAYER, 6, 3), job=JOB, lag=1, on_late="wait")
    with RawClient(server.address, spec) as client:
        client.versions_of(4)
        good = snapshot_of(spec, 5)
        rows = good.layers[0]
        nan = replace(rows, derivatives=torch.full_like(rows.derivatives, torch.nan))
        (answer,) = client.push(*client.frames(replace(good, layers=(nan,))))
        assert answer.HasField("refusal")
        yield client


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"),
        *("--disable-gpu", "--no-proxy-server"),
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.binary_location = shutil.which("chromium") or "chromium"
    service = webdriver.ChromeService(shutil.which("chromedriver") or "chromedriver")
    driver = webdriver.Chrome(options, service)
    driver.set_page_load_timeout(LONG_S)
    driver.set_script_timeout(LONG_S)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def chart(browser, server, trainer, hostile):
    """The page with a chart of some answers, which take seconds to come."""
    return opened(browser, server, DESK, columns=2)


@pytest.fixture
def page(chart):
    """It, at the width of a desk."""
    show(chart, DESK)
    return chart


def opened(browser, server, size: tuple[int, int], columns: int):
    show(browser, size)
    browser.get_log("browser")
    browser.get(f"http://{server.metrics_address}/")
    solves = By.CSS_SELECTOR, "#chart .solve"
    eventually(lambda: len(browser.find_elements(*solves)) >= columns)
    return browser


def show(browser, size: tuple[int, int]) -> None:
    width, height = size
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {
            "width": width,
            "height": height,
            "deviceScaleFactor": 1,
            "mobile": size == PHONE,
        },
    )


def prefer(browser, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def eventually(is_so, within_s: float = 3 * LONG_S) -> None:
    end_s = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < end_s, "It did not become so."
        time.sleep(0.1)


def asked(server: ServerProcess) -> pb.GetStatusResponse:
    with grpc.insecure_channel(server.address) as channel:
        stub = rpc.PreconditioningServiceStub(channel)
        return stub.GetStatus(pb.GetStatusRequest(), timeout=LONG_S)


def solved(status: pb.GetStatusResponse) -> dict[str, int]:
    return {session.job: session.solved for session in status.sessions}


def rows(page, table: str) -> list[list[str]]:
    return page.execute_script(ROWS, table)


def text(page, name: str) -> str:
    return page.find_element(By.ID, name).text


def complaints(page) -> list[str]:
    return [entry["message"] for entry in page.get_log("browser")]


def as_shown(status: pb.GetStatusResponse) -> tuple[list[list[str]], list[list[str]]]:
    """What of a status is the same however it is rounded."""
    sessions = [
        [
            s.job,
            f"{s.open_ranks}/{s.world_size}",
            *map(str, (len(s.layers), s.solved, s.queued)),
            *map(str, (s.superseded + s.failed, s.refused)),
        ]
        for s in status.sessions
    ]
    layers = [
        [
            *(s.job, layer.name),
            *map(str, (layer.newest_step, layer.rows, layer.behind_steps)),
        ]
        for s in status.sessions
        for layer in s.layers
    ]
    return sessions, layers


def on_page(page) -> tuple[list[list[str]], list[list[str]]]:
    sessions = [[*row[:3], *row[4:8]] for row in rows(page, "sessions")]
    return sessions, rows(page, "layers")


def test_a_training_is_shown_as_in_the_documentation(
    browser, server, trainer, tmp_path
):
    """The first one: no session of a test is there yet."""
    columns = 20 if "STATUS_IMAGE" in os.environ else 3
    page = opened(browser, server, (1100, 1290), columns)
    stages = [row[0] for row in rows(page, "stages")]

    assert stages == list(STAGES)
    assert page.find_element(By.CSS_SELECTOR, "#chart .total").get_attribute("points")
    assert page.save_screenshot(
        os.environ.get("STATUS_IMAGE", f"{tmp_path}/status.png")
    )
    assert complaints(page) == []


def test_values_are_those_of_get_status_while_training(page, server):
    before = solved(asked(server))
    eventually(lambda: int(rows(page, "sessions")[0][4]) > min(before.values()))
    shown = {row[0]: int(row[4]) for row in rows(page, "sessions")}
    after = solved(asked(server))

    assert set(shown) == set(before) == set(after)
    assert all(shown[job] <= after[job] for job in shown)
    stages = [row[0] for row in rows(page, "stages")]
    assert stages == [stage.stage for stage in asked(server).stages]
    (now,) = [row[1] for row in rows(page, "stages") if row[0] == "solve"]
    assert now.endswith("s")


def test_values_are_those_of_get_status_exactly(page, server, trainer):
    trainer.send_signal(signal.SIGSTOP)
    try:
        eventually(lambda: asked(server).load.queue_depth == 0)
        eventually(lambda: on_page(page) == as_shown(asked(server)))
        status = asked(server)
        assert text(page, "session-count") == "2"
        assert text(page, "queue") == "0"
        counts = [int(row[4]) for row in rows(page, "stages")]
        assert counts == [stage.count for stage in status.stages]
        (error,) = [row for row in rows(page, "errors") if row[1] == JOB]
        (told,) = [one for one in status.errors if one.job == JOB]
        assert error[2:] == [told.layer, told.kind, str(told.count), told.message]
    finally:
        trainer.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("size", [DESK, PHONE, (320, 640)])
def test_nothing_is_wider_than_the_window(page, size):
    show(page, size)
    eventually(lambda: page.execute_script("return innerWidth") == size[0])
    eventually(
        lambda: (
            page.execute_script(
                "return document.getElementById('chart').viewBox.baseVal.width"
            )
            <= size[0]
        )
    )
    wide = page.execute_script(WIDE)
    assert wide == []
    assert page.execute_script("return document.documentElement.scrollWidth") <= size[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE])
def test_text_can_be_read(page, scheme, size):
    show(page, size)
    prefer(page, scheme)
    ground = page.execute_script(
        "return getComputedStyle(document.body).backgroundColor"
    )
    least = page.execute_script(CONTRASTS)
    prefer(page, "light")

    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    assert len(least) > 40
    assert least[0][0] >= 4.5, least[:5]


def test_a_screen_reader_finds_its_way(page):
    script = """
    return {
      heads: [...document.querySelectorAll("th")].every((th) => th.scope === "col"),
      columns: [...document.querySelectorAll("thead tr")].map((tr) => tr.cells.length),
      sections: [...document.querySelectorAll("section")].every((s) =>
        document.getElementById(s.getAttribute("aria-labelledby")).textContent),
      chart: document.getElementById(
        document.querySelector("svg").getAttribute("aria-labelledby")).textContent,
      lang: document.documentElement.lang,
    }"""
    found = page.execute_script(script)

    assert found["heads"]
    assert found["sections"]
    assert found["lang"] == "en"
    assert found["columns"] == [5, 11, 6, 5]
    assert "Mean seconds of each stage" in found["chart"]


def test_it_says_when_the_server_cannot_be_reached(page, server):
    assert text(page, "lost") == ""
    server.process.send_signal(signal.SIGSTOP)
    try:
        eventually(lambda: "The server cannot be reached" in text(page, "lost"))
        assert "what is below is from then" in text(page, "lost")
        assert rows(page, "sessions")
    finally:
        server.process.send_signal(signal.SIGCONT)
    eventually(lambda: text(page, "lost") == "")


def test_names_are_text_and_never_run(page):
    """The last one: it leaves markup in the page."""
    eventually(lambda: any(row[1] == LAYER for row in rows(page, "layers")))
    assert any(row[0] == JOB for row in rows(page, "sessions"))
    assert any(row[2] == LAYER for row in rows(page, "errors"))
    assert page.find_elements(By.CSS_SELECTOR, "main img, main script") == []
    assert page.execute_script("return window.hacked") is None
    assert complaints(page) == []

    # Were one of them ever taken for markup, the policy would still not let it run.
    page.execute_script(
        "document.body.insertAdjacentHTML('beforeend', arguments[0])", LAYER
    )
    eventually(
        lambda: any("Content Security Policy" in one for one in complaints(page))
    )
    assert page.execute_script("return window.hacked") is None
