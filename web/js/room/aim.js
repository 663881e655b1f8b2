// @ts-check
// Step "Aim": what the LoRA is to learn.
import { h } from "../lib/dom.js";
import { t } from "../lib/words.js";

export const title = "room.aim.title";

/** @param {TrainingRoom} _room @returns {Step} */
export function build(_room) {
  return { element: h("div", { class: "ck-aim" }, h("p", {}, t("room.aim.about"))) };
}
