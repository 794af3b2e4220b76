// Runs once for the answer component (`element`); its content is replaced with every answer, so events are delegated.
let pinned = null;
let edit = null; // the mask that is being corrected: {start, pressed, strokes, ...}
let tool = "click"; // of the correction: "click", for points and boxes, or "brush"
let adds = true; // whether it adds to the mask or takes away
let following = false; // an answer is being written and is kept in view: on a narrow page it is below the question

const masks = () => [...element.querySelectorAll(".plum-mask")];
const pad = () => element.querySelector(".plum-pad"); // the canvas over the picture

function isolate(index) {
  if (edit) return;
  element.classList.toggle("plum-isolating", index !== null);
  for (const part of element.querySelectorAll("[data-span]")) {
    part.classList.toggle("plum-on", part.dataset.span === index);
    if (part.role === "button") part.ariaPressed = String(part.dataset.span === pinned);
  }
}

function pin(index) {
  if (edit) return;
  pinned = pinned === index ? null : index;
  isolate(pinned);
  const button = element.querySelector("[data-do=correct]");
  if (button) button.disabled = pinned === null;
}

// The span whose mask is seen at a point of the picture: the last drawn one that is not transparent there.
function spanAt(event) {
  const box = event.target.closest(".plum-stage").getBoundingClientRect();
  const pixel = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  for (const mask of masks().reverse()) {
    const x = ((event.clientX - box.left) / box.width) * mask.naturalWidth;
    const y = ((event.clientY - box.top) / box.height) * mask.naturalHeight;
    pixel.clearRect(0, 0, 1, 1);
    pixel.drawImage(mask, -Math.floor(x), -Math.floor(y));
    if (pixel.getImageData(0, 0, 1, 1).data[3]) return mask.dataset.span;
  }
  return null;
}

function spanOf(event) {
  const span = event.target.closest(".plum-span");
  if (span) return span.dataset.span;
  return event.target.closest(".plum-stage") ? spanAt(event) : null;
}

// ---------------------------------------------------------------- the correction of a mask

function startCorrecting() {
  const { start } = element.querySelector(`.plum-span[data-span="${pinned}"]`).dataset;
  edit = { start: Number(start), cross: [0.5, 0.5], pressed: null, band: null };
  const clicked = element.querySelector(`.plum-clicked[data-start="${start}"]`);
  element.querySelector("[data-do=undo-click]").disabled = !clicked;
  choose(tool, adds);
}

// After a click the same mask is open for the next one, which may have begun before this answer came.
function continueCorrecting({ start, cross, pressed, focus }) {
  const span = element.querySelector(`.plum-span[data-start="${start}"]`);
  if (!span) return;
  pin(span.dataset.span);
  startCorrecting();
  Object.assign(edit, { cross, pressed });
  if (focus) element.querySelector(focus).focus({ preventScroll: true });
  if (focus === ".plum-pad") addMark("plum-cross", "+", cross);
}

function stopCorrecting() {
  edit = null;
  element.classList.remove("plum-clicking", "plum-brushing");
  for (const mark of element.querySelectorAll(".plum-pending")) mark.remove();
}

function choose(newTool, newAdds) {
  tool = newTool;
  adds = newAdds;
  element.classList.toggle("plum-clicking", tool === "click");
  element.classList.toggle("plum-brushing", tool === "brush");
  const pressed = { click: tool === "click", brush: tool === "brush", add: adds, take: !adds };
  for (const [name, value] of Object.entries(pressed)) {
    element.querySelector(`.plum-correction [data-do=${name}]`).ariaPressed = String(value);
  }
  if (tool === "brush") takeBrush();
  else pad().getContext("2d").clearRect(0, 0, pad().width, pad().height);
}

// The place of the pointer on the picture, 0 to 1 in both directions.
function placeOf(event) {
  const box = pad().getBoundingClientRect();
  const parts = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  return parts.map((part) => Math.min(Math.max(part, 0), 1));
}

// ---------------------------------------------------------------- clicks and boxes

const FURTHEST_CLICK = 10; // screen pixels between press and release; more is a box

// Puts a mark on the picture until the next answer, which has marks of its own (pages.py).
function addMark(kind, sign, from, to = from) {
  const mark = document.createElement("span");
  mark.className = `plum-mark plum-on plum-pending ${kind}`;
  mark.textContent = sign;
  placeMark(mark, from, to);
  pad().after(mark);
  return mark;
}

function placeMark(mark, from, to = from) {
  const [left, top] = from.map((part, axis) => Math.min(part, to[axis]));
  const [width, height] = from.map((part, axis) => Math.abs(part - to[axis]));
  for (const [name, part] of Object.entries({ left, top, width, height })) mark.style[name] = `${100 * part}%`;
}

// The size of the image itself, in whose pixels points and boxes are sent.
function sizeOfImage() {
  const { width, height } = pad().closest(".plum-stage").dataset;
  return [Number(width), Number(height)];
}

function sendPoint(place, isAdded) {
  const point = sizeOfImage().map((size, axis) => Math.min(Math.floor(place[axis] * size), size - 1));
  addMark(`plum-point ${isAdded ? "" : "plum-less"}`, isAdded ? "+" : "\u2212", place);
  trigger("edit", { start: edit.start, point, label: isAdded ? 1 : 0 });
}

function sendBox(from, to) {
  const size = sizeOfImage();
  const low = size.map((side, axis) => Math.min(Math.floor(Math.min(from[axis], to[axis]) * side), side - 1));
  const high = size.map((side, axis) => Math.max(Math.ceil(Math.max(from[axis], to[axis]) * side), low[axis] + 1));
  trigger("edit", { start: edit.start, box: [...low, ...high] });
}

function drag(event) {
  const [dx, dy] = [event.clientX - edit.pressed.clientX, event.clientY - edit.pressed.clientY];
  if (Math.hypot(dx, dy) > FURTHEST_CLICK) edit.band ??= addMark("plum-box", "", placeOf(edit.pressed));
  if (edit.band) placeMark(edit.band, placeOf(edit.pressed), placeOf(event));
}

function release(event) {
  drag(event);
  if (edit.band) sendBox(placeOf(edit.pressed), placeOf(event));
  else sendPoint(placeOf(event), adds && !event.shiftKey);
  edit.band = null; // its mark stays until the answer
}

// The arrow keys move a cross over the picture; Enter clicks at it.
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function pressKey(event) {
  if (event.key in ARROWS) {
    edit.cross = edit.cross.map((part, axis) => Math.min(Math.max(part + 0.02 * ARROWS[event.key][axis], 0), 1));
    element.querySelector(".plum-cross")?.remove();
    addMark("plum-cross", "+", edit.cross);
  } else if (event.key === "Enter") {
    edit.focus = ".plum-pad";
    sendPoint(edit.cross, adds && !event.shiftKey);
  } else {
    return;
  }
  event.preventDefault();
}

// ---------------------------------------------------------------- the brush

function takeBrush() {
  if (!edit.ink) {
    const mask = masks().find((candidate) => candidate.dataset.span === pinned);
    const colour = element.querySelector(`.plum-span[data-span="${pinned}"]`).style.getPropertyValue("--colour").trim();
    const ink = pixelsOf(mask, false).getContext("2d", { willReadFrequently: true });
    Object.assign(edit, { ink, edge: pixelsOf(mask, true), colour: `${colour}99`, strokes: [] });
  }
  showInk();
}

// Shows what is painted, translucent, under the edge that the mask had before.
function showInk() {
  const { ink, edge, colour } = edit;
  const { width, height } = pad();
  const context = pad().getContext("2d");
  context.clearRect(0, 0, width, height);
  context.globalCompositeOperation = "source-over";
  context.drawImage(ink.canvas, 0, 0);
  context.globalCompositeOperation = "source-in";
  context.fillStyle = colour;
  context.fillRect(0, 0, width, height);
  context.globalCompositeOperation = "source-over";
  context.drawImage(edge, 0, 0);
}

// The pixels of a mask: all of them as ink, or those of its edge in white.
function pixelsOf(mask, isEdge) {
  const canvas = new OffscreenCanvas(mask.naturalWidth, mask.naturalHeight);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(mask, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let at = 0; at < pixels.data.length; at += 4) {
    const kept = isEdge ? pixels.data[at + 3] === 255 : pixels.data[at + 3] > 0;
    pixels.data.set([255, 255, 255, kept ? 255 : 0], at);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

function pointOf(event) {
  const box = pad().getBoundingClientRect();
  const scale = pad().width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
}

function startStroke(event) {
  edit.strokes.push(edit.ink.getImageData(0, 0, pad().width, pad().height));
  if (edit.strokes.length > 20) edit.strokes.shift();
  edit.last = pointOf(event);
  stroke(event);
}

function stroke(event) {
  const { ink } = edit;
  const to = pointOf(event);
  ink.globalCompositeOperation = adds ? "source-over" : "destination-out";
  ink.lineCap = ink.lineJoin = "round";
  ink.strokeStyle = "#fff";
  ink.lineWidth = (Number(element.querySelector(".plum-size").value) * pad().width) / 640;
  ink.beginPath();
  ink.moveTo(...edit.last);
  ink.lineTo(to[0] + 0.01, to[1]); // a line of no length would draw nothing where the pointer is only pressed
  ink.stroke();
  edit.last = to;
  showInk();
}

function undoStroke() {
  const before = edit.strokes.pop();
  if (before) edit.ink.putImageData(before, 0, 0);
  showInk();
}

async function useMask() {
  const { ink, start } = edit;
  const file = await ink.canvas.convertToBlob({ type: "image/png" });
  const reader = new FileReader();
  reader.onload = () => {
    stopCorrecting();
    trigger("apply", { start, mask: reader.result });
  };
  reader.readAsDataURL(file);
}

const DOES = {
  correct: () => {
    [tool, adds] = ["click", true];
    startCorrecting();
    element.querySelector("[data-do=click]").focus();
  },
  click: () => choose("click", adds),
  brush: () => choose("brush", adds),
  add: () => choose(tool, true),
  take: () => choose(tool, false),
  "undo-click": () => {
    edit.focus = "[data-do=undo-click]";
    trigger("undo");
  },
  "undo-stroke": undoStroke,
  use: useMask,
  done: stopCorrecting,
  undo: () => trigger("undo"),
  before: (button) => {
    button.ariaPressed = String(element.classList.toggle("plum-before"));
  },
};

element.addEventListener("pointerdown", (event) => {
  if (!edit || !event.isPrimary || event.target !== pad() || event.button) return;
  event.preventDefault();
  pad().setPointerCapture(event.pointerId);
  [edit.pressed, edit.focus] = [event, null];
  if (tool === "brush") startStroke(event);
});
// On the document: an answer that comes while the pointer is pressed replaces the canvas.
document.addEventListener("pointermove", (event) => {
  if (event.pointerId !== edit?.pressed?.pointerId) return;
  if (tool === "brush") stroke(event);
  else drag(event);
});
document.addEventListener("pointerup", (event) => {
  if (event.pointerId !== edit?.pressed?.pointerId) return;
  if (tool === "click") release(event);
  edit.pressed = null;
});
document.addEventListener("pointercancel", (event) => {
  if (event.pointerId !== edit?.pressed?.pointerId) return;
  edit.band?.remove();
  edit.band = edit.pressed = null;
});

// ---------------------------------------------------------------- pointer and keyboard

element.addEventListener("mousemove", (event) => isolate(spanOf(event) ?? pinned));
element.addEventListener("mouseleave", () => isolate(pinned));
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  if (button) DOES[button.dataset.do](button);
  else if (event.target.closest(".plum-stage, .plum-answer")) pin(spanOf(event));
});
document.addEventListener("keydown", (event) => {
  // wherever the focus is: a click on the picture moves it away from here
  if (event.key !== "Escape") return;
  if (edit && tool === "click") stopCorrecting();
  else pin(pinned);
});
element.addEventListener("keydown", (event) => {
  if (event.target.matches(".plum-span") && (event.key === "Enter" || event.key === " ")) {
    event.preventDefault();
    pin(event.target.dataset.span);
  } else if (edit && tool === "click" && event.target === pad()) {
    pressKey(event);
  }
});
// Enter asks, Shift+Enter begins a new line; gradio's text boxes of several lines do it the other way round.
document.addEventListener(
  "keydown",
  (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    if (!event.target.closest?.("#question")) return;
    event.preventDefault();
    document.querySelector("#ask").click();
  },
  true,
);
document.addEventListener(
  "keypress",
  (event) => {
    if (event.key === "Enter" && event.target.closest?.("#question")) event.stopPropagation();
  },
  true,
);
watch("value", () => {
  const last = tool === "click" ? edit : null;
  pinned = null;
  stopCorrecting();
  element.classList.remove("plum-isolating", "plum-before");
  if (last) continueCorrecting(last);
  following ||= element.querySelector(".plum-begun") !== null;
  if (following && innerWidth < 768) {
    const images = [...element.querySelectorAll("img")].map((image) => image.decode());
    Promise.allSettled(images).then(() => element.scrollIntoView({ block: "start" }));
  }
  following &&= element.querySelector("[aria-busy]") !== null;
});
for (const own of ["wheel", "touchmove"]) {
  document.addEventListener(own, () => (following = false), { passive: true });
}

// Words that are selected in the answer, in characters (code points, as Python counts them).
let waiting;
document.addEventListener("selectionchange", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    const selection = document.getSelection();
    const answer = element.querySelector(".plum-answer:not([aria-busy])");
    if (!answer || selection.isCollapsed || !selection.rangeCount) return;
    const range = selection.getRangeAt(0);
    if (!answer.contains(range.startContainer) || !answer.contains(range.endContainer)) return;
    const before = document.createRange();
    before.setStart(answer, 0);
    before.setEnd(range.startContainer, range.startOffset);
    const start = [...before.toString()].length;
    trigger("select", { start, end: start + [...range.toString()].length });
  }, 300);
});
