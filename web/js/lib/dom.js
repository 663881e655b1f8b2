// Elements without a framework, and the stylesheets. Every rule in those begins with .chromakit, the class of each of our
// roots, so that nothing of the host's page changes; colours are the host's own variables, so that themes are followed.
const SHEETS = ["base", "jobs", "widgets", "room", "wall"];

/**
 * Make an element: h("button.a", { disabled: true, onclick: f, "aria-label": "x" }, "text", child, …).
 *
 * After the tag come its classes, then properties, which may be left out, and children; those that are null or false are
 * left out. Properties with a dash, `role` and `class` become attributes, `style` is an object of CSS properties, the rest
 * are set on the element. A button is a plain one.
 *
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K | `${K}.${string}`} kind
 * @param {Parts<K>} parts
 */
export function h(kind, ...parts) {
  const [tag, ...classes] = kind.split(".");
  const made = document.createElement(/** @type {K} */ (tag));
  if (tag === "button") made.setAttribute("type", "button");
  if (classes.length) made.className = classes.join(" ");
  const given = parts[0]?.constructor === Object ? parts.shift() : {};
  for (const [name, value] of Object.entries(/** @type {object} */ (given))) {
    if (value == null) continue;
    if (name === "style") for (const [key, text] of Object.entries(value)) made.style.setProperty(key, text);
    else if (name === "class" || name === "role" || name.includes("-")) made.setAttribute(name, String(value));
    else Object.assign(made, { [name]: value });
  }
  made.append(...present(/** @type {Children[]} */ (parts)));
  return made;
}

/** @param {Children[]} children */
const present = (children) => children.flat().filter((child) => child != null && child !== false);

/**
 * Make an SVG element with these attributes and text.
 * @param {string} tag
 * @param {Record<string, string | number>} attributes
 * @param {string} [text]
 */
export function svg(tag, attributes = {}, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
  if (text != null) made.textContent = text;
  return made;
}

/**
 * Put these children into an element instead of those it has.
 * @param {Element} element
 * @param {Children[]} children
 */
export function fill(element, ...children) {
  element.replaceChildren(...present(children));
}

/**
 * Set a text only when it changes: an equal one would end a selection in it.
 * @param {Element} element
 * @param {string} text
 */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const AGAIN = 5000; // milliseconds

/** Ask once more for an image that did not come. @param {Element} image */
function mend(image) {
  if (!(image instanceof HTMLImageElement)) return;
  const source = image.getAttribute("src");
  if (source && image.complete && !image.naturalWidth) image.src = source;
}

/** Images of ours that did not come are asked for once more after a while, and whenever what is returned is called. */
export function mendImages() {
  /** @type {WeakMap<Element, string | null>} */
  const again = new WeakMap();
  const failed = (/** @type {Event} */ { target }) => {
    if (!(target instanceof Element) || !target.closest(".chromakit") || again.get(target) === target.getAttribute("src")) return;
    again.set(target, target.getAttribute("src"));
    setTimeout(() => mend(target), AGAIN);
  };
  document.addEventListener("error", failed, true); // it does not rise
  return () => document.querySelectorAll(".chromakit img").forEach(mend);
}

/**
 * A function that calls `work` once, `milliseconds` after the last of several calls.
 * @param {() => void} work
 * @param {number} milliseconds
 */
export function debounced(work, milliseconds) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(work, milliseconds);
  };
}

/**
 * A function that calls `work` at once, but at most every `milliseconds`; a call in between is made up for at the end.
 * @param {() => void} work
 * @param {number} milliseconds
 */
export function throttled(work, milliseconds) {
  let last = -Infinity;
  /** @type {number | null} */
  let timer = null;
  return () => {
    if (timer != null) return;
    const wait = Math.max(0, last + milliseconds - performance.now());
    timer = setTimeout(() => {
      timer = null;
      last = performance.now();
      work();
    }, wait);
  };
}

/** Link the stylesheets into the page, once. */
export function linkStyles() {
  for (const name of SHEETS) {
    const href = new URL(`../../css/${name}.css`, import.meta.url).href;
    if (document.querySelector(`link[href="${href}"]`)) continue;
    document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href }));
  }
}
