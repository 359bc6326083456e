"""The page as people use it: in a browser, against a live server. Needs Chromium on the PATH: apt-get install chromium."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from model import bundle
from model.modality import BinaryModality, CategoricalModality, ImageModality, TextModality, VectorModality
from model.runtime import Runtime
from tests.graphs import write_bundle
from tests.server import ROOT

Serve = Callable[..., contextlib.AbstractContextManager[httpx.Client]]
Visit = Callable[..., Page]
KEY = "the-key-of-a-lovelace"
MOST_BYTES = 200_000
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=30_000)  # a busy machine is no defect of the page
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser, client: httpx.Client) -> Iterator[Visit]:
    """Opens the page. Whatever the browser complains of, and whatever it asks elsewhere, fails the test."""
    with contextlib.ExitStack() as opened:
        complaints: list[str] = []

        def visit(to: httpx.Client = client, *, ready: bool = True, **options: Any) -> Page:
            context = opened.enter_context(browser.new_context(reduced_motion="reduce", **options))
            context.grant_permissions(["clipboard-read", "clipboard-write"])
            page = context.new_page()
            page.on("console", lambda message: complaints.append(message.text) if "status of" not in message.text else None)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("request", lambda asked: complaints.append(asked.url) if elsewhere(asked.url, to) else None)
            page.goto(str(to.base_url))
            if ready:
                settle(page)
            return page

        yield visit
    assert not complaints


def elsewhere(url: str, client: httpx.Client) -> bool:
    return not url.startswith((str(client.base_url), "data:", "blob:"))


def settle(page: Page) -> None:
    """What is on the screen is the answer to what was asked last."""
    expect(page.locator("#results")).to_have_attribute("aria-busy", "false")


def draw(page: Page, modality: str, *points: tuple[float, float]) -> None:
    """One stroke; points in parts of the canvas."""
    canvas = page.locator(f"[aria-labelledby=card-{modality}] canvas.sketch")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=6)
    page.mouse.up()


def shown(page: Page, modality: str) -> list[str]:
    """Pictures or texts of one modality, as they stand in an answer."""
    figure = page.locator(f"#results figure[data-modality={modality}]")
    pictures = figure.locator("img").evaluate_all("them => them.map(one => one.src.split(',')[1])")
    return pictures or figure.locator(".said").all_inner_texts()


def copied(page: Page) -> str:
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_text("Copied.")).to_be_visible()
    return str(page.evaluate("navigator.clipboard.readText()"))


def clear(page: Page) -> None:
    for button in page.get_by_role("button", name="Clear").or_(page.locator("button:text('Clear')")).all():
        if button.is_visible():
            button.click()
    expect(page.locator("#results")).to_contain_text("Nothing is given yet")


def test_a_drawn_seven_speaks_for_the_rest(visit: Visit) -> None:
    page = visit()
    clear(page)
    draw(page, "digit", (0.25, 0.25), (0.75, 0.25), (0.45, 0.8))
    expect(page.locator("#told")).to_have_text("Shown: digit, photo, word, from digit.")
    settle(page)
    alone = shown(page, "photo")
    assert len(alone) == len(shown(page, "word")) == 4

    page.locator("#steps").fill("3")
    settle(page)
    expect(page.locator("#objective")).to_contain_text("the observed terms alone (no photo, word)")
    assert page.locator(".chart circle").count() == 4, "the objective before and after each step"
    assert page.locator(".trail").count() == 1
    assert shown(page, "photo") != alone

    answered = subprocess.run(["bash"], input=copied(page), capture_output=True, text=True, check=True, timeout=30)
    (item,) = json.loads(answered.stdout)["data"]
    assert item["refinement"]["steps"] == 3
    for modality in ("digit", "photo"):
        assert [one["data"] for one in item["generated"][modality]] == shown(page, modality)
    assert [one["text"] or "nothing" for one in item["generated"]["word"]] == shown(page, "word")

    page.get_by_role("button", name="python").click()
    ran = subprocess.run([sys.executable, "-c", copied(page)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    assert "modalities=('digit',)" in ran.stdout


def test_evidence_narrows_the_posterior(visit: Visit) -> None:
    page = visit()
    rows = page.locator("#facts tbody tr")
    expect(rows).to_have_count(2)  # of the prior, and of what the first example gives
    page.locator("[aria-labelledby=card-photo] .sample").first.click()
    expect(rows).to_have_count(4)  # of each one alone, and of both
    settle(page)
    assert page.locator(".latent .alone").count() == 2
    stds = [float(row.locator("td").last.inner_text()) for row in rows.all()]
    assert stds[0] == 1.0
    assert stds[-1] < stds[0]
    page.locator("#compare").check()
    expect(page.locator(".block")).to_have_count(3)


def test_examples_come_from_the_manifest(visit: Visit) -> None:
    page = visit()
    buttons = page.locator("#examples button")
    assert buttons.all_inner_texts() == [
        "a word, to digit and photo",
        "a noisy photo, with and without its word",
        "a digit, refined",
    ]
    buttons.nth(1).click()
    expect(page.locator(".block h3")).to_have_text(["from photo + word", "from photo alone", "from word alone"])
    buttons.nth(2).click()
    expect(page.locator("#objective")).to_contain_text("Climbed")


def test_mistakes_are_told_beside_what_they_are_of(visit: Visit) -> None:
    page = visit()
    word = page.get_by_role("textbox", name="word", exact=True)
    word.fill("s3ven")
    card = page.locator("[aria-labelledby=card-word]")
    expect(card.get_by_role("alert")).to_contain_text("characters outside the alphabet")
    word.fill("seven")
    expect(card.get_by_role("alert")).to_be_hidden()
    page.locator("#seed").fill("-1")
    expect(page.locator("#seed-fault")).to_contain_text("greater than or equal to 0")
    page.locator("input[type=file]").first.set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
    expect(page.locator("[aria-labelledby=card-digit] .fault").last).to_contain_text("a.png is not a picture")


def test_a_file_is_an_input(visit: Visit) -> None:
    page = visit()
    page.locator("[aria-labelledby=card-photo] input[type=file]").set_input_files(ROOT / "tests/fixtures/photo-7.png")
    expect(page.locator("#told")).to_have_text("Shown: digit, photo, word, from photo, word.")


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_picture_comes_from_elsewhere_on_the_desk(visit: Visit, way: str) -> None:
    page = visit()
    picture = base64.b64encode((ROOT / "tests/fixtures/photo-7.png").read_bytes()).decode()
    canvas = page.locator("[aria-labelledby=card-photo] canvas.sketch")
    canvas.focus()
    canvas.evaluate(
        """(canvas, [way, picture]) => {
            const held = new DataTransfer();
            const bytes = Uint8Array.from(atob(picture), (one) => one.charCodeAt(0));
            held.items.add(new File([bytes], "7.png", { type: "image/png" }));
            const event = { bubbles: true, cancelable: true };
            canvas.dispatchEvent(way === "drop" ? new DragEvent("drop", { ...event, dataTransfer: held })
                : new ClipboardEvent("paste", { ...event, clipboardData: held }));
        }""",
        [way, picture],
    )
    expect(page.locator("#told")).to_have_text("Shown: digit, photo, word, from photo, word.")


def test_the_keyboard_draws(visit: Visit) -> None:
    page = visit()
    page.locator("[aria-labelledby=card-digit] canvas.sketch").focus()
    page.keyboard.down("Space")
    for _ in range(5):
        page.keyboard.press("ArrowDown")
    page.keyboard.up("Space")
    expect(page.locator("#told")).to_have_text("Shown: digit, photo, word, from digit, word.")


def test_a_server_that_is_not_ready_is_said_and_waited_for(serve: Serve, visit: Visit) -> None:
    with serve() as client:
        page = visit(client)
        bundles = client.app.state.bundles  # type: ignore[attr-defined]
        (serving,) = bundles.all()
        prepared = serving._prepared["golden"]
        serving._prepared["golden"], serving._fit, bundles.draining = "failed", False, True
        page.get_by_role("textbox", name="word", exact=True).fill("three")
        expect(page.locator("#notice")).to_contain_text("Not ready: the model is not ready: see /readyz. Asking again in 1 s.")
        expect(page.locator("#state")).to_have_text("the server is stopping")
        serving._prepared["golden"], serving._fit, bundles.draining = prepared, True, False
        expect(page.locator("#notice")).to_be_hidden()


def test_a_key_is_asked_for_and_kept_nowhere(serve: Serve, visit: Visit, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{KEY} ada\n")
    with serve(api_keys_file=tmp_path / "keys") as client:
        page = visit(client, ready=False)
        page.get_by_label("API key").fill("another-key-altogether")
        page.get_by_role("button", name="Use it").click()
        expect(page.locator("#notice")).to_contain_text("this API key is not known here")
        page.get_by_label("API key").fill(KEY)
        page.get_by_role("button", name="Use it").click()
        settle(page)
        expect(page.locator("#access")).to_be_hidden()
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        line = copied(page)
        assert KEY not in line
        environment = {"PATH": os.environ["PATH"], "CONCORD_KEY": KEY}
        answered = subprocess.run(
            ["bash"],
            input=line,
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
            env=environment,
        )
        assert json.loads(answered.stdout)["object"] == "list"


def test_the_first_view_is_light(browser: Browser, client: httpx.Client) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        sizes: list[int] = []
        page.on("response", lambda response: sizes.append(len(response.body())))
        page.goto(str(client.base_url))
        settle(page)
        assert sum(sizes) < MOST_BYTES


@pytest.fixture(scope="module")
def of_all_kinds(tiny_facts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    modalities = (
        ImageModality(name="scan", channels=1, height=12, width=8, background="white"),
        ImageModality(name="view", channels=3, height=8, width=8, background="black"),
        ImageModality(name="bands", channels=5, height=8, width=8),
        TextModality(name="caption", length=6, unit="word", vocabulary=("a", "bird", "sings")),
        VectorModality(name="sensor", size=5, mean=(1.0,) * 5, std=(2.0,) * 5),
        VectorModality(name="features", size=70),
        BinaryModality(name="traits", attributes=("red", "round", "a/b ~c")),
        CategoricalModality(name="species", classes=("jay", "wren", "tit")),
    )
    made = write_bundle(tmp_path_factory.mktemp("kinds") / "kinds", modalities, {**tiny_facts, "name": "kinds"})
    return Runtime(made, threads=1)


def test_every_kind_is_given_and_shown(serve: Serve, visit: Visit, of_all_kinds: Runtime) -> None:
    names = [modality.name for modality in of_all_kinds.modalities]
    with serve(of_all_kinds) as client:
        page = visit(client)
        expect(page.locator("#results figure")).to_have_count(len(names))
        clear(page)
        for number, name in enumerate(names, start=1):
            page.locator(f"[aria-labelledby=card-{name}] .sample").first.click()
            expect(page.locator("#told")).to_have_text(f"Shown: {', '.join(names)}, from {', '.join(names[:number])}.")
        page.locator("#steps").fill("1")
        expect(page.locator("#objective")).to_contain_text("the full multimodal ELBO")
        page.get_by_label("sensor 2").fill("warm")
        expect(page.locator("[aria-labelledby=card-sensor]").get_by_role("alert")).to_contain_text("a vector holds numbers")
        assert not violations(page)


def test_another_bundle_is_shown_as_it_is(serve: Serve, visit: Visit) -> None:
    birds = Runtime.load(bundle.builtin("birds"), threads=1)
    with serve(birds) as client:
        page = visit(client)
        expect(page.locator("#state")).to_have_text("birds@1 · 3 modalities · 64 dimensions")
        clear(page)
        page.locator("[aria-labelledby=card-photo] .sample").first.click()
        expect(page.locator("#told")).to_have_text("Shown: photo, caption, attributes, from photo.")
        settle(page)
        answered = subprocess.run(["bash"], input=copied(page), capture_output=True, text=True, check=True, timeout=30)
        assert json.loads(answered.stdout)["model"] == "birds"
        assert not violations(page)


def test_of_several_models_one_is_chosen(serve: Serve, visit: Visit, runtime: Runtime, of_all_kinds: Runtime) -> None:
    with serve(runtime, of_all_kinds, default_model="digits") as client:
        page = visit(client)
        page.get_by_label("Model").select_option("kinds@1")
        expect(page.locator("#state")).to_have_text("kinds@1 · 8 modalities · 6 dimensions")
        expect(page.locator("#told")).to_contain_text("from caption")
        settle(page)
        answered = subprocess.run(["bash"], input=copied(page), capture_output=True, text=True, check=True, timeout=30)
        assert json.loads(answered.stdout)["model"] == "kinds"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_anyone_can_use_it(visit: Visit, scheme: str, width: int) -> None:
    page = visit(color_scheme=scheme, viewport={"width": width, "height": 844})
    page.locator("#examples button").nth(1).click()
    expect(page.locator(".block")).to_have_count(3)
    page.get_by_role("textbox", name="word", exact=True).fill("s3ven")
    expect(page.locator("[aria-labelledby=card-word]").get_by_role("alert")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the screen"
    assert not violations(page)


def violations(page: Page) -> list[str]:
    """What axe-core finds wrong."""
    found = Axe().run(page).response
    assert len(found["passes"]) > 20, "it looked"
    return [
        f"{one['id']}: {node['html'][:200]} {node['failureSummary']}" for one in found["violations"] for node in one["nodes"]
    ]
