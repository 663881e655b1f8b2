// What the page says, in the user's language: the host serves locales/<language>/main.json of every pack at /i18n.
import { app } from "../../../../scripts/app.js";
import { api } from "../../../../scripts/api.js";

/** @type {Words} */
let languages = {};
/** @type {Map<string, Code>} */
const codes = new Map();
/** @type {Promise<void> | undefined} */
let loading;

/** Fetch the words, once however often it is called; before any node is made. Without them keys are shown. */
export function loadWords() {
  loading ??= fetchWords();
  return loading;
}

async function fetchWords() {
  try {
    languages = await (await api.fetchApi("/i18n")).json();
  } catch (error) {
    console.warn("ChromaKit: the words of the page could not be loaded:", error);
  }
}

/** @param {string} language @param {string} key */
function find(language, key) {
  /** @type {Words | string | undefined} */
  let found = languages[language];
  for (const part of ["chromakit", ...key.split(".")]) found = typeof found === "object" ? found[part] : undefined;
  return typeof found === "string" ? found : undefined;
}

/**
 * The text of `key` (dots lead into the file's tables) in the page's language, else in English; {name} is replaced.
 * @param {string} key
 * @param {Record<string, unknown>} values
 */
export function t(key, values = {}) {
  const language = String(app.ui?.settings?.getSettingValue?.("Comfy.Locale") ?? "en");
  const text = find(language, key) ?? find(language.split("-")[0], key) ?? find("en", key) ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}

/** Remember which of the host's sentences can be said in other languages, too. @param {Record<string, Code>} given */
export function learn(given) {
  for (const [text, code] of Object.entries(given)) codes.set(text, code);
}

/** A sentence of the host's, in the page's language where that is known. @param {string} text */
export function told(text) {
  const known = codes.get(text);
  return known ? t(`remark.${known.code}`, known.values) : text;
}
