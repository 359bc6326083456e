"""The page in a browser, against a live server. Needs Chromium on the PATH: apt-get install chromium."""

import base64
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from concord.model import bundle
from concord.model.gallery import Gallery
from concord.model.modality import BinaryModality, CategoricalModality, ImageModality, TextModality, VectorModality
from concord.model.runtime import Runtime
from tests.support.bundles import write_copy
from tests.support.encoders import encoded_modalities
from tests.support.graphs import write_bundle
from tests.support.server import ROOT

Serve = Callable[..., contextlib.AbstractContextManager[httpx.Client]]
OpenPage = Callable[..., Page]
KEY = "the-key-of-a-lovelace"
MAX_FIRST_VIEW_BYTES = 200_000
PHOTO = ROOT / "tests/fixtures/photo-7.png"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=30_000)  # enough for a machine under load
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, client: httpx.Client) -> Iterator[OpenPage]:
    """A function that opens the page. Any message on the console and any request to another host fails the test."""
    with contextlib.ExitStack() as contexts:
        errors: list[str] = []

        def open_page(server: httpx.Client = client, *, ready: bool = True, **options: Any) -> Page:
            context = contexts.enter_context(browser.new_context(reduced_motion="reduce", **options))
            context.grant_permissions(["clipboard-read", "clipboard-write"])
            page = context.new_page()
            page.on("console", lambda message: errors.append(message.text) if "status of" not in message.text else None)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("request", lambda request: errors.append(request.url) if is_foreign(request.url, server) else None)
            page.goto(str(server.base_url))
            if ready:
                wait_until_idle(page)
            return page

        yield open_page
    assert not errors


def is_foreign(url: str, client: httpx.Client) -> bool:
    return not url.startswith((str(client.base_url), "data:", "blob:"))


def wait_until_idle(page: Page) -> None:
    """Wait until the page shows the response to its last request."""
    expect(page.locator("#generated")).to_have_attribute("aria-busy", "false")


def input_card(page: Page, modality: str) -> Locator:
    return page.locator(f"[aria-labelledby=input-{modality}]")


def draw_stroke(page: Page, modality: str, *points: tuple[float, float]) -> None:
    """Draw a line through points, whose coordinates are fractions of the canvas."""
    canvas = input_card(page, modality).locator("canvas.drawing-canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    positions = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*positions[0])
    page.mouse.down()
    for position in positions[1:]:
        page.mouse.move(*position, steps=6)
    page.mouse.up()


def generated_values(page: Page, modality: str) -> list[str]:
    """The images (base64), the texts or the numbers of one modality on the page."""
    figure = page.locator(f"#generated figure[data-modality={modality}]")
    images = figure.locator("img").evaluate_all("images => images.map(image => image.src.split(',')[1])")
    return images or figure.locator(".text-value, .numbers").all_inner_texts()


def copy_snippet(page: Page) -> str:
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_text("Copied.")).to_be_visible()
    return str(page.evaluate("navigator.clipboard.readText()"))


def run_curl_snippet(page: Page) -> Any:
    """The JSON response to the copied curl snippet."""
    result = subprocess.run(["bash"], input=copy_snippet(page), capture_output=True, text=True, check=True, timeout=30)
    return json.loads(result.stdout)


def clear_inputs(page: Page) -> None:
    for button in page.get_by_role("button", name="Clear").all():
        if button.is_visible():
            button.click()
    expect(page.locator("#generated")).to_contain_text("No inputs yet")


def test_page_drawn_digit_generates_and_refines_and_snippets_reproduce_it(open_page: OpenPage) -> None:
    page = open_page()
    clear_inputs(page)
    draw_stroke(page, "digit", (0.25, 0.25), (0.75, 0.25), (0.45, 0.8))
    expect(page.locator("#announcement")).to_have_text("Generated digit, photo, word from digit.")
    wait_until_idle(page)
    unrefined = generated_values(page, "photo")
    assert len(unrefined) == len(generated_values(page, "word")) == 4

    page.locator("#steps").fill("3")
    wait_until_idle(page)
    expect(page.locator("#objective")).to_contain_text("the observed terms of the ELBO (without photo, word)")
    assert page.locator(".objective-chart circle").count() == 4, "one point before the first and one after each step"
    assert page.locator(".refinement-path").count() == 1
    assert generated_values(page, "photo") != unrefined

    (item,) = run_curl_snippet(page)["data"]
    assert item["refinement"]["steps"] == 3
    for modality in ("digit", "photo"):
        assert [value["data"] for value in item["generated"][modality]] == generated_values(page, modality)
    assert [value["text"] or "(empty)" for value in item["generated"]["word"]] == generated_values(page, "word")

    page.get_by_role("button", name="python").click()
    snippet = copy_snippet(page)
    assert "from concord.client import Client" in snippet
    result = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    assert "modalities=('digit',)" in result.stdout


def test_posterior_with_more_inputs_is_narrower(open_page: OpenPage) -> None:
    page = open_page()
    rows = page.locator("#posterior-table tbody tr")
    expect(rows).to_have_count(2)  # the prior, and the word of the first example
    input_card(page, "photo").locator(".input-example").first.click()
    expect(rows).to_have_count(4)  # the prior, each input alone, both inputs
    wait_until_idle(page)
    assert page.locator(".latent-map .unimodal").count() == 2
    stds = [float(row.locator("td").last.inner_text()) for row in rows.all()]
    assert stds[0] == 1.0
    assert stds[-1] < stds[0]
    page.locator("#compare").check()
    expect(page.locator(".result")).to_have_count(3)


def test_example_buttons_suit_the_modalities_of_the_bundle(open_page: OpenPage) -> None:
    page = open_page()
    buttons = page.locator("#examples button")
    assert buttons.all_inner_texts() == [
        "generate digit and photo from word",
        "noisy photo, with and without word",
        "refine digit",
    ]
    buttons.nth(1).click()
    expect(page.locator(".result h3")).to_have_text(["from photo + word", "from photo alone", "from word alone"])
    buttons.nth(2).click()
    expect(page.locator("#objective")).to_contain_text("Objective:")


def test_invalid_value_shows_its_error_at_the_control(open_page: OpenPage) -> None:
    page = open_page()
    word = page.get_by_role("textbox", name="word", exact=True)
    word.fill("s3ven")
    card = input_card(page, "word")
    expect(card.get_by_role("alert")).to_contain_text("characters outside the alphabet")
    word.fill("seven")
    expect(card.get_by_role("alert")).to_be_hidden()
    page.locator("#seed").fill("-1")
    expect(page.locator("#seed-error")).to_contain_text("greater than or equal to 0")
    page.locator("input[type=file]").first.set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
    expect(input_card(page, "digit").locator(".field-error").last).to_contain_text("a.png is not an image")


def test_uploaded_file_becomes_an_input(open_page: OpenPage) -> None:
    page = open_page()
    input_card(page, "photo").locator("input[type=file]").set_input_files(PHOTO)
    expect(page.locator("#announcement")).to_have_text("Generated digit, photo, word from photo, word.")


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_dropped_or_pasted_file_becomes_an_input(open_page: OpenPage, event: str) -> None:
    page = open_page()
    canvas = input_card(page, "photo").locator("canvas.drawing-canvas")
    canvas.focus()
    canvas.evaluate(
        """(canvas, [type, base64]) => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
            transfer.items.add(new File([bytes], "7.png", { type: "image/png" }));
            const options = { bubbles: true, cancelable: true };
            canvas.dispatchEvent(type === "drop" ? new DragEvent("drop", { ...options, dataTransfer: transfer })
                : new ClipboardEvent("paste", { ...options, clipboardData: transfer }));
        }""",
        [event, base64.b64encode(PHOTO.read_bytes()).decode()],
    )
    expect(page.locator("#announcement")).to_have_text("Generated digit, photo, word from photo, word.")


def test_keyboard_on_the_canvas_draws(open_page: OpenPage) -> None:
    page = open_page()
    input_card(page, "digit").locator("canvas.drawing-canvas").focus()
    page.keyboard.down("Space")
    for _ in range(5):
        page.keyboard.press("ArrowDown")
    page.keyboard.up("Space")
    expect(page.locator("#announcement")).to_have_text("Generated digit, photo, word from digit, word.")


def test_server_that_is_not_ready_shows_a_notice_and_the_page_retries(serve: Serve, open_page: OpenPage) -> None:
    with serve() as client:
        page = open_page(client)
        state = client.app.state  # type: ignore[attr-defined]
        (model,) = state.registry.all()
        prepared = model._prepared["golden"]
        model._prepared["golden"], model._prepared_ok, state.health.draining = "failed", False, True
        page.get_by_role("textbox", name="word", exact=True).fill("three")
        expect(page.locator("#notice")).to_contain_text("Not ready: the model is not ready: see /readyz. Retrying in 1 s.")
        expect(page.locator("#status")).to_have_text("the server is stopping")
        model._prepared["golden"], model._prepared_ok, state.health.draining = prepared, True, False
        expect(page.locator("#notice")).to_be_hidden()


def test_api_key_is_requested_and_not_stored(serve: Serve, open_page: OpenPage, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{KEY} ada\n")
    with serve(api_keys_file=tmp_path / "keys") as client:
        page = open_page(client, ready=False)
        page.get_by_label("API key").fill("another-key-altogether")
        page.get_by_role("button", name="Use key").click()
        expect(page.locator("#notice")).to_contain_text("this API key is not known here")
        page.get_by_label("API key").fill(KEY)
        page.get_by_role("button", name="Use key").click()
        wait_until_idle(page)
        expect(page.locator("#api-key-form")).to_be_hidden()
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        snippet = copy_snippet(page)
        assert KEY not in snippet
        environment = {"PATH": os.environ["PATH"], "CONCORD_KEY": KEY}
        result = subprocess.run(
            ["bash"],
            input=snippet,
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
            env=environment,
        )
        assert json.loads(result.stdout)["object"] == "list"


def test_page_starts_with_the_recommended_steps(serve: Serve, open_page: OpenPage, tmp_path: Path) -> None:
    written = write_copy(tmp_path / "copy", name="copy", metrics={"recommended_steps": 2})
    with serve(Runtime(written, threads=1)) as client:
        page = open_page(client)
        expect(page.locator("#steps")).to_have_value("2")
        expect(page.locator("#recommended-steps")).to_have_text("Recommended for this model: 2 steps.")
        page.get_by_role("button", name="refine digit").click()
        expect(page.locator("#steps")).to_have_value("8")
        page.get_by_role("button", name="generate digit and photo from word").click()
        expect(page.locator("#steps")).to_have_value("2")
        wait_until_idle(page)
        (item,) = run_curl_snippet(page)["data"]
        assert item["refinement"]["steps"] == 2
        assert not accessibility_violations(page)


def test_page_without_recommended_steps_starts_without_refinement(open_page: OpenPage) -> None:
    page = open_page()
    expect(page.locator("#steps")).to_have_value("0")
    expect(page.locator("#recommended-steps")).to_be_hidden()


def test_first_view_loads_few_bytes(browser: Browser, client: httpx.Client) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        sizes: list[int] = []
        page.on("response", lambda response: sizes.append(len(response.body())))
        page.goto(str(client.base_url))
        wait_until_idle(page)
        assert sum(sizes) < MAX_FIRST_VIEW_BYTES


@pytest.fixture(scope="module")
def every_kind(tiny_facts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Runtime:
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
    path = tmp_path_factory.mktemp("kinds") / "kinds"
    return Runtime(write_bundle(path, modalities, {**tiny_facts, "name": "kinds"}), threads=1)


def test_every_kind_of_modality_can_be_input_and_is_generated(serve: Serve, open_page: OpenPage, every_kind: Runtime) -> None:
    names = [modality.name for modality in every_kind.modalities]
    with serve(every_kind) as client:
        page = open_page(client)
        expect(page.locator("#generated figure")).to_have_count(len(names))
        clear_inputs(page)
        for number, name in enumerate(names, start=1):
            input_card(page, name).locator(".input-example").first.click()
            message = f"Generated {', '.join(names)} from {', '.join(names[:number])}."
            expect(page.locator("#announcement")).to_have_text(message)
        page.locator("#steps").fill("1")
        expect(page.locator("#objective")).to_contain_text("the full multimodal ELBO")
        page.get_by_label("sensor 2").fill("warm")
        expect(input_card(page, "sensor").get_by_role("alert")).to_contain_text("a vector holds numbers")
        assert not accessibility_violations(page)


ARTICLE_TYPES = ("Casual Shoes", "Sports Shoes", "Tights", "Décolletés", *(f"Article {number}" for number in range(296)))


@pytest.fixture(scope="module")
def catalogue(tiny_facts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    """A bundle as a shop's catalogue gives: one number per article, many classes, long texts."""
    modalities = (
        ImageModality(name="image", channels=3, height=8, width=8),
        TextModality(name="title", length=12, unit="word", vocabulary=("international", "peter", "england", "women", "watch")),
        CategoricalModality(name="article_type", classes=ARTICLE_TYPES),
        CategoricalModality(name="usage", classes=("casual", "formal")),
        VectorModality(name="year", size=1, mean=(2012.3,), std=(2.2,)),
        VectorModality(name="measures", size=3, mean=(1e10, 1.0, 1e-7), std=(3e9, 0.1, 2e-8)),
    )
    path = tmp_path_factory.mktemp("catalogue") / "catalogue"
    return Runtime(write_bundle(path, modalities, {**tiny_facts, "name": "catalogue"}), threads=1)


def test_numbers_of_a_short_vector_are_shown_as_numbers(serve: Serve, open_page: OpenPage, catalogue: Runtime) -> None:
    with serve(catalogue) as client:
        page = open_page(client)
        expect(input_card(page, "year").locator(".format")).to_have_text("1 number")
        expect(page.locator("#examples button").first).to_have_text("generate image from title")
        clear_inputs(page)
        chip = input_card(page, "year").locator(".input-example").first
        assert 1990 < float(chip.inner_text()) < 2030
        chip.click()
        expect(page.get_by_role("textbox", name="year", exact=True)).to_have_value(re.compile(r"^20\d\d(\.\d+)?$"))
        expect(page.locator("#announcement")).to_contain_text("from year.")
        wait_until_idle(page)
        (item,) = run_curl_snippet(page)["data"]
        for name, decimals in (("year", [2]), ("measures", [0, 3, 10])):
            expected = [
                [round(number, count) for number, count in zip(value["data"], decimals, strict=True)]
                for value in item["generated"][name]
            ]
            shown = [[float(number) for number in text.split(", ")] for text in generated_values(page, name)]
            np.testing.assert_allclose(shown, expected, rtol=1e-12)


def test_example_chips_wrap_and_are_not_cut_off(serve: Serve, open_page: OpenPage, catalogue: Runtime) -> None:
    with serve(catalogue) as client:
        page = open_page(client)
        groups = page.locator(".input-examples:visible")
        assert groups.count() == 6
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 844})
            cut_off = groups.evaluate_all(
                """groups => groups.flatMap((group) => {
                    const box = group.getBoundingClientRect();
                    return [...group.children].filter((chip) => {
                        const { right, bottom } = chip.getBoundingClientRect();
                        return right > box.right + 1 || bottom > box.bottom + 1 || chip.scrollWidth > chip.clientWidth;
                    }).map((chip) => chip.textContent);
                })"""
            )
            assert cut_off == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the screen"


def test_class_is_found_by_search_with_the_keyboard(serve: Serve, open_page: OpenPage, catalogue: Runtime) -> None:
    with serve(catalogue) as client:
        page = open_page(client)
        clear_inputs(page)
        field = page.get_by_role("combobox", name="article_type")
        options = page.get_by_role("option")
        field.focus()
        page.keyboard.press("ArrowDown")
        expect(options).to_have_count(200)
        page.keyboard.type("SHOES")
        expect(options).to_have_text(["Casual Shoes", "Sports Shoes"])
        page.keyboard.press("ArrowDown")
        expect(page.get_by_role("option", selected=True)).to_have_text("Sports Shoes")
        active = page.locator(f"#{field.get_attribute('aria-activedescendant')}")
        expect(active).to_have_text("Sports Shoes")
        assert not accessibility_violations(page)
        page.keyboard.press("Enter")
        expect(field).to_have_value("Sports Shoes")
        expect(field).to_have_attribute("aria-expanded", "false")
        expect(page.locator("#announcement")).to_contain_text("from article_type.")
        assert run_curl_snippet(page)["data"][0]["modalities"] == ["article_type"]

        field.fill("decol")  # without accents
        page.keyboard.press("Escape")
        expect(field).to_have_value("Sports Shoes")
        field.fill("decol")
        page.keyboard.press("Enter")
        expect(field).to_have_value("Décolletés")
        field.fill("tights ")  # typed in full, and left with Tab
        page.keyboard.press("Tab")
        expect(field).to_have_value("Tights")
        field.fill("")
        page.keyboard.press("Enter")
        expect(page.locator("#generated")).to_contain_text("No inputs yet")


def test_class_is_picked_with_the_mouse(serve: Serve, open_page: OpenPage, catalogue: Runtime) -> None:
    with serve(catalogue) as client:
        page = open_page(client)
        field = page.get_by_role("combobox", name="usage")
        field.click()
        expect(page.get_by_role("option")).to_have_text(["casual", "formal"])
        page.get_by_role("option", name="formal").click()
        expect(field).to_have_value("formal")
        expect(page.get_by_role("listbox")).to_be_hidden()
        field.click()
        expect(page.get_by_role("option", selected=True)).to_have_text("formal")


def test_text_that_is_no_class_shows_the_error_of_the_service(serve: Serve, open_page: OpenPage, catalogue: Runtime) -> None:
    with serve(catalogue) as client:
        page = open_page(client)
        field = page.get_by_role("combobox", name="article_type")
        alert = input_card(page, "article_type").get_by_role("alert")
        field.fill("Sandals")
        expect(input_card(page, "article_type").get_by_role("status")).to_have_text("no class contains “Sandals”")
        expect(alert).to_be_hidden()
        page.keyboard.press("Tab")
        expect(alert).to_contain_text("Sandals")
        field.fill("Tights")
        page.keyboard.press("Enter")
        expect(alert).to_be_hidden()


def test_page_of_another_bundle_shows_its_modalities(serve: Serve, open_page: OpenPage) -> None:
    birds = Runtime.load(bundle.builtin("birds"), threads=1)
    with serve(birds) as client:
        page = open_page(client)
        expect(page.locator("#status")).to_have_text("birds@1 · 3 modalities · 64 dimensions")
        clear_inputs(page)
        input_card(page, "photo").locator(".input-example").first.click()
        expect(page.locator("#announcement")).to_have_text("Generated photo, caption, attributes from photo.")
        wait_until_idle(page)
        assert run_curl_snippet(page)["model"] == "birds"
        assert not accessibility_violations(page)


def test_model_picker_with_two_models_selects_the_model(
    serve: Serve, open_page: OpenPage, runtime: Runtime, every_kind: Runtime
) -> None:
    with serve(runtime, every_kind, default_model="digits") as client:
        page = open_page(client)
        page.get_by_label("Model").select_option("kinds@1")
        expect(page.locator("#status")).to_have_text("kinds@1 · 8 modalities · 6 dimensions")
        expect(page.locator("#announcement")).to_contain_text("from caption")
        wait_until_idle(page)
        assert run_curl_snippet(page)["model"] == "kinds"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_is_accessible_and_fits_the_screen(open_page: OpenPage, scheme: str, width: int) -> None:
    page = open_page(color_scheme=scheme, viewport={"width": width, "height": 844})
    page.locator("#examples button").nth(1).click()
    expect(page.locator(".result")).to_have_count(3)
    page.get_by_role("textbox", name="word", exact=True).fill("s3ven")
    expect(input_card(page, "word").get_by_role("alert")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the screen"
    assert not accessibility_violations(page)


def accessibility_violations(page: Page) -> list[str]:
    """The violations that axe-core reports."""
    report = Axe().run(page).response
    assert len(report["passes"]) > 20, "axe-core checked the page"
    return [
        f"{rule['id']}: {node['html'][:200]} {node['failureSummary']}"
        for rule in report["violations"]
        for node in rule["nodes"]
    ]


def test_frozen_encoders_take_pictures_of_any_size_and_texts(
    open_page: OpenPage, serve: Serve, tiny_facts: dict[str, Any], tmp_path: Path
) -> None:
    modalities, files = encoded_modalities(tmp_path)
    runtime = Runtime(
        write_bundle(tmp_path / "bundle", modalities, {**tiny_facts, "name": "encoded"}, encoders=files), threads=1
    )
    with serve(runtime) as client:
        page = open_page(client)
        card = input_card(page, "photo")
        with page.expect_file_chooser() as chooser:
            card.get_by_role("button", name="Upload photo").click()
        chooser.value.set_files(PHOTO)
        expect(card.get_by_role("img", name="photo")).to_be_visible()
        input_card(page, "title").get_by_role("textbox").fill("a red cup")
        wait_until_idle(page)
        expect(page.locator("#generated .vector .bar-chart").first).to_be_visible()
        input_card(page, "back").get_by_role("button", name="back, example 1").click()
        expect(input_card(page, "back")).to_contain_text("12 features of an example")
        wait_until_idle(page)
        expect(page.locator(".field-error:visible")).to_have_count(0)


def test_page_shows_the_nearest_training_examples(open_page: OpenPage, serve: Serve, tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "teal").save(file, "webp")
    mean = np.eye(5, 32, dtype=np.float32)
    galleries = {
        "photo": Gallery(mean, list("abcde"), (), [file.getvalue()] * 5, 16),
        "word": Gallery(mean, list("abcde"), [["one"], ["two"], ["three"], ["four"], ["five"]]),
        "digit": Gallery(mean, [f"no. {number}" for number in range(5)]),
    }
    facts = {}
    for name, gallery in galleries.items():
        (tmp_path / f"{name}.npz").write_bytes(gallery.to_bytes())
        facts[name] = {"file": f"{name}.npz", "rows": 5, "values": gallery.has_values}
    copy = write_copy(tmp_path / "bundle", galleries=facts, more=[tmp_path / f"{name}.npz" for name in galleries])
    with serve(Runtime(copy, threads=1)) as client:
        page = open_page(client)
        examples = {name: page.locator(f"#generated figure[data-modality={name}] .nearest li") for name in galleries}
        expect(examples["photo"].get_by_role("img")).to_have_count(4)
        expect(examples["digit"].first).to_contain_text("no. ")
        assert {"one", "two", "three", "four", "five"} > set(examples["word"].all_inner_texts())
        assert run_curl_snippet(page)["data"][0]["nearest"].keys() == galleries.keys()
        assert not accessibility_violations(page)
