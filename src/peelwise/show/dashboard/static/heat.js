// The heat map: blocks by steps, in the colours and patterns of the verdicts, or one statistic against its median.

import { colour, h, setText, Table, thinned, tile, width as widthOf } from "./dom.js";
import { find } from "./loss.js";
import { follow, LEFT, RIGHT } from "./plot.js";
import { amount, integer, linear, ticks } from "./scale.js";
import { divergingShades, verdictPatterns, widenRed, WORST } from "./shades.js";

const LEAST = 2; // pixels of a red
const FULL = 4; // a quotient of this, or of its inverse, has the full colour

export class HeatMap {
  constructor({ words, onHover, onChoose, onSelect }) {
    Object.assign(this, { words, onSelect });
    this.canvas = h("canvas", { "aria-hidden": "true" });
    this.line = h("i", { class: "heat-cursor", "aria-hidden": "true" });
    this.mark = h("i", { class: "heat-selected", "aria-hidden": "true" });
    this.point = h("i", { class: "heat-point", "aria-hidden": "true" });
    this.stage = h(
      "div",
      {
        class: "heat-stage", tabindex: 0, role: "application", "aria-roledescription": "heat map",
        onkeydown: (event) => this.#key(event), onblur: () => this.#leave(),
      },
      this.canvas, this.mark, this.line, this.point,
    );
    this.readout = h("p", { class: "readout", role: "status", "aria-live": "polite" });
    this.legend = h("figcaption");
    this.title = h("h3", {}, "Blocks over steps");
    this.table = new Table("Blocks over steps", ["from step"]);
    this.table.rows = () => this.#rows();
    this.root = h(
      "section",
      { class: "panel heat" },
      this.title,
      h("figure", {}, this.stage, this.readout, this.legend),
      this.table.root,
    );
    this.at = null; // where the keyboard is: {column, block}
    follow(this.stage, {
      toStep: (x) => (this.X ? this.X.invert(x) : 0),
      onChoose,
      onHover: (step, event) => {
        onHover(step);
        setText(this.readout, step === null ? "" : this.#words(step, this.#blockAt(event.offsetY)));
      },
      onPress: (event) => {
        const block = this.#blockAt(event.offsetY);
        if (block !== null) onSelect(block);
      },
    });
  }

  get columns() {
    return this.data.heat ? this.data.heat.bins.items : this.data.looks.items;
  }

  render(data, { x, selected, statistic }) {
    Object.assign(this, { data, selected });
    this.statistic = data.heat ? data.statistics.get(statistic) : null;
    const width = widthOf(this.stage);
    const blocks = data.facts.blocks.length;
    if (!width || !blocks) return;
    this.row = Math.round(Math.min(26, Math.max(5, 380 / blocks)));
    this.X = linear(x, [LEFT, width - RIGHT]);
    this.#draw(width, this.row * blocks);
    this.mark.classList.toggle("shown", selected >= 0);
    this.mark.classList.toggle("thin", this.row < 12);
    this.mark.style.top = `${selected * this.row}px`;
    this.mark.style.height = `${this.row}px`;
    this.#describe();
    this.table.update();
  }

  #draw(width, height) {
    const ratio = window.devicePixelRatio || 1;
    const canvas = this.canvas;
    const [w, tall] = [Math.round(width * ratio), Math.round((height + 22) * ratio)];
    if (canvas.width !== w || canvas.height !== tall) {
      Object.assign(canvas, { width: w, height: tall });
      canvas.style.height = `${height + 22}px`;
    }
    const context = canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, w, tall);
    const x0 = Math.round(LEFT * ratio);
    const wide = Math.max(1, w - Math.round(RIGHT * ratio) - x0);
    const image = context.createImageData(wide, Math.round(height * ratio));
    const runs = this.statistic ? this.#paintStatistic(image, ratio) : this.#paintVerdicts(image, ratio);
    context.putImageData(image, x0, 0);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.#letters(context, runs, ratio);
    this.#axes(context, width, height);
  }

  // For every pixel column the columns of data that lie in it, as [first, last], or null left of the first look.
  #places(wide, ratio) {
    const columns = this.columns;
    const found = new Array(wide).fill(null);
    if (!columns.length) return found;
    const end = Math.max(columns.at(-1).last, this.data.now.step?.[0] ?? 0);
    let i = -1;
    for (let px = 0; px < wide; px += 1) {
      const from = i;
      const right = this.X.invert(LEFT + (px + 1) / ratio);
      if (this.X.invert(LEFT + px / ratio) > end) break;
      while (i + 1 < columns.length && columns[i + 1].first < right) i += 1;
      if (i >= 0) found[px] = [Math.min(from + 1, i), i];
    }
    return found;
  }

  // The pixel rows that belong to a block, as [first, end]; rows that are high enough stand apart a little.
  #rowsOf(block, ratio, height) {
    const gap = this.row >= 8 ? ratio : 0;
    return [Math.round(block * this.row * ratio), Math.min(height, Math.round((block + 1) * this.row * ratio - gap))];
  }

  #paintVerdicts(image, ratio) {
    const { width, height } = image;
    const pixels = new Uint32Array(image.data.buffer);
    const blocks = this.data.facts.blocks.length;
    const places = this.#places(width, ratio);
    const columns = this.columns.map(ranksOf);
    const patterns = verdictPatterns();
    const across = Uint8Array.from({ length: width }, (_, px) => Math.floor(px / ratio) & 7);
    const ranks = new Int8Array(width);
    const runs = [];
    for (let b = 0; b < blocks; b += 1) {
      for (let px = 0; px < width; px += 1) {
        ranks[px] = -1;
        if (!places[px]) continue;
        for (let i = places[px][0]; i <= places[px][1]; i += 1) ranks[px] = Math.max(ranks[px], columns[i][b]);
      }
      widenRed(ranks, Math.ceil(LEAST * ratio));
      for (let px = 1, start = 0; px <= width; px += 1) {
        if (px < width && ranks[px] === ranks[px - 1]) continue;
        if (ranks[px - 1] >= 0) runs.push([b, start / ratio, px / ratio, WORST[ranks[px - 1]]]);
        start = px;
      }
      const [top, bottom] = this.#rowsOf(b, ratio, height);
      for (let y = top; y < bottom; y += 1) {
        const down = (Math.floor((y - top) / ratio) & 7) << 3;
        for (let px = 0, at = y * width; px < width; px += 1, at += 1) {
          if (ranks[px] >= 0) pixels[at] = patterns[(ranks[px] << 6) | down | across[px]];
        }
      }
    }
    return runs;
  }

  #paintStatistic(image, ratio) {
    const { width, height } = image;
    const pixels = new Uint32Array(image.data.buffer);
    const places = this.#places(width, ratio);
    const blocks = this.data.facts.blocks.length;
    const strengths = this.#strengths();
    const shades = divergingShades();
    const line = new Uint32Array(2 * width); // a plain row of pixels, and one of the stripes
    for (let b = 0; b < blocks; b += 1) {
      line.fill(0);
      for (let px = 0; px < width; px += 1) {
        if (!places[px]) continue;
        let t = NaN;
        for (let i = places[px][0]; i <= places[px][1]; i += 1) {
          const each = strengths[i][b];
          if (!(Math.abs(each) <= Math.abs(t)) && !Number.isNaN(each)) t = each;
        }
        if (Number.isNaN(t)) continue;
        const shade = Math.round((t + 1) * 32) * 2;
        line[px] = shades[shade];
        line[width + px] = shades[shade + (t < -0.05 ? 1 : 0)];
      }
      const [top, bottom] = this.#rowsOf(b, ratio, height);
      for (let y = top; y < bottom; y += 1) {
        const striped = Math.floor((y - top) / ratio) % 4 < 2;
        pixels.set(line.subarray(striped ? width : 0, striped ? 2 * width : width), y * width);
      }
    }
    return [];
  }

  // How far every column's values are from their medians: -1 to 1, kept for the next time.
  #strengths() {
    const { quotient } = this.data.heat;
    const full = quotient ? Math.log(FULL) : this.#fullDifference();
    const strength = quotient
      ? (v) => (v > 0 ? clamp(Math.log(v) / full) : NaN)
      : (v) => (Number.isNaN(v) ? NaN : clamp(v / full));
    return this.columns.map((column) => {
      if (column.full !== full || !column.strengths) Object.assign(column, { full, strengths: column.values.map(strength) });
      return column.strengths;
    });
  }

  // The difference that has the full colour: only the largest few lie beyond. Found again when a column is added.
  #fullDifference() {
    const { heat } = this.data;
    if (heat.fullFor !== this.columns.length) {
      const sizes = this.columns.flatMap((c) => [...c.values].filter((v) => !Number.isNaN(v)).map(Math.abs));
      heat.full = Float64Array.from(sizes).sort()[Math.floor(0.98 * (sizes.length - 1))] || 1e-9;
      heat.fullFor = this.columns.length;
    }
    return heat.full;
  }

  #letters(context, runs) {
    if (this.row < 12) return;
    context.font = `700 ${Math.min(12, this.row - 3)}px system-ui, sans-serif`;
    context.textBaseline = "middle";
    const ink = { R: colour("--page"), Y: colour("--ink"), G: colour("--green"), "?": colour("--grey"), F: colour("--muted") };
    for (const [b, from, to, letter] of runs) {
      if (to - from < 15) continue;
      context.fillStyle = ink[letter];
      context.fillText(letter, LEFT + from + 5, (b + 0.5) * this.row);
    }
  }

  #axes(context, width, height) {
    const blocks = this.data.facts.blocks.length;
    context.fillStyle = colour("--muted");
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.textAlign = "right";
    const every = Math.ceil(15 / this.row);
    const step = [1, 2, 5, 10, 20, 50].find((each) => each >= every) ?? 100;
    for (let b = 0; b < blocks; b += step) context.fillText(String(b), LEFT - 12, Math.max(7, (b + 0.5) * this.row));
    context.textAlign = "center";
    const [x0, x1] = [this.X.invert(LEFT), this.X.invert(width - RIGHT)];
    for (const value of ticks(x0, x1, Math.max(2, Math.floor((width - LEFT) / 90)))) {
      const text = integer(value);
      const place = Math.min(this.X(value), width - context.measureText(text).width / 2 - 1);
      if (Number.isInteger(value)) context.fillText(text, place, height + 13);
    }
    context.textAlign = "start";
  }

  #describe() {
    const name = this.statistic ? this.statistic.name : "";
    const letters = this.data.now.look?.letters ?? "";
    const words = this.words.filter((word) => word.letter !== "F" || letters.includes("F"));
    const spoken = words.map((word) => `${letters.split(word.letter).length - 1} ${word.colour}`).join(", ");
    this.stage.setAttribute(
      "aria-label",
      `Heat map of ${this.data.facts.blocks.length} blocks by ${this.columns.length} columns of measurements. Now ${spoken}. ` +
        "Arrow keys move, Enter selects the block, the same numbers are in the table below.",
    );
    const full = this.statistic && !this.data.heat.quotient ? this.#fullDifference().toFixed(4) : "";
    const most = Math.max(1, ...this.columns.map((column) => column.rows));
    if (this.described === `${name} ${full} ${most} ${words.length}`) return;
    this.described = `${name} ${full} ${most} ${words.length}`;
    const shown = this.statistic ? "farthest from its median" : "worst";
    const shared = most > 1 ? h("span", {}, `up to ${most} measurements share a column: the ${shown} is shown`) : null;
    setText(this.title, this.statistic ? `${this.statistic.title} against its own median` : "Verdicts of all blocks");
    if (!this.statistic) {
      const meaning = (word) => h("span", { class: "chip small", title: word.meaning }, tile(word), word.words);
      this.legend.replaceChildren(...[...words.map(meaning), shared].filter(Boolean));
      return;
    }
    const [below, above] = full
      ? [`\u2212${full}`, `+${full} ${this.statistic.unit}`]
      : [`a quarter of its median`, `${FULL} times its median`];
    this.legend.replaceChildren(
      h("span", { class: "key" }, below, h("i", { class: "ramp" }), above),
      h("span", {}, "below the median striped, above it plain; blank where not measured"),
      ...[shared].filter(Boolean),
    );
  }

  #words(step, block) {
    if (block === null || !this.columns.length) return "";
    const column = find(this.columns, step);
    const steps = column.first === column.last ? integer(column.first) : `${integer(column.first)}–${integer(column.last)}`;
    const looks = column.rows > 1 ? `, ${this.statistic ? "farthest" : "worst"} of ${column.rows} measurements` : "";
    const name = `block ${block} (${this.data.facts.blocks[block]}), step ${steps}`;
    if (step < this.columns[0].first) return `block ${block}: not looked at yet`;
    return `${name}: ${this.#value(column, block)}${looks}`;
  }

  #value(column, block) {
    if (!this.statistic) return this.words.find((word) => word.letter === column.letters[block])?.words ?? "";
    const value = column.values[block];
    if (Number.isNaN(value)) return "not measured";
    return this.data.heat.quotient
      ? `${value.toPrecision(3)} × its median`
      : `${amount(this.statistic, value)} against its median`;
  }

  #blockAt(y) {
    const block = Math.floor(y / this.row);
    return block >= 0 && block < this.data.facts.blocks.length ? block : null;
  }

  #key(event) {
    const columns = this.columns.length;
    if (!columns) return;
    const big = Math.max(1, Math.floor(columns / 20));
    const moves = {
      ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1],
      PageUp: [-big, 0], PageDown: [big, 0], Home: [-columns, 0], End: [columns, 0],
    };
    const blocks = this.data.facts.blocks.length;
    this.at ??= { column: columns - 1, block: Math.max(this.selected, 0) };
    if (event.key in moves) {
      const [across, down] = moves[event.key];
      this.at.column = Math.min(Math.max(this.at.column + across, 0), columns - 1);
      this.at.block = Math.min(Math.max(this.at.block + down, 0), blocks - 1);
    } else if (event.key === "Enter" || event.key === " ") this.onSelect(this.at.block);
    else return;
    event.preventDefault();
    const step = this.columns[this.at.column].first;
    this.point.classList.add("shown");
    this.point.style.left = `${this.X(step)}px`;
    this.point.style.top = `${(this.at.block + 0.5) * this.row}px`;
    setText(this.readout, this.#words(step, this.at.block));
  }

  #leave() {
    this.at = null;
    this.point.classList.remove("shown");
  }

  showCursor(step) {
    this.line.classList.toggle("shown", step !== null && Boolean(this.X));
    if (step !== null && this.X) this.line.style.left = `${this.X(step)}px`;
  }

  #rows() {
    const header = this.table.root.querySelector("thead tr");
    const names = this.data.facts.blocks;
    if (header.children.length !== names.length + 1) {
      header.replaceChildren(
        h("th", { scope: "col" }, "from step"),
        ...names.map((name, b) => h("th", { scope: "col", title: name }, String(b))),
      );
    }
    const short = (column, b) => {
      if (!this.statistic) return column.letters[b];
      return Number.isNaN(column.values[b]) ? "" : column.values[b].toPrecision(3);
    };
    return thinned(this.columns, 60).reverse().map((c) => [integer(c.first), ...names.map((_, b) => short(c, b))]);
  }
}

// The ranks of a column's letters, kept for the next time.
function ranksOf(column) {
  if (column.ranked !== column.letters) {
    column.ranked = column.letters;
    column.ranks = Int8Array.from(column.letters, (letter) => WORST.indexOf(letter));
  }
  return column.ranks;
}

const clamp = (value) => Math.max(-1, Math.min(1, value));
