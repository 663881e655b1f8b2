// @ts-check
// Step "Images": the folder of images to learn from.
import { h } from "../lib/dom.js";
import { t } from "../lib/words.js";

export const title = "room.images.title";

/** @param {TrainingRoom} _room @returns {Step} */
export function build(_room) {
  return { element: h("div", { class: "ck-images" }, h("p", {}, t("room.images.about"))) };
}
