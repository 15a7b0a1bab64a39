// The explorer: routes after the hash, #/latents?... and #/latent/N. Everything from the run enters the page as text.
{
  const known = {}, loading = {}; window.crosscodeData = (name, value) => { known[name] = value; };
  const load = file => loading[file] ??= new Promise((done, failed) => {
    const script = document.createElement("script");
    Object.assign(script, { src: file, onload: done, onerror: () => failed(new Error(`${file} cannot be read`)) });
    document.head.append(script);
  });
  const data = async name => { await load(`data/${name}.js`); return known[name]; };
  const { make, digits, card, grid, exampleItem, histogram } = crosscodeParts;
  const byId = id => document.getElementById(id);
  const served = !location.protocol.startsWith("http") ? Promise.resolve(false) : fetch("notes").then(
    answer => answer.headers.get("Content-Type")?.startsWith("application/json") ?? false, () => false);

  // ---- the table: sorted and searched here, shown by Tabulator page by page

  const PAGE = 50;
  const state = { q: "", sort: "latent", dir: "asc", page: 1 };
  const FIRST = /^(latent|layer|index|tokens|firings|max_activation|tag|rank_.*|effect|relative_norm.*|nu_activations|why)$/;
  let columns, search, table, order = [], orderKey, quiet = false;

  async function readTable() {
    if (columns) return;
    const found = await data("table");
    const n = found.search.length;
    const numbers = { name: "latent", values: Int32Array.from({ length: n }, (_, i) => i) };
    columns = [numbers, { name: "tokens", values: found.search }, ...found.columns];
    search = found.search.map(text => text.toLowerCase());
  }

  const column = name => columns.find(one => one.name === name);

  function matcher(term) {
    const found = /^(.+?)(<=|>=|=|<|>)(.+)$/.exec(term);
    const one = found && columns.find(each => each.name.toLowerCase() === found[1].replaceAll("_", " ") ||
      each.name.toLowerCase() === found[1]);
    if (one) {
      const [, , sign, text] = found, number = Number(text);
      const tests = { "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b };
      if (sign === "=") return i => String(one.values[i]).toLowerCase().replaceAll(" ", "_") === text.replaceAll(" ", "_");
      return i => one.values[i] !== null && tests[sign](one.values[i], number);
    }
    return i => search[i].includes(term) || String(i) === term;
  }

  function reorder() {
    const key = JSON.stringify([state.q, state.sort, state.dir]);
    if (key === orderKey) return;
    orderKey = key;
    const terms = state.q.toLowerCase().split(/\s+/).filter(Boolean).map(matcher);
    const all = crosscodeOrder(column(state.sort) ?? columns[0], state.dir === "desc");
    order = terms.length ? all.filter(i => terms.every(test => test(i))) : all;
  }

  const tableHash = () => "#/latents?" + new URLSearchParams(
    Object.entries(state).filter(([, value]) => value !== "" && value !== 1));

  function rows(parameters) {
    const sorter = parameters.sort?.[0];
    if (sorter && !quiet) [state.sort, state.dir] = [columns[Number(sorter.field.slice(1))].name, sorter.dir];
    state.page = parameters.page;
    reorder();
    const last = Math.max(1, Math.ceil(order.length / PAGE));
    byId("found").textContent = `${order.length.toLocaleString("en")} of ${search.length.toLocaleString("en")} latents`;
    byId("sort").value = state.sort;
    byId("dir").value = state.dir;
    history.replaceState(null, "", tableHash());
    const some = order.slice((parameters.page - 1) * PAGE, parameters.page * PAGE);
    return { last_page: last, data: some.map(i => Object.fromEntries(columns.map((one, c) => [`c${c}`, one.values[i]]))) };
  }

  const MAIN = /^(decoder_|density|mean_)/;
  const latentLink = i => make("a", { href: `#/latent/${i}`, textContent: i });

  async function showTable(query) {
    const start = new URLSearchParams(query);
    Object.assign(state, { q: start.get("q") ?? "", sort: start.get("sort") ?? "latent", dir: start.get("dir") ?? "asc" });
    const page = Number(start.get("page") ?? 1);
    await Promise.all([readTable(), load("tabulator.min.js")]);
    if (!column(state.sort)) state.sort = "latent";
    byId("search").value = state.q;
    if (!byId("sort").options.length) byId("sort").append(...columns.map(one => new Option(one.name.replaceAll("_", " "), one.name)));
    if (!table) {
      table = new Tabulator("#table", {
        ajaxURL: "rows", ajaxRequestFunc: async (url, config, parameters) => rows(parameters),
        pagination: true, paginationMode: "remote", paginationSize: PAGE, paginationInitialPage: page,
        sortMode: "remote", height: "68vh", index: "c0", nestedFieldSeparator: false, headerSortTristate: false,
        initialSort: [{ column: `c${columns.indexOf(column(state.sort))}`, dir: state.dir }],
        placeholder: "No latent is like that.", layout: "fitData",
        columns: shownColumns(),
      });
      byId("all").addEventListener("change", () => { table.setColumns(shownColumns()); resort(); });
      table.on("rowClick", (event, row) => { location.hash = `#/latent/${row.getData().c0}`; });
    } else await resort(page);
  }

  // Those that one looks at first and the one that sorts, or all.
  const shownColumns = () => columns.map((one, c) => ({
    field: `c${c}`, title: String(c), frozen: c === 0, hozAlign: typeof one.values[0] === "string" ? "left" : "right",
    titleFormatter: () => make("span", { textContent: one.name.replaceAll("_", " ") }),
    formatter: cell => c === 0 ? latentLink(cell.getValue()) : document.createTextNode(digits(cell.getValue())),
    ...(one.name === "tokens" || one.name.startsWith("why") ? { width: 220 } : {}),
  })).filter((_, c) => byId("all").checked || columns[c].name === state.sort || FIRST.test(columns[c].name));

  async function resort(page = 1) {
    quiet = true;
    const field = `c${columns.indexOf(column(state.sort))}`;
    if (!table.getColumn(field)) {
      table.clearData(); // or the rows that go would be drawn anew
      table.setColumns(shownColumns());
    }
    table.setSort(field, state.dir);
    quiet = false;
    if (table.getPage() !== page) await table.setPage(page);
  }

  byId("search").addEventListener("input", () => { state.q = byId("search").value; table?.setPage(1); });
  byId("sort").addEventListener("change", () => { state.sort = byId("sort").value; resort(); });
  byId("dir").addEventListener("change", () => { state.dir = byId("dir").value; resort(); });

  // ---- one latent

  async function showLatent(latent) {
    const view = byId("latent"), wanted = location.hash;
    await readTable();
    if (!(Number.isInteger(latent) && latent >= 0 && latent < search.length)) {
      view.replaceChildren(make("p", { textContent: `There is no latent ${latent}; they go from 0 to ${search.length - 1}.` }));
      return;
    }
    const { perFile, readers } = known.table;
    const [some, texts] = await Promise.all([data(`records-${Math.floor(latent / perFile)}`), data("texts")]);
    const record = some[latent % perFile];
    const norms = columns.filter(one => one.name.startsWith("decoder_norm"))
      .map(one => [one.name.slice("decoder_norm_".length), one.values[latent]]);
    const shown = { texts, readers, norms, largest: Math.max(1e-30, column("max_activation").values[latent]) };
    const of = (name, one = latent) => column(name).values[one];
    reorder();
    const at = order.indexOf(latent), step = by => order[at + by] ?? (at < 0 ? latent + by : undefined);
    const link = (text, target) => target === undefined || target < 0 || target >= search.length ? "" :
      make("a", { href: `#/latent/${target}`, textContent: text, className: "step" });
    const titles = ["Where it is largest", "Strongest quarter of its firings", "Second quarter", "Third quarter", "Weakest quarter"];
    const [main, others] = [true, false].map(wanted => columns.slice(2).filter(one => !one.name.startsWith("why") &&
      (FIRST.test(one.name) || MAIN.test(one.name)) === wanted));
    const figures = some => make("dl", { className: "figures-of" }, ...some.map(one => make("div", {},
      make("dt", { textContent: one.name.replaceAll("_", " ") }), make("dd", { textContent: digits(one.values[latent]) }))));
    const examples = record.examples.flatMap((some, i) => some.length ? [make("section", { className: "card" },
      make("h3", { textContent: titles[i] }), make("ol", { className: "snippets" }, ...some.map(one => exampleItem(shown, one))))] : []);
    const near = ([other, value]) => [latentLink(other), make("span", { className: "tokens", textContent: of("tokens", other), title: of("tokens", other) }), digits(value)];
    const logit = ([text, value]) => [make("code", { textContent: text }), digits(value)];
    const note = await noteOn(latent);
    if (location.hash !== wanted) return; // to another one, which was faster
    view.replaceChildren(
      make("p", { className: "steps" }, link("← previous", step(-1)), link("next →", step(1))),
      make("h2", { textContent: column("layer") ? `Latent ${latent} (${of("layer")}, ${of("index")})` : `Latent ${latent}` }),
      ...columns.filter(one => one.name.startsWith("why")).map(one => make("p", { className: "why" },
        make("b", { textContent: `${of(one.name.replace("why", "tag"))}:` }), ` ${one.values[latent]}`)),
      figures(main), ...others.length ? [make("details", {}, make("summary", { textContent: "All figures" }), figures(others))] : [],
      ...note,
      ...examples.slice(0, 1),
      make("div", { className: "blocks" },
        card("Activations where it fires", ...(record.histogram.length ? [histogram(record.histogram, record.upper),
          make("p", { className: "muted", textContent: `from 0 to ${digits(record.upper)}; heights are logarithmic` })] :
          [make("p", { className: "muted", textContent: "It never fired." })])),
        card("Nearest by decoder cosine", grid(record.byDecoder.map(near))),
        card("Nearest by firing together", grid(record.byFiring.map(near))),
        ...Object.entries(record.logits).map(([name, [top, bottom]]) => card(name ? `Logits, ${name}` : "Logits",
          grid(top.map((one, i) => [...logit(one), ...logit(bottom[i])]), ["largest", "", "smallest", ""])))),
      ...examples.slice(1));
    view.dataset.latent = latent;
  }

  // ---- notes: in the run where a server beside the page takes them, else in this browser; other tabs may write, too

  const noteKey = `crosscode notes ${location.pathname}`;
  const call = async (path, options) => {
    const answer = await fetch(path, options), found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    return found;
  };
  const post = (path, value) => call(path,
    { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(value) });
  const notes = async () => await served ? call("notes") : JSON.parse(localStorage.getItem(noteKey) ?? "{}");

  async function noteOn(latent) {
    const note = make("textarea", { id: "note", rows: 2, placeholder: "Your note on this latent", ariaLabel: "note" });
    const saved = make("p", { className: "muted", id: "saved", role: "status" });
    let was = "";
    const read = async () => { was = (await notes())[latent] ?? ""; };
    await read().catch(error => { saved.textContent = `notes cannot be read: ${error.message}`; });
    note.value = was;
    note.addEventListener("change", async () => {
      const text = note.value;
      try {
        if (await served) await post("notes", { latent, text, was });
        else localStorage.setItem(noteKey, JSON.stringify({ ...await notes(), [latent]: text }));
        was = text;
        saved.textContent = await served ? "saved in the run" : "saved in this browser";
      } catch (error) {
        saved.textContent = `not saved: ${error.message}`;
        await read().catch(() => {});
      }
    });
    return [note, saved];
  }

  // ---- a typed prompt

  byId("prompt-form").addEventListener("submit", async event => {
    event.preventDefault();
    const out = Object.assign(byId("encoded"), { textContent: "…" });
    try {
      const found = await post("encode", { text: byId("prompt-text").value, chat: byId("prompt-chat").checked });
      out.replaceChildren(make("table", {}, make("tbody", {}, ...found.tokens.map((token, i) => make("tr", {},
        make("td", {}, make("code", { textContent: token })),
        make("td", {}, ...found.strongest[i].flatMap(([latent, value]) => [latentLink(latent), ` ${digits(value)}  `])))))));
    } catch (error) { out.textContent = error.message; }
  });

  // ---- routes and keys

  async function route() {
    const [, shown = "overview", rest] = /^#\/(latents|latent|prompt)?[/?]?(.*)$/.exec(location.hash) ?? [];
    for (const name of ["overview", "latents", "latent", "prompt"]) byId(name).hidden = name !== shown;
    document.querySelector("nav a[data-place=latents]").href = tableHash();
    for (const link of document.querySelectorAll("nav a")) link.ariaCurrent = link.dataset.place === shown ? "page" : null;
    try {
      if (shown === "latents") await showTable(rest);
      if (shown === "latent") { await showLatent(Number(rest)); window.scrollTo(0, 0); }
      byId("trouble").textContent = "";
    } catch (error) { byId("trouble").textContent = error.message; }
    if (shown === "overview" && location.hash.startsWith("#latent-")) byId(location.hash.slice(1))?.scrollIntoView();
  }
  document.addEventListener("keydown", event => {
    if (event.target.matches("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    const steps = [...document.querySelectorAll("#latent:not([hidden]) .step")];
    if (event.key === "/") { event.preventDefault(); if (byId("latents").hidden) location.hash = "#/latents"; setTimeout(() => byId("search").focus(), 0); }
    if (event.key === "ArrowLeft") steps.find(link => link.textContent.startsWith("←"))?.click();
    if (event.key === "ArrowRight") steps.find(link => link.textContent.startsWith("next"))?.click();
  });
  served.then(found => { byId("prompt-link").hidden = !found; });
  addEventListener("hashchange", route);
  route();
}
