// Runs once for the answer component (`element`); its content is replaced with every answer, so events are delegated.
let pinned = null;

function isolate(index) {
  element.classList.toggle("plum-isolating", index !== null);
  for (const part of element.querySelectorAll("[data-span]")) {
    part.classList.toggle("plum-on", part.dataset.span === index);
    if (part.role === "button") part.ariaPressed = String(part.dataset.span === pinned);
  }
}

function pin(index) {
  pinned = pinned === index ? null : index;
  isolate(pinned);
}

// The span whose mask is seen at a point of the picture: the last drawn one that is not transparent there.
function spanAt(event) {
  const stage = event.target.closest(".plum-stage");
  const box = stage.getBoundingClientRect();
  const masks = [...stage.querySelectorAll(".plum-mask")].reverse();
  const pixel = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  for (const mask of masks) {
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

element.addEventListener("mousemove", (event) => isolate(spanOf(event) ?? pinned));
element.addEventListener("mouseleave", () => isolate(pinned));
element.addEventListener("click", (event) => pin(spanOf(event)));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") pin(pinned);  // wherever the focus is: a click on the picture moves it away from here
});
element.addEventListener("keydown", (event) => {
  if (event.target.matches(".plum-span") && (event.key === "Enter" || event.key === " ")) {
    event.preventDefault();
    pin(event.target.dataset.span);
  }
});
watch("value", () => { pinned = null; element.classList.remove("plum-isolating"); });

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
