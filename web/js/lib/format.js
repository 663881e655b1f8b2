// Numbers for people.
import { t } from "./words.js";

/** 95 → "1 min 35 s", 4000 → "1 h 7 min". Empty for null. @param {number | null | undefined} seconds */
export function duration(seconds) {
  if (seconds == null || !Number.isFinite(seconds)) return "";
  const whole = Math.round(seconds);
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60), whole % 60];
  const text = hours
    ? t("time.hours", { hours, minutes })
    : minutes
      ? t("time.minutes", { minutes, seconds: rest })
      : t("time.seconds", { seconds: seconds < 1 ? seconds.toFixed(2) : rest });
  return text.replaceAll(" ", "\u00a0"); // never broken over two lines
}

/** The lines of a text, without those that are empty. @param {string} text */
export const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

/** A loss: four decimals, or an exponent where they would show nothing. @param {number | null | undefined} value */
export function loss(value) {
  if (value == null) return "–";
  return value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(2) : value.toFixed(4);
}

/** A learning rate: 0.0002 → "2e-4". @param {number | null | undefined} value */
export function rate(value) {
  return value == null ? "–" : value.toExponential(2).replace(/\.?0+e/, "e").replace("e+0", "");
}

/** Bytes as GiB, below one as MiB. @param {number | null | undefined} value */
export function bytes(value) {
  if (value == null) return "–";
  return value >= 2 ** 30 ? `${(value / 2 ** 30).toFixed(2)} GiB` : `${(value / 2 ** 20).toFixed(0)} MiB`;
}

/** A moment in seconds since 1970, in the user's way: the time today, else the date. @param {number} seconds */
export function moment(seconds) {
  const then = new Date(seconds * 1000);
  const today = then.toDateString() === new Date().toDateString();
  return today ? then.toLocaleTimeString(undefined, { timeStyle: "short" }) : then.toLocaleDateString();
}
