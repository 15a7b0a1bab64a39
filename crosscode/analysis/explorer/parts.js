// What a latent's page is made of. Everything from the run enters as text.
window.crosscodeParts = (() => {
  const make = (tag, properties, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const digits = value => typeof value !== "number" ? value ?? "–" :
    Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(3)));
  const card = (title, ...children) => make("section", { className: "block" }, make("h3", { textContent: title }), ...children);
  const grid = (rows, titles) => make("table", {},
    ...titles ? [make("thead", {}, make("tr", {}, ...titles.map(textContent => make("th", { textContent }))))] : [],
    make("tbody", {}, ...rows.map(cells => make("tr", {}, ...cells.map(cell => make("td", {}, cell))))));

  // Tokens [from, to) with their text; those that only together make a character are one piece.
  function* pieces(texts, numbers) {
    let bytes = [], from = 0;
    for (const [i, number] of numbers.entries()) {
      const piece = texts[number];
      if (typeof piece === "string") {
        if (bytes.length) yield [from, i, new TextDecoder().decode(new Uint8Array(bytes))];
        bytes = [];
        yield [i, i + 1, piece];
        continue;
      }
      if (!bytes.length) from = i;
      bytes.push(...piece);
      try {
        yield [from, i + 1, new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(bytes))];
        bytes = [];
      } catch { /* a character that goes on in the next token */ }
    }
    if (bytes.length) yield [from, numbers.length, new TextDecoder().decode(new Uint8Array(bytes))];
  }

  // ---- what a token says where the pointer or the focus is on it

  const hint = make("div", { className: "hint", role: "tooltip", id: "hint", hidden: true });
  const said = new WeakMap();
  let target;
  function place() {
    const token = target.getBoundingClientRect(), below = token.bottom + 6;
    hint.style.left = `${Math.max(8, Math.min(token.left, document.documentElement.clientWidth - hint.offsetWidth - 8))}px`;
    hint.style.top = `${below + hint.offsetHeight > innerHeight ? token.top - hint.offsetHeight - 6 : below}px`;
  }
  function showHint(event) {
    target = event.target;
    hint.hidden = !said.has(target);
    if (hint.hidden) return;
    hint.textContent = said.get(target);
    document.body.append(hint);
    place();
  }
  for (const kind of ["pointerover", "focusin", "click"]) document.addEventListener(kind, showHint);
  document.addEventListener("focusout", () => { hint.hidden = true; });
  document.addEventListener("keydown", event => { if (event.key === "Escape") hint.hidden = true; });
  document.addEventListener("scroll", () => { if (!hint.hidden) place(); }, true);

  function about({ readers, norms }, [value, ...read]) {
    const list = found => found.map(([name, number]) => `${name ? `${name} ` : ""}${digits(number)}`).join(", ");
    return [`activation ${digits(value)}`,
      ...read.length ? [`reads: ${list(readers.map((name, i) => [name, read[i]]))}`] : [],
      ...norms.length ? [`writes a vector of norm: ${list(norms.map(([name, norm]) => [name, value * norm]))}`] : []].join("\n");
  }

  // ---- one example, in the tokens of each tokenizer

  function exampleItem(shown, [sequence, position, ...active]) {
    const { texts, readers, largest } = shown, stride = 2 + readers.length, found = new Map();
    for (let i = 0; i < active.length; i += stride) found.set(position + active[i], active.slice(i + 1, i + stride));
    const more = make("button", { className: "more", textContent: "more", title: "show more of the text around" });
    const lines = [{ own: texts, peak: position, found }, ...texts.others.map(own => ({
      own, peak: own.places[sequence][position],
      found: new Map([...found].map(([at, values]) => [own.places[sequence][at], values])),
    }))].map((line, i) => ({ ...line, code: make("code"), name: texts.names[i] }));
    let radius = [20, 11];
    const draw = () => {
      more.hidden = true;
      for (const { own, peak, found, code } of lines) {
        const tokens = own.texts[sequence], first = Math.max(0, peak - radius[0]), part = tokens.slice(first, peak + radius[1] + 1);
        more.hidden &&= first === 0 && peak + radius[1] >= tokens.length - 1;
        code.replaceChildren(...[...pieces(own.pieces, part)].map(([from, to, text]) => {
          const values = Array.from({ length: to - from }, (_, i) => found.get(first + from + i) ?? [0]);
          const most = values.reduce((one, other) => other[0] > one[0] ? other : one);
          const span = make("span", { textContent: text });
          if (most[0] > 0) {
            span.className = "hit";
            span.style.setProperty("--s", Math.min(1, most[0] / largest));
            said.set(span, about(shown, most));
          }
          if (first + from <= peak && peak < first + to) {
            span.classList.add("peak");
            Object.assign(span, { tabIndex: 0, ariaDescription: said.get(span) ?? "" });
          }
          return span;
        }));
      }
    };
    more.addEventListener("click", () => { radius = radius.map(r => r * 3); draw(); });
    draw();
    const rows = lines.length === 1 ? lines[0].code : make("div", { className: "lines" }, ...lines.flatMap(({ name, code }) =>
      [make("span", { className: "muted", textContent: name }), code]));
    return make("li", {}, make("span", { className: "value", textContent: digits(found.get(position)?.[0]) }), rows, more);
  }

  function histogram(counts, upper) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 320 100");
    svg.setAttribute("class", "histogram");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `histogram of activations up to ${digits(upper)}`);
    const most = Math.log1p(Math.max(...counts)), width = 320 / counts.length;
    counts.forEach((count, i) => {
      const bar = document.createElementNS(svg.namespaceURI, "rect"), height = 100 * Math.log1p(count) / most;
      const sizes = { x: i * width, y: 100 - height, width: Math.max(width - 1, 0.5), height };
      for (const [key, value] of Object.entries(sizes)) bar.setAttribute(key, value);
      const title = document.createElementNS(svg.namespaceURI, "title");
      title.textContent = `${digits(upper * i / counts.length)} to ${digits(upper * (i + 1) / counts.length)}: ${count}`;
      bar.append(title);
      svg.append(bar);
    });
    return svg;
  }

  return { make, digits, card, grid, exampleItem, histogram };
})();
