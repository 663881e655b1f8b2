// What the page knows about training jobs: fetched when the page opens, kept current by the host's broadcasts, fetched
// again when some may have been missed. The host holds the truth; nothing here is lost by a reload.
import { api } from "../../../../scripts/api.js";
import { get, ofJob, post, reason } from "../lib/http.js";

/** States of a job that is queued or at work. */
export const ACTIVE = new Set(["queued", "preparing", "running", "paused"]);

const EVENT = "chromakit.job";
const DELETED = "chromakit.job.deleted";
const QUIET_MILLISECONDS = 5000; // without a word about a job at work, ask; no word comes of another process' jobs

/** @type {Map<string, Job>} */
const known = new Map();
/** @type {Set<(id: string | null) => void>} */
const listeners = new Set();
/** @type {Set<(job: Job) => void>} */
const endings = new Set();
/** @type {Map<string, number>} */
const watched = new Map();
/** @type {{id: string, error: string}[]} */
let leftAlone = [];
let heard = 0;
let asked = 0;
let trouble = "";

/** All jobs, newest first; each the newest status or summary that is known. */
export const all = () => [...known.values()].sort((a, b) => b.created - a.created);

/** One job, or undefined. @param {string} id */
export const find = (id) => known.get(id);

/** Why the list could not be fetched, in words; empty when it could. */
export const problem = () => trouble;

/** Folders of jobs that the host cannot read, each with the reason. */
export const unreadable = () => leftAlone;

/**
 * Call `listener(id)` after a job changed, came or went (id null: any of them); returns what ends it.
 * @param {(id: string | null) => void} listener
 */
export function listen(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

/** Call `listener(status)` when a job that this page saw at work has ended. @param {(job: Job) => void} listener */
export function onEnd(listener) {
  endings.add(listener);
}

/**
 * Keep a job's whole status and not only its summary, until the function that this returns is called.
 * @param {string} id
 */
export function watch(id) {
  watched.set(id, (watched.get(id) ?? 0) + 1);
  fetchOne(id);
  let over = false;
  return () => {
    if (over) return;
    over = true;
    const others = (watched.get(id) ?? 0) - 1;
    if (others > 0) watched.set(id, others);
    else watched.delete(id);
  };
}

/** @param {string | null} id */
function tell(id) {
  for (const listener of [...listeners]) listener(id);
}

/** @param {Job} status @param {boolean} announce */
function take(status, announce = true) {
  const before = known.get(status.id);
  // An answer may arrive after a broadcast that is newer than it.
  if (before && status.updated < before.updated) return before;
  const now = { ...before, ...status };
  known.set(status.id, now);
  if (announce) tell(status.id);
  if (before && ACTIVE.has(before.state) && !ACTIVE.has(now.state)) for (const ended of endings) ended(now);
  return now;
}

/** @param {string} id */
async function fetchOne(id) {
  try {
    take(await get(`jobs/${encodeURIComponent(id)}`));
  } catch {
    tell(id); // a graph from another machine, or a job that was deleted
  }
}

/** Fetch the list anew, and the whole status of jobs that are watched. */
export async function reload() {
  heard = asked = performance.now();
  try {
    const list = /** @type {Job[]} */ (await get("jobs?brief=true"));
    leftAlone = await get("jobs/unreadable");
    const ids = new Set(list.map((job) => job.id));
    for (const id of known.keys()) if (!ids.has(id)) known.delete(id);
    for (const job of list) take(job, false);
    trouble = "";
  } catch (error) {
    trouble = reason(error);
  }
  tell(null);
  await Promise.all([...watched.keys()].map(fetchOne));
}

/**
 * Do something with a job; returns its status. Throws Error with the host's words, and asks what there is now.
 * @param {string} id
 * @param {string} action
 * @param {object} body
 */
export async function act(id, action, body = {}) {
  return take(await posted(id, action, body));
}

/** @param {string} id @param {string} action @param {object} body */
async function posted(id, action, body = {}) {
  try {
    return await post(ofJob(id, action), body);
  } catch (error) {
    reload();
    throw error;
  }
}

/** Delete a job that is not at work. Throws Error with the host's words. @param {string} id */
export async function remove(id) {
  await posted(id, "delete");
  forget(id);
}

/** @param {string} id */
function forget(id) {
  if (known.delete(id)) tell(id);
}

/** Begin to listen to the host; called once. */
export function start() {
  api.addEventListener(EVENT, ({ detail }) => {
    heard = performance.now();
    take(detail);
  });
  api.addEventListener(DELETED, ({ detail }) => forget(detail.id));
  api.addEventListener("reconnected", reload);
  document.addEventListener("visibilitychange", () => document.hidden || reload());
  setInterval(() => {
    const since = all().some((job) => job.elsewhere) ? asked : heard;
    const atWork = trouble || all().some((job) => ACTIVE.has(job.state));
    if (atWork && !document.hidden && performance.now() - since > QUIET_MILLISECONDS) reload();
  }, 1000);
  return reload();
}
