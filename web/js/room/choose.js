// @ts-check
// Step "Choose": the LoRAs of a job's steps.
import { fill, h } from "../lib/dom.js";
import { t } from "../lib/words.js";
import { Choice } from "../jobs/choice.js";
import { find, listen, watch } from "../jobs/store.js";

export const title = "room.choose.title";

/** @param {TrainingRoom} room @returns {Step} */
export function build(room) {
  const element = h("div", { class: "ck-choose" });
  /** @type {Choice | null} */
  let choice = null;
  let follow = () => {};
  const show = () => {
    follow();
    const job = find(room.view.job);
    choice = job ? new Choice(job, (text) => room.notice(text, "error")) : null;
    follow = job ? watch(job.id) : () => {};
    fill(element, choice?.element ?? h("p", {}, t("room.choose.no_job")));
  };
  const ends = [
    room.onChoice((changed) => "job" in changed && show()),
    listen((id) => {
      const job = find(room.view.job);
      if (choice && job && (!id || id === job.id)) choice.show(job);
      else if (!choice && job) show();
    }),
  ];
  show();
  return {
    element,
    destroy() {
      for (const end of ends) end();
      follow();
    },
  };
}
