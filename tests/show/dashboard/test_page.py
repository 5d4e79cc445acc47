"""The page in a real browser, clicked and typed through."""

import re
import time

import pytest

pytest.importorskip("uvicorn", reason="the live page needs starlette and uvicorn")
pytest.importorskip("playwright", reason="playwright drives the browser")

from playwright.sync_api import expect, sync_playwright

from peelwise.records.run import WHOLE_MODEL, Event, MatrixShare, Measurement, RunInfo, Statistic, StepRow, VerdictRow
from peelwise.store.writer import RunWriter
from runs import event, measurement_row, run_info
from show.dashboard.asking import served

HOSTILE = '<img src=x onerror="window.harm=1"><script>window.harm=1</script>{{harm}}'


@pytest.fixture(scope="module")
def browser(chromium):
    with sync_playwright() as driver:
        # The browser's own calls home stay on this machine too.
        quiet = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]
        browser = driver.chromium.launch(executable_path=chromium, args=quiet)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page that must not complain, nor ask for anything but its own server."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(10_000)
    complaints, asked = [], set()
    # The browser's advice about reading a canvas back is for these tests, not for the page.
    page.on("console", lambda message: message.text.startswith("Canvas2D") or complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(error.message))
    page.on("request", lambda request: asked.add(re.match(r"\w+://[^/]*|\w+:", request.url).group()))
    page.complaints, page.asked = complaints, asked
    yield page
    assert complaints == []
    assert all(address.startswith("http://127.0.0.1:") for address in asked)
    context.close()


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """Two runs of three blocks: the first with a cloud, the second without; block 0 turns red in the first."""
    path = tmp_path_factory.mktemp("page") / "run.db"
    for name, cloud in (("clouded", True), ("plain", False)):
        with RunWriter(path, run_info(name)) as writer:
            for step in range(200):
                writer.step(StepRow(step, 4.0 - step / 100, 0.02))
                if step % 10 == 9:
                    writer.measurement(look(step, cloud, "RG?" if step > 100 else "Y?G"))
            writer.event(event(120, text="block 0 turned red"))
            writer.event(event(150, text="no gradient", level="warning", block=2))
    return path


def look(step, cloud, letters):
    rows = [Statistic("energy", b, 1.0 + b, to_median=4.0 if b == 1 else 1.0) for b in range(3)]
    rows += [Statistic("recoverable", b, 0.02 * b + 0.01, 0.0, 0.05) for b in range(3)]
    if cloud:
        rows += [Statistic("bound_upper", WHOLE_MODEL, 3.5), Statistic("bound_lower", WHOLE_MODEL, 2.2)]
    matrices = tuple(
        MatrixShare(b, f"blocks.{b}.{name}", share) for b in range(3) for name, share in (("out", 0.7), ("up", 0.3))
    )
    verdicts = (VerdictRow(0, "red", "0.05 nats lie above the margin", step),) if step == 109 else ()
    return Measurement(
        step,
        "alone",
        4.1 - step / 100,
        0.5,
        0.02,
        letters,
        statistics=tuple(rows),
        matrices=matrices,
        verdicts=verdicts,
    )


@pytest.fixture(scope="module")
def ask(history):
    with served(history) as asker:
        yield asker


def opened(page, ask, view=""):
    page.goto(f"http://127.0.0.1:{ask.port}/{view}")
    page.wait_for_selector("html[data-ready]")
    return page


def drawn(page):
    """Wait until what was asked for is on the screen: two frames."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def cell(page, x, y):
    """The colour of the heat map at a share of its width and height, as ``[r, g, b, a]``."""
    script = """([x, y]) => { const canvas = document.querySelector('.heat-stage canvas');
        const r = devicePixelRatio, w = canvas.width - 70 * r, h = canvas.height - 22 * r;
        return [...canvas.getContext('2d').getImageData(58 * r + x * w, y * h, 1, 1).data] }"""
    drawn(page)
    return page.evaluate(script, [x, y])


def test_it_shows_the_newest_run(page, ask):
    opened(page, ask)
    assert page.title() == "plain – peelwise"
    article = page.get_by_role("article", name="plain")
    assert "finished" in article.inner_text()
    assert article.locator(".number").inner_text() == "2.1100 nats per token"
    assert article.locator(".tally li:visible").all_inner_texts() == [
        "1\nR\ncertified under-optimised",
        "0\nY\nrecoverable",
        "1\nG\nnothing above the margin found",
        "1\n?\nundecided",
    ]
    assert page.locator(".what").inner_text().startswith("on the probe, at step 199, 0.1000 below that of step 189.")
    assert page.locator(".cloud").count() == 0  # no bounds, no cloud
    assert "2.0 % of the wall time so far, 3.0 % asked for" in article.inner_text()
    assert page.locator("#connection").inner_text() == "at rest"


LEVELS = {"cost": "info", "unlike-scales": "warning"}
FIRST = {
    "no measurement": ("", (), "Nothing measured yet, and no alert so far."),
    "nothing wrong": (
        "GY?",
        ((20, "block 0 turned red", "red", 0),),
        "Healthy as far as was seen: no alert holds, 2 of 3 blocks are decided and none is red.",
    ),
    "a red that holds": (
        "GR?",
        ((20, "block 1 turned red", "red", 1), (21, "it is slow", "cost", None)),
        "Look here, because: block 1 turned red",
    ),
    "none decided": ("???", (), "No block is decided yet, and no alert so far."),
    "unlike, and undecided": (
        "GG?",
        ((20, "block 2 is unlike the others", "unlike-scales", 2), (21, "it is slow", "cost", None)),
        "Look here, because: block 2 is unlike the others",
    ),
    "unlike, and decided": (
        "GG?",
        ((20, "block 1 is unlike the others", "unlike-scales", 1),),
        "Healthy as far as was seen: no alert holds, 2 of 3 blocks are decided and none is red.",
    ),
    "a mistake": (
        "GG?",
        ((20, "labels are shifted", "labels-shifted", None),),
        "Look here, because: labels are shifted",
    ),
}


@pytest.mark.parametrize("case", FIRST)
def test_the_first_sentence_says_whether_to_look_and_where(page, tmp_path, case):
    letters, told, sentence = FIRST[case]
    path = tmp_path / "run.db"
    with RunWriter(path, run_info("told")) as writer, served(path) as ask:
        writer.step(StepRow(0, 4.0, 0.0))
        for step, text, kind, block in told:
            writer.event(Event(step, LEVELS.get(kind, "alert"), kind, text, block))
        if letters:
            writer.measurement(Measurement(30, "alone", 2.0, 0.1, 0.0, letters))
        opened(page, ask)
        expect(page.locator(".first")).to_have_text(sentence)


def test_the_cloud_is_shown_where_its_bounds_are(page, ask):
    opened(page, ask, "#runs=0.1")
    assert page.locator(".cloud.red, .cloud.yellow, .cloud.green").count() == 3
    assert page.locator(".cloud-letter").all_text_contents() == ["R", "Y", "G"]  # told without colour too
    assert "within the margin of what the composed witness reaches" in page.locator(".loss figcaption").inner_text()
    # 3.5 is the edge between red and yellow, higher up on the screen than 2.2.
    red, green = (page.locator(f".edge.{colour}").bounding_box()["y"] for colour in ("red", "green"))
    assert red < green


def test_choosing_a_block_changes_the_view_and_the_link(page, ask):
    opened(page, ask, "#runs=0.1")
    assert page.locator(".block h3").inner_text().startswith("Block 0")  # the red one, unless told otherwise
    assert (
        "0.05 nats lie above the margin. Rests on the measurement at step 109." in page.locator(".reason").inner_text()
    )
    page.get_by_role("radio", name="Block 1, blocks.1").click()
    page.wait_for_selector(".block h3:has-text('Block 1')")
    page.wait_for_selector(".small-chart")
    assert page.url.endswith("#runs=0.1&block=1")
    recoverable = page.locator('[data-statistic="recoverable"]')
    expect(recoverable).to_contain_text("+0.0300 [0.0000, +0.0500] nats per token at step 199")
    expect(recoverable.locator(".whisker")).to_have_count(20)
    assert page.locator(".matrices tbody tr").all_inner_texts()[0].split() == ["out", "70", "%", "70", "%"]
    page.go_back()
    page.wait_for_selector(".block h3:has-text('Block 0')")
    page.get_by_role("button", name="see block 2").click()
    page.wait_for_selector(".block h3:has-text('Block 2')")
    page.get_by_role("radio", name="The whole model").click()
    page.wait_for_selector(".block h3:has-text('The whole model')")
    assert page.url.endswith("block=all")


def test_a_link_shows_the_same_view_again(page, ask):
    view = "#runs=0.2,0.1&block=2&show=energy&steps=50-149"
    opened(page, ask, view)
    assert page.get_by_role("article").count() == 2
    assert page.locator(".heat h3").all_inner_texts() == ["Input-whitened score against its own median"] * 2
    assert page.locator(".block h3").first.inner_text().startswith("Block 2")
    assert page.locator("#first-step").input_value() == "50"
    assert page.locator("#colour-by").input_value() == "energy"
    rows = page.locator(".loss details").first
    rows.locator("summary").click()
    rows.locator("tbody th").first.wait_for()  # filled once it is opened
    steps = [int(text) for text in rows.locator("tbody th").all_inner_texts()]
    assert (max(steps), min(steps)) == (149, 50)


def test_malformed_links_show_something_sensible(page, ask):
    for view in ("#runs=9.9", "#runs=<b>&block=x&steps=9-1&show=nothing", "#block=99", "#%%%"):
        opened(page, ask, view)
        assert page.get_by_role("article").count() == 1
        page.wait_for_selector(".small-chart")


def test_the_heat_map_has_the_colours_of_the_verdicts(page, ask):
    opened(page, ask, "#runs=0.1")
    red = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--red').trim()")
    assert cell(page, 0.9, 0.2)[:3] == [int(red[i : i + 2], 16) for i in (1, 3, 5)]
    assert cell(page, 0.01, 0.2)[3] == 0  # before the first look
    yellow = {tuple(cell(page, 0.3 + i / 500, 0.2)) for i in range(12)}
    assert len(yellow) > 1  # striped
    page.locator("#colour-by").select_option("energy")
    page.wait_for_selector(".heat h3:has-text('against its own median')")
    plain, above = cell(page, 0.5, 0.1), cell(page, 0.5, 0.45)
    assert plain != above
    mark = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--mark').trim()")
    assert abs(above[0] - int(mark[1:3], 16)) < 30  # four times its median: the full colour


def test_with_the_keyboard_alone(page, ask):
    opened(page, ask, "#runs=0.1")
    page.locator(".pick[aria-checked=true]").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(".block h3:has-text('Block 1')")
    expect(page.locator(".pick:focus")).to_have_attribute("data-block", "1")
    expect(page.locator(".pick[tabindex='0']")).to_have_count(1)
    page.keyboard.press("End")
    page.wait_for_selector(".block h3:has-text('The whole model')")
    page.locator(".heat-stage").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    status = page.locator(".heat [role=status]")
    expect(status).to_have_text("block 1 (blocks.1), step 9: undecided")
    page.keyboard.press("End")
    page.keyboard.press("ArrowUp")
    expect(status).to_have_text("block 0 (blocks.0), step 199: certified under-optimised")
    page.keyboard.press("Enter")
    page.wait_for_selector(".block h3:has-text('Block 0')")
    # Everything that can be used can be reached, in the order of the page.
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                """() => { const at = document.activeElement;
                return at === document.body ? '' : at.textContent.trim().slice(0, 12) || at.id }"""
            )
        )
    for words in ("Skip to the", "Runs (1 of 2", "first-step", "Loss as a ta", "Blocks over", "see block 2"):
        assert any(each.startswith(words) for each in reached), (words, reached)


def test_what_a_screen_reader_is_told(page, ask):
    opened(page, ask, "#runs=0.1")
    tree = page.locator("body").aria_snapshot()
    for words in (
        'heading "peelwise runs" [level=1]',
        'heading "clouded" [level=2]',
        'radiogroup "Block to show"',
        'radio "Block 0, blocks.0: certified under-optimised" [checked]',
        "Loss over steps. Training loss 2.0100 at step 199.",
        "Heat map of 3 blocks by 20 columns of measurements. Now 1 red, 0 yellow, 1 green, 1 grey.",
        "Solo gain of 20 measurements. Latest: +0.0100",
        "alert:",
    ):
        assert words in tree, (words, tree)
    page.locator(".heat details summary").click()
    table = page.get_by_role("table", name="Blocks over steps")
    expect(table.locator("tbody tr")).to_have_count(20)  # filled once it is opened
    assert table.locator("tbody tr").first.inner_text().split() == ["199", "R", "G", "?"]


def test_choosing_steps_by_dragging_and_by_number(page, ask):
    opened(page, ask, "#runs=0.1")
    box = page.locator(".loss .plot-host").bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 100)
    expect(page.locator(".loss .readout")).to_contain_text("training")
    expect(page.locator(".heat-cursor.shown")).to_have_count(1)  # at the same step in all charts
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 100)
    page.mouse.up()
    page.wait_for_selector("#all-steps:enabled")
    first, last = map(int, re.search(r"steps=(\d+)-(\d+)", page.url).groups())
    assert first <= 2
    assert 70 < last < 110
    page.locator("#first-step").fill("20")
    page.locator("#last-step").fill("40")
    page.locator("#show-steps").click()
    page.wait_for_url("**steps=20-40")
    page.locator("#all-steps").click()
    page.wait_for_selector("#all-steps:disabled")
    assert "steps" not in page.url


def test_runs_side_by_side(page, ask):
    opened(page, ask, "#runs=0.1")
    page.locator(".picker summary").click()
    page.get_by_role("checkbox", name="plain run 2, finished").check()
    page.wait_for_selector(".several")
    drawn(page)
    boxes = [article.bounding_box() for article in page.get_by_role("article").all()]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[1]["x"] > boxes[0]["x"] + 400
    ticks = [plot.locator(".tick").all_text_contents() for plot in page.locator(".loss .plot").all()]
    assert ticks[0] == ticks[1]  # the same scales, or they could not be compared
    page.get_by_role("checkbox", name="clouded run 1, finished").uncheck()
    page.wait_for_selector("main:not(.several)")
    assert page.get_by_role("article").get_attribute("data-run") == "0.2"


def test_it_follows_live_and_tells_of_alerts(page, tmp_path):
    path = tmp_path / "live.db"
    with RunWriter(path, run_info("live")) as writer, served(path) as ask:
        writer.step(StepRow(0, 4.0, 0.0))
        opened(page, ask)
        page.wait_for_selector("#connection:has-text('live')")
        expect(page.locator(".what")).to_contain_text("No measurement yet")
        loads = []
        page.on("request", lambda request: loads.append(request.url))
        for step in range(1, 30):
            writer.step(StepRow(step, 4.0 - step / 100, 0.01))
        writer.measurement(measurement_row(29, kind="alone", events=(event(29, text="block 0 is in need"),)))
        page.wait_for_selector(".event:has-text('block 0 is in need')")
        expect(page.locator("#spoken")).to_have_text("Alert at step 29: block 0 is in need")
        expect(page.get_by_role("radio", name="Block 0, blocks.0: certified under-optimised")).to_have_count(1)
        page.wait_for_selector("[data-statistic=energy]")
        loads.clear()
        writer.measurement(measurement_row(39, kind="alone"))
        page.wait_for_selector("[data-statistic=energy] .value:has-text('at step 39')")
        assert loads == []  # what came was enough to draw it
        page.locator("#colour-by").focus()
        page.evaluate("document.querySelector('article').dataset.kept = 'yes'")
        rows = tuple(Statistic("unheard_of", b, 1.0) for b in range(3))
        writer.measurement(Measurement(49, "ranking", 2.0, 0.1, 0.0, "RG?", statistics=rows))
        page.wait_for_selector("[data-statistic=unheard_of] h4:has-text('Unheard of')")
        drawn(page)
        assert page.locator("article[data-kept=yes]").count() == 1  # nobody loses their place
        assert page.evaluate("document.activeElement.id") == "colour-by"
        page.locator(".heat details summary").click()
        expect(page.locator(".heat tbody th")).to_have_text(["49", "39", "29"])  # each once
        writer.close()
        page.wait_for_selector("#connection:has-text('at rest')")
        with RunWriter(path, run_info("second")) as second:  # nobody chose a run: the newest is shown
            page.wait_for_selector("h2:has-text('second')")
            second.step(StepRow(0, 4.0, 0.0))


def test_it_comes_back_after_the_server_was_away(page, tmp_path):
    path = tmp_path / "live.db"
    with RunWriter(path, run_info("live")) as writer:
        writer.step(StepRow(0, 4.0, 0.0))
        with served(path) as ask:
            port = ask.port
            opened(page, ask)
            page.wait_for_selector("#connection:has-text('live')")
        page.wait_for_selector("#connection:has-text('no connection')")
        writer.step(StepRow(1, 3.5, 0.0))
        with served_at(path, port):
            page.wait_for_selector("#connection:has-text('live')", timeout=15_000)
            page.wait_for_selector(".what:has-text('step 1, loss 3.5000')")
    page.complaints[:] = [text for text in page.complaints if "ERR_" not in text]  # the browser says so itself


def served_at(path, port):
    from contextlib import contextmanager

    from peelwise.show.dashboard.serve import Address, Server

    @contextmanager
    def serving():
        server = Server([path], Address(port=port))
        thread = server.beside()
        yield
        server.stop()
        thread.join(10)

    return serving()


def test_what_a_history_holds_does_nothing_on_the_page(page, tmp_path):
    path = tmp_path / "run.db"
    info = RunInfo(HOSTILE, HOSTILE, 1, (HOSTILE, "b"), budget=0.03)
    with RunWriter(path, info) as writer:
        writer.step(StepRow(0, 1.0, 0.0))
        rows = (Statistic(HOSTILE, 0, 1.0, to_median=1.0), Statistic("energy", 0, 1.0))
        verdicts = (VerdictRow(0, "red", HOSTILE, 0),)
        matrices = (MatrixShare(0, HOSTILE, 1.0),)
        happened = (event(0, text=HOSTILE, suggestion=HOSTILE, kind=HOSTILE),)
        writer.measurement(
            Measurement(
                0,
                "ranking",
                1.0,
                0.1,
                0.0,
                "RG",
                statistics=rows,
                verdicts=verdicts,
                matrices=matrices,
                events=happened,
            )
        )
    with served(path) as ask:
        opened(page, ask, f"#block=0&show={HOSTILE}")
        page.wait_for_selector(".matrices table")
        for summary in page.locator("article summary").all():
            summary.click()
        page.locator(".heat details tbody th").first.wait_for()  # the last thing that is filled once it is opened
        assert page.evaluate("window.harm") is None
        assert page.locator("main img, main script").count() == 0
        assert page.locator("h2").inner_text() == HOSTILE
        assert HOSTILE in page.locator(".event").first.inner_text()


def test_the_token_leaves_the_address(page, history):
    with served(history, token=True) as ask:
        page.goto(f"{ask.server.url}#runs=0.1&block=1")
        page.wait_for_selector("html[data-ready]")
        assert page.url == f"http://127.0.0.1:{ask.port}/#runs=0.1&block=1"
        assert page.evaluate("document.cookie") == ""  # no script can read it
        page.reload()
        page.wait_for_selector("html[data-ready]")
        page.wait_for_selector(".block h3:has-text('Block 1')")


def test_no_script_of_another_page_can_read_it(browser, ask, history):
    """A page on another port of this machine tries what it can."""
    import http.server
    import threading

    attack = f"""<!DOCTYPE html><iframe src="http://127.0.0.1:{ask.port}/"></iframe><script>
        const found = []; const to = "http://127.0.0.1:{ask.port}";
        const quiet = {{mode: "no-cors"}}, post = {{method: "POST"}};
        const tries = [fetch(to + "/api/runs"), fetch(to + "/api/runs", quiet), fetch(to + "/", post)];
        Promise.all(tries.map((each) => each.then((answer) => answer.text()).catch(() => ""))).then((texts) => {{
          const stream = new EventSource(to + "/api/stream?from=0.1@0.0.0");
          stream.onopen = () => {{ document.title = "leak"; }};
          stream.onerror = () => {{ document.title = texts.join("") ? "leak" : "nothing"; stream.close(); }};
        }});</script>"""

    class Evil(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(attack.encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Evil)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
    deadline = time.monotonic() + 10
    while not page.title() and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    assert page.title() == "nothing"
    assert page.frames[1].locator("article").count() == 0
    page.close()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("width", "scheme"), [(1600, "light"), (1280, "dark"), (360, "light")])
def test_any_width_light_and_dark(browser, ask, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened(page, ask, "#runs=0.1,0.2&show=energy")
    page.wait_for_selector(".small-chart")
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    page.close()


def test_a_series_that_grows_keeps_its_extremes_and_its_newest_row(page, ask):
    """Rows are step, block, value, interval, distance from the median, and what the place spans."""
    opened(page, ask)
    rows = [[step, 0, {3: 90.0, 4: -7.0, 6: None}.get(step, 1.0 + step), None, None, None] for step in range(9)]
    halved = "async (rows) => (await import('/static/data.js')).halved(rows)"
    once = page.evaluate(halved, rows)
    assert [row[0] for row in once] == [0, 2, 4, 6, 8]
    assert [row[6:] for row in once] == [[1, 1], [2, 3], [-7, 90], [6, 6], [8, 9]]
    twice = page.evaluate(halved, once)
    assert [row[0] for row in twice] == [0, 4, 8]
    assert twice[1] == [4, 0, -7, None, None, None, -7, 90]
    assert page.evaluate(halved, [[0, 0, None, None, None, None]])[0][6:] == [None, None]


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """60 blocks by 10,000 looks: the last block is red always, block 5 in one look alone."""
    path = tmp_path_factory.mktemp("big") / "big.db"
    blocks, looks = 60, 10_000
    letters = ["G" * 59 + "R"] * looks
    letters[4_321] = "G" * 5 + "R" + "G" * 53 + "R"
    with RunWriter(path, RunInfo("big", "M", 1, tuple(f"layers.{b}" for b in range(blocks)))) as writer:
        parts = []  # one transaction is quicker

        def insert(sql, rows):
            parts.append((sql, list(rows)))

        insert(
            "INSERT INTO probes (run_id, step, time, kind, probe_loss, seconds, share, letters)"
            " VALUES (1, ?, 0, 'ranking', 2, 1, 0.03, ?)",
            enumerate(letters),
        )
        insert(
            "INSERT INTO steps (run_id, step, time, loss, share) VALUES (1,?,0,2.0,0.03)",
            [(step,) for step in range(looks)],
        )
        for block in (7, 8):  # one swells for one look; the other does not
            numbers = [50.0 if block == 7 and step == 8_888 else 1.0 for step in range(looks)]
            insert(
                "INSERT INTO statistics (probe_id, name, block, value, to_median) VALUES (?, 'energy', ?, ?, ?)",
                [(step + 1, block, number, number) for step, number in enumerate(numbers)],
            )
        writer._keeper.write(parts, 60)
    with served(path) as asker:
        yield asker


def red_pixels(page, block, blocks):
    """How many pixels wide a block's red is on the heat map."""
    red = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--red').trim()")
    rgb = [int(red[i : i + 2], 16) for i in (1, 3, 5)]
    script = """([y, rgb]) => { const canvas = document.querySelector('.heat-stage canvas');
        const row = canvas.getContext('2d').getImageData(0, y * (canvas.height - 22), canvas.width, 1).data;
        let count = 0;
        for (let i = 0; i < row.length; i += 4) count += rgb.every((part, c) => row[i + c] === part);
        return count }"""
    drawn(page)
    return page.evaluate(script, [(block + 0.5) / blocks, rgb])


def test_many_blocks_and_records_are_drawn_from_few_numbers(page, big):
    opened(page, big)
    assert len(big("/api/overview?run=0.1").content["looks"]["letters"]) <= 1_200
    assert page.locator(".pick").count() == 61
    rows = {page.locator(".pick").nth(i).bounding_box()["y"] for i in range(0, 61, 5)}
    assert len(rows) <= 3
    red = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--red').trim()")
    assert cell(page, 0.5, 0.99)[:3] == [int(red[i : i + 2], 16) for i in (1, 3, 5)]


def test_one_red_look_among_ten_thousand_is_seen(page, big):
    opened(page, big)
    assert (red_pixels(page, 4, 60), red_pixels(page, 5, 60), red_pixels(page, 6, 60)) == (0, 2, 0)
    assert "up to 9 measurements share a column: the worst is shown" in page.locator(".heat figcaption").inner_text()
    opened(page, big, "#steps=4300-4350")  # loaded again: every look has its own column
    page.wait_for_selector("[aria-label*='by 51 columns of measurements']")
    wide = red_pixels(page, 59, 60)
    assert red_pixels(page, 5, 60) == pytest.approx(wide / 50, abs=2)
    assert "share a column" not in page.locator(".heat figcaption").inner_text()


def test_one_outlier_among_ten_thousand_is_seen(page, big):
    opened(page, big, "#show=energy&block=7")
    page.wait_for_selector(".heat figcaption:has-text('the farthest from its median is shown')")
    assert (
        "Grey: from the lowest to the highest of measurements that share a place" in page.locator(".block").inner_text()
    )
    shaded = page.locator("[data-statistic=energy] .shared").bounding_box()
    assert shaded["height"] > 60
    page.locator(".pick[data-block='8']").click()
    page.wait_for_selector(".block h3:has-text('Block 8')")
    drawn(page)
    assert page.locator("[data-statistic=energy] .shared").bounding_box()["height"] < 2
