"""Sound on the page, in Chromium with its fake microphone: record, upload, play, look at the spectrogram."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect, sync_playwright

from concord.model import codec
from concord.model.modality import ImageModality, TextModality
from concord.model.runtime import Runtime
from tests.service.page.test_page import CHROMIUM, clear_inputs, input_card, run_curl_snippet, wait_until_idle
from tests.support.graphs import write_bundle
from tests.support.sounds import SEVEN, SOUND, encode_sound, speech

Serve = Callable[..., contextlib.AbstractContextManager[httpx.Client]]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: apt-get install chromium")


@pytest.fixture(scope="module")
def client(serve: Serve, tiny_facts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    modalities = (
        ImageModality(name="digit", channels=1, height=8, width=8),
        TextModality(name="word", length=8, alphabet=" abcdefghijklmnopqrstuvwxyz"),
        SOUND,
    )
    path = tmp_path_factory.mktemp("sound") / "spoken"
    with serve(Runtime(write_bundle(path, modalities, {**tiny_facts, "name": "spoken"}), threads=1)) as client:
        yield client


@pytest.fixture(scope="module")
def page(client: httpx.Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page in a browser whose microphone plays "seven" half a second after it is opened. Its console must be empty."""
    spoken = tmp_path_factory.mktemp("microphone") / "seven.wav"
    samples = np.repeat(np.pad(speech(), (4000, 20_000)), 6)  # 48 kHz
    spoken.write_bytes(encode_sound(0.8 * samples / np.abs(samples).max(), rate=48_000))
    switches = ["--use-fake-device-for-media-stream", f"--use-file-for-fake-audio-capture={spoken}"]
    errors: list[str] = []
    expect.set_options(timeout=30_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *switches])
        context = browser.new_context(reduced_motion="reduce")
        page = context.new_page()
        page.on("console", lambda message: errors.append(message.text) if "status of" not in message.text else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(str(client.base_url))
        wait_until_idle(page)
        yield page
        browser.close()
    assert not errors


def sent_sound(page: Page, act: Callable[[], object]) -> np.ndarray:
    """Return the spectrogram of the sound in the request that the page sends after ``act``."""
    with page.expect_request("**/embed", timeout=30_000) as sent:
        act()
    (item,) = json.loads(sent.value.post_data or "")["inputs"]
    return codec.parse(SOUND, item["sound"])


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Return the correlation of two spectrograms, the largest over small translations in time."""
    return max(float(np.corrcoef(np.roll(one, shift, axis=2).ravel(), other.ravel())[0, 1]) for shift in range(-4, 5))


def test_recording_is_sent_and_the_digit_and_the_sound_are_shown(page: Page) -> None:
    clear_inputs(page)
    page.context.grant_permissions(["microphone", "clipboard-read", "clipboard-write"])
    record = input_card(page, "sound").get_by_role("button", name="Record sound")
    array = sent_sound(page, record.click)
    assert similarity(array, codec.parse_bytes(SOUND, SEVEN.read_bytes())) > 0.9
    expect(record).to_have_attribute("aria-pressed", "false")
    expect(page.locator("#announcement")).to_have_text("Generated digit, word, sound from sound.")
    wait_until_idle(page)
    expect(page.locator("#generated figure[data-modality=digit] img")).to_have_count(4)
    figure = page.locator("#generated figure[data-modality=sound]")
    expect(figure.locator("audio")).to_have_count(4)
    expect(figure.get_by_role("img", name="spectrogram of sound, reconstructed from sound, sample 1")).to_be_visible()
    load = "audio => new Promise(done => { audio.onloadedmetadata = () => done(audio.duration); audio.load(); })"
    duration = figure.locator("audio").first.evaluate(load)
    assert duration == pytest.approx(1.0)
    (item,) = run_curl_snippet(page)["data"]
    shown = figure.locator("audio").evaluate_all("players => players.map(player => player.src.split(',')[1])")
    assert [value["data"] for value in item["generated"]["sound"]] == shown
    results = Axe().run(page)
    assert not results.response["violations"]


def test_denied_microphone_shows_how_to_go_on(page: Page) -> None:
    clear_inputs(page)
    page.context.clear_permissions()
    page.context.grant_permissions(["clipboard-read"])
    card = input_card(page, "sound")
    card.get_by_role("button", name="Record sound").click()
    expect(card.get_by_role("alert")).to_contain_text("upload a file")
    expect(card.get_by_role("button", name="Record sound")).to_have_text("Record")


def test_uploaded_file_and_example_are_sent(page: Page) -> None:
    clear_inputs(page)
    card = input_card(page, "sound")
    array = sent_sound(page, lambda: card.locator("input[type=file]").set_input_files(SEVEN))
    np.testing.assert_array_equal(array, codec.parse_bytes(SOUND, SEVEN.read_bytes()))
    sent_sound(page, card.locator(".input-example").first.click)


def test_file_that_is_no_sound_shows_the_service_s_message(page: Page, tmp_path: Path) -> None:
    clear_inputs(page)
    (tmp_path / "text.wav").write_text("This is a text.")
    card = input_card(page, "sound")
    card.locator("input[type=file]").set_input_files(tmp_path / "text.wav")
    expect(card.get_by_role("alert")).to_contain_text("not a WAV, FLAC, OGG or MP3 file")


def test_page_without_a_microphone_offers_upload_only(page: Page, client: httpx.Client) -> None:
    other = page.context.new_page()
    other.add_init_script("Object.defineProperty(navigator, 'mediaDevices', { value: undefined })")
    other.goto(str(client.base_url))
    wait_until_idle(other)
    card = input_card(other, "sound")
    expect(card.get_by_role("button", name="Upload sound")).to_be_visible()
    expect(card.get_by_role("button", name="Record sound")).to_be_hidden()
    other.close()
