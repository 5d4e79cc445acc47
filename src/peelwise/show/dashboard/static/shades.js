// The heat map's pixels: the patterns of the verdicts, and the shades of a statistic against its median.

import { colour } from "./dom.js";

export const WORST = "FG?YR"; // best first, behind blocks that are not asked about

// A red of one look among thousands is still seen: it takes at least so many pixels, from where it began.
export function widenRed(ranks, least) {
  const red = WORST.indexOf("R");
  let left = 0; // pixels that the red before may still take
  let before = false;
  for (let px = 0; px < ranks.length; px += 1) {
    const now = ranks[px] === red;
    if (now && !before) left = least;
    if (!now && left > 0 && ranks[px] >= 0) ranks[px] = red;
    left -= 1;
    before = now;
  }
}

function rgb(name) {
  const hex = colour(name).replace("#", "");
  return [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

function packed(shade, page, share) {
  const [r, g, b] = shade.map((value, i) => Math.round(value * share + page[i] * (1 - share)));
  return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
}

// The tiles' colours and patterns as squares of 8 by 8 pixels, one per rank: red plain, yellow striped, green light,
// grey dotted, frozen next to nothing.
export function verdictPatterns() {
  const page = rgb("--page");
  const [red, yellow, green, grey] = ["--red", "--yellow", "--green", "--grey"].map(rgb);
  const stripes = [packed(yellow, page, 0.5), packed(yellow, page, 0.2)];
  const [dot, blank] = [packed(grey, page, 0.75), packed(grey, page, 0.08)];
  const [solid, light] = [packed(red, page, 1), packed(green, page, 0.26)];
  const of = {
    F: () => blank,
    G: () => light,
    "?": (x, y) => (x % 4 === 1 && y % 4 === 1 ? dot : blank),
    Y: (x, y) => stripes[((x + y) >> 2) & 1],
    R: () => solid,
  };
  const found = new Uint32Array(64 * WORST.length);
  for (let rank = 0; rank < WORST.length; rank += 1) {
    for (let at = 0; at < 64; at += 1) found[(rank << 6) | at] = of[WORST[rank]](at & 7, at >> 3);
  }
  return found;
}

// 65 shades from far below the median to far above it, each followed by its paler stripe.
export function divergingShades() {
  const page = rgb("--page");
  const [above, below] = [rgb("--mark"), rgb("--accent")];
  const found = new Uint32Array(130);
  for (let i = 0; i <= 64; i += 1) {
    const t = i / 32 - 1;
    const shade = t < 0 ? below : above;
    found[2 * i] = packed(shade, page, 0.06 + 0.86 * Math.abs(t));
    found[2 * i + 1] = packed(shade, page, 0.06 + 0.6 * Math.abs(t));
  }
  return found;
}
