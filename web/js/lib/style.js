// @ts-check
// The stylesheets, linked once. Every rule in them begins with .chromakit, the class of each of our roots, so that nothing
// of the host's page changes; colours are the host's own variables, so that themes and palettes are followed.
const SHEETS = ["base", "jobs", "widgets", "room", "wall"];

/** Link the stylesheets into the page. */
export function linkStyles() {
  for (const name of SHEETS) {
    const href = new URL(`../../css/${name}.css`, import.meta.url).href;
    if (document.querySelector(`link[href="${href}"]`)) continue;
    document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href }));
  }
}
