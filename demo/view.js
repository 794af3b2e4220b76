// Runs once for the answer component (`element`); its content is replaced with every answer, so events are delegated.
let pinned = null;
let brush = null; // while a mask is being painted on
let following = false; // an answer is being written and is kept in view: on a narrow page it is below the question

const masks = () => [...element.querySelectorAll(".plum-mask")];

function isolate(index) {
  if (brush) return;
  element.classList.toggle("plum-isolating", index !== null);
  for (const part of element.querySelectorAll("[data-span]")) {
    part.classList.toggle("plum-on", part.dataset.span === index);
    if (part.role === "button") part.ariaPressed = String(part.dataset.span === pinned);
  }
}

function pin(index) {
  if (brush) return;
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

// ---------------------------------------------------------------- the brush

// Shows what is painted, translucent, under the edge that the mask had before.
function showInk() {
  const { canvas, ink, edge, colour } = brush;
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.globalCompositeOperation = "source-over";
  context.drawImage(ink.canvas, 0, 0);
  context.globalCompositeOperation = "source-in";
  context.fillStyle = colour;
  context.fillRect(0, 0, canvas.width, canvas.height);
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

function startPainting() {
  const mask = masks().find((candidate) => candidate.dataset.span === pinned);
  const canvas = element.querySelector(".plum-brush");
  canvas.width = mask.naturalWidth;
  canvas.height = mask.naturalHeight;
  const ink = pixelsOf(mask, false).getContext("2d", { willReadFrequently: true });
  const colour = element.querySelector(`.plum-span[data-span="${pinned}"]`).style.getPropertyValue("--colour");
  brush = { canvas, ink, edge: pixelsOf(mask, true), colour: `${colour.trim()}99`, index: Number(pinned), strokes: [] };
  choose("paint");
  element.classList.add("plum-painting");
  showInk();
  element.querySelector("[data-do=paint]").focus();
}

function stopPainting() {
  brush = null;
  element.classList.remove("plum-painting");
}

function choose(tool) {
  brush.tool = tool;
  for (const button of element.querySelectorAll("[data-do=paint], [data-do=erase]")) {
    button.ariaPressed = String(button.dataset.do === tool);
  }
}

function pointOf(event) {
  const box = brush.canvas.getBoundingClientRect();
  const scale = brush.canvas.width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
}

function stroke(event) {
  const { ink, canvas } = brush;
  const to = pointOf(event);
  ink.globalCompositeOperation = brush.tool === "erase" ? "destination-out" : "source-over";
  ink.lineCap = ink.lineJoin = "round";
  ink.strokeStyle = "#fff";
  ink.lineWidth = (Number(element.querySelector(".plum-size").value) * canvas.width) / 640;
  ink.beginPath();
  ink.moveTo(...brush.last);
  ink.lineTo(to[0] + 0.01, to[1]); // a line of no length would draw nothing where the pointer is only pressed
  ink.stroke();
  brush.last = to;
  showInk();
}

function undoStroke() {
  const before = brush.strokes.pop();
  if (before) brush.ink.putImageData(before, 0, 0);
  showInk();
}

async function useMask() {
  const { ink, index } = brush;
  const file = await ink.canvas.convertToBlob({ type: "image/png" });
  const reader = new FileReader();
  reader.onload = () => {
    stopPainting();
    trigger("apply", { index, mask: reader.result });
  };
  reader.readAsDataURL(file);
}

const DOES = {
  correct: startPainting,
  paint: () => choose("paint"),
  erase: () => choose("erase"),
  "undo-stroke": undoStroke,
  use: useMask,
  cancel: stopPainting,
  undo: () => trigger("undo"),
  before: (button) => {
    button.ariaPressed = String(element.classList.toggle("plum-before"));
  },
};

element.addEventListener("pointerdown", (event) => {
  if (!brush || event.target !== brush.canvas || event.button) return;
  event.preventDefault();
  brush.canvas.setPointerCapture(event.pointerId);
  brush.strokes.push(brush.ink.getImageData(0, 0, brush.canvas.width, brush.canvas.height));
  if (brush.strokes.length > 20) brush.strokes.shift();
  brush.last = pointOf(event);
  brush.down = true;
  stroke(event);
});
element.addEventListener("pointermove", (event) => {
  if (brush?.down) stroke(event);
});
for (const end of ["pointerup", "pointercancel"]) {
  element.addEventListener(end, () => {
    if (brush) brush.down = false;
  });
}

// ---------------------------------------------------------------- pointer and keyboard

element.addEventListener("mousemove", (event) => isolate(spanOf(event) ?? pinned));
element.addEventListener("mouseleave", () => isolate(pinned));
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  if (button) DOES[button.dataset.do](button);
  else if (event.target.closest(".plum-stage, .plum-answer")) pin(spanOf(event));
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") pin(pinned); // wherever the focus is: a click on the picture moves it away from here
});
element.addEventListener("keydown", (event) => {
  if (event.target.matches(".plum-span") && (event.key === "Enter" || event.key === " ")) {
    event.preventDefault();
    pin(event.target.dataset.span);
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
  pinned = null;
  stopPainting();
  element.classList.remove("plum-isolating", "plum-before");
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
