"use strict";
const KEYS = {VQ: "qwei", MQ: "asdi", TA: "zxci"};
const SIDES = ["left", "same", "right", "invalid"]; // what the four keys stand for
const clips = [...document.querySelectorAll("video")]; // A and B
let state = {}, since, paused = false;
let queue = Promise.resolve(); // requests go out one after the other

/** Sends a request, and shows the state that it leads to. */
function send(name, settings) {
  const request = queue.then(() => ask(name, settings)).then(show);
  queue = request.catch((error) => alarm(`${error.message}; reload the page`));
}

/** The labels that SIDES stand for, as the clips lie on the screen. */
function labels() {
  return state.left === "A" ? ["A", "same", "B", "invalid"] : ["B", "same", "A", "invalid"];
}

function answer(dimension, side) {
  const shown = {label: labels()[side], seen: SIDES[side], seconds: (Date.now() - since) / 1000};
  send("answer", {question: state.id, dimension, ...shown});
}

async function show(next) {
  const isNew = next.id !== state.id;
  state = isNew ? next : {...next, left: state.left}; // Tab may have swapped the clips
  alarm("");
  $("done").max = state.count;
  $("done").value = state.count - state.open;
  $("left").textContent = state.progress;
  $("work").hidden = !state.id;
  $("report").hidden = Boolean(state.id);
  if (!state.id) {
    $("report").textContent = "All pairs are labelled. The report is being computed.";
    $("report").textContent = (await ask("report")).lines.join("\n");
    return;
  }
  $("prompt").textContent = state.prompt;
  if (isNew) {
    since = Date.now();
    clips.forEach(load);
  }
  paint();
}

function paint() {
  $("stage").style.flexDirection = state.left === "A" ? "row" : "row-reverse";
  const open = Object.keys(KEYS).find((name) => !state.answers[name]);
  for (const button of document.querySelectorAll(".row button")) {
    const {dimension, side} = button.dataset;
    button.setAttribute("aria-pressed", labels()[side] === state.answers[dimension]);
    button.parentElement.classList.toggle("on", dimension === open);
  }
}

async function load(clip, i) {
  const {id} = state;
  URL.revokeObjectURL(clip.src);
  clip.removeAttribute("src");
  const file = await (await call("clip", {question: id, clip: "AB"[i]})).blob();
  if (id === state.id) clip.src = URL.createObjectURL(file);
}

/** Plays both clips once both are there, and again once both have ended. */
function play() {
  const ready = clips.every((clip) => clip.readyState > 1);
  const over = clips.every((clip) => clip.ended);
  for (const clip of clips) {
    if (paused) clip.pause();
    else if (ready && (over || !clip.ended)) clip.play();
  }
}

function showFrame(change) {
  paused = true;
  play();
  const now = Math.max(...clips.map((clip) => clip.currentTime));
  const frame = Math.floor(now * state.fps) + change;
  clips.forEach((clip) => { clip.currentTime = (frame + 0.5) / state.fps; });
}

const ACTIONS = {
  " ": () => { paused = !paused; play(); },
  ",": () => showFrame(-1),
  ".": () => showFrame(1),
  "?": () => { $("help").open = !$("help").open; },
  Tab: () => { state.left = labels()[2]; paint(); },
  Backspace: () => send("undo"),
};

addEventListener("keydown", (event) => {
  const {key} = event;
  if (event.ctrlKey || event.metaKey || event.altKey || key === "Tab" && event.shiftKey) return;
  if (!state.id && key !== "Backspace") return;
  const isMeant = (name) => KEYS[name].includes(key) && !state.answers[name];
  const dimension = Object.keys(KEYS).find(isMeant); // i: the first row without an answer
  if (dimension) answer(dimension, KEYS[dimension].indexOf(key));
  else if (key in ACTIONS) ACTIONS[key]();
  else return;
  event.preventDefault();
});

for (const [name, keys] of Object.entries(KEYS)) {
  const buttons = SIDES.map((side, i) => `<button onclick="answer('${name}', ${i})"
    data-dimension="${name}" data-side="${i}">${side} <kbd>${keys[i]}</kbd></button>`);
  const row = `<div class="row" role="group" aria-label="${name}"><b>${name}</b>`;
  $("rows").insertAdjacentHTML("beforeend", `${row}${buttons.join("")}</div>`);
}
for (const clip of clips) {
  clip.onerror = () => alarm("A clip cannot be played; i answers invalid.");
  clip.onloadeddata = clip.onended = play;
}
send("state");
