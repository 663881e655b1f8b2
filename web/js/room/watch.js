// @ts-check
// Step "Watch": the jobs, and the one that is open.
import { fill, h } from "../lib/dom.js";
import { JobList } from "../jobs/list.js";
import { find } from "../jobs/store.js";
import { JobView } from "../jobs/view.js";

export const title = "room.watch.title";

/** @param {TrainingRoom} room @returns {Step} */
export function build(room) {
  const element = h("div", { class: "ck-watch" });
  /** @type {JobView | JobList | null} */
  let shown = null;
  const show = () => {
    shown?.destroy();
    const job = find(room.view.job);
    shown = job ? new JobView(job, () => room.choose({ job: "" })) : new JobList((id) => room.choose({ job: id }));
    fill(element, shown.element);
  };
  const end = room.onChoice((changed) => "job" in changed && show());
  show();
  return {
    element,
    destroy() {
      end();
      shown?.destroy();
    },
  };
}
