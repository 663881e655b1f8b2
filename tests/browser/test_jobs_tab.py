"""The Chroma tab in the host's own page: a job is started, watched, steered, compared, used and deleted there."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import pytest
from PIL import Image

from _host import Host
from _workflows import change, load_api, load_window
from after_a_run import as_after_a_run, image_to_show
from prompts import ACTIVE
from restarting import restarted
from tools.page import drawn, ready
from tools.workflows.look import lying
from training_page import RENDERER, SIZE, THEME, build, losing_the_first, start, stop_all, until

OPEN = """() => { const tabs = window.app.extensionManager.sidebarTab;
    if (tabs.activeSidebarTab?.id !== 'chromakit') tabs.toggleSidebarTab('chromakit') }"""
CLOSE = """() => { const tabs = window.app.extensionManager.sidebarTab;
    if (tabs.activeSidebarTab?.id === 'chromakit') tabs.toggleSidebarTab('chromakit') }"""
ASK = """() => {
    // the panel on the data set node asks the host
    const node = window.app.graph.nodes.find(node => node.type === 'ChromaDataset');
    const widget = node.widgets.find(each => each.name === 'trigger');
    widget.value = 'zxq';
    widget.callback?.('zxq');
}"""
FAILED = ("it fails", "failed")
PROMPTS = "a [trigger] emblem on a red background\na red circle"


IN_SIGHT = """() => {
  const { scale, offset } = app.canvas.ds, tab = document.querySelector('.ck-tab').getBoundingClientRect();
  return scale >= 0.6 && app.graph.nodes.every(node => (node.pos[0] + offset[0]) * scale >= tab.right);
}"""
"""Whether the whole graph lies beside the tab, and is large enough for its text."""


@pytest.fixture(autouse=True)
def clean(window, server: Host):
    yield
    window.page.evaluate(CLOSE)
    window.page.evaluate(RENDERER, False)
    window.page.evaluate(THEME, "dark")
    stop_all(server)


def status(server: Host, job: str) -> dict[str, Any]:
    return server.get(f"/chromakit/jobs/{job}")


def open_list(page: Any) -> None:
    page.evaluate(OPEN)
    if page.locator(".ck-back").count():
        page.locator(".ck-back").click()
    page.wait_for_selector(".ck-list")


def open_job(page: Any, job: str) -> None:
    open_list(page)
    page.locator(f".ck-list li[data-job='{job}'] .ck-open").click()
    page.wait_for_selector(f".ck-job[data-job='{job}']")


def shown_step(page: Any) -> int:
    """The step in the open job's line of numbers."""
    found = re.match(r"(\d+) / \d+", page.locator(".ck-job > .ck-strong").inner_text())
    return int(found[1]) if found else -1


def charted(page: Any) -> int:
    """The last step that the open job's curve shows in its legend."""
    text = (
        page.locator(".ck-curves .u-legend .u-series").first.inner_text() if page.locator(".u-legend").count() else ""
    )
    found = re.search(r"\d+", text)
    return int(found[0]) if found else -1


def chip(page: Any) -> str:
    return page.locator(".ck-job .ck-chip").inner_text()


def act(page: Any, name: str) -> None:
    page.locator(f"[data-action='{name}']").click()


@pytest.mark.slow
@pytest.mark.parametrize("renderer", ["canvas", "vue"])
def test_a_job_is_started_watched_and_steered(window, server: Host, renderer: str):
    page = window.page
    page.evaluate(RENDERER, renderer == "vue")
    job = start(page, server, f"in the tab, {renderer}", prompt=PROMPTS)
    open_job(page, job)
    until(page, server, lambda: charted(page) >= 3, "the curve to grow")
    before = charted(page)
    until(page, server, lambda: charted(page) > before, "the curve to grow on")
    window.screenshot(f"tab_{renderer}_running")

    frozen = paused(window, server, job)
    page.wait_for_timeout(1500)
    assert status(server, job)["step"] == frozen == shown_step(page)

    act(page, "sample")
    until(page, server, lambda: f"step-{frozen:06d}-0.png" in status(server, job)["samples"], "previews in a pause")
    until(page, server, lambda: page.locator(f".ck-strip [data-step='{frozen}']").count() == 2, "both strips")

    resume = page.locator("[data-action='pause']", has_text="Resume")  # as it is called once the previews are made
    until(page, server, lambda: chip(page) == "paused" and resume.count(), "the pause after the previews")
    resume.click()
    until(page, server, lambda: chip(page).startswith("running") and charted(page) > frozen, "the curve to go on")
    act(page, "stop")
    until(page, server, lambda: chip(page) == "stopped", "the stop")
    lora = status(server, job)["lora_name"]
    until(page, server, lambda: lora in choices(page), "the LoRA in the lists of files, without a reload")
    assert page.get_by_text("has stopped").count(), "a notice"
    window.screenshot(f"tab_{renderer}_stopped")
    assert window.ours == []


@pytest.mark.slow
def test_a_job_is_found_again_in_a_second_page_and_after_a_reload(window, server: Host):
    page = window.page
    job = training(window, server, "found again")
    frozen = paused(window, server, job)
    curve = server.get(f"/chromakit/jobs/{job}/curve")
    other = page.context.new_page()
    other.goto(server.url)
    ready(other)
    open_job(other, job)
    until(other, server, lambda: charted(other) == frozen, "the same curve in a second page")
    assert chip(other) == "paused" and shown_step(other) == frozen
    act(other, "pause")  # which is Resume now
    until(page, server, lambda: chip(page).startswith("running"), "the first page to hear it")
    until(page, server, lambda: charted(page) > frozen and charted(other) > frozen, "both curves")
    other.reload()
    ready(other)
    open_job(other, job)
    until(other, server, lambda: charted(other) > frozen, "the curve after a reload in the middle of it")
    again = server.get(f"/chromakit/jobs/{job}/curve")
    assert again["loss"][: len(curve["loss"])] == curve["loss"]

    act(other, "stop")
    until(page, server, lambda: chip(page) == "stopped", "the first page to hear of the stop")
    other.close()
    assert window.ours == []


def paused(window, server: Host, job: str) -> int:
    """Press Pause, and return the step at which the job stands as soon as the tab shows it."""
    act(window.page, "pause")
    until(window.page, server, lambda: chip(window.page) == "paused", "the pause")
    frozen = status(server, job)["step"]
    until(window.page, server, lambda: shown_step(window.page) == frozen, "the step that it stands at")
    return frozen


def choices(page: Any) -> list[str]:
    """What a fresh Chroma Apply LoRA offers, and the host's own loader too."""
    return page.evaluate(
        """() => ['ChromaApplyLora', 'LoraLoaderModelOnly'].map(type => {
            const node = window.LiteGraph.createNode(type);
            const widget = node.widgets.find(one => one.name === 'lora' || one.name === 'lora_name');
            const { values } = widget.options;
            return typeof values === 'function' ? values() : values;
        }).reduce((a, b) => a.filter(name => b.includes(name)))"""
    )


def training(window, server: Host, name: str) -> str:
    """A job that trains for ever, open in the tab."""
    job = start(window.page, server, name)
    open_job(window.page, job)
    until(window.page, server, lambda: shown_step(window.page) >= 1, "the first steps")
    return job


def finished(server: Host, page: Any, name: str, steps: int = 4, prompt: str = "") -> str:
    job = start(page, server, name, steps, prompt)
    until(page, server, lambda: status(server, job)["state"] not in ACTIVE, "the end of the job")
    assert status(server, job)["state"] == "completed"
    return job


def test_two_curves_lie_over_one_another(window, server: Host):
    page = window.page
    jobs = [finished(server, page, f"compared {i}", 3 + i) for i in range(2)]
    open_list(page)
    for job in jobs:
        page.locator(f"li[data-job='{job}'] input").check()
    legend = page.locator(".ck-compare .u-legend")
    until(page, server, lambda: legend.count() and "compared 1" in legend.inner_text(), "both curves")
    assert "compared 0" in legend.inner_text()
    window.screenshot("tab_compare")
    before = legend.inner_text()
    page.locator(".ck-compare select").select_option("heldout")
    until(page, server, lambda: legend.inner_text() != before, "the held-out losses")
    page.locator(f"li[data-job='{jobs[0]}'] input").uncheck()
    assert page.locator(".ck-compare").is_hidden()
    assert window.ours == []


@pytest.mark.slow
def test_charts_previews_options_and_log_of_a_job(window, server: Host):
    page = window.page
    job = finished(server, page, "looked into", 4, PROMPTS)
    with losing_the_first(page, f"{job}/curve", f"{job}/samples/.+side=1024"):
        look_into(window, server, job)
    assert window.ours == []


def look_into(window: Any, server: Host, job: str) -> None:
    page = window.page
    open_job(page, job)
    until(page, server, lambda: charted(page) == 4, "the curve, whose first answer was lost")
    views = page.locator(".ck-curves select")
    for view, words in (("heldout", "σ 0.05"), ("gain", "%"), ("lr", "learning rate"), ("seconds", "step time")):
        views.select_option(view)
        until(page, server, lambda w=words: w in page.locator(".ck-curves .u-legend").inner_text(), view)
    views.select_option("loss")
    page.locator(".ck-curves input[type=checkbox]").check()
    page.locator(".ck-curves .ck-chart").focus()
    page.keyboard.press("+")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("0")

    prompts = page.locator(".ck-prompt")
    assert prompts.count() == 2 and "a sks emblem on a red background" in prompts.first.inner_text()
    tags = prompts.first.locator(".ck-tag")
    assert tags.all_inner_texts() == ["step 0", "step 4"]
    prompts.first.locator(".ck-strip [data-step='0']").click()
    assert tags.all_inner_texts()[0] == "step 0"
    prompts.first.locator(".ck-strip [data-step='4']").click()
    slider = prompts.first.locator("input[type=range]")
    slider.focus()
    page.keyboard.press("Home")
    assert prompts.first.locator(".ck-frame").evaluate("e => e.style.getPropertyValue('--ck-share')") == "0%"
    loaded = "images => images.length === 4 && images.every(image => image.complete && image.naturalWidth)"
    large = page.locator(".ck-previews .ck-frame img")
    until(page, server, lambda: large.evaluate_all(loaded), "the previews, of which one was lost on its way")

    page.locator("summary", has_text="All options").click()
    assert "sks_emblem" in page.locator(".ck-settings").inner_text()
    page.locator("summary", has_text="Recipe").click()
    assert "text_attention" in page.locator(".ck-settings").inner_text()
    page.locator(".ck-log summary").click()
    until(page, server, lambda: "completed at step 4" in page.locator(".ck-log pre").inner_text(), "the log")
    assert "Too early to say" in page.locator(".ck-verdict").inner_text()
    page.locator("summary", has_text="LoRAs of earlier steps").click()
    steps = page.locator(".ck-kept")
    steps.locator("[data-step='4']").click()
    until(page, server, lambda: "looked-into-step-000004.safetensors" in steps.inner_text(), "the LoRA of step 4")
    assert "looked-into-step-000004.safetensors" in server.get("/models/loras")
    for theme in ("light", "dark"):
        page.evaluate(THEME, theme)
        drawn(page)
        page.evaluate("() => document.querySelector('.ck-tab').scrollTo(0, 0)")
        window.screenshot(f"tab_{theme}")
    page.set_viewport_size({"width": 800, "height": 500})  # what 200 % zoom leaves of the window
    drawn(page)
    window.screenshot("tab_zoom_200")
    wide = page.locator(".ck-tab").evaluate("e => e.scrollWidth > e.clientWidth + 1")
    page.set_viewport_size(SIZE)
    assert not wide, "nothing is cut off at the right"


@pytest.mark.slow
def test_a_job_is_extended_duplicated_used_and_deleted(window, server: Host):
    page = window.page
    job = finished(server, page, "to the end", 2, "a [trigger] star")
    open_job(page, job)
    page.locator(".ck-actions input").fill("2")
    act(page, "extend")
    until(page, server, lambda: shown_step(page) == 4 and chip(page) == "completed", "two steps more")

    act(page, "again")
    page.wait_for_function("() => window.app.graph.nodes.some(node => node.type === 'ChromaTrainingSettings')")
    drawn(page)
    crowded = "() => app.graph.nodes.filter(node => node.size[1] + 1 < node.computeSize()[1]).map(node => node.type)"
    assert page.evaluate(crowded) == [], "every node has room for what stands on it"
    again = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    (train,) = [node["inputs"] for node in again.values() if node["class_type"] == "ChromaTrainLora"]
    assert (train["name"], train["steps"]) == ("to the end", 4)
    before = len(server.get("/chromakit/jobs"))
    page.evaluate("() => window.app.queuePrompt(0, 1)")
    until(page, server, lambda: not server.get("/queue")["queue_running"], "the prompt")
    assert len(server.get("/chromakit/jobs")) == before, "the same settings are the same job"

    act(page, "use")
    page.wait_for_function("() => window.app.graph.nodes.some(node => node.type === 'ChromaSampler')")
    page.wait_for_function(IN_SIGHT)
    seen = set(server.get("/history"))
    page.evaluate("() => window.app.queuePrompt(0, 1)")
    until(page, server, lambda: set(server.get("/history")) - seen, "the image")
    (prompt,) = set(server.get("/history")) - seen
    assert len(server.images(server.wait(prompt))) == 1
    window.screenshot("tab_used")

    act(page, "delete")
    page.get_by_text("Delete “to the end”?").wait_for()
    page.get_by_role("button", name="Cancel").click()
    assert status(server, job)["state"] == "completed"
    act(page, "delete")
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    page.wait_for_selector(".ck-list")
    assert job not in [one["id"] for one in server.get("/chromakit/jobs")]
    assert page.locator(f"li[data-job='{job}']").count() == 0
    assert window.ours == []


@pytest.mark.parametrize("renderer", ["canvas", "vue"])
def test_graphs_of_a_job_have_room_for_what_comes_onto_their_nodes(window, server: Host, renderer: str):
    page = window.page
    page.evaluate(RENDERER, renderer == "vue")
    job = finished(server, page, f"laid out, {renderer}", 2, "a [trigger] star")
    open_job(page, job)
    with image_to_show(server):
        for kind, node in (("again", "ChromaTrainingStatus"), ("use", "ChromaSampler")):
            act(page, kind)
            page.wait_for_selector(f"[data-action='{kind}']:enabled")
            drawn(page)
            assert node in page.evaluate("() => window.app.graph.nodes.map(node => node.type)")
            assert page.evaluate(IN_SIGHT) and lying(page) == [], kind
            as_after_a_run(page)
            assert lying(page) == [], f"{kind}, after a run"
            window.screenshot(f"tab_{kind}_{renderer}")
    assert window.ours == []


def test_a_failing_job_says_why(window, server: Host):
    page = window.page
    folder = server.base / "input" / "cut_off"
    folder.mkdir(exist_ok=True)
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(whole, "PNG")
    (folder / "one.png").write_bytes(whole.getvalue()[:-1000])  # the header is whole, so only decoding notices
    (folder / "one.txt").write_text("a sks")
    page.evaluate("() => window.app.refreshComboInNodes()")
    build(page, "it fails", 50)
    page.evaluate(
        """() => window.app.graph.nodes.find(node => node.type === 'ChromaDataset')
            .widgets.find(widget => widget.name === 'folder').value = 'cut_off'"""
    )
    page.evaluate("() => window.app.queuePrompt(0, 1)")

    def failed() -> list[dict[str, Any]]:
        return [job for job in server.get("/chromakit/jobs?brief=true") if (job["name"], job["state"]) == FAILED]

    until(page, server, failed, "the failure")
    (job,) = failed()
    message = status(server, job["id"])["message"]
    open_job(page, job["id"])
    assert chip(page) == "failed"
    assert message and message in page.locator(".ck-message").inner_text()
    assert message in page.locator(".chromakit-train").first.inner_text()
    assert page.get_by_text("“it fails” has failed").count(), "a notice, which stays"
    window.screenshot("tab_failed")
    page.locator(".p-toast-close-button").first.click()
    assert window.ours == []


@pytest.mark.slow
def test_a_prompt_gets_the_machine_and_the_job_takes_it_back(window, server: Host):
    page = window.page
    job = training(window, server, "it yields")
    panel = page.locator(".chromakit-train .ck-chip").first
    prompt = server.post_prompt(change(load_api("chroma_1_first_picture"), "ChromaSampler", steps=50, seed=5))
    until(page, server, lambda: chip(page) == "running, yielding", "the tab to say so")
    assert panel.inner_text() == "running, yielding"
    window.screenshot("yielding")
    assert len(server.images(server.wait(prompt))) == 1
    step = status(server, job)["step"]
    until(page, server, lambda: chip(page) == "running" and shown_step(page) > step, "the job to go on")
    assert window.ours == []


def test_events_that_are_missed_are_made_up_for(window, server: Host):
    page = window.page
    job = training(window, server, "unheard")
    page.evaluate("() => window.app.api.socket.close()")  # the page opens another one by itself, after a while
    server.post(f"/chromakit/jobs/{job}/stop")
    until(page, server, lambda: chip(page) == "stopped", "the end that no event told of")
    until(page, server, lambda: charted(page) == status(server, job)["step"], "the curve to its end")
    window.errors.clear()  # of the socket that was closed


@pytest.mark.slow
def test_a_restarted_host_has_the_same_jobs(window, server: Host):
    """The page stays open, as when a user restarts the host with Ctrl-C; settings damaged meanwhile are not used."""
    page = window.page
    for job in server.get("/chromakit/jobs?brief=true"):
        server.post(f"/chromakit/jobs/{job['id']}/delete")
    page.evaluate(OPEN)
    page.get_by_role("button", name="First LoRA").click()  # what a tab without jobs offers
    page.wait_for_function("() => window.app.graph.nodes.some(node => node.type === 'ChromaWaitForTraining')")
    job = start(page, server, "before the restart")
    open_job(page, job)
    until(page, server, lambda: shown_step(page) >= 3, "the first steps")
    settings = server.base / "user" / "chromakit" / "settings.json"
    panel = page.locator("[data-panel=dataset]")
    with restarted(server):
        saved = json.loads((server.base / "output" / "chromakit" / "jobs" / job / "job.json").read_text())
        assert saved["state"] == "interrupted" and saved["checkpoint"] == saved["step"] >= 3
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text('{"prompts_while_training": "fin', encoding="utf-8")
        later = server.base / "output" / "chromakit" / "jobs" / "of-a-later-version"
        later.mkdir()
        (later / "job.json").write_text('{"format": 99}')
        page.evaluate(ASK)
        until(page, server, lambda: "ComfyUI does not answer" in panel.inner_text(), "that nobody answers")
    until(page, server, lambda: "16 images" in panel.inner_text(), "the answer of the host that came back")
    until(page, server, lambda: chip(page) == "interrupted", "the truth of the host that came back")
    assert server.get("/chromakit/settings")["prompts_while_training"] == "yield"
    assert server.log_path.read_text(encoding="utf-8", errors="replace").count("settings.json' is not used") == 1
    step = shown_step(page)
    assert step == status(server, job)["step"] == saved["step"]
    act(page, "resume")
    until(page, server, lambda: chip(page) == "running" and charted(page) > step, "the curve to go on")
    act(page, "stop")
    until(page, server, lambda: chip(page) == "stopped", "the stop")
    open_list(page)
    left_alone = page.locator("section", has=page.get_by_role("heading", name="Left alone"))
    assert "'of-a-later-version' has the format 99, which a later version" in left_alone.inner_text()
    window.screenshot("tab_left_alone")
    window.errors.clear()  # of the socket that was closed


def test_the_host_chooses_what_prompts_do(window, server: Host):
    page = window.page
    setting = "() => window.app.extensionManager.setting.get('Chroma.Training.Prompts')"
    choose = "value => window.app.extensionManager.setting.set('Chroma.Training.Prompts', value)"

    def hosts() -> str:
        return server.get("/chromakit/settings")["prompts_while_training"]

    try:
        page.evaluate(choose, "finish")
        until(page, server, lambda: hosts() == "finish", "the host to take it")
        assert server.post("/chromakit/settings", {"prompts_while_training": "refuse"})[0] == 200
        until(page, server, lambda: page.evaluate(setting) == "refuse", "the page to hear of it")
        job = start(page, server, "while prompts are refused")
        open_list(page)
        said = page.get_by_text("Prompts are refused while a job")
        until(page, server, lambda: said.is_visible(), "the words in the tab")
        window.load(load_window("chroma_1_first_picture"))
        page.evaluate("() => { window.app.queuePrompt(0, 1) }")
        until(page, server, lambda: page.get_by_text("Refused while").count(), "the host's words in the page")
        window.screenshot("prompts_refused")
        assert status(server, job)["state"] in ACTIVE
        page.keyboard.press("Escape")
    finally:
        server.post("/chromakit/settings", {"prompts_while_training": "yield"})
    until(page, server, lambda: page.evaluate(setting) == "yield", "the page to follow")
