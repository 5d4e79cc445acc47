// One block's history: every statistic with its intervals, its matrices, and why it has its verdict.

import { chip, h, s, setText, Table, thinned, width } from "./dom.js";
import { extremes, MODEL } from "./data.js";
import { find } from "./loss.js";
import { area, marker, path, Plot } from "./plot.js";
import { against, amount, compact, duration, integer, percent } from "./scale.js";

// Said in a sentence, not drawn.
const IN_WORDS = ["tokens_to_decide", "seconds_to_decide"];
const COLOURS = { R: "red", Y: "yellow", G: "green", "?": "grey", F: "frozen" };

export class BlockPanel {
  constructor({ words }) {
    this.words = words;
    this.title = h("h3");
    this.reason = h("p", { class: "reason" });
    this.charts = h("div", { class: "small-charts" });
    this.shared = h(
      "p", { class: "value" },
      "Grey: from the lowest to the highest of measurements that share a place; the line goes through the last of them.");
    this.matrices = h("div", { class: "matrices" });
    this.history = h("ol", { class: "changes" });
    this.past = h("details", { class: "numbers" }, h("summary", {}, "Verdicts of this block over time"), this.history);
    this.table = new Table("This block's numbers", ["step", "statistic", "value", "95 % interval", "against its median"]);
    this.table.rows = () => this.#rows();
    this.root = h(
      "section", { class: "panel block" }, this.title, this.reason, this.charts, this.shared, this.matrices, this.past, this.table.root);
    this.plots = new Map();
  }

  render(data, { x, selected }) {
    Object.assign(this, { data, selected });
    const name = selected === MODEL ? "The whole model" : `Block ${selected}`;
    const long = selected === MODEL ? "" : data.facts.blocks[selected];
    if (this.title.dataset.of !== `${name}${long}`) {
      this.title.dataset.of = `${name}${long}`;
      this.title.replaceChildren(name, h("small", {}, ` ${long}`));
    }
    this.#renderReason();
    this.shared.hidden = true;
    if (!data.block) {
      setText(this.matrices, "");
      return;
    }
    const names = [...data.statistics.keys()].filter(
      (each) => data.block.series.has(each) && !data.statistics.get(each).in_cloud && !IN_WORDS.includes(each));
    this.#arrange(names);
    names.forEach((each) => width(this.plots.get(each).plot.root)); // before anything is drawn
    names.forEach((each) => this.#renderSeries(each, x));
    this.shared.hidden = !names.some((each) => data.block.series.get(each).some(sharesPlace));
    this.#renderMatrices();
    this.#renderHistory();
    this.table.update();
  }

  #renderReason() {
    const verdict = this.data.verdicts.get(this.selected);
    const wait = verdict?.colour === "grey" ? this.#wait() : "";
    const state = verdict ? `${verdict.step}${verdict.colour}${this.selected}${wait}` : "";
    if (this.reason.dataset.of === state) return;
    this.reason.dataset.of = state;
    if (!verdict) {
      setText(this.reason, this.selected === MODEL ? "What belongs to all blocks together." : "");
      return;
    }
    const word = this.words.find((each) => each.colour === verdict.colour);
    const measured = verdict.measured_step === null ? "" : ` Rests on the measurement at step ${integer(verdict.measured_step)}.`;
    this.reason.replaceChildren(
      chip(word), h("span", { class: "muted" }, ` since step ${integer(verdict.step)}: ${verdict.reason}.${measured}${wait}`));
  }

  // What would decide an undecided block: as the newest measurement says, if it does.
  #wait() {
    const newest = (name) => {
      const row = this.data.block?.series.get(name)?.at(-1);
      return row && row[0] === this.data.now.look?.step ? row[2] : null;
    };
    const [tokens, seconds] = [newest("tokens_to_decide"), newest("seconds_to_decide")];
    if (tokens === null) return "";
    const of = this.data.facts.unit === "nats per token" ? "tokens" : "examples";
    const time = seconds ? `, which the budget pays for in about ${duration(seconds)}` : "";
    return ` About ${compact(tokens)} ${of} to report on would decide it${time}, if its gain stays what it is.`;
  }

  // One chart per statistic, kept as long as the statistic is there.
  #arrange(names) {
    const wanted = names.join(" ");
    if (this.arranged === wanted) return;
    this.arranged = wanted;
    const charts = names.map((name) => {
      if (!this.plots.has(name)) {
        const plot = new Plot({ height: 150, label: name, left: 52, top: 12 });
        const value = h("p", { class: "value" });
        const title = h("h4", { title: this.data.statistics.get(name).meaning }, this.data.statistics.get(name).title);
        const root = h("figure", { class: "small-chart", "data-statistic": name }, title, value, plot.root);
        this.plots.set(name, { plot, value, root });
      }
      return this.plots.get(name).root;
    });
    this.charts.replaceChildren(...charts);
  }

  #renderSeries(name, x) {
    const facts = this.data.statistics.get(name);
    const rows = this.data.block.series.get(name).filter((row) => row[2] !== null);
    const { plot, value } = this.plots.get(name);
    if (!rows.length) return;
    const medians = rows.map(([step, , v, , , m]) => [step, m === null ? null : facts.quotient ? v / m : v - m]);
    let [low, high] = range(rows);
    const log = facts.quotient && low > 0 && high / low > 20;
    if (!facts.quotient && facts.unit) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
    const room = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
    const y = log ? [low * 0.85, high * 1.2] : [low - (low === 0 ? 0 : room), high + room];
    const frame = plot.frame({ x, y, log });
    if (!frame) return;
    const { X, Y } = frame;
    const line = rows.map(([step, , v]) => [X(step), Y(v)]);
    plot.paint(
      y[0] < 0 && y[1] > 0 && s("line", { class: "zero", x1: frame.left, x2: frame.right, y1: Y(0), y2: Y(0) }),
      shared(rows, frame),
      this.#intervals(rows, frame),
      path(medians.map(([step, m]) => [X(step), m === null || (log && m <= 0) ? null : Y(m)]), "line median"),
      path(line, "line"),
      this.#markers(rows, X, Y),
    );
    const [step, , v, lo, hi, m] = rows.at(-1);
    const interval = lo === null ? "" : ` [${amount(facts, lo)}, ${amount(facts, hi)}]`;
    const unit = facts.unit && !["steps", "s"].includes(facts.unit) ? ` ${facts.unit}` : "";
    const compared = against(facts, v, m);
    setText(value, `${amount(facts, v)}${interval}${unit} at step ${integer(step)}${compared ? `, ${compared}` : ""}`);
    plot.svg.setAttribute("aria-label", `${facts.title} of ${rows.length} measurements. Latest: ${value.textContent}`);
  }

  #intervals(rows, { X, Y }) {
    const found = rows.filter(([, , , low, high]) => low !== null && high !== null);
    if (found.length > 80) {
      return area(found.map(([step, , , , high]) => [X(step), Y(high)]), found.map(([step, , , low]) => [X(step), Y(low)]), "spread");
    }
    return found.map(([step, , , low, high]) =>
      s("line", { class: "whisker", x1: X(step), x2: X(step), y1: Y(low), y2: Y(high) }));
  }

  // A marker per look while there is room for them, else only where the verdict changed, and at the end.
  #markers(rows, X, Y) {
    let before = null;
    return rows.map(([step, block, v], i) => {
      const look = block === MODEL ? null : find(this.data.looks.items, step);
      const colour = COLOURS[look?.letters[block]] ?? "plain";
      const shown = rows.length <= 60 || colour !== before || i === rows.length - 1;
      before = colour;
      if (!shown) return null;
      if (colour === "plain") return s("circle", { class: "dot", cx: X(step), cy: Y(v), r: 3 });
      return marker(colour, X(step), Y(v), colour === "red" ? 4 : 3.4);
    }).filter(Boolean);
  }

  #renderMatrices() {
    const found = this.data.block.matrices;
    const state = found.map((each) => `${each.name} ${each.share} ${each.step}`).join();
    if (this.matrices.dataset.of === state) return;
    this.matrices.dataset.of = state;
    if (!found.length) {
      this.matrices.replaceChildren();
      return;
    }
    const prefix = `${this.data.facts.blocks[this.selected] ?? ""}.`;
    const most = Math.max(...found.map((each) => each.share), 1e-9);
    const rows = [...found].sort((a, b) => b.share - a.share).map((each) => {
      const bar = h("i", { class: "bar" });
      bar.style.width = `${(100 * each.share) / most}%`;
      const name = each.name.startsWith(prefix) ? each.name.slice(prefix.length) : each.name;
      return h(
        "tr", {},
        h("th", { scope: "row" }, name),
        h("td", { class: "bars" }, bar),
        h("td", { class: "right" }, percent(each.share)),
        h("td", { class: "right muted" }, percent(each.median)),
      );
    });
    const head = ["matrix", "", "share", "usually"].map((text) => h("th", { scope: "col" }, text));
    this.matrices.replaceChildren(
      h("h4", {}, "Its matrices"),
      h("p", { class: "value" }, `share of the block's input-whitened score at step ${integer(found[0].step)}`),
      h("table", {}, h("caption", {}, "Shares of the block's matrices"), h("thead", {}, h("tr", {}, head)), h("tbody", {}, rows)),
    );
  }

  #renderHistory() {
    const found = this.data.block.verdicts;
    this.past.hidden = !found.length;
    if (this.history.dataset.of === String(found.length)) return;
    this.history.dataset.of = String(found.length);
    const items = found.slice(-60).reverse().map((each) => {
      const word = this.words.find((one) => one.colour === each.colour);
      return h("li", {}, h("span", { class: "muted" }, `step ${integer(each.step)} `), chip(word, `${word.words}: ${each.reason}`));
    });
    this.history.replaceChildren(...items);
  }

  showCursor(step) {
    for (const { plot } of this.plots.values()) plot.showCursor(step);
  }

  #rows() {
    if (!this.data.block) return [];
    return [...this.data.block.series].flatMap(([name, rows]) => {
      const facts = this.data.statistics.get(name);
      if (!facts) return [];
      return thinned(rows, 40).reverse().map(([step, , v, low, high, m]) => [
        integer(step), facts.title, amount(facts, v),
        low === null ? "" : `${amount(facts, low)} to ${amount(facts, high)}`, against(facts, v, m),
      ]);
    });
  }
}

// The lowest and highest that a series must show.
function range(rows) {
  let [low, high] = [Infinity, -Infinity];
  for (const row of rows) {
    for (const value of [row[2], row[3], row[4], ...extremes(row)]) {
      if (value === null) continue;
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
  }
  return [low, high];
}

const sharesPlace = (row) => row.length > 6;

// Where looks share a place, the last is a point of the line; shaded from the lowest to the highest of them.
function shared(rows, { X, Y }) {
  if (!rows.some(sharesPlace)) return null;
  const ends = rows.map((row) => [X(row[0]), ...extremes(row).map((value) => Y(value ?? row[2]))]);
  return area(ends.map(([x, , high]) => [x, high]), ends.map(([x, low]) => [x, low]), "shared");
}
