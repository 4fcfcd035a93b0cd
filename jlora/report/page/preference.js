// A blind test of pairs: the answers, where they are kept, and what they come to.
"use strict";

const element = (id) => document.getElementById(id);

// The two-sided exact binomial test of equal chances: twice the smaller tail, at most 1. In logarithms, for any number of pairs.
function signTest(wins, losses) {
  const n = wins + losses;
  const logs = [0];
  for (let k = 1; k <= n; k += 1) logs.push(logs[k - 1] + Math.log(k));
  let tail = 0;
  for (let k = 0; k <= Math.min(wins, losses); k += 1) tail += Math.exp(logs[n] - logs[k] - logs[n - k] - n * Math.LN2);
  return Math.min(1, 2 * tail);
}

function start({ id, seed, aim, adapters, same, pairs }) {
  const key = `jlora-preference-${id}`;
  let choices = [];
  try {
    const kept = JSON.parse(localStorage.getItem(key) ?? "[]");
    if (Array.isArray(kept)) choices = kept.filter((choice) => ["left", "right", "tie"].includes(choice)).slice(0, pairs.length);
  } catch {
    element("kept").textContent = " \u00b7 this browser keeps nothing of this page: finish before you close it";
  }

  const winner = (index) => {
    const { adapter_is: side, adapter } = pairs[index];
    if (choices[index] === "tie") return "tie";
    return choices[index] === side ? adapter : "base";
  };

  const tally = (adapter) => {
    const found = pairs.map((pair, index) => (pair.adapter === adapter ? winner(index) : null));
    const count = (name) => found.filter((who) => who === name).length;
    const [wins, losses, ties] = [count(adapter), count("base"), count("tie")];
    const decided = wins + losses;
    return { adapter, wins, losses, ties, same: same[adapter], share: decided ? wins / decided : null, p: signTest(wins, losses) };
  };

  const rows = () =>
    pairs.map((pair, index) => ({
      prompt_number: pair.number, prompt: pair.prompt, adapter: pair.adapter, a: pair.left, b: pair.right,
      a_was: pair.adapter_is === "left" ? pair.adapter : "base", better: winner(index),
    }));

  const keep = () => {
    try {
      localStorage.setItem(key, JSON.stringify(choices));
    } catch {
      // Said at the start.
    }
  };

  const show = (moved) => {
    const done = choices.length === pairs.length;
    element("judging").hidden = done;
    element("results").hidden = !done;
    if (done) {
      showResults();
    } else {
      const pair = pairs[choices.length];
      element("progress").textContent = `Pair ${choices.length + 1} of ${pairs.length}`;
      element("bar").value = choices.length;
      element("prompt").textContent = pair.prompt || "(empty prompt)";
      element("left").textContent = pair.left.trim() || "(nothing)";
      element("right").textContent = pair.right.trim() || "(nothing)";
      element("undo").disabled = choices.length === 0;
    }
    if (moved) element(done ? "results-title" : "prompt").focus({ preventScroll: false });
  };

  const line = (name, text, more) => {
    const group = document.createElement("div");
    const [term, value, small] = ["dt", "dd", "small"].map((tag) => document.createElement(tag));
    term.textContent = name;
    value.textContent = text;
    small.textContent = more ?? "";
    small.className = "muted";
    if (more) value.append(small);
    group.append(term, value);
    return group;
  };

  const showResults = () => {
    const percent = (share) => `${(100 * share).toFixed(1)} %`;
    const parts = adapters.map(tally).map((found) => {
      const list = document.createElement("dl");
      list.className = "readings";
      list.append(
        line(`${found.adapter} better`, found.wins),
        line("base better", found.losses),
        line("neither", found.ties, found.same ? `and ${found.same} pairs of equal answers, which were not shown` : ""),
        line("share of the adapter", found.share === null ? "\u2013" : percent(found.share), `${found.share !== null && found.share >= aim ? "reaches" : "does not reach"} the aim of ${percent(aim)}; pairs with a winner`),
        line("sign test, two-sided", `p = ${found.p < 1e-4 ? found.p.toExponential(2) : found.p.toFixed(4)}`, "chance of a result at least as far from even, if neither were better"),
      );
      return list;
    });
    element("tallies").replaceChildren(...parts);
    element("answers").replaceChildren(
      ...rows().map((row) => {
        const made = document.createElement("tr");
        for (const value of [row.prompt_number, row.prompt, row.adapter, row.a_was, row.better]) {
          const cell = document.createElement("td");
          cell.textContent = value;
          made.append(cell);
        }
        made.firstChild.className = "number";
        return made;
      }),
    );
  };

  const choose = (choice) => {
    if (choices.length === pairs.length) return;
    choices.push(choice);
    keep();
    element("said").textContent = { left: "A is better", right: "B is better", tie: "neither" }[choice];
    show(true);
  };

  const undo = () => {
    if (choices.pop() === undefined) return;
    keep();
    element("said").textContent = "taken back";
    show(true);
  };

  const save = (name, type, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  };

  const cell = (value) => `"${String(value).replaceAll('"', '""')}"`;

  for (const button of document.querySelectorAll("[data-choice]")) button.addEventListener("click", () => choose(button.dataset.choice));
  element("undo").addEventListener("click", undo);
  element("back").addEventListener("click", undo);
  element("again").addEventListener("click", () => {
    choices = [];
    keep();
    show(true);
  });
  element("json").addEventListener("click", () => {
    const whole = { seed, aim, results: adapters.map(tally), answers: rows() };
    save("preference.json", "application/json", `${JSON.stringify(whole, null, 2)}\n`);
  });
  element("csv").addEventListener("click", () => {
    const found = rows();
    const lines = [Object.keys(found[0]), ...found.map(Object.values)].map((row) => row.map(cell).join(","));
    save("preference.csv", "text/csv", `${lines.join("\r\n")}\r\n`);
  });
  const keys = { a: "left", arrowleft: "left", b: "right", arrowright: "right", t: "tie", arrowdown: "tie" };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    const pressed = event.key.toLowerCase();
    if (pressed === "u") undo();
    else if (keys[pressed] && !element("judging").hidden) {
      event.preventDefault();
      choose(keys[pressed]);
    }
  });
  show(false);
}

if (element("data")) start(JSON.parse(element("data").textContent));
