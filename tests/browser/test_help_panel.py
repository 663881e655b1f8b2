"""The help pages in the host's own help panel, opened as a user does: select a node, press the info button."""

from __future__ import annotations

import pytest

from _host import pack_node_ids

SELECT = """type => {
  app.graph.clear();
  const node = LiteGraph.createNode(type);
  app.graph.add(node);
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [400, 300];
  app.canvas.selectItems([node]);
  app.canvas.setDirty(true, true);
}"""
SHOWN = """title => {
  const help = document.querySelector('.node-help-content'), image = help?.querySelector('img');
  return help?.querySelector('h1')?.textContent === title && image?.complete && image.naturalWidth > 0;
}"""
TOO_WIDE = """() => {
  const help = document.querySelector('.node-help-content');
  return [help, ...help.querySelectorAll('table')].filter(part => part.scrollWidth > part.clientWidth)
    .map(part => `${part.scrollWidth} > ${part.clientWidth}: ${part.textContent.slice(0, 80)}`);
}"""
"""Parts of a page that would have to be scrolled sideways."""


@pytest.fixture(scope="module")
def wide(session_window):
    """ComfyUI's panel is a share of the window, and our widest table as wide as that of a usual one."""
    before = session_window.page.viewport_size
    session_window.page.set_viewport_size({"width": 1600, "height": 1000})
    yield
    session_window.page.set_viewport_size(before)


@pytest.fixture
def panel(window, wide):
    yield window
    window.page.evaluate("() => { app.canvas.deselectAll(); app.graph.clear() }")
    close = window.page.locator("[aria-label='Toggle properties panel']")
    if close.count():
        close.first.click()


@pytest.mark.parametrize("node", pack_node_ids())
def test_the_panel_shows_text_and_image(panel, node: str):
    title = panel.server.get("/object_info")[node]["display_name"]
    panel.page.evaluate(SELECT, node)
    if not panel.page.locator(".node-help-content").count():
        panel.page.locator("[data-testid=info-button]").first.click()
    panel.page.wait_for_function(SHOWN, arg=title)
    too_wide = panel.page.evaluate(TOO_WIDE)
    panel.page.evaluate("() => document.querySelector('.node-help-content img').scrollIntoView({ block: 'center' })")
    panel.screenshot(f"help_{node}")
    assert too_wide == []
    # The host asks for a page in the window's language first, and takes ours when there is none.
    assert [error for error in panel.ours if ".md)" not in error] == []
