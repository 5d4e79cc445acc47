// A line chart as SVG: axes, a cursor line shared with its neighbours, choosing steps by dragging.

import { h, s, width as widthOf } from "./dom.js";
import { axis, integer, linear, logarithmic, logTicks, ticks } from "./scale.js";

export const LEFT = 58;
export const RIGHT = 12;

let plots = 0; // ids are of the whole page

export class Plot {
  constructor({ height, label, left = LEFT, top = 10, bottom = 26, format = axis }) {
    Object.assign(this, { height, left, top, bottom, format });
    this.axes = s("g", { class: "axes" });
    this.id = `inside-${(plots += 1)}`;
    this.inside = s("rect");
    this.marks = s("g", { class: "marks", "clip-path": `url(#${this.id})` });
    this.cursor = s("line", { class: "cursor" });
    this.svg = s("svg", { class: "plot", role: "img", "aria-label": label },
      s("defs", {}, s("clipPath", { id: this.id }, this.inside)), this.axes, this.marks, this.cursor);
    this.root = h("div", { class: "plot-host" }, this.svg);
    this.width = 0;
  }

  // Returns the scales, or null where there is no room yet. `y` is [low, high]; `log` needs both above zero.
  frame({ x, y, log = false, unit = "" }) {
    const width = widthOf(this.root);
    if (!width) return null;
    if (width !== this.width) {
      this.width = width;
      this.svg.setAttribute("viewBox", `0 0 ${width} ${this.height}`);
      this.svg.setAttribute("height", this.height);
    }
    const bottom = this.height - this.bottom;
    // Markers at the edge stay whole.
    const box = { x: this.left - 6, y: this.top - 6, width: Math.max(0, width - RIGHT - this.left + 12), height: bottom - this.top + 12 };
    for (const [name, value] of Object.entries(box)) this.inside.setAttribute(name, value);
    this.X = linear(x, [this.left, width - RIGHT]);
    this.Y = (log ? logarithmic : linear)(y, [bottom, this.top]);
    const rows = Math.max(3, Math.floor((bottom - this.top) / 38));
    const yTicks = log ? logTicks(y[0], y[1]) : ticks(y[0], y[1], rows);
    const nodes = yTicks.flatMap((value) => [
      s("line", { class: "grid", x1: this.left, x2: width - RIGHT, y1: this.Y(value), y2: this.Y(value) }),
      s("text", { class: "tick", x: this.left - 7, y: this.Y(value) + 4, "text-anchor": "end" }, this.format(value)),
    ]);
    for (const value of ticks(x[0], x[1], Math.max(2, Math.floor((width - this.left) / 90)))) {
      if (!Number.isInteger(value)) continue;
      nodes.push(s("text", { class: "tick", x: this.X(value), y: bottom + 17, "text-anchor": "middle" }, integer(value)));
    }
    if (unit) nodes.push(s("text", { class: "unit", x: this.left, y: this.top - 12 }, unit));
    this.axes.replaceChildren(...nodes);
    return { X: this.X, Y: this.Y, left: this.left, right: width - RIGHT, top: this.top, bottom };
  }

  paint(...nodes) {
    this.marks.replaceChildren(...nodes.flat().filter(Boolean));
  }

  showCursor(step) {
    const inside = step !== null && this.X && this.width;
    this.cursor.classList.toggle("shown", Boolean(inside));
    if (!inside) return;
    const x = this.X(step);
    for (const [name, value] of [["x1", x], ["x2", x], ["y1", this.top], ["y2", this.height - this.bottom]]) {
      this.cursor.setAttribute(name, value);
    }
  }
}

// A path through [x, y] points; a missing y interrupts it.
export function path(points, style) {
  let d = "";
  let pen = "M";
  for (const [x, y] of points) {
    if (y === null || Number.isNaN(y)) {
      pen = "M";
      continue;
    }
    d += `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
    pen = "L";
  }
  return s("path", { class: style, d });
}

// The area between two lines, each a list of [x, y].
export function area(above, below, style) {
  const points = [...above, ...[...below].reverse()].map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`);
  return points.length > 2 ? s("path", { class: style, d: `M${points.join("L")}Z` }) : null;
}

// The same shapes as in the report, so that a verdict is told without its colour.
export function marker(colour, x, y, size = 4) {
  const r = size;
  const shapes = {
    red: `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}Z`,
    yellow: `M${x} ${y - r * 1.2}L${x + r * 1.15} ${y + r}H${x - r * 1.15}Z`,
    green: `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`,
    frozen: `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}Z`,
    grey: `M${x} ${y - r * 1.25}L${x + r * 1.25} ${y}L${x} ${y + r * 1.25}L${x - r * 1.25} ${y}Z`,
  };
  return s("path", { class: `marker ${colour}`, d: shapes[colour] });
}

// Moving over a chart tells a step; dragging along it chooses steps.
export function follow(element, { toStep, onHover, onChoose, onPress }) {
  let from = null;
  const place = (event) => event.clientX - element.getBoundingClientRect().left;
  element.addEventListener("pointerdown", (event) => {
    if (event.button === 0 && event.pointerType === "mouse") from = place(event);
  });
  element.addEventListener("pointermove", (event) => onHover(toStep(place(event)), event));
  element.addEventListener("pointerleave", () => {
    from = null;
    onHover(null);
  });
  element.addEventListener("pointerup", (event) => {
    const to = place(event);
    if (from !== null && Math.abs(to - from) > 12) {
      const ends = [toStep(from), toStep(to)].sort((a, b) => a - b);
      onChoose([Math.max(0, Math.floor(ends[0])), Math.ceil(ends[1])]);
    } else if (onPress) onPress(event);
    from = null;
  });
}
