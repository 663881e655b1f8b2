// The host's routes under /chromakit, as JSON. An error carries the host's own words.
import { api } from "../../../../scripts/api.js";
import { t } from "./words.js";

/**
 * What the host answers at any of its paths. Throws Error, in words, where there is no answer; what was given up by its
 * `signal` throws that signal's reason.
 * @param {string} path
 * @param {RequestInit} [options]
 */
export async function ask(path, options) {
  try {
    return await api.fetchApi(path, options);
  } catch {
    options?.signal?.throwIfAborted();
    throw new Error(t("host.no_answer"));
  }
}

/** The JSON of an answer; Error, in words, where it is none or tells of one. @param {Response} answer */
export async function answered(answer) {
  const text = await answer.text().catch(() => {
    throw new Error(t("host.no_answer"));
  });
  let value = null;
  try {
    value = text ? JSON.parse(text) : null;
  } catch {
    // Not ours: a proxy's page, or a host that is going down.
  }
  if (!answer.ok) throw new Error(value?.error ?? t("host.odd_answer", { status: [answer.status, answer.statusText].join(" ").trim() }));
  return value;
}

/**
 * The JSON that the host answers at any of its paths. Throws as `ask` and `answered` do.
 * @param {string} path
 * @param {RequestInit} [options]
 */
export async function askJson(path, options) {
  return answered(await ask(path, options));
}

/**
 * The JSON that GET /chromakit/<path> answers.
 * @template T
 * @param {string} path
 * @returns {Promise<T>}
 */
export function get(path) {
  return askJson(`/chromakit/${path}`, { cache: "no-store" });
}

/**
 * The JSON that POST /chromakit/<path> with a JSON body answers.
 * @template T
 * @param {string} path
 * @param {object} body
 * @returns {Promise<T>}
 */
export function post(path, body = {}) {
  return askJson(`/chromakit/${path}`, jsonPost(body));
}

/** How fetch is told of a POST with a JSON body. @param {object} body @returns {RequestInit} */
export const jsonPost = (body) => ({ method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

/**
 * A function that waits for an answer; undefined when it was called again meanwhile, for then only the newer one counts:
 * answers may overtake each other.
 * @returns {<T>(asked: Promise<T> | null) => Promise<T | null | undefined>}
 */
export function newest() {
  let calls = 0;
  return async (asked) => {
    const call = ++calls;
    try {
      const answer = await asked;
      return call === calls ? answer : undefined;
    } catch (error) {
      if (call === calls) throw error;
    }
  };
}

/**
 * Changes, one after another, for each counts on what the one before has left; and looks at what they change, which
 * count only where no change was on its way or came meanwhile.
 */
export class InTurn {
  constructor() {
    /** @type {Promise<unknown>} */
    this.queue = Promise.resolve();
    this.pending = 0; // asked for and not yet over
    this.over = 0;
  }

  /**
   * Do this after what was asked for before.
   * @template T
   * @param {() => Promise<T>} work
   */
  next(work) {
    this.pending += 1;
    const done = this.queue.then(work).finally(() => {
      this.pending -= 1;
      this.over += 1;
    });
    this.queue = done.catch(() => {});
    return done;
  }

  /** To be called before a look; what it returns says after it whether the look counts. */
  look() {
    const before = this.over;
    return () => !this.pending && before === this.over;
  }
}

/**
 * The path of what is below a job.
 * @param {string} id
 * @param {string} rest
 */
export const ofJob = (id, rest) => `jobs/${encodeURIComponent(id)}/${rest}`;

/** What an error says. @param {unknown} error */
export const reason = (error) => (error instanceof Error ? error.message : String(error));

/** The address of what GET /chromakit/<path> gives, for an image or a link. @param {string} path */
export function address(path) {
  return api.apiURL(`/chromakit/${path}`);
}
