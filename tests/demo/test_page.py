"""The page, in a browser that nobody sees."""

import io
import shutil
import urllib.request
import zipfile

import numpy as np
from PIL import Image
import pytest

pytestmark = pytest.mark.slow
CLASSES = ("tabby", "tench", "a/b")


def draw(noise, labels, steps, w):
  """Flat images whose channels are 10 times the steps, 40 times w, and 60 times the label."""
  if steps not in ("1", "2", "4", "128"):
    raise ValueError(f"steps={steps!r} is no schedule.")
  shade = np.stack([np.full(len(w), 10 * int(steps) % 251), 40 * w, 60 * labels + noise[:, 0]], -1)
  return np.broadcast_to(shade[:, None, None].round().astype(np.uint8), (len(w), 8, 8, 3)).copy()


@pytest.fixture(scope="module")
def url():
  from ism_jax.demo import page

  noise = lambda count, seed: np.full((count, 1), seed % 7, np.float32)
  blocks = page.page(page.Sampler("A network", "of a test", noise, draw, CLASSES, 0.5, 3.5))
  _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
  yield address
  blocks.close()


@pytest.fixture(scope="module")
def browser():
  from playwright import sync_api

  names = ("chromium", "chromium-browser", "google-chrome")
  path = next(filter(None, map(shutil.which, names)))
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
    yield browser
    browser.close()


def open_page(browser, url):
  page = browser.new_page()
  page.set_default_timeout(60_000)
  page.goto(url)
  return page


def pixels(page, place=0) -> np.ndarray:
  """The picture that the open tab shows there."""
  image = page.get_by_role("tabpanel").locator("img").nth(place)
  with urllib.request.urlopen(image.get_attribute("src")) as answer:
    return np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))


def wait_for(page, expected):
  """Until the picture shows these colours, of its images from left to right, row by row."""
  side = 116  # 14 times 8 pixels and a gap
  for _ in range(600):
    try:
      shown = pixels(page)[56::side, 56::side].reshape(-1, 3)
      if np.array_equal(shown[: len(expected)], expected):
        return
    except (TimeoutError, AttributeError, ValueError, OSError):
      shown = None  # not there yet
    page.wait_for_timeout(100)
  raise AssertionError(f"shown is {shown}, not {expected}")


def choose(page, label, value):
  box = page.get_by_label(label, exact=True).locator("visible=true").first
  box.fill(value)
  box.press("Enter")


def test_each_control_changes_the_picture(browser, url):
  page = open_page(browser, url)
  in_turn = lambda steps, w, n, seed=0: [
    [10 * steps, round(40 * w), 60 * (i % 3) + seed] for i in range(n)
  ]
  wait_for(page, in_turn(4, 0.5, 16))
  page.get_by_role("slider").first.focus()
  page.keyboard.press("ArrowRight")
  wait_for(page, in_turn(4, 0.55, 16))
  choose(page, "seed", "5")
  wait_for(page, in_turn(4, 0.55, 16, seed=5))
  choose(page, "steps", "2")
  wait_for(page, in_turn(2, 0.55, 16, seed=5))
  choose(page, "class", "a/b")
  wait_for(page, [[20, 22, 125]] * 16)
  page.get_by_label("w of each image").fill("0, 1, 2.5")
  wait_for(page, [[20, 0, 125], [20, 40, 125], [20, 100, 125]])
  assert "3 images" in page.get_by_role("tabpanel").inner_text()
  with page.expect_download() as download:
    page.get_by_role("button", name="PNGs, zipped").click()
  with zipfile.ZipFile(download.value.path()) as archive:
    assert archive.namelist() == ["000_a_b.png", "001_a_b.png", "002_a_b.png"]
    image = np.asarray(Image.open(archive.open("002_a_b.png")))
  np.testing.assert_array_equal(image, np.broadcast_to(np.uint8([20, 100, 125]), (8, 8, 3)))


def test_what_is_wrong_is_said_and_the_page_goes_on(browser, url):
  page = open_page(browser, url)
  wait_for(page, [[40, 20, 0]])
  choose(page, "seed", "-3")
  page.get_by_text("give a whole number from 0 to 4294967295").wait_for()
  choose(page, "seed", "1")
  wait_for(page, [[40, 20, 1]])
  page.get_by_label("w of each image").fill("1, much")
  page.get_by_text("give numbers: 0, 0.5, 1").wait_for()
  page.get_by_label("w of each image").fill("1, 2")
  wait_for(page, [[40, 40, 1], [40, 80, 61]])
  choose(page, "steps", "1/3,2/3")
  page.get_by_text("steps='1/3,2/3' is no schedule").wait_for()


def test_the_other_tabs_interpolate_and_compare(browser, url):
  page = open_page(browser, url)
  page.get_by_role("tab", name="Between two noises").click()
  wait_for(page, [[40, 20, round(np.sin(a))] for a in np.linspace(0, np.pi / 2, 9)])
  page.get_by_role("tab", name="One step beside 128").click()
  page.get_by_role("button", name="Draw both").click()
  page.get_by_text("times as long").wait_for()
  centre = lambda place: pixels(page, place)[20, 20].tolist()
  assert (centre(0), centre(1)) == ([10, 20, 0], [1280 % 251, 20, 0])


def test_two_users_at_once_get_their_own_pictures(browser, url):
  pages = [open_page(browser, url) for _ in range(2)]
  for seed, page in enumerate(pages, 2):
    choose(page, "seed", str(seed))
  for seed, page in enumerate(pages, 2):
    wait_for(page, [[40, 20, seed]])
