// The mask of one image: what is painted white is trained, what is black is not. Painted with the pointer or by keys, or loaded.
import { h } from "../lib/dom.js";
import { t } from "../lib/words.js";
import { maskOf, sourceOf } from "./folder.js";

const SIDE = 1024; // pixels of the longer side that a mask is painted at
const BRUSH = 8; // per cent of the image's width

/**
 * Open the painter over the room; the focus comes back to `opener`.
 * @param {FolderImage} image
 * @param {Folder} folder
 * @param {HTMLElement} opener
 */
export function paintMask(image, folder, opener) {
  const { name, size, mask, version } = image;
  if (!size) return;
  const scale = Math.min(1, SIDE / Math.max(...size));
  const [width, height] = size.map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = h("canvas.ck-mask", { width, height, tabIndex: 0, role: "application", "aria-label": t("room.mask.canvas", { name }) });
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

  const radius = h("input", { type: "range", min: 1, max: 50, value: BRUSH, oninput: () => show() });
  const colour = h("select", ["black", "white"].map((value) => h("option", { value }, t(`room.mask.${value}`))));
  const file = h("input", { type: "file", accept: "image/*", "aria-label": t("room.mask.load") });
  file.addEventListener("change", () => file.files?.[0] && draw(URL.createObjectURL(file.files[0])));
  const spot = h("div.ck-brush");
  let at = /** @type {Point} */ ([width / 2, height / 2]);
  let last = /** @type {Point | null} */ (null); // where the stroke has come to
  const show = () => {
    const places = { left: at[0] / width, top: at[1] / height, width: Number(radius.value) / 100 };
    for (const [key, share] of Object.entries(places)) spot.style.setProperty(key, `${100 * share}%`);
  };
  const move = (/** @type {number} */ x, /** @type {number} */ y) => {
    at = [Math.min(width, Math.max(0, x)), Math.min(height, Math.max(0, y))];
    show();
    if (last) stroke();
  };
  const stroke = () => {
    brush.strokeStyle = colour.value;
    brush.lineCap = "round";
    brush.lineWidth = (Number(radius.value) * width) / 100;
    brush.beginPath();
    brush.moveTo(...(last ?? at));
    brush.lineTo(...at);
    brush.stroke();
    last = at;
  };
  const follow = (/** @type {PointerEvent} */ { clientX, clientY }) => {
    const box = canvas.getBoundingClientRect();
    move(((clientX - box.left) * width) / box.width, ((clientY - box.top) * height) / box.height);
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    follow(event);
    stroke();
  });
  canvas.addEventListener("pointermove", follow);
  canvas.addEventListener("pointerup", () => (last = null));
  canvas.addEventListener("keyup", ({ key }) => key === " " && (last = null));
  canvas.addEventListener("blur", () => (last = null));
  canvas.addEventListener("keydown", (event) => {
    const by = ((event.shiftKey ? 1 : Number(radius.value) / 2) * width) / 100; // half the brush, or 1 % of the width
    const ways = /** @type {Record<string, Point>} */ ({ ArrowLeft: [-by, 0], ArrowRight: [by, 0], ArrowUp: [0, -by], ArrowDown: [0, by] });
    const sizes = /** @type {Record<string, number>} */ ({ "[": -2, "-": -2, "]": 2, "+": 2 });
    if (event.key in ways) move(at[0] + ways[event.key][0], at[1] + ways[event.key][1]);
    else if (event.key in sizes) radius.value = String(Number(radius.value) + sizes[event.key]);
    else if (event.key === " ") stroke();
    else return;
    show();
    event.preventDefault();
  });
  show();

  const keep = (/** @type {string} */ content) => {
    folder.change("mask", { name, mask: content, label: t("room.mask.did", { name }) });
    element.close();
  };
  const button = (/** @type {string} */ key, /** @type {() => void} */ work) => h("button", { "data-action": key, onclick: work }, t(`room.mask.${key}`));
  const element = h(
    "dialog.ck-large",
    { "aria-label": t("room.mask.title", { name }) },
    h("div.ck-group", h("label", t("room.mask.paint"), " ", colour),
      h("label", t("room.mask.brush"), " ", radius),
      button("fill", () => all(colour.value)),
      h("label", t("room.mask.load"), " ", file)),
    h("p.ck-faint", t("room.mask.about")),
    h("div.ck-masked", { style: { "--ck-aspect": String(width / height) } }, h("img", { src: sourceOf(folder, name, SIDE, version), alt: "" }), canvas, spot),
    h("div.ck-group", button("save", () => keep(canvas.toDataURL("image/png").split(",")[1])),
      mask && button("remove", () => keep("")),
      button("cancel", () => element.close())),
  );
  element.addEventListener("keydown", (event) => event.stopPropagation());
  element.addEventListener("close", () => {
    element.remove();
    opener.focus();
  });
  opener.closest(".ck-room")?.append(element);
  element.showModal();
}
