"use strict";
// Draws the figures kept as JSON in the page. A string "--name" in them is a colour of the style sheet; it is looked up
// at each drawing, so the plots follow the page between light and dark. plotly lies gzipped in the page and is run when
// it is unpacked; the page's policy allows it by its digest.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const touch = window.matchMedia("(pointer: coarse)").matches;
  const config = { responsive: true, displaylogo: false, displayModeBar: false, doubleClick: "reset" };

  function resolved(value, style) {
    if (typeof value === "string") return value.startsWith("--") ? style.getPropertyValue(value).trim() : value;
    if (Array.isArray(value)) {
      return typeof value[0] === "number" ? value : value.map((item) => resolved(item, style));
    }
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolved(item, style)]));
  }

  function draw(id) {
    const div = document.getElementById(id);
    if (!div) return Promise.resolve();
    const style = getComputedStyle(document.documentElement);
    const { data, layout } = resolved(figures[id], style);
    if (touch) layout.dragmode = false; // a finger on a plot scrolls the page
    return Plotly.react(div, data, layout, config);
  }

  function drawAll() {
    return Promise.all(Object.keys(figures).map(draw));
  }

  for (const button of document.querySelectorAll("button[data-logx]")) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      const id = "plot-" + button.dataset.logx;
      figures[id].layout.xaxis.type = on ? "log" : "linear";
      figures[id].layout.uirevision = on ? "log" : "keep";
      draw(id);
    });
  }

  for (const button of document.querySelectorAll("button[data-trace]")) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      const id = "plot-" + button.dataset.figure;
      figures[id].data[Number(button.dataset.trace)].visible = on;
      draw(id);
    });
  }

  async function unpackLibrary() {
    const packed = atob(document.getElementById("library").textContent);
    const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
    const source = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(source).text();
    document.head.append(script);
    script.remove(); // it has run
  }

  for (const box of document.querySelectorAll(".rows")) {
    const body = box.querySelector("tbody");
    const rows = [...body.rows].map((row) => ({ row, text: row.textContent.toLowerCase() }));
    const shown = box.querySelector("output");
    box.querySelector("input").addEventListener("input", (event) => {
      const words = event.target.value.toLowerCase().split(/\s+/);
      let count = 0;
      for (const { row, text } of rows) {
        row.hidden = !words.every((word) => text.includes(word));
        count += row.hidden ? 0 : 1;
      }
      shown.textContent = words.join("") ? `${count} of ${rows.length}` : "";
    });
    const heads = [...box.querySelectorAll("thead th")];
    heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const keyed = rows.map(({ row }) => {
        const cell = row.cells[column];
        return { row, text: cell.textContent, value: cell.dataset.v === undefined ? NaN : Number(cell.dataset.v) };
      });
      keyed.sort((a, b) => {
        if (!a.text || !b.text) return (a.text ? 0 : 1) - (b.text ? 0 : 1); // empty cells last, either way
        return sign * (isNaN(a.value) ? a.text.localeCompare(b.text, undefined, { numeric: true }) : a.value - b.value);
      });
      body.append(...keyed.map(({ row }) => row));
    }));
  }

  async function start() {
    if (typeof DecompressionStream === "undefined") {
      for (const plot of document.querySelectorAll(".plot")) {
        plot.textContent = "This browser is too old to draw the plot; the table holds the same figures.";
      }
      return;
    }
    await unpackLibrary();
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
    window.addEventListener("beforeprint", drawAll);
    await drawAll();
    document.documentElement.setAttribute("data-drawn", "true");
  }

  start();
})();
