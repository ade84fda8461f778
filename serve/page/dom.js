// Elements and figures, made for reading.

const NAMESPACE = "http://www.w3.org/2000/svg";

/** An HTML element; text in `children` stays text, whatever it holds. */
export function html(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** An SVG element. */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(NAMESPACE, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export const byId = (id) => document.getElementById(id);

/** A bar that is full at 1. */
export function meter(share) {
  const fill = html("span");
  fill.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
  return html("div", { class: "meter", "aria-hidden": "true" }, fill);
}

/** A state's word, coloured by `tone`: good, warn or bad. */
export const chip = (word, tone) => html("span", { class: `state ${tone}` }, word);

export const NOTHING = "–";

const told = (value, write) => (value === null || value === undefined ? NOTHING : write(value));

export const count = (value) => told(value, (number) => number.toLocaleString("en"));

export const rate = (value) => told(value, (number) => number.toLocaleString("en", { maximumFractionDigits: 1 }));

export const percent = (value) => told(value, (share) => `${(100 * share).toFixed(1)} %`);

export const milliseconds = (value) => told(value, (ms) => `${ms < 10 ? ms.toFixed(2) : ms < 100 ? ms.toFixed(1) : count(Math.round(ms))} ms`);

export function bytes(value) {
  return told(value, (number) => {
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    const power = Math.min(units.length - 1, number ? Math.floor(Math.log2(number) / 10) : 0);
    return `${(number / 1024 ** power).toFixed(power ? 1 : 0)} ${units[power]}`;
  });
}

export function duration(value) {
  return told(value, (seconds) => {
    const whole = Math.max(0, Math.floor(seconds));
    if (whole < 60) return `${whole} s`;
    if (whole < 3600) return `${Math.floor(whole / 60)} min`;
    if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
    return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
  });
}
