// The loss of training and of the probe, with the cloud: red above the loss that a new head on the embeddings reaches
// without any block, green within the margin of what the composed witness reaches, yellow between.

import { h, s, setText, Table, thinned, tile } from "./dom.js";
import { area, follow, LEFT, path, Plot } from "./plot.js";
import { integer, nats } from "./scale.js";

let charts = 0; // ids of patterns are of the whole page

export class LossChart {
  constructor({ words, onHover, onChoose }) {
    this.words = words;
    this.id = `cloud-${(charts += 1)}`;
    this.plot = new Plot({ height: 270, label: "Loss", top: 24 });
    this.plot.svg.prepend(patterns(this.id));
    this.readout = h("p", { class: "readout" });
    this.caption = h("figcaption");
    this.table = new Table("Loss", ["steps", "training loss", "lowest", "highest"]);
    this.table.rows = () => this.#rows();
    this.root = h(
      "section",
      { class: "panel loss" },
      h("h3", {}, "Loss"),
      h("figure", {}, this.plot.root, this.readout, this.caption),
      this.table.root,
    );
    follow(this.plot.root, {
      toStep: (x) => (this.plot.X ? this.plot.X.invert(x) : 0),
      onHover,
      onChoose,
    });
  }

  // The losses that must be in view, as [low, high], or null.
  extent(data) {
    const { items } = data.loss;
    // What a beginning costs would hide everything after it; it is in view when those steps are chosen.
    const from = data.range || items.length < 60 ? -1 : items[Math.floor(0.03 * items.length)].first;
    const late = (bin) => bin.last >= from;
    const means = items.filter(late).map((bin) => bin.mean).filter((value) => value !== null);
    const all = [...means, ...data.looks.items.filter(late).map((bin) => bin.loss)].filter(Number.isFinite);
    if (!all.length) return null;
    const lower = data.bounds.lower.map(([, value]) => value).filter(Number.isFinite);
    return [Math.min(...all, ...lower), Math.max(...all)];
  }

  render(data, { x, y }) {
    this.data = data;
    const [low, high] = y ?? [0, 1];
    const room = (high - low || 0.1) * 0.06;
    const frame = this.plot.frame({ x, y: [low - room, high + room], unit: data.facts.unit });
    if (!frame) return;
    const { X, Y } = frame;
    const middle = (bin) => X((bin.first + bin.last) / 2);
    const bins = data.loss.items.filter((bin) => bin.mean !== null);
    const clip = (value) => Math.min(Math.max(Y(value), frame.top), frame.bottom);
    const spread = data.loss.stride > 1 && area(
      bins.map((bin) => [middle(bin), clip(bin.high)]), bins.map((bin) => [middle(bin), clip(bin.low)]), "spread");
    const looks = data.looks.items;
    const probe = path(looks.map((bin) => [middle(bin), bin.loss === null ? null : Y(bin.loss)]), "line probe");
    const dots = looks.length <= 40 ? looks.filter((bin) => bin.loss !== null).map((bin) =>
      s("circle", { class: "dot", cx: middle(bin), cy: Y(bin.loss), r: 3 })) : [];
    this.plot.paint(
      this.#cloud(frame), spread, path(bins.map((bin) => [middle(bin), Y(bin.mean)]), "line"), probe, dots);
    this.plot.svg.setAttribute("aria-label", this.#spoken());
    this.#describe();
    this.table.update();
  }

  #cloud({ X, Y, top, bottom, right }) {
    const clip = (value) => Math.min(Math.max(Y(value), top), bottom);
    const curve = (bound, place) => bound.filter(([, value]) => value !== null).map(([step, v]) => [X(step), place(v)]);
    const upper = curve(this.data.bounds.upper, clip);
    const lower = curve(this.data.bounds.lower, clip);
    const level = (points, y) => points.map(([x]) => [x, y]);
    const parts = [];
    const region = (above, below, colour) => {
      const shape = area(above, below, `cloud ${colour}`);
      if (!shape) return;
      const filling = shape.cloneNode();
      filling.setAttribute("class", "cloud-pattern");
      filling.setAttribute("fill", `url(#${this.id}-${colour})`);
      parts.push(shape, filling);
      // The letter stands where there is most room for it.
      const rooms = above.map(([, y], i) => (below[i]?.[1] ?? y) - y);
      const at = rooms.indexOf(Math.max(...rooms));
      if (rooms[at] > 18) parts.push(letter(this.words, colour, Math.min(above[at][0], right - 14), above[at][1], below[at][1]));
    };
    if (upper.length > 1) region(level(upper, top), upper, "red");
    // Green is known in fewer looks than red: yellow, too, only where both are.
    const both = lower.length > 1 ? upper.filter(([x]) => x >= lower[0][0] && x <= lower.at(-1)[0]) : [];
    if (both.length > 1) region(both, lower, "yellow");
    if (lower.length > 1) region(lower, level(lower, bottom), "green");
    // An edge that is out of view is not drawn at the border, where it is not.
    if (upper.length > 1) parts.push(path(curve(this.data.bounds.upper, Y), "edge red"));
    if (lower.length > 1) parts.push(path(curve(this.data.bounds.lower, Y), "edge green"));
    if (lower.length <= 40) parts.push(lower.map(([x, y]) => s("circle", { class: "edge-dot", cx: x, cy: y, r: 2 })));
    return parts;
  }

  #describe() {
    const { upper, lower } = this.data.bounds;
    const has = upper.length > 1 || lower.length > 1;
    if (this.described === has) return;
    this.described = has;
    const key = (style, text) => h("span", { class: "key" }, h("i", { class: `swatch ${style}` }), text);
    const say = (colour, text) =>
      h("span", { class: "chip small" }, tile(this.words.find((word) => word.colour === colour)), text);
    this.caption.replaceChildren(
      key("training", "training, shaded from lowest to highest where steps share a place"),
      key("probe", "probe, on its report part"),
      ...(has
        ? [
            say("red", "above a new head on the embeddings, without any block"),
            say("yellow", "between the two"),
            say("green", "within the margin of what the composed witness reaches"),
          ]
        : []),
    );
  }

  #spoken() {
    const { step, look } = this.data.now;
    const words = ["Loss over steps."];
    if (step && step[1] !== null) words.push(`Training loss ${nats(step[1])} at step ${integer(step[0])}.`);
    if (look) words.push(`On the probe ${nats(look.probe_loss)} at step ${integer(look.step)}.`);
    return words.join(" ");
  }

  showCursor(step) {
    this.plot.showCursor(step);
    setText(this.readout, step === null || !this.data ? "" : this.#at(step));
  }

  #at(step) {
    const bin = find(this.data.loss.items, step);
    const look = find(this.data.looks.items, step);
    const words = [];
    if (bin) {
      const steps = bin.first === bin.last ? integer(bin.first) : `${integer(bin.first)}–${integer(bin.last)}`;
      const spread = bin.rows > 1 && bin.mean !== null ? ` (${nats(bin.low)} to ${nats(bin.high)})` : "";
      words.push(`step ${steps}: training ${nats(bin.mean)}${spread}`);
    }
    if (look) words.push(`probe ${nats(look.loss)}`);
    for (const [name, bound] of [["red above", this.data.bounds.upper], ["green below", this.data.bounds.lower]]) {
      const before = bound.filter(([at]) => at <= step).at(-1);
      if (before) words.push(`${name} ${nats(before[1])}`);
    }
    return words.join(", ");
  }

  #rows() {
    return thinned(this.data.loss.items, 100).map((bin) => [
      bin.first === bin.last ? integer(bin.first) : `${integer(bin.first)}–${integer(bin.last)}`,
      nats(bin.mean), nats(bin.low), nats(bin.high),
    ]).reverse();
  }
}

// The last bin that begins at or before a step.
export function find(bins, step) {
  let low = 0;
  let high = bins.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (bins[middle].first <= step) low = middle + 1;
    else high = middle;
  }
  return bins[Math.max(low - 1, 0)] ?? null;
}

function letter(words, colour, x, above, below) {
  const word = words.find((each) => each.colour === colour);
  const place = { x: Math.max(x, LEFT + 14), y: (above + below) / 2 + 5, "text-anchor": "middle" };
  return s("text", { class: `cloud-letter ${colour}`, ...place }, word.letter);
}

// Red is cross-hatched, yellow striped, green dotted: the cloud is read without colours too.
function patterns(id) {
  const pattern = (colour, ...marks) =>
    s("pattern", { id: `${id}-${colour}`, width: 8, height: 8, patternUnits: "userSpaceOnUse", class: colour }, marks);
  return s(
    "defs",
    {},
    pattern("red", s("path", { d: "M0 0L8 8M8 0L0 8" })),
    pattern("yellow", s("path", { d: "M-2 2L2 -2M0 8L8 0M6 10L10 6" })),
    pattern("green", s("circle", { cx: 2, cy: 2, r: 0.9 }), s("circle", { cx: 6, cy: 6, r: 0.9 })),
  );
}
