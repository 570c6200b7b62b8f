// Keyboard: the page says what its keys do; fields keep their own, but esc always leaves them.

let actions = {};

export function setKeys(next) {
  actions = next;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const field = event.target.closest?.("input, select, textarea");
  if (document.querySelector("#layer dialog[open]")) return;
  if (field) {
    if (event.key === "Escape") {
      if (field.value && field.type === "search") {
        field.value = "";
        field.dispatchEvent(new Event("input", { bubbles: true }));
      }
      field.blur();
      event.preventDefault();
    }
    if (event.key !== "Enter" || field.type !== "search") return;
  }
  // A focused link or button answers to Enter itself.
  if (event.key === "Enter" && event.target.closest?.("a, button")) return;
  const act = actions[event.key];
  if (!act) return;
  if (act(event) !== false) event.preventDefault();
});
