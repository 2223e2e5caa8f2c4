// Everything that comes from result files is put into the page as text (textContent), never as markup.
"use strict";

const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
tip.setAttribute("role", "tooltip");
document.body.append(tip);

function showTip(facts, x, y) {
  tip.replaceChildren();
  const list = document.createElement("dl");
  for (const [name, text] of Object.entries(facts)) {
    if (name === "") {
      const heading = document.createElement("strong");
      heading.textContent = text;
      tip.append(heading);
    } else {
      const term = document.createElement("dt"), value = document.createElement("dd");
      term.textContent = name;
      value.textContent = text;
      list.append(term, value);
    }
  }
  tip.append(list);
  tip.hidden = false;
  const box = tip.getBoundingClientRect(), room = document.documentElement;
  const left = x + 16 + box.width > room.clientWidth ? x - 16 - box.width : x + 16;
  const top = y + 16 + box.height > room.clientHeight ? y - 16 - box.height : y + 16;
  tip.style.left = `${Math.max(4, Math.min(left, room.clientWidth - box.width - 4)) + scrollX}px`;
  tip.style.top = `${Math.max(4, top) + scrollY}px`;
}

for (const plot of document.querySelectorAll("figure.plot")) {
  const { points } = JSON.parse(plot.querySelector("script").textContent);
  for (const title of plot.querySelectorAll(".spot title")) title.remove(); // shown by the tip below
  const spotOf = (event) => event.target.closest?.(".spot");
  let current = null;
  const choose = (spot, x, y) => {
    if (current !== spot) current?.classList.remove("on");
    current = spot;
    spot.classList.add("on");
    showTip(points[spot.dataset.i], x, y);
  };
  const leave = () => {
    current?.classList.remove("on");
    current = null;
    tip.hidden = true;
  };
  plot.addEventListener("pointermove", (event) => {
    const spot = spotOf(event);
    if (spot) choose(spot, event.clientX, event.clientY);
    else leave();
  });
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("click", (event) => {
    const spot = spotOf(event);
    if (spot) choose(spot, event.clientX, event.clientY);
  });
  plot.addEventListener("focusin", (event) => {
    const spot = spotOf(event);
    if (!spot || !spot.matches(":focus-visible")) return;
    const box = spot.getBoundingClientRect();
    choose(spot, box.left + box.width / 2, box.top + box.height / 2);
  });
  plot.addEventListener("focusout", leave);
}
addEventListener("keydown", (event) => {
  if (event.key === "Escape") tip.hidden = true;
});

const byText = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

function sortRows(table, column, descending) {
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => {
    const cell = row.cells[column];
    const raw = cell.dataset.v ?? cell.textContent.trim();
    return { row, raw, number: cell.dataset.v === undefined ? null : Number(raw) };
  });
  rows.sort((a, b) => {
    if ((a.raw === "") !== (b.raw === "")) return a.raw === "" ? 1 : -1; // unknown stays last, whichever way
    const order = a.number !== null && b.number !== null ? a.number - b.number : byText.compare(a.raw, b.raw);
    return descending ? -order : order;
  });
  body.append(...rows.map((entry) => entry.row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const heading of table.tHead.rows[0].cells) {
    heading.querySelector("button").addEventListener("click", () => {
      const ways = heading.dataset.first === "descending" ? ["descending", "ascending"] : ["ascending", "descending"];
      const way = heading.getAttribute("aria-sort") === ways[0] ? ways[1] : ways[0];
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", way);
      sortRows(table, heading.cellIndex, way === "descending");
    });
  }
}

document.querySelector("#filter")?.addEventListener("input", (event) => {
  const parts = event.target.value.split(";").map((part) => part.trim().toLowerCase()).filter(Boolean);
  for (const row of document.querySelectorAll("table.sortable tbody tr")) {
    const text = row.textContent.toLowerCase();
    row.hidden = parts.length > 0 && !parts.some((part) => text.includes(part));
  }
});

for (const button of document.querySelectorAll("button.copy")) {
  button.addEventListener("click", async () => {
    const code = button.closest(".run").querySelector("pre");
    getSelection().selectAllChildren(code);
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Selected"; // no clipboard here: the text is selected
    }
  });
}

const theme = document.querySelector("#theme");
const dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
const nameTheme = () => { if (theme) theme.textContent = isDark() ? "Light" : "Dark"; };
theme?.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  nameTheme();
});
dark.addEventListener("change", nameTheme);
nameTheme();
document.documentElement.dataset.ready = "";
