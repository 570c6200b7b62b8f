// The gradient map as numbers: rows are tensors, columns are stretches of steps.

import { bytes, floats } from "../base/api.js";

export class MapData {
  constructor(answer) {
    Object.assign(this, answer);
    this.values = floats(answer.values);
    this.alarm = bytes(answer.alarm);
    this.rowOf = new Map(this.ids.map((id, row) => [id, row]));
    this.dead = new Set(answer.dead);
  }

  row(id) {
    const row = this.rowOf.get(id);
    return row === undefined ? null : this.values.subarray(row * this.columns, (row + 1) * this.columns);
  }

  alarms(id) {
    const row = this.rowOf.get(id);
    return row === undefined ? null : this.alarm.subarray(row * this.columns, (row + 1) * this.columns);
  }

  value(id, column) {
    return this.values[this.rowOf.get(id) * this.columns + column];
  }

  // The column that holds `step`: the last that begins at or before it.
  column(step) {
    let [low, high] = [0, this.step.length - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.step[middle] <= step) low = middle;
      else high = middle - 1;
    }
    return high;
  }

  // Steps a column stands for: [first, last].
  steps(column) {
    const first = this.step[column];
    const next = column + 1 < this.step.length ? this.step[column + 1] : this.last + 1;
    return [first, Math.max(first, Math.min(next, first + this.stride) - 1)];
  }

  // 1 for the largest of the column.
  rank(id, column) {
    const own = this.value(id, column);
    if (Number.isNaN(own)) return null;
    let above = 0;
    for (let row = 0; row < this.rows; row++) if (this.values[row * this.columns + column] > own) above++;
    return above + 1;
  }

  latest(id) {
    const row = this.row(id);
    for (let k = row ? row.length - 1 : -1; k >= 0; k--) if (!Number.isNaN(row[k])) return row[k];
    return NaN;
  }

  // Where a value stands on the colour scale, 0 … 1; NaN where it has no place on it.
  place(value) {
    const seen = this.log ? (value > 0 ? Math.log10(value) : NaN) : value;
    return (seen - this.low) / (this.high - this.low || 1);
  }

  // As an image: one pixel a cell. Zeros and nothing get `none`, what is not finite `alarm`.
  pixels(order, scale, none, alarm) {
    const image = new ImageData(Math.max(1, this.columns), Math.max(1, order.length));
    const out = image.data;
    order.forEach((id, at) => {
      const row = this.rowOf.get(id);
      for (let column = 0; column < this.columns; column++) {
        const cell = row * this.columns + column;
        const value = this.values[cell];
        const k = (at * this.columns + column) * 4;
        out[k + 3] = 255;
        if (this.alarm[cell]) out.set(alarm, k);
        else if (row === undefined || Number.isNaN(value)) out[k + 3] = 0;
        else {
          const place = this.place(value);
          if (Number.isNaN(place)) { out.set(none, k); continue; }
          const n = Math.round(Math.min(1, Math.max(0, place)) * 255) * 3;
          out[k] = scale[n];
          out[k + 1] = scale[n + 1];
          out[k + 2] = scale[n + 2];
        }
      }
    });
    return image;
  }
}
