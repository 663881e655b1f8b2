// The head of step "Images": which folder, for which size, with which trigger word; files in, changes back.
import { debounced, fill, h } from "../lib/dom.js";
import { t } from "../lib/words.js";

const NEW = "\n"; // no folder's name
const TYPING = 400;

/** What the bar's buttons do. @typedef {{ add(files: File[]): void, undo(): void, redo(): void, again(): void }} Doing */

/** The controls; `offer(list)` says what there is to choose from. */
export class Bar {
  /** @param {TrainingRoom} room @param {Doing} doing */
  constructor(room, doing) {
    this.room = room;
    this.choice = h("select", { "data-choice": "folder", onchange: () => this.#choose() });
    this.name = h("input", { type: "text", placeholder: t("room.images.name_hint"), "aria-label": t("room.images.name_hint") });
    this.name.addEventListener("keydown", (event) => event.key === "Enter" && this.#create());
    const create = button("create", () => this.#create());
    this.making = h("span.ck-group", { hidden: true }, this.name, create);
    const soon = debounced(() => room.choose({ trigger: this.trigger.value.trim() }), TYPING);
    this.trigger = h("input", { type: "text", size: 10, value: room.view.trigger, placeholder: "zxq", oninput: soon });
    this.size = h("select", { "data-choice": "size", onchange: () => room.choose({ size: Number(this.size.value) }) });
    const file = h("input", { type: "file", multiple: true, hidden: true, "aria-label": t("room.images.add") });
    file.addEventListener("change", () => {
      doing.add([...(file.files ?? [])]);
      file.value = "";
    });
    this.add = button("add", () => file.click());
    this.undo = button("undo", doing.undo);
    this.redo = button("redo", doing.redo);
    const again = h("button.ck-quiet", { title: t("room.images.again"), "aria-label": t("room.images.again"), onclick: doing.again }, "⟳");
    const next = button("next", () => room.go("aim"));
    this.add.classList.add("ck-primary");
    next.classList.add("ck-next");
    this.element = h(
      "div.ck-bar",
      labelled("folder", this.choice),
      this.making,
      labelled("trigger", this.trigger),
      labelled("crop_size", this.size),
      this.add,
      file,
      this.undo,
      this.redo,
      again,
      next,
    );
  }

  /**
   * The folders and sizes to choose from, what is chosen among them.
   * @param {FolderList} list
   * @param {boolean} [naming] whether a new folder's name is asked for
   */
  offer({ folders, sizes }, naming = !this.making.hidden) {
    const { folder, size } = this.room.view;
    const names = folders.map((each) => each.name);
    const all = folder && !names.includes(folder) ? [folder, ...names] : names;
    const first = h("option", { value: "" }, t("room.images.choose"));
    fill(this.choice, !folder && first, h("option", { value: NEW }, t("room.images.new")), all.map((name) => h("option", { value: name }, name)));
    this.choice.value = naming ? NEW : folder;
    this.making.hidden = !naming;
    fill(this.size, h("option", { value: "0" }, t("room.images.size_open")), sizes.map((px) => h("option", { value: String(px) }, `${px} px`)));
    this.size.value = String(size);
  }

  /** @param {Partial<RoomView>} changed */
  follow({ trigger, size }) {
    if (trigger != null && this.trigger.value.trim() !== trigger) this.trigger.value = trigger;
    if (size != null) this.size.value = String(size);
  }

  /** Ask for the name of a new folder. */
  nameNew() {
    this.choice.value = NEW;
    this.#choose();
  }

  #choose() {
    this.making.hidden = this.choice.value !== NEW;
    if (this.making.hidden) this.room.choose({ folder: this.choice.value });
    else this.name.focus();
  }

  #create() {
    const folder = this.name.value.trim();
    if (!folder) return;
    this.making.hidden = true;
    this.choice.value = this.room.view.folder;
    this.room.choose({ folder });
    this.add.focus();
  }
}

/** @param {string} key @param {() => void} work */
const button = (key, work) => h("button", { "data-action": key, onclick: work }, t(`room.images.${key}`));

/** @param {string} key @param {HTMLElement} control */
const labelled = (key, control) => h("label", { title: t(`room.images.${key}_tip`) }, t(`room.images.${key}`), " ", control);
