"use strict";
(function () {
  // which method and how many workers the page shows
  const state = { method: document.body.dataset.method, workers: document.body.dataset.workers };
  function show() {
    for (const key of ["method", "workers"]) {
      for (const el of document.querySelectorAll(`[data-if-${key}]`)) {
        el.hidden = false;
      }
    }
    for (const key of ["method", "workers"]) {
      for (const el of document.querySelectorAll(`[data-if-${key}]`)) {
        if (el.getAttribute(`data-if-${key}`) !== state[key]) el.hidden = true;
      }
      for (const b of document.querySelectorAll(`[data-set-${key}]`)) {
        b.setAttribute("aria-pressed", b.getAttribute(`data-set-${key}`) === state[key]);
      }
    }
    for (const row of document.querySelectorAll("tr[data-method]")) {
      row.classList.toggle("now", row.dataset.method === state.method);
    }
  }
  const tip = document.getElementById("tip");
  function place(event) {
    const x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    const below = event.clientY + 18 + tip.offsetHeight < innerHeight;
    tip.style.left = Math.max(8, x) + "px";
    tip.style.top = (below ? event.clientY + 16 : event.clientY - tip.offsetHeight - 10) + "px";
  }
  function hover(event) {
    const el = event.target.closest && event.target.closest("[data-tip]");
    if (!el) {
      tip.hidden = true;
      return;
    }
    const [head, ...rest] = el.dataset.tip.split("|");
    tip.replaceChildren(Object.assign(document.createElement("b"), { textContent: head }));
    for (const line of rest) {
      tip.append(Object.assign(document.createElement("div"), { textContent: line }));
    }
    tip.hidden = false;
    place(event);
  }
  document.addEventListener("pointermove", hover);
  document.addEventListener("pointerdown", hover);
  document.addEventListener("scroll", () => { tip.hidden = true; }, true);
  document.addEventListener("click", (event) => {
    const b = event.target.closest("button");
    if (!b) return;
    if (b.dataset.setMethod) state.method = b.dataset.setMethod;
    if (b.dataset.setWorkers) state.workers = b.dataset.setWorkers;
    show();
  });
  show();
})();
