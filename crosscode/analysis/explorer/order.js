// The order of latents by a column whose values are numbers or null, or texts. What is null comes last, either way.
window.crosscodeOrder = (() => {
  const byText = values => Uint32Array.from(values, (_, i) => i).sort((i, j) => {
    const a = values[i] ?? "", b = values[j] ?? "";
    return a < b ? -1 : a > b ? 1 : i - j;
  });

  // Keys of 64 bits, a number's above its place: sorted without a comparison in script. That of null is the largest.
  function byNumber(values) {
    const keys = new BigUint64Array(values.length), halves = new Uint32Array(keys.buffer);
    const number = new Float32Array(1), bits = new Uint32Array(number.buffer);
    for (let i = 0; i < values.length; i++) {
      number[0] = values[i];
      halves[2 * i] = i;
      halves[2 * i + 1] = values[i] === null ? 0xffffffff : bits[0] & 0x80000000 ? ~bits[0] : bits[0] | 0x80000000;
    }
    keys.sort();
    return halves.filter((_, at) => at % 2 === 0);
  }

  return (column, descending) => {
    const { values } = column;
    column.ascending ??= [...(values.some(value => typeof value === "string") ? byText : byNumber)(values)];
    if (!descending) return column.ascending;
    const first = values.length - values.reduce((n, value) => n + (value === null), 0);
    return [...column.ascending.slice(0, first).reverse(), ...column.ascending.slice(first)];
  };
})();
