"use strict";
const { classes, colours, threshold, videos } = JSON.parse(document.getElementById("data").textContent);
const STEP = 5; // seconds per press of an arrow key

const one = (selector) => document.querySelector(selector);
const player = one("#video"), timeline = one("#timeline"), list = one("#found ol"), slider = one("#slider input");

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function clock(seconds, digits) {
  const unit = 10 ** digits, all = Math.round(seconds * unit) / unit;
  const hours = Math.floor(all / 3600), minutes = Math.floor(all / 60) % 60;
  const rest = (all % 60).toFixed(digits).padStart(digits ? 3 + digits : 2, "0");
  return (hours ? `${hours}:${String(minutes).padStart(2, "0")}` : minutes) + `:${rest}`;
}

let video = null; // the video on display
let segments = []; // its segments with enough score, sorted by start
let at = 0; // position in seconds, also without a player
let wanted = null; // position to seek once the file is open

function seek(seconds, play = false) {
  at = Math.min(Math.max(seconds, 0), video.duration);
  wanted = at;
  if (player.readyState > 0) {
    player.currentTime = at;
    wanted = null;
  }
  if (play && player.src) player.play().catch(() => {}); // the player's own "error" event reports the file
  showTime();
}

function setColour(element, segment) {
  const turn = Math.floor(segment.label / colours.length); // repeated colours are striped, each round at its own angle
  element.style.setProperty("--colour", colours[segment.label % colours.length]);
  element.style.setProperty("--stripes", turn ? `repeating-linear-gradient(${turn * 35}deg, transparent 0 3px, var(--panel) 3px 5px)` : "none");
  element.style.setProperty("--score", segment.score);
}

function laneOf(label, members, line) {
  const track = make("div", { className: "track" }), name = make("span", { className: "lane", title: classes[label] }, classes[label]);
  track.style.gridRow = name.style.gridRow = line;
  track.addEventListener("click", (event) => {
    if (event.target !== track) return;
    const box = track.getBoundingClientRect();
    seek(((event.clientX - box.left) / box.width) * video.duration);
  });
  for (const segment of members) {
    const { start, end, score } = segment;
    const bar = make("button", { type: "button", tabIndex: -1, title: `${classes[label]} ${score.toFixed(2)}, ${clock(start, 1)} to ${clock(end, 1)}` });
    bar.style.left = `${(100 * start) / video.duration}%`;
    bar.style.width = `${(100 * (end - start)) / video.duration}%`;
    setColour(bar, segment);
    bar.addEventListener("click", () => seek(start, true));
    segment.bar = bar;
    track.append(bar);
  }
  return [name, track];
}

function axis() {
  const steps = [0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200];
  const most = timeline.clientWidth < 600 ? 4 : 9;
  const step = steps.find((size) => video.duration / size <= most) ?? 14400;
  const marks = make("div", { className: "axis" });
  for (let time = 0; time <= video.duration; time += step) {
    const mark = make("span", {}, clock(time, step < 1 ? 1 : 0));
    mark.style.left = `${(100 * time) / video.duration}%`;
    if (time && time > 0.97 * video.duration) mark.className = "last";
    marks.append(mark);
  }
  return marks;
}

function row(segment) {
  const { start, end, score, label } = segment;
  const button = make("button", { type: "button" },
    make("b", {}, classes[label]), make("span", { className: "score" }, score.toFixed(2)),
    make("small", {}, `${clock(start, 1)} – ${clock(end, 1)}`), make("i"));
  setColour(button, segment);
  button.addEventListener("click", () => seek(start, true));
  segment.row = button;
  return make("li", {}, button);
}

function showSegments() {
  const least = Number(slider.value);
  one("#slider output").textContent = least.toFixed(2);
  segments = video.found
    .filter(([, , score]) => score >= least)
    .map(([start, end, score, label]) => ({ start, end, score, label }))
    .sort((a, b) => a.start - b.start || a.end - b.end);
  one("#count").textContent = `${segments.length} of ${video.found.length} segments`;
  const lanes = [...new Set(video.found.map((found) => found[3]))].sort((a, b) => a - b);
  const head = make("div", { className: "head" }, make("i"));
  head.style.setProperty("--rows", lanes.length + 1);
  timeline.replaceChildren(...lanes.flatMap((label, line) => laneOf(label, segments.filter((s) => s.label === label), line + 1)), axis(), ...(lanes.length ? [head] : []));
  list.replaceChildren(...segments.map(row));
  showTime();
}

function showTime() {
  const head = one(".head i");
  if (head) head.style.left = `${(100 * at) / video.duration}%`;
  // players round to microseconds: after a seek to a start, the position must not lie before it
  const on = segments.filter(({ start, end }) => start <= at + 0.001 && at < end);
  for (const segment of segments) {
    const active = on.includes(segment);
    segment.bar.classList.toggle("on", active);
    if (active) segment.row.setAttribute("aria-current", "true");
    else segment.row.removeAttribute("aria-current");
  }
  one("#now").replaceChildren(...on.map((segment) => {
    const chip = make("span", {}, `${classes[segment.label]} ${segment.score.toFixed(2)}`);
    setColour(chip, segment);
    return chip;
  }));
  if (on.length && !player.paused) keepVisible(on[0].row.parentElement);
}

function keepVisible(item) {
  // scrolls only the list; the page stays where the reader has put it
  const above = item.offsetTop - list.scrollTop, below = above + item.offsetHeight - list.clientHeight;
  if (above < 0) list.scrollTop += above;
  else if (below > 0) list.scrollTop += below;
}

function say(text) {
  one("#message").textContent = text;
  one("#message").hidden = !text;
}

function show(chosen) {
  video = chosen;
  at = 0;
  wanted = null;
  for (const button of document.querySelectorAll("#videos button")) {
    button.toggleAttribute("aria-current", false);
    if (button.dataset.id === video.id) button.setAttribute("aria-current", "true");
  }
  one("#name").textContent = video.id;
  say(video.problems.length ? `${video.failed ? "This video could not be read" : "Parts of this video could not be read"}: ${video.problems.join("; ")}` : video.source ? "" : "A browser cannot play a video from this place. Its segments are shown nevertheless.");
  player.hidden = !video.source;
  if (video.source) player.src = video.source;
  else {
    player.removeAttribute("src");
    player.load();
  }
  one("#found").hidden = one("#keys").hidden = timeline.hidden = video.failed;
  showSegments();
}

function step(direction) {
  // with tolerance, so that "previous" does not return to the segment that has just begun
  const next = direction > 0 ? segments.find((s) => s.start > at + 0.05) : segments.findLast((s) => s.start < at - 0.5);
  if (next) seek(next.start);
}

function follow() {
  at = player.currentTime;
  showTime();
  if (!player.paused) requestAnimationFrame(follow);
}

player.addEventListener("play", follow);
player.addEventListener("seeked", () => { if (wanted === null) follow(); });
player.addEventListener("loadedmetadata", () => { if (wanted !== null) seek(wanted); });
player.addEventListener("error", () => {
  if (!video.source) return;
  player.hidden = true;
  say("The browser cannot play this video: the file was moved, or has a format that browsers do not play. Its segments are shown nevertheless.");
});
slider.addEventListener("input", showSegments);
list.addEventListener("keydown", (event) => {
  const rows = segments.map((segment) => segment.row), place = rows.indexOf(document.activeElement);
  const target = { ArrowDown: place + 1, ArrowUp: place - 1, Home: 0, End: rows.length - 1 }[event.key];
  if (target === undefined || !rows[target]) return;
  event.preventDefault();
  rows[target].focus();
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, video")) return;
  const actions = {
    ArrowLeft: () => seek(at - STEP),
    ArrowRight: () => seek(at + STEP),
    n: () => step(1),
    p: () => step(-1),
  };
  if (!event.target.closest("button")) actions[" "] = () => (player.paused ? player.play().catch(() => {}) : player.pause());
  if (!actions[event.key] || video.failed) return;
  event.preventDefault();
  actions[event.key]();
});
one("#search").addEventListener("input", (event) => {
  const text = event.target.value.toLowerCase();
  for (const item of document.querySelectorAll("#videos li")) item.hidden = !item.textContent.toLowerCase().includes(text);
});
window.addEventListener("hashchange", () => showNamed());
window.addEventListener("resize", () => timeline.querySelector(".axis")?.replaceWith(axis()));

function named() {
  const text = location.hash.slice(1);
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // an address that was truncated within a character, or never escaped
  }
}

function showNamed() {
  const name = named();
  show(videos.find((candidate) => candidate.id === name) ?? videos.find((candidate) => !candidate.failed) ?? videos[0]);
}

const failed = videos.filter((candidate) => candidate.failed).length;
const through = videos.length - failed;
one("#summary").textContent = `${through} ${through === 1 ? "video" : "videos"}${failed ? `, ${failed} more failed` : ""}; detections that score at least ${threshold}`;
one("#videos").hidden = videos.length < 2;
one("#layout").classList.toggle("many", videos.length > 1);
slider.min = slider.value = threshold;
for (const candidate of videos) {
  const button = make("button", { type: "button" }, make("span", {}, candidate.id), make("span", {}, candidate.failed ? "failed" : String(candidate.found.length)));
  button.dataset.id = candidate.id;
  button.addEventListener("click", () => { location.hash = encodeURIComponent(candidate.id); });
  one("#videos ul").append(make("li", {}, button));
}
showNamed();
