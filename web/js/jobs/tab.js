// The sidebar tab: the list of jobs, or one of them.
import { app } from "../../../../scripts/app.js";
import { fill, h, say } from "../lib/dom.js";
import { t } from "../lib/words.js";
import { openRoom } from "../room/room.js";
import { JobList } from "./list.js";
import { onManners } from "./prompts.js";
import { find, listen } from "./store.js";
import { JobView } from "./view.js";
import { help, mannersWords } from "./words.js";

const TAB = "chromakit";

/** @type {HTMLElement | null} */
let holder = null; // the element that the host gives while the tab is open
/** @type {HTMLElement | null} */
let root = null;
/** @type {JobView | JobList | null} */
let room = null; // what is shown in it
/** @type {string | null} */
let opened = null; // the job that is open, kept while the tab is closed
/** @type {(() => void) | null} */
let unlisten = null;
/** @type {(() => void) | null} */
let unfollow = null;
const note = h("p.ck-faint", { role: "status" }); // what prompts do meanwhile

/** What `registerSidebarTab` takes. @returns {Parameters<ExtensionManager["registerSidebarTab"]>[0]} */
export function tab() {
  return {
    id: TAB,
    icon: "pi pi-chart-line",
    title: "Chroma",
    tooltip: "chromakit.tab.tooltip", // the host looks it up
    type: "custom",
    render,
    destroy,
  };
}

/** Open the tab, at this job if one is given. @param {string} [id] */
export function openJobs(id) {
  if (id) opened = id;
  const tabs = app.extensionManager.sidebarTab;
  if (tabs.activeSidebarTab?.id !== TAB) tabs.toggleSidebarTab(TAB);
  else show();
}

/** @param {HTMLElement} element */
function render(element) {
  // The host calls this at each of its own renderings.
  if (holder === element && root?.parentElement === element) return;
  destroy();
  holder = element;
  root = h("div.chromakit.ck-tab");
  element.style.setProperty("height", "100%");
  fill(element, root);
  const ends = [listen(showManners), onManners(showManners)];
  unfollow = () => ends.forEach((end) => end());
  showManners();
  show();
}

function showManners() {
  const words = mannersWords();
  note.hidden = !words;
  if (words) say(note, words);
}

function destroy() {
  unlisten?.();
  unfollow?.();
  room?.destroy();
  holder = root = room = unlisten = unfollow = null;
}

function show() {
  if (!root) return;
  unlisten?.();
  unlisten = null;
  room?.destroy();
  if (opened && !find(opened)) {
    // Not known yet (the page has just been opened), or no longer there.
    const wanted = opened;
    unlisten = listen(() => find(wanted) && opened === wanted && show());
  }
  const job = opened && find(opened);
  room = job ? new JobView(job, leave) : new JobList(open);
  const wide = h("button", { "data-action": "room", onclick: () => openRoom(opened ? { job: opened } : {}) }, t("room.open"));
  fill(root, h("header", h("div.ck-row", h("h1", t("tab.title")), h("span.ck-group", help("guide"), wide)), note), room.element);
}

/** @param {string} id */
function open(id) {
  opened = id;
  show();
  root?.scrollTo(0, 0);
}

function leave() {
  opened = null;
  show();
}
