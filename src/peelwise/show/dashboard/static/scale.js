// Scales, ticks and number formats.

export function linear([d0, d1], [r0, r1]) {
  const k = d1 > d0 ? (r1 - r0) / (d1 - d0) : 0;
  const scale = (value) => r0 + (value - d0) * k;
  scale.invert = (place) => (k ? d0 + (place - r0) / k : d0);
  return scale;
}

export function logarithmic([d0, d1], range) {
  const inner = linear([Math.log10(d0), Math.log10(d1)], range);
  return (value) => inner(Math.log10(Math.max(value, d0 / 1e3)));
}

export function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const raw = (high - low) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((each) => each >= raw * 0.7);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) found.push(i * step + 0); // adding 0 makes a minus zero plain
  return found;
}

export function logTicks(low, high) {
  const found = [];
  const wide = high / low > 1000;
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const m of wide ? [1] : [1, 2, 5]) {
      const value = m * 10 ** power;
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  }
  return found;
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const four = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
const three = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

export const missing = "not measured";
export const integer = (value) => whole.format(value);
export const axis = (value) => (Math.abs(value) >= 10_000 ? short.format(value) : four.format(value));
export const compact = (value) => short.format(value);
export const nats = (value) => (value === null ? missing : value.toFixed(4));

export function signed(value) {
  const text = value.toFixed(4);
  return value > 0 ? `+${text}` : text.replace("-", "\u2212");
}

export function percent(share) {
  return share === null ? missing : `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
}

export function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.floor(Math.round(seconds) / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

// A statistic's value as people write it: nats with sign and four decimals, steps whole, others with three digits.
export function amount(facts, value) {
  if (value === null) return "no finite number";
  if (facts.of_loss) return signed(value);
  if (facts.unit === "steps" || facts.unit === "tokens" || facts.unit === "examples") return integer(value);
  if (facts.unit === "s") return duration(value);
  return Math.abs(value) >= 10_000 ? short.format(value) : three.format(value);
}

export function against(facts, value, toMedian) {
  if (toMedian === null || value === null) return "";
  return facts.quotient ? `${three.format(toMedian)} × its median` : `${signed(toMedian)} against its median`;
}
