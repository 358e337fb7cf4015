"use strict";
const KEYS = {VQ: "qwei", MQ: "asdi", TA: "zxci"}; // of left, same, right and invalid
const SIDES = ["left", "same", "right", "invalid"];
const clips = [...document.querySelectorAll("video")]; // A and B
let state = {}, since, swapped = false, paused = false;
let queue = Promise.resolve(); // requests go out one after the other

const openRow = () => Object.keys(KEYS).find((name) => !state.answers[name]);

/** The labels that SIDES stand for, as the clips lie on the screen. */
function labels() {
  const aIsLeft = (state.left === "A") !== swapped;
  return aIsLeft ? ["A", "same", "B", "invalid"] : ["B", "same", "A", "invalid"];
}

function inTurn(name, body) {
  const task = async () => show(await ask(name, body()));
  queue = queue.then(task).then(() => alarm(""), async (error) => {
    alarm(error.message);
    show(await ask("state", {}));
  }).catch(() => {});
}

function answer(dimension, side) {
  const {id} = state, label = labels()[side], seconds = (Date.now() - since) / 1000;
  inTurn("answer", () => {
    const row = dimension || openRow();
    return {question: id, dimension: row, label, seen: SIDES[side], seconds};
  });
}

function show(next) {
  const isNew = next.id !== state.id;
  state = next;
  $("work").hidden = !state.id;
  $("end").hidden = Boolean(state.id);
  $("progress").max = state.count;
  $("progress").value = state.count - state.open;
  const seconds = `${state.seconds.toFixed(1)} seconds a pair`;
  $("left").textContent = `${state.open} of ${state.count} left, ${seconds}`;
  if (!state.id) return end();
  if (isNew) {
    swapped = false;
    since = Date.now();
    clips.forEach(load);
  }
  $("prompt").textContent = state.prompt;
  paint();
}

async function end() {
  $("file").textContent = state.file;
  $("report").textContent = (await ask("report", {})).lines.join("\n");
}

function paint() {
  $("stage").classList.toggle("reversed", labels()[0] === "B");
  for (const button of document.querySelectorAll(".row button")) {
    const {dimension, side} = button.dataset;
    button.setAttribute("aria-pressed", labels()[side] === state.answers[dimension]);
    button.parentElement.classList.toggle("on", dimension === openRow());
  }
}

// ---- The clips, in step

async function load(clip, i) {
  const {id} = state;
  clip.removeAttribute("src");
  const file = await (await call("clip", {question: id, clip: "AB"[i]})).blob();
  if (id === state.id) clip.src = URL.createObjectURL(file);
}

/** Plays both once both are there, and again once both have ended. */
function play() {
  const ready = clips.every((clip) => clip.error || clip.readyState > 1);
  const over = clips.every((clip) => clip.error || clip.ended);
  for (const clip of clips) {
    if (paused) clip.pause();
    else if (ready && (over || !clip.ended)) clip.play().catch(() => {});
  }
}

function showFrame(change) {
  paused = true;
  play();
  const longest = (name) => Math.max(...clips.map((clip) => clip[name] || 0)) * state.fps;
  const frames = Math.round(longest("duration")) || 1;
  const now = Math.min(Math.floor(longest("currentTime")), frames - 1);
  const time = ((now + change + frames) % frames + 0.5) / state.fps;
  clips.forEach((clip) => { clip.currentTime = time; });
}

// ---- Keys and buttons

const ACTIONS = {
  " ": () => { paused = !paused; play(); },
  ",": () => showFrame(-1),
  ".": () => showFrame(1),
  "?": () => $("keys").showModal(),
  Tab: () => { swapped = !swapped; paint(); },
  Backspace: () => inTurn("undo", () => ({})),
};

document.addEventListener("keydown", (event) => {
  const {key} = event, dimension = Object.keys(KEYS).find((name) => KEYS[name].includes(key));
  const isKnown = state.id ? dimension || key in ACTIONS : key === "Backspace";
  const isOther = event.ctrlKey || event.metaKey || event.altKey || key === "Tab" && event.shiftKey;
  if (!isKnown || isOther || $("keys").open) return;
  event.preventDefault();
  if (dimension) answer(key === "i" ? "" : dimension, KEYS[dimension].indexOf(key));
  else ACTIONS[key]();
});

for (const [name, keys] of Object.entries(KEYS)) {
  const buttons = SIDES.map((side, i) =>
    `<button data-dimension="${name}" data-side="${i}">${side} <kbd>${keys[i]}</kbd></button>`);
  const row = `<div class="row" role="group" aria-label="${name}"><b>${name}</b>`;
  $("rows").insertAdjacentHTML("beforeend", `${row}${buttons.join("")}</div>`);
}
$("rows").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) answer(button.dataset.dimension, button.dataset.side);
});
$("help").addEventListener("click", ACTIONS["?"]);
for (const clip of clips) {
  clip.addEventListener("error", () => alarm("A clip cannot be played; i answers invalid."));
  clip.addEventListener("loadeddata", play);
  clip.addEventListener("ended", play);
}
inTurn("state", () => ({}));
