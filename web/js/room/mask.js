// @ts-check
// The mask of one image: what is painted white is trained, what is black is not. Painted with the pointer, or loaded.
import { h } from "../lib/dom.js";
import { t } from "../lib/words.js";
import { maskOf, sourceOf } from "./folder.js";

const SIDE = 1024; // pixels of the longer side that a mask is painted at
const BRUSH = 8; // per cent of the image's width

/**
 * Open the painter over the room; the focus comes back to `opener`.
 * @param {FolderImage} image
 * @param {import("./folder.js").Folder} folder
 * @param {HTMLElement} opener
 */
export function paintMask(image, folder, opener) {
  const { name, size, mask, version } = image;
  if (!size) return;
  const scale = Math.min(1, SIDE / Math.max(...size));
  const [width, height] = size.map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = h("canvas", { width, height, class: "ck-mask", role: "img", "aria-label": t("room.mask.title", { name }) });
  const brush = canvas.getContext("2d");
  if (!brush) return;
  const all = (/** @type {string} */ colour) => {
    brush.fillStyle = colour;
    brush.fillRect(0, 0, width, height);
  };
  const draw = (/** @type {string} */ source) => {
    const found = new Image();
    found.onload = () => brush.drawImage(found, 0, 0, width, height);
    found.src = source;
  };
  all("white");
  if (mask) draw(sourceOf(folder, maskOf(name), SIDE, mask));

  const radius = h("input", { type: "range", min: 1, max: 50, value: BRUSH });
  const colour = h("select", {}, ["black", "white"].map((value) => h("option", { value }, t(`room.mask.${value}`)))); // prettier-ignore
  const file = h("input", { type: "file", accept: "image/*", "aria-label": t("room.mask.load") });
  file.addEventListener("change", () => file.files?.[0] && draw(URL.createObjectURL(file.files[0])));
  /** @type {[number, number] | null} */
  let last = null;
  const stroke = (/** @type {PointerEvent} */ event) => {
    const box = canvas.getBoundingClientRect();
    const at = /** @type {[number, number]} */ ([((event.clientX - box.left) * width) / box.width, ((event.clientY - box.top) * height) / box.height]);
    brush.strokeStyle = colour.value;
    brush.lineCap = "round";
    brush.lineWidth = (Number(radius.value) * width) / 100;
    brush.beginPath();
    brush.moveTo(...(last ?? at));
    brush.lineTo(...at);
    brush.stroke();
    last = at;
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    stroke(event);
  });
  canvas.addEventListener("pointermove", (event) => last && stroke(event));
  canvas.addEventListener("pointerup", () => (last = null));

  const keep = (/** @type {string} */ content) => {
    folder.change("mask", { name, mask: content, label: t("room.mask.did", { name }) });
    element.close();
  };
  const button = (/** @type {string} */ key, /** @type {() => void} */ work) => h("button", { type: "button", "data-action": key, onclick: work }, t(`room.mask.${key}`));
  const element = h(
    "dialog",
    { class: "ck-large", "aria-label": t("room.mask.title", { name }) },
    h("div", { class: "ck-group" },
      h("label", {}, t("room.mask.paint"), " ", colour),
      h("label", {}, t("room.mask.brush"), " ", radius),
      button("fill", () => all(colour.value)),
      h("label", {}, t("room.mask.load"), " ", file)),
    h("p", { class: "ck-faint" }, t("room.mask.about")),
    h("div", { class: "ck-masked", style: { "--ck-aspect": String(width / height) } }, h("img", { src: sourceOf(folder, name, SIDE, version), alt: "" }), canvas),
    h("div", { class: "ck-group" },
      button("save", () => keep(canvas.toDataURL("image/png").split(",")[1])),
      mask && button("remove", () => keep("")),
      button("cancel", () => element.close())),
  ); // prettier-ignore
  element.addEventListener("keydown", (event) => event.stopPropagation());
  element.addEventListener("close", () => {
    element.remove();
    opener.focus();
  });
  opener.closest(".ck-room")?.append(element);
  element.showModal();
}
