// Elements without a framework.

/**
 * Make an element: h("button", { class: "a", disabled: true, onclick: f, "aria-label": "x" }, "text", child, …).
 *
 * Properties with a dash, `role` and `class` become attributes, `style` is an object of CSS properties, the rest are set
 * on the element. Children that are null or false are left out.
 */
export function h(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value == null) continue;
    if (name === "style") for (const [key, text] of Object.entries(value)) made.style.setProperty(key, text);
    else if (name === "class" || name === "role" || name.includes("-")) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.flat().filter((child) => child != null && child !== false));
  return made;
}

/** Make an SVG element with these attributes and text. */
export function svg(tag, attributes = {}, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text != null) made.textContent = text;
  return made;
}

/** Put these children into an element instead of those it has. */
export function fill(element, ...children) {
  element.replaceChildren(...children.flat().filter((child) => child != null && child !== false));
}

/** Set a text only when it changes: an equal one would end a selection in it. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A function that calls `work` once, `milliseconds` after the last of several calls. */
export function debounced(work, milliseconds) {
  let timer;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...values), milliseconds);
  };
}

/** A function that calls `work` at once, but at most every `milliseconds`; a call in between is made up for at the end. */
export function throttled(work, milliseconds) {
  let last = -Infinity;
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
