// A trace's sentence matrix, sparse, as GetTrace sends it: rows read columns.
import { floats, integers, role } from "./api.js";
import { headName } from "./heads.js";

export class Trace {
  /** `answer`: GetTraceResponse as protobuf JSON. */
  constructor(answer) {
    this.info = answer.info;
    this.events = answer.events ?? [];
    this.sentences = (answer.sentences ?? []).map((one) => ({
      index: one.index ?? 0, role: role(one), first: one.firstToken ?? 0, end: one.endToken ?? 0, text: one.text ?? "",
    }));
    this.scores = floats(answer.verticalScore);
    // By which heads the curve is: all of them, and where the monitor tells them apart the receiver heads.
    this.curves = { all: this.scores, receiver: floats(answer.receiverScore), corrected: floats(answer.correctedScore) };
    this.heads = (answer.heads ?? []).map((one) => ({ name: headName(one.head), kurtosis: Number(one.kurtosis ?? 0), receiver: Boolean(one.receiver) }));
    this.unobserved = floats(answer.unobservedShare);
    this.captured = integers(answer.capturedRows);
    this.columns = integers(answer.matrixColumn);
    this.shares = floats(answer.matrixShare);
    this.starts = rowStarts(integers(answer.matrixRow), this.sentences.length);
    this.hasText = this.sentences.some((sentence) => sentence.text);
  }

  get size() {
    return this.sentences.length;
  }

  /** [column, share] of a row's entries, heaviest first. */
  reads(row) {
    const found = [];
    for (let at = this.starts[row]; at < this.starts[row + 1]; at++) found.push([this.columns[at], this.shares[at]]);
    return found.sort((a, b) => b[1] - a[1]);
  }

  /** [row, share] of a column's entries, heaviest first. */
  readBy(column) {
    const found = [];
    for (let row = column; row < this.size; row++) {
      const share = this.share(row, column);
      if (share > 0) found.push([row, share]);
    }
    return found.sort((a, b) => b[1] - a[1]);
  }

  /** Share that `row` gives to `column`; columns ascend within a row. */
  share(row, column) {
    let low = this.starts[row];
    let high = this.starts[row + 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.columns[middle] < column) low = middle + 1;
      else high = middle;
    }
    return low < this.starts[row + 1] && this.columns[low] === column ? this.shares[low] : 0;
  }

  /**
   * The cells of rows and columns [from, to) in at most `side` steps each way: of sentences that share a cell, the pair
   * with the largest share. { step, shares: rows of numbers or null, pairs: rows of [row, column] or null }
   */
  cells([fromRow, toRow], [fromColumn, toColumn], side) {
    const step = Math.max(1, Math.ceil(Math.max(toRow - fromRow, toColumn - fromColumn) / side));
    const [high, wide] = [Math.ceil((toRow - fromRow) / step), Math.ceil((toColumn - fromColumn) / step)];
    const shares = Array.from({ length: high }, () => new Array(wide).fill(null));
    const pairs = Array.from({ length: high }, () => new Array(wide).fill(null));
    for (let row = fromRow; row < toRow; row++) {
      const y = Math.floor((row - fromRow) / step);
      for (let at = this.starts[row]; at < this.starts[row + 1]; at++) {
        const column = this.columns[at];
        if (column < fromColumn || column >= toColumn) continue;
        const x = Math.floor((column - fromColumn) / step);
        if (shares[y][x] === null || this.shares[at] > shares[y][x]) {
          shares[y][x] = this.shares[at];
          pairs[y][x] = [row, column];
        }
      }
    }
    return { step, shares, pairs };
  }
}

/** First entry of each row, and the end of the last; rows ascend. */
function rowStarts(rows, size) {
  const starts = new Uint32Array(size + 1);
  for (const row of rows) starts[row + 1]++;
  for (let row = 0; row < size; row++) starts[row + 1] += starts[row];
  return starts;
}
