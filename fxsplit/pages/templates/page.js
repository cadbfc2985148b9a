"use strict";
{
  const network = document.getElementById("network");
  const blocks = [...network.querySelectorAll("details")];
  const modules = blocks.filter((block) => !block.matches(".op"));
  const texts = new Map(blocks.map((block) => [block, block.dataset.find.toLowerCase()]));
  const input = document.getElementById("search");
  const found = document.getElementById("found");
  const keys = document.getElementById("keys");
  const help = document.getElementById("key-help");
  const around = (block) => block.parentElement.closest("details");
  const collapse = () => { for (const block of modules) block.open = false; };
  // Of a row of equal blocks the first is enough.
  const expand = () => { for (const block of modules) block.open = !block.matches(".row > .blocks > :not(:first-child)"); };

  // What was open before a search, to be so again after it.
  let before = null;

  function search() {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    network.classList.toggle("searching", words.length > 0);
    if (!words.length) {
      for (const block of blocks) {
        block.hidden = false;
        block.classList.remove("hit");
        if (before) block.open = before.has(block);
      }
      before = null;
      found.value = "";
      return;
    }
    before ??= new Set(blocks.filter((block) => block.open));
    const hits = new Set(blocks.filter((block) => words.every((word) => texts.get(block).includes(word))));
    const holding = new Set();
    for (const hit of hits) {
      for (let block = around(hit); block && !holding.has(block); block = around(block)) holding.add(block);
    }
    for (const block of blocks) {
      const outer = around(block);
      const isInHit = outer !== null && (hits.has(outer) || outer.dataset.shown === "whole") && !outer.hidden;
      block.dataset.shown = hits.has(block) || isInHit ? "whole" : "";
      block.hidden = !(holding.has(block) || block.dataset.shown);
      block.classList.toggle("hit", hits.has(block));
      block.open = holding.has(block) && !hits.has(block);
    }
    found.value = `${hits.size} found`;
  }

  function move(step) {
    const visible = [...network.querySelectorAll("summary")].filter((summary) => summary.checkVisibility());
    const at = visible.indexOf(document.activeElement);
    const next = at < 0 ? (step > 0 ? 0 : visible.length - 1) : at + step;
    visible[next]?.focus();
  }

  function openOrClose(summary, open) {
    const block = summary.parentElement;
    if (block.open !== open) block.open = open;
    else if (open) move(1);
    else around(block)?.querySelector("summary").focus();
  }

  function toggleHelp() {
    help.hidden = !help.hidden;
    keys.setAttribute("aria-expanded", String(!help.hidden));
  }

  const actions = {
    "/": () => input.focus(),
    "?": toggleHelp,
    e: expand,
    c: collapse,
    ArrowDown: () => move(1),
    ArrowUp: () => move(-1),
    Escape: () => { input.value = ""; search(); },
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const focused = document.activeElement;
    const isSummary = focused.matches("#network summary");
    if (focused === input && !["ArrowDown", "Escape"].includes(event.key)) return;
    if (event.key.startsWith("Arrow") && !isSummary && focused !== input) return;
    const action = isSummary && event.key === "ArrowRight" ? () => openOrClose(focused, true)
      : isSummary && event.key === "ArrowLeft" ? () => openOrClose(focused, false)
      : actions[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
  input.addEventListener("input", search);
  document.getElementById("expand").addEventListener("click", expand);
  document.getElementById("collapse").addEventListener("click", collapse);
  keys.addEventListener("click", toggleHelp);
  network.querySelector(".tools").hidden = false;
}
