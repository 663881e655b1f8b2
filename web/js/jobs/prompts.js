// What prompts do while a job trains: the host's one choice (yield, finish or refuse), and how many it holds back.
import { api } from "../../../../scripts/api.js";
import { throttled } from "../lib/dom.js";
import { get, post } from "../lib/http.js";

const CHANGED = "chromakit.settings";
const MILLISECONDS = 1000;

/** @type {Set<() => void>} */
const listeners = new Set();
/** @type {string | null} */
let choice = null; // null: not known yet
let held = 0;
let heard = 0; // how often the host has told by itself

/** The choice, or null before it is known; and the number of prompts that wait for the job. */
export const manners = () => ({ choice, held });

/** Call `listener()` when either changed; returns what ends it. @param {() => void} listener */
export function onManners(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

/** @param {HostSettings} found */
function take(found) {
  choice = found.prompts_while_training;
  held = found.held;
  for (const listener of [...listeners]) listener();
}

/**
 * Take an answer, unless the host has told something since it was asked for: that is newer.
 * @param {() => Promise<HostSettings>} ask
 */
async function takeAnswer(ask) {
  const before = heard;
  const found = await ask();
  if (heard === before) take(found);
}

async function load() {
  try {
    await takeAnswer(() => get("settings"));
  } catch (error) {
    console.warn("ChromaKit: the host's settings could not be read:", error);
  }
}

/** Choose for the host. Throws Error with its words. @param {unknown} value */
export async function choose(value) {
  await takeAnswer(() => post("settings", { prompts_while_training: value }));
}

/** Begin to follow the host; called once. */
export function startManners() {
  const again = throttled(load, MILLISECONDS);
  api.addEventListener(CHANGED, ({ detail }) => {
    heard += 1;
    take(detail);
  });
  api.addEventListener("reconnected", load);
  // The queue became longer or shorter; only then does the number of held prompts change.
  api.addEventListener("status", () => choice === "finish" && again());
  return load();
}
