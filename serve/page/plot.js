// A line plot over the last five minutes.

import { html, svg } from "./dom.js";

const SPAN_S = 300;
const HEIGHT = 205;
const MARGIN = { left: 52, right: 10, top: 22, bottom: 26 };
// Seconds without traffic leave no point: across a longer pause no line is drawn.
const PAUSE_S = 5;

/** Shows `series` (`{ key, name }`, at most three) of points with a `time` in Unix seconds. */
export class Plot {
  constructor(place, { title, unit, series, write, empty }) {
    Object.assign(this, { title, unit, series, write, points: [], now: 0, seen: null });
    this.caption = html("figcaption");
    this.picture = svg("svg", { class: "plot", role: "img", height: HEIGHT });
    this.nothing = html("p", { class: "empty" }, empty);
    place.append(html("figure", {}, this.caption, this.picture, this.nothing));
    new ResizeObserver(() => this.draw()).observe(place);
    this.picture.addEventListener("pointermove", (event) => this.look(event.offsetX));
    this.picture.addEventListener("pointerleave", () => this.look(null));
  }

  /** Shows other points; `now` is the server's clock. */
  update(points, now) {
    this.now = now;
    this.points = points.filter((point) => point.time >= now - SPAN_S && point[this.series[0].key] !== null);
    this.draw();
  }

  look(x) {
    this.seen = x;
    this.draw();
  }

  draw() {
    const any = this.points.length > 0;
    this.picture.toggleAttribute("hidden", !any);
    this.nothing.hidden = any;
    this.width = this.picture.parentElement.clientWidth;
    const point = this.chosen();
    this.tell(point);
    if (!any || !this.width) return;
    this.top = niceCeiling(Math.max(...this.points.flatMap((one) => this.series.map(({ key }) => one[key] ?? 0))));
    this.picture.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    this.picture.replaceChildren(...this.axes(), ...this.series.flatMap((_, index) => this.line(index)), ...this.cursor(point));
  }

  x(time) {
    return MARGIN.left + (1 - (this.now - time) / SPAN_S) * (this.width - MARGIN.left - MARGIN.right);
  }

  y(value) {
    return HEIGHT - MARGIN.bottom - (value / this.top) * (HEIGHT - MARGIN.top - MARGIN.bottom);
  }

  /** The point under the pointer, else the last one. */
  chosen() {
    if (this.seen === null || !this.points.length) return this.points.at(-1);
    const away = (point) => Math.abs(this.x(point.time) - this.seen);
    return this.points.reduce((best, point) => (away(point) < away(best) ? point : best));
  }

  /** Says a point's values in words, which also name the lines. */
  tell(point) {
    const keys = this.series.map(({ key, name }, index) =>
      html(
        "span",
        { class: "key" },
        svg("svg", { viewBox: "0 0 22 10", "aria-hidden": "true" }, svg("path", { d: "M1 5H21", class: `series series-${index + 1}` })),
        point ? `${name} ${this.write(point[key])}` : name,
      ),
    );
    const when = point ? [html("span", {}, ago(this.now - point.time))] : [];
    this.caption.replaceChildren(html("span", {}, this.title), ...keys, ...when);
    this.picture.setAttribute("aria-label", this.caption.textContent);
  }

  axes() {
    const steps = [0, 0.25, 0.5, 0.75, 1].map((share) => share * this.top);
    const lines = steps.flatMap((value) => [
      svg("line", { class: "grid", x1: MARGIN.left, x2: this.width - MARGIN.right, y1: this.y(value), y2: this.y(value) }),
      svg("text", { x: MARGIN.left - 6, y: this.y(value) + 4, "text-anchor": "end" }, short(value)),
    ]);
    const unit = svg("text", { x: MARGIN.left - 6, y: 10, "text-anchor": "end" }, this.unit);
    const minutes = [5, 4, 3, 2, 1, 0].map((minute) =>
      svg(
        "text",
        { x: this.x(this.now - 60 * minute), y: HEIGHT - 8, "text-anchor": minute === 0 ? "end" : minute === 5 ? "start" : "middle" },
        minute ? `${minute} min ago` : "now",
      ),
    );
    // Narrow plots have room for every other label only.
    return [...lines, unit, ...minutes.filter((_, index) => this.width > 460 || index === 0 || index === 2 || index === 5)];
  }

  line(index) {
    const { key } = this.series[index];
    const runs = [];
    let last = null;
    for (const point of this.points) {
      if (last === null || point.time - last.time > PAUSE_S) runs.push([]);
      runs.at(-1).push(`${this.x(point.time).toFixed(1)} ${this.y(point[key]).toFixed(1)}`);
      last = point;
    }
    return runs.map((run) => {
      const [x, y] = run[0].split(" ");
      return run.length > 1
        ? svg("path", { class: `series series-${index + 1}`, d: `M${run.join("L")}` })
        : svg("circle", { class: `dot series-${index + 1}`, cx: x, cy: y, r: 2 });
    });
  }

  cursor(point) {
    if (this.seen === null) return [];
    const x = this.x(point.time);
    return [
      svg("line", { class: "cursor", x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }),
      ...this.series.map(({ key }, index) => svg("circle", { class: `dot series-${index + 1}`, cx: x, cy: this.y(point[key]), r: 3.5 })),
    ];
  }
}

const ago = (seconds) => (seconds < 2 ? "just now" : `${Math.round(seconds)} s ago`);

/** The least number with round quarters that is not below `value`. */
function niceCeiling(value) {
  const power = 10 ** Math.floor(Math.log10(value || 1));
  return power * [1, 1.2, 1.6, 2, 3, 4, 6, 8, 10].find((step) => step * power >= value * (1 - 1e-9));
}

const short = (value) => Number(value.toPrecision(3)).toLocaleString("en");
