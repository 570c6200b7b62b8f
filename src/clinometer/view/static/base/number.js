// Four significant digits; scientific outside 1e-3 … 1e4; a true zero is "0".

const MINUS = "\u2212";
// What a run file keeps of a norm that float32 cannot hold: its largest number.
const LARGEST = 3.4028234663852886e38;

export function number(value, digits = 4) {
  if (value === null || value === undefined) return "\u2013";
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "\u221e" : MINUS + "\u221e";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (value === LARGEST) return "\u2265 " + scientific(size, digits);
  const text = size >= 1e-3 && size < 1e4 ? plain(size, digits) : scientific(size, digits);
  return (value < 0 ? MINUS : "") + text;
}

function plain(size, digits) {
  const text = size.toPrecision(digits);
  return text.includes("e") ? scientific(size, digits) : text;
}

function scientific(size, digits) {
  const [mantissa, exponent] = size.toExponential(digits - 1).split("e");
  const sign = exponent[0] === "-" ? "-" : "+";
  return `${mantissa}e${sign}${exponent.slice(1).padStart(2, "0")}`;
}

export function signed(value, digits = 4) {
  return value > 0 ? "+" + number(value, digits) : number(value, digits);
}

// Whole numbers in groups of three: steps, entries, tokens.
export function count(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return number(value);
  return Math.round(value).toString().replace(/\B(?=(\d{3})+$)/g, ",");
}

// 12.9 M rather than 12,900,000, where only the size matters.
export function size(value) {
  if (value === null || value === undefined) return "\u2013";
  for (const [limit, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (Math.abs(value) >= limit) return `${(value / (limit === 1e4 ? 1e3 : limit)).toPrecision(3)} ${unit}`;
  }
  return count(value);
}

export function shape(dimensions) {
  return dimensions.length ? dimensions.map((n) => count(n)).join(" × ") : "1";
}

export function percent(share) {
  if (share === 0) return "0 %";
  const value = share * 100;
  return `${Math.abs(value) >= 10 ? value.toFixed(0) : value.toPrecision(2)} %`;
}
